"""Spearman's correlation on sentence pairs, against scipy on similarities computed one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from bivec.engine.data import STSPair, load_sts
from bivec.engine.errors import DataError, RunError
from bivec.engine.evaluation import evaluate_sts, sts_spearman

PAIRS = load_sts(Path(__file__).parents[3] / "recipes" / "data" / "stsb_dev.csv.gz")[:120]


def letters(sentences: list[str]) -> np.ndarray:
    """Letter counts: an embedding that knows a little about similarity."""
    return np.array([[s.lower().count(chr(97 + i)) for i in range(26)] for s in sentences], dtype=np.float32)


def test_against_scipy_pair_by_pair():
    similarities = []
    for pair in PAIRS:
        a, b = letters([pair.sentence1, pair.sentence2]).astype(np.float64)
        similarities.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    expected = 100 * spearmanr(similarities, [pair.score for pair in PAIRS]).statistic
    result = evaluate_sts(letters, PAIRS)
    assert expected > 20  # the embedding is not noise, so a wrong pairing would show
    assert result.spearman == pytest.approx(expected, abs=1e-9)
    assert result.num_pairs == 120
    assert sts_spearman(letters, PAIRS) == result.spearman


def test_every_sentence_is_embedded_once_and_left_alone():
    pairs = [STSPair("a", "b", 1.0), STSPair("b", "c", 2.0), STSPair("a", "c", 3.0), STSPair("c", "c", 5.0)]
    calls = []
    embeddings = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])

    def embed(sentences):
        calls.append(sentences)
        return embeddings

    evaluate_sts(embed, pairs)
    assert calls == [["a", "b", "c"]]
    np.testing.assert_array_equal(embeddings, [[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])


@pytest.mark.parametrize(("order", "expected"), [([1.0, 2.0, 3.0], 100.0), ([3.0, 2.0, 1.0], -100.0)])
def test_hand_made_orders(order, expected):
    """Similarities 0 (a zero vector), cos 45 degrees and 1."""
    vectors = {"zero": [0.0, 0.0], "east": [1.0, 0.0], "north-east": [1.0, 1.0], "far east": [9.0, 0.0]}
    others = ["zero", "north-east", "far east"]
    pairs = [STSPair("east", other, score) for other, score in zip(others, order, strict=True)]
    assert sts_spearman(lambda sentences: np.array([vectors[s] for s in sentences]), pairs) == pytest.approx(expected)


def test_nothing_ordered_is_zero():
    assert sts_spearman(lambda sentences: np.zeros((len(sentences), 3)), PAIRS) == 0.0
    equal_scores = [STSPair("a", "b", 1.0), STSPair("ab", "b", 1.0)]
    assert sts_spearman(letters, equal_scores) == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_embeddings_are_named(value):
    def embed(sentences):
        embeddings = letters(sentences)
        embeddings[3, 5] = value
        return embeddings

    sentences = list(dict.fromkeys(s for pair in PAIRS for s in (pair.sentence1, pair.sentence2)))
    with pytest.raises(RunError, match=f"1 of {len(sentences)} embeddings") as caught:
        sts_spearman(embed, PAIRS)
    assert sentences[3] in str(caught.value)


def test_bad_shapes_and_too_few_pairs():
    with pytest.raises(ValueError, match="embed must return"):
        sts_spearman(lambda sentences: np.zeros((1, 3)), PAIRS)
    with pytest.raises(DataError, match="two pairs at least, got 1"):
        sts_spearman(letters, PAIRS[:1])
