"""The Triton backend of ``apply_rotary``: q and k in one launch, out of place or where they lie.

    y₁ = x₁ · cos - x₂ · sin        y₂ = x₂ · cos + x₁ · sin        x = [x₁ | x₂], halves of a head

The angle of a token is read from the tables by its position inside the kernel, in fp32; a position outside the tables,
which no host looks at on a GPU, makes its token NaN. The backward is the same launch with sin negated.

Tiles. A program owns BLOCK_TILE pairs (x₁, x₂): the heads of a token, or those of some tokens where there are few; half
of Dh and the heads are padded to powers of two. The first programs are those of q, the rest those of k. All heads of a
token read the same row of the tables, the later ones from the L1 cache: with Dh = 128, 512 bytes a head beside the 512
that a bf16 head itself moves through memory, which is what bounds the kernel.

In place. Autograd lets a function overwrite a view only if it returns nothing else, and q and k are views (of two
projections' outputs, or slices of one). So they are not declared to be overwritten: an operator that says what it
mutates raises their versions, which every backward that has saved them will notice, and the function hands out aliases
of q and k that carry the gradient. Only these are to be used: read through q, k or the projection they are slices of,
the turned numbers count as unturned ones to autograd.

Saved for backward: the tables and the position ids, as given; no activation. Elements moved: 1 read and 1 write of q
and of k, each way. The backward writes new tensors: others may hold the gradients that it is given.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
# No `from __future__ import annotations`: torch.library reads the operators' schemas from the annotations.
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bivec.kernels.launch import architecture, launch
from bivec.kernels.tuning import config_for


@triton.jit
def rotate_tile(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    token_stride,
    head_stride,
    out_token_stride,
    out_head_stride,
    num_tokens,
    num_positions,
    direction,
    tile,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rows are (token, head): BLOCK_HEADS heads of each of BLOCK_ROWS / BLOCK_HEADS tokens."""
    HEAD_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    in_tile = tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    tokens = (tile // HEAD_BLOCKS).to(tl.int64) * (BLOCK_ROWS // BLOCK_HEADS) + in_tile // BLOCK_HEADS
    heads = (tile % HEAD_BLOCKS).to(tl.int64) * BLOCK_HEADS + in_tile % BLOCK_HEADS
    rows_ok = (tokens < num_tokens) & (heads < HEADS)
    dims = tl.arange(0, BLOCK_HALF)  # [BLOCK_HALF]
    dims_ok = dims < HALF
    mask = rows_ok[:, None] & dims_ok[None, :]  # [BLOCK_ROWS, BLOCK_HALF]

    positions = tl.load(position_ids_ptr + tokens, mask=rows_ok, other=0)  # [BLOCK_ROWS]
    in_table = ((positions >= 0) & (positions < num_positions))[:, None] & dims_ok[None, :]
    table_offsets = positions[:, None] * HALF + dims[None, :]
    cos = tl.load(cos_ptr + table_offsets, mask=in_table, other=float("nan"))
    sin = tl.load(sin_ptr + table_offsets, mask=in_table, other=float("nan"))
    cos, sin = cos.to(tl.float32), sin.to(tl.float32) * direction

    first_ptrs = x_ptr + tokens[:, None] * token_stride + heads[:, None] * head_stride + dims[None, :]
    first = tl.load(first_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + tokens[:, None] * out_token_stride + heads[:, None] * out_head_stride + dims[None, :]
    tl.store(out_ptrs, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "q_tiles"])
def rotary(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    q_out_token_stride,
    q_out_head_stride,
    k_out_token_stride,
    k_out_head_stride,
    num_tokens,
    num_positions,
    q_tiles,
    direction,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_Q_HEADS: tl.constexpr,
    BLOCK_K_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Grid: the tiles of q, then those of k. The outputs may be the inputs. ``direction`` is 1, or -1 to turn back."""
    program = tl.program_id(0)
    if program < q_tiles:
        rotate_tile(
            q_ptr,
            q_out_ptr,
            cos_ptr,
            sin_ptr,
            position_ids_ptr,
            q_token_stride,
            q_head_stride,
            q_out_token_stride,
            q_out_head_stride,
            num_tokens,
            num_positions,
            direction,
            program,
            Q_HEADS,
            HALF,
            BLOCK_Q_HEADS,
            BLOCK_ROWS,
            BLOCK_HALF,
        )
    else:
        rotate_tile(
            k_ptr,
            k_out_ptr,
            cos_ptr,
            sin_ptr,
            position_ids_ptr,
            k_token_stride,
            k_head_stride,
            k_out_token_stride,
            k_out_head_stride,
            num_tokens,
            num_positions,
            direction,
            program - q_tiles,
            K_HEADS,
            HALF,
            BLOCK_K_HEADS,
            BLOCK_ROWS,
            BLOCK_HALF,
        )


def _launch(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    inverse: bool,
) -> None:
    """Rotates q into ``q_out`` and k into ``k_out``, whose last dims are contiguous."""
    config = config_for("rotary", "rotary", architecture(q.device), itemsize=q.element_size())
    num_tokens, q_heads, head_dim = q.shape
    k_heads, half = k.shape[1], head_dim // 2
    block_half = triton.next_power_of_2(max(half, 1))
    block_rows = max(config.blocks["BLOCK_TILE"] // block_half, 1)

    def tiling(heads: int) -> tuple[int, int]:
        """Heads of a token in a tile, and tiles."""
        block = min(triton.next_power_of_2(max(heads, 1)), block_rows)
        return block, triton.cdiv(num_tokens, block_rows // block) * triton.cdiv(heads, block)

    (block_q_heads, q_tiles), (block_k_heads, k_tiles) = tiling(q_heads), tiling(k_heads)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "q_out_ptr": q_out,
        "k_out_ptr": k_out,
        "cos_ptr": cos.contiguous(),
        "sin_ptr": sin.contiguous(),
        "position_ids_ptr": position_ids.contiguous(),
        "q_token_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "k_token_stride": k.stride(0),
        "k_head_stride": k.stride(1),
        "q_out_token_stride": q_out.stride(0),
        "q_out_head_stride": q_out.stride(1),
        "k_out_token_stride": k_out.stride(0),
        "k_out_head_stride": k_out.stride(1),
        "num_tokens": num_tokens,
        "num_positions": cos.shape[0],
        "q_tiles": q_tiles,
        "direction": -1.0 if inverse else 1.0,
        "Q_HEADS": max(q_heads, 1),  # where there is none, there is no program for it
        "K_HEADS": max(k_heads, 1),
        "HALF": half,
        "BLOCK_Q_HEADS": block_q_heads,
        "BLOCK_K_HEADS": block_k_heads,
        "BLOCK_ROWS": block_rows,
        "BLOCK_HALF": block_half,
    }
    if half:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        launch(rotary, (q_tiles + k_tiles,), arguments, **options)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Launches the kernel into new tensors; see ``rotary_op``."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    _launch(q, k, q_out, k_out, cos, sin, position_ids, inverse)
    return q_out, k_out


@torch.library.custom_op("bivec::rotary", mutates_args=())
def rotary_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The rotated q and k.

    Args:
        q: [T, H, Dh], of ``TRITON_DTYPES``.
        k: [T, Hkv, Dh], dtype of q.
        cos: [max_position, Dh/2].
        sin: [max_position, Dh/2].
        position_ids: [T] int64.
        inverse: turn back.
    """
    return rotate(q, k, cos, sin, position_ids, inverse)


@rotary_op.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("bivec::rotary_", mutates_args=("q", "k"))
def rotary_inplace_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, inverse: bool) -> None:
    """Overwrites q and k, whose last dims are contiguous and which do not overlap, by their rotation."""
    _launch(q, k, q, k, cos, sin, position_ids, inverse)


@rotary_inplace_op.register_fake
def _(*_: Any) -> None:
    return None


def _turned_back(
    dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor, inverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of q and k: one launch for both, or for the one that there is."""
    present = dk if dq is None else dq
    if present is None:
        return None, None
    nothing = present.new_empty(present.shape[0], 0, present.shape[2])
    d_q, d_k = rotary_op(
        nothing if dq is None else dq, nothing if dk is None else dk, cos, sin, position_ids, not inverse
    )
    return None if dq is None else d_q, None if dk is None else d_k


def _save(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    _, _, cos, sin, position_ids, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, position_ids)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    cos, sin, position_ids = ctx.saved_tensors
    return *_turned_back(dq, dk, cos, sin, position_ids, ctx.inverse), None, None, None, None


rotary_op.register_autograd(_differentiate, setup_context=_save)


class _RotaryInPlace(torch.autograd.Function):
    """Overwrites q and k, and returns them as aliases; see the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        rotary_inplace_op(q, k, cos, sin, position_ids, False)
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.set_materialize_grads(False)
        return q, k

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin, position_ids = ctx.saved_tensors
        return *_turned_back(dq, dk, cos, sin, position_ids, False), None, None, None


def rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, inplace: bool
) -> tuple[Tensor, Tensor]:
    """``apply_rotary`` of operands that it has checked."""
    if inplace:
        q, k = _RotaryInPlace.apply(q, k, cos, sin, position_ids)
    else:
        q, k = rotary_op(q, k, cos, sin, position_ids, False)
    return q, k
