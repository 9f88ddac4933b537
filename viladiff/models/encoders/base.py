"""The interface of encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from viladiff.data.transforms.augment import IMAGENET_MEAN, IMAGENET_STD, of_channels
from viladiff.models.batch_norm import batch_norms


class Encoder(nn.Module):
    """Contract: ``forward`` maps (B, inputs, H, W) to four maps (B, channels[i], H / strides[i], W / strides[i]).

    Where ``any_size``, a map of a side that its stride does not divide has one cell more: ceil(H / strides[i]).
    Images come in the units of batches, ImageNet's mean and standard deviation, whatever the encoder's own are.
    """

    inputs: int = 3
    """Channels of an image."""
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    any_size: bool = True
    """Whether it can do with sides that are no multiples of ``patch``; patches cut without overlap cannot."""
    frozen: bool = False
    """Whether running statistics of BatchNorm stay as they are, also in training mode."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    """Of each channel in 0..1, by which the images that its weights were learned from were normalised."""
    scale: Tensor | None
    shift: Tensor | None
    """(inputs, 1, 1) from the units of batches to the encoder's own; none where these are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", None)
        self.register_buffer("shift", None)

    @property
    def patch(self) -> int:
        """Pixels a cell of the coarsest map is wide; image sides must be multiples of it."""
        return self.strides[-1]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts; BatchNorm of a frozen encoder stays in evaluation mode."""
        super().train(mode)
        for norm in batch_norms(self) if self.frozen else ():
            norm.eval()
        return self

    def set_units(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Name the mean and standard deviation that the weights expect; those of batches change nothing.

        Both are of red, green and blue; other channels have them in turn, as batches do. Raises ValueError unless there
        are three of each and the deviations are positive.
        """
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {tuple(mean)}, std {tuple(std)}: must be three numbers each, std above 0")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        if (self.mean, self.std) != (IMAGENET_MEAN, IMAGENET_STD):
            self.scale, self.shift = unit_change(self.mean, self.std, self.inputs)

    def own_units(self, images: Tensor) -> Tensor:
        """Convert (B, inputs, H, W) from the units of batches to the encoder's; the same tensor where they agree."""
        return images if self.scale is None or self.shift is None else images * self.scale + self.shift


def unit_change(mean: Sequence[float], std: Sequence[float], channels: int = 3) -> tuple[Tensor, Tensor]:
    """Return factor and summand (channels, 1, 1) from ImageNet's units to those of ``mean`` and ``std``."""
    own_mean, own_std, to_mean, to_std = (
        torch.tensor(of_channels(x, channels)).view(-1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
    )
    return own_std / to_std, (own_mean - to_mean) / to_std
