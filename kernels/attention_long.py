"""Attention of long sequences in Triton, forward (formulas: ``kernels/attention.py``).

A program owns BLOCK_M rows and walks over the keys with an online softmax in base 2; K and V are read once for the
query heads of a group. Saved for the backward: the output, and the lse in base 2, lse2 ``[H, T]`` fp32.

Without a window only the last block of keys needs a mask: it comes first (TAIL_FIRST), so that the loop over the others
has none. An unmasked loop followed by a masked one made ptxas serialise the tensor-core instructions on sm_90. With a
window, causal included, one masked loop visits the blocks of which some row sees a key: a third copy of the step for
the blocks in the middle would have to earn its registers first. One masked loop it is, too, where the first step's
registers beside the loop's are too many: head dim 256 and fp32. At head dim 256 in fp32 the operands of the scores are
read in chunks of the head dimension (IN_CHUNKS), of q again at every step.

Source: Dao, "FlashAttention-2" (2023); Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bivec.kernels.attention_tiles import (
    Problem,
    base2_scores,
    chunked_products,
    find_block,
    key_range,
    last_block,
    load_tile,
    row_block,
    visible,
)
from bivec.kernels.dropout_triton import attention_row_keys, kept
from bivec.kernels.launch import launch


@triton.jit
def _step(
    n,  # the first key of the block
    q,  # [BLOCK_M, BLOCK_D]; if IN_CHUNKS pointers to its rows, [BLOCK_M, 1]
    acc,  # [BLOCK_M, BLOCK_D] fp32
    row_max,  # [BLOCK_M] fp32, base 2
    row_sum,  # [BLOCK_M] fp32
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
    """The online softmax over one block of keys."""
    CHECK_DIMS: tl.constexpr = HEAD_DIM != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    keys = n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    keys_ok = keys < length
    n_wide = tl.cast(n, tl.int64)
    k_rows += n_wide * k_stride_t
    v_rows += n_wide * v_stride_t
    if not IN_CHUNKS:
        k = load_tile(k_rows + dims[None, :], keys_ok, dims_ok, MASKED, CHECK_DIMS)
    v = load_tile(v_rows + dims[None, :], keys_ok, dims_ok, MASKED, CHECK_DIMS)
    if IN_CHUNKS:
        products = chunked_products(
            q, k_rows, positions < length, keys_ok, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION
        )  # [BLOCK_M, BLOCK_N]
    else:
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    scores = base2_scores(products, scale2, cap2, HAS_SOFTCAP)
    if MASKED:
        seen = visible(positions[:, None], keys[None, :], length, left, right, HAS_WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = new_max
    if MASKED:  # a row may have seen nothing yet
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(p, 1)
    if HAS_DROPOUT:
        p = tl.where(kept(row_keys[:, None], keys[None, :], threshold), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["num_sequences", "total", "left", "right", "threshold"])
def attention_forward(
    q_ptr,  # [T, H, Dh]
    k_ptr,  # [T, Hkv, Dh]
    v_ptr,
    out_ptr,  # [T, H, Dh], contiguous
    lse2_ptr,  # [H, T] fp32
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
    if not IN_CHUNKS:
        q = load_tile(q + dims[None, :], rows_ok, dims_ok, True, CHECK_DIMS)  # [BLOCK_M, BLOCK_D]
    k_rows = k_ptr + start * k_stride_t + kv_head * k_stride_h + keys[:, None] * k_stride_t
    v_rows = v_ptr + start * v_stride_t + kv_head * v_stride_h + keys[:, None] * v_stride_t
    row_keys = positions  # not read without dropout
    if HAS_DROPOUT:
        row_keys = attention_row_keys(seed_ptr, sample_ids_ptr, sequence, heads, positions)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # fmt: off
    begin, end = 0, length
    if HAS_WINDOW:
        begin, end = key_range(first, last, length, left, right, BLOCK_N)
    if TAIL_FIRST:
        end = last_block(length, BLOCK_N)
        acc, row_max, row_sum = _step(
            end, q, acc, row_max, row_sum, k_rows, v_rows, k_stride_t, v_stride_t, positions, row_keys, length, scale2,
            cap2, left, right, threshold, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT,
            True, IN_CHUNKS, PRECISION,
        )
    for n in range(begin, end, BLOCK_N):
        acc, row_max, row_sum = _step(
            n, q, acc, row_max, row_sum, k_rows, v_rows, k_stride_t, v_stride_t, positions, row_keys, length, scale2,
            cap2, left, right, threshold, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT,
            not TAIL_FIRST, IN_CHUNKS, PRECISION,
        )
    # fmt: on

    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # a row without a visible key: output 0, lse -inf
    out = acc * (inverse_keep / row_sum)[:, None]
    out_stride_t = KV_HEADS * GROUP * HEAD_DIM
    out_ptrs = out_ptr + (start + first) * out_stride_t + (offsets * out_stride_t + heads * HEAD_DIM)[:, None]
    tl.store(out_ptrs + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=rows_ok[:, None] & dims_ok[None, :])
    lse2 = row_max + tl.log2(row_sum)
    tl.store(lse2_ptr + heads.to(tl.int64) * total + start + positions, lse2, mask=rows_ok)


def long_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output ``[T, H, Dh]`` in q's dtype and lse2 ``[H, T]`` fp32."""
    q = problem.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse2 = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    config = problem.config("attention_forward")
    arguments = problem.arguments() | problem.schedule() | problem.hash() | {"out_ptr": out, "lse2_ptr": lse2}
    launch(
        attention_forward,
        (problem.slots(problem.group, config.blocks["BLOCK_M"]) * problem.k.shape[1],),
        arguments | config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse2
