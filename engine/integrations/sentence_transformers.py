"""sentence-transformers with our InfoNCE: two losses to put where its own stand.

``BivecMultipleNegativesRankingLoss`` and ``BivecCachedMultipleNegativesRankingLoss`` take the arguments of
``MultipleNegativesRankingLoss`` and ``CachedMultipleNegativesRankingLoss``, embed the columns as those do, and hand the
embeddings to ``info_nce``: the similarity matrix is never held whole, logits are fp32 whatever the embeddings are, and
nearly solved batches keep their gradient. What ``info_nce`` does not compute is refused at construction.

Read in sentence-transformers 5.4, 5.7, 6.0.1 and 6.2; before 5.4 the losses had another place, or fewer arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score
from torch import Tensor, distributed

from bivec.engine.errors import ConfigError
from bivec.kernels import info_nce

# the similarities that info_nce has, and whether they are of unit vectors
NORMALIZED: dict[Callable[..., Tensor], bool] = {cos_sim: True, dot_score: False}
PLAIN, SYMMETRIC, WITH_QUERIES = {"query_to_doc"}, {"query_to_doc", "doc_to_query"}, {"query_to_doc", "query_to_query"}


Loss: TypeAlias = "MultipleNegativesRankingLoss | CachedMultipleNegativesRankingLoss"  # with the same attributes


def _check(loss: Loss) -> None:
    """Raises ConfigError for arguments of the stock loss that info_nce cannot honour."""
    name, instead = type(loss).__name__, type(loss).__name__.removeprefix("Bivec")
    if loss.similarity_fct not in NORMALIZED:
        raise ConfigError(
            f"{name}: similarity_fct must be sentence_transformers.util.cos_sim or dot_score, got "
            f"{loss.similarity_fct!r}; use {instead} for others"
        )
    directions = set(loss.directions)
    supported = directions == PLAIN or (
        directions == SYMMETRIC if loss.partition_mode == "per_direction" else directions == WITH_QUERIES
    )
    if not supported:
        raise ConfigError(
            f"{name}: directions={loss.directions} with partition_mode={loss.partition_mode!r} is none of "
            "('query_to_doc',), ('query_to_doc', 'doc_to_query') with 'per_direction' and ('query_to_doc', "
            f"'query_to_query') with 'joint'; use {instead} for others"
        )
    if loss.gather_across_devices and directions == WITH_QUERIES:
        raise ConfigError(
            f"{name}: gather_across_devices=True does not go with the direction 'query_to_query': leave one of "
            f"them out, or use {instead}"
        )
    if loss.hardness_mode is not None and loss.hardness_strength > 0.0:
        raise ConfigError(f"{name}: hardness_mode={loss.hardness_mode!r} is not ours: leave it out, or use {instead}")


def _contrastive_loss(loss: Loss, embeddings: list[Tensor]) -> Tensor:
    """Mean InfoNCE of the columns: anchors [B, D], positives [B, D], then hard negatives, each [B, D]."""
    if len(embeddings) < 2:
        raise ConfigError(
            f"{type(loss).__name__}: needs columns of anchors and positives, got {len(embeddings)} column(s)"
        )
    _check(loss)  # the attributes may have been set since
    queries, positives, *negatives = embeddings
    normalize, directions = NORMALIZED[loss.similarity_fct], set(loss.directions)
    if not loss.gather_across_devices:
        return info_nce(
            queries,
            positives,
            scale=loss.scale,
            normalize=normalize,
            symmetric=directions == SYMMETRIC,
            hard_negatives=torch.cat(negatives) if negatives else None,  # of all queries
            include_query_query=directions == WITH_QUERIES,
        )
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    targets = torch.arange(len(queries), device=queries.device) + rank * len(queries)
    hard = torch.cat([all_gather_with_grad(column) for column in negatives]) if negatives else None
    value = info_nce(
        queries,
        all_gather_with_grad(positives),
        targets,
        scale=loss.scale,
        normalize=normalize,
        hard_negatives=hard,
    )
    if directions == SYMMETRIC:
        gathered = all_gather_with_grad(queries)
        value = (value + info_nce(positives, gathered, targets, scale=loss.scale, normalize=normalize)) / 2
    return value


class BivecMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """``MultipleNegativesRankingLoss`` with our InfoNCE; the same arguments.

    Honoured are ``scale``; ``similarity_fct`` = ``cos_sim`` or ``dot_score``; ``gather_across_devices``; ``directions``
    and ``partition_mode`` = ``("query_to_doc",)`` alone, with ``"doc_to_query"`` under ``"per_direction"``, or with
    ``"query_to_query"`` under ``"joint"``. Anchors, positives and any number of hard-negative columns, as there.

    Raises:
        ConfigError: other values, and ``hardness_mode`` with a strength.

    Example:
        >>> loss = BivecMultipleNegativesRankingLoss(model)  # doctest: +SKIP
        >>> SentenceTransformerTrainer(model=model, train_dataset=data, loss=loss).train()  # doctest: +SKIP
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self)

    def compute_loss_from_embeddings(
        self,
        embeddings: list[Tensor],
        labels: Tensor | None = None,  # noqa: ARG002 - of the stock loss
    ) -> Tensor:
        """0-dim loss of the embeddings of the columns, [B, D] each; the labels are not read."""
        return _contrastive_loss(self, embeddings)


class BivecCachedMultipleNegativesRankingLoss(CachedMultipleNegativesRankingLoss):
    """``CachedMultipleNegativesRankingLoss`` (GradCache) with our InfoNCE; the same arguments.

    ``mini_batch_size`` and ``mini_batch_num_tokens`` bound the embedding, as there; the loss itself is taken over all
    queries at once, in the workspace of ``info_nce``. For the rest see :class:`BivecMultipleNegativesRankingLoss`.

    Raises:
        ConfigError: as there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self)

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,  # noqa: ARG002 - of the stock loss
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """0-dim loss of the embedded mini-batches of every column; with ``with_backward`` walked back already."""
        loss = _contrastive_loss(self, [torch.cat(column) for column in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss
