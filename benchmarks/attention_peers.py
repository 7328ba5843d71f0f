"""The attentions that benchmarks/attention.py compares, each behind the same call, and the reference they must meet."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bivec.kernels import attention_plan, flash_attention

SEED = 17
LARGEST_SCORES = 2**29  # elements; our torch backend, the reference with dropout, holds several such fp32 tensors


@dataclass(frozen=True, eq=False)
class Work:
    """One batch."""

    q: Tensor  # [T, H, Dh], a leaf that requires its gradient
    k: Tensor  # [T, Hkv, Dh], the same
    v: Tensor  # [T, Hkv, Dh]
    d_out: Tensor  # [T, H, Dh]
    cu_seqlens: Tensor  # [B+1] int32
    lengths: tuple[int, ...]  # [B]
    causal: bool
    dropout_p: float

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a head of K and V."""
        return self.q.shape[1] != self.k.shape[1]


@dataclass(frozen=True, eq=False)
class Call:
    """An implementation that is ready to run on a batch."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    d_out: Tensor
    packed: Callable[[Tensor], Tensor] = lambda x: x  # [T, heads, Dh] of what it returns
    note: str = ""

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """dQ, dK, dV; the graph stays, to be walked again."""
        return torch.autograd.grad(out, self.leaves, self.d_out, retain_graph=True)

    def directed(self, direction: str) -> Callable[[], object]:
        """What is timed; "backward" runs the forward once, here."""
        if direction == "forward":
            return self.forward
        if direction == "backward":
            return partial(self.backward, self.forward())
        return lambda: self.backward(self.forward())


@dataclass(frozen=True)
class Peer:
    """An implementation."""

    prepare: Callable[[Work], Call]
    has_dropout: bool


def bivec_call(work: Work, backend: str | None = None) -> Call:
    """Ours, by default in Triton on a GPU; the plan is made once, as the model makes it for all layers of a batch."""
    backend = backend or ("triton" if work.q.is_cuda else "torch")
    longest, device = max(work.lengths), work.q.device
    plan = attention_plan(work.cu_seqlens, longest)
    dropout = {}
    if work.dropout_p > 0.0:
        sample_ids = torch.arange(len(work.lengths), device=device)
        dropout = {"dropout_p": work.dropout_p, "seed": torch.tensor([SEED], device=device), "sample_ids": sample_ids}
    attend = partial(
        flash_attention,
        work.q,
        work.k,
        work.v,
        work.cu_seqlens,
        longest,
        causal=work.causal,
        plan=plan,
        backend=backend,
        **dropout,
    )
    return Call(attend, (work.q, work.k, work.v), work.d_out)


def sdpa_call(work: Work) -> Call:
    """torch's SDPA on the padded batch; see the benchmark's docstring for what is done in its favour."""
    lengths = torch.tensor(work.lengths, device=work.q.device)
    valid = torch.arange(max(work.lengths), device=work.q.device) < lengths[:, None]  # [B, L]
    masked = not work.causal and min(work.lengths) < max(work.lengths)
    repeated = masked and work.grouped

    def padded(x: Tensor) -> Tensor:  # [B, heads, L, Dh]
        wide = x.new_zeros(*valid.shape, *x.shape[1:])
        wide[valid] = x.detach()
        return wide.transpose(1, 2).contiguous()

    def packed(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[valid]

    group = work.q.shape[1] // work.k.shape[1] if repeated else 1
    leaves = [padded(work.q), *(padded(x.repeat_interleave(group, 1)) for x in (work.k, work.v))]
    q, k, v = (leaf.requires_grad_() for leaf in leaves)
    attend = partial(
        F.scaled_dot_product_attention,
        q,
        k,
        v,
        attn_mask=valid[:, None, None, :] if masked else None,
        dropout_p=work.dropout_p,
        is_causal=work.causal,
        enable_gqa=work.grouped and not repeated,
    )
    note = f"{valid.numel() / sum(work.lengths):.1f} x padded" + ", kv heads repeated" * repeated
    return Call(attend, (q, k, v), padded(work.d_out), packed, note)


def varlen_call(work: Work) -> Call:
    """torch's own varlen attention: FlashAttention-2; its keyword arguments differ from release to release."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(work.lengths)
    wanted = {
        "window_size": (-1, 0) if work.causal else (-1, -1),  # since 2.11, where (-1, 0) means causal
        "is_causal": work.causal,  # 2.10
        "enable_gqa": work.grouped,  # 2.12; before, grouped heads were taken without asking
    }
    attend = partial(
        varlen_attn,
        work.q,
        work.k,
        work.v,
        work.cu_seqlens,
        work.cu_seqlens,
        longest,
        longest,
        **_accepted(varlen_attn, wanted),
    )
    return Call(attend, (work.q, work.k, work.v), work.d_out)


def flash_attn_call(work: Work, module: str) -> Call:
    """``flash_attn_varlen_func`` of flash-attn 2, 3 or 4; only 2 has dropout."""
    function = _flash_attn(module)
    longest = max(work.lengths)
    wanted = {
        "cu_seqlens_q": work.cu_seqlens,
        "cu_seqlens_k": work.cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "causal": work.causal,
        "dropout_p": work.dropout_p,
    }
    accepted = _accepted(function, wanted)

    def attend() -> Tensor:
        out = function(work.q, work.k, work.v, **accepted)
        return out[0] if isinstance(out, tuple) else out  # some versions return the lse too

    return Call(attend, (work.q, work.k, work.v), work.d_out)


def _flash_attn(module: str) -> Callable[..., Any]:
    return importlib.import_module(module).flash_attn_varlen_func


def _accepted(function: Callable[..., Any], wanted: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in wanted.items() if name in parameters}


FLASH_ATTN = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}
PEERS = {
    "bivec": Peer(bivec_call, has_dropout=True),
    "bivec torch": Peer(partial(bivec_call, backend="torch"), has_dropout=True),
    "sdpa": Peer(sdpa_call, has_dropout=True),
    "varlen": Peer(varlen_call, has_dropout=False),
    **{
        name: Peer(partial(flash_attn_call, module=module), has_dropout=name == "flash-attn 2")
        for name, module in FLASH_ATTN.items()
    },
}


def missing() -> dict[str, str]:
    """The peers that cannot be imported here, and why."""
    found = {name: failed(partial(_flash_attn, module)) for name, module in FLASH_ATTN.items()}
    return {name: reason for name, reason in found.items() if reason is not None}


def failed(load: Callable[[], object]) -> str | None:
    """Why it cannot be loaded; None if it can."""
    try:
        load()
    except Exception as error:  # of any kind: a build for another torch raises what it likes
        return f"{type(error).__name__}: {error}"
    return None


def outcome(call: Call, work: Work) -> tuple[Tensor, ...]:
    """Output, dQ, dK and dV in the packed form, repeated kv heads summed."""
    out = call.forward()
    d_q, d_k, d_v = call.backward(out)
    tokens, kv_heads, head_dim = work.k.shape

    def summed(x: Tensor) -> Tensor:
        return call.packed(x).reshape(tokens, kv_heads, -1, head_dim).float().sum(2)

    return call.packed(out).detach(), call.packed(d_q), summed(d_k), summed(d_v)


def reference(work: Work) -> tuple[Tensor, ...] | None:
    """What ``outcome`` must be: SDPA of every sequence by itself, or with dropout our torch backend.

    None where the scores of the latter do not fit.
    """
    if work.dropout_p > 0.0:
        scores = work.q.shape[1] * sum(length**2 for length in work.lengths)
        return outcome(bivec_call(work, "torch"), work) if scores <= LARGEST_SCORES else None

    def attend() -> Tensor:
        split = [x.transpose(0, 1).split(work.lengths, 1) for x in (work.q, work.k, work.v)]
        sequences = [
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=work.causal, enable_gqa=work.grouped
            ).squeeze(0)
            for q, k, v in zip(*split, strict=True)
        ]
        return torch.cat(sequences, 1).transpose(0, 1)

    return outcome(Call(attend, (work.q, work.k, work.v), work.d_out), work)
