"""The verdicts on the paper's trends follow the figures; the paper's own figures are its own."""

from itertools import pairwise

import pytest

from bivec.engine.evaluation.trends import (
    CLOSE,
    FAILS,
    HOLDS,
    MISSING,
    highest,
    pooling_trends,
    prefix_trends,
    rising,
    sequence_trends,
    small_loss,
    trends_table,
    word_trends,
)


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ({"a": 1.0, "b": 2.0, "c": 3.5}, HOLDS),
        ({"a": 1.0, "b": 1.9, "c": 9.0}, CLOSE),  # the smallest step decides
        ({"a": 1.0, "b": 0.1, "c": 9.0}, CLOSE),
        ({"a": 1.0, "b": 5.0, "c": 4.0}, FAILS),
        ({"a": 1.0, "c": 4.0}, MISSING),
    ],
)
def test_rising(scores, verdict):
    trend = rising("claim", "paper", scores, ("a", "b", "c"))
    assert trend.verdict == verdict
    signs = {(1.0, 0.1): ">", (5.0, 4.0): ">"}
    values = list(scores.items())
    shown = f"a {values[0][1]:.1f}"
    for (_, before), (name, score) in pairwise(values):
        shown += f" {signs.get((before, score), '<')} {name} {score:.1f}"
    assert trend.ours == ("" if verdict == MISSING else shown)


def test_highest():
    scores = {"eos_token": 10.0, "mean": 30.0, "weighted_mean": 29.5}
    assert highest("claim", "", scores, "mean").verdict == CLOSE
    assert highest("claim", "", scores, "eos_token").verdict == FAILS
    assert highest("claim", "", scores | {"weighted_mean": 20.0}, "mean").verdict == HOLDS
    assert highest("claim", "", scores, "max").verdict == highest("claim", "", {"mean": 1.0}, "mean").verdict == MISSING
    assert highest("claim", "", scores, "mean").ours == "mean 30.0, best of the others weighted_mean 29.5"


@pytest.mark.parametrize(
    ("after", "verdict"), [(88.8, HOLDS), (87.1, HOLDS), (86.9, FAILS), (89.9, CLOSE), (90.1, CLOSE), (91.0, FAILS)]
)
def test_small_loss(after, verdict):
    trend = small_loss("claim", "paper", {"a": 90.0, "b": after}, "a", "b")
    assert trend.verdict == verdict and trend.ours == f"a 90.0, b {after:.1f}"
    assert small_loss("claim", "paper", {"a": 1.0}, "a", "b").verdict == MISSING


def verdicts(trends):
    return [trend.verdict for trend in trends]


def test_sequence_trends():
    """S-LLaMA's column of Table 5, with Echo from Table 1, must confirm what the paper says of it."""
    paper = {
        "uni": 33.03,
        "uni weighted_mean": 34.99,
        "echo": 39.10,
        "bi": 30.26,
        "bi+mntp": 42.10,
        "bi+mntp+simcse": 52.40,
        "uni+simcse": 44.95,
        "bi+simcse": 44.46,
    }
    assert set(verdicts(sequence_trends(paper))) == {HOLDS}
    mistral = paper | {"bi": 50.07, "uni": 43.00}
    assert verdicts(sequence_trends(mistral))[0] == FAILS
    assert verdicts(sequence_trends(paper | {"uni+simcse": 60.0}))[4] == FAILS
    assert verdicts(sequence_trends({"bi": 1.0, "uni": 2.5})) == [HOLDS] + 5 * [MISSING]


def test_pooling_trends():
    table = {
        "uni": {"eos_token": 27.72, "mean": 33.03, "weighted_mean": 34.99},
        "bi+mntp": {"eos_token": 29.16, "mean": 42.10, "weighted_mean": 38.67},
        "bi+mntp+simcse": {"eos_token": 45.57, "mean": 52.40, "weighted_mean": 50.23},
    }
    assert verdicts(pooling_trends(table)) == 6 * [HOLDS]
    table["bi+mntp"] = {"eos_token": 50.0, "mean": 42.10, "weighted_mean": 38.67}
    assert verdicts(pooling_trends(table)) == [HOLDS, FAILS, HOLDS, HOLDS, FAILS, HOLDS]
    assert verdicts(pooling_trends({})) == 3 * [MISSING]


def test_word_trends():
    tasks = {
        "chunking": {"uni": 86.10, "bi": 76.50, "bi+mntp": 90.51, "bi+mntp+simcse": 89.33},
        "ner": {"uni": 96.09, "bi": 92.17, "bi+mntp": 96.59, "bi+mntp+simcse": 95.90},
        "pos": {"uni": 90.89, "bi": 89.18, "bi+mntp": 92.04, "bi+mntp+simcse": 90.38},
    }
    found = word_trends(tasks, "at their own tokens")
    assert verdicts(found) == 7 * [HOLDS]
    assert found[-1].ours == "chunking 4.4, best of the others pos 1.2"
    del tasks["chunking"]["bi"]
    assert verdicts(word_trends(tasks, "at their own tokens"))[0] == MISSING


def test_prefix_trends_and_the_table():
    trends = prefix_trends({"uni": 50.0, "bi": 49.5, "bi+mntp": 80.0})
    assert verdicts(trends) == [CLOSE, HOLDS]
    table = trends_table(trends).splitlines()
    assert len(table) == 4 and "| **holds** | bi 49.5 < bi+mntp 80.0 |" in table[3]
    assert {line.count("|") for line in table} == {5}
