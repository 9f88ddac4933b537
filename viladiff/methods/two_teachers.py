"""What PS-MT and SwiTh share: two teachers that take turns, each a moving average of the one student."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from viladiff.batch import Step, TextBatch
from viladiff.methods.base import Method
from viladiff.models.ema import frozen_copy
from viladiff.models.segmenter import Build, Segmenter


class Pair(nn.Module):
    """Two networks that predict together: ``forward`` gives the mean of their logits."""

    def __init__(self, first: Segmenter, second: Segmenter) -> None:
        super().__init__()
        self.members = nn.ModuleList([first, second])

    def __getitem__(self, place: int) -> Segmenter:
        network = self.members[place]
        assert isinstance(network, Segmenter)
        return network

    @property
    def patch(self) -> int:
        """Image sides must be multiples of this."""
        return self[0].patch

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        """Mean logits (B, C, h, w) of the two decoders on the same maps of an encoder."""
        return torch.stack([self[i].decode(features)["visual"].logits for i in (0, 1)]).mean(0)

    def forward(self, images: Tensor, text: TextBatch | None = None) -> dict[str, Tensor]:
        """images (B, 3, H, W) to {"visual": (B, C, H, W) logits}."""
        return {"visual": torch.stack([self[i](images)["visual"] for i in (0, 1)]).mean(0)}


class TwoTeachers(Method):
    """``teachers`` start as copies of the student, get no gradient and are always in evaluation mode."""

    def __init__(self, cfg: Any, build: Build) -> None:
        super().__init__(cfg, build)
        self.teachers = Pair(frozen_copy(self.student), frozen_copy(self.student))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teachers.eval()
        return self


def turn(step: Step, period: float, ahead: int = 0) -> tuple[int, int]:
    """Which turn the step ``ahead`` of this one falls into, from 0, and how many of the turn's steps came before it.

    A turn is ``period``, a share of training, and at least two steps: published code says epochs, whose length is that
    of a data set. The first step does not know how long the run is, and need not.
    """
    index = step.index + ahead
    if step.index == 0:
        return 0, index
    length = max(2.0, period * step.index / step.progress)
    number = int((index + 1e-6) / length)
    return number, index - math.ceil(number * length - 1e-6)
