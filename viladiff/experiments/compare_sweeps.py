"""Sweeps of several methods side by side: number of trials, first point and chosen point."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from viladiff.core.installation import specs_dir
from viladiff.experiments.publish_sweep import published_trials
from viladiff.experiments.sweep_setup import SweepJob, prepare
from viladiff.sweeps.finals import Finalist, Tuned, chosen, finalists, scores
from viladiff.sweeps.trials import Trial, load_trials
from viladiff.tables.significance import Records


def tuned(job: SweepJob, trials: Sequence[Trial], found: Sequence[Finalist]) -> list[Tuned]:
    """Return this sweep's result and those of the sweeps that it names ``beside`` it, as far as they exist.

    Loads torch.
    """
    records = job.store.records()
    return [_tuned(job, trials, found, records), *(_other(name, job, records) for name in job.sweep.beside)]


def _other(name: str, job: SweepJob, records: Records) -> Tuned:
    plain: dict[str, Any] = {
        "study": None,
        "trials": None,
        "seeds": None,
        "database": None,
        "report_dir": None,
        "changes": [],
    }
    args = argparse.Namespace(**{**vars(job.args), **plain})
    other = prepare(specs_dir("tune") / f"sweep_{name}.toml", args)
    trials = load_trials(other.directory / "trials") or published_trials(other)
    return _tuned(other, trials, finalists(other.sweep, trials, other.namer), records)


def _tuned(job: SweepJob, trials: Sequence[Trial], found: Sequence[Finalist], records: Records) -> Tuned:
    first = next((trial.value for trial in trials if trial.origin == "paper"), None)
    paper = next((one for one in found if "paper" in one.roles), None)
    best = chosen(found, records)
    return Tuned(
        job.sweep.title,
        job.trials,
        sum(trial.state == "complete" for trial in trials),
        "—" if first is None else f"{100 * first:.1f}",
        _scored(paper, records),
        _scored(best, records),
        {} if best is None else best.point,
        best is not None and "paper" in best.roles,
    )


def _scored(one: Finalist | None, records: Records) -> str:
    values = [] if one is None else list(scores(one, records).values())
    if not values:
        return "—"
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f} (1)"
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.1f} ± {sd:.1f} ({len(values)})"
