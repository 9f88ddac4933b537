"""A sweep from its file to its verdict: search, finals on fresh seeds. Ray and torch are imported late."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from viladiff.config.base import did_you_mean
from viladiff.core.installation import specs_dir
from viladiff.core.messages import format_value, print_text
from viladiff.evaluation.devices import CPU
from viladiff.evaluation.step_time import ERROR
from viladiff.experiments.compare_sweeps import tuned
from viladiff.experiments.infeasible import refuse_points
from viladiff.experiments.publish_sweep import adopt, publish_sweep, published_trials
from viladiff.experiments.sweep_setup import SweepJob, alone, check_same, open_directory, prepare
from viladiff.experiments.tables import PageWriter, public_command
from viladiff.experiments.target_device import target_device
from viladiff.runs.job import Event, PlannedRun
from viladiff.runs.lease import Lease
from viladiff.runs.store import Store
from viladiff.sweeps.controller import SweepController
from viladiff.sweeps.early_stopping import optuna_pruner
from viladiff.sweeps.finals import Finalist, chosen, finalists, format_verdict
from viladiff.sweeps.optuna_study import JOURNAL, OptunaStudy
from viladiff.sweeps.spec import choosing_images
from viladiff.sweeps.summary import INPUTS, to_toml, train_command
from viladiff.sweeps.trial_queue import TrialQueue
from viladiff.sweeps.trials import Trial, load_trials, ranked
from viladiff.tables.estimate import RunTime, Target, time_of_run
from viladiff.tables.spec import OWN_LISTS


def find_sweep(name: str) -> Path:
    """Return the file of a sweep, by name or path. Raises ValueError that lists the existing ones."""
    path = Path(name) if name.endswith(".toml") else specs_dir("tune") / f"sweep_{name}.toml"
    if path.is_file():
        return path
    known = sorted(one.stem.removeprefix("sweep_") for one in specs_dir("tune").glob("sweep_*.toml"))
    raise ValueError(
        f"sweep {name!r}: unknown; allowed: the path of a .toml file, {', '.join(known)}{did_you_mean(name, known)}"
    )


def run_sweep(path: Path, args: argparse.Namespace, command: str) -> int:
    """Search, retrain the best points, print the result; return the exit status: 0, 1 given up, 130 interrupted."""
    job = prepare(path, args)
    if args.dry_run:
        print_text("\n".join(dry_run_lines(job)))
        refuse_points(job.tried(), fetch=None if args.address else False)
        return 0
    if args.render:
        check_same(job)
        trials = load_trials(job.directory / "trials") or published_trials(job)
        return conclude(job, trials, write_sweep_page(job, trials, command))
    refuse_points(job.tried(), fetch=None if args.address else True)
    with alone(job.directory) as lease:
        open_directory(job)
        adopt(job)
        return _search(job, command, lease)


def _search(job: SweepJob, command: str, lease: Lease) -> int:
    """Resume the sweep and run it to its end, rewriting its page on the way."""
    load = partial(load_trials, job.directory / "trials")  # not those in memory, which change meanwhile
    pages = PageWriter(lambda: write_sweep_page(job, load(), command, resting=False))
    queue = _desk(job, lease.check, pages.dirty.set)
    begun = len(queue.search.trials)
    print_text(f"{job.sweep.title}, scale {job.scale}: {begun} of {job.trials} trials begun", flush=True)
    from viladiff.cluster.sweep_executor import run_search

    with pages:
        run_search(queue)
    trials, given_up = queue.search.trials, queue.search.hopeless
    index = write_sweep_page(job, trials, command, given_up)
    if given_up:
        print_text(f"given up: {given_up}\npage: {index}", error=True)
        return 1
    job.store.clean()
    failed = any([_failed(queue, one) for one in finalists(job.sweep, trials, job.namer)])
    return conclude(job, trials, index) or (130 if queue.stopping else int(failed))


def conclude(job: SweepJob, trials: Sequence[Trial], index: Path) -> int:
    """Print the result and return 0."""
    print_text("\n".join(conclusion(job, trials, finalists(job.sweep, trials, job.namer))))
    print_text(f"\npage: {index}")
    return 0


def _desk(
    job: SweepJob, held: Callable[[], None] = lambda: None, changed: Callable[[], object] = lambda: None
) -> TrialQueue:
    """Restore the sweep's queue; ``held`` as in SweepController, ``changed`` is called when its page is out of date."""
    args, found = job.args, job.room
    if found.note:
        print_text(found.note)
    parallel = found.slots > 1
    where = args.database or str(job.directory / JOURNAL)
    asker = OptunaStudy(
        job.name,
        job.sweep.space,
        [job.sweep.initial_point, *({**job.sweep.initial_point, **point} for point in job.sweep.points)],
        args.sampler,
        args.sampler_seed,
        parallel,
        where,
        optuna_pruner(args.early_stopping, job.namer.steps),
    )

    def ended(trial: Trial) -> None:
        print_text(line(trial, job.namer.steps[-1]), flush=True)
        changed()

    def hear(event: Event) -> None:
        if event.kind in ("note", "retry"):
            print_text(event.message, error=True, flush=True)
        elif event.kind == "done":
            changed()

    search = SweepController(
        job.directory / "trials",
        asker,
        job.namer.planned,
        job.seeds,
        job.namer.steps,
        job.trials,
        job.store,
        ended,
        held,
    )
    then = None if args.no_finals else partial(_finals, job, search)
    return TrialQueue(search, job.store, found.settings, found.slots, hear, timeout=args.trial_timeout, then=then)


def _finals(job: SweepJob, search: SweepController) -> list[PlannedRun]:
    """Return the finalists' runs that are not done."""
    found = finalists(job.sweep, search.trials, job.namer)
    left = [run for one in found for run in one.runs.values() if job.store.get(run.run_id) is None]
    if left:
        print_text(f"retraining the best points: {len(left)} runs on fresh seeds", flush=True)
    return left


def _failed(queue: TrialQueue, finalist: Finalist) -> bool:
    """Return whether a run of a finalist failed, and print it."""
    failed = False
    for seed, run in finalist.runs.items():
        outcome = queue.outcomes.get(run.run_id)
        if outcome is not None and outcome.failure is not None and outcome.state == "failed":
            failed = True
            print_text(f"failed: {finalist.label}, seed {seed}: {outcome.failure.message}", error=True)
    return failed


def write_sweep_page(
    job: SweepJob, trials: Sequence[Trial], command: str, given_up: str = "", resting: bool = True
) -> Path:
    """Publish the sweep if requested, and write its page; return the page's path."""
    from viladiff.report.sweep.sweep_page import Shown, render_sweep

    store = job.store
    found = finalists(job.sweep, trials, job.namer)
    if job.args.publish:
        publish_sweep(job, trials, found)
        # From what is committed and nothing else, so that whoever clones it makes the same page.
        store, trials = Store(store.root / "nothing", store.layers), published_trials(job)
    best = ranked(list(trials))
    shown = Shown(
        job.sweep,
        job.scale,
        trials,
        found,
        store.records(),
        job.namer.steps,
        max(job.trials, len(trials)),
        job.args.select,
        public_command(command),
        public_command(again(job, best[0])) if best else "",
        given_up,
        resting,
        tuned(job, trials, found) if resting and job.sweep.beside else (),
    )
    return render_sweep(shown, job.out)


def line(trial: Trial, full: int) -> str:
    """Format a finished trial as one line."""
    point = ", ".join(f"{path.rpartition('.')[2]} = {format_value(value, 4)}" for path, value in trial.point.items())
    if trial.value is not None:
        what = f"{100 * trial.value:.2f} over {len(trial.values)} seed{'s' * (len(trial.values) != 1)}"
    elif trial.state == "pruned" and trial.rungs:
        what = f"stopped at step {trial.rungs[-1].step} of {full}, with {100 * trial.rungs[-1].value:.2f} there"
    else:
        what = f"{trial.state}: {trial.reason.splitlines()[0] if trial.reason else 'unknown reason'}"
    return f"trial {trial.number}: {point}: {what}"


def dry_run_lines(job: SweepJob) -> list[str]:
    """Describe the runs of a sweep and their cost."""
    steps, size = job.namer.steps, job.sweep.scale[job.scale]
    example = job.namer.planned(job.sweep.initial_point, job.seeds[0])
    target = Target(target_device(job.args.device, [example]), price_per_hour=job.args.hourly_price)
    one = time_of_run(example, job.store.records().values(), target, size.seconds_per_step, size.seconds_overhead)
    ended = sum(trial.state != "running" for trial in load_trials(job.directory / "trials"))
    runs = max(0, job.trials - ended) * len(job.seeds) + 3 * len(job.sweep.final_seeds)
    known = job.args.address is None or job.args.max_concurrent is not None
    slots = min(job.room.slots, runs) if known else 1
    many = f"{slots} at once" if known else "sequential; a cluster runs as many at once as fit"
    begun = f", of which {ended} have ended," if ended else ""
    stops = f" at steps {', '.join(map(str, steps[:-1]))}" if job.args.early_stopping != "none" else ""
    lines = {
        "searched": "; ".join(f"{path} in {dimension}" for path, dimension in job.sweep.space.items()),
        "first": ", ".join(f"{path} = {value}" for path, value in job.sweep.initial_point.items())
        + f" ({job.sweep.initial_label})",
        "chosen by": f"{choosing_images(job.sweep, job.scale)}, not used for training"
        if job.args.select == "holdout"
        else "THE REPORTED VALIDATION SET (--select val): reported scores are biased",
        **({"labelled": OWN_LISTS.replace("rows", "points")} if size.split_per_seed else {}),
        "trials": f"{job.trials}{begun} of {len(job.seeds)} seeds, by {job.args.sampler}; stopped early by "
        f"{job.args.early_stopping}{stops}",
        "then": f"the best, the first and the second best on {len(job.sweep.final_seeds)} fresh seeds, scored on "
        + ("the reported set" if job.sweep.finals_split == "test" else "the same images, to choose between them"),
        "at most": f"{runs} runs, {runs * steps[-1]:,} steps",
        **({"time": "unknown"} if one is None else _cost(one, target, (runs, steps[-1], slots), many)),
        **({"GPUs": job.room.note} if job.room.note else {}),
        "sweep": str(job.directory),
        "page": str(job.out / "index.html"),
    }
    width = max(map(len, lines))
    return [f"{job.sweep.title}, scale {job.scale}", *(f"{name:<{width}}  {text}" for name, text in lines.items())]


def _cost(one: RunTime, target: Target, size: tuple[int, int, int], many: str) -> dict[str, str]:
    """Return the lines of time, memory and money of at most ``size`` = (runs, steps of each, runs at once)."""
    runs, steps, slots = size
    hours = runs * (steps * one.step + one.outside) / 3600
    error = f", estimated to within {ERROR:.0%}" if one.source == "counted" else ""
    lines = {"time": f"at most {hours / slots:.1f} h, {many}{error}"}
    price = target.price_per_hour
    if target.device is not CPU:
        lines["GPU-hours"] = f"at most {hours * one.devices:,.0f} on {target.device.name}{error}"
    if one.peak_bytes:
        lines["memory"] = f"{one.peak_bytes / 2**30:.1f} GiB a run"
    if price is not None or target.device.price is not None:
        money = hours / slots * price if price is not None else hours * one.devices * (target.device.price or 0.0)
        lines["cost"] = f"at most {money:,.2f}{error}"
    return lines


def conclusion(job: SweepJob, trials: Sequence[Trial], found: Sequence[Finalist]) -> list[str]:
    """Describe the outcome and how to reproduce it."""
    states = {state: sum(trial.state == state for trial in trials) for state in ("complete", "pruned", "failed")}
    counts = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    lines = ["", f"{len(trials)} of {job.trials} trials: {counts or 'none ended'}"]
    best = ranked(list(trials))
    if job.args.select == "val":
        lines.append("CHOSEN BY THE REPORTED SET (--select val): these scores are biased")
    if not best:
        return lines
    lines += ["", *format_verdict(found, job.store.records(), len(job.sweep.final_seeds)), "", "winner:"]
    lines += to_toml(best[0].point).splitlines()
    if job.sweep.finals_split == "dev" and (one := chosen(found, job.store.records())):
        lines += ["", f"chosen, by the mean over fresh seeds: {one.label}, trial {one.trial}:"]
        lines += to_toml(one.point).splitlines()
    seed = best[0].seeds[0]
    lines += ["", f"reproduce seed {seed} of its trial ({100 * best[0].values[seed]:.2f} on the images of its choice):"]
    return [*lines, f"  {again(job, best[0])}"]


def again(job: SweepJob, trial: Trial) -> str:
    """Return the command that trains a trial's first run again."""
    run = job.namer.planned(trial.point, int(trial.seeds[0]))
    return train_command(run.changed, run.threads, {path: run.changes[path] for path in INPUTS if path in run.changes})
