"""Scatter plot of score against cost, for the leaderboard: numbered points, names listed below, light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from viladiff.core.colormap import SERIES
from viladiff.report.charts.themes import LIGHT, new_figure, plain, save_drawn, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*hp"
NUMBERED = 6.5
"""Size of a point's number and of the list of names, in points."""
COLUMNS = 3
"""Of the list of names beneath the axes."""
MARKER = 3.0
"""Half of a marker's width, in points."""


class Point(NamedTuple):
    x: float
    y: float
    spread: float | None
    """Standard deviation of y; None with a single seed."""
    number: str
    """Stands at the point and before the label in the list beneath: a row's number in its table."""
    label: str
    group: int
    """Colour and marker."""
    ours: bool = False
    """A control or a reference: hollow."""


class Label(NamedTuple):
    """The numbers of one point, or of some that are close together."""

    at: tuple[float, float]
    text: str
    offset: tuple[float, float]
    """From ``at`` to the text's end that ``align`` names, in points of the figure."""
    align: str


class Chart(NamedTuple):
    """One picture."""

    title: str
    across: str
    upwards: str
    points: tuple[Point, ...]
    groups: tuple[str, ...]


def save_scatter(chart: Chart, folder: Path, name: str) -> dict[str, Path]:
    """Write ``<name>-light.svg`` and ``<name>-dark.svg``; keep a file that was drawn from the same numbers."""
    return save_drawn(chart, lambda: draw(chart), folder, name)


def draw(chart: Chart) -> Figure:
    """Draw the light figure: numbered points, and beneath them the list of their names."""
    given, chart = chart.points, chart._replace(points=brought_in(chart.points))
    lines = math.ceil(len(chart.points) / COLUMNS)
    below = 0.62 + 0.15 * lines
    height = 3.9 + below
    figure = new_figure(6.4, height)
    axes = figure.add_axes((0.09, below / height, 0.89, 3.55 / height))
    for place, group in enumerate(chart.groups):
        _points(axes, [one for one in chart.points if one.group == place], place, group, LIGHT)
    _frame(axes, chart)
    if moved := [one.y for one in chart.points if one not in given]:  # below all others, where the axis has no numbers
        axes.set_yticks([mark for mark in axes.get_yticks() if max(moved) < mark <= axes.get_ylim()[1]])
    look: dict[str, Any] = {"textcoords": "offset points", "fontsize": NUMBERED, "color": LIGHT["ink"], "zorder": 4}
    for label in number_labels(axes, chart.points):
        axes.annotate(label.text, label.at, label.offset, ha=label.align, **look)
    for i, one in enumerate(chart.points):
        across, up = 0.09 + 0.3 * (i // lines), (0.15 * (lines - 1 - i % lines) + 0.06) / height
        colour = LIGHT["faint"] if one.ours else LIGHT["ink"]
        figure.text(across, up, plain(f"{one.number}  {one.label}"), fontsize=NUMBERED, color=colour)
    return figure


def number_labels(axes: Axes, points: Sequence[Point]) -> list[Label]:
    """Return places and numbers; points whose numbers would overlap share one text, as ``8, 18``.

    A text stands where it covers no marker and no earlier text, if there is such a place beside its points.
    """
    found: list[list[Point]] = []
    for one in points:
        near = (those for those in found if _distance(axes, (those[0].x, those[0].y), (one.x, one.y)) < 1)
        those = next(near, None)
        if those is None:
            found.append([one])
        else:
            those.append(one)
    taken = [_box(axes, (one.x, one.y), (-MARKER, -MARKER), 2 * MARKER, 2 * MARKER) for one in points]
    labels = []
    for those in found:
        text = ", ".join(one.number for one in those)
        places = [
            _beside(axes, those, text, right=right, up=up) for right, up in itertools.product((True, False), (2, -8))
        ]
        label, box = min(places, key=lambda place: sum(_overlap(place[1], other) for other in taken))
        taken.append(box)
        labels.append(label)
    return labels


Box = tuple[float, float, float, float]
"""Left, bottom, right, top; in points of the figure."""


def _beside(axes: Axes, those: Sequence[Point], text: str, *, right: bool, up: float) -> tuple[Label, Box]:
    last = (max if right else min)(those, key=lambda one: one.x)  # so that the text covers none of them
    width = 0.55 * NUMBERED * len(text)
    label = Label((last.x, last.y), text, (4 if right else -4, up), "left" if right else "right")
    return label, _box(axes, label.at, (4 if right else -4 - width, up), width, NUMBERED)


def _box(axes: Axes, at: tuple[float, float], corner: tuple[float, float], width: float, height: float) -> Box:
    figure = axes.get_figure(root=True)
    assert figure is not None
    x, y = axes.transData.transform(at) * 72 / figure.dpi + corner
    return float(x), float(y), float(x + width), float(y + height)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _distance(axes: Axes, one: tuple[float, float], other: tuple[float, float]) -> float:
    """Return the distance of two points in sizes of a number: 10 points across, 7 up."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    across, up = np.abs(np.subtract(*axes.transData.transform([one, other]))) * 72 / figure.dpi
    return float(max(across / 10, up / 7))


def brought_in(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points far below all others stand just below them, with an arrow and their score: one collapse hides no order.

    Far is four times the distance of the quartiles below the lower one; nothing is far among fewer than six.
    """
    if len(points) < 6:
        return tuple(points)
    low, high = np.quantile([one.y for one in points], (0.25, 0.75))
    near = [one for one in points if one.y >= low - 4 * max(high - low, 1.0)]
    lowest, highest = min(one.y - (one.spread or 0) for one in near), max(one.y for one in near)
    edge = lowest - 0.1 * (highest - lowest)
    far = [one._replace(y=edge, spread=None, number=f"{one.number} ↓ {one.y:.1f}") for one in points]
    return tuple(one if one in near else moved for one, moved in zip(points, far, strict=True))


def _points(axes: Axes, points: Sequence[Point], place: int, group: str, look: dict[str, str]) -> None:
    colour = SERIES[place % len(SERIES)]
    for one in points:
        shown = look["faint"] if one.ours else colour
        if one.spread:
            axes.errorbar(one.x, one.y, one.spread, color=shown, linewidth=0.8, alpha=0.7, zorder=2)
        fill = look["ground"] if one.ours else shown
        axes.plot(
            one.x, one.y, MARKERS[place % len(MARKERS)], color=shown, markerfacecolor=fill, markersize=5, zorder=3
        )
    if points:
        shown = look["faint"] if points[0].ours else colour
        fill = look["ground"] if points[0].ours else shown
        style = {"color": shown, "markerfacecolor": fill, "markersize": 5, "linestyle": "none"}
        axes.plot([], [], marker=MARKERS[place % len(MARKERS)], label=plain(group), **style)  # type: ignore[arg-type]


def _frame(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    style_axes(axes, chart.title, chart.across, chart.upwards)
    axes.set_xscale("log")
    low, high = min(one.x for one in chart.points), max(one.x for one in chart.points)
    axes.set_xlim(low / 1.25, high * 1.45)
    marks = [mark for mark in (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32) if low / 1.25 <= mark <= high * 1.45]
    axes.set_xticks(marks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    tops, bottoms = ([one.y + sign * (one.spread or 0) for one in chart.points] for sign in (1, -1))
    margin = 0.12 * (max(tops) - min(bottoms)) or 1.0
    # Room below for the key, which takes a line for every third family.
    axes.set_ylim(min(bottoms) - margin * (1.2 + 0.6 * math.ceil(len(chart.groups) / 3)), max(tops) + margin)
    style = {"fontsize": 6.5, "frameon": False, "labelcolor": LIGHT["faint"], "handletextpad": 0.2}
    axes.legend(loc="lower center", ncol=3, columnspacing=1.0, **style)
