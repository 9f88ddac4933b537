"""Where a run computes: the device of each worker, and several workers on one machine without any launcher."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

PATIENCE = timedelta(hours=12)
"""That workers wait for the first one of their machine to read a data set."""


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


def join_here(backend: str, meeting: Path, rank: int, workers: int) -> None:
    """Joins a group of this machine alone: its workers meet in a file, which must be new, and talk over loopback.

    A rendezvous over TCP would listen on every network of the machine, whatever address it is given.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    store = dist.FileStore(str(meeting), workers)  # type: ignore[attr-defined]  # public, and missing in __all__
    dist.init_process_group(backend, store=store, rank=rank, world_size=workers)


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
