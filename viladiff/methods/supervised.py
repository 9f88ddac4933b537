"""Training on the labelled images alone: the floor that every other method is compared with."""

from __future__ import annotations

from typing import Literal

from viladiff.data.batch import Batch, Losses, Step, Views
from viladiff.methods.base import Method, MethodConfig, StepCost
from viladiff.methods.common.published import PublishedSetting, adamw, protocol


class SupervisedConfig(MethodConfig):
    """Nothing of its own to choose: cross-entropy on labelled pixels (paper, Eq. 10)."""

    name: Literal["supervised"] = "supervised"


class Supervised(Method):
    Config = SupervisedConfig
    views = Views(weak=0)
    step_cost = StepCost(1, 1)
    published = tuple(
        PublishedSetting((dataset,), {"train.epoch_images": images, **hard}, "UniMatch-V2 f6afb4d, supervised.py")
        for dataset, images, hard in (
            ("voc", 3000, {}),
            ("cityscapes", 3000, {"method.ohem.enabled": True}),
            ("ade20k", 6000, {}),
            ("coco", 30_000, {}),
        )
    )
    # Twice the labelled images of a step with unlabelled ones.
    protocols = (
        protocol(("voc",), "UniMatch-V2 f6afb4d", 518, 60.0, 32, adamw(5e-6, 40)),
        protocol(("cityscapes",), "UniMatch-V2 f6afb4d", 798, 180.0, 16, adamw(5e-6, 40)),
        protocol(("coco",), "UniMatch-V2 f6afb4d", 518, 20.0, 32, adamw(5e-6, 40)),
        protocol(("ade20k",), "UniMatch-V2 f6afb4d", 518, 60.0, 16, adamw(5e-6, 40)),
    )

    def forward(self, batch: Batch, step: Step) -> Losses:
        loss = self.supervised(self.student.predicted(batch.image), batch.target)
        return Losses(loss, {"sup": loss.detach()}, {"sup": loss})
