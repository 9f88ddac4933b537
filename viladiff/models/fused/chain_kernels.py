"""Triton kernels of ``chain``: a reverse step of MixE after its network, and a sum with its statistics.

Maps are contiguous (B, channels, h, w), float32; each program has some pixels of an image, or of one of its channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from viladiff.models.fused import norm_kernels
from viladiff.models.fused.norm_kernels import store_statistics

BLOCK = 256


@triton.jit
def _reverse_kernel(
    logits: Any, noise: Any, x: Any, z: Any, uniform: Any, gaussian: Any, edges: Any, lost: Any, codes: Any,
    x_out: Any, z_out: Any, pixels: Any, length: Any, class_planes: Any, noise_planes: Any,
    noise_share: Any, signal_share: Any, x_share: Any, x0_share: Any, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    pixel, image = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask = pixel < pixels
    at = image * pixels + pixel
    label = tl.load(z + at, mask, 0)
    edge = tl.load(edges + at, mask, 0).to(tl.int32)
    lost_t, lost_prev = tl.load(lost + edge, mask, 1.0), tl.load(lost + 2 + edge, mask, 0.0)
    lost_step = tl.load(lost + 4 + edge, mask, 1.0)
    # The softmax's largest, its sum, and the share of the pixel's own class.
    most, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    own = tl.full([BLOCK], float("-inf"), tl.float32)
    for c in range(CLASSES):
        value = tl.load(logits + (image * class_planes + c) * pixels + pixel, mask, 0.0)
        higher = tl.maximum(most, value)
        total = total * tl.exp(most - higher) + tl.exp(value - higher)
        most = higher
        own = tl.where(label == c, value, own)
    own = tl.exp(own - most) / total
    # The posterior, as diffusion.posterior_of has it.
    away = (CLASSES - 1) / CLASSES
    ratio, kept = own / (1 - away * lost_t), 1 - lost_prev
    factor = CLASSES / lost_t
    base = ((1 - own) * factor + ratio) * (lost_prev / CLASSES)
    stayed, moved = (base + ratio * kept) * (1 - away * lost_step), lost_step / CLASSES
    every = ((CLASSES - 1) * base + (1 - own) * factor * kept) * moved + stayed
    point = tl.minimum(tl.load(uniform + at, mask, 0.0) * every, every * (1 - 6e-8))
    run, drawn = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int64)
    for c in range(CLASSES):
        p = tl.exp(tl.load(logits + (image * class_planes + c) * pixels + pixel, mask, 0.0) - most) / total
        run += tl.where(label == c, stayed, (base + p * factor * kept) * moved)
        drawn += (run <= point).to(tl.int64)
    noisy = tl.load(gaussian + at, mask, 0) != 0
    label = tl.where(noisy, label, tl.minimum(drawn, CLASSES - 1))
    tl.store(z_out + at, label, mask)
    # DDIM in the Gaussian region, codes elsewhere.
    for j in range(length):
        there = (image * length + j) * pixels + pixel
        value = tl.load(x + there, mask, 0.0)
        seen = tl.load(noise + (image * noise_planes + j) * pixels + pixel, mask, 0.0)
        x0 = (value - noise_share * seen) / signal_share
        x0 = tl.minimum(tl.maximum(x0, -1.0), 1.0)
        code = tl.load(codes + label * length + j, mask, 0.0)
        tl.store(x_out + there, tl.where(noisy, value * x_share + x0 * x0_share, code), mask)


@triton.jit
def _add_kernel(x: Any, y: Any, out: Any, stats: Any, pixels: Any, BLOCK: tl.constexpr) -> None:
    block, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    mask, at = pixel < pixels, plane * pixels + pixel
    value = tl.load(x + at, mask, 0.0).to(tl.float32) + tl.load(y + at, mask, 0.0).to(tl.float32)
    tl.store(out + at, value, mask)
    store_statistics(value, mask, stats, pixels, BLOCK)


def reversed_maps(
    maps: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    lost: Tensor,
    codes: Tensor,
    shares: tuple[float, float, float, float],
) -> tuple[Tensor, Tensor]:
    """Return x (B, d, h, w) and labels (B, h, w) of the step before.

    ``maps``: logits, noise (both may be channels of a larger map), x, labels, uniform, Gaussian region and edges;
    ``lost`` (3, 2); ``codes`` (C, d);
    ``shares``: of noise and signal in x, then of x and its x0 in the new x.
    """
    logits, noise, x, z = maps[:4]
    (batch, classes, h, w), length = logits.shape, x.shape[1]
    x_out, z_out = torch.empty_like(x), torch.empty_like(z)
    blocks, planes = (triton.cdiv(h * w, BLOCK), batch), (logits.stride(0) // (h * w), noise.stride(0) // (h * w))
    _reverse_kernel[blocks](
        *maps, lost, codes, x_out, z_out, h * w, length, *planes, *shares, CLASSES=classes, BLOCK=BLOCK
    )  # fmt: skip
    return x_out, z_out


def added_maps(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return x + y (B, W, h, w) float32, and its statistics as of ``norm_kernels.group_statistics``."""
    out, stats = torch.empty(x.shape, dtype=torch.float32, device=x.device), norm_kernels.empty_statistics(x)
    planes, blocks, _ = stats.shape
    _add_kernel[blocks, planes](x, y, out, stats, x.shape[2] * x.shape[3], BLOCK=norm_kernels.SUMMED)
    return out, stats
