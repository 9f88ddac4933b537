"""Logits of pixels that are read by their cross-entropy and their most probable class alone, wherever that is cheaper.

The loss functions (``viladiff.losses``) take them in place of logits (B, C, H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor

from viladiff.losses import pixel_cross_entropy
from viladiff.models.blocks import upsample
from viladiff.models.fused.pixel_loss import grid_cross_entropy, grid_top, stays_on_grid


class PixelLogits:
    """Grid logits (B, C, h, w) seen at pixels of ``size`` = (H, W).

    Where one operation reads the loss of the grid (``pixel_loss``) nothing is enlarged before it is asked for.
    Elsewhere all images are enlarged at once, and parts of them are slices, so that numbers are torch's bit for bit.
    """

    def __init__(
        self,
        grid: Tensor,
        size: torch.Size | tuple[int, ...],
        align_corners: bool = False,
        enlarged: Tensor | None = None,
    ) -> None:
        self.grid, self.size, self.align_corners = grid, size, align_corners
        if enlarged is None and not stays_on_grid(grid):
            enlarged = upsample(grid, size, align_corners)
        self._enlarged = enlarged

    def __len__(self) -> int:
        return len(self.grid)

    def __getitem__(self, images: slice) -> PixelLogits:
        return self._part(self.grid[images], None if self._enlarged is None else self._enlarged[images])

    def split(self, counts: int | list[int]) -> list[PixelLogits]:
        """Return parts of so many images each, in order."""
        grids = self.grid.split(counts)
        wholes = [None] * len(grids) if self._enlarged is None else self._enlarged.split(counts)
        return [self._part(grid, whole) for grid, whole in zip(grids, wholes, strict=True)]

    def channels(self, count: int) -> PixelLogits:
        """Return the first ``count`` channels."""
        return self._part(self.grid[:, :count], None if self._enlarged is None else self._enlarged[:, :count])

    def detach(self) -> PixelLogits:
        """Return the same without a gradient."""
        return self._part(self.grid.detach(), None if self._enlarged is None else self._enlarged.detach())

    def tensor(self) -> Tensor:
        """Return all enlarged logits (B, C, H, W)."""
        return upsample(self.grid, self.size, self.align_corners) if self._enlarged is None else self._enlarged

    def cross_entropy(self, target: Tensor) -> Tensor:
        """Return (B, H, W) nats, 0 where ``target`` (B, H, W) is 255. Raises ValueError for unlike batches."""
        if self._enlarged is None:
            return grid_cross_entropy(self.grid, target, self.align_corners)
        return pixel_cross_entropy(self._enlarged, target)

    @torch.no_grad()
    def top(self, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return probability and index (B, H, W) of the most probable class; no gradient.

        ``factor`` (C,), above 0, multiplies the classes' probabilities, which are normalised again.
        """
        if self._enlarged is None:
            shifted = self.grid if factor is None else self.grid + factor.log().view(-1, 1, 1)
            return grid_top(shifted, self.size, self.align_corners)
        probabilities = self._enlarged.softmax(1)
        found = (probabilities if factor is None else reweighted(probabilities, factor)).max(1)
        return found.values, found.indices

    @torch.no_grad()
    def classes(self) -> Tensor:
        """Return the index (B, H, W) of the highest logit."""
        return self.top()[1] if self._enlarged is None else self._enlarged.argmax(1)

    def _part(self, grid: Tensor, enlarged: Tensor | None) -> PixelLogits:
        return PixelLogits(grid, self.size, self.align_corners, enlarged)


def reweighted(probabilities: Tensor, factor: Tensor) -> Tensor:
    """Multiply class probabilities (B, C, H, W) by ``factor`` (C,) and normalise again."""
    scaled = probabilities * factor.view(-1, 1, 1)
    return scaled / scaled.sum(1, keepdim=True)
