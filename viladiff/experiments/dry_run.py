"""The dry run of a table: its runs and their cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from viladiff.core.messages import format_seconds, printable
from viladiff.experiments.target_device import target_device
from viladiff.runs.job import ExecutionSettings, PlannedRun
from viladiff.runs.store import Store
from viladiff.tables.estimate import cost_lines, estimate
from viladiff.tables.plan import Plan, State, states
from viladiff.tables.spec import OWN_LISTS

SIGNS: dict[State, str] = {
    "done": "done",
    "stale": "stale",
    "failed": "failed",
    "running": "running",
    "begun": "begun",
    "missing": "to run",
}
STYLES: dict[State, str] = {"done": "green", "failed": "red", "stale": "yellow", "running": "cyan", "begun": "cyan"}


def print_dry_run(
    plan: Plan,
    store: Store,
    settings: ExecutionSettings,
    out: Path,
    priced: tuple[float | None, str | None] = (None, None),
    beside: tuple[Plan, Store] | None = None,
) -> None:
    """Print the grid of cells with their states, runs, steps and seconds, and all output paths.

    priced: ``--hourly-price`` and ``--device``. ``beside``: the plan of the scale whose committed records stand beside
    these runs, and a store of those alone.
    """
    from viladiff.cluster.resources import concurrency

    found = states(plan, store)
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(f"[bold]{escape(plan.table.title)}[/bold], scale {plan.scale}, seeds {_listed(plan.seeds)}\n")
    console.print(_grid(plan, found) if beside is None else _grid_beside(plan, found, *beside))
    left = [run for run_id, run in plan.runs.items() if found[run_id] != "done"]
    room = concurrency(settings, left)
    price, named = priced
    device = target_device(named, plan.runs.values())
    guess = estimate(plan, store, room.slots if room else 1, price, device)
    many = f"{room.slots} at once" if room else "as many at once as the cluster can run"
    workers = max((run.workers for run in left), default=1)
    each = f"{settings.threads} {'thread' if settings.threads == 1 else 'threads'} each"
    about = "" if guess.seconds is None else "about "
    spread = "" if room else " of sequential work"
    lists = _pictures(left) | ({"labelled": OWN_LISTS} if plan.table.scale[plan.scale].split_per_seed else {})
    recipe = plan.table.scale[plan.scale].recipe
    lines = {
        **({"recipe": f"{recipe}; viladiff methods --recipe {recipe} lists it"} if recipe else {}),
        "cells": f"{guess.cells} with {guess.runs} different runs, of which {guess.done} are done",
        "to train": f"{len(left)} runs, {sum(run.steps for run in left):,} steps, {many}, "
        + (f"{workers} workers with {each}" if workers > 1 else each),
        **lists,
        **({"GPUs": room.note} if room and room.note else {}),
        "time": f"{about}{format_seconds(guess.seconds, 'unknown')}{spread} ({guess.basis})",
        **cost_lines(guess, device, price),
        **({} if beside is None else {"records": _committed(*beside)}),
        "runs": str(store.root),
        "page": str(out / "index.html"),
    }
    console.print()
    width = max(map(len, lines))
    for name, text in lines.items():
        console.print(f"{name:<{width}}  {escape(printable(text))}", soft_wrap=True)
    if "stale" in found.values():
        console.print("\nstale: the record of the same settings is of older code, data or weights, and is not used")


def _pictures(left: Sequence[PlannedRun]) -> dict[str, str]:
    """Return the size of the picture cache of the runs, if one is asked for; loads torch and opens the data then."""
    if not any("runtime.picture_cache" in run.changes for run in left):
        return {}
    from viladiff.data.loading.picture_space import planned_space
    from viladiff.methods import METHODS
    from viladiff.runs.config import RunConfig, override

    configs = [override(RunConfig(), run.changes) for run in left]
    space = planned_space((cfg, METHODS[cfg.method.name].views.unlabelled) for cfg in configs)
    return {} if space is None else {"pictures": space.text()}


def _grid(plan: Plan, found: dict[str, State]) -> Grid:
    grid = Grid("", *(escape(plan.table.columns[column].label) for column in plan.columns), box=None, pad_edge=False)
    numbers = plan.table.row_numbers
    for row in plan.rows:
        label = plan.table.rows[row].label
        later = plan.unavailable.get(row)
        cells = [_cell(plan, found, row, column) if later is None else later.split(":")[0] for column in plan.columns]
        grid.add_row(f"{numbers[row]:>2}  {escape(label)}", *cells)
    return grid


def _grid_beside(plan: Plan, found: dict[str, State], other: Plan, committed: Store) -> Grid:
    """Return every row of either plan; for each column the runs trained here and the number of committed records."""
    columns = sorted({*plan.columns, *other.columns})
    labels = [escape(plan.table.columns[column].label) for column in columns]
    heads = (head for label in labels for head in (f"{label}, here", "published"))
    grid = Grid("", *heads, box=None, pad_edge=False)
    there = committed.records()
    for row in dict.fromkeys((*other.rows, *plan.rows)):
        cells = []
        for column in columns:
            names = other.run_ids(row, column)
            done = sum(name in there for name in names)
            said = f"{done} of {len(names)} records" if done else "no record"
            cells += [_cell(plan, found, row, column) or "–", said]
        grid.add_row(f"{plan.table.row_numbers[row]:>2}  {escape(plan.table.rows[row].label)}", *cells)
    return grid


def _committed(other: Plan, committed: Store) -> str:
    there = committed.records().keys() & other.runs.keys()
    if not there:
        return f"none committed for scale {other.scale}; the page shows only runs of this machine"
    return f"{len(there)} of {len(other.runs)} runs of scale {other.scale} are committed"


def _cell(plan: Plan, found: dict[str, State], row: int, column: int) -> str:
    """Return "done" or "2 done, 1 to run"."""
    asked = [found[run_id] for run_id in plan.run_ids(row, column)]
    parts = [
        f"[{STYLES.get(state, 'default')}]{asked.count(state) if len(asked) > 1 else ''} {sign}".replace("] ", "]")
        + "[/]"
        for state, sign in SIGNS.items()
        if state in asked
    ]
    return ", ".join(parts)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
