"""The torch backend of ``info_nce``: normalised copies, one softmax a chunk of queries.

Queries are cut into chunks whose logits against all columns (candidates, shared hard negatives, own hard negatives,
other queries: side by side in the workspace, the vectors themselves never concatenated) fit ``workspace_bytes``. Per
chunk: GEMMs write the logits; masks; one softmax in place; then the workspace, with -1 put at the positive, is the
gradient up to the row factor p_i, which goes to the [rows, D] operands of the gradient GEMMs. Where normalised fp32
copies of the column vectors do not fit a quarter of the workspace they are made tile by tile. The gradients of the unit
vectors accumulate in fp32; the norm's rank-1 correction, g - x<x, g>, comes once at the end. Masked logits are the
finite value half the dtype's minimum, so a row without negatives has loss and gradient 0.

Saved for backward: the fp32 gradients of queries, candidates and hard negatives, not divided by B, and the scalar one
of scale; with ``reduction="none"`` the inputs, and all is computed again in the backward with the row weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.backend import autocast_kind
from bivec.kernels.info_nce_plan import EPS, Grads, Options, Steps, all_widths, workspace_budget


@dataclass(frozen=True)
class _Group:
    """Column vectors that every query is compared with."""

    vectors: Tensor  # [R, D]
    ids: Tensor | None  # [R]
    grad: Tensor | None  # [R, D]
    column: int  # where its logits begin in the workspace
    ready: bool = False  # vectors are unit vectors in the accumulation dtype


@dataclass(frozen=True)
class _Plan:
    rows: int  # queries a chunk
    tile: int  # column vectors prepared at a time
    cached: bool  # all prepared column vectors fit


def _inverse_norm(x: Tensor) -> Tensor:
    """``[..., 1]`` for ``x [..., D]``; 0 for a zero vector."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > EPS, norm.reciprocal(), 0.0)


def _unit(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """[..., D] in ``dtype``, divided by the norms; a view where there is nothing to do."""
    converted = x.to(dtype)
    if not normalize:
        return converted
    inverse = _inverse_norm(converted)
    return converted * inverse if converted is x else converted.mul_(inverse)


def _project_(grad: Tensor, x: Tensor, plan: _Plan, weight: float) -> None:
    """Turns the gradient of the unit vectors into ``weight`` times that of ``x``, in place."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    for start in range(0, x.shape[0], plan.tile):
        g, rows = grad[start : start + plan.tile], x[start : start + plan.tile].to(grad.dtype)  # [t, D]
        inverse = _inverse_norm(rows)  # [t, 1]
        unit = rows * inverse
        g.sub_(unit.mul_((unit * g).sum(-1, keepdim=True))).mul_(inverse * weight)


def _make_plan(queries: Tensor, candidates: Tensor, hard: Tensor | None, dtype: torch.dtype, options: Options) -> _Plan:
    """Divides the workspace: at most a quarter for prepared column vectors, the rest for a query chunk's logits."""
    width, item = queries.shape[1], dtype.itemsize
    shared = candidates.shape[0] + (queries.shape[0] if options.include_query_query else 0)
    own = 0
    if hard is not None and hard.dim() == 3:
        own = hard.shape[1]
    elif hard is not None:
        shared += hard.shape[0]
    masked = options.query_ids is not None or options.margin is not None
    vectors = 6 + 3 * own  # 6: query, scaled, gradient, temporaries
    row_bytes = (shared + own) * (item + masked) + vectors * width * item
    tile_row_bytes = 3 * width * item
    minimum = row_bytes + tile_row_bytes
    budget = workspace_budget(queries.device, options, minimum, shared + own, width)
    tile_bytes = max(tile_row_bytes, min(budget // 4, budget - row_bytes))
    limit = max(1, (budget - tile_bytes) // row_bytes)
    num_chunks = -(-queries.shape[0] // limit) or 1
    rows = max(1, -(-queries.shape[0] // num_chunks))
    return _Plan(rows, tile_bytes // tile_row_bytes, shared * width * item <= tile_bytes)


def _tiles(group: _Group, plan: _Plan, dtype: torch.dtype, normalize: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (rows of the group, their columns in the workspace, prepared vectors [t, D])."""
    total = group.vectors.shape[0]
    step = max(total, 1) if group.ready else plan.tile
    for start in range(0, total, step):
        rows = slice(start, min(start + step, total))
        columns = slice(group.column + rows.start, group.column + rows.stop)
        yield rows, columns, group.vectors if group.ready else _unit(group.vectors[rows], dtype, normalize)


def _mask_(
    logits: Tensor, positive: Tensor, span: slice, groups: list[_Group], own: slice, scale: Tensor, options: Options
) -> None:
    """Writes the masked value over every column that is no negative of its query, the positive's included."""
    masked = torch.finfo(logits.dtype).min / 2
    rows = torch.arange(logits.shape[0], device=logits.device)
    if options.query_ids is not None:
        ids = options.query_ids[span, None]  # [n, 1]
        for group in groups:
            if group.ids is not None:
                columns = logits[:, group.column : group.column + group.ids.shape[0]]
                columns.masked_fill_(ids == group.ids, masked)
        if own.stop > own.start and options.hard_negative_ids is not None:
            logits[:, own].masked_fill_(ids == options.hard_negative_ids[span], masked)
    if options.include_query_query:
        logits[rows, groups[-1].column + span.start + rows] = masked
    if options.margin is not None:
        logits.masked_fill_(logits > (positive + options.margin * scale)[:, None], masked)
    logits[rows, options.targets[span]] = masked


def _columns(
    queries: Tensor, candidates: Tensor, hard: Tensor | None, options: Options, grads: Grads
) -> tuple[list[_Group], slice, int]:
    """The groups of shared columns, the columns of a query's own hard negatives, and how many there are of all."""
    groups = [_Group(candidates, options.candidate_ids, grads.candidates, 0)]
    end = candidates.shape[0]
    own = slice(end, end)
    if hard is not None and hard.dim() == 3:
        own = slice(end, end + hard.shape[1])
        end = own.stop
    elif hard is not None:
        groups.append(_Group(hard, options.hard_negative_ids, grads.hard, end))
        end += hard.shape[0]
    if options.include_query_query:
        groups.append(_Group(queries, options.query_ids, grads.queries, end))
        end += queries.shape[0]
    return groups, own, end


def _direction(
    queries: Tensor,
    candidates: Tensor,
    hard: Tensor | None,
    scale: Tensor,
    options: Options,
    grads: Grads,
    plan: _Plan,
    row_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query → candidate losses of one width; adds ``row_weights``-weighted gradients of the unit vectors to ``grads``.

    Returns (losses [B], lse [B], positive [B], correct [B]).
    """
    dtype, num_queries, device = scale.dtype, queries.shape[0], queries.device
    groups, own, end = _columns(queries, candidates, hard, options, grads)
    if plan.cached:
        groups = [replace(g, vectors=_unit(g.vectors, dtype, options.normalize), ready=True) for g in groups]
    workspace = torch.empty(min(plan.rows, num_queries), end, dtype=dtype, device=device)
    losses, lse, positives = (torch.empty(num_queries, dtype=dtype, device=device) for _ in range(3))
    correct = torch.empty(num_queries, dtype=torch.bool, device=device)

    any_gradient = any(grad is not None for grad in (grads.queries, grads.candidates, grads.hard, grads.scale))
    for start in range(0, num_queries, plan.rows):
        span = slice(start, min(start + plan.rows, num_queries))
        unit = _unit(queries[span], dtype, options.normalize)  # [n, D]
        scaled, logits = unit * scale, workspace[: unit.shape[0]]  # [n, D], [n, columns]
        for group in groups:
            for _, columns, vectors in _tiles(group, plan, dtype, options.normalize):
                torch.mm(scaled, vectors.t(), out=logits[:, columns])
        own_unit = None
        if hard is not None and own.stop > own.start:
            own_unit = _unit(hard[span], dtype, options.normalize)  # [n, K, D]
            logits[:, own] = torch.bmm(own_unit, scaled[:, :, None]).squeeze(-1)
        picks = (torch.arange(unit.shape[0], device=device), options.targets[span])
        positive = logits[picks]  # [n]
        _mask_(logits, positive, span, groups, own, scale, options)
        peak = logits.amax(-1)  # [n] best negative
        torch.softmax(logits, -1, out=logits)
        gap = peak - logits.amax(-1).log() - positive  # [n] L - s+
        losses[span] = torch.logaddexp(gap, torch.zeros_like(gap))
        lse[span], positives[span], correct[span] = losses[span] + positive, positive, peak <= positive
        logits[picks] = -1.0
        factor = gap.sigmoid()[:, None]  # [n, 1]
        if row_weights is not None:
            factor = factor * row_weights[span, None]
        if any_gradient:
            _accumulate(logits, unit, own_unit, factor, scale, span, groups, own, grads, plan, options)
    return losses, lse, positives, correct


def _accumulate(
    slopes: Tensor,
    unit: Tensor,
    own_unit: Tensor | None,
    factor: Tensor,
    scale: Tensor,
    span: slice,
    groups: list[_Group],
    own: slice,
    grads: Grads,
    plan: _Plan,
    options: Options,
) -> None:
    """Adds one chunk's share to the gradients; dloss/dlogits is ``factor`` [n, 1] times ``slopes`` [n, columns]."""
    query_side = grads.queries is not None or grads.scale is not None
    weighted = unit * (factor * scale)  # [n, D]
    pull = torch.zeros_like(unit)  # [n, D] sum_j slopes_ij c_j
    for group in (group for group in groups if query_side or group.grad is not None):
        for rows, columns, vectors in _tiles(group, plan, unit.dtype, options.normalize):
            if query_side:
                pull.addmm_(slopes[:, columns], vectors)
            if group.grad is not None:
                group.grad[rows].addmm_(slopes[:, columns].t(), weighted)
    if own_unit is not None and query_side:
        pull += torch.bmm(slopes[:, None, own], own_unit).squeeze(1)
    if own_unit is not None and grads.hard is not None:
        grads.hard[span] += slopes[:, own, None] * weighted[:, None, :]
    pull *= factor
    if grads.scale is not None:
        grads.scale.add_((unit * pull).sum())
    if grads.queries is not None:
        grads.queries[span] += pull.mul_(scale)


STEPS = Steps(_make_plan, _direction, _project_)


class InfoNCE(torch.autograd.Function):
    """(queries, candidates, hard, scale, options) -> loss, lse, positive, correct."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, candidates: Tensor, hard: Tensor | None, scale: Tensor, options: Options
    ) -> tuple[Tensor, ...]:
        """The chunk loop; forms the gradients, unless they are to be weighted row by row."""
        ctx.per_row, ctx.options = options.reduction == "none", options
        wanted = (False,) * 4 if ctx.per_row else ctx.needs_input_grad[:4]
        with torch.autocast(autocast_kind(queries), enabled=False):
            losses, stats, grads = all_widths(STEPS, queries, candidates, hard, scale, options, wanted)
        ctx.factor = 1.0 / max(queries.shape[0], 1) if options.reduction == "mean" else 1.0
        ctx.dtypes = [None if x is None else x.dtype for x in (queries, candidates, hard, scale)]
        if ctx.per_row:
            ctx.save_for_backward(queries, candidates, hard, scale)
        else:
            ctx.save_for_backward(grads.queries, grads.candidates, grads.hard, grads.scale)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return (losses if ctx.per_row else losses.sum() * ctx.factor), *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scales what the forward formed, or forms it with the rows' weights."""
        if grad_loss is None:
            return None, None, None, None, None
        if ctx.per_row:
            with torch.autocast(autocast_kind(grad_loss), enabled=False):
                queries, candidates, hard, scale = ctx.saved_tensors
                wanted = ctx.needs_input_grad[:4]
                grads = all_widths(STEPS, queries, candidates, hard, scale, ctx.options, wanted, grad_loss)[2]
            found = (grads.queries, grads.candidates, grads.hard, grads.scale)
            return *(g if g is None else g.to(d) for g, d in zip(found, ctx.dtypes, strict=True)), None
        weight = grad_loss * ctx.factor
        scaled = (  # and rounded in one pass, which leaves the saved tensor as it is
            None if g is None else torch.mul(g, weight, out=torch.empty_like(g, dtype=d))
            for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None
