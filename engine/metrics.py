"""``metrics.jsonl``: one line a logged step."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from bivec.engine.errors import RunError
from bivec.engine.trainer import StepMetrics
from bivec.models.files import write_text_atomic


class MetricsLog:
    """Appends step metrics to a file, and cuts them back to a checkpoint when a run is resumed."""

    def __init__(self, path: Path):
        self.path = path

    def clear(self) -> None:
        """Starts an empty file."""
        write_text_atomic(self.path, "")

    def append(self, metrics: StepMetrics) -> None:
        """Adds one line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")

    def read(self) -> list[StepMetrics]:
        """All whole lines; a last line that a kill cut short is left out.

        Raises:
            RunError: a line before the last that is not of this format.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        metrics = []
        for number, line in enumerate(lines, start=1):
            try:
                metrics.append(StepMetrics(**json.loads(line)))
            except (ValueError, TypeError) as error:
                if number == len(lines):
                    break
                raise RunError(
                    f"{self.path}, line {number}: not a line of metrics ({error}); mend or delete it"
                ) from error
        return metrics

    def truncate(self, stage: str, step: int) -> None:
        """Drops what the stage logged after ``step``: it will be run, and logged, again."""
        kept = [m for m in self.read() if m.stage != stage or m.step <= step]
        write_text_atomic(self.path, "".join(json.dumps(asdict(m)) + "\n" for m in kept))

    def losses(self) -> dict[str, list[tuple[int, float]]]:
        """(step, loss) of every logged step, by stage."""
        by_stage: dict[str, list[tuple[int, float]]] = {}
        for metrics in self.read():
            by_stage.setdefault(metrics.stage, []).append((metrics.step, metrics.loss))
        return by_stage
