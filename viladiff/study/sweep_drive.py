"""From a sweep's file to its answer: search, the best points anew on fresh seeds, verdict. Ray and torch come late."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from viladiff.fields import nearest, parse_overrides
from viladiff.record import write_atomically
from viladiff.study import lease as leases
from viladiff.study.asking import JOURNAL, Asker
from viladiff.study.drive import ROOT, hinted, seeds_of, typed
from viladiff.study.events import Settings
from viladiff.study.finals import Finalist, finalists, said
from viladiff.study.plan import Planned
from viladiff.study.search import Judge, Nobody, Search
from viladiff.study.search_desk import SearchDesk
from viladiff.study.space import dumped, shrunk
from viladiff.study.store import Store
from viladiff.study.sweep import Namer, Sweep, check, load_sweep
from viladiff.study.sweep_options import parser
from viladiff.study.sweeps import command, toml
from viladiff.study.trials import Trial, ranked

META = "sweep.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Job:
    """One call: a sweep at a scale, and where it lives."""

    sweep: Sweep
    scale: str
    args: argparse.Namespace
    namer: Namer
    store: Store
    name: str
    trials: int
    seeds: tuple[int, ...]

    @property
    def directory(self) -> Path:
        return self.store.root / "sweeps" / self.name

    @property
    def eta(self) -> int:
        """How many times fewer trials a scheduler lets pass at each rung: as many as the budget grows there."""
        steps = self.namer.steps
        return max(2, round((steps[-1] / steps[0]) ** (1 / max(1, len(steps) - 1))))


def main(path: Path, argv: Sequence[str] | None = None, name: str | None = None) -> int:
    """What ``tune/sweep_lambda.py`` and ``viladiff sweep lambda`` do; errors that a user can mend are a line each."""
    from viladiff.cli import carry_out

    given = sys.argv[1:] if argv is None else list(argv)
    args = parser(path, name or Path(sys.argv[0]).name).parse_args(given)
    return carry_out(lambda: run(path, args, typed(f"python tune/{path.stem}.py", given)))


def find(name: str) -> Path:
    """The file of a sweep, by name or by path. ValueError lists those there are."""
    path = Path(name) if name.endswith(".toml") else ROOT / "tune" / f"sweep_{name}.toml"
    if path.is_file():
        return path
    known = sorted(one.stem.removeprefix("sweep_") for one in (ROOT / "tune").glob("sweep_*.toml"))
    there = f"there are {', '.join(known)}{nearest(name, known)}" if known else "they come with a checkout, not a wheel"
    raise ValueError(f"sweep {name!r}: not known; {there}, or give the path of a .toml file")


def run(path: Path, args: argparse.Namespace, command: str) -> int:
    """Searches, trains the best anew, says; the exit status: 0 all done, 1 it was given up, 130 interrupted."""
    job = prepare(path, args)
    if args.dry_run:
        print("\n".join(outline(job)))
        return 0
    with _alone(job.directory):
        _open(job)
        desk = _desk(job)
        if not args.render:
            print(
                f"{job.sweep.title}, scale {job.scale}: {len(desk.search.trials)} of {job.trials} trials begun",
                flush=True,
            )
            from viladiff.ray_search import run_search

            run_search(desk)
        search = desk.search
        if search.hopeless:
            print(f"given up: {search.hopeless}", file=sys.stderr)
            return 1
        found = finalists(job.sweep, search.trials, job.namer)
        status = 130 if desk.stopping else int(any(_failed(job, desk, one) for one in found))
        job.store.sweep()
    print("\n".join(conclusion(job, search.trials, found)))
    print(f"\nthe page: {page(job, search.trials, found, command)}")
    return status


def prepare(path: Path, args: argparse.Namespace) -> Job:
    """Reads the sweep and checks all that was asked for, the space at its edges too; nothing is trained or written."""
    sweep = load_sweep(path)
    changes = parse_overrides(args.changes)
    check(sweep, args.scale, changes, args.select)
    trials = sweep.trials if args.trials is None else args.trials
    seeds = seeds_of(args.seeds) or sweep.scale[args.scale].seeds or sweep.seeds
    for name, value, fine in (
        ("trials", trials, trials >= 1),
        ("workers", args.workers, args.workers >= 1),
        ("trial-timeout", args.trial_timeout, args.trial_timeout is None or args.trial_timeout > 0),
    ):
        if not fine:
            raise ValueError(f"--{name} {value}: must be more than 0")
    if set(seeds) & set(sweep.finals):
        raise ValueError(
            f"--seeds {args.seeds}: {sorted(set(seeds) & set(sweep.finals))} are kept fresh for the finals"
        )
    name = args.study or f"{sweep.name}-{args.scale}" + ("-val" if args.select == "val" else "")
    if not _NAME.fullmatch(name):
        raise ValueError(f"--study {name!r}: letters, digits, dots, dashes and underscores only")
    namer = Namer(sweep, args.scale, changes, args.select, args.workers)
    store = Store(Path(args.storage), [ROOT / "reports" / "published"])
    return Job(sweep, args.scale, args, namer, store, name, trials, seeds)


# The sweep's directory


def _alone(directory: Path) -> leases.Lease:
    """The right to drive the sweep. ValueError where somebody else has it, or where nothing can be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        watch = leases.Watch()
        lease = leases.take(directory, watch)
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written ({error.strerror or error}); see --storage") from error
    if lease is None:
        holder = next(iter(leases.living(directory, watch).values()), None)
        raise ValueError(f"{directory}: {holder or 'another driver'} is at this sweep; wait, or give --study NAME")
    return lease


def _open(job: Job) -> None:
    """Compares with what the sweep was begun as, and notes the space, which may be wider now. Raises ValueError."""
    path = job.directory / META
    for left in job.directory.rglob(".*.tmp"):  # of a driver that was killed while it wrote
        left.unlink(missing_ok=True)
    now = _meta(job)
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:
        before = None
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); give the sweep another name with --study") from None
    if before is not None:
        now_read = json.loads(json.dumps(now))
        faults = [
            f"{name} was {before.get(name)!r}, and is now {value!r}"
            for name, value in now_read.items()
            if name != "space" and before.get(name) != value
        ]
        faults += shrunk(before["space"], job.sweep.space)
        if faults:
            more = "; a wider space or more trials would go on with it, this needs another name: --study NAME"
            raise ValueError(f"{job.directory} is another sweep: {'; '.join(faults)}{more}")
    try:
        (job.directory / "trials").mkdir(exist_ok=True)
        write_atomically(path, json.dumps(now, indent=1).encode())
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}); see --storage") from error


def _meta(job: Job) -> dict[str, Any]:
    """What makes trials comparable: all but the space, the number of trials, and how they are drawn and stopped."""
    fixed = {path: value for path, value in job.namer.fixed.items() if not path.startswith("runtime.")}
    return {
        "sweep": job.sweep.name,
        "scale": job.scale,
        "select": job.args.select,
        "seeds": list(job.seeds),
        "rungs": list(job.namer.steps),
        "fields": {path: fixed[path] for path in sorted(fixed)},
        "first run": job.namer.planned(job.sweep.first, job.seeds[0]).run_id,
        "space": dumped(job.sweep.space),
    }


def _desk(job: Job) -> SearchDesk:
    from viladiff.ray_room import room

    args = job.args
    settings = Settings(
        threads=job.sweep.scale[job.scale].threads or 1,
        gpus_per_trial=args.gpus_per_trial,
        max_concurrent=args.max_concurrent,
        hang_after=args.hang_after,
        address=args.address,
    )
    example = job.namer.planned(job.sweep.first, job.seeds[0])
    found = room(replace(settings, threads=example.threads or settings.threads), [example] * job.trials)
    if found.note:
        print(found.note)
    asker = Asker(
        job.name,
        job.sweep.space,
        job.sweep.first,
        args.sampler,
        args.sampler_seed,
        found.slots > 1,
        args.database or str(job.directory / JOURNAL),
    )
    search = Search(
        job.directory / "trials",
        asker,
        _judge(job),
        job.namer.planned,
        job.seeds,
        job.namer.steps,
        job.trials,
        job.store,
        lambda trial: print(line(trial, job.namer.steps[-1]), flush=True),
    )
    then = None if args.no_finals else partial(_finals, job, search)
    return SearchDesk(search, job.store, found.settings, found.slots, timeout=args.trial_timeout, then=then)


def _judge(job: Job) -> Judge:
    if job.args.scheduler == "none":
        return Nobody()
    from viladiff.ray_judges import judge

    return judge(job.args.scheduler, len(job.namer.steps), job.eta)


def _finals(job: Job, search: Search) -> list[Planned]:
    """The runs of the finalists that are not done."""
    found = finalists(job.sweep, search.trials, job.namer)
    left = [run for one in found for run in one.runs.values() if job.store.get(run.run_id) is None]
    if left:
        print(f"the best points anew: {len(left)} runs on fresh seeds, on the whole labelled list", flush=True)
    return left


def _failed(job: Job, desk: SearchDesk, finalist: Finalist) -> bool:
    """Whether a run of a finalist failed, which is said."""
    failed = False
    for seed, run in finalist.runs.items():
        outcome = desk.outcomes.get(run.run_id)
        if outcome is not None and outcome.failure is not None and outcome.state == "failed":
            failed = True
            print(f"failed: {finalist.label}, seed {seed}: {outcome.failure.message}", file=sys.stderr)
    return failed


# Words


def line(trial: Trial, full: int) -> str:
    """A trial that has ended, in one line."""
    point = ", ".join(f"{path.rpartition('.')[2]} = {_short(value)}" for path, value in trial.point.items())
    if trial.value is not None:
        what = f"{100 * trial.value:.2f} over {len(trial.values)} seed{'s' * (len(trial.values) != 1)}"
    elif trial.state == "pruned" and trial.rungs:
        what = f"stopped at step {trial.rungs[-1].step} of {full}, with {100 * trial.rungs[-1].value:.2f} there"
    else:
        what = f"{trial.state}: {trial.reason.splitlines()[0] if trial.reason else 'no reason is known'}"
    return f"trial {trial.number}: {point}: {what}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def outline(job: Job) -> list[str]:
    """What would run and what it would take."""
    steps, size = job.namer.steps, job.sweep.scale[job.scale]
    example = job.namer.planned(job.sweep.first, job.seeds[0])
    step = _seconds(job, example) or size.guess_step
    runs = job.trials * len(job.seeds) + 3 * len(job.sweep.finals)
    at_once = job.args.max_concurrent or 1
    lines = {
        "searched": "; ".join(f"{path} in {dimension}" for path, dimension in job.sweep.space.items()),
        "first": ", ".join(f"{path} = {value}" for path, value in job.sweep.first.items()) + " (the paper's)",
        "chosen by": f"{job.sweep.holdout:.0%} of the labelled images, which no trial trains on"
        if job.args.select == "holdout"
        else "THE REPORTED VALIDATION SET (--select val): what is found there is too good",
        "trials": f"{job.trials} of {len(job.seeds)} seeds, by {job.args.sampler}; stopped early by "
        f"{job.args.scheduler}"
        + (f" at steps {', '.join(map(str, steps[:-1]))}" if job.args.scheduler != "none" else ""),
        "then": f"the best, the paper's and the second on {len(job.sweep.finals)} fresh seeds, scored on the "
        "reported set",
        "at most": f"{runs} runs, {runs * steps[-1]:,} steps",
        "time": "not known"
        if step is None
        else f"at most {runs * (steps[-1] * step + size.guess_besides) / 3600 / at_once:.1f} h, {at_once} at once",
        "sweep": str(job.directory),
    }
    width = max(map(len, lines))
    return [f"{job.sweep.title}, scale {job.scale}", *(f"{name:<{width}}  {text}" for name, text in lines.items())]


def _seconds(job: Job, example: Planned) -> float | None:
    """Median seconds a step of runs of the same method and data set that the store has."""
    kind = ("method.name", "data.dataset")
    found = sorted(
        record.train_seconds / record.steps
        for record in job.store.records().values()
        if record.steps and all(record.changed.get(path) == example.changed.get(path) for path in kind)
    )
    return found[len(found) // 2] if found else None


def conclusion(job: Job, trials: Sequence[Trial], found: Sequence[Finalist]) -> list[str]:
    """What came out, and how to make it again."""
    states = {state: sum(trial.state == state for trial in trials) for state in ("complete", "pruned", "failed")}
    counts = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    lines = ["", f"{len(trials)} of {job.trials} trials: {counts or 'none ended'}"]
    best = ranked(list(trials))
    if job.args.select == "val":
        lines.append("CHOSEN BY THE REPORTED SET (--select val): these scores are too good")
    if not best:
        return lines
    lines += ["", *said(found, job.store.records(), len(job.sweep.finals)), "", "winner:"]
    lines += toml(best[0].point).splitlines()
    seed = best[0].seeds[0]
    lines += ["", f"its trial's seed {seed} again ({100 * best[0].values[seed]:.2f} on what it was chosen by):"]
    return [*lines, f"  {_again(job, best[0])}"]


def _again(job: Job, trial: Trial) -> str:
    """The command that trains a trial's first run again."""
    run = job.namer.planned(trial.point, int(trial.seeds[0]))
    return command(run.changed, run.threads)


def page(job: Job, trials: Sequence[Trial], found: Sequence[Finalist], typed_: str) -> Path:
    """Writes the page, and returns where it is."""
    from viladiff.report.sweep_page import render_sweep

    best = ranked(list(trials))
    out = Path(job.args.out or ROOT / "reports" / job.scale / f"sweep_{job.sweep.name}").expanduser().absolute()
    return render_sweep(
        job.sweep,
        job.scale,
        trials,
        found,
        job.store.records(),
        job.namer.steps,
        out,
        select=job.args.select,
        command=hinted(typed_),
        again=_again(job, best[0]) if best else "",
    )
