"""UniMatch: two strong views and one with dropped channels learn the student's own labels (Yang et al., CVPR 2023).

L = 1/2 [L_x + 1/4 L_s1 + 1/4 L_s2 + 1/2 L_fp]; the labels are the student's, detached, on the clean weak view, at
confidence 0.95; a loss is divided by all pixels outside the padding. There is no teacher.

Differences from the released code: the image that a box comes from is the neighbour in the batch, never another crop of
the same image as there, and its labels are those already at hand, which saves a forward pass without a gradient (with
BatchNorm they are of training mode here and of evaluation mode there; without it drop-path alone tells them apart);
labelled images, whose perturbed half the released code throws away, are not perturbed; all views are one pass. One
channel mask serves the four maps of an image. CutMix boxes lie on the patch grid, on any pixel there
(``data.cutmix_grid``).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, Losses, Step, TextBatch, Views
from viladiff.losses import distributed_mean, pseudo_label_cross_entropy
from viladiff.methods.base import (
    SHARED_THRESHOLD,
    Method,
    MethodConfig,
    PseudoConfig,
    Reference,
    StepCost,
    apply_cutmix_to,
)
from viladiff.methods.common.published import PublishedSetting, protocol, sgd
from viladiff.models.baselines.perturbations import channel_dropout, widest
from viladiff.models.fused.pixel_logits import PixelLogits


class UniMatchConfig(MethodConfig):
    """Weights of the terms within L = 1/2 [...]; the pseudo-label threshold is 0 on Cityscapes."""

    name: Literal["unimatch"] = "unimatch"
    cutmix: bool = True
    strong_weight: float = Field(0.5, ge=0)
    """Of both strong views together."""
    feature_weight: float = Field(0.5, ge=0)
    """Of the weak view with dropped channels."""
    feature_dropout: float = Field(0.5, ge=0, lt=1)
    """Probability that a channel is dropped."""
    pseudo: PseudoConfig = PseudoConfig()


class UniMatch(Method):
    Config: ClassVar[type[MethodConfig]] = UniMatchConfig
    embedded = SHARED_THRESHOLD
    views = Views(strong=2, cutmix=True)
    trains_on_weak = True
    paper = Reference("Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation", "CVPR", 2023)
    step_cost = StepCost(4, 4, 1, 1)
    published: ClassVar[tuple[PublishedSetting, ...]] = (
        PublishedSetting(("voc", "coco"), {"method.pseudo.threshold": 0.95}, "UniMatch 0324f3d"),
        PublishedSetting(
            ("cityscapes",), {"method.pseudo.threshold": 0.0, "method.ohem.enabled": True}, "UniMatch 0324f3d"
        ),
    )
    protocols: ClassVar[tuple[PublishedSetting, ...]] = (
        protocol(("voc",), "UniMatch 0324f3d", 321, 80.0, 8, sgd(1e-3, 10)),
        protocol(("voc",), "UniMatch, CVPR 2023", 513, 80.0, 8, sgd(1e-3, 10))._replace(
            families=("aug_cps", "aug_u2pl")
        ),
        protocol(("cityscapes",), "UniMatch 0324f3d", 801, 240.0, 8, sgd(5e-3, 1)),
        protocol(("coco",), "UniMatch 0324f3d", 513, 30.0, 8, sgd(4e-3, 10)),
    )

    def required_views(self) -> Views:
        return Views(strong=2, cutmix=self.cfg.cutmix)

    def forward(self, batch: Batch, step: Step) -> Losses:
        cfg, labelled, unlabelled = self.cfg, len(batch.image), len(batch.weak[0])
        strong = [apply_cutmix_to(batch, i, x)[0] for i, x in enumerate(batch.strong)]
        features = self.student.encode(torch.cat([batch.image, batch.weak[0], *strong]))
        weak = [level[labelled : labelled + unlabelled] for level in features]
        uniform = keyed_random.uniform(
            batch.keys_u, (widest(weak),), step.seed, "feature-dropout", step.index, device=weak[0].device
        )
        perturbed = channel_dropout(weak, uniform, cfg.feature_dropout)
        joined = [torch.cat(pair) for pair in zip(features, perturbed, strict=True)]
        logits = self.student.at_pixels(self.student.grid_logits(joined), batch.image.shape[-2:])
        mine, clean, first, second, dropped = logits.split([labelled, *[unlabelled] * 4])

        confidence, labels, threshold = self.pseudo_label(mine.detach(), clean.detach(), batch)
        accepted, valid = self.pixel_weight(confidence, threshold, batch.valid), batch.valid
        sup = self.supervised(mine, batch.target)
        streams = [
            pseudo_label_cross_entropy(z, *apply_cutmix_to(batch, i, labels, accepted, valid))
            for i, z in enumerate((first, second))
        ]
        strong_loss = torch.stack(streams).mean()
        feature_loss = pseudo_label_cross_entropy(dropped, labels, accepted, valid)
        unsup = cfg.strong_weight * strong_loss + cfg.feature_weight * feature_loss
        weights = {"pseudo": cfg.strong_weight, "feature": cfg.feature_weight}
        added, more, own = self.extra_loss(batch, step, features, (first, second, dropped))
        total = (sup + cfg.pseudo.weight * unsup) / 2 + added
        coverage = distributed_mean((accepted * valid).sum(), valid.sum())
        terms = {"sup": sup, "pseudo": strong_loss, "feature": feature_loss, "coverage": coverage}
        halves = {name: cfg.pseudo.weight * weight / 2 * terms[name] for name, weight in weights.items()}
        logged = {name: value.detach() for name, value in (terms | more | self.running_stats()).items()}
        return Losses(total, logged, {"sup": sup / 2, **halves, **own})

    def pseudo_label(
        self, mine: PixelLogits, clean: PixelLogits, batch: Batch
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return confidence and labels (U, H, W) of the weak views and the lowest confidence that counts.

        ``mine`` (B, C, H, W) are the logits of the labelled images, ``clean`` (U, C, H, W) those of the weak views.
        """
        confidence, labels = clean.top()
        return confidence, labels, self.cfg.pseudo.threshold

    def pixel_weight(self, confidence: Tensor, threshold: float | Tensor, valid: Tensor) -> Tensor:
        """Return the weight (U, H, W) of each pixel's label, by its confidence (U, H, W)."""
        return (confidence >= threshold).float()

    def extra_loss(
        self, batch: Batch, step: Step, features: list[Tensor], streams: tuple[PixelLogits, ...]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return an extra loss, its terms and its weighted parts; zero here, for subclasses.

        ``features`` are the encoder's maps of labelled, weak and both strong views, ``streams`` the logits
        (U, C, H, W) of the strong views and of the weak one with dropped channels.
        """
        return features[0].new_zeros((), dtype=torch.float32), {}, {}

    def running_stats(self) -> dict[str, Tensor]:
        """Return running values for the log; none here."""
        return {}

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        return {"before": self.student(images)["visual"].softmax(1)}
