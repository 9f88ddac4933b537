"""How the end of a run's process reaches the queue, and what is said of it, without starting Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from viladiff.cluster.session import load_ray
from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.runs.job_queue import JobQueue
from viladiff.runs.store import Store

load_ray(local=True)  # Ray is loaded for this machine alone, before the modules that import it
from viladiff.cluster.ray_tune import death_message, killed_for_memory, report_death, trial_error  # noqa: E402

MEMORY = """Failure # 1 (occurred at 2026-11-29_11-43-14)
1 worker(s) were killed due to the node running low on memory. Memory on the node was 5.55GB used / 23.54GB limit
To adjust the kill threshold, set the environment variable `RAY_memory_usage_threshold`
"""
KILLED = """Failure # 1 (occurred at 2026-11-29_11-43-14)
The actor died unexpectedly before finishing this task.
Worker exit type: SYSTEM_ERROR Worker exit detail: Worker exits with error code 2. There are some
"""


def test_the_memory_monitor_is_told_with_what_to_lower(tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(MEMORY)
    text = trial_error(SimpleNamespace(error_file=str(tmp_path / "error.txt"), get_error=lambda: None))
    assert killed_for_memory(text)
    assert death_message(text).startswith("Ray's memory monitor ended its process") and "\n" not in death_message(text)
    assert "--max-concurrent" in death_message(text)


def test_another_death_is_none_of_memory() -> None:
    assert not killed_for_memory(KILLED)
    assert death_message(KILLED) == "its process died: Worker exits with error code 2."


@pytest.mark.parametrize("found", [None, "", "gone"])
def test_a_death_without_a_file_is_told_too(found: str | None, tmp_path: Path) -> None:
    text = trial_error(SimpleNamespace(error_file=str(tmp_path / "none.txt"), get_error=lambda: found))
    assert death_message(text) == f"its process died: {found or 'no reason given'}"


RUN = PlannedRun(run_id=f"{0:016x}", changes={}, title="run", steps=10, changed={})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("preempted", "preempted: its machine was taken away"),
        ("died", "killed: its process died: The actor died unexpectedly"),
        ("memory", "memory: Ray's memory monitor ended its process"),
    ],
)
def test_a_preemption_is_told_from_a_death_and_from_too_little_memory(tmp_path: Path, error: str, told: str) -> None:
    from ray.exceptions import OutOfMemoryError, RayActorError

    raised = {
        "preempted": RayActorError(error_msg="The node was drained", preempted=True),
        "died": RayActorError(error_msg="The actor died unexpectedly"),
        "memory": OutOfMemoryError("Task was killed due to the node running low on memory."),
    }[error]
    events: list[Event] = []
    queue = JobQueue([RUN], Store(tmp_path), ExecutionSettings(), 1, events.append)
    assert queue.next_job() is RUN
    report_death(queue, RUN.run_id, raised)
    assert events[-1].kind == "retry" and events[-1].message.startswith(told)
    assert (Store(tmp_path).failure(RUN.run_id) is None) == (error == "preempted")
