"""BatchNorm of networks that several workers train: synchronised on GPUs, statistics per worker elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def batch_norms(module: nn.Module) -> Iterator[BatchNorm]:
    """Yield the BatchNorm modules in ``module``, of any dimension, synchronised ones too."""
    return (part for part in module.modules() if isinstance(part, BatchNorm))


def synchronises(module: nn.Module, device: torch.device, world: int) -> bool:
    """Return whether ``module`` must have its BatchNorm replaced: several workers, each with a GPU of its own.

    torch has synchronised BatchNorm for GPUs alone.
    """
    return world > 1 and device.type == "cuda" and any(True for _ in batch_norms(module))


def synchronise(module: nn.Module, device: torch.device, world: int) -> None:
    """Replace BatchNorm inside ``module`` by SyncBatchNorm where ``synchronises``.

    Parameters, buffers and their names are kept, so that optimisers and checkpoints are the same with both. So are the
    activations that timm's norms include, which torch's own conversion would drop.
    """
    if synchronises(module, device, world):
        from timm.layers.norm_act import convert_sync_batchnorm  # a second of import time

        convert_sync_batchnorm(module)


def statistics_notes(module: nn.Module, device: torch.device, world: int) -> tuple[str, ...]:
    """Return a note where several workers have BatchNorm that is not synchronised, which changes results."""
    if world == 1 or device.type == "cuda" or not any(True for _ in batch_norms(module)):
        return ()
    return (
        f"BatchNorm on {world} workers without GPUs: each normalises by its own share of a batch, running statistics "
        "are averaged after each step; results differ from those of one worker",
    )


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Average running means and variances of BatchNorm over workers, in one message, where they are not synchronised.

    All workers must call it; workers then hold equal networks. The mean of variances leaves out how far the workers'
    means lie apart.
    """
    buffers = [
        buffer
        for norm in batch_norms(module)
        if not isinstance(norm, nn.SyncBatchNorm) and norm.track_running_stats
        for buffer in (norm.running_mean, norm.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
