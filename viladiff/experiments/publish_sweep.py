"""Publication of a sweep: its trials and their runs' records, from which another machine continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from viladiff.core.atomic import write_atomically
from viladiff.core.installation import published_dir
from viladiff.core.messages import print_text
from viladiff.experiments.publish import publish_records
from viladiff.experiments.sweep_setup import META, SweepJob, differences, meta, read_definition
from viladiff.sweeps.finals import Finalist
from viladiff.sweeps.trials import Trial, load_trials, save_trial, trial_bytes, without_paths


def published_in(job: SweepJob) -> Path:
    return published_dir() / f"sweep_{job.sweep.name}"


def published_trials(job: SweepJob) -> list[Trial]:
    """Return the published trials of this sweep, or of it over a narrower space; empty if there are none.

    Raises ValueError if their files are damaged.
    """
    path = published_in(job) / META
    try:
        before = read_definition(path)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ValueError(f"{error}; restore it") from None
    return [] if differences(before, job) else load_trials(path.parent / "trials")


def adopt(job: SweepJob) -> None:
    """Import the published trials of the sweep that continue the trials of this storage.

    Raises ValueError if the sweep is to be published over trials that have diverged.
    """
    here, there = load_trials(job.directory / "trials"), published_trials(job)
    if continues(there, here):
        if len(there) > len(here):
            print_text(f"{len(there)} trials of this sweep are published in {published_in(job)}; resuming from them")
        for trial in there:
            if trial.number >= len(here) or here[trial.number].state == "running":
                save_trial(trial, job.directory / "trials")
    elif job.args.publish and not continues(here, there):
        raise ValueError(
            f"{job.directory}: trials have diverged from those published in {published_in(job)}; use --study NAME to "
            "continue from the published ones"
        )


def continues(later: Sequence[Trial], earlier: Sequence[Trial]) -> bool:
    """Return whether one state of a sweep can continue another."""
    return len(later) >= len(earlier) and all(_continues(a, b) for a, b in zip(later, earlier, strict=False))


def _continues(later: Trial, earlier: Trial) -> bool:
    a, b = (without_paths(one).model_dump() for one in (later, earlier))
    if earlier.state != "running":
        return a == b
    begun = ("number", "point", "runs", "order", "twin", "origin")
    return (
        all(a[name] == b[name] for name in begun)
        and a["rungs"][: len(b["rungs"])] == b["rungs"]
        and b["values"].items() <= a["values"].items()
    )


def publish_sweep(job: SweepJob, trials: Sequence[Trial], found: Sequence[Finalist]) -> None:
    """Write the sweep's definition, its trials and the records of their finished runs, without machine paths."""
    out = published_in(job)
    (out / "trials").mkdir(parents=True, exist_ok=True)
    runs = [run for trial in trials for run in trial.runs.values()]
    publish_records([*runs, *(run.run_id for one in found for run in one.runs.values())], job.store, out)
    known = {path.name: path for path in (out / "trials").glob("[0-9]*.json")}
    for trial in map(without_paths, trials):
        path = known.pop(f"{trial.number:06}.json", None)
        if path is None or path.read_bytes() != trial_bytes(trial):
            save_trial(trial, out / "trials")
    for path in known.values():  # of a sweep that this one has taken the place of
        path.unlink()
    # Last: with it the trials count.
    write_atomically(out / META, json.dumps(meta(job), indent=1).encode())
