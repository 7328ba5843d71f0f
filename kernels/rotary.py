"""Rotary position embedding of q and k in one call (rotate-half convention of the Hugging Face checkpoints).

With x = [x₁ | x₂] split at Dh/2 and the angles of the token's position:

    y₁ = x₁ · cos - x₂ · sin        y₂ = x₂ · cos + x₁ · sin

The backward is the inverse rotation (sin negated), so nothing is saved but the table rows and the position ids.

This is the torch backend; ``kernels/rotary_triton.py`` turns q and k in one launch, and gathers no rows.

Source: Su et al., "RoFormer" (2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bivec.kernels.backend import check_triton_dtypes, checks_values, resolve
from bivec.kernels.overwriting import check_overwritable


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """x [T, H, Dh]; cos, sin [T, 1, Dh/2] fp32; ``out`` may be x itself."""
    half = x.shape[-1] // 2
    wide = x.to(cos.dtype)
    turned = torch.empty_like(wide)  # [T, H, Dh] (-x₂ · sin, x₁ · sin)
    torch.mul(wide[..., half:], -sin, out=turned[..., :half])
    torch.mul(wide[..., :half], sin, out=turned[..., half:])
    cos = torch.cat((cos, cos), dim=-1)
    if out is not None and out.dtype == cos.dtype:
        return torch.addcmul(turned, wide, cos, out=out)
    turned.addcmul_(wide, cos)
    return turned.to(x.dtype) if out is None else out.copy_(turned)


class _Rotary(torch.autograd.Function):
    """One tensor at a time: autograd lets a function overwrite a view only if it returns nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, inplace: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if inplace:
            ctx.mark_dirty(x)
        return _rotate(x, cos, sin, out=x if inplace else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None, None


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions.

    Args:
        q: [T, H, Dh], any float dtype; fp16, bf16 or fp32 with the Triton backend.
        k: [T, Hkv, Dh], dtype of ``q``.
        cos: [max_position, Dh/2] fp32; no gradient is given.
        sin: [max_position, Dh/2] fp32; no gradient is given.
        position_ids: [T] int64, rows of the tables.
        inplace: overwrite q and k (their old values must not be needed by anybody's backward). They may be slices of
            one projection; the torch backend refuses the outputs of ``split`` and ``chunk``. From then on use the pair
            returned: with the Triton backend autograd does not know that q, k and what they are views of have turned.
            Compiled by torch.compile or exported, nothing is overwritten.
        backend: None, "torch" or "triton".

    Returns:
        The rotated pair, shapes and dtypes as given.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on CPU, and with BIVEC_CHECK=1, also a position outside
            the tables (else it makes its token NaN with the Triton backend); operands that cannot be overwritten.
        BackendError: the backend cannot be used here, or not with these dtypes.

    Source: Su et al. 2021.
    """
    chosen = resolve(backend, "apply_rotary", q.device)
    _check_operands(q, k, cos, sin, position_ids)
    if inplace:
        check_overwritable("apply_rotary", "inplace=True", q=q, k=k)
    inplace = inplace and not torch.compiler.is_compiling()  # which reuses memory by itself
    if chosen == "triton":
        from bivec.kernels import rotary_triton  # triton is an optional dependency

        check_triton_dtypes("apply_rotary", q=q)
        if inplace and not (q.stride(2) == k.stride(2) == 1 or q.shape[2] == 0):
            raise ValueError(
                f"apply_rotary: inplace=True needs neighbouring elements in the last dimension of q and k, got strides "
                f'{q.stride()} and {k.stride()}; pass contiguous tensors, or use backend="torch"'
            )
        return rotary_triton.rotated(q, k, cos, sin, position_ids, inplace)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows_cos, rows_sin = cos[position_ids].to(dtype).unsqueeze(1), sin[position_ids].to(dtype).unsqueeze(1)
    return _Rotary.apply(q, rows_cos, rows_sin, inplace), _Rotary.apply(k, rows_cos, rows_sin, inplace)


def _check_operands(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0] or q.shape[-1] % 2:
        raise ValueError(
            f"apply_rotary: q {tuple(q.shape)} and k {tuple(k.shape)} must be [T, heads, Dh] with one even Dh"
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"apply_rotary: q and k must have one floating-point dtype, got {q.dtype} and {k.dtype}")
    half = q.shape[-1] // 2
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] != half:
        raise ValueError(
            f"apply_rotary: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [max_position, {half}]"
        )
    if position_ids.shape != q.shape[:1] or position_ids.dtype != torch.int64:
        raise ValueError(
            f"apply_rotary: position_ids must be int64 of shape [{q.shape[0]}], "
            f"got {position_ids.dtype} of shape {tuple(position_ids.shape)}"
        )
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin), ("position_ids", position_ids)):
        if tensor.device != q.device:
            raise ValueError(f"apply_rotary: {name} is on {tensor.device}, q on {q.device}; move them together")
    if checks_values(position_ids.device) and len(position_ids):
        lowest, highest = (int(bound) for bound in position_ids.aminmax())
        if lowest < 0 or highest >= len(cos):
            raise ValueError(
                f"apply_rotary: positions {lowest} … {highest} are not all inside the table of {len(cos)} positions"
            )
