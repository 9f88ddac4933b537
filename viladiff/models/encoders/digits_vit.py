"""The conv-stem ViT of the built-in data sets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from viladiff.models.blocks import SelfBlock
from viladiff.models.encoders.base import Encoder


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(width, width, 1), nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x + self.body(x))


class DigitsViT(Encoder):
    """A ViT on 8 x 8 patches behind a residual convolutional stem, whose stages serve as the finer maps.

    The stem is deeper than is usual, since attention alone learns shapes slowly from a few thousand small images.
    """

    def __init__(self, dim: int = 128, depth: int = 2, heads: int = 4, drop_path: float = 0.0, inputs: int = 3) -> None:
        super().__init__()
        self.inputs = inputs
        self.channels, self.strides = (32, 64, dim, dim), (2, 4, 8, 8)
        self.stem = nn.ModuleList(
            [
                _conv(inputs, 32, 2),
                nn.Sequential(_conv(32, 64, 2), ResidualBlock(64)),
                nn.Sequential(_conv(64, dim, 2), ResidualBlock(dim)),
            ]
        )
        self.positions = nn.Parameter(torch.zeros(1, dim, 8, 8))
        nn.init.trunc_normal_(self.positions, std=0.02)
        rates = [drop_path * (i + 1) / depth for i in range(depth)]
        self.blocks = nn.Sequential(*[SelfBlock(dim, heads, drop_path=rate) for rate in rates])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.stem[0](x)
        middle = self.stem[1](fine)
        grid = self.stem[2](middle)
        positions: Tensor = self.positions
        if grid.shape[-2:] != positions.shape[-2:]:
            positions = nn.functional.interpolate(positions, grid.shape[-2:], mode="bicubic", align_corners=False)
        tokens = self.norm(self.blocks((grid + positions).flatten(2).transpose(1, 2)))
        return [fine, middle, grid, tokens.transpose(1, 2).reshape_as(grid)]


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(8, outputs), nn.ReLU())
