"""Compiles our Triton kernels for GPUs that are not there, and says from the binaries what they cost.

    python -m bivec.kernels.aot --arch sm_90 --family attention_long   # the table
    python -m bivec.kernels.aot --check                                # exits 1 on a spill, a matmul without tensor
                                                                       # cores, a kernel that would not launch
    python -m bivec.kernels.aot --cases my_module:my_cases             # other people's kernels

A case calls a public launcher with tensors on the "meta" device inside :func:`bivec.kernels.launch.recording`; the
launches that it makes are specialised and compiled by the code that Triton's JIT runs before a real launch, so what is
judged here is what a GPU would be given. Meta tensors start at address 0, hence count as aligned to 16 bytes, as
torch's allocations are. Reports are cached by a hash of everything the compiler reads; binaries are not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from bivec.kernels.aot_binary import (
    Compiled,
    Instructions,
    Job,
    Report,
    backend_for,
    compile_jobs,
    compile_launch,
    quiet_compiler,
    specialise,
)
from bivec.kernels.launch import Launch, interpreting, recording
from bivec.kernels.tuning import ARCHITECTURES

__all__ = ["Case", "Compiled", "Failure", "Report", "Row", "compile_launch", "main", "report", "reports", "rows"]

# What a block can have; of sm_80's 163 KB its rows use the 99 KB that sm_86, sm_89 and sm_120 have too.
SHARED_LIMITS = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # a block's
TENSOR_MEMORY_LIMIT = 512  # columns of sm_100
SLOWEST = "sm_100"  # to compile for, by a factor of two: begun last, it would leave the other processes idle
CHUNK = 16  # launches a worker takes at once: they share one start of nvdisasm


@dataclass(frozen=True)
class Case:
    """One way to call a public launcher."""

    family: str  # "attention_long"
    label: str  # "bf16 d128 g4 dropout"
    call: Callable[[], None]  # calls the launcher with meta tensors
    matmul: frozenset[str]  # names of the kernels that must use tensor cores in this case; none where it is fp32
    architectures: tuple[str, ...] = ARCHITECTURES  # those that have it


@dataclass(frozen=True)
class Failure:
    """A kernel that did not compile."""

    kernel: str
    architecture: str
    error: str  # its first lines


def reports(launches: Sequence[tuple[Launch, str]], jobs: int | None = None) -> list[Report | Failure]:
    """The reports of many launches: equal ones compiled once, known ones read from the cache, the rest in processes.

    Args:
        launches: pairs of a launch and the architecture it is for.
        jobs: the number of processes; None takes one for each CPU.

    Returns:
        One report or failure for each pair, in their order.

    Raises:
        ValueError: an architecture is none of ours.
        RuntimeError: Triton's interpreter is on.
    """
    outcomes, _ = _reports(launches, jobs or os.cpu_count() or 1)
    return outcomes


def report(case: Case, architecture: str) -> list[Report]:
    """The reports of the kernels that ``case`` launches on ``architecture``, in launch order.

    Raises:
        RuntimeError: a kernel does not compile, or Triton's interpreter is on.
    """
    found: list[Report] = []
    for outcome in reports([(launch, architecture) for launch in _launches(case, architecture)]):
        if isinstance(outcome, Failure):
            message = f"{outcome.kernel} does not compile for {architecture}: {outcome.error}"
            raise RuntimeError(message)  # noqa: TRY004 - a kernel is at fault, no argument
        found.append(outcome)
    return found


def _launches(case: Case, architecture: str) -> list[Launch]:
    with recording(architecture) as launches:
        case.call()
    return launches


# --- cache and processes --------------------------------------------------------------------------------------


def _cache_path(key: str) -> Path:
    folder = os.environ.get("BIVEC_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "bivec" / "aot") / f"{key}.json"


def _read_cache(key: str) -> Report | None:
    """The cached report; None where there is none or it cannot be read."""
    try:
        entry = json.loads(_cache_path(key).read_text(encoding="utf-8"))
        return Report(**entry | {"instructions": Instructions(**entry["instructions"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_cache(key: str, entry: Report) -> None:
    path = _cache_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(entry)), encoding="utf-8")
    temporary.replace(path)


def _reports(launches: Sequence[tuple[Launch, str]], processes: int) -> tuple[list[Report | Failure], dict[str, int]]:
    """The outcomes, and how many kernels were compiled and how many came from the cache."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        specialised = [_try_job(launch, architecture) for launch, architecture in launches]
    jobs = {job.key: job for job in specialised if isinstance(job, Job)}
    known: dict[str, Report | Failure] = {key: entry for key in jobs if (entry := _read_cache(key)) is not None}
    pending = [job for key, job in jobs.items() if key not in known]
    counts = {"compiled": len(pending), "cached": len(known)}
    known |= _compile_in_processes(pending, processes)
    return [known[job.key] if isinstance(job, Job) else job for job in specialised], counts


def _try_job(launch: Launch, architecture: str) -> Job | Failure:
    backend_for(architecture)  # raises on what is the caller's mistake, not a kernel's
    try:
        return specialise(launch, architecture)
    except Exception as error:  # noqa: BLE001 - an argument that Triton cannot specialise, for instance
        return Failure(launch.kernel.__name__, architecture, _first_lines(error))


def _compile_in_processes(jobs: list[Job], processes: int) -> dict[str, Report | Failure]:
    """Compiles ``jobs`` and caches their reports; by key.

    The compiler can abort its process. Then the chunks that were under way are done again, each job in a process of
    its own, to find out whose fault it was.
    """
    size = max(1, min(CHUNK, len(jobs) // (4 * processes)))
    chunks = []
    for architecture in sorted({job.architecture for job in jobs}, key=lambda name: (name != SLOWEST, name)):
        same = [job for job in jobs if job.architecture == architecture]
        chunks += [same[start : start + size] for start in range(0, len(same), size)]
    outcomes = _run_pool(chunks, processes)
    for job in jobs:
        if job.key not in outcomes:
            crash = Failure(job.launch.kernel.__name__, job.architecture, "the compiler crashed; its output is above")
            outcomes |= {job.key: crash} | _run_pool([[job]], 1)
    return outcomes


def _run_pool(chunks: list[list[Job]], processes: int) -> dict[str, Report | Failure]:
    """By key, the outcomes of the chunks that came back."""
    outcomes: dict[str, Report | Failure] = {}
    if not chunks:
        return outcomes
    # forked, so that kernels and cases, which cannot be pickled, need not be
    forking = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(min(processes, len(chunks)), forking, _start_worker, (chunks, folder)) as pool,
        contextlib.suppress(BrokenProcessPool),
    ):
        try:
            futures = [pool.submit(_compile_chunk, index) for index in range(len(chunks))]
            for chunk, future in zip(chunks, futures, strict=True):
                with contextlib.suppress(BrokenProcessPool):
                    outcomes |= {job.key: outcome for job, outcome in zip(chunk, future.result(), strict=True)}
        finally:
            pool.shutdown(cancel_futures=True)  # after an interrupt, do not work through what is left
    return outcomes


_worker_chunks: list[list[Job]] = []  # in a worker: what there is to do
_worker_folder = ""


def _start_worker(chunks: list[list[Job]], folder: str) -> None:
    global _worker_folder  # noqa: PLW0603 - a worker is a process, which this starts
    gc.disable()  # looking for cycles takes a tenth of the time, and finds none that a chunk's end would not
    _worker_chunks[:] = chunks
    _worker_folder = folder
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker would wait for work forever if the command was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _compile_chunk(index: int) -> list[Report | Failure]:
    chunk = _worker_chunks[index]
    with quiet_compiler(_worker_folder):
        outcomes = compile_jobs(chunk)
    results: list[Report | Failure] = []
    for job, outcome in zip(chunk, outcomes, strict=True):
        if isinstance(outcome, Exception):
            results.append(Failure(job.launch.kernel.__name__, job.architecture, _first_lines(outcome)))
        else:
            _write_cache(job.key, outcome.report)
            results.append(outcome.report)
    gc.collect()
    return results


def _first_lines(error: BaseException, count: int = 3) -> str:
    """The cause that started it, then where: Triton wraps an error once for each function it was called from."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = f"{type(cause).__name__}: {getattr(cause, 'error_message', None) or cause}"
    lines = [line for line in text.splitlines() if line.strip()][:count]
    trace = str(error).splitlines()  # "at 2:6:", the kernel's source down to the line, and a caret below it
    lines += [line for line, below in pairwise(trace) if below.strip() == "^"]
    return " | ".join(line.strip() for line in lines)


# --- the table and the check ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A kernel in a case."""

    family: str
    label: str
    outcome: Report | Failure
    problems: tuple[str, ...]  # why the check fails


def rows(cases: Sequence[Case], architectures: Sequence[str], jobs: int) -> tuple[list[Row], dict[str, int]]:
    """Every kernel of every case on every architecture, judged; and how many were compiled and cached.

    Args:
        cases: what to call.
        architectures: those of ``bivec.kernels.tuning.ARCHITECTURES`` to compile for.
        jobs: the number of processes.
    """
    broken: list[Row] = []
    launches: list[tuple[Case, Launch, str]] = []
    for case in cases:
        for architecture in filter(case.architectures.__contains__, architectures):
            try:
                made = _launches(case, architecture)
                missing = case.matmul - {launch.kernel.__name__ for launch in made}
                error = f"does not launch {', '.join(sorted(missing)) or 'any kernel'}" if missing or not made else ""
            except Exception as failure:  # noqa: BLE001 - of any kind: the next cases are still to be checked
                made, error = [], _first_lines(failure)
            if error:
                broken.append(Row(case.family, case.label, Failure("(the call)", architecture, error), (error,)))
            launches += [(case, launch, architecture) for launch in made]
    outcomes, counts = _reports([(launch, architecture) for _, launch, architecture in launches], jobs)
    judged = [
        Row(case.family, case.label, outcome, _problems(outcome, case))
        for (case, _, _), outcome in zip(launches, outcomes, strict=True)
    ]
    return broken + judged, counts


def _problems(outcome: Report | Failure, case: Case) -> tuple[str, ...]:
    if isinstance(outcome, Failure):
        return (f"does not compile: {outcome.error}",)
    problems = []
    if outcome.spills:
        instructions = outcome.instructions
        moves = f"{instructions.local_loads} loads and {instructions.local_stores} stores of local memory"
        problems.append(f"spills {outcome.spills} bytes ({outcome.registers} registers, {moves})")
    if outcome.kernel in case.matmul and not outcome.instructions.tensor_core:
        problems.append("is a matmul without tensor-core instructions")
    limit = SHARED_LIMITS[outcome.architecture]
    if outcome.shared > limit:
        problems.append(f"needs {outcome.shared} bytes of shared memory, a block has {limit}")
    if outcome.tensor_memory > TENSOR_MEMORY_LIMIT:
        problems.append(f"needs {outcome.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY_LIMIT}")
    return tuple(problems)


_COLUMNS: tuple[tuple[str, Callable[[Report], object]], ...] = (
    ("arch", lambda r: r.architecture),
    ("kernel", lambda r: r.kernel),
    ("config", lambda r: " ".join(re.sub("BLOCK_|num_", "", name) + f"={value}" for name, value in r.config.items())),
    ("regs", lambda r: r.registers),
    ("spills", lambda r: r.spills),
    ("stack", lambda r: r.stack),
    ("shared", lambda r: r.shared),
    ("tmem", lambda r: r.tensor_memory),
    ("serial", lambda r: "yes" if r.serialized else "-"),
    ("total", lambda r: r.instructions.total),
    ("tensor", lambda r: r.instructions.tensor_core),
    ("mufu", lambda r: r.instructions.mufu),
    ("global", lambda r: f"{r.instructions.global_loads}/{r.instructions.global_stores}"),
    ("shared ld/st", lambda r: f"{r.instructions.shared_loads}/{r.instructions.shared_stores}"),
    ("local", lambda r: f"{r.instructions.local_loads}/{r.instructions.local_stores}"),
    ("atomics", lambda r: r.instructions.atomics),
)


def _table(table_rows: Sequence[Row]) -> str:
    lines = [["family", "case", *(name for name, _ in _COLUMNS)]]
    lines += [
        [row.family, row.label, *(str(value(row.outcome)) for _, value in _COLUMNS)]
        for row in table_rows
        if isinstance(row.outcome, Report)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _load_cases(where: str) -> list[Case]:
    module, _, function = where.partition(":")
    cases: list[Case] = getattr(importlib.import_module(module), function or "cases")()
    return cases


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bivec.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="may be repeated; default: all")
    parser.add_argument("--family", help="only the cases of this family")
    parser.add_argument("--match", default="", metavar="SUBSTRING", help="only the cases with this in their label")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one for each CPU")
    parser.add_argument("--check", action="store_true", help="no table; exit 1 if a kernel fails")
    parser.add_argument(
        "--cases",
        default="bivec.kernels.aot_cases:cases",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns a list of bivec.kernels.aot.Case",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    if interpreting():
        print("TRITON_INTERPRET is on: Triton's interpreter cannot compile; unset it", file=sys.stderr)
        return 2
    start = time.perf_counter()
    chosen = [
        case
        for case in _load_cases(options.cases)
        if options.match in case.label and options.family in (None, case.family)
    ]
    if not chosen:
        wanted = f"family {options.family or 'of any kind'} and {options.match!r} in its label"
        print(f"no case of {options.cases} has {wanted}", file=sys.stderr)
        return 2
    found, counts = rows(chosen, options.arch or ARCHITECTURES, options.jobs)
    seconds = time.perf_counter() - start
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1), encoding="utf-8")
    if not options.check:
        print(_table(found))
    failed = [row for row in found if row.problems]
    for row in failed:
        place = f"{row.outcome.architecture}  {row.family}  {row.label}  {row.outcome.kernel}"
        print(f"FAILED  {place}: {'; '.join(row.problems)}")
    print(
        f"{len(found)} kernels of {len(chosen)} cases: {len(failed)} failed, {counts['compiled']} compiled, "
        f"{counts['cached']} from the cache, {seconds:.0f} s"
    )
    return 1 if options.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
