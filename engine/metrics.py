"""``metrics.jsonl`` and ``evaluations.jsonl``: one JSON line a logged step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

from bivec.engine.errors import RunError
from bivec.engine.records import check_types
from bivec.engine.trainer import StepMetrics
from bivec.models.files import write_text_atomic
from bivec.models.plain_json import parse_json


@dataclass(frozen=True)
class Evaluation:
    """One line of ``evaluations.jsonl``: STS in the middle of a stage."""

    stage: str
    step: int  # optimiser steps done
    sts_dev_spearman: float  # x 100


Record = TypeVar("Record", StepMetrics, Evaluation)


class StepLog(Generic[Record]):
    """Appends records to a file, and cuts them back to a checkpoint when a run is resumed."""

    def __init__(self, path: Path, record: type[Record]):
        self.path = path
        self.record: type[Record] = record

    def append(self, record: Record) -> None:
        """Adds one line.

        Raises:
            RunError: the disk is full, or the file may not be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}); the checkpoints are as they were"
            ) from error

    def read(self) -> list[Record]:
        """All whole lines; a last line that a kill cut short is left out.

        Raises:
            RunError: a line before the last that is not of this format.
        """
        if not self.path.is_file():
            return []
        # not splitlines(), for which U+2028 ends a line too
        lines = self.path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                record = self.record(**parse_json(line))
                check_types(record)
                records.append(record)
            except (ValueError, TypeError) as error:  # noqa: PERF203 - of one line, which the message names
                if number == len(lines):
                    break
                raise RunError(f"{self.path}, line {number}: not a line of this log ({error}); delete it") from error
        return records

    def truncate(self, stage: str, step: int) -> None:
        """Drops what the stage logged after ``step``: it will be run, and logged, again."""
        if not self.path.is_file():
            return
        kept = [record for record in self.read() if record.stage != stage or record.step <= step]
        write_text_atomic(self.path, "".join(json.dumps(asdict(record)) + "\n" for record in kept))


def losses_by_stage(metrics: list[StepMetrics]) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of every logged step."""
    by_stage: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        by_stage.setdefault(line.stage, []).append((line.step, line.loss))
    return by_stage
