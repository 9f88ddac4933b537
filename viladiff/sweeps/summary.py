"""Summary of a sweep for its page: trials as rows, rungs, history, importances, commands. From records, no torch.

Scores are in points, percent of mIoU. Trials are compared at one budget.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from viladiff.core.messages import format_value
from viladiff.sweeps.samplers import distributions
from viladiff.sweeps.space import Space
from viladiff.sweeps.trials import Trial, ranked
from viladiff.tables.significance import Records

FEWEST = 8
"""Trials at one budget, fewer of which say nothing of what matters."""
WIDTHS = (0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 1.0)
"""Of the kernel of ``local_mean``, as shares of a dimension."""
PLACES = 49
FOREST, TREES = 150, 32
"""Trials that fANOVA sees at most, an even choice, and its trees: its time grows faster than both."""


class TrialRow(NamedTuple):
    """A trial as a table shows it."""

    number: int
    point: dict[str, Any]
    origin: str
    state: str
    budget: int | None
    """Step that its value is of; values of different budgets are not to be compared."""
    mean: float | None
    """Of a completed trial over its seeds; of a stopped one, of its first seed at its budget."""
    low: float | None
    high: float | None
    seeds: int
    reason: str
    rank: int | None
    """Among completed trials; None for others and for twins."""
    seconds: float | None
    """Training of all its finished runs; None where one of them is not known."""


def trial_rows(trials: Sequence[Trial], records: Records, full: int) -> list[TrialRow]:
    """Return all trials in order; ``full`` is the step of the full budget."""
    places = {trial.number: place for place, trial in enumerate(ranked(list(trials)), 1)}
    return [_row(trial, records, full, places.get(trial.number)) for trial in trials]


def _row(trial: Trial, records: Records, full: int, rank: int | None) -> TrialRow:
    budget: int | None = full
    values = [100 * value for value in trial.values.values()]
    if trial.state != "complete":
        reached = trial.rungs[-1:] if not values else []
        budget = reached[0].step if reached else full if values else None
        values = values or [100 * rung.value for rung in reached]
    mean = math.fsum(values) / len(values) if values else None
    done = [records.get(trial.runs[seed]) for seed in trial.values]
    seconds = None
    if done and all(record is not None for record in done):
        seconds = math.fsum(record.train_seconds for record in done if record is not None)
    low, high = (min(values), max(values)) if values else (None, None)
    return TrialRow(
        trial.number,
        trial.point,
        trial.origin,
        trial.state,
        budget,
        mean,
        low,
        high,
        len(trial.values),
        trial.reason,
        rank,
        seconds,
    )


def best_so_far(trials: Sequence[Trial]) -> list[tuple[int, float]]:
    """Return (trial, mean) of each completed trial that was the best one when it ended, in that order."""
    found: list[tuple[int, float]] = []
    for trial in sorted((one for one in trials if one.ended is not None), key=lambda one: one.ended or 0):
        if trial.value is not None and (not found or 100 * trial.value > found[-1][1]):
            found.append((trial.number, 100 * trial.value))
    return found


def trained(trials: Sequence[Trial], full: int) -> list[tuple[int, int]]:
    """Return (trial, steps trained until it ended) of each ended trial, in that order; twins cost nothing.

    A stopped trial counts up to its last rung, a failed one up to the last rung that it is known to have reached.
    """
    found, total = [], 0
    for trial in sorted((one for one in trials if one.ended is not None), key=lambda one: one.ended or 0):
        if trial.twin is None:
            reached = trial.rungs[-1].step if trial.rungs else 0
            total += max(full * len(trial.values), reached)
        found.append((trial.number, total))
    return found


class Smooth(NamedTuple):
    """A line through scattered points, with the standard error of each place of it."""

    at: list[float]
    """Places on the dimension, 0 to 1."""
    mean: list[float]
    error: list[float]
    width: float


def local_mean(at: Sequence[float], values: Sequence[float]) -> Smooth | None:
    """Return m(u) = Σ w_i y_i / Σ w_i with w_i = exp(-(u - u_i)² / 2h²), between the outermost points.

    None for fewer than FEWEST different positions (Nadaraya 1964, Watson 1964).

    h is that of WIDTHS whose predictions of each point from the others err least, and s² their mean squared error; the
    standard error at u is s √Σ w_i² / Σ w_i.
    """
    u, y = np.asarray(at, float), np.asarray(values, float)
    if len(set(at)) < FEWEST:
        return None
    apart = (u[:, None] - u[None, :]) ** 2
    found = []
    for width in WIDTHS:
        weights = np.exp(-apart / (2 * width**2))
        np.fill_diagonal(weights, 0.0)
        total = weights.sum(1)
        if (total > 1e-12).all():
            found.append((float(np.mean((y - weights @ y / total) ** 2)), width))
    if not found:
        return None
    square, width = min(found)
    places = np.linspace(u.min(), u.max(), PLACES)
    weights = np.exp(-((places[:, None] - u[None, :]) ** 2) / (2 * width**2))
    total = weights.sum(1)
    error = math.sqrt(square) * np.sqrt((weights**2).sum(1)) / total
    return Smooth(places.tolist(), (weights @ y / total).tolist(), error.tolist(), width)


class RungStep(NamedTuple):
    """One rung: who came to it, and who went on."""

    step: int
    came: list[tuple[int, float]]
    """(trial, its first seed's score)."""
    on: set[int]


def rungs(trials: Sequence[Trial], steps: Sequence[int]) -> list[RungStep]:
    """Return each rung with the trials that reached it; twins are left out, since they are the same runs."""
    found = []
    own = [trial for trial in trials if trial.twin is None]
    for i, step in enumerate(steps):
        came = [(trial.number, 100 * rung.value) for trial in own for rung in trial.rungs if rung.step == step]
        later = {trial.number for trial in own for rung in trial.rungs if rung.step in steps[i + 1 :]}
        done = {trial.number for trial in own if trial.state == "complete"}
        found.append(RungStep(step, came, {number for number, _ in came if number in later | done}))
    return found


def one_budget(trials: Sequence[Trial], steps: Sequence[int]) -> int | None:
    """Return the step at which trials are compared for importance: the last that half of all, and FEWEST, reached.

    Later steps were reached by the best alone, among which the important dimensions no longer differ.
    """
    own = [trial for trial in trials if trial.twin is None]
    came = {step: sum(any(rung.step == step for rung in trial.rungs) for trial in own) for step in steps}
    fit = [step for step in steps if came[step] >= max(FEWEST, came[steps[0]] / 2)]
    return fit[-1] if fit else None


def importances(
    trials: Sequence[Trial], space: Space, step: int, kind: Literal["ped_anova", "fanova"] = "ped_anova", seed: int = 0
) -> dict[str, float] | None:
    """Return each dimension's share in the first seed's score at one rung; None if too few trials reached it.

    ``ped_anova`` asks what tells good trials from the rest, ``fanova`` the sources of the variance (estimated by a
    forest from FOREST trials).
    """
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    at = {
        trial.number: rung.value for trial in trials if trial.twin is None for rung in trial.rungs if rung.step == step
    }
    if len(at) < FEWEST or len(set(at.values())) < 2:
        return None
    if kind == "fanova":
        at = dict(list(at.items())[:: -(-len(at) // FOREST)])
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    known = distributions(space)
    study.add_trials(
        [
            optuna.trial.create_trial(params=trials[number].point, distributions=known, value=value)
            for number, value in at.items()
        ]
    )
    forest = kind == "fanova"
    evaluator = FanovaImportanceEvaluator(n_trees=TREES, seed=seed) if forest else PedAnovaImportanceEvaluator()
    found = get_param_importances(study, evaluator=evaluator)
    return {path: float(found.get(path, 0.0)) for path in space}


INPUTS = ("runtime.data_root", "runtime.captions", "runtime.text_model")
"""Files that a run reads: their content is in its name, their places in none of its changed fields."""

_NONE: Mapping[str, Any] = MappingProxyType({})


def train_command(changed: Mapping[str, Any], threads: int | None, inputs: Mapping[str, Any] = _NONE) -> str:
    """Return the command that repeats a run, bit for bit on the same machine, from its changed fields and inputs."""
    fields = {path: value for path, value in changed.items() if not path.startswith("runtime.")}
    words = [f"{path}={format_value(value)}" for path, value in {**fields, **inputs}.items()]
    more = [] if threads is None else ["--threads", str(threads)]
    return shlex.join(["viladiff", "train", *words, *more])


def to_toml(point: Mapping[str, object]) -> str:
    """Format a point as lines for a table's ``base`` or ``set``."""

    def one(value: object) -> str:
        text = str(value).replace("\\", "\\\\").replace('"', '\\"')
        return f'"{text}"' if isinstance(value, str) else format_value(value)

    return "".join(f'"{path}" = {one(value)}\n' for path, value in point.items())
