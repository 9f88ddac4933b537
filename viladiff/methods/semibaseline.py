"""Weak-to-strong consistency with a moving-average teacher: the SemiBaseline of the paper's Table 5.

CutMix boxes lie on the patch grid (ours), as those of ``viladiff`` must; UniMatch's, of which they have size and shape,
lie on any pixel, as with ``data.cutmix_grid=pixel``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from viladiff.batch import Batch, Losses, Step, Views
from viladiff.losses import global_mean, hard_consistency
from viladiff.methods.base import MeanTeacher, MethodConfig, Passes, PredictConfig, TeacherConfig, pasted
from viladiff.methods.oracle import OraclePseudoConfig, with_truth


class SemiBaselineConfig(MethodConfig):
    """FixMatch-style consistency on one strong view with CutMix."""

    name: Literal["semibaseline"] = "semibaseline"
    cutmix: bool = True
    teacher: TeacherConfig = TeacherConfig()
    pseudo: OraclePseudoConfig = OraclePseudoConfig()
    predict: PredictConfig = PredictConfig()


class SemiBaseline(MeanTeacher):
    Config: ClassVar[type[MethodConfig]] = SemiBaselineConfig
    views = Views(strong=1, cutmix=True)
    passes = Passes(3, 2)
    keeps = "teacher"

    def views_wanted(self) -> Views:
        return Views(strong=1, cutmix=self.cfg.cutmix, truth=self.cfg.pseudo.oracle != "none")

    def _pseudo(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """Confidence and labels (U, H, W) of the teacher on the weak views."""
        confidence, labels = self.teacher(batch.weak[0])["visual"].softmax(1).max(1)
        stride = self.student.decoder.stride
        return with_truth(self.cfg.pseudo, step.progress, confidence, labels, batch.truth_u, stride)

    def forward(self, batch: Batch, step: Step) -> Losses:
        labelled = len(batch.image)
        with torch.no_grad():
            confidence, labels = self._pseudo(batch, step)
        strong, confidence, labels, valid = pasted(batch, 0, batch.strong[0], confidence, labels, batch.valid)

        logits = self.student(torch.cat([batch.image, strong]))["visual"]
        accepted = (confidence >= self.cfg.pseudo.threshold).float()
        sup = self.supervised(logits[:labelled], batch.target)
        pseudo = hard_consistency(logits[labelled:], labels, accepted, valid)
        coverage = global_mean((accepted * valid).sum(), valid.sum())
        parts = {"sup": sup, "pseudo": self.cfg.pseudo.weight * pseudo}
        terms = {"sup": sup.detach(), "pseudo": pseudo.detach(), "coverage": coverage}
        return Losses(parts["sup"] + parts["pseudo"], terms, parts)
