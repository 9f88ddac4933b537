"""Where a run computes: the device of each worker, and several workers on one machine without any launcher."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing import SimpleQueue, get_context
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from viladiff.runs.config import RunConfig
from viladiff.training.errors import TrainingError

PATIENCE = timedelta(hours=12)
"""That workers wait for the first one of their machine to read a data set."""


def select_device(cfg: RunConfig) -> torch.device:
    """The device of this worker. Raises ValueError where CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if cfg.runtime.device == "cuda" and not available:
        raise ValueError('runtime.device = "cuda": this machine has no usable CUDA device (use auto or cpu)')
    if cfg.runtime.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether CUDA rounds inputs of fp32 products and convolutions to TF32; what held before holds again afterwards.

    torch by itself allows it for convolutions alone. The flags are the process's.
    """
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    matmul.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32 = before


def join_group(cfg: RunConfig) -> None:
    """Joins the group that torchrun announces in the environment. Raises ValueError where it has another size."""
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        return
    announced = int(os.environ["WORLD_SIZE"])
    if announced != cfg.runtime.workers:
        raise ValueError(f"runtime.workers = {cfg.runtime.workers}, but the launcher started {announced} processes")
    if announced > 1:
        dist.init_process_group(_backend(cfg, announced))


def join_here(backend: str, meeting: Path, rank: int, workers: int) -> None:
    """Joins a group of this machine alone: its workers meet in a file, which must be new, and talk over loopback.

    A rendezvous over TCP would listen on every network of the machine, whatever address it is given.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    store = dist.FileStore(str(meeting), workers)  # type: ignore[attr-defined]  # public, and missing in __all__
    dist.init_process_group(backend, store=store, rank=rank, world_size=workers)


def _backend(cfg: RunConfig, workers: int) -> str:
    """nccl wants a GPU of its own for every worker of this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", workers))
    return "nccl" if select_device(cfg).type == "cuda" and torch.cuda.device_count() >= here else "gloo"


T = TypeVar("T")


def in_turn(work: Callable[[], T]) -> T:
    """``work()`` by the first worker of each machine, then by its others, which find what that one has kept.

    An error of the first one is the others' as well, since they do the same afterwards.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    # A group of its own, since NCCL's waits for ten minutes alone, and reading a data set may take longer.
    group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    first = int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0
    try:
        if first:
            try:
                return work()
            finally:
                dist.barrier(group)
        dist.barrier(group)
        return work()
    finally:
        dist.destroy_process_group(group)


def summed_over_workers(counts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Counts of all workers together, tensors on the CPU; one that has seen no image has none, but must take part."""
    parts: list[dict[str, dict[str, Any]]] = [counts]
    if dist.is_initialized():
        parts = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, counts)
    total: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, found in part.items():
            into = total.setdefault(name, {})
            for what, count in found.items():
                into[what] = into.get(what, 0) + count
    return total


def run_in_processes(work: Callable[..., str], cfg: RunConfig, workers: int, *arguments: object) -> str:
    """``work(cfg, *arguments)`` in ``workers`` new processes that form a group; the first one's short answer.

    work is a function of a module, since new processes look it up by name. A worker's error is raised here.
    """
    queue: SimpleQueue = get_context("spawn").SimpleQueue()
    # Workers get a terminal's Ctrl-C themselves and stop together; this process only waits for them.
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    failure: Exception | None = None
    try:
        dump = cfg.model_dump(mode="json")
        with tempfile.TemporaryDirectory(prefix=f"viladiff-{os.getpid()}-", ignore_cleanup_errors=True) as meeting:
            spawn(_worker, (work, dump, workers, arguments, _backend(cfg, workers), meeting, queue), workers)
    except ProcessRaisedException as error:
        failure = error
    finally:
        signal.signal(signal.SIGINT, old)
    kind, text = ("", "") if queue.empty() else queue.get()
    if kind == "done":
        return text
    if kind in _RAISED:
        raise _RAISED[kind](text) from None
    raise failure or RuntimeError("the workers ended without a result")


_RAISED: dict[str, type[BaseException]] = {
    "KeyboardInterrupt": KeyboardInterrupt,
    "TrainingError": TrainingError,
    "ValueError": ValueError,
}


def _worker(
    rank: int,
    work: Callable[..., str],
    dump: dict,
    workers: int,
    arguments: tuple,
    backend: str,
    meeting: str,
    queue: SimpleQueue,
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent ignores it, and children inherit that
    os.environ |= {"LOCAL_RANK": str(rank)}
    threads = dump["runtime"]["threads"] or max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    join_here(backend, Path(meeting) / "store", rank, workers)
    try:
        answer = work(RunConfig(**dump), *arguments)
        if rank == 0:
            queue.put(("done", answer))
    except KeyboardInterrupt as stop:
        queue.put(("KeyboardInterrupt", str(stop)))
        raise
    except ValueError as error:
        queue.put(("TrainingError" if isinstance(error, TrainingError) else "ValueError", str(error)))
        raise
    finally:
        dist.destroy_process_group()
