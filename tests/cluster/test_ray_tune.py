"""How the end of a run's process reaches the queue, by the errors that Ray raises, without starting Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from viladiff.cluster.session import load_ray
from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.runs.job_queue import JobQueue
from viladiff.runs.store import Store

RUN = PlannedRun(run_id=f"{0:016x}", changes={}, title="run", steps=10, changed={})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("preempted", "preempted: its machine was taken away"),
        ("died", "killed: its process died: The actor died unexpectedly"),
        ("memory", "memory: its process died: "),
    ],
)
def test_a_preemption_is_told_from_a_death_and_from_too_little_memory(tmp_path: Path, error: str, told: str) -> None:
    load_ray(local=True)
    from ray.exceptions import OutOfMemoryError, RayActorError

    from viladiff.cluster.ray_tune import report_death

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
