"""Figures without a screen, written so that a kill leaves no half of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bivec.models.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, on matplotlib's Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a PNG through a temporary name.

    Raises:
        CheckpointError: the disk is full.
    """
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
