"""Records of a sweep's trials: point, runs, values at each budget, and how it ended. The sweep's only state.

Optuna's study with its pruner's decisions and the page all follow from these files. A trial is a point of the space;
its runs are the point under each seed. Scores are shares in [0, 1].
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from viladiff.core.atomic import write_atomically
from viladiff.runs.record import checksum
from viladiff.sweeps.space import Value

State = Literal["running", "complete", "pruned", "failed"]

DECIDED = 2.0
"""Standard errors by which a trial must stay behind the best for its other seeds to be left out."""
_FOLDERS = re.compile(r"""(?<![\w.])(?:~|[A-Za-z]:)?[/\\][^\s'"]*[/\\]""")
FEWEST_DF = 3
"""Degrees of freedom of the spread between seeds before anything is left out."""


class Rung(BaseModel):
    """An intermediate score of the first seed's run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    value: float
    order: int
    """Place among all that happened in the sweep."""


class Trial(BaseModel):
    """One point of a sweep."""

    model_config = ConfigDict(extra="forbid")

    number: int
    point: dict[str, Value]
    runs: dict[str, str]
    """Run by seed, in the order of the seeds."""
    order: int
    """When it was asked for, among all that happened in the sweep."""
    state: State = "running"
    rungs: list[Rung] = Field(default_factory=list)
    values: dict[str, float] = Field(default_factory=dict)
    """Score by seed at the full budget; seeds that were left out are missing."""
    reason: str = ""
    """Why it was stopped, failed, or did without some seeds."""
    twin: int | None = None
    """An earlier trial of the same runs, whose end is this one's too."""
    origin: str = ""
    """Where the point came from: the paper, or the sampler's name."""
    ended: int | None = None
    """When it ended, among all that happened; None while it runs."""

    @property
    def value(self) -> float | None:
        """Mean over the seeds that were run in full; None for a trial that was not completed."""
        if self.state != "complete" or not self.values:
            return None
        return math.fsum(self.values.values()) / len(self.values)

    @property
    def seeds(self) -> list[str]:
        return list(self.runs)


def save_trial(trial: Trial, directory: Path) -> None:
    """Write ``<number>.json`` atomically."""
    write_atomically(directory / f"{trial.number:06}.json", trial_bytes(trial))


def trial_bytes(trial: Trial) -> bytes:
    """Return what ``save_trial`` writes: JSON, the checksum last."""
    rest = json.loads(trial.model_dump_json())
    return json.dumps({**rest, "checksum": checksum(rest)}, indent=1, ensure_ascii=False, allow_nan=False).encode()


def load_trials(directory: Path) -> list[Trial]:
    """Return all trials by number, without a gap. Raises ValueError that names the damaged or missing file."""
    paths = sorted(directory.glob("[0-9]*.json"))
    trials = [_load(path) for path in paths]
    for number, (trial, path) in enumerate(zip(trials, paths, strict=True)):
        if trial.number != number:
            raise ValueError(
                f"{directory / f'{number:06}.json'}: missing, though {path.name} is there; restore it, or use "
                "--study NAME for a new sweep (finished runs are reused)"
            )
    return trials


def without_paths(trial: Trial) -> Trial:
    """Return a copy for publication: the reason of its end has no paths of this machine."""
    return Trial(**{**trial.model_dump(), "reason": _FOLDERS.sub("…/", trial.reason)})


def _load(path: Path) -> Trial:
    try:
        rest = json.loads(path.read_bytes())
        written = rest.pop("checksum")
        if written != checksum(rest):
            raise ValueError("its checksum does not match")
        trial = Trial.model_validate(rest)
        if path.stem != f"{trial.number:06}":
            raise ValueError(f"it is the record of trial {trial.number}")
    except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError, ValidationError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: not a trial's record, or damaged ({why}); restore it, or use --study NAME for a new sweep "
            "(finished runs are reused)"
        ) from None
    return trial


class SeedStatistics:
    """The best completed trial so far and the spread between seeds within trials, kept up to date in constant time."""

    def __init__(self) -> None:
        self.best: Trial | None = None
        self.squares, self.df = 0.0, 0

    def add(self, trial: Trial) -> None:
        """Count a completed trial; a twin is the same sample as its original and counts once."""
        if trial.value is None or trial.twin is not None:
            return
        values = list(trial.values.values())
        self.squares += math.fsum((value - trial.value) ** 2 for value in values)
        self.df += len(values) - 1
        # Of equal ones the earlier stays, so that the order in which files are read does not matter.
        if self.best is None or self.best.value is None or trial.value > self.best.value:
            self.best = trial

    def decided(self, values: list[float]) -> str:
        """Explain why the other seeds of a trial with these first ones need not be run; empty if they must.

        mean + 2 sd √(1 / n + 1 / m) < best mean, where n and m are the seeds of the trial and of the best one and sd
        is pooled over all trials. It saves runs that would very likely not change the winner, and claims no more.
        """
        if self.best is None or self.best.value is None or self.df < FEWEST_DF or not values:
            return ""
        mean = math.fsum(values) / len(values)
        sd = math.sqrt(self.squares / self.df)
        error = sd * math.sqrt(1 / len(values) + 1 / len(self.best.values))
        if mean + DECIDED * error >= self.best.value:
            return ""
        return (
            f"after {len(values)} of the seeds it was {100 * (self.best.value - mean):.1f} points below trial "
            f"{self.best.number}, {(self.best.value - mean) / error if error else math.inf:.1f} standard errors"
        )


def ranked(trials: list[Trial]) -> list[Trial]:
    """Return completed trials that are no twins, best first; in a tie the earlier. Stopped ones are not ranked."""
    done = [trial for trial in trials if trial.value is not None and trial.twin is None]
    return sorted(done, key=lambda trial: (-float(trial.value or 0), trial.number))
