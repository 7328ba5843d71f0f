"""What the Triton kernels of attention share: who works on what, scores, masks, and casts that do not overflow.

(Kernels are longer than our functions: a third of one is parameters, and Triton has no structures to pass.)

Rows. The G query heads of a kv head are interleaved with the positions: row r of a (sequence, kv head) is position
``r // G`` of head ``r % G`` of the group, so any G fills a tile, and K and V are read once for the whole group.

Slots. Programs own (sequence, block of rows) pairs. Sequences are ranked by length, longest first, and the one of rank
n gets the slots from ``starts[n] * G // BLOCK + n`` on, ``starts`` being the running sum of the lengths in that order:
floor(a + x) + 1 - floor(a) >= ceil(x), so they are always enough, and at most one a sequence is too many. A program
finds its sequence by counting the ranks that begin at or before its slot. This needs no table of tiles, no value on
the host and no launch of its own, serves every tile size, and starts the long sequences first.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bivec.kernels.dropout import drop_threshold
from bivec.kernels.launch import architecture
from bivec.kernels.tuning import Config, config_for, has_config

LOG2E = tl.constexpr(1.4426950408889634)
UNBOUNDED = 1 << 30  # the edge of a window that is none; position ± edge + a tile fits int32
NO_CAP = 2.0**48  # a softcap that is none: tanh(x) = x and a slope of 1 to the last place for x up to 1e8 / NO_CAP
SEARCH = tl.constexpr(256)  # ranks looked at in one step


@triton.jit
def find_block(slot, starts_ptr, order_ptr, num_sequences, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence that owns ``slot``, and which of its blocks; a block may lie behind the end of the sequence."""
    rank = -1
    for first in range(0, num_sequences, SEARCH):
        ranks = first + tl.arange(0, SEARCH)  # [SEARCH]
        inside = ranks < num_sequences
        starts = tl.load(starts_ptr + ranks, mask=inside, other=0).to(tl.int64)
        rank += tl.sum(((starts * GROUP // BLOCK + ranks <= slot) & inside).to(tl.int32), 0)
    start = tl.load(starts_ptr + rank).to(tl.int64)
    block = slot - (start * GROUP // BLOCK + rank)
    return tl.load(order_ptr + rank), block.to(tl.int32)


@triton.jit
def row_block(row0, kv_head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows row0 … row0 + BLOCK_M - 1: the first position, the positions relative to it, and the query heads."""
    first = row0 // GROUP
    in_group = row0 - first * GROUP + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    return first, in_group // GROUP, kv_head * GROUP + in_group % GROUP


@triton.jit
def load_tile(ptrs, rows_ok, dims_ok, CHECK_ROWS: tl.constexpr, CHECK_DIMS: tl.constexpr):
    """``[rows, BLOCK_D]``, zeros outside; the checks that are not needed cost nothing."""
    if CHECK_ROWS and CHECK_DIMS:
        return tl.load(ptrs, mask=rows_ok[:, None] & dims_ok[None, :], other=0.0)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=rows_ok[:, None], other=0.0)
    elif CHECK_DIMS:
        return tl.load(ptrs, mask=dims_ok[None, :], other=0.0)
    else:
        return tl.load(ptrs)


DIM_CHUNK = tl.constexpr(32)  # head dims that ``chunked_products`` reads at a time


@triton.jit
def chunked_products(
    a_rows,  # [BLOCK_A, 1]: where the rows begin
    b_rows,  # [BLOCK_B, 1]
    a_ok,  # [BLOCK_A] bool
    b_ok,  # [BLOCK_B] bool
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``a b^T`` ``[BLOCK_A, BLOCK_B]`` fp32, of operands that no thread could hold, read a few dimensions at a time.

    Of fp32 operands at head dim 256, 16 rows, which every warp needs whole and split in two, fill all registers.
    """
    acc = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    for first in range(0, BLOCK_D, DIM_CHUNK):
        dims = first + tl.arange(0, DIM_CHUNK)
        dims_ok = dims < HEAD_DIM
        a = load_tile(a_rows + dims[None, :], a_ok, dims_ok, True, HEAD_DIM != BLOCK_D)
        b = load_tile(b_rows + dims[None, :], b_ok, dims_ok, True, HEAD_DIM != BLOCK_D)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def tanh(x):
    """tanh in fp32, to 2 units in the last place: a series near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    square = x * x
    series = 0.021869488536155203  # 62/2835, -17/315, 2/15, -1/3
    series = series * square - 0.05396825396825397
    series = series * square + 0.13333333333333333
    series = series * square - 0.3333333333333333
    series = x + x * square * series
    exact = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.25, series, exact)


@triton.jit
def base2_scores(products, scale2, cap2, HAS_SOFTCAP: tl.constexpr):
    """Scores times log2(e), from q·k.

    Without softcap scale2 = scale log2(e); with it scale2 = scale / softcap and cap2 = softcap log2(e).
    """
    if HAS_SOFTCAP:
        return tanh(products * scale2) * cap2
    else:
        return products * scale2


@triton.jit
def cap_slope(scores, cap2):
    """The derivative of the capped score by the uncapped one: 1 - tanh²."""
    t = scores * (1.0 / cap2)
    return 1.0 - t * t


@triton.jit
def visible(positions, keys, length, left, right, HAS_WINDOW: tl.constexpr):
    """Whether rows see keys, for int32 positions and keys that broadcast to a tile."""
    if HAS_WINDOW:
        return (keys >= positions - left) & (keys <= tl.minimum(positions + right, length - 1))
    else:
        return keys < length


@triton.jit
def last_block(length, BLOCK: tl.constexpr):
    """Where the last block begins; it holds 1 to BLOCK of the ``length`` keys, of which there is at least one."""
    return (length - 1) // BLOCK * BLOCK


@triton.jit
def key_range(first, last, length, left, right, BLOCK_N: tl.constexpr):
    """begin and end of the keys of which some row at the positions first … last sees one; begin is that of a block."""
    return tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N, tl.minimum(length, last + right + 1)


@triton.jit
def row_range(first, length, left, right, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """begin and end of the rows of which some sees one of the keys first … first + BLOCK_N - 1."""
    begin = tl.maximum(first - right, 0) * GROUP // BLOCK_M * BLOCK_M
    return begin, tl.minimum(length, first + BLOCK_N + left) * GROUP


SMALLEST_EXPONENT = tl.constexpr(-100.0)  # where ``rescaled`` begins


@triton.jit
def rescaled(d_scores, acc, exponent, dtype: tl.constexpr):
    """d_scores as an operand of a dot, and the accumulator that the dot adds to, both divided by 2^exponent.

    In fp16 a gradient of the scores may pass 65504 although the gradients of q and k do not, and small ones would lose
    their bits. So the exponent follows the largest |d_scores| of the tiles so far, which it brings into (2^13, 2^14].
    Other dtypes have fp32's range: their exponent stays, and is not used.
    """
    if dtype == tl.float16:
        top = tl.maximum(tl.max(tl.max(tl.abs(d_scores), 1), 0), 1e-30)
        largest = tl.maximum(exponent, tl.ceil(tl.log2(top)) - 14.0)
        return (d_scores * tl.exp2(-largest)).to(dtype), acc * tl.exp2(exponent - largest), largest
    else:
        return d_scores.to(dtype), acc, exponent


@triton.jit
def unscaled(acc, exponent, dtype: tl.constexpr):
    """The accumulator of ``rescaled`` at its true size."""
    if dtype == tl.float16:
        return acc * tl.exp2(exponent)
    else:
        return acc


@dataclass(frozen=True)
class Problem:
    """One call on tensors, and the arguments that its kernels have in common."""

    q: Tensor  # [T, H, Dh]
    k: Tensor  # [T, Hkv, Dh]
    v: Tensor  # [T, Hkv, Dh]
    cu_seqlens: Tensor  # [B+1] int32
    starts: Tensor  # [B+1] int32: running sum of the lengths, longest first
    order: Tensor  # [B] int32: the sequences in that order
    softmax_scale: float
    softcap: float | None
    left: int | None  # keys seen to the left of a row; None = all
    right: int | None
    dropout_p: float
    seed: Tensor | None  # [1] int64
    sample_ids: Tensor | None  # [B] int64

    @property
    def group(self) -> int:
        """G, the query heads of a kv head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def block_d(self) -> int:
        """The head dimension as the kernels see it: a power of two."""
        return max(16, int(triton.next_power_of_2(self.q.shape[2])))

    def slots(self, rows_per_token: int, block: int) -> int:
        """How many blocks of ``block`` rows the sequences take at most (module docstring)."""
        sequences = len(self.order)
        return self.q.shape[0] * rows_per_token // block + sequences if self.q.shape[0] and sequences else 0

    def config(self, kernel: str, **key: int) -> Config:
        """The row of the tuning table."""
        return config_for("attention", kernel, architecture(self.q.device), **self._key(), **key)

    def has_config(self, kernel: str, **key: int) -> bool:
        """Whether the tuning table has one."""
        return has_config("attention", kernel, architecture(self.q.device), **self._key(), **key)

    def _key(self) -> dict[str, int]:
        return {"head_dim": max(64, self.block_d), "itemsize": self.q.element_size()}  # narrower heads: rows of 64

    def arguments(self) -> dict[str, Any]:
        """Operands, strides, options and constexprs that all kernels take."""
        q, k, v = self.q, self.k, self.v
        # One fp32 kernel serves every window and softcap: it is there for accuracy, and each of ours takes a second to
        # compile. Scores of up to 1e8 pass this cap unchanged.
        softcap = NO_CAP if self.softcap is None and q.dtype == torch.float32 else self.softcap
        windowed = self.left is not None or self.right is not None or q.dtype == torch.float32
        return {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "cu_seqlens_ptr": self.cu_seqlens,
            "q_stride_t": q.stride(0),
            "q_stride_h": q.stride(1),
            "k_stride_t": k.stride(0),
            "k_stride_h": k.stride(1),
            "v_stride_t": v.stride(0),
            "v_stride_h": v.stride(1),
            "total": q.shape[0],
            "scale2": self.softmax_scale * math.log2(math.e) if softcap is None else self.softmax_scale / softcap,
            "cap2": 1.0 if softcap is None else softcap * math.log2(math.e),
            "left": UNBOUNDED if self.left is None else self.left,
            "right": UNBOUNDED if self.right is None else self.right,
            "threshold": drop_threshold(self.dropout_p),
            "inverse_keep": 1.0 / (1.0 - self.dropout_p),
            "KV_HEADS": k.shape[1],
            "GROUP": self.group,
            "HEAD_DIM": q.shape[2],
            "BLOCK_D": self.block_d,
            "HAS_WINDOW": windowed,
            "HAS_SOFTCAP": softcap is not None,
            "HAS_DROPOUT": self.dropout_p > 0.0,
            # fp32 products: TF32 alone is too coarse, and AMD's compiler knows no split TF32.
            "PRECISION": "ieee" if architecture(q.device).startswith("gfx") else "tf32x3",
        }

    def schedule(self) -> dict[str, Any]:
        """What ``find_block`` reads."""
        return {"starts_ptr": self.starts, "order_ptr": self.order, "num_sequences": len(self.order)}

    def hash(self) -> dict[str, Any]:
        """What ``attention_row_keys`` reads; nothing without dropout."""
        dropped = self.dropout_p > 0.0
        return {"seed_ptr": self.seed if dropped else None, "sample_ids_ptr": self.sample_ids if dropped else None}
