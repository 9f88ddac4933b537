"""A table from its file to its page: plan, run, and update the page. Ray and torch are imported late.

A second call with nothing left to run loads neither, so that a changed title is on the page within seconds.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from viladiff.cluster.resources import threads_of_a_run
from viladiff.config.base import parse_overrides
from viladiff.core.installation import published_dir, reports_dir, require_checkout, specs_dir
from viladiff.core.messages import hidden_url, print_text
from viladiff.experiments.infeasible import refuse_rows
from viladiff.experiments.target_device import target_device
from viladiff.runs.job import Event, ExecutionSettings, Outcome, PlannedRun
from viladiff.runs.store import Store
from viladiff.tables.estimate import estimate
from viladiff.tables.plan import Plan, make_plan, states
from viladiff.tables.spec import Table
from viladiff.tables.spec_file import load_table

if TYPE_CHECKING:
    import pandas as pd

"""The checkout: tables, reports and the records that are committed with them."""
PICTURES = 4
"""Validation images of each cell's first seed whose labels are kept at every stage."""
REWRITE = 20.0
"""Seconds at least between two versions of the page while runs finish."""


@dataclass(frozen=True)
class TableJob:
    """One call: a table at a scale, where its runs live, and where its page goes."""

    table: Table
    plan: Plan
    store: Store
    out: Path
    command: str
    published: bool = False
    """Whether finished runs are copied beside the page, to be committed."""
    path: Path | None = None
    """The table's file; the tables beside it are looked at for printed numbers that contradict its own."""
    beside: Plan | None = None
    """Of the scale whose committed records stand beside these runs; None where the scale names none."""

    @property
    def records(self) -> Store:
        """Committed records and nothing else."""
        return Store(self.store.root / "nothing", [published_dir()])


def run_table(path: Path, args: argparse.Namespace, command: str) -> int:
    """Plan, then print or run, and write; return the exit status: 0 all done, 1 some runs failed, 130 interrupted.

    Raises ValueError, before any training, with a line for each row that cannot be trained or scored.
    """
    _check_options(args)
    job = plan_table(path, args, command)
    settings = ExecutionSettings(
        threads=job.table.scale[args.scale].threads or threads_of_a_run(args.address),
        gpus_per_trial=args.gpus_per_trial,
        max_concurrent=args.max_concurrent,
        stall_timeout=args.stall_timeout,
        address=args.address,
        dashboard=args.dashboard,
        track=tuple(args.track),
        group=f"{job.table.name} {args.scale}",
    )
    if args.dry_run:
        from viladiff.experiments.dry_run import print_dry_run

        beside = None if job.beside is None else (job.beside, job.records)
        print_dry_run(job.plan, job.store, settings, job.out, (args.hourly_price, args.device), beside)
    if not args.render:
        refuse_rows(job.plan, _left(job, args.restart), fetch=None if args.address else not args.dry_run)
    if args.dry_run:
        return 0
    if args.restart:
        _set_aside(job)
    try:
        outcomes = [] if args.render else run_missing(job, settings)
    finally:
        if not args.render:
            job.store.clean()  # also where a second Ctrl-C ended it at once
    index = write_table_page(job)
    return print_summary(job, outcomes, index)


def plan_table(path: Path, args: argparse.Namespace, command: str) -> TableJob:
    """Read the table, check all arguments and name its runs; train nothing."""
    table = load_table(path)
    changes: dict[str, object] = dict(parse_overrides(args.changes))
    if args.encoder is not None:
        changes.setdefault("model.encoder", args.encoder)
        changes.setdefault("model.pretrained", "shipped" if args.encoder == "digits_vit" else "timm")
    if args.workers is not None:
        changes.setdefault("runtime.workers", args.workers)
    runs_dir = Path(args.runs_dir).expanduser().absolute()
    plan = make_plan(
        table,
        args.scale,
        seeds=seeds_of(args.seeds),
        rows=args.rows,
        columns=args.columns,
        changes=changes,
        cache=runs_dir / "plans",
    )
    other = table.scale[args.scale].published_runs
    beside = make_plan(table, other, cache=runs_dir / "plans") if other else None
    # Where published numbers have a column of their own, what counts as run here is what was run here.
    looking = args.render or args.dry_run  # which deletes nothing, also of what is damaged
    store = Store(runs_dir, [] if args.restart or beside else [published_dir()], repair=not looking)
    if not looking:
        store.clean()
    default = (published_dir() if args.publish else reports_dir() / args.scale) / table.name
    out = Path(args.report_dir).expanduser().absolute() if args.report_dir else default
    return TableJob(table, plan, store, out, command, args.publish, path, beside)


def in_order_of_scale(plan: Plan) -> list[PlannedRun]:
    """Return the runs of a plan in the order of the rows that its scale names; in the order of the table by default."""
    named = plan.table.scale[plan.scale].rows or ()
    first = {cell.run_id: plan.table.rows[cell.row].label for cell in reversed(plan.cells)}
    place = {label: i for i, label in enumerate(named)}
    return sorted(plan.runs.values(), key=lambda run: place.get(first[run.run_id], len(place)))


def run_missing(job: TableJob, settings: ExecutionSettings) -> list[Outcome]:
    """Run the missing runs with a live table; a thread rewrites the page as runs finish."""
    records = job.store.records()
    left = [_with_extras(job, one) for one in in_order_of_scale(job.plan) if one.run_id not in records]
    if not left:
        return []
    from viladiff.cluster.executor import run_jobs
    from viladiff.cluster.resources import concurrency
    from viladiff.experiments.live_table import LiveTable

    room = concurrency(settings, left)
    device = target_device(None, left)
    expected = None if room is None else estimate(job.plan, job.store, room.slots, device=device).seconds
    done = {name: record.miou for name, record in records.items()}
    with (
        PageWriter(lambda: write_table_page(job)) as pages,
        LiveTable(job.plan, done, room and room.slots, expected=expected) as live,
    ):

        def hear(event: Event) -> None:
            live.hear(event)
            if event.kind in ("done", "failed", "progress"):
                pages.dirty.set()

        return run_jobs(left, job.store, settings, hear)


class PageWriter:
    """Writes the page again when it is out of date, beside the runs: every ``REWRITE`` seconds at most, and seldom
    enough that it takes a thirtieth of a processor."""

    def __init__(self, write: Callable[[], object]) -> None:
        self.write, self.dirty, self.over = write, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._keep, name="page", daemon=True)

    def __enter__(self) -> PageWriter:
        self.dirty.set()  # a first page, so that there is something to look at from the beginning
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.dirty.set()
        self.thread.join()

    def _keep(self) -> None:
        while True:
            self.dirty.wait()
            if self.over.is_set():
                return  # whoever ends this writes the last page
            self.dirty.clear()
            began = time.thread_time()
            try:
                self.write()
            except Exception as error:  # a page that cannot be drawn must not end a campaign
                print_text(f"the page could not be written: {error}", error=True)
            self.over.wait(max(REWRITE, 30 * (time.thread_time() - began)))


def write_table_page(job: TableJob) -> Path:
    """Publish finished runs if requested, evaluate the claims, write the page; return the path of its index.html."""
    from viladiff.experiments.publish import publish
    from viladiff.report.table.table_page import render_table
    from viladiff.tables.claims import evaluate_claims
    from viladiff.tables.consistency import inconsistencies, siblings

    store = job.store
    if job.published:
        publish(job.plan, store, job.out)
        # From what is committed and nothing else, so that whoever clones it makes the same page.
        store = Store(job.store.root / "nothing", job.store.layers)
    judged, records, published = job.plan, store.records(), None
    if job.beside is not None:
        published = job.beside, job.records
        committed = published[1].records()
        if committed.keys() & job.beside.runs.keys():
            judged, records = job.beside, committed
    verdicts = evaluate_claims(judged, records)
    printed = inconsistencies(job.table, siblings(job.path) if job.path else ())
    return render_table(
        job.plan,
        store,
        job.out,
        command=public_command(job.command),
        verdicts=verdicts,
        printed=printed,
        published=published,
    )


def print_summary(job: TableJob, outcomes: Sequence[Outcome], index: Path) -> int:
    """Print the result in a few lines."""
    found = list(states(job.plan, job.store).values())
    if job.beside is None:
        print_text((index.parent / "table.md").read_text().split("\n## ")[0].strip(), end="\n\n")
    else:
        _say_beside(job, job.beside)
    print_text(f"{found.count('done')} of {len(found)} runs done; page: {_relative(index)}")
    stopped = [outcome for outcome in outcomes if outcome.state == "stopped"]
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if any(one.failure is not None and one.failure.kind == "stale" for one in failed):
        _forget(job.plan)
    for outcome in failed:
        why = outcome.failure.message if outcome.failure else "unknown reason"
        print_text(f"failed: {job.plan.runs[outcome.run_id].title}: {why}", error=True)
    if stopped:
        print_text(f"{len(stopped)} runs were stopped; resume with:\n  {job.command}", error=True)
        return 130
    return int(bool(failed))


def _say_beside(job: TableJob, other: Plan) -> None:
    """Print the three columns in a few lines, and the sentence that sums them up."""
    from viladiff.report.sections.side_by_side import headline_of_both, to_terminal
    from viladiff.report.table.results import collect_results
    from viladiff.report.table.table_page import load_both

    both = load_both(collect_results(job.plan, job.store), other, job.records, job.out)
    print_text(
        f"{job.table.title}, scale {job.plan.scale}, mIoU (%)\n\n{to_terminal(both)}\n\n{headline_of_both(both)}\n"
    )


def table(name: str | int, scale: str = "quick", *, runs_dir: str = "runs", long_form: bool = False) -> pd.DataFrame:
    """Return a table of the finished runs; train nothing. Rows by (column, mean | sd | n | paper), all in percent.

    ``n`` counts the seeds of a cell that are done, ``sd`` is their sample standard deviation, NaN below two. Runs of
    one seed share their labelled images and draws from row to row, so that ``sd`` is not the spread of a difference:
    ``long_form`` has a line a run, with its seed, to take differences within a seed. Verdicts are on the page alone.

    >>> import viladiff
    >>> viladiff.table(5, "digits")  # doctest: +SKIP
    """
    from viladiff.report.table.long_form import frame

    found = load_table(find_table(name))
    plan = make_plan(found, scale, cache=Path(runs_dir).absolute() / "plans")
    return frame(plan, Store(Path(runs_dir), [published_dir()], repair=False), long_form=long_form)


def find_table(name: str | int) -> Path:
    """Return the file of a table, by number, name or path. Raises ValueError that lists the existing ones."""
    given = Path(str(name))
    path = given if given.suffix == ".toml" else specs_dir("ablations") / f"{'table' * given.name.isdigit()}{name}.toml"
    if path.is_file():
        return path
    known = sorted(one.stem for one in specs_dir("ablations").glob("*.toml"))
    raise ValueError(f"table {name!r}: unknown; allowed: the path of a .toml file, {', '.join(known)}")


# Parts


def shell_command(program: str, words: Sequence[str]) -> str:
    """Return the command that resumes the table or sweep, quoted for a shell, with *** for the passwords of URLs."""
    kept = [hidden_url(word) for word in words if word not in ("--restart", "--render")]
    return " ".join([program, *map(shlex.quote, kept)])


def public_command(command: str) -> str:
    """Return the command for a page, which may be published: without this machine's paths."""
    return re.sub(r"""(?<![\w.])[~/][^\s'"]*/""", "…/", command)


def _check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other."""
    if args.publish:
        require_checkout("--publish")
    if args.restart and args.render:
        raise ValueError(
            "--restart and --render: mutually exclusive, since --restart archives the runs that --render reads"
        )
    partial = [name for name in ("rows", "columns", "seeds", "encoder", "changes", "restart") if getattr(args, name)]
    if args.publish and (partial or args.scale != "digits"):
        wrong = f"--scale {args.scale}" if args.scale != "digits" else f"--{partial[0]}"
        raise ValueError(f"--publish {wrong}: not allowed; a published page is of the whole table at --scale digits")


def seeds_of(text: str | None) -> tuple[int, ...] | None:
    """Parse seeds: a number of them, from 0, or a list; None if nothing was given. Raises ValueError."""
    if text is None:
        return None
    words = text.split(",")
    if not all(word.strip().isdigit() for word in words) or (len(words) == 1 and int(text) < 1):
        raise ValueError(f"--seeds {text}: must be a number of seeds such as 3, or a list such as 0,1,5")
    return tuple(range(int(text))) if len(words) == 1 else tuple(dict.fromkeys(int(word) for word in words))


def _with_extras(job: TableJob, one: PlannedRun) -> PlannedRun:
    """Add fields outside a run's name that a table wants: frequent logs for the screen, pictures of the first seed."""
    extras: dict[str, object] = {"runtime.log_every": 10}
    seed = next(cell.seed for cell in job.plan.cells if cell.run_id == one.run_id)
    if seed == job.plan.seeds[0]:
        extras["runtime.visualizations"] = PICTURES
    return replace(one, changes={**extras, **one.changes})


def _left(job: TableJob, restart: bool) -> list[PlannedRun]:
    """Return the runs to do, of which ``restart`` leaves none out."""
    records = {} if restart else job.store.records()
    return [run for run_id, run in job.plan.runs.items() if run_id not in records]


def _forget(plan: Plan) -> None:
    """Delete the cached plan, which is out of date."""
    if plan.file is not None:
        with suppress(OSError):
            plan.file.unlink()
    print_text(
        "code, data or weights changed since planning; re-run to plan again",
        error=True,
    )


def _set_aside(job: TableJob) -> None:
    aside = job.store.root / "replaced" / time.strftime("%Y%m%dT%H%M%S")
    for run_id in job.plan.runs:
        directory = job.store.directory(run_id)
        lease = job.store.lease(run_id) if directory.is_dir() else None
        if lease is None:
            continue  # not there, or somebody is at it
        with lease:
            aside.mkdir(parents=True, exist_ok=True)
            for path in [path for path in directory.iterdir() if not path.name.startswith("lease")]:
                (aside / run_id).mkdir(exist_ok=True)
                shutil.move(path, aside / run_id / path.name)


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
