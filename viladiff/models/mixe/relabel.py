"""The choice of pixels that take the refined label, and its confidence (ours; the paper replaces all of them).

Labels are passed on as class scores (B, C, H, W): the largest is the confidence, its index the label.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.data.batch import IGNORE
from viladiff.losses import all_reduce_sum
from viladiff.models.mixe.diffusion import edge_mask

LEVELS = 20
"""Equal parts of [0, 1] that a refined confidence is sorted into for its calibration."""
KEPT = 0.99
"""Share of the counts of a calibration that is kept from step to step."""

TINY = 1e-20
"""Least factor of a product, so that scores never underflow to a tie that would put class 0 in the label's place."""


def refined_pixels(teacher: Tensor, where: str, threshold: float, stride: int, valid: Tensor | None = None) -> Tensor:
    """Return (B, H, W) bool, True where the refined label replaces the teacher's.

    ``teacher`` (B, C, H, W) probabilities. ``where``: "all"; "unsure", those whose largest is below ``threshold``; or
    "edges", all pixels of the cells, ``stride`` wide, that hold a pixel on an edge of the teacher's labels. The border
    of the picture, where ``valid`` (B, H, W) bool ends, is no edge.
    """
    confidence, labels = teacher.max(1)
    if where == "unsure":
        return confidence < threshold
    if valid is not None:
        labels = labels.masked_fill(~valid, IGNORE)
    return cells_with(edge_mask(labels), stride) if where == "edges" else torch.ones_like(labels, dtype=torch.bool)


def cells_with(pixels: Tensor, stride: int) -> Tensor:
    """Return (B, H, W) bool: all pixels of each cell, ``stride`` wide, that holds one of ``pixels`` (B, H, W) bool."""
    cells = F.max_pool2d(pixels.float()[:, None], stride)
    return F.interpolate(cells, scale_factor=stride, mode="nearest")[:, 0] > 0


def relabelled(
    teacher: Tensor, refined: Tensor, where: Tensor | None, confidence: str, calibration: Calibration | None
) -> Tensor:
    """Return (B, C, H, W) class scores of the labels that training uses: refined ones in the pixels ``where``.

    ``teacher`` and ``refined`` (B, C, H, W) probabilities; ``where`` (B, H, W) bool, None is all; ``confidence`` as
    ``method.mixe.confidence``, of which "calibrated" needs ``calibration``.
    """
    scores = refined
    if confidence != "refined":
        sure, labels = refined.max(1, keepdim=True)
        if confidence == "product":
            factor = teacher.gather(1, labels).clamp_min(TINY)
        else:
            assert calibration is not None
            factor = calibration(sure) / sure
        scores = refined * factor
    return scores if where is None else torch.where(where[:, None], scores, teacher)


class Calibration(nn.Module):
    """Running precision of refined labels by their confidence, counted on labelled pixels that were left out.

    ``counts`` (2, LEVELS) are pixels and right ones, of which a share ``KEPT`` is kept from step to step; all workers
    have the same. Level k holds confidences in [k / LEVELS, (k + 1) / LEVELS), the last one 1 too.
    """

    counts: Tensor
    pending: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, LEVELS))
        # Of this step so far, over all of its micro-batches; 0 between steps.
        self.register_buffer("pending", torch.zeros(2, LEVELS), persistent=False)

    def forward(self, confidence: Tensor) -> Tensor:
        """Return the precision, of any shape, at each ``confidence``, adding one pixel of the level's middle
        confidence.
        """
        middle = (torch.arange(LEVELS, device=confidence.device) + 0.5) / LEVELS
        return ((self.counts[1] + middle) / (self.counts[0] + 1))[_level(confidence)]

    @torch.no_grad()
    def add(self, confidence: Tensor, right: Tensor, counted: Tensor) -> None:
        """Count pixels (B, H, W) of this worker by confidence, correctness of the label, and whether they count."""
        weight = counted.flatten().float()
        parts = torch.stack([weight, weight * right.flatten()])
        self.pending.index_add_(1, _level(confidence).flatten(), parts)

    @torch.no_grad()
    def after_step(self) -> None:
        """Count the pixels of all workers since the last call."""
        self.counts.mul_(KEPT).add_(all_reduce_sum(self.pending))
        self.pending.zero_()


def _level(confidence: Tensor) -> Tensor:
    return (confidence.float() * LEVELS).long().clamp(0, LEVELS - 1)
