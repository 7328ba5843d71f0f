"""How does a decoder become an encoder? The README's figure: the four steps, what is packed, and which kernels run.

    python benchmarks/how_it_works.py     # writes benchmarks/results/how_it_works.png, or --output FILE

Nothing is measured. The masks, the rows that MNTP scores and the pairs that a loss compares are those of a packed batch
of three short texts.
"""

from __future__ import annotations

import argparse
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from bivec.engine.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parent / "results"
LENGTHS = (4, 3, 5)  # of the packed texts
BOUNDS = (0, *accumulate(LENGTHS))
TOKENS = BOUNDS[-1]
MASKED = (2, 6, 9, 10)  # rows of hidden tokens
COLOURS = ("#2f6fb5", "#d98e04", "#3c8d5a")  # of the texts
INK, GREY, PALE = "#1f2933", "#6b7785", "#e4e8ec"
STEPS = (
    (
        "1  Bidirectional attention",
        "the mask opens, inside each text;\nnothing is trained",
        "flash_attention on a packed batch:\ntexts never meet, nothing is padded",
    ),
    (
        "2  MNTP",
        "hidden tokens are predicted\nfrom the row before them (LoRA)",
        "linear_cross_entropy scores these rows\nonly, and never forms all logits",
    ),
    (
        "3  SimCSE",
        "two dropout views of a text agree,\nother texts do not (LoRA, merged MNTP)",
        "dropout in flash_attention; segment_pool;\ninfo_nce over the batch",
    ),
    (
        "4  Supervised (optional)",
        "a query meets its answer, not the\nhard negatives nor others' answers",
        "the same kernels; gradient caching\nfrees the batch from the memory",
    ),
)
LAYER = (
    ("rms_norm", "+ residual"),
    ("lora_linears", "q, k, v"),
    ("apply_rotary", "q, k"),
    ("flash_attention", "packed"),
    ("lora_linear", "o"),
    ("rms_norm", "+ residual"),
    ("lora_linears", "gate, up"),
    ("swiglu", ""),
    ("lora_linear", "down"),
)


def text_of(row: int) -> int:
    """Which text a packed row belongs to."""
    return next(i for i, (start, end) in enumerate(pairwise(BOUNDS)) if start <= row < end)


def cell(axes: Axes, x: float, y: float, colour: str, size: float = 1.0, alpha: float = 1.0, **style) -> None:
    """A square with its lower left corner at (x, y)."""
    from matplotlib.patches import FancyBboxPatch

    gap = 0.08 * size
    box = FancyBboxPatch(
        (x + gap, y + gap), size - 2 * gap, size - 2 * gap, boxstyle=f"round,pad=0,rounding_size={0.14 * size}"
    )
    box.set(facecolor=colour, edgecolor="none", alpha=alpha, **style)
    axes.add_patch(box)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, colour: str = GREY):
    """An arrow; ``bend`` is the curvature."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    axes.annotate("", end, start, arrowprops={**style, "connectionstyle": f"arc3,rad={bend}"})


def token_row(axes: Axes, y: float, hidden: tuple[int, ...] = (), alpha: float = 1.0) -> None:
    """The packed batch as a row of squares; hidden tokens are white with an underscore."""
    for row in range(TOKENS):
        colour = COLOURS[text_of(row)]
        if row in hidden:
            cell(axes, row, y, "white", lw=1.3)
            axes.patches[-1].set_edgecolor(colour)
            axes.text(row + 0.5, y + 0.5, "_", ha="center", va="center", color=colour, weight="bold", size=9)
        else:
            cell(axes, row, y, colour, alpha=alpha)


def draw_masks(axes: Axes) -> None:
    """The causal mask beside the bidirectional one: block diagonal both."""
    for offset, causal in ((0.0, True), (7.0, False)):
        for i in range(TOKENS):
            for j in range(TOKENS):
                seen = text_of(i) == text_of(j) and (not causal or j <= i)
                colour = COLOURS[text_of(i)] if seen else PALE
                cell(axes, offset + 0.42 * j, 6.1 - 0.42 * i, colour, size=0.42)
        axes.text(offset + 2.5, 7.05, "decoder" if causal else "encoder", ha="center", color=INK, size=8.5)
    arrow(axes, (5.35, 4.0), (6.65, 4.0))


def draw_mntp(axes: Axes) -> None:
    """The row in front of each hidden token is gathered and scored."""
    token_row(axes, 1.6, hidden=MASKED)
    token_row(axes, 3.7, alpha=0.45)
    axes.text(0, 3.15, "hidden states", color=GREY, size=7.5)
    axes.text(0, 1.05, "three packed texts, 4 tokens hidden", color=GREY, size=7.5)
    arrow(axes, (TOKENS / 2, 2.75), (TOKENS / 2, 3.65))
    axes.text(TOKENS / 2 + 0.4, 3.0, "model", color=GREY, size=7.5)
    for place, row in enumerate(MASKED):
        left = 2.2 + 2.2 * place
        cell(axes, left, 6.2, COLOURS[text_of(row - 1)])
        arrow(axes, (row - 0.5, 4.75), (left + 0.5, 6.15), colour=COLOURS[text_of(row)])
    axes.text(TOKENS / 2, 7.45, "LM head on 4 of 12 rows", ha="center", color=INK, size=8.5)


def draw_pairs(axes: Axes, names: tuple[str, str], groups: int) -> None:
    """Pooled vectors of both sides, and the matrix of their cosines; ``groups`` of candidates."""
    count, size = len(LENGTHS), 1.15
    left, top = 6.9 - (groups - 1) * 4.5, 4.65
    for i in range(count):
        cell(axes, left - 1.6, top - size * i, COLOURS[i], size)
        for j in range(count * groups):
            answer = j == i
            x = left + size * j + 0.35 * (j // count)
            cell(axes, x, top - size * i, COLOURS[i] if answer else PALE, size)
    for j in range(count * groups):
        x = left + size * j + 0.35 * (j // count)
        cell(axes, x, top + size + 0.35, COLOURS[j % count], size, alpha=1.0 if j < count else 0.4)
    axes.text(left - 1.6 + size / 2, 2.2, names[0], ha="center", va="top", color=GREY, size=7.5)
    axes.text(left + size * count / 2, 7.4, names[1], ha="center", color=GREY, size=7.5)
    if groups > 1:
        axes.text(left + size * count * 1.5 + 0.35, 7.4, "hard negatives", ha="center", color=GREY, size=7.5)


def draw_simcse(axes: Axes) -> None:
    """One packed forward of both views, pooled and compared."""
    draw_pairs(axes, ("view 1", "view 2"), groups=1)
    for y, label in ((4.9, "view 1"), (3.3, "view 2")):
        for row in range(TOKENS):
            dropped = (7 * row + int(10 * y)) % 5 == 0
            cell(axes, 0.32 * row, y, COLOURS[text_of(row)], 0.32, alpha=0.25 if dropped else 1.0)
        axes.text(0, y + 0.45, label, color=GREY, size=7.5)
    axes.text(0, 2.75, "in one forward", color=GREY, size=7.5)
    arrow(axes, (4.05, 4.2), (5.1, 4.2))


def draw_supervised(axes: Axes) -> None:
    """Queries against positives and hard negatives."""
    draw_pairs(axes, ("queries", "positives"), groups=2)


def draw_layer(axes: Axes) -> None:
    """What runs in a layer, from left to right."""
    from matplotlib.patches import FancyBboxPatch

    width, gap = 1.0, 0.22
    for place, (kernel, what) in enumerate(LAYER):
        x = place * (width + gap)
        box = FancyBboxPatch((x, 0.15), width, 0.8, boxstyle="round,pad=0,rounding_size=0.1")
        box.set(facecolor="#eef3f9" if kernel != "flash_attention" else "#dbe8f6", edgecolor=COLOURS[0], lw=1)
        axes.add_patch(box)
        axes.text(x + width / 2, 0.63 if what else 0.55, kernel, ha="center", va="center", color=INK, size=8.5)
        axes.text(x + width / 2, 0.34, what, ha="center", va="center", color=GREY, size=7.5)
        if place:
            arrow(axes, (x - gap + 0.03, 0.55), (x - 0.03, 0.55))
    axes.set(xlim=(-0.05, len(LAYER) * (width + gap) - gap + 0.05), ylim=(-0.05, 1.5))
    axes.text(0, 1.2, "Every layer, on [T, D] rows of a packed batch:", color=INK, size=9.5, weight="bold")


def main() -> None:
    """Draws and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "how_it_works.png", metavar="FILE")
    arguments = parser.parse_args()
    figure = new_figure(11.2, 4.3)
    grid = figure.add_gridspec(2, 4, height_ratios=(3.3, 1))
    for column, (draw, (title, method, kernels)) in enumerate(
        zip((draw_masks, draw_mntp, draw_simcse, draw_supervised), STEPS, strict=True)
    ):
        axes = figure.add_subplot(grid[0, column])
        axes.set(xlim=(-0.3, 12.3), ylim=(-1.0, 11.1), aspect="equal")
        axes.axis("off")
        axes.text(0, 10.5, title, color=INK, size=11.5, weight="bold")
        axes.text(0, 10.1, method, color=GREY, size=8.5, va="top")
        axes.text(0, 0.3, kernels, color=COLOURS[0], size=8.5, va="top")
        draw(axes)
    layer = figure.add_subplot(grid[1, :])
    layer.axis("off")
    draw_layer(layer)
    save_figure(figure, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
