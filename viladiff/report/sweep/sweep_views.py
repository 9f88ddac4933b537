"""Data of the charts on a sweep's page. Trials are compared at the full length alone, but for the chart of rungs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from viladiff.core.messages import format_seconds
from viladiff.report.charts.sweep_figures import (
    BEST,
    LINE,
    PAPER,
    PLAIN,
    WIDE,
    Axis,
    ParallelChart,
    ParallelLine,
    Point,
    Polyline,
    TrialChart,
)
from viladiff.sweeps.space import Dimension
from viladiff.sweeps.spec import PaperCurve, Sweep
from viladiff.sweeps.summary import TrialRow, best_so_far, local_mean, trained
from viladiff.sweeps.trials import Trial

DRAWN = 300
"""Trials that a chart shows at most."""


def last(path: str) -> str:
    """Return a field without its sections."""
    return path.rpartition(".")[2]


def short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _axis(path: str, dimension: Dimension) -> Axis:
    if dimension.choices:
        return Axis(-0.5, len(dimension.choices) - 0.5, last(path), names=tuple(map(str, dimension.choices)))
    low, high = (float(end) for end in dimension.ends)
    return Axis(low, high, last(path), dimension.log)


def _place(dimension: Dimension, value: Any) -> float:
    return float(dimension.choices.index(value)) if dimension.choices else float(value)


def _who(row: TrialRow, best: TrialRow) -> tuple[str, str]:
    """Colour and word of a completed trial."""
    if row.number == best.number:
        return BEST, "best" + ", the first point" * (row.origin == "paper")
    return (PAPER, "the first point") if row.origin == "paper" else (PLAIN, row.origin)


def _ranked(every: Sequence[TrialRow], most: int = DRAWN) -> list[TrialRow]:
    """Return completed trials, worst first; of very many, the best and an even selection of the rest."""
    found = sorted(
        (row for row in every if row.rank is not None and row.mean is not None), key=lambda row: row.rank or 0
    )
    if len(found) > most:
        top, rest = found[: most // 2], found[most // 2 :]
        found = top + rest[:: -(-len(rest) // (most // 2))]
    return found[::-1]


def response(sweep: Sweep, path: str, every: Sequence[TrialRow], best: TrialRow) -> tuple[TrialChart, float | None]:
    """Completed trials along one dimension, mean and range over seeds, with a local mean where it holds numbers.

    Also returns the width of that mean's kernel, as a share of the dimension.
    """
    dimension, axis = sweep.space[path], _axis(path, sweep.space[path])
    done, dots, lines = [row for row in every if row.rank is not None and row.mean is not None], [], []
    smooth = None
    if not dimension.choices:
        smooth = local_mean([dimension.unit(row.point[path]) for row in done], [row.mean or 0.0 for row in done])
    if smooth is not None:
        points = [(_along(axis, share), mean) for share, mean in zip(smooth.at, smooth.mean, strict=True)]
        lines.append(Polyline(points, words="local mean", band=[2 * error for error in smooth.error]))
    reference = next((row.mean for row in done if row.origin == "paper"), None)
    if reference is not None:
        words = f"the first point scored {reference:.2f}"
        lines.append(Polyline([(axis.low, reference), (axis.high, reference)], PAPER, words, dashed=True, faint=True))
    for row in _ranked(every):
        colour, who = _who(row, best)
        words = f"trial {row.number} ({who}, {row.seeds} seeds): {path} = {short(row.point[path])}, {row.mean:.2f}"
        dots.append(Point(_place(dimension, row.point[path]), row.mean or 0.0, words, colour, row.low, row.high))
    stopped = [row for row in every if row.state == "pruned"][-DRAWN:]
    rug = [_place(dimension, row.point[path]) for row in stopped]
    words = f"mIoU of completed trials along {path}" + (f", {len(rug)} stopped early" if rug else "")
    return TrialChart(axis, words, dots, lines, rug=rug), smooth.width if smooth else None


def _along(axis: Axis, share: float) -> float:
    """Return the value at a fraction of a numeric axis."""
    if axis.log:
        return axis.low * (axis.high / axis.low) ** share
    return axis.low + (axis.high - axis.low) * share


def printed(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the paper's values along a dimension: a chart relative to its own value, and the numbers."""
    found = []
    for path in sweep.space:
        curves = [curve for curve in sweep.paper if curve.field == path]
        lines, dots = [], []
        for curve in curves:
            line, some = _printed_line(sweep, curve)
            lines += line
            dots += some
        if lines:
            words = f"Numbers that the paper prints along {path}, as differences to its own value"
            places = list(dict.fromkeys(at for curve in curves for at in curve.at))
            numbers = [
                (curve.label, [dict(zip(curve.at, curve.miou, strict=True)).get(at, "-") for at in places])
                for curve in curves
            ]
            found.append(
                {
                    "path": path,
                    "at": places,
                    "numbers": numbers,
                    "chart": TrialChart(_axis(path, sweep.space[path]), words, dots, lines, upwards="points of mIoU"),
                }
            )
    return found


def _printed_line(sweep: Sweep, curve: PaperCurve) -> tuple[list[Polyline], list[Point]]:
    """Return one printed curve, in points above its value at the paper's choice."""
    dimension = sweep.space[curve.field]
    known = {at: float(miou) for at, miou in zip(curve.at, curve.miou, strict=True) if miou != "-"}
    base = known.get(sweep.initial_point[curve.field])
    if base is None:
        return [], []
    points = [(_place(dimension, at), miou - base) for at, miou in known.items()]
    dots = [
        Point(x, y, f"{curve.label}: {last(curve.field)} = {x:g}, {y + base:g} (printed), {y:+.1f}", PAPER)
        for x, y in points
    ]
    return [Polyline(points, PAPER, curve.label, faint=True)], dots


def threads(sweep: Sweep, every: Sequence[TrialRow], best: TrialRow) -> ParallelChart:
    """Chart completed trials across all dimensions and their mIoU."""
    done = _ranked(every)
    low, high = min(row.mean or 0.0 for row in done), max(row.mean or 0.0 for row in done)
    score = Axis(low, high if high > low else low + 1, "mIoU (%)")
    axes = [_axis(path, dimension) for path, dimension in sweep.space.items()]
    threads = []
    for place, row in enumerate(done):
        colour, who = _who(row, best)
        shares = [
            axis.share(_place(sweep.space[path], row.point[path])) for path, axis in zip(sweep.space, axes, strict=True)
        ]
        words = f"trial {row.number} ({who}): {row.mean:.2f}"
        rank = place / max(1, len(done) - 1)
        threads.append(
            ParallelLine([*shares, score.share(row.mean or 0.0)], words, rank, "" if colour == PLAIN else colour)
        )
    return ParallelChart([*axes, score], "Completed trials across all dimensions, and their mIoU", threads)


def history(every: Sequence[TrialRow], trials: Sequence[Trial]) -> TrialChart | None:
    """Completed trials by number, and the best of them so far."""
    best = best_so_far(trials)
    if not best:
        return None
    dots = [
        Point(
            float(row.number),
            row.mean or 0.0,
            f"trial {row.number} ({row.origin}): {row.mean:.2f}",
            PLAIN,
            row.low,
            row.high,
        )
        for row in _ranked(every)
    ]
    end = max(1.0, float(len(trials) - 1))
    return TrialChart(Axis(0.0, end, "trial"), "Completed trials in their order", dots, [_stairs(best, end)], WIDE)


def _stairs(best: Sequence[tuple[float, float]], end: float) -> Polyline:
    points: list[tuple[float, float]] = []
    for x, y in best:
        points += [(x, points[-1][1])] if points else []
        points.append((x, y))
    return Polyline([*points, (end, points[-1][1])], LINE, f"best so far: {points[-1][1]:.2f}")


def cost(trials: Sequence[Trial], full: int) -> TrialChart:
    """Chart the best so far against the steps that it took to find it."""
    total = dict(trained(trials, full))
    best = [(total[number] / 1000, mean) for number, mean in best_so_far(trials)]
    end = max(total.values()) / 1000
    return TrialChart(
        Axis(0.0, end * 1.02, "thousand steps trained"), "Best so far by steps trained", [], [_stairs(best, end)]
    )


def minutes(every: Sequence[TrialRow], best: TrialRow) -> TrialChart | None:
    """Score of each completed trial against the time that its runs trained."""
    timed = [row for row in _ranked(every) if row.seconds]
    if not timed:
        return None
    dots = [
        Point(
            (row.seconds or 0) / 60,
            row.mean or 0.0,
            f"trial {row.number}: {row.mean:.2f} after {format_seconds(row.seconds)}",
            _who(row, best)[0],
        )
        for row in timed
    ]
    return TrialChart(
        Axis(0.0, max(dot.x for dot in dots) * 1.05, "minutes of training"), "mIoU against minutes of training", dots
    )


def climbs(trials: Sequence[Trial], steps: Sequence[int]) -> TrialChart | None:
    """Chart the first seed of each trial from rung to rung; where it was stopped, its last place is hollow."""
    own = [trial for trial in trials if trial.twin is None and trial.rungs]
    if not own or len(steps) < 2:
        return None
    own = own[:: -(-len(own) // DRAWN)]
    lines, dots = [], []
    for trial in own:
        points = [(float(rung.step), 100 * rung.value) for rung in trial.rungs]
        end = "" if trial.state == "complete" else f", {trial.state}"
        words = f"trial {trial.number}{end}: " + ", ".join(f"{y:.2f} at step {x:g}" for x, y in points)
        lines.append(Polyline(points, PLAIN, words, faint=True))
        dots.append(Point(*points[-1], words, PLAIN, hollow=trial.state != "complete"))
    return TrialChart(Axis(0.0, float(steps[-1]) * 1.03, "step"), "First seed of each trial by step", dots, lines, WIDE)
