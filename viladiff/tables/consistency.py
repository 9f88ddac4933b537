"""Contradictions of a paper's printed numbers with each other or its own sentences, compared as decimals.

Nothing here reads a record or loads torch: cells are compared by their settings.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Literal, NamedTuple

from viladiff.tables.cells import paper_settings
from viladiff.tables.contrasts import printed_verdict
from viladiff.tables.spec import Table
from viladiff.tables.spec_file import load_table

FEWEST_REPEATED = 3
"""Numbers in a row that two rows must share to count as one copied from the other; two may agree by chance."""


class Inconsistency(NamedTuple):
    kind: Literal["same run", "repeated", "below supervised", "encoders", "claim"]
    text: str


class _Cell(NamedTuple):
    table: Table
    row: int
    column: int
    number: Decimal
    fields: dict[str, object]

    @property
    def where(self) -> str:
        return self.table.columns[self.column].label

    @property
    def data(self) -> dict[str, object]:
        return {path: value for path, value in self.fields.items() if path.startswith("data.")}


def siblings(path: Path) -> list[Table]:
    """Return the tables beside a table's file, and itself; an unreadable one is skipped: running it reports why."""
    found = []
    for one in sorted(path.parent.glob("*.toml")):
        try:
            found.append(load_table(one))
        except ValueError:
            continue
    return found


def inconsistencies(table: Table, others: Sequence[Table] = ()) -> list[Inconsistency]:
    """Return what is wrong with a table's printed numbers, by themselves and against other tables'.

    same run: cells with the same settings, hence one run, have different numbers. repeated: a row's numbers are those
    of a row of other runs. below supervised: a semi-supervised row is below the supervised one on the same data.
    encoders: rows that are compared have different ones. claim: a sentence that the printed numbers do not bear out.
    """
    mine = _cells(table)
    theirs = [cell for other in others if other.name != table.name for cell in _cells(other)]
    return [
        *_claims(table),
        *_same_run(mine, [*mine, *theirs]),
        *_repeated(mine, [*mine, *theirs]),
        *_below_supervised(mine, [*mine, *theirs]),
        *_encoders(table),
    ]


def _cells(table: Table) -> list[_Cell]:
    return [
        _Cell(table, i, j, Decimal(str(number)), paper_settings(table, i, j))
        for i, row in enumerate(table.rows)
        for j, number in enumerate(row.paper)
        if number != "-"
    ]


def _claims(table: Table) -> Iterator[Inconsistency]:
    for claim in table.claims:
        verdict, why = printed_verdict(table, claim)
        if claim.source == "paper" and verdict == "fails":
            yield Inconsistency("claim", f"“{claim.text}”: {why}.")


def _same_run(mine: Sequence[_Cell], every: Sequence[_Cell]) -> Iterator[Inconsistency]:
    found: dict[tuple[int, str, int], list[str]] = defaultdict(list)
    for cell in mine:
        for other in every:
            if other.number != cell.number and other.fields == cell.fields:
                found[cell.row, other.table.name, other.row].append(_against(cell, other))
    names = _names(every)
    for (row, name, place), numbers in found.items():
        label = mine[0].table.rows[row].label
        said = f"“{label}” and {names[name, place]} are one run by all that is said, and differ"
        yield Inconsistency("same run", f"{said}: {'; '.join(numbers)}.")


def _repeated(mine: Sequence[_Cell], every: Sequence[_Cell]) -> Iterator[Inconsistency]:
    names = _names(every)
    for row, own in _by_row(mine).items():
        for place, other in _by_row(every).items():
            if place == row:
                continue
            shared = _longest_shared(own, other)
            if len(shared) >= FEWEST_REPEATED and all(one.fields != two.fields for one, two in shared):
                numbers = ", ".join(str(one.number) for one, _ in shared)
                said = f"The numbers of “{own[0].table.rows[row[1]].label}” ({numbers}) are those of {names[place]}"
                yield Inconsistency("repeated", f"{said}, on other data or of another method.")


def _longest_shared(own: Sequence[_Cell], other: Sequence[_Cell]) -> list[tuple[_Cell, _Cell]]:
    """Return the longest run of equal numbers in equal order."""
    best: list[tuple[_Cell, _Cell]] = []
    for start in range(len(own)):
        for begin in range(len(other)):
            pairs = []
            for one, two in zip(own[start:], other[begin:], strict=False):
                if one.number != two.number:
                    break
                pairs.append((one, two))
            best = max(best, pairs, key=len)
    return best


def _below_supervised(mine: Sequence[_Cell], every: Sequence[_Cell]) -> Iterator[Inconsistency]:
    base = [cell for cell in every if cell.table.rows[cell.row].label == cell.table.supervised]
    names = _names(every)
    found: dict[tuple[int, str, int], list[str]] = defaultdict(list)
    for cell in mine:
        if cell in base:
            continue
        for other in base:
            if cell.number < other.number and cell.data == other.data:
                found[cell.row, other.table.name, other.row].append(_against(cell, other))
    for (row, name, place), numbers in found.items():
        label = mine[0].table.rows[row].label
        said = f"“{label}” is semi-supervised and below {names[name, place]}, which sees the labelled images alone"
        yield Inconsistency("below supervised", f"{said}: {'; '.join(numbers)}.")


def _encoders(table: Table) -> Iterator[Inconsistency]:
    counts = Counter(row.encoder for row in table.rows if row.encoder)
    if len(counts) > 1:
        listed = ", ".join(f"{name} ({n} row{'s' if n > 1 else ''})" for name, n in counts.most_common())
        yield Inconsistency("encoders", f"The rows that are compared have different encoders: {listed}.")


def _against(cell: _Cell, other: _Cell) -> str:
    return f"{cell.number} against {other.number} ({cell.where})"


def _by_row(cells: Sequence[_Cell]) -> dict[tuple[str, int], list[_Cell]]:
    found: dict[tuple[str, int], list[_Cell]] = defaultdict(list)
    for cell in cells:
        found[cell.table.name, cell.row].append(cell)
    return found


def _names(cells: Sequence[_Cell]) -> dict[tuple[str, int], str]:
    """Name the rows; a table is called by the beginning of its title."""
    return {
        (cell.table.name, cell.row): f"“{cell.table.rows[cell.row].label}” of {cell.table.title.partition('.')[0]}"
        for cell in cells
    }
