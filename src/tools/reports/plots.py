"""Plots with matplotlib, which is an extra: `pip install -r requirements-plots.txt`."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from src.common.files.store import write_named

MISSING = "plots are left out: pip install -r requirements-plots.txt adds matplotlib"
COLUMNS = 3
WIDTH, HEIGHT, DPI = 4.4, 3.2, 110  # inches of a panel, dots of an inch


class Line(NamedTuple):
    """Values `y` at `x`; `spread` is half the height of the band around them, or None; `mark`: points alone."""

    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    mark: str = ""


class Panel(NamedTuple):
    """A plot: lines by their name, and what its axes are called."""

    title: str
    lines: Mapping[str, Line]
    x: str = "step"
    y: str = ""


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def write_plot(path: str | os.PathLike[str], panels: Sequence[Panel]) -> None:
    """Draws panels side by side into a PNG. Raises ImportError without matplotlib, OSError if it cannot be written."""
    if not can_plot():
        raise ImportError(MISSING)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), dpi=DPI, layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        for name, line in panel.lines.items():
            (drawn,) = axes.plot(line.x, line.y, line.mark or "-", label=name, markersize=4)
            if line.spread is not None:
                below, above = zip(*((y - s, y + s) for y, s in zip(line.y, line.spread, strict=True)), strict=True)
                axes.fill_between(line.x, below, above, color=drawn.get_color(), alpha=0.2, linewidth=0)
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.grid(alpha=0.3)
        if len(panel.lines) > 1:
            axes.legend(fontsize="small")
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    write_named(path, data.getvalue(), "plot")
