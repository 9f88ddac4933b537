"""Figures of a sweep by matplotlib: trials along an axis, and parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from viladiff.core.colormap import SERIES
from viladiff.report.charts.themes import LIGHT, new_figure, plain, save_drawn, style_axes, uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, WIDE = (4.2, 2.4), (9.6, 3.0)
"""Inches of a small figure and of one that spans the page."""
PLAIN, BEST, LINE, PAPER = SERIES[0], SERIES[1], SERIES[2], SERIES[3]
TOLD = 20
"""Points that a text for those who do not see the figure names at most."""


class Point(NamedTuple):
    """A value at a place of the axis, with its spread."""

    x: float
    y: float
    words: str
    colour: str = PLAIN
    low: float | None = None
    high: float | None = None
    hollow: bool = False


class Polyline(NamedTuple):
    """Places that are joined; ``band`` is how far it may be off, above and below, at each."""

    points: Sequence[tuple[float, float]]
    colour: str = LINE
    words: str = ""
    band: Sequence[float] = ()
    dashed: bool = False
    faint: bool = False


class Axis(NamedTuple):
    low: float
    high: float
    name: str
    log: bool = False
    names: tuple[str, ...] = ()
    """Of the places 0, 1, ... on an axis of choices."""

    def share(self, x: float) -> float:
        """Return the position of a value on the axis, 0 to 1."""
        warp = math.log if self.log else float
        return (warp(x) - warp(self.low)) / (warp(self.high) - warp(self.low))


class TrialChart(NamedTuple):
    """Values over ``axis``; ``words`` are read to those who do not see it. ``rug``: places without a value."""

    axis: Axis
    words: str
    dots: Sequence[Point] = ()
    lines: Sequence[Polyline] = ()
    size: tuple[float, float] = SIZE
    rug: Sequence[float] = ()
    upwards: str = "mIoU (%)"


class ParallelLine(NamedTuple):
    """A trial in parallel coordinates: its place on each axis, 0 to 1."""

    shares: Sequence[float]
    words: str
    rank: float
    """0 for the worst to 1 for the best."""
    colour: str = ""
    """Instead of that of its rank."""


class ParallelChart(NamedTuple):
    """One upright axis a dimension, a line a trial; better ones are stronger, and drawn later."""

    axes: Sequence[Axis]
    words: str
    lines: Sequence[ParallelLine]


class Picture(NamedTuple):
    """A figure inside a page: data URIs of both themes, and what is read to those who do not see it."""

    light: str
    dark: str
    words: str


def save_picture(chart: TrialChart | ParallelChart, folder: Path, name: str) -> Picture:
    """Draw both themes below ``folder`` where the numbers are new; the text names the best points or lines."""
    draw = draw_parallel if isinstance(chart, ParallelChart) else draw_trials
    paths = save_drawn(chart, lambda: draw(chart), folder, name)  # type: ignore[arg-type]
    told: list[Point | Polyline | ParallelLine] = [*chart.lines]
    if isinstance(chart, TrialChart):
        told = [*chart.dots, *told]
    named = list(dict.fromkeys(one.words for one in told if one.words))
    more = [f"and {len(named) - TOLD} more"] if len(named) > TOLD else []
    words = "; ".join([*named[-TOLD:], *more])
    return Picture(uri(paths["light"]), uri(paths["dark"]), f"{chart.words}. {words}" if words else chart.words)


def draw_trials(chart: TrialChart) -> Figure:
    """Draw the light figure of values over an axis."""
    figure = new_figure(*chart.size)
    axes = figure.add_axes(_inside(*chart.size))
    style_axes(axes, "", chart.axis.name, chart.upwards)
    _scale(axes, chart.axis)
    for line in chart.lines:
        x, y = [one[0] for one in line.points], [one[1] for one in line.points]
        style, alpha = "--" if line.dashed else "-", 0.35 if line.faint else 1.0
        axes.plot(x, y, style, color=line.colour, alpha=alpha, linewidth=1.3, zorder=2)
        if line.band:
            low, high = ([at + sign * off for at, off in zip(y, line.band, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=line.colour, alpha=0.18, linewidth=0, zorder=1)
    for dot in chart.dots:
        if dot.low is not None and dot.high is not None and dot.high > dot.low:
            axes.vlines(dot.x, dot.low, dot.high, color=dot.colour, alpha=0.5, linewidth=0.9, zorder=3)
    for colour, hollow in dict.fromkeys((dot.colour, dot.hollow) for dot in chart.dots):
        same = [dot for dot in chart.dots if (dot.colour, dot.hollow) == (colour, hollow)]
        fill = LIGHT["ground"] if hollow else colour
        at = [dot.x for dot in same], [dot.y for dot in same]
        axes.plot(*at, "o", color=colour, markerfacecolor=fill, markersize=4, zorder=4)
    if chart.rug:
        across = axes.get_xaxis_transform()
        axes.plot(chart.rug, [0.03] * len(chart.rug), "|", color=PLAIN, alpha=0.6, markersize=7, transform=across)
    return figure


def draw_parallel(chart: ParallelChart) -> Figure:
    """Draw the light figure of parallel coordinates."""
    size = max(WIDE[0], 1.1 * len(chart.axes)), WIDE[1]
    figure = new_figure(*size)
    axes = figure.add_axes((0.03, 0.06, 0.92, 0.82), facecolor=LIGHT["ground"])
    places = list(range(len(chart.axes)))
    for line in sorted(chart.lines, key=lambda one: (bool(one.colour), one.rank)):
        alpha, width = (1.0, 2.0) if line.colour else (0.1 + 0.9 * line.rank, 0.9)
        axes.plot(places, line.shares, color=line.colour or PLAIN, alpha=alpha, linewidth=width)
    for place, axis in zip(places, chart.axes, strict=True):
        axes.axvline(place, color=LIGHT["faint"], linewidth=0.9)
        axes.text(place, 1.05, plain(axis.name), fontsize=8, color=LIGHT["ink"], ha="center")
        for value, name in _marks(axis):
            box = {"facecolor": LIGHT["ground"], "edgecolor": "none", "alpha": 0.7, "pad": 0.8}
            axes.text(place + 0.02, axis.share(value), name, fontsize=7, color=LIGHT["faint"], va="center", bbox=box)
    axes.set_xlim(-0.05, len(places) - 0.8)
    axes.set_ylim(-0.04, 1.04)
    axes.axis("off")
    return figure


def _inside(width: float, height: float) -> tuple[float, float, float, float]:
    """Return the axes' rectangle, with room for the numbers and names of both axes, whatever the size."""
    return 0.7 / width, 0.5 / height, 1 - 0.8 / width, 1 - 0.6 / height


def _scale(axes: Axes, axis: Axis) -> None:
    from matplotlib.ticker import NullFormatter

    if axis.log:
        axes.set_xscale("log")
    axes.set_xlim(axis.low, axis.high)
    if axis.names or axis.log:
        marks = _marks(axis)
        axes.set_xticks([place for place, _ in marks], [plain(name) for _, name in marks])
        axes.xaxis.set_minor_formatter(NullFormatter())


def _marks(axis: Axis) -> list[tuple[float, str]]:
    """Return places and texts of an axis's ticks, all inside."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if axis.names:
        return [(float(i), name) for i, name in enumerate(axis.names)]
    locator = LogLocator(subs=(1.0, 2.0, 5.0)) if axis.log else MaxNLocator(5)
    values = [float(value) for value in locator.tick_values(axis.low, axis.high) if axis.low <= value <= axis.high]
    return [(value, f"{value:g}") for value in values]
