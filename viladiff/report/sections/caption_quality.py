"""Page section on captions: mIoU against the captions' recall, and both streams of every row.

Used by specs with ``page = "captions"``. The curve's rows are those that differ from the headline's in
``data.caption_recall`` alone, and the one without captions, at 0; the lines are rows of other methods.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from viladiff.core.colormap import SERIES
from viladiff.report.charts.themes import LIGHT, new_figure, plain, save_drawn, style_axes, uri
from viladiff.report.markup import markdown
from viladiff.report.sections.leaderboard import CostChart
from viladiff.report.table.comparisons import signed
from viladiff.report.table.results import CEILING, Results, Summary, difference, number, row_name, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECALL = "data.caption_recall"
CAPTIONS = "data.captions"
STREAMS = ("visual", "fusion")
DASHES = ("--", ":", "-.", (0, (5, 1)), (0, (1, 3)), (0, (3, 1, 1, 1)))


class DoseLine(NamedTuple):
    """Both streams of a row of the headline's method."""

    number: str
    label: str
    recall: float | None
    """None where the row differs from the headline's in more than this."""
    found: tuple[tuple[Summary, ...], ...]
    """By column of the table, then by ``STREAMS``."""


class DosePoint(NamedTuple):
    """A place of the curve."""

    recall: float
    mean: float
    error: float | None
    """Half the 95 % interval of the difference to the headline's row, paired by seed; None for that row itself, and
    below two common seeds."""


class Level(NamedTuple):
    """A row of another method."""

    label: str
    found: tuple[Summary, ...]
    """By column."""


class Dose(NamedTuple):
    said: tuple[str, ...]
    lines: tuple[DoseLine, ...]
    headline: str
    pictures: tuple[CostChart, ...]
    files: tuple[str, ...]
    """Names of the pictures below figures/."""


def dose(results: Results, out: Path) -> Dose | None:
    """Compute all values of the template; None if the spec does not request them. Writes figures below ``out``."""
    table = results.plan.table
    if table.page != "captions":
        return None
    base = _fields(results, results.headline)
    mine = [row for row in results.rows() if _fields(results, row).get("method.name") == base.get("method.name")]
    lines = tuple(_line(results, row, base) for row in mine if not (table.rows[row].stream or table.rows[row].network))
    columns = results.plan.columns
    levels = tuple(
        Level(row_name(results, row), tuple(summary(results.at(row, column), "miou") for column in columns))
        for row in results.rows()
        if row not in mine
    )
    head = next((line for line in lines if line.number == number(results, results.headline)), None)
    ranked = [level for level in levels if CEILING not in level.label]
    said = [] if head is None else [_said(table.columns[c].label, i, head, ranked) for i, c in enumerate(columns)]
    pictures, files = _pictures(results, lines, head, levels, out / "figures")
    return Dose(tuple(said), lines, row_name(results, results.headline), pictures, files)


def _fields(results: Results, row: int) -> Mapping[str, Any]:
    """Return the changed fields of a row's first run; empty if it has none."""
    plan = results.plan
    name = next((name for column in plan.columns for name in plan.run_ids(row, column)), None)
    return {} if name is None else plan.runs[name].changed


def _line(results: Results, row: int, base: Mapping[str, Any]) -> DoseLine:
    mine = _fields(results, row)
    same, wanted = ({k: v for k, v in of.items() if k not in (RECALL, CAPTIONS)} for of in (mine, base))
    recall = None
    if same == wanted and mine.get(CAPTIONS) == "none":
        recall = 0.0
    elif same == wanted and mine.get(CAPTIONS) == base.get(CAPTIONS):
        recall = mine.get(RECALL, results.plan.default(mine, RECALL))
    found = tuple(
        tuple(summary(results.at(row, column), "miou", stream=stream) for stream in STREAMS)
        for column in results.plan.columns
    )
    return DoseLine(number(results, row), row_name(results, row), recall, found)


def _said(column: str, place: int, head: DoseLine, levels: Sequence[Level]) -> str:
    """Format the headline's streams minus the best of the other methods, over the seeds that both have."""
    visual, fusion = head.found[place]
    compared = [(gap.mean, level) for level in levels if (gap := difference(visual, level.found[place]))]
    if not compared:
        return f"{column}: not measured yet."
    best = min(compared, key=lambda one: one[0])[1]  # at the seeds of both, since rows may have unlike ones
    of = f"the best of {len(compared)} baseline{'s' if len(compared) > 1 else ''}, {best.label} ({best.found[place]})"
    rest = f"; {len(levels) - len(compared)} not measured yet" if len(compared) < len(levels) else ""
    gaps = [difference(one, best.found[place]) for one in (visual, fusion)]
    told = [
        f"{name} {one} mIoU, {signed(gap.mean) if gap else '—'} points"
        for name, one, gap in zip(
            ("visual stream", "fusion stream, which reads captions,"), (visual, fusion), gaps, strict=True
        )
    ]
    return f"{column}: {head.label}'s {told[0]} to {of}{rest}. Apart from that, {told[1]} to it."


# Pictures


def _pictures(
    results: Results, lines: Sequence[DoseLine], head: DoseLine | None, levels: Sequence[Level], folder: Path
) -> tuple[tuple[CostChart, ...], tuple[str, ...]]:
    """Draw a figure for each column in which two points of the curve are measured at a common seed."""
    found, files = [], []
    for place, column in enumerate(results.plan.columns):
        of = [line for line in lines if line.recall is not None and line.found[place][0].values]
        beside = [level for level in levels if level.found[place].values]
        seeds = _common([line.found[place][0] for line in of] + [level.found[place] for level in beside])
        if len(of) < 2 or not seeds:
            continue
        curves = {stream: _curve(of, head, place, i, seeds) for i, stream in enumerate(STREAMS)}
        means = [(level.label, _mean(level.found[place], seeds)) for level in beside]
        title = f"{results.plan.table.columns[column].label}, mean of {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        numbers: list[Any] = [title, curves, means]

        def picture(title: str = title, curves: Any = curves, means: Any = means) -> Figure:
            return draw_dose(title, curves, means)

        paths = save_drawn(numbers, picture, folder, f"captions-{place + 1}")
        points = [f"{stream} {one.mean:.1f} at {one.recall:g}" for stream, curve in curves.items() for one in curve]
        words = "; ".join([*points, *(f"{label} {mean:.1f}" for label, mean in means)])
        light, dark = (uri(paths[theme]) for theme in ("light", "dark"))
        found.append(CostChart(title, light, dark, f"mIoU (%) against recall of captions, {title}. {words}"))
        files += [path.name for path in paths.values()]
    return tuple(found), tuple(files)


def _common(found: Iterable[Summary]) -> set[int]:
    """Return the seeds that all have: a point of other seeds would have other labelled images."""
    each = [set(one.values) for one in found]
    return set.intersection(*each) if each else set()


def _mean(of: Summary, seeds: Iterable[int]) -> float:
    return statistics.fmean(of.values[seed] for seed in sorted(seeds))


def _curve(
    lines: Sequence[DoseLine], head: DoseLine | None, place: int, stream: int, seeds: set[int]
) -> list[DosePoint]:
    """Return the points by recall; a stream may lack some of them."""
    found = []
    for line in lines:
        one = line.found[place][stream]
        if line.recall is not None and seeds <= one.values.keys():
            other = None if head is None or line is head else head.found[place][stream]
            found.append(DosePoint(line.recall, _mean(one, seeds), None if other is None else _error(one, other)))
    return sorted(found)


def _error(one: Summary, other: Summary) -> float | None:
    from scipy import stats

    seeds = one.values.keys() & other.values.keys()
    if len(seeds) < 2:
        return None
    spread = statistics.stdev(one.values[seed] - other.values[seed] for seed in sorted(seeds))
    return float(stats.t.isf(0.025, len(seeds) - 1)) * spread / math.sqrt(len(seeds))


def draw_dose(
    title: str,
    curves: Mapping[str, Sequence[DosePoint]],
    levels: Sequence[tuple[str, float]],
) -> Figure:
    """Draw the light figure: a curve a stream with intervals of differences, a level a row of another method."""
    figure = new_figure(6.4, 4.2)
    axes = figure.add_axes((0.09, 0.12, 0.89, 0.8))
    style_axes(axes, title, "recall of captions", "mIoU (%)")
    for place, (stream, curve) in enumerate(curves.items()):
        if not curve:
            continue
        x, y, bars = zip(*((one.recall, one.mean, one.error or 0.0) for one in curve), strict=True)
        axes.errorbar(x, y, bars, color=SERIES[place], marker="os"[place], markersize=5, label=stream, zorder=3)
    for place, (label, mean) in enumerate(levels):
        dashes = DASHES[place % len(DASHES)]
        axes.axhline(mean, color=LIGHT["faint"], linewidth=1, linestyle=dashes, label=plain(label))
    axes.legend(loc="best", fontsize=7, frameon=False, labelcolor=LIGHT["faint"])
    return figure


# Plain text


def dose_markdown(found: Dose | None, columns: Sequence[str]) -> dict[str, list[str]]:
    """Return the section of table.md."""
    if found is None:
        return {}
    heads = ["row", "recall", *(f"{stream}, {column}" for column in columns for stream in STREAMS)]
    grid = [heads, *(list(_cells(line)) for line in found.lines)]
    pipes = ["| " + " | ".join(markdown(cell) for cell in row) + " |" for row in grid]
    said = [f"- {markdown(text)}" for text in found.said]
    return {"What captions bring": [*said, "", pipes[0], "|" + " --- |" * len(heads), *pipes[1:]]}


def _cells(line: DoseLine) -> Iterator[str]:
    yield f"{line.number} {line.label}"
    yield "—" if line.recall is None else f"{line.recall:g}"
    for streams in line.found:
        yield from map(str, streams)
