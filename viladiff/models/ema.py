"""The moving-average teacher follows its student without a copy through the host and without a loop over parameters."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def ema_momentum(step: int, momentum: float) -> float:
    """The teacher starts as a plain average: m_i = min(1 - 1 / (i + 1), momentum), so step 0 copies the student.

    step counts the optimiser steps done before this one, from 0. Source: UniMatch's schedule; paper, section 4.1, gives
    the momentum 0.99. ValueError for a negative step or a momentum outside [0, 1].
    """
    if step < 0:
        raise ValueError(f"step = {step}: must be at least 0")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum = {momentum}: must be in [0, 1]")
    return min(1 - 1 / (step + 1), momentum)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, step: int, momentum: float = 0.99) -> None:
    """teacher <- m teacher + (1 - m) student over all parameters and float buffers; integer buffers are copied.

    Both modules have the same structure, on the same device. The average is kept in the teacher's precision, which
    must be float32 or better: in bfloat16 a step of 1 - m = 0.01 is mostly rounded away. ValueError where the
    structures differ or the teacher is not in such a precision.
    """
    weight = 1 - ema_momentum(step, momentum)
    averaged: list[Tensor] = []
    towards: list[Tensor] = []
    for (name, mine), (other, theirs) in zip(_tensors(teacher), _tensors(student), strict=True):
        if name != other or mine.shape != theirs.shape:
            raise ValueError(
                f"teacher has {name} {tuple(mine.shape)} where the student has {other} {tuple(theirs.shape)}"
            )
        if not mine.is_floating_point():
            mine.copy_(theirs)
        elif mine.dtype in (torch.float32, torch.float64):
            averaged.append(mine)
            towards.append(theirs.detach().to(mine.dtype))
        else:
            raise ValueError(f"teacher's {name} is {mine.dtype}: averages need float32 or float64")
    if averaged:
        torch._foreach_lerp_(averaged, towards, weight)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def frozen_copy(module: M) -> M:
    """A copy whose parameters never get a gradient and which shares no memory with the original."""
    return copy.deepcopy(module).requires_grad_(False)
