"""The interface of encoders."""

from __future__ import annotations

from typing import Self

from torch import nn

from viladiff.models.batch_norm import batch_norms


class Encoder(nn.Module):
    """Contract: ``forward`` maps (B, 3, H, W) to four maps (B, channels[i], H / strides[i], W / strides[i]).

    Where ``any_size``, a map of a side that its stride does not divide has one cell more: ceil(H / strides[i]).
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    any_size: bool = True
    """Whether it can do with sides that are no multiples of ``patch``; patches cut without overlap cannot."""
    frozen: bool = False
    """Whether running statistics of BatchNorm stay as they are, also in training mode."""

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
