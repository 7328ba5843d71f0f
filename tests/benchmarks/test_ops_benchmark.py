"""benchmarks/ops.py: every operator of ours and its plain statement run, agree, and are timed in one group."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments):
    pytest_command = str(Path(sys.executable).parent / "pytest")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    command = [pytest_command, "-q", "-p", "no:cacheprovider", "benchmarks/ops.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_all_of_them_run_and_agree():
    finished = run("-k", "not compile", "--benchmark-disable")
    assert finished.returncode == 0, finished.stdout
    assert "40 passed" in finished.stdout  # 10 operators, 2 directions, ours and plain torch


def test_one_is_timed_beside_its_peer(tmp_path):
    file = tmp_path / "ops.json"
    options = ("--benchmark-max-time=0.05", "--benchmark-min-rounds=2", f"--benchmark-json={file}")
    assert run("-k", "swiglu and not compile", *options).returncode == 0
    timed = [(b["group"], b["params"]["name"]) for b in json.loads(file.read_text())["benchmarks"]]
    assert timed == [(f"swiglu {d}", name) for d in ("forward", "backward") for name in ("bivec", "torch")]
