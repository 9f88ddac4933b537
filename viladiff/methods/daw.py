"""DAW: UniMatch with aligned class distributions and an estimated threshold (Sun et al., NeurIPS 2023).

Views, losses and weights are UniMatch's. Before a label is read, the probabilities of unlabelled pixels are multiplied
by the ratio of two running averages, of each class's confidence on labelled and on unlabelled images. A label counts
above the confidence at which two Gaussians cross, one fitted to right and one to wrong predictions on labelled pixels.
A moving average of the student is kept for evaluation alone.

Differences from the released code, which cannot run as it is (its data set gives no map of ignored labelled pixels):
labelled pixels of label 255 are left out; a step reads the statistics of the steps before it and adds its own when it
is done, summed over all workers and micro-batches; equal variances, where the quadratic has no such root, give the
midpoint; running values are saved; CutMix boxes lie on the patch grid, on any pixel there (``data.cutmix_grid``), as
what else differs in UniMatch. Which of student and average is quoted is ``predict.network``, never the better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from viladiff.data.batch import IGNORE, Batch, Step, TextBatch, Views
from viladiff.losses import all_reduce_sum
from viladiff.methods.base import MeanTeacher, MethodConfig, PredictConfig, PseudoConfig, Reference, TeacherConfig
from viladiff.methods.common.published import PublishedSetting, protocol, sgd
from viladiff.methods.unimatch import UniMatch
from viladiff.models.fused.pixel_logits import PixelLogits, reweighted
from viladiff.models.segmenter import NetworkFactory

ENOUGH = 10
"""Right, or wrong, labelled pixels below which a step tells nothing of their confidence."""


class DawTeacherConfig(TeacherConfig):
    """The moving average that is evaluated; it teaches nothing."""

    momentum: float = Field(0.999, ge=0, le=1)


class DawPseudoConfig(PseudoConfig):
    threshold: float = Field(0.95, ge=0, le=1)
    """Where the threshold starts; it is estimated from the first step on."""


class DawConfig(MethodConfig):
    """UniMatch's fields, and the momentum of the running values."""

    name: Literal["daw"] = "daw"
    cutmix: bool = True
    strong_weight: float = Field(0.5, ge=0)
    feature_weight: float = Field(0.5, ge=0)
    feature_dropout: float = Field(0.5, ge=0, lt=1)
    momentum: float = Field(0.99, ge=0, le=1)
    """Of class distributions and of the two Gaussians."""
    distribution_alignment: bool = True
    adaptive_threshold: bool = True
    """Off keeps the first threshold."""
    teacher: DawTeacherConfig = DawTeacherConfig()
    pseudo: DawPseudoConfig = DawPseudoConfig()
    predict: PredictConfig = PredictConfig()


class Daw(UniMatch, MeanTeacher):
    Config = DawConfig
    embedded: ClassVar[Mapping[str, object]] = {}  # the threshold is estimated from the first step on
    published = (
        PublishedSetting(("voc",), {"method.teacher.momentum": 0.999}, "DAW 3d1e093"),
        PublishedSetting(
            ("cityscapes",), {"method.teacher.momentum": 0.999, "method.ohem.enabled": True}, "DAW 3d1e093"
        ),
    )
    protocols = (
        protocol(("voc",), "DAW 3d1e093", 513, 80.0, 8, sgd(1e-3, 10)),
        protocol(("cityscapes",), "DAW 3d1e093", 801, 240.0, 8, sgd(5e-3, 1)),
    )
    views = Views(strong=2, cutmix=True)
    paper = Reference(
        "DAW: Exploring the Better Weighting Function for Semi-supervised Semantic Segmentation", "NeurIPS", 2023
    )
    extra_state = "average for evaluation, class distributions, two Gaussians"
    distributions: Tensor
    """(2, C) mean confidence of the pixels predicted as a class, on labelled and on unlabelled images."""
    gaussians: Tensor
    """(2, 2) mean and variance of the confidence of right and of wrong predictions."""
    tau: Tensor

    def __init__(self, cfg: DawConfig, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        classes = build.num_classes
        self.register_buffer("distributions", torch.full((2, classes), 1 / classes))
        self.register_buffer("gaussians", torch.tensor([[1 / classes, 0.5]] * 2))
        self.register_buffer("tau", torch.tensor(float(cfg.pseudo.threshold)))
        self._sums: list[Tensor] = []

    def pseudo_label(self, mine: PixelLogits, clean: PixelLogits, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            own, known, classes = mine.top(), batch.target != IGNORE, self.student.num_classes
            self._sums.append(
                torch.cat(
                    [
                        class_confidence(*own, known, classes).flatten(),
                        class_confidence(*clean.top(), batch.valid, classes).flatten(),
                        right_and_wrong(*own, batch.target).flatten(),
                    ]
                )
            )
        return *clean.top(self._factor()), self.tau

    def _factor(self) -> Tensor | None:
        """Return what multiplies each class's probability (C,), with alignment."""
        if not self.cfg.distribution_alignment:
            return None
        labelled, unlabelled = self.distributions
        return labelled / unlabelled

    def after_step(self, step: Step) -> None:
        super().after_step(step)
        if not self._sums:
            return
        classes, keep = self.distributions.shape[1], self.cfg.momentum
        sums = all_reduce_sum(torch.stack(self._sums).sum(0))
        self._sums = []
        count, total = sums[: 4 * classes].view(2, 2, classes).unbind(1)
        seen = torch.where(count > 0, total / count.clamp(min=1), self.distributions)
        self.distributions.lerp_(seen, 1 - keep)
        self.gaussians.copy_(moved(self.gaussians, sums[4 * classes :].view(2, 3), keep))
        if self.cfg.adaptive_threshold:
            right, wrong = self.gaussians
            self.tau.copy_(crossing(right, wrong, 1 / classes))

    def running_stats(self) -> dict[str, Tensor]:
        (right, spread), (wrong, spread_wrong) = self.gaussians
        return {
            "tau": self.tau.clone(),
            "right": right.clone(),
            "wrong": wrong.clone(),
            "right_std": spread.sqrt(),
            "wrong_std": spread_wrong.sqrt(),
        }

    def threshold(self) -> float:
        return float(self.tau)

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        probabilities, factor = self.student(images)["visual"].softmax(1), self._factor()
        return {"before": probabilities if factor is None else reweighted(probabilities, factor)}


def class_confidence(confidence: Tensor, labels: Tensor, counted: Tensor, num_classes: int) -> Tensor:
    """Return (2, C): pixels predicted as each class, and the sum of their confidence.

    ``confidence`` and ``labels`` of the most probable class and ``counted``, bool, are (B, H, W).
    """
    sums = torch.zeros(2, num_classes, device=labels.device)
    terms = torch.stack([counted.float(), confidence.float() * counted]).flatten(1)
    return sums.scatter_add_(1, labels.flatten().expand(2, -1), terms)


def right_and_wrong(confidence: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Return (2, 3): right and wrong pixels, the sum of their conflict_weight 1 - p, and of its square.

    Label 255 is neither. ``confidence`` and ``labels`` of the most probable class, and ``target``, are (B, H, W).
    1 - p is near 0 where confidence is near 1, so that its variance survives float32.
    """
    conflict_weight = 1 - confidence.float()
    groups = torch.stack([labels == target, (labels != target) & (target != IGNORE)]).float().flatten(1)
    powers = torch.stack([torch.ones_like(conflict_weight), conflict_weight, conflict_weight.square()]).flatten(1)
    return groups @ powers.T


def moved(gaussians: Tensor, sums: Tensor, momentum: float) -> Tensor:
    """Update means and variances (2, 2) with a step's ``sums`` (2, 3) of ``right_and_wrong``, if there are enough."""
    count, conflict_weight, square = sums.unbind(1)
    mean = conflict_weight / count.clamp(min=1)
    variance = (square / count.clamp(min=1) - mean.square()).clamp(min=0)
    seen = torch.stack([1 - mean, variance], 1)
    return torch.where((count >= ENOUGH)[:, None], gaussians.lerp(seen, 1 - momentum), gaussians)


def crossing(right: Tensor, wrong: Tensor, lowest: float) -> Tensor:
    """Return the confidence in [lowest, 1] at which the densities of two Gaussians, (mean, variance) each, are equal.

    Of A t² + B t + C = 0 the root with + lies between the means; equal variances leave a line, whose root is their
    midpoint. B² - 4AC = 4 v w ((m - n)² + (v - w) ln(v / w)) is never negative. Float64, as A may be nearly 0.
    """
    (m, v), (n, w) = right.double(), wrong.double()
    v, w = v.clamp(min=1e-12), w.clamp(min=1e-12)
    a, b = v - w, 2 * (m * w - n * v)
    inside = 4 * v * w * ((m - n).square() + a * (v / w).log())
    level = a.abs() < 1e-9 * (v + w)
    root = (inside.sqrt() - b) / (2 * torch.where(level, 1.0, a))
    return torch.where(level, (m + n) / 2, root).clamp(lowest, 1).to(right.dtype)
