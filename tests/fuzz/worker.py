"""Reads mutants of small valid files with bivec's readers, each reader in a process of its own, and reports on them.

    python worker.py LLAMA_DIR WORK_DIR REPORT.json '{"seed": 0, "counts": {"csv": 100, …}}'

LLAMA_DIR is a tiny causal language model, WORK_DIR a folder that may be filled. A mutant is known by (seed, reader,
number): the same three, the same bytes. What may come of it is one of ours: an error of ``BivecError``, or a value that
the reader's oracle finds right (see readers.py). All else is a finding:

* ``crash``: another exception, or the end of the process; ``hang``: more than 5 s of CPU time; ``memory``: an
  allocation beyond 4 GiB more than the process had, or a peak 1 GiB above that of the valid file;
* ``write``: a file opened for writing, made, renamed or removed outside of the mutant's own folder;
* ``wrong``: a value that the file does not say; ``text``: an error that names no file;
* ``broken``: the fuzzer itself failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from random import Random

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "critical", "DATASETS_VERBOSITY": "critical", "RUST_BACKTRACE": "0"}

CPU_SECONDS = 5.0
WALL_SECONDS = 120.0  # for what waits and uses no CPU; the machine may be busy with other things
ALLOWED_BYTES = 4 << 30  # beyond what the process has when it begins
PEAK_BYTES = 1 << 30  # of one mutant; the files have 1 MB at most
WRITING = {"os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}  # path first, its folder's number last


class Guard:
    """Notes what is written outside of a folder: a hook on Python's audit events."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None  # None: anything goes
        self.outside: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple) -> None:
        if self.allowed is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            )
            places = [(path, -1)] if writes else []
        elif event == "os.rename":
            places = list(zip(arguments[:2], arguments[2:], strict=True))
        else:
            places = [(arguments[0], arguments[-1])] if event in WRITING else []
        for named, folder in places:
            if isinstance(named, (str, bytes)):
                path = os.fsdecode(named)
                if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
                    path = f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"
                full = os.path.realpath(path)
                if not full.startswith((*self.allowed, "/dev/")):
                    self.outside.append(f"{event} {full}")


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> None:
    with contextlib.suppress(OSError):  # a container may forbid it; then the limit alone counts
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def copy_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)


def make_mutant(reader, seed: int, number: int, source: Path, target: Path) -> str | None:
    """The valid files with one of them mutated; its name, None if the mutant is the file as it was."""
    rng = Random(f"{seed}/{reader.name}/{number}")
    names = list(reader.files)
    name = rng.choices(names, [reader.weights.get(name, 1.0) for name in names])[0]
    copy_tree(source, target)
    file, before = target / name, (source / name).read_bytes()
    if rng.random() < 0.01:  # not the file's bytes, but what stands in its place
        file.unlink()
        kind = rng.randrange(3)
        if kind == 1:
            file.mkdir()
        elif kind == 2:
            file.symlink_to(file.name)  # to itself
        return name
    after = reader.files[name](rng, before)
    file.write_bytes(after)
    return None if after == before else name


def is_ours(error: BaseException) -> bool:
    from bivec.models.errors import BivecError

    return isinstance(error, BivecError)


def read_one(reader, seed: int, number: int, source: Path, home: Path, valid, guard: Guard) -> dict:
    """What comes of one mutant."""
    from harness import MUTATED

    case = home / f"{number}"
    found = {"number": number}
    try:
        name = make_mutant(reader, seed, number, source, case / "files")
    except Exception:  # of the fuzzer's own
        return found | {"outcome": "broken", "detail": traceback.format_exc()[-1500:]}
    if name is None:
        shutil.rmtree(case)
        return found | {"outcome": "same"}
    found["file"] = name
    MUTATED[:] = [file.read_bytes() if (file := case / "files" / name).is_file() else None]
    reset_peak()
    before = memory("VmRSS")
    guard.allowed, guard.outside = (os.path.realpath(case), os.environ["HF_HOME"]), []
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        value = reader.read(case / "files")
        complaint = reader.check(source, case / "files", name, valid, value)
        found["outcome"] = "accepted"
        if complaint:
            found |= {"outcome": "wrong", "detail": complaint[:500]}
    except MemoryError:
        found |= {"outcome": "memory", "detail": traceback.format_exc()[-1500:]}
    except BaseException as error:
        found |= {"outcome": "refused", "detail": str(error)[:300]}
        if not is_ours(error):
            kind = "memory" if "allocate" in str(error) else "crash"
            found |= {"outcome": kind, "detail": traceback.format_exc()[-1500:]}
        elif reader.names_file and str(case) not in str(error):
            found |= {"outcome": "text"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        guard.allowed = None
    if guard.outside:
        found |= {"outcome": "write", "detail": "; ".join(guard.outside)[:500]}
    if (grown := memory("VmHWM") - before) > PEAK_BYTES:
        found |= {"outcome": "memory", "detail": f"the peak is {grown / 2**30:.1f} GiB above"}
    shutil.rmtree(case)
    return found


def serve(reader, seed: int, numbers: range, source: Path, home: Path, log: int) -> None:
    """The child: a line of JSON for every mutant, its number before and what came of it behind."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open to the end
    guard = Guard()
    copy_tree(source, home / "valid")
    valid = reader.read(home / "valid")
    shutil.rmtree(home / "valid")
    limit = memory("VmSize") + ALLOWED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        os.write(log, json.dumps({"begins": number}).encode() + b"\n")
        found = read_one(reader, seed, number, source, home, valid, guard)
        os.write(log, json.dumps(found).encode() + b"\n")


def forked(reader, seed: int, numbers: range, source: Path, home: Path) -> list[dict]:
    """The results of ``serve`` in a child, up to the mutant that ends it."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read_end)
            serve(reader, seed, numbers, source, home, write_end)
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(write_end)
    results, begun, buffer = [], None, b""
    os.set_blocking(read_end, False)
    last = time.monotonic()
    while True:
        try:
            data = os.read(read_end, 1 << 16)
        except BlockingIOError:
            if time.monotonic() - last > WALL_SECONDS:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
            continue
        if not data:
            break
        last = time.monotonic()
        *lines, buffer = (buffer + data).split(b"\n")
        for line in map(json.loads, lines):
            if "begins" in line:
                begun = line["begins"]
            else:
                results.append(line)
                begun = None
    os.close(read_end)
    status = os.waitpid(child, 0)[1]
    if begun is not None:
        ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        kind = "hang" if ended in ("SIGPROF", "SIGKILL") else "crash"
        results.append({"number": begun, "outcome": kind, "detail": f"the process ended by {ended}"})
    elif status:
        raise RuntimeError(f"{reader.name}: the valid files cannot be read, see stderr")
    return results


def fuzz(reader, seed: int, numbers: range, llama: Path, work: Path) -> list[dict]:
    """Every mutant's result, in order."""
    source, home = work / reader.name / "valid", work / reader.name / "mutants"
    source.mkdir(parents=True)
    reader.build(source, llama)
    results: list[dict] = []
    while len(results) < len(numbers):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        results += forked(reader, seed, numbers[len(results) :], source, home)
    return results


def row(name: str, results: list[dict], seconds: float) -> str:
    """Of the table that is printed."""
    outcomes = [result["outcome"] for result in results]
    refused, accepted, same = (outcomes.count(outcome) for outcome in ("refused", "accepted", "same"))
    findings = len(outcomes) - refused - accepted - same
    return f"| {name} | {len(outcomes)} | {refused} | {accepted} | {same} | {findings} | {seconds:.1f} |"


def main(arguments: list[str]) -> None:
    llama, work, report = map(Path, arguments[:3])
    job = json.loads(arguments[3])
    import torch

    torch.set_num_threads(1)
    from canaries import CANARIES
    from harness import LLAMA
    from readers import READERS

    LLAMA.append(llama)
    os.environ["HF_HOME"] = os.environ["HF_DATASETS_CACHE"] = os.path.realpath(work / "cache")
    import datasets  # noqa: F401 - once for all children; it reads its environment now

    found: dict[str, dict] = {}
    print("| reader | mutants | refused | accepted | as it was | findings | CPU s |\n|---|---|---|---|---|---|---|")
    for name, count in job["counts"].items():
        started, first = time.process_time() + sum(os.times()[2:4]), job.get("first", 0)
        results = fuzz((READERS | CANARIES)[name], job["seed"], range(first, first + count), llama, work)
        seconds = time.process_time() + sum(os.times()[2:4]) - started
        found[name] = {"seconds": round(seconds, 2), "results": results}
        report.write_text(json.dumps(found), encoding="utf-8")
        print(row(name, results, seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
