"""The interface between Ray Tune and a job queue: a searcher that asks for runs and a callback that reports results."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.tune import Callback
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from viladiff.cluster.worker import WorkerContext
from viladiff.runs.job_queue import JobQueue

MEMORY = (
    "Ray's memory monitor ended its process, since the machine was short of memory; lower --max-concurrent, "
    "data.batch_labelled or data.crop, or add memory"
)
"""Said of a run's process."""


def stop_name() -> str:
    """Return a new name for the actor that tells runs to stop; it is of this driver alone, also on a shared cluster."""
    return f"viladiff-stop-{ray.get_runtime_context().get_job_id()}"


def worker_context(queue: JobQueue) -> WorkerContext:
    """Return what a run's process is told of its driver, with a new name for the actor that tells it to stop."""
    settings = queue.settings
    tracking = {**dict.fromkeys((f"runtime.{name}" for name in settings.track), True), "runtime.group": settings.group}
    return WorkerContext(
        str(queue.store.root),
        os.getcwd(),
        settings.threads,
        settings.stall_timeout,
        stop_name(),
        tracking if settings.track else {},
        settings.gpus_per_trial or 0.0,
    )


class QueueSearcher(Searcher):
    """Not a search: hands out the queue's next run whenever Tune has room."""

    def __init__(self, queue: JobQueue) -> None:
        super().__init__(metric="step", mode="max")
        self.queue = queue

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy of what it is given on disk; nothing is ever restored from it

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        poll_queue(self.queue)  # Tune asks nobody else while nothing runs
        job = self.queue.next_job()
        if job is not None:
            return {"run": job.run_id}
        return Searcher.FINISHED if self.queue.done else None

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Do nothing: the callback has handled the result."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the records are the state."""
        open(checkpoint_path, "w").close()

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the records are the state."""


class QueueCallback(Callback):
    """Brings what happens to trials to the queue, and the queue's wishes to trials."""

    def __init__(self, queue: JobQueue, stop: str, refresh: Callable[[], None]) -> None:
        self.queue, self.stop, self.refresh = queue, stop, refresh
        self.flag: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        self.refresh()
        poll_queue(self.queue)
        if self.queue.stopping and self.flag is None and self.queue.live:
            self.flag = create_stop_flag(self.stop)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.queue.on_started(trial.config["run"])

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        self.queue.on_progress(trial.config["run"], result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.queue.on_result(trial.config["run"], trial.last_result)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        report_death(self.queue, trial.config["run"], trial.get_error(), trial_error(trial))


def report_death(queue: JobQueue, run_id: str, error: BaseException | str | None, text: str | None = None) -> None:
    """Tell the queue how a run's process ended: preempted with its machine, out of memory, or in another way.

    ``text``: what Ray says of it where the error has not arrived (``trial_error``).
    """
    cause = error.__cause__ if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, ray.exceptions.RayActorError) and cause.preempted:
        queue.on_preempted(run_id, "its machine was taken away")
        return
    if text is None:
        text = "" if error is None else str(error)
    memory = isinstance(error, ray.exceptions.OutOfMemoryError) or killed_for_memory(text)
    queue.on_worker_died(run_id, MEMORY if memory else death_message(text), memory)


def poll_queue(queue: JobQueue) -> None:
    """Poll the queue once and kill the stalled processes."""
    if queue.asked_to_stop and not queue.stopping:
        queue.request_stop()
    for _, (node, pid) in queue.poll():
        kill(node, pid)


class StopFlag:
    """Stands for a wish by being there."""


def create_stop_flag(name: str) -> Any:
    """Tell every trial to stop, for as long as the caller holds the returned actor."""
    return ray.remote(num_cpus=0)(StopFlag).options(name=name).remote()


def kill(node: str, pid: int) -> None:
    """Kill an unresponsive process on any node, provided that it is one of this driver's."""
    if node == ray.get_runtime_context().get_node_id():
        _kill(pid)
    else:
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        ray.remote(num_cpus=0)(_kill).options(scheduling_strategy=strategy).remote(pid)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended meanwhile


def trial_error(trial: Any) -> str:
    """Return what Ray says of a trial's death; Tune gives it out only once it has copied the file that has it."""
    with suppress(OSError, TypeError):
        return Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    return str(trial.get_error() or "")


def killed_for_memory(text: str) -> bool:
    """Return whether Ray's memory monitor ended a process, from what Ray says of its death."""
    return any(sign in text for sign in ("NODE_OUT_OF_MEMORY", "running low on memory", "OutOfMemoryError"))


def death_message(text: str) -> str:
    """Return one line on the cause of a process's death, without Ray's advice."""
    if killed_for_memory(text):
        return MEMORY
    for line in text.splitlines():
        if "Worker exit detail" in line or "exit code" in line.lower():
            return "its process died: " + line.split("detail:")[-1].split("There are some")[0].strip()
    return "its process died: " + (text.strip().splitlines() or ["no reason given"])[-1][:200]
