"""Two real workers of Ray Train around ``fit``: the same run as by one, and what a worker's death does to it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from viladiff.cluster.executor import run_jobs
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.runs.store import Store
from viladiff.training.trainer import Trainer, fit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # Ray starts many processes; a machine may be busy

TWO: dict[str, object] = {
    "train.steps": 4,
    "eval.max_images": 8,
    "eval.boundary": False,
    "runtime.workers": 2,
    "runtime.threads": 1,
    "runtime.log_every": 1,
    "runtime.checkpoint_every": 2,
}


def planned(changes: dict[str, object], seed: int) -> PlannedRun:
    changes = {**changes, "seed": seed}
    name = Trainer(override(RunConfig(), {**changes, "runtime.workers": 1})).name
    return PlannedRun(run_id=name, changes=changes, title=f"seed {seed}", steps=4, changed={}, workers=2, threads=1)


def test_two_workers_make_one_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store, job = Store(tmp_path / "runs"), planned(TWO, 1)
    events: list[Event] = []
    (outcome,) = run_jobs([job], store, ExecutionSettings(), events.append)
    assert outcome.state == "done" and outcome.attempts == 1 and outcome.worker, outcome
    record = store.get(job.run_id)
    assert record is not None and record.workers == 2 and record.steps == 4
    assert {event.kind for event in events} >= {"started", "done"}
    assert not list(store.root.rglob("lease-*")) and not list(store.root.rglob("hang.txt"))
    assert capfd.readouterr() == ("", ""), "Ray must be silent"
    one = fit(override(RunConfig(), {**job.changes, "runtime.workers": 1, "runtime.runs_dir": str(tmp_path / "one")}))
    # Sums in another order: the last bits differ, and with them at most a few pixels.
    assert one.directory.name == job.run_id
    assert record.miou == pytest.approx(one.miou, abs=5e-3)


@pytest.mark.slow
def test_a_killed_worker_and_a_diverging_run(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    job = planned({**TWO, "train.steps": 40}, 2)
    broken = planned({**TWO, "optim.lr": 1e30, "optim.warmup_steps": 0}, 3)
    killed: list[int] = []
    events: list[Event] = []

    def tell(event: Event) -> None:
        events.append(event)
        if event.run_id == job.run_id and event.kind == "progress" and (event.step or 0) > 4 and not killed:
            holder = store.holder(job.run_id)
            assert holder is not None
            killed.append(holder.pid)
            os.kill(holder.pid, signal.SIGKILL)

    done, nan = run_jobs([job, broken], store, ExecutionSettings(), tell)
    assert killed and done.state == "done" and done.attempts == 2, (done, events)
    assert nan.failure is not None and nan.failure.kind == "nan" and nan.attempts == 1
    whole = fit(override(RunConfig(), {**job.changes, "runtime.runs_dir": str(tmp_path / "whole")}))
    record = store.get(job.run_id)
    assert record is not None and record.scores == whole.record.scores
