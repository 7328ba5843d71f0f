"""What a session with a GPU runs first: are the kernels right, and how fast are they? One summary.

    python benchmarks/gpu_suite.py --output DIR            # pytest, then benchmarks/attention.py and losses.py
    python benchmarks/gpu_suite.py --output DIR --quick    # the short forms of the benchmarks
    python benchmarks/gpu_suite.py --output DIR --tune     # also benchmarks/tune.py, which writes a new tuning table
    python benchmarks/gpu_suite.py --output DIR --timeout 240 --tests tests/kernels/test_attention.py

The tests are those of the Triton kernels, dropout and the models on them, all of them and not only those marked
`gpu`: where there is a GPU the same bodies run on it, kernels compiled and not interpreted.

A part that fails, or takes longer than ``--timeout`` seconds, does not stop the next one. DIR holds a log of each part,
the benchmarks' JSON and plots, and summary.json, written after each part. Exit status: 0, 1 where a part failed, 2
without a GPU. Needs bivec (``pip install --no-deps --no-build-isolation -e .`` where there is no network), triton and
pytest; transformers for the models' tests, matplotlib for the plot. No `datasets`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timing import describe_run

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("bivec", "triton", "pytest", "transformers", "matplotlib")
TESTS = (
    "tests/kernels/test_attention_triton.py",
    "tests/kernels/test_attention_triton_edges.py",
    "tests/kernels/test_attention_ops.py",
    "tests/kernels/test_dropout.py",
    "tests/kernels/test_linear_cross_entropy_triton.py",
    "tests/kernels/test_linear_cross_entropy_ops.py",
    "tests/kernels/test_info_nce_triton.py",
    "tests/kernels/test_segment_pool_triton.py",
    "tests/models/test_triton_backend.py",
)


def pytest_command() -> str:
    """The command beside this Python, or the one on the path; never `python -m pytest`, which would put the
    repository's folders before other packages."""
    beside = Path(sys.executable).parent / "pytest"
    return str(beside) if beside.exists() else shutil.which("pytest") or "pytest"


def parts(options: argparse.Namespace) -> dict[str, list[str]]:
    """The commands, by name, in their order."""
    benchmarks = Path(__file__).resolve().parent
    quick, small = (["--quick"], ["--size", "small"]) if options.quick else ([], [])
    output = str(options.output.resolve())
    commands = {
        "tests": [pytest_command(), "-q", *options.tests],
        "attention": [sys.executable, str(benchmarks / "attention.py"), "--output", output, *quick],
        "losses": [sys.executable, str(benchmarks / "losses.py"), "--output", output, *small],
    }
    if options.tune:
        commands["tune"] = [sys.executable, str(benchmarks / "tune.py"), "--timed"]
    return commands


def run_part(command: Sequence[str], log: Path, timeout: float) -> dict[str, Any]:
    """Runs it in the repository's root, its output on the screen and in ``log``."""
    # kernels are to be compiled, not interpreted; and what a killed part printed must have left its buffer
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return {"command": list(command), "exit_code": None, "error": str(error), "seconds": 0.0}
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)  # its own session: pytest's workers and compilers too

    timer = threading.Timer(timeout, stop)
    timer.start()
    with log.open("w", encoding="utf-8") as file:
        for text in process.stdout:
            print(text, end="", flush=True)
            file.write(text)
    code = process.wait()
    timer.cancel()
    seconds = round(time.perf_counter() - start, 1)
    error = f"stopped after {timeout:g} s" if late.is_set() else None
    return {"command": list(command), "exit_code": code, "error": error, "seconds": seconds, "log": log.name}


def run_suite(options: argparse.Namespace, device: torch.device) -> int:
    """All parts and the summary; the exit status."""
    options.output.mkdir(parents=True, exist_ok=True)
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    summary = {**describe_run(device), "not_installed": absent, "parts": {}}
    print(f"{summary['device']}, driver {summary['driver']}, {summary['versions']}")
    print(f"not installed: {', '.join(absent) or 'nothing that is needed'}", flush=True)
    for name, command in parts(options).items():
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        summary["parts"][name] = run_part(command, options.output / f"{name}.log", options.timeout)
        (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print("\n== summary")
    for name, part in summary["parts"].items():
        verdict = (
            "ok" if part["exit_code"] == 0 else f"FAILED ({part['error'] or 'exit code ' + str(part['exit_code'])})"
        )
        print(f"{name:<10} {part['seconds']:7.1f} s  {verdict}")
    return 0 if all(part["exit_code"] == 0 for part in summary["parts"].values()) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="the short form of the benchmark")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="what pytest runs")
    parser.add_argument("--tune", action="store_true", help="also time the tiles and write the table")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="of each part")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("No GPU here (torch.cuda.is_available() is False): nothing was run.", file=sys.stderr)
        return 2
    return run_suite(options, torch.device("cuda"))


if __name__ == "__main__":
    sys.exit(main())
