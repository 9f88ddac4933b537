"""What running many short trials through Ray costs beside the same runs in a plain loop at the same concurrency.

OMP_NUM_THREADS=1 python benchmarks/harness.py [--trials 24] [--steps 20] [--concurrency 2] [--rounds 1]

Both sides train the same configurations from scratch, on one thread each, in as many processes at once; the data set is
rendered before the clock starts. The plain side starts one Python a process, which imports torch and calls ``fit`` on
every second configuration. Overhead of a trial: time of its process since the end of the one before that is not spent
inside ``fit``; a process's first trial carries the whole start from the shell on. Shared out evenly, the starts and the
end stand in a line of their own, for both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.runs.store import Store

PLAIN = """
import json, os, sys, time
from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import fit
spans = []
for changes in json.loads(sys.argv[1]):
    cfg, begun = override(RunConfig(), changes), time.time()
    fit(cfg)
    spans.append([str(os.getpid()), begun, time.time()])
print(json.dumps(spans))
"""
Span = tuple[str, float, float]
"""Process, and the unix times around one call of ``fit``."""


class Side(NamedTuple):
    """One way of running all trials."""

    begun: float
    ended: float
    spans: list[Span]

    @property
    def seconds(self) -> float:
        return self.ended - self.begun

    def overheads(self) -> list[float]:
        """Seconds outside ``fit`` before each trial, in its process."""
        found = []
        for runs in self._processes():
            found += [runs[0][1] - self.begun, *(later[1] - earlier[2] for earlier, later in pairwise(runs))]
        return found

    def shared_out(self) -> float:
        """Seconds outside ``fit`` of all processes, from the shell to the end, over the number of trials."""
        return (sum(self.overheads()) + sum(self.ended - runs[-1][2] for runs in self._processes())) / len(self.spans)

    def first(self) -> float:
        """Seconds from the shell to the first ``fit``."""
        return min(start for _, start, _ in self.spans) - self.begun

    def _processes(self) -> list[list[Span]]:
        names = sorted({process for process, _, _ in self.spans})
        return [sorted(span for span in self.spans if span[0] == name) for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the ratio and the overheads; returns 0 where both aims are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("trials", 24), ("steps", 20), ("concurrency", 2), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(arguments)
    jobs = planned(given.trials, given.steps)
    ratios, found = [], []
    for round_ in range(given.rounds):
        # Each goes first once, so that a machine that is busy for a while favours neither.
        order = (through_ray, plain) if round_ % 2 == 0 else (plain, through_ray)
        sides = {run: run(jobs, given.concurrency) for run in order}
        ray, loop = sides[through_ray], sides[plain]
        print(f"{len(jobs)} trials: {ray.seconds:.1f} s through Ray, {loop.seconds:.1f} s in a plain loop")
        print(f"  from the shell to the first fit: {ray.first():.1f} s and {loop.first():.1f} s")
        print(f"  all that is not fit, by trial: {ray.shared_out():.2f} s and {loop.shared_out():.2f} s")
        ratios.append(ray.seconds / loop.seconds)
        found += ray.overheads()
    ratio, median, p95 = statistics.median(ratios), statistics.median(found), statistics.quantiles(found, n=20)[-1]
    print(f"ratio {ratio:.3f} (aim: at most 1.1)")
    print(f"overhead of a trial: median {median:.3f} s (aim: at most 0.3 s), 95th percentile {p95:.3f} s")
    return 0 if ratio <= 1.1 and median <= 0.3 else 1


def planned(trials: int, steps: int) -> list[PlannedRun]:
    """Short runs that differ in their seeds, named as ``fit`` names them; renders the data set on the way."""
    from viladiff.runs.config import RunConfig, override
    from viladiff.training.trainer import Trainer

    found = []
    for seed in range(trials):
        changes: dict[str, object] = {
            "seed": seed,
            "train.steps": steps,
            "eval.max_images": 25,
            "eval.boundary": False,
            "runtime.threads": 1,
        }
        name = Trainer(override(RunConfig(), changes)).name
        found.append(PlannedRun(run_id=name, changes=changes, title=f"seed {seed}", steps=steps, changed={}, threads=1))
    return found


def through_ray(jobs: list[PlannedRun], concurrency: int) -> Side:
    """All jobs by a driver in a new process."""
    with tempfile.TemporaryDirectory() as root:
        begun = time.time()
        given = json.dumps({"jobs": [vars(job) for job in jobs], "root": root, "concurrency": concurrency})
        done = subprocess.run(
            [sys.executable, __file__, "--side", given], stdout=subprocess.PIPE, text=True, check=True
        )
        ended = time.time()
    return Side(begun, ended, [(*span,) for span in json.loads(done.stdout.splitlines()[-1])])


def side(text: str) -> None:
    """The driver that is timed."""
    from viladiff.cluster.executor import run_jobs

    given = json.loads(text)
    jobs = [PlannedRun(**job) for job in given["jobs"]]
    outcomes = run_jobs(
        jobs, Store(Path(given["root"])), ExecutionSettings(max_concurrent=given["concurrency"]), ignore
    )
    failed = [outcome for outcome in outcomes if outcome.state != "done"]
    if failed:
        raise SystemExit(f"{len(failed)} runs did not finish: {failed[0]}")
    print(json.dumps([[outcome.worker, outcome.began, outcome.ended] for outcome in outcomes]))


def ignore(event: Event) -> None:
    """A display would be measured too."""


def plain(jobs: list[PlannedRun], concurrency: int) -> Side:
    """The same runs in ``concurrency`` processes that know nothing of each other."""
    with tempfile.TemporaryDirectory() as root:
        begun = time.time()
        changes = [{**job.changes, "runtime.runs_dir": root, "runtime.progress": False} for job in jobs]
        parts = [json.dumps(changes[i::concurrency]) for i in range(concurrency)]
        command = [sys.executable, "-c", PLAIN]
        processes = [subprocess.Popen([*command, part], stdout=subprocess.PIPE, text=True) for part in parts]
        said = [process.communicate()[0] for process in processes]
        ended = time.time()
    if any(process.returncode for process in processes):
        raise SystemExit("a plain run failed")
    return Side(begun, ended, [(*span,) for text in said for span in json.loads(text.splitlines()[-1])])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(sys.argv[2])
    else:
        raise SystemExit(main())
