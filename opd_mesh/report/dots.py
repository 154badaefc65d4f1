"""Accuracies of systems as dots with intervals, one row each: an inline SVG in the style of the other plots."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from opd_mesh.report.plots import AXIS, STYLE, SURFACE, colour_of, inline

WIDTH_INCHES, ROW_INCHES, REST_INCHES = 5.6, 0.235, 0.62
MAX_LABEL = 26  # characters


@dataclass(frozen=True, slots=True)
class Dot:
    """One row: values in percent.

    Attributes:
        colour: index of the palette, None the neutral ink.
        hollow: of what is beside the point, for instance an expert elsewhere.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: int | None = None
    hollow: bool = False


def draw_dots(
    name: str, dots: Sequence[Dot], description: str, *, marks: Sequence[float] = (), width: float = WIDTH_INCHES
) -> str:
    """Rows from above to below → an ``<svg>`` element. At least one row.

    Args:
        name: unique in the page; prefixes the ids inside the SVG.
        marks: values (in percent) that a thin vertical line goes through, to compare with.
        description: for readers who cannot see it.
        width: in inches.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": name, "axes.grid.axis": "x", "axes.spines.bottom": False}):
        size = (width, ROW_INCHES * len(dots) + REST_INCHES)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.05))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for mark in marks:
            axes.axvline(mark, color=AXIS, linewidth=1.0, linestyle="--", zorder=1.5)
        for row, dot in enumerate(dots):
            colour = colour_of(dot.colour)
            if dot.low is not None and dot.high is not None:
                axes.plot([dot.low, dot.high], [row, row], color=colour, linewidth=2.2, alpha=0.55, zorder=2)
            face = SURFACE if dot.hollow else colour
            axes.plot([dot.value], [row], "o", markersize=6, markerfacecolor=face, markeredgecolor=colour, zorder=3)
        labels = [dot.label if len(dot.label) <= MAX_LABEL else f"{dot.label[: MAX_LABEL - 1]}…" for dot in dots]
        axes.set_yticks(range(len(dots)), labels, parse_math=False)
        axes.set_ylim(len(dots) - 0.4, -0.6)
        low = min([0.0, *(dot.low for dot in dots if dot.low is not None)])
        axes.set_xlim(low - 1.5, 101.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("% right, with 95% interval")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline(text.getvalue(), name, description)
