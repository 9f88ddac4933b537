"""The paper's numbers, the published runs and this machine's runs side by side, with criteria for the last.

A scale with ``published_runs`` trains few of a table's cells; the committed records of all are beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from viladiff.core.installation import checkout
from viladiff.report import provenance
from viladiff.report.markup import markdown
from viladiff.report.provenance import Origin
from viladiff.report.table.comparisons import signed
from viladiff.report.table.exports import latex, paper_text, pipes
from viladiff.report.table.long_form import to_rows
from viladiff.report.table.results import (
    CEILING,
    Difference,
    Results,
    Summary,
    begun_columns,
    difference,
    headline_sentence,
    number,
    paper_value,
    row_name,
    summary,
    swapped,
)
from viladiff.tables.spec import Criterion

HEADING = "Paper, published runs, this machine"
RECORDS = "records"
"""Stands for this machine's number where none is trained here and a published one is there."""


@dataclass(frozen=True)
class SideBySide:
    """Results of one table twice: of this machine's runs, and of committed records alone."""

    here: Results
    published: Results
    origins: tuple[Origin, ...] = ()
    """Where the published numbers come from."""

    @property
    def any_published(self) -> bool:
        return bool(self.published.records())

    @property
    def rows(self) -> tuple[int, ...]:
        """Places of the rows of either, the paper's first."""
        table = self.here.plan.table
        every = dict.fromkeys((*self.published.plan.rows, *self.here.plan.rows))
        return tuple(sorted(every, key=lambda row: (table.rows[row].control, row)))

    @property
    def columns(self) -> tuple[int, ...]:
        """Places of the columns of either; of the published ones those with a run, if there are runs."""
        return tuple(sorted({*begun_columns(self.published).plan.columns, *self.here.plan.columns}))

    def trained(self, row: int, column: int) -> bool:
        """Return whether the cell is trained on this machine."""
        return bool(self.here.at(row, column))


class Number(NamedTuple):
    """A mean over seeds in percent, and its difference to the reference row over the seeds of both."""

    found: Summary
    gap: Difference | None

    @property
    def seeds(self) -> str:
        return ", ".join(f"seed {seed}: {value:.2f}" for seed, value in sorted(self.found.values.items()))


class BesideCell(NamedTuple):
    """One row in one column of the table, by three sources; ``paper`` is as printed, empty for a row of ours."""

    paper: str
    paper_gap: float | None
    published: Number
    here: Number
    trained: bool

    @property
    def own(self) -> str:
        """This machine's number in words, or what stands for it."""
        if self.trained:
            return str(self.here.found)
        return RECORDS if self.published.found.mean is not None else "—"


class BesideRow(NamedTuple):
    number: str
    label: str
    control: bool
    trained: bool
    """In some column."""
    cells: tuple[BesideCell, ...]


def both_rows(both: SideBySide) -> list[BesideRow]:
    """Return every row of the table."""
    table = both.here.plan.table
    return [
        BesideRow(
            number(both.here, row),
            _name(both, row),
            table.rows[row].control,
            any(both.trained(row, column) for column in both.columns),
            tuple(_cell(both, row, column) for column in both.columns),
        )
        for row in both.rows
    ]


def _name(both: SideBySide, row: int) -> str:
    """Return a row's label, with a mark if its runs read true masks, even on this machine alone."""
    if row in both.here.plan.ceilings - both.published.plan.ceilings:
        return f"{both.here.plan.table.rows[row].label} (this machine: {CEILING})"
    return row_name(both.published, row)


def _cell(both: SideBySide, row: int, column: int) -> BesideCell:
    paper, base = (paper_value(both.here, place, column) for place in (row, both.published.reference))
    both_printed = isinstance(paper, float | int) and isinstance(base, float | int)
    gap = paper - base if both_printed and row != both.published.reference else None  # type: ignore[operator]
    there, here = (_number(one, row, both.published.reference, column) for one in (both.published, both.here))
    return BesideCell(paper_text(paper), gap, there, here, both.trained(row, column))


def _number(results: Results, row: int, reference: int, column: int) -> Number:
    found, base = (summary(results.at(place, column), results.plan.table.metric) for place in (row, reference))
    return Number(found, None if row == reference else difference(found, base))


# What it says


def no_records() -> str:
    """Say why there is no published number."""
    if checkout() is None:
        return "Published records are part of the source checkout, and this installation has none."
    return "No published records of this table are there yet."


def headline_of_both(both: SideBySide) -> str:
    """Return the page's first sentence: the published numbers, the paper's differences to them, this machine's."""
    if not both.any_published:
        return f"{no_records()} On this machine {_reached(both, both.here, True)}"
    published, here = _reached(both, both.published, True), _reached(both, both.here, False)
    return f"In the published runs {published} On this machine {here}"


def _reached(both: SideBySide, results: Results, with_paper: bool) -> str:
    """Describe the headline's score and its difference to the reference, as the end of a sentence."""
    table, row, base = both.here.plan.table, both.published.headline, both.published.reference
    said = []
    for column in results.plan.columns:
        there = _number(results, row, base, column)
        if there.found.mean is not None:
            where = f"{there.found} on {table.columns[column].label}"
            apart = "" if there.gap is None else f", {_against(there.gap.mean)} {table.rows[base].label}"
            paper = _cell(both, row, column).paper_gap
            note = f" (paper: {_against(paper)})" if with_paper and paper is not None else ""
            said.append(where + apart + note)
    if not said:
        return headline_sentence(results)[:1].lower() + headline_sentence(results)[1:]
    return f"{row_name(results, row)} (row {number(both.here, row)}) reaches {'; '.join(said)}."


def _against(gap: float) -> str:
    return "level with" if abs(gap) < 0.05 else f"{abs(gap):.1f} {'above' if gap > 0 else 'below'}"


def sources(both: SideBySide) -> list[tuple[str, str]]:
    """Return each of the three columns with the source of its numbers."""
    pairs = dict.fromkeys(filter(None, (swapped(both.here, column) for column in both.columns)))
    paper = f"as printed, on {' and '.join(asked for asked, _ in pairs)}" if pairs else "as printed"
    stand = " and ".join(ours for _, ours in pairs)
    paper += f"; the other two are on {stand}, so compare differences, not levels" if stand else ""
    records = len(both.published.records())
    every = sum(both.published.counts().values())
    published = f"{records} of {every} runs of scale {both.published.plan.scale}, from committed records"
    return [
        ("Paper", paper),
        ("Published", f"{published}{_made(both.published)}" if records else no_records().rstrip(".").lower()),
        ("This machine", f"{len(both.here.records())} of {sum(both.here.counts().values())} runs{_made(both.here)}"),
    ]


def _made(results: Results) -> str:
    """Describe steps, seeds and processor of the existing runs."""
    records = list(results.records().values())
    if not records:
        return ""
    steps = ", ".join(f"{steps:,}" for steps in sorted({record.steps for record in records}))
    seeds = sorted({entry.cell.seed for entry in results.entries if entry.record is not None})
    made = dict.fromkeys(record.processor.partition(",")[0] for record in records if record.processor)
    words = f"; {steps} steps; {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    return words + (f"; {', '.join(made)}" if made else "")


# Criteria


class Judged(NamedTuple):
    """One criterion of the table in one column."""

    verdict: Literal["holds", "fails", "not decided"]
    text: str


def criteria(both: SideBySide) -> list[Judged]:
    """Evaluate every criterion of the table in every column in which its row is trained here."""
    table = both.here.plan.table
    labels = [row.label for row in table.rows]
    found = []
    for one in table.criteria:
        row = labels.index(one.row)
        for column in both.columns:
            if both.trained(row, column):
                above = labels.index(one.above) if one.above else None
                judged = _apart(both, one, row, column) if above is None else _above(both, one, row, above, column)
                asked, ceilings = (row, above), both.here.plan.ceilings | both.published.plan.ceilings
                found.append(_undecided(judged, [labels[i] for i in asked if i is not None and i in ceilings]))
    return found


def _undecided(judged: Judged, ceilings: Sequence[str]) -> Judged:
    """Return the criterion without ``ceilings``, its rows that read true masks and are no result of a method."""
    if not ceilings:
        return judged
    return Judged("not decided", f"{judged.text} No result of a method: {', '.join(ceilings)} reads true masks.")


def _apart(both: SideBySide, one: Criterion, row: int, column: int) -> Judged:
    """Evaluate whether a row's mean is near the published one."""
    table = both.here.plan.table
    mine, theirs = (summary(side.at(row, column), table.metric).mean for side in (both.here, both.published))
    said = f"{one.row} within {one.points:g} points of its published value, {table.columns[column].label}"
    if mine is None or theirs is None:
        return Judged("not decided", f"{said}: {_lacking(mine is None, theirs is None)}.")
    assert one.points is not None
    holds = abs(mine - theirs) <= one.points
    why = f"{mine:.1f} here, {theirs:.1f} published, {abs(mine - theirs):.1f} apart{_lengths(both, row, column)}"
    return Judged("holds" if holds else "fails", f"{said}: {why}.")


def _lengths(both: SideBySide, row: int, column: int) -> str:
    """Describe the length of a cell's runs in both sources; empty if they are equal."""
    entries = [side.at(row, column) for side in (both.here, both.published)]
    here, there = (sorted({one.record.steps for one in found if one.record is not None}) for found in entries)
    said = (" and ".join(f"{steps:,}" for steps in found) for found in (here, there))
    return "" if here == there else "; {} steps here, {} published".format(*said)


def _above(both: SideBySide, one: Criterion, row: int, other: int, column: int) -> Judged:
    """Evaluate whether a row is above another by so many standard deviations of the published runs."""
    table = both.here.plan.table
    found, base = (summary(both.here.at(place, column), table.metric) for place in (row, other))
    gap, spread = difference(found, base), pooled_spread(both.published, (row, other), column)
    where = f"{one.above} by {one.deviations:g} standard deviations of the published runs"
    said = f"{one.row} above {where}, {table.columns[column].label}"
    if gap is None or spread is None:
        seen = "" if gap is None else f"; the difference here is {signed(gap.mean)} points"
        lacking = _lacking(gap is None, spread is None, "no published record of two seeds")
        return Judged("not decided", f"{said}: {lacking}{seen}.")
    assert one.deviations is not None
    least = one.deviations * spread
    why = f"{signed(gap.mean)} points here, at least {one.deviations:g} × {spread:.2f} = {least:.2f} wanted"
    return Judged("holds" if gap.mean > 0 and gap.mean >= least else "fails", f"{said}: {why}.")


def _lacking(here: bool, published: bool, record: str = "no published record") -> str:
    return " and ".join([*["not run here yet"] * here, *[f"{record} is there"] * published])


def pooled_spread(results: Results, rows: Sequence[int], column: int) -> float | None:
    """Return the pooled standard deviation over seeds of the rows' cells in a column, in points, or None."""
    squares, free = 0.0, 0
    for row in rows:
        found = summary(results.at(row, column), results.plan.table.metric)
        if found.spread is not None:
            squares, free = squares + (found.n - 1) * found.spread**2, free + found.n - 1
    return math.sqrt(squares / free) if free else None


# Exports


def long_lines(both: SideBySide) -> list[dict[str, object]]:
    """Return a line a run, ``source`` first: ``published`` or ``this machine``; the paper's value in ``paper``."""
    found = [
        {"source": source, **line}
        for source, results in (("published", both.published), ("this machine", both.here))
        for line in to_rows(results)
    ]
    names = dict.fromkeys(name for line in found for name in line)
    return [{name: line.get(name) for name in names} for line in found]


def both_markdown(both: SideBySide) -> list[str]:
    """Return the lines of a section."""
    labels = [markdown(both.here.plan.table.columns[column].label) for column in both.columns]
    head = ["", "row", *(f"{label} {kind}" for label in labels for kind in ("paper", "published", "this machine"))]
    body = [
        [line.number, markdown(line.label) + " (ours)" * (line.control and CEILING not in line.label), *texts]
        for line, texts in ((line, map(markdown, _texts(line))) for line in both_rows(both))
    ]
    told = [f"- {name}: {markdown(text)}" for name, text in sources(both)]
    mark = f"- “{RECORDS}”: not trained at this scale; the published number stands for it"
    judged = [f"- **{one.verdict}**: {markdown(one.text)}" for one in criteria(both)]
    return [*pipes([head, *body]), "", *told, mark, *judged]


def _texts(line: BesideRow) -> Iterator[str]:
    for cell in line.cells:
        yield from (cell.paper, str(cell.published.found), cell.own)


def both_latex(both: SideBySide, caption: Sequence[str]) -> str:
    """Render a booktabs table with three columns for each of the table's; printed numbers are grey."""
    table = both.here.plan.table
    grey = r"\textcolor{gray}{%s}"
    spans = [rf"\multicolumn{{3}}{{c}}{{{latex(table.columns[column].label)}}}" for column in both.columns]
    rules = " ".join(rf"\cmidrule(lr){{{3 + 3 * i}-{5 + 3 * i}}}" for i in range(len(spans)))
    kinds = [grey % "paper", "published", "this machine"] * len(spans)
    said = [f"{name}: {text}." for name, text in sources(both)]
    out = [
        "% needs \\usepackage{booktabs, amssymb, xcolor}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(' '.join([table.title, '— mIoU (%).', *caption, *said]))}}}",
        rf"\begin{{tabular}}{{ll{'r' * 3 * len(spans)}}}",
        r"\toprule",
        " & ".join(["", "", *spans]) + r" \\",
        rules,
        " & ".join(["", "Row", *kinds]) + r" \\",
        r"\midrule",
    ]
    ruled = False
    for line in both_rows(both):
        if line.control and not ruled:
            out.append(r"\midrule")
            ruled = True
        texts = [latex(text) for text in _texts(line)]
        shown = [grey % text if i % 3 == 0 and text else text for i, text in enumerate(texts)]
        out.append(" & ".join([line.number, latex(line.label), *shown]) + r" \\")
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def to_terminal(both: SideBySide) -> str:
    """Format the columns that are trained here, a line for each of the paper's and trained rows, and the criteria."""
    shown = [i for i, column in enumerate(both.columns) if any(both.trained(row, column) for row in both.rows)]
    labels = [both.here.plan.table.columns[both.columns[i]].label for i in shown]
    grid = [["", "", *(word for label in labels for word in (f"{label}: paper", "published", "this machine"))]]
    for line in both_rows(both):
        if not line.control or line.trained:
            texts = list(_texts(line))
            grid.append([line.number, line.label, *(text for i in shown for text in texts[3 * i : 3 * i + 3])])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    left = (1,)
    rows = [
        "  ".join(
            text.ljust(n) if i in left else text.rjust(n) for i, (text, n) in enumerate(zip(row, widths, strict=True))
        )
        for row in grid
    ]
    judged = [f"{one.verdict}: {one.text}" for one in criteria(both)]
    mark = [f"{RECORDS}: not trained at this scale; the published number stands for it"]
    mark = mark if any(RECORDS in texts for texts in grid) else []
    return "\n".join([*(row.rstrip() for row in rows), *mark, "", *judged])


def published_facts(both: SideBySide) -> list[provenance.Fact]:
    """Return the facts that the published runs share."""
    records = list(both.published.records().values())
    return provenance.shared_facts(records) if records else []
