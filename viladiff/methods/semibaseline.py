"""Weak-to-strong consistency with a moving-average teacher: the SemiBaseline of the paper's Table 5."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from viladiff.methods.base import Method, MethodConfig, Section


class TeacherConfig(Section):
    """The moving average of the student that makes the pseudo-labels."""

    momentum: float = Field(0.99, ge=0, le=1)
    """Paper, section 4.1; the first steps use min(momentum, 1 - 1 / (step + 1))."""


class PseudoConfig(Section):
    """How teacher predictions become labels."""

    threshold: float = Field(0.95, ge=0, le=1)
    """Pixels below this confidence have weight 0."""
    weight: float = Field(1.0, ge=0)
    """Factor of the weak-to-strong cross-entropy in the total."""


class PredictConfig(Section):
    """Which network is evaluated and shipped."""

    network: Literal["teacher", "student"] = "teacher"


class SemiBaselineConfig(MethodConfig):
    """FixMatch-style consistency on one strong view with CutMix."""

    name: Literal["semibaseline"] = "semibaseline"
    cutmix: bool = True
    teacher: TeacherConfig = TeacherConfig()
    pseudo: PseudoConfig = PseudoConfig()
    predict: PredictConfig = PredictConfig()


class SemiBaseline(Method):
    Config = SemiBaselineConfig
