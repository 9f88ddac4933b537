"""Chart of each row's difference to the reference row: seeds as dots, mean, and 95 % interval of the table's tests."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from viladiff.core.colormap import SERIES
from viladiff.report.charts.themes import LIGHT, new_figure, plain, style_axes
from viladiff.report.table.comparisons import signed
from viladiff.report.table.results import Results, begun_columns, number, paper_value, summary
from viladiff.tables.claims import table_variances
from viladiff.tables.contrasts import Term
from viladiff.tables.paired import contrast_parts, t_test, untestable
from viladiff.tables.significance import cell_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"row": SERIES[0], "control": SERIES[5], "ceiling": SERIES[1]}
"""Colour of a row by its kind."""


class RowDifference(NamedTuple):
    """One row's difference to the reference in one column, in points."""

    label: str
    """Number and name."""
    kind: str
    values: tuple[float, ...]
    """By seed, over the seeds of both rows."""
    interval: tuple[float, float] | None
    """95 % interval of the table's tests; None below two seeds, and for a ceiling."""
    printed: float | None
    """The paper's difference."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


def gaps_of(results: Results) -> dict[str, list[RowDifference]]:
    """Return the rows that have a difference to the reference row, by the label of the column.

    ``results``: of all columns of the table, since intervals are those of its claims' tests. Columns without a run are
    left out.
    """
    plan, base = results.plan, results.reference
    metric = plan.table.metric
    measured = cell_samples(plan, results.records(), metric)
    known = table_variances(plan, measured)
    found: dict[str, list[RowDifference]] = {}
    for column in begun_columns(results).plan.columns:
        to = summary(results.at(base, column), metric).values
        for row in plan.rows:
            of = summary(results.at(row, column), metric).values
            if row == base or not (seeds := sorted(of.keys() & to.keys())):
                continue
            kind = "ceiling" if row in plan.ceilings else "control" if plan.table.rows[row].control else "row"
            terms = (Term(row, column, 1), Term(base, column, -1))
            interval = None
            if kind != "ceiling" and not untestable(contrast_parts(terms, measured), 2):
                interval = t_test(terms, 0.0, measured, known).interval()
            values = tuple(of[seed] - to[seed] for seed in seeds)
            label = f"{number(results, row)}  {plan.table.rows[row].label}"
            gap = RowDifference(label, kind, values, interval, _printed(results, row, column))
            found.setdefault(plan.table.columns[column].label, []).append(gap)
    return found


def _printed(results: Results, row: int, column: int) -> float | None:
    """Return the difference of the printed numbers, of the table's own metric."""
    one, other = (paper_value(results, place, column) for place in (row, results.reference))
    if isinstance(one, str) or isinstance(other, str) or one is None or other is None:
        return None
    return float(Decimal(str(one)) - Decimal(str(other)))


def bounds(gaps: Sequence[RowDifference]) -> tuple[float, float]:
    """Return the axis' limits: 0 and all rows but those farther out than four times the distance of the quartiles."""
    means = [one.mean for one in gaps]
    low, high = np.quantile(means, (0.25, 0.75))
    room = 4 * max(high - low, 0.5)
    near = [one for one in gaps if low - room <= one.mean <= high + room]
    ends = [0.0, *(end for one in near for end in (*one.values, *(one.interval or ())))]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    return float(min(ends) - margin), float(max(ends) + margin)


def draw_differences(columns: dict[str, list[RowDifference]], reference: str, metric: str) -> Figure:
    """Draw a panel a column, one below another, each with its own rows and its own axis.

    ``reference``: name of the row that differences are taken to.
    """
    longest = max(len(one.label) for gaps in columns.values() for one in gaps)
    beside = 1.05  # inches right of a panel, for its numbers
    left, width, line = 0.35 + 0.062 * longest, 3.9, 0.21  # inches
    above, below, legend = 0.33, 0.5, 0.26
    whole = left + width + beside
    height = legend + sum(above + line * len(gaps) + below for gaps in columns.values())
    figure, top = new_figure(whole, height), height
    for column, gaps in columns.items():
        tall = line * len(gaps)
        top -= above + tall
        axes = figure.add_axes((left / whole, top / height, width / whole, tall / height))
        top -= below
        _panel(axes, gaps, bounds(gaps))
        style_axes(axes, column, f"{metric} minus {reference}, points", "")
        axes.set_yticks(range(len(gaps)), [plain(one.label) for one in gaps])
        axes.tick_params(labelsize=7.5, colors=LIGHT["ink"])
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(gaps) - 0.5, -0.5)
    _legend(figure, {one.kind for gaps in columns.values() for one in gaps}, height)
    return figure


def _panel(axes: Axes, gaps: Sequence[RowDifference], ends: tuple[float, float]) -> None:
    axes.set_xlim(*ends)
    axes.axvline(0, color=LIGHT["ink"], linewidth=0.8, zorder=1)
    for place, one in enumerate(gaps):
        css = KINDS[one.kind]
        if not ends[0] <= one.mean <= ends[1]:
            left = one.mean < ends[0]
            told, side = f"{'←' if left else '→'} {signed(one.mean)}", ends[0] if left else ends[1]
            shift, align = (4, "left") if left else (-4, "right")
            at = (side, place)
            axes.annotate(
                told, at, (shift, 0), textcoords="offset points", color=css, fontsize=7, va="center", ha=align
            )
        else:
            axes.plot(one.values, [place] * len(one.values), "o", color=css, alpha=0.35, markersize=3.5, zorder=2)
            if one.interval:
                axes.plot(one.interval, [place, place], "-", color=css, linewidth=2.2, zorder=3)
            axes.plot([one.mean], [place], "|", color=css, markersize=10, markeredgewidth=2.2, zorder=4)
        said = signed(one.mean) + (f"  paper {signed(one.printed)}" if one.printed is not None else "")
        where = axes.get_yaxis_transform()
        axes.text(1.01, place, said, transform=where, fontsize=7, va="center", clip_on=False, color=LIGHT["ink"])


def words(columns: dict[str, list[RowDifference]]) -> str:
    """Describe the picture for those who do not see it."""
    return "; ".join(
        f"{column}: {', '.join(f'{one.label} {signed(one.mean)}' for one in gaps)}" for column, gaps in columns.items()
    )


def _legend(figure: Figure, kinds: set[str], height: float) -> None:
    from matplotlib.lines import Line2D

    names = {"row": "compared row", "control": "control (ours)", "ceiling": "reads true masks: no result of a method"}
    marks = [Line2D([], [], marker="s", linestyle="none", color=KINDS[k], label=names[k]) for k in KINDS if k in kinds]
    dots = Line2D([], [], marker="o", linestyle="none", color="#555555", alpha=0.5, markersize=4, label="one seed")
    mean = Line2D([], [], marker="|", color="#555555", markersize=9, markeredgewidth=2, label="mean, 95 % interval")
    figure.legend(
        handles=[dots, mean, *marks],
        loc="lower left",
        bbox_to_anchor=(0.005, 0.03 / height),
        ncol=5,
        fontsize=7,
        frameon=False,
        labelcolor=LIGHT["ink"],
        handletextpad=0.4,
        columnspacing=1.4,
    )
