"""What stops the supervised stage, and what it goes on after: NaN, a rate that explodes, the end of memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bivec.engine import run as run_module
from bivec.engine import supervised, trainer
from bivec.engine.grad_cache import Embedder
from bivec.engine.lora import LoraLinear

STAGES = ("--stages", "bi,supervised")


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines(directory)]


def content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(execute, recipe, tmp_path_factory):
    """A run that nothing stops."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    execute(recipe, directory, *STAGES)
    return directory


def nan_loss(monkeypatch, first):
    """The loss itself, from the step ``first`` (from 1) of the run on."""
    original, calls = supervised.info_nce, []

    def broken(*args, **options):
        calls.append(1)
        return original(*args, **options) * (float("nan") if len(calls) >= first else 1.0)

    monkeypatch.setattr(supervised, "info_nce", broken)


def poisoned_weights(monkeypatch, first):
    """One number of a frozen projection, before the step ``first`` (from 1) of the run."""
    original, calls = trainer._optimizer_step, []

    def poisoning(state, objective, *rest):
        calls.append(1)
        if len(calls) >= first:
            layer = next(module for module in objective.model.modules() if isinstance(module, LoraLinear))
            layer.base.weight[0, 0] = float("nan")
        return original(state, objective, *rest)

    monkeypatch.setattr(trainer, "_optimizer_step", poisoning)


@pytest.mark.parametrize("breakage", [nan_loss, poisoned_weights])
def test_a_nan_stops_the_run(execute, fails, breakage, whole, recipe, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        breakage(patch, first=4)
        message = fails(recipe, directory, *STAGES)  # exit code 2
    assert "error: supervised, step 4: the loss is nan, the gradient norm nan" in message
    assert f"Last good checkpoint: {directory / 'checkpoints' / 'supervised-000002'}." in message
    assert losses(directory) == losses(whole)[:3] and not (directory / "supervised").exists()
    before = content(directory)
    with monkeypatch.context() as patch:
        breakage(patch, first=2)  # the resumed run begins with step 3
        assert "error: supervised, step 4: the loss is nan" in fails(recipe, directory, *STAGES, "--resume")
    after = content(directory)
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"metrics.jsonl"}  # step 3 was logged once more, with its time
    execute(recipe, directory, *STAGES, "--resume")
    assert losses(directory) == losses(whole)


@pytest.mark.parametrize(
    ("evaluate_every", "expected", "good"),
    [
        (0, "supervised, step 2: the loss is nan", "none yet"),
        (1, "supervised, step 1: 20 of 20 embeddings hold NaN or infinity", "none yet"),
    ],
)
def test_a_learning_rate_that_explodes(fails, evaluate_every, expected, good, recipe, tmp_path):
    settings = ("optim.learning_rate=1e30", f"evaluate_every={evaluate_every}")
    flags = [word for setting in settings for word in ("--set", f"supervised.{setting}")]
    message = fails(recipe, tmp_path / "run", *STAGES, *flags)
    assert f"error: {expected}" in message and f"Last good checkpoint: {good}" in message
    assert not (tmp_path / "run" / "checkpoints").exists()  # save_every=2: no broken weights were saved


def cramped(monkeypatch, most, error):
    """Forwards that keep a graph of more than ``most`` tokens, or keep all of it, run out of memory at their end."""
    original, failures = Embedder.embed, []

    def embed(self, rows):
        tokens = rows.batch.num_tokens
        if torch.is_grad_enabled() and (tokens > most or self.recompute != "layer"):
            failures.append((tokens, self.recompute))
            raise error
        return original(self, rows)

    monkeypatch.setattr(Embedder, "embed", embed)
    return failures


ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_goes_on_in_smaller_micro_batches(execute, error, whole, recipe, tmp_path, monkeypatch, capsys):
    """With the same losses; and a resumed run begins with the cut that memory has forced."""
    directory = tmp_path / "run"

    def interrupt(self, name, step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        failures = cramped(patch, 60, ERRORS[error])
        patch.setattr(run_module.Run, "_evaluate_midway", interrupt)  # after step 2
        with pytest.raises(SystemExit):
            execute(recipe, directory, *STAGES)
    assert [level for _, level in failures] == ["none", "selective", "layer", "layer"]
    told = capsys.readouterr()
    assert "supervised, step 1: out of memory (" in told.out and "The effective batch stays" in told.out
    assert "going on with micro-batches of 50 tokens, recomputation 'layer'" in told.out
    cuts = {"supervised": {"micro_batch_tokens": 50, "recompute": "layer"}}
    assert json.loads((directory / "run.json").read_text())["cuts"] == cuts
    with monkeypatch.context() as patch:
        failures = cramped(patch, 60, ERRORS[error])
        execute(recipe, directory, *STAGES, "--resume")
    assert failures == [] and json.loads((directory / "run.json").read_text())["cuts"] == cuts
    for (step, loss, norm, tokens), expected in zip(losses(directory), losses(whole), strict=True):
        assert (step, tokens) == (expected[0], expected[3])
        assert loss == pytest.approx(expected[1], rel=1e-4) and norm == pytest.approx(expected[2], rel=1e-3)


def test_out_of_memory_in_the_middle_of_a_step_leaves_nothing_of_it(execute, whole, recipe, tmp_path, monkeypatch):
    """The second micro-batch of step 3 fails once, when the first has been walked back already."""
    original, count = Embedder.embed, {}

    def embed(self, rows):
        step = int(rows.batch.sample_ids[0]) >> supervised.STEP_BITS
        if torch.is_grad_enabled() and step == 2:
            count[step] = count.get(step, 0) + 1
            if count[step] == 2:
                raise torch.OutOfMemoryError("out of memory")
        return original(self, rows)

    monkeypatch.setattr(Embedder, "embed", embed)
    execute(recipe, tmp_path / "run", *STAGES)
    assert count[2] > 3  # it was begun again
    for found, expected in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        assert found[3] == expected[3] and found[1] == pytest.approx(expected[1], rel=1e-4)
        assert found[2] == pytest.approx(expected[2], rel=1e-3)


def test_no_way_left(fails, recipe, tmp_path, monkeypatch):
    """A single sequence does not fit: the error says what can be done, and nothing is written."""
    cramped(monkeypatch, 5, ERRORS["cpu"])
    message = fails(recipe, tmp_path / "run", *STAGES)
    assert "error: [enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory" in message
    assert "give --memory a size below the device's, such as 20GiB, or lower micro_batch_tokens of the stage" in message
    assert losses(tmp_path / "run") == [] and not (tmp_path / "run" / "checkpoints").exists()
