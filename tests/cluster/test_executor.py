"""Runs on a real Ray, and what happens to them when processes are killed, stopped or interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_kit import alive

from viladiff.cluster.executor import run_jobs
from viladiff.core.watchdog import descendants
from viladiff.runs.checkpoint import load_file
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.runs.record import RunRecord
from viladiff.runs.store import Store
from viladiff.training.trainer import Trainer, fit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # Ray starts many processes; a machine may be busy

SHORT: dict[str, object] = {
    "train.steps": 4,
    "eval.max_images": 8,
    "eval.boundary": False,
    "runtime.threads": 1,
    "runtime.log_every": 1,
    "runtime.checkpoint_every": 4,
}
LONG = {**SHORT, "train.steps": 120}

DRIVER = """
import json, sys
from pathlib import Path
from viladiff.cluster.executor import run_jobs
from viladiff.runs.job import ExecutionSettings, PlannedRun
from viladiff.runs.store import Store
given = json.loads(sys.argv[1])
def tell(event): print(json.dumps(vars(event)), flush=True)
jobs = [PlannedRun(**job) for job in given["jobs"]]
outcomes = run_jobs(jobs, Store(Path(given["root"])), ExecutionSettings(**given["settings"]), tell)
print(json.dumps({"outcomes": [[o.run_id, o.state, o.attempts] for o in outcomes]}), flush=True)
"""


def planned(changes: dict[str, object], seed: int = 0, title: str = "") -> PlannedRun:
    changes = {**changes, "seed": seed}
    name = Trainer(override(RunConfig(), changes)).name
    return PlannedRun(
        run_id=name, changes=changes, title=title or f"seed {seed}", steps=int(str(changes["train.steps"])), changed={}
    )


def undisturbed(job: PlannedRun, root: Path) -> RunRecord:
    return fit(override(RunConfig(), {**job.changes, "runtime.runs_dir": str(root), "runtime.progress": False})).record


def same(job: PlannedRun, one: Path, other: Path) -> None:
    """Weights bit for bit, scores, and every line of the log."""
    states = [load_file(root / job.run_id / "checkpoint.pt")["method"] for root in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    records = [Store(root).get(job.run_id) for root in (one, other)]
    assert records[0] and records[1] and records[0].scores == records[1].scores and records[0].miou == records[1].miou
    logs = [(root / job.run_id / "steps.jsonl").read_text() for root in (one, other)]
    assert logs[0] == logs[1] and logs[0].count("\n") == job.steps


def wait_for(what: Callable[[], Any], seconds: float) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


class Driver:
    """A table's driver in a process of its own, as a person would start it."""

    def __init__(self, jobs: list[PlannedRun], root: Path, **settings: Any) -> None:
        """Of a process group of its own, as a shell makes one."""
        given = json.dumps({"jobs": [vars(job) for job in jobs], "root": str(root), "settings": settings})
        self.errors = (root.parent / f"stderr-{time.time_ns()}").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, given],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=root.parent,
            start_new_session=True,
        )

    def ctrl_c(self) -> None:
        """What a terminal does: a signal to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def events(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def until(self, kind: str, count: int = 1) -> dict[str, Any]:
        for event in self.events():
            count -= event.get("kind") == kind
            if not count:
                return event
        raise AssertionError(f"the driver ended before: {self.said()}")

    def outcomes(self) -> dict[str, tuple[str, int]]:
        last = [event for event in self.events() if "outcomes" in event]
        assert self.process.wait(60) == 0, self.said()
        return {name: (state, attempts) for name, state, attempts in last[0]["outcomes"]}

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()


def leftovers(root: Path) -> list[str]:
    """Locks and half-written files."""
    return [str(path) for path in root.rglob("*") if path.name.startswith("lease-") or ".tmp" in path.name]


def scratch(driver: int) -> list[Path]:
    return list(Path("/tmp").glob(f"viladiff-{driver}-*"))


def test_one_bad_run_or_a_killed_process_leaves_the_others_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = set(descendants(os.getpid()))  # other tests may have left the helpers that multiprocessing keeps
    store = Store(tmp_path / "runs")
    good, killed = planned(SHORT, 1), planned(LONG, 2)
    diverges = planned({**SHORT, "optim.lr": 1e30, "optim.warmup_steps": 0}, 3)
    missing = PlannedRun("0" * 16, {**SHORT, "model.weights": "nowhere.safetensors"}, "no such file", 4, {})
    last = planned(SHORT, 4)
    events: list[Event] = []
    victims: list[int] = []

    def tell(event: Event) -> None:
        events.append(event)
        if event.kind == "progress" and event.run_id == killed.run_id and (event.step or 0) >= 8 and not victims:
            holder = store.holder(killed.run_id)
            assert holder is not None and holder.pid != os.getpid()
            victims.append(holder.pid)
            os.kill(holder.pid, signal.SIGKILL)

    outcomes = run_jobs([good, killed, diverges, missing, last], store, ExecutionSettings(max_concurrent=2), tell)
    found = {outcome.run_id: outcome for outcome in outcomes}
    assert [outcome.run_id for outcome in outcomes] == [j.run_id for j in (good, killed, diverges, missing, last)]

    assert found[good.run_id].state == found[last.run_id].state == "done"
    assert victims and found[killed.run_id].state == "done" and found[killed.run_id].attempts == 2
    assert [event.kind for event in events if event.run_id == killed.run_id].count("retry") == 1
    same(killed, store.root, undisturbed(killed, tmp_path / "other") and tmp_path / "other")
    assert store.failure(killed.run_id) is None

    failure = store.failure(diverges.run_id)
    assert failure is not None and failure == found[diverges.run_id].failure
    assert failure.kind == "nan" and failure.attempts == 1 and "optim.lr" in failure.message
    failure = found[missing.run_id].failure
    assert failure is not None and failure.kind == "error" and "nowhere.safetensors" in failure.message

    assert len({outcome.worker for outcome in outcomes if outcome.worker}) < 5, "processes are used again"
    assert leftovers(store.root) == []
    assert not list(store.root.rglob("hang.txt"))
    assert capfd.readouterr() == ("", ""), "Ray must be silent"
    assert wait_for(lambda: not alive(sorted(set(descendants(os.getpid())) - before)), 20)
    assert not scratch(os.getpid())
    # Once more: nothing to do, and so no Ray.
    begun = time.monotonic()
    again = run_jobs([good, last], store, ExecutionSettings(), events.append)
    assert [(outcome.state, outcome.attempts) for outcome in again] == [("done", 0)] * 2
    assert time.monotonic() - begun < 2


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_running_and_the_same_command_ends_alike(tmp_path: Path) -> None:
    root, draw = tmp_path / "runs", random.Random(5)
    jobs = [planned(LONG if i % 2 else SHORT, 10 + i) for i in range(4)]
    first_seen: dict[str, int] = {}

    def note() -> None:
        for path in root.glob("*/record.json"):
            first_seen.setdefault(path.parent.name, path.stat().st_mtime_ns)
            assert first_seen[path.parent.name] == path.stat().st_mtime_ns, "a finished run was run again"

    for kind in draw.sample(["started", "progress", "done"], 3):
        driver = Driver(jobs, root)
        driver.until(kind)
        time.sleep(draw.uniform(0, 1.5))
        processes = descendants(driver.process.pid)
        assert len(processes) > 4
        driver.process.kill()
        driver.process.wait()
        wait_for(lambda processes=processes: not alive(processes), 30)
        wait_for(lambda driver=driver: not scratch(driver.process.pid), 20)
        note()
    outcomes = Driver(jobs, root).outcomes()
    note()
    assert {state for state, _ in outcomes.values()} == {"done"}
    assert leftovers(root) == []
    for job in jobs:
        undisturbed(job, tmp_path / "other")
        same(job, root, tmp_path / "other")


@pytest.mark.slow
def test_two_drivers_share_the_work_and_one_takes_over_from_the_other(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    jobs = [planned(LONG if i < 2 else SHORT, 20 + i) for i in range(5)]
    one = Driver(jobs, root, max_concurrent=1)
    first = one.until("progress")["run_id"]
    two = Driver(jobs, root, max_concurrent=1)
    assert two.until("elsewhere")["run_id"] == first
    two.until("done")
    one.process.kill()
    one.process.wait()
    done = [path.parent.name for path in root.glob("*/record.json")]
    outcomes = two.outcomes()
    assert {state for state, _ in outcomes.values()} == {"done"} and len(done) < len(jobs)
    assert leftovers(root) == []
    for job in jobs:
        undisturbed(job, tmp_path / "other")
        same(job, root, tmp_path / "other")


@pytest.mark.slow
def test_ctrl_c_saves_every_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    jobs = [planned(LONG, 30 + i) for i in range(3)]
    driver = Driver(jobs, root)
    driver.until("progress")
    processes = descendants(driver.process.pid)
    driver.ctrl_c()
    assert "Press Ctrl-C again" in driver.until("note")["message"]
    outcomes = driver.outcomes()
    assert {state for state, _ in outcomes.values()} == {"stopped"}
    assert not alive(processes)
    steps = [load_file(path)["step"] for path in root.glob("*/checkpoint.pt")]
    assert steps and all(0 < step < 30 for step in steps)
    assert leftovers(root) == []
    again = Driver(jobs, root).outcomes()
    assert {state for state, _ in again.values()} == {"done"}
    for job in jobs:
        undisturbed(job, tmp_path / "other")
        same(job, root, tmp_path / "other")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    jobs = [planned({**LONG, "train.steps": 60}, 50 + i) for i in range(2)]
    driver = Driver(jobs, root)
    driver.until("progress")
    processes = descendants(driver.process.pid)
    driver.ctrl_c()
    driver.until("note")
    driver.ctrl_c()
    assert driver.process.wait(60) != 0
    assert not list(root.glob("*/record.json")), "it came too late to be a test"
    wait_for(lambda: not alive(processes), 10)
    wait_for(lambda: not scratch(driver.process.pid), 10)
    assert leftovers(root) == []
    again = Driver(jobs, root).outcomes()
    assert {state for state, _ in again.values()} == {"done"}
    undisturbed(jobs[0], tmp_path / "other")
    same(jobs[0], root, tmp_path / "other")


@pytest.mark.slow
def test_a_process_that_stands_still_is_killed_and_its_run_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    job = planned(LONG, 40)
    stopped: list[int] = []
    events: list[Event] = []

    def tell(event: Event) -> None:
        events.append(event)
        if event.kind == "progress" and not stopped:
            holder = store.holder(job.run_id)
            assert holder is not None
            stopped.append(holder.pid)
            os.kill(holder.pid, signal.SIGSTOP)

    (outcome,) = run_jobs([job], store, ExecutionSettings(stall_timeout=12), tell)
    assert outcome.state == "done" and outcome.attempts == 2 and stopped
    retry = next(event for event in events if event.kind == "retry")
    assert retry.message.startswith("hang: no sign of life for 12 s")
    undisturbed(job, tmp_path / "other")
    same(job, store.root, tmp_path / "other")
