"""Where a run computes: the device of each worker, and several workers on one machine without any launcher."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import SimpleQueue, get_context
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from viladiff.config import RunConfig


def pick_device(cfg: RunConfig) -> torch.device:
    """The device of this worker. Raises ValueError where CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if cfg.runtime.device == "cuda" and not available:
        raise ValueError('runtime.device = "cuda": this machine has no usable CUDA device (use auto or cpu)')
    if cfg.runtime.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def join_group(cfg: RunConfig) -> None:
    """Joins the group that torchrun announces in the environment."""
    if (
        {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)
        and not dist.is_initialized()
        and cfg.runtime.workers > 1
    ):
        dist.init_process_group("nccl" if pick_device(cfg).type == "cuda" else "gloo")


def launch(cfg: RunConfig, resume: bool):  # type: ignore[no-untyped-def]  # Result; train imports this module
    """Runs ``fit`` in ``runtime.workers`` processes and returns its result; a worker's error is raised here."""
    from viladiff.record import load_record
    from viladiff.train import Result

    backend = "nccl" if pick_device(cfg).type == "cuda" and torch.cuda.device_count() >= cfg.runtime.workers else "gloo"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue: SimpleQueue = get_context("spawn").SimpleQueue()
    # Workers get a terminal's Ctrl-C themselves and stop together; this process only waits for them.
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        spawn(_worker, (cfg.model_dump(mode="json"), resume, backend, port, queue), nprocs=cfg.runtime.workers)
    except ProcessRaisedException as error:
        if not queue.empty():
            kind, text = queue.get()
            if kind == "KeyboardInterrupt":
                raise KeyboardInterrupt(text) from None
            if kind == "ValueError":
                raise ValueError(text) from None
        raise error
    finally:
        signal.signal(signal.SIGINT, old)
    directory = Path(queue.get()[1])
    return Result(directory, load_record(directory / "record.json"))


def _worker(rank: int, dump: dict, resume: bool, backend: str, port: int, queue: SimpleQueue) -> None:
    from viladiff.train import fit

    workers = dump["runtime"]["workers"]
    os.environ |= {"LOCAL_RANK": str(rank)}
    threads = dump["runtime"]["threads"] or max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    try:
        result = fit(RunConfig(**dump), resume=resume)
        if rank == 0:
            queue.put(("done", str(result.directory)))
    except KeyboardInterrupt as stop:
        queue.put(("KeyboardInterrupt", str(stop)))
        raise
    except ValueError as error:
        queue.put(("ValueError", str(error)))
        raise
    finally:
        dist.destroy_process_group()
