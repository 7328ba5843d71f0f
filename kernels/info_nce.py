"""InfoNCE over in-batch candidates and hard negatives, without ever holding the whole similarity matrix.

    s_ij = scale * <q_i, c_j>                      q, c: rows divided by their L2 norm (``normalize=True``)
    L_i  = logsumexp_j(s_i-)                       over the negatives of query i that no mask removes
    loss_i = softplus(L_i - s_i+)                  = -log(exp(s_i+) / (exp(s_i+) + sum_j exp(s_ij)))
    dloss_i/ds_i+ = -p_i,  dloss_i/ds_ij = p_i * exp(s_ij - L_i),  p_i = sigmoid(L_i - s_i+)

Taking the LSE over the negatives only is what keeps nearly solved batches exact: the usual softmax(s)_i+ - 1 is a
difference of almost equal numbers (99 % gradient error in fp32 at scale 100), p_i is not a difference.

Algorithm. Queries are cut into chunks whose logits against all columns (candidates, shared hard negatives, own hard
negatives, other queries: side by side in the workspace, the vectors themselves never concatenated) fit
``workspace_bytes``. Per chunk: GEMMs write the logits; masks; one softmax in place; then the workspace, with -1 put at
the positive, is the gradient up to the row factor p_i, which goes to the [rows, D] operands of the gradient GEMMs.
Where normalised fp32 copies of the column vectors do not fit a quarter of the workspace they are made tile by tile. The
gradients of the unit vectors accumulate in fp32; the norm's rank-1 correction, g - x<x, g>, comes once at the end.
Masked logits are the finite value half the dtype's minimum, so a row without negatives has loss and gradient 0.

Saved for backward: the fp32 gradients of queries, candidates and hard negatives, not divided by B, and the scalar one
of scale; with ``reduction="none"`` the inputs, and all is computed again in the backward with the row weights.

Memory beyond inputs and gradients: the workspace (and with several matryoshka dims one more set of gradients).
FLOPs: 6 B (N + M + B·[query-query]) D + 6 B K D; twice that for ``symmetric``, once more per matryoshka dim.

Source: van den Oord et al. 2018 (arXiv:1807.03748) for the loss, SimCSE (arXiv:2104.08821) and LLM2Vec
(arXiv:2404.05961) for its use, Kusupati et al. 2022 (arXiv:2205.13147) for matryoshka prefixes, Gao et al. 2021
(arXiv:2101.06983) for chunking. The file is long because the door checks fourteen options.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.backend import resolve

# On the CPU, B = N = 16,384 takes 1,000 queries a chunk in 64 MiB, where the GEMMs are already at full speed.
DEFAULT_WORKSPACE_BYTES = {"cpu": 64 * 2**20}
DEFAULT_WORKSPACE_BYTES_ACCELERATOR = 256 * 2**20
EPS = 1e-12  # a vector whose norm is not above this counts as zero: similarity 0 with everything, gradient 0


@dataclass(frozen=True)
class InfoNceStats:
    """What the loss pass knows anyway, without gradient: query → candidate, the largest matryoshka dim."""

    lse: Tensor  # [B] fp32 (fp64 for fp64 inputs): log of the softmax denominator, positive included
    positive: Tensor  # [B]: logit (similarity times scale) of the positive
    correct: Tensor  # [B] bool: no unmasked negative scores higher than the positive
    count: int  # B

    @property
    def accuracy(self) -> Tensor:
        """0-dim share of the queries whose positive scores highest."""
        return self.correct.to(self.lse.dtype).sum() / max(self.count, 1)


@dataclass(frozen=True)
class _Options:
    """Everything that is not differentiable; the tensors are int64 ids and targets."""

    targets: Tensor  # [B]
    query_ids: Tensor | None  # [B]
    candidate_ids: Tensor | None  # [N]
    hard_negative_ids: Tensor | None  # [M] or [B, K]
    normalize: bool
    symmetric: bool
    margin: float | None
    include_query_query: bool
    dims: tuple[int, ...]  # descending
    dim_weights: tuple[float, ...]  # sum to 1
    reduction: str
    workspace_bytes: int | None


@dataclass(frozen=True)
class _Grads:
    """fp32 accumulators, with respect to the unit vectors until :func:`_project_` has run; None = not wanted."""

    queries: Tensor | None  # [B, D]
    candidates: Tensor | None  # [N, D]
    hard: Tensor | None  # [M, D] or [B, K, D]
    scale: Tensor | None  # 0-dim


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
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > EPS, norm.reciprocal(), 0.0)


def _unit(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """[..., D] in ``dtype``, divided by the norms; a view where there is nothing to do."""
    converted = x.to(dtype)
    if not normalize:
        return converted
    inverse = _inverse_norm(converted)
    return converted * inverse if converted is x else converted.mul_(inverse)


def _project_(grad: Tensor | None, x: Tensor, plan: _Plan, weight: float) -> None:
    """Turns the gradient of the unit vectors into ``weight`` times that of ``x``, in place."""
    if grad is None:
        return
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    for start in range(0, x.shape[0], plan.tile):
        g, rows = grad[start : start + plan.tile], x[start : start + plan.tile].to(grad.dtype)  # [t, D]
        inverse = _inverse_norm(rows)  # [t, 1]
        unit = rows * inverse
        g.sub_(unit.mul_((unit * g).sum(-1, keepdim=True))).mul_(inverse * weight)


def _make_plan(
    queries: Tensor, candidates: Tensor, hard: Tensor | None, dtype: torch.dtype, options: _Options
) -> _Plan:
    """Divides the workspace: at most a quarter for prepared column vectors, the rest for a query chunk's logits."""
    width, item = queries.shape[1], dtype.itemsize
    shared = candidates.shape[0] + (queries.shape[0] if options.include_query_query else 0)
    own = 0
    if hard is not None and hard.dim() == 3:
        own = hard.shape[1]
    elif hard is not None:
        shared += hard.shape[0]
    masked = options.query_ids is not None or options.margin is not None
    row_bytes = (shared + own) * (item + masked) + (
        6 + 3 * own
    ) * width * item  # 6: query, scaled, gradient, temporaries
    tile_row_bytes = 3 * width * item
    budget, minimum = options.workspace_bytes, row_bytes + tile_row_bytes
    if budget is None:
        default = DEFAULT_WORKSPACE_BYTES.get(queries.device.type, DEFAULT_WORKSPACE_BYTES_ACCELERATOR)
        budget = max(default, minimum)
    if budget < minimum:
        raise ValueError(
            f"info_nce: workspace_bytes={budget} cannot hold the logits of one query; "
            f"{shared + own} columns of width {width} need at least {minimum} bytes"
        )
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


def _mask_(logits: Tensor, positive: Tensor, span: slice, groups: list[_Group], own: slice, scale, options: _Options):
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


def _direction(
    queries: Tensor,
    candidates: Tensor,
    hard: Tensor | None,
    scale: Tensor,
    options: _Options,
    grads: _Grads,
    plan: _Plan,
    row_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query → candidate losses of one width; adds ``row_weights``-weighted gradients of the unit vectors to ``grads``.

    Returns (losses [B], lse [B], positive [B], correct [B]).
    """
    dtype, num_queries, device = scale.dtype, queries.shape[0], queries.device
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
        end += num_queries
    if plan.cached:
        groups = [replace(g, vectors=_unit(g.vectors, dtype, options.normalize), ready=True) for g in groups]
    workspace = torch.empty(min(plan.rows, num_queries), end, dtype=dtype, device=device)
    losses, lse, positives = (torch.empty(num_queries, dtype=dtype, device=device) for _ in range(3))
    correct = torch.empty(num_queries, dtype=torch.bool, device=device)

    for start in range(0, num_queries, plan.rows):
        span = slice(start, min(start + plan.rows, num_queries))
        unit = _unit(queries[span], dtype, options.normalize)  # [n, D]
        scaled, logits = unit * scale, workspace[: unit.shape[0]]  # [n, D], [n, columns]
        for group in groups:
            for _, columns, vectors in _tiles(group, plan, dtype, options.normalize):
                torch.mm(scaled, vectors.t(), out=logits[:, columns])
        own_unit = None
        if own.stop > own.start:
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
    grads: _Grads,
    plan: _Plan,
    options: _Options,
) -> None:
    """Adds one chunk's share to the gradients; dloss/dlogits is ``factor`` [n, 1] times ``slopes`` [n, columns]."""
    query_side = grads.queries is not None or grads.scale is not None
    if not query_side and all(group.grad is None for group in groups) and grads.hard is None:
        return
    weighted = unit * (factor * scale)  # [n, D]
    pull = torch.zeros_like(unit)  # [n, D] sum_j slopes_ij c_j
    for group in groups:
        if not query_side and group.grad is None:
            continue
        for rows, columns, vectors in _tiles(group, plan, unit.dtype, options.normalize):
            if query_side:
                pull.addmm_(slopes[:, columns], vectors)
            if group.grad is not None:
                group.grad[rows].addmm_(slopes[:, columns].t(), weighted)
    if own_unit is not None:
        if query_side:
            pull += torch.bmm(slopes[:, None, own], own_unit).squeeze(1)
        if grads.hard is not None:
            grads.hard[span] += slopes[:, own, None] * weighted[:, None, :]
    if query_side:
        pull *= factor
    if grads.scale is not None:
        grads.scale.add_((unit * pull).sum())
    if grads.queries is not None:
        grads.queries[span] += pull.mul_(scale)


def _one_width(queries, candidates, hard, scale, options: _Options, wanted, row_weights, share: float):
    """Loss and gradients of one prefix width, both directions; gradients come times ``share``, of the vectors given."""
    dtype, half = scale.dtype, 0.5 if options.symmetric else 1.0
    plan = _make_plan(queries, candidates, hard, dtype, options)

    def accumulator(want: bool, like: Tensor | None) -> Tensor | None:
        return torch.zeros(like.shape, dtype=dtype, device=like.device) if want and like is not None else None

    tensors = (queries, candidates, hard, scale)
    grads = _Grads(*(accumulator(want, like) for want, like in zip(wanted, tensors, strict=True)))
    losses, *stats = _direction(queries, candidates, hard, scale, options, grads, plan, row_weights)
    if options.symmetric:
        swapped = replace(
            options, query_ids=options.candidate_ids, candidate_ids=options.query_ids, include_query_query=False
        )
        reverse = replace(grads, queries=grads.candidates, candidates=grads.queries, hard=None)
        losses = losses + _direction(candidates, queries, None, scale, swapped, reverse, plan, row_weights)[0]
    for grad, vectors in ((grads.queries, queries), (grads.candidates, candidates), (grads.hard, hard)):
        if options.normalize:
            _project_(grad, vectors, plan, half * share)
        elif grad is not None:
            grad.mul_(half * share)
    if grads.scale is not None:
        grads.scale.mul_(half * share)
    return losses * (half * share), stats, grads


def _all_widths(queries, candidates, hard, scale, options: _Options, wanted, row_weights=None):
    """Sums the widths: (losses [B], (lse, positive, correct) of the largest, gradients)."""
    dtypes = [x.dtype for x in (queries, candidates, hard) if x is not None]
    scale = scale.to(reduce(torch.promote_types, dtypes, torch.float32))
    losses = stats = total = None
    for width, share in zip(options.dims, options.dim_weights, strict=True):
        prefix = [x if x is None or width == x.shape[-1] else x[..., :width] for x in (queries, candidates, hard)]
        part, part_stats, grads = _one_width(*prefix, scale, options, wanted, row_weights, share)
        if total is None:  # the largest first: its gradients hold the sum
            losses, stats, total = part, part_stats, grads
            continue
        losses = losses + part
        for name in ("queries", "candidates", "hard"):
            if getattr(grads, name) is not None:
                getattr(total, name)[..., :width] += getattr(grads, name)
        if grads.scale is not None:
            total.scale.add_(grads.scale)
    missing = queries.shape[1] - options.dims[0]
    if missing:  # no prefix reaches the last columns
        padded = (g if g is None else F.pad(g, (0, missing)) for g in (total.queries, total.candidates, total.hard))
        total = _Grads(*padded, total.scale)
    return losses, stats, total


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, candidates, hard, scale, options):
        ctx.per_row, ctx.options = options.reduction == "none", options
        wanted = (False,) * 4 if ctx.per_row else ctx.needs_input_grad[:4]
        with torch.autocast(queries.device.type, enabled=False):
            losses, stats, grads = _all_widths(queries, candidates, hard, scale, options, wanted)
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
    def backward(ctx, grad_loss, *_grad_stats):
        if grad_loss is None:
            return None, None, None, None, None
        if ctx.per_row:
            with torch.autocast(grad_loss.device.type, enabled=False):
                wanted, inputs = ctx.needs_input_grad[:4], ctx.saved_tensors
                grads = _all_widths(*inputs, ctx.options, wanted, row_weights=grad_loss)[2]
            grads = [grads.queries, grads.candidates, grads.hard, grads.scale]
            return *(g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)), None
        weight = grad_loss * ctx.factor
        return (
            *(  # scales and rounds in one pass and leaves the saved tensor as it is
                None if g is None else torch.mul(g, weight, out=torch.empty_like(g, dtype=d))
                for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            ),
            None,
        )


def _check_vectors(queries: Tensor, candidates: Tensor, hard: Tensor | None, targets: Tensor | None, symmetric: bool):
    if queries.dim() != 2 or candidates.dim() != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            "info_nce: queries [B, D] and candidates [N, D] must share D; "
            f"got {tuple(queries.shape)} and {tuple(candidates.shape)}"
        )
    batch, width = queries.shape
    if hard is not None:
        own = hard.dim() == 3 and hard.shape[0] == batch
        if not (hard.dim() == 2 or own) or hard.shape[-1] != width:
            raise ValueError(
                f"info_nce: hard_negatives must be [M, {width}] (shared) or [{batch}, K, {width}] (own); "
                f"got {tuple(hard.shape)}"
            )
    for label, x in (("queries", queries), ("candidates", candidates), ("hard_negatives", hard)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"info_nce: {label} must be floating point; got {x.dtype}")
    if symmetric and (targets is not None or candidates.shape[0] != batch):
        raise ValueError(
            f"info_nce: symmetric=True pairs query i with candidate i; it needs targets=None and N = B = {batch}, "
            f"got N={candidates.shape[0]} and targets {'given' if targets is not None else 'not given'}"
        )
    if targets is None:
        if candidates.shape[0] < batch:
            raise ValueError(
                f"info_nce: without targets query i belongs to candidate i; {batch} queries need at least as many "
                f"candidates, got {candidates.shape[0]}"
            )
    elif targets.shape != (batch,) or targets.dtype != torch.int64:
        raise ValueError(
            f"info_nce: targets must be [{batch}] int64, one a query; got {tuple(targets.shape)} {targets.dtype}"
        )
    elif targets.device.type == "cpu" and batch and not 0 <= int(targets.min()) <= int(targets.max()) < len(candidates):
        raise ValueError(
            f"info_nce: targets must lie in [0, N={candidates.shape[0]}); "
            f"found {int(targets.min())} … {int(targets.max())}"
        )


def _check_ids(queries: Tensor, candidates: Tensor, hard: Tensor | None, ids: dict[str, Tensor | None]) -> None:
    shapes = {
        "query_ids": queries.shape[:1],
        "candidate_ids": candidates.shape[:1],
        "hard_negative_ids": None if hard is None else hard.shape[:-1],
    }
    for label, tensor in ids.items():
        if tensor is None:
            continue
        if shapes[label] is None:
            raise ValueError(f"info_nce: {label} were given without hard_negatives")
        if tensor.shape != shapes[label] or tensor.dtype != torch.int64:
            raise ValueError(
                f"info_nce: {label} must be {list(shapes[label])} int64; got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if ids["query_ids"] is None:
            raise ValueError(f"info_nce: {label} are compared with query_ids, which are missing")


def _check_scale(scale: float | Tensor, margin: float | None) -> None:
    if isinstance(scale, Tensor) and (scale.dim() != 0 or not scale.is_floating_point()):
        raise ValueError(
            f"info_nce: scale must be a number or a 0-dim float tensor; got {tuple(scale.shape)} {scale.dtype}"
        )
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"info_nce: margin must be finite or None; got {margin!r}")
    if isinstance(scale, Tensor) and scale.device.type != "cpu":
        return  # looking at its value would synchronise
    value = scale.item() if isinstance(scale, Tensor) else float(scale)
    if not math.isfinite(value):
        raise ValueError(f"info_nce: scale must be finite; got {value}")
    if margin is not None and value <= 0:
        raise ValueError(f"info_nce: margin needs a positive scale; got {value}")


def _matryoshka(width: int, dims: Sequence[int] | None, weights: Sequence[float] | None) -> list[tuple[int, float]]:
    """Returns (prefix width, share of the loss), the widest first."""
    if dims is None:
        if weights is not None:
            raise ValueError("info_nce: matryoshka_weights were given without matryoshka_dims")
        return [(width, 1.0)]
    if not dims or len(set(dims)) != len(dims) or not all(isinstance(d, int) and 1 <= d <= width for d in dims):
        raise ValueError(f"info_nce: matryoshka_dims must be different integers in [1, D={width}]; got {list(dims)}")
    weights = [1.0] * len(dims) if weights is None else [float(w) for w in weights]
    if len(weights) != len(dims) or not all(0 <= w < math.inf for w in weights) or sum(weights) == 0:
        raise ValueError(
            f"info_nce: matryoshka_weights must be {len(dims)} non-negative numbers, not all 0; got {list(weights)}"
        )
    return sorted(((d, w / sum(weights)) for d, w in zip(dims, weights, strict=True)), reverse=True)


def info_nce(
    queries: Tensor,
    candidates: Tensor,
    targets: Tensor | None = None,
    *,
    scale: float | Tensor = 20.0,
    normalize: bool = True,
    symmetric: bool = False,
    hard_negatives: Tensor | None = None,
    query_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    hard_negative_ids: Tensor | None = None,
    margin: float | None = None,
    include_query_query: bool = False,
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    workspace_bytes: int | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, InfoNceStats]:
    """Contrastive loss of every query against its positive, with all other candidates as negatives.

    Args:
        queries: [B, D]; fp16, bf16, fp32 or fp64. Logits are fp32 (fp64 for fp64) whatever the dtype.
        candidates: [N, D]; every one that is not a query's positive is its negative.
        targets: [B] int64, the positive's row in ``candidates``; None = ``arange(B)`` (then N >= B). May repeat.
        scale: 1 / temperature, a number or 0-dim tensor (then it gets a gradient).
        normalize: compare cosines; a vector of norm <= 1e-12 has cosine 0 with everything and gradient 0.
        symmetric: mean of both directions; needs N = B and no ``targets``. Hard and query-query negatives count in the
            query → candidate direction only.
        hard_negatives: [M, D], negatives of all queries (LLM2Vec's layout), or [B, K, D], each query's own.
        query_ids: [B] int64 identities; a negative with the query's id is not a negative and is masked.
        candidate_ids: [N] int64, compared with ``query_ids``; a query's target is never masked.
        hard_negative_ids: [M] or [B, K] int64, likewise. Query-query negatives are compared through ``query_ids``.
        margin: masks negatives whose similarity is above the positive's + margin (before ``scale``).
        include_query_query: the other queries are negatives too.
        matryoshka_dims: prefix widths; the loss is their weighted mean, each prefix normalised anew.
        matryoshka_weights: one non-negative weight a width, default equal.
        reduction: "mean", "sum", or "none" (one loss a query; the backward then computes everything again).
        workspace_bytes: upper bound on logits and prepared vectors; None = 64 MiB on a CPU, 256 MiB on an accelerator,
            never less than one query needs. Any value gives the same result up to rounding.
        return_stats: also return :class:`InfoNceStats`.
        backend: None, "torch" or "triton".

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), 0-dim or [B] with reduction="none"; with ``return_stats`` the pair
        (loss, stats). A query without any unmasked negative has loss and gradients 0, and so has an empty batch.

    Raises:
        ValueError: shapes, dtypes, ids or options that do not fit; a non-finite scale; on CPU tensors also targets
            outside the candidates; a workspace too small for one query (the message says the minimum).

    Source:
        SimCSE (Gao et al. 2021, arXiv:2104.08821) and LLM2Vec (arXiv:2404.05961), section 2.1 and appendix.
    """
    resolve(backend, "info_nce")
    _check_vectors(queries, candidates, hard_negatives, targets, symmetric)
    ids = {"query_ids": query_ids, "candidate_ids": candidate_ids, "hard_negative_ids": hard_negative_ids}
    _check_ids(queries, candidates, hard_negatives, ids)
    if query_ids is not None and candidate_ids is None and hard_negative_ids is None and not include_query_query:
        raise ValueError(
            "info_nce: query_ids mask nothing without candidate_ids, hard_negative_ids or query-query negatives"
        )
    _check_scale(scale, margin)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'info_nce: reduction must be "none", "mean" or "sum"; got {reduction!r}')
    tensors = {"candidates": candidates, "hard_negatives": hard_negatives, "targets": targets, **ids}
    for label, x in tensors.items():
        if x is not None and x.device != queries.device:
            raise ValueError(f"info_nce: {label} is on {x.device}, queries on {queries.device}; move them together")
    widths = _matryoshka(queries.shape[1], matryoshka_dims, matryoshka_weights)
    options = _Options(
        targets=torch.arange(queries.shape[0], device=queries.device) if targets is None else targets,
        **ids,
        normalize=normalize,
        symmetric=symmetric,
        margin=margin,
        include_query_query=include_query_query,
        dims=tuple(width for width, _ in widths),
        dim_weights=tuple(share for _, share in widths),
        reduction=reduction,
        workspace_bytes=workspace_bytes,
    )
    if isinstance(scale, Tensor):
        scale = scale.to(queries.device)
    else:  # filled there: a copy from the host would synchronise
        scale = torch.full((), scale, dtype=torch.float64, device=queries.device)
    vectors = [queries, candidates, hard_negatives, scale]
    if not torch.is_grad_enabled():  # an evaluation pays for the loss alone
        vectors = [x if x is None else x.detach() for x in vectors]
    loss, lse, positive, correct = _InfoNCE.apply(*vectors, options)
    return (loss, InfoNceStats(lse, positive, correct, queries.shape[0])) if return_stats else loss
