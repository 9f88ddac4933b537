"""Setup of a sweep: arguments, directory, lease, and the check that the directory holds the same sweep."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from viladiff.cluster.resources import Capacity, threads_of_a_run
from viladiff.cluster.resources import plan_capacity as room
from viladiff.config.base import error_reason, parse_overrides
from viladiff.core.atomic import write_atomically
from viladiff.core.installation import published_dir, reports_dir, require_checkout
from viladiff.core.messages import HIDDEN, hidden_url, one_line, shown
from viladiff.experiments.tables import seeds_of
from viladiff.runs import lease as leases
from viladiff.runs.job import ExecutionSettings, PlannedRun
from viladiff.runs.store import Store
from viladiff.sweeps.early_stopping import optuna_pruner
from viladiff.sweeps.space import dumped, edges, shrunk
from viladiff.sweeps.spec import Sweep, SweepPlanner, at_scale, check, load_sweep

META = "sweep.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SweepJob:
    """One call: a sweep at a scale, and where it lives."""

    sweep: Sweep
    scale: str
    args: argparse.Namespace
    namer: SweepPlanner
    store: Store
    name: str
    trials: int
    seeds: tuple[int, ...]
    out: Path
    """Where its page goes."""
    settings: ExecutionSettings
    room: Capacity
    """How many runs go at once, and what each has."""

    @property
    def directory(self) -> Path:
        return self.store.root / "sweeps" / self.name

    def tried(self) -> list[PlannedRun]:
        """Return a run at each edge of the space and at each point that the file lists."""
        sweep = self.sweep
        listed = [{**sweep.initial_point, **point} for point in ({}, *sweep.points)]
        return [
            self.namer.planned(point, self.seeds[0]) for point in [*listed, *edges(sweep.space, sweep.initial_point)]
        ]


def prepare(path: Path, args: argparse.Namespace) -> SweepJob:
    """Read the sweep and check all arguments, and the space at its edges; train and write nothing."""
    sweep = at_scale(load_sweep(path), args.scale)
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
    if set(seeds) & set(sweep.final_seeds):
        raise ValueError(
            f"--seeds {args.seeds}: {sorted(set(seeds) & set(sweep.final_seeds))} are reserved for the finals"
        )
    if args.database is not None and f":{HIDDEN}@" in args.database:
        raise ValueError(f"--database {hidden_url(args.database)}: {HIDDEN} stands for the password; write it out")
    if args.database is not None and "://" not in args.database:
        raise ValueError(
            f"--database {hidden_url(args.database)}: must be a URL, such as sqlite:///sweeps.db; omit it for a "
            "journal beside the trials"
        )
    name = args.study or f"{sweep.name}-{args.scale}" + ("-val" if args.select == "val" else "")
    if not _NAME.fullmatch(name):
        raise ValueError(f"--study {name!r}: must be of letters, digits, dots, dashes and underscores")
    _check_publishing(args)
    namer = SweepPlanner(sweep, args.scale, changes, args.select, args.workers)
    optuna_pruner(args.early_stopping, namer.steps)  # whether it can judge at these rungs
    store = Store(Path(args.runs_dir), [published_dir()])
    own = published_dir() if args.publish else reports_dir() / args.scale
    out = Path(args.report_dir).expanduser().absolute() if args.report_dir else own / f"sweep_{sweep.name}"
    example = namer.planned(sweep.initial_point, seeds[0])
    settings = ExecutionSettings(
        threads=example.threads or sweep.scale[args.scale].threads or threads_of_a_run(args.address),
        gpus_per_trial=args.gpus_per_trial,
        max_concurrent=args.max_concurrent,
        stall_timeout=args.stall_timeout,
        address=args.address,
        track=tuple(args.track),
        group=name,
    )
    found = room(settings, [example] * trials)
    return SweepJob(sweep, args.scale, args, namer, store, name, trials, seeds, out, settings, found)


def _check_publishing(args: argparse.Namespace) -> None:
    """Raise ValueError for options under which the published sweep would differ from its file."""
    if args.publish:
        require_checkout("--publish")
    others = [name for name in ("changes", "seeds", "report_dir", "no_finals") if getattr(args, name)]
    wrong = [f"--{others[0].replace('_', '-')}"] if others else []
    wrong += [f"--scale {args.scale}"] * (args.scale != "digits")
    if args.publish and wrong:
        raise ValueError(
            f"--publish {wrong[0]}: not allowed; a published page is of the sweep as in its file, at --scale digits"
        )


# The sweep's directory


def alone(directory: Path) -> leases.Lease:
    """Acquire the sweep's lease, waiting if need be. Raises ValueError if others hold it or writing fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        watch = leases.HeartbeatMonitor()
        lease = leases.take_or_wait(directory, watch)
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written ({error.strerror or error}); change --runs-dir") from error
    if lease is None:
        holder = next(iter(leases.live_leases(directory, watch).values()), None)
        raise ValueError(
            f"{directory}: sweep is locked by {holder or 'another driver'}; wait for it to finish, or use --study NAME"
        )
    return lease


def open_directory(job: SweepJob) -> None:
    """Write the sweep's definition, as ``check_same`` compares it; the space may have grown. Raises ValueError."""
    path = job.directory / META
    for left in job.directory.rglob(".*.tmp"):  # of a driver that was killed while it wrote
        left.unlink(missing_ok=True)
    check_same(job)
    try:
        (job.directory / "trials").mkdir(exist_ok=True)
        write_atomically(path, json.dumps(meta(job), indent=1).encode())
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}); change --runs-dir") from error


def check_same(job: SweepJob) -> None:
    """Raise ValueError if the directory holds another sweep; a directory that does not exist holds none."""
    path = job.directory / META
    try:
        before = read_definition(path)
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ValueError(f"{error}; use --study NAME for a new sweep") from None
    faults = differences(before, job)
    if faults:
        more = "; only a wider space or more trials can resume it; use --study NAME for a new sweep"
        raise ValueError(f"{job.directory} is another sweep: {'; '.join(faults)}{more}")


def read_definition(path: Path) -> dict[str, Any]:
    """Read what ``meta`` wrote. Raises FileNotFoundError, and ValueError that names a file which is none."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({one_line(str(error))})") from None
    space = found.get("space") if isinstance(found, dict) else None
    if not isinstance(space, dict):
        raise ValueError(f"{path}: damaged (it defines no space)")
    try:
        shrunk(space, {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{path}: damaged (space: {one_line(error_reason(first))})") from None
    return dict(found)


def differences(before: Mapping[str, Any], job: SweepJob) -> list[str]:
    """Explain why this sweep does not continue the one that ``before``, written by ``meta``, describes."""
    faults = [
        f"{name} was {shown(before.get(name))}, and is now {shown(value)}"
        for name, value in json.loads(json.dumps(meta(job))).items()
        if name != "space" and before.get(name) != value
    ]
    return faults + shrunk(before.get("space", {}), job.sweep.space)


def meta(job: SweepJob) -> dict[str, Any]:
    """Return what makes trials comparable: all but the space, the number of trials, the sampler and the pruner.

    It has no machine paths.
    """
    fixed = {path: value for path, value in job.namer.fixed.items() if not path.startswith("runtime.")}
    if fixed.get("model.weights"):
        fixed["model.weights"] = Path(str(fixed["model.weights"])).name  # a run's name has a hash of the file
    return {
        "sweep": job.sweep.name,
        "scale": job.scale,
        "select": job.args.select,
        "seeds": list(job.seeds),
        "rungs": list(job.namer.steps),
        "fields": {path: fixed[path] for path in sorted(fixed)},
        "first run": job.namer.planned(job.sweep.initial_point, job.seeds[0]).run_id,
        "space": dumped(job.sweep.space),
    }
