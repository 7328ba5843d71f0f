"""InfoNCE over in-batch candidates and hard negatives, without ever holding the whole similarity matrix.

    s_ij = scale * <q_i, c_j>                      q, c: rows divided by their L2 norm (``normalize=True``)
    L_i  = logsumexp_j(s_i-)                       over the negatives of query i that no mask removes
    loss_i = softplus(L_i - s_i+)                  = -log(exp(s_i+) / (exp(s_i+) + sum_j exp(s_ij)))
    dloss_i/ds_i+ = -p_i,  dloss_i/ds_ij = p_i * exp(s_ij - L_i),  p_i = sigmoid(L_i - s_i+)

Taking the LSE over the negatives only is what keeps nearly solved batches exact: the usual softmax(s)_i+ - 1 is a
difference of almost equal numbers (99 % gradient error in fp32 at scale 100), p_i is not a difference.

This is the door: arguments, their checks, the choice of the backend. The algorithm, the same in both, is chunks of
queries whose logits fit a workspace, gradients formed in the forward: ``info_nce_torch.py`` says it with torch alone,
``info_nce_triton.py`` with the norms folded into one kernel's pass over raw dot products; ``info_nce_plan.py`` is what
they share.

Saved for backward: the fp32 gradients of queries, candidates and hard negatives, not divided by B, and the scalar one
of scale; with ``reduction="none"`` the inputs, and all is computed again in the backward with the row weights.

Memory beyond inputs and gradients: the workspace, and the saved gradients until the backward has scaled them (with
several matryoshka dims one more set).
FLOPs: 6 B (N + M + B·[query-query]) D + 6 B K D; twice that for ``symmetric``, once more per matryoshka dim.

Source: van den Oord et al. 2018 (arXiv:1807.03748) for the loss, SimCSE (arXiv:2104.08821) and LLM2Vec
(arXiv:2404.05961) for its use, Kusupati et al. 2022 (arXiv:2205.13147) for matryoshka prefixes, Gao et al. 2021
(arXiv:2101.06983) for chunking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from bivec.kernels.backend import check_triton_dtypes, checks_values, resolve
from bivec.kernels.info_nce_plan import Options
from bivec.kernels.info_nce_torch import InfoNCE


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


def _check_vectors(queries: Tensor, candidates: Tensor, hard: Tensor | None) -> None:
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


def _check_targets(batch: int, candidates: Tensor, targets: Tensor | None, symmetric: bool) -> None:
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
    elif batch and checks_values(targets.device):
        lowest, highest = (int(bound) for bound in targets.aminmax())
        if lowest < 0 or highest >= len(candidates):
            raise ValueError(f"info_nce: targets must lie in [0, N={candidates.shape[0]}); found {lowest} … {highest}")


def _check_ids(queries: Tensor, candidates: Tensor, hard: Tensor | None, ids: dict[str, Tensor | None]) -> None:
    shapes = {
        "query_ids": queries.shape[:1],
        "candidate_ids": candidates.shape[:1],
        "hard_negative_ids": None if hard is None else hard.shape[:-1],
    }
    for label, tensor in ids.items():
        if tensor is None:
            continue
        expected = shapes[label]
        if expected is None:
            raise ValueError(f"info_nce: {label} were given without hard_negatives")
        if tensor.shape != expected or tensor.dtype != torch.int64:
            raise ValueError(
                f"info_nce: {label} must be {list(expected)} int64; got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if ids["query_ids"] is None:
            raise ValueError(f"info_nce: {label} are compared with query_ids, which are missing")


def _check_scale(scale: float | Tensor, margin: float | None) -> None:
    if isinstance(scale, Tensor) and (scale.dim() != 0 or not scale.is_floating_point()):
        raise ValueError(
            f"info_nce: scale must be a number or a 0-dim float tensor; got {tuple(scale.shape)} {scale.dtype}"
        )
    if torch.compiler.is_compiling():  # numbers may be symbols
        return
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"info_nce: margin must be finite or None; got {margin!r}")
    if isinstance(scale, Tensor) and not checks_values(scale.device):
        return
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


@overload
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
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
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
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, InfoNceStats]: ...
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
        queries: [B, D]; fp16, bf16, fp32 or fp64 (torch only). Logits are fp32 (fp64 for fp64) whatever the dtype.
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
        backend: None, "torch" or "triton" (``kernels/backend.py``). None takes "triton" on a GPU whatever the dtype,
            and float64 is refused there.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), 0-dim or [B] with reduction="none"; with ``return_stats`` the pair
        (loss, stats). A query without any unmasked negative has loss and gradients 0, and so has an empty batch.

    Raises:
        ValueError: shapes, dtypes, ids or options that do not fit; a non-finite scale or targets outside the
            candidates (values are read on a CPU, on a GPU with ``BIVEC_CHECK=1``; unread, such a target makes the
            Triton backend's loss NaN); a workspace too small for one query (the message says the minimum).
        BackendError: the backend cannot run on these tensors.

    Source:
        SimCSE (Gao et al. 2021, arXiv:2104.08821) and LLM2Vec (arXiv:2404.05961), section 2.1 and appendix.
    """
    chosen = resolve(backend, "info_nce", queries.device)
    _check_vectors(queries, candidates, hard_negatives)
    _check_targets(queries.shape[0], candidates, targets, symmetric)
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
    options = Options(
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
    run = _triton if chosen == "triton" else _torch
    loss, lse, positive, correct = run(queries, candidates, hard_negatives, scale, options)
    return (loss, InfoNceStats(lse, positive, correct, queries.shape[0])) if return_stats else loss


def _torch(
    queries: Tensor, candidates: Tensor, hard: Tensor | None, scale: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors = [queries, candidates, hard, scale]
    if not torch.is_grad_enabled():  # an evaluation pays for the loss alone
        vectors = [x if x is None else x.detach() for x in vectors]
    loss, lse, positive, correct = InfoNCE.apply(*vectors, options)
    return loss, lse, positive, correct


def _triton(
    queries: Tensor, candidates: Tensor, hard: Tensor | None, scale: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bivec.kernels import info_nce_triton  # triton is an optional dependency

    check_triton_dtypes("info_nce", queries=queries, candidates=candidates, hard_negatives=hard)
    return info_nce_triton.run(queries, candidates, hard, scale, options)
