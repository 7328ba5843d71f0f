"""Attention of long sequences in Triton, backward (formulas: ``kernels/attention.py``).

Two kernels, both computing the probabilities again from the lse:

* the dQ kernel owns BLOCK_M rows and walks over the keys; it also writes ``delta = rowsum(dO * O)`` and, with dropout,
  the rows' keys of the hash, for
* the dK/dV kernel, which owns BLOCK_N keys and walks over the rows of *all* query heads of the group, so that their
  gradients add up in registers, in a fixed order, without atomics.

P is kept at or below 1: at scores of 1e8, which fp16 operands can have, products that are summed up in another order
than the forward's differ by more than exp2 can take.

Multiply-adds: 7 L^2 H Dh; scores and dP are computed by both.

Source: Dao, "FlashAttention-2" (2023).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bivec.kernels.attention_tiles import (
    SMALLEST_EXPONENT,
    Problem,
    base2_scores,
    cap_slope,
    chunked_products,
    find_block,
    key_range,
    last_block,
    load_tile,
    rescaled,
    row_block,
    row_range,
    unscaled,
    visible,
)
from bivec.kernels.dropout_triton import attention_row_keys, kept
from bivec.kernels.launch import launch


@triton.jit
def _query_step(
    n,  # the first key of the block
    q,  # [BLOCK_M, BLOCK_D]; if IN_CHUNKS pointers to its rows, [BLOCK_M, 1]
    d_out,  # likewise
    acc,  # [BLOCK_M, BLOCK_D] fp32
    exponent,
    lse2,  # [BLOCK_M] fp32, base 2
    delta,  # [BLOCK_M] fp32
    k_rows,  # [BLOCK_N, 1] pointers, of key 0
    v_rows,
    k_stride_t,
    v_stride_t,
    positions,  # [BLOCK_M]
    row_keys,  # [BLOCK_M] int32
    length,
    scale2,
    cap2,
    left,
    right,
    threshold,
    inverse_keep,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    IN_CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the contribution of one block of keys to dQ."""
    CHECK_DIMS: tl.constexpr = HEAD_DIM != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    keys = n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    keys_ok = keys < length
    n_wide = tl.cast(n, tl.int64)
    k_rows += n_wide * k_stride_t
    v_rows += n_wide * v_stride_t
    rows_ok = positions < length
    k = load_tile(k_rows + dims[None, :], keys_ok, dims_ok, MASKED, CHECK_DIMS)
    if IN_CHUNKS:
        products = chunked_products(
            q, k_rows, rows_ok, keys_ok, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION
        )  # [BLOCK_M, BLOCK_N]
    else:
        v = load_tile(v_rows + dims[None, :], keys_ok, dims_ok, MASKED, CHECK_DIMS)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    scores = base2_scores(products, scale2, cap2, HAS_SOFTCAP)
    p = tl.exp2(tl.minimum(scores - lse2[:, None], 0.0))
    if MASKED:
        p = tl.where(visible(positions[:, None], keys[None, :], length, left, right, HAS_WINDOW), p, 0.0)
    if IN_CHUNKS:
        d_p = chunked_products(d_out, v_rows, rows_ok, keys_ok, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION)
    else:
        d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if HAS_DROPOUT:
        d_p = tl.where(kept(row_keys[:, None], keys[None, :], threshold), d_p * inverse_keep, 0.0)
    d_scores = p * (d_p - delta[:, None])
    if HAS_SOFTCAP:
        d_scores *= cap_slope(scores, cap2)
    operand, acc, exponent = rescaled(d_scores, acc, exponent, k.dtype)
    return tl.dot(operand, k, acc, input_precision=PRECISION), exponent


@triton.jit(do_not_specialize=["num_sequences", "total", "left", "right", "threshold"])
def attention_backward_q(
    q_ptr,  # [T, H, Dh]
    k_ptr,  # [T, Hkv, Dh]
    v_ptr,
    out_ptr,  # [T, H, Dh], contiguous
    d_out_ptr,  # [T, H, Dh], contiguous
    d_q_ptr,  # [T, H, Dh], contiguous
    lse2_ptr,  # [H, T] fp32
    delta_ptr,  # [H, T] fp32, written
    row_keys_ptr,  # [H, T] int32, written
    cu_seqlens_ptr,  # [B+1] int32
    starts_ptr,  # [B+1] int32
    order_ptr,  # [B] int32
    seed_ptr,  # [1] int64
    sample_ids_ptr,  # [B] int64
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    num_sequences,
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
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (slots of BLOCK_M rows) x KV_HEADS."""
    CHECK_DIMS: tl.constexpr = HEAD_DIM != BLOCK_D
    TAIL_FIRST: tl.constexpr = not HAS_WINDOW and BLOCK_D <= 128 and q_ptr.dtype.element_ty != tl.float32
    IN_CHUNKS: tl.constexpr = BLOCK_D > 128 and q_ptr.dtype.element_ty == tl.float32
    kv_head = tl.program_id(0) % KV_HEADS
    sequence, block = find_block(tl.program_id(0) // KV_HEADS, starts_ptr, order_ptr, num_sequences, GROUP, BLOCK_M)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    rows, row0 = length * GROUP, block * BLOCK_M
    if row0 >= rows:
        return
    start = start.to(tl.int64)
    first, offsets, heads = row_block(row0, kv_head, GROUP, BLOCK_M)
    last = tl.minimum(row0 + BLOCK_M, rows) - 1
    last = last // GROUP
    positions = first + offsets  # [BLOCK_M]
    rows_ok = positions < length
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    keys = tl.arange(0, BLOCK_N)

    q = q_ptr + (start + first) * q_stride_t + (offsets * q_stride_t + heads * q_stride_h)[:, None]  # its rows
    k_rows = k_ptr + start * k_stride_t + kv_head * k_stride_h + keys[:, None] * k_stride_t
    v_rows = v_ptr + start * v_stride_t + kv_head * v_stride_h + keys[:, None] * v_stride_t
    out_stride_t = KV_HEADS * GROUP * HEAD_DIM
    own_rows = (start + first) * out_stride_t + (offsets * out_stride_t + heads * HEAD_DIM)[:, None]
    own = own_rows + dims[None, :]
    d_out = load_tile(d_out_ptr + own, rows_ok, dims_ok, True, CHECK_DIMS)  # [BLOCK_M, BLOCK_D]
    out = load_tile(out_ptr + own, rows_ok, dims_ok, True, CHECK_DIMS)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)  # [BLOCK_M]
    if IN_CHUNKS:
        d_out = d_out_ptr + own_rows
    else:
        q = load_tile(q + dims[None, :], rows_ok, dims_ok, True, CHECK_DIMS)  # [BLOCK_M, BLOCK_D]
    stat = heads.to(tl.int64) * total + start + positions
    tl.store(delta_ptr + stat, delta, mask=rows_ok)
    lse2 = tl.load(lse2_ptr + stat, mask=rows_ok, other=float("inf"))
    row_keys = positions  # not read without dropout
    if HAS_DROPOUT:
        row_keys = attention_row_keys(seed_ptr, sample_ids_ptr, sequence, heads, positions)
        tl.store(row_keys_ptr + stat, row_keys, mask=rows_ok)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    exponent = tl.full([], SMALLEST_EXPONENT, dtype=tl.float32)
    # fmt: off
    begin, end = 0, length
    if HAS_WINDOW:
        begin, end = key_range(first, last, length, left, right, BLOCK_N)
    if TAIL_FIRST:
        end = last_block(length, BLOCK_N)
        acc, exponent = _query_step(
            end, q, d_out, acc, exponent, lse2, delta, k_rows, v_rows, k_stride_t, v_stride_t, positions, row_keys,
            length, scale2, cap2, left, right, threshold, inverse_keep, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, True, IN_CHUNKS, PRECISION,
        )
    for n in range(begin, end, BLOCK_N):
        acc, exponent = _query_step(
            n, q, d_out, acc, exponent, lse2, delta, k_rows, v_rows, k_stride_t, v_stride_t, positions, row_keys,
            length, scale2, cap2, left, right, threshold, inverse_keep, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, not TAIL_FIRST, IN_CHUNKS, PRECISION,
        )
    # fmt: on
    d_q = unscaled(acc * softmax_scale, exponent, q_ptr.dtype.element_ty)
    tl.store(d_q_ptr + own, d_q.to(d_q_ptr.dtype.element_ty), mask=rows_ok[:, None] & dims_ok[None, :])


@triton.jit(do_not_specialize=["num_sequences", "total", "left", "right", "threshold"])
def attention_backward_kv(
    q_ptr,  # [T, H, Dh]
    k_ptr,  # [T, Hkv, Dh]
    v_ptr,
    d_out_ptr,  # [T, H, Dh], contiguous
    d_k_ptr,  # [T, Hkv, Dh], contiguous
    d_v_ptr,
    lse2_ptr,  # [H, T] fp32
    delta_ptr,  # [H, T] fp32
    row_keys_ptr,  # [H, T] int32
    cu_seqlens_ptr,  # [B+1] int32
    starts_ptr,  # [B+1] int32
    order_ptr,  # [B] int32
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    num_sequences,
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
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (slots of BLOCK_N keys) x KV_HEADS."""
    CHECK_DIMS: tl.constexpr = HEAD_DIM != BLOCK_D
    IN_CHUNKS: tl.constexpr = BLOCK_D > 128 and q_ptr.dtype.element_ty == tl.float32
    kv_head = tl.program_id(0) % KV_HEADS
    sequence, block = find_block(tl.program_id(0) // KV_HEADS, starts_ptr, order_ptr, num_sequences, 1, BLOCK_N)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    first_key = block * BLOCK_N
    if first_key >= length:
        return
    start = start.to(tl.int64)
    key_offsets = tl.arange(0, BLOCK_N)
    keys = first_key + key_offsets  # [BLOCK_N]
    keys_ok = keys < length
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    first_wide = start + first_key
    k_rows = k_ptr + first_wide * k_stride_t + kv_head * k_stride_h + key_offsets[:, None] * k_stride_t
    v_rows = v_ptr + first_wide * v_stride_t + kv_head * v_stride_h + key_offsets[:, None] * v_stride_t
    if not IN_CHUNKS:
        # Keys behind the end are zeros; what they give stays in their own rows of dK and dV, which are not stored.
        k = load_tile(k_rows + dims[None, :], keys_ok, dims_ok, True, CHECK_DIMS)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_rows + dims[None, :], keys_ok, dims_ok, True, CHECK_DIMS)

    begin, end = 0, length * GROUP
    if HAS_WINDOW:
        begin, end = row_range(first_key, length, left, right, GROUP, BLOCK_M, BLOCK_N)
    d_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    exponent = tl.full([], SMALLEST_EXPONENT, dtype=tl.float32)
    lse2_ptr += start
    delta_ptr += start
    if HAS_DROPOUT:
        row_keys_ptr += start
    q_ptr += start * q_stride_t
    out_stride_t = KV_HEADS * GROUP * HEAD_DIM
    d_out_ptr += start * out_stride_t
    for row0 in range(begin, end, BLOCK_M):
        first, offsets, heads = row_block(row0, kv_head, GROUP, BLOCK_M)
        positions = first + offsets  # [BLOCK_M]
        rows_ok = positions < length
        first_wide = tl.cast(first, tl.int64)
        q_rows = q_ptr + first_wide * q_stride_t + (offsets * q_stride_t + heads * q_stride_h)[:, None]
        q = load_tile(q_rows + dims[None, :], rows_ok, dims_ok, True, CHECK_DIMS)  # [BLOCK_M, BLOCK_D]
        d_out_rows = d_out_ptr + first_wide * out_stride_t + (offsets * out_stride_t + heads * HEAD_DIM)[:, None]
        stat = heads.to(tl.int64) * total + positions
        lse2 = tl.load(lse2_ptr + stat, mask=rows_ok, other=float("inf"))  # [BLOCK_M]; behind the end p = 0
        if IN_CHUNKS:
            products = chunked_products(
                k_rows, q_rows, keys_ok, rows_ok, BLOCK_N, BLOCK_M, HEAD_DIM, BLOCK_D, PRECISION
            )  # [BLOCK_N, BLOCK_M]
        else:
            products = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        scores = base2_scores(products, scale2, cap2, HAS_SOFTCAP)
        p = tl.exp2(tl.minimum(scores - lse2[None, :], 0.0))  # [BLOCK_N, BLOCK_M]
        if HAS_WINDOW or q.dtype == tl.float16:  # in fp16 a key behind the end must not set the exponent
            seen = visible(positions[None, :], keys[:, None], length, left, right, HAS_WINDOW)
            p = tl.where(seen, p, 0.0)
        d_out = load_tile(d_out_rows + dims[None, :], rows_ok, dims_ok, True, CHECK_DIMS)  # [BLOCK_M, BLOCK_D]
        used = p
        if HAS_DROPOUT:
            row_keys = tl.load(row_keys_ptr + stat, mask=rows_ok, other=0)  # [BLOCK_M]
            keep = kept(row_keys[None, :], keys[:, None], threshold)
            used = tl.where(keep, p, 0.0)
        d_v = tl.dot(used.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
        if IN_CHUNKS:
            d_p = chunked_products(
                v_rows, d_out_rows, keys_ok, rows_ok, BLOCK_N, BLOCK_M, HEAD_DIM, BLOCK_D, PRECISION
            )  # [BLOCK_N, BLOCK_M]
        else:
            d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if HAS_DROPOUT:
            d_p = tl.where(keep, d_p * inverse_keep, 0.0)
        delta = tl.load(delta_ptr + stat, mask=rows_ok, other=0.0)  # [BLOCK_M]
        d_scores = p * (d_p - delta[None, :])
        if HAS_SOFTCAP:
            d_scores *= cap_slope(scores, cap2)
        operand, d_k, exponent = rescaled(d_scores, d_k, exponent, q.dtype)
        d_k = tl.dot(operand, q, d_k, input_precision=PRECISION)
    own = (start + first_key) * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
    own = own + (key_offsets * (KV_HEADS * HEAD_DIM))[:, None] + dims[None, :]
    stored = keys_ok[:, None] & dims_ok[None, :]
    d_k = unscaled(d_k * softmax_scale, exponent, q_ptr.dtype.element_ty)
    tl.store(d_k_ptr + own, d_k.to(d_k_ptr.dtype.element_ty), mask=stored)
    tl.store(d_v_ptr + own, (d_v * inverse_keep).to(d_v_ptr.dtype.element_ty), mask=stored)


def long_backward(problem: Problem, out: Tensor, lse2: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV in q's dtype, contiguous; ``out`` and ``lse2`` are those of ``long_forward``."""
    q, k = problem.q, problem.k
    d_out = d_out.contiguous()
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    delta = torch.empty_like(lse2)
    row_keys = torch.empty_like(lse2, dtype=torch.int32) if problem.dropout_p > 0.0 else None
    common = problem.arguments() | problem.schedule() | {"d_out_ptr": d_out, "lse2_ptr": lse2, "delta_ptr": delta}
    common |= {"row_keys_ptr": row_keys, "softmax_scale": problem.softmax_scale}

    config = problem.config("attention_backward_q")
    launch(
        attention_backward_q,
        (problem.slots(problem.group, config.blocks["BLOCK_M"]) * k.shape[1],),
        common | problem.hash() | {"out_ptr": out, "d_q_ptr": d_q} | config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    config = problem.config("attention_backward_kv")
    launch(
        attention_backward_kv,
        (problem.slots(1, config.blocks["BLOCK_N"]) * k.shape[1],),
        common | {"d_k_ptr": d_k, "d_v_ptr": d_v} | config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return d_q, d_k, d_v
