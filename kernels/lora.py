"""A linear layer with a low-rank update beside it.

    y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ            A [r, in], B [out, r]

The base weight is usually frozen: then its gradient GEMM is skipped and nothing is saved for it. Saved for backward: x (one
tensor, shared by all projections of the same input) and the small h = dropout(x) Aᵀ [T, r]. The dropout mask is a function
of (seed, token id, column) and is drawn again in the backward.

FLOPs per token: 2·in·out forward, the same backward with a frozen base, plus 2·r·(in + out) and twice that for the update.

Source: Hu et al., "LoRA" (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bivec.kernels.backend import resolve
from bivec.kernels.dropout import linear_keep_mask


def _dropped(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    return x if keep is None else (x * keep).mul_(1.0 / (1.0 - dropout_p))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, token_ids) -> Tensor:
        keep = linear_keep_mask(seed, token_ids, x.shape[1], dropout_p) if dropout_p else None
        # the update runs in the dtype of the LoRA matrices (fp32 over a bf16 base)
        h = _dropped(x.to(lora_a.dtype), keep, dropout_p) @ lora_a.T  # [T, r]
        y = torch.addmm(bias, x, weight.T) if bias is not None else x @ weight.T  # [T, out]
        if y.dtype == h.dtype:
            y.addmm_(h, lora_b.T, alpha=scaling)
        else:
            y += (h @ lora_b.T).mul_(scaling).to(y.dtype)
        ctx.save_for_backward(x, weight, lora_a, lora_b, h, seed if isinstance(seed, Tensor) else None, token_ids)
        ctx.seed = None if isinstance(seed, Tensor) else seed
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, lora_a, lora_b, h, seed, token_ids = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        keep = None
        if ctx.dropout_p and (need_a or need_x):
            keep = linear_keep_mask(ctx.seed if seed is None else seed, token_ids, x.shape[1], ctx.dropout_p)
        dy_lora = dy.to(lora_a.dtype)
        dh = (dy_lora @ lora_b).mul_(ctx.scaling) if need_a or need_x else None  # [T, r]
        db = (dy_lora.T @ h).mul_(ctx.scaling) if need_b else None
        da = dh.T @ _dropped(x.to(lora_a.dtype), keep, ctx.dropout_p) if need_a else None
        dx = None
        if need_x:
            dx = dy @ weight  # [T, in]
            if keep is None and dx.dtype == dh.dtype:
                dx.addmm_(dh, lora_a)
            else:
                dx += _dropped(dh @ lora_a, keep, ctx.dropout_p).to(dx.dtype)
        dweight = dy.T @ x if need_weight else None
        dbias = dy.sum(0) if need_bias else None
        return dx, dweight, dbias, da, db, None, None, None, None


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
        bias: [out].
        dropout_p: probability of dropping an input of the update, in [0, 1).
        seed: int or int64 tensor of one element; needed when ``dropout_p > 0``.
        token_ids: [T] int64, keys the mask; 0 … T-1 by default.
        backend: None, "torch" or "triton".

    Returns:
        [T, out], dtype of ``x``.

    Raises:
        ValueError: shapes that do not fit, dropout outside [0, 1), dropout without a seed.

    Source: Hu et al. 2021.
    """
    resolve(backend, "lora_linear")
    rank, out_features = lora_a.shape[0], weight.shape[0]
    if x.dim() != 2 or weight.shape[1] != x.shape[1] or lora_a.shape[1] != x.shape[1]:
        raise ValueError(
            f"lora_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)} and lora_a {tuple(lora_a.shape)} "
            "must be [T, in], [out, in] and [r, in]"
        )
    if lora_b.shape != (out_features, rank):
        raise ValueError(f"lora_linear: lora_b has shape {tuple(lora_b.shape)}, expected [{out_features}, {rank}]")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"lora_linear: dropout_p={dropout_p} is outside [0, 1)")
    if dropout_p and seed is None:
        raise ValueError("lora_linear: dropout_p > 0 needs a seed")
    if dropout_p and token_ids is None:
        token_ids = torch.arange(x.shape[0], device=x.device)
    if token_ids is not None and token_ids.shape != x.shape[:1]:
        raise ValueError(f"lora_linear: token_ids has shape {tuple(token_ids.shape)}, expected [{x.shape[0]}]")
    return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, token_ids)
