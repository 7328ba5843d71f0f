"""The Triton backend of ``rms_norm``: one kernel forward and one backward, each with the residual addition in it.

    s = x + residual          rstd = 1 / sqrt(mean(s²) + eps)          y = s · rstd · (weight_offset + weight)

The sum s is rounded to the dtype of x, and the statistics, in fp32, are of the rounded sum. With n = s · rstd and
g = dy · (weight_offset + weight), and ds the gradient of the sum that was handed out,

    dx = dresidual = rstd · (g - n · mean(g · n)) + ds        dweight = Σ_rows dy · n

Tiles. A program owns a tile of BLOCK_TILE elements: one row, or several where D is small, D padded to a power of two.
Longer rows get a longer tile with as many more warps, to 4 x BLOCK_TILE. Rows that are longer still are walked over
twice in pieces of that size, the second time from the cache, and once more for dweight; those that fit are read once.

dweight, which a frozen weight does not need, is summed in two stages: at most ``PARTIALS`` programs walk over
neighbouring tiles of rows and leave one fp32 row each, and torch adds these up. The number of programs depends on the
shape only, and nothing is added by atomics: runs repeat bit for bit.

Saved for backward: the rows that were normed (x, or the sum that is handed out as well), weight, and rstd, 4 bytes a
row. Elements moved, each way: forward 1 read and 1 write, with residual 2 and 2; backward 2 reads and 1 write, with the
gradient of the sum 3 and 1.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
# No `from __future__ import annotations`: torch.library reads the operators' schemas from the annotations.

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bivec.kernels.launch import architecture, launch
from bivec.kernels.tuning import config_for

PARTIALS = 512  # rows of the first stage of dweight: four for each multiprocessor of an H100
LONGEST_TILE = 4  # x BLOCK_TILE, with 4 times its warps


@triton.jit
def load_rows(x_ptr, residual_ptr, offsets, residual_offsets, mask):
    """A tile of x + residual in fp32, rounded to the dtype of x; ``residual_ptr`` None = of x."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if residual_ptr is None:
        return x.to(tl.float32)
    else:
        residual = tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0)
        return (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x) to the last place; Triton's own is to two, and one a row costs nothing."""
    return tl.div_rn(tl.zeros_like(x) + 1.0, tl.sqrt_rn(x))


@triton.jit
def load_scale(weight_ptr, dims, weight_offset, dims_ok):
    """What the normed row is multiplied by, ``[BLOCK_D]`` fp32."""
    return tl.load(weight_ptr + dims, mask=dims_ok, other=0.0).to(tl.float32) + weight_offset  # [BLOCK_D]


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    num_rows,
    eps,
    weight_offset,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: tiles of rows. ``total_ptr`` takes the sums; None where ``residual_ptr`` is."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    rows_ok = rows < num_rows
    dims = tl.arange(0, BLOCK_D)  # [BLOCK_D]

    if DIM <= BLOCK_D:
        mask = rows_ok[:, None] & (dims < DIM)[None, :]
        offsets = rows[:, None] * DIM + dims[None, :]  # [BLOCK_ROWS, BLOCK_D]
        x_offsets = rows[:, None] * x_stride + dims[None, :]
        residual_offsets = rows[:, None] * residual_stride + dims[None, :]
        x = load_rows(x_ptr, residual_ptr, x_offsets, residual_offsets, mask)  # [BLOCK_ROWS, BLOCK_D]
        if residual_ptr is not None:
            tl.store(total_ptr + offsets, x.to(total_ptr.dtype.element_ty), mask=mask)
        rstd = reciprocal_root(tl.sum(x * x, 1) / DIM + eps)  # [BLOCK_ROWS]
        y = x * rstd[:, None] * load_scale(weight_ptr, dims, weight_offset, dims < DIM)[None, :]
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        products = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
        for first in range(0, DIM, BLOCK_D):
            at = first + dims
            mask = rows_ok[:, None] & (at < DIM)[None, :]
            x_offsets = rows[:, None] * x_stride + at[None, :]
            residual_offsets = rows[:, None] * residual_stride + at[None, :]
            x = load_rows(x_ptr, residual_ptr, x_offsets, residual_offsets, mask)
            products += x * x
        rstd = reciprocal_root(tl.sum(products, 1) / DIM + eps)
        for first in range(0, DIM, BLOCK_D):
            at = first + dims
            mask = rows_ok[:, None] & (at < DIM)[None, :]
            offsets = rows[:, None] * DIM + at[None, :]
            x_offsets = rows[:, None] * x_stride + at[None, :]
            residual_offsets = rows[:, None] * residual_stride + at[None, :]
            x = load_rows(x_ptr, residual_ptr, x_offsets, residual_offsets, mask)
            if residual_ptr is not None:
                tl.store(total_ptr + offsets, x.to(total_ptr.dtype.element_ty), mask=mask)
            y = x * rstd[:, None] * load_scale(weight_ptr, at, weight_offset, at < DIM)[None, :]
            tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows_ok)


@triton.jit(do_not_specialize=["num_rows", "tiles_per_program"])
def rms_norm_backward(
    dy_ptr,
    d_total_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    dy_stride,
    d_total_stride,
    x_stride,
    num_rows,
    tiles_per_program,
    weight_offset,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: programs, of ``tiles_per_program`` tiles of rows each.

    ``x`` is what was normed, ``d_total`` the gradient of the sum, ``partial [programs, D]`` takes the shares of
    dweight; None where there is none.
    """
    program = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dims_ok = dims < DIM
    if DIM <= BLOCK_D:
        scale = load_scale(weight_ptr, dims, weight_offset, dims_ok)  # [BLOCK_D]
    share = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)  # of dweight

    for tile in range(0, tiles_per_program):
        rows = (program * tiles_per_program + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        rows_ok = rows < num_rows
        rstd = tl.load(rstd_ptr + rows, mask=rows_ok, other=0.0)  # [BLOCK_ROWS]
        x_rows, dy_rows = rows[:, None] * x_stride, rows[:, None] * dy_stride  # [BLOCK_ROWS, 1]
        d_total_rows, dx_rows = rows[:, None] * d_total_stride, rows[:, None] * DIM

        if DIM <= BLOCK_D:
            mask = rows_ok[:, None] & dims_ok[None, :]
            normed = tl.load(x_ptr + x_rows + dims[None, :], mask=mask, other=0.0).to(tl.float32)
            normed *= rstd[:, None]  # [BLOCK_ROWS, BLOCK_D]
            dy = tl.load(dy_ptr + dy_rows + dims[None, :], mask=mask, other=0.0).to(tl.float32)
            if d_total_ptr is not None:  # asked for before the sum, which has to wait for the other loads anyway
                d_total = tl.load(d_total_ptr + d_total_rows + dims[None, :], mask=mask, other=0.0)
            if partial_ptr is not None:
                share += dy * normed
            g = dy * scale[None, :]
            mean = tl.sum(g * normed, 1) / DIM  # [BLOCK_ROWS]
            dx = (g - normed * mean[:, None]) * rstd[:, None]
            if d_total_ptr is not None:
                dx += d_total.to(tl.float32)
            tl.store(dx_ptr + dx_rows + dims[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        else:
            products = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
            for first in range(0, DIM, BLOCK_D):
                at = first + dims
                mask = rows_ok[:, None] & (at < DIM)[None, :]
                x = tl.load(x_ptr + x_rows + at[None, :], mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(dy_ptr + dy_rows + at[None, :], mask=mask, other=0.0).to(tl.float32)
                products += x * dy * load_scale(weight_ptr, at, weight_offset, at < DIM)[None, :]
            mean = tl.sum(products, 1) * rstd / DIM
            for first in range(0, DIM, BLOCK_D):
                at = first + dims
                at_ok = at < DIM
                mask = rows_ok[:, None] & at_ok[None, :]
                normed = tl.load(x_ptr + x_rows + at[None, :], mask=mask, other=0.0).to(tl.float32) * rstd[:, None]
                dy = tl.load(dy_ptr + dy_rows + at[None, :], mask=mask, other=0.0).to(tl.float32)
                g = dy * load_scale(weight_ptr, at, weight_offset, at_ok)[None, :]
                dx = (g - normed * mean[:, None]) * rstd[:, None]
                if d_total_ptr is not None:
                    dx += tl.load(d_total_ptr + d_total_rows + at[None, :], mask=mask, other=0.0).to(tl.float32)
                tl.store(dx_ptr + dx_rows + at[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if partial_ptr is not None and DIM <= BLOCK_D:
        tl.store(partial_ptr + program * DIM + dims, tl.sum(share, 0), mask=dims_ok)
    elif partial_ptr is not None:  # the share of a whole row is too much for registers
        for first in range(0, DIM, BLOCK_D):
            at = first + dims
            piece = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
            for tile in range(0, tiles_per_program):
                rows = (program * tiles_per_program + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
                rows_ok = rows < num_rows
                mask = rows_ok[:, None] & (at < DIM)[None, :]
                rstd = tl.load(rstd_ptr + rows, mask=rows_ok, other=0.0)
                x = tl.load(x_ptr + rows[:, None] * x_stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(dy_ptr + rows[:, None] * dy_stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
                piece += dy * (x * rstd[:, None])
            tl.store(partial_ptr + program * DIM + at, tl.sum(piece, 0), mask=at < DIM)


def _tile(kernel: str, x: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """The constexprs and the launch options for rows like those of ``x [rows, D]``."""
    config = config_for("rms_norm", kernel, architecture(x.device), itemsize=x.element_size())
    tile, dim = config.blocks["BLOCK_TILE"], x.shape[1]
    block_d = min(triton.next_power_of_2(max(dim, 1)), LONGEST_TILE * tile)
    blocks = {"DIM": dim, "BLOCK_ROWS": max(tile // block_d, 1), "BLOCK_D": block_d}
    return blocks, {"num_warps": config.num_warps * max(block_d // tile, 1), "num_stages": config.num_stages}


def _rows(x: Tensor) -> Tensor:
    """``[rows, D]`` with neighbouring columns; a copy where the layout of ``x`` allows no such view."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launches the forward kernel: y, x + residual (None without) and rstd; see ``add_rms_norm_op``."""
    shape, x = x.shape, _rows(x)
    residual = None if residual is None else _rows(residual)
    y, rstd = x.new_empty(shape), x.new_empty(x.shape[0], dtype=torch.float32)
    total = None if residual is None else x.new_empty(shape)
    blocks, options = _tile("rms_norm_forward", x)
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight.contiguous(),
        "y_ptr": y,
        "total_ptr": total,
        "rstd_ptr": rstd,
        "x_stride": x.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "num_rows": x.shape[0],
        "eps": eps,
        "weight_offset": weight_offset,
        **blocks,
    }
    if x.numel():
        launch(rms_norm_forward, (triton.cdiv(x.shape[0], blocks["BLOCK_ROWS"]),), arguments, **options)
    return y, total, rstd


def backward(
    dy: Tensor,
    d_total: Tensor | None,
    normed: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float,
    want_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Launches the backward kernel and adds up its shares of dweight; see ``rms_norm_backward_op``."""
    shape, x, dy = normed.shape, _rows(normed), _rows(dy)
    d_total = None if d_total is None else _rows(d_total)
    dx = x.new_empty(shape)
    blocks, options = _tile("rms_norm_backward", x)
    tiles = triton.cdiv(x.shape[0], blocks["BLOCK_ROWS"])
    tiles_per_program = triton.cdiv(tiles, PARTIALS) if want_dweight and tiles else 1
    programs = triton.cdiv(tiles, tiles_per_program)
    partial = x.new_empty(programs, x.shape[1], dtype=torch.float32) if want_dweight else None
    arguments = {
        "dy_ptr": dy,
        "d_total_ptr": d_total,
        "x_ptr": x,
        "weight_ptr": weight.contiguous(),
        "rstd_ptr": rstd,
        "dx_ptr": dx,
        "partial_ptr": partial,
        "dy_stride": dy.stride(0),
        "d_total_stride": 0 if d_total is None else d_total.stride(0),
        "x_stride": x.stride(0),
        "num_rows": x.shape[0],
        "tiles_per_program": tiles_per_program,
        "weight_offset": weight_offset,
        **blocks,
    }
    if x.numel():
        launch(rms_norm_backward, (programs,), arguments, **options)
    return dx, weight.new_empty(0) if partial is None else partial.sum(0).to(weight.dtype)


@torch.library.custom_op("bivec::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    """The normed rows, like x, and rstd ``[rows]`` fp32, which has no gradient.

    Args:
        x: [..., D], of ``TRITON_DTYPES``.
        weight: [D], of ``TRITON_DTYPES``.
        eps: added to the mean square.
        weight_offset: added to the weight.
    """
    y, _, rstd = forward(x, None, weight, eps, weight_offset)
    return y, rstd


@rms_norm_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


@torch.library.custom_op("bivec::add_rms_norm", mutates_args=())
def add_rms_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed sums, the sums, both like x, and rstd; ``residual`` has the shape and dtype of x."""
    y, total, rstd = forward(x, residual, weight, eps, weight_offset)
    return y, x if total is None else total, rstd


@add_rms_norm_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


@torch.library.custom_op("bivec::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    dy: Tensor,
    d_total: Tensor | None,
    normed: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float,
    want_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """dx, which is dresidual too, and dweight: ``[0]`` where it is not wanted.

    Args:
        dy: like ``normed``.
        d_total: gradient of the sum, like ``normed``, or None.
        normed: what was normed: x, or the sum.
        weight: [D].
        rstd: [rows], of the forward.
        weight_offset: of the forward.
        want_dweight: False for a frozen weight.
    """
    return backward(dy, d_total, normed, weight, rstd, weight_offset, want_dweight)


@rms_norm_backward_op.register_fake
def _(_dy: Tensor, _d_total: Tensor | None, normed: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return normed.new_empty(normed.shape), weight.new_empty(weight.shape if others[-1] else 0)


def _gradients(ctx: Any, dy: Tensor | None, d_total: Tensor | None, weight_argument: int) -> tuple[Tensor | None, ...]:
    """dx and dweight. Where y has no gradient the sum's is dx."""
    if dy is None:
        return d_total, None
    normed, weight, rstd = ctx.saved_tensors
    want_dweight = ctx.needs_input_grad[weight_argument]
    dx, dweight = rms_norm_backward_op(dy, d_total, normed, weight, rstd, ctx.weight_offset, want_dweight)
    return dx, dweight if want_dweight else None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of both operators, whose last three arguments and whose first and last results are the same."""
    weight, _, ctx.weight_offset = inputs[-3:]
    _, *total, rstd = output
    ctx.save_for_backward(*(total or inputs[:1]), weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dweight = _gradients(ctx, dy, None, weight_argument=1)
    return dx, dweight, None, None


rms_norm_op.register_autograd(_differentiate, setup_context=_save)


def _differentiate_sum(ctx: Any, dy: Tensor | None, ds: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dweight = _gradients(ctx, dy, ds, weight_argument=2)
    return dx, dx, dweight, None, None


add_rms_norm_op.register_autograd(_differentiate_sum, setup_context=_save)


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> Tensor | tuple[Tensor, Tensor]:
    """``rms_norm`` of operands that it has checked."""
    if residual is None:
        alone: Tensor = rms_norm_op(x, weight, eps, weight_offset)[0]
        return alone
    y, total, _ = add_rms_norm_op(x, residual, weight, eps, weight_offset)
    return y, total
