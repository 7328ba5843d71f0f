"""kill -9 at random moments of a run, again and again: it ends as the run that nobody killed.

A process of a recipe imports for seconds what a tiny model needs for a fraction of one. So this file is a program too,
a fork server: it imports everything once, runs nothing itself, and forks a child for every run, which is a process of
its own and gets a real SIGKILL. The server has executed no operator when it forks, and has one thread: the thread pools
of torch, of OpenBLAS and of the tokenizers do not survive a fork.

A kill has one of three aims: a time after the child's n-th entry into a function of ``PLACES``; such an entry itself,
for functions that are over before a parent can aim at them; or the n-th change of a file (Python's audit events: open
for writing, rename, remove …), so that the gaps of microseconds between two operations on the disk are met too.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "llm2vec_sheared_llama.py"
STAGES = ("mntp", "simcse", "supervised")
STEPS = 5  # of every stage
PLACES = ("begun", "training", "checkpoint", "evaluation", "adapter", "merging", "encoder", "elsewhere")
# the memory that a child shares with its parent, int64 each: changes of files, the place it is in, entries by place
CHANGES, HERE, ENTRIES = 0, 1, 2
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
KILLS_OF_A_RUN = 5  # then it is left to finish


# --- the fork server ---------------------------------------------------------------------------------------------


def serve() -> None:
    """Reads jobs from stdin and answers each with how its child ended; one JSON line each."""
    import datasets  # noqa: F401 - this and the following: not to be imported in every child
    import matplotlib.figure  # noqa: F401 - likewise
    import scipy.stats  # noqa: F401 - likewise
    import torch
    import torch._dynamo  # an optimiser imports it
    import transformers

    from bivec.engine import run_start  # noqa: F401 - likewise

    assert torch.get_num_threads() == 1 and transformers.PreTrainedTokenizerFast  # the attribute imports its module
    for line in sys.stdin:
        job = json.loads(line)
        shared = memoryview(mmap.mmap(-1, 8 * (ENTRIES + len(PLACES)))).cast("q")
        shared[HERE] = PLACES.index("elsewhere")
        child = os.fork()
        if child == 0:
            run_recipe(job, shared)
        print(json.dumps(wait_or_kill(child, job, shared)), flush=True)


def run_recipe(job: dict[str, Any], shared: memoryview) -> None:
    """The child; does not return."""
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    status = 1
    try:
        watch_places(job, shared)
        watch_changes(job, shared)
        sys.argv = [str(SCRIPT), *job["arguments"]]
        runpy.run_path(str(SCRIPT))["main"]()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(status)


def watch_places(job: dict[str, Any], shared: memoryview) -> None:
    """Notes in the shared memory where the child is; where the job says so, it dies at the n-th entry."""
    from bivec.engine import trainer
    from bivec.engine.encoder import Encoder
    from bivec.engine.lora import Adapter
    from bivec.engine.run import Run

    def noting(function: Callable, place: str) -> Callable:
        slot, fatal = PLACES.index(place), place == job.get("place") and job["seconds"] is None

        def noted(*args, **options):
            before, shared[HERE] = shared[HERE], slot
            shared[ENTRIES + slot] += 1
            if fatal and shared[ENTRIES + slot] == job["entry"]:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*args, **options)
            finally:
                shared[HERE] = before

        return noted

    for place, owner, name in (
        ("begun", Run, "_train"),
        ("training", trainer, "_optimizer_step"),
        ("checkpoint", trainer, "save_checkpoint"),
        ("evaluation", Run, "_sts"),
        ("adapter", Adapter, "save"),
        ("merging", Adapter, "merge"),
        ("encoder", Encoder, "save_pretrained"),
    ):
        setattr(owner, name, noting(getattr(owner, name), place))


def watch_changes(job: dict[str, Any], shared: memoryview) -> None:
    """Counts the changes of files in the folder ``within``; where the job says so, the child dies before the n-th."""
    within = job["within"]

    def hook(event: str, args: tuple) -> None:
        if not (event in EVENTS or (event == "open" and args[1] is not None and set(args[1]) & set("wax+"))):
            return
        # rmtree names what it removes relative to an open folder; here these are folders of the run
        relative = event in ("os.remove", "os.rmdir") and args[1] not in (None, -1)
        if relative or str(args[0]).startswith(within):
            shared[CHANGES] += 1
            if shared[CHANGES] == job.get("change"):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def wait_or_kill(child: int, job: dict[str, Any], shared: memoryview) -> dict[str, Any]:
    """Waits for the child's end, or kills it when the time of the job has come."""
    timed = job.get("seconds") is not None
    begun = due = None
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        now = time.monotonic()
        if begun is None and shared[ENTRIES + PLACES.index("begun")]:
            begun = now
        if timed and due is None and shared[ENTRIES + PLACES.index(job["place"])] >= job["entry"]:
            due = now + job["seconds"]
        if due is not None and now >= due:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.0002)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "place": PLACES[shared[HERE]],
        "seconds": 0.0 if begun is None else time.monotonic() - begun,  # of training and what follows
        "changes": shared[CHANGES],
    }


# --- the test ----------------------------------------------------------------------------------------------------


class ForkServer:
    """Runs the recipe in children of a process of its own."""

    def __init__(self, process: subprocess.Popen, folder: Path, flags: list[str]) -> None:
        self.process, self.output, self.flags = process, folder / "output.txt", flags

    def run(self, directory: Path, within: str = "", **kill: object) -> dict[str, Any]:
        """Begins the run, or goes on with it; the answer of ``wait_or_kill``."""
        again = ["--resume"] if (directory / "run.json").exists() else []
        arguments = [*self.flags, "--output-dir", str(directory), *again]
        job = {"arguments": arguments, "output": str(self.output), "within": str(directory / within), **kill}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer["status"] in ((0, -signal.SIGKILL) if kill else (0,)), self.output.read_text()
        return answer


@pytest.fixture
def server(recipe, tmp_path) -> Iterator[ForkServer]:
    """Five steps of every stage; a checkpoint after every step, or every other; evaluations in between."""
    data = {"--model": recipe.model, "--mntp-data": recipe.mntp_data, "--simcse-data": recipe.simcse_data}
    data |= {"--supervised-data": recipe.supervised_data, "--sts-dev": recipe.sts_dev, "--sts-test": recipe.sts_test}
    flags = ["--smoke", "--stages", f"bi,{','.join(STAGES)}", *(word for pair in data.items() for word in pair)]
    for stage, every in zip(STAGES, (1, 2, 1), strict=True):
        for setting in (f"optim.steps={STEPS}", "optim.learning_rate=1e-2", f"save_every={every}", "evaluate_every=2"):
            flags += ["--set", f"{stage}.{setting}"]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, __file__]
    with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **threads}, **pipes) as process:
        yield ForkServer(process, tmp_path, flags)
        process.stdin.close()


def outcome(directory: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on where it was killed: all but the times it took."""
    keys = ("stage", "step", "loss", "lr", "grad_norm", "tokens")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    folders = [*STAGES, "merged", *(f"checkpoints/{stage}-{STEPS:06d}" for stage in STAGES)]
    files = [directory / "run.json", directory / "evaluations.jsonl"]
    files += [path for folder in folders for path in (directory / folder).rglob("*") if path.is_file()]
    names = [str(path.relative_to(directory)) for path in files]
    found = {name: (directory / name).read_bytes() for name in names if "/." not in name}  # hidden: what kills left
    found["metrics"] = [[line[key] for key in keys] for line in lines]
    found["stages"] = json.loads((directory / "results.json").read_text())["stages"]
    return found


def assert_nothing_is_half_written(directory: Path) -> None:
    """Whatever has its final name is whole."""
    pairs = [(folder, "state.safetensors", "state.json") for folder in directory.glob("checkpoints/[!.]*")]
    pairs += [(directory / stage, "adapter_model.safetensors", "adapter_config.json") for stage in STAGES]
    pairs.append((directory / "merged", "model.safetensors", "config.json"))
    for folder, tensors, config in pairs:
        # into merged/ of an earlier end the files are moved one by one; until config.json is back, nobody loads it
        if folder.exists() and (folder.name != "merged" or (folder / config).exists()):
            assert load_file(folder / tensors) and json.loads((folder / config).read_text()), folder
    for file in (directory / "run.json", directory / "results.json"):
        assert not file.exists() or json.loads(file.read_text())


def drawn_kills(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Twenty kills in a random order; ``whole`` is the answer of a run that nobody killed."""
    draw = random.Random(20)
    kills = [{"place": "begun", "entry": 1, "seconds": draw.uniform(0, 0.6 * whole["seconds"])} for _ in range(4)]
    kills += [{"place": "training", "entry": draw.randint(1, 6), "seconds": draw.uniform(0, 0.01)} for _ in range(5)]
    for place, seconds in (("checkpoint", 0.004), ("checkpoint", 0.004), ("evaluation", 0.01), ("encoder", 0.01)):
        first = draw.randint(1, 4) if place != "encoder" else 1
        kills.append({"place": place, "entry": first, "seconds": draw.uniform(0, seconds)})
    kills += [{"place": place, "entry": 1, "seconds": None} for place in ("adapter", "merging")]
    kills += [{"within": "checkpoints", "change": draw.randint(1, 24)} for _ in range(3)]
    kills += [{"change": draw.randint(1, whole["changes"])} for _ in range(2)]
    draw.shuffle(kills)
    return kills


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_twenty_times_and_resumed(server, tmp_path):
    server.run(tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    whole = server.run(tmp_path / "run0")  # the first one was slower, its files and pages were not in memory
    assert outcome(tmp_path / "run0") == expected
    kills, landed, finished, directory = drawn_kills(whole), Counter(), 1, tmp_path / "run1"
    while kills:
        answer = server.run(directory, **kills[0])
        if answer["status"]:
            landed[answer["place"]] += 1
            kills.pop(0)
            assert_nothing_is_half_written(directory)
            if landed.total() % KILLS_OF_A_RUN:
                continue
            server.run(directory)
        # nothing is left under a temporary name, but for what a kill before there was a run.json has left
        assert {path.name.split(".")[1] for path in directory.rglob(".*.tmp*")} <= {"run"}
        assert outcome(directory) == expected  # where the kill came too late it is tried again, in another run
        if not answer["status"] and kills[0].get("seconds"):
            kills[0]["seconds"] /= 2  # the machine was slower when the whole run was timed
        finished += 1
        assert finished < 20, f"the kills come too late: {kills}"
        directory = tmp_path / f"run{finished}"
    print(f"{landed.total()} kills: {dict(landed)}; {finished} runs came to their end")
    assert landed["checkpoint"] >= 4 and landed["training"] >= 2
    assert min(landed[place] for place in ("evaluation", "adapter", "merging", "encoder")) >= 1


if __name__ == "__main__":
    serve()
