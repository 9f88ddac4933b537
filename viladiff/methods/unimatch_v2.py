"""UniMatch V2: two strong views, each with the feature channels that the other lacks (Yang et al., TPAMI 2025).

L = 1/2 [L_x + 1/2 (L_s1 + L_s2)], labels from a moving-average teacher on the weak view, at confidence 0.95 on every
data set. Both streams are one pass, and a channel mask of the widest map serves the four maps, narrower ones with its
first part: the published encoder has four maps of one width. Which half of a batch keeps all its channels is drawn
within pairs of neighbours, so that it is exactly half on any number of workers; boxes come from the neighbour, where
the released code pairs the first image of a batch with the last. They lie on the patch grid, on any pixel there
(``data.cutmix_grid``).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, Losses, Step, Views
from viladiff.data.loading.device_copies import send
from viladiff.losses import distributed_mean, weighted_pixel_mean
from viladiff.methods.base import (
    SHARED_THRESHOLD,
    MeanTeacher,
    MethodConfig,
    PredictConfig,
    PseudoConfig,
    Reference,
    StepCost,
    TeacherConfig,
    apply_cutmix_to,
)
from viladiff.methods.common.published import PublishedSetting, adamw, protocol
from viladiff.models.baselines.perturbations import complementary_dropout, half_of_pairs, widest


class UniMatchV2TeacherConfig(TeacherConfig):
    momentum: float = Field(0.996, ge=0, le=1)
    """The first steps use min(momentum, 1 - 1 / (step + 1))."""


class UniMatchV2Config(MethodConfig):
    """Two strong views with CutMix and complementary channel dropout."""

    name: Literal["unimatch_v2"] = "unimatch_v2"
    cutmix: bool = True
    complementary: bool = True
    """Whether half of the images lose channels, each stream the other's; off leaves FixMatch with two strong views."""
    teacher: UniMatchV2TeacherConfig = UniMatchV2TeacherConfig()
    pseudo: PseudoConfig = PseudoConfig()
    predict: PredictConfig = PredictConfig()


class UniMatchV2(MeanTeacher):
    Config = UniMatchV2Config
    embedded = SHARED_THRESHOLD
    views = Views(strong=2, cutmix=True)
    paper = Reference("UniMatch V2: Pushing the Limit of Semi-Supervised Semantic Segmentation", "TPAMI", 2025)
    step_cost = StepCost(4, 3)
    published = (
        PublishedSetting(
            ("voc", "coco", "ade20k"),
            {"method.pseudo.threshold": 0.95, "method.teacher.momentum": 0.996},
            "UniMatch-V2 f6afb4d",
        ),
        PublishedSetting(
            ("cityscapes",),
            {"method.pseudo.threshold": 0.95, "method.teacher.momentum": 0.996, "method.ohem.enabled": True},
            "UniMatch-V2 f6afb4d",
        ),
    )
    protocols = (
        protocol(("voc",), "UniMatch-V2 f6afb4d", 518, 60.0, 16, adamw(5e-6, 40)),
        protocol(("cityscapes",), "UniMatch-V2 f6afb4d", 798, 180.0, 8, adamw(5e-6, 40)),
        protocol(("coco",), "UniMatch-V2 f6afb4d", 518, 20.0, 16, adamw(5e-6, 40)),
        protocol(("ade20k",), "UniMatch-V2 f6afb4d", 518, 60.0, 8, adamw(5e-6, 40)),
    )
    extra_state = "teacher"

    def required_views(self) -> Views:
        return Views(strong=2, cutmix=self.cfg.cutmix)

    def forward(self, batch: Batch, step: Step) -> Losses:
        labelled, unlabelled = len(batch.image), len(batch.weak[0])
        with torch.no_grad():
            confidence, labels = self.teacher.predicted(batch.weak[0]).top()
        views = [apply_cutmix_to(batch, i, x, confidence, labels, batch.valid) for i, x in enumerate(batch.strong)]

        features = self.student.encode(torch.cat([batch.image, *(view[0] for view in views)]))
        if self.cfg.complementary:
            features = self._dropped(features, labelled, batch.keys_u, step)
        logits = self.student.at_pixels(self.student.grid_logits(features), labels.shape[-2:])
        maps = logits.cross_entropy(torch.cat([batch.target, *(view[2] for view in views)]))
        mine, *streams = maps.split([labelled, unlabelled, unlabelled])

        sup = self.supervised_mean(mine, batch.target)
        accepted = [(view[1] >= self.cfg.pseudo.threshold).float() for view in views]
        parts = [
            weighted_pixel_mean(loss, weight, view[3])
            for loss, view, weight in zip(streams, views, accepted, strict=True)
        ]
        pseudo = torch.stack(parts).mean()
        coverage = distributed_mean((accepted[0] * views[0][3]).sum(), views[0][3].sum())
        weighted = self.cfg.pseudo.weight * pseudo
        terms = {"sup": sup.detach(), "pseudo": pseudo.detach(), "coverage": coverage}
        return Losses((sup + weighted) / 2, terms, {"sup": sup / 2, "pseudo": weighted / 2})

    def _dropped(self, features: list[Tensor], labelled: int, keys: tuple[int, ...], step: Step) -> list[Tensor]:
        """Return maps (B + 2 U, ...) of labelled images and both streams, these with complementary channels dropped."""
        device = features[0].device
        name = (step.seed, "complementary", step.index)
        uniform = keyed_random.uniform(keys, (widest(features),), *name, device=device)
        whole = torch.tensor(half_of_pairs(keys, step.seed, "complementary-whole", step.index))
        whole = send(whole, device)
        first, second = complementary_dropout([level[labelled:] for level in features], uniform, whole)
        return [torch.cat([level[:labelled], a, b]) for level, a, b in zip(features, first, second, strict=True)]
