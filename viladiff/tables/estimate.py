"""Estimate of a plan's remaining time, from seconds a step of similar records, or the table's guess."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from viladiff.runs.job import PlannedRun
from viladiff.runs.record import RunRecord
from viladiff.tables.plan import Plan, RunStore, fields_of


class Estimate(NamedTuple):
    """The remaining cost of a plan."""

    cells: int
    runs: int
    """Unique ones."""
    done: int
    seconds: float | None
    """Wall time left, with all trials at work; None where nobody can say."""
    measured: int
    """Unfinished runs whose time follows from records; those of the rest are guesses that the table states."""
    cost: float | None
    """Seconds left at the price that was given; None without one."""
    basis: str
    """What ``seconds`` rests on, in words."""


def estimate(
    plan: Plan, store: RunStore, concurrency: int = 1, price_per_hour: float | None = None, gpus: bool | None = None
) -> Estimate:
    """Return the remaining time with ``concurrency`` runs at once, and its cost at the machine's price per hour.

    A run takes its steps times the median seconds a step, and the median seconds outside of steps, of the most similar
    records of its precision: those that differ in seed, labelled list, captions, length, learning rates and evaluation
    only, or else those that besides differ in settings of the method's own. Without such records the guesses of the
    scale are used, and without those the time is unknown. Steps that the log of an interrupted run holds are not
    counted again.

    gpus: whether runs will train on GPUs, and then only records of runs that did so count, or of those that did not;
    None counts both.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency = {concurrency}: must be at least 1")
    records = store.records()
    usable = _on(records.values(), gpus)
    left = [run for run in plan.runs.values() if run.run_id not in records]
    size = plan.table.scale[plan.scale]
    times, alike, akin = [], 0, 0
    for run in left:
        near, close = _nearest(run, usable)
        alike, akin = alike + (close and bool(near)), akin + (not close and bool(near))
        step = median(near_step) if (near_step := [_per_step(one) for one in near]) else size.seconds_per_step
        if step is None:
            return _estimate(plan, left, None, alike + akin, price_per_hour, f"no timing for {run.title!r}")
        besides = _besides(run, near)
        outside = size.seconds_overhead if besides is None else besides
        times.append(max(0, run.steps - _logged(store.directory(run.run_id))) * step + outside)
    guessed = len(left) - alike - akin
    parts = [
        f"{alike} timed from runs with the same settings" if alike else "",
        f"{akin} timed from runs of the same method, networks and batches" if akin else "",
        f"{guessed} estimated by the table file" if guessed else "",
    ]
    basis = f"{len(left)} runs remaining: " + ", ".join(filter(None, parts)) if left else "nothing to run"
    seconds = max([sum(times) / concurrency, *times]) if times else 0.0
    return _estimate(plan, left, seconds, alike + akin, price_per_hour, basis)


def step_seconds(run: PlannedRun, records: Iterable[RunRecord], gpus: bool | None = None) -> float | None:
    """Return the median seconds a step of the most similar records, chosen as by ``estimate``; None without any."""
    near, _ = _nearest(run, _on(records, gpus))
    return median(map(_per_step, near)) if near else None


def _on(records: Iterable[RunRecord], gpus: bool | None) -> list[RunRecord]:
    return [one for one in records if gpus is None or gpus == (one.device != "cpu")]


def _estimate(
    plan: Plan, left: Sequence[PlannedRun], seconds: float | None, measured: int, price: float | None, basis: str
) -> Estimate:
    cost = None if seconds is None or price is None else seconds / 3600 * price
    return Estimate(len(plan.cells), len(plan.runs), len(plan.runs) - len(left), seconds, measured, cost, basis)


_FREE = ("seed", "data.split", "data.split_seed", "data.captions", "data.captions_on", "train.steps", "train.epochs")
"""Fields that leave the time of a step as it is; so do learning rates and evaluation."""


def _cost_fields(changed: Mapping[str, Any]) -> str:
    free = {path for path in changed if path in _FREE or path.startswith(("optim.", "eval."))}
    return fields_of({path: value for path, value in changed.items() if path not in free})


def _shared(changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return all fields but those of the method's own: a tenfold encoder or crop makes a tenfold step."""
    return {path: value for path, value in changed.items() if path == "method.name" or not path.startswith("method.")}


def _nearest(run: PlannedRun, records: Iterable[RunRecord]) -> tuple[list[RunRecord], bool]:
    """Return the records to take times from, and whether their settings are the same; with equal threads if any."""
    usable = [one for one in records if one.steps > 0 and one.train_seconds > 0 and one.precision == run.precision]
    same = [one for one in usable if _cost_fields(one.changed) == _cost_fields(run.changed)]
    akin = [one for one in usable if _cost_fields(_shared(one.changed)) == _cost_fields(_shared(run.changed))]
    found = same or akin
    threads = [one for one in found if run.threads is None or one.threads == run.threads]
    return threads or found, bool(same)


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
        except (ValueError, KeyError, TypeError):
            continue
    return 0
