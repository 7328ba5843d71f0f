"""`--memory`: the steps of a recipe are cut so that they fit, and the losses stay."""

import json

import pytest
import torch

from bivec.engine import cuts as cuts_module
from bivec.engine import run as run_module
from bivec.engine import trainer


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


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_resumed_run_keeps_its_cut_unless_another_memory_is_given(execute, recipe, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    free = [3_200_000]
    monkeypatch.setattr(cuts_module, "free_memory", lambda device: free[0])

    with monkeypatch.context() as patch:  # in the first stage
        patch.setattr(run_module.Run, "_evaluate_midway", interrupt)
        with pytest.raises(SystemExit):
            execute(recipe, directory, "--memory", "auto")
    before = json.loads((directory / "run.json").read_text())
    assert before["memory"] == "auto" and before["cuts"]["simcse"]["recompute"] != "none"
    free[0] = 10**9
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "_evaluate_midway", interrupt)
        with pytest.raises(SystemExit):
            execute(recipe, directory, "--memory", "auto", "--resume")
    assert json.loads((directory / "run.json").read_text()) == before
    execute(recipe, directory, "--memory", "1GB", "--resume")
    after = json.loads((directory / "run.json").read_text())
    assert after["memory"] == "1GB" and after["cuts"]["simcse"] == {"micro_batch_tokens": None, "recompute": "none"}
    assert {**after, "memory": 0, "cuts": 0} == {**before, "memory": 0, "cuts": 0}


def test_a_cut_that_memory_forced_is_kept(execute, recipe, tmp_path, monkeypatch):
    """A resumed run does not run out of memory again."""
    step, failures = trainer._optimizer_step, []

    def cramped(state, objective, *rest):
        if state.stage == "mntp" and objective.micro_batch_tokens > 48:
            failures.append(state.step)
            raise torch.OutOfMemoryError("out of memory")
        return step(state, objective, *rest)

    monkeypatch.setattr(trainer, "_optimizer_step", cramped)
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "_evaluate_midway", interrupt)
        with pytest.raises(SystemExit):
            execute(recipe, tmp_path / "run")
    cuts = {"mntp": {"micro_batch_tokens": 48, "recompute": "none"}}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["cuts"] == cuts and failures == [0]
    execute(recipe, tmp_path / "run", "--resume")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["cuts"] == cuts and failures == [0]
