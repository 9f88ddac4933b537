"""Planned runs that cannot be trained or scored: found before the first one starts. Torch is loaded if one is new."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from viladiff.core.progress import counter
from viladiff.data.sources import embedded_datasets
from viladiff.runs.job import PlannedRun
from viladiff.tables.plan import Plan
from viladiff.training.checked import Checked, shares_statistics, usual

if TYPE_CHECKING:
    from viladiff.runs.config import RunConfig

SHOWN = 5
"""Faults of a sweep's points that a message quotes."""


def infeasible(runs: Iterable[PlannedRun], fetch: bool | None = False, show: bool = True) -> dict[str, list[str]]:
    """Return the faults of the runs that have some, by name: a sentence each, with what to set.

    Each distinct combination of method, encoder, crop and classes is tried once, and its result stored for the next
    call. ``fetch`` downloads weights that are not in this machine's cache; else no network is used. None asks for no
    weights, since other machines train, and takes it that these have GPUs; a start looks again.
    """
    runs = [run if fetch is not None else _elsewhere(run) for run in runs if run.data is not None]
    shapes = _shape_faults(runs, show)
    weights: dict[str, str | None] = {}
    found = {}
    for run in runs:
        faults = shapes.get(run.run_id, [])
        if fetch is not None and _downloads(run):
            model = _config(run).model
            name = model.model_dump_json()
            if name not in weights:
                from viladiff.models.encoders.build import weights_fault

                weights[name] = weights_fault(model, fetch)
            faults = [*faults, *filter(None, [weights[name]])]
        if faults:
            found[run.run_id] = faults
    return found


def _shape_faults(runs: Sequence[PlannedRun], show: bool) -> dict[str, list[str]]:
    asked = [run for run in runs if run.data is not None and not usual(run.changed, run.workers, run.data)]
    if not asked:
        return {}
    store = Checked()
    known: dict[str, list[str]] = {}
    keys: dict[str, str] = {}
    new: dict[str, PlannedRun] = {}
    for run in asked:
        assert run.data is not None
        shared = shares_statistics(run.workers, str(run.changes.get("runtime.device", "auto")))
        stored = store.key(run.changed, run.workers, run.data, shared)
        keys[run.run_id] = key = stored or json.dumps([run.changed, run.workers, shared, run.data], sort_keys=True)
        if key not in known and key not in new:
            found = store.find(stored)
            if found is None:
                new[key] = run
            else:
                known[key] = found
    with counter("checking networks", show and sys.stderr.isatty() and len(new) > 1) as advance:
        for i, (key, run) in enumerate(new.items()):
            advance(i, len(new))
            known[key] = _examined(run, store)
    return {run_id: known[key] for run_id, key in keys.items()}


def _elsewhere(run: PlannedRun) -> PlannedRun:
    if run.workers == 1 or run.changes.get("runtime.device") == "cpu":
        return run
    return replace(run, changes={**run.changes, "runtime.device": "cuda"})


def _examined(run: PlannedRun, store: Checked) -> list[str]:
    from viladiff.training.feasibility import run_faults

    assert run.data is not None
    return run_faults(_config(run), run.data, store)


def _config(run: PlannedRun) -> RunConfig:
    from viladiff.runs.config import RunConfig, override

    return override(RunConfig(), run.changes)


def _downloads(run: PlannedRun) -> bool:
    """Return whether weights may come from outside, judged without torch."""
    own = run.changed.get("data.dataset") in embedded_datasets() and "model.encoder" not in run.changed
    return not own and run.changed.get("model.weights") is None and run.changed.get("model.pretrained") != "none"


def row_lines(plan: Plan, faults: dict[str, list[str]]) -> list[str]:
    """Return a line for each row and fault: its number, label, the columns if not all of them, and what to set."""
    where: dict[tuple[int, str], list[int]] = {}
    for cell in plan.cells:
        for fault in faults.get(cell.run_id, []):
            columns = where.setdefault((cell.row, fault), [])
            if cell.column not in columns:
                columns.append(cell.column)
    table = plan.table
    lines = []
    for row in plan.rows:
        for (at, fault), columns in where.items():
            if at == row:
                labels = ", ".join(table.columns[column].label for column in columns)
                some = "" if len(columns) == len(plan.columns) else f", {labels}"
                lines.append(f"row {table.row_numbers[row]} {table.rows[row].label!r}{some}: {fault}")
    return lines


def refuse_rows(plan: Plan, left: Iterable[PlannedRun], fetch: bool | None = False) -> None:
    """Raise ValueError with ``row_lines`` if runs of the plan that are left to do cannot be trained or scored."""
    faults = infeasible(left, fetch)
    if faults:
        wrong = {cell.row for cell in plan.cells if cell.run_id in faults}
        fine = [plan.table.row_numbers[row] for row in plan.rows if row not in wrong and row not in plan.unavailable]
        more = [f"{len(fine)} rows can run: --rows {' '.join(fine)}"] if fine else []
        raise ValueError("\n".join(["these rows cannot run:", *row_lines(plan, faults), *more]))


def refuse_points(runs: Iterable[PlannedRun], fetch: bool | None = False) -> None:
    """Raise ValueError if runs of a sweep cannot be trained or scored."""
    lines = list(dict.fromkeys(_sentences(infeasible(runs, fetch))))
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise ValueError("\n".join([*lines[:SHOWN], *more]))


def _sentences(faults: dict[str, list[str]]) -> Iterator[str]:
    for some in faults.values():
        yield from some
