"""The kernels of a low-rank update in Triton, and their launchers; ``kernels/lora_triton.py`` makes layers of them.

With x [T, n], a mask keep [T, n], h [T, R] fp32 and a matrix M [R, n]:

    project     h    = factor (keep * x) Mᵀ
    update      y   += factor keep * (h M)                        in place; the sum is rounded once
    gradient    dM   = factor sum_t h[t]ᵀ (keep * x)[t]

R may be the ranks of several projections of x side by side, and h a slice of such a matrix.

Masks are those of ``kernels/dropout.py``, drawn tile by tile from the rows' keys, one int32 a token, which a small
kernel of its own makes: in the tiles, whose threads see few columns of many rows, they would cost more than the
elements.

Precision. Accumulators and h are fp32. fp32 LoRA matrices over a half-precision base: operands are converted to fp32,
and products are split TF32 on NVIDIA, which is as exact as fp32, and fp32 on AMD. LoRA matrices in half precision are
multiplied as they are, h being rounded to their dtype.

Determinism. Sums over tokens have two stages: at most 16 parts of a number of rows that T alone decides, in fp32, then
their sum. There are no atomics.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs

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
def lora_row_keys(seed_ptr, token_ids_ptr, keys_ptr, num_tokens, BLOCK_T: tl.constexpr):
    """Grid: blocks of tokens. ``keys`` ``[T]`` int32."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    inside = tokens < num_tokens
    keys = linear_row_keys(tl.load(seed_ptr), tl.load(token_ids_ptr + tokens, mask=inside, other=0))
    tl.store(keys_ptr + tokens, keys, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "threshold"])
def lora_project(
    x_ptr,
    m_ptr,
    keys_ptr,
    h_ptr,
    num_tokens,
    width,
    rank,
    x_stride,
    h_stride,
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
    """Grid: blocks of tokens x blocks of ranks, the latter side by side: the cache serves all but the first with x."""
    rank_blocks = tl.cdiv(rank, BLOCK_R)
    ranks = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    tokens = (tl.program_id(0) // rank_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    tokens_ok, ranks_ok = tokens < num_tokens, ranks < rank
    if HAS_DROPOUT:
        keys = tl.load(keys_ptr + tokens, mask=tokens_ok, other=0)  # [BLOCK_T]
    x_rows = x_ptr + tokens[:, None] * x_stride
    m_rows = m_ptr + ranks[None, :].to(tl.int64) * m_stride_r
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for first in range(0, width, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        columns_ok = columns < width
        x = tl.load(x_rows + columns[None, :], mask=tokens_ok[:, None] & columns_ok[None, :], other=0.0)
        if HAS_DROPOUT:
            x = tl.where(kept(keys[:, None], columns[None, :], threshold), x, 0.0)  # [BLOCK_T, BLOCK_K]
        m_ptrs = m_rows + columns[:, None].to(tl.int64) * m_stride_k
        m = tl.load(m_ptrs, mask=columns_ok[:, None] & ranks_ok[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x.to(m.dtype), m, acc, input_precision=PRECISION)
    h_ptrs = h_ptr + tokens[:, None] * h_stride + ranks[None, :]
    tl.store(h_ptrs, acc * factor, mask=tokens_ok[:, None] & ranks_ok[None, :])


@triton.jit(do_not_specialize=["num_tokens", "threshold"])
def lora_update(
    y_ptr,
    h_ptr,
    m_ptr,
    keys_ptr,
    num_tokens,
    width,
    rank,
    y_stride,
    h_stride,
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
    h_rows = h_ptr + tokens[:, None] * h_stride
    m_columns = m_ptr + columns[None, :].to(tl.int64) * m_stride_k
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for first in range(0, rank, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        ranks_ok = ranks < rank
        h = tl.load(h_rows + ranks[None, :], mask=tokens_ok[:, None] & ranks_ok[None, :], other=0.0)
        m_ptrs = m_columns + ranks[:, None].to(tl.int64) * m_stride_r
        m = tl.load(m_ptrs, mask=ranks_ok[:, None] & columns_ok[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(h.to(m.dtype), m, acc, input_precision=PRECISION)
    if HAS_DROPOUT:
        keys = tl.load(keys_ptr + tokens, mask=tokens_ok, other=0)  # [BLOCK_T]
        acc = tl.where(kept(keys[:, None], columns[None, :], threshold), acc, 0.0)
    tl.store(y_ptrs, (y.to(tl.float32) + acc * factor).to(y.dtype), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "part_rows", "threshold"])
def lora_gradient(
    x_ptr,
    h_ptr,
    keys_ptr,
    parts_ptr,
    num_tokens,
    part_rows,
    width,
    rank,
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
    """Grid: parts of the tokens x blocks of columns x blocks of ranks, the last side by side.

    ``parts`` ``[parts, rank, width]`` fp32; a part has ``part_rows`` tokens, a multiple of BLOCK_T.
    """
    rank_blocks, blocks = tl.cdiv(rank, BLOCK_R), tl.cdiv(width, BLOCK_N)
    ranks = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    place = tl.program_id(0) // rank_blocks
    part = (place // blocks).to(tl.int64)
    columns = place % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns_ok, ranks_ok = columns < width, ranks < rank
    dtype = tl.float32 if FP32_OPERANDS else x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    begin = part * part_rows
    for first in range(0, tl.minimum(part_rows, num_tokens - begin), BLOCK_T):
        tokens = begin + first + tl.arange(0, BLOCK_T)  # [BLOCK_T] int64
        tokens_ok = tokens < num_tokens
        x_ptrs = x_ptr + tokens[:, None] * x_stride + columns[None, :]
        x = tl.load(x_ptrs, mask=tokens_ok[:, None] & columns_ok[None, :], other=0.0)  # [BLOCK_T, BLOCK_N]
        if HAS_DROPOUT:
            keys = tl.load(keys_ptr + tokens, mask=tokens_ok, other=0)  # [BLOCK_T]
            x = tl.where(kept(keys[:, None], columns[None, :], threshold), x, 0.0)
        h_ptrs = h_ptr + tokens[None, :] * h_stride + ranks[:, None]
        h = tl.load(h_ptrs, mask=ranks_ok[:, None] & tokens_ok[None, :], other=0.0)  # [BLOCK_R, BLOCK_T]
        acc = tl.dot(h.to(dtype), x.to(dtype), acc, input_precision=PRECISION)
    part_ptrs = parts_ptr + (part * rank + ranks)[:, None] * width + columns[None, :]
    tl.store(part_ptrs, acc * factor, mask=ranks_ok[:, None] & columns_ok[None, :])


def _config(kernel: str, x: Tensor, lora_dtype: torch.dtype) -> Config:
    key = {"itemsize": x.element_size(), "lora_itemsize": lora_dtype.itemsize}
    return config_for("lora", kernel, architecture(x.device), **key)


def _rank_block(rank: int) -> int:
    """Ranks in a tile that x is read once for."""
    return min(max(RANK_STEP, int(triton.next_power_of_2(rank))), MAX_BLOCK_R)


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


def row_keys(seed: Tensor, token_ids: Tensor) -> Tensor:
    """``[1]`` and ``[T]`` int64 -> ``[T]`` int32, the keys of the rows' masks."""
    num_tokens = token_ids.shape[0]
    keys = torch.empty(num_tokens, dtype=torch.int32, device=token_ids.device)
    arguments = {
        "seed_ptr": seed,
        "token_ids_ptr": token_ids.contiguous(),
        "keys_ptr": keys,
        "num_tokens": num_tokens,
        "BLOCK_T": ROW_KEYS_BLOCK,
    }
    launch(lora_row_keys, (triton.cdiv(num_tokens, ROW_KEYS_BLOCK),), arguments, num_warps=4, num_stages=1)
    return keys


def project_(
    h: Tensor, x: Tensor, m: Tensor, factor: float, keys: Tensor | None = None, dropout_p: float = 0.0
) -> None:
    """``h = factor * (keep * x) m^T``.

    Args:
        h: [T, R] fp32, columns contiguous; overwritten.
        x: [T, n], columns contiguous.
        m: [R, n]; any strides.
        factor: of the product.
        keys: [T] int32, or None where nothing is dropped.
        dropout_p: that of the mask; not read without keys.
    """
    config = _config("lora_project", x, m.dtype)
    rank, block_r = m.shape[0], _rank_block(m.shape[0])
    arguments = {
        "x_ptr": x,
        "m_ptr": m,
        "h_ptr": h,
        "rank": rank,
        "x_stride": x.stride(0),
        "h_stride": h.stride(0),
        "m_stride_r": m.stride(0),
        "m_stride_k": m.stride(1),
        "BLOCK_R": block_r,
        **_arguments(x, keys, factor, dropout_p),
        **config.blocks,
    }
    grid = (triton.cdiv(rank, block_r) * triton.cdiv(x.shape[0], config.blocks["BLOCK_T"]),)
    launch(lora_project, grid, arguments, num_warps=config.num_warps, num_stages=config.num_stages)


def update_(y: Tensor, h: Tensor, m: Tensor, factor: float, keys: Tensor | None = None, dropout_p: float = 0.0) -> None:
    """``y += factor * keep * (h m)``; ``y`` [T, n], columns contiguous; the others as in ``project_``."""
    config = _config("lora_update", y, m.dtype)
    rank, width = m.shape
    arguments = {
        "y_ptr": y,
        "h_ptr": h,
        "m_ptr": m,
        "rank": rank,
        "y_stride": y.stride(0),
        "h_stride": h.stride(0),
        "m_stride_r": m.stride(0),
        "m_stride_k": m.stride(1),
        "BLOCK_R": RANK_STEP,
        **_arguments(y, keys, factor, dropout_p),
        **config.blocks,
    }
    grid = (triton.cdiv(y.shape[0], config.blocks["BLOCK_T"]) * triton.cdiv(width, config.blocks["BLOCK_N"]),)
    launch(lora_update, grid, arguments, num_warps=config.num_warps, num_stages=config.num_stages)


def gradient(
    x: Tensor,
    h: Tensor,
    lora_dtype: torch.dtype,
    factor: float,
    keys: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``factor * sum_t h[t]^T (keep * x)[t]``, ``[R, n]`` fp32.

    Args:
        x: [T, n], columns contiguous.
        h: [T, R] fp32, columns contiguous.
        lora_dtype: of the LoRA matrices: the operands are of it.
        factor: of the sum.
        keys: [T] int32, or None where nothing is dropped.
        dropout_p: that of the mask; not read without keys.
    """
    config = _config("lora_gradient", x, lora_dtype)
    (num_tokens, rank), width = h.shape, x.shape[1]
    block_r = _rank_block(rank)
    part_rows = PART_ROWS * max(1, triton.cdiv(num_tokens, PART_ROWS * MAX_PARTS))
    num_parts = triton.cdiv(num_tokens, part_rows)
    parts = torch.empty(num_parts, rank, width, dtype=torch.float32, device=x.device)
    arguments = {
        "x_ptr": x,
        "h_ptr": h,
        "parts_ptr": parts,
        "part_rows": part_rows,
        "rank": rank,
        "x_stride": x.stride(0),
        "h_stride": h.stride(0),
        "FP32_OPERANDS": lora_dtype == torch.float32,
        "BLOCK_R": block_r,
        **_arguments(x, keys, factor, dropout_p),
        **config.blocks,
    }
    grid = (triton.cdiv(rank, block_r) * triton.cdiv(width, config.blocks["BLOCK_N"]) * num_parts,)
    launch(lora_gradient, grid, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return parts.sum(0)
