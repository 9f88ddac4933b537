"""A sweep whose runs are formulas: what its tests and its benchmark drive, without torch and without Ray."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.sweeps.controller import SweepController
from viladiff.sweeps.early_stopping import optuna_pruner
from viladiff.sweeps.optuna_study import OptunaStudy
from viladiff.sweeps.space import Dimension, Point
from viladiff.sweeps.trial_queue import TrialQueue

STEPS = (25, 50, 100)
SEEDS = (0, 1, 2)
FIRST: dict[str, Any] = {"a": 0.5, "b": 4}
SPACE = {
    "a": Dimension(low=0.01, high=4.0, log=True),
    "b": Dimension(low=1, high=9),
}


class Runs:
    """A store of runs that are formulas of (point, seed, step); how far each has come outlives a driver."""

    def __init__(self, root: Path, score: Callable[[dict[str, Any], int, int], float]) -> None:
        self.root, self.score = root, score
        self.progress: dict[str, int] = {}
        self.records: dict[str, Any] = {}
        self.failures: dict[str, Any] = {}
        self.trained = 0

    def get(self, run_id: str) -> Any:
        return self.records.get(run_id)

    def directory(self, run_id: str) -> Path:
        return self.root / run_id

    def held(self, run_id: str) -> bool:
        """Nobody else is here."""
        return False

    def holder(self, run_id: str) -> None:
        return None

    def failure(self, run_id: str) -> Any:
        return self.failures.get(run_id)

    def record_failure(self, run_id: str, failure: Any) -> None:
        self.failures[run_id] = failure

    def clear_failure(self, run_id: str) -> None:
        self.failures.pop(run_id, None)


def planned(point: Point, seed: int, title: str = "") -> PlannedRun:
    text = json.dumps([sorted(point.items()), seed])
    return PlannedRun(hashlib.sha256(text.encode()).hexdigest()[:16], {**point, "seed": seed}, title, STEPS[-1], {})


def bowl(point: dict[str, Any], seed: int, step: int) -> float:
    """Best at a = 0.5, b = 6; seeds differ a little, and longer is better."""
    noise = int(hashlib.sha256(f"{point} {seed}".encode()).hexdigest()[:6], 16) / 16**6
    loss = abs(point["a"] - 0.5) / 4 + (point["b"] - 6) ** 2 / 100
    return (0.8 - 0.4 * loss) * (step / 100) ** 0.3 + 0.01 * noise


def opened(
    root: Path, runs: Runs, wanted: int, kind: Any = "tpe", pruner: Any = "none", slots: int = 1, **more: Any
) -> TrialQueue:
    """A queue on the sweep in ``root``, new or as it was left; ``pruner``: one of Optuna's, or its name here."""
    (root / "trials").mkdir(parents=True, exist_ok=True)
    space = more.pop("space", SPACE)
    listed = [more.pop("first", FIRST), *more.pop("points", [])]
    storage, seed = more.pop("storage", str(root / "optuna.journal")), more.pop("seed", 7)
    made = optuna_pruner(pruner, STEPS) if isinstance(pruner, str) else pruner
    asker = OptunaStudy("sweep", space, listed, kind, seed, slots > 1, storage, made)
    search = SweepController(root / "trials", asker, planned, more.pop("seeds", SEEDS), STEPS, wanted, runs, **more)  # type: ignore[arg-type]
    return TrialQueue(search, runs, ExecutionSettings(), slots, lambda event: None)  # type: ignore[arg-type]


def drive(queue: TrialQueue, runs: Runs, event: Callable[[str], None] = lambda what: None) -> list[Event]:
    """Plays Tune: hands out up to ``queue.slots`` runs, and lets each in turn come to its next rung or its end."""
    live: dict[str, PlannedRun] = {}
    while not queue.done:
        job = queue.next_job()
        while job is not None:
            live[job.run_id] = job
            queue.on_started(job.run_id)
            job = queue.next_job()
        for run_id in list(live):
            _advance(queue, runs, live.pop(run_id), live, event)
    return []


def _advance(
    queue: TrialQueue, runs: Runs, job: PlannedRun, live: dict[str, PlannedRun], event: Callable[[str], None]
) -> None:
    point, seed, run_id = {**job.changes}, int(str(job.changes["seed"])), job.run_id
    del point["seed"]
    ahead = [step for step in STEPS if step > runs.progress.get(run_id, 0)]
    passed = [step for step in STEPS[:-1] if step <= runs.progress.get(run_id, 0)]
    # A run that goes on says once more what it had measured, as training does from its checkpoint.
    if any(queue.should_stop(run_id, step, runs.score(point, seed, step)) for step in passed):
        queue.on_result(run_id, {"state": "stopped"})
        return
    step = ahead[0] if ahead else STEPS[-1]
    event("before a step")
    value = runs.score(point, seed, step)
    runs.trained += step - runs.progress.get(run_id, 0)
    runs.progress[run_id] = step
    event("after a step")
    if value != value or value < 0:
        kind = "nan" if value != value else "error"
        queue.on_result(run_id, {"state": "failed", "kind": kind, "message": f"value {value}"})
        return
    if step < STEPS[-1]:
        if queue.should_stop(run_id, step, value):
            event("told to stop")
            queue.on_result(run_id, {"state": "stopped"})
        else:
            live[run_id] = job
        return
    history = [{"step": one, "miou": runs.score(point, seed, one)} for one in STEPS]
    runs.records[run_id] = SimpleNamespace(miou=value, history=history)
    event("recorded")
    queue.on_result(run_id, {"state": "done", "began": 0.0, "ended": 0.0, "miou": value})


def told(queue: TrialQueue) -> list[dict[str, Any]]:
    """All trials as their records have them."""
    return [trial.model_dump() for trial in queue.search.trials]


# The same formulas in processes


class Files(Runs):
    """Runs whose progress and results lie in files, since processes of Ray make them."""

    def get(self, run_id: str) -> Any:
        path = self.root / run_id / "result.json"
        if not path.is_file():
            return None
        value = json.loads(path.read_text())
        return SimpleNamespace(miou=value["history"][-1]["miou"], history=value["history"])

    def clean(self, gone: Any = ()) -> None:
        """Nothing to clear up."""


def work(job: PlannedRun, place: Any, tell: Callable[[dict[str, Any]], Any], judged: Callable[[int, Any], bool]) -> Any:
    """One run as a process does it; ``b`` = 3 fails, 7 is killed the first time, and each step takes a moment."""
    directory = Path(place.root) / job.run_id
    directory.mkdir(parents=True, exist_ok=True)
    tell({"node": "", "pid": os.getpid()})
    point, seed, began = {**job.changes}, int(str(job.changes["seed"])), time.time()
    del point["seed"]
    if point["b"] == 3:
        return {"state": "failed", "kind": "nan", "message": "the loss is nan"}
    if point["b"] == 7 and not (directory / "killed").exists():
        (directory / "killed").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    history: list[dict[str, Any]] = []
    progress = directory / "progress"
    reached = int(progress.read_text()) if progress.exists() else 0
    for step in STEPS:
        if step > reached:
            time.sleep(0.02)
            (directory / "new").write_text(str(step))
            (directory / "new").rename(progress)
            with (directory / "trained").open("a") as file:
                file.write(f"{step}\n")
        history.append({"step": step, "miou": bowl(point, seed, step)})
        if step < STEPS[-1] and judged(step, history[-1]["miou"]):
            return {"state": "stopped"}
    (directory / "new").write_text(json.dumps({"history": history}))
    (directory / "new").rename(directory / "result.json")
    return {"state": "done", "began": began, "ended": time.time(), "miou": history[-1]["miou"]}
