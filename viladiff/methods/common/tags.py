"""Image tags: what captions say of an image, for a method without any network for language (ours).

L_tags = BCE(linear head on the mean of the encoder's last map, classes that the captions mention), a term of
``semibaseline`` and ``fixmatch`` where ``method.tags.weight`` is above 0. It is the control of methods that read
captions: whatever part of their gain comes from knowing what is in an image, this one can have too. Captions are of
whole images, so a class that the crop leaves out counts as there, and an image that another was pasted into has the
tags of both, as ViLaDiff gives it the words of both. A class that is not mentioned counts as absent, although captions
leave some out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from viladiff.config.base import Section
from viladiff.data.batch import CutMix
from viladiff.losses import distributed_mean


class TagsConfig(Section):
    """The loss of tags from captions."""

    weight: float = Field(0.0, ge=0)
    """Factor of the tags' cross-entropy, where the supervised loss has 1; 0 leaves it and its head out."""


def of_both(tags: Tensor, mix: CutMix) -> Tensor:
    """Join the tags (U, C) of images and their pasted partners: 1 if either is, else -1 if either is, else 0."""
    boxed = (mix.boxes[:, 2] > mix.boxes[:, 0])[:, None]
    other = torch.where(boxed, tags[mix.partner], tags)
    unknown = torch.minimum(tags, other) < 0
    return torch.where(torch.maximum(tags, other) > 0, 1.0, torch.where(unknown, -1.0, 0.0))


def shown_mean(top: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Average a map (B, D, h, w) over cells that show a pixel of ``shown`` (B, H, W) bool: (B, D), 0 where none does.

    Also returns (B,) bool, whether one does.
    """
    cells = (F.adaptive_max_pool2d(shown[:, None].float(), top.shape[-2:]) > 0).float()
    count = cells.sum((1, 2, 3))
    return (top * cells).sum((2, 3)) / count.clamp(min=1)[:, None], count > 0


def tag_cross_entropy(logits: Tensor, tags: Tensor, seen: Tensor) -> Tensor:
    """Return mean binary cross-entropy, in nats, over known tags of seen images; logits, tags (B, C), seen (B,) bool.

    Tags are 1 or 0, and -1 if unknown; the result is 0 if all are.
    """
    known = (tags >= 0) & seen[:, None]
    loss = F.binary_cross_entropy_with_logits(logits.float(), tags.clamp(min=0), reduction="none")
    return distributed_mean((loss * known).sum(), known.sum())
