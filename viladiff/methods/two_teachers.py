"""Teachers that take turns, each a moving average of the one student, for PS-MT and SwiTh."""

from __future__ import annotations

import math
from typing import Any, Self

from viladiff.data.batch import Step
from viladiff.methods.base import Method
from viladiff.models.ema import frozen_copy
from viladiff.models.segmenter import DualNetwork, NetworkFactory


class TwoTeachers(Method):
    """``teachers`` start as copies of the student, get no gradient and are always in evaluation mode."""

    def __init__(self, cfg: Any, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        self.teachers = DualNetwork(frozen_copy(self.student), frozen_copy(self.student))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teachers.eval()
        return self


def turn_length(step: Step, period: float) -> float:
    """Return the steps of a teacher's turn: ``period``, a share of training, and at least two steps.

    Published code counts epochs, whose length depends on the data set. At the first step the run's length is unknown:
    2.
    """
    return max(2.0, period * step.index / step.progress) if step.index else 2.0


def turn(step: Step, period: float, ahead: int = 0) -> tuple[int, int]:
    """Return the number of the turn of the step ``ahead`` of this one, from 0, and the turn's steps before it.

    At the first step the run's length is unknown and not needed.
    """
    index = step.index + ahead
    if step.index == 0:
        return 0, index
    length = turn_length(step, period)
    number = int((index + 1e-6) / length)
    return number, index - math.ceil(number * length - 1e-6)
