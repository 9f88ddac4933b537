"""The moving-average teacher: updates without a copy to the host and without a loop over parameters."""

from __future__ import annotations

import copy
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

M = TypeVar("M", bound=nn.Module)


def ema_momentum(step: int, momentum: float) -> float:
    """Return m_i = min(1 - 1 / (i + 1), momentum): the average starts as a plain mean, and step 0 copies the student.

    step counts the optimiser steps done before this one, from 0. Source: UniMatch's schedule; paper, section 4.1, gives
    the momentum 0.99. Raises ValueError for a negative step or a momentum outside [0, 1].
    """
    if step < 0:
        raise ValueError(f"step = {step}: must be at least 0")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum = {momentum}: must be in [0, 1]")
    return min(1 - 1 / (step + 1), momentum)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, step: int, momentum: float = 0.99) -> None:
    """Set teacher <- m teacher + (1 - m) student for all parameters and float buffers; copy integer buffers.

    Both modules have the same structure, on the same device; their tensors are paired by position. The average is kept
    in the teacher's precision, which must be float32 or better: in bfloat16 a step of 1 - m = 0.01 is mostly rounded
    away. Raises ValueError if the shapes differ or the teacher is not in such a precision.
    """
    average = get_ema_multi_avg_fn(ema_momentum(step, momentum))
    mine, theirs = _tensors(teacher), _tensors(student)
    if [x.shape for x in mine] != [x.shape for x in theirs]:
        _refuse(teacher, student)
    averaged: list[Tensor] = []
    towards: list[Tensor] = []
    for into, source in zip(mine, theirs, strict=True):
        if into.dtype in (torch.float32, torch.float64):
            averaged.append(into)
            towards.append(source.to(into.dtype))
        elif into.is_floating_point():
            name = next(name for name, x in _named(teacher) if x is into)
            raise ValueError(f"teacher's {name} is {into.dtype}: averages need float32 or float64")
        else:
            into.copy_(source)
    if averaged:
        average(averaged, towards, step)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _refuse(teacher: nn.Module, student: nn.Module) -> None:
    for (name, mine), (other, theirs) in zip_longest(_named(teacher), _named(student), fillvalue=("nothing", None)):
        have, has = (() if x is None else tuple(x.shape) for x in (mine, theirs))
        if name != other or have != has:
            raise ValueError(f"teacher has {name} {have} where the student has {other} {has}")


def frozen_copy(module: M) -> M:
    """Copy a module; the copy's parameters never get a gradient and share no memory with the original."""
    return copy.deepcopy(module).requires_grad_(False)
