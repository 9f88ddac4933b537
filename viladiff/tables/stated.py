"""Published settings of a table's methods, beside those of its runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from viladiff.tables.published import published

if TYPE_CHECKING:
    from viladiff.tables.cells import Cell
    from viladiff.tables.spec import Table


class Stated(NamedTuple):
    """One field that the publication of a cell's method sets, or what it has beyond all fields."""

    row: int
    column: int
    source: str
    path: str
    """Empty for what no field here gives."""
    value: Any
    """What the publication sets, or says in words."""
    runs: Any
    """The value in the cell's runs; None where they lack the field."""

    @property
    def applied(self) -> bool:
        return bool(self.path) and self.value == self.runs


def stated(table: Table, found: Iterable[Cell]) -> tuple[Stated, ...]:
    """Return the publication's settings for the first run of each cell, beside the run's own."""
    from viladiff.runs.config import RunConfig, flatten, override
    from viladiff.tables.cells import paper_settings

    said: dict[tuple[int, int, str], Stated] = {}
    seen: set[tuple[int, int]] = set()
    for cell in found:
        place = (cell.row, cell.column)
        asked = published(paper_settings(table, *place))
        if place in seen or not asked:
            continue
        seen.add(place)
        runs = flatten(override(RunConfig(), cell.changes))
        for one in asked:
            for path, value in one.fields.items():
                said[*place, path] = Stated(*place, one.source, path, value, runs.get(path))
            if one.not_available:
                said[*place, one.not_available] = Stated(*place, one.source, "", one.not_available, None)
    return tuple(said.values())
