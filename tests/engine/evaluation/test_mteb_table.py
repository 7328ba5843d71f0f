"""Our MTEB scores beside the paper's: which average stands beside which, and the deltas."""

from __future__ import annotations

from statistics import fmean

import pytest

from bivec.engine.evaluation.mteb_table import ALL, SUBSET, compare, comparison_table
from bivec.engine.evaluation.paper import paper_rows, paper_tasks

UNSUPERVISED = paper_rows("11", model="LLaMA-2-7B")[0].scores


def everything():
    return {task.name: UNSUPERVISED[task.name] for task in paper_tasks()}


def test_the_papers_own_scores_have_no_delta():
    tasks, averages = compare(everything(), "bi+mntp+simcse", ["LLaMA-2-7B"])
    assert len(tasks) == 56 and len(averages) == 9
    for row in (*tasks, *averages):
        assert row.ours == pytest.approx(row.paper["LLaMA-2-7B"], abs=1e-9), row.name
    by_name = {row.name: row for row in averages}
    assert by_name[ALL].ours == pytest.approx(55.36, abs=0.01)
    assert by_name[SUBSET].ours == pytest.approx(58.88, abs=0.01)
    assert by_name["STS"].ours == pytest.approx(76.41, abs=0.01)


def test_part_of_a_category_is_compared_with_the_same_part():
    scores = {"SICK-R": 70.0, "STS17": 80.0, "SciFact": 60.0, "STS22.v2": 1.0}
    tasks, averages = compare(scores, "bi+mntp+supervised", ["Mistral-7B", "Llama-3-8B"])
    assert [(row.name, row.of, dict(row.paper)) for row in tasks] == [
        ("SICK-R", 1, {"Mistral-7B": 83.70}),
        ("STS17", 1, {"Mistral-7B": 90.19}),
        ("SciFact", 1, {"Mistral-7B": 78.86}),
        ("STS22.v2", 0, {}),  # another task than the paper's STS22
    ]
    by_name = {row.name: row for row in averages}
    assert list(by_name) == ["Retrieval", "STS", SUBSET, ALL]
    assert (by_name["STS"].tasks, by_name["STS"].of, by_name["STS"].ours) == (2, 10, 75.0)
    assert by_name["STS"].paper == {"Mistral-7B": pytest.approx((83.70 + 90.19) / 2)}
    assert by_name[ALL].tasks == 3


def test_variants_without_scores_of_tasks_are_compared_where_all_tasks_are_there():
    models = ["S-LLaMA-1.3B", "Llama-3-8B"]
    tasks, averages = compare(everything(), "uni", models, pooling="weighted_mean")
    assert all(row.paper == {} for row in tasks)
    by_name = {row.name: row.paper for row in averages}
    assert by_name["STS"] == {"S-LLaMA-1.3B": 49.15, "Llama-3-8B": 62.80}
    assert by_name[SUBSET] == {"S-LLaMA-1.3B": 34.99}  # Table 5, which has no Llama-3
    assert by_name[ALL] == {"S-LLaMA-1.3B": 35.05, "Llama-3-8B": 43.98}
    fewer = {name: score for name, score in everything().items() if name != "STS12"}
    by_name = {row.name: row for row in compare(fewer, "uni", pooling="weighted_mean")[1]}
    assert by_name["STS"].paper == by_name[ALL].paper == {}
    assert by_name["Reranking"].paper["S-LLaMA-1.3B"] == 38.02


def test_the_papers_row_is_of_the_same_pooling():
    for pooling, subset in (("mean", 33.03), ("eos_token", 27.72)):
        by_name = {row.name: row.paper for row in compare(everything(), "uni", ["S-LLaMA-1.3B"], pooling=pooling)[1]}
        assert by_name[SUBSET] == {"S-LLaMA-1.3B": subset}
        assert by_name["STS"] == by_name[ALL] == {}  # Table 1 has Uni with the weighted mean
    tasks, averages = compare(everything(), "bi+mntp+simcse", ["LLaMA-2-7B"], pooling="eos_token")
    assert all(row.paper == {} for row in tasks)
    assert [dict(row.paper) for row in averages if row.paper] == [{"LLaMA-2-7B": 50.61}]


def test_the_table_in_markdown():
    tasks, averages = compare({"SICK-R": 70.0, "LocalSTS": 50.0}, "bi+mntp+simcse", ["S-LLaMA-1.3B"])
    assert comparison_table(tasks).splitlines() == [
        "| task | ours | S-LLaMA-1.3B (paper) | ours less it |",
        "|---|---|---|---|",
        "| SICK-R | 70.00 | 69.34 | +0.66 |",
        "| LocalSTS | 50.00 |  |  |",
    ]
    assert "| STS (1 of 10 tasks) | 70.00 | 69.34 | +0.66 |" in comparison_table(averages, "average")
    assert comparison_table(compare({"LocalSTS": 50.0}, "bi")[0]).splitlines()[0] == "| task | ours |"


def test_uni_beside_weighted_mean_and_the_mean_of_a_group():
    scores = {task.name: 10.0 + i for i, task in enumerate(paper_tasks(category="Reranking"))}
    (reranking,) = (row for row in compare(scores, "bi+mntp", ["Mistral-7B"])[1] if row.name == "Reranking")
    assert reranking.ours == fmean(scores.values()) and reranking.paper == {"Mistral-7B": 50.43}
