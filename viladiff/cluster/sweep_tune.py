"""What Tune is given for a sweep: a searcher and a scheduler that pass its requests to Optuna's sampler and pruner.

The searcher asks the sweep's study for points and the scheduler asks its pruner at rungs, so that Tune's interfaces
keep their roles; but the answers come from the sweep's records, and stopping is a flag that the training loop reads
where it reports, never a process that is killed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from viladiff.cluster.executor import RaySession, run_tuner
from viladiff.cluster.ray_tune import QueueSearcher, poll_queue, worker_context
from viladiff.cluster.torch_trainer import Mailbox, asked
from viladiff.cluster.worker import Tell, WorkerContext, run_attempt
from viladiff.runs.job import PlannedRun
from viladiff.sweeps.trial_queue import TrialQueue

Work = Callable[[PlannedRun, WorkerContext, Tell, Callable[[int, float | None], bool]], dict[str, Any]]
"""Does a run: tells of its life, asks about its scores, and returns how it ended."""


class TrialSearcher(QueueSearcher):
    """Tune's searcher: each run that it suggests is a point of the sweep under one seed."""

    queue: TrialQueue

    def suggest(self, trial_id: str) -> Any:
        poll_queue(self.queue)
        job = self.queue.next_job()
        if job is not None:
            return {"run": job.run_id, "job": asdict(job)}
        return Searcher.FINISHED if self.queue.done else None


class RungScheduler(FIFOScheduler):
    """Tune's scheduler: brings scores to the sweep's pruner and its answers to the runs; it ends nothing itself."""

    def __init__(self, queue: TrialQueue, box: Any) -> None:
        super().__init__()
        self.queue, self.box = queue, box

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        if result.get("judge") is not None:
            run_id, step = trial.config["run"], int(result["judge"])
            self.box.decide.remote(run_id, step, self.queue.should_stop(run_id, step, result["miou"]))
        return TrialScheduler.CONTINUE

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the records are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the records are the state."""


def train_trial(config: dict[str, Any], place: WorkerContext, box: Any, work: Work) -> None:
    """Tune trainable that performs one run and reports its outcome as the last result."""
    job = PlannedRun(**config["job"])
    judged = partial(asked, box, tune.report, job.run_id)
    tune.report(work(job, place, tune.report, judged))


def run_trials(queue: TrialQueue, session: RaySession, work: Work = run_attempt) -> None:
    """Run the sweep's trials of one worker on the session's Ray until the queue is over."""
    place = worker_context(queue)
    box: Any = ray.remote(num_cpus=0)(Mailbox).remote()
    trainable = tune.with_parameters(train_trial, place=place, box=box, work=work)
    run_tuner(queue, session, trainable, TrialSearcher(queue), place.stop_name, RungScheduler(queue, box))
