"""Runs of two or more workers: ``TorchTrainer`` starts and joins the processes, and ``fit`` trains.

Each trainer runs in a thread of the driver, beside a queue; a Tune trial around it would add a minute of processes and
placement groups. Torch and Ray Train are imported where they are used, since most tables have no such run.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import ray

from viladiff.cluster.ray_tune import create_stop_flag, poll_queue, report_death, worker_context
from viladiff.cluster.worker import WorkerContext, attempt_held, classify_error, configuration
from viladiff.runs.job import PlannedRun
from viladiff.runs.job_queue import JobQueue
from viladiff.runs.store import Store

PAUSE = 0.2
"""Seconds between looks at the trainers."""


class Mailbox:
    """An actor that carries words from rank 0 to the driver, and each run's last word."""

    def __init__(self) -> None:
        self.news: list[tuple[str, dict[str, Any]]] = []
        self.last: dict[str, dict[str, Any]] = {}
        self.answers: dict[tuple[str, int], bool] = {}

    def put(self, run_id: str, news: dict[str, Any]) -> None:
        self.news.append((run_id, news))

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the messages since the last call."""
        taken, self.news = self.news, []
        return taken

    def decide(self, run_id: str, step: int, stop: bool) -> None:
        """Store the driver's decision on the score at a step."""
        self.answers[run_id, step] = stop

    def answer(self, run_id: str, step: int) -> bool | None:
        """Return the decision; None if there is none yet."""
        return self.answers.pop((run_id, step), None)

    def end(self, run_id: str, result: dict[str, Any]) -> None:
        """Store the first cause of the end; a lost neighbour is a consequence and does not count."""
        if self.last.get(run_id, {}).get("kind", "killed") == "killed":
            self.last[run_id] = result

    def pop(self, run_id: str) -> dict[str, Any] | None:
        return self.last.pop(run_id, None)


def run_shared(queue: JobQueue, scratch: Path, refresh: Callable[[], None]) -> None:
    """Run the queue's jobs, ``queue.slots`` trainers at a time, until it is done."""
    settings = queue.settings
    place = worker_context(queue)
    box: Any = ray.remote(num_cpus=0)(Mailbox).remote()
    flag: Any = None
    running: dict[Future[None], str] = {}
    while not queue.done:
        refresh()
        poll_queue(queue)
        if queue.stopping and flag is None and running:
            flag = create_stop_flag(place.stop_name)
        while (job := queue.next_job()) is not None:
            alone = settings.address is None
            given = job, place, box, settings.gpus_per_trial or 0.0, scratch, queue.judges, alone
            running[_aside(_train, *given)] = job.run_id
            queue.on_started(job.run_id)
        for run_id, news in ray.get(box.take.remote()):
            queue.on_progress(run_id, news)
            if "judge" in news:
                box.decide.remote(run_id, news["judge"], queue.should_stop(run_id, news["judge"], news["miou"]))
        for future in [future for future in running if future.done()]:
            run_id = running.pop(future)
            result, error = ray.get(box.pop.remote(run_id)), future.exception()
            if result is not None:
                queue.on_result(run_id, result)
            else:
                report_death(queue, run_id, error)
        time.sleep(PAUSE)


def _aside(do: Callable[..., None], *given: Any) -> Future[None]:
    """Call a function in a daemon thread, which does not block the interpreter's exit as an executor's threads do."""
    future: Future[None] = Future()

    def call() -> None:
        try:
            do(*given)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=call, name="trainer", daemon=True).start()
    return future


def _train(
    job: PlannedRun, place: WorkerContext, box: Any, gpus: float, scratch: Path, judges: bool, alone: bool
) -> None:
    """Run one trainer from start to end, blocking; its own retries are off, since the queue decides on them.

    alone: whether all workers are on this machine, and so meet in a file.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from viladiff.cluster.process_group import Apart

    name = f"{job.run_id}-{time.time_ns()}"  # one that was used before would be resumed
    meeting = (str(scratch / f"{name}.store"), "nccl" if gpus else "gloo") if alone else None
    resources = {"CPU": place.threads, **({"GPU": max(1.0, gpus)} if gpus else {})}
    TorchTrainer(
        worker,
        train_loop_config={"job": job, "place": place, "box": box, "judges": judges, "meeting": meeting},
        torch_config=Apart() if alone else TorchConfig(),
        scaling_config=ScalingConfig(num_workers=job.workers, use_gpu=bool(gpus), resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=str(scratch / "train"),
            failure_config=FailureConfig(max_failures=0),
        ),
    ).fit()


def worker(config: dict[str, Any]) -> None:
    """Run one rank in a process of Ray Train, which has joined it to those on other machines."""
    if config["meeting"] is None:
        _work(config)
        return
    from viladiff.cluster.process_group import joined_group

    path, backend = config["meeting"]
    with joined_group(Path(path), backend):
        _work(config)


def _work(config: dict[str, Any]) -> None:
    import torch.distributed as dist

    job, place, box = config["job"], config["place"], config["box"]
    rank = dist.get_rank()
    lease, decided = None, [False]
    if rank == 0:
        box.put.remote(job.run_id, {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()})
        lease = Store(Path(place.root)).lease(job.run_id)
        decided = [lease is not None]
    dist.broadcast_object_list(decided, src=0)
    if not decided[0]:
        result = {"state": "elsewhere"}
    elif lease is not None:
        with lease:
            put = partial(box.put.remote, job.run_id)
            judged = partial(asked, box, put, job.run_id) if config["judges"] else None
            result = attempt_held(job, place, put, lease, judged)
    else:
        result = _follow(job, place)
    failed = result["state"] == "failed"
    if rank == 0 or failed:
        ray.get(box.end.remote(job.run_id, result))
    if failed:
        raise RuntimeError(result["message"])  # so that Train ends the other ranks, which may wait for this one


def asked(box: Any, tell: Callable[[dict[str, Any]], Any], run_id: str, step: int, value: float | None) -> bool:
    """Send the driver a score and wait for its answer: whether to stop the run."""
    tell({"judge": step, "step": step, "miou": value})
    while (answer := ray.get(box.answer.remote(run_id, step))) is None:
        time.sleep(0.02)
    return bool(answer)


def _follow(job: PlannedRun, place: WorkerContext) -> dict[str, Any]:
    """Run a rank other than 0, which writes nothing and asks nothing but takes part in all collectives."""
    from viladiff.training.trainer import fit

    try:
        fit(configuration(job, place), report=lambda news: False)
    except Exception as error:
        return classify_error(error) or {"state": "failed", "kind": "error", "message": str(error)}
    return {"state": "done"}
