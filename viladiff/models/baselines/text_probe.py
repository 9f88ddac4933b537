"""The network of the paper's section 3.2: image tokens read a caption, and class queries' attention maps are masks.

W is the width of the tokens, C the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from viladiff.config.base import Section
from viladiff.data.batch import TextBatch
from viladiff.models.blocks import CrossBlock
from viladiff.models.encoders.base import Encoder
from viladiff.models.segmenter import Segmenter
from viladiff.models.stream import StreamOutput
from viladiff.models.vila import prepend_null_token

if TYPE_CHECKING:
    from viladiff.config.sections import ModelConfig


class ProbeConfig(Section):
    """The layers between the encoder's last tokens and the masks."""

    text: bool = True
    """Whether there is a cross-attention to the caption at all; with ``data.captions=none`` it reads a null token."""
    width: int = Field(64, ge=8)
    """W; sized for the built-in data, to be raised at paper scale."""
    heads: int = Field(4, ge=1)
    """Of the attention to words; the maps that are masks have one."""
    depth: int = Field(1, ge=1, le=12)
    """Blocks in which the tokens read the words."""


class ClassQueryHead(nn.Module):
    """Tokens read words, classes attend to tokens."""

    align_corners = any_size = False

    def __init__(self, dim: int, num_classes: int, text_dim: int, cfg: ProbeConfig) -> None:
        super().__init__()
        self.project = nn.Linear(dim, cfg.width)
        self.norm = nn.LayerNorm(cfg.width)
        self.key = nn.Linear(cfg.width, cfg.width)
        self.queries = nn.Parameter(torch.randn(num_classes, cfg.width))
        # Made after the rest, so that the shared part starts from the same weights with and without text.
        self.reads_text = cfg.text
        if cfg.text:
            self.words = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, cfg.width))
            self.null = nn.Parameter(torch.zeros(1, 1, cfg.width))
            nn.init.trunc_normal_(self.null, std=0.02)
            self.inject = nn.ModuleList([CrossBlock(cfg.width, cfg.heads) for _ in range(cfg.depth)])

    def tokens(self, top: Tensor, text: TextBatch | None = None) -> dict[str, Tensor]:
        """Map the encoder's last map (B, D, h, w) to normalised tokens (B, h * w, W) that classes attend to.

        ``after`` reading the texts, and ``before``: the tokens without it. Without text the null token is read; without
        the attention there is ``after`` alone.
        """
        x = self.project(top.flatten(2).transpose(1, 2))
        if not self.reads_text:
            return {"after": self.norm(x)}
        before = x
        words, mask = prepend_null_token(self.null, self.words, text, len(x))
        for block in self.inject:
            x = block(x, words, mask)
        return {"before": self.norm(before), "after": self.norm(x)}

    def forward(self, top: Tensor, text: TextBatch | None = None) -> StreamOutput:
        """Return the stream; its middle map is that of the keys (B, W, h, w), its logits are float32."""
        grid, x = top.shape[-2:], self.tokens(top, text)["after"]
        keys = self.key(x)
        maps = attention_maps(self.queries, keys).float()
        return StreamOutput(x, keys.transpose(1, 2).unflatten(2, grid), maps.unflatten(2, grid))


class Probe(Segmenter):
    """An encoder and ``Masks``. Stream ``fusion`` reads the caption, ``visual`` the null token alone."""

    def __init__(
        self, encoder: Encoder, model: ModelConfig, num_classes: int, *, text_dim: int, cfg: ProbeConfig
    ) -> None:
        """Build the network; ``model`` is not used, since the head has its own width."""
        nn.Module.__init__(self)
        self.num_classes, self.encoder = num_classes, encoder
        self.vila = self.classifier_fusion = None
        self.decoder: ClassQueryHead = ClassQueryHead(encoder.channels[-1], num_classes, text_dim, cfg)  # type: ignore[assignment]

    @property
    def names(self) -> tuple[str, ...]:
        """Streams that this network has; the first needs no text."""
        return ("visual", "fusion") if self.decoder.reads_text else ("visual",)

    def decode(
        self, features: list[Tensor], text: TextBatch | None = None, names: tuple[str, ...] | None = None
    ) -> dict[str, StreamOutput]:
        """Return the streams as a segmenter does, from the coarsest map alone."""
        names = self.names if names is None else names
        return {name: self.decoder(features[-1], text if name == "fusion" else None) for name in names}


def attention_maps(queries: Tensor, keys: Tensor) -> Tensor:
    """Score classes' queries (C, W) on tokens' keys (B, N, W): q · k / √W as (B, C, N), before any softmax.

    In attention the softmax goes over tokens; a mask is a choice among classes, so its softmax goes over these.
    """
    return torch.einsum("cw,bnw->bcn", queries, keys) / queries.shape[1] ** 0.5


def probe(text_dim: int, cfg: ProbeConfig) -> Callable[[Encoder, ModelConfig, int], Segmenter]:
    """Return the constructor that ``NetworkFactory`` calls for a text probe."""
    return partial(Probe, text_dim=text_dim, cfg=cfg)
