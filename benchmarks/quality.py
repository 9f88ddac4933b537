"""Does a search with TPE and ASHA find as good a point as random search does, for less training?

OMP_NUM_THREADS=1 python benchmarks/quality.py [--seeds 20] [--trials 48]

Replays whole sweeps, with their seeds, rungs, stopping and leaving out of seeds, on learning curves that
``scripts/record_curves.py`` has recorded from real runs over the joint space (curves.csv; curves.json says where they
come from). What was not recorded is filled in by a smooth surface (of mean curves, from the recorded points, over the
learning rates of head and encoder; what a seed adds is a recorded curve's difference from its mean). It knows nothing
of who asks, and how well it predicts points that it has not seen is printed; surfaces and forests over all dimensions
predicted them hardly at all (docs/experiments.md). So the other dimensions that are searched are idle in the replay, as
they are in the runs as far as so few points can tell. Beside it, and no aim, stand the same surface with all seeds
alike, and ``nearest``, which fills in nothing: each point has the curves of the recorded one that is nearest, so that
in this many dimensions most of what a search could learn is lost.

Random search has ``--trials`` full trials. The regret of a search is how far, at the full length and without noise, the
trial that it ranks first lies below the best there is. Random search's final regret, the median over sampler seeds, is
the goal; a search has reached it from the step on after which its regret stays there. Searches begin at a drawn point,
since the paper's may be good already. Aim: the median search with TPE and ASHA takes at most 40 % of the steps.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import math
import random
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from viladiff.sweeps.space import Space, Value
from viladiff.sweeps.spec import load_sweep
from viladiff.sweeps.summary import trained
from viladiff.sweeps.trials import ranked

ROOT = Path(__file__).resolve().parent.parent
CURVES = ROOT / "benchmarks" / "curves.csv"
AIM = 0.4
SHARES = (0.25, 0.5, 1.0)
FOLDS = 8


class Curves(NamedTuple):
    """What was recorded: mIoU by point, seed and rung."""

    points: list[dict[str, Value]]
    values: np.ndarray
    """(points, seeds, rungs)."""


class Course(NamedTuple):
    """One search: steps that were trained when each of its trials ended, and its regret from then on."""

    steps: list[int]
    regret: list[float]
    complete: int = 0
    """Trials of them that were not stopped, nor failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures; returns 0 where the aim is met, or nothing was recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=48)
    given = parser.parse_args(arguments)
    if not CURVES.is_file():
        print(f"not measured: {CURVES.name} is not there; scripts/record_curves.py records it")
        return 0
    space = load_sweep(ROOT / "tune" / "sweep_joint.toml").space
    curves = load(CURVES, space)
    means = 100 * curves.values[..., -1].mean(1)
    noise = 100 * math.sqrt(float(curves.values[..., -1].var(1, ddof=1).mean()))
    print(
        f"{len(means)} points of {curves.values.shape[1]} seeds: {means.min():.1f} to {means.max():.1f} mIoU, median "
        f"{np.median(means):.1f}, standard deviation between seeds {noise:.1f}"
    )
    print(f"the surface predicts points that it has not seen with R² = {predicted(curves):.2f} ({FOLDS} parts)")
    shares = {}
    for replay in (Surface(curves, space), Surface(curves, space, noise=False), Nearest(curves, space)):
        shares[replay.name] = compare(replay, space, given.seeds, given.trials)
    return 0 if shares["surface"] <= AIM else 1


def load(path: Path, space: Space) -> Curves:
    """The table of ``scripts/record_curves.py``; points that lack a seed or a rung are left out.

    Raises ValueError where nothing is left, or where a point does not lie in the space.
    """
    found: dict[int, dict[tuple[int, int], float]] = {}
    points: dict[int, dict[str, Value]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            number = int(row["point"])
            points[number] = {name: _typed(row[name], one) for name, one in space.items()}
            found.setdefault(number, {})[int(row["seed"]), int(row["step"])] = float(row["miou"])
    seeds = sorted({seed for scores in found.values() for seed, _ in scores})
    full = max((step for scores in found.values() for _, step in scores), default=0)
    cells = [[(seed, round(share * full)) for share in SHARES] for seed in seeds]
    whole = [n for n, scores in found.items() if all(cell in scores for row in cells for cell in row)]
    if len(whole) < FOLDS or len(seeds) < 3:
        raise ValueError(f"{path}: {len(whole)} points of {len(seeds)} seeds; at least {FOLDS} of 3 are needed")
    for number in whole:
        wrong = [name for name, one in space.items() if not one.has(points[number][name])]
        if wrong:
            raise ValueError(f"{path}: point {number}: {wrong[0]} = {points[number][wrong[0]]!r} is not in the space")
    values = [[[found[number][cell] for cell in row] for row in cells] for number in whole]
    return Curves([points[number] for number in whole], np.array(values))


def _typed(text: str, dimension: Any) -> Value:
    if dimension.choices:
        return next((choice for choice in dimension.choices if str(choice) == text), text)
    return int(text) if dimension.whole else float(text)


def coordinates(point: dict[str, Any], space: Space) -> list[float]:
    """A point as numbers in [0, 1]; a choice has one for each of its values."""
    found: list[float] = []
    for path, one in space.items():
        found += [float(point[path] == choice) for choice in one.choices] if one.choices else [one.unit(point[path])]
    return found


# Curves of any point


def rates(point: dict[str, Any]) -> list[float]:
    """What the recorded points differ by most: the logarithms of the head's learning rate and of the encoder's."""
    head = math.log(point["optim.lr"])
    return [head, head + math.log(point["optim.encoder_lr_scale"])]


def surface(curves: Curves, kept: Sequence[int] | None = None) -> Any:
    """A Gaussian process of mean curves over the two rates, with at least the noise that means of so few seeds have."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler

    values = curves.values if kept is None else curves.values[list(kept)]
    points = curves.points if kept is None else [curves.points[row] for row in kept]
    noise = values[..., -1].var(1, ddof=1).mean() / values.shape[1] / values[..., -1].mean(1).var()
    others = WhiteKernel(0.1, (1e-4, 1.0))  # what the other dimensions do
    kernel = ConstantKernel(1.0, (1e-2, 1e4)) * Matern(1.0, (0.05, 100.0), nu=2.5) + others
    process = GaussianProcessRegressor(kernel, alpha=noise, normalize_y=True, n_restarts_optimizer=2, random_state=0)
    at = np.array([rates(point) for point in points])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a parameter at a bound is an answer, too
        return make_pipeline(MinMaxScaler(), process).fit(at, values.mean(1))


def predicted(curves: Curves) -> float:
    """R² at the full length over points that were left out when they were predicted."""
    means, guess = curves.values[..., -1].mean(1), np.empty(len(curves.points))
    for fold in range(FOLDS):
        out = [i for i in range(len(means)) if i % FOLDS == fold]
        model = surface(curves, [i for i in range(len(means)) if i % FOLDS != fold])
        guess[out] = model.predict(np.array([rates(curves.points[i]) for i in out]))[:, -1]
    return float(1 - ((means - guess) ** 2).sum() / ((means - means.mean()) ** 2).sum())


class Surface:
    """Mean curves from ``surface``; what a seed adds is the difference of a recorded curve from its point's mean.

    Without ``noise`` a seed adds nothing.
    """

    def __init__(self, curves: Curves, space: Space, noise: bool = True) -> None:
        self.name = "surface" if noise else "surface, all seeds alike"
        self.model = surface(curves)
        seeds = curves.values.shape[1]
        apart = curves.values - curves.values.mean(1, keepdims=True)
        # Differences from a mean of so few seeds are too small by this factor.
        self.noise = noise * (apart * math.sqrt(seeds / (seeds - 1))).reshape(-1, len(SHARES))
        self.known: dict[str, np.ndarray] = {}
        drawn = random.Random("the best of the surface")
        at = [rates(point) for point in (*curves.points, *(draw(space, drawn) for _ in range(4096)))]
        self.best = float(self.model.predict(np.array(at))[:, -1].max())

    def mean(self, point: dict[str, Any]) -> np.ndarray:
        name = repr(sorted(point.items()))
        if name not in self.known:
            self.known[name] = self.model.predict(np.array([rates(point)]))[0]
        return self.known[name]

    def curve(self, point: dict[str, Any], seed: int) -> np.ndarray:
        digest = hashlib.sha256(f"{sorted(point.items())} {seed}".encode()).digest()
        return np.maximum(0.0, self.mean(point) + self.noise[int.from_bytes(digest[:6], "little") % len(self.noise)])


class Nearest:
    """The curves of the nearest recorded point, as they were recorded."""

    name = "nearest"

    def __init__(self, curves: Curves, space: Space) -> None:
        self.space, self.curves = space, curves
        self.at = np.array([coordinates(point, space) for point in curves.points])
        self.best = float(curves.values[..., -1].mean(1).max())

    def _row(self, point: dict[str, Any]) -> int:
        return int(np.abs(self.at - np.array(coordinates(point, self.space))).sum(1).argmin())

    def mean(self, point: dict[str, Any]) -> np.ndarray:
        return np.asarray(self.curves.values[self._row(point)].mean(0))

    def curve(self, point: dict[str, Any], seed: int) -> np.ndarray:
        return np.asarray(self.curves.values[self._row(point), seed % self.curves.values.shape[1]])


Replay = Surface | Nearest


def draw(space: Space, drawn: random.Random) -> dict[str, Value]:
    """A point, each dimension equally likely in its own measure."""
    return {p: drawn.choice(one.choices) if one.choices else one.number(drawn.random()) for p, one in space.items()}


# Searches


def compare(replay: Replay, space: Space, seeds: int, trials: int) -> float:
    """Share of random search's steps that the median search with TPE and ASHA takes to its final regret; prints it."""
    plain = [search(replay, space, "random", seed, trials) for seed in range(seeds)]
    steps = statistics.median(one.steps[-1] for one in plain)
    goal = statistics.median(one.regret[-1] for one in plain)
    guided = [search(replay, space, "tpe", seed, 8 * trials, int(steps)) for seed in range(seeds)]
    shares = sorted(reached(one, goal) / steps for one in guided)
    low, high = shares[len(shares) // 4], shares[-1 - len(shares) // 4]
    share = statistics.median(shares)
    never = sum(math.isinf(one) for one in shares)
    left = 100 * statistics.median(one.regret[-1] for one in guided)
    after, first, third = ("never" if math.isinf(one) else f"{one:.0%}" for one in (share, low, high))
    print(
        f"{replay.name}: random search ends {100 * goal:.2f} points below the best of {100 * replay.best:.1f}; share "
        f"of its steps\n  that TPE and ASHA need to get there: {after} (aim: at most {AIM:.0%}; quartiles {first} and "
        f"{third}; {never} of {seeds} never do); they end {left:.2f} below"
    )
    return share


def search(
    replay: Replay, space: Space, kind: str, seed: int, trials: int, budget: int | None = None, pruner: Any = "asha"
) -> Course:
    """One sweep from a drawn first point; with a ``budget`` ``pruner`` stops trials, and none begins after it."""
    from viladiff.sweeps.trials import Trial

    sweeping = helper()
    full = sweeping.STEPS[-1]

    def score(point: dict[str, Any], number: int, step: int) -> float:
        return float(replay.curve(point, number)[SHARES.index(step / full)])

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        runs = sweeping.Runs(Path(root), score)
        first = draw(space, random.Random(f"first {seed}"))

        def tell(trial: Trial) -> None:
            if budget is not None and runs.trained >= budget:
                queue.search.wanted = len(queue.search.trials)

        stops = "none" if budget is None else pruner
        queue = sweeping.opened(
            Path(root), runs, trials, kind, stops, 1, space=space, first=first, seed=seed, tell=tell
        )
        sweeping.drive(queue, runs)
    found = queue.search.trials
    total, steps, regret = dict(trained(found, full)), [], []
    ended = sorted((trial for trial in found if trial.ended is not None), key=lambda trial: trial.ended or 0)
    for i, trial in enumerate(ended, 1):
        best = ranked(ended[:i])
        steps.append(total[trial.number])
        regret.append(replay.best - float(replay.mean(best[0].point)[-1]) if best else math.inf)
    return Course(steps, regret, sum(trial.state == "complete" for trial in found))


def reached(path: Course, goal: float) -> float:
    """Steps after which a search's regret stays at the goal or below; infinite where it does not end there."""
    at = math.inf
    for step, regret in zip(reversed(path.steps), reversed(path.regret), strict=True):
        if regret > goal + 1e-12:
            break
        at = step
    return at


def helper() -> ModuleType:
    """tests/sweeping.py, which drives a sweep on formulas."""
    spec = importlib.util.spec_from_file_location("sweeping", ROOT / "tests" / "sweeping.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
