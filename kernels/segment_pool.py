"""Pooling of token states over spans: one vector a span.

    out_s = sum_{t in [start_s, end_s)} w_{s,t} hidden_t

    mean            w = 1 / n                          weighted_mean   w = 2 k / (n (n + 1)), k = 1 … n inside the span
    first, last     w = 1 at one token                 empty span      out = 0

Algorithm. The spans become a flat list of (token, weight) slots, grouped by span; one gather-and-sum (an embedding bag,
which reads each row once and copies nothing) forms the output. The backward is the same with the list sorted by token:
every token sums its spans in a fixed order, so overlapping spans need no atomics and runs repeat bit for bit. ``first``
and ``last`` are spans of one token. Sums are fp32 (fp64 for fp64).

Saved for backward: the slot list (span, token, weight), 20 bytes a slot (24 in fp64); no activation. Memory beyond
input and output: the slots, and for half-precision input one fp32 copy. FLOPs: 2 D a slot in either direction.

This is the torch backend; ``kernels/segment_pool_triton.py`` needs no slots, and no copy.

Source: mean and EOS pooling as in LLM2Vec (arXiv:2404.05961, section 3.2); weighted mean as in SGPT (Muennighoff 2022,
arXiv:2202.08904).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.backend import check_triton_dtypes, checks_values, resolve

MODES = ("mean", "weighted_mean", "first", "last")


def _slots(starts: Tensor, ends: Tensor, mode: str, num_slots: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists the spans' tokens: span [P], token [P] and fp64 weight [P] of each slot, first slot of each span [S]."""
    lengths = ends - starts
    if mode in ("first", "last"):  # exactly one slot a span keeps P known without asking the device; empty ones weigh 0
        spans = torch.arange(starts.shape[0], device=starts.device)
        tokens = starts if mode == "first" else ends - 1
        return spans, tokens, (lengths > 0).double(), spans
    first = lengths.cumsum(0) - lengths  # [S]
    num_slots = int(lengths.sum()) if num_slots is None else num_slots
    spans = torch.arange(starts.shape[0], device=starts.device).repeat_interleave(lengths, output_size=num_slots)
    rank = torch.arange(num_slots, device=starts.device) - first[spans]  # [P] 0 … n-1 inside the span
    n = lengths[spans].double()
    weights = n.reciprocal() if mode == "mean" else 2.0 * (rank + 1) / (n * (n + 1))
    return spans, starts[spans] + rank, weights, first


def _bag(rows: Tensor, index: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Weighted sums of ``rows[index]`` between consecutive ``offsets``, accumulated in fp32 or fp64."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if index.shape[0] == 0 or rows.shape[0] == 0:
        return rows.new_zeros(offsets.shape[0], rows.shape[1])
    rows = rows.to(dtype).contiguous()
    return F.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights.to(dtype))


class _SegmentPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, starts: Tensor, ends: Tensor, mode: str, num_slots: int | None) -> Tensor:
        spans, tokens, weights, first = _slots(starts, ends, mode, num_slots)
        tokens = tokens.clamp(0, max(hidden.shape[0] - 1, 0))  # an empty span may sit at either end of the batch
        pooled = _bag(hidden, tokens, weights, first)
        ctx.save_for_backward(spans, tokens, weights)
        ctx.num_tokens, ctx.dtype = hidden.shape[0], hidden.dtype
        return pooled.masked_fill_((ends == starts)[:, None], 0.0).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spans, tokens, weights = ctx.saved_tensors
        tokens, order = tokens.sort(stable=True)
        offsets = torch.searchsorted(tokens, torch.arange(ctx.num_tokens, device=tokens.device))  # [T]
        return _bag(grad, spans[order], weights[order], offsets).to(ctx.dtype), None, None, None, None


def _check(hidden: Tensor, cu_seqlens: Tensor, mode: str, spans: dict[str, Tensor | None]) -> None:
    name = "segment_pool"
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"{name}: hidden must be [T, D] floating point; got {tuple(hidden.shape)} {hidden.dtype}")
    if mode not in MODES:
        raise ValueError(f"{name}: mode must be one of {', '.join(MODES)}; got {mode!r}")
    given = {label: tensor for label, tensor in spans.items() if tensor is not None}
    if len(given) == 1:
        raise ValueError(f"{name}: span_starts and span_ends come together; only one was given")
    for label, tensor in {"cu_seqlens": cu_seqlens, **given}.items():
        if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: {label} must be 1-D int32 or int64; got {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, hidden on {hidden.device}; move them together")
    if len({tensor.shape for tensor in given.values()}) > 1:
        starts, ends = given.values()
        raise ValueError(f"{name}: {starts.shape[0]} span_starts but {ends.shape[0]} span_ends; one pair a span")
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name}: cu_seqlens must be [B + 1] offsets beginning with 0; it is empty")


def _check_values(cu_seqlens: Tensor, starts: Tensor, ends: Tensor, num_tokens: int) -> None:
    name = "segment_pool"
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"{name}: cu_seqlens must rise from 0 to T={num_tokens}; it goes from {int(cu_seqlens[0])} to "
            f"{int(cu_seqlens[-1])}{'' if bool((cu_seqlens.diff() >= 0).all()) else ' and falls in between'}"
        )
    bad = ((starts < 0) | (ends < starts) | (ends > num_tokens)).nonzero()
    if bad.numel():
        s = int(bad[0])
        raise ValueError(
            f"{name}: span {s} is [{int(starts[s])}, {int(ends[s])}); spans need 0 <= start <= end <= T={num_tokens}"
        )


def segment_pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    *,
    mode: str = "mean",
    span_starts: Tensor | None = None,
    span_ends: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pools token states over spans of a packed batch; differentiable in ``hidden``.

    Args:
        hidden: [T, D] token states; fp16, bf16, fp32 or fp64.
        cu_seqlens: [B + 1] int32 or int64, the sequences' offsets, from 0 to T.
        mode: "mean", "weighted_mean" (weights 1 … n inside the span, normalised), "first" or "last" token.
        span_starts: [S] int32 or int64, absolute positions in T; None = one span a sequence.
        span_ends: [S], exclusive. Spans may overlap, repeat, leave tokens out and be of any number. On a GPU explicit
            spans cost no synchronisation with the Triton backend; with the torch backend those of the mean modes cost
            one (the total of their lengths).
        backend: None, "torch" or "triton" (fp16, bf16 and fp32).

    Returns:
        [S, D] in hidden's dtype, accumulated in fp32 (fp64 for fp64); zeros for an empty span.

    Raises:
        ValueError: wrong shapes, dtypes or mode; on CPU tensors, and with BIVEC_CHECK=1, also offsets or spans that do
            not fit T.
        BackendError: the backend cannot be used here, or not with these dtypes.

    Source:
        LLM2Vec (arXiv:2404.05961), section 3.2; weighted mean: SGPT (arXiv:2202.08904).
    """
    chosen = resolve(backend, "segment_pool", hidden.device)
    _check(hidden, cu_seqlens, mode, {"span_starts": span_starts, "span_ends": span_ends})
    in_sequences = span_starts is None
    starts = cu_seqlens[:-1] if span_starts is None else span_starts
    ends = cu_seqlens[1:] if span_ends is None else span_ends
    if checks_values(hidden.device):
        _check_values(cu_seqlens, starts, ends, hidden.shape[0])
    if chosen == "triton":
        from bivec.kernels import segment_pool_triton  # triton is an optional dependency

        check_triton_dtypes("segment_pool", hidden=hidden)
        return segment_pool_triton.pool(hidden, starts, ends, mode, in_order=in_sequences)
    num_slots = hidden.shape[0] if in_sequences else None
    pooled: Tensor = _SegmentPool.apply(hidden, starts.long(), ends.long(), mode, num_slots)
    return pooled
