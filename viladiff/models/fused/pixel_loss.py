"""Enlargement of grid logits and what is read of them, as one operation that holds no enlarged logits of all classes.

On a GPU by Triton's kernels (``pixel_kernels``), where Triton is installed and agrees with torch on a small example; on
a CPU in pieces of a few rows, from ``MANY`` classes on; otherwise by torch's own operations, bit for bit as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from viladiff.data.batch import IGNORE
from viladiff.losses import pixel_cross_entropy
from viladiff.models.blocks import upsample
from viladiff.models.fused.agreement import kernels_agree, stands_for_gpu

MANY = 64
"""Classes from which on a CPU works in pieces: below, all of them fit its caches well enough."""
PIECE = 1 << 22
"""Numbers of an enlarged piece, about: 16 MiB."""


def grid_cross_entropy(grid: Tensor, target: Tensor, align_corners: bool = False) -> Tensor:
    """Return ``pixel_cross_entropy`` (B, H, W) of grid logits (B, C, h, w) enlarged to the size of ``target``.

    Raises ValueError for unlike batches.
    """
    if grid.ndim != 4 or target.ndim != 3 or len(grid) != len(target):
        raise ValueError(f"target {tuple(target.shape)} does not fit grid {tuple(grid.shape)}: want (B, H, W)")
    if fused(grid):
        loss: Tensor = torch.ops.viladiff.grid_cross_entropy(grid.float().contiguous(), target, align_corners)[0]
        return loss
    if _in_pieces(grid):
        pieces: Tensor = _InPieces.apply(grid.float(), target, align_corners)
        return pieces
    return pixel_cross_entropy(upsample(grid, target.shape[-2:], align_corners), target)


@torch.no_grad()
def grid_top(grid: Tensor, size: torch.Size | tuple[int, ...], align_corners: bool = False) -> tuple[Tensor, Tensor]:
    """Return probability (B, H, W) and index, int64, of the most probable class of enlarged logits; no gradient."""
    if fused(grid):
        top = torch.ops.viladiff.grid_top(grid.float().contiguous(), int(size[0]), int(size[1]), align_corners)
        return top[0], top[1]
    found = upsample(grid, size, align_corners).softmax(1).max(1)
    return found.values, found.indices


def stays_on_grid(grid: Tensor) -> bool:
    """Return whether the loss of ``grid`` (B, C, h, w) is one operation, without enlarged logits of all classes."""
    return fused(grid) or _in_pieces(grid)


def _in_pieces(grid: Tensor) -> bool:
    return grid.device.type == "cpu" and grid.shape[1] >= MANY and not torch.compiler.is_compiling()


def fused(x: Tensor) -> bool:
    """Return whether Triton's kernels work on the device of ``x``; tensors without content stand for a GPU's."""
    return stands_for_gpu(x) or (x.device.type == "cuda" and _agrees(x.device))


@lru_cache
def _agrees(device: torch.device) -> bool:
    """Try each kernel on a small example, the gradient too."""
    return kernels_agree(device, _example)


def _example(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return loss, gradient, confidence and its class by the kernels and by torch."""
    drawn = torch.Generator().manual_seed(0)
    grid = torch.randn(2, 5, 6, 7, generator=drawn).to(device)
    slope = torch.rand(2, 24, 28, generator=drawn).to(device)
    target = torch.arange(2 * 24 * 28).reshape(2, 24, 28).remainder(6).to(device)
    target[target == 5] = IGNORE

    def answers(loss: Callable[[Tensor], Tensor], top: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        x = grid.clone().requires_grad_()
        value, (confidence, label) = loss(x), top(grid)
        (gradient,) = torch.autograd.grad((value * slope).sum(), x)
        return [value.detach(), gradient, confidence, label.float()]

    ops = torch.ops.viladiff
    return (
        answers(lambda x: ops.grid_cross_entropy(x, target, False)[0], lambda x: ops.grid_top(x, 24, 28, False)),
        answers(
            lambda x: pixel_cross_entropy(upsample(x, (24, 28)), target),
            lambda x: upsample(x, (24, 28)).softmax(1).max(1),
        ),
    )


# Triton, as operations that torch knows


@torch.library.custom_op("viladiff::grid_cross_entropy", mutates_args=())
def _cross_entropy(grid: Tensor, target: Tensor, align: bool) -> tuple[Tensor, Tensor]:
    from viladiff.models.fused.pixel_kernels import loss_maps

    return loss_maps(grid, target.contiguous(), align)


@_cross_entropy.register_fake
def _(grid: Tensor, target: Tensor, align: bool) -> tuple[Tensor, Tensor]:
    return grid.new_empty(target.shape), grid.new_empty(target.shape)


@torch.library.custom_op("viladiff::grid_cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(slope: Tensor, grid: Tensor, target: Tensor, lse: Tensor, align: bool) -> Tensor:
    from viladiff.models.fused.pixel_kernels import loss_gradient

    return loss_gradient(slope.contiguous(), grid, target.contiguous(), lse, align)


@_cross_entropy_backward.register_fake
def _(slope: Tensor, grid: Tensor, target: Tensor, lse: Tensor, align: bool) -> Tensor:
    return torch.empty_like(grid)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    grid, target, ctx.align = inputs
    ctx.set_materialize_grads(False)  # of the second, which nobody reads
    ctx.save_for_backward(grid, target, output[1])


def _backward(ctx: Any, slope: Tensor, _: None) -> tuple[Tensor, None, None]:
    grid, target, lse = ctx.saved_tensors
    return torch.ops.viladiff.grid_cross_entropy_backward(slope, grid, target, lse, ctx.align), None, None


_cross_entropy.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("viladiff::grid_top", mutates_args=())
def _top(grid: Tensor, height: int, width: int, align: bool) -> tuple[Tensor, Tensor]:
    from viladiff.models.fused.pixel_kernels import top_maps

    return top_maps(grid, (height, width), align)


@_top.register_fake
def _(grid: Tensor, height: int, width: int, align: bool) -> tuple[Tensor, Tensor]:
    shape = len(grid), height, width
    return grid.new_empty(shape), grid.new_empty(shape, dtype=torch.int64)


# In pieces


def _pieces(grid: Tensor, height: int, width: int, align: bool) -> list[tuple[int, int, int, int]]:
    """Return rows of the grid and how far their neighbours reach: (first, last, rows before, rows after).

    All rows are one piece unless each has a whole number of pixels.
    """
    _, classes, h, _ = grid.shape
    if align or height % h:
        return [(0, h, 0, 0)]
    count = max(1, PIECE // (classes * width * (height // h)))
    return [(i, min(i + count, h), min(i, 1), min(h - min(i + count, h), 1)) for i in range(0, h, count)]


class _InPieces(torch.autograd.Function):
    """Cross-entropy that enlarges a few rows at a time, forwards and again backwards."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, target: Tensor, align: bool) -> Tensor:
        (height, width), h = target.shape[-2:], grid.shape[2]
        known = target != IGNORE
        index = target.masked_fill(~known, 0)
        lse, own = (torch.empty(target.shape, dtype=grid.dtype) for _ in range(2))
        for first, last, before, after in _pieces(grid, height, width, align):
            factor = height // h if (first, last) != (0, h) else 0
            pixels = slice(first * factor, last * factor) if factor else slice(None)
            for i in range(len(grid)):
                logits = _enlarged(grid[i], (first, last, before, after), (height, width), align)
                lse[i, pixels] = logits.logsumexp(0)
                own[i, pixels] = logits.gather(0, index[i, None, pixels])[0]
        ctx.save_for_backward(grid, index, known, lse)
        ctx.align = align
        return (lse - own).masked_fill_(~known, 0)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        grid, index, known, lse = ctx.saved_tensors
        slope, out = slopes[0] * known, torch.zeros_like(grid)
        (height, width), (h, w) = lse.shape[-2:], grid.shape[2:]
        for first, last, before, after in _pieces(grid, height, width, ctx.align):
            factor = height // h if (first, last) != (0, h) else 0
            pixels = slice(first * factor, last * factor) if factor else slice(None)
            for i in range(len(grid)):
                p = _enlarged(grid[i], (first, last, before, after), (height, width), ctx.align)
                p = p.sub_(lse[i, pixels]).exp_()
                p.scatter_add_(0, index[i, None, pixels], p.new_full((), -1.0).expand(1, *p.shape[1:]))
                p.mul_(slope[i, pixels])
                p = F.pad(p, (0, 0, before * factor, after * factor))[None]
                rows = last - first + before + after
                sizes = list(p.shape[-2:]), [1, grid.shape[1], rows, w]
                piece = torch.ops.aten.upsample_bilinear2d_backward(p, *sizes, ctx.align)
                out[i, :, first - before : last + after] += piece[0]
        return out, None, None


def _enlarged(grid: Tensor, rows: tuple[int, int, int, int], size: tuple[int, int], align: bool) -> Tensor:
    """Return (C, pixels, W) of the rows of a grid (C, h, w)."""
    first, last, before, after = rows
    if (first, last) == (0, grid.shape[1]):
        return F.interpolate(grid[None], size, mode="bilinear", align_corners=align)[0]
    factor = size[0] // grid.shape[1]
    part = grid[None, :, first - before : last + after]
    whole = F.interpolate(part, ((last - first + before + after) * factor, size[1]), mode="bilinear")[0]
    return whole[:, before * factor : before * factor + (last - first) * factor]
