"""Perturbations of an encoder's maps: dropped channels, complementary pairs of them, and adversarial noise.

A list of maps (B, D_i, h_i, w_i) goes in and comes out, so that any method can put one between ``encode`` and
``decode``. Random numbers are handed in (``viladiff.core.keyed_random``), one row an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.core.distributed import full_precision


def widest(features: Sequence[Tensor]) -> int:
    """Return the channels of the widest map: the random numbers that an image needs below."""
    return max(level.shape[1] for level in features)


def channel_dropout(features: Sequence[Tensor], uniform: Tensor, p: float = 0.5) -> list[Tensor]:
    """Drop whole channels with probability p and scale the rest by 1 / (1 - p); one mask an image, for all maps.

    ``uniform`` (B, widest) in [0, 1); a narrower map reads the first of it. UniMatch's feature perturbation.
    """
    return _scaled(features, (uniform >= p) / (1 - p))


def complementary_dropout(
    features: Sequence[Tensor], uniform: Tensor, whole: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return two streams of the same images, each with the channels that the other one lacks, scaled by 2.

    ``features`` holds both streams, (2 B, D_i, h_i, w_i); ``uniform`` (B, widest) in [0, 1): below one half a channel
    is the second stream's. ``whole`` (B,) bool marks the images that lose nothing. UniMatch V2, section 3.
    """
    kept = 2.0 * (uniform >= 0.5)
    first = torch.where(whole[:, None], 1.0, kept)
    second = torch.where(whole[:, None], 1.0, 2 - kept)
    halves = [level.chunk(2) for level in features]
    return _scaled([half[0] for half in halves], first), _scaled([half[1] for half in halves], second)


def half_of_pairs(keys: Sequence[int], *parts: keyed_random.Part) -> list[bool]:
    """Choose exactly one of each pair of neighbours 2k, 2k + 1, by a coin named by ``parts`` and the pair.

    ``keys`` are positions in the global batch: half of it is chosen without a worker knowing another's images.
    """
    return [bool(keyed_random.numpy_generator(*parts, key // 2).integers(2) ^ (key & 1)) for key in keys]


def _scaled(features: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    return [level * factor[:, : level.shape[1], None, None].to(level.dtype) for level in features]


def virtual_adversarial(
    features: Sequence[Tensor],
    predict: Callable[[list[Tensor]], Tensor],
    start: Sequence[Tensor],
    radius: float,
    probe: float = 1e-2,
    steps: int = 1,
) -> list[Tensor]:
    """Return noise to which the predicted classes are most sensitive, to first order: one map per map, detached.

    ``predict`` maps features to logits (B, C, ...). From ``start`` (random maps, shaped like the features), ``steps``
    times: the direction becomes the gradient of KL(p(f) || p(f + probe |f| direction)). Lengths are over all maps of an
    image together. The result has length radius * |f|; it is zero where no direction changes the prediction.

    Virtual adversarial training (Miyato et al. 2018) with a probe that is a share of the length of the features: the
    absolute 1e-6 of published code is lost in float32 rounding. Autocast is off in here for the same reason.
    """
    with full_precision(features[0].device), torch.enable_grad():
        base = [level.detach().float() for level in features]
        length = _length(base)
        with torch.no_grad():
            target = F.log_softmax(predict(base).float(), 1)
        direction = _unit([level.detach().float() for level in start])
        for _ in range(steps):
            moved = [d.requires_grad_() for d in direction]
            seen = predict([f + probe * _image(length, d) * d for f, d in zip(base, moved, strict=True)])
            apart = F.kl_div(F.log_softmax(seen.float(), 1), target, reduction="sum", log_target=True)
            direction = _unit([g.detach() for g in torch.autograd.grad(apart, moved, materialize_grads=True)])
    return [(radius * _image(length, d) * d).to(f.dtype) for f, d in zip(features, direction, strict=True)]


def _length(maps: Sequence[Tensor]) -> Tensor:
    """Return (B,) Euclidean length over all maps of an image."""
    return torch.stack([level.flatten(1).square().sum(1) for level in maps]).sum(0).sqrt()


def _unit(maps: Sequence[Tensor]) -> list[Tensor]:
    """Divide the maps by their common length, in two rounds, since the squares of tiny gradients vanish in float32."""
    largest = torch.stack([level.flatten(1).abs().amax(1) for level in maps]).amax(0)
    safe = torch.where(largest > 0, largest, 1.0)
    scaled = [level / _image(safe, level) for level in maps]
    length = _length(scaled).clamp(min=1)
    return [level / _image(length, level) for level in scaled]


def _image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) values to a factor of ``like`` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))
