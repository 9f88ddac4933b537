"""Triton kernels of ``norms``: LayerNorm after a sum, and GroupNorm with what follows it, forwards and backwards.

Inputs and outputs may be in half precision; all sums are in float32. Maps are contiguous (B, channels, h, w), tokens
(rows, columns). Statistics of a block of a channel's pixels are its mean and the sum of squared distances from it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SUMMED = 1024
"""Pixels of a channel that a program reads."""
PROGRAMS = 512
"""Programs of a backward pass over rows, each of which sums the gradients of weight and bias over its own."""


@triton.jit
def _layer_kernel(
    x: Any, y: Any, weight: Any, bias: Any, total: Any, out: Any, mean: Any, scale: Any, columns: Any, eps: Any,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, at = column < columns, row * columns + column
    value = tl.load(x + at, mask, 0.0).to(tl.float32)
    if ADD:
        value += tl.load(y + at, mask, 0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + at, value, mask)
        value = value.to(tl.float32)
    centre = tl.sum(value, 0) / columns
    apart = tl.where(mask, value - centre, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(apart * apart, 0) / columns + eps)
    tl.store(mean + row, centre)
    tl.store(scale + row, inverse)
    value = apart * inverse * tl.load(weight + column, mask, 0.0) + tl.load(bias + column, mask, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask)


@triton.jit
def _layer_gradient_kernel(
    slope: Any, straight: Any, x: Any, weight: Any, mean: Any, scale: Any, at_x: Any, at_y: Any, parts: Any,
    rows: Any, columns: Any, STRAIGHT: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    program, column, programs = tl.program_id(0), tl.arange(0, BLOCK), tl.num_programs(0)
    mask = column < columns
    own = tl.load(weight + column, mask, 0.0)
    of_weight, of_bias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for turn in range(tl.cdiv(rows, programs)):
        row = program.to(tl.int64) + turn * programs
        inside = mask & (row < rows)
        at = row * columns + column
        inverse = tl.load(scale + row, row < rows, 0.0)
        normed = (tl.load(x + at, inside, 0.0).to(tl.float32) - tl.load(mean + row, row < rows, 0.0)) * inverse
        normed = tl.where(inside, normed, 0.0)
        given = tl.load(slope + at, inside, 0.0).to(tl.float32)
        of_weight += given * normed
        of_bias += given
        given = given * own
        found = given - tl.sum(given, 0) / columns - normed * (tl.sum(given * normed, 0) / columns)
        found = found * inverse
        if STRAIGHT:
            found += tl.load(straight + at, inside, 0.0).to(tl.float32)
        tl.store(at_x + at, found.to(at_x.dtype.element_ty), inside)
        if TWO:
            tl.store(at_y + at, found.to(at_y.dtype.element_ty), inside)
    tl.store(parts + program * columns + column, of_weight, mask)
    tl.store(parts + (programs + program) * columns + column, of_bias, mask)


@triton.jit
def store_statistics(value: Any, mask: Any, stats: Any, pixels: Any, BLOCK: tl.constexpr) -> None:
    """Store mean, and sum of squared distances from it, of this program's block of a channel's pixels."""
    block, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    mean = tl.sum(value, 0) / tl.minimum(pixels - block * BLOCK, BLOCK)
    apart = tl.where(mask, value - mean, 0.0)
    place = stats + (plane * tl.num_programs(0) + block) * 2
    tl.store(place, mean)
    tl.store(place + 1, tl.sum(apart * apart, 0))


@triton.jit
def _statistics_kernel(x: Any, stats: Any, pixels: Any, BLOCK: tl.constexpr) -> None:
    block, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < pixels
    store_statistics(tl.load(x + plane * pixels + pixel, mask, 0.0).to(tl.float32), mask, stats, pixels, BLOCK)


@triton.jit
def joined_statistics(
    stats: Any, first: Any, own: Any, pixels: Any, blocks: Any, eps: Any, PARTS: tl.constexpr, BLOCK: tl.constexpr
) -> Any:
    """Return mean and inverse deviation of a group, from the statistics of all blocks of its ``own`` channels."""
    part = tl.arange(0, PARTS)
    there = part < own * blocks
    count = tl.where(there, tl.minimum(pixels - (part % blocks) * BLOCK, BLOCK), 0).to(tl.float32)
    means = tl.load(stats + (first * blocks + part) * 2, there, 0.0)
    mean = tl.sum(means * count, 0) / (own * pixels)
    apart = means - mean
    squares = tl.load(stats + (first * blocks + part) * 2 + 1, there, 0.0) + count * apart * apart
    return mean, 1 / tl.sqrt(tl.sum(squares, 0) / (own * pixels) + eps)


@triton.jit
def _slope_of(value: Any, given: Any, ACT: tl.constexpr) -> Any:
    """Return the gradient before the activation, from that after it: 1 is ReLU, 2 SiLU, 0 none."""
    if ACT == 1:
        return tl.where(value > 0, given, 0.0)
    if ACT == 2:
        share = 1 / (1 + tl.exp(-value))
        return given * share * (1 + value * (1 - share))
    return given


@triton.jit
def _group_kernel(
    x: Any, stats: Any, weight: Any, bias: Any, out: Any, channels: Any, groups: Any, pixels: Any, blocks: Any,
    eps: Any, ACT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    pixel, plane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask, channel, own = pixel < pixels, plane % channels, channels // groups
    mean, inverse = joined_statistics(stats, plane - channel % own, own, pixels, blocks, eps, PARTS, BLOCK)
    value = tl.load(x + plane * pixels + pixel, mask, 0.0).to(tl.float32)
    value = (value - mean) * inverse * tl.load(weight + channel) + tl.load(bias + channel)
    if ACT == 1:
        value = tl.maximum(value, 0.0)
    if ACT == 2:
        value = value / (1 + tl.exp(-value))
    tl.store(out + plane * pixels + pixel, value.to(out.dtype.element_ty), mask)


@triton.jit
def _group_sums_kernel(
    slope: Any, x: Any, stats: Any, weight: Any, bias: Any, parts: Any, channels: Any, groups: Any, pixels: Any,
    blocks: Any, eps: Any, ACT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    block, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    mask, channel, own = pixel < pixels, plane % channels, channels // groups
    mean, inverse = joined_statistics(stats, plane - channel % own, own, pixels, blocks, eps, PARTS, BLOCK)
    at = plane * pixels + pixel
    normed = (tl.load(x + at, mask, 0.0).to(tl.float32) - mean) * inverse
    value = normed * tl.load(weight + channel) + tl.load(bias + channel)
    given = tl.where(mask, _slope_of(value, tl.load(slope + at, mask, 0.0).to(tl.float32), ACT), 0.0)
    place = parts + (plane * blocks + block) * 2
    tl.store(place, tl.sum(given * normed, 0))
    tl.store(place + 1, tl.sum(given, 0))


@triton.jit
def _group_gradient_kernel(
    slope: Any, x: Any, stats: Any, weight: Any, bias: Any, parts: Any, at_x: Any, channels: Any, groups: Any,
    pixels: Any, blocks: Any, eps: Any, ACT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    pixel, plane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask, channel, own = pixel < pixels, plane % channels, channels // groups
    first = plane - channel % own
    mean, inverse = joined_statistics(stats, first, own, pixels, blocks, eps, PARTS, BLOCK)
    part = tl.arange(0, PARTS)
    there = part < own * blocks
    factor = tl.load(weight + channel - channel % own + part // blocks, there, 0.0)
    along = tl.sum(factor * tl.load(parts + (first * blocks + part) * 2, there, 0.0), 0) / (own * pixels)
    level = tl.sum(factor * tl.load(parts + (first * blocks + part) * 2 + 1, there, 0.0), 0) / (own * pixels)
    at, factor = plane * pixels + pixel, tl.load(weight + channel)
    normed = (tl.load(x + at, mask, 0.0).to(tl.float32) - mean) * inverse
    value = normed * factor + tl.load(bias + channel)
    given = _slope_of(value, tl.load(slope + at, mask, 0.0).to(tl.float32), ACT)
    found = (given * factor - level - normed * along) * inverse
    tl.store(at_x + at, found.to(at_x.dtype.element_ty), mask)


def layer_norm(x: Tensor, y: Tensor | None, affine: tuple[Tensor, Tensor], eps: float, out: tuple[Tensor, ...]) -> None:
    """Write x + y (rows, columns), its norm, and mean and inverse deviation (rows,) to ``out``."""
    rows, columns = x.shape
    total = out[0] if y is not None else x
    parts = x, x if y is None else y, *affine, total, *out[-3:]
    _layer_kernel[(rows,)](*parts, columns, eps, ADD=y is not None, BLOCK=triton.next_power_of_2(columns))


def layer_gradient(
    slope: Tensor, straight: Tensor | None, x: Tensor, weight: Tensor, moments: tuple[Tensor, Tensor], other: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient at x, the same in the type ``other``, and those of weight and bias (2, programs, columns).

    ``straight``: the gradient at x itself, that is not of its norm.
    """
    (rows, columns), at_x = x.shape, torch.empty_like(x)
    at_y = at_x if other == x.dtype else torch.empty_like(x, dtype=other)
    parts = torch.empty(2, programs_of(rows), columns, dtype=torch.float32, device=x.device)
    given = slope, slope if straight is None else straight, x, weight, *moments, at_x, at_y, parts, rows, columns
    options = {"STRAIGHT": straight is not None, "TWO": at_y is not at_x, "BLOCK": triton.next_power_of_2(columns)}
    _layer_gradient_kernel[(parts.shape[1],)](*given, **options)
    return at_x, at_y, parts


def programs_of(rows: int) -> int:
    """Return the programs of a backward pass over so many rows."""
    return min(rows, PROGRAMS)


def empty_statistics(x: Tensor) -> Tensor:
    """Return room for the statistics (B * W, blocks, 2) of blocks of x (B, W, h, w)."""
    blocks = -(-x.shape[2] * x.shape[3] // SUMMED)
    return torch.empty(len(x) * x.shape[1], blocks, 2, dtype=torch.float32, device=x.device)


def group_statistics(x: Tensor) -> Tensor:
    """Return the statistics (B * W, blocks, 2) of x (B, W, h, w)."""
    stats = empty_statistics(x)
    planes, blocks, _ = stats.shape
    _statistics_kernel[blocks, planes](x, stats, x.shape[2] * x.shape[3], BLOCK=SUMMED)
    return stats


def _sizes(x: Tensor, stats: Tensor, rule: list[float]) -> tuple[tuple[int, int], list[float], dict[str, int]]:
    channels, pixels, blocks = x.shape[1], x.shape[2] * x.shape[3], stats.shape[1]
    groups, act = int(rule[0]), int(rule[2])
    parts = triton.next_power_of_2(channels // groups * blocks)
    options = {"ACT": act, "PARTS": parts, "BLOCK": SUMMED}
    return (blocks, len(x) * channels), [channels, groups, pixels, blocks, rule[1]], options


def group_norm(x: Tensor, stats: Tensor, affine: tuple[Tensor, Tensor], rule: list[float], out: Tensor) -> None:
    """Write the norm of x (B, W, h, w) after the activation to ``out``; ``rule``: groups, epsilon, activation."""
    grid, sizes, options = _sizes(x, stats, rule)
    _group_kernel[grid](x, stats, *affine, out, *sizes, **options)


def group_sums(slope: Tensor, x: Tensor, stats: Tensor, affine: tuple[Tensor, Tensor], rule: list[float]) -> Tensor:
    """Return (B * W, blocks, 2): a block's shares of the gradients of weight and bias."""
    found, (grid, sizes, options) = torch.empty_like(stats), _sizes(x, stats, rule)
    _group_sums_kernel[grid](slope, x, stats, *affine, found, *sizes, **options)
    return found


def group_gradient(
    slope: Tensor, x: Tensor, stats: Tensor, affine: tuple[Tensor, Tensor], parts: Tensor, rule: list[float]
) -> Tensor:
    """Return the gradient at x, from that at the result and ``group_sums``."""
    out, (grid, sizes, options) = torch.empty_like(x), _sizes(x, stats, rule)
    _group_gradient_kernel[grid](slope, x, stats, *affine, parts, out, *sizes, **options)
    return out
