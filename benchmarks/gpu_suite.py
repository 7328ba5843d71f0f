"""What a session with a GPU runs first, in nine minutes: are the kernels right, and how fast is everything?

    python benchmarks/gpu_suite.py                        # into benchmarks/results/DEVICE-DATE
    python benchmarks/gpu_suite.py --output-dir DIR --quick
    python benchmarks/gpu_suite.py --minutes 30 --tune    # also benchmarks/tune.py, which writes a new tuning table
    python benchmarks/gpu_suite.py --only tests --tests tests/kernels/test_attention.py

Parts: the tests of the Triton kernels, of dropout and of models and steps on them (all of them and not only those
marked `gpu`: where there is a GPU the same bodies run on it, kernels compiled and not interpreted), then attention.py,
losses.py, ops.py, and train_step.py of random models of the shapes of LLaMA-1.3B and Mistral-7B in bf16.

A part that fails, or takes longer than its share of ``--minutes`` (what earlier parts leave is shared by those to
come), does not stop the next one. The folder gets seven files at most: results.json (machine, versions, and each part's
command, exit status, seconds and JSON; written after each part, read by compare.py and roofline.py), results.md,
log.txt and the plots. Exit status: 0, 1 where a part failed, 2 without a GPU.

Runs from a checkout that was never installed. Needs torch, triton and pytest; what else is missing is said:
pytest-benchmark for ops.py, transformers and peft as train_step.py's peer, matplotlib for the plots. No `datasets`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from compare import medians_of_ops
from timing import describe_run, device_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
NEEDED = ("triton", "pytest", "pytest_benchmark", "transformers", "peft", "matplotlib", "hypothesis")
SHARES = {"tests": 3.0, "train_step_mistral-7b": 2.0}  # of the time; 1 for every other part
LOG_BYTES = 1 << 20  # the end of each part's output that is kept
TESTS = (
    "tests/kernels/test_attention_triton.py",
    "tests/kernels/test_attention_triton_edges.py",
    "tests/kernels/test_attention_ops.py",
    "tests/kernels/test_dropout.py",
    "tests/kernels/test_linear_cross_entropy_triton.py",
    "tests/kernels/test_linear_cross_entropy_ops.py",
    "tests/kernels/test_info_nce_triton.py",
    "tests/kernels/test_info_nce_op.py",
    "tests/kernels/test_segment_pool_triton.py",
    "tests/kernels/test_rms_norm_triton.py",
    "tests/kernels/test_rotary_triton.py",
    "tests/kernels/test_swiglu_triton.py",
    "tests/kernels/test_lora_triton.py",
    "tests/kernels/test_lora_op.py",
    "tests/models/test_triton_backend.py",
    "tests/engine/test_triton_step.py",
)


def pytest_command() -> str:
    """The command beside this Python, or the one on the path.

    Never `python -m pytest`, which would put the repository's folders before other packages.
    """
    beside = Path(sys.executable).parent / "pytest"
    return str(beside) if beside.exists() else shutil.which("pytest") or "pytest"


def parts(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The commands, by name, in their order; those that write results do so into ``folder/NAME``."""
    quick = options.quick

    def script(name: str, part: str, *arguments: str) -> list[str]:
        path = Path(__file__).resolve().parent / f"{name}.py"
        return [sys.executable, str(path), *arguments, "--output", str(folder / part)]

    steps = ("--steps", "2", "--warmup", "1", "--loss-steps", "4") if quick else ("--steps", "4", "--warmup", "2")
    timed = f"--benchmark-json={folder / 'ops' / 'ops.json'}"
    commands = {
        "tests": [pytest_command(), "-q", *options.tests],
        "attention": script("attention", "attention", *(("--quick",) if quick else ())),
        "losses": script("losses", "losses", *(("--size", "small") if quick else ())),
        "ops": [pytest_command(), "-q", "benchmarks/ops.py", "--benchmark-max-time=0.2", timed],
        **{
            f"train_step_{shape}": script("train_step", f"train_step_{shape}", "--shape", shape, *steps)
            for shape in ("llama-1.3b", "mistral-7b")
        },
    }
    if options.tune:
        commands["tune"] = [sys.executable, str(Path(__file__).resolve().parent / "tune.py"), "--timed"]
    return {name: command for name, command in commands.items() if not options.only or name in options.only}


@contextlib.contextmanager
def importable() -> Iterator[dict[str, str]]:
    """The environment in which `import bivec` finds this checkout, installed or not."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if importlib.util.find_spec("bivec") is None:
            (Path(folder) / "bivec").symlink_to(ROOT, target_is_directory=True)
            paths = [folder, *filter(None, [environment.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        # kernels are to be compiled, not interpreted; and what a killed part printed must have left its buffer
        environment.pop("TRITON_INTERPRET", None)
        yield environment | {"PYTHONUNBUFFERED": "1"}


def run_part(command: Sequence[str], log: Path, timeout: float, environment: dict[str, str]) -> dict[str, Any]:
    """Runs it in the repository's root, its output on the screen and in ``log``."""
    start = time.perf_counter()
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        log.write_text(f"{error}\n", encoding="utf-8")
        return {"exit_code": None, "error": str(error), "seconds": 0.0}
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
    error = f"stopped after {timeout:.0f} s" if late.is_set() else None
    return {"exit_code": code, "error": error, "seconds": seconds}


def share(name: str, waiting: Sequence[str], left: float) -> float:
    """Seconds for a part, of those that are left for it and the ``waiting`` ones."""
    total = sum(SHARES.get(part, 1.0) for part in (name, *waiting))
    return max(1.0, left * SHARES.get(name, 1.0) / total)


def collect(name: str, folder: Path, output: Path, part: dict[str, Any]) -> None:
    """Takes a part's JSON into its entry, its plot into ``output`` and its output into the log."""
    for path in sorted(folder.glob(f"{name}/*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # of a part that was stopped while it wrote
            part["error"] = part["error"] or f"{path.name}: {error}"
            continue
        if name == "ops":  # of its many figures those that are compared
            content = {"ops": medians_of_ops(content)}
        part["result"] = content
    for path in folder.glob(f"{name}/*.png"):
        shutil.copyfile(path, output / f"{name}.png")
    told = (folder / f"{name}.log").read_bytes()[-LOG_BYTES:]
    with (output / "log.txt").open("ab") as log:
        log.write(f"== {name}\n".encode() + told + b"\n")


def summary(content: dict[str, Any]) -> str:
    """The parts as a Markdown table, and a line for each test that failed."""
    lines = [f"# {content['device']}, {content['date']}", "", f"torch {content['versions']['torch']}, triton "]
    lines[-1] += f"{content['versions']['triton']}; not installed: {', '.join(content['not_installed']) or 'nothing'}"
    lines += ["", "| part | seconds | |", "|---|---|---|"]
    for name, part in content["parts"].items():
        failed = part["error"] or f"exit code {part['exit_code']}"
        lines.append(f"| {name} | {part['seconds']:.0f} | {'ok' if part['exit_code'] == 0 else 'FAILED: ' + failed} |")
    for name, part in content["parts"].items():
        for stage, found in part.get("result", {}).get("stages", {}).items():
            rates = ", ".join(f"{side} {result['tokens_per_s']:,.0f}" for side, result in found["sides"].items())
            lines.append(f"\n{name}, {stage}: tokens/s {rates}")
    return "\n".join(lines) + "\n"


def run_suite(options: argparse.Namespace, device: torch.device) -> int:
    """All parts and the summary; the exit status."""
    output = options.output_dir
    output.mkdir(parents=True, exist_ok=True)
    (output / "log.txt").unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    content = {**describe_run(device), "not_installed": absent, "parts": {}}
    print(f"{content['device']}, driver {content['driver']}, {content['versions']}")
    print(f"not installed: {', '.join(absent) or 'nothing that is needed'}", flush=True)
    with tempfile.TemporaryDirectory() as folder, importable() as environment:
        commands = parts(options, Path(folder))
        for index, (name, command) in enumerate(commands.items()):
            (Path(folder) / name).mkdir()
            seconds = share(name, list(commands)[index + 1 :], deadline - time.monotonic())
            print(f"\n== {name}, at most {seconds:.0f} s: {' '.join(command)}", flush=True)
            part = run_part(command, Path(folder) / f"{name}.log", seconds, environment)
            collect(name, Path(folder), output, part)
            content["parts"][name] = {"command": command_of(command)} | part
            (output / "results.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
            (output / "results.md").write_text(summary(content), encoding="utf-8")
    print(f"\n{summary(content)}\nwrote {output}")
    return 0 if all(part["exit_code"] == 0 for part in content["parts"].values()) else 1


def command_of(words: Sequence[str]) -> str:
    """Without paths of this machine."""
    shown = (re.sub(r"\S*/(\S+\.(?:py|json))", r"\1", str(word)) for word in words[1:])
    return " ".join([Path(words[0]).name, *shown])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="default: benchmarks/results/DEVICE-DATE")
    parser.add_argument("--quick", action="store_true", help="the short forms of the benchmarks")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only these parts")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="what pytest runs")
    parser.add_argument("--tune", action="store_true", help="also time the tiles and write the table")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("No GPU here (torch.cuda.is_available() is False): nothing was run.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    if options.output_dir is None:
        name = re.sub("[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
        options.output_dir = RESULTS / f"{name}-{datetime.now(timezone.utc).date().isoformat()}"
    return run_suite(options, device)


if __name__ == "__main__":
    sys.exit(main())
