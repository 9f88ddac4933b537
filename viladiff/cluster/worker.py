"""One run inside a Ray worker: lease, ``fit``, and errors classified for the driver.

Torch is imported where it is used: the driver names these functions and never runs them.
"""

from __future__ import annotations

import faulthandler
import math
import os
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from viladiff.core.environment import visible_cpus
from viladiff.core.messages import disk_advice
from viladiff.runs.job import PlannedRun
from viladiff.runs.job_queue import SETUP
from viladiff.runs.lease import LeaseLostError
from viladiff.runs.store import Store

if TYPE_CHECKING:
    from viladiff.runs.config import RunConfig
    from viladiff.runs.lease import Lease
    from viladiff.training.trainer import ProgressCallback

SAY_EVERY = 2.0
"""Seconds between words to the driver, and between looks whether the run is to stop."""

LOST_NEIGHBOUR = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says, in a plain RuntimeError, where another process of the group has died."""

Tell = Callable[[dict[str, Any]], None]
Judged = Callable[[int, float | None], bool]
"""Told each score of a run with its step, those before an interruption again; True asks the run to end there."""


@dataclass(frozen=True)
class WorkerContext:
    """Settings of a worker besides its run; every path is absolute."""

    root: str
    cwd: str
    """Where the driver was started: paths in a configuration are meant from there."""
    threads: int
    stall_timeout: float
    stop_name: str
    """An actor of this name exists once all runs are to stop."""
    tracking: Mapping[str, object] = field(default_factory=dict)
    """Fields of ``runtime`` for trackers."""
    gpus: float = 0.0
    """GPUs of a run of one worker, which may be a part of one; a worker of several has one at least."""


def train_run(config: Mapping[str, Any], jobs: Mapping[str, PlannedRun], place: WorkerContext) -> None:
    """Tune trainable that performs ``jobs[config["run"]]`` and reports its outcome as the last result."""
    from ray import tune

    # A reused worker ends its trial with a report and not with a returned value, which costs one more exchange.
    tune.report(run_attempt(jobs[config["run"]], place, tune.report))


def run_attempt(job: PlannedRun, place: WorkerContext, tell: Tell, judged: Judged | None = None) -> dict[str, Any]:
    """Perform the run unless it is done or leased by another process; return ``state`` and its details."""
    store = Store(Path(place.root))
    tell({"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()})
    lease = store.lease(job.run_id)
    if lease is None:
        return {"state": "elsewhere"}
    with lease:
        return attempt_held(job, place, tell, lease, judged)


def attempt_held(
    job: PlannedRun, place: WorkerContext, tell: Tell, lease: Lease, judged: Judged | None = None
) -> dict[str, Any]:
    """Perform ``run_attempt`` under the acquired lease."""
    directory = Path(place.root) / job.run_id
    trace, told = directory / "hang.txt", directory / "traceback.txt"
    told.unlink(missing_ok=True)
    with trace.open("w") as file:
        watchdog = _Watchdog(file.fileno(), place.stall_timeout)
        report: ProgressCallback = _reporter(tell, watchdog, place.stop_name)
        if judged is not None:
            report = _hearing(report, judged, watchdog)
        try:
            watchdog.arm(SETUP)
            from viladiff.training.trainer import fit

            cfg = configuration(job, place)
            began = time.time()
            result = fit(cfg, report=report, lease=lease)
        except BaseException as error:
            found = classify_error(error)
            if found is None:
                raise
            if found.get("kind") == "error":
                with suppress(OSError):  # a full disk is what the error is about
                    told.write_text(traceback.format_exc(), encoding="utf-8")
            return found
        finally:
            watchdog.rest()
            trace.unlink(missing_ok=True)
    return {"state": "done", "began": began, "ended": time.time(), "miou": result.miou}


def configuration(job: PlannedRun, place: WorkerContext) -> RunConfig:
    """Return the run's configuration with this call's output directory and without a progress bar."""
    from viladiff.runs.config import RunConfig, override

    with suppress(FileNotFoundError):
        os.chdir(place.cwd)
    here = {"runtime.runs_dir": place.root, "runtime.progress": False, "runtime.workers": job.workers}
    gpus = place.gpus if job.workers == 1 or not place.gpus else max(1.0, place.gpus)
    own = {"runtime.threads": place.threads, **({"runtime.cores": _cores(gpus)} if gpus else {}), **place.tracking}
    return override(RunConfig(), {**own, **job.changes, **here})


def _cores(gpus: float) -> int:
    """Return a worker's share of this machine's processors: that of the GPUs which it holds.

    What Ray counts for it is no guide: a scale may fix one thread, so that the last bits of sums stay.
    """
    here = ray.get_runtime_context().get_node_id()
    there: dict[str, float] = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == here), {})
    processors = min(visible_cpus(), there.get("CPU", math.inf))
    return max(1, int(round(processors * gpus / max(gpus, there.get("GPU", 0)), 2)))  # Ray rounds a third to 0.3333


def classify_error(error: BaseException) -> dict[str, Any] | None:
    """Return the final result of a run that raised ``error``; None for errors outside the run (an interrupt)."""
    import torch.distributed as dist

    from viladiff.training.errors import RunIdMismatchError, StopRequested, TrainingError

    if isinstance(error, StopRequested):
        return {"state": "stopped"}
    if isinstance(error, LeaseLostError):
        return {"state": "elsewhere"}
    if not isinstance(error, Exception):
        return None
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        kind = "memory"
    elif isinstance(error, TrainingError):
        kind = "nan"
    elif isinstance(error, RunIdMismatchError):
        kind = "stale"
    elif isinstance(error, dist.DistError) or any(sign in text for sign in LOST_NEIGHBOUR):
        kind, text = "killed", f"another worker of the run is gone ({text.splitlines()[0]})"
    else:
        kind = "error"
        text = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}{disk_advice(error)}"
    return {"state": "failed", "kind": kind, "message": text}


class _Watchdog:
    """Ends the process when nobody arms it again in time, also where Python itself stands still; leaves the stacks."""

    def __init__(self, file: int, seconds: float) -> None:
        self.file, self.seconds = file, seconds

    def arm(self, times: float = 1) -> None:
        faulthandler.dump_traceback_later(self.seconds * times, exit=True, file=self.file)

    def rest(self) -> None:
        faulthandler.cancel_dump_traceback_later()


def _reporter(tell: Tell, watchdog: _Watchdog, stop_name: str) -> Callable[[dict[str, Any]], bool]:
    """Return the callback of ``fit``: it sends heartbeats and progress to the driver; True asks the run to stop."""
    said = time.monotonic()

    def report(news: dict[str, Any]) -> bool:
        nonlocal said
        watchdog.arm()
        if time.monotonic() - said < SAY_EVERY:
            return False
        # A driver that is busy or stopped keeps this call waiting, which is no fault of the run.
        watchdog.rest()
        tell({name: news[name] for name in ("step", "steps", "loss", "miou") if name in news})
        asked = _stop_asked(stop_name)
        watchdog.arm()
        said = time.monotonic()
        return asked

    return report


def _hearing(report: ProgressCallback, judged: Judged, watchdog: _Watchdog) -> ProgressCallback:
    """``report`` that also asks ``judged`` of each score of the run, once."""
    heard = 0

    def also(news: dict[str, Any]) -> bool:
        nonlocal heard
        asked = bool(report(news))
        for entry in news.get("history", [])[heard:]:
            watchdog.rest()  # whoever judges may be busy with other trials
            asked = judged(entry["step"], entry["miou"]) or asked
            watchdog.arm()
            heard += 1
        return asked

    return also


def _stop_asked(name: str) -> bool:
    try:
        ray.get_actor(name)
    except ValueError:
        return False
    return True
