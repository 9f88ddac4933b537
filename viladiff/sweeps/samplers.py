"""Samplers of a sweep. Each is created anew for each trial, from (seed, trial) and the study alone.

A sampler thereby has no state that could be lost: a killed sweep draws the same points after it is resumed.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from viladiff.sweeps.space import Dimension, Space, Value, grid
from viladiff.sweeps.trials import Trial

if TYPE_CHECKING:
    import numpy as np
    from cmaes import CMA
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

Kind = Literal["tpe", "gp", "cmaes", "random", "grid"]
SPREAD = 0.3
"""First standard deviation of CMA-ES, as a share of each dimension."""


def key(seed: int, number: int) -> int:
    """Return 32 bits named by a sweep's seed and a trial's number."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest(), "little")


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return the space as Optuna's distributions."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def one(dimension: Dimension) -> BaseDistribution:
        if dimension.choices:
            return CategoricalDistribution(dimension.choices)
        low, high = dimension.low, dimension.high
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=dimension.log, step=int(dimension.step or 1))
        assert low is not None and high is not None
        return FloatDistribution(float(low), float(high), log=dimension.log, step=dimension.step)

    return {path: one(dimension) for path, dimension in space.items()}


def optuna_sampler(kind: Kind, seed: int, number: int, parallel: bool) -> BaseSampler:
    """Build a sampler for one trial. ``parallel``: running points count as bad ones, so that they are avoided."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import GPSampler, RandomSampler, TPESampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        made: dict[str, Callable[[int], BaseSampler]] = {
            "tpe": lambda drawn: TPESampler(seed=drawn, multivariate=True, constant_liar=parallel),
            "gp": lambda drawn: GPSampler(seed=drawn),
            "random": lambda drawn: RandomSampler(seed=drawn),
        }
        return made[kind](key(seed, number))


def next_on_grid(space: Space, trials: Sequence[Trial]) -> dict[str, Value] | None:
    """Return the first point of the grid that no trial has; None after the last."""
    taken = {_named(trial.point, space) for trial in trials}
    return next((point for point in grid(space) if _named(point, space) not in taken), None)


def _named(point: dict[str, Value], space: Space) -> tuple[str, ...]:
    return tuple(repr(point.get(path)) for path in space)


class Cmaes:
    """CMA-ES whose state is what it was told of completed trials, generation by generation, in the order of trials.

    Optuna's own keeps its state in the study, pickled, where a study rebuilt from records would lack it.
    """

    def __init__(self, space: Space, first: dict[str, Value], seed: int) -> None:
        """Create the optimiser. Raises ValueError for a space that it cannot search, and without the package."""
        self.space, self.first, self.seed = space, first, seed
        self.told = 0
        self.cma = self._make()

    def point(self, trials: Sequence[Trial], number: int) -> dict[str, Value]:
        """Return the point of trial ``number``, after ``trials``.

        Stopped and failed trials are ignored, since they have no value at the full budget.
        """
        done = [trial for trial in trials if trial.value is not None and trial.origin == "cmaes"]
        done.sort(key=lambda trial: trial.ended or 0)
        size = self.cma.population_size
        if self.told > len(done) // size:
            self.cma, self.told = self._make(), 0
        done.sort(key=lambda trial: trial.ended or 0)
        for start in range(self.told * size, len(done) - size + 1, size):
            generation = done[start : start + size]
            self.cma.tell([(self._place(trial), -float(trial.value or 0)) for trial in generation])
            self.told += 1
        self.cma.reseed_rng(key(self.seed, number))
        drawn = self.cma.ask()
        return {path: one.number(float(u)) for (path, one), u in zip(self.space.items(), drawn, strict=True)}

    def _place(self, trial: Trial) -> np.ndarray:
        import numpy as np

        return np.array([one.unit(trial.point[path]) for path, one in self.space.items()])

    def _make(self) -> CMA:
        try:
            import numpy as np
            from cmaes import CMA
        except ImportError:
            raise ValueError("--sampler cmaes requires the 'cmaes' package: pip install cmaes") from None
        words = [path for path, one in self.space.items() if one.choices]
        if words or len(self.space) < 2:
            why = f"{words[0]} has choices" if words else "the space has one dimension, and it takes two"
            raise ValueError(f"--sampler cmaes: searches numbers only, but {why}; use tpe")
        mean = np.array([one.unit(self.first[path]) for path, one in self.space.items()])
        bounds = np.array([[0.0, 1.0]] * len(self.space))
        return CMA(mean=mean, sigma=SPREAD, bounds=bounds, seed=key(self.seed, -1))
