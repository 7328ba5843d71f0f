"""The Triton backend of ``segment_pool``: weighted sums over spans of tokens, and the spans that hold a token.

    out_s = sum_{k=1…n} w_k hidden_{start_s + k - 1}          w_k = 1 / n, or 2 k / (n (n + 1))

Forward: a program a (span, block of D) walks the span's tokens, BLOCK_T rows at a time, into an fp32 tile, and adds its
rows up at the end.

Backward: a program a (block of BLOCK_T tokens, block of D) adds up ``w dOut_s`` of the spans that hold its tokens. With
the spans in the order of their starts, those that start before the block ends are a prefix, found by binary search. It
is walked backwards as long as ``reach``, the running maximum of the ends, lies behind the block's first token: before
that, no span can hold one. Spans that follow each other cost a block those it touches; one very long span makes the
blocks inside it walk over all the short ones before them. The order of the sum is fixed, there are no atomics, and
nothing is read on the host. The order is made in the backward, by a stable sort on the device; the spans of sequences
are in order already.

Saved for backward: the spans' bounds; no activation. Memory beyond input and output: up to 40 bytes a span in the
backward, and a copy of an input whose rows are not contiguous. FLOPs: 2 D for each token of each span, in either
direction; both are bound by reading the rows, once a span.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
# No `from __future__ import annotations`: torch.library reads the operators' schemas from the annotations.
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bivec.kernels.launch import architecture, launch, rows_contiguous
from bivec.kernels.tuning import Config, config_for


@triton.jit
def weight_total(n, WEIGHTED: tl.constexpr):
    """What the sum over a span of ``n`` > 0 tokens is divided by."""
    n = n.to(tl.float32)
    return n * (n + 1.0) * 0.5 if WEIGHTED else n


@triton.jit
def segment_pool_forward(
    hidden_ptr,
    starts_ptr,
    ends_ptr,
    out_ptr,
    hidden_stride,
    DIM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: spans x blocks of columns."""
    span = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dims_ok = dims < DIM
    start = tl.load(starts_ptr + span).to(tl.int64)
    length = tl.load(ends_ptr + span).to(tl.int64) - start
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)  # [BLOCK_T] position inside the span
        ptrs = hidden_ptr + (start + at)[:, None] * hidden_stride + dims[None, :]
        tile = tl.load(ptrs, mask=(at < length)[:, None] & dims_ok[None, :], other=0.0)  # [BLOCK_T, BLOCK_D]
        tile = tile.to(tl.float32)
        total += tile * (at + 1).to(tl.float32)[:, None] if WEIGHTED else tile
    pooled = tl.sum(total, 0)  # [BLOCK_D]
    pooled = tl.div_rn(pooled, tl.zeros_like(pooled) + weight_total(tl.maximum(length, 1), WEIGHTED))
    tl.store(out_ptr + span * DIM + dims, pooled.to(out_ptr.dtype.element_ty), mask=dims_ok)


@triton.jit(do_not_specialize=["num_tokens", "num_spans"])
def segment_pool_backward(
    d_out_ptr,
    starts_ptr,
    ends_ptr,
    reach_ptr,
    order_ptr,
    d_hidden_ptr,
    d_out_stride,
    num_tokens,
    num_spans,
    DIM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of tokens x blocks of columns.

    ``starts``, ``ends`` and ``reach`` are in the order of the starts; ``order`` says which span that is, None = its own
    place.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    tokens = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dims_ok = dims < DIM

    place, above = first * 0, first * 0 + num_spans  # how many spans start before the block ends
    while place < above:
        middle = (place + above) // 2
        begins = tl.load(starts_ptr + middle) < first + BLOCK_T
        place = tl.where(begins, middle + 1, place)
        above = tl.where(begins, above, middle)

    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    place -= 1
    reach = tl.load(reach_ptr + place, mask=place >= 0, other=0)
    while reach > first:
        start = tl.load(starts_ptr + place).to(tl.int64)
        end = tl.load(ends_ptr + place).to(tl.int64)
        span = place if order_ptr is None else tl.load(order_ptr + place)
        row = tl.load(d_out_ptr + span * d_out_stride + dims, mask=dims_ok, other=0.0).to(tl.float32)  # [BLOCK_D]
        share = (tokens - start + 1).to(tl.float32) if WEIGHTED else (tokens * 0 + 1).to(tl.float32)  # [BLOCK_T]
        share = tl.div_rn(share, tl.zeros_like(share) + weight_total(tl.maximum(end - start, 1), WEIGHTED))
        inside = (tokens >= start) & (tokens < end)
        total += tl.where(inside[:, None], share[:, None] * row[None, :], 0.0)
        place -= 1
        reach = tl.load(reach_ptr + place, mask=place >= 0, other=0)
    offsets = tokens[:, None] * DIM + dims[None, :]
    mask = (tokens < num_tokens)[:, None] & dims_ok[None, :]
    tl.store(d_hidden_ptr + offsets, total.to(d_hidden_ptr.dtype.element_ty), mask=mask)


def _config(kernel: str, x: Tensor) -> Config:
    return config_for("segment_pool", kernel, architecture(x.device), itemsize=x.element_size())


def forward(hidden: Tensor, starts: Tensor, ends: Tensor, weighted: bool) -> Tensor:
    """Launches the forward kernel; see ``segment_pool_op``."""
    hidden = rows_contiguous(hidden)
    config = _config("segment_pool_forward", hidden)
    num_spans, dim = starts.shape[0], hidden.shape[1]
    out = hidden.new_empty(num_spans, dim)
    arguments = {
        "hidden_ptr": hidden,
        "starts_ptr": starts.contiguous(),
        "ends_ptr": ends.contiguous(),
        "out_ptr": out,
        "hidden_stride": hidden.stride(0),
        "DIM": dim,
        "WEIGHTED": weighted,
        **config.blocks,
    }
    grid = (num_spans, triton.cdiv(dim, config.blocks["BLOCK_D"]))
    launch(segment_pool_forward, grid, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return out


def backward(d_out: Tensor, starts: Tensor, ends: Tensor, num_tokens: int, weighted: bool, in_order: bool) -> Tensor:
    """Puts the spans in order and launches the backward kernel; see ``segment_pool_backward_op``."""
    d_out = rows_contiguous(d_out)
    config = _config("segment_pool_backward", d_out)
    dim = d_out.shape[1]
    d_hidden = d_out.new_empty(num_tokens, dim)
    order = None
    if in_order:
        starts, ends = starts.contiguous(), ends.contiguous()
        reach = ends
    else:
        starts, order = torch.sort(starts, stable=True)
        ends = ends[order]
        reach = ends.cummax(0).values
    arguments = {
        "d_out_ptr": d_out,
        "starts_ptr": starts,
        "ends_ptr": ends,
        "reach_ptr": reach,
        "order_ptr": order,
        "d_hidden_ptr": d_hidden,
        "d_out_stride": d_out.stride(0),
        "num_tokens": num_tokens,
        "num_spans": starts.shape[0],
        "DIM": dim,
        "WEIGHTED": weighted,
        **config.blocks,
    }
    grid = (triton.cdiv(num_tokens, config.blocks["BLOCK_T"]), triton.cdiv(dim, config.blocks["BLOCK_D"]))
    launch(segment_pool_backward, grid, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return d_hidden


@torch.library.custom_op("bivec::segment_pool", mutates_args=())
def segment_pool_op(
    hidden: Tensor,
    starts: Tensor,
    ends: Tensor,
    weighted: bool,
    in_order: bool,  # noqa: ARG001 - autograd hands it to the backward
) -> Tensor:
    """Weighted sums ``[S, D]`` of rows of hidden, in its dtype.

    Args:
        hidden: [T, D], of ``TRITON_DTYPES``.
        starts: [S] int32 or int64.
        ends: [S] int32 or int64, exclusive; from start to T.
        weighted: weights 1 … n in place of equal ones.
        in_order: neither starts nor ends ever decrease: the backward need not sort them.
    """
    return forward(hidden, starts, ends, weighted)


@segment_pool_op.register_fake
def _(hidden: Tensor, starts: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(starts.shape[0], hidden.shape[1])


@torch.library.custom_op("bivec::segment_pool_backward", mutates_args=())
def segment_pool_backward_op(
    d_out: Tensor, starts: Tensor, ends: Tensor, num_tokens: int, weighted: bool, in_order: bool
) -> Tensor:
    """The gradient ``[T, D]`` of hidden; the other arguments as in the forward, ``num_tokens`` is T."""
    return backward(d_out, starts, ends, num_tokens, weighted, in_order)


@segment_pool_backward_op.register_fake
def _(d_out: Tensor, _starts: Tensor, _ends: Tensor, num_tokens: int, *_: Any) -> Tensor:
    return d_out.new_empty(num_tokens, d_out.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    hidden, starts, ends, ctx.weighted, ctx.in_order = inputs
    ctx.num_tokens = hidden.shape[0]
    ctx.save_for_backward(starts, ends)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    starts, ends = ctx.saved_tensors
    d_hidden = segment_pool_backward_op(d_out, starts, ends, ctx.num_tokens, ctx.weighted, ctx.in_order)
    return d_hidden, None, None, None, None


segment_pool_op.register_autograd(_differentiate, setup_context=_save)


def pool(hidden: Tensor, starts: Tensor, ends: Tensor, mode: str, in_order: bool) -> Tensor:
    """``segment_pool`` of these spans; "first" and "last" are spans of one token, or of none where the span is empty.

    Args:
        hidden: [T, D], of ``TRITON_DTYPES``.
        starts: [S] int32 or int64, checked by the caller.
        ends: likewise.
        mode: of ``segment_pool``.
        in_order: neither starts nor ends ever decrease.
    """
    if mode == "first":
        ends = torch.minimum(starts + 1, ends)
    elif mode == "last":
        starts = torch.maximum(ends - 1, starts)
    pooled: Tensor = segment_pool_op(hidden, starts, ends, mode == "weighted_mean", in_order)
    return pooled
