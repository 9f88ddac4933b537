"""CPS: two networks that start from different heads, each taught by the other's hard labels (Chen et al., CVPR 2021).

Differences from the released code: the partner of a mixed image is its neighbour in the batch, whose labels are already
there, so that no second unlabelled batch has to be looked at (6 forwards in place of 8); padding trains nothing, nor,
without CutMix, do labelled images' pixels of label 255 teach the other network, as all do there; losses are plain
global means, where the released ones shrink with the number of workers.

No threshold leaves unsure labels out, as published: in runs of a few hundred steps on the built-in data, where early
labels are poor, they cost 1.5 to 2 points.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import IGNORE, Batch, Losses, Step, TextBatch, Views
from viladiff.data.loading.device_copies import send
from viladiff.data.transforms.mixing import pair_partner, parity_boxes, parity_mask, paste
from viladiff.losses import distributed_mean, pseudo_label_cross_entropy
from viladiff.methods.base import Method, MethodConfig, PseudoConfig, Reference, StepCost
from viladiff.methods.common.published import PublishedSetting, protocol, sgd
from viladiff.models.segmenter import Network, NetworkFactory


class CpsPseudoConfig(PseudoConfig):
    threshold: float = Field(0.0, ge=0, le=1)
    """The paper has none: every pixel of the other network's labels counts."""
    weight: float = Field(1.0, ge=0)
    """λ: 1 with CutMix on VOC, 1.5 without; 5 and 6 on Cityscapes."""


class CpsConfig(MethodConfig):
    """Cross pseudo supervision; weak views only, no colour changes."""

    name: Literal["cps"] = "cps"
    cutmix: bool = True
    """Three boxes an image; without, both networks teach each other on labelled images too."""
    pseudo: CpsPseudoConfig = CpsPseudoConfig()


class Cps(Method):
    Config = CpsConfig
    views = Views(weak=1, pairs=True)
    trains_on_weak = True
    paper = Reference("Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", "CVPR", 2021)
    step_cost = StepCost(6, 4)
    published = (
        PublishedSetting(
            ("voc",), {"method.pseudo.weight": 1.0}, "TorchSemiSeg 5e0c29c", given={"method.cutmix": True}
        ),
        PublishedSetting(
            ("voc",), {"method.pseudo.weight": 1.5}, "TorchSemiSeg 5e0c29c", given={"method.cutmix": False}
        ),
        # OHEM there keeps 50,000 pixels of each crop of 800 x 800 at least.
        PublishedSetting(
            ("cityscapes",),
            {"method.pseudo.weight": 5.0, "method.ohem.enabled": True, "method.ohem.min_kept": 0.078},
            "TorchSemiSeg 5e0c29c",
            given={"method.cutmix": True},
        ),
        PublishedSetting(
            ("cityscapes",),
            {"method.pseudo.weight": 6.0, "method.ohem.enabled": True, "method.ohem.min_kept": 0.078},
            "TorchSemiSeg 5e0c29c",
            given={"method.cutmix": False},
        ),
    )
    protocols = (
        protocol(("voc",), "TorchSemiSeg 5e0c29c", 512, batch=8, rates=sgd(2.5e-3)),
        protocol(("cityscapes",), "TorchSemiSeg 5e0c29c", 800, batch=8, rates=sgd(2e-2)),
    )
    extra_state = "second network"

    def __init__(self, cfg: CpsConfig, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        self.second = self.build_student(build)
        """Its encoder starts from the same weights; decoder and classifier are drawn anew."""

    def required_views(self) -> Views:
        return Views(weak=1, pairs=self.cfg.cutmix)

    def forward(self, batch: Batch, step: Step) -> Losses:
        nets, labelled, weak, valid = (self.student, self.second), len(batch.image), batch.weak[0], batch.valid
        if self.cfg.cutmix:
            with torch.no_grad():
                answers: list[tuple[Tensor, ...]] = [net.predicted(weak).top() for net in nets]
            partner, mask = self._boxes(batch, step)
            weak, valid = paste(weak, mask, partner), paste(valid, mask, partner)
            answers = [tuple(paste(x, mask, partner) for x in answer) for answer in answers]
        images = torch.cat([batch.image, weak])
        logits = [net.predicted(images) for net in nets]
        taught = [z[labelled:] for z in logits]
        if not self.cfg.cutmix:
            answers, taught = [z.detach().top() for z in logits], logits
            valid = torch.cat([batch.target != IGNORE, valid])

        sup = torch.stack([self.supervised(z[:labelled], batch.target) for z in logits]).sum()
        accepted = [(confidence >= self.cfg.pseudo.threshold).float() for confidence, _ in answers]
        cross = torch.stack(
            [
                pseudo_label_cross_entropy(z, answers[i][1], accepted[i], valid)
                for z, i in zip(taught, (1, 0), strict=True)
            ]
        ).sum()
        agree = distributed_mean(((answers[0][1] == answers[1][1]) * valid).sum(), valid.sum())
        terms = {"sup": sup.detach(), "pseudo": cross.detach(), "agreement": agree}
        parts = {"sup": sup, "pseudo": self.cfg.pseudo.weight * cross}
        return Losses(parts["sup"] + parts["pseudo"], terms, parts)

    def _boxes(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """Return each image's partner, and the pixels that come from it: (U,), (U, H, W)."""
        device, (height, width) = batch.valid.device, batch.valid.shape[-2:]
        rngs = [keyed_random.numpy_generator(step.seed, "cps-boxes", step.index, key) for key in batch.keys_u]
        boxes = send(parity_boxes(rngs, height), device)
        return send(pair_partner(len(rngs)), device), parity_mask(boxes, height, width)

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        """Return the labels of the second network, which teach the evaluated one."""
        return {"before": self.second(images)["visual"].softmax(1)}

    def eval_networks(self) -> dict[str, Network]:
        return {"student": self.student, "second": self.second}
