"""Two processes of which one has other texts, another disk, or an error of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("rare_ranks_worker.py")


def two(tmp_path, *arguments):
    """What either rank said its calls have raised, [type, message] each; both must fail."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        variables = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": rank, "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
        command = [sys.executable, str(WORKER), *map(str, arguments)]
        options = {"cwd": tmp_path / str(rank), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **options))
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], outputs
    return [[json.loads(line) for line in printed.splitlines() if line.startswith("[")] for printed, _ in outputs]


@pytest.mark.slow
def test_corpora_that_are_not_one(tiny_llama_dir, tmp_path):
    """Other texts are told by both, before any work; a folder that rank 1 does not see by rank 1, which is missed."""
    (first, second), (third, fourth) = two(tmp_path, "corpora", tiny_llama_dir)
    other = "e.npy: the processes read different texts or models; give all of them the same"
    assert first == third == ["RunError", other]
    assert fourth[0] == "RunError"
    assert fourth[1].startswith(".e.npy.partial: rank 1 does not see what rank 0 has made there; give a path on a file")
    assert second[0] == "RunError" and second[1].startswith("lost rank 1: killed, stuck, or stopped by an error")
    assert [path.name for path in (tmp_path / "0").iterdir() if path.name != "told"] == [".e.npy.partial"]
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["told"]


def test_an_error_of_ones_own_is_not_blamed_on_the_others(tmp_path):
    (said,), nothing = two(tmp_path, "error")
    assert said == ["RuntimeError", "of rank 0 alone"] and nothing == []
