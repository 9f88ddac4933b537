"""Self-attention Grad-CAM (PseudoSeg): evidence of tokens for classes, spread to similar tokens.

With a classifier on the mean of all tokens, the gradient that Grad-CAM asks for is that classifier's weight, over the
number of tokens: all maps are one product, without a backward pass and without a loop over classes.

Memory beside the encoder's, counted of one image with 32 x 32 tokens of 768 channels, in float32: 27 MB at most, 20 MB
kept for the way back, with 81 classes; 26 and 18 MB with 21. It goes into the attention (N²) and the columns that it
reads, hardly into the classes. What grows with them is the soft label of ``pseudoseg``: (C, H, W) at full size, 85 MB
for 81 classes at 512 x 512, as large as the logits that learn it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.data.batch import IGNORE
from viladiff.losses import distributed_mean

MASKED = -1e9
"""Score of a token in padding; finite, so that an image without a valid token attends to all alike."""


class Sgc(nn.Module):
    """Tags of an image, and scores of its tokens that are made of these tags' maps alone.

    Class 0 is the background, which has no tag: where no other class is found.
    """

    def __init__(self, channels: tuple[int, ...], num_classes: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.tag = nn.Linear(channels[-1], num_classes - 1)
        self.query, self.key = (nn.Conv2d(sum(channels[-2:]), width, 1) for _ in range(2))
        self.score = nn.Sequential(nn.Conv2d(num_classes, num_classes, 1), nn.GroupNorm(1, num_classes))

    def tags(self, top: Tensor) -> Tensor:
        """Return logits (B, C - 1) of the foreground classes' presence in the image, from the last map (B, D, h, w)."""
        return self.tag(top.mean((2, 3))).float()

    def forward(self, features: list[Tensor], present: Tensor, valid: Tensor) -> Tensor:
        """Return logits (B, C, h, w) on the grid of the last map.

        ``features`` are the encoder's maps, ``present`` (B, C - 1) the foreground classes in the image, 0 or 1,
        ``valid`` (B, H, W) bool, False in padding. No gradient reaches the encoder or the tags from here.
        """
        lower, top = (level.detach() for level in features[-2:])
        maps = class_maps(top, self.tag.weight.detach(), present)
        grid = (top.shape[-2], top.shape[-1])
        columns = torch.cat([F.adaptive_avg_pool2d(lower, grid), top], 1)
        counted = F.adaptive_max_pool2d(valid.float()[:, None], grid).flatten(1) > 0
        return self.score(spread_maps(maps, attention(self.query(columns), self.key(columns), counted))).float()


def class_maps(top: Tensor, weight: Tensor, present: Tensor) -> Tensor:
    """Return Grad-CAM of a classifier on mean tokens, each map divided by its highest: (B, K, h, w) in [0, 1].

    ``top`` (B, D, h, w), ``weight`` (K, D), ``present`` (B, K) 0 or 1: a map of 0 for an absent class.
    """
    maps = torch.einsum("bdhw,kd->bkhw", top, weight).float().relu() * present[..., None, None]
    highest = maps.amax((2, 3), keepdim=True)
    return maps / torch.where(highest > 0, highest, 1.0)


def attention(query: Tensor, key: Tensor, counted: Tensor) -> Tensor:
    """Return softmax(Q^T K / sqrt(width)), (B, N, N), row n over the tokens that n reads.

    Maps (B, width, h, w), counted (B, N).
    """
    scores = query.flatten(2).mT @ key.flatten(2) / query.shape[1] ** 0.5
    return scores.float().masked_fill(~counted[:, None], MASKED).softmax(2)


def spread_maps(maps: Tensor, a: Tensor) -> Tensor:
    """Return s = A m + m for each class map (B, K, h, w), preceded by the background, 2 - max s: (B, K + 1, h, w)."""
    own = maps + (maps.flatten(2) @ a.to(maps.dtype).mT).view_as(maps)
    return torch.cat([2 - own.amax(1, keepdim=True), own], 1)


class Tagged(NamedTuple):
    """The image tags of a mask."""

    present: Tensor
    """(B, C - 1) float, 1 for a foreground class with a pixel in it."""
    known: Tensor
    """(B,) bool, False for a picture without a labelled pixel."""


def tagged(target: Tensor, num_classes: int) -> Tagged:
    """Return the tags of ``target`` (B, H, W) int64, 255 where unknown."""
    flat = target.flatten(1)
    seen = torch.zeros(len(flat), IGNORE + 1, device=target.device).scatter_(1, flat, 1.0)
    return Tagged(seen[:, 1:num_classes], (flat != IGNORE).any(1))


def tag_loss(scores: Tensor, found: Tagged) -> Tensor:
    """Return binary cross-entropy, a mean over classes and over the images of all workers that have a label."""
    loss = F.binary_cross_entropy_with_logits(scores, found.present, reduction="none").mean(1)
    return distributed_mean((loss * found.known).sum(), found.known.sum())
