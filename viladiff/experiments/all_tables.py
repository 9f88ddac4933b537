"""The dry run of all tables: unique runs, since one run is in many cells, and remaining ones."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from viladiff.cluster.resources import threads_of_a_run
from viladiff.config.base import parse_overrides
from viladiff.core.messages import first_names, format_seconds, printable
from viladiff.core.progress import tracked
from viladiff.evaluation.devices import CPU
from viladiff.experiments.tables import TableJob, plan_table, seeds_of
from viladiff.experiments.target_device import target_device
from viladiff.runs.job import ExecutionSettings
from viladiff.runs.store import Store
from viladiff.tables.cells import cells, unavailable
from viladiff.tables.estimate import Target, cost_lines, estimate_on
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.spec import Table
from viladiff.tables.spec_file import load_table
from viladiff.training.run_cost import assumed_run

SHOWN = 3
"""Methods that a line names; more are counted."""
UNKNOWN = "a time that is not known"


@dataclass(frozen=True)
class TableShare:
    """One table's part of the whole."""

    name: str
    cells: int
    runs: frozenset[str]
    """Names of its runs; where data are not here, names made of settings alone."""
    waiting: tuple[str, ...] = ()
    """Rows that cannot be run yet, and why."""
    job: TableJob | None = None
    """None where its runs cannot be named."""
    why: str = ""
    absent: bool = False
    """Whether the table has no such scale."""
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
    shares = [share_of(path, args) for path in tracked(paths, "planning the tables")]
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    money = "cost" if args.hourly_price is not None else "US dollars"
    heads = ("table", "cells", "runs", "new runs", "done", "time alone", "GPU-hours", "GiB a run", money)
    rows: list[tuple[str, ...]] = []
    seen: set[str] = set()
    target = _target(shares, args)
    if target.device is not CPU and (every := _all_plans(shares)) is not None:
        target.steps.prepare(every.runs.values())
    for share in shares:
        if share.absent:
            continue
        new, seen = share.runs - seen, seen | share.runs
        counts = map(str, (share.cells, len(share.runs), len(new)))
        rows.append((share.name, *counts, *_left(share, target, args), str(len(share.waiting))))
    lists = _seeds(shares, args)
    console.print(f"[bold]All tables[/bold], scale {escape(args.scale)}{f', seeds {lists}' if lists else ''}\n")
    console.print(_filled((*heads, "unavailable rows"), rows))
    console.print()
    lines = totals(shares, args, target)
    width = max(11, *map(len, lines))
    for name, text in lines.items():
        console.print(f"{name:<{width}}  {escape(printable(text))}", soft_wrap=True)
    return 0


def _filled(heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Grid:
    """Return the grid without columns that have no entry, as GPU-hours of a plan for a processor."""
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    grid = Grid(*(heads[i] for i in kept), box=None, pad_edge=False)
    for row in rows:
        grid.add_row(*(row[i] for i in kept))
    return grid


def _seeds(shares: Sequence[TableShare], args: argparse.Namespace) -> str:
    """Return the seeds of the tables that are planned; empty where they differ."""
    found = {tuple(sorted({cell.seed for cell in share.plan.cells})) for share in shares if share.plan is not None}
    return ", ".join(map(str, found.pop())) if len(found) == 1 else ""


def share_of(path: Path, args: argparse.Namespace) -> TableShare:
    """Return a table's cells and runs; if its data cannot be read, count equal settings as one run.

    Raises ValueError for other errors.
    """
    table = load_table(path)
    if args.scale not in table.scale:
        return TableShare(table.name, 0, frozenset(), why=f"has no scale {args.scale}", absent=True)
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
        waiting = _waiting(table, unavailable(table))
        return TableShare(table.name, len(found), frozenset(names), waiting, why=why, assumed=whole)
    waiting = _waiting(table, job.plan.unavailable)
    return TableShare(table.name, len(job.plan.cells), frozenset(job.plan.runs), waiting, job)


def _waiting(table: Table, reasons: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(f"{table.rows[place].label!r} {why}" for place, why in reasons.items())


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
        partly = any(share.assumed is not None for share in shares)
        where = " in the tables whose data are here" if partly else ""
        lines |= {
            "done": f"{guess.done} of {guess.runs} runs{where}",
            "time": f"{format_seconds(alone.seconds, UNKNOWN)} of work left{where}{together} ({guess.basis})",
        }
        if partly and (whole := _all_plans(shares)) is not None:
            guess = estimate_on(whole, job.store, at_once)
        lines |= cost_lines(guess, target.device, args.hourly_price)
    elif (every := _all_plans(shares)) is not None:
        guess = estimate_on(every, _store(args), target)
        lines |= {"basis": guess.basis, **cost_lines(guess, target.device, args.hourly_price)}
    if sum(len(share.runs) for share in shares) > len(unique):
        lines["shared runs"] = "a run of several tables is in each table's numbers, and once in those of this list"
    return lines | _remarks(shares, args, target)


def _remarks(shares: Sequence[TableShare], args: argparse.Namespace, target: Target) -> dict[str, str]:
    """Return what a reader must know of single tables, by subject; tables with the same remark share a line."""
    lines = {}
    large = [text for share in shares if (text := _too_large(share, target))]
    if large:
        lines["too large"] = f"for the memory of {target.device.name}, and counted: {'; '.join(large)}"
    waiting: dict[str, list[str]] = {}
    for share in shares:
        for text in share.waiting:
            waiting.setdefault(text, []).append(share.name)
    if waiting:
        count, said = sum(map(len, waiting.values())), [f"{text} ({', '.join(at)})" for text, at in waiting.items()]
        lines["unavailable"] = f"{count} rows, not counted: {'; '.join(said)}"
    for title, assumed, what in (
        ("no data here", True, "costed with the published number of images, done runs not known"),
        ("not timed", False, ""),
    ):
        reasons: dict[str, list[str]] = {}
        for share in shares:
            if share.job is None and not share.absent and (share.assumed is not None) == assumed:
                reasons.setdefault(share.why, []).append(share.name)
        said = [f"{', '.join(names)} ({why})" for why, names in reasons.items()]
        if said:
            lines[title] = "; ".join([*said, *([what] if what else [])])
    absent = [share.name for share in shares if share.absent]
    if absent:
        lines["not planned"] = f"{', '.join(absent)}: no scale {args.scale}"
    return lines


def _too_large(share: TableShare, target: Target) -> str:
    """Return which runs of a table need more memory than the device has, and the most that one needs."""
    runs = share.plan.runs.values() if share.plan is not None and target.device.memory else ()
    needs = [
        (str(run.changed.get("method.name")), cost.peak_bytes)
        for run in runs
        if (cost := target.steps.of(run)) is not None and cost.peak_bytes > target.device.memory
    ]
    if not needs:
        return ""
    methods = sorted({method for method, _ in needs})
    most = f"{max(n for _, n in needs) / 2**30:.0f} GiB"
    return f"{share.name} {len(needs)} of {len(runs)} runs, up to {most} ({first_names(methods, SHOWN)})"


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


def _left(share: TableShare, target: Target, args: argparse.Namespace) -> tuple[str, str, str, str, str]:
    """Return the state of a table, the time of its remaining runs alone, and what they cost."""
    if share.plan is None:
        return ("not known", *("",) * 4)
    guess = estimate_on(share.plan, share.job.store if share.job else _store(args), target)
    hours = "" if guess.device_hours is None or target.device is CPU else f"{guess.device_hours:,.0f}"
    memory = f"{guess.peak_bytes / 2**30:.1f}" if guess.peak_bytes else ""
    cost = "" if guess.cost is None else f"{guess.cost:,.0f}"
    return "–" if share.job is None else str(guess.done), format_seconds(guess.seconds, UNKNOWN), hours, memory, cost
