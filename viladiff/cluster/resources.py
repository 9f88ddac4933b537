"""The number of concurrent runs, and each one's share of a machine's processors and GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from viladiff.core.environment import visible_cpus
from viladiff.data.sources import embedded_datasets
from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.runs.job_queue import JobQueue

SHARING = 4
"""Runs on built-in data that one GPU gets at most where nobody says how many; a run on photographs gets a GPU."""


class Capacity(NamedTuple):
    """Settings with nothing left open, runs at once, and what a person should know of it."""

    settings: ExecutionSettings
    slots: int
    note: str = ""


def plan_capacity(settings: ExecutionSettings, jobs: Sequence[PlannedRun]) -> Capacity:
    """Return the capacity for runs with equally many workers; a cluster's is known only after joining it.

    GPUs are shared out where no share was asked for: as many runs at once as ``max_concurrent`` or the processors
    allow, and at most SHARING on a GPU, one of those on photographs; a run of several workers has whole ones, or none
    where there are too few. Raises ValueError for a share that this machine does not have.
    """
    workers = max((job.workers for job in jobs), default=1)
    if settings.address is not None:
        return Capacity(settings, settings.max_concurrent or max(1, len(jobs)))
    by_cpus = max(1, visible_cpus() // (settings.threads * workers))
    if settings.gpus_per_trial is not None:
        return Capacity(settings, settings.max_concurrent or _slots(settings, by_cpus, workers))
    found = 0 if all(job.changes.get("runtime.device") == "cpu" for job in jobs) else visible_gpus()
    there = f"{found} GPU{'s' * (found != 1)} here"
    if not found:
        return Capacity(replace(settings, gpus_per_trial=0.0), settings.max_concurrent or by_cpus)
    if workers > 1:
        share, note = (1.0, f"{there}, one for each worker") if found >= workers else (0.0, f"{there} for all workers")
    else:
        names = {str(job.changes.get("data.dataset", "digits")) for job in jobs}
        small = names <= set(embedded_datasets())
        wanted = settings.max_concurrent or min(by_cpus, len(jobs), (SHARING if small else 1) * found)
        each = math.ceil(wanted / found)
        share = math.floor(10_000 / each) / 10_000  # Ray counts in steps of 1/10000 and rounds up
        note = f"{there}, {'one for each run' if each == 1 else f'each for {each} runs at once'}"
    settings = replace(settings, gpus_per_trial=share)
    slots = settings.max_concurrent or _slots(settings, by_cpus, workers)
    return Capacity(settings, slots, f"{note}; --gpus-per-trial says otherwise")


def concurrency(settings: ExecutionSettings, jobs: Sequence[PlannedRun]) -> Capacity | None:
    """Return ``plan_capacity`` of most of the jobs; None on a cluster without a limit, whose size may change."""
    if settings.address is not None and settings.max_concurrent is None:
        return None
    settings = replace(settings, threads=max((job.threads or settings.threads for job in jobs), default=1))
    single = [job for job in jobs if job.workers == 1]
    return plan_capacity(settings, single if 2 * len(single) >= len(jobs) else [job for job in jobs if job.workers > 1])


def trains_on_gpus(room: Capacity | None) -> bool | None:
    """Return whether runs of this capacity have GPUs; None where that is not known, as on a cluster."""
    if room is None or room.settings.gpus_per_trial is None:
        return None
    # A share of 0 keeps no GPU for a run, which then sees all of them.
    return True if room.settings.gpus_per_trial else None if visible_gpus() else False


def ask_cluster(*queues: JobQueue) -> None:
    """Let each run request a GPU if the joined cluster has some and the user set no number."""
    import ray

    open_ = [queue for queue in queues if queue.settings.gpus_per_trial is None and not queue.done]
    if not open_:
        return
    found = ray.cluster_resources().get("GPU", 0)
    for queue in open_:
        queue.settings = replace(queue.settings, gpus_per_trial=1.0 if found else 0.0)
    some = f"{found:g} GPUs in the cluster, one for each run"
    none = "no GPU in the cluster so far, and none is asked for"
    send_note(open_[0].tell, f"{some if found else none}; --gpus-per-trial says otherwise")


def cluster_slots(settings: ExecutionSettings, workers: int) -> int:
    """Return how many runs of so many workers fit on the joined cluster now; at least one."""
    import ray

    found = ray.cluster_resources()
    rooms = [found.get("CPU", 0) / (settings.threads * workers)]
    if settings.gpus_per_trial:
        rooms.append(found.get("GPU", 0) / (settings.gpus_per_trial * workers))
    return max(1, int(min(rooms)))


def threads_of_a_run(address: str | None) -> int:
    """Return the processors of a run where a scale does not say: on a machine with GPUs each GPU's share, else 1.

    They decode images while the GPU trains. A cluster's machines are not known here, and get 1.
    """
    gpus = 0 if address is not None else visible_gpus()
    return max(1, visible_cpus() // gpus) if gpus else 1


def visible_gpus() -> int:
    """Return the number of GPUs that this process may use."""
    if not any(Path("/dev").glob("nvidia*")) and not Path("/dev/dxg").exists():
        return 0  # torch, which looks closer, takes seconds to load
    import torch

    return torch.cuda.device_count()


def _slots(settings: ExecutionSettings, by_cpus: int, workers: int) -> int:
    """Return how many runs of so many workers fit on this machine; at least one, which then shares what there is."""
    share = settings.gpus_per_trial
    if not share:
        return by_cpus
    found = visible_gpus()
    # Workers of one run do not share a GPU: nccl refuses that.
    needed = share if workers == 1 else max(1.0, share) * workers
    if found < needed:
        each = "" if workers == 1 else f" for each of runtime.workers = {workers}"
        raise ValueError(
            f"gpus_per_trial = {share:g}{each} needs {needed:g} GPUs, but this machine has {found}: "
            "lower it, or give the address of a cluster"
        )
    return int(found / needed)


def send_note(on_event: Callable[[Event], None], note: str) -> None:
    """Send a note to ``on_event`` unless it is empty."""
    if note:
        on_event(Event("note", "", message=note))
