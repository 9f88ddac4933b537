"""What running many short trials through Ray costs beside the same runs in a plain loop: issue 3's two figures.

    OMP_NUM_THREADS=1 python benchmarks/harness.py [--trials 24] [--steps 20] [--concurrency 2] [--rounds 1]

Both sides train the same configurations from scratch, on one thread each, in as many processes at once; the data set is
rendered before the clock starts. The plain side starts one Python a process, which imports torch and calls ``fit`` on
every second configuration. Overhead of a trial: time of its slot that is not spent inside ``fit``, from the end of
the one before to its own end; what goes before the first run and after the last is shared out over all trials.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from viladiff.study.events import Event, Settings
from viladiff.study.plan import Planned
from viladiff.study.store import Store

PLAIN = """
import json, sys
from viladiff.config import RunConfig, override
from viladiff.train import fit
for changes in json.loads(sys.argv[1]):
    fit(override(RunConfig(), changes))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the ratio and the overheads; returns 0 where both aims are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, value in (("trials", 24), ("steps", 20), ("concurrency", 2), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(arguments)
    jobs = planned(given.trials, given.steps)
    ratios, overheads = [], []
    for round_ in range(given.rounds):
        # Each goes first once, so that a machine that warms up or is busy for a while favours neither for good.
        sides = [lambda: through_ray(jobs, given.concurrency), lambda: (plain(jobs, given.concurrency), [])]
        results = [side() for side in (sides if round_ % 2 == 0 else sides[::-1])]
        (ray_seconds, each), (plain_seconds, _) = results if round_ % 2 == 0 else results[::-1]
        print(f"{len(jobs)} trials: {ray_seconds:.1f} s through Ray, {plain_seconds:.1f} s in a plain loop")
        ratios.append(ray_seconds / plain_seconds)
        overheads += each
    ratio, median = statistics.median(ratios), statistics.median(overheads)
    p95 = statistics.quantiles(overheads, n=20)[-1]
    print(f"ratio {ratio:.3f} (aim: at most 1.1)")
    print(f"overhead of a trial: median {median:.3f} s (aim: at most 0.3 s), 95th percentile {p95:.3f} s")
    return 0 if ratio <= 1.1 and median <= 0.3 else 1


def planned(trials: int, steps: int) -> list[Planned]:
    """Short runs that differ in their seeds, named as ``fit`` names them; renders the data set on the way."""
    from viladiff.config import RunConfig, override
    from viladiff.train import Run

    found = []
    for seed in range(trials):
        changes: dict[str, object] = {
            "seed": seed,
            "train.steps": steps,
            "eval.images": 25,
            "eval.boundary": False,
            "runtime.threads": 1,
        }
        name = Run(override(RunConfig(), changes)).name
        found.append(Planned(run_id=name, changes=changes, title=f"seed {seed}", steps=steps, changed={}, threads=1))
    return found


def through_ray(jobs: list[Planned], concurrency: int) -> tuple[float, list[float]]:
    """Seconds from a new process to its end, and the overhead of each trial."""
    with tempfile.TemporaryDirectory() as root:
        begun = time.time()
        given = json.dumps({"jobs": [vars(job) for job in jobs], "root": root, "concurrency": concurrency})
        done = subprocess.run(
            [sys.executable, __file__, "--side", given], stdout=subprocess.PIPE, text=True, check=True
        )
        ended = time.time()
    return ended - begun, overheads(json.loads(done.stdout.splitlines()[-1]), begun, ended, concurrency)


def side(text: str) -> None:
    """The driver that is timed."""
    from viladiff.ray_launch import run_jobs

    given = json.loads(text)
    jobs = [Planned(**job) for job in given["jobs"]]
    outcomes = run_jobs(jobs, Store(Path(given["root"])), Settings(max_concurrent=given["concurrency"]), ignore)
    failed = [outcome for outcome in outcomes if outcome.state != "done"]
    if failed:
        raise SystemExit(f"{len(failed)} runs did not finish: {failed[0]}")
    print(json.dumps([[outcome.worker, outcome.began, outcome.ended] for outcome in outcomes]))


def ignore(event: Event) -> None:
    """A display would be measured too."""


def overheads(spans: list[list], begun: float, ended: float, concurrency: int) -> list[float]:
    """Gaps between runs in each process, with an equal share of what the processes' starts and ends took."""
    workers: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for worker, start, end in spans:
        workers[worker].append((start, end))
    edges, gaps = 0.0, []
    for runs in workers.values():
        runs.sort()
        edges += runs[0][0] - begun + ended - runs[-1][1]
        gaps += [0.0, *(later[0] - earlier[1] for earlier, later in pairwise(runs))]
    return [gap + edges / len(spans) for gap in gaps]


def plain(jobs: list[Planned], concurrency: int) -> float:
    """Seconds of the same runs in ``concurrency`` processes that know nothing of each other."""
    with tempfile.TemporaryDirectory() as root:
        begun = time.time()
        changes = [{**job.changes, "runtime.out": root, "runtime.progress": False} for job in jobs]
        parts = [json.dumps(changes[i::concurrency]) for i in range(concurrency)]
        processes = [subprocess.Popen([sys.executable, "-c", PLAIN, part]) for part in parts]
        if any(process.wait() for process in processes):
            raise SystemExit("a plain run failed")
        return time.time() - begun


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(sys.argv[2])
    else:
        raise SystemExit(main())
