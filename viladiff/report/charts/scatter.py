"""Accuracy against cost as a picture: every point has its name, no two names overlap, once light and once dark."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from viladiff.core.atomic import write_atomically
from viladiff.core.colormap import SERIES
from viladiff.core.hashing import sha256_hex

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*hp"
THEMES = {
    "light": {"ink": "#1b1c20", "faint": "#585b64", "line": "#e0e0da", "ground": "#ffffff"},
    "dark": {"ink": "#e9e9eb", "faint": "#a5a8b1", "line": "#33363d", "ground": "#131417"},
}
"""As in page.css."""
REACH = (7, 11, 16, 22, 29, 37, 46, 56, 67, 80, 95, 112)
"""How far a name may be from its point, in points of 1/72 inch, nearest first."""
_FORM = 2
"""Raised when the same numbers are drawn otherwise."""
TURNS = 2 * math.pi * np.array([0, 8, 1, 15, 2, 14, 7, 9, 3, 13, 6, 10, 4, 12, 5, 11]) / 16
"""Directions, beside the point first."""
WAYS = np.array([(reach * math.cos(turn), reach * math.sin(turn)) for reach in REACH for turn in TURNS])
SIZE = 6.8
"""Of a name, in points."""


class Point(NamedTuple):
    x: float
    y: float
    spread: float | None
    """Standard deviation of y; None with a single seed."""
    label: str
    group: int
    """Colour and marker."""
    ours: bool = False
    """A control or a reference: hollow."""


class Chart(NamedTuple):
    """One picture."""

    title: str
    across: str
    upwards: str
    points: tuple[Point, ...]
    groups: tuple[str, ...]


def save(chart: Chart, folder: Path, name: str) -> dict[str, Path]:
    """Writes ``<name>-light.svg`` and ``<name>-dark.svg``; what was drawn from the same numbers is left as it is."""
    return save_drawn(chart, lambda: draw(chart), folder, name)


def save_drawn(numbers: object, picture: Callable[[], Figure], folder: Path, name: str) -> dict[str, Path]:
    """``save`` for a light picture of any kind; ``numbers`` are all that it is drawn from, as JSON takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = sha256_hex(json.dumps([_FORM, numbers]))
    paths = {theme: folder / f"{name}-{theme}.svg" for theme in THEMES}
    old = [path for path in paths.values() if not path.is_file() or digest not in _head(path)]
    drawn = _svg(picture(), digest) if old else ""
    for theme, path in paths.items():
        if path in old:
            write_atomically(path, _coloured(drawn, theme).encode())
    return paths


def _head(path: Path) -> str:
    """Where a file says what it was drawn from."""
    return path.read_text(encoding="utf-8", errors="replace")[:2000]


def _coloured(svg: str, theme: str) -> str:
    """A light picture in another theme: its colours are exchanged, which takes no time."""
    for name, colour in THEMES["light"].items():
        svg = svg.replace(colour, THEMES[theme][name])
    return svg


def _svg(figure: Figure, digest: str) -> str:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "viladiff", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Description": digest}, facecolor="auto")
    return buffer.getvalue().decode()


def draw(chart: Chart) -> Figure:
    """The light picture; the more points, the taller."""
    chart = chart._replace(points=brought_in(chart.points))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it keeps figures and picks a display

    look = THEMES["light"]
    figure = Figure(figsize=(6.4, 4.2 + 0.06 * max(0, len(chart.points) - 12)), facecolor=look["ground"])
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.12, 0.89, 0.8), facecolor=look["ground"])
    for place, group in enumerate(chart.groups):
        _points(axes, [one for one in chart.points if one.group == place], place, group, look)
    _frame(axes, chart, look)
    _name(axes, chart.points, look)
    return figure


def brought_in(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points far below all others stand just below them, with their number and an arrow: one collapse hides no order.

    Far is four times the distance of the quartiles below the lower one; nothing is far among fewer than six.
    """
    if len(points) < 6:
        return tuple(points)
    low, high = np.quantile([one.y for one in points], (0.25, 0.75))
    near = [one for one in points if one.y >= low - 4 * max(high - low, 1.0)]
    lowest, highest = min(one.y - (one.spread or 0) for one in near), max(one.y for one in near)
    edge = lowest - 0.1 * (highest - lowest)
    return tuple(
        one if one in near else one._replace(y=edge, spread=None, label=f"{one.label} ↓ {one.y:.1f}") for one in points
    )


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
        axes.plot([], [], marker=MARKERS[place % len(MARKERS)], label=_plain(group), **style)  # type: ignore[arg-type]


def _frame(axes: Axes, chart: Chart, look: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

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
    axes.grid(color=look["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=look["faint"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(look["line"])
    axes.set_title(_plain(chart.title), fontsize=9, color=look["ink"], loc="left")
    axes.set_xlabel(_plain(chart.across), fontsize=8, color=look["faint"])
    axes.set_ylabel(_plain(chart.upwards), fontsize=8, color=look["faint"])
    style = {"fontsize": 6.5, "frameon": False, "labelcolor": look["faint"], "handletextpad": 0.2}
    axes.legend(loc="lower center", ncol=3, columnspacing=1.0, **style)


def _name(axes: Axes, points: Sequence[Point], look: dict[str, str]) -> None:
    """Names beside their points, as ``offsets`` places them, with a line where one had to go far."""
    ordered = sorted(points, key=lambda one: (-one.y, one.x))
    for one, (x, y) in zip(ordered, offsets(axes, ordered), strict=True):
        far = math.hypot(x, y) > REACH[1]
        line = {"arrowstyle": "-", "color": look["faint"], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            _plain(one.label),
            (one.x, one.y),
            (x, y),
            textcoords="offset points",
            ha=("right", "center", "left")[_side(x) + 1],
            va=("top", "center", "bottom")[_side(y) + 1],
            fontsize=SIZE,
            color=look["faint"] if one.ours else look["ink"],
            arrowprops=line if far else None,
            zorder=4,
        )


def offsets(axes: Axes, points: Sequence[Point]) -> list[tuple[float, float]]:
    """Where each name goes, from its point, in points of 1/72 inch: the nearest place of ``REACH`` that is free.

    Taken are points with their spreads, the key and the names before. Where no place is free, it is the one that the
    least is lost at.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    legend, unit = axes.get_legend(), figure.dpi / 72
    boxes = [_around(axes, one) for one in points]
    boxes += [list(legend.get_window_extent(renderer).extents)] if legend else []
    taken, found = np.array(boxes), []
    for one in points:
        text = axes.text(0, 0, _plain(one.label), fontsize=SIZE)
        extent = text.get_window_extent(renderer)
        text.remove()
        here = _boxes(axes.transData.transform((one.x, one.y)), WAYS * unit, (extent.width, extent.height))
        best = int(np.argmin(_overlap(here, taken) + 1e3 * _outside(here, np.asarray(axes.bbox.extents))))
        taken = np.concatenate([taken, here[best : best + 1]])
        found.append((float(WAYS[best, 0]), float(WAYS[best, 1])))
    return found


def _boxes(at: np.ndarray, shifts: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """(n, 4) left, bottom, right, top of a name of that size at each shift from a point, with a pixel around it."""
    sides = np.array([[_side(x), _side(y)] for x, y in WAYS.tolist()])
    low = at + shifts + np.array(size) * (sides - 1) / 2
    return np.concatenate([low - 1, low + size + 1], 1)


def _side(offset: float) -> int:
    """Whether a name begins there (1), is centred (0) or ends (-1)."""
    return (offset > 3) - (offset < -3)


def _overlap(boxes: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """(n,) area that each box shares with those that are taken."""
    low = np.maximum(boxes[:, None, :2], taken[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], taken[None, :, 2:])
    return (high - low).clip(min=0).prod(2).sum(1)


def _outside(boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """(n,) by how many pixels each box leaves the frame."""
    return (frame[:2] - boxes[:, :2]).clip(min=0).sum(1) + (boxes[:, 2:] - frame[2:]).clip(min=0).sum(1)


def _around(axes: Axes, one: Point) -> list[float]:
    """A point with its spread, in pixels."""
    spread = one.spread or 0.0
    (x, low), (_, high) = axes.transData.transform([(one.x, one.y - spread), (one.x, one.y + spread)])
    return [x - 4, low - 4, x + 4, high + 4]


def _plain(text: str) -> str:
    """matplotlib takes text between two dollars for mathematics."""
    return text.replace("$", r"\$")
