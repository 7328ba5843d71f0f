"""Training curves: STS against step, from the runs' ``evaluations.jsonl`` (the paper's Figure 6, METHOD 8.3).

    python recipes/llm2vec_smollm2.py --set mntp.evaluate_every=5 --set simcse.evaluate_every=5

The paper's points are the average of 15 MTEB tasks in supervised training, ours STS in any stage: beside each other,
never in one axis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bivec.engine.errors import RunError
from bivec.engine.evaluation.paper import paper_rows, paper_title
from bivec.engine.figure import new_figure, save_figure
from bivec.engine.metrics import Evaluation, StepLog

EVALUATIONS = "evaluations.jsonl"
PAPER_MODEL = "S-LLaMA-1.3B"


@dataclass(frozen=True)
class TrainingCurve:
    """One stage of one run."""

    run: str
    stage: str  # "mntp", "simcse", "supervised"
    points: tuple[tuple[int, float], ...]  # (optimiser steps done, STS dev Spearman x 100)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def training_curves(runs: Mapping[str, str | Path]) -> list[TrainingCurve]:
    """The curves of runs, one a stage that was evaluated on its way.

    A stage begins (step 0) with the score of the state before it, where the run's ``results.json`` has it.

    Args:
        runs: the directories of the runs by name.

    Raises:
        RunError: a run without evaluations, or a file of it that is damaged.
    """
    curves: list[TrainingCurve] = []
    for name, directory in runs.items():
        evaluations = StepLog(Path(directory) / EVALUATIONS, Evaluation).read()
        if not evaluations:
            raise RunError(
                f"{directory}: no {EVALUATIONS} with scores there; a run writes them with --set mntp.evaluate_every=5 "
                "(or simcse., supervised.)"
            )
        before = _scores_before(Path(directory))
        for stage in dict.fromkeys(one.stage for one in evaluations):
            points = [(one.step, one.sts_dev_spearman) for one in evaluations if one.stage == stage]
            start = [(0, before[stage])] if stage in before else []
            curves.append(TrainingCurve(name, stage, (*start, *points)))
    return curves


def curves_markdown(curves: Sequence[TrainingCurve], *, paper_model: str = PAPER_MODEL) -> str:
    """A table a stage, one row a run, one column a step; then the paper's points.

    Raises:
        ConfigError: the paper's figure has no such model.
    """
    parts = []
    for stage in dict.fromkeys(curve.stage for curve in curves):
        rows = {curve.run: dict(curve.points) for curve in curves if curve.stage == stage}
        parts.append(_points_table(f"{stage}: STS dev, Spearman x 100, by step", rows))
    theirs = {row.variant: _paper_points(row.scores) for row in paper_rows("figure6", model=paper_model)}
    parts.append(_points_table(f"Paper, Figure 6, {paper_model}: {paper_title('figure6')}", theirs))
    return "\n\n".join(parts)


def draw_curves(path: str | Path, curves: Sequence[TrainingCurve], *, paper_model: str = PAPER_MODEL) -> None:
    """One panel a stage with all runs in it, and one with the paper's Figure 6.

    Args:
        path: of the PNG file.
        curves: one at least.
        paper_model: which of the paper's models.
    """
    stages = list(dict.fromkeys(curve.stage for curve in curves))
    figure = new_figure(4 * (len(stages) + 1), 3.6)
    *panels, paper = figure.subplots(1, len(stages) + 1)
    for axis, stage in zip(panels, stages, strict=True):
        for curve in curves:
            if curve.stage == stage:
                axis.plot(*zip(*curve.points, strict=True), marker="o", markersize=3, label=curve.run)
        axis.set(title=stage, xlabel="step", ylabel="STS dev, Spearman x 100")
    for row in paper_rows("figure6", model=paper_model):
        points = sorted(_paper_points(row.scores).items())
        paper.plot(*zip(*points, strict=True), marker="o", markersize=3, label=row.variant)
    paper.set(title=f"paper: {paper_model}, supervised", xlabel="step", ylabel="average of 15 MTEB tasks")
    for axis in (*panels, paper):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def _scores_before(directory: Path) -> dict[str, float]:
    """By trained stage: STS dev of the state that it began with."""
    file = directory / "results.json"
    if not file.is_file():
        return {}
    try:
        results = json.loads(file.read_text(encoding="utf-8"))["stages"]
        scores = {(one["stage"], one["pooling"]): float(one["sts_dev_spearman"]) for one in results}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: not the results of a run ({error!r})") from error
    before = {}
    for state, pooling in scores:
        earlier, _, stage = state.rpartition("+")
        if (earlier, pooling) in scores:
            before[stage] = scores[earlier, pooling]
    return before


def _paper_points(scores: Mapping[str, float]) -> dict[int, float]:
    return {int(step): score for step, score in scores.items()}


def _points_table(title: str, rows: Mapping[str, Mapping[int, float]]) -> str:
    steps = sorted({step for row in rows.values() for step in row})
    lines = [title, "", f"| | {' | '.join(map(str, steps))} |", "|---|" + "---|" * len(steps)]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[s]:.1f}' if s in row else '' for s in steps)} |")
    return "\n".join(lines)
