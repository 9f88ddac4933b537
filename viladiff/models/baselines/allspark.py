"""AllSpark's block: channels of labelled features are rebuilt from channels of unlabelled ones, kept by class.

Tokens are (B, N, C) of the block's own width C; a channel is a map of N tokens, and it is channels that attend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.data.batch import TextBatch
from viladiff.models.encoders.base import Encoder
from viladiff.models.segmenter import Segmenter
from viladiff.models.stream import StreamOutput

if TYPE_CHECKING:
    from viladiff.config.sections import ModelConfig

Draw = Callable[[str, tuple[int, ...]], Tensor]
"""What they are for and a shape, to that many uniform numbers for each image of a batch: (B, *shape)."""


class ChannelAttention(nn.Module):
    """A = softmax(norm(Q^T K)) between channels, then V A^T and a linear layer; norm is over each whole map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, heads * width, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * width, width, bias=False)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor, source: Tensor, draw: Draw | None = None, p: float = 0.1) -> Tensor:
        """Attend from the channels of x (B, N, C) to those of source (G, S, N, C): S images and all heads together.

        G is 1 if all images of x read the same source, else B. The map is (B, h C, S h C). With ``draw``, weights of
        the map and values of the output are each dropped with probability ``p``.
        """
        keys, values = (f(source).transpose(1, 2).flatten(2) for f in (self.key, self.value))
        found = _attend(self.query(x).mT, keys, values.mT, draw, p)
        return _dropped(self.out(found.mT), draw, p)

    def within(self, x: Tensor, draw: Draw | None = None, p: float = 0.1) -> Tensor:
        """Attend from x (B, N, C) to itself, each head on its own: maps (B, h, C, C)."""
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).permute(0, 2, 3, 1) for f in (self.query, self.key, self.value))
        found = _attend(q, k.mT, v, draw, p)
        return _dropped(self.out(found.flatten(1, 2).mT), draw, p)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, draw: Draw | None, p: float) -> Tensor:
    """Attend with queries (..., R, N), keys (..., N, M), values (..., M, N): (..., R, N), float32 but for products."""
    scores = (queries @ keys).float()
    weights = F.layer_norm(scores, scores.shape[-2:]).softmax(-1)
    return _dropped(weights, draw, p, "weights").to(values.dtype) @ values


def _dropped(x: Tensor, draw: Draw | None, p: float, what: str = "answer") -> Tensor:
    """Drop each number of x (B, ...) with probability p and scale the rest by 1 / (1 - p)."""
    if draw is None or not p:
        return x
    return x * ((draw(what, tuple(x.shape[1:])) >= p) / (1 - p)).to(x.dtype)


class AllSparkBlock(nn.Module):
    """Convolution and GELU, attention with a residual, convolution and GELU: a map like the one that went in."""

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(channels, width, 1), nn.GELU())
        self.norm, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross, self.own = ChannelAttention(width, heads), ChannelAttention(width, heads)
        self.leave = nn.Sequential(nn.Conv2d(width, channels, 1), nn.GELU())

    def embed(self, top: Tensor) -> tuple[Tensor, Tensor]:
        """Map top (B, D, h, w) to tokens (B, N, C), as they are and normalised."""
        tokens = self.enter(top).flatten(2).mT
        return tokens, self.norm(tokens)

    def restore(self, tokens: Tensor, grid: torch.Size) -> Tensor:
        """Map tokens (B, N, C) to (B, D, h, w)."""
        return self.leave(self.norm_out(tokens).mT.unflatten(2, tuple(grid)))

    def forward(self, top: Tensor) -> Tensor:
        """Rebuild every image from its own channels, in any size, as in evaluation."""
        tokens, e = self.embed(top)
        return self.restore(tokens + self.cross(e, e[:, None]), top.shape[-2:])


class AllSparkSegmenter(Segmenter):
    """A segmenter with the block between encoder and decoder."""

    def __init__(self, encoder: Encoder, model: ModelConfig, num_classes: int, *, spark_width: int, heads: int) -> None:
        super().__init__(encoder, model, num_classes)
        self.spark = AllSparkBlock(encoder.channels[-1], min(spark_width, encoder.channels[-1]), heads)

    def decode(
        self, features: list[Tensor], text: TextBatch | None = None, names: tuple[str, ...] | None = None
    ) -> dict[str, StreamOutput]:
        return self.decode_rebuilt([*features[:-1], self.spark(features[-1])], text, names)

    def decode_rebuilt(
        self, features: list[Tensor], text: TextBatch | None = None, names: tuple[str, ...] | None = None
    ) -> dict[str, StreamOutput]:
        """``decode`` of maps of which the last has been through the block."""
        return super().decode(features, text, names)


def allspark_segmenter(spark_width: int, heads: int) -> Callable[[Encoder, ModelConfig, int], Segmenter]:
    """Return the constructor that ``NetworkFactory`` calls for a SparkSegmenter."""
    return partial(AllSparkSegmenter, spark_width=spark_width, heads=heads)


class SemanticMemory(nn.Module):
    """The last C channels that went to each class, each a map of N tokens: 4 K C N bytes, part of the checkpoint."""

    slots: Tensor
    """(K * C + 1, N); the last row takes what is not kept and is 0."""
    pushed: Tensor
    """(K,) channels that each class ever got."""

    def __init__(self, num_classes: int, width: int, side: int) -> None:
        super().__init__()
        self.width, self.side = width, side
        self.register_buffer("slots", torch.zeros(num_classes * width + 1, side * side))
        self.register_buffer("pushed", torch.zeros(num_classes, dtype=torch.int64))

    def read(self, grid: torch.Size, slots: Tensor | None = None) -> Tensor:
        """Return (K, N, C) tokens on that grid, or of the ``slots`` of ``placed``; 0 at positions without a channel."""
        kept = (self.slots if slots is None else slots)[:-1].unflatten(0, (-1, self.width))
        return resize_tokens(kept, (self.side, self.side), tuple(grid)).mT

    def filled(self) -> Tensor:
        """Return the share of the positions that hold a channel."""
        return self.pushed.clamp(max=self.width).float().mean() / self.width

    def push(self, channels: Tensor, classes: Tensor) -> None:
        """Append to each class its channels (R, N) in order and drop its oldest; ``classes`` (R,) int64."""
        self.slots.copy_(self.placed(channels, classes))
        self.pushed.add_(F.one_hot(classes, len(self.pushed)).sum(0))

    def placed(self, channels: Tensor, classes: Tensor) -> Tensor:
        """Return the slots as they will be after ``push``; the memory is unchanged."""
        own = F.one_hot(classes, len(self.pushed))
        rank = own.cumsum(0).gather(1, classes[:, None])[:, 0] - 1
        total = own.sum(0)
        place = classes * self.width + (self.pushed[classes] + rank) % self.width
        newest = rank >= total[classes] - self.width  # of more than a queue holds, the last
        rows = torch.where(newest, place, len(self.slots) - 1)
        slots = self.slots.index_copy(0, rows, channels.to(self.slots.dtype))
        slots[-1].zero_()
        return slots


def resize_tokens(maps: Tensor, grid: tuple[int, ...], to: tuple[int, ...]) -> Tensor:
    """Resize maps (B, C, N) from one grid to another, bilinearly."""
    if grid == to:
        return maps
    return F.interpolate(maps.unflatten(2, grid), to, mode="bilinear", align_corners=False).flatten(2)


def nearest_class(channels: Tensor, maps: Tensor) -> Tensor:
    """Return (U, C) the class whose map over the tokens is most similar to a channel's, by cosine.

    ``channels`` (U, C, N) and ``maps`` (U, K, N).
    """
    similar = F.normalize(channels.float(), dim=2) @ F.normalize(maps.float(), dim=2).mT
    return similar.argmax(2)
