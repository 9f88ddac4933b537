"""FixMatch with image tags: what captions say of an image, for a method without any network for language (ours).

L = FixMatch's + weight · BCE(linear head on the mean of the encoder's last map, classes that the captions mention).
It is the control of methods that read captions: whatever part of their gain comes from knowing what is in an image,
this one can have too. Captions are of whole images, so a class that the crop leaves out counts as there, and an image
that another was pasted into has the tags of both, as ViLaDiff gives it the words of both. A class that is not
mentioned counts as absent, although captions leave some out. The weight was not tuned. CutMix boxes lie on the patch
grid unless ``data.cutmix_grid`` says otherwise, as in FixMatch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from viladiff.batch import IGNORE, Batch, CutMix, Losses, Step, Views
from viladiff.losses import global_mean, hard_consistency
from viladiff.methods.base import pasted
from viladiff.methods.fixmatch import FixMatch, FixMatchConfig
from viladiff.models.segmenter import Build


class FixMatchTagsConfig(FixMatchConfig):
    """FixMatch and tags from captions."""

    name: Literal["fixmatch_tags"] = "fixmatch_tags"  # type: ignore[assignment]
    tag_weight: float = Field(1.0, ge=0)
    """Factor of the tags' cross-entropy."""


class FixMatchTags(FixMatch):
    Config = FixMatchTagsConfig
    views = Views(strong=1, cutmix=True, tags=True)
    paper = None  # type: ignore[assignment]  # ours
    keeps = "teacher, tag head"

    def __init__(self, cfg: FixMatchTagsConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.tagger = nn.Linear(self.student.encoder.channels[-1], build.num_classes)

    def views_wanted(self) -> Views:
        return replace(super().views_wanted(), tags=True)

    def forward(self, batch: Batch, step: Step) -> Losses:
        assert batch.tags is not None and batch.tags_u is not None  # the loader makes what views_wanted asks for
        labelled = len(batch.image)
        with torch.no_grad():
            confidence, labels = self._pseudo(batch, step)
        strong, confidence, labels, valid = pasted(batch, 0, batch.strong[0], confidence, labels, batch.valid)

        features = self.student.encode(torch.cat([batch.image, strong]))
        logits = self.student.logits(features, strong.shape[-2:])
        accepted = (confidence >= self.cfg.pseudo.threshold).float()
        sup = self.supervised(logits[:labelled], batch.target)
        pseudo = hard_consistency(logits[labelled:], labels, accepted, valid)

        tags = torch.cat([batch.tags, of_both(batch.tags_u, batch.mix[0]) if batch.mix else batch.tags_u])
        mean, seen = shown_mean(features[-1], torch.cat([batch.target != IGNORE, valid]))
        tagged = tag_cross_entropy(self.tagger(mean), tags, seen)
        terms = {"sup": sup, "pseudo": pseudo, "tags": tagged}
        terms["coverage"] = global_mean((accepted * valid).sum(), valid.sum())
        weighted = self.cfg.pseudo.weight * pseudo, self.cfg.tag_weight * tagged
        total = (sup + weighted[0]) / 2 + weighted[1]
        parts = {"sup": sup / 2, "pseudo": weighted[0] / 2, "tags": weighted[1]}
        return Losses(total, {name: value.detach() for name, value in terms.items()}, parts)


def of_both(tags: Tensor, mix: CutMix) -> Tensor:
    """Tags (U, C) of pictures that have a box of their partner: 1 if either is, else -1 if either is, else 0."""
    boxed = (mix.boxes[:, 2] > mix.boxes[:, 0])[:, None]
    other = torch.where(boxed, tags[mix.partner], tags)
    unknown = torch.minimum(tags, other) < 0
    return torch.where(torch.maximum(tags, other) > 0, 1.0, torch.where(unknown, -1.0, 0.0))


def shown_mean(top: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, D) of a map (B, D, h, w) over cells that show a pixel of ``shown`` (B, H, W) bool; 0 where none does.

    And (B,) bool, whether one does.
    """
    cells = (F.adaptive_max_pool2d(shown[:, None].float(), top.shape[-2:]) > 0).float()
    count = cells.sum((1, 2, 3))
    return (top * cells).sum((2, 3)) / count.clamp(min=1)[:, None], count > 0


def tag_cross_entropy(logits: Tensor, tags: Tensor, seen: Tensor) -> Tensor:
    """Mean binary cross-entropy, in nats, over known tags of seen images; logits and tags (B, C), seen (B,) bool.

    Tags are 1 or 0, and -1 where they are not known; 0 where none is.
    """
    known = (tags >= 0) & seen[:, None]
    loss = F.binary_cross_entropy_with_logits(logits.float(), tags.clamp(min=0), reduction="none")
    return global_mean((loss * known).sum(), known.sum())
