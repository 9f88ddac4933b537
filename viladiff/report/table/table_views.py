"""Data of a table's page, computed so that its template only lays it out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup, escape

from viladiff.core import colormap
from viladiff.report import provenance
from viladiff.report.charts import figures
from viladiff.report.sections import training
from viladiff.report.sections.learning_curves import TERMS, Curve
from viladiff.report.table import exports
from viladiff.report.table.results import (
    CellRun,
    Difference,
    Results,
    Summary,
    gaps,
    number,
    per_class,
    row_name,
    summary,
    swapped,
)
from viladiff.tables.spec import OWN_LISTS, letter

if TYPE_CHECKING:
    from viladiff.tables.claims import Verdict

PSEUDO = {
    "before/coverage": "Coverage, teacher's",
    "after/coverage": "Coverage, refined",
    "before/precision": "Precision, teacher's",
    "after/precision": "Precision, refined",
    "before/ece": "Calibration error, teacher's",
    "after/ece": "Calibration error, refined",
    "rescued": "Rescued",
    "spoiled": "Spoiled",
}
STREAMS = {
    "visual": "visual",
    "fusion": "fusion, with text",
    "fusion_no_text": "fusion, without text",
    "mean": "mean of both",
}


class TableCell(NamedTuple):
    """One measured number of the page and what hangs on it."""

    found: Summary
    best: bool
    gap: float | None
    bar: float
    """Share of the longest bar, with its sign."""
    unpaired: bool
    """The difference is over fewer seeds than the mean."""
    notes: tuple[str, ...]
    """Letters of the reasons why seeds are missing."""
    hover: str
    anchor: str
    best_epoch: Summary | None = None


class TableRow(NamedTuple):
    row: int
    number: str
    label: str
    note: str
    control: bool
    ticks: tuple[bool, ...]
    cells: tuple[TableCell, ...]
    printed: tuple[str, ...]
    group: str
    encoder: str
    ceiling: bool
    """Whether its runs read true masks."""

    @property
    def section(self) -> int:
        """The paper's rows, or those that are compared, then controls, then ceilings."""
        return 2 if self.ceiling else int(self.control)


class Reasons:
    """Letters for reasons, given out in the order in which a page first needs them."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def letter(self, why: str) -> str:
        return self.letters.setdefault(why, letter(len(self.letters)))


def table_rows(results: Results, metric: str, reasons: Reasons) -> list[TableRow]:
    plain_rows = exports.export_rows(results, metric)
    longest = max((abs(gap.mean) for r in plain_rows for _, _, gap, _ in r.cells if gap), default=0) or 1
    out = []
    for row, line in zip(results.rows(), plain_rows, strict=True):
        cells = tuple(
            _cell(results, row, column, found, longest, reasons)
            for column, found in zip(results.plan.columns, line.cells, strict=True)
        )
        spec = results.plan.table.rows[row]
        papers = tuple(cell[3] for cell in line.cells)
        about = (row, line.number, line.label, spec.note, line.control, line.ticks)
        out.append(TableRow(*about, cells, papers, spec.group, spec.encoder, line.ceiling))
    return out


def _cell(
    results: Results,
    row: int,
    column: int,
    line: tuple[Summary, bool, Difference | None, str],
    longest: float,
    reasons: Reasons,
) -> TableCell:
    found, top, gap, _ = line
    entries = results.at(row, column)
    values = [f"seed {s}: {value:.2f}" for s, value in found.values.items()]
    values += [f"seed {s}: {why}" for s, why in found.missing.items()]
    notes = tuple(dict.fromkeys(reasons.letter(why) for why in found.missing.values()))
    return TableCell(
        found,
        top,
        gap.mean if gap else None,
        gap.mean / longest if gap and round(gap.mean, 1) else 0.0,
        gap is not None and len(gap.seeds) < found.n,
        notes,
        "; ".join(values),
        f"run-{entries[0].cell.run_id}" if entries and entries[0].cell.run_id else "",
        training.best_epoch(entries),
    )


class Dots(NamedTuple):
    """A row of the chart of seeds: places are percent of the track's width."""

    line: TableRow
    tracks: tuple[tuple[list[tuple[float, str]], float | None], ...]


def seed_dots(results: Results, table: Sequence[TableRow]) -> tuple[list[Dots], list[list[tuple[float, str]]]]:
    """Return the seeds of each cell on one axis a column, and the axes' ticks: none if nothing is measured."""
    ranges, axes = [], []
    for i in range(len(results.plan.columns)):
        values = [value for line in table for value in line.cells[i].found.values.values()]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        margin = 0.08 * (high - low) or 1.0
        reach = (low - margin, high + margin)
        ranges.append(reach)
        axes.append([(_place(t, reach), f"{t:g}") for t in figures.ticks(*reach, False)] if values else [])
    rows = []
    for line in table:
        tracks = []
        for cell, reach in zip(line.cells, ranges, strict=True):
            seeds = [(_place(v, reach), f"seed {s}: {v:.2f}") for s, v in cell.found.values.items()]
            tracks.append((seeds, None if cell.found.mean is None else _place(cell.found.mean, reach)))
        rows.append(Dots(line, tuple(tracks)))
    return rows, axes


def _place(value: float, reach: tuple[float, float]) -> float:
    low, high = reach
    return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 2)


@dataclass(frozen=True)
class Forest:
    """The positions of a comparison's interval and difference on the track, in percent of its width."""

    left: float
    right: float
    at: float


def forest(verdicts: Sequence[Verdict]) -> tuple[dict[int, Forest], float]:
    """Return intervals by ``id`` of each comparison, on one axis for all claims; and the axis' half width in points.

    An interval that is four times as long as most may leave the axis, or no other would be visible.
    """
    shown = [c for verdict in verdicts for c in verdict.comparisons if c.form != "spread"]
    lengths = [c.interval[1] - c.interval[0] for c in shown]
    long = 4 * statistics.median(lengths) if lengths else math.inf
    ends = [
        abs(end)
        for c, length in zip(shown, lengths, strict=True)
        for end in ((c.difference,) if length > long else (*c.interval, c.difference))
        if math.isfinite(end)
    ]
    reach = 1.1 * max(ends, default=1.0) or 1.0
    span = (-reach, reach)
    placed = {}
    for verdict in verdicts:
        for c in verdict.comparisons:
            if c.form != "spread" and all(map(math.isfinite, (*c.interval, c.difference))):
                low, at, high = (_place(points, span) for points in (c.interval[0], c.difference, c.interval[1]))
                placed[id(c)] = Forest(low, high, at)
    return placed, reach


def panels(results: Results, drawn: dict[str, list[Curve]]) -> list[dict[str, Any]]:
    """Return a group of small charts a term: one a row, a line a column, all on the same axes."""
    names, table = TERMS | {"miou": "mIoU along the way (%)"}, results.plan.table
    groups = []
    for term, found in drawn.items():
        bounds = figures.limits(found)
        charts = []
        for row in dict.fromkeys(c.row for c in found):
            mine = [c for c in found if c.row == row]
            colours = [f"var(--series-{results.plan.columns.index(c.column) % len(colormap.SERIES)})" for c in mine]
            named = [(table.columns[c.column].label, "so far" if c.running else "at the end", c) for c in mine]
            ends = "; ".join(f"{label}: {c.mean[-1]:.3g} {when}" for label, when, c in named)
            under_way = sum(c.running for c in mine)
            title = f"{number(results, row)} {row_name(results, row)}" + f" ({under_way} unfinished)" * (under_way > 0)
            charts.append((title, figures.panel(mine, colours, bounds, f"{names[term]} of row {title}. {ends}")))
        seeds = max(c.seeds for c in found)
        about = {"seeds": seeds, "running": sum(c.running for c in found)}
        groups.append({"term": term, "name": names[term], "charts": charts, "log": bounds[2], **about})
    return groups


def network_scores(results: Results) -> list[tuple[str, str, list[list[Summary]]]]:
    """Return (row, stream) with, by column, each network's mIoU."""
    table, out = results.plan.table, []
    records = [e.record for e in results.entries if e.record]
    nets = list(dict.fromkeys(net for record in records for net in record.scores))
    for row in results.rows():
        stream = next((e.stream or e.record.stream for e in results.of_row(row) if e.record), "")
        found = [[summary(results.at(row, c), table.metric, net) for net in nets] for c in results.plan.columns]
        out.append((f"{number(results, row)} {row_name(results, row)}", stream, found))
    return out


def stream_scores(results: Results) -> tuple[str, list[str], list[tuple[str, list[list[Summary]]]]]:
    """Return the streams of the headline, or else of the last row with records.

    Label, networks, each stream's mIoU by column and network.
    """
    table = results.plan.table
    for row in (results.headline, *reversed(results.rows(control=False) or results.rows())):
        record = next((e.record for e in results.of_row(row) if e.record), None)
        if record is None:
            continue
        nets = list(record.scores)
        kinds = list(dict.fromkeys(stream for scores in record.scores.values() for stream in scores))
        found = [
            (
                STREAMS.get(s, s),
                [[summary(results.at(row, c), table.metric, n, s) for n in nets] for c in results.plan.columns],
            )
            for s in kinds
        ]
        return f"{number(results, row)} {row_name(results, row)}", nets, found
    return "", [], []


def pseudo(results: Results) -> list[tuple[str, str, list[Summary | None]]]:
    """Return (row, column, quality of its pseudo-labels in the order of PSEUDO); rows without any are left out."""
    table, out = results.plan.table, []
    for row in results.rows():
        for column in results.plan.columns:
            entries = [e for e in results.at(row, column) if e.record and e.record.pseudo_labels]
            if entries:
                found = [shares(entries, name) for name in PSEUDO]
                out.append((f"{number(results, row)} {row_name(results, row)}", table.columns[column].label, found))
    return out


def shares(entries: Sequence[CellRun], name: str) -> Summary | None:
    """Return one of ``PSEUDO`` in percent by seed; None if no run measured it."""
    found = {e.cell.seed: e.record.pseudo_labels.get(name) for e in entries if e.record}
    values = {seed: 100 * share for seed, share in found.items() if share is not None and math.isfinite(share)}
    return Summary(values, {}, frozenset()) if values else None


def class_heatmap(results: Results) -> list[dict[str, Any]]:
    """Return a column's table of IoU by row and class, mean over seeds."""
    out = []
    for column in results.plan.columns:
        by_row = {r: [per_class(e.record) for e in results.at(r, column) if e.record] for r in results.rows()}
        names = list(dict.fromkeys(name for found in by_row.values() for one in found for name in one))
        rows = []
        for row, found in by_row.items():
            if found:
                label = f"{number(results, row)} {row_name(results, row)}"
                rows.append((label, [_mean([one.get(name) for one in found]) for name in names]))
        if rows:
            out.append({"column": results.plan.table.columns[column].label, "names": names, "rows": rows})
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def part_html(part: str) -> Markup:
    found = exports.symbol(part)
    if found is None:
        return escape(part)
    above = f"<sup>{escape(found.above)}</sup>" if found.above else ""
    return Markup(f"<i>{escape(found.base)}</i><sub>{escape(found.below)}</sub>{above}")


def scored_images(results: Results) -> str:
    """Describe the images that the scores are of; empty without a record."""
    names = {"val": "validation set", "holdout": "held-out labelled images"}
    parts = dict.fromkeys(str(record.config.get("eval.split", "val")) for record in results.records().values())
    return " and ".join(names.get(part, f"part {part}") for part in parts)


def context(results: Results) -> list[str]:
    """Return the sentences that the numbers need: stand-in data sets, captions, length."""
    records = list(results.records().values())
    size = results.plan.table.scale.get(results.plan.scale)
    said = [*stand_ins(results), *([training.BEST] if training.shows_best(results) else [])]
    instead = [f"{_fields(fields)} for {asked}" for asked, fields in (size.substitute.items() if size else ())]
    said += [f"Stand-ins for what this data set lacks: {'; '.join(instead)}."] if instead else []
    said += (
        [f"In every method that has it: {_fields(size.shared_method_fields)}."]
        if size and size.shared_method_fields
        else []
    )
    ceilings = [f"{number(results, row)} {results.plan.table.rows[row].label}" for row in sorted(results.plan.ceilings)]
    said += (
        [f"Ceilings, which read true masks of unlabelled images and are no results of a method: {'; '.join(ceilings)}."]
        if ceilings
        else []
    )
    said += gaps(results)
    said += [f"{OWN_LISTS[0].upper()}{OWN_LISTS[1:]}."] if size and size.split_per_seed else []
    own = list(dict.fromkeys(provenance.captions(r) for r in records if r.config.get("data.captions", "own") == "own"))
    said += [f"Captions: {'; '.join(own)}."] if own else []
    encoders = list(dict.fromkeys(f"{r.encoder} ({r.pretrained})" for r in records))
    said += (
        [f"Encoder: {', '.join(encoders)}; steps: {', '.join(sorted({str(r.steps) for r in records}))}."]
        if records
        else []
    )
    return said


def stand_ins(results: Results) -> list[str]:
    """Return a sentence for each data set of the paper's columns that is substituted."""
    return [
        f"The paper's {paper} is {ours} here: compare order and direction with the paper's numbers, not levels."
        for paper, ours in dict.fromkeys(filter(None, (swapped(results, column) for column in results.plan.columns)))
    ]


def _fields(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{path}={value}" for path, value in fields.items()) or "nothing"
