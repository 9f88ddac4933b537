"""The plan of a table's runs: equal cells once, and finished ones not again.

A plan names its runs, for which data sets, captions and weights have to be read; it is therefore cached in a file, and
with that file nothing here loads torch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import TypeAdapter

from viladiff.core.atomic import write_atomically
from viladiff.core.hashing import sha256_hex
from viladiff.core.source_digest import code_digest, file_digest, plan_stem
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import RunRecord
from viladiff.runs.run_name import PLACES, arithmetic
from viladiff.tables.cells import cells, choose, seeds_by_column, unavailable
from viladiff.tables.contrasts import Contrast, contrasts
from viladiff.tables.recipes.recipe import recipe_file
from viladiff.tables.spec import ORACLE, Claim, Table
from viladiff.tables.stated import Stated, stated

State = Literal["done", "stale", "failed", "running", "begun", "missing"]

_FORMAT = 5
"""Raised when the file of a plan means something else than before."""
_DATA_PACKAGES = ("numpy", "scipy", "scikit-learn", "torch")
"""What else decides the pixels, words and numbers behind a run's name."""
_NOTHING: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True)
class PlannedCell:
    row: int
    column: int
    seed: int
    run_id: str


@dataclass(frozen=True)
class Plan:
    table: Table
    scale: str
    rows: tuple[int, ...]
    """Places in ``table.rows`` that were asked for, controls last."""
    columns: tuple[int, ...]
    seeds: tuple[int, ...]
    cells: tuple[PlannedCell, ...]
    """Seed by seed, so that a campaign that is cut short leaves whole tables."""
    runs: dict[str, PlannedRun]
    """In the order of their first cells."""
    unavailable: dict[int, str] = field(default_factory=dict)
    """Why rows that were asked for have no cells, by place."""
    published: tuple[Stated, ...] = ()
    """What the publications of the cells' methods set there, and what the runs have."""
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fields where nothing is set, by ``kind_of``; none of ``run_name.PLACES``."""
    file: Path | None = field(default=None, compare=False)
    """Where it is kept for the next time; None where it is made each time."""

    def run_ids(self, row: int, column: int) -> tuple[str, ...]:
        """Return the runs of a cell, one a seed; empty for a cell that was not selected."""
        return tuple(cell.run_id for cell in self.cells if (cell.row, cell.column) == (row, column))

    @cached_property
    def ceilings(self) -> frozenset[int]:
        """Rows whose runs read true masks of unlabelled images, by the spec or by the command line."""
        read = {name for name, run in self.runs.items() if run.changed.get(ORACLE, "none") != "none"}
        found = {cell.row for cell in self.cells if cell.run_id in read}
        return frozenset(found | {row for row in self.rows if self.table.rows[row].oracle})

    @cached_property
    def asked_of(self) -> tuple[frozenset[int], frozenset[int]]:
        """Rows and columns that claims are asked of: what the scale runs when none are named, and what was named."""
        rows, columns, _ = choose(self.table, self.scale)
        return frozenset(rows) | frozenset(self.rows), frozenset(columns) | frozenset(self.columns)

    def contrasts(self, claim: Claim) -> list[Contrast]:
        """Return the contrasts of a claim without those on rows and columns that this scale leaves out."""
        return contrasts(self.table, claim, *self.asked_of)

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """The table's claims, but those that ask only about rows and columns that this scale leaves out."""
        return tuple(claim for claim in self.table.claims if self.contrasts(claim) or not contrasts(self.table, claim))

    def left_out(self, claim: Claim) -> str:
        """Return what is added to a verdict on a claim of which this scale leaves rows or columns out; else empty."""
        among, every = self.contrasts(claim), contrasts(self.table, claim)
        return "" if among == every else f"; other rows and columns are not run at scale {self.scale}"

    def by_seed(self, row: int, column: int) -> dict[int, str]:
        """Return the runs of a cell by seed."""
        return {cell.seed: cell.run_id for cell in self.cells if (cell.row, cell.column) == (row, column)}

    def default(self, changed: Mapping[str, Any], path: str) -> Any:
        """Return a field's value in a run with these changed fields that does not set it; None if the plan has none."""
        return self.defaults.get(kind_of(changed), _NOTHING).get(path)

    def settled(self, record: RunRecord) -> RunRecord:
        """Return the record of a planned run with the plan's defaults in ``config``.

        A run's name binds its changed fields alone; the record's values of other fields are not reliable.
        """
        plain = self.defaults.get(kind_of(record.changed), _NOTHING)
        rest = {path: value for path, value in plain.items() if path not in record.changed}
        return RunRecord(**{**dict(record), "config": {**record.config, **rest}})


class RunStore(Protocol):
    """The interface of a store that a plan reads."""

    def records(self) -> dict[str, RunRecord]: ...

    def directory(self, run_id: str) -> Path: ...

    def failure(self, run_id: str) -> object | None: ...

    def holder(self, run_id: str) -> object | None: ...


class _Kept(NamedTuple):
    """The cached part of a plan; titles come from the table's present labels."""

    cells: tuple[PlannedCell, ...]
    runs: tuple[PlannedRun, ...]
    unavailable: dict[int, str] = {}  # noqa: RUF012, never changed
    published: tuple[Stated, ...] = ()
    defaults: dict[str, dict[str, Any]] = {}  # noqa: RUF012, never changed


def make_plan(
    table: Table,
    scale: str,
    *,
    seeds: Sequence[int] | None = None,
    rows: Iterable[str | int] | None = None,
    columns: Iterable[str | int] | None = None,
    changes: Mapping[str, object] = _NOTHING,
    cache: Path | None = None,
) -> Plan:
    """Return the unique runs behind a table's cells, named as ``viladiff.training.trainer.Trainer`` names them.

    ``changes`` come from the command line and override everything that the table sets. ``cache`` is a directory for
    plans; one made there before from the same fields, code and weights is used again, and torch is not loaded. Plans
    with data that is not built in are not cached, since it may change. Raises ValueError for what cannot be run.
    """
    chosen_rows, chosen_columns, chosen_seeds = choose(table, scale, seeds, rows, columns)
    file = None
    if cache is not None:
        per_column = seeds_by_column(table, scale, chosen_columns, seeds)
        key = _key(table, scale, chosen_rows, per_column, changes)
        file = Path(cache) / f"{plan_stem()}-{key}.json"
    kept = None if file is None else _read(file)
    if kept is None:
        kept, lasting = _make(table, scale, chosen_rows, chosen_columns, seeds, changes)
        if file is not None and lasting:
            _write(file, kept)
    titled = _titled(table, kept)
    rest = kept.cells, titled, kept.unavailable, kept.published, kept.defaults, file
    return Plan(table, scale, chosen_rows, chosen_columns, chosen_seeds, *rest)


def _make(
    table: Table,
    scale: str,
    rows: Sequence[int],
    columns: Sequence[int],
    seeds: Sequence[int] | None,
    changes: Mapping[str, object],
) -> tuple[_Kept, bool]:
    """Make the plan; return it, and whether it holds for as long as its key does."""
    from viladiff.data.sources import embedded_datasets
    from viladiff.runs.config import RunConfig, defaults, override
    from viladiff.runs.config import non_default_fields as changed
    from viladiff.training.fingerprints import name_runs

    labels = [table.rows[i].label for i in rows], [table.columns[i].label for i in columns]
    found = cells(table, scale, seeds, *labels, changes)
    configs = [override(RunConfig(), cell.changes) for cell in found]
    planned: dict[str, PlannedRun] = {}
    where, plain = [], {}
    for cell, cfg, named in zip(found, configs, name_runs(configs), strict=True):
        where.append(PlannedCell(cell.row, cell.column, cell.seed, named.run_id))
        fields = {path: value for path, value in changed(cfg).items() if not path.startswith("runtime.")}
        how = cfg.runtime.workers, cfg.runtime.threads, arithmetic(cfg.train.precision, cfg.train.tf32)
        run = PlannedRun(named.run_id, cell.changes, "", named.steps, fields, *how, named.data)
        planned.setdefault(named.run_id, run)
        plain[kind_of(fields)] = {
            path: value
            for path, value in defaults(cfg.data.dataset, cfg.method.name).items()
            if not path.startswith(PLACES)
        }
    # Through JSON, so that a plan is the same whether it was read or made: tuples become lists.
    later = {row: why for row, why in unavailable(table, changes).items() if row in rows}
    kept = _loads(_dumps(_Kept(tuple(where), tuple(planned.values()), later, stated(table, found), plain)))
    fixed = (cfg.data.dataset in embedded_datasets() and cfg.data.text_encoder == "words" for cfg in configs)
    return kept, all(fixed) and not any(cfg.runtime.captions for cfg in configs)


def _titled(table: Table, kept: _Kept) -> dict[str, PlannedRun]:
    titles: dict[str, str] = {}
    for cell in kept.cells:
        row, column = table.rows[cell.row].label, table.columns[cell.column].label
        titles.setdefault(cell.run_id, f"{row}, {column}, seed {cell.seed}")
    return {run.run_id: replace(run, title=titles[run.run_id]) for run in kept.runs}


# Keeping


def _key(
    table: Table,
    scale: str,
    rows: Sequence[int],
    columns: Mapping[int, Sequence[int]],
    changes: Mapping[str, object],
) -> str:
    """Return a key of everything that a plan depends on; not of titles, labels, printed numbers, notes and claims.

    ``columns``: each with its seeds.
    """
    size = table.scale[scale]
    places = [
        {"base": table.base},
        *({i: table.columns[i].set} for i in columns),
        *({i: [table.rows[i].set, table.rows[i].requires]} for i in rows),
    ]
    fields = {
        "scale": scale,
        "set": size.set,
        "shared_method_fields": size.shared_method_fields,
        "published": size.published,
        "recipe": size.recipe and recipe_file(size.recipe).read_text(encoding="utf-8"),
        "datasets": size.datasets,
        "substitute": size.substitute,
        "threads": size.threads,
        "split_per_seed": size.split_per_seed,
    }
    weights = {
        str(one["model.weights"]) for one in (table.base, size.set, *_sets(table), changes) if "model.weights" in one
    }
    content = [
        _FORMAT,
        fields,
        places,
        {i: list(seeds) for i, seeds in columns.items()},
        sorted((path, repr(value)) for path, value in changes.items()),
        [file_digest(Path(path)) for path in sorted(weights)],
        code_digest(),
        [_version(name) for name in _DATA_PACKAGES],
    ]
    return sha256_hex(json.dumps(content, sort_keys=True))[:24]


def _sets(table: Table) -> list[dict[str, Any]]:
    return [*(row.set for row in table.rows), *(column.set for column in table.columns)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


_ADAPTER = TypeAdapter(_Kept)


def _dumps(kept: _Kept) -> str:
    cells, runs = [asdict(cell) for cell in kept.cells], [asdict(run) for run in kept.runs]
    published = [one._asdict() for one in kept.published]
    rest = {"unavailable": kept.unavailable, "published": published, "defaults": kept.defaults}
    return json.dumps({"cells": cells, "runs": runs, **rest})


def _loads(text: str) -> _Kept:
    return _ADAPTER.validate_json(text)


def _read(file: Path) -> _Kept | None:
    """Read the plan in a file; None if there is none, or if it is damaged and must be made again."""
    try:
        checksum, _, text = file.read_text(encoding="utf-8").partition("\n")
        if sha256_hex(text) != checksum:
            return None
        return _loads(text)
    except (OSError, ValueError):
        return None


def _write(file: Path, kept: _Kept) -> None:
    text = _dumps(kept)
    # A plan that cannot be kept is still a plan: the next one takes a few seconds longer.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, f"{sha256_hex(text)}\n{text}".encode())


# What there is


def states(plan: Plan, store: RunStore) -> dict[str, State]:
    """Return the state of each run: done, running (a process holds it), failed, begun (checkpoint), stale or missing.

    The first that holds, in this order. Stale: there is only a record with the same fields and seed and another name,
    made with older code, data or weights.
    """
    records = store.records()
    older = {fields_of(record.changed) for record in records.values()}
    return {run_id: _state(run, store, records, older) for run_id, run in plan.runs.items()}


def _state(run: PlannedRun, store: RunStore, records: Mapping[str, RunRecord], older: set[str]) -> State:
    if run.run_id in records:
        return "done"
    if store.holder(run.run_id) is not None:
        return "running"
    if store.failure(run.run_id) is not None:
        return "failed"
    if (store.directory(run.run_id) / "checkpoint.pt").is_file():
        return "begun"
    return "stale" if fields_of(run.changed) in older else "missing"


def kind_of(changed: Mapping[str, Any]) -> str:
    """Return data set and method, which decide a run's defaults."""
    return f"{changed.get('data.dataset')} {changed.get('method.name')}"


def fields_of(changed: Mapping[str, Any]) -> str:
    """Return the changed fields outside ``runtime`` as text, the seed among them."""
    return json.dumps(
        {path: value for path, value in changed.items() if not path.startswith("runtime.")}, sort_keys=True
    )
