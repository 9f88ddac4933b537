"""Reproduction of published runs on this machine, and comparison with their committed records.

If processor, threads and torch are those of the record, every score has to be the same, bit for bit; otherwise the
difference in mIoU has to be within ``DEVIATIONS`` standard deviations over seeds of the published cells.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from viladiff.cluster.resources import threads_of_a_run
from viladiff.core.environment import processor, versions
from viladiff.core.installation import published_dir
from viladiff.core.messages import print_text
from viladiff.experiments import tables
from viladiff.runs.job import ExecutionSettings
from viladiff.runs.record import RunRecord
from viladiff.runs.store import Store
from viladiff.tables.plan import Plan, make_plan, states
from viladiff.tables.spec_file import load_table

DEVIATIONS = 2.5
_STATUS = {"holds": 0, "fails": 1, "not decided": 2}


class Compared(NamedTuple):
    verdict: Literal["holds", "fails", "not decided"]
    text: str


def reproduce(args: argparse.Namespace) -> int:
    """Trains what has a committed record and is not trained in ``args.runs_dir`` yet, and prints a line a run."""
    table = load_table(tables.find_table(args.table))
    runs_dir = Path(args.runs_dir).expanduser().absolute()
    cache = runs_dir / "plans"
    plan = make_plan(table, args.scale, seeds=[args.seed], rows=args.rows, columns=args.columns, cache=cache)
    committed = Store(runs_dir / "nothing", [published_dir()])
    there = committed.records()
    records = {name: there[name] for name in plan.runs if name in there}
    lacking = [Compared("not decided", text) for text in _lacking(plan, committed)]
    if args.dry_run or not records:
        for text in [*(one.text for one in lacking), *_outline(plan, records, runs_dir)]:
            print_text(text)
        return 0 if args.dry_run else 2
    every = make_plan(table, args.scale, rows=args.rows, columns=args.columns, cache=cache)
    store = Store(runs_dir)
    store.clean()
    stopped = _train(plan, records, store, _settings(plan, args))
    found = [*lacking]
    for run_id, theirs in records.items():
        mine, title = store.get(run_id), plan.runs[run_id].title
        if mine is None:
            found.append(Compared("fails", f"{title}: not finished; re-run to resume"))
        else:
            column = next(cell.column for cell in plan.cells if cell.run_id == run_id)
            one = compare(theirs, mine, published_deviation(every, committed, column))
            found.append(Compared(one.verdict, f"{title}: {one.text}"))
    for one in found:
        print_text(f"{one.verdict}: {one.text}")
    return 130 if stopped else _status(found)


def _status(found: Sequence[Compared]) -> int:
    verdicts = {one.verdict for one in found}
    return next((_STATUS[kind] for kind in ("fails", "not decided") if kind in verdicts), 0)


def _lacking(plan: Plan, committed: Store) -> Iterator[str]:
    for run_id, state in states(plan, committed).items():
        if state != "done":
            older = "; one of the same settings was made by older code, data or weights" if state == "stale" else ""
            yield f"{plan.runs[run_id].title}: no published record of run {run_id}{older}: nothing to compare with"


def _outline(plan: Plan, records: dict[str, RunRecord], runs_dir: Path) -> Iterator[str]:
    """Yield the runs to train and the time that they take according to the records."""
    for run_id, record in records.items():
        wall = "unknown time" if record.wall_seconds is None else f"{record.wall_seconds / 60:.0f} min"
        score = "not measured" if record.miou is None else f"{100 * record.miou:.2f}"
        here = {"processor": processor(), "threads": plan.runs[run_id].threads, "torch": versions().get("torch")}
        other = _different(record, here)
        how = f"within {DEVIATIONS} standard deviations ({'; '.join(other)})" if other else "bit for bit"
        yield f"{plan.runs[run_id].title}: {record.steps:,} steps, {wall} when published; mIoU {score}, compared {how}"
    if records:
        yield f"{len(records)} runs to train and compare; directory: {runs_dir}"
    else:
        yield "nothing to train; make published creates the records"


def _settings(plan: Plan, args: argparse.Namespace) -> ExecutionSettings:
    return ExecutionSettings(
        threads=plan.table.scale[plan.scale].threads or threads_of_a_run(None),
        gpus_per_trial=args.gpus_per_trial,
        max_concurrent=args.max_concurrent,
        stall_timeout=args.stall_timeout,
        address=args.address,
    )


def _train(plan: Plan, records: dict[str, RunRecord], store: Store, settings: ExecutionSettings) -> bool:
    """Train the runs that have a record and are not in the store; return whether that was interrupted."""
    from dataclasses import replace

    done = {name: record.miou for name, record in store.records().items()}
    for name in done.keys() & records.keys():
        print_text(f"{plan.runs[name].title}: already trained in {store.root}; use another --runs-dir to retrain")
    runs = {name: run for name, run in plan.runs.items() if name in records}
    left = [replace(run, changes={"runtime.log_every": 10, **run.changes}) for run in runs.values()]
    left = [run for run in left if run.run_id not in done]
    if not left:
        return False
    from viladiff.cluster.executor import run_jobs
    from viladiff.cluster.resources import concurrency
    from viladiff.experiments.live_table import LiveTable

    room = concurrency(settings, left)
    walls = [records[run.run_id].wall_seconds for run in left]
    slots = room.slots if room else 1
    known = [wall for wall in walls if wall is not None]
    expected = max(sum(known) / slots, *known) if len(known) == len(walls) else None
    cells = tuple(cell for cell in plan.cells if cell.run_id in runs)
    shown = replace(plan, runs=runs, cells=cells, rows=tuple(dict.fromkeys(cell.row for cell in cells)))
    with LiveTable(shown, done, room and room.slots, expected=expected) as live:
        outcomes = run_jobs(left, store, settings, live.hear)
    store.clean()
    for one in outcomes:
        if one.failure is not None:
            print_text(f"failed: {plan.runs[one.run_id].title}: {one.failure.message}", error=True)
    return any(one.state == "stopped" for one in outcomes)


# Comparing


def published_deviation(every: Plan, committed: Store, column: int) -> float | None:
    """Return the pooled standard deviation over seeds of the plan's published cells in a column, in points."""
    from viladiff.report.sections.side_by_side import pooled_spread
    from viladiff.report.table.results import collect_results

    return pooled_spread(collect_results(every, committed), every.rows, column)


def compare(theirs: RunRecord, mine: RunRecord, deviation: float | None) -> Compared:
    """Compare a published record with one of the same run made here; ``deviation`` is in points, None if unknown."""
    if theirs.miou is None or mine.miou is None:
        return Compared("not decided", "mIoU was not measured in both")
    other = _different(theirs, _how(mine))
    numbers = f"mIoU {100 * theirs.miou:.4f} published, {100 * mine.miou:.4f} here"
    wrong = _first_difference(theirs, mine)
    if not wrong:
        return Compared("holds", f"every score is the same, bit for bit; mIoU {100 * mine.miou:.4f}")
    if not other:
        return Compared("fails", f"{numbers}; {wrong} differs although processor, threads and torch are the same")
    if deviation is None:
        return Compared("not decided", f"{numbers}; no two published seeds give a spread ({'; '.join(other)})")
    gap, most = 100 * abs(theirs.miou - mine.miou), DEVIATIONS * deviation
    least = f"{gap:.2f} points apart, at most {DEVIATIONS} × {deviation:.2f} = {most:.2f} are allowed"
    return Compared("holds" if gap <= most else "fails", f"{numbers}; {least} ({'; '.join(other)})")


def _how(record: RunRecord) -> dict[str, object]:
    """Return the record's facts that decide the last bits of a run; None where one is not recorded."""
    about = {"processor": record.processor or None, "threads": record.threads, "torch": record.versions.get("torch")}
    return {**about, "device": record.device}


def _different(theirs: RunRecord, here: Mapping[str, object]) -> list[str]:
    """Explain why equal bits are not to be expected; empty if they are."""
    there = _how(theirs)
    found = [(name, there[name], value) for name, value in here.items() if there[name] is None or there[name] != value]
    return [f"{name} {'not recorded' if old is None else old} there, {new} here" for name, old, new in found]


def _first_difference(theirs: RunRecord, mine: RunRecord) -> str:
    """Return the first score that differs; empty if none does."""
    if theirs.miou != mine.miou:
        return "mIoU"
    if theirs.pseudo_labels != mine.pseudo_labels:
        return "quality of pseudo-labels"
    for network in {**theirs.scores, **mine.scores}:
        for stream in {**theirs.scores.get(network, {}), **mine.scores.get(network, {})}:
            one, two = (record.scores.get(network, {}).get(stream, {}) for record in (theirs, mine))
            for name in {**one, **two}:
                if one.get(name) != two.get(name):
                    return f"{network}/{stream}/{name}"
    return ""
