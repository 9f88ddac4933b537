"""DPT as UniMatch-V2 has it (f6afb4d; Ranftl et al. 2021): four maps to one of 8 x 8 cells a patch, without any norm.

Source: UniMatch-V2's head for DINOv2. One thing is not as there: the residual unit that its coarsest fusion owns and
never calls is left out.
"""

from __future__ import annotations

from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.models.decoders.base import Decoder

PROJECTED = {64: (48, 96, 192, 384), 128: (96, 192, 384, 768), 256: (256, 512, 1024, 1024)}
"""Width of the decoder to the channels that the four maps are projected to: the head of DINOv2-S, -B and -L."""


class ResidualUnit(nn.Module):
    """ReLU, 3 x 3 convolution, ReLU, 3 x 3 convolution, around a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class Fusion(nn.Module):
    """A residual unit, an enlargement in which corners meet, and a 1 x 1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.unit, self.out = ResidualUnit(width), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """Map (B, width, h, w) to (B, width, *size)."""
        return self.out(F.interpolate(self.unit(x), size, mode="bilinear", align_corners=True))


class DptDecoder(Decoder):
    """Maps are brought to a quarter, a half, one and two patches a cell, then fused from coarse to fine, doubled.

    A pyramid of encoders, whose maps are at such strides already, is only projected. A cell is an eighth of a patch of
    a plain transformer: 1.75 pixels of 14, 2 of 16.
    """

    align_corners = True

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], width: int) -> None:
        super().__init__()
        if width not in PROJECTED:
            known = ", ".join(map(str, PROJECTED))
            raise ValueError(
                f"model.decoder_width = {width}: model.decoder = 'dpt' has one of {known}; nearest: "
                f"{min(PROJECTED, key=lambda known: abs(known - width))}"
            )
        factors, cell = _factors(strides)
        self.width, self.stride = width, int(cell) if cell.denominator == 1 else float(cell)
        projected = PROJECTED[width]
        self.project = nn.ModuleList([nn.Conv2d(c, p, 1) for c, p in zip(channels, projected, strict=True)])
        self.resize = nn.ModuleList([_resize(p, factor) for p, factor in zip(projected, factors, strict=True)])
        self.reduce = nn.ModuleList([nn.Conv2d(p, width, 3, padding=1, bias=False) for p in projected])
        self.lateral = nn.ModuleList([ResidualUnit(width) for _ in range(3)])
        self.fuse = nn.ModuleList([Fusion(width) for _ in range(4)])

    def laterals(self, features: list[Tensor]) -> list[Tensor]:
        """Return the three finer maps, resized and through their residual units, each (B, width, h_i, w_i)."""
        return [self.lateral[i](self._reduced(features[i], i)) for i in range(3)]

    def forward(self, top: Tensor, laterals: list[Tensor]) -> Tensor:
        """Decode top (k * B, D, h, w) for k streams with laterals (B, ...): (k * B, width, H / stride, W / stride)."""
        x = self.fuse[3](self._reduced(top, 3), laterals[2].shape[-2:])
        for i in (2, 1, 0):
            lateral = laterals[i]
            copies = x.shape[0] // lateral.shape[0]
            x = x + (lateral if copies == 1 else lateral.repeat(copies, 1, 1, 1))
            finer = laterals[i - 1].shape[-2:] if i else (2 * x.shape[-2], 2 * x.shape[-1])
            x = self.fuse[i](x, finer)
        return x

    def classifier(self, num_classes: int) -> DptClassifier:
        """Return a new classifier of the fine map alone."""
        return DptClassifier(self.width, num_classes)

    def _reduced(self, x: Tensor, level: int) -> Tensor:
        return self.reduce[level](self.resize[level](self.project[level](x)))


class DptClassifier(nn.Module):
    """3 x 3 convolution, ReLU, 1 x 1 convolution; the coarsest map is not read."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.score = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, num_classes, 1)

    def forward(self, mid: Tensor, top: Tensor) -> Tensor:
        return self.score(F.relu(self.hidden(mid)))


def _factors(strides: tuple[int, ...]) -> tuple[list[Fraction], Fraction]:
    """Return how much each map is enlarged, below 1 shrunk, and the pixels of a cell of the decoder's map.

    Raises ValueError for strides that whole steps do not bring to a doubling sequence.
    """
    finest = min(Fraction(strides[0]), Fraction(strides[-1], 4))
    factors = [stride / (finest * 2**i) for i, stride in enumerate(strides)]
    if any(1 not in (factor.numerator, factor.denominator) for factor in factors):
        raise ValueError(
            f"model.decoder = 'dpt': maps at strides {strides} cannot be brought to a doubling sequence; use light, or "
            "an encoder with strides of 4, 8, 16, 32 or of one patch"
        )
    return factors, finest / 2


def _resize(width: int, factor: Fraction) -> nn.Module:
    if factor == 1:
        return nn.Identity()
    if factor > 1:
        return nn.ConvTranspose2d(width, width, int(factor), stride=int(factor))
    return nn.Conv2d(width, width, 3, stride=factor.denominator, padding=1)
