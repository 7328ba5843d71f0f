"""A linear layer with a low-rank update beside it.

    y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ            A [r, in], B [out, r]

The base weight is usually frozen: then its gradient GEMM is skipped and nothing is saved for it. Saved for backward: x
(one tensor, shared by all projections of the same input) and the small h = dropout(x) Aᵀ [T, r]. The dropout mask is a
function of (seed, token id, column) and is drawn again in the backward. Its factor 1 / (1 - dropout_p) multiplies
[T, r] matrices, not [T, in] ones.

FLOPs per token: 2·in·out forward, the same backward with a frozen base, plus 2·r·(in + out) and twice that for the
update.

Source: Hu et al., "LoRA" (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.backend import resolve
from bivec.kernels.dropout import check_dropout, linear_keep_mask


def _draw_keep(seed: int | Tensor, token_ids: Tensor, columns: int, dropout_p: float) -> Tensor:
    """[T, columns] uint8, 1 = kept: a product with it takes a third of the time of one with a bool on a CPU."""
    return linear_keep_mask(seed, token_ids, columns, dropout_p).view(torch.uint8)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, token_ids) -> Tensor:
        # the update runs in the dtype of the LoRA matrices (fp32 over a bf16 base)
        dropped = x.to(lora_a.dtype)
        if dropout_p:
            dropped = dropped * _draw_keep(seed, token_ids, x.shape[1], dropout_p)
        h = (dropped @ lora_a.T).mul_(1.0 / (1.0 - dropout_p))  # [T, r]
        y = torch.addmm(bias, x, weight.T) if bias is not None else x @ weight.T  # [T, out]
        _add_product_(y, h, lora_b.T, scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b, h, seed if isinstance(seed, Tensor) else None, token_ids)
        ctx.seed = None if isinstance(seed, Tensor) else seed
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    @once_differentiable  # h is saved as a number: a second derivative would miss its part
    def backward(ctx, dy: Tensor):
        x, weight, lora_a, lora_b, h, seed, token_ids = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dx = dweight = dbias = da = db = keep = None
        dy_wide = dy.to(lora_a.dtype)
        if need_b:
            db = (dy_wide.T @ h).mul_(ctx.scaling)
        if need_a or need_x:
            dh = (dy_wide @ lora_b).mul_(ctx.scaling / (1.0 - ctx.dropout_p))  # [T, r]
            if ctx.dropout_p:
                keep = _draw_keep(ctx.seed if seed is None else seed, token_ids, x.shape[1], ctx.dropout_p)
        if need_a:
            x_wide = x.to(lora_a.dtype)
            da = dh.T @ (x_wide if keep is None else x_wide * keep)
        if need_x:
            dx = dy @ weight  # [T, in]
            if keep is None:
                _add_product_(dx, dh, lora_a, 1.0)
            else:
                dx += (dh @ lora_a).mul_(keep)
        if need_weight:
            dweight = dy.T @ x
        if need_bias:
            dbias = dy.sum(0)
        return dx, dweight, dbias, da, db, None, None, None, None


def _add_product_(y: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """``y += factor * left @ right``; a wider product is rounded once, after the sum."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=factor)
    else:
        y.add_(left @ right, alpha=factor)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    token_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x @ weight.T + bias + scaling * (dropout(x) @ lora_a.T) @ lora_b.T``.

    Args:
        x: [T, in].
        weight: [out, in], dtype of ``x``.
        lora_a: [r, in], dtype of ``x`` or fp32.
        lora_b: [out, r], dtype of ``lora_a``.
        scaling: alpha / r.
        bias: [out], dtype of ``x``.
        dropout_p: probability of dropping an input of the update, in [0, 1).
        seed: int or int64 tensor of one element; needed when ``dropout_p > 0``.
        token_ids: [T] int64, keys the mask; 0 … T-1 by default.
        backend: None, "torch" or "triton".

    Returns:
        [T, out], dtype of ``x``.

    Raises:
        ValueError: shapes or dtypes that do not fit, dropout outside [0, 1), dropout without a seed.

    Source: Hu et al. 2021.
    """
    resolve(backend, "lora_linear")
    _check_operands(x, weight, bias, lora_a, lora_b)
    check_dropout(dropout_p, seed, "lora_linear")
    if token_ids is None:
        token_ids = torch.arange(x.shape[0], device=x.device) if dropout_p else None
    elif token_ids.shape != x.shape[:1] or token_ids.dtype != torch.int64:
        raise ValueError(
            f"lora_linear: token_ids must be int64 of shape [{x.shape[0]}], "
            f"got {token_ids.dtype} of shape {tuple(token_ids.shape)}"
        )
    return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, token_ids)


def _check_operands(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    op = "lora_linear"
    matrices = all(tensor.dim() == 2 for tensor in (x, weight, lora_a, lora_b))
    if not matrices or weight.shape[1] != x.shape[1] or lora_a.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_a {tuple(lora_a.shape)} and "
            f"lora_b {tuple(lora_b.shape)} must be [T, in], [out, in], [r, in] and [out, r]"
        )
    expected = (weight.shape[0], lora_a.shape[0])
    if lora_b.shape != expected:
        raise ValueError(f"{op}: lora_b has shape {tuple(lora_b.shape)}, expected {expected}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    base = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None}
    if len(base) > 1 or not x.is_floating_point():
        raise ValueError(f"{op}: x, weight and bias must have one floating-point dtype, got {sorted(map(str, base))}")
    if lora_a.dtype != lora_b.dtype or lora_a.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{op}: lora_a and lora_b must both have the dtype of x ({x.dtype}) or be torch.float32, "
            f"got {lora_a.dtype} and {lora_b.dtype}"
        )
