"""What both backends of ``info_nce`` share: the options, the accumulators, and the sum over widths and directions.

A backend is a :class:`Steps`: it divides the workspace, goes through the queries of one direction, and turns the
accumulators into gradients of the vectors given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# On the CPU, B = N = 16,384 takes 1,000 queries a chunk in 64 MiB, where the GEMMs are already at full speed.
DEFAULT_WORKSPACE_BYTES = {"cpu": 64 * 2**20}
DEFAULT_WORKSPACE_BYTES_ACCELERATOR = 256 * 2**20
EPS = 1e-12  # a vector whose norm is not above this counts as zero: similarity 0 with everything, gradient 0


@dataclass(frozen=True)
class Options:
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
class Grads:
    """fp32 accumulators, gradients of the vectors given once :func:`Steps.project_` has run; None = not wanted."""

    queries: Tensor | None  # [B, D]
    candidates: Tensor | None  # [N, D]
    hard: Tensor | None  # [M, D] or [B, K, D]
    scale: Tensor | None  # 0-dim


@dataclass(frozen=True)
class Steps:
    """What a backend does for one prefix width."""

    # (queries, candidates, hard, accumulation dtype, options) -> how the workspace is divided
    plan: Callable[..., Any]
    # (queries, candidates, hard, scale, options, grads, plan, row_weights) -> (losses, lse, positive, correct), all [B]
    direction: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    # (accumulator, vectors, plan, weight): makes it ``weight`` times the gradient of the vectors before their norm
    project_: Callable[..., None]


def workspace_budget(device: torch.device, options: Options, minimum: int, columns: int, width: int) -> int:
    """The bytes to divide.

    Raises:
        ValueError: they are fewer than ``minimum``, what one query needs.
    """
    budget = options.workspace_bytes
    if budget is None:
        return max(DEFAULT_WORKSPACE_BYTES.get(device.type, DEFAULT_WORKSPACE_BYTES_ACCELERATOR), minimum)
    if budget < minimum:
        raise ValueError(
            f"info_nce: workspace_bytes={budget} cannot hold the logits of one query; "
            f"{columns} columns of width {width} need at least {minimum} bytes"
        )
    return budget


def _one_width(
    steps: Steps,
    queries: Tensor,
    candidates: Tensor,
    hard: Tensor | None,
    scale: Tensor,
    options: Options,
    wanted: Sequence[bool],
    row_weights: Tensor | None,
    share: float,
) -> tuple[Tensor, list[Tensor], Grads]:
    """Loss and gradients of one prefix width, both directions; gradients come times ``share``, of the vectors given."""
    dtype, half = scale.dtype, 0.5 if options.symmetric else 1.0
    plan = steps.plan(queries, candidates, hard, dtype, options)

    def accumulator(want: bool, like: Tensor | None) -> Tensor | None:
        return torch.zeros(like.shape, dtype=dtype, device=like.device) if want and like is not None else None

    tensors = (queries, candidates, hard, scale)
    grads = Grads(*(accumulator(want, like) for want, like in zip(wanted, tensors, strict=True)))
    losses, *stats = steps.direction(queries, candidates, hard, scale, options, grads, plan, row_weights)
    if options.symmetric:
        swapped = replace(
            options, query_ids=options.candidate_ids, candidate_ids=options.query_ids, include_query_query=False
        )
        reverse = replace(grads, queries=grads.candidates, candidates=grads.queries, hard=None)
        losses = losses + steps.direction(candidates, queries, None, scale, swapped, reverse, plan, row_weights)[0]
    for grad, vectors in ((grads.queries, queries), (grads.candidates, candidates), (grads.hard, hard)):
        if grad is None:
            continue
        if options.normalize:
            steps.project_(grad, vectors, plan, half * share)
        else:
            grad.mul_(half * share)
    if grads.scale is not None:
        grads.scale.mul_(half * share)
    return losses * (half * share), stats, grads


def all_widths(
    steps: Steps,
    queries: Tensor,
    candidates: Tensor,
    hard: Tensor | None,
    scale: Tensor,
    options: Options,
    wanted: Sequence[bool],
    row_weights: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Grads]:
    """Sums the widths: (losses [B], (lse, positive, correct) of the largest, gradients)."""
    dtypes = [x.dtype for x in (queries, candidates, hard) if x is not None]
    scale = scale.to(reduce(torch.promote_types, dtypes, torch.float32))

    def one(width: int, share: float) -> tuple[Tensor, list[Tensor], Grads]:
        q, c = (x if width == x.shape[-1] else x[..., :width] for x in (queries, candidates))
        h = hard if hard is None or width == hard.shape[-1] else hard[..., :width]
        return _one_width(steps, q, c, h, scale, options, wanted, row_weights, share)

    losses, stats, total = one(options.dims[0], options.dim_weights[0])  # the largest: its gradients hold the sum
    for width, share in zip(options.dims[1:], options.dim_weights[1:], strict=True):
        part, _, grads = one(width, share)
        losses = losses + part
        for name in ("queries", "candidates", "hard"):
            if getattr(grads, name) is not None:
                getattr(total, name)[..., :width] += getattr(grads, name)
        if total.scale is not None and grads.scale is not None:
            total.scale.add_(grads.scale)
    missing = queries.shape[1] - options.dims[0]
    if missing:  # no prefix reaches the last columns
        q, c, h = (g if g is None else F.pad(g, (0, missing)) for g in (total.queries, total.candidates, total.hard))
        total = Grads(q, c, h, total.scale)
    return losses, stats, total
