"""What benchmarks on a GPU share: a meter of time and memory, interleaved repeats, and the machine's description."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

SCRATCH_BYTES = 512 * 2**20  # twice the largest cache of today's GPUs (256 MB on an MI300X)
LEAD_MS = 2.0  # how long the GPU is kept busy before the timed work
PACKAGES = ("bivec", "torch", "triton", "transformers", "numpy")


@dataclass(frozen=True)
class Sample:
    """One repeat."""

    ms: float  # on the GPU
    host_ms: float  # until the call had returned: what Python and the launches cost


@dataclass(frozen=True)
class Timing:
    """All repeats."""

    ms: float  # median
    ms_min: float
    ms_max: float
    host_ms: float  # median
    repeats: int


class Meter(Protocol):
    """Measures a call; tests have one for the CPU."""

    def time(self, run: Callable[[], object]) -> Sample:
        """Runs it once on the clock."""

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Runs it once; the peak above what was there before."""


class GpuMeter:
    """Time by events on the current stream, cold caches, the host ahead of the GPU.

    Before the timed work the GPU overwrites a buffer larger than its caches, for long enough that the host has queued
    the work before it begins: so the time is the kernels', as inside a training step, where the GPU is busy with
    linear layers meanwhile. A host time near ``LEAD_MS`` says that this failed and the GPU waited for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scratch = torch.empty(SCRATCH_BYTES, dtype=torch.int8, device=device)
        self.fills = 1
        fill_ms = median(self.time(self.scratch.zero_).ms for _ in range(5))
        self.fills = math.ceil(LEAD_MS / max(fill_ms, 0.01))

    def time(self, run: Callable[[], object]) -> Sample:
        """Runs it once."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        for _ in range(self.fills):
            self.scratch.zero_()
        begin.record()
        start = time.perf_counter()
        run()
        host_ms = (time.perf_counter() - start) * 1e3
        end.record()
        torch.cuda.synchronize(self.device)
        return Sample(begin.elapsed_time(end), host_ms)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Runs it once; the most memory that it took above what was taken before."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def interleaved(
    meter: Meter, runs: Mapping[str, Callable[[], object]], budget_ms: float, max_repeats: int
) -> dict[str, Timing]:
    """Times the calls in turns, so that a clock that drifts drifts for all of them.

    Args:
        meter: what times one repeat.
        runs: the calls by name, each run before (compiled, allocated).
        budget_ms: GPU time for each call; a slow one gets fewer repeats, but at least 3.
        max_repeats: the most repeats of a fast one.

    Returns:
        The timings, by name.
    """
    repeats, samples = {}, {name: [] for name in runs}
    for name, run in runs.items():
        repeats[name] = max(3, min(max_repeats, int(budget_ms / max(meter.time(run).ms, 1e-3))))
    for turn in range(max(repeats.values(), default=0)):
        for name, run in runs.items():
            if turn < repeats[name]:
                samples[name].append(meter.time(run))
    return {name: _timing(taken) for name, taken in samples.items()}


def _timing(samples: list[Sample]) -> Timing:
    times = [sample.ms for sample in samples]
    return Timing(
        ms=median(times),
        ms_min=min(times),
        ms_max=max(times),
        host_ms=median(sample.host_ms for sample in samples),
        repeats=len(times),
    )


def describe_run(device: torch.device) -> dict[str, Any]:
    """Machine, driver, versions, date and command, for the JSON of a run."""
    versions = {"python": platform.python_version(), **{package: installed(package) for package in PACKAGES}}
    # the distribution "torch" of a CUDA build may not say so; torch itself does
    versions |= {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    return {
        "device": device_name(device),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "driver": driver_version(),
        "host": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": described_command(sys.argv),
    }


def installed(package: str) -> str:
    """Its version, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def described_command(argv: Sequence[str]) -> str:
    """The command from the repository's root, without ``--output DIR``: no path of this machine, no other figures."""
    script = Path(argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    words = ["python", str(script.relative_to(root)) if script.is_relative_to(root) else script.name]
    arguments = iter(argv[1:])
    for word in arguments:
        if word == "--output":
            next(arguments, None)
        elif not word.startswith("--output="):
            words.append(word)
    return " ".join(words)


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H100 80GB HBM3"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def driver_version() -> str | None:
    """NVIDIA's, where ``nvidia-smi`` tells it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split("\n")[0].strip() or None
