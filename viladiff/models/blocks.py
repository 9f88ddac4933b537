"""Transformer blocks that the small encoder and ViLa share."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.models.fused.norms import added_and_normed, normed

SMALL = 48
"""Longest side of a map that a CPU enlarges by matrix products, two to three times faster there both ways."""


class Attention(nn.Module):
    """Multi-head attention from one set of tokens to another; to itself when no other is given."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not divisible by {heads} heads")
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from x (B, N, D) to other (B, L, D); mask (B, L) bool is False at tokens that must not be read."""
        source = x if other is None else other
        batch, tokens, dim = x.shape
        q = self.query(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(source).view(batch, source.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return self.out(attended.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Sequential):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))


class DropPath(nn.Module):
    """Skips a residual branch for whole images at random while training (stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand((x.shape[0], *[1] * (x.ndim - 1)), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class SelfBlock(nn.Module):
    """Pre-norm transformer block on (B, N, D)."""

    def __init__(self, dim: int, heads: int, ratio: int = 4, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm_attention, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), Mlp(dim, ratio)
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        read = self.drop(self.attention(normed(self.norm_attention, x)))
        x, inner = added_and_normed(self.norm_mlp, x, read)
        return x + self.drop(self.mlp(inner))


class CrossBlock(nn.Module):
    """Pre-norm block in which image tokens (B, N, D) read words (B, L, D), residually."""

    def __init__(self, dim: int, heads: int, ratio: int = 2) -> None:
        super().__init__()
        self.norm_attention, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), Mlp(dim, ratio)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        read = self.attention(normed(self.norm_attention, x), words, mask)
        x, inner = added_and_normed(self.norm_mlp, x, read)
        found: Tensor = x + self.mlp(inner)
        return found


def sincos_2d(h: int, w: int, dim: int, device: torch.device) -> Tensor:
    """Return fixed positions of an h x w grid: (h * w, dim), a quarter of it each for sine and cosine of y and x.

    Raises ValueError if dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"positions need a width that is a multiple of 4, got {dim}")
    rate = 1e-4 ** (torch.arange(dim // 4, device=device) / (dim // 4))
    y = (torch.arange(h, device=device)[:, None] * rate)[:, None].expand(h, w, -1)
    x = (torch.arange(w, device=device)[:, None] * rate)[None].expand(h, w, -1)
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=-1).reshape(h * w, dim)


def bilinear(x: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """Resize (B, C, h, w) to ``size`` = (H, W), pixel centres at half-integers, edges replicated.

    One number that is not finite makes all of its map NaN where matrix products enlarge it, its neighbourhood
    elsewhere.
    """
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or max(x.shape[-2:]) > SMALL
    plain = plain or type(x) is not Tensor  # a fake one's weights would be fake, and are kept
    if plain or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
    rows, columns = _weights(x.shape[-2], size[0]), _weights(x.shape[-1], size[1])
    return rows @ (x @ columns.mT)


def upsample(logits: Tensor, size: torch.Size | tuple[int, ...], align_corners: bool = False) -> Tensor:
    """Resize grid logits (B, C, h, w) to pixels, bilinearly; ``align_corners`` as in F.interpolate."""
    if align_corners:
        return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=True)
    return bilinear(logits, size)


def resampled(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bring a map (B, C, h, w) to ``size``: means over what a cell covers where it shrinks, else bilinearly.

    A map of that size is returned as it is.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if size[0] <= x.shape[-2] and size[1] <= x.shape[-1]:
        return F.interpolate(x, tuple(size), mode="area")
    return bilinear(x, size)


def cell_means(pixels: Tensor, stride: float) -> Tensor:
    """Average pixels (B, H, W) float over cells ``stride`` wide: (B, H / stride, W / stride).

    Where a cell is no whole number of pixels, those that its edges cut count in full in both cells.
    """
    if isinstance(stride, int):
        return F.avg_pool2d(pixels[:, None], stride)[:, 0]
    height, width = (round(side / stride) for side in pixels.shape[-2:])
    return F.adaptive_avg_pool2d(pixels[:, None], (height, width))[:, 0]


def at_cells(pixels: Tensor, stride: float) -> Tensor:
    """Pick the pixel (B, H, W) at the upper left corner of each cell ``stride`` wide: (B, H / stride, W / stride)."""
    if isinstance(stride, int):
        return pixels[:, ::stride, ::stride]
    rows, columns = (
        (torch.arange(round(side / stride), device=pixels.device) * stride).long() for side in pixels.shape[-2:]
    )
    return pixels[:, rows[:, None], columns]


@lru_cache(maxsize=64)
def _weights(source: int, length: int) -> Tensor:
    """Return (length, source) weight of each source in each result along one axis."""
    with torch.inference_mode(False), torch.no_grad():
        # Whatever device and type are the default now: the weights are kept.
        unit = torch.eye(source, dtype=torch.float32, device="cpu").unsqueeze(1)
        return F.interpolate(unit, length, mode="linear", align_corners=False)[:, 0].T.contiguous()
