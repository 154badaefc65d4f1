"""Plots as inline SVG: no script, no external resource, and colours that follow the page's light or dark theme.

Matplotlib draws with stand-in colours; in its SVG each is then replaced by a CSS variable of the page. Text stays text
(selectable, and in the page's font).
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from opd_mesh.report.data import Series

# Teachers' colours are `--s0` … in template.html.j2, the phases of a step `--p0` …. Beyond them they repeat, dashed.
PALETTE_SIZE = 8
PANEL_INCHES = (5.6, 2.5)
SMALL_INCHES = (2.7, 1.9)
STACKED_PANEL_HEIGHT_INCHES = 1.6
# More points than this are drawn as the mean of a bucket, with the range in the bucket as a band behind it.
MAX_POINTS = 160
MARKERS_BELOW = 14

# Stand-ins are colours nobody would choose; each maps to a CSS variable.
_VARIABLES = {f"#0a0b{index:02x}": f"var(--s{index})" for index in range(PALETTE_SIZE)}
_VARIABLES |= {f"#0a0c{index:02x}": f"var(--p{index})" for index in range(PALETTE_SIZE)}
_VARIABLES |= {"#0c0d01": "var(--plot-text)", "#0c0d02": "var(--grid)", "#0c0d03": "var(--axis)"}
_VARIABLES |= {"#0c0d04": "var(--neutral)", "#0c0d05": "var(--surface)"}
_SERIES = [name for name in _VARIABLES if name.startswith("#0a0b")]
_PHASES = [name for name in _VARIABLES if name.startswith("#0a0c")]
_TEXT, _GRID, AXIS, NEUTRAL, SURFACE = (name for name in _VARIABLES if name.startswith("#0c0d"))

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # for the layout; the page's own font is put in afterwards
    "font.size": 8.5,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": AXIS,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": AXIS,
    "xtick.labelcolor": _TEXT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.labelcolor": _TEXT,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot. ``colour`` is an index of the palette, None the neutral ink; ``style`` as matplotlib's."""

    label: str
    series: Series
    colour: int | None = None
    style: str = "-"


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: lines, or (``stacked``) areas on top of each other."""

    lines: Sequence[Line]
    unit: str
    stacked: bool = False
    from_zero: bool = True
    top: float | None = None  # the least upper end of the axis, to compare panels by eye
    zero_line: bool = False
    exact: bool = False  # no running mean: every point is a measurement of its own, or the line is not noisy


def line_style(index: int) -> str:
    """Colours repeat after the palette; the dash tells the second round from the first."""
    return "-" if index < PALETTE_SIZE else "--"


def draw(name: str, panels: Sequence[Panel], description: str, *, small: bool = False) -> str:
    """Panels under each other over one axis of steps → an ``<svg>`` element. At least one point must exist.

    Args:
        name: unique in the page; prefixes the ids inside the SVG.
        description: for readers who cannot see it.
    """
    width, height = SMALL_INCHES if small else PANEL_INCHES
    if len(panels) > 1:
        height = STACKED_PANEL_HEIGHT_INCHES * len(panels)
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.05, hspace=0.04))
        FigureCanvasSVG(figure)
        all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(all_axes, panels, strict=True):
            (_draw_stack if panel.stacked else _draw_lines)(axes, panel)
            _dress(axes, panel)
        steps = [step for panel in panels for line in panel.lines for step in line.series.steps]
        low, high = min(steps), max(steps)
        margin = max((high - low) * 0.02, 0.5)
        all_axes[-1].set_xlim(low - margin, high + margin)
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=5 if small else 7, integer=True, min_n_ticks=1))
        all_axes[-1].set_xlabel("optimizer step")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline(text.getvalue(), name, description)


def bucketed(series: Series) -> tuple[list[float], list[float], list[float], list[float]]:
    """At most about ``MAX_POINTS`` points: (steps, means, minima, maxima), each of one length.

    Buckets are ranges of steps, so a gap stays where it is.
    """
    if len(series.steps) <= MAX_POINTS:
        steps = [float(step) for step in series.steps]
        return steps, list(series.values), list(series.values), list(series.values)
    first, last = series.steps[0], series.steps[-1]
    width = (last - first + 1) / MAX_POINTS
    buckets: dict[int, list[int]] = {}
    for index, step in enumerate(series.steps):
        buckets.setdefault(int((step - first) / width), []).append(index)
    steps, means, lows, highs = [], [], [], []
    for members in buckets.values():
        values = [series.values[index] for index in members]
        steps.append(sum(series.steps[index] for index in members) / len(members))
        means.append(sum(values) / len(values))
        lows.append(min(values))
        highs.append(max(values))
    return steps, means, lows, highs


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Centred running mean over ``2 * reach + 1`` values, fewer at the ends."""
    result = []
    for index in range(len(values)):
        window = values[max(0, index - reach) : index + reach + 1]
        result.append(sum(window) / len(window))
    return result


def colour_of(index: int | None) -> str:
    """The stand-in of a colour of the palette; None: of the neutral ink."""
    return NEUTRAL if index is None else _SERIES[index % PALETTE_SIZE]


def _phase(index: int | None) -> str:
    return NEUTRAL if index is None else _PHASES[index % PALETTE_SIZE]


def _draw_lines(axes: Axes, panel: Panel) -> None:
    if panel.zero_line:
        axes.axhline(0, color=AXIS, linewidth=1.0, zorder=1.5)
    for line in panel.lines:
        if not line.series:
            continue
        colour = colour_of(line.colour)
        steps, means, lows, highs = bucketed(line.series)
        if panel.exact and highs == means and len(steps) >= MARKERS_BELOW:
            axes.plot(steps, means, line.style, color=colour, zorder=3)
            continue
        if len(steps) < MARKERS_BELOW:
            # Few points (evaluations, a run just begun): every one is a measurement to be seen.
            axes.plot(
                steps, means, line.style, color=colour, marker="o", markersize=5, markeredgecolor=SURFACE, zorder=3
            )
            continue
        if highs != means:
            axes.fill_between(steps, lows, highs, color=colour, alpha=0.16, linewidth=0)
        else:
            axes.plot(steps, means, "-", color=colour, alpha=0.35, linewidth=0.9)
        shown = means if panel.exact else smoothed(means, max(1, len(means) // 40))
        axes.plot(steps, shown, line.style, color=colour, zorder=3)


def _draw_stack(axes: Axes, panel: Panel) -> None:
    lines = [line for line in panel.lines if line.series]
    steps = sorted({step for line in lines for step in line.series.steps})
    rows: list[list[float]] = []
    grid: list[float] = []
    for line in lines:
        value_at = dict(zip(line.series.steps, line.series.values, strict=True))
        # A phase that did not happen in a step took no time.
        grid, means, _, _ = bucketed(Series(steps, [max(0.0, value_at.get(step, 0.0)) for step in steps]))
        rows.append(means)
    floor = [0.0] * len(grid)
    if len(grid) < MARKERS_BELOW:
        gap = min((b - a for a, b in itertools.pairwise(grid)), default=1.0)
        for line, row in zip(lines, rows, strict=True):
            axes.bar(grid, row, bottom=floor, width=gap * 0.7, color=_phase(line.colour), edgecolor=SURFACE)
            floor = [low + value for low, value in zip(floor, row, strict=True)]
        return
    for line, row in zip(lines, rows, strict=True):
        ceiling = [low + value for low, value in zip(floor, row, strict=True)]
        axes.fill_between(grid, floor, ceiling, color=_phase(line.colour), edgecolor=SURFACE, linewidth=0.6, alpha=0.9)
        floor = ceiling


def _dress(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.unit, loc="left", fontsize=8.5, color=_TEXT, pad=5)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, min_n_ticks=3))
    low, high = axes.get_ylim()
    if max(abs(low), abs(high)) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif 0 < max(abs(low), abs(high)) < 0.01:
        axes.yaxis.set_major_formatter(FuncFormatter(_short_scientific))
    if panel.from_zero:
        # Room above the data: matplotlib's own margin is a share of the data's range, not of the axis from zero.
        axes.set_ylim(min(0.0, low) if axes.dataLim.y0 < 0 else 0.0, max(axes.dataLim.y1, 0.0) * 1.06 or 1.0)
    if panel.top is not None:
        axes.set_ylim(top=max(panel.top, axes.get_ylim()[1] if axes.dataLim.y1 > panel.top else 0.0))


def _short_scientific(value: float, _position: int | None = None) -> str:
    """0.00005 → "5e-5"."""
    return "0" if value == 0 else re.sub(r"\.?0*e([-+])0*", r"e\1", f"{value:.2e}")


def inline(svg: str, name: str, description: str) -> str:
    """Matplotlib's document → an element that lives in the page: themed, named, without ids in common with others."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r"(font: [\d.]+px )[^;\"]*", r"\1var(--font)", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    # Its size is the page's business; the view box keeps the proportions.
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height|version|xmlns(:\w+)?)="[^"]*"', "", head)
    label = _attribute(description)
    rest = rest.replace("xlink:href", "href")
    return f'{head} role="img" aria-label="{label}">{rest}'.strip()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def drawable(panels: Iterable[Panel]) -> bool:
    """Whether there is a point to draw."""
    return any(line.series for panel in panels for line in panel.lines)
