"""Weak-to-strong consistency with a moving-average teacher: the SemiBaseline of the paper's Table 5.

CutMix boxes lie on the patch grid (ours), as those of ``viladiff`` must; UniMatch's, of which they have size and shape,
lie on any pixel, as with ``data.cutmix_grid=pixel``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from viladiff.data.batch import IGNORE, Batch, Losses, Step, Views
from viladiff.losses import distributed_mean, weighted_pixel_mean
from viladiff.methods.base import (
    SHARED_THRESHOLD,
    MeanTeacher,
    MethodConfig,
    PredictConfig,
    StepCost,
    TeacherConfig,
    apply_cutmix_to,
)
from viladiff.methods.common.oracle import OraclePseudoConfig, with_truth
from viladiff.methods.common.tags import TagsConfig, of_both, shown_mean, tag_cross_entropy
from viladiff.models.segmenter import NetworkFactory


class SemiBaselineConfig(MethodConfig):
    """FixMatch-style consistency on one strong view with CutMix."""

    name: Literal["semibaseline"] = "semibaseline"
    cutmix: bool = True
    teacher: TeacherConfig = TeacherConfig()
    pseudo: OraclePseudoConfig = OraclePseudoConfig()
    tags: TagsConfig = TagsConfig()
    predict: PredictConfig = PredictConfig()


class SemiBaseline(MeanTeacher):
    Config: ClassVar[type[MethodConfig]] = SemiBaselineConfig
    embedded = SHARED_THRESHOLD
    views = Views(strong=1, cutmix=True)
    step_cost = StepCost(3, 2)
    extra_state = "teacher"

    def __init__(self, cfg: Any, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        self.tagger: nn.Linear | None = None
        if cfg.tags.weight:
            self.tagger = nn.Linear(self.student.encoder.channels[-1], build.num_classes)

    def required_views(self) -> Views:
        cfg = self.cfg
        return Views(strong=1, cutmix=cfg.cutmix, truth=cfg.pseudo.oracle != "none", tags=cfg.tags.weight > 0)

    def _pseudo(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """Return confidence and labels (U, H, W) of the teacher on the weak views."""
        confidence, labels = self.teacher.predicted(batch.weak[0]).top()
        stride = self.student.label_stride
        return with_truth(self.cfg.pseudo, step.progress, confidence, labels, batch.truth_u, stride)

    def forward(self, batch: Batch, step: Step) -> Losses:
        labelled = len(batch.image)
        with torch.no_grad():
            confidence, labels = self._pseudo(batch, step)
        strong, confidence, labels, valid = apply_cutmix_to(batch, 0, batch.strong[0], confidence, labels, batch.valid)

        features = self.student.encode(torch.cat([batch.image, strong]))
        logits = self.student.at_pixels(self.student.grid_logits(features), labels.shape[-2:])
        maps = logits.cross_entropy(torch.cat([batch.target, labels]))
        accepted = (confidence >= self.cfg.pseudo.threshold).float()
        sup = self.supervised_mean(maps[:labelled], batch.target)
        pseudo = weighted_pixel_mean(maps[labelled:], accepted, valid)
        coverage = distributed_mean((accepted * valid).sum(), valid.sum())
        parts = {"sup": sup, "pseudo": self.cfg.pseudo.weight * pseudo}
        total = parts["sup"] + parts["pseudo"]
        terms = {"sup": sup.detach(), "pseudo": pseudo.detach()}
        if self.tagger is not None:
            assert batch.tags is not None and batch.tags_u is not None  # the loader makes what required_views asks for
            tags = torch.cat([batch.tags, of_both(batch.tags_u, batch.mix[0]) if batch.mix else batch.tags_u])
            mean, seen = shown_mean(features[-1], torch.cat([batch.target != IGNORE, valid]))
            tagged = tag_cross_entropy(self.tagger(mean), tags, seen)
            parts["tags"] = self.cfg.tags.weight * tagged
            total = total + parts["tags"]
            terms["tags"] = tagged.detach()
        return Losses(total, {**terms, "coverage": coverage}, parts)
