"""Shares of the gradient by part of a row's loss, and ablated parts that are too small to test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from viladiff.core import colormap
from viladiff.report.markup import markdown
from viladiff.report.table.results import CellRun, Results, number
from viladiff.runs.gradient_shares import ENOUGH, THIRDS, TermShare, Triple, by_thirds, together
from viladiff.runs.record import RunRecord

WIDTH, HEIGHT = 260, 128
_LEFT, _TOP, _BOTTOM, _BAR = 34, 8, 20, 52


class TermChart(NamedTuple):
    """A row in a column, at one place: its parts, and their shares as stacked bars."""

    title: str
    column: str
    place: str
    seeds: int
    terms: tuple[TermShare, ...]
    """Means over seeds."""
    svg: Markup


class GradientSection(NamedTuple):
    """The values of the page's section."""

    charts: tuple[TermChart, ...]
    legend: tuple[tuple[str, str], ...]
    """Parts with their colours."""
    said: tuple[str, ...]
    """A sentence a field that the rows vary, then one on what was not measured."""
    thirds: tuple[str, ...] = THIRDS


def section(results: Results) -> GradientSection | None:
    """Return the section; None if no run of the table measured shares."""
    cells = {
        (row, column): of_cell(results.at(row, column)) for row in results.rows() for column in results.plan.columns
    }
    measured = {place: terms for place, terms in cells.items() if terms}
    if not measured:
        return None
    names = dict.fromkeys(term.term for terms in measured.values() for term in terms)
    shades = [colormap.css(colour) for colour in colormap.class_colours(len(names) + 1)[1:]]
    colours = dict(zip(names, shades, strict=True))
    table, charts = results.plan.table, []
    for (row, column), terms in measured.items():
        seeds = sum(bool(_shares(entry)) for entry in results.at(row, column))
        title = f"{number(results, row)} {table.rows[row].label}"
        for place in dict.fromkeys(term.place for term in terms):
            mine = tuple(term for term in terms if term.place == place)
            words = f"Gradient shares of row {title}, {table.columns[column].label}, at the {place}"
            charts.append(TermChart(title, table.columns[column].label, place, seeds, mine, bars(mine, colours, words)))
    said = [*ablated(results, measured), *_lacking(results, measured)]
    return GradientSection(tuple(charts), tuple(colours.items()), tuple(said))


def of_cell(entries: Sequence[CellRun]) -> list[TermShare]:
    """Return means over the seeds that measured shares; empty without one."""
    found = [shares for entry in entries if (shares := _shares(entry))]
    names = dict.fromkeys((one.place, one.term) for shares in found for one in shares)
    out = []
    for name in names:
        mine = [one for shares in found for one in shares if (one.place, one.term) == name]
        out.append(TermShare(*name, _mean([one.shares for one in mine]), _mean([one.cosines for one in mine])))
    return out


def _shares(entry: CellRun) -> list[TermShare]:
    return [] if entry.record is None else by_thirds(entry.record.gradient_shares, entry.record.steps)


def _mean(triples: Sequence[Triple]) -> Triple:
    columns = [[value for value in column if value is not None] for column in zip(*triples, strict=True)]
    early, middle, late = (sum(there) / len(there) if there else None for there in columns)
    return early, middle, late


def bars(terms: Sequence[TermShare], colours: dict[str, str], words: str) -> Markup:
    """Draw a stacked bar for each third of training; a third that was not measured has none."""
    bottom, span = HEIGHT - _BOTTOM, HEIGHT - _BOTTOM - _TOP
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="panel"><title>{escape(words)}</title>']
    for mark in (0.0, 0.5, 1.0):
        level = bottom - mark * span
        parts.append(f'<path class="grid" d="M{_LEFT} {level:.1f}H{WIDTH - 8}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{level + 3:.1f}" text-anchor="end">{100 * mark:g} %</text>')
    for third, name in enumerate(THIRDS):
        left = _LEFT + 12 + third * (WIDTH - _LEFT - 20) / 3
        top = float(bottom)
        for term in terms:
            share = term.shares[third]
            if share:
                top -= share * span
                said = f"{term.term}, {name}: {percent(share)} %"
                parts.append(
                    f'<rect x="{left:.1f}" y="{top:.2f}" width="{_BAR}" height="{share * span:.2f}" '
                    f'fill="{colours[term.term]}"><title>{escape(said)}</title></rect>'
                )
        parts.append(f'<text x="{left + _BAR / 2:.1f}" y="{bottom + 13}" text-anchor="middle">{name}</text>')
    return Markup("".join([*parts, "</svg>"]))


def percent(share: float | None) -> str:
    """Format ``12.3``; an em dash if not measured."""
    return "—" if share is None else f"{100 * share:.1f}"


def small(share: float | None) -> bool:
    """Return whether a share is measured and below ``ENOUGH``."""
    return share is not None and share < ENOUGH


# What the table varies


def ablated(results: Results, measured: dict[tuple[int, int], list[TermShare]]) -> list[str]:
    """Return a sentence for each field that rows of one method vary and that weights parts of its loss.

    The parts are read in the headline's row, or in the first row where they have a share. A part is called untestable
    if it is small in every row that measured any: a row may weight it more than the headline's.
    """
    records = {place: _records(results.at(*place)) for place in measured}
    fields: dict[str, tuple[str, ...]] = {}
    for found in records.values():
        for record in found:
            fields |= {f: tuple(names) for f, names in (record.gradient_shares or {}).get("fields", {}).items()}
    said = []
    for field, names in fields.items():
        if not _varied(results, field):
            continue
        row = next((r for r in (results.headline, *results.rows()) if _any(measured, r, names)), None)
        where = results.plan.columns
        sums = {} if row is None else {c: together(measured.get((row, c), []), names) for c in where}
        tops = {c: _largest(measured, c, names) for c in where}
        there = {c: s for c, s in sums.items() if any(x is not None for x in s)}
        said.append(_sentence(results, field, row, there, tops))
    return said


def _largest(measured: dict[tuple[int, int], list[TermShare]], column: int, names: Sequence[str]) -> tuple[float, int]:
    """Return the parts' largest share in a column, and its row."""
    shares = [(x or 0.0, r) for (r, c), terms in measured.items() if c == column for x in together(terms, names)]
    return max(shares, key=lambda one: one[0], default=(0.0, -1))


def _sentence(
    results: Results, field: str, row: int | None, sums: dict[int, Triple], tops: dict[int, tuple[float, int]]
) -> str:
    if row is None or not sums:
        return f"{field}: the parts that it weighs have no share in the rows that measured any."
    labels, told = results.plan.table.columns, []
    for column, triple in sums.items():
        most = max(share for share in triple if share is not None)
        third = THIRDS[triple.index(most)]
        top, other = tops[column]
        verdict = "" if most >= ENOUGH else f", below {100 * ENOUGH:g} %: this table cannot test it there"
        if most < ENOUGH <= top:
            verdict = f", but {percent(top)} % in row {number(results, other)}"
        told.append(f"{percent(most)} % ({third}) in {labels[column].label}{verdict}")
    return f"{field}: the parts that it weighs reach, in row {number(results, row)}, {'; '.join(told)}."


def _varied(results: Results, field: str) -> bool:
    """Return whether rows of one method differ in the field in a column; for ``path=value`` in having the value."""
    path, _, one = field.partition("=")
    values: dict[tuple[int, object], set[bool | str]] = {}
    for entry in results.entries:
        config: dict[str, Any] = entry.record.config if entry.record is not None else {}
        if path in config:
            value = config[path]
            method = entry.cell.column, config.get("method.name")
            values.setdefault(method, set()).add(one in value if one else str(value))
    return any(len(there) > 1 for there in values.values())


def _any(measured: dict[tuple[int, int], list[TermShare]], row: int, names: Sequence[str]) -> bool:
    return any(share for (r, _), terms in measured.items() if r == row for share in together(terms, names))


def _records(entries: Sequence[CellRun]) -> list[RunRecord]:
    return [entry.record for entry in entries if entry.record is not None]


def _lacking(results: Results, measured: dict[tuple[int, int], list[TermShare]]) -> list[str]:
    table = results.plan.table
    rows = [row for row in results.rows() if not any(r == row for r, _ in measured)]
    names = ", ".join(f"{number(results, row)} {table.rows[row].label}" for row in rows)
    return [f"Not measured in rows {names}: runs with runtime.gradient_shares measure them."] if rows else []


def gradients_markdown(found: GradientSection | None) -> dict[str, list[str]]:
    """Return the sections of table.md."""
    if found is None:
        return {}
    heads = ["row", "column", "at", "part", *THIRDS]
    grid = [
        [chart.title, chart.column, chart.place, term.term, *(percent(s) + " <" * small(s) for s in term.shares)]
        for chart in found.charts
        for term in chart.terms
    ]
    pipes = ["| " + " | ".join(markdown(cell) for cell in row) + " |" for row in [heads, *grid]]
    lines = [pipes[0], "|" + " --- |" * len(heads), *pipes[1:], ""]
    return {"Gradient shares": [*lines, *(f"- {markdown(text)}" for text in found.said)]}
