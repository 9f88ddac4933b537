"""A control for MixE (ours): labels are refined by smoothing along the image, without noise.

A joint bilateral filter whose distances are learned (after Tomasi and Manduchi 1998; Petschnigg et al. 2004): a pixel's
probabilities become a mean of its neighbours', weighted by the similarity of the two in the image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.core.distributed import full_precision

WINDOW = 5
"""Side, in cells, of the square that a filter averages over."""
KEYS = 8
"""Channels that neighbours are compared by."""


class Guided(nn.Module):
    """Probabilities of the teacher and the picture to logits of the clean class, on the label grid.

    ``stride`` is the side of a cell in pixels, ``width`` the channels of what reads the picture, ``depth`` the
    number of passes of the filter. At first the labels stay nearly as they are.
    """

    def __init__(self, num_classes: int, stride: int, width: int, depth: int) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, width, stride, stride)
        norms = [nn.GroupNorm(math.gcd(width, 8), width) for _ in range(2)]
        self.body = nn.Sequential(norms[0], nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), norms[1])
        self.keys = nn.Conv2d(width, KEYS, 1)
        near = torch.zeros(depth, WINDOW**2)
        near[:, WINDOW**2 // 2] = 4.0
        self.near = nn.Parameter(near)
        self.sharpness = nn.Parameter(torch.zeros(()))
        self.correct = nn.Conv2d(width + num_classes, num_classes, 3, padding=1)
        for parameter in self.correct.parameters():
            nn.init.zeros_(parameter)

    def forward(self, soft: Tensor, image: Tensor) -> Tensor:
        """Return (B, C, h, w) float32 logits from ``soft`` (B, C, h, w) probabilities and ``image`` (B, 3, H, W)."""
        seen = self.body(self.cells(image))
        with full_precision(soft.device):
            distance = _distances(self.keys(seen.float()))
            probs = soft.detach().float()
            for near in self.near:
                weight = (near[None, :, None, None] - distance).softmax(1)
                probs = (_windows(probs) * weight[:, None]).sum(2)
            logits = probs.clamp_min(1e-6).log() * self.sharpness.exp()
        return logits + self.correct(torch.cat([F.silu(seen), probs.to(seen.dtype)], 1)).float()


def _windows(x: Tensor) -> Tensor:
    """Return (B, D, WINDOW², h, w): each cell's neighbours, zeros outside the map."""
    return F.unfold(x, WINDOW, padding=WINDOW // 2).unflatten(2, x.shape[-2:]).unflatten(1, (x.shape[1], WINDOW**2))


def _distances(keys: Tensor) -> Tensor:
    """Return (B, WINDOW², h, w) squared distance of each cell's keys to its neighbours'; infinite outside the map."""
    distance = (_windows(keys) - keys[:, :, None]).square().sum(1)
    inside = _windows(torch.ones_like(keys[:1, :1]))[:, 0] > 0
    return distance.masked_fill(~inside, torch.inf)
