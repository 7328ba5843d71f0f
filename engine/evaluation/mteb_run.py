"""Runs MTEB tasks one by one, as mteb does, and keeps what is done; one that fails does not stop the others.

mteb's own results lie in ``results/NAME/REVISION/TASK.json`` of the output directory, where a later call of the same
model finds them.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bivec.engine.errors import RunError
from bivec.engine.evaluation.mteb_encoder import MTEBEncoder
from bivec.engine.evaluation.paper import paper_tasks

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.types import EncodeKwargs

BENCHMARK = "MTEB(eng, v1)"  # mteb's name for the 56 tasks of the paper, with their splits and languages
HUB_PACKAGES = ("huggingface_hub", "datasets", "requests", "httpx", "urllib3")
GROUPS = ("local", "subset15", "full56")


@dataclass
class Outcome:
    """What became of the tasks so far, by name."""

    scores: dict[str, float] = field(default_factory=dict)  # main scores x 100
    failed: dict[str, str] = field(default_factory=dict)  # why there is none
    instructions: dict[str, str] = field(default_factory=dict)


def named_tasks(names: Sequence[str], local: Sequence[AbsTask]) -> list[AbsTask]:
    """The tasks of these names, each once.

    Args:
        names: of mteb's tasks, of local ones, or of GROUPS: all local ones, and the paper's.
        local: those that ship, from ``local_tasks``.

    Raises:
        RunError: mteb has no task of a name.
    """
    import mteb

    ours = {task.metadata.name: task for task in local}
    members = {
        "local": list(ours),
        "subset15": [task.name for task in paper_tasks(subset_only=True)],
        "full56": [task.name for task in paper_tasks()],
    }
    english = {task.metadata.name: task for task in mteb.get_benchmark(BENCHMARK).tasks}
    found = {}
    for name in (member for given in names for member in members.get(given, [given])):
        try:
            found[name] = ours.get(name) or english.get(name) or mteb.get_task(name)
        except KeyError as error:  # noqa: PERF203 - the error is of one name
            raise RunError(f"{error.args[0]} (benchmarks/mteb_eval.py --list prints those of the paper)") from None
    return list(found.values())


def run_tasks(
    model: MTEBEncoder,
    tasks: Sequence[AbsTask],
    directory: str | Path,
    *,
    after: Callable[[Outcome], object] = lambda _: None,
) -> Outcome:
    """Runs the tasks that have no result yet, and prints a line for each.

    Args:
        model: from ``Encoder.as_mteb``.
        tasks: from :func:`named_tasks`.
        directory: where mteb's results are kept.
        after: called after every task.
    """
    import mteb
    from mteb.cache import ResultCache

    logging.getLogger("mteb").setLevel(logging.ERROR)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _drop_broken_results(directory / "results")
    cache, outcome = ResultCache(directory), Outcome()
    # mypy does not see that mteb lets every key be missing
    options: EncodeKwargs = {"show_progress_bar": sys.stderr.isatty()}  # type: ignore[typeddict-item]
    for task in tasks:
        name, start = task.metadata.name, time.monotonic()
        outcome.instructions[name] = model.instruction_for(task.metadata)
        try:
            result = mteb.evaluate(
                model,
                task,
                cache=cache,
                co2_tracker=False,
                show_progress_bar=False,
                encode_kwargs=options,
            )
            if result.exceptions:
                raise RunError(str(result.exceptions[0].exception))  # noqa: TRY301 - what any failure becomes is below
            outcome.scores[name] = 100 * float(result.task_results[0].get_score())
            print(f"{name}: {outcome.scores[name]:.2f} ({time.monotonic() - start:.0f} s)", flush=True)
        except Exception as error:  # noqa: BLE001 - a task of mteb's may fail in any way; the others go on
            if _needs_hub(error):
                _take_cache_only()
                outcome.failed[name] = "needs the hub: its data is not in the local cache and could not be fetched"
            else:
                outcome.failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {outcome.failed[name]}", flush=True)
        after(outcome)
    return outcome


def _drop_broken_results(folder: Path) -> None:
    """A killed mteb can leave half a file, which it could not read again."""
    for file in folder.rglob("*.json"):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # noqa: PERF203 - of one file
            print(f"{file}: not whole, its task runs again", flush=True)
            file.unlink()


def _needs_hub(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that data could not be fetched."""
    while error is not None:
        if isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in HUB_PACKAGES:
            return True
        error = error.__cause__ or error.__context__
    return False


def _take_cache_only() -> None:
    """After one failure the others find their data in the local cache or fail at once: a try takes 23 s."""
    import datasets
    import huggingface_hub

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
