"""Charts of a sweep as SVG that follows the page's colours and width; hovering names each point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from viladiff.core.colormap import SERIES
from viladiff.report.charts.figures import ticks

SIZE, WIDE = (300, 170), (760, 230)
"""Units of a small chart and of one that spans the page."""
PLAIN, BEST, LINE, PAPER = SERIES[0], SERIES[1], SERIES[2], SERIES[3]
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 12, 8, 32
Place = Callable[[float], float]


class Point(NamedTuple):
    """A place in a chart, with its spread."""

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
        """Where a value lies, 0 to 1."""
        warp = math.log if self.log else float
        return (warp(x) - warp(self.low)) / (warp(self.high) - warp(self.low))

    def marks(self) -> list[tuple[float, str]]:
        if self.names:
            return [(float(i), name) for i, name in enumerate(self.names)]
        found = ticks(self.low, self.high, self.log)
        return [(one, f"{one:g}") for one in found]


def chart(
    axis: Axis,
    words: str,
    dots: Sequence[Point] = (),
    lines: Sequence[Polyline] = (),
    size: tuple[int, int] = SIZE,
    rug: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Values over ``axis``; ``words`` are read to those who do not see it. ``rug``: places without a value."""
    (width, height), (low, high) = size, _reach(dots, lines)
    bottom = height - _BOTTOM

    def across(x: float) -> float:
        return _LEFT + axis.share(x) * (width - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return bottom - (y - low) / (high - low) * (bottom - _TOP)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" class="panel"><title>{escape(words)}</title>']
    for value in ticks(low, high, False):
        parts.append(f'<path class="grid" d="M{_LEFT} {down(value):.1f}H{width - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{down(value) + 3:.1f}" text-anchor="end">{value:g}</text>')
    for place, name in axis.marks():
        parts.append(f'<text x="{across(place):.1f}" y="{bottom + 13}" text-anchor="middle">{escape(name)}</text>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle:.0f}" y="{height - 4}" text-anchor="middle">{escape(axis.name)}</text>'
    )
    for place, text in rug:
        title = f"<title>{escape(text)}</title>"
        stroke = f'M{across(place):.1f} {bottom}v-6" stroke="{PLAIN}"'
        parts.append(f'<path class="rug" d="{stroke}>{title}</path>')
    for line in lines:
        parts += _line(line, across, down)
    for dot in dots:
        parts += _dot(dot, across, down)
    return Markup("".join([*parts, "</svg>"]))


def _reach(dots: Sequence[Point], lines: Sequence[Polyline]) -> tuple[float, float]:
    ends = [end for dot in dots for end in (dot.y, dot.low, dot.high) if end is not None]
    for line in lines:
        off = line.band or [0.0] * len(line.points)
        ends += [y + sign * one for (_, y), one in zip(line.points, off, strict=True) for sign in (-1, 1)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _line(line: Polyline, across: Place, down: Place) -> list[str]:
    def joined(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)

    parts = []
    if line.band:
        off = list(zip(line.points, line.band, strict=True))
        around = [(x, y + one) for (x, y), one in off] + [(x, y - one) for (x, y), one in reversed(off)]
        parts.append(f'<polygon points="{joined(around)}" fill="{line.colour}" opacity=".18"/>')
    style = ' stroke-dasharray="4 3"' * line.dashed + ' opacity=".35"' * line.faint
    title = f"<title>{escape(line.words)}</title>" if line.words else ""
    parts.append(f'<polyline points="{joined(line.points)}" stroke="{line.colour}"{style}>{title}</polyline>')
    return parts


def _dot(dot: Point, across: Place, down: Place) -> list[str]:
    x, parts = across(dot.x), []
    if dot.low is not None and dot.high is not None and dot.high > dot.low:
        parts.append(
            f'<path d="M{x:.1f} {down(dot.low):.1f}V{down(dot.high):.1f}" stroke="{dot.colour}" opacity=".5"/>'
        )
    paint = f'fill="none" stroke="{dot.colour}"' if dot.hollow else f'fill="{dot.colour}"'
    title = f"<title>{escape(dot.words)}</title>"
    parts.append(f'<circle cx="{x:.1f}" cy="{down(dot.y):.1f}" r="3" {paint}>{title}</circle>')
    return parts


class ParallelLine(NamedTuple):
    """A point in parallel coordinates: its place on each axis, 0 to 1."""

    shares: Sequence[float]
    words: str
    rank: float
    """0 for the worst to 1 for the best."""
    colour: str = ""
    """Instead of that of its rank."""


def parallel(axes: Sequence[Axis], threads: Sequence[ParallelLine], words: str) -> Markup:
    """One upright axis a dimension, a line a point; better ones are stronger, and drawn later."""
    width, height = max(WIDE[0], 84 * len(axes)), 260
    top, bottom = 26, height - 12
    places = [24 + i * (width - 90) / max(1, len(axes) - 1) for i in range(len(axes))]
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" class="panel wide"><title>{escape(words)}</title>']
    for thread in sorted(threads, key=lambda one: (bool(one.colour), one.rank)):
        joined = " ".join(
            f"{x:.1f},{bottom - share * (bottom - top):.1f}" for x, share in zip(places, thread.shares, strict=True)
        )
        mixed = f"color-mix(in srgb, var(--accent) {10 + 90 * thread.rank:.0f}%, var(--line))"
        style = f"stroke:{thread.colour or mixed};stroke-width:{2.4 if thread.colour else 1.1}"
        parts.append(f'<polyline points="{joined}" style="{style}"><title>{escape(thread.words)}</title></polyline>')
    for x, axis in zip(places, axes, strict=True):
        parts.append(f'<path class="upright" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(f'<text class="axis" x="{x - 3:.1f}" y="12" text-anchor="start">{escape(axis.name)}</text>')
        for place, name in axis.marks():
            y = bottom - axis.share(place) * (bottom - top)
            parts.append(f'<text x="{x + 4:.1f}" y="{y + 3:.1f}">{escape(name)}</text>')
    return Markup("".join([*parts, "</svg>"]))
