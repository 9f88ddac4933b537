"""The number of concurrent runs, and each one's share of a machine's processors and GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from viladiff.core.environment import visible_cpus
from viladiff.evaluation.devices import device_called
from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.runs.job_queue import JobQueue
from viladiff.training.run_cost import CountedSteps

MARGIN = 0.15
"""Share of a run's counted memory that is kept free: an allocator's fragments, and what kernels need for themselves."""
CONTEXT = 2**30
"""Bytes that a process needs on a GPU before it trains: the driver's context, and workspaces of cuBLAS and cuDNN."""


class Capacity(NamedTuple):
    """Settings with nothing left open, runs at once, and what a person should know of it."""

    settings: ExecutionSettings
    slots: int
    note: str = ""


def plan_capacity(settings: ExecutionSettings, jobs: Sequence[PlannedRun]) -> Capacity:
    """Return the capacity for runs with equally many workers; a cluster's is known only after joining it.

    GPUs are shared out where no share was asked for: as many runs at once as ``max_concurrent`` or the processors
    allow, and on a GPU no more than its memory holds (``runs_that_fit``); a run of several workers has whole ones, or
    none where there are too few. Raises ValueError for a share that this machine does not have.
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
        most = min(by_cpus, len(jobs))
        # Counting takes seconds, and decides nothing where each run has a GPU in any case.
        fit = runs_that_fit(jobs, gpu_memory()) if most > found and not settings.max_concurrent else 1
        wanted = settings.max_concurrent or min(most, fit * found)
        each = math.ceil(wanted / found)
        share = math.floor(10_000 / each) / 10_000  # Ray counts in steps of 1/10000 and rounds up
        note = f"{there}, {'one for each run' if each == 1 else f'each for {each} runs at once'}"
    settings = replace(settings, gpus_per_trial=share)
    slots = settings.max_concurrent or _slots(settings, by_cpus, workers)
    return Capacity(settings, slots, f"{note}; --gpus-per-trial says otherwise")


def runs_that_fit(jobs: Sequence[PlannedRun], memory: int) -> int:
    """Return how many of the runs fit in a GPU's ``memory`` bytes at once by their counted steps; at least one.

    One where a step cannot be counted.
    """
    steps = CountedSteps()
    costs = [steps.of(job) for job in jobs]
    needs = [(1 + MARGIN) * cost.peak_bytes + CONTEXT for cost in costs if cost is not None]
    return max(1, int(memory / max(needs))) if len(needs) == len(costs) else 1


def concurrency(settings: ExecutionSettings, jobs: Sequence[PlannedRun]) -> Capacity | None:
    """Return ``plan_capacity`` of most of the jobs; None on a cluster without a limit, whose size may change."""
    if settings.address is not None and settings.max_concurrent is None:
        return None
    settings = replace(settings, threads=max((job.threads or settings.threads for job in jobs), default=1))
    single = [job for job in jobs if job.workers == 1]
    return plan_capacity(settings, single if 2 * len(single) >= len(jobs) else [job for job in jobs if job.workers > 1])


def ask_cluster(*queues: JobQueue) -> None:
    """Let each run request a GPU if the joined cluster has some and the user set no number."""
    import ray

    open_ = [queue for queue in queues if queue.settings.gpus_per_trial is None and not queue.done]
    if not open_:
        return
    there = ray.cluster_resources()
    found = there.get("GPU", 0)
    fits = {queue: runs_that_fit(list(queue.waiting), _cluster_memory(there)) for queue in open_} if found else {}
    for queue in open_:
        each = math.floor(10_000 / fits.get(queue, 1)) / 10_000
        queue.settings = replace(queue.settings, gpus_per_trial=each if found else 0.0)
    most = max(fits.values(), default=1)
    some = f"{found:g} GPUs in the cluster, {'one for each run' if most == 1 else f'each for {most} runs at once'}"
    none = "no GPU in the cluster so far, and none is asked for"
    send_note(open_[0].tell, f"{some if found else none}; --gpus-per-trial says otherwise")


def _cluster_memory(there: Mapping[str, float]) -> int:
    """Return the bytes of the smallest GPU that Ray names among a cluster's resources; 0 if it names none we know."""
    mark = "accelerator_type:"
    named = [name.removeprefix(mark) for name in there if name.startswith(mark)]
    known = [device_called(name) for name in named]
    return min((device.memory if device else 0 for device in known), default=0)


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


def gpu_memory() -> int:
    """Return the bytes of the smallest GPU that this process may use."""
    import torch

    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


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
