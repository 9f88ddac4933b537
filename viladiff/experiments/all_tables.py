"""The dry run of all tables: unique runs, since one run is in many cells, and remaining ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from viladiff.cluster.resources import threads_of_a_run
from viladiff.config.base import parse_overrides
from viladiff.core.messages import format_seconds
from viladiff.evaluation.devices import CPU
from viladiff.experiments.tables import TableJob, plan_table, seeds_of
from viladiff.experiments.target_device import target_device
from viladiff.runs.job import ExecutionSettings
from viladiff.runs.store import Store
from viladiff.tables.cells import cells, unavailable
from viladiff.tables.estimate import Target, cost_lines, estimate_on
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.spec_file import load_table
from viladiff.training.run_cost import assumed_run

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
    assumed: Plan | None = None
    """Where its data are not here: its runs with as many images as the data set is published with."""

    @property
    def plan(self) -> Plan | None:
        """What its cost is estimated from."""
        return self.assumed if self.job is None else self.job.plan


def outline_all(paths: Sequence[Path], args: argparse.Namespace) -> int:
    """Print cells, runs, finished runs and hours, table by table and in total; train nothing.

    ``args``: as ``viladiff plan`` reads them. Raises ValueError for options that only one table can have.
    """
    for name in ("rows", "columns", "encoder", "report_dir"):
        if getattr(args, name, None):
            raise ValueError(f"--{name.replace('_', '-')} is not supported by `plan all`")
    shares = [share_of(path, args) for path in paths]
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    heads = ("cells", "runs", "new runs", "done", "time alone", "GPU-hours", "GiB a run", "cost", "unavailable rows")
    grid = Grid("table", *heads, box=None, pad_edge=False)
    seen: set[str] = set()
    target = _target(shares, args)
    for share in shares:
        new, seen = share.runs - seen, seen | share.runs
        counts = map(str, (share.cells, len(share.runs), len(new)))
        grid.add_row(share.name, *counts, *_left(share, target, args), str(share.waiting))
    console.print(f"[bold]All tables[/bold], scale {escape(args.scale)}\n")
    console.print(grid)
    console.print()
    for name, text in totals(shares, args, target).items():
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

        names = [run_id(override(RunConfig(), cell.changes)) for cell in found]
        runs = {name: assumed_run(cell.changes, name) for name, cell in zip(names, found, strict=True)}
        places = tuple(PlannedCell(c.row, c.column, c.seed, name) for name, c in zip(names, found, strict=True))
        known = {name: run for name, run in runs.items() if run is not None}
        whole = Plan(table, args.scale, (), (), (), places, known) if len(known) == len(runs) else None
        why = str(error).splitlines()[0]
        return TableShare(table.name, len(found), frozenset(names), len(unavailable(table)), why=why, assumed=whole)
    return TableShare(table.name, len(job.plan.cells), frozenset(job.plan.runs), len(job.plan.unavailable), job)


def totals(shares: Sequence[TableShare], args: argparse.Namespace, target: Target | None = None) -> dict[str, str]:
    """Return the lines under the grid: cells against runs, time and money, and unknown ones."""
    target = target or _target(shares, args)
    unique = frozenset().union(*(share.runs for share in shares))
    all_cells = sum(share.cells for share in shares)
    lines = {"cells": f"{all_cells} with {len(unique)} different runs"}
    plan, job = merged(shares)
    if plan is not None and job is not None:
        from viladiff.cluster.resources import concurrency

        records = job.store.records()
        left = [run for run_id, run in plan.runs.items() if run_id not in records]
        threads = job.table.scale[args.scale].threads or threads_of_a_run(None)
        asked = ExecutionSettings(threads, args.gpus_per_trial, args.max_concurrent, address=args.address)
        room = concurrency(asked, left)
        at_once = replace(target, concurrency=room.slots if room else 1)
        alone, guess = (estimate_on(plan, job.store, one) for one in (target, at_once))
        together = f", {format_seconds(guess.seconds, UNKNOWN)} with {room.slots} at once" if room else ""
        lines |= {
            "done": f"{guess.done} of {guess.runs} runs",
            "time": f"{format_seconds(alone.seconds, UNKNOWN)} of work left{together} ({guess.basis})",
        }
        lines |= cost_lines(guess, target.device)
    elif (every := _all_plans(shares)) is not None:
        lines |= cost_lines(estimate_on(every, _store(args), target), target.device)
    waiting = sum(share.waiting for share in shares)
    lines |= {"unavailable": f"{waiting} rows, which require a field that is not set"} if waiting else {}
    lines |= {share.name: _absent(share, args) for share in shares if share.job is None}
    return lines


def merged(shares: Sequence[TableShare]) -> tuple[Plan | None, TableJob | None]:
    """Merge the plans, each run once, and return the job of the first; None if no table can be planned."""
    jobs = [share.job for share in shares if share.job is not None]
    return (_merge([job.plan for job in jobs]), jobs[0]) if jobs else (None, None)


def _merge(plans: Sequence[Plan]) -> Plan:
    runs = {name: run for plan in reversed(plans) for name, run in plan.runs.items()}
    every = tuple(cell for plan in plans for cell in plan.cells)
    return replace(plans[0], cells=every, runs=runs, unavailable={})


def _all_plans(shares: Sequence[TableShare]) -> Plan | None:
    """Merge the plans of all tables, with data and without; None if there is none."""
    plans = [share.plan for share in shares if share.plan is not None]
    return _merge(plans) if plans else None


def _store(args: argparse.Namespace) -> Store:
    return Store(Path(args.runs_dir).expanduser().absolute())


def _target(shares: Sequence[TableShare], args: argparse.Namespace) -> Target:
    """Return the device that all tables are costed for; steps that they share are counted once."""
    whole = _all_plans(shares)
    device = target_device(args.device, whole.runs.values() if whole else ())
    return Target(device, price_per_hour=args.hourly_price)


def _absent(share: TableShare, args: argparse.Namespace) -> str:
    if share.assumed is None:
        return f"not timed: {share.why}"
    return f"not timed here, costed with the published number of images: {share.why}"


def _left(share: TableShare, target: Target, args: argparse.Namespace) -> tuple[str, str, str, str, str]:
    """Return the state of a table, the time of its remaining runs alone, and what they cost."""
    if share.plan is None:
        return ("?",) * 5
    guess = estimate_on(share.plan, share.job.store if share.job else _store(args), target)
    hours = "" if guess.device_hours is None or target.device is CPU else f"{guess.device_hours:,.0f}"
    memory = f"{guess.peak_bytes / 2**30:.1f}" if guess.peak_bytes else ""
    cost = "" if guess.cost is None else f"{guess.cost:,.0f}"
    if share.job is None:
        return "?", "?", hours, memory, cost
    return str(guess.done), format_seconds(guess.seconds, UNKNOWN), hours, memory, cost
