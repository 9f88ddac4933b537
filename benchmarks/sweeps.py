"""What a sweep costs beside its training: a suggestion, a report and memory over 1,000 trials, and a trial on Ray.

OMP_NUM_THREADS=1 python benchmarks/sweeps.py [--trials 1000] [--samplers random tpe] [--slots 64] [--ray 24]

Trials without training: formulas in place of runs, one seed, three rungs, ``--slots`` at once, Optuna's journal and a
record of each trial on disk. Each line is of one tenth of the trials, so that growth is seen: processor time, and in
brackets time by the clock, which is longer by Optuna's waits for the disk. ``--ray`` so many short real runs with TPE
and ASHA asked at every rung (its word is heard and not followed, so that every trial has an end to measure); the
overhead of a trial is the time of its process that is not spent inside ``fit``. 0 leaves it out.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures; returns 0 where the aims are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("trials", 1000), ("slots", 64), ("ray", 24)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--samplers", nargs="*", default=["random", "tpe"])
    given = parser.parse_args(arguments)
    fine = True
    for sampler in given.samplers:
        with tempfile.TemporaryDirectory() as root:
            formulas(Path(root), sampler, given.trials, given.slots)
    if given.ray:
        with tempfile.TemporaryDirectory() as root:
            median = on_ray(Path(root), given.ray)
        fine = median <= 0.3
    return 0 if fine else 1


def formulas(root: Path, sampler: str, trials: int, slots: int) -> None:
    """Time a suggestion and a report, and the driver's memory, tenth by tenth."""
    sweeping = helper()
    runs = sweeping.Runs(root, sweeping.bowl)
    before = memory()
    begun, spent = time.perf_counter(), time.process_time()
    queue = sweeping.opened(root, runs, trials, sampler, "none", slots, seeds=(0,))
    asks, reports = timed(queue.search.asker, "ask"), timed(queue.search, "heard")
    sizes: list[float] = []
    queue.search.tell = lambda trial: sizes.append(memory())
    sweeping.drive(queue, runs)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - spent
    print(f"{sampler}: {trials} trials, {slots} at once: {1000 * cpu / trials:.1f} ms of processor time a trial")
    print(
        f"  {seconds:.0f} s in all, of which {cpu:.0f} s of processor time: the rest waits for the disk, or for others"
    )
    part = max(1, trials // 10)
    for start in range(0, trials, part):
        ask = medians(asks[start : start + part])
        report = medians(reports[start * len(reports) // trials : (start + part) * len(reports) // trials])
        grown = sizes[min(start + part, len(sizes)) - 1] - before
        print(f"  to {start + part:>6}: {ask} ms a suggestion, {report} ms a report, {grown:6.0f} MB more")
    begun = time.perf_counter()
    again = sweeping.opened(root, runs, trials, sampler, "none", slots, seeds=(0,))
    assert again.search.next_runs() == [] and len(again.search.trials) == trials
    print(f"  opened again in {time.perf_counter() - begun:.1f} s")


def timed(owner: Any, name: str) -> list[tuple[float, float]]:
    """Milliseconds, of processor and by the clock, of each later call of a method that does something."""
    found: list[tuple[float, float]] = []
    plain: Callable[..., Any] = getattr(owner, name)

    def measured(*given: Any) -> Any:
        order, begun, since = getattr(owner, "order", None), time.process_time(), time.perf_counter()
        try:
            return plain(*given)
        finally:
            # What a run says again after an interruption is known already, and changes nothing.
            if order is None or owner.order != order:
                found.append((1000 * (time.process_time() - begun), 1000 * (time.perf_counter() - since)))

    setattr(owner, name, measured)
    return found


def medians(calls: Sequence[tuple[float, float]]) -> str:
    """Processor time and, in brackets, time by the clock."""
    cpu, clock = (statistics.median(call[kind] for call in calls) for kind in (0, 1))
    return f"{cpu:6.2f} ({clock:6.2f})"


def memory() -> float:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def on_ray(root: Path, trials: int) -> float:
    """Median overhead of a trial with a searcher and a scheduler."""
    from optuna.pruners import SuccessiveHalvingPruner

    from viladiff.cluster.sweep_executor import run_search
    from viladiff.runs.job import ExecutionSettings
    from viladiff.runs.store import Store
    from viladiff.sweeps.controller import SweepController
    from viladiff.sweeps.early_stopping import successive_halving_settings
    from viladiff.sweeps.optuna_study import OptunaStudy
    from viladiff.sweeps.spec import SweepPlanner, load_sweep
    from viladiff.sweeps.trial_queue import TrialQueue

    sweep = load_sweep(ROOT / "tune" / "sweep_joint.toml")
    namer = SweepPlanner(sweep, "smoke", {"train.steps": "20", "eval.max_images": "25"}, "holdout")
    (root / "trials").mkdir()

    class Heard(SuccessiveHalvingPruner):
        def prune(self, study: Any, trial: Any) -> bool:
            super().prune(study, trial)
            return False

    asha, journal = Heard(*successive_halving_settings("asha", namer.steps)), str(root / "optuna.journal")
    asker = OptunaStudy("sweep", sweep.space, [sweep.initial_point], "tpe", 0, True, journal, asha)
    store = Store(root / "runs")
    search = SweepController(root / "trials", asker, namer.planned, (0,), namer.steps, trials, store)
    queue = TrialQueue(search, store, ExecutionSettings(), 2)
    run_search(queue)
    spans: dict[str, list[tuple[float, float]]] = {}
    for outcome in queue.outcomes.values():
        if outcome.began is not None and outcome.ended is not None:
            spans.setdefault(outcome.worker, []).append((outcome.began, outcome.ended))
    gaps = [later[0] - earlier[1] for runs in spans.values() for earlier, later in pairwise(sorted(runs))]
    states = [trial.state for trial in search.trials]
    median = statistics.median(gaps)
    print(f"on Ray: {states.count('complete')} of {trials} trials in {len(spans)} processes, TPE, ASHA at every rung")
    print(f"  overhead of a trial: median {median:.3f} s (aim: at most 0.3 s), largest {max(gaps):.3f} s")
    return median


def helper() -> ModuleType:
    """tests/sweeping.py, whose formulas this shares."""
    spec = importlib.util.spec_from_file_location("sweeping", ROOT / "tests" / "sweeping.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
