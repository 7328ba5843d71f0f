"""`--memory`: the steps of a recipe are cut so that they fit, and the losses stay."""

import json

import pytest


def test_a_recipe_is_cut_to_the_memory_given(execute, recipe, fails, tmp_path, capsys):
    execute(recipe, tmp_path / "plain")
    capsys.readouterr()
    execute(recipe, tmp_path / "cut", "--memory", "3.2MB")
    told = capsys.readouterr().out
    assert "mntp: " in told and "simcse: 1 micro-batch of" in told
    run = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert run["cuts"]["mntp"] == {"micro_batch_tokens": 144, "recompute": "none"}  # the recipe has 96
    assert run["cuts"]["simcse"]["recompute"] != "none"
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "cut")
    ]
    for whole, parts in zip(*lines, strict=True):
        assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-4) and whole["tokens"] == parts["tokens"]
    assert "--memory lots: expected auto" in fails(recipe, tmp_path / "other", "--memory", "lots")
    assert "mntp needs" in fails(recipe, tmp_path / "other", "--memory", "1MB")
    assert not (tmp_path / "other").exists()
