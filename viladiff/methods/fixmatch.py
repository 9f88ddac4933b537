"""FixMatch with a moving-average teacher, as UniMatch V2 compares itself with (Yang et al., TPAMI 2025).

The step is that of ``semibaseline``, the first row of the paper's Table 5. Two things differ: the teacher's momentum is
0.996 there and 0.99 in the paper, and the total is halved, which AdamW undoes but for its epsilon and for clipping.

Differences from the released code: CutMix boxes lie on the patch grid, on any pixel there (``data.cutmix_grid``).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from viladiff.data.batch import Batch, Losses, Step
from viladiff.methods.base import MethodConfig, PredictConfig, Reference, TeacherConfig
from viladiff.methods.common.oracle import OraclePseudoConfig
from viladiff.methods.common.published import PublishedSetting, adamw, protocol
from viladiff.methods.common.tags import TagsConfig
from viladiff.methods.semibaseline import SemiBaseline


class FixMatchTeacherConfig(TeacherConfig):
    momentum: float = Field(0.996, ge=0, le=1)
    """UniMatch V2's; the first steps use min(momentum, 1 - 1 / (step + 1))."""


class FixMatchConfig(MethodConfig):
    """One strong view with CutMix, no perturbed features."""

    name: Literal["fixmatch"] = "fixmatch"
    cutmix: bool = True
    teacher: FixMatchTeacherConfig = FixMatchTeacherConfig()
    pseudo: OraclePseudoConfig = OraclePseudoConfig()
    tags: TagsConfig = TagsConfig()
    predict: PredictConfig = PredictConfig()


class FixMatch(SemiBaseline):
    Config = FixMatchConfig
    paper = Reference("FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", "NeurIPS", 2020)
    published = (
        PublishedSetting(
            ("voc", "coco", "ade20k"),
            {"method.pseudo.threshold": 0.95, "method.teacher.momentum": 0.996},
            "UniMatch-V2 f6afb4d, fixmatch.py",
        ),
        PublishedSetting(
            ("cityscapes",),
            {"method.pseudo.threshold": 0.95, "method.teacher.momentum": 0.996, "method.ohem.enabled": True},
            "UniMatch-V2 f6afb4d, fixmatch.py",
        ),
    )
    protocols = (
        protocol(("voc",), "UniMatch-V2 f6afb4d", 518, 60.0, 16, adamw(5e-6, 40)),
        protocol(("cityscapes",), "UniMatch-V2 f6afb4d", 798, 180.0, 8, adamw(5e-6, 40)),
        protocol(("coco",), "UniMatch-V2 f6afb4d", 518, 20.0, 16, adamw(5e-6, 40)),
        protocol(("ade20k",), "UniMatch-V2 f6afb4d", 518, 60.0, 8, adamw(5e-6, 40)),
    )

    def forward(self, batch: Batch, step: Step) -> Losses:
        losses = super().forward(batch, step)
        return Losses(losses.total / 2, losses.terms, {name: part / 2 for name, part in losses.parts.items()})
