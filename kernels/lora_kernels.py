"""The kernels of a low-rank update in Triton, and their launchers; ``kernels/lora_triton.py`` makes layers of them.

Of P projections of one input x [T, in], with masks keep_p, A_p [r, in] and B_p [out_p, r]:

    project     h_p   = factor (keep_p * x) M_pᵀ                  [T, r]    M = A forward; of dy, M = Bᵀ backward
    update      y    += factor sum_p keep_p * (h_p M_p)           [T, n]    in place; the sum is rounded once
    gradient    d_p   = factor sum_t h_p[t]ᵀ (keep_p * x)[t]      [r, n]

Programs that differ only in p are neighbours in the grid and walk over the same tile of x at the same time, so that the
cache serves all but the first.

Masks are those of ``kernels/dropout.py``, drawn tile by tile from the rows' keys, P int32 a token, which a small kernel
of its own makes: in the tiles, whose threads see few columns of many rows, they would cost more than the elements.

Precision. Accumulators and h are fp32. fp32 LoRA matrices over a half-precision base: operands are converted to fp32,
and products are split TF32 on NVIDIA, which is as exact as fp32, and fp32 on AMD. LoRA matrices in half precision are
multiplied as they are, h being rounded to their dtype.

Determinism. Sums over tokens have two stages: at most 16 parts of a number of rows that T alone decides, in fp32, then
their sum. There are no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bivec.kernels.dropout import drop_threshold
from bivec.kernels.dropout_triton import kept, linear_row_keys
from bivec.kernels.launch import architecture, launch
from bivec.kernels.tuning import Config, config_for

RANK_STEP = 16  # ranks that an update multiplies at a time: what a dot takes at least, and few registers
MAX_BLOCK_R = 32  # larger ranks take several programs: tiles of 64 spill on sm_80
ROW_KEYS_BLOCK = 256
PART_ROWS, MAX_PARTS = 256, 16  # of a sum over tokens


@triton.jit(do_not_specialize=["num_tokens"])
def lora_row_keys(seeds_ptr, token_ids_ptr, keys_ptr, num_tokens, BLOCK_T: tl.constexpr):
    """Grid: projections x blocks of tokens. ``keys`` ``[P, T]`` int32."""
    blocks = tl.cdiv(num_tokens, BLOCK_T)
    projection = tl.program_id(0) // blocks
    tokens = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    inside = tokens < num_tokens
    keys = linear_row_keys(tl.load(seeds_ptr + projection), tl.load(token_ids_ptr + tokens, mask=inside, other=0))
    tl.store(keys_ptr + projection.to(tl.int64) * num_tokens + tokens, keys, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "projections", "threshold"])
def lora_project(
    x_ptr,
    m_ptr,
    keys_ptr,
    h_ptr,
    num_tokens,
    width,
    rank,
    projections,
    x_stride,
    h_stride,
    m_stride_p,
    m_stride_r,
    m_stride_k,
    factor,
    threshold,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: blocks of tokens x (projection, block of ranks), the latter side by side. Fills ``h_stride`` ranks."""
    rank_blocks = tl.cdiv(h_stride, BLOCK_R)
    unit = tl.program_id(0) % (projections * rank_blocks)
    projection = (unit // rank_blocks).to(tl.int64)
    ranks = unit % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    block = tl.program_id(0) // (projections * rank_blocks)
    tokens = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    tokens_ok = tokens < num_tokens
    if HAS_DROPOUT:
        keys = tl.load(keys_ptr + projection * num_tokens + tokens, mask=tokens_ok, other=0)  # [BLOCK_T]
    x_rows = x_ptr + tokens[:, None] * x_stride
    m_rows = m_ptr + projection * m_stride_p + ranks[None, :] * m_stride_r
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for first in range(0, width, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        columns_ok = columns < width
        x = tl.load(x_rows + columns[None, :], mask=tokens_ok[:, None] & columns_ok[None, :], other=0.0)
        if HAS_DROPOUT:
            x = tl.where(kept(keys[:, None], columns[None, :], threshold), x, 0.0)  # [BLOCK_T, BLOCK_K]
        m_ptrs = m_rows + columns[:, None].to(tl.int64) * m_stride_k
        m = tl.load(m_ptrs, mask=columns_ok[:, None] & (ranks < rank)[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x.to(m.dtype), m, acc, input_precision=PRECISION)
    h_ptrs = h_ptr + (projection * num_tokens + tokens)[:, None] * h_stride + ranks[None, :]
    tl.store(h_ptrs, acc * factor, mask=tokens_ok[:, None] & (ranks < h_stride)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "projections", "threshold"])
def lora_update(
    y_ptr,
    h_ptr,
    m_ptr,
    keys_ptr,
    num_tokens,
    width,
    rank,
    projections,
    y_stride,
    h_stride,
    m_stride_p,
    m_stride_r,
    m_stride_k,
    factor,
    threshold,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: blocks of tokens x blocks of columns, the latter side by side."""
    blocks = tl.cdiv(width, BLOCK_N)
    tokens = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    columns = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    tokens_ok, columns_ok = tokens < num_tokens, columns < width
    y_ptrs = y_ptr + tokens[:, None] * y_stride + columns[None, :]
    inside = tokens_ok[:, None] & columns_ok[None, :]
    y = tl.load(y_ptrs, mask=inside, other=0.0)  # [BLOCK_T, BLOCK_N], under way during the products
    m_columns = m_ptr + columns[None, :].to(tl.int64) * m_stride_k
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for p in range(0, projections):
        projection = tl.cast(p, tl.int64)
        h_rows = h_ptr + (projection * num_tokens + tokens)[:, None] * h_stride
        if HAS_DROPOUT:
            keys = tl.load(keys_ptr + projection * num_tokens + tokens, mask=tokens_ok, other=0)  # [BLOCK_T]
            keep = kept(keys[:, None], columns[None, :], threshold)  # [BLOCK_T, BLOCK_N]
        for first in range(0, rank, BLOCK_R):
            ranks = first + tl.arange(0, BLOCK_R)  # [BLOCK_R]
            ranks_ok = ranks < rank
            h = tl.load(h_rows + ranks[None, :], mask=tokens_ok[:, None] & ranks_ok[None, :], other=0.0)
            m_ptrs = m_columns + projection * m_stride_p + ranks[:, None] * m_stride_r
            m = tl.load(m_ptrs, mask=ranks_ok[:, None] & columns_ok[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
            if HAS_DROPOUT:
                acc += tl.where(keep, tl.dot(h.to(m.dtype), m, input_precision=PRECISION), 0.0)
            else:
                acc = tl.dot(h.to(m.dtype), m, acc, input_precision=PRECISION)
    tl.store(y_ptrs, (y.to(tl.float32) + acc * factor).to(y.dtype), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "part_rows", "projections", "threshold"])
def lora_gradient(
    x_ptr,
    h_ptr,
    keys_ptr,
    parts_ptr,
    num_tokens,
    part_rows,
    width,
    rank,
    projections,
    x_stride,
    h_stride,
    factor,
    threshold,
    HAS_DROPOUT: tl.constexpr,
    FP32_OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: parts of the tokens x blocks of columns x (projection, block of ranks), the last side by side.

    ``parts`` ``[parts, P, rank, width]`` fp32; a part has ``part_rows`` tokens, a multiple of BLOCK_T.
    """
    rank_blocks = tl.cdiv(rank, BLOCK_R)
    unit = tl.program_id(0) % (projections * rank_blocks)
    projection = (unit // rank_blocks).to(tl.int64)
    ranks = unit % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    place, blocks = tl.program_id(0) // (projections * rank_blocks), tl.cdiv(width, BLOCK_N)
    part = (place // blocks).to(tl.int64)
    columns = place % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns_ok, ranks_ok = columns < width, ranks < rank
    dtype = tl.float32 if FP32_OPERANDS else x_ptr.dtype.element_ty
    h_ptr += projection * num_tokens * h_stride
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    begin = part * part_rows
    for first in range(0, tl.minimum(part_rows, num_tokens - begin), BLOCK_T):
        tokens = begin + first + tl.arange(0, BLOCK_T)  # [BLOCK_T] int64
        tokens_ok = tokens < num_tokens
        x_ptrs = x_ptr + tokens[:, None] * x_stride + columns[None, :]
        x = tl.load(x_ptrs, mask=tokens_ok[:, None] & columns_ok[None, :], other=0.0)  # [BLOCK_T, BLOCK_N]
        if HAS_DROPOUT:
            keys = tl.load(keys_ptr + projection * num_tokens + tokens, mask=tokens_ok, other=0)  # [BLOCK_T]
            x = tl.where(kept(keys[:, None], columns[None, :], threshold), x, 0.0)
        h_ptrs = h_ptr + tokens[None, :] * h_stride + ranks[:, None]
        h = tl.load(h_ptrs, mask=ranks_ok[:, None] & tokens_ok[None, :], other=0.0)  # [BLOCK_R, BLOCK_T]
        acc = tl.dot(h.to(dtype), x.to(dtype), acc, input_precision=PRECISION)
    rows = ((part * projections + projection) * rank + ranks)[:, None]
    part_ptrs = parts_ptr + rows * width + columns[None, :]
    tl.store(part_ptrs, acc * factor, mask=ranks_ok[:, None] & columns_ok[None, :])


def _config(kernel: str, x: Tensor, lora_dtype: torch.dtype) -> Config:
    key = {"itemsize": x.element_size(), "lora_itemsize": lora_dtype.itemsize}
    return config_for("lora", kernel, architecture(x.device), **key)


def _rank_block(rank: int) -> int:
    """Ranks in a tile that x is read once for."""
    return min(max(RANK_STEP, triton.next_power_of_2(rank)), MAX_BLOCK_R)


def _arguments(x: Tensor, keys: Tensor | None, factor: float, dropout_p: float) -> dict[str, Any]:
    """What the three kernels have in common."""
    return {
        "keys_ptr": keys,
        "num_tokens": x.shape[0],
        "width": x.shape[1],
        "factor": factor,
        "threshold": drop_threshold(dropout_p),
        "HAS_DROPOUT": keys is not None,
        "PRECISION": "ieee" if architecture(x.device).startswith("gfx") else "tf32x3",
    }


def row_keys(seeds: Tensor, token_ids: Tensor) -> Tensor:
    """``[P]`` and ``[T]`` int64 -> ``[P, T]`` int32, the keys of the rows' masks."""
    projections, num_tokens = seeds.shape[0], token_ids.shape[0]
    keys = torch.empty(projections, num_tokens, dtype=torch.int32, device=token_ids.device)
    arguments = {
        "seeds_ptr": seeds,
        "token_ids_ptr": token_ids.contiguous(),
        "keys_ptr": keys,
        "num_tokens": num_tokens,
        "BLOCK_T": ROW_KEYS_BLOCK,
    }
    grid = (projections * triton.cdiv(num_tokens, ROW_KEYS_BLOCK),)
    launch(lora_row_keys, grid, arguments, num_warps=4, num_stages=1)
    return keys


def project_(
    h: Tensor, x: Tensor, m: Tensor, factor: float, keys: Tensor | None = None, dropout_p: float = 0.0
) -> None:
    """``h[p] = factor * (keep_p * x) m[p]^T``.

    Args:
        h: [P, T, R] fp32, contiguous; columns from ``rank`` on become 0.
        x: [T, n], columns contiguous.
        m: [P, rank, n], rank <= R; any strides.
        keys: [P, T] int32, or None where nothing is dropped.
    """
    config = _config("lora_project", x, m.dtype)
    projections, rank, _ = m.shape
    block_r = _rank_block(h.shape[2])
    arguments = {
        "x_ptr": x,
        "m_ptr": m,
        "h_ptr": h,
        "rank": rank,
        "projections": projections,
        "x_stride": x.stride(0),
        "h_stride": h.shape[2],
        "m_stride_p": m.stride(0),
        "m_stride_r": m.stride(1),
        "m_stride_k": m.stride(2),
        "BLOCK_R": block_r,
        **_arguments(x, keys, factor, dropout_p),
        **config.blocks,
    }
    units = projections * triton.cdiv(h.shape[2], block_r)
    grid = (units * triton.cdiv(x.shape[0], config.blocks["BLOCK_T"]),)
    launch(lora_project, grid, arguments, num_warps=config.num_warps, num_stages=config.num_stages)


def update_(y: Tensor, h: Tensor, m: Tensor, factor: float, keys: Tensor | None = None, dropout_p: float = 0.0) -> None:
    """``y += factor * sum_p keep_p * (h[p] m[p])``; ``y`` [T, n], columns contiguous; the others as in ``project_``."""
    config = _config("lora_update", y, m.dtype)
    projections, rank, width = m.shape
    arguments = {
        "y_ptr": y,
        "h_ptr": h,
        "m_ptr": m,
        "rank": rank,
        "projections": projections,
        "y_stride": y.stride(0),
        "h_stride": h.shape[2],
        "m_stride_p": m.stride(0),
        "m_stride_r": m.stride(1),
        "m_stride_k": m.stride(2),
        "BLOCK_R": RANK_STEP,
        **_arguments(y, keys, factor, dropout_p),
        **config.blocks,
    }
    grid = (triton.cdiv(y.shape[0], config.blocks["BLOCK_T"]) * triton.cdiv(width, config.blocks["BLOCK_N"]),)
    launch(lora_update, grid, arguments, num_warps=config.num_warps, num_stages=config.num_stages)


def gradient_parts(
    x: Tensor,
    h: Tensor,
    lora_dtype: torch.dtype,
    factor: float,
    keys: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``[parts, P, R, n]`` fp32, whose sum over the parts is ``factor * sum_t h[p, t]^T (keep_p * x)[t]``.

    Args:
        x: [T, n], columns contiguous.
        h: [P, T, R] fp32, contiguous.
        lora_dtype: of the LoRA matrices: the operands are of it.
        keys: [P, T] int32, or None where nothing is dropped.
    """
    config = _config("lora_gradient", x, lora_dtype)
    (projections, num_tokens, rank), width = h.shape, x.shape[1]
    block_r = _rank_block(rank)
    part_rows = PART_ROWS * max(1, triton.cdiv(num_tokens, PART_ROWS * MAX_PARTS))
    num_parts = triton.cdiv(num_tokens, part_rows)
    parts = torch.empty(num_parts, projections, rank, width, dtype=torch.float32, device=x.device)
    arguments = {
        "x_ptr": x,
        "h_ptr": h,
        "parts_ptr": parts,
        "part_rows": part_rows,
        "rank": rank,
        "projections": projections,
        "x_stride": x.stride(0),
        "h_stride": rank,
        "FP32_OPERANDS": lora_dtype == torch.float32,
        "BLOCK_R": block_r,
        **_arguments(x, keys, factor, dropout_p),
        **config.blocks,
    }
    units = projections * triton.cdiv(rank, block_r)
    grid = (units * triton.cdiv(width, config.blocks["BLOCK_N"]) * num_parts,)
    launch(lora_gradient, grid, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return parts
