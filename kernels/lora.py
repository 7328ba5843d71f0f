"""Linear layers with a low-rank update beside each: one, or several that share their input.

    y_p = x W_pᵀ + bias_p + scaling · (dropout(x) A_pᵀ) B_pᵀ            A [r, in], B [out, r]

The base weights are usually frozen: then their gradient GEMMs are skipped and nothing is saved for them. Saved for
backward: x (one tensor, shared by all projections) and the small h_p = dropout(x) A_pᵀ [T, r]. The dropout mask is a
function of (seed, token id, column) and is drawn again in the backward. Its factor 1 / (1 - dropout_p) multiplies
[T, r] matrices, not [T, in] ones.

Jointly (q, k and v; gate and up), x is dropped and saved once, by one mask, where PEFT draws one for each projection;
the A's are one matrix, so that h, the update of dx and the gradients of the A's are one product each; and dx is one
buffer that the base products add to.

FLOPs per token and projection: 2·in·out forward, the same backward with a frozen base, plus 2·r·(in + out) and twice
that for the update.

This is the torch backend; the other is ``kernels/lora_triton.py``.

Source: Hu et al., "LoRA" (2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.backend import autocast_kind, check_triton_dtypes, resolve
from bivec.kernels.dropout import check_dropout, linear_keep_words

T = TypeVar("T")
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element


def _words(x: Tensor) -> Tensor:
    """The bits of floating-point numbers."""
    return x.view(_WORDS[x.itemsize])


def _keep_words(
    seed: int | Tensor, token_ids: Tensor, x: Tensor, dropout_p: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of x that stay in the cache, and their masks as words as wide as ``dtype``."""
    return linear_keep_words(seed, token_ids, x.shape[1], dropout_p, _WORDS[dtype.itemsize])


def _dropped_(keep: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What is kept of x, in ``dtype`` and in the memory of the mask."""
    return keep.bitwise_and_(_words(x.to(dtype))).view(dtype)


def _split(values: Sequence[T], kinds: int) -> list[Sequence[T]]:
    """Values of several kinds, all of one kind after the other, one a projection."""
    count = len(values) // kinds
    return [values[i * count : (i + 1) * count] for i in range(kinds)]


def _ranks(lora_as: Sequence[Tensor]) -> list[int]:
    return [lora_a.shape[0] for lora_a in lora_as]


def _blank(count: int) -> list[Tensor | None]:
    return [None] * count


def _joined(matrices: Sequence[Tensor], dim: int) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), dim)


def _project(x: Tensor, lora_as: Sequence[Tensor], dropout_p: float, seed: int | Tensor, token_ids: Tensor) -> Tensor:
    """``dropout(x) A^T`` of all A, ``[T, sum of r]``, in the dtype of the LoRA matrices (fp32 over a bf16 base)."""
    joined = _joined(lora_as, 0)
    if dropout_p:
        h = joined.new_empty(x.shape[0], joined.shape[0])
        for rows, keep in _keep_words(seed, token_ids, x, dropout_p, h.dtype):
            torch.mm(_dropped_(keep, x[rows], h.dtype), joined.T, out=h[rows])
    else:
        h = x.to(joined.dtype) @ joined.T
    return h.mul_(1.0 / (1.0 - dropout_p))


class _LoraLinears(torch.autograd.Function):
    """The operands are all weights, then all biases, all A and all B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scaling: float,
        dropout_p: float,
        seed: int | Tensor,
        token_ids: Tensor,
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, biases, lora_as, lora_bs = _split(operands, 4)
        # dtypes are those of the operands, whatever autocast asks for
        with torch.autocast(autocast_kind(x), enabled=False):
            h = _project(x, lora_as, dropout_p, seed, token_ids)
            ys = []
            for weight, bias, lora_b, part in zip(weights, biases, lora_bs, h.split(_ranks(lora_as), 1), strict=True):
                y = torch.addmm(bias, x, weight.T) if bias is not None else x @ weight.T  # [T, out]
                _add_product_(y, part, lora_b.T, scaling)
                ys.append(y)
        ctx.save_for_backward(x, token_ids, h, seed if isinstance(seed, Tensor) else None, *weights, *lora_as, *lora_bs)
        ctx.seed = None if isinstance(seed, Tensor) else seed
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable  # h is saved as a number: a second derivative would miss its part
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, token_ids, h, seed, *matrices = ctx.saved_tensors
        weights, lora_as, lora_bs = _split(matrices, 3)
        hs = h.split(_ranks(lora_as), 1)
        need_x = ctx.needs_input_grad[0]
        need_weights, need_biases, need_as, need_bs = _split(ctx.needs_input_grad[5:], 4)
        dx: Tensor | None = None
        d_weights, d_biases, d_as, d_bs = (_blank(len(weights)) for _ in range(4))
        dhs = {}
        reached = {p: dy for p, dy in enumerate(dys) if dy is not None}  # on other outputs nothing depends
        with torch.autocast(autocast_kind(x), enabled=False):
            for p, dy in reached.items():
                dy_wide = dy.to(lora_bs[p].dtype)
                if need_bs[p]:
                    d_bs[p] = (dy_wide.T @ hs[p]).mul_(ctx.scaling)
                if need_as[p] or need_x:
                    dhs[p] = (dy_wide @ lora_bs[p]).mul_(ctx.scaling / (1.0 - ctx.dropout_p))  # [T, r]
                if need_x:
                    dx = dy @ weights[p] if dx is None else dx.addmm_(dy, weights[p])  # [T, in]
                if need_weights[p]:
                    d_weights[p] = dy.T @ x
                if need_biases[p]:
                    d_biases[p] = dy.sum(0)
            if dhs:
                dh, joined = _joined(list(dhs.values()), 1), _joined([lora_as[p] for p in dhs], 0)
                mask = (ctx.seed if seed is None else seed, token_ids, ctx.dropout_p) if ctx.dropout_p else None
                together = _update_backward(x, dh, joined, dx, any(need_as[p] for p in dhs), mask)
                if together is not None:
                    for p, d_a in zip(dhs, together.split(_ranks([lora_as[p] for p in dhs])), strict=True):
                        d_as[p] = d_a.to(dh.dtype) if need_as[p] else None
        return dx, None, None, None, None, *d_weights, *d_biases, *d_as, *d_bs


def _update_backward(
    x: Tensor,
    dh: Tensor,
    joined: Tensor,
    dx: Tensor | None,
    want_as: bool,
    mask: tuple[int | Tensor, Tensor, float] | None,
) -> Tensor | None:
    """Adds ``keep * (dh joined)`` to ``dx``, if there is one, and gives the gradient of ``joined``, if wanted.

    ``mask`` is what that of the forward is drawn from again: seed, token ids and dropout_p; None = all is kept.
    """
    if mask is None:
        if dx is not None:
            _add_product_(dx, dh, joined, 1.0)
        return dh.T @ x.to(dh.dtype) if want_as else None
    seed, token_ids, dropout_p = mask
    together = None
    if want_as:
        together = torch.zeros_like(joined, dtype=torch.promote_types(joined.dtype, torch.float32))
    for rows, keep in _keep_words(seed, token_ids, x, dropout_p, dh.dtype):
        if dx is not None:
            update = dh[rows] @ joined
            _words(update).bitwise_and_(keep)
            dx[rows] += update
        if together is not None:
            together += dh[rows].T @ _dropped_(keep, x[rows], dh.dtype)
    return together


def _add_product_(y: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """``y += factor * left @ right``; a wider product is rounded once, after the sum."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=factor)
    else:
        y.add_(left @ right, alpha=factor)


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scaling: float,
    *,
    biases: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    token_ids: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """``lora_linear`` of several projections of one input (q, k and v; gate and up), which is read and saved once.

    The results are those of one ``lora_linear`` a projection with the same seed, up to the order of sums.

    Args:
        x: [T, in].
        weights: P matrices [out_p, in], dtype of ``x``.
        lora_as: P matrices [r_p, in], dtype of ``x`` or fp32, one dtype for all.
        lora_bs: P matrices [out_p, r_p], dtype of ``lora_as``.
        scaling: alpha / r.
        biases: None, or P vectors [out_p] in the dtype of ``x``, each of which may be None.
        dropout_p: probability of dropping an input of the updates, in [0, 1).
        seed: int or int64 tensor of one element; needed when ``dropout_p > 0``. All projections have its mask.
        token_ids: [T] int64, keys the mask; 0 … T-1 by default.
        backend: None, "torch" or "triton" (fp16, bf16 and fp32).

    Returns:
        P tensors [T, out_p], dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, not P of each, dropout outside [0, 1) or without a seed.
        BackendError: the backend cannot be used here.

    Source: Hu et al. 2021.
    """
    count = len(weights)
    biases = (None,) * count if biases is None else biases
    given = {"weights": weights, "lora_as": lora_as, "lora_bs": lora_bs, "biases": biases}
    if count == 0 or any(len(sequence) != count for sequence in given.values()):
        numbers = ", ".join(f"{len(sequence)} {name}" for name, sequence in given.items())
        raise ValueError(f"lora_linears: one of each a projection, and at least one projection; got {numbers}")
    return _dispatch("lora_linears", x, weights, biases, lora_as, lora_bs, scaling, dropout_p, seed, token_ids, backend)


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
        backend: None, "torch" or "triton" (fp16, bf16 and fp32).

    Returns:
        [T, out], dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, dropout outside [0, 1), dropout without a seed.
        BackendError: the backend cannot be used here.

    Source: Hu et al. 2021.
    """
    operands = (weight,), (bias,), (lora_a,), (lora_b,)
    (y,) = _dispatch("lora_linear", x, *operands, scaling, dropout_p, seed, token_ids, backend)
    return y


def _dispatch(
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scaling: float,
    dropout_p: float,
    seed: int | Tensor | None,
    token_ids: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """Checks the operands of ``op`` and runs them on the backend chosen."""
    chosen = resolve(backend, op, x.device)
    for p, of_p in enumerate(zip(weights, biases, lora_as, lora_bs, strict=True)):
        where = op if len(weights) == 1 else f"{op}: projection {p}"
        _check_operands(where, x, *of_p)
        _check_devices(where, x, dict(zip(("weight", "bias", "lora_a", "lora_b"), of_p, strict=True)))
    check_dropout(dropout_p, seed, op)
    _check_devices(op, x, {"token_ids": token_ids, "seed": seed})
    if len({lora_a.dtype for lora_a in lora_as}) > 1:
        raise ValueError(f"{op}: lora_as must have one dtype, got {[str(lora_a.dtype) for lora_a in lora_as]}")
    if token_ids is None:
        token_ids = torch.arange(x.shape[0], device=x.device) if dropout_p else None
    elif token_ids.shape != x.shape[:1] or token_ids.dtype != torch.int64:
        raise ValueError(
            f"{op}: token_ids must be int64 of shape [{x.shape[0]}], "
            f"got {token_ids.dtype} of shape {tuple(token_ids.shape)}"
        )
    if chosen == "torch":
        operands = *weights, *biases, *lora_as, *lora_bs
        ys: tuple[Tensor, ...] = _LoraLinears.apply(x, scaling, dropout_p, seed, token_ids, *operands)
        return ys

    from bivec.kernels import lora_triton  # triton is an optional dependency

    check_triton_dtypes(op, x=x)
    return lora_triton.apply(x, weights, biases, lora_as, lora_bs, scaling, dropout_p, seed, token_ids)


def _check_devices(op: str, x: Tensor, operands: dict[str, Tensor | int | None]) -> None:
    for name, operand in operands.items():
        if isinstance(operand, Tensor) and operand.device != x.device:
            raise ValueError(f"{op}: {name} is on {operand.device}, x on {x.device}; move them together")


def _check_operands(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
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
