"""Semantic textual similarity: how well cosines of embeddings order sentence pairs as people do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bivec.engine.data import STSPair
from bivec.engine.errors import DataError, RunError


@dataclass(frozen=True)
class STSResult:
    """Outcome of one evaluation on sentence pairs."""

    spearman: float  # rank correlation x 100
    num_pairs: int


def evaluate_sts(embed: Callable[[list[str]], np.ndarray | Tensor], pairs: Sequence[STSPair]) -> STSResult:
    """Spearman's rank correlation between the cosine similarities and the scores of sentence pairs.

    Args:
        embed: turns a list of N sentences into embeddings [N, D] on the CPU; called once with every distinct sentence.
        pairs: two at least.

    Returns:
        The correlation x 100 and the number of pairs. A zero vector has the similarity 0 with everything; where all
        similarities (or all scores) are equal, nothing is ordered and the correlation is 0.

    Raises:
        DataError: fewer than two pairs.
        ValueError: ``embed`` returned another shape.
        RunError: an embedding is not finite; the message holds its sentence.

    Source: Cer et al., 2017, SemEval task 1.
    """
    from scipy.stats import spearmanr

    if len(pairs) < 2:
        raise DataError(f"a rank correlation needs two pairs at least, got {len(pairs)}")
    rows: dict[str, int] = {}  # every distinct sentence and its row
    for pair in pairs:
        rows.setdefault(pair.sentence1, len(rows))
        rows.setdefault(pair.sentence2, len(rows))
    sentences = list(rows)
    embeddings = np.asarray(embed(sentences), dtype=np.float64)
    if embeddings.ndim != 2 or len(embeddings) != len(sentences):
        raise ValueError(f"embed must return [{len(sentences)}, D] for as many sentences, got {embeddings.shape}")
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        raise RunError(
            f"{np.count_nonzero(~finite)} of {len(sentences)} embeddings hold NaN or infinity, first that of "
            f"{sentences[int(np.argmin(finite))]!r}: the model's weights or its precision broke"
        )
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    embeddings = embeddings / np.where(norms > 0, norms, 1.0)
    first = embeddings[[rows[pair.sentence1] for pair in pairs]]
    second = embeddings[[rows[pair.sentence2] for pair in pairs]]
    similarities = (first * second).sum(axis=1)
    scores = np.array([pair.score for pair in pairs])
    ordered = np.ptp(similarities) > 0 and np.ptp(scores) > 0
    return STSResult(100 * float(spearmanr(similarities, scores).statistic) if ordered else 0.0, len(pairs))


def sts_spearman(embed: Callable[[list[str]], np.ndarray | Tensor], pairs: Sequence[STSPair]) -> float:
    """The correlation x 100 alone: ``evaluate_sts(embed, pairs).spearman``."""
    return evaluate_sts(embed, pairs).spearman
