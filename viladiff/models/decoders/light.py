"""A light DPT-like head: four encoder maps to one map at the output stride, without BatchNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from viladiff.models.blocks import bilinear
from viladiff.models.decoders.base import Decoder
from viladiff.models.fused.norms import norm_act


class Classifier(nn.Module):
    """Scores from the decoder's fine map plus scores straight from the coarse one.

    The short way from the encoder's most semantic features to the classes is learned from few labels and few steps; the
    decoder is left with the outlines.
    """

    def __init__(self, coarse: int, fine: int, num_classes: int) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(fine, num_classes, 1), nn.Conv2d(coarse, num_classes, 1)

    def forward(self, mid: Tensor, top: Tensor) -> Tensor:
        return self.fine(mid) + bilinear(self.coarse(top), mid.shape[-2:])


class Refine(nn.Module):
    """Residual GroupNorm, ReLU, 3 x 3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        norm, _, convolution = self.body
        assert isinstance(norm, nn.GroupNorm)
        found: Tensor = x + convolution(norm_act(norm, x, "relu"))
        return found


class LightDecoder(Decoder):
    """Brings level i to stride ``output_stride * 2 ** i``, never coarser than the encoder's top; adds from coarse to
    fine.

    The three finer levels do not depend on the stream, so ``laterals`` is computed once for both streams.
    """

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.stride, self.coarse = output_stride(strides), channels[-1]
        self.width = width
        targets = [min(self.stride * 2**i, max(strides)) for i in range(4)]
        self.reshape = nn.ModuleList(
            [_resize(c, width, s, t) for c, s, t in zip(channels, strides, targets, strict=True)]
        )
        self.fuse = nn.ModuleList([Refine(width) for _ in range(4)])
        self.norm = nn.GroupNorm(8, width)

    def laterals(self, features: list[Tensor]) -> list[Tensor]:
        """Project the three finer levels to their target strides, each (B, width, h_i, w_i)."""
        return [reshape(level) for reshape, level in zip(self.reshape[:3], features[:3], strict=True)]

    def forward(self, top: Tensor, laterals: list[Tensor]) -> Tensor:
        """Decode top (k * B, D, h, w) for k streams with laterals (B, ...): (k * B, width, H / stride, W / stride)."""
        x = self.fuse[3](self.reshape[3](top))
        for fuse, lateral in zip(list(self.fuse[:3])[::-1], laterals[::-1], strict=True):
            if x.shape[-2:] != lateral.shape[-2:]:
                x = bilinear(x, lateral.shape[-2:])
            copies = x.shape[0] // lateral.shape[0]
            x = fuse(x + (lateral if copies == 1 else lateral.repeat(copies, 1, 1, 1)))
        return norm_act(self.norm, x, "relu", torch.float32)

    def classifier(self, num_classes: int) -> Classifier:
        """Return a new classifier of the decoder's map and the coarsest one."""
        return Classifier(self.coarse, self.width, num_classes)


def output_stride(strides: tuple[int, ...]) -> int:
    """Return the pixels of a cell of the decoder's map: 4, the encoder's finest if less, or 7 for patches of 14.

    A cell must be whole pixels and a patch whole cells, since boxes are cut out of maps of both. Raises ValueError for
    patches that neither fits.
    """
    fine = min(4, strides[0])
    found = next((stride for stride in (fine, 7) if max(strides) % stride == 0), None)
    if found is None:
        raise ValueError(
            f"model.encoder: cells of {max(strides)} pixels; the decoder needs a multiple of {fine} or of 7"
        )
    return found


def _resize(inputs: int, width: int, stride: int, target: int) -> nn.Module:
    if stride > target:
        factor = stride // target
        return nn.Sequential(nn.Conv2d(inputs, width, 1), nn.ConvTranspose2d(width, width, factor, stride=factor))
    return nn.Conv2d(inputs, width, 3, stride=target // stride, padding=1)
