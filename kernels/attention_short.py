"""Attention of short sequences in Triton: one tile a sequence (formulas: ``kernels/attention.py``).

For sequences of at most BLOCK_N = 64 or 128 tokens. A program owns one kv head of one sequence: it loads K and V
once, and walks over the rows of all the group's query heads, BLOCK_M at a time. A row sees its keys in one tile, so
there is no online softmax. Two accumulators of the size of K must fit the register file in the backward: which tiles
do, on which GPU, is what the tuning table has rows for (in half types, up to ``BLOCK_N * Dh = 128 * 128``).

The backward is one kernel for dQ, dK and dV. Saved are q, k, v and the lse (in base 2), but not the output:
``delta = sum_j P_ij dP_ij`` is a sum over one tile. Its tiles have the keys as rows, so that P and dS go from the
registers into the products for dV and dK, which add up in registers, in a fixed order. Without the lse the sums of a
row would run across warps three times instead of once; and with the queries as rows (tried: 64 x 128, head dim 128, 8
warps, sm_90) P and dS take a detour through shared memory, and the kernel spills kilobytes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bivec.kernels.attention_tiles import (
    SMALLEST_EXPONENT,
    Problem,
    base2_scores,
    cap_slope,
    load_tile,
    rescaled,
    row_block,
    unscaled,
    visible,
)
from bivec.kernels.dropout_triton import attention_row_keys, kept
from bivec.kernels.launch import launch

LENGTHS = (64, 128)  # BLOCK_N; shorter batches are rare, and leave rows of a tile of 64 empty


@triton.jit(do_not_specialize=["total", "left", "right", "threshold"])
def attention_short_forward(
    q_ptr,  # [T, H, Dh]
    k_ptr,  # [T, Hkv, Dh]
    v_ptr,
    out_ptr,  # [T, H, Dh], contiguous
    lse2_ptr,  # [H, T] fp32
    cu_seqlens_ptr,  # [B+1] int32
    seed_ptr,  # [1] int64
    sample_ids_ptr,  # [B] int64
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    total,  # T
    scale2,
    cap2,
    left,
    right,
    threshold,
    inverse_keep,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: B x KV_HEADS."""
    CHECK_DIMS: tl.constexpr = HEAD_DIM != BLOCK_D
    sequence, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    start = start.to(tl.int64)
    keys = tl.arange(0, BLOCK_N)
    keys_ok = keys < length
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    k_ptrs = k_ptr + start * k_stride_t + kv_head * k_stride_h + keys[:, None] * k_stride_t + dims[None, :]
    v_ptrs = v_ptr + start * v_stride_t + kv_head * v_stride_h + keys[:, None] * v_stride_t + dims[None, :]
    k = load_tile(k_ptrs, keys_ok, dims_ok, True, CHECK_DIMS)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptrs, keys_ok, dims_ok, True, CHECK_DIMS)
    q_ptr += start * q_stride_t
    out_stride_t = KV_HEADS * GROUP * HEAD_DIM
    out_ptr += start * out_stride_t
    for row0 in range(0, length * GROUP, BLOCK_M):
        first, offsets, heads = row_block(row0, kv_head, GROUP, BLOCK_M)
        positions = first + offsets  # [BLOCK_M]
        rows_ok = positions < length
        q_ptrs = q_ptr + (positions * q_stride_t + heads * q_stride_h)[:, None] + dims[None, :]
        q = load_tile(q_ptrs, rows_ok, dims_ok, True, CHECK_DIMS)  # [BLOCK_M, BLOCK_D]
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        seen = visible(positions[:, None], keys[None, :], length, left, right, True)
        scores = tl.where(seen, base2_scores(products, scale2, cap2, HAS_SOFTCAP), float("-inf"))
        row_max = tl.max(scores, 1)
        weights = tl.exp2(scores - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
        row_sum = tl.sum(weights, 1)
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # a row without a visible key: output 0, lse -inf
        if HAS_DROPOUT:
            row_keys = attention_row_keys(seed_ptr, sample_ids_ptr, sequence, heads, positions)
            weights = tl.where(kept(row_keys[:, None], keys[None, :], threshold), weights, 0.0)
        out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        out *= (inverse_keep / row_sum)[:, None]
        out_ptrs = out_ptr + (positions * out_stride_t + heads * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=rows_ok[:, None] & dims_ok[None, :])
        lse2 = row_max + tl.log2(row_sum)
        tl.store(lse2_ptr + heads.to(tl.int64) * total + start + positions, lse2, mask=rows_ok)


@triton.jit(do_not_specialize=["total", "left", "right", "threshold"])
def attention_short_backward(
    q_ptr,  # [T, H, Dh]
    k_ptr,  # [T, Hkv, Dh]
    v_ptr,
    d_out_ptr,  # [T, H, Dh], contiguous
    d_q_ptr,  # [T, H, Dh], contiguous
    d_k_ptr,  # [T, Hkv, Dh], contiguous
    d_v_ptr,
    lse2_ptr,  # [H, T] fp32
    cu_seqlens_ptr,  # [B+1] int32
    seed_ptr,  # [1] int64
    sample_ids_ptr,  # [B] int64
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    total,  # T
    softmax_scale,
    scale2,
    cap2,
    left,
    right,
    threshold,
    inverse_keep,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: B x KV_HEADS."""
    CHECK_DIMS: tl.constexpr = HEAD_DIM != BLOCK_D
    sequence, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    start = start.to(tl.int64)
    keys = tl.arange(0, BLOCK_N)
    keys_ok = keys < length
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    k_ptrs = k_ptr + start * k_stride_t + kv_head * k_stride_h + keys[:, None] * k_stride_t + dims[None, :]
    v_ptrs = v_ptr + start * v_stride_t + kv_head * v_stride_h + keys[:, None] * v_stride_t + dims[None, :]
    k = load_tile(k_ptrs, keys_ok, dims_ok, True, CHECK_DIMS)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptrs, keys_ok, dims_ok, True, CHECK_DIMS)
    d_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    exponent = tl.full([], SMALLEST_EXPONENT, dtype=tl.float32)
    q_ptr += start * q_stride_t
    out_stride_t = KV_HEADS * GROUP * HEAD_DIM
    d_out_ptr += start * out_stride_t
    d_q_ptr += start * out_stride_t
    for row0 in range(0, length * GROUP, BLOCK_M):
        first, offsets, heads = row_block(row0, kv_head, GROUP, BLOCK_M)
        positions = first + offsets  # [BLOCK_M]
        rows_ok = positions < length
        q_ptrs = q_ptr + (positions * q_stride_t + heads * q_stride_h)[:, None] + dims[None, :]
        q = load_tile(q_ptrs, rows_ok, dims_ok, True, CHECK_DIMS)  # [BLOCK_M, BLOCK_D]
        own = (positions * out_stride_t + heads * HEAD_DIM)[:, None] + dims[None, :]
        d_out = load_tile(d_out_ptr + own, rows_ok, dims_ok, True, CHECK_DIMS)  # [BLOCK_M, BLOCK_D]
        scores = base2_scores(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale2, cap2, HAS_SOFTCAP)
        seen = visible(positions[None, :], keys[:, None], length, left, right, True)
        if q.dtype == tl.float16:
            # At scores of 1e8, which fp16 operands can have, the rounding of these products and of the forward's are
            # powers of two apart: then P from the lse is not 1 where it should be, and dQ = dS K overflows.
            top = tl.max(tl.where(seen, scores, float("-inf")), 0)  # [BLOCK_M]
            p = tl.where(seen, tl.exp2(scores - top[None, :]), 0.0)  # [BLOCK_N, BLOCK_M]
            row_sum = tl.sum(p, 0)
            p *= (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[None, :]
        else:
            stat = heads.to(tl.int64) * total + start + positions
            lse2 = tl.load(lse2_ptr + stat, mask=rows_ok, other=0.0)  # [BLOCK_M]
            p = tl.where(seen, tl.exp2(tl.minimum(scores - lse2[None, :], 0.0)), 0.0)
        used = p
        if HAS_DROPOUT:
            row_keys = attention_row_keys(seed_ptr, sample_ids_ptr, sequence, heads, positions)
            keep = kept(row_keys[None, :], keys[:, None], threshold)
            used = tl.where(keep, p, 0.0)
        # Rows behind the end have d_out = 0, and so add nothing.
        d_v = tl.dot(used.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
        d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if HAS_DROPOUT:
            d_p = tl.where(keep, d_p * inverse_keep, 0.0)
        d_scores = p * (d_p - tl.sum(p * d_p, 0)[None, :])
        if HAS_SOFTCAP:
            d_scores *= cap_slope(scores, cap2)
        operand, d_k, exponent = rescaled(d_scores, d_k, exponent, q.dtype)
        d_k = tl.dot(operand, q, d_k, input_precision=PRECISION)
        d_q = tl.dot(tl.trans(operand), k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        d_q = unscaled(d_q * softmax_scale, exponent, q.dtype)
        tl.store(d_q_ptr + own, d_q.to(d_q_ptr.dtype.element_ty), mask=rows_ok[:, None] & dims_ok[None, :])
    own = start * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
    own = own + (keys * (KV_HEADS * HEAD_DIM))[:, None] + dims[None, :]
    stored = keys_ok[:, None] & dims_ok[None, :]
    d_k = unscaled(d_k * softmax_scale, exponent, k.dtype)
    tl.store(d_k_ptr + own, d_k.to(d_k_ptr.dtype.element_ty), mask=stored)
    tl.store(d_v_ptr + own, (d_v * inverse_keep).to(d_v_ptr.dtype.element_ty), mask=stored)


def _arguments(problem: Problem) -> dict[str, Any]:
    """One kernel serves every window: in one tile the mask is there anyway, and a window is one comparison more."""
    arguments = problem.arguments() | problem.hash()
    del arguments["HAS_WINDOW"]
    return arguments


def short_forward(problem: Problem, length: int) -> tuple[Tensor, Tensor]:
    """Output ``[T, H, Dh]`` in q's dtype and lse2 ``[H, T]`` fp32; no sequence is longer than ``length``."""
    q = problem.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse2 = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    config = problem.config("attention_short_forward", length=length)
    launch(
        attention_short_forward,
        (len(problem.order) * problem.k.shape[1],),
        _arguments(problem) | {"out_ptr": out, "lse2_ptr": lse2, "BLOCK_N": length} | config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse2


def short_backward(problem: Problem, length: int, lse2: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV in q's dtype, contiguous; ``lse2`` is that of ``short_forward``."""
    q, k = problem.q, problem.k
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    config = problem.config("attention_short_backward", length=length)
    launch(
        attention_short_backward,
        (len(problem.order) * k.shape[1],),
        _arguments(problem)
        | {"softmax_scale": problem.softmax_scale, "BLOCK_N": length}
        | {"d_out_ptr": d_out.contiguous(), "d_q_ptr": d_q, "d_k_ptr": d_k, "d_v_ptr": d_v, "lse2_ptr": lse2}
        | config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return d_q, d_k, d_v
