"""PseudoSeg: soft labels fused from the decoder and from class activation maps (Zou et al., ICLR 2021).

L = CE + CE of the maps' own scores + BCE of image tags, on labelled images, + soft cross-entropy of the strong view.
Its labels come from the same network on the weak view: decoder and maps, brought to one scale, averaged as
probabilities and sharpened. Every pixel counts, from the first step on.

Differences from the released code. Class maps are those of a linear classifier on mean tokens, which need no backward
pass a class (``models.sgc``), and the classifier reads the features of the passes that are made anyway: 3 in place of
5. Decoder and maps are brought to one scale image by image, where there one norm is taken over the whole batch, so that
images and workers do not depend on each other; they are fused on the decoder's grid. Norms are GroupNorm. Padding of
labelled images is known by its label 255 alone. The strong view is that of the other methods (colours change with
probability 0.8, also grey and blur), before CutOut; the place of the square is uniform within the crop. On data without
a background, class 0 takes its part (the road on Cityscapes).

The tags' gradient into the encoder, which is published so, is what holds the method back on the built-in data: at 183
labels it reaches 45.5, 47.3 where that gradient is cut, and 45.2 without any pseudo-label.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import IGNORE, Batch, Losses, Step, TextBatch, Views
from viladiff.data.loading.device_copies import send
from viladiff.data.transforms.mixing import box_mask, square_boxes
from viladiff.losses import cross_entropy, distributed_mean, weighted_pixel_mean
from viladiff.methods.base import Method, MethodConfig, PseudoConfig, Reference, StepCost
from viladiff.methods.common.published import PublishedSetting, protocol, sgd
from viladiff.models.baselines.grad_cam import Sgc, tag_loss, tagged
from viladiff.models.blocks import upsample
from viladiff.models.fused.pixel_logits import PixelLogits
from viladiff.models.segmenter import NetworkFactory


class PseudoSegPseudoConfig(PseudoConfig):
    threshold: float = Field(0.0, ge=0, le=1)
    """The paper has none: every soft label counts."""
    temperature: float = Field(0.5, gt=0)
    """Fused labels are sharpened to p^(1 / T), normalised."""


class PseudoSegConfig(MethodConfig):
    """Fused soft labels on one strong view with CutOut."""

    name: Literal["pseudoseg"] = "pseudoseg"
    cutout: float = Field(100 / 513, ge=0, lt=1)
    """Side of the square that is cut out, as a share of the crop's; 0 cuts nothing."""
    width: int = Field(128, ge=1)
    """Channels of keys and queries."""
    pseudo: PseudoSegPseudoConfig = PseudoSegPseudoConfig()


class PseudoSeg(Method):
    Config = PseudoSegConfig
    published = (
        PublishedSetting(
            ("voc", "coco"), {"method.pseudo.temperature": 0.5, "method.pseudo.threshold": 0.0}, "wss b01acaf"
        ),
    )
    protocols = (
        protocol(("voc",), "wss b01acaf", 513, batch=64, rates={"train.steps": 30_000, **sgd(7e-3)}),
        protocol(("coco",), "wss b01acaf", 513, batch=64, rates={"train.steps": 200_000, **sgd(7e-3)}),
    )
    views = Views(strong=1)
    paper = Reference("PseudoSeg: Designing Pseudo Labels for Semantic Segmentation", "ICLR", 2021)
    step_cost = StepCost(3, 2)
    extra_state = "class activation head"

    def __init__(self, cfg: PseudoSegConfig, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        self.sgc = Sgc(self.student.encoder.channels, build.num_classes, cfg.width)

    def forward(self, batch: Batch, step: Step) -> Losses:
        labelled, size = len(batch.image), batch.image.shape[-2:]
        soft = self._soft_labels(batch.weak[0], batch.valid)
        strong, valid = self._cut(batch, step)
        features = self.student.encode(torch.cat([batch.image, strong]))
        logits = self.student.at_pixels(self.student.grid_logits(features), size)
        mine, taught = logits[:labelled], logits[labelled:]

        own = [level[:labelled] for level in features]
        found = tagged(batch.target, self.student.num_classes)
        scores = PixelLogits(self.sgc(own, found.present, batch.target != IGNORE), size)
        accepted = (soft.amax(1) >= self.cfg.pseudo.threshold).float()
        terms = {
            "sup": self.supervised(mine, batch.target),
            "maps": cross_entropy(scores, batch.target),
            "tags": tag_loss(self.sgc.tags(own[-1]), found),
            "pseudo": weighted_pixel_mean(soft_cross_entropy(taught.tensor(), soft), accepted, valid),
        }
        parts = {**terms, "pseudo": self.cfg.pseudo.weight * terms["pseudo"]}
        total = parts["sup"] + parts["maps"] + parts["tags"] + parts["pseudo"]
        terms["coverage"] = distributed_mean((accepted * valid).sum(), valid.sum())
        return Losses(total, {name: value.detach() for name, value in terms.items()}, parts)

    @torch.no_grad()
    def _soft_labels(self, images: Tensor, valid: Tensor) -> Tensor:
        """Return sharpened class probabilities (U, C, H, W) of weak views (U, 3, H, W); ``valid`` (U, H, W) bool."""
        features = self.student.encode(images)
        grid = self.student.decode(features)["visual"].logits
        present = (self.sgc.tags(features[-1]) >= 0).float()  # a probability of one half
        maps = upsample(self.sgc(features, present, valid), grid.shape[-2:])
        return self.student.upsample(fuse(grid, maps, self.cfg.pseudo.temperature), images.shape[-2:])

    def _cut(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """Fill a square of the strong view with the mean colour, which is 0; remove it from the valid pixels."""
        height, width = batch.valid.shape[-2:]
        rngs = [keyed_random.numpy_generator(step.seed, "pseudoseg-cutout", step.index, key) for key in batch.keys_u]
        boxes = send(square_boxes(rngs, width, self.cfg.cutout), batch.valid.device)
        inside = box_mask(boxes, height, width)
        return batch.strong[0].masked_fill(inside[:, None], 0.0), batch.valid & ~inside

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        """Return the decoder's own prediction, and the fused one."""
        whole = torch.ones_like(images[:, 0], dtype=torch.bool)
        return {"before": self.student(images)["visual"].softmax(1), "after": self._soft_labels(images, whole)}


def fuse(logits: Tensor, maps: Tensor, temperature: float) -> Tensor:
    """Average two predictions with equal weight and sharpen: (U, C, h, w), each pixel sums to 1.

    Both (U, C, h, w) logits of an image are divided by their common root mean square first.
    """
    both = torch.stack([logits.float(), maps.float()], 1)
    both = both * torch.rsqrt(both.square().mean((1, 2, 3, 4), keepdim=True) + 1e-8)
    mean = both.softmax(2).mean(1)
    return (mean.log() / temperature).softmax(1)


def soft_cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    """Return (U, H, W) nats: - sum over classes of ``soft`` log softmax(``logits``), both (U, C, H, W)."""
    return F.cross_entropy(logits.float(), soft, reduction="none")
