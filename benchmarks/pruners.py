"""What each of Optuna's pruners, and some of their arguments, does to a search, on replayed learning curves.

OMP_NUM_THREADS=1 python benchmarks/pruners.py [--seeds 40] [--trials 48] [--replays surface alike nearest]

The replays are those of ``quality.py``. Every search has one budget, the median steps of random search with
``--trials`` full trials, and begins at the point that its seed draws, the same for all, so that differences are of
pairs. A line is of one half of the seeds: choose on the even ones, and quote the odd ones. Regret: how far the trial
that is ranked first lies below the best there is, in points of mIoU at full length, without noise. ``against random``
is the mean of regret less that of random search without pruner, pair by pair; ± is a standard error. ``trials`` and
``complete`` are medians; ``goal`` is the median share of the budget after which the regret stays at or below the
median final regret of random search of that half, and ``never`` how many do not come to that.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from viladiff.sweeps.early_stopping import optuna_pruner, successive_halving_settings
from viladiff.sweeps.spec import load_sweep

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

ROOT = Path(__file__).resolve().parent.parent


def variants(steps: Sequence[int]) -> dict[str, Callable[[], BasePruner]]:
    """Pruners by name, each with documented arguments alone."""
    from optuna.pruners import MedianPruner, NopPruner, PercentilePruner, SuccessiveHalvingPruner

    least, factor = successive_halving_settings("asha", steps)
    first, second = steps[:2]

    def asha(**more: Any) -> BasePruner:
        return SuccessiveHalvingPruner(min_resource=least, reduction_factor=factor, **more)

    return {
        "none": NopPruner,
        "asha": asha,
        f"asha from step {second}": lambda: asha(min_early_stopping_rate=1),
        "median": MedianPruner,
        f"median from step {second}": lambda: MedianPruner(n_warmup_steps=first + 1),
        "percentile 75": lambda: PercentilePruner(75.0),
        f"percentile 75 from step {second}": lambda: PercentilePruner(75.0, n_warmup_steps=first + 1),
        "hyperband": lambda: optuna_pruner("hyperband", steps),
        "asha, bootstrap_count 4": lambda: asha(bootstrap_count=4),
        "median, n_startup_trials 10": lambda: MedianPruner(n_startup_trials=10),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table for each replay; 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--replays", nargs="*", default=["surface"], choices=("surface", "alike", "nearest"))
    parser.add_argument("--samplers", nargs="*", default=["random", "tpe"], choices=("random", "tpe"))
    parser.add_argument("--pruners", nargs="*", help="names as they are printed (default: all)")
    given = parser.parse_args(arguments)
    quality = load("benchmarks/quality.py")
    space = load_sweep(ROOT / "tune" / "sweep_joint.toml").space
    curves = quality.load(quality.CURVES, space)
    made = {
        "surface": lambda: quality.Surface(curves, space),
        "alike": lambda: quality.Surface(curves, space, noise=False),
        "nearest": lambda: quality.Nearest(curves, space),
    }
    known = variants(load("tests/sweeping.py").STEPS)
    for name in given.replays:
        replay = made[name]()
        plain = [quality.search(replay, space, "random", seed, given.trials) for seed in range(given.seeds)]
        budget = int(statistics.median(one.steps[-1] for one in plain))
        print(f"{replay.name}: {given.seeds} seeds, {budget:,} steps each", flush=True)
        show("random, none", plain, plain, budget, quality.reached)
        for pruner in given.pruners or known:
            for kind in given.samplers:
                if (kind, pruner) == ("random", "none"):
                    continue
                found = [
                    quality.search(replay, space, kind, seed, 8 * given.trials, budget, known[pruner]())
                    for seed in range(given.seeds)
                ]
                show(f"{kind}, {pruner}", found, plain, budget, quality.reached)
    return 0


def show(name: str, found: Sequence[Any], plain: Sequence[Any], budget: int, reached: Callable[..., float]) -> None:
    """A line for each half of the seeds."""
    for half, word in enumerate(("even", "odd")):
        print(line(f"{name}, {word}", found[half::2], plain[half::2], budget, reached), flush=True)


def line(name: str, found: Sequence[Any], plain: Sequence[Any], budget: int, reached: Callable[..., float]) -> str:
    """One variant over some seeds, beside random search of the same seeds."""
    regret = [100 * one.regret[-1] for one in found]
    apart = [a - 100 * b.regret[-1] for a, b in zip(regret, plain, strict=True)]
    goal = statistics.median(one.regret[-1] for one in plain)
    shares = sorted(reached(one, goal) / budget for one in found)
    low, middle, high = statistics.quantiles(regret, n=4)
    at, never = statistics.median(shares), sum(map(math.isinf, shares))
    return (
        f"  {name:<40} regret {statistics.mean(regret):.2f} ± {error(regret):.2f} (quartiles {low:.2f} {middle:.2f} "
        f"{high:.2f}), against random {statistics.mean(apart):+.2f} ± {error(apart):.2f}; goal "
        f"{'never' if math.isinf(at) else format(at, '.0%')} ({never} of {len(shares)} never); "
        f"{statistics.median(len(one.steps) for one in found):.0f} trials, "
        f"{statistics.median(one.complete for one in found):.0f} complete"
    )


def error(values: Sequence[float]) -> float:
    """Standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def load(path: str) -> ModuleType:
    """A module of the repository that is in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
