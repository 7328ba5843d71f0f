"""The Triton backend of ``lora_linear`` and ``lora_linears``: vendor GEMMs for the base, our kernels for the update.

Of projections p of one input x [T, in] with one mask keep, A the matrices A_p [r_p, in] one below the other, and h, dh
the [T, r_p] side by side (``kernels/lora_kernels.py``, where masks, precision and determinism are explained):

    forward     h = project(keep * x, A);  y_p = x W_pᵀ + bias_p;  update(y_p, h_p, B_pᵀ, scaling)
    backward    dh_p = project(dy_p, B_pᵀ);  dB_p = gradient(dy_p, h_p)ᵀ;  dA = gradient(keep * x, dh)
                dx = sum_p dy_p W_p;  update(dx, keep, dh, A)

dx is one buffer, which the GEMMs add to. Saved for backward: x, W, A, B (all the caller's), token ids and seed, and h,
4 r bytes a token and projection. Traffic: project reads x, gradient reads x or dy, update reads and writes y; FLOPs as
in ``kernels/lora.py``, far below what the bytes cost at the usual ranks.
"""

# No `from __future__ import annotations`: torch.library reads the operators' schemas from the annotations.

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bivec.kernels.dropout import seed_tensor
from bivec.kernels.launch import rows_contiguous
from bivec.kernels.lora_kernels import gradient, project_, row_keys, update_


def _stacked(lora_as: Sequence[Tensor]) -> Tensor:
    """One below the other; one matrix is not copied."""
    return lora_as[0] if len(lora_as) == 1 else torch.cat(list(lora_as))


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    seed: Tensor | None,
    token_ids: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> list[Tensor]:
    """The products and launches of the forward; see ``lora_linears_op``."""
    x = rows_contiguous(x)
    keys = row_keys(seed, token_ids) if seed is not None and token_ids is not None else None
    m = _stacked(lora_as)
    h = torch.empty(x.shape[0], m.shape[0], dtype=torch.float32, device=x.device)
    project_(h, x, m, 1.0 / (1.0 - dropout_p), keys, dropout_p)
    outs = []
    parts = h.split([a.shape[0] for a in lora_as], 1)
    for weight, bias, lora_b, part in zip(weights, biases, lora_bs, parts, strict=True):
        y = torch.addmm(bias, x, weight.t()) if bias.numel() else x @ weight.t()  # [T, out]
        update_(y, part, lora_b.t(), scaling)
        outs.append(y)
    return [*outs, h]


def backward(
    d_outs: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    h: Tensor,
    seed: Tensor | None,
    token_ids: Tensor | None,
    scaling: float,
    dropout_p: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The products and launches of the backward; see ``lora_linears_backward_op``."""
    count = len(weights)
    want_x, *others = wanted
    want_weights, want_biases, want_as, want_bs = (others[i * count : (i + 1) * count] for i in range(4))
    x = rows_contiguous(x)
    grads = {p: rows_contiguous(d_out) for p, d_out in enumerate(d_outs) if d_out is not None}
    active = list(grads)
    lora_dtype = lora_as[0].dtype
    hs = h.split([a.shape[0] for a in lora_as], 1)

    def each(wants: Sequence[bool], make: Callable[[int], Tensor]) -> list[Tensor]:
        return [make(p) if want else x.new_empty(0) for p, want in enumerate(wants)]

    d_weights = each(want_weights, lambda p: grads[p].t() @ x)
    d_biases = each(want_biases, lambda p: grads[p].sum(0))
    d_bs = each(want_bs, lambda p: gradient(grads[p], hs[p], lora_dtype, scaling).t().to(lora_dtype))  # [out, r]
    chosen = [p for p in active if want_x or want_as[p]]
    if not chosen:
        return [x.new_empty(0), *d_weights, *d_biases, *(x.new_empty(0) for _ in lora_as), *d_bs]

    ranks = [lora_as[p].shape[0] for p in chosen]
    dh = torch.empty(x.shape[0], sum(ranks), dtype=torch.float32, device=x.device)
    for p, part in zip(chosen, dh.split(ranks, 1), strict=True):
        project_(part, grads[p], lora_bs[p].t(), scaling / (1.0 - dropout_p))
    keys = row_keys(seed, token_ids) if seed is not None and token_ids is not None else None
    d_as: dict[int, Tensor] = {}
    if any(want_as):
        together = gradient(x, dh, lora_dtype, 1.0, keys, dropout_p).to(lora_dtype)
        d_as = dict(zip(chosen, together.split(ranks), strict=True))
    dx = x.new_empty(0)
    if want_x:
        first, *rest = active
        dx = grads[first] @ weights[first]  # [T, in]
        for p in rest:
            dx.addmm_(grads[p], weights[p])
        update_(dx, dh, _stacked([lora_as[p] for p in chosen]), 1.0, keys, dropout_p)
    # copies: the results of an operator may not share memory
    return [dx, *d_weights, *d_biases, *each(want_as, lambda p: d_as[p].clone() if count > 1 else d_as[p]), *d_bs]


@torch.library.custom_op("bivec::lora_linears", mutates_args=())
def lora_linears_op(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    seed: Tensor | None,
    token_ids: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> list[Tensor]:
    """The outputs ``[T, out_p]``, and last h ``[T, sum of r_p]`` fp32, which has no gradient.

    Args:
        x: [T, in], of ``TRITON_DTYPES``.
        weights: [out_p, in], dtype of ``x``.
        biases: [out_p], dtype of ``x``; one of no elements is none.
        lora_as: [r_p, in], dtype of ``x`` or fp32.
        lora_bs: [out_p, r_p].
        seed: [1] int64, where ``dropout_p`` is not 0.
        token_ids: [T] int64, likewise.
        scaling: alpha / r.
        dropout_p: probability of dropping an input of the updates.
    """
    with torch.autocast(x.device.type, enabled=False):
        return forward(x, weights, biases, lora_as, lora_bs, seed, token_ids, scaling, dropout_p)


@lora_linears_op.register_fake
def _(x: Tensor, weights: Sequence[Tensor], _biases: object, lora_as: Sequence[Tensor], *_: Any) -> list[Tensor]:
    outs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    rank = sum(a.shape[0] for a in lora_as)
    return [*outs, x.new_empty(x.shape[0], rank, dtype=torch.float32)]


@torch.library.custom_op("bivec::lora_linears_backward", mutates_args=())
def lora_linears_backward_op(
    d_outs: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    h: Tensor,
    seed: Tensor | None,
    token_ids: Tensor | None,
    scaling: float,
    dropout_p: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x, and of each of weights, biases, lora_as and lora_bs, in this order.

    ``wanted`` says which, in the same order, and asks nothing of a projection whose ``d_outs`` is None; an unwanted one
    has no elements.
    """
    with torch.autocast(x.device.type, enabled=False):
        return backward(d_outs, x, weights, lora_as, lora_bs, h, seed, token_ids, scaling, dropout_p, wanted)


@lora_linears_backward_op.register_fake
def _(
    _d_outs: object,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    *others: Any,
) -> list[Tensor]:
    shapes = [x, *weights, *(w[:, 0] for w in weights), *lora_as]
    like = [t.new_empty(t.shape) for t in shapes] + [b.new_empty(b.shape[1], b.shape[0]).t() for b in lora_bs]
    return [gradient if want else x.new_empty(0) for gradient, want in zip(like, others[-1], strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, _, lora_as, lora_bs, seed, token_ids, ctx.scaling, ctx.dropout_p = inputs
    ctx.save_for_backward(x, output[-1], seed, token_ids, *weights, *lora_as, *lora_bs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    """Skips the projections that no gradient reaches."""
    x, h, seed, token_ids, *matrices = ctx.saved_tensors
    *d_outs, _ = gradients
    count = len(d_outs)
    weights, lora_as, lora_bs = (matrices[i * count : (i + 1) * count] for i in range(3))
    need_x, *needs = ctx.needs_input_grad[:5]
    reached = [d_out is not None for d_out in d_outs]
    wanted = [need_x and any(reached)]
    for need in needs:
        wanted += [needed and reaches for needed, reaches in zip(need, reached, strict=True)]
    if not any(wanted):
        return None, *([None] * count for _ in range(4)), None, None, None, None
    results = lora_linears_backward_op(
        d_outs, x, weights, lora_as, lora_bs, h, seed, token_ids, ctx.scaling, ctx.dropout_p, wanted
    )
    dx, *others = (gradient if want else None for gradient, want in zip(results, wanted, strict=True))
    return dx, *(others[i * count : (i + 1) * count] for i in range(4)), None, None, None, None


lora_linears_op.register_autograd(_differentiate, setup_context=_save)


def apply(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scaling: float,
    dropout_p: float,
    seed: int | Tensor | None,
    token_ids: Tensor | None,
) -> tuple[Tensor, ...]:
    """``lora_linears`` of operands that its caller has checked; ``token_ids`` where ``dropout_p`` is not 0."""
    keyed = seed_tensor(seed, x.device) if dropout_p and seed is not None else None
    present = [x.new_empty(0) if bias is None else bias for bias in biases]
    operands = x, list(weights), present, list(lora_as), list(lora_bs)
    *outs, _ = lora_linears_op(*operands, keyed, token_ids if dropout_p else None, scaling, dropout_p)
    return tuple(outs)
