"""Two processes on gloo train as one: same losses and gradients, resumed on any number, a lost rank is named."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bivec.engine.checkpoint import list_checkpoints
from bivec.engine.distributed import World, launched
from bivec.engine.errors import CheckpointError, ConfigError

WORKER = Path(__file__).with_name("ranks_worker.py")
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def _load_worker():
    spec = importlib.util.spec_from_file_location("ranks_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranks_worker"] = module
    spec.loader.exec_module(module)
    return module


worker = _load_worker()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(*arguments, size=2, worker=WORKER):
    """The worker in ``size`` processes, by SLURM's variables, and without torchrun's agent that would end them all."""
    port = str(free_port())
    processes = []
    for rank in range(size):
        variables = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": size, "SLURM_LOCALID": rank, "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
        command = [sys.executable, str(worker), *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return processes


def finish(processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


@pytest.fixture(scope="module")
def two_ranks(tiny_llama_dir, tmp_path_factory):
    """Loss and gradients of every case, of two ranks together."""
    file = tmp_path_factory.mktemp("ranks") / "steps.pt"
    finish(start_ranks("steps", tiny_llama_dir, file))
    return torch.load(file)


@pytest.mark.parametrize("case", worker.CASES, ids=str)
def test_two_ranks_are_one(case, two_ranks, tiny_llama_dir):
    loss, gradients = two_ranks[str(case)]
    expected_loss, expected = worker.step(case, tiny_llama_dir)
    tolerance = TOLERANCE[case.dtype]
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("objective", worker.OBJECTIVES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_micro_batches_are_one(objective, dtype, tiny_llama_dir):
    """In one process: the cut in micro-batches of one, three or so, and all."""
    expected_loss, expected = worker.step(worker.Case(objective, dtype), tiny_llama_dir)
    for tokens in (1, 40):
        loss, gradients = worker.step(worker.Case(objective, dtype, tokens), tiny_llama_dir)
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE[dtype])
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() <= TOLERANCE[dtype] * gradient.norm(), name


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama_dir, tmp_path_factory):
    """By mode, losses and tensors of a run in one process."""
    return {
        mode: worker.run(tiny_llama_dir, tmp_path_factory.mktemp(mode), worker.STEPS, World(), mode)
        for mode in worker.MODES
    }


def assert_same_end(found, expected, tolerance=1e-8):
    losses, trained = found
    assert losses == pytest.approx(expected[0][-len(losses) :], rel=tolerance)
    for name, tensor in expected[1].items():
        assert (trained[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("mode", worker.MODES)
def test_from_two_ranks_to_one_and_back(mode, uninterrupted, tiny_llama_dir, tmp_path):
    finish(start_ranks("train", tiny_llama_dir, tmp_path, 2, mode))
    (last,) = list_checkpoints(tmp_path, "stage")[-1:]
    shards = sorted(file.name for file in last.glob("shard-*"))
    assert len(shards) == (0 if mode == "replicated" else 2)
    found = worker.run(tiny_llama_dir, tmp_path, 3, World(), mode)
    assert len(found[0]) == 1
    finish(start_ranks("train", tiny_llama_dir, tmp_path, worker.STEPS, mode))
    assert_same_end(torch.load(tmp_path / "result.pt"), uninterrupted[mode])


def test_a_shard_is_missing(tiny_llama_dir, tmp_path):
    finish(start_ranks("train", tiny_llama_dir, tmp_path, 1, "sharded"))
    (last,) = list_checkpoints(tmp_path, "stage")
    shard = min(last.glob("shard-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=f"{last}: not a whole checkpoint .*{shard.name}"):
        worker.run(tiny_llama_dir, tmp_path, 2, World(), "sharded")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{last}: not a whole checkpoint .*{shard.name}"):
        worker.run(tiny_llama_dir, tmp_path, 2, World(), "sharded")


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="starves threads by Linux's scheduler")
def test_ranks_end_while_gloo_is_busy():
    """A thread of gloo that lags behind the last exchange aborted the process: one in three of these, before."""
    for _ in range(6):
        finish(start_ranks(worker=WORKER.with_name("ending_worker.py")))


def test_a_rank_killed_in_the_middle_of_a_step(tiny_llama_dir, tmp_path):
    """The other one ends and names it; what was saved is whole, and goes on bit for bit as without the kill."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    finish(start_ranks("train", tiny_llama_dir, whole, worker.STEPS))
    survivor, victim = start_ranks("lose", tiny_llama_dir, killed, "SIGKILL", 1)
    output = survivor.communicate(timeout=120)[0]
    victim.communicate(timeout=10)
    assert victim.returncode == -9 and survivor.returncode not in (0, None)
    assert "lost rank 1" in output
    assert [path.name for path in list_checkpoints(killed, "stage")] == ["stage-000001", "stage-000002"]
    finish(start_ranks("train", tiny_llama_dir, killed, worker.STEPS))
    (losses, trained), (expected_losses, expected) = (torch.load(x / "result.pt") for x in (killed, whole))
    assert losses == expected_losses[2:]
    assert all(torch.equal(trained[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs(rank, tiny_llama_dir, tmp_path):
    """The other one waits for the timeout, and names it; also rank 0, with which the store hangs."""
    processes = start_ranks("lose", tiny_llama_dir, tmp_path, "SIGSTOP", rank)
    victim, survivor = processes[rank], processes[1 - rank]
    try:
        output = survivor.communicate(timeout=120)[0]
        assert survivor.returncode not in (0, None) and f"lost rank {rank}" in output
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.communicate()


def launch(**variables):
    return launched({name: str(value) for name, value in variables.items()})


def test_what_the_launcher_says():
    assert launch() == World()
    torchrun = {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
    assert launch(**torchrun) == World(3, 4, 1, 2)
    slurm = {"SLURM_PROCID": 5, "SLURM_STEP_NUM_TASKS": 16, "SLURM_LOCALID": 5, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
    assert launch(**slurm) == World(5, 16, 5, 8)
    assert launch(**torchrun, **slurm) == World(3, 4, 1, 2)
    # the shell of a batch script, in which no step has been started
    assert launch(SLURM_PROCID=0, SLURM_NTASKS=16, SLURM_LOCALID=0) == World()
    for broken, message in (
        ({"WORLD_SIZE": 2}, "not RANK, LOCAL_RANK"),
        (torchrun | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        (torchrun | {"RANK": 4}, "RANK is 4, expected 0 … 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            launch(**broken)


def test_shares():
    for size in (1, 2, 3, 5):
        ranks = [World(rank, size) for rank in range(size)]
        assert [place for rank in ranks for place in rank.share(7)] == list(range(7))
        assert all(rank.shares(7) == [len(other.share(7)) for other in ranks] for rank in ranks)
    with pytest.raises(ConfigError, match="a batch of 2 cannot be shared by 3 processes"):
        World(0, 3).share(2)


def test_several_machines_need_the_size_of_each():
    with pytest.raises(
        ConfigError, match="LOCAL_WORLD_SIZE is not set: how many of the 4 processes are on this machine"
    ):
        launch(RANK=3, WORLD_SIZE=4, LOCAL_RANK=1, MASTER_ADDR="node7")
