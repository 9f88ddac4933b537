"""The dry run of all tables: unique runs, since one run is in many cells, and remaining ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from viladiff.cluster.resources import threads_of_a_run
from viladiff.config.base import parse_overrides
from viladiff.core.messages import format_seconds
from viladiff.experiments.tables import TableJob, plan_table, seeds_of
from viladiff.runs.job import ExecutionSettings
from viladiff.tables.cells import cells, unavailable
from viladiff.tables.estimate import estimate
from viladiff.tables.plan import Plan
from viladiff.tables.spec_file import load_table

if TYPE_CHECKING:
    from viladiff.cluster.resources import Capacity

UNKNOWN = "a time that is not known"


@dataclass(frozen=True)
class TableShare:
    """One table's part of the whole."""

    name: str
    cells: int
    runs: frozenset[str]
    """Names of its runs; where data are not here, names made of settings alone."""
    waiting: int
    """Rows that cannot be run yet."""
    job: TableJob | None = None
    """None where its runs cannot be named."""
    why: str = ""


def outline_all(paths: Sequence[Path], args: argparse.Namespace) -> int:
    """Print cells, runs, finished runs and hours, table by table and in total; train nothing.

    ``args``: as ``viladiff plan`` reads them. Raises ValueError for options that only one table can have.
    """
    for name in ("rows", "columns", "encoder", "report_dir"):
        if getattr(args, name, None):
            raise ValueError(f"--{name.replace('_', '-')} is not supported by `plan all`")
    shares = [share_of(path, args) for path in paths]
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    grid = Grid(
        "table", *("cells", "runs", "new runs", "done", "time alone", "unavailable rows"), box=None, pad_edge=False
    )
    seen: set[str] = set()
    for share in shares:
        new, seen = share.runs - seen, seen | share.runs
        grid.add_row(
            share.name, *map(str, (share.cells, len(share.runs), len(new))), *_left(share, args), str(share.waiting)
        )
    console.print(f"[bold]All tables[/bold], scale {escape(args.scale)}\n")
    console.print(grid)
    console.print()
    for name, text in totals(shares, args).items():
        console.print(f"{name:<11}  {escape(text)}", soft_wrap=True)
    return 0


def share_of(path: Path, args: argparse.Namespace) -> TableShare:
    """Return a table's cells and runs; if its data cannot be read, count equal settings as one run.

    Raises ValueError for other errors.
    """
    table = load_table(path)
    if args.scale not in table.scale:
        return TableShare(table.name, 0, frozenset(), 0, why=f"has no scale {args.scale}")
    try:
        job = plan_table(path, args, "")
    except ValueError as error:
        found = cells(table, args.scale, seeds_of(args.seeds), changes=dict(parse_overrides(args.changes)))
        from viladiff.runs.config import RunConfig, override, run_id

        names = frozenset(run_id(override(RunConfig(), cell.changes)) for cell in found)
        return TableShare(table.name, len(found), names, len(unavailable(table)), why=str(error).splitlines()[0])
    return TableShare(table.name, len(job.plan.cells), frozenset(job.plan.runs), len(job.plan.unavailable), job)


def totals(shares: Sequence[TableShare], args: argparse.Namespace) -> dict[str, str]:
    """Return the lines under the grid: cells against runs, time and money, and unknown ones."""
    unique = frozenset().union(*(share.runs for share in shares))
    all_cells = sum(share.cells for share in shares)
    lines = {"cells": f"{all_cells} with {len(unique)} different runs"}
    plan, job = merged(shares)
    if plan is not None and job is not None:
        room, gpus = _room(plan, job, args)
        price = args.hourly_price
        alone, guess = (estimate(plan, job.store, n, price, gpus) for n in (1, room.slots if room else 1))
        together = f", {format_seconds(guess.seconds, UNKNOWN)} with {room.slots} at once" if room else ""
        lines |= {
            "done": f"{guess.done} of {guess.runs} runs",
            "time": f"{format_seconds(alone.seconds, UNKNOWN)} of work left{together} ({guess.basis})",
        }
        lines |= {"cost": f"{guess.cost:.2f}"} if guess.cost is not None else {}
    waiting = sum(share.waiting for share in shares)
    lines |= {"unavailable": f"{waiting} rows, which require a field that is not set"} if waiting else {}
    lines |= {share.name: f"not timed: {share.why}" for share in shares if share.job is None}
    return lines


def merged(shares: Sequence[TableShare]) -> tuple[Plan | None, TableJob | None]:
    """Merge the plans, each run once, and return the job of the first; None if no table can be planned."""
    jobs = [share.job for share in shares if share.job is not None]
    if not jobs:
        return None, None
    runs = {name: run for job in reversed(jobs) for name, run in job.plan.runs.items()}
    every = tuple(cell for job in jobs for cell in job.plan.cells)
    return replace(jobs[0].plan, cells=every, runs=runs, unavailable={}), jobs[0]


def _room(plan: Plan, job: TableJob, args: argparse.Namespace) -> tuple[Capacity | None, bool | None]:
    """Return the capacity for the runs of a plan that are left, and whether they have GPUs; each None if unknown."""
    from viladiff.cluster.resources import concurrency, trains_on_gpus

    records = job.store.records()
    left = [run for run_id, run in plan.runs.items() if run_id not in records]
    threads = job.table.scale[args.scale].threads or threads_of_a_run(None)
    asked = ExecutionSettings(threads, args.gpus_per_trial, args.max_concurrent, address=args.address)
    room = concurrency(asked, left)
    return room, trains_on_gpus(room)


def _left(share: TableShare, args: argparse.Namespace) -> tuple[str, str]:
    """Return the state of a table, and the time of its remaining runs alone."""
    if share.job is None:
        return "?", "?"
    guess = estimate(share.job.plan, share.job.store, gpus=_room(share.job.plan, share.job, args)[1])
    return str(guess.done), format_seconds(guess.seconds, UNKNOWN)
