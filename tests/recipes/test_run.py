"""A run that is stopped anywhere and resumed equals one that was not; what stops it is one line."""

import errno
import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bivec.engine import checkpoint as checkpoint_module
from bivec.engine import objectives
from bivec.engine.encoder import Encoder
from bivec.engine.lora import Adapter
from bivec.engine.metrics import StepLog
from bivec.engine.run import Run

ROOT = Path(__file__).parents[2]
STEPS = 4  # of either stage of the recipe in conftest.py
EVERY = [(stage, step) for stage in ("mntp", "simcse") for step in range(1, STEPS + 1)]


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def outcome(directory):
    """Everything of a run that must not depend on where it was stopped."""
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kept = [[line[key] for key in ("stage", "step", "loss", "lr", "grad_norm", "tokens")] for line in metrics]
    evaluations = (directory / "evaluations.jsonl").read_text()
    return kept, evaluations, json.loads((directory / "results.json").read_text())["stages"]


def same_weights(one, other):
    ours, theirs = (load_file(directory / "merged" / "model.safetensors") for directory in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def content(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(execute, recipe, tmp_path_factory):
    """A run that nothing interrupts."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    execute(recipe, directory)
    return directory


def stop_at(monkeypatch, place, error=Stopped):
    """Raises at one (stage, step), after its line is in the log and before its evaluation and its checkpoint."""
    append = StepLog.append

    def stopping(self, record):
        append(self, record)
        if (record.stage, record.step) == place and "metrics" in self.path.name:
            raise error

    monkeypatch.setattr(StepLog, "append", stopping)


def test_an_uninterrupted_run(whole, recipe):
    metrics, evaluations, stages = outcome(whole)
    assert [(line[0], line[1]) for line in metrics] == EVERY
    assert len({line[2] for line in metrics}) == 2 * STEPS
    evaluated = [json.loads(line) for line in evaluations.splitlines()]
    assert [(line["stage"], line["step"]) for line in evaluated] == [
        ("mntp", 1),
        ("mntp", 2),
        ("mntp", 3),
        ("mntp", 4),
        ("simcse", 2),
        ("simcse", 4),
    ]
    # the evaluation after the last step is of the weights that are then merged
    assert evaluated[3]["sts_dev_spearman"] == pytest.approx(stages[3]["sts_dev_spearman"], abs=1)
    assert [stage["stage"] for stage in stages] == ["uni", "uni weighted-mean", "bi", "bi+mntp", "bi+mntp+simcse"]
    run = json.loads((whole / "run.json").read_text())
    assert run["recipe"]["mntp"]["lora"] == {
        "rank": 4,
        "alpha": 8,
        "dropout": 0.1,
        "targets": run["recipe"]["mntp"]["lora"]["targets"],
    }
    assert set(run["data"]) == {"mntp", "simcse"} and run["data"]["simcse"].startswith("30 sentences")


def test_a_second_run_is_the_same(execute, whole, recipe, tmp_path):
    execute(recipe, tmp_path)
    assert outcome(tmp_path) == outcome(whole) and same_weights(tmp_path, whole)


@pytest.mark.parametrize("place", EVERY, ids=lambda place: "-".join(map(str, place)))
def test_stopped_at_any_step(execute, place, whole, recipe, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, place)
        with pytest.raises(Stopped):
            execute(recipe, directory)
    first = (directory / "run.json").read_bytes()
    assert not (directory / "merged").exists()
    execute(recipe, directory, "--resume")
    assert outcome(directory) == outcome(whole) and same_weights(directory, whole)
    assert (directory / "run.json").read_bytes() == first


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (Run, "_write_results", 1),  # the first result is known and not written
        (Run, "_write_results", 4),
        (Adapter, "save", 1),  # MNTP's last checkpoint is there, its adapter is not
        (Adapter, "merge", 1),  # MNTP's adapter is there, its result is not
        (Adapter, "save", 2),
        (Adapter, "merge", 2),
        (Run, "_write_results", 5),
        (Encoder, "save_pretrained", 1),
        (Run, "_test_all_stages", 1),  # merged/ is there, the test set has not been read
        (Run, "_write_results", 6),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_stopped_between_the_steps(execute, owner, name, call, whole, recipe, tmp_path, monkeypatch):
    original, calls = getattr(owner, name), []

    def stopping(self, *args, **options):
        calls.append(self)
        if len(calls) == call:
            raise Stopped
        return original(self, *args, **options)

    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(Stopped):
            execute(recipe, directory)
    execute(recipe, directory, "--resume")
    assert outcome(directory) == outcome(whole) and same_weights(directory, whole)


def test_a_finished_run_stays_as_it_is(execute, whole, recipe, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    (directory / "results.png").unlink()
    left = [
        directory / name for name in ("mntp/.mntp.01234567.tmp", "merged/.merged.01234567.tmp", ".run.01234567.tmp")
    ]
    for folder in left:  # by a kill in the middle of a write
        folder.mkdir()
    results = json.loads((directory / "results.json").read_text())
    (directory / "results.json").write_text(json.dumps({**results, "seconds": 1000.0, "peak_memory_bytes": 1 << 50}))
    execute(recipe, directory, "--resume")
    after = json.loads((directory / "results.json").read_text())
    assert not any(folder.exists() for folder in left)
    assert outcome(directory) == outcome(whole) and same_weights(directory, whole)
    assert after["seconds"] >= 1000 and after["peak_memory_bytes"] == 1 << 50  # those of both runs
    assert (directory / "results.png").is_file() and "| bi+mntp+simcse | mean |" in capsys.readouterr().out


def test_a_run_in_the_way(fails, whole, recipe, tmp_path):
    before = content(whole)
    assert "holds a run already; give --resume" in fails(recipe, whole)
    assert content(whole) == before
    assert "there is no run.json; leave --resume out" in fails(recipe, tmp_path / "new", "--resume")
    assert not (tmp_path / "new").exists()
    remains = tmp_path / "remains"
    (remains / "checkpoints").mkdir(parents=True)
    assert "holds checkpoints of a run, but no run.json" in fails(recipe, remains)
    file = tmp_path / "file"
    file.touch()
    assert "is a file; give another --output-dir" in fails(recipe, file)


def test_resumed_with_other_hyper_parameters(fails, whole, recipe):
    before = content(whole)
    flags = ["--resume", "--seed", "7", "--set", "simcse.optim.learning_rate=1e-3", "--stages", "bi,mntp"]
    message = fails(recipe, whole, *flags)
    assert "seed (was 42, now 7)" in message and "simcse.optim.learning_rate (was 0.01, now 0.001)" in message
    assert "stages (was ['bi', 'mntp', 'simcse'], now ['bi', 'mntp'])" in message and "mntp.optim" not in message
    assert content(whole) == before


def test_resumed_with_other_text(fails, whole, recipe, files, tmp_path):
    """The file has changed under its name."""
    text = (files / "simcse.txt").read_text(encoding="utf-8")
    try:
        (files / "simcse.txt").write_text(text.replace("the", "a"), encoding="utf-8")
        message = fails(recipe, whole, "--resume")
    finally:
        (files / "simcse.txt").write_text(text, encoding="utf-8")
    assert "--resume with other text: --simcse-data gives 30 sentences" in message and "mntp" not in message


def test_resumed_on_another_device(fails, whole, recipe, tmp_path):
    """A GPU runs in bfloat16 by default: not the same run any more."""
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    run = json.loads((directory / "run.json").read_text())
    (directory / "run.json").write_text(json.dumps({**run, "device": "cuda:0"}))
    assert "--resume on cpu, but the run was started on cuda:0" in fails(recipe, directory, "--resume")


@pytest.mark.parametrize("damage", ["run.json", "results.json", "metrics.jsonl", "mntp", "simcse"])
def test_a_damaged_file_of_the_run(fails, damage, whole, recipe, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    path = directory / damage
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    path.write_bytes(b"[1]\n[2]\n" if damage == "metrics.jsonl" else path.read_bytes()[:-40])
    assert str(path) in fails(recipe, directory, "--resume")


def test_a_damaged_checkpoint(execute, fails, whole, recipe, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, ("simcse", 4))
        with pytest.raises(Stopped):
            execute(recipe, directory, "--set", "simcse.save_every=1")
    last = directory / "checkpoints" / "simcse-000003"
    (last / "state.safetensors").write_bytes(b"half")
    flags = ["--resume", "--set", "simcse.save_every=1"]
    message = fails(recipe, directory, *flags)
    assert f"error: {last}: not a whole checkpoint" in message and "delete it to resume from the one before" in message
    shutil.rmtree(last)
    execute(recipe, directory, *flags)
    assert outcome(directory) == outcome(whole)


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_a_nan_stops_the_run(execute, fails, stage, whole, recipe, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    loss_name, calls = {"mntp": "mntp_loss", "simcse": "info_nce"}[stage], []
    original, per_step = getattr(objectives, loss_name), 2 if stage == "mntp" else 1

    def broken(*args, **options):
        calls.append(1)
        factor = float("nan") if len(calls) > 2 * per_step else 1.0  # from the third step on
        return original(*args, **options) * factor

    with monkeypatch.context() as patch:
        patch.setattr(objectives, loss_name, broken)
        message = fails(recipe, directory)
        assert f"error: {stage}, step 3: the loss is nan" in message
        assert f"Last good checkpoint: {directory / 'checkpoints' / stage}-000002." in message
        before = content(directory)
        calls[:] = [1] * 2 * per_step
        assert "step 3: the loss is nan" in fails(recipe, directory, "--resume")
        assert content(directory) == before  # nothing was overwritten
    execute(recipe, directory, "--resume")
    assert outcome(directory) == outcome(whole)


@pytest.mark.parametrize(
    ("evaluate_every", "expected"),
    [(0, "mntp, step 3: the loss is"), (1, "mntp, step 2: 20 of 20 embeddings hold NaN or infinity")],
)
def test_a_learning_rate_that_explodes(fails, evaluate_every, expected, recipe, tmp_path):
    """The second step is the first after the warm-up's zero; nothing broken is saved under ``save_every=2``."""
    flags = ["--set", "mntp.optim.learning_rate=1e30", "--set", f"mntp.evaluate_every={evaluate_every}"]
    message = fails(recipe, tmp_path / "run", *flags)
    assert f"error: {expected}" in message and "Last good checkpoint: " in message


def test_ctrl_c_says_how_to_go_on(execute, fails, whole, recipe, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["recipes/tiny.py"])
    with monkeypatch.context() as patch:
        stop_at(patch, ("mntp", 3), KeyboardInterrupt)
        message = fails(recipe, directory, code=130)
    assert f"stopped; to go on: python recipes/tiny.py --output-dir {directory} --resume\n" in message
    with monkeypatch.context() as patch:
        stop_at(patch, ("simcse", 1), KeyboardInterrupt)
        assert fails(recipe, directory, "--resume", code=130).count("--resume") == 1
    execute(recipe, directory, "--resume")
    assert outcome(directory) == outcome(whole)
    monkeypatch.setattr("bivec.engine.run.load_inputs", lambda recipe: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "before anything was written" in fails(recipe, tmp_path / "new", code=130)


def test_a_full_disk(execute, fails, whole, recipe, tmp_path, monkeypatch):
    directory, calls = tmp_path / "run", []
    save = checkpoint_module.save_file

    def full(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", full)
        message = fails(recipe, directory)
    assert "mntp-000004: the disk is full" in message
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["mntp-000002"]
    execute(recipe, directory, "--resume")
    assert outcome(directory) == outcome(whole)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_kill_9_and_resume(recipe, tmp_path, monkeypatch):
    """The command itself: killed once it has a checkpoint, resumed, compared with a run that was left alone."""
    script = ROOT / "recipes" / "llm2vec_sheared_llama.py"
    flags = ["--model", recipe.model, "--mntp-data", recipe.mntp_data, "--simcse-data", recipe.simcse_data, "--smoke"]
    flags += ["--stages", "bi,mntp", "--set", "mntp.optim.steps=60", "--set", "mntp.save_every=3"]
    flags += ["--set", "mntp.optim.learning_rate=1e-2", "--set", "mntp.evaluate_every=20", "--output-dir"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, script, *flags, killed], **quiet)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "mntp-000003").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = len((killed / "metrics.jsonl").read_text().splitlines())
    assert 3 <= done < 60 and not (killed / "mntp").exists()
    subprocess.run([sys.executable, script, *flags, killed, "--resume"], check=True, **quiet)
    monkeypatch.setattr(sys, "argv", [str(script), *flags, str(whole)])
    runpy.run_path(str(script))["main"]()
    assert outcome(killed) == outcome(whole) and same_weights(killed, whole)
