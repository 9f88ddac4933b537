"""SemiVL's decoder: a similarity map for each class's text, decoded class by class, with attention between classes.

T is the width of the text vectors, K the number of classes, W the decoder's width (128 as published). Norms are
GroupNorm with 16 channels a group, so a class's map is done alike in any batch.

Differences from the released code: maps are resized without aligned corners, cells at a border that fill no whole token
are pooled all the same, and which of the encoder's maps join follows their sizes (``skip_levels``: of a plain
transformer the third and the first of four, where there the outputs of blocks 5 and 1 join).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from viladiff.config.base import Section
from viladiff.data.batch import TextBatch
from viladiff.models.blocks import SelfBlock
from viladiff.models.encoders.base import Encoder
from viladiff.models.fused.norms import NormActs
from viladiff.models.segmenter import Segmenter
from viladiff.models.stream import StreamOutput

if TYPE_CHECKING:
    from viladiff.config.sections import ModelConfig

POOL = 4
"""Cells along each side that share one token of a semantic transformer."""


class VlDecoderConfig(Section):
    """Its width is ``model.decoder_width``."""

    dilations: tuple[int, ...] = Field((6, 12, 18), min_length=1)
    """Of the 3 x 3 convolutions that read a class's map, beside a 1 x 1 one and the map's mean."""
    transformers: int = Field(2, ge=0)
    classes_per_chunk: int = Field(21, ge=1)
    """Classes decoded at a time. Where there are more, only the maps between the stages are kept for the backward pass
    and the rest is computed again, chunk by chunk: time for memory."""


class Aspp(nn.Module):
    """x + ReLU(norm(.)) of parallel convolutions of several reaches and the mean, joined."""

    def __init__(self, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        near = _conv(width, width, 1)
        far = [_conv(width, width, 3, dilation) for dilation in dilations]
        self.branches = nn.ModuleList([NormActs(*layers) for layers in (near, *far)])
        self.mean = NormActs(*_conv(width, width, 1))
        self.join = NormActs(*_conv((len(self.branches) + 1) * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x (B, W, h, w), same shape out; the residual passes unchanged, negative values too."""
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand_as(x)
        return x + self.join(torch.cat([*(branch(x) for branch in self.branches), mean], 1))


class SemanticBlock(nn.Module):
    """At each place of a pooled grid the classes are the tokens; each brings its map and its text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = SelfBlock(2 * width, 4, ratio=2)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Apply the block to x (B, K, W, h, w) with the projected texts ``words`` (K, W)."""
        classes, width = x.shape[1:3]
        pooled = F.avg_pool2d(x.flatten(0, 1), POOL, ceil_mode=True, count_include_pad=False)
        tokens = pooled.unflatten(0, (-1, classes)).permute(0, 3, 4, 1, 2)  # (B, h', w', K, W)
        beside = words.to(tokens.dtype).expand_as(tokens)
        seen = self.block(torch.cat([tokens, beside], -1).flatten(0, 2))[..., :width]
        maps = seen.reshape(tokens.shape).permute(0, 3, 4, 1, 2).flatten(0, 1)
        fine = F.interpolate(maps, x.shape[-2:], mode="bilinear", align_corners=False)
        return x + fine.unflatten(0, (-1, classes))


class Up(nn.Module):
    """Twice the size; a map of the encoder joins, the same for all classes."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose2d(inputs, inputs - skip, 2, stride=2)
        self.join = NormActs(*_conv(inputs, outputs), *_conv(outputs, outputs))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Upsample x (B, k, inputs, h, w) of k classes and join skip (B, ..., 2 h, 2 w)."""
        classes = x.shape[1]  # a number also in an exported graph, where the batch is free
        repeated = skip[:, None].expand(-1, classes, -1, -1, -1).flatten(0, 1)
        return self.join(torch.cat([self.grow(x.flatten(0, 1)), repeated], 1)).unflatten(0, (-1, classes))


class VlDecoder(nn.Module):
    """Similarity maps, class-wise ASPP, semantic transformers, twice up: (B, K, 4 h, 4 w) from a top map of h x w."""

    align_corners = any_size = False
    class_texts: Tensor
    """(K, T) unit vectors, part of the state."""

    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        width: int,
        class_texts: Tensor,
        cfg: VlDecoderConfig,
    ) -> None:
        super().__init__()
        self.chunk, self.width = cfg.classes_per_chunk, width
        text_dim, half, quarter = class_texts.shape[1], max(8, width // 2), max(8, width // 4)
        self.register_buffer("class_texts", class_texts)
        self.to_text = nn.Conv2d(channels[-1], text_dim, 1)
        self.embed = nn.Conv2d(1, width, 7, padding=3)
        self.aspp = Aspp(width, cfg.dilations)
        self.text = nn.Sequential(nn.Linear(text_dim, width), nn.ReLU()) if cfg.transformers else nn.Identity()
        self.blocks = nn.ModuleList([SemanticBlock(width) for _ in range(cfg.transformers)])
        first, second = max(4, width // 4), max(4, width // 8)
        self.levels = skip_levels(strides)
        self.skips = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(channels[level], size, 3, padding=1), nn.ReLU())
                for level, size in zip(self.levels, (first, second), strict=True)
            ]
        )
        self.ups = nn.ModuleList([Up(width, first, half), Up(half, second, quarter)])
        self.score = nn.Conv2d(quarter, 1, 3, padding=1)

    def dense(self, top: Tensor) -> Tensor:
        """Map the encoder's last map (B, D, h, w) to the space of the texts, at length 1: (B, T, h, w) float32."""
        return F.normalize(self.to_text(top).float(), dim=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Map the encoder's four maps to float32 logits."""
        maps = similarity(self.dense(features[-1]), self.class_texts)
        height, width = maps.shape[-2:]
        x = torch.cat([self._chunked(self._read, part) for part in maps.split(self.chunk, 1)], 1)
        words = self.text(self.class_texts)  # one projection, which all blocks read
        for block in self.blocks:
            x = block(x, words)
        skips = [
            _fitted(skip(features[level]), (scale * height, scale * width))
            for skip, level, scale in zip(self.skips, self.levels, (2, 4), strict=True)
        ]
        return torch.cat([self._chunked(self._grow, part, *skips) for part in x.split(self.chunk, 1)], 1).float()

    def _chunked(self, stage: Callable[..., Tensor], *given: Tensor) -> Tensor:
        if len(self.class_texts) <= self.chunk or not torch.is_grad_enabled():
            return stage(*given)
        # Nothing in a stage is drawn, so there is no state of a generator to bring back.
        found: Tensor = checkpoint(stage, *given, use_reentrant=False, preserve_rng_state=False)
        return found

    def _read(self, maps: Tensor) -> Tensor:
        """Map (B, k, h, w) to (B, k, W, h, w)."""
        return self.aspp(self.embed(maps.flatten(0, 1)[:, None])).unflatten(0, (-1, maps.shape[1]))

    def _grow(self, x: Tensor, *skips: Tensor) -> Tensor:
        """Map (B, k, W, h, w) to (B, k, 4 h, 4 w)."""
        classes = x.shape[1]
        for up, skip in zip(self.ups, skips, strict=True):
            x = up(x, skip)
        return self.score(x.flatten(0, 1))[:, 0].unflatten(0, (-1, classes))


class VlSegmenter(Segmenter):
    """Encoder and ``VlDecoder``; the streams are those of a segmenter without ViLa."""

    def __init__(
        self, encoder: Encoder, model: ModelConfig, num_classes: int, *, class_texts: Tensor, cfg: VlDecoderConfig
    ) -> None:
        nn.Module.__init__(self)
        self.num_classes, self.encoder = num_classes, encoder
        self.vila = self.classifier_fusion = None
        self.decoder: VlDecoder = VlDecoder(  # type: ignore[assignment]
            encoder.channels, encoder.strides, model.decoder_width, class_texts, cfg
        )

    def decode(
        self, features: list[Tensor], text: TextBatch | None = None, names: tuple[str, ...] | None = None
    ) -> dict[str, StreamOutput]:
        """Return the streams; the middle map is the dense one in the space of the texts."""
        top = features[-1]
        return {"visual": StreamOutput(top.flatten(2).mT, self.decoder.dense(top), self.decoder(features))}


def vl_segmenter(class_texts: Tensor, cfg: VlDecoderConfig) -> Callable[[Encoder, ModelConfig, int], Segmenter]:
    """Return the constructor that ``NetworkFactory`` calls for a VlSegmenter."""
    return partial(VlSegmenter, class_texts=class_texts, cfg=cfg)


def similarity(dense: Tensor, texts: Tensor) -> Tensor:
    """Return cosines (B, M, h, w) of unit maps (B, T, h, w) and unit texts (M, T)."""
    return torch.einsum("bthw,mt->bmhw", dense, texts)


def skip_levels(strides: Sequence[int]) -> tuple[int, int]:
    """Return which of the three finer maps are nearest to a half and to a quarter of the top one's cells.

    In a tie, as all are in a plain transformer, the deepest joins first and the shallowest last.
    """
    found = [
        min(range(3), key=lambda i, wanted=wanted, sign=sign: (abs(math.log2(strides[i] / wanted)), sign * i))  # type: ignore[misc]
        for wanted, sign in ((strides[-1] / 2, -1), (strides[-1] / 4, 1))
    ]
    return found[0], found[1]


def _fitted(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _norm(width: int) -> nn.GroupNorm:
    """Return a norm with 16 channels a group, or the smallest number above it that divides the width."""
    groups = max(count for count in range(1, max(1, width // 16) + 1) if width % count == 0)
    return nn.GroupNorm(groups, width)


def _conv(inputs: int, outputs: int, kernel: int = 3, dilation: int = 1) -> tuple[nn.Module, ...]:
    """Return convolution without a bias, norm, ReLU; the size of the map stays."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
    return conv, _norm(outputs), nn.ReLU()
