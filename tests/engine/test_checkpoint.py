"""Checkpoints: whole or not there, whatever interrupts the write; damaged ones are refused with their name."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bivec.engine import checkpoint
from bivec.engine.checkpoint import KEPT, TrainState, list_checkpoints, load_checkpoint, save_checkpoint
from bivec.engine.errors import BivecError, CheckpointError
from bivec.engine.optim import OptimConfig, make_optimizer


def fresh_state(step=0, shapes=((3, 2), (2,))):
    parameters = {f"layers.{i}.w": torch.nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(shapes)}
    return TrainState("stage", step, parameters, make_optimizer(parameters.values(), OptimConfig(0.1, 100)))


def advance(state, steps=1):
    """Optimiser steps with gradients that follow from the step number."""
    for step in range(state.step, state.step + steps):
        for parameter in state.parameters.values():
            generator = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.optimizer.step()
    return TrainState(state.stage, state.step + steps, state.parameters, state.optimizer)


def values(state):
    return [p.detach().clone() for p in state.parameters.values()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_round_trip(tmp_path):
    state = advance(fresh_state(), 3)
    path = save_checkpoint(tmp_path, state)
    assert path == tmp_path / "stage-000003"
    # nothing is pickled: safetensors and JSON alone
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "state.safetensors"]
    assert "optimizer/exp_avg_sq/layers.0.w" in load_file(path / "state.safetensors")
    restored = load_checkpoint(path, fresh_state())
    assert restored.step == 3 and same(values(restored), values(state))
    for ours, theirs in zip(restored.parameters.values(), state.parameters.values(), strict=True):
        one, other = restored.optimizer.state[ours], state.optimizer.state[theirs]
        assert one.keys() == other.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(one[slot], other[slot]) and one[slot].dtype == other[slot].dtype for slot in one)
    assert same(values(advance(restored, 4)), values(advance(state, 4)))


def test_training_on_does_not_write_into_the_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path, advance(fresh_state(), 2))
    content = (path / "state.safetensors").read_bytes()
    advance(load_checkpoint(path, fresh_state()), 3)
    assert (path / "state.safetensors").read_bytes() == content


def test_a_parameter_without_a_gradient_has_no_moments(tmp_path):
    state = fresh_state()
    state.parameters["layers.0.w"].grad = torch.ones(3, 2)
    state.optimizer.step()
    restored = load_checkpoint(save_checkpoint(tmp_path, state), fresh_state())
    assert restored.optimizer.state[restored.parameters["layers.1.w"]] == {}
    advance(restored)


def test_rotation(tmp_path):
    state = fresh_state()
    other = save_checkpoint(tmp_path, TrainState("other", 1, state.parameters, state.optimizer))
    longer = save_checkpoint(tmp_path, TrainState("stage-two", 1, state.parameters, state.optimizer))
    for step in (1, 2, 999_999, 1_000_000):  # by number, not by name
        save_checkpoint(tmp_path, TrainState("stage", step, state.parameters, state.optimizer))
    names = [path.name for path in list_checkpoints(tmp_path, "stage")]
    assert names == ["stage-999999", "stage-1000000"] and len(names) == KEPT
    assert other.is_dir() and longer.is_dir()
    assert list_checkpoints(tmp_path / "nowhere", "stage") == []


def test_a_kill_in_the_middle_of_the_rotation(tmp_path, monkeypatch):
    """What is left of a dropped checkpoint does not look like one, and goes with the next save."""

    def killed(path, **_):
        if path.exists():
            next(path.iterdir()).unlink()
            raise KeyboardInterrupt

    def save(step):
        save_checkpoint(tmp_path, TrainState("stage", step, state.parameters, state.optimizer))

    state = fresh_state()
    for step in range(1, KEPT + 1):
        save(step)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(KEPT + 1)
    names = [path.name for path in list_checkpoints(tmp_path, "stage")]
    assert names == ["stage-000002", "stage-000003"] and len(list(tmp_path.iterdir())) == 3
    save(KEPT + 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-000003", "stage-000004"]


def test_an_injected_failure_keeps_the_previous_one(tmp_path, monkeypatch):
    state = advance(fresh_state(), 1)
    path = save_checkpoint(tmp_path, state)
    expected = values(state)

    def half_written(tensors, file, *_, **__):
        file.write_bytes(b"half")
        raise RuntimeError("injected")

    monkeypatch.setattr(checkpoint, "save_file", half_written)
    with pytest.raises(RuntimeError, match="injected"):
        save_checkpoint(tmp_path, advance(state))
    assert [item.name for item in tmp_path.iterdir()] == ["stage-000001"]
    assert same(values(load_checkpoint(path, fresh_state())), expected)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "SafetensorError"],
)
def test_a_full_disk(error, tmp_path, monkeypatch):
    state = advance(fresh_state(), 1)
    path = save_checkpoint(tmp_path, state)

    def full(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(BivecError, match="stage-000002: the disk is full"):
        save_checkpoint(tmp_path, advance(state))
    assert [item.name for item in tmp_path.iterdir()] == ["stage-000001"]
    assert load_checkpoint(path, fresh_state()).step == 1


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from bivec.engine import checkpoint
from bivec.engine.optim import OptimConfig, make_optimizer

parameters = {f"layers.{i}.w": torch.nn.Parameter(torch.full(s, 7.0)) for i, s in enumerate([(3, 2), (2,)])}
state = checkpoint.TrainState("stage", 2, parameters, make_optimizer(parameters.values(), OptimConfig(0.1, 100)))

def killed(tensors, file, *_, **__):
    file.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = killed
checkpoint.save_checkpoint(Path(sys.argv[1]), state)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_a_kill_in_the_middle_of_the_write(tmp_path):
    state = advance(fresh_state(), 1)
    save_checkpoint(tmp_path, state)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=environment, cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the half-written one is there, under a name that nobody takes for whole
    (last,) = list_checkpoints(tmp_path, "stage")
    assert last.name == "stage-000001" and same(values(load_checkpoint(last, fresh_state())), values(state))
    save_checkpoint(tmp_path, advance(state, 2))  # the next save sweeps it away
    assert sorted(item.name for item in tmp_path.iterdir()) == ["stage-000001", "stage-000003"]


def cut(path, name, kept):
    (path / name).write_bytes((path / name).read_bytes()[:kept])


def edit(path, change):
    tensors = load_file(path / "state.safetensors")
    change(tensors)
    save_file(tensors, path / "state.safetensors")


def write_state(path, **changes):
    (path / "state.json").write_text(json.dumps({"stage": "stage", "step": 2} | changes))


COUNTER = "optimizer/step/layers.0.w"
WEIGHT, MOMENT = "parameter/layers.0.w", "optimizer/exp_avg/layers.0.w"
DAMAGES = {
    "truncated": (lambda p: cut(p, "state.safetensors", -4), "not a whole checkpoint"),
    "empty": (lambda p: cut(p, "state.safetensors", 0), "not a whole checkpoint"),
    "no tensors": (lambda p: (p / "state.safetensors").unlink(), "not a whole checkpoint"),
    "no step": (lambda p: (p / "state.json").write_text("{}"), "not a whole checkpoint"),
    "a JSON list": (lambda p: (p / "state.json").write_text("[]"), "not a whole checkpoint"),
    "cut JSON": (lambda p: cut(p, "state.json", 5), "not a whole checkpoint"),
    "no JSON": (lambda p: (p / "state.json").unlink(), "not a whole checkpoint"),
    "missing": (lambda p: edit(p, lambda t: t.pop(WEIGHT)), r"other parameters .*\(1, first: layers\.0\.w\)"),
    "unexpected": (
        lambda p: edit(p, lambda t: t.update({"parameter/x": torch.ones(1)})),
        "other parameters .*first: x",
    ),
    "shape": (lambda p: edit(p, lambda t: t.update({WEIGHT: torch.ones(4)})), r"\[4\], this run has \[3, 2\]"),
    "moment": (lambda p: edit(p, lambda t: t.update({MOMENT: torch.ones(1)})), rf"{MOMENT} has shape \[1\]"),
    "other step": (lambda p: write_state(p, step=7), "state.json is of stage 'stage', step 7"),
    "other stage": (lambda p: write_state(p, stage="mntp"), "state.json is of stage 'mntp', step 2"),
    "step of text": (lambda p: write_state(p, step="2"), "state.json is of stage 'stage', step '2'"),
    "huge step": (lambda p: (p / "state.json").write_text('{"step": 1e999}'), "Infinity|not a whole checkpoint"),
    "nested": (lambda p: (p / "state.json").write_text("[" * 100_000), "nested too deep"),
    "integers": (
        lambda p: edit(p, lambda t: t.update({WEIGHT: t[WEIGHT].view(torch.int32)})),
        f"{WEIGHT} is stored as torch.int32",
    ),
    "counter": (lambda p: edit(p, lambda t: t.update({COUNTER: torch.ones(2, 2)})), rf"{COUNTER} has shape \[2, 2\]"),
    "no counter": (lambda p: edit(p, lambda t: t.pop(COUNTER)), "lacks a part of the optimiser's state"),
    "slot": (lambda p: edit(p, lambda t: t.update({"optimizer/x/layers.0.w": torch.ones(3, 2)})), "no such parameter"),
    "stray": (lambda p: edit(p, lambda t: t.update({"optimizer/exp_avg/x": torch.ones(1)})), "no such parameter"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(damage, tmp_path):
    path = save_checkpoint(tmp_path, advance(fresh_state(), 2))
    change, message = DAMAGES[damage]
    change(path)
    state = fresh_state()
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path, state)
    assert str(path) in str(error.value)
    assert same(values(state), values(fresh_state())) and not state.optimizer.state  # nothing was copied


def test_the_step_is_in_the_json(tmp_path):
    path = save_checkpoint(tmp_path, advance(fresh_state(), 5))
    assert json.loads((path / "state.json").read_text()) == {"stage": "stage", "step": 5}
