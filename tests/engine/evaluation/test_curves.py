"""Training curves from the logs of runs, beside the paper's points."""

from __future__ import annotations

import json

import pytest

from bivec.engine.errors import RunError
from bivec.engine.evaluation.curves import TrainingCurve, curves_markdown, draw_curves, training_curves


def write_run(directory, lines, stages=None):
    directory.mkdir()
    text = "".join(
        json.dumps({"stage": stage, "step": step, "sts_dev_spearman": score}) + "\n" for stage, step, score in lines
    )
    (directory / "evaluations.jsonl").write_text(text)
    if stages is not None:
        results = [{"stage": name, "pooling": pooling, "sts_dev_spearman": score} for name, pooling, score in stages]
        (directory / "results.json").write_text(json.dumps({"stages": results}))
    return directory


@pytest.fixture
def runs(tmp_path):
    """One with results, whose stages so have a beginning; one of SimCSE alone, still running."""
    done = write_run(
        tmp_path / "done",
        [("mntp", 5, 30.0), ("mntp", 10, 40.0), ("simcse", 5, 60.0)],
        [
            ("uni", "mean", 48.0),
            ("uni weighted-mean", "weighted_mean", 59.0),
            ("bi", "mean", 17.5),
            ("bi+mntp", "mean", 41.0),
            ("bi+mntp+simcse", "mean", 80.0),
        ],
    )
    return {"done": done, "going": write_run(tmp_path / "going", [("simcse", 5, 20.0)])}


def test_points_and_where_they_begin(runs):
    assert training_curves(runs) == [
        TrainingCurve("done", "mntp", ((0, 17.5), (5, 30.0), (10, 40.0))),
        TrainingCurve("done", "simcse", ((0, 41.0), (5, 60.0))),
        TrainingCurve("going", "simcse", ((5, 20.0),)),
    ]


def test_a_state_before_with_another_pooling_is_no_beginning(tmp_path):
    stages = [("uni", "mean", 1.0), ("uni+supervised", "weighted_mean", 2.0)]
    run = write_run(tmp_path / "run", [("supervised", 25, 50.0)], stages)
    assert training_curves({"run": run}) == [TrainingCurve("run", "supervised", ((25, 50.0),))]


def test_beside_the_paper(tmp_path, runs):
    found = training_curves(runs)
    parts = [part.splitlines() for part in curves_markdown(found, paper_model="Mistral-7B").split("\n\n")]
    assert [part[0].split(":")[0] for part in parts[::2]] == ["mntp", "simcse", "Paper, Figure 6, Mistral-7B"]
    assert parts[3] == ["| | 0 | 5 |", "|---|---|---|", "| done | 41.0 | 60.0 |", "| going |  | 20.0 |"]
    assert parts[5][0] == "| | 25 | 50 | 75 | 100 |"
    assert parts[5][2] == "| uni+supervised | 51.8 | 63.1 | 65.6 | 66.9 |"
    draw_curves(tmp_path / "figure.png", found)
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    json.dumps([curve.to_dict() for curve in found])


def test_runs_without_scores(tmp_path):
    with pytest.raises(RunError, match=r"none: no evaluations.jsonl .* --set mntp.evaluate_every=5"):
        training_curves({"none": tmp_path / "none"})
    run = write_run(tmp_path / "run", [("mntp", 5, 30.0)])
    (run / "results.json").write_text("{}")
    with pytest.raises(RunError, match=r"results.json: not the results of a run"):
        training_curves({"run": run})
    (run / "evaluations.jsonl").write_text("{}\n{}\n")
    with pytest.raises(RunError, match="line 1: not a line of this log"):
        training_curves({"run": run})
