"""What a sweep's command says: a trial in a line, what would run, what came out and how to make it again."""

from __future__ import annotations

from collections.abc import Sequence

from viladiff.core.messages import format_value
from viladiff.experiments.sweep_setup import SweepJob
from viladiff.runs.job import PlannedRun
from viladiff.sweeps.finals import Finalist, chosen, format_verdict
from viladiff.sweeps.spec import choosing_images
from viladiff.sweeps.summary import to_toml, train_command
from viladiff.sweeps.trials import Trial, load_trials, ranked
from viladiff.tables.spec import OWN_LISTS


def line(trial: Trial, full: int) -> str:
    """A trial that has ended, in one line."""
    point = ", ".join(f"{path.rpartition('.')[2]} = {format_value(value, 4)}" for path, value in trial.point.items())
    if trial.value is not None:
        what = f"{100 * trial.value:.2f} over {len(trial.values)} seed{'s' * (len(trial.values) != 1)}"
    elif trial.state == "pruned" and trial.rungs:
        what = f"stopped at step {trial.rungs[-1].step} of {full}, with {100 * trial.rungs[-1].value:.2f} there"
    else:
        what = f"{trial.state}: {trial.reason.splitlines()[0] if trial.reason else 'no reason is known'}"
    return f"trial {trial.number}: {point}: {what}"


def outline(job: SweepJob) -> list[str]:
    """What would run and what it would take."""
    steps, size = job.namer.steps, job.sweep.scale[job.scale]
    example = job.namer.planned(job.sweep.initial_point, job.seeds[0])
    step = _seconds(job, example) or size.seconds_per_step
    ended = sum(trial.state != "running" for trial in load_trials(job.directory / "trials"))
    runs = max(0, job.trials - ended) * len(job.seeds) + 3 * len(job.sweep.final_seeds)
    known = job.args.address is None or job.args.max_concurrent is not None
    slots = min(job.room.slots, runs) if known else 1
    many = f"{slots} at once" if known else "one after another; a cluster does as many at once as it has room for"
    begun = f", of which {ended} have ended," if ended else ""
    stops = f" at steps {', '.join(map(str, steps[:-1]))}" if job.args.scheduler != "none" else ""
    lines = {
        "searched": "; ".join(f"{path} in {dimension}" for path, dimension in job.sweep.space.items()),
        "first": ", ".join(f"{path} = {value}" for path, value in job.sweep.initial_point.items()) + " (the paper's)",
        "chosen by": f"{choosing_images(job.sweep, job.scale)}, which no trial trains on"
        if job.args.select == "holdout"
        else "THE REPORTED VALIDATION SET (--select val): what is found there is too good",
        **({"labelled": OWN_LISTS.replace("rows", "points")} if size.split_per_seed else {}),
        "trials": f"{job.trials}{begun} of {len(job.seeds)} seeds, by {job.args.sampler}; stopped early by "
        f"{job.args.scheduler}{stops}",
        "then": f"the best, the paper's and the second on {len(job.sweep.final_seeds)} fresh seeds, scored on "
        + ("the reported set" if job.sweep.finals_split == "test" else "the same images, to choose between them"),
        "at most": f"{runs} runs, {runs * steps[-1]:,} steps",
        "time": "not known"
        if step is None
        else f"at most {runs * (steps[-1] * step + size.seconds_overhead) / 3600 / slots:.1f} h, {many}",
        **({"GPUs": job.room.note} if job.room.note else {}),
        "sweep": str(job.directory),
        "page": str(job.out / "index.html"),
    }
    width = max(map(len, lines))
    return [f"{job.sweep.title}, scale {job.scale}", *(f"{name:<{width}}  {text}" for name, text in lines.items())]


def _seconds(job: SweepJob, example: PlannedRun) -> float | None:
    """Median seconds a step of runs of the same method and data set that the store has."""
    kind = ("method.name", "data.dataset")
    found = sorted(
        record.train_seconds / record.steps
        for record in job.store.records().values()
        if record.steps and all(record.changed.get(path) == example.changed.get(path) for path in kind)
    )
    return found[len(found) // 2] if found else None


def conclusion(job: SweepJob, trials: Sequence[Trial], found: Sequence[Finalist]) -> list[str]:
    """What came out, and how to make it again."""
    states = {state: sum(trial.state == state for trial in trials) for state in ("complete", "pruned", "failed")}
    counts = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    lines = ["", f"{len(trials)} of {job.trials} trials: {counts or 'none ended'}"]
    best = ranked(list(trials))
    if job.args.select == "val":
        lines.append("CHOSEN BY THE REPORTED SET (--select val): these scores are too good")
    if not best:
        return lines
    lines += ["", *format_verdict(found, job.store.records(), len(job.sweep.final_seeds)), "", "winner:"]
    lines += to_toml(best[0].point).splitlines()
    if job.sweep.finals_split == "dev" and (one := chosen(found, job.store.records())):
        lines += ["", f"chosen, by the mean over fresh seeds: {one.label}, trial {one.trial}:"]
        lines += to_toml(one.point).splitlines()
    seed = best[0].seeds[0]
    lines += ["", f"its trial's seed {seed} again ({100 * best[0].values[seed]:.2f} on what it was chosen by):"]
    return [*lines, f"  {again(job, best[0])}"]


def again(job: SweepJob, trial: Trial) -> str:
    """The command that trains a trial's first run again."""
    run = job.namer.planned(trial.point, int(trial.seeds[0]))
    return train_command(run.changed, run.threads)
