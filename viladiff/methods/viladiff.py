"""ViLaDiff: two streams with and without text (ViLa), and pseudo-labels refined by diffusion (MixE)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from viladiff.methods.base import Method, MethodConfig, Section
from viladiff.methods.semibaseline import PredictConfig, PseudoConfig, TeacherConfig

Path = Literal["student_features", "student_logits", "teacher_features", "teacher_logits"]


class VilaConfig(Section):
    """Vision-language dual distillation (paper, section 3.3, Eqs. 1, 2 and 12)."""

    enabled: bool = True
    lam: float = Field(0.5, ge=0)
    """λ of Eq. 1: weight of the cosine distance against the squared one (paper, Table 6)."""
    temperature: float = Field(2.0, gt=0)
    """T of Eq. 2; the paper gives none."""
    feature_reduction: Literal["mean", "sum"] = "mean"
    feature_scope: Literal["pooled", "flattened", "tokens"] = "pooled"
    gate: Literal["per_image", "per_batch", "always"] = "per_image"
    """When the fusion stream teaches the visual one: where its cross-entropy is lower, or always."""
    paths: tuple[Path, ...] = ("student_features", "student_logits", "teacher_features", "teacher_logits")
    """Arrows that are on. Student: fusion to visual inside the student. Teacher: from the teacher's streams to the student's."""
    teacher_to_visual: bool = True
    """Whether the teacher path also has the arrow teacher fusion to student visual (ours; the paper names only visual to fusion)."""
    feature_weight: float = Field(1.0, ge=0)
    logit_weight: float = Field(1.0, ge=0)
    depth: int = Field(1, ge=1, le=12)
    """Cross-attention blocks of the fusion stream, and shared reconstruction blocks."""
    width: int = Field(128, ge=8)
    heads: int = Field(4, ge=1)
    cutmix_text: Literal["both", "own"] = "both"
    """Words that a mixed image is given: its own and its partner's, or its own alone (ours)."""


class MixeConfig(Section):
    """Edge-aware mixed-noise diffusion on labels (paper, section 3.4, Eqs. 3-8 and 13)."""

    enabled: bool = True
    gaussian: bool = True
    """q_G of Table 5; off leaves its region clean."""
    flips: bool = True
    """q_C of Table 5; off leaves its region clean."""
    edge_loss: bool = True
    timesteps: int = Field(10, ge=1, le=1000)
    beta: float = Field(0.1, ge=0, le=1)
    """Probability of a flip in one step (Eq. 6)."""
    edge_bonus: float = Field(0.1, ge=0, le=1)
    """Added to ``beta`` on edge pixels, in each step."""
    flip_schedule: Literal["cumulative", "constant", "matched"] = "cumulative"
    gaussian_region: Literal["confident", "uncertain"] = "confident"
    """Which side of τ gets Gaussian noise; Eq. 7 and the sentence below it disagree."""
    tau_start: float = Field(0.0, ge=0, le=1)
    tau_end: float = Field(0.8, ge=0, le=1)
    tau_ramp: float = Field(0.5, ge=0, le=1)
    """Share of training over which τ moves from start to end."""
    tau_shape: Literal["linear", "cosine", "step"] = "linear"
    reverse: Literal["posterior", "direct"] = "posterior"
    train_on: Literal["labelled", "unlabelled", "both"] = "both"
    mu: tuple[float, float, float] = (1.0, 0.5, 0.5)
    """Weights of (L_ce, L_edge, L_d) in Eq. 11."""
    refine: bool = True
    """Whether refined labels replace the teacher's in the later part of training."""
    refine_from: float = Field(0.5, ge=0, le=1)
    refine_steps: int | None = Field(None, ge=1, le=1000)
    """Reverse steps at refinement; none means ``timesteps``."""
    denoiser: Literal["diffusion", "plain"] = "diffusion"
    """``plain``: a network of the same size that never sees noise (control)."""
    width: int = Field(64, ge=8)
    depth: int = Field(2, ge=1)
    """Residual blocks of the denoiser."""
    cond_noise: float = Field(0.1, ge=0)
    """Standard deviation of the noise on the conditioning features, in units of their own (ours)."""

    @model_validator(mode="after")
    def _check(self) -> MixeConfig:
        if self.refine_steps is not None and self.refine_steps > self.timesteps:
            raise ValueError(f"refine_steps = {self.refine_steps} is more than timesteps = {self.timesteps}")
        if len(self.mu) != 3 or min(self.mu) < 0:
            raise ValueError(f"mu = {self.mu}: three weights that are not negative, for (L_ce, L_edge, L_d)")
        if self.beta + self.edge_bonus >= 1:
            raise ValueError(
                f"beta + edge_bonus = {self.beta + self.edge_bonus:g}: must be at most (C - 1) / C for C classes"
            )
        return self


class ViLaPseudoConfig(PseudoConfig):
    source: Literal["fusion", "visual", "mean"] = "fusion"
    """The teacher stream that makes the pseudo-labels."""


class ViLaPredictConfig(PredictConfig):
    stream: Literal["visual", "fusion", "mean"] = "visual"
    """The headline stream; ``visual`` needs no text. The others are reported beside it."""


class ViLaDiffConfig(MethodConfig):
    name: Literal["viladiff"] = "viladiff"
    cutmix: bool = True
    teacher: TeacherConfig = TeacherConfig()
    pseudo: ViLaPseudoConfig = ViLaPseudoConfig()
    predict: ViLaPredictConfig = ViLaPredictConfig()
    vila: VilaConfig = VilaConfig()
    mixe: MixeConfig = MixeConfig()


class ViLaDiff(Method):
    Config = ViLaDiffConfig
