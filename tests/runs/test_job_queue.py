"""What is run next, tried again, left to others or given up, without any process."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from viladiff.core.messages import disk_advice
from viladiff.core.watchdog import Reaper, descendants, start
from viladiff.runs import job_queue as queues
from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.runs.job_queue import JobQueue
from viladiff.runs.store import Failure, Store


def job(number: int) -> PlannedRun:
    return PlannedRun(run_id=f"{number:016x}", changes={}, title=f"run {number}", steps=10, changed={})


def queue(root: Path, count: int, slots: int = 2, **settings: object) -> tuple[JobQueue, list[Event]]:
    events: list[Event] = []
    jobs = [job(number) for number in range(count)]
    return JobQueue(jobs, Store(root), ExecutionSettings(**settings), slots, events.append), events  # type: ignore[arg-type]


def names(found: JobQueue) -> list[int]:
    """Numbers of the runs that are handed out until there is no room."""
    out = []
    while (one := found.next_job()) is not None:
        out.append(int(one.run_id, 16))
    return out


def fail(found: JobQueue, number: int, kind: str) -> None:
    found.on_result(job(number).run_id, {"state": "failed", "kind": kind, "message": f"{kind} happened"})


def done(found: JobQueue, number: int) -> None:
    found.on_result(job(number).run_id, {"state": "done", "began": 1.0, "ended": 2.0, "miou": 0.5})


def test_no_more_than_the_slots_and_in_order(tmp_path: Path) -> None:
    found, events = queue(tmp_path, 4)
    assert names(found) == [0, 1]
    done(found, 1)
    assert names(found) == [2]
    for number in (0, 2):
        done(found, number)
    assert names(found) == [3] and not found.done
    done(found, 3)
    assert found.done and {outcome.state for outcome in found.outcomes.values()} == {"done"}
    assert [event.miou for event in events if event.kind == "done"] == [0.5] * 4


@pytest.mark.parametrize(("kind", "attempts"), [("nan", 1), ("error", 1), ("stale", 1), ("hang", 2), ("killed", 3)])
def test_what_is_tried_again_and_how_often(tmp_path: Path, kind: str, attempts: int) -> None:
    found, events = queue(tmp_path, 2, slots=1, retries=2)
    for attempt in range(attempts):
        assert names(found) == [0], f"attempt {attempt}"
        fail(found, 0, kind)
    outcome = found.outcomes[job(0).run_id]
    assert outcome.state == "failed" and outcome.attempts == attempts
    assert outcome.failure is not None
    # A name that is no longer used is not worth a note on disk.
    assert Store(tmp_path).failure(job(0).run_id) == (None if kind == "stale" else outcome.failure)
    assert outcome.failure.kind == kind and outcome.failure.attempts == attempts
    assert [event.kind for event in events].count("retry") == attempts - 1
    assert names(found) == [1], "the others go on"


def test_a_run_that_comes_further_each_time_is_never_given_up(tmp_path: Path) -> None:
    found, _ = queue(tmp_path, 1, slots=1, retries=2)
    run_id = job(0).run_id
    for step in (100, 200, 300, 400, 500):
        assert names(found) == [0], f"before step {step}"
        found.on_progress(run_id, {"step": step, "steps": 999, "loss": 1.0})
        found.on_worker_died(run_id, "its process died")
    for step in (500, 450):
        assert names(found) == [0]
        found.on_progress(run_id, {"step": step, "steps": 999, "loss": 1.0})
        found.on_worker_died(run_id, "its process died")
    assert found.done and found.outcomes[run_id].state == "failed", "three ends without a new step"


def test_a_machine_that_is_taken_away_is_no_failure(tmp_path: Path) -> None:
    found, events = queue(tmp_path, 2, slots=1, retries=0)
    for _ in range(4):
        assert names(found) == [0]
        found.on_preempted(job(0).run_id, "its machine was taken away")
    assert Store(tmp_path).failure(job(0).run_id) is None
    assert [event.message for event in events if event.kind == "retry"] == ["preempted: its machine was taken away"] * 4
    assert names(found) == [0]
    done(found, 0)
    assert found.outcomes[job(0).run_id].attempts == 1
    found.request_stop()
    assert found.done


def test_too_little_memory_is_tried_once_more_alone_at_the_end(tmp_path: Path) -> None:
    found, _ = queue(tmp_path, 4)
    assert names(found) == [0, 1]
    fail(found, 0, "memory")
    assert names(found) == [2]
    done(found, 1)
    assert names(found) == [3]
    done(found, 2)
    assert names(found) == [], "something still runs beside it"
    done(found, 3)
    assert names(found) == [0]
    done(found, 0)
    assert found.done and found.outcomes[job(0).run_id].attempts == 2
    assert Store(tmp_path).failure(job(0).run_id) is None, "what went well in the end is no failure"


def test_a_run_of_another_driver_is_waited_for_and_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "LOOK", 0.0)
    other = Store(tmp_path)
    lease = other.lease(job(0).run_id)
    assert lease is not None
    found, events = queue(tmp_path, 2)
    found.drop_finished()
    assert names(found) == [1]
    assert [event.run_id for event in events if event.kind == "elsewhere"] == [job(0).run_id]
    list(found.poll())
    assert names(found) == [] and not found.done
    lease.release()
    list(found.poll())
    assert names(found) == [0]
    # A trial may find the lease taken in the last moment.
    lease = other.lease(job(0).run_id)
    found.on_result(job(0).run_id, {"state": "elsewhere"})
    assert lease is not None and names(found) == []
    other.record_failure(
        job(0).run_id, Failure(kind="nan", message="nan", step=3, attempts=1, when="2026-01-31T12:00:00Z")
    )
    lease.release()
    list(found.poll())
    outcome = found.outcomes[job(0).run_id]
    assert outcome.state == "failed" and outcome.attempts == 0, "the same arithmetic would fail alike"


def test_a_silent_process_is_pointed_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(queues.time, "monotonic", lambda: now[0])
    found, events = queue(tmp_path, 1, stall_timeout=8)

    def pass_time(seconds: int) -> list[str]:
        hung = []
        for _ in range(2 * seconds):
            now[0] += 0.5
            hung += [run_id for run_id, _ in found.poll()]
        return hung

    names(found)
    run_id = job(0).run_id
    found.on_started(run_id)
    assert pass_time(100) == [], "no process is known yet"
    found.on_progress(run_id, {"node": "n", "pid": 7})
    assert pass_time(55) == [], "before its first step a run may take six times as long"
    found.on_progress(run_id, {"step": 1, "steps": 10, "loss": 2.0})
    assert pass_time(9) == []
    now[0] += 1000  # the driver itself was stopped
    assert pass_time(0) == [] and list(found.poll()) == []
    assert pass_time(5) == [run_id] and pass_time(50) == []
    found.on_worker_died(run_id, "killed")
    assert events[-1].kind == "retry" and "hang: no sign of life for 8 s" in events[-1].message


def test_a_trace_of_the_watchdog_tells_a_hang_from_a_kill(tmp_path: Path) -> None:
    found, _ = queue(tmp_path, 1)
    names(found)
    directory = Store(tmp_path).directory(job(0).run_id)
    directory.mkdir(parents=True)
    (directory / "hang.txt").write_text("Timeout (0:10:00)!\n")
    found.on_worker_died(job(0).run_id, "gone")
    failure = Store(tmp_path).failure(job(0).run_id)
    assert failure is not None and failure.kind == "hang" and "hang.txt" in failure.message


def test_a_stop_starts_nothing_more_and_lets_the_rest_end(tmp_path: Path) -> None:
    found, events = queue(tmp_path, 3)
    assert names(found) == [0, 1]
    found.request_stop()
    assert names(found) == [] and not found.done
    (note,) = [event for event in events if event.kind == "note"]
    assert (
        note.message.startswith("Stopping: 2 runs will checkpoint")
        and "Press Ctrl-C again to kill them" in note.message
    )
    found.on_result(job(0).run_id, {"state": "stopped"})
    found.on_worker_died(job(1).run_id, "killed")
    assert found.done and {outcome.state for outcome in found.outcomes.values()} == {"stopped"}


def test_a_reaper_ends_what_a_killed_driver_leaves_and_nothing_else(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = (
        "import subprocess, sys, time, json\n"
        "from pathlib import Path\n"
        "from viladiff.core.watchdog import Reaper\n"
        "reaper = Reaper(Path(sys.argv[1]))\n"
        "children = [subprocess.Popen(['sleep', '60']).pid for _ in range(2)]\n"
        "reaper.watch(children[:1])\n"
        "print(json.dumps(children), flush=True)\n"
        "time.sleep(60)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, str(scratch)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    named, spared = json.loads(driver.stdout.readline())
    assert {named, spared} < set(descendants(driver.pid))
    driver.kill()
    driver.wait()
    until = time.monotonic() + 20
    while (running(named) or scratch.exists()) and time.monotonic() < until:
        time.sleep(0.05)
    try:
        assert not running(named) and running(spared) and not scratch.exists()
    finally:
        os.kill(spared, signal.SIGKILL)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_dismissed_reaper_touches_nothing(tmp_path: Path) -> None:
    reaper = Reaper(tmp_path)
    reaper.watch([os.getpid()])
    reaper.dismiss()
    assert tmp_path.exists() and start(os.getpid()) is not None


def test_a_full_disk_stops_the_queue_and_is_kept_for_its_launcher(tmp_path: Path) -> None:
    """Nothing is raised within a call of Ray's, which would bury it in a traceback."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "page.html"))

    def tell(event: Event) -> None:
        raise full

    found = JobQueue([job(0), job(1)], Store(tmp_path), ExecutionSettings(), 1, tell)
    assert names(found) == [0]
    fail(found, 0, "error")
    assert found.trouble is full and found.asked_to_stop
    found.request_stop()
    assert found.done and {outcome.state for outcome in found.outcomes.values()} == {"failed", "stopped"}
    assert disk_advice(full) == "; free some space, and the same command goes on where it stopped"
    assert "ulimit -f" in disk_advice(OSError(errno.EFBIG, "no"))
    assert "--runs-dir" in disk_advice(OSError(errno.EACCES, "no")) and disk_advice(OSError(errno.EIO, "no")) == ""
