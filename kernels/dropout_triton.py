"""The counter-based dropout of ``kernels/dropout.py`` inside Triton kernels: the same bits, drawn tile by tile."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs

import triton
import triton.language as tl

from bivec.kernels import dropout

GOLDEN64 = tl.constexpr(dropout.GOLDEN64)
MIX64_A = tl.constexpr(dropout.MIX64_A)
MIX64_B = tl.constexpr(dropout.MIX64_B)
COLUMN_STEP = tl.constexpr(dropout.COLUMN_STEP)
MIX32_A = tl.constexpr(dropout.MIX32_A)
MIX32_B = tl.constexpr(dropout.MIX32_B)


@triton.jit
def mix64(x):
    """SplitMix64's finaliser on int64; the masks make the arithmetic shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX64_A
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX64_B
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def absorb(state, word):
    """Folds int64 words into an int64 state."""
    return mix64(state + (word + 1) * GOLDEN64)


@triton.jit
def attention_row_keys(seed_ptr, sample_ids_ptr, sequence, heads, rows):
    """The int32 keys of attention rows: ``heads`` and ``rows`` int32 of one shape, rows counted inside the sequence."""
    state = absorb(mix64(tl.load(seed_ptr)), tl.load(sample_ids_ptr + sequence))
    return absorb(state, (heads.to(tl.int64) << 32) | rows.to(tl.int64)).to(tl.int32)


@triton.jit
def linear_row_keys(seed, token_ids):
    """The int32 keys of the rows of a linear layer's input, from an int64 seed and int64 token ids."""
    return absorb(mix64(seed), token_ids).to(tl.int32)


@triton.jit
def kept(row_keys, columns, threshold):
    """Whether elements are kept: int32 row keys and column numbers that broadcast to a tile."""
    x = row_keys + columns * COLUMN_STEP
    x = (x ^ (x >> 16)) * MIX32_A
    x = (x ^ (x >> 15)) * MIX32_B
    return x >= threshold
