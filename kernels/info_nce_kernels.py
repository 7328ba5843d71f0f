"""The Triton kernels of ``info_nce``: one pass over a row of raw dot products, and the norm's part of the gradient.

A program of ``info_nce_scores`` owns a row of the workspace, raw products q·c, and walks over its columns twice:

    1.  x_j = q·c_j / (|q| |c_j|), masks, running maximum and sum over the negatives (base 2); the loss of the row
    2.  the row becomes G_j = p * scale / |q| * exp(s_j - L) / |c_j|, at the positive -p * scale / (|q| |c+|), else 0

G, the gradient by the raw product, is fp32 or bf16, in place. In bf16 it fills the first half of each row's bytes:
block k of BLOCK_N columns is read at the bytes from 4 k BLOCK_N on and written below 2 (k + 1) BLOCK_N, so a store
meets only what its own block and those before it have read, and a barrier between the loads and the stores of each
block makes all warps have read them.

A target outside the candidates makes the loss of its row NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from bivec.kernels.info_nce_plan import EPS
from bivec.kernels.launch import architecture, launch
from bivec.kernels.tuning import config_for

PADDING, PLAIN, WITH_ID = 0, 1, 2  # the kinds of columns; kernels spell them as numbers

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
ZERO_NORM = tl.constexpr(EPS)
MASKED = tl.constexpr(-1.7e38)  # finite: a row without negatives has loss and gradient 0


@triton.jit
def compare(
    columns,
    end,
    row,
    products_ptr,
    inverse_ptr,
    kinds_ptr,
    ids_ptr,
    own_inverse_ptr,
    own_ids_ptr,
    own_start,
    num_own,
    row_inverse,
    row_id,
    target,
    itself,
    limit,
    HAS_MARGIN: tl.constexpr,
):
    """Similarities, inverse norms and whether it is a negative of the row, of ``[BLOCK_N]`` columns."""
    inside = columns < end
    products = tl.load(products_ptr + columns, mask=inside, other=0.0)
    inverse = tl.load(inverse_ptr + columns, mask=inside, other=0.0)
    negative = inside & (columns != target) & (columns != itself)
    kind = tl.full(columns.shape, 1, tl.int8)
    if kinds_ptr is not None:
        kind = tl.load(kinds_ptr + columns, mask=inside, other=0)
        products = tl.where(kind != 0, products, 0.0)  # nobody has written the padding
        negative = negative & (kind != 0)
    own = (columns >= own_start) & (columns < own_start + num_own)
    at = row * num_own + (columns - own_start)
    if own_inverse_ptr is not None:
        inverse = tl.where(own, tl.load(own_inverse_ptr + at, mask=own, other=0.0), inverse)
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + columns, mask=inside, other=0)
        if own_ids_ptr is not None:
            ids = tl.where(own, tl.load(own_ids_ptr + at, mask=own, other=0), ids)
        negative = negative & ((kind != 2) | (ids != row_id))
    similarity = products * row_inverse * inverse
    if HAS_MARGIN:
        negative = negative & ~(similarity > limit)
    return similarity, inverse, negative


@triton.jit
def log1p(y):
    """log(1 + y) for 0 <= y <= 1: 2 artanh(y / (2 + y)), whose series keeps the bits of small y."""
    z = y / (2.0 + y)  # <= 1/3
    square = z * z
    series = 0.06666666666666667  # 1/15, 1/13, …
    series = series * square + 0.07692307692307693
    series = series * square + 0.09090909090909091
    series = series * square + 0.1111111111111111
    series = series * square + 0.14285714285714285
    series = series * square + 0.2
    series = series * square + 0.3333333333333333
    return 2.0 * (z + z * square * series)


@triton.jit(do_not_specialize=["first", "itself0"])
def info_nce_scores(
    products_ptr,
    slopes_ptr,
    row_inverse_ptr,
    inverse_ptr,
    kinds_ptr,
    row_ids_ptr,
    ids_ptr,
    own_inverse_ptr,
    own_ids_ptr,
    targets_ptr,
    row_weights_ptr,
    scale_ptr,
    losses_ptr,
    lse_ptr,
    positive_ptr,
    correct_ptr,
    d_scale_ptr,
    products_stride,
    slopes_stride,
    first,
    itself0,
    num_candidates,
    end,
    own_start,
    num_own,
    margin,
    HAS_MARGIN: tl.constexpr,
    HAS_ITSELF: tl.constexpr,
    IN_PLACE_HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: the queries ``first`` … of a chunk, whose raw products are turned into slopes."""
    row = first.to(tl.int64) + tl.program_id(0)
    products_ptr += tl.program_id(0).to(tl.int64) * products_stride
    row_inverse = tl.load(row_inverse_ptr + row)
    target = tl.load(targets_ptr + row)
    row_id = 0
    if row_ids_ptr is not None:
        row_id = tl.load(row_ids_ptr + row)
    itself = -1
    if HAS_ITSELF:
        itself = (itself0 + row).to(tl.int32)
    scale = tl.load(scale_ptr)
    exists = (target >= 0) & (target < num_candidates)
    positive = tl.load(products_ptr + target, mask=exists, other=float("nan")) * row_inverse
    positive = positive * tl.load(inverse_ptr + target, mask=exists, other=0.0)
    limit = positive + margin

    peak = tl.full([BLOCK_N], MASKED, tl.float32)  # each lane runs over its own columns
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        similarity, _, negative = compare(
            columns,
            end,
            row,
            products_ptr,
            inverse_ptr,
            kinds_ptr,
            ids_ptr,
            own_inverse_ptr,
            own_ids_ptr,
            own_start,
            num_own,
            row_inverse,
            row_id,
            target,
            itself,
            limit,
            HAS_MARGIN,
        )
        scores = tl.where(negative, similarity * (scale * LOG2E), MASKED)
        higher = tl.maximum(peak, scores)
        total = total * tl.exp2(peak - higher) + tl.exp2(scores - higher)
        peak = higher
    top = tl.max(peak, 0)
    total_sum = tl.sum(total * tl.exp2(peak - top), 0)

    gap = (top - positive * (scale * LOG2E)) * LN2 + tl.log(total_sum)  # L - s+
    small = tl.exp2(-tl.abs(gap) * LOG2E)
    loss = tl.maximum(gap, 0.0) + log1p(small)
    tl.store(losses_ptr + row, loss)
    tl.store(lse_ptr + row, loss + positive * scale)
    tl.store(positive_ptr + row, positive * scale)
    tl.store(correct_ptr + row, top <= positive * (scale * LOG2E))

    if slopes_ptr is not None:
        factor = tl.where(gap >= 0, 1.0, small) / (1.0 + small)  # sigmoid(gap)
        if row_weights_ptr is not None:
            factor *= tl.load(row_weights_ptr + row)
        row_factor = factor * scale * row_inverse
        slopes_ptr += tl.program_id(0).to(tl.int64) * slopes_stride
        along = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            similarity, inverse, negative = compare(
                columns,
                end,
                row,
                products_ptr,
                inverse_ptr,
                kinds_ptr,
                ids_ptr,
                own_inverse_ptr,
                own_ids_ptr,
                own_start,
                num_own,
                row_inverse,
                row_id,
                target,
                itself,
                limit,
                HAS_MARGIN,
            )
            scores = tl.where(negative, similarity * (scale * LOG2E), MASKED)
            share = tl.where(negative, tl.exp2(scores - top) / total_sum, 0.0)  # exp(s - L)
            along += tl.where(negative, share * similarity, 0.0)
            share = tl.where(columns == target, -1.0, share)
            slopes = tl.where(share != 0, share * (row_factor * inverse), 0.0)
            if IN_PLACE_HALF:
                tl.debug_barrier()
            tl.store(slopes_ptr + columns, slopes.to(slopes_ptr.dtype.element_ty), mask=columns < end)
        tl.store(d_scale_ptr + row, factor * (tl.sum(along, 0) - positive))


@triton.jit
def info_nce_project(grad_ptr, x_ptr, grad_stride, x_stride_r, x_stride_d, width, weight, BLOCK_D: tl.constexpr):
    """Grid: rows. In place ``weight * (g - u<u, g>)``, u being the row of x divided by its norm."""
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * grad_stride
    x_ptr += row * x_stride_r
    dots = tl.zeros([BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        x = tl.load(x_ptr + at.to(tl.int64) * x_stride_d, mask=at < width, other=0.0).to(tl.float32)
        dots += x * tl.load(grad_ptr + at, mask=at < width, other=0.0)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, 0))
    inverse = tl.where(norm > ZERO_NORM, 1.0, 0.0) / tl.maximum(norm, ZERO_NORM)
    along = tl.sum(dots, 0) * inverse
    for start in range(0, width, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + at.to(tl.int64) * x_stride_d, mask=at < width, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=at < width, other=0.0)
        tl.store(grad_ptr + at, (grad - x * inverse * along) * weight, mask=at < width)


@dataclass(frozen=True)
class Columns:
    """What the row of the workspace compares a query with, as the kernel reads it."""

    inverse: Tensor  # [end] fp32: inverse norms of the shared columns
    kinds: Tensor | None  # [end] int8; None = all PLAIN
    ids: Tensor | None  # [end] int64, of the shared columns WITH_ID
    own: slice  # columns of the query's own hard negatives
    own_inverse: Tensor | None  # [B, K] fp32
    own_ids: Tensor | None  # [B, K] int64
    num_candidates: int
    itself: int | None  # the column in which query 0 meets itself, query 1 in the next, …


@dataclass(frozen=True)
class Rows:
    """What the kernel knows of the queries, and what it says."""

    inverse: Tensor  # [B] fp32
    ids: Tensor | None  # [B] int64
    targets: Tensor  # [B] int64
    weights: Tensor | None  # [B] fp32, of the losses in the gradients
    losses: Tensor  # [B] fp32
    lse: Tensor  # [B] fp32
    positive: Tensor  # [B] fp32
    correct: Tensor  # [B] bool
    d_scale: Tensor  # [B] fp32


def score_rows(
    products: Tensor,
    slopes: Tensor | None,
    first: int,
    rows: Rows,
    columns: Columns,
    scale: Tensor,
    margin: float | None,
) -> None:
    """Losses of the queries ``first`` … and, unless ``slopes`` is None, the gradient by their raw products.

    Args:
        products: [n, end] fp32, rows contiguous.
        slopes: the storage of ``products`` seen as [n, end] fp32, or as [n, 2 end] bf16 of which half is written.
        first: the query of the first row.
        rows: of all queries.
        columns: contiguous vectors.
        scale: 0-dim fp32.
        margin: on similarities.
    """
    item = 4 if slopes is None else slopes.element_size()
    config = config_for("info_nce", "info_nce_scores", architecture(products.device), itemsize=item)
    arguments = {
        "products_ptr": products,
        "slopes_ptr": slopes,
        "row_inverse_ptr": rows.inverse,
        "inverse_ptr": columns.inverse,
        "kinds_ptr": columns.kinds,
        "row_ids_ptr": rows.ids,
        "ids_ptr": columns.ids,
        "own_inverse_ptr": columns.own_inverse,
        "own_ids_ptr": columns.own_ids,
        "targets_ptr": rows.targets,
        "row_weights_ptr": rows.weights,
        "scale_ptr": scale,
        "losses_ptr": rows.losses,
        "lse_ptr": rows.lse,
        "positive_ptr": rows.positive,
        "correct_ptr": rows.correct,
        "d_scale_ptr": rows.d_scale,
        "products_stride": products.stride(0),
        "slopes_stride": 0 if slopes is None else slopes.stride(0),
        "first": first,
        "itself0": columns.itself or 0,
        "num_candidates": columns.num_candidates,
        "end": products.shape[1],
        "own_start": columns.own.start,
        "num_own": columns.own.stop - columns.own.start,
        "margin": margin or 0.0,
        "HAS_MARGIN": margin is not None,
        "HAS_ITSELF": columns.itself is not None,
        "IN_PLACE_HALF": item == 2,
    }
    launch(
        info_nce_scores,
        (products.shape[0],),
        arguments | config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def project_rows(grad: Tensor, x: Tensor, weight: float) -> None:
    """Makes ``grad`` [R, D] fp32, that of unit vectors divided by the norms, ``weight`` times the gradient of ``x``."""
    config = config_for("info_nce", "info_nce_project", architecture(x.device), itemsize=x.element_size())
    arguments = {
        "grad_ptr": grad,
        "x_ptr": x,
        "grad_stride": grad.stride(0),
        "x_stride_r": x.stride(0),
        "x_stride_d": x.stride(1),
        "width": x.shape[1],
        "weight": float(weight),
    }
    launch(
        info_nce_project,
        (x.shape[0],),
        arguments | config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
