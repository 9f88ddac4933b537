"""The interface of encoders."""

from __future__ import annotations

from torch import nn


class Encoder(nn.Module):
    """Contract: ``forward`` maps (B, 3, H, W) to four maps (B, channels[i], H / strides[i], W / strides[i])."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    any_size: bool = True
    """Whether it can do with sides that are no multiples of ``patch``; patches cut without overlap cannot."""

    @property
    def patch(self) -> int:
        """Pixels a cell of the coarsest map is wide; image sides must be multiples of it."""
        return self.strides[-1]
