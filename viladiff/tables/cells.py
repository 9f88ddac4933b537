"""Cells of a table as configurations: each cell's settings, layer over layer, and their check.

``cells`` loads torch, since it builds the configuration of every cell in order to check it; ``choose`` does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from viladiff.config.base import ConfigError, did_you_mean
from viladiff.config.toml_file import entry_name, listed
from viladiff.core.messages import error_lines, one_line, shown
from viladiff.tables.published import published_fields
from viladiff.tables.recipes.recipe import recipe_fields, shared
from viladiff.tables.spec import RESERVED, Layer, Scale, Table, table_layers

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

CHOOSERS = ("data.dataset", "method.name")
"""Fields that choose a section; a layer that chooses another leaves nothing of the section before but ``COMMON``."""
COMMON = "method.ohem."
"""Fields that every method has: set for a scale, they are meant for all rows."""
_TYPED = "the command line"
_SCALE = 1
"""Rank of the scale's layer, below those of column, row and command line."""
_PROTOCOL = 2
"""Rank of a recipe's shared fields: above a publication's settings, which go above the scale's layer alone."""
_NOTHING: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True)
class Cell:
    """One run that a table asks for; equal runs in several cells happen once."""

    row: int
    column: int
    seed: int
    changes: dict[str, object]
    """Everything set for this cell, by dotted path, precedence resolved."""


# Selection


def select_labels(
    kind: str, labels: Sequence[str], requested: Iterable[str | int], numbers: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return the indices of the requested rows or columns, in the table's order, each once.

    Each is a label, a number, or a unique prefix of a label (case does not matter), in this order of precedence.
    ``numbers``: of the labels, as ``Table.row_numbers``; counted from 1 by default. Raises ValueError with the nearest
    label.
    """
    numbers = numbers or [str(number) for number in range(1, len(labels) + 1)]
    return tuple(sorted({_select_one(kind, labels, numbers, str(one)) for one in requested}))


def _select_one(kind: str, labels: Sequence[str], numbers: Sequence[str], requested: str) -> int:
    if requested in labels:
        return labels.index(requested)
    if requested.casefold() in numbers:
        return numbers.index(requested.casefold())
    if requested.isascii() and requested.isdigit():
        raise ValueError(f"{kind} = {requested}: no such number. {listed(labels, numbers)}")
    prefix = requested.casefold()
    matches = [i for i, label in enumerate(labels) if prefix and label.casefold().startswith(prefix)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        options = ", ".join(f"{numbers[i]} {labels[i]!r}" for i in matches)
        raise ValueError(f"{kind} = {requested!r}: ambiguous, matches {options}")
    near = did_you_mean(requested, labels) or "."
    raise ValueError(f"{kind} = {requested!r}: no such label{near} {listed(labels, numbers)}")


def choose(
    table: Table,
    scale: str,
    seeds: Sequence[int] | None = None,
    rows: Iterable[str | int] | None = None,
    columns: Iterable[str | int] | None = None,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return (rows, columns, seeds) of a scale: positions in the table, controls last, then ceilings.

    Raises ValueError.
    """
    if scale not in table.scale:
        names = ", ".join(table.scale)
        raise ValueError(f"{table.name}.toml: scale = {scale!r}: allowed: {names}{did_you_mean(scale, table.scale)}")
    size = table.scale[scale]
    every = [i for i, row in enumerate(table.rows) if size.controls or not row.control]
    every = [i for i in every if not table.rows[i].scales or scale in table.rows[i].scales]
    rows = size.rows or None if rows is None else rows
    columns = size.columns or None if columns is None else columns
    labels = [row.label for row in table.rows]
    chosen = every if rows is None else select_labels("rows", labels, rows, table.row_numbers)
    across = range(len(table.columns))
    chosen_columns = (
        across if columns is None else select_labels("columns", [one.label for one in table.columns], columns)
    )
    wanted = tuple(dict.fromkeys(seeds if seeds is not None else size.seeds or table.seeds))
    for name, found in (("rows", chosen), ("columns", chosen_columns), ("seeds", wanted)):
        if not found:
            raise ValueError(f"{table.name}.toml: no {name} selected")
    if min(wanted) < 0:
        raise ValueError(f"seeds = {list(wanted)}: a seed must not be negative")
    order = sorted(chosen, key=lambda i: (table.rows[i].control, table.rows[i].oracle))
    return tuple(order), tuple(chosen_columns), wanted


def seeds_by_column(
    table: Table, scale: str, columns: Iterable[int], seeds: Sequence[int] | None = None
) -> dict[int, tuple[int, ...]]:
    """Return the seeds of each column: those named, else its own in the scale, else the scale's or the table's."""
    size = table.scale[scale]
    own = {} if seeds is not None else size.column_seeds
    rest = seeds if seeds is not None else size.seeds or table.seeds
    return {column: tuple(dict.fromkeys(own.get(table.columns[column].label, rest))) for column in columns}


# Merging


def cells(
    table: Table,
    scale: str,
    seeds: Sequence[int] | None = None,
    rows: Iterable[str | int] | None = None,
    columns: Iterable[str | int] | None = None,
    changes: Mapping[str, object] = _NOTHING,
) -> list[Cell]:
    """Return every run that the table requests at a scale, seed by seed, each checked as a configuration.

    A later layer overrides an earlier one: base, scale, column, row, seed, command line (``changes``); with the scale's
    ``split_per_seed`` a seed also draws the labelled list. The scale's ``shared_method_fields`` apply to cells whose
    method has them and where neither column nor row sets them. The scale's ``recipe`` overrides the base alone. With
    the scale's ``published``, settings of a method's publication for the cell's data set override base and scale, and
    of the recipe what it sets of a method's own fields (``recipes.recipe.shared``). A layer that chooses another method
    or data set drops earlier settings of the previous one alone, and of ``train.steps`` and ``train.epochs`` the later
    one replaces the other. A field of ``changes`` that the method or the data set of a cell lacks is left out there,
    unless all cells lack it. Rows that cannot be run yet have no cells (``unavailable``). Loads torch. Raises
    ValueError that names file and entry.
    """
    chosen_rows, chosen_columns, chosen_seeds = choose(table, scale, seeds, rows, columns)
    for path in RESERVED.keys() & changes.keys():
        raise ValueError(f"{path} = {one_line(str(changes[path]), 160)}: not set here: {RESERVED[path]}")
    later = unavailable(table, changes)
    places = [(row, column) for row in chosen_rows if row not in later for column in chosen_columns]
    # Which method and data set are meant has to be known before the shared fields are.
    chosen = Layer(_TYPED, {path: changes[path] for path in CHOOSERS if path in changes})
    layers = {place: _shared(table, scale, [*_layers(table, scale, *place), chosen]) for place in places}
    typed = _fitting(changes, {place: _merge(layers[place]) for place in places})
    settled = {place: _merge([*layers[place], Layer(_TYPED, typed[place])]) for place in places}
    settled = {place: _with_recipe(table, scale, merged) for place, merged in settled.items()}
    if table.scale[scale].published:
        settled = {place: _with_published(merged) for place, merged in settled.items()}
    fixed: dict[str, object] = {"runtime.scale": scale}
    per_column = seeds_by_column(table, scale, chosen_columns, seeds)
    own = table.scale[scale].split_per_seed
    found = []
    for seed in chosen_seeds:
        for place in (place for place in places if seed in per_column[place[1]]):
            fields = {path: one.value for path, one in settled[place].items()}
            drawn = list_of_seed(fields, seed) if own else {}
            found.append(Cell(*place, seed, {**fields, "seed": seed, **drawn, **fixed}))
    _check(table, found, settled)
    if table.chooses:
        _check_chooses(table, found)
    if own:
        for cell in found:
            check_lists(f"{table.name}.toml: scale.{scale}", cell.changes)
    return found


def list_of_seed(fields: Mapping[str, object], seed: int) -> dict[str, object]:
    """Return ``data.split_seed`` of a run whose seed draws its labelled list: the seed, added to the fields' value."""
    given = str(fields.get("data.split_seed"))
    return {"data.split_seed": seed + (int(given) if given.isascii() and given.isdigit() else 0)}


def check_lists(entry: str, fields: Mapping[str, object]) -> None:
    """Raise ValueError if seeds cannot draw lists of their own: on data sets that come with published ones."""
    if not embedded(fields):
        from viladiff.data.sources import embedded_datasets

        raise ValueError(
            f"{entry}: split_per_seed = true: data.dataset = {shown(fields.get('data.dataset'))} has published "
            f"lists, which all seeds share; allowed: {', '.join(embedded_datasets())}"
        )


def embedded(fields: Mapping[str, object]) -> bool:
    """Return whether runs with these fields are on a built-in data set, which has parts ``dev`` and ``test``."""
    from viladiff.data.sources import embedded_datasets

    return str(fields.get("data.dataset", "digits")) in embedded_datasets()


def unavailable(table: Table, changes: Mapping[str, object] = _NOTHING) -> dict[int, str]:
    """Return why rows cannot be run, by position: a required field, such as a file, is not set."""
    return {
        place: f"requires {row.requires}"
        for place, row in enumerate(table.rows)
        if row.requires and {**table.base, **row.set, **changes}.get(row.requires) is None
    }


def paper_settings(table: Table, row: int, column: int) -> dict[str, object]:
    """Return the settings of the paper's cell, before any scale; equal for cells, also of two tables, of one run."""
    base, *entries = table_layers(table)
    return {p: one.value for p, one in _merge([base, entries[column], entries[len(table.columns) + row]]).items()}


class Setting(NamedTuple):
    """A field's value and the layer that it comes from, the later the higher."""

    value: object
    entry: str
    rank: int


def _layers(table: Table, scale: str, row: int, column: int) -> list[Layer]:
    """Return base, scale, column and row, with the paper's data sets replaced by the scale's."""
    size = table.scale[scale]
    base, *entries = table_layers(table)
    chosen = [base, entries[column], entries[len(table.columns) + row]]
    mapped = [Layer(entry, _mapped(fields, size)) for entry, fields in chosen]
    threads = {} if size.threads is None else {"runtime.threads": size.threads}
    return [mapped[0], Layer(f"scale.{scale}", {**threads, **size.set}), *mapped[1:]]


def _shared(table: Table, scale: str, layers: list[Layer]) -> list[Layer]:
    """Add the settings of the scale for all methods that have them. Raises ValueError if no method has one."""
    from viladiff.methods import METHODS

    shared = table.scale[scale].shared_method_fields
    if not shared:
        return layers
    merged = _merge(layers)
    try:
        found = _known(merged)
    except ConfigError:  # an unknown method or data set: ``_check`` says which entry names it
        return layers
    here = f"{table.name}.toml: scale.{scale}: shared_method_fields"
    every = {path for method in METHODS for path in _known(merged, method) if path.startswith("method.")} - {*CHOOSERS}
    for path in shared:
        if path not in every:
            raise ValueError(f"{here}: {path}: not a field of any method{did_you_mean(path, every)}")
        if path in table.scale[scale].set:
            raise ValueError(f"{here}: {path}: set has it too; keep one")
    known = found.keys() - {path for path, one in merged.items() if one.rank > _SCALE}
    fields = {path: value for path, value in shared.items() if path in known}
    return [*layers, Layer(f"scale.{scale}: shared_method_fields", fields)]


def _with_recipe(table: Table, scale: str, merged: Mapping[str, Setting]) -> dict[str, Setting]:
    """Add the fields of the scale's recipe that neither the scale nor a layer above it sets.

    Raises ValueError for a recipe with unknown fields, or without settings of the cell's data set.
    """
    recipe = table.scale[scale].recipe
    if not recipe:
        return dict(merged)
    try:
        _known(merged)
    except ConfigError:  # an unknown method or data set: ``_check`` says which entry names it
        return dict(merged)
    try:
        fields = recipe_fields(recipe, {path: one.value for path, one in merged.items()})
    except ConfigError as error:
        lines = str(error).splitlines()
        raise ValueError(
            error_lines("\n".join(f"{table.name}.toml: scale.{scale}: {line}" for line in lines))
        ) from None
    taken = {path for path, one in merged.items() if one.rank >= _SCALE}
    if taken & {"train.steps", "train.epochs"}:
        taken |= {"train.steps", "train.epochs"}
    free = {path: one for path, one in fields.items() if path not in taken}
    ranks = {path: _PROTOCOL if shared(path) else _SCALE for path in free}
    return {**merged, **{path: Setting(one.value, one.entry, ranks[path]) for path, one in free.items()}}


def _with_published(merged: Mapping[str, Setting]) -> dict[str, Setting]:
    """Add the fields of the cell's publication that no layer above the scale sets."""
    try:
        fields = published_fields({path: one.value for path, one in merged.items()})
    except ConfigError:  # an unknown method or data set: ``_check`` says which entry names it
        return dict(merged)
    entry = f"the published settings of {merged['method.name'].value}" if "method.name" in merged else "published"
    free = {path: value for path, value in fields.items() if path not in merged or merged[path].rank <= _SCALE}
    return {**merged, **{path: Setting(value, entry, _SCALE) for path, value in free.items()}}


def _known(merged: Mapping[str, Setting], method: str | None = None) -> dict[str, FieldInfo]:
    """Return the fields of a cell's data set and method. Raises ConfigError if one is unknown."""
    from viladiff.runs.config import RunConfig, schema

    plain = RunConfig()
    defaults = {"data.dataset": plain.data.dataset, "method.name": plain.method.name}
    now = defaults | {path: str(one.value) for path, one in merged.items()}
    return schema(now["data.dataset"], method or now["method.name"])


def _mapped(fields: Mapping[str, object], size: Scale) -> dict[str, object]:
    """Replace the paper's data sets, lists and lengths by the scale's substitutes."""
    found: dict[str, object] = {}
    for path, value in fields.items():
        if path == "data.dataset":
            value = size.datasets.get(str(value), value)
        found |= size.substitute.get(f"{path}={value}", {path: value})
    return found


def _merge(layers: Iterable[Layer]) -> dict[str, Setting]:
    """Merge as in ``cells``; a chooser that no earlier layer names drops nothing, since their settings are for any."""
    merged: dict[str, Setting] = {}
    for rank, (entry, fields) in enumerate(layers):
        for chooser in CHOOSERS:
            if chooser in fields and chooser in merged and merged[chooser].value != fields[chooser]:
                section = chooser.partition(".")[0]
                own = {path for path in merged if path.startswith(f"{section}.") and not path.startswith(COMMON)}
                merged = {path: one for path, one in merged.items() if path not in own}
        for one, other in (("train.steps", "train.epochs"), ("train.epochs", "train.steps")):
            if one in fields:
                merged.pop(other, None)
        merged |= {path: Setting(value, entry, rank) for path, value in fields.items()}
    return merged


def _fitting(
    changes: Mapping[str, object], settled: Mapping[tuple[int, int], Mapping[str, Setting]]
) -> dict[tuple[int, int], Mapping[str, object]]:
    """Restrict ``changes`` for each cell to the fields of its method and data set."""
    fitting: dict[tuple[int, int], Mapping[str, object]] = {}
    for place, before in settled.items():
        try:
            known = _known({**before, **{path: Setting(value, _TYPED, 0) for path, value in changes.items()}})
        except ConfigError:
            return dict.fromkeys(settled, changes)
        fitting[place] = {path: value for path, value in changes.items() if path in known}
    if set(changes) - {path for fields in fitting.values() for path in fields}:
        return dict.fromkeys(settled, changes)
    return fitting


def _check(table: Table, found: Sequence[Cell], settled: Mapping[tuple[int, int], Mapping[str, Setting]]) -> None:
    """Raise ValueError with a line for each error, which names the entry that set the field."""
    from viladiff.runs.config import RunConfig, override

    faults: dict[str, None] = {}
    for cell in found:
        try:
            override(RunConfig(), cell.changes)
        except ConfigError as error:
            for line in str(error).splitlines():
                faults[f"{table.name}.toml: {_blamed(line, table, cell, settled[cell.row, cell.column])}: {line}"] = (
                    None
                )
    if faults:
        raise ValueError(error_lines("\n".join(faults)))


def _check_chooses(table: Table, found: Iterable[Cell]) -> None:
    """Raise ValueError if a run that chooses settings would be scored on the images of reported results."""
    for cell in found:
        split = cell.changes.get("eval.split", "dev" if embedded(cell.changes) else "val")
        if split not in ("dev", "holdout"):
            where = entry_name("rows", cell.row, table.rows[cell.row].label)
            raise ValueError(
                f"{table.name}.toml: {where}: eval.split = {split!r}: settings are chosen by this table (chooses = "
                "true), so that its runs are not scored on what results are quoted from; allowed: dev, holdout"
            )


def _blamed(line: str, table: Table, cell: Cell, settled: Mapping[str, Setting]) -> str:
    """Return the last layer that set a field named in the message, or the cell."""
    named = set(re.findall(r"[a-z_.]*[a-z]", line))
    setting = [one for path, one in settled.items() if path in named]
    if setting:
        return max(setting, key=lambda one: one.rank).entry
    row, column = table.rows[cell.row].label, table.columns[cell.column].label
    return f"{entry_name('rows', cell.row, row)} in {entry_name('columns', cell.column, column)}"
