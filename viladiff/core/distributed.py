"""Process groups, collectives and number formats of torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

PATIENCE = timedelta(hours=12)
"""That workers wait for the first one of their machine to read a data set."""


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Set whether CUDA rounds inputs of fp32 products and convolutions to TF32; restore the old setting afterwards.

    By default torch allows it for convolutions alone. The flags belong to the process.
    """
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    matmul.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32 = before


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return a context for forward passes in ``precision`` (``fp32``, ``bf16`` or ``fp16``) of ``train.precision``."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which nothing on ``device`` is autocast; meta tensors stand for those of a GPU."""
    kind = "cuda" if device.type == "meta" else device.type
    known = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known else nullcontext()


def join_here(backend: str, meeting: Path, rank: int, workers: int) -> None:
    """Join a group of this machine alone: its workers meet in the new file ``meeting`` and talk over loopback.

    A rendezvous over TCP would listen on every network of the machine, whatever address it is given.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    store = dist.FileStore(str(meeting), workers)  # type: ignore[attr-defined]  # public, and missing in __all__
    dist.init_process_group(backend, store=store, rank=rank, world_size=workers)


T = TypeVar("T")


def in_turn(work: Callable[[], T]) -> T:
    """Run ``work()`` on the first worker of each machine, then on its others, which find the first one's cache.

    An error of the first worker is raised on the others too, since they do the same afterwards.
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
    """Sum counts over all workers, as tensors on the CPU; a worker without images has no counts but must take part."""
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
