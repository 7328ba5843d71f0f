"""The Triton backend of ``info_nce``: raw dot products, norms as row and column factors, one pass in place.

Per chunk of queries, GEMMs write the raw products q·c of the vectors as given, in fp32, into the workspace; the column
groups (candidates, shared hard negatives, other queries, own hard negatives) lie side by side there, each beginning at
a multiple of 16. ``info_nce_kernels.py`` turns every row, in place, into G, the gradient of its loss by the raw
products. Since G has the factors of row and column in it, the gradient GEMMs, dQ += G C and dC += G^T Q, run on the
vectors as given, too: no normalised copies, and a bf16 operand is exact. What they give is divided by the norms, once;
the rest of the norm's gradient, g - u<u, g> with u = x / |x|, comes at the end, in fp32.

bf16: all GEMMs take bf16, G included, and give fp32. fp16: the logits likewise, but G would underflow, so the gradient
GEMMs are fp32, on tiles of columns converted one by one. fp32, and vectors of different dtypes: everything in fp32,
other operands converted tile by tile; so are halves where no GEMM takes them and gives fp32 (``gemm.py``). On AMD G is
fp32: a barrier there does not wait for loads under way, and a half of another lane's columns could be overwritten
before it was read. Products of vectors with norms above 1e19 overflow. Where all candidates share one large component
and all queries another (cosines of 0.99 between all of them), rounding G to bf16 leaks 1 to 3 % of it into the
gradients, since G then no longer sums to 0 over a row; fp32 operands do not have this.

``bivec::info_nce`` is opaque to ``torch.compile``. It returns the gradients with the loss, and autograd, registered on
it, saves those (with ``reduction="none"`` the inputs). Memory and FLOPs: ``info_nce.py``.
"""

# No `from __future__ import annotations`: torch.library reads the operator's schema from the annotations.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.gemm import multiplies_halves, multiply_
from bivec.kernels.info_nce_kernels import PADDING, PLAIN, WITH_ID, Columns, Rows, project_rows, score_rows
from bivec.kernels.info_nce_plan import EPS, Grads, Options, Steps, all_widths, workspace_budget
from bivec.kernels.launch import architecture

ALIGNMENT = 16  # columns: tensor cores want addresses and row strides of 16 bytes; Triton knows multiples of 16 only


@dataclass(frozen=True)
class _Plan:
    rows: int  # queries a chunk
    tile: int | None  # column vectors converted at a time; None = all, where nothing is converted
    operand: torch.dtype  # of the GEMMs that make logits
    slope: torch.dtype  # of the gradient GEMMs: bf16 or fp32


@dataclass(frozen=True)
class _Group:
    """Column vectors that every query is compared with."""

    vectors: Tensor  # [R, D]
    ids: Tensor | None  # [R]
    grad: Tensor | None  # [R, D]
    start: int  # its first column in the workspace


def _padded(columns: int) -> int:
    return -(-columns // ALIGNMENT) * ALIGNMENT


def _make_plan(
    queries: Tensor, candidates: Tensor, hard: Tensor | None, _dtype: torch.dtype, options: Options
) -> _Plan:
    """Divides the workspace: at most a quarter for converted column vectors, the rest for a query chunk's logits."""
    dtypes = {x.dtype for x in (queries, candidates, hard) if x is not None}
    operand = queries.dtype if len(dtypes) == 1 else torch.float32
    on_amd = architecture(queries.device).startswith("gfx")
    slope = torch.bfloat16 if operand == torch.bfloat16 and not on_amd else torch.float32
    native = operand == torch.float32 or multiplies_halves(operand, queries.device)
    converts = dtypes != {slope} or not native
    width, own = queries.shape[1], hard.shape[1] if hard is not None and hard.dim() == 3 else 0
    columns = _padded(candidates.shape[0]) + _padded(own)
    columns += _padded(queries.shape[0]) if options.include_query_query else 0
    columns += _padded(hard.shape[0]) if hard is not None and hard.dim() == 2 else 0
    row_bytes = 4 * (columns + 2 * own) + converts * 4 * (1 + own) * width  # products; the query and its own, converted
    tile_row_bytes = converts * 4 * width
    minimum = row_bytes + tile_row_bytes
    budget = workspace_budget(queries.device, options, minimum, columns, width)
    tile_bytes = max(tile_row_bytes, min(budget // 4, budget - row_bytes)) if converts else 0
    limit = max(1, (budget - tile_bytes) // max(row_bytes, 1))
    num_chunks = -(-queries.shape[0] // limit) or 1
    rows = max(1, -(-queries.shape[0] // num_chunks))
    return _Plan(rows, max(1, tile_bytes // max(tile_row_bytes, 1)) if converts else None, operand, slope)


def _inverse_norms(x: Tensor, normalize: bool) -> Tensor:
    """``[...]`` fp32 for ``x [..., D]``: 0 for a zero vector; ones where nothing is normalised."""
    if not normalize:
        return torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return torch.where(norm > EPS, norm.reciprocal(), 0.0)


def _groups(queries: Tensor, candidates: Tensor, hard: Tensor | None, options: Options, grads: Grads) -> list[_Group]:
    """Those of the shared columns, the queries last."""
    members = [(candidates, options.candidate_ids, grads.candidates)]
    if hard is not None and hard.dim() == 2:
        members.append((hard, options.hard_negative_ids, grads.hard))
    if options.include_query_query:
        members.append((queries, options.query_ids, grads.queries))
    groups, start = [], 0
    for vectors, ids, grad in members:
        groups.append(_Group(vectors, ids if options.query_ids is not None else None, grad, start))
        start += _padded(vectors.shape[0])
    return groups


def _describe(groups: list[_Group], hard: Tensor | None, options: Options) -> Columns:
    """What the kernel needs to know of the columns: O(columns) of memory."""
    start, num_own = groups[-1].start + _padded(groups[-1].vectors.shape[0]), 0
    own_inverse = own_ids = None
    if hard is not None and hard.dim() == 3 and hard.shape[1]:
        num_own, own_inverse = hard.shape[1], _inverse_norms(hard, options.normalize).contiguous()
        own_ids = None if options.hard_negative_ids is None else options.hard_negative_ids.contiguous()
    own, end = slice(start, start + num_own), start + _padded(num_own)
    with_ids = own_ids is not None or any(group.ids is not None for group in groups)
    padded = end != num_own + sum(group.vectors.shape[0] for group in groups)

    device = groups[0].vectors.device
    inverse = torch.zeros(end, dtype=torch.float32, device=device)
    ids = torch.zeros(end, dtype=torch.int64, device=device) if with_ids else None
    kinds = torch.full((end,), PADDING, dtype=torch.int8, device=device) if with_ids or padded else None
    for group in groups:
        at = slice(group.start, group.start + group.vectors.shape[0])
        inverse[at] = _inverse_norms(group.vectors, options.normalize)
        if kinds is not None:
            kinds[at] = PLAIN if group.ids is None else WITH_ID
        if ids is not None and group.ids is not None:
            ids[at] = group.ids
    if kinds is not None:
        kinds[own] = PLAIN if own_ids is None else WITH_ID
    itself = groups[-1].start if options.include_query_query else None
    return Columns(inverse, kinds, ids, own, own_inverse, own_ids, groups[0].vectors.shape[0], itself)


def _tiles(group: _Group, plan: _Plan, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (rows of the group, their columns in the workspace, their vectors in ``dtype``)."""
    total = group.vectors.shape[0]
    step = max(total, 1) if plan.tile is None else plan.tile
    for start in range(0, total, step):
        rows = slice(start, min(start + step, total))
        yield rows, slice(group.start + rows.start, group.start + rows.stop), group.vectors[rows].to(dtype)


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
    """Query → candidate losses of one width; adds ``row_weights``-weighted gradients to ``grads``.

    Returns (losses [B], lse [B], positive [B], correct [B]).
    """
    num_queries, device = queries.shape[0], queries.device
    groups = _groups(queries, candidates, hard, options, grads)
    columns = _describe(groups, hard, options)
    query_ids = None if columns.ids is None or options.query_ids is None else options.query_ids.contiguous()
    losses, lse, positive, d_scale = (torch.empty(num_queries, dtype=torch.float32, device=device) for _ in range(4))
    rows = Rows(
        _inverse_norms(queries, options.normalize),
        query_ids,
        options.targets.contiguous(),
        None if row_weights is None else row_weights.float().contiguous(),
        losses,
        lse,
        positive,
        torch.empty(num_queries, dtype=torch.bool, device=device),
        d_scale,
    )
    end = columns.inverse.shape[0]
    workspace = torch.empty(min(plan.rows, num_queries), end, dtype=torch.float32, device=device)
    wanted = any(grad is not None for grad in (grads.queries, grads.candidates, grads.hard, grads.scale))
    for start in range(0, num_queries, plan.rows):
        span = slice(start, min(start + plan.rows, num_queries))
        products = workspace[: span.stop - start]  # [n, end]
        slopes = products.view(plan.slope) if wanted else None
        _products_(products, queries[span], hard, span, groups, columns.own, plan)
        score_rows(products, slopes, start, rows, columns, scale, options.margin)
        if slopes is not None:
            _accumulate(slopes, queries[span], hard, span, groups, columns.own, grads, plan)
    if grads.scale is not None:
        grads.scale.add_(rows.d_scale.sum())
    return rows.losses, rows.lse, rows.positive, rows.correct


def _products_(
    products: Tensor, queries: Tensor, hard: Tensor | None, span: slice, groups: list[_Group], own: slice, plan: _Plan
) -> None:
    """Writes the raw dot products of a chunk's queries [n, D] with all columns."""
    queries = queries.to(plan.operand)
    for group in groups:
        for _, at, vectors in _tiles(group, plan, plan.operand):
            multiply_(products[:, at], queries, vectors.t(), add=False)
    if hard is not None and own.stop > own.start:
        result = products.new_empty(queries.shape[0], own.stop - own.start, 1)
        multiply_(result, hard[span].to(plan.operand), queries[:, :, None], add=False)
        products[:, own] = result[:, :, 0]


def _accumulate(
    slopes: Tensor,
    queries: Tensor,
    hard: Tensor | None,
    span: slice,
    groups: list[_Group],
    own: slice,
    grads: Grads,
    plan: _Plan,
) -> None:
    """Adds one chunk's share to the gradients; ``slopes`` [n, columns] is the loss's gradient by the raw products."""
    queries = queries.to(plan.slope)  # [n, D]
    into = None if grads.queries is None else grads.queries[span]  # [n, D]
    for group in groups:
        if into is None and group.grad is None:
            continue
        for rows, at, vectors in _tiles(group, plan, plan.slope):
            if into is not None:
                multiply_(into, slopes[:, at], vectors, add=True)
            if group.grad is not None:
                multiply_(group.grad[rows], slopes[:, at].t(), queries, add=True)
    if hard is not None and own.stop > own.start:
        slopes = slopes[:, own]  # [n, K]
        if into is not None:
            multiply_(into[:, None, :], slopes[:, None, :], hard[span].to(plan.slope), add=True)
        if grads.hard is not None:  # every row has one query and is written once
            torch.mul(slopes.float()[:, :, None], queries[:, None, :], out=grads.hard[span])


def _project_(grad: Tensor, x: Tensor, _plan: _Plan, weight: float) -> None:
    """Turns the accumulator, divided by the norms already, into ``weight`` times the gradient of ``x``, in place."""
    project_rows(grad.flatten(0, -2), x.flatten(0, -2), weight)


info_nce_pass = partial(all_widths, Steps(_make_plan, _direction, _project_))


@torch.library.custom_op("bivec::info_nce", mutates_args=())
def info_nce_op(
    queries: Tensor,
    candidates: Tensor,
    hard: Tensor | None,
    scale: Tensor,
    targets: Tensor,
    query_ids: Tensor | None,
    candidate_ids: Tensor | None,
    hard_negative_ids: Tensor | None,
    row_weights: Tensor | None,
    normalize: bool,
    symmetric: bool,
    margin: float | None,
    include_query_query: bool,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    reduction: str,
    workspace_bytes: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, positive, correct, and the fp32 gradients of queries, candidates, hard and scale, by the loss summed.

    The gradients that are not ``wanted`` are empty. ``row_weights`` [B] weights the losses in the gradients.
    """
    options = Options(
        targets,
        query_ids,
        candidate_ids,
        hard_negative_ids,
        normalize,
        symmetric,
        margin,
        include_query_query,
        tuple(dims),
        tuple(dim_weights),
        reduction,
        workspace_bytes,
    )
    with torch.autocast(queries.device.type, enabled=False):
        losses, stats, grads = info_nce_pass(queries, candidates, hard, scale, options, wanted, row_weights)
    found = (grads.queries, grads.candidates, grads.hard, grads.scale)
    loss = losses if reduction == "none" else losses.sum() * _factor(reduction, queries.shape[0])
    lse, positive, correct = stats
    dq, dc, dh, ds = (queries.new_empty(0, dtype=torch.float32) if g is None else g for g in found)
    return loss, lse, positive, correct, dq, dc, dh, ds


@info_nce_op.register_fake
def _(queries: Tensor, candidates: Tensor, hard: Tensor | None, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wanted, reduction = rest[-1], rest[-3]
    batch = queries.shape[:1]

    def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return queries.new_empty(shape, dtype=dtype)

    vectors = (queries, candidates, hard, scale)
    grads = (empty(x.shape if w and x is not None else (0,)) for x, w in zip(vectors, wanted, strict=True))
    loss = empty(batch if reduction == "none" else ())
    return loss, empty(batch), empty(batch), empty(batch, torch.bool), *grads


def _factor(reduction: str, batch: int) -> float:
    return 1.0 / max(batch, 1) if reduction == "mean" else 1.0


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.options = inputs[9:-1]
    ctx.reduction, ctx.batch, ctx.wanted = inputs[-3], inputs[0].shape[0], list(inputs[-1])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:4]]
    _, *stats = output
    ctx.save_for_backward(*(inputs[:8] if ctx.reduction == "none" else output[4:]))
    ctx.mark_non_differentiable(*stats)
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Only the loss has a gradient."""
    if grad_loss is None:
        return (None,) * 18
    if ctx.reduction == "none":
        wanted = list(ctx.needs_input_grad[:4])
        grads = info_nce_op(*ctx.saved_tensors, grad_loss, *ctx.options, wanted)[4:]
        results = [g.to(d) if w else None for g, d, w in zip(grads, ctx.dtypes, wanted, strict=True)]
    else:
        weight = grad_loss * _factor(ctx.reduction, ctx.batch)
        results = [  # scales and rounds in one pass and leaves the saved tensor as it is
            torch.mul(g, weight, out=torch.empty_like(g, dtype=d)) if w else None
            for g, d, w in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
        ]
    return *results, *(None,) * 14


info_nce_op.register_autograd(_differentiate, setup_context=_save)


def run(
    queries: Tensor, candidates: Tensor, hard: Tensor | None, scale: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, positive and correct of checked arguments."""
    in_forward = torch.is_grad_enabled() and options.reduction != "none"
    wanted = [in_forward and x is not None and x.requires_grad for x in (queries, candidates, hard, scale)]
    results = info_nce_op(
        queries,
        candidates,
        hard,
        scale,
        options.targets,
        options.query_ids,
        options.candidate_ids,
        options.hard_negative_ids,
        None,
        options.normalize,
        options.symmetric,
        options.margin,
        options.include_query_query,
        options.dims,
        options.dim_weights,
        options.reduction,
        options.workspace_bytes,
        wanted,
    )
    loss, lse, positive, correct = results[:4]
    return loss, lse, positive, correct
