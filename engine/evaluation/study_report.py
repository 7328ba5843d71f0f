"""The report of a study: every table beside the paper's, every plot, and which trends of the paper hold."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import torch

from bivec.engine.evaluation.parts import Part
from bivec.engine.evaluation.trends import (
    FAILS,
    HOLDS,
    Trend,
    pooling_trends,
    prefix_trends,
    sequence_trends,
    trends_table,
    word_trends,
)
from bivec.engine.run_files import installed_version
from bivec.models.files import write_text_atomic

# title, and what the part asks
SECTIONS = {
    "pooling": ("Sentence pairs by variant and pooling", "STS-B test, Spearman x 100 (the paper's Figure 3, Table 5)."),
    "tasks": ("Four tasks run by mteb", "Built of the text that ships; the paper's Table 1 has the means of 56 tasks."),
    "words": ("Words", "A linear probe on the frozen encoder (the paper's Figure 2, Table 4)."),
    "prefixes": ("Does a prefix know what follows?", "The paper's Figure 4."),
    "masks": ("What the mask does to the hidden states", "The decoder as it is, no training (the paper's Figure 5)."),
    "curves": ("How fast each start learns", "STS by step of SimCSE; the paper's Figure 6 is of supervised training."),
}


def study_trends(parts: Mapping[str, Part]) -> list[Trend]:
    """The paper's claims, decided by the parts that are there."""
    pooled: dict[str, dict[str, float]] = {}
    for one in parts["pooling"].data["scores"] if "pooling" in parts else []:
        pooled.setdefault(one["variant"], {})[one["pooling"]] = one["spearman"]
    sts = {variant: scores["mean"] for variant, scores in pooled.items() if "mean" in scores}
    if "weighted_mean" in pooled.get("uni", {}):
        sts["uni weighted_mean"] = pooled["uni"]["weighted_mean"]
    found = [*sequence_trends(sts), *pooling_trends(pooled)] if pooled else []
    if "words" in parts:
        for read, tasks in parts["words"].data["accuracy"].items():
            found += word_trends(tasks, read)
    if "prefixes" in parts:
        found += prefix_trends(parts["prefixes"].data["auc"])
    return found


def study_report(run: str, parts: Mapping[str, Part], images: Sequence[str], notes: Sequence[str]) -> str:
    """Markdown.

    Args:
        run: the run under study.
        parts: by name; those that are missing are said to be.
        images: files beside the report, "<part>.png".
        notes: what was left out or cut short, a sentence each.
    """
    trends = study_trends(parts)
    count = {verdict: sum(trend.verdict == verdict for trend in trends) for verdict in (HOLDS, FAILS)}
    lines = [
        f"# The paper's evaluations on {run}",
        "",
        f"{datetime.now().astimezone().date().isoformat()}, {platform.machine()}, {torch.get_num_threads()} threads, "
        + ", ".join(
            f"{name} {installed_version(name) or '(none)'}" for name in ("bivec", "torch", "transformers", "mteb")
        )
        + ". Uni: the decoder's own causal mask; Bi: bidirectional attention, no training.",
        "",
        *(f"* {note}" for note in notes),
        "",
        "## Which trends of the paper hold here",
        "",
        (
            f"Of {len(trends)} claims {count[HOLDS]} hold and {count[FAILS]} do not; the rest is within the noise of "
            "one seed or was not measured."
        ),
        "",
        trends_table(trends),
    ]
    for name, (title, asked) in SECTIONS.items():
        lines += ["", f"## {title}", "", asked, ""]
        if name not in parts:
            lines += ["This part was not run."]
            continue
        lines += [parts[name].data["table"]]
        if f"{name}.png" in images:
            lines += ["", f"![{title}]({name}.png)"]
    lines += ["", "## Time", "", _times(parts)]
    return "\n".join(lines) + "\n"


def write_report(directory: Path, run: str, parts: Mapping[str, Part], notes: Sequence[str]) -> Path:
    """Writes ``report.md`` into the study's directory; returns its path."""
    images = [file.name for file in directory.glob("*.png")]
    file = directory / "report.md"
    write_text_atomic(file, study_report(run, parts, images, notes))
    return file


def _times(parts: Mapping[str, Part]) -> str:
    rows = [f"| {name} | {part.seconds / 60:.1f} |" for name, part in parts.items()]
    total = sum(part.seconds for part in parts.values())
    return "\n".join(["| part | minutes |", "|---|---|", *rows, f"| all | {total / 60:.1f} |"])
