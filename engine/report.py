"""The result of a run as a table (Markdown, terminal) and as a figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bivec.engine.figure import new_figure, save_figure

CAUSAL, BIDIRECTIONAL = "#9aa5b1", "#2f6fb5"
SHOWN = (  # whose similarities a run prints
    "A man is playing the guitar on stage.",
    "Someone performs music for an audience.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value this week.",
    "A kitten is sleeping on the sofa.",
)


@dataclass(frozen=True)
class StageResult:
    """STS of one state of the model; correlations are Spearman x 100."""

    stage: str  # "uni" | "uni weighted-mean" | "bi" | "bi+mntp" | "bi+mntp+simcse" …
    pooling: str
    sts_dev_spearman: float
    sts_test_spearman: float | None = None  # read at the end of the run

    def to_dict(self) -> dict[str, Any]:
        """As ``results.json`` holds it."""
        return asdict(self)


def results_table(results: list[StageResult], pairs: dict[str, int]) -> str:
    """A Markdown table, one row a stage.

    Args:
        results: in the order of the run.
        pairs: number of sentence pairs by split ("dev", "test").
    """
    rows = [
        f"| stage | pooling | STS-B dev ({pairs['dev']} pairs) | STS-B test ({pairs['test']} pairs) |",
        "|---|---|---|---|",
    ]
    for result in results:
        test = "" if result.sts_test_spearman is None else f"{result.sts_test_spearman:.1f}"
        rows.append(f"| {result.stage} | {result.pooling} | {result.sts_dev_spearman:.1f} | {test} |")
    return "\n".join(rows)


def similarity_table(sentences: list[str], similarities: list[list[float]]) -> str:
    """The cosine similarities of a few sentences, one row each."""
    width = max(len(sentence) for sentence in sentences)
    header = " " * (width + 6) + "   ".join(f"[{i + 1}]" for i in range(len(sentences)))
    rows = [
        f"[{i + 1}] {sentence:<{width}}  " + "  ".join(f"{value:.2f}" for value in row)
        for i, (sentence, row) in enumerate(zip(sentences, similarities, strict=True))
    ]
    return "\n".join([header, *rows])


def draw_results(
    path: Path, title: str, results: list[StageResult], losses: dict[str, list[tuple[int, float]]]
) -> None:
    """Writes ``results.png``: the stages as bars, beside them one loss curve a training stage.

    Args:
        path: of the PNG file.
        title: of the figure.
        results: the stages.
        losses: (step, loss) of every logged step, by stage.
    """
    figure = new_figure(4.5 + 3.2 * len(losses), 3.6)
    axes = figure.subplots(1, 1 + len(losses), width_ratios=[1.5] + [1] * len(losses), squeeze=False)[0]
    names = [result.stage for result in results]
    values = [result.sts_dev_spearman for result in results]
    colours = [CAUSAL if name.startswith("uni") else BIDIRECTIONAL for name in names]
    bars = axes[0].barh(names, values, color=colours)
    axes[0].bar_label(bars, fmt="%.1f", padding=3)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="STS-B dev, Spearman x 100", xlim=(min(0, *values), max(100, *values)), title=title)
    for axis, (stage, points) in zip(axes[1:], losses.items(), strict=True):
        axis.plot([step for step, _ in points], [loss for _, loss in points], color=BIDIRECTIONAL, linewidth=1.2)
        axis.set(title=f"{stage} loss", xlabel="step")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
