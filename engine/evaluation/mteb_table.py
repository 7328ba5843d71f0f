"""MTEB scores beside those of the paper: task by task, by category, over the subset and over all 56 tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from bivec.engine.evaluation.paper import (
    AVERAGE,
    CATEGORIES,
    PaperRow,
    paper_rows,
    paper_tasks,
)

PAPER_MODELS = ("S-LLaMA-1.3B", "LLaMA-2-7B", "Mistral-7B", "Llama-3-8B")
SUBSET, ALL = "15-task subset", "56 tasks"


@dataclass(frozen=True)
class ComparisonRow:
    """One line of the table; scores x 100."""

    name: str  # of a task, of a category, SUBSET, ALL, or "other tasks"
    tasks: int  # how many are averaged
    of: int  # how many there are in the paper; 0 for a task that is not the paper's
    ours: float
    paper: Mapping[str, float]  # by model, where the paper has a figure for the same tasks


def compare(
    scores: Mapping[str, float], variant: str, models: Sequence[str] = PAPER_MODELS, *, pooling: str = "mean"
) -> tuple[list[ComparisonRow], list[ComparisonRow]]:
    """Our scores and the paper's for the same variant.

    Averages of the paper are taken over the tasks that we have, where it gives every task's score (Tables 11, 12:
    "bi+mntp+simcse" and "bi+mntp+supervised"). Of other variants it gives averages only (Tables 1, 2, 5): these stand
    beside ours where ours is over as many tasks and of the same pooling (in Tables 1 and 2 Uni's is the weighted mean).

    Args:
        scores: x 100, by the task's name in mteb; a name with a version ("STS22.v2") is another task than the paper's.
        variant: "uni", "bi+mntp+simcse", …
        models: of the paper.
        pooling: ours: "mean", "weighted_mean" or "eos_token".

    Returns:
        (a row for each task, in the order of ``scores``; a row for each category that has one, SUBSET, ALL).
    """
    known = {task.name: task for task in paper_tasks()}
    by_task = {model: _row(("11", "12"), model, variant, pooling) for model in models}
    tasks = [
        ComparisonRow(
            name,
            1,
            int(name in known),
            score,
            {model: row.scores[name] for model, row in by_task.items() if row and name in known},
        )
        for name, score in scores.items()
    ]
    groups = [(category, [task.name for task in paper_tasks(category=category)]) for category in CATEGORIES]
    groups += [(SUBSET, [task.name for task in paper_tasks(subset_only=True)]), (ALL, list(known))]
    averages = []
    for name, members in groups:
        done = [member for member in members if member in scores]
        if done:
            paper = {
                model: _paper_average(name, members, done, by_task[model] or _averages(model, variant, pooling, name))
                for model in models
            }
            present = {model: value for model, value in paper.items() if value is not None}
            ours = fmean(scores[member] for member in done)
            averages.append(ComparisonRow(name, len(done), len(members), ours, present))
    return tasks, averages


def comparison_table(rows: Sequence[ComparisonRow], title: str = "task") -> str:
    """Markdown: ours, then the figure of every model of the paper with ours less that.

    Args:
        rows: one part of what :func:`compare` returns.
        title: of the first column.
    """
    models = [model for model in PAPER_MODELS if any(model in row.paper for row in rows)]
    lines = [
        f"| {title} | ours | " + "".join(f"{model} (paper) | ours less it | " for model in models),
        "|---|---|" + "---|---|" * len(models),
    ]
    for row in rows:
        name = row.name if row.of in (row.tasks, 0) else f"{row.name} ({row.tasks} of {row.of} tasks)"
        cells = [name, f"{row.ours:.2f}"]
        for model in models:
            value = row.paper.get(model)
            cells += ["", ""] if value is None else [f"{value:.2f}", f"{row.ours - value:+.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(line.rstrip() for line in lines)


def _row(tables: Sequence[str], model: str, variant: str, pooling: str) -> PaperRow | None:
    """The one row of a model and variant in any of the tables, if it is of this pooling."""
    rows = [row for table in tables for row in paper_rows(table, variant=variant) if row.model == model]
    return next((row for row in rows if row.pooling in (None, pooling)), None)


def _averages(model: str, variant: str, pooling: str, name: str) -> dict[str, float]:
    """The paper's average of a category, of SUBSET or of ALL, under its name; nothing where it has none."""
    if name == SUBSET:
        row, column = _row(("5",), model, variant, pooling), pooling
    else:
        row, column = _row(("1", "2"), model, variant, pooling), AVERAGE if name == ALL else name
    return {name: row.scores[column]} if row is not None and column in row.scores else {}


def _paper_average(
    name: str, members: Sequence[str], done: Sequence[str], known: PaperRow | Mapping[str, float]
) -> float | None:
    """Over the tasks that are done, of their scores; where these are not known, the average of all."""
    if isinstance(known, PaperRow):
        return fmean(known.scores[member] for member in done)
    return known.get(name) if len(done) == len(members) else None
