"""Training on the labelled images alone: the floor that every other method is compared with."""

from __future__ import annotations

from typing import Literal

from viladiff.methods.base import Method, MethodConfig


class SupervisedConfig(MethodConfig):
    """Nothing to choose: cross-entropy on labelled pixels (paper, Eq. 10)."""

    name: Literal["supervised"] = "supervised"


class Supervised(Method):
    Config = SupervisedConfig
