"""Runs tests on the mutants of a copy of the repository: what benchmarks/mutation.py starts.

    python mutation_worker.py JOBS RESULTS           # both JSON lines

The first job has no ``source``: its tests run on the file as it is. What they import of others is then imported here,
once; each mutant is written into the copy and a fork runs pytest on it, so that a mutant costs what its tests do. A
fork has a limit of time, which follows from the first job, and of memory.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

MEMORY_BYTES = 16 * 2**30  # of addresses: a mutant that asks for more fails there
POLL_SECONDS = 0.01
FIRST_SECONDS = 600
OURS = ("bivec", "tests", "conftest", "__main__")


class FirstFailure:
    """A plugin of pytest that notes the first test that failed."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Pytest calls this for every phase of every test."""
        if report.failed and not self.file.exists():
            self.file.write_text(report.nodeid, encoding="utf-8")


def run_tests(tests: list[str], timeout: float, note: Path) -> dict[str, Any]:
    """Runs test files in a fork until the first failure.

    Returns:
        ``outcome``: "survived", "killed" or "timeout"; ``by``: the test that failed first, or how it ended;
        ``seconds``.
    """
    note.unlink(missing_ok=True)
    started, pid = time.monotonic(), os.fork()
    if pid == 0:
        _child(tests, note)
    status = None
    while status is None and time.monotonic() - started < timeout:
        done, code = os.waitpid(pid, os.WNOHANG)
        status = code if done else None
        if status is None:
            time.sleep(POLL_SECONDS)
    with contextlib.suppress(ProcessLookupError):  # what the tests have started, too
        os.killpg(pid, signal.SIGKILL)
    seconds = round(time.monotonic() - started, 2)
    if status is None:
        os.waitpid(pid, 0)
        return {"outcome": "timeout", "by": "", "seconds": seconds}
    code = os.waitstatus_to_exitcode(status)
    by = note.read_text(encoding="utf-8") if note.exists() else f"pytest's exit code {code}"
    return {"outcome": "survived" if code == 0 else "killed", "by": "" if code == 0 else by, "seconds": seconds}


def _child(tests: list[str], note: Path) -> None:
    import pytest

    code, here = 70, set(sys.modules)
    try:
        os.setsid()
        quiet = os.open(note.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        code = pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", *tests], plugins=[FirstFailure(note)])
        others = [name for name, module in sys.modules.items() if name not in here and not _ours(name, module)]
        note.with_suffix(".imports").write_text("\n".join(others), encoding="utf-8")
    finally:
        os._exit(int(code))


def _ours(name: str, module: Any) -> bool:
    """Whether a module may be that of a mutant, or hold parts of it."""
    file = Path(getattr(module, "__file__", None) or "/")
    here = file.is_relative_to(Path.cwd()) or file.is_relative_to(os.environ["PYTHONPATH"])
    return here or name.partition(".")[0] in OURS


def main(jobs: Path, results: Path) -> None:
    """One result a job, in their order."""
    os.environ |= {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.dont_write_bytecode = True
    import torch

    torch.set_num_threads(1)
    limit, note = FIRST_SECONDS, results.with_suffix(".note")
    for line in jobs.read_text(encoding="utf-8").splitlines():
        job = json.loads(line)
        path, source = Path(job["file"]), job["source"]
        original = path.read_text(encoding="utf-8")
        if source is not None:
            path.write_text(source, encoding="utf-8")
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
        try:
            result = run_tests(job["tests"], limit, note)
        finally:
            path.write_text(original, encoding="utf-8")
        if source is None:
            _import_others(note)
            limit = 15 + 3 * result["seconds"]
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def _import_others(note: Path) -> None:
    for name in note.with_suffix(".imports").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
