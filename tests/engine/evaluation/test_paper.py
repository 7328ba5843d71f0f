"""The paper's figures: the sums that they must give, as the paper prints them."""

from __future__ import annotations

from statistics import fmean

import pytest

from bivec.engine.errors import ConfigError
from bivec.engine.evaluation.paper import (
    AVERAGE,
    CATEGORIES,
    SUBSET_AVERAGE,
    paper_findings,
    paper_rows,
    paper_tasks,
    paper_title,
)

SIZES = {
    "Retrieval": 15,
    "Reranking": 4,
    "Clustering": 11,
    "PairClassification": 3,
    "Classification": 12,
    "STS": 10,
    "Summarization": 1,
}
MODELS = ["S-LLaMA-1.3B", "LLaMA-2-7B", "Mistral-7B"]


def test_tasks_and_the_subset():
    assert {category: len(paper_tasks(category=category)) for category in CATEGORIES} == SIZES
    subset = paper_tasks(subset_only=True)
    assert {task.name for task in subset} == {
        "SciFact", "ArguAna", "NFCorpus", "StackOverflowDupQuestions", "SciDocsRR", "BiorxivClusteringS2S",
        "MedrxivClusteringS2S", "TwentyNewsgroupsClustering", "SprintDuplicateQuestions", "Banking77Classification",
        "EmotionClassification", "MassiveIntentClassification", "STS17", "SICK-R", "STSBenchmark",
    }  # fmt: skip
    assert [task.name for task in paper_tasks(category="Reranking", subset_only=True)] == [
        "SciDocsRR",
        "StackOverflowDupQuestions",
    ]


@pytest.mark.parametrize(
    ("table", "average", "subset"),
    [("11", [49.42, 55.36, 56.80], [52.37, 58.88, 60.43]), ("12", [61.85, 64.14, 64.80], [64.68, 66.90, 67.46])],
)
def test_the_means_of_the_tasks_are_the_averages_printed(table, average, subset):
    rows = paper_rows(table)
    assert [row.model for row in rows] == MODELS
    assert [row.scores[AVERAGE] for row in rows] == average
    assert [row.scores[SUBSET_AVERAGE] for row in rows] == subset
    for row in rows:
        names = [task.name for task in paper_tasks()]
        assert set(row.scores) == {*names, AVERAGE, SUBSET_AVERAGE}
        assert fmean(row.scores[name] for name in names) == pytest.approx(row.scores[AVERAGE], abs=0.0051)
        subset_mean = fmean(row.scores[task.name] for task in paper_tasks(subset_only=True))
        assert subset_mean == pytest.approx(row.scores[SUBSET_AVERAGE], abs=0.0051)


@pytest.mark.parametrize(("tasks", "categories"), [("11", "1"), ("12", "2")])
def test_the_means_of_a_category_are_those_of_the_table_of_categories(tasks, categories):
    for row in paper_rows(tasks):
        (whole,) = paper_rows(categories, model=row.model, variant=row.variant)
        assert whole.scores[AVERAGE] == row.scores[AVERAGE]
        for category in CATEGORIES:
            mean = fmean(row.scores[task.name] for task in paper_tasks(category=category))
            assert mean == pytest.approx(whole.scores[category], abs=0.0101), (row.model, category)


@pytest.mark.parametrize(("table", "rows"), [("1", 20), ("2", 17)])
def test_the_average_of_every_row_follows_from_its_categories(table, rows):
    assert len(paper_rows(table)) == rows
    for row in paper_rows(table):
        mean = sum(SIZES[category] * row.scores[category] for category in CATEGORIES) / 56
        printed = 0.05 if row.model.startswith("GritLM") else 0.01  # GritLM's row has one decimal
        assert mean == pytest.approx(row.scores[AVERAGE], abs=printed + 1e-4), (row.model, row.variant)


def test_word_tasks_pooling_and_steps():
    assert len(paper_rows(4)) == 17
    assert dict(paper_rows(4, model="S-LLaMA-1.3B", variant="bi+mntp")[0].scores) == {
        "chunking": 90.51,
        "ner": 96.59,
        "pos": 92.04,
    }
    assert len(paper_rows("5")) == 18
    for model, gain in zip(MODELS, [0.498, 0.232, 0.375], strict=True):
        best_causal = max(paper_rows("5", model=model, variant="uni")[0].scores.values())
        whole = paper_rows("5", model=model, variant="bi+mntp+simcse")[0].scores["mean"]
        assert whole / best_causal - 1 == pytest.approx(gain, abs=0.0006)
    assert len(paper_rows("figure6")) == 12
    assert [row.scores["100"] for row in paper_rows("figure6", model="LLaMA-2-7B")] == [64.2, 58.6, 64.3, 64.1]
    assert paper_rows("9")[-1].scores[AVERAGE] == paper_rows(12, model="Mistral-7B")[0].scores[AVERAGE]


def test_what_is_not_there_is_named():
    with pytest.raises(ConfigError, match="'13' is not kept; choose one of 1, 2, 4"):
        paper_rows("13")
    with pytest.raises(ConfigError, match="no model 'GPT'; choose one of BERT, S-LLaMA"):
        paper_rows(1, model="GPT")
    with pytest.raises(ConfigError, match="category 'Rerank'"):
        paper_tasks(category="Rerank")
    assert paper_rows(1, variant="bi+simcse") == []


def test_titles_and_findings():
    assert "15-task subset" in paper_title(5)
    assert "Mistral-7B" in paper_findings()["layer_similarity"]
