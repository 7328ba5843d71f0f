"""Attention over packed sequences: bidirectional, causal or windowed, grouped-query, with dropout on the probabilities.

For row i of a sequence, over the keys j that it sees::

    s_ij = softcap * tanh(scale * <q_i, k_j> / softcap)          (without softcap: scale * <q_i, k_j>)
    p_ij = exp(s_ij - lse_i),   lse_i = log sum_j exp(s_ij)
    o_i  = sum_j keep_ij / (1 - dropout_p) * p_ij * v_j          (keep: kernels/dropout.py)

    d p_ij = keep_ij / (1 - dropout_p) * <do_i, v_j>,   d s_ij = p_ij * (d p_ij - sum_j p_ij d p_ij)

A sequence of L tokens costs 2 L^2 H Dh multiply-adds forward and 4 backward, 5 where the scores are computed again.
Saved for the backward: q, k, v, and either the output with its lse (fused kernel, long sequences in Triton), or the
lse alone (short ones), or the probabilities of short sequences, or nothing more.

The torch backend is in ``kernels/attention_torch.py``, the Triton backend in ``kernels/attention_triton.py``, with its
kernels in ``attention_short.py``, ``attention_long.py`` and ``attention_long_backward.py``.

Source: Vaswani et al., "Attention is all you need" (2017); Ainslie et al., "GQA" (2023); Dao et al., "FlashAttention"
(2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from bivec.kernels.attention_layout import Layout, LengthGroups, Options, build_layout, hidden_keys, length_groups
from bivec.kernels.attention_torch import explicit_attention, fused_attention, prefers_explicit
from bivec.kernels.backend import BackendError, check_triton_dtypes, checks_values, resolve
from bivec.kernels.dropout import attention_keep_mask, check_dropout, seed_tensor


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What the attention layers of one batch share; made by :func:`attention_plan`."""

    cu_seqlens: Tensor  # [B+1] int32
    max_seqlen: int  # the upper bound the caller gave
    starts: Tensor  # [B+1] int32: running sum of the lengths, longest sequence first
    order: Tensor  # [B] int32: the sequences in that order
    _layouts: dict[tuple[int, int], Layout] = field(default_factory=dict, repr=False)
    _hidden: dict[tuple[bool, tuple[int, int] | None], dict[int, Tensor | None]] = field(
        default_factory=dict, repr=False
    )

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """[B]; read on the host, which stalls a GPU."""
        return tuple(end - start for start, end in pairwise(self.cu_seqlens.tolist()))

    @cached_property
    def groups(self) -> LengthGroups:
        """The sequences by length, for the torch backend."""
        return length_groups(self.lengths, self.cu_seqlens.device)

    def layout(self, heads: int, kv_heads: int) -> Layout:
        """The row order of the explicit path, built at the first layer that asks."""
        if (heads, kv_heads) not in self._layouts:
            self._layouts[heads, kv_heads] = build_layout(self.groups, heads, kv_heads)
        return self._layouts[heads, kv_heads]

    def hidden(self, causal: bool, window: tuple[int, int] | None) -> dict[int, Tensor | None]:
        """For every length of the batch, ``[L, L]`` bool, True where a row does not see the key; None = it sees all."""
        if (causal, window) not in self._hidden:
            device = self.cu_seqlens.device
            lengths = [length for length, _ in self.groups.sizes]
            self._hidden[causal, window] = {n: hidden_keys(n, causal, window, device) for n in lengths}
        return self._hidden[causal, window]


def attention_plan(cu_seqlens: Tensor, max_seqlen: int) -> AttentionPlan:
    """Prepares a batch for :func:`flash_attention`: once a batch, shared by all layers. Does not stall a GPU.

    Args:
        cu_seqlens: ``[B+1]`` int32, starts at 0 and ends at T; sequence b is its tokens
            ``cu_seqlens[b]:cu_seqlens[b+1]``.
        max_seqlen: upper bound of the sequence lengths; nothing is allocated by it.

    Returns:
        The plan, on the device of ``cu_seqlens``.

    Raises:
        ValueError: ``cu_seqlens`` is not an int32 vector. On a CPU, or with ``BIVEC_CHECK=1``, also: it does not start
            at 0, it decreases, or a sequence is longer than ``max_seqlen``.
    """
    op = "attention_plan"
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{op}: cu_seqlens must be an int32 vector [B+1], got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if checks_values(cu_seqlens.device):
        _check_bounds(cu_seqlens.tolist(), max_seqlen)
    lengths, order = cu_seqlens.diff().sort(descending=True, stable=True)
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return AttentionPlan(cu_seqlens, max_seqlen, starts, order.int())


def _check_bounds(bounds: list[int], max_seqlen: int) -> None:
    op = "attention_plan"
    lengths = [end - start for start, end in pairwise(bounds)]
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if bounds[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0, got {bounds[0]}")
    if shortest < 0:
        b = lengths.index(shortest)
        raise ValueError(f"{op}: cu_seqlens must not decrease, but goes from {bounds[b]} to {bounds[b + 1]} at {b + 1}")
    if longest > max_seqlen:
        raise ValueError(f"{op}: max_seqlen={max_seqlen} is below the longest sequence, {longest} tokens in cu_seqlens")


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    plan: AttentionPlan | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    plan: AttentionPlan | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    plan: AttentionPlan | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every sequence of a packed batch to itself.

    Args:
        q: ``[T, H, Dh]`` queries of all sequences, one after the other.
        k: ``[T, Hkv, Dh]`` keys; Hkv divides H, and query head h reads kv head ``h // (H // Hkv)``.
        v: ``[T, Hkv, Dh]`` values.
        cu_seqlens: ``[B+1]`` int32, starts at 0 and ends at T; sequence b is its tokens
            ``cu_seqlens[b]:cu_seqlens[b+1]`` and may be empty.
        max_seqlen: upper bound of the sequence lengths; nothing is allocated by it.
        causal: row i sees the keys up to i only.
        window: ``(left, right)``: row i sees the keys ``i-left … i+right`` inclusive; -1 = unbounded.
        softmax_scale: factor of the scores; None = ``1 / sqrt(Dh)``.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None = left alone.
        dropout_p: probability of dropping an attention probability, at least 0 and below 1.
        seed: an int, or an int64 tensor of one element on q's device; layer and site are folded in by the
            caller (``fold_seed``).
        sample_ids: ``[B]`` int64, what the dropout mask of a sequence is keyed by; None = 0 … B-1.
        plan: ``attention_plan(cu_seqlens, max_seqlen)`` of this batch, shared by its layers; None = made here.
        return_lse: return the log-sum-exp of the scores too.
        backend: None, "torch" or "triton" (``kernels/backend.py``). None takes "triton" on a GPU whatever the dtype,
            and float64 is refused there.

    Returns:
        ``[T, H, Dh]`` in q's dtype; with ``return_lse`` also ``[H, T]`` fp32, natural logarithm, not differentiable.
        Every row sees at least its own key, so no row is without a sum; scores and statistics are fp32
        (float64 for float64, which only the torch backend takes).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The values of ``cu_seqlens`` are checked
            on a CPU, and on a GPU with ``BIVEC_CHECK=1``.
        BackendError: the backend cannot run on these tensors.

    Source: Vaswani et al., "Attention is all you need" (2017); the packed form is that of
        FlashAttention's varlen functions.

    Example:
        >>> cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
        >>> q, k, v = torch.randn(8, 4, 16), torch.randn(8, 2, 16), torch.randn(8, 2, 16)
        >>> flash_attention(q, k, v, cu_seqlens, max_seqlen=5).shape
        torch.Size([8, 4, 16])
    """
    _check_operands(q, k, v, cu_seqlens)
    _check_bound(max_seqlen)
    _check_options(window, softcap)
    check_dropout(dropout_p, seed, "flash_attention")
    chosen = resolve(backend, "flash_attention", q.device)
    if plan is None:
        plan = attention_plan(cu_seqlens, max_seqlen)
    _check_plan(plan, cu_seqlens, max_seqlen, q)
    if sample_ids is None and dropout_p > 0.0:
        sample_ids = torch.arange(plan.order.numel(), device=q.device)
    _check_keys(seed, sample_ids, plan.order.numel(), q.device)
    scale = softmax_scale if softmax_scale is not None else q.shape[-1] ** -0.5
    window = (window[0], window[1]) if window is not None else None  # a list would be no key of the plan's masks
    options = Options(scale, softcap, causal, window, dropout_p)
    if chosen == "triton":
        out, lse = _triton_attention(q, k, v, plan, max_seqlen, options, seed, sample_ids, return_lse)
    else:
        out, lse = _torch_attention(q, k, v, plan, options, seed, sample_ids, return_lse)
    return out if lse is None else (out, lse)


def _torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    options: Options,
    seed: int | Tensor | None,
    sample_ids: Tensor | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    hidden = plan.hidden(options.causal, options.window)
    heads, kv_heads = q.shape[1], k.shape[1]
    # without a backward both are as fast, and the choice, which falls by batch, would round a sequence differently
    graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    keep = graph and prefers_explicit(plan.groups, heads, kv_heads, q.shape[2])
    # The fused kernels of GPUs add up gradients in no fixed order; ours are bit-identical from run to run.
    plain = options.dropout_p == 0.0 and options.softcap is None and not want_lse
    if q.device.type == "cpu" and plain and not keep and q.shape[0]:
        return fused_attention(q, k, v, plan.groups, options, hidden), None
    layout = plan.layout(heads, kv_heads)
    return explicit_attention(
        q, k, v, layout, options, hidden, keep=keep, want_lse=want_lse, seed=seed, sample_ids=sample_ids
    )


def _triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    max_seqlen: int,
    options: Options,
    seed: int | Tensor | None,
    sample_ids: Tensor | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    from bivec.kernels import attention_triton  # triton is an optional dependency

    check_triton_dtypes("flash_attention", q=q)
    if q.shape[2] > attention_triton.MAX_HEAD_DIM:
        raise BackendError(
            f"flash_attention: the Triton kernels take head dims up to {attention_triton.MAX_HEAD_DIM}, got "
            f'{q.shape[2]}; use backend="torch"'
        )
    left, right = options.edges(max_seqlen)
    dropped = options.dropout_p > 0.0
    out, lse2 = attention_triton.attention_op(
        *(_with_int32_offsets(x) for x in (q, k, v)),
        plan.cu_seqlens.contiguous(),
        plan.starts,
        plan.order,
        attention_triton.length_bucket(max_seqlen),
        options.scale,
        options.softcap,
        left,
        right,
        options.dropout_p,
        seed_tensor(seed, q.device) if dropped and seed is not None else None,
        sample_ids.contiguous() if dropped and sample_ids is not None else None,
    )
    return out, lse2.detach() * math.log(2.0) if want_lse else None


def _with_int32_offsets(x: Tensor) -> Tensor:
    """``x``, copied if the heads of a token or the tokens of a tile are further apart than int32 reaches.

    The kernels use int64 from the start of the tensor to the first token of a tile, and int32 inside the tile.
    """
    far = x.shape[1] * x.stride(1) + 128 * x.stride(0) >= 2**31
    return x.contiguous() if far else x


def _check_operands(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    op = "flash_attention"
    for name, x in (("q", q), ("k", k), ("v", v), ("cu_seqlens", cu_seqlens)):
        if x.device != q.device:
            raise ValueError(f"{op}: {name} is on {x.device}, q on {q.device}; move it")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or 0 in x.shape[1:]:
            raise ValueError(f"{op}: {name} must have shape [tokens, heads, head_dim], got {tuple(x.shape)}")
        if not x.dtype.is_floating_point or x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must be floating point and of one dtype with q ({q.dtype}), got {x.dtype}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{op}: the last dimension of {name} must be contiguous, its stride is {x.stride(-1)}")
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"{op}: k must have q's tokens and head_dim, got k {tuple(k.shape)} and q {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"{op}: v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: the heads of q must be a multiple of those of k, got {q.shape[1]} and {k.shape[1]}")


def _check_bound(max_seqlen: object) -> None:
    if isinstance(max_seqlen, Tensor):
        message = "flash_attention: max_seqlen must be an int, got a tensor; reading it would stall a GPU"
        raise ValueError(message)  # noqa: TRY004 - as all that is wrong with an argument


def _check_options(window: tuple[int, int] | None, softcap: float | None) -> None:
    if window is not None and (len(window) != 2 or any(not isinstance(w, int) or w < -1 for w in window)):
        raise ValueError(f"flash_attention: window must be (left, right), each an int >= -1, got {window}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"flash_attention: softcap must be above 0, or None for no cap, got {softcap}")


def _check_plan(plan: AttentionPlan, cu_seqlens: Tensor, max_seqlen: int, q: Tensor) -> None:
    op = "flash_attention"
    checks = checks_values(q.device)
    if cu_seqlens is not plan.cu_seqlens:
        same = cu_seqlens.shape == plan.cu_seqlens.shape and cu_seqlens.device == plan.cu_seqlens.device
        if not same or (checks and not torch.equal(cu_seqlens, plan.cu_seqlens)):
            raise ValueError(f"{op}: plan was made from other cu_seqlens; make one with attention_plan for every batch")
    if checks:
        longest, total = max(plan.lengths, default=0), sum(plan.lengths)
        if longest > max_seqlen:
            raise ValueError(f"{op}: max_seqlen={max_seqlen} is below the longest sequence, {longest} tokens")
        if total != q.shape[0]:
            raise ValueError(f"{op}: cu_seqlens must end at the number of tokens, q has {q.shape[0]}, got {total}")


def _check_keys(seed: int | Tensor | None, sample_ids: Tensor | None, sequences: int, device: torch.device) -> None:
    op = "flash_attention"
    if isinstance(seed, Tensor) and seed.device != device:
        raise ValueError(f"{op}: seed is on {seed.device}, q on {device}; move it")
    if sample_ids is None:
        return
    if sample_ids.dtype != torch.int64 or sample_ids.shape != (sequences,) or sample_ids.device != device:
        raise ValueError(
            f"{op}: sample_ids must be int64 of shape ({sequences},) on {device}, one id a sequence, "
            f"got {sample_ids.dtype} of shape {tuple(sample_ids.shape)} on {sample_ids.device}"
        )


def attention_dropout_mask(
    seed: int | Tensor, cu_seqlens: Tensor, num_heads: int, dropout_p: float, sample_ids: Tensor | None = None
) -> list[Tensor]:
    """The keep masks that :func:`flash_attention` draws: for tests, and for looking at them.

    Args:
        seed: as given to ``flash_attention``.
        cu_seqlens: ``[B+1]`` int32.
        num_heads: H, the query heads.
        dropout_p: probability of dropping, at least 0 and below 1.
        sample_ids: ``[B]`` int64; None = 0 … B-1.

    Returns:
        For every sequence ``[H, L, L]`` bool (head, row, column), True = kept, on the device of ``cu_seqlens``.

    Raises:
        ValueError: ``dropout_p`` out of range, or no usable seed.
    """
    lengths = cu_seqlens.diff().tolist()
    ids = sample_ids.tolist() if sample_ids is not None else range(len(lengths))
    return [
        attention_keep_mask(seed, sample_id, num_heads, length, dropout_p, cu_seqlens.device)
        for sample_id, length in zip(ids, lengths, strict=True)
    ]
