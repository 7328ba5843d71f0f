"""Recipes under torchrun: two processes run as one, also sharded, with all weights trained, or when one is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bivec import Encoder
from bivec.engine.distributed import World
from bivec.engine.errors import RunError
from bivec.engine.recipe import MntpStage, SimcseStage, SupervisedStage
from bivec.engine.run_files import check_shared
from bivec.models import load_pretrained

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "llm2vec_sheared_llama.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(scope="module")
def flags(recipe):
    return [
        *("--model", recipe.model, "--mntp-data", recipe.mntp_data, "--simcse-data", recipe.simcse_data, "--smoke"),
        *("--supervised-data", recipe.supervised_data, "--stages", "bi,mntp,simcse,supervised"),
        *("--set", "mntp.optim.learning_rate=1e-2", "--set", "simcse.optim.learning_rate=1e-2"),
        *("--set", "mntp.batch_size=3", "--set", "supervised.micro_batch_tokens=100"),
        *("--set", "mntp.evaluate_every=2", "--dtype", "float32"),
    ]


def command(processes, flags, directory):
    launcher = [sys.executable] if processes == 1 else [*TORCHRUN, f"--nproc_per_node={processes}"]
    return [*launcher, str(SCRIPT), *map(str, flags), "--output-dir", str(directory)]


def run(processes, flags, directory, code=0):
    """What the command printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(processes, flags, directory), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def scores(directory):
    stages = json.loads((directory / "results.json").read_text())["stages"]
    return [number for stage in stages for number in (stage["sts_dev_spearman"], stage["sts_test_spearman"])]


def assert_same_run(found, expected, tolerance=2e-4):
    ours, theirs = (lines(directory / "metrics.jsonl") for directory in (found, expected))
    assert [(line["stage"], line["step"], line["tokens"]) for line in ours] == [
        (line["stage"], line["step"], line["tokens"]) for line in theirs
    ]
    for field in ("loss", "grad_norm"):
        expected_values = [line[field] for line in theirs]  # SimCSE of two or four unlike sentences is near 0
        assert [line[field] for line in ours] == pytest.approx(expected_values, rel=tolerance, abs=1e-5)
    evaluations = (lines(directory / "evaluations.jsonl") for directory in (found, expected))
    assert [(x["stage"], x["step"]) for x in next(evaluations)] == [(x["stage"], x["step"]) for x in next(evaluations)]
    assert scores(found) == pytest.approx(scores(expected), abs=8)  # a rank of 16 pairs may be swapped by rounding
    sentences = ["a choir sang", "the river runs north"]
    vectors = [Encoder.from_pretrained(directory).encode(sentences) for directory in (found, expected)]
    np.testing.assert_allclose(*vectors, rtol=0, atol=2e-3 * abs(vectors[1]).max())


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """The run of one process."""
    directory = tmp_path_factory.mktemp("alone")
    run(1, flags, directory / "run")
    return directory / "run"


@pytest.mark.parametrize("more", [[], ["--shard"]], ids=["replicated", "sharded"])
def test_two_processes_are_one(more, alone, flags, tmp_path):
    """Batches of 3 and 4: the shares are uneven in MNTP. One of the processes writes and speaks."""
    printed = run(2, [*flags, *more], tmp_path / "run")
    assert_same_run(tmp_path / "run", alone)
    assert printed.count("Cosine similarities:") == 1 and printed.count("bi+mntp: STS-B dev") == 1
    assert not [file for file in (tmp_path / "run").rglob("*") if file.name.endswith(".tmp")]
    ours, theirs = (load_file(x / "supervised" / "adapter_model.safetensors") for x in (tmp_path / "run", alone))
    assert all(torch.dist(ours[name], tensor) <= 1e-2 * tensor.norm() for name, tensor in theirs.items())


SLOW = """
import os, runpy, sys, time
from bivec.engine.lora import Adapter

save = Adapter.save
def slow(self, directory, base, world, *more):
    time.sleep(3 if world.is_main else 0)
    save(self, directory, base, world, *more)

Adapter.save = slow
runpy.run_path(sys.argv[0])["main"]()
"""


def test_a_process_that_writes_slowly_is_waited_for(flags, tmp_path):
    """The supervised stage goes on with the adapter of SimCSE, which every process reads."""
    (tmp_path / "slow.py").write_text(SLOW.replace("sys.argv[0]", repr(str(SCRIPT))), encoding="utf-8")
    more = ["--stages", "bi,simcse,supervised", "--set", "supervised.init_adapter=simcse"]
    words = [
        tmp_path / "slow.py" if word == str(SCRIPT) else word for word in command(2, [*flags, *more], tmp_path / "x")
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "x" / "metrics.jsonl")) == 6


def test_directories_that_are_not_shared(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr(World, "from_main", lambda self, value: '{"another": 1}')
    with pytest.raises(RunError, match=r"rank 1 does not see the run\.json that rank 0 has written"):
        check_shared(tmp_path, World(1, 2), patience=1)
    monkeypatch.setattr(World, "from_main", lambda self, value: "{}")
    check_shared(tmp_path, World(1, 2), patience=1)


def child_of_rank(rank):
    """The worker of this rank that torchrun has started on SCRIPT, once it is there."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(SCRIPT).encode() in words and f"RANK={rank}".encode() in variables:
            yield words, int(entry.name)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the worker by Linux's /proc")
def test_a_killed_rank_ends_the_job_and_the_run_goes_on_in_one_process(alone, flags, tmp_path):
    directory = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command(2, flags, directory), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (directory / "checkpoints" / "mntp-000002").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.01)
    (victim,) = [pid for words, pid in child_of_rank(1) if str(directory).encode() in words]
    os.kill(victim, signal.SIGKILL)
    output = job.communicate(timeout=60)[0]
    assert job.returncode != 0
    assert "rank      : 1" in output and "Signal 9 (SIGKILL)" in output
    run(1, [*flags, "--resume"], directory)
    assert_same_run(directory, alone)


@pytest.fixture(scope="module")
def full(flags):
    """All weights of every stage, the LM head too; too low a rate for the stages to part from each other."""
    rates = [f"{stage}.optim.learning_rate=1e-3" for stage in ("mntp", "simcse", "supervised")]
    tuned = [f"{stage}.tuning=full" for stage in ("mntp", "simcse")]
    return [*flags, *(word for one in [*rates, *tuned, "mntp.lm_head=trained"] for word in ("--set", one))]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.05)])
def test_all_weights(dtype, tolerance, full, flags, tmp_path):
    """MNTP and SimCSE train all weights, in shards; the supervised stage puts an adapter on top.

    The last thing before a stage is written is an evaluation.
    """
    full = [*full, "--dtype", dtype, "--set", "mntp.evaluate_every=3", "--set", "simcse.evaluate_every=3"]
    run(1, full, tmp_path / "one")
    run(2, full, tmp_path / "two")
    if dtype == "float32":
        assert_same_run(tmp_path / "two", tmp_path / "one", tolerance)
    ours, theirs = (lines(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=tolerance, abs=1e-3)
    stage = tmp_path / "two" / "mntp"
    assert {tensor.dtype for tensor in load_file(stage / "model.safetensors").values()} == {torch.float32}
    merged = load_file(tmp_path / "two" / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {getattr(torch, dtype)}
    trained = dict(load_pretrained(stage).model.named_parameters())
    model = flags[flags.index("--model") + 1]
    before = dict(load_pretrained(model).model.named_parameters())
    assert trained.keys() == before.keys()
    assert all(not torch.equal(trained[name], before[name]) for name in before if "embed" not in name)
    assert not (stage / "adapter_config.json").exists() and (tmp_path / "two/supervised/adapter_config.json").exists()
    # what is there is taken from there
    printed = run(1, [*full, "--resume"], tmp_path / "two")
    assert "step" not in printed and scores(tmp_path / "two") == pytest.approx(scores(tmp_path / "one"), abs=8)


def test_bad_settings(fails, recipe, tmp_path):
    for key, value, message in (
        ("mntp.tuning", "some", "tuning is 'some', expected one of lora, full"),
        ("mntp.lm_head", "thrown", "lm_head is 'thrown', expected one of frozen, trained"),
    ):
        assert message in fails(recipe, tmp_path / "x", "--set", f"{key}={value}")
    message = fails(recipe, tmp_path / "x", "--set", "supervised.init_adapter=simcse", "--set", "simcse.tuning=full")
    assert "supervised.init_adapter is 'simcse', but simcse.tuning is 'full'" in message
    assert "--timeout 0: expected a number of seconds" in fails(recipe, tmp_path / "x", "--timeout", "0")
    assert "--timeout nan: " in fails(recipe, tmp_path / "x", "--dry-run", "--timeout", "nan")
    assert {stage().tuning for stage in (MntpStage, SimcseStage, SupervisedStage)} == {"lora"}


def test_the_lm_head_is_trained_and_thrown_away(execute, fails, recipe, tmp_path, tiny_llama_dir):
    """Beside an adapter; a tied head is the embedding, which an adapter leaves frozen."""
    short = ("--stages", "bi,mntp", "--set", "mntp.optim.steps=3")
    losses = {}
    for lm_head in ("frozen", "trained"):
        execute(recipe, tmp_path / lm_head, *short, "--set", f"mntp.lm_head={lm_head}")
        losses[lm_head] = [line["loss"] for line in lines(tmp_path / lm_head / "metrics.jsonl")]
        tensors = load_file(tmp_path / lm_head / "mntp" / "adapter_model.safetensors")
        assert all(".lora_" in name for name in tensors)
    # the first step of the schedule has a rate of 0
    assert losses["trained"][:2] == losses["frozen"][:2] and losses["trained"][2] < losses["frozen"][2] - 1e-3
    last = tmp_path / "trained/checkpoints/mntp-000003/state.safetensors"
    assert "parameter/lm_head_weight" in load_file(last)
    tied = tmp_path / "tied"
    shutil.copytree(tiny_llama_dir, tied)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(tied / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    message = fails(recipe, tmp_path / "x", *short, "--model", tied, "--set", "mntp.lm_head=trained")
    assert "give mntp.lm_head=frozen, or mntp.tuning=full" in message


def test_more_processes_than_samples(flags, tmp_path):
    printed = run(2, [*flags, "--set", "mntp.batch_size=1"], tmp_path / "run", code=1)
    assert "a batch of 1 cannot be shared by 2 processes" in printed
    assert not (tmp_path / "run").exists()
