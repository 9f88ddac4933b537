"""Estimate of a plan's remaining cost: from measured steps of the same kind, the table's guess, or counted work."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from viladiff.evaluation.devices import CPU, Device, device_called
from viladiff.evaluation.step_time import ERROR
from viladiff.runs.job import DataFacts, PlannedRun
from viladiff.runs.record import RunRecord
from viladiff.tables.plan import Plan, RunStore, fields_of
from viladiff.training.run_cost import CountedSteps, scoring_seconds


class Estimate(NamedTuple):
    """The remaining cost of a plan."""

    cells: int
    runs: int
    """Unique ones."""
    done: int
    seconds: float | None
    """Wall time left, with all trials at work; None where nobody can say."""
    measured: int
    """Unfinished runs whose time follows from records; those of the rest are guesses or counted."""
    cost: float | None
    """Of the time left, at the price that was given, else at the device's; None without one."""
    basis: str
    """What ``seconds`` rests on, in words."""
    device_hours: float | None = None
    """Hours of all devices together; None as ``seconds``."""
    peak_bytes: int = 0
    """The most that one run needs of a device's memory; 0 where it was not counted."""
    checkpoint_bytes: int = 0
    """Of the largest run's checkpoint, likewise."""
    counted: int = 0
    """Unfinished runs whose time is counted, to within ``ERROR``."""
    corrected: int = 0
    """Unfinished runs whose counted time is corrected by measured steps; they are among ``measured``."""


@dataclass(frozen=True)
class Target:
    """Where the runs are to go."""

    device: Device = CPU
    concurrency: int = 1
    """Runs at once."""
    price_per_hour: float | None = None
    """Of the whole machine; None takes the device's own, for each device."""
    steps: CountedSteps = field(default_factory=CountedSteps)
    ratios: dict[object, float | None] = field(default_factory=dict)
    """Measured time over counted time, by what the records have in common; of one store."""


def estimate(
    plan: Plan, store: RunStore, concurrency: int = 1, price_per_hour: float | None = None, device: Device = CPU
) -> Estimate:
    """Return the remaining time on ``device`` with ``concurrency`` runs at once, and what it costs.

    A run takes its steps times the median seconds a step, and the median seconds outside of steps, of the most similar
    records of that device, its precision and its workers: those that differ in seed, labelled list, captions, length,
    learning rates and evaluation only, or else those of the same method, encoder, crop, batch and data set. Without
    records the guesses of the scale are used, and without those the step's work is counted. A count is corrected by
    records of the same method, encoder, decoder, crop and batch that differ otherwise, as in data set, classes or T:
    by the ratio of their measured to their counted steps. Steps that the log of an interrupted run holds are not
    counted again.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency = {concurrency}: must be at least 1")
    return estimate_on(plan, store, Target(device, concurrency, price_per_hour))


def estimate_on(plan: Plan, store: RunStore, target: Target) -> Estimate:
    """Return ``estimate`` for a place to run; plans that share ``target.steps`` count each step once."""
    records = store.records()
    left = [run for run in plan.runs.values() if run.run_id not in records]
    size = plan.table.scale[plan.scale]
    if target.device is not CPU or (size.seconds_per_step is None and not records):
        target.steps.prepare(left)
    times: list[RunTime] = []
    for run in left:
        found = time_of_run(run, records.values(), target, size.seconds_per_step, size.seconds_overhead)
        if found is None:
            return _summary(plan, left, [], target, f"no timing for {run.title!r}")
        step = max(0, run.steps - _logged(store.directory(run.run_id))) * found.step
        times.append(found._replace(seconds=step + found.outside))
    return _summary(plan, left, times, target, _basis(times))


class RunTime(NamedTuple):
    """The seconds of a run, and where they are from."""

    source: str
    """``alike``, ``akin``, ``corrected``, ``guess`` or ``counted``."""
    step: float
    outside: float
    """Seconds outside of steps."""
    seconds: float = 0.0
    devices: int = 1
    peak_bytes: int = 0
    checkpoint_bytes: int = 0


_SAYS = {
    "alike": "timed from runs with the same settings",
    "akin": "timed from runs of the same method, encoder, crop and data set",
    "corrected": "estimated from their counted work, corrected by measured steps of the same method, encoder and crop",
    "guess": "estimated by the table file",
    "counted": "estimated from their counted work",
}


def time_of_run(
    run: PlannedRun, records: Collection[RunRecord], target: Target, guess: float | None, overhead: float
) -> RunTime | None:
    """Return a run's seconds a step and outside of steps on ``target``; None where nobody can say.

    guess: seconds a step of its scale, which are a core's; ``overhead``: seconds outside of steps, likewise.
    """
    guess = guess if target.device is CPU else None
    near, close = _nearest(run, records, target.device)
    # What the scale's guess is for is small; counting takes seconds, and memory matters on a GPU alone.
    cost = target.steps.of(run) if target.device is not CPU or (guess is None and not near) else None
    sizes = (0.0, run.workers, cost.peak_bytes if cost else 0, cost.checkpoint_bytes if cost else 0)
    besides = _besides(run, near)
    if cost is not None and not close and guess is None:
        ratio = _ratio(run, near or records, target, bool(near))
        if ratio is not None:
            step = ratio * cost.seconds(target.device, run.precision.endswith("TF32"))
            outside = scoring_seconds(run, cost, step) if besides is None else besides
            return RunTime("corrected", step, outside, *sizes)
    if near:
        step = median(_per_step(one) for one in near)
        return RunTime("alike" if close else "akin", step, overhead if besides is None else besides, *sizes)
    if guess is not None:
        return RunTime("guess", guess, overhead, *sizes)
    if cost is None:
        return None
    step = cost.seconds(target.device, run.precision.endswith("TF32"))
    return RunTime("counted", step, scoring_seconds(run, cost, step), *sizes)


def _basis(times: Sequence[RunTime]) -> str:
    counts = {source: sum(one.source == source for one in times) for source in _SAYS}
    parts = [f"{count} {_SAYS[source]}" for source, count in counts.items() if count]
    return f"{len(times)} runs remaining: " + ", ".join(parts) if times else "nothing to run"


def _summary(plan: Plan, left: Sequence[PlannedRun], times: Sequence[RunTime], target: Target, basis: str) -> Estimate:
    known = len(times) == len(left)
    each = [one.seconds for one in times]
    seconds = (max([sum(each) / target.concurrency, *each]) if each else 0.0) if known else None
    hours = sum(one.seconds * one.devices for one in times) / 3600 if known else None
    cost = None
    if seconds is not None and target.price_per_hour is not None:
        cost = seconds / 3600 * target.price_per_hour
    elif hours is not None and target.device.price is not None:
        cost = hours * target.device.price
    return Estimate(
        *(len(plan.cells), len(plan.runs), len(plan.runs) - len(left), seconds),
        *(sum(one.source in ("alike", "akin", "corrected") for one in times), cost, basis, hours),
        *(max((one.peak_bytes for one in times), default=0), max((one.checkpoint_bytes for one in times), default=0)),
        *(sum(one.source == source for one in times) for source in ("counted", "corrected")),
    )


def cost_lines(guess: Estimate, device: Device, price: float | None = None) -> dict[str, str]:
    """Return what is said of a plan's cost beside its time; nothing where it has no device's price or memory.

    price: the hourly one of the whole machine that was given, if any.
    """
    lines = {}
    error = f", estimated to within {ERROR:.0%}" if guess.counted else ""
    hours = guess.device_hours
    if hours is not None and device is not CPU:
        long = f"; {hours / 24:,.0f} days on one, {hours / 24 / 8:,.0f} on eight" if hours >= 48 else ""
        lines["GPU-hours"] = f"{hours:,.0f} on {device.name}{error}{long}"
    if guess.peak_bytes:
        lines["memory"] = (
            f"at most {guess.peak_bytes / 2**30:.1f} GiB a run, checkpoints of {guess.checkpoint_bytes / 2**30:.2f} GiB"
        )
        if 0 < device.memory < guess.peak_bytes:
            lines["memory"] += (
                f"; more than the {device.memory / 2**30:.0f} GiB of {device.name}: name another --device, or spread a "
                "batch by train.grad_accum_steps=2"
            )
    if guess.cost is not None:
        money = f"{guess.cost:,.0f}" if guess.cost >= 100 else f"{guess.cost:,.2f}"
        if price is not None:
            lines["cost"] = f"{money} at {price:,.2f} an hour (--hourly-price){error}"
        elif device.price is not None:
            rate = f"{device.price:.2f} an hour for one {device.name}"
            lines["cost"] = f"{money} US dollars at {rate}, an assumed price (--hourly-price sets yours){error}"
    return lines


_FREE = ("seed", "data.split", "data.split_seed", "data.captions", "data.captions_on", "train.steps", "train.epochs")
"""Fields that leave the time of a step as it is; so do learning rates and evaluation."""
_KIND = (
    *("method.name", "data.dataset", "data.crop", "data.batch_labelled", "data.batch_unlabelled"),
    *("train.grad_accum_steps", "model.encoder", "model.encoder_stride", "model.encoder_frozen", "model.decoder"),
    *("model.decoder_width",),
)
"""Fields that a record must share to lend its time."""


def _cost_fields(changed: Mapping[str, Any]) -> str:
    free = {path for path in changed if path in _FREE or path.startswith(("optim.", "eval."))}
    return fields_of({path: value for path, value in changed.items() if path not in free})


def _usable(run: PlannedRun, records: Iterable[RunRecord], device: Device) -> list[RunRecord]:
    """Return the timed records of the device, and of the run's precision and workers."""
    return [
        one
        for one in records
        if one.steps > 0 and one.train_seconds > 0 and one.precision == run.precision and one.workers == run.workers
        if device_called(one.device) is device
    ]


def _nearest(run: PlannedRun, records: Iterable[RunRecord], device: Device) -> tuple[list[RunRecord], bool]:
    """Return the records to take times from, and whether their settings are the same; with equal threads if any."""
    usable = _usable(run, records, device)
    same = [one for one in usable if _cost_fields(one.changed) == _cost_fields(run.changed)]
    akin = [one for one in usable if all(one.changed.get(path) == run.changed.get(path) for path in _KIND)]
    found = same or akin
    threads = [one for one in found if run.threads is None or one.threads == run.threads]
    return threads or found, bool(same)


_SHAPE = tuple(path for path in _KIND if path != "data.dataset")
"""Fields of which a record must have the same values, given or default, to correct a count."""


def _ratio(run: PlannedRun, records: Collection[RunRecord], target: Target, near: bool) -> float | None:
    """Return the median of measured over counted seconds a step of records like the run; None without any.

    They are of the target's device, the run's precision, workers and ``_SHAPE``; on a processor also of its threads.
    ``near``: the records are those of ``_nearest``.
    """
    shape = _shape(run.changed)
    threads = run.threads if target.device is CPU else None
    key = (shape, run.changed.get("data.dataset") if near else None, run.precision, run.workers, threads)
    if key not in target.ratios:
        fits = [
            one
            for one in _usable(run, records, target.device)
            if one.changed.get("method.name") == run.changed.get("method.name")
            if threads in (None, one.threads)
            if _shape(one.changed) == shape
        ]
        counted = [(one, target.steps.of(_as_planned(one))) for one in fits]
        found = [
            _per_step(one) / cost.seconds(target.device, one.precision.endswith("TF32"))
            for one, cost in counted
            if cost is not None
        ]
        target.ratios[key] = median(found) if found else None
    return target.ratios[key]


def _shape(changed: Mapping[str, Any]) -> tuple[object, ...]:
    """Return the values of ``_SHAPE``; defaults depend on the data set, so that equal changed fields do not suffice."""
    from viladiff.runs.config import defaults  # loads torch, as counting does

    whole = {**defaults(str(changed.get("data.dataset")), str(changed.get("method.name"))), **changed}
    return tuple(whole.get(path) for path in _SHAPE)


def _as_planned(record: RunRecord) -> PlannedRun:
    """Return the run of a record, to count its step."""
    fields = {path: value for path, value in record.changed.items() if not path.startswith("runtime.")}
    facts = DataFacts(len(record.class_names), 0, True)
    how = record.workers, record.threads, record.precision
    return PlannedRun(record.run_id, fields, record.run_id, record.steps, fields, *how, facts)


def _per_step(record: RunRecord) -> float:
    return record.train_seconds / record.steps


def _besides(run: PlannedRun, near: Sequence[RunRecord]) -> float | None:
    """Return the median seconds outside of steps, of records evaluated in the same way if there are any."""

    def scored(changed: Mapping[str, Any]) -> dict[str, Any]:
        return {path: value for path, value in changed.items() if path.startswith("eval.")}

    alike = [one for one in near if scored(one.changed) == scored(run.changed)]
    # Records of an older version count the last leg's wall time, and the training of all.
    found = [
        [
            one.wall_seconds - one.train_seconds
            for one in some
            if one.wall_seconds is not None and one.wall_seconds >= one.train_seconds
        ]
        for some in (alike, near)
    ]
    return median(found[0] or found[1]) if found[1] else None


def _logged(directory: Path) -> int:
    """Return the steps that an interrupted run has logged; its checkpoint may be somewhat older."""
    if not (directory / "checkpoint.pt").is_file():
        return 0
    try:
        lines = (directory / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"]) + 1
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return 0
