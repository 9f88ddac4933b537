"""Encoders of a few weights that timm is told of, each with one property that a run may not do with."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from timm.models import register_model
from torch import Tensor, nn

CHANNELS, STRIDES = (8, 16, 16, 16), (4, 8, 16, 32)
SIZES = ((64, 64), (64, 96))
"""Of the only images that ``stub_fixed`` takes; the second is what an encoder is tried with when it is built."""
__all__: list[str] = []


class Levels(NamedTuple):
    """The part of timm's description of feature levels that is read."""

    count: int = 4

    def __len__(self) -> int:
        return self.count

    def channels(self) -> list[int]:
        return list(CHANNELS)

    def reduction(self) -> list[int]:
        return list(STRIDES)


class Stub(nn.Module):
    """Four convolutions, coarser from one to the next."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.feature_info = kind, Levels()
        inputs = (3, *CHANNELS[:3])
        strides = (4, 2, 2, 2)
        self.levels = nn.ModuleList([nn.Conv2d(i, o, s, s) for i, o, s in zip(inputs, CHANNELS, strides, strict=True)])
        self.norm = nn.BatchNorm2d(3) if kind == "norm" else nn.Identity()
        self.idle = nn.Parameter(torch.zeros(1)) if kind == "idle" else None

    def forward(self, x: Tensor) -> list[Tensor]:
        height, width = x.shape[-2:]
        if self.kind == "fixed" and (height, width) not in SIZES:
            raise AssertionError(f"input of {(height, width)} is not of 64")
        x = nn.functional.pad(self.norm(x), (0, -x.shape[-1] % 32, 0, -x.shape[-2] % 32))
        found = []
        for level in self.levels:
            x = level(x)
            found.append(x.permute(0, 2, 3, 1) if self.kind == "last" and height == width else x)
        return found


def stub_any(**options: Any) -> nn.Module:
    return Stub("any")


def stub_fixed(**options: Any) -> nn.Module:
    return Stub("fixed")


def stub_last(**options: Any) -> nn.Module:
    return Stub("last")


def stub_norm(**options: Any) -> nn.Module:
    return Stub("norm")


def stub_idle(**options: Any) -> nn.Module:
    return Stub("idle")


def register() -> None:
    """Make them known to timm, once."""
    if "stub_any" not in sys.modules[__name__].__all__:
        for build in (stub_any, stub_fixed, stub_last, stub_norm, stub_idle):
            register_model(build)
