"""MixE's reverse chain in few kernels, on a GPU where Triton's kernels are used (``pixel_loss.fused``).

It computes what ``Denoiser.denoise`` and the loop of ``refine`` do. No gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.core.distributed import full_precision
from viladiff.models.fused.norms import ACTIVATIONS


@torch.library.custom_op("viladiff::reverse_step", mutates_args=())
def _reverse_step(
    logits: Tensor,
    noise: Tensor,
    x: Tensor,
    z: Tensor,
    uniform: Tensor,
    gaussian: Tensor,
    edges: Tensor,
    lost: Tensor,
    codes: Tensor,
    shares: list[float],
) -> tuple[Tensor, Tensor]:
    from viladiff.models.fused.chain_kernels import reversed_maps

    maps = tuple(part.contiguous() for part in (x, z, uniform, gaussian, edges))
    return reversed_maps((logits, noise, *maps), lost, codes, (shares[0], shares[1], shares[2], shares[3]))  # type: ignore[arg-type]


@_reverse_step.register_fake
def _(
    logits: Tensor,
    noise: Tensor,
    x: Tensor,
    z: Tensor,
    uniform: Tensor,
    gaussian: Tensor,
    edges: Tensor,
    lost: Tensor,
    codes: Tensor,
    shares: list[float],
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(z)


@torch.library.custom_op("viladiff::add_with_statistics", mutates_args=())
def _add_with_statistics(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    from viladiff.models.fused.chain_kernels import added_maps

    return added_maps(x.contiguous(), y.contiguous())


@_add_with_statistics.register_fake
def _(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    # The second one's true length is the kernels' own affair.
    return torch.empty_like(x, dtype=torch.float32), x.new_empty(x.shape[0] * x.shape[1], 1, 2, dtype=torch.float32)


def added(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return x + y (B, W, h, w) float32 with the statistics that ``norm_silu`` needs."""
    total, stats = torch.ops.viladiff.add_with_statistics(x, y)
    return total, stats


def norm_silu(norm: nn.GroupNorm, x: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Return SiLU of the norm of what ``added`` returned, in ``dtype``."""
    rule = [norm.num_groups, norm.eps, ACTIVATIONS["silu"][0]]
    found: Tensor = torch.ops.viladiff.group_norm_act(*x, norm.weight, norm.bias, rule, dtype)
    return found


def reverse_step(
    heads: tuple[Tensor, Tensor],
    state: tuple[Tensor, Tensor],
    uniform: Tensor,
    regions: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    signal: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Return x (B, d, h, w) and labels (B, h, w) a step earlier: posterior, draw and DDIM as one operation.

    ``heads``: class logits and noise; ``state``: x and labels; ``regions``: the Gaussian one and edges, bool;
    ``tables``: the three shares of ``posterior_memory`` (3, 2), off and on an edge, and the codes (C, d); ``signal``:
    alpha_bar now and then.
    """
    now, then = signal
    share = ((1 - then) / (1 - now)) ** 0.5
    shares = [(1 - now) ** 0.5, now**0.5, share, then**0.5 - share * now**0.5]
    x, z = torch.ops.viladiff.reverse_step(*heads, *state, uniform, *regions, *tables, shares)
    return x, z


class FoldedChain:
    """``Denoiser.denoise`` at the steps of a chain, whose scales and shifts are part of the convolutions' weights.

    ``denoiser`` is a ``Denoiser``, which makes these and is therefore not imported.
    """

    def __init__(self, denoiser: Any, films: Tensor, placed: Tensor) -> None:
        self.denoiser, self.placed = denoiser, placed
        cuda = torch.is_autocast_enabled("cuda")
        self.dtype = torch.get_autocast_dtype("cuda") if cuda else torch.float32
        parts = films[:, :, 0, 0].chunk(2 * len(denoiser.convs), dim=1)
        scales, shifts = [1 + scale for scale in parts[::2]], [*parts[1::2], None]
        self.entry = denoiser.entry.weight[:, :-2].to(self.dtype), parts[1].to(self.dtype)
        heads = denoiser.class_head, denoiser.noise_head
        weights, biases = (torch.cat([getattr(head, name) for head in heads]) for name in ("weight", "bias"))
        self.heads, self.classes = (weights, biases), denoiser.class_head.out_channels
        self.blocks = []
        for conv, scale, after in zip(denoiser.convs, scales, shifts[1:], strict=True):
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            bias = conv.bias * scale if after is None else torch.addcmul(after.float(), conv.bias, scale.float())
            weight = conv.weight * scale[:, :, None, None, None]
            self.blocks.append((weight.to(self.dtype), bias.to(self.dtype)))

    def __call__(self, codes: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Return class logits and noise of ``codes`` at the i-th step."""
        own = self.denoiser
        x = added(self.placed, F.conv2d(codes.to(self.dtype), self.entry[0], self.entry[1][i], padding=1))
        for norm, (weight, bias) in zip(own.norms, self.blocks, strict=True):
            assert isinstance(norm, nn.GroupNorm)
            x = added(x[0], F.conv2d(norm_silu(norm, x, self.dtype), weight[i], bias[i], padding=1))
        with full_precision(codes.device):
            maps = F.conv2d(norm_silu(own.exit, x, torch.float32), *self.heads)
        return maps[:, : self.classes], maps[:, self.classes :]
