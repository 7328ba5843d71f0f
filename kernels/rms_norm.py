"""RMSNorm, alone or fused with the residual addition in front of it.

    rstd = 1 / sqrt(mean(x²) + eps)          y = x · rstd · (weight_offset + weight)

Statistics are taken in fp32 (float64 for float64 inputs) whatever the operands. Saved for backward: x and one rstd per
row.

Backward, with n = x · rstd and g = dy · (weight_offset + weight):

    dx = rstd · (g - n · mean(g · n))        dweight = Σ_rows dy · n

This is the torch backend; ``kernels/rms_norm_triton.py`` adds and norms in one pass over memory.

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019); the offset is Gemma's ``(1 + w)``.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.backend import autocast_kind, check_triton_dtypes, resolve


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _vecdot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x y over the last dimension, in their dtype whatever autocast asks for; forms no product in memory."""
    with torch.autocast(autocast_kind(x), enabled=False):
        summed: Tensor = torch.linalg.vecdot(x, y)
    return summed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
        wide = x.to(_statistics_dtype(x))
        rstd = _vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        scale = weight.to(wide.dtype) + weight_offset if weight_offset else weight.to(wide.dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.weight_offset = weight_offset
        y: Tensor = (wide * rstd).mul_(scale).to(x.dtype)
        return y

    @staticmethod
    @once_differentiable  # rstd is saved as a number: a second derivative would miss its part
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        wide_dy = dy.to(rstd.dtype)
        normed = x.to(rstd.dtype) * rstd
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (wide_dy * normed).reshape(rstd.numel(), x.shape[-1]).sum(0).to(weight.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            g = wide_dy * (weight.to(rstd.dtype) + ctx.weight_offset)
            projection = _vecdot(g, normed).div_(x.shape[-1]).neg_().unsqueeze(-1)
            dx = g.addcmul_(normed, projection).mul_(rstd).to(x.dtype)
        return dx, dweight, None, None


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: None = None,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, weight_offset: float = 0.0, backend: str | None = None
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square layer normalisation over the last dimension.

    Args:
        x: [..., D], any float dtype; fp16, bf16 or fp32 with the Triton backend.
        weight: [D], likewise.
        eps: added to the mean square.
        residual: [..., D], dtype of ``x``, added to it first.
        weight_offset: 0 for LLaMA, 1 for Gemma's ``(1 + w)``.
        backend: None, "torch" or "triton".

    Returns:
        y like ``x``; with ``residual`` the pair ``(norm(x + residual), x + residual)``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        BackendError: the backend cannot be used here, or not with these dtypes.

    Source: Zhang & Sennrich 2019.
    """
    chosen = resolve(backend, "rms_norm", x.device)
    _check(x, weight, residual)
    if chosen == "triton":
        from bivec.kernels import rms_norm_triton  # triton is an optional dependency

        check_triton_dtypes("rms_norm", x=x, weight=weight)
        return rms_norm_triton.norm(x, residual, weight, eps, weight_offset)
    total = x if residual is None else x + residual
    y: Tensor = _RMSNorm.apply(total, weight, eps, weight_offset)
    return y if residual is None else (y, total)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be [..., D] and [D] with one D"
        )
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"rms_norm: x and weight must be floating point, got {x.dtype} and {weight.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual {tuple(residual.shape)} {residual.dtype} must have the shape and dtype of x, "
            f"{tuple(x.shape)} {x.dtype}"
        )
    for name, tensor in (("weight", weight), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"rms_norm: {name} is on {tensor.device}, x on {x.device}; move them together")
