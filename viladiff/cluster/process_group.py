"""The process group of a run's workers on one machine: they meet in a file, not on a network port."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from ray.train import get_context
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from viladiff.core.distributed import join_here


class _Unjoined(Backend):
    share_cuda_visible_devices = True  # as Ray's own for torch: a worker's device is its local rank


class Apart(TorchConfig):
    """Leaves it to the workers to join: torch's store of a rendezvous over TCP listens on all addresses."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Unjoined


@contextmanager
def joined_group(meeting: Path, backend: str) -> Iterator[None]:
    """Keep the calling worker in the process group; ``meeting`` is a new file that all workers of the run name."""
    context = get_context()
    os.environ |= {
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    join_here(backend, meeting, context.get_world_rank(), context.get_world_size())
    try:
        yield
    finally:
        dist.destroy_process_group()
