"""Published settings of a table's methods, beside those of its runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from viladiff.tables.published import protocols, published
from viladiff.tables.recipes.recipe import recipe_fields, shared

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
    yields: bool = False
    """Whether it belongs to the protocol that all rows of the scale share, and differs from it."""

    @property
    def applied(self) -> bool:
        return bool(self.path) and self.value == self.runs


def stated(table: Table, found: Iterable[Cell]) -> tuple[Stated, ...]:
    """Return the publication's settings for the first run of each cell, beside the run's own.

    At a scale with a recipe also those of the protocol, which are the scale's for all rows.
    """
    from viladiff.runs.config import RunConfig, flatten, override
    from viladiff.tables.cells import paper_settings

    said: dict[tuple[int, int, str], Stated] = {}
    seen: set[tuple[int, int]] = set()
    for cell in found:
        place = (cell.row, cell.column)
        if place in seen:
            continue
        seen.add(place)
        settings = paper_settings(table, *place)
        asked = published(settings)
        recipe = table.scale[str(cell.changes["runtime.scale"])].recipe
        if not asked and not recipe:
            continue
        runs = flatten(override(RunConfig(), cell.changes))
        common = protocols(runs) if recipe else []
        ruled = {path for path in recipe_fields(recipe, runs) if shared(path)} if recipe else set()
        for one in [*common, *asked]:
            for path, value in one.fields.items():
                here = Stated(*place, one.source, path, value, runs.get(path))
                other = recipe and (one in common or path in ruled) and path not in settings
                said[*place, path] = here._replace(yields=True) if other and not here.applied else here
            if one.not_available:
                said[*place, one.not_available] = Stated(*place, one.source, "", one.not_available, None)
    return tuple(said.values())
