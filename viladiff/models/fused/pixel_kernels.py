"""Triton kernels of ``pixel_loss``: cross-entropy and most probable class of grid logits enlarged to pixels.

No enlarged logits are in memory: each program interpolates the classes of its pixels from the grid, one after the
other. Grid logits are (B, C, h, w) float32, pixels (B, H, W). The scale of an axis is grid cells a pixel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
IGNORED = tl.constexpr(255)


@triton.jit
def _source(place: Any, scale: Any, cells: Any, ALIGN: tl.constexpr) -> Any:
    """Return the two cells of an axis that a pixel lies between, and the share of the second."""
    at = place.to(tl.float32) * scale if ALIGN else (place.to(tl.float32) + 0.5) * scale - 0.5
    at = tl.maximum(at, 0.0)
    first = tl.minimum(at.to(tl.int32), cells - 1)
    second = tl.minimum(first + 1, cells - 1)
    return first, second, at - first.to(tl.float32)


@triton.jit
def _between(grid: Any, y0: Any, y1: Any, fy: Any, x0: Any, x1: Any, fx: Any, w: Any, mask: Any) -> Any:
    upper = tl.load(grid + y0 * w + x0, mask, 0.0) * (1 - fx) + tl.load(grid + y0 * w + x1, mask, 0.0) * fx
    lower = tl.load(grid + y1 * w + x0, mask, 0.0) * (1 - fx) + tl.load(grid + y1 * w + x1, mask, 0.0) * fx
    return upper * (1 - fy) + lower * fy


@triton.jit
def _loss_kernel(
    grid: Any, target: Any, loss: Any, lse: Any, classes: Any, h: Any, w: Any, height: Any, width: Any,
    sy: Any, sx: Any, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    pixel, image = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask = pixel < height * width
    y0, y1, fy = _source(pixel // width, sy, h, ALIGN)
    x0, x1, fx = _source(pixel % width, sx, w, ALIGN)
    wanted = tl.load(target + image * height * width + pixel, mask, 255)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    own = tl.zeros([BLOCK], tl.float32)
    for c in range(classes):
        value = _between(grid + (image * classes + c) * h * w, y0, y1, fy, x0, x1, fx, w, mask)
        higher = tl.maximum(most, value)
        total = total * tl.exp(most - higher) + tl.exp(value - higher)
        most = higher
        own = tl.where(wanted == c, value, own)
    summed = most + tl.log(total)
    tl.store(lse + image * height * width + pixel, summed, mask)
    tl.store(loss + image * height * width + pixel, tl.where(wanted == IGNORED, 0.0, summed - own), mask)


@triton.jit
def _gradient_kernel(
    slope: Any, grid: Any, target: Any, lse: Any, out: Any, classes: Any, h: Any, w: Any, height: Any, width: Any,
    sy: Any, sx: Any, rows: Any, columns: Any, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    cell, plane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside = cell < h * w
    image, c = plane // classes, plane % classes
    gy, gx = cell // w, cell % w
    shift = 0.0 if ALIGN else 0.5
    # The first pixel that may lie between this cell and the one before.
    top = tl.where(sy > 0, tl.floor((gy.to(tl.float32) - 1 + shift) / tl.maximum(sy, 1e-9) - shift), 0.0).to(tl.int32)
    left = tl.where(sx > 0, tl.floor((gx.to(tl.float32) - 1 + shift) / tl.maximum(sx, 1e-9) - shift), 0.0).to(tl.int32)
    found = tl.zeros([BLOCK], tl.float32)
    for dy in range(rows):
        y = top + dy
        y0, y1, fy = _source(y, sy, h, ALIGN)
        share_y = tl.where(y0 == gy, 1 - fy, 0.0) + tl.where(y1 == gy, fy, 0.0)
        seen_y = inside & (y >= 0) & (y < height) & (share_y > 0)
        for dx in range(columns):
            x = left + dx
            x0, x1, fx = _source(x, sx, w, ALIGN)
            share = share_y * (tl.where(x0 == gx, 1 - fx, 0.0) + tl.where(x1 == gx, fx, 0.0))
            seen = seen_y & (x >= 0) & (x < width) & (share > 0)
            at = image * height * width + y * width + x
            wanted = tl.load(target + at, seen, 255)
            seen = seen & (wanted != IGNORED)
            value = _between(grid + plane * h * w, y0, y1, fy, x0, x1, fx, w, seen)
            p = tl.exp(value - tl.load(lse + at, seen, 0.0)) - tl.where(wanted == c, 1.0, 0.0)
            found += tl.where(seen, share * tl.load(slope + at, seen, 0.0) * p, 0.0)
    tl.store(out + plane * h * w + cell, found, inside)


@triton.jit
def _top_kernel(
    grid: Any, confidence: Any, label: Any, classes: Any, h: Any, w: Any, height: Any, width: Any,
    sy: Any, sx: Any, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    pixel, image = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask = pixel < height * width
    y0, y1, fy = _source(pixel // width, sy, h, ALIGN)
    x0, x1, fx = _source(pixel % width, sx, w, ALIGN)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.zeros([BLOCK], tl.int64)
    for c in range(classes):
        value = _between(grid + (image * classes + c) * h * w, y0, y1, fy, x0, x1, fx, w, mask)
        best = tl.where(value > most, c, best)
        higher = tl.maximum(most, value)
        total = total * tl.exp(most - higher) + tl.exp(value - higher)
        most = higher
    tl.store(confidence + image * height * width + pixel, 1 / total, mask)
    tl.store(label + image * height * width + pixel, best, mask)


def _scale(cells: int, pixels: int, align: bool) -> float:
    if align:
        return (cells - 1) / (pixels - 1) if pixels > 1 else 0.0
    return cells / pixels


def _reach(cells: int, pixels: int, align: bool) -> int:
    """Return the pixels of an axis that a cell can have a share in, at most."""
    scale = _scale(cells, pixels, align)
    return math.ceil(2 / scale) + 2 if scale else pixels


def loss_maps(grid: Tensor, target: Tensor, align: bool) -> tuple[Tensor, Tensor]:
    """Return loss and log-sum-exp (B, H, W) of contiguous ``grid`` and ``target``."""
    (batch, classes, h, w), (height, width) = grid.shape, target.shape[-2:]
    loss, lse = (torch.empty(target.shape, dtype=torch.float32, device=grid.device) for _ in range(2))
    scales = _scale(h, height, align), _scale(w, width, align)
    blocks = triton.cdiv(height * width, BLOCK), batch
    _loss_kernel[blocks](grid, target, loss, lse, classes, h, w, height, width, *scales, ALIGN=align, BLOCK=BLOCK)
    return loss, lse


def loss_gradient(slope: Tensor, grid: Tensor, target: Tensor, lse: Tensor, align: bool) -> Tensor:
    """Return the gradient (B, C, h, w) at the grid, from that at the loss (B, H, W)."""
    (batch, classes, h, w), (height, width) = grid.shape, target.shape[-2:]
    out = torch.empty_like(grid)
    scales = _scale(h, height, align), _scale(w, width, align)
    reach = _reach(h, height, align), _reach(w, width, align)
    blocks = triton.cdiv(h * w, BLOCK), batch * classes
    sizes = classes, h, w, height, width, *scales, *reach
    _gradient_kernel[blocks](slope, grid, target, lse, out, *sizes, ALIGN=align, BLOCK=BLOCK)
    return out


def top_maps(grid: Tensor, size: tuple[int, int], align: bool) -> tuple[Tensor, Tensor]:
    """Return probability and index (B, H, W) of the most probable class."""
    (batch, classes, h, w), (height, width) = grid.shape, size
    confidence = torch.empty(batch, height, width, dtype=torch.float32, device=grid.device)
    label = torch.empty(batch, height, width, dtype=torch.int64, device=grid.device)
    scales = _scale(h, height, align), _scale(w, width, align)
    blocks = triton.cdiv(height * width, BLOCK), batch
    _top_kernel[blocks](grid, confidence, label, classes, h, w, height, width, *scales, ALIGN=align, BLOCK=BLOCK)
    return confidence, label
