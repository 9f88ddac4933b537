"""Augmentation of whole batches on any device, with every parameter drawn per image on the host, so nothing waits for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from viladiff.batch import IGNORE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey value (ITU-R BT.601)."""

Range = tuple[float, float]


def normalise(images: Tensor) -> Tensor:
    """(n, 3, H, W) in 0..1 to the units of ImageNet encoders: mean 0, standard deviation 1 per channel."""
    mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def geometric(
    images: Tensor | np.ndarray,
    masks: Tensor | np.ndarray | None,
    crop: int,
    scale: Range,
    hflip: float,
    draws: Sequence[np.random.Generator],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Resize by a factor from ``scale``, pad at the bottom and right, crop, mirror with probability ``hflip``.

    images (n, H, W, 3) uint8, masks (n, H, W) integers or None, one generator per image. Returns images (n, 3, crop, crop)
    in 0..1, not normalised, 0 in the padding; masks int64, 255 there; valid (n, crop, crop) bool, False there, which
    depends on the geometry alone. The resize is bilinear, over the area of a source pixel where it shrinks, as PIL does;
    masks take the nearest pixel. Each is separable, so it is two small matrix products for the batch, and exact at scale 1.
    """
    pixels = torch.as_tensor(images)
    height, width = pixels.shape[1:3]
    if len(draws) != len(pixels):
        raise ValueError(f"{len(pixels)} images, {len(draws)} generators: must be equal")
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale = {scale}: must be low, high with 0 < low <= high")
    rows, columns = zip(*(_draw_window(rng, height, width, crop, scale, hflip) for rng in draws), strict=True)
    weights_y, nearest_y, valid_y = _axis(np.stack(rows), height, pixels.device)
    weights_x, nearest_x, valid_x = _axis(np.stack(columns), width, pixels.device)
    planes = pixels.permute(0, 3, 1, 2).float()
    out = weights_y[:, None] @ planes @ weights_x[:, None].mT / 255
    valid = valid_y[:, :, None] & valid_x[:, None, :]
    if masks is None:
        return out, None, valid
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    labels = torch.as_tensor(masks).to(pixels.device)[image, nearest_y[:, :, None], nearest_x[:, None, :]].long()
    return out, labels.masked_fill_(~valid, IGNORE), valid


def _draw_window(
    rng: np.random.Generator, height: int, width: int, crop: int, scale: Range, hflip: float
) -> tuple[np.ndarray, np.ndarray]:
    """Per axis: the resized length, then the resized coordinate that each output pixel shows, (1 + crop,) int64 each."""
    factor = rng.uniform(*scale)
    lengths = [max(1, round(side * factor)) for side in (height, width)]
    starts = [int(rng.integers(max(length - crop, 0) + 1)) for length in lengths]
    flipped = rng.random() < hflip
    places = np.arange(crop)
    rows = np.concatenate([[lengths[0]], places + starts[0]])
    columns = np.concatenate([[lengths[1]], (places[::-1] if flipped else places) + starts[1]])
    return rows, columns


def _axis(window: np.ndarray, source: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One axis of the resize for n images: weights (n, crop, source), nearest source index and valid, both (n, crop).

    Pixel centres lie at half-integers: output k shows source position (k + 0.5) * source / length - 0.5.
    """
    window_on = torch.from_numpy(window).to(device, non_blocking=True)
    length, place = window_on[:, :1], window_on[:, 1:]
    valid = place < length
    nearest = (((2 * place + 1) * source) // (2 * length)).clamp_(max=source - 1)
    step = (source / length.double()).float()  # source pixels per output pixel
    position = ((place + 0.5).double() * source / length - 0.5).float()
    distance = position[..., None] - torch.arange(source, device=device)
    weights = (1 - distance.abs() / step.clamp_min(1)[..., None]).clamp_min_(0)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
    return weights * valid[..., None], nearest, valid


def strong(
    images: Tensor,
    draws: Sequence[np.random.Generator],
    p_jitter: float = 0.8,
    brightness: float = 0.5,
    contrast: float = 0.5,
    saturation: float = 0.5,
    hue: float = 0.25,
    p_gray: float = 0.2,
    p_blur: float = 0.5,
    sigma: Range = (0.1, 2.0),
) -> Tensor:
    """Colour jitter in a drawn order, then grey, then blur: (n, 3, H, W) in 0..1 to the same; the input is not changed.

    One generator per image, each giving the same number of draws whatever applies. Factors come from 1 ± brightness
    and so on, the turn of the hue from ± hue (in full turns), sigma is in pixels. Defaults: UniMatch V2.
    """
    if len(draws) != len(images):
        raise ValueError(f"{len(images)} images, {len(draws)} generators: must be equal")
    widths = (brightness, contrast, saturation, hue)
    drawn = np.array([[*rng.random(8), *rng.permutation(4)] for rng in draws])
    jittered = drawn[:, 0] < p_jitter
    change = (2 * drawn[:, 3:7] - 1) * widths * jittered[:, None]
    out = images
    for place in range(4):
        operation = drawn[:, 8 + place].astype(int)
        amount = change[np.arange(len(drawn)), operation]
        out = blend(out, np.where(operation < 3, 1 + amount, 1.0), operation)
        turned = np.flatnonzero((operation == 3) & (amount != 0))
        if len(turned):
            index = torch.from_numpy(turned).to(out.device, non_blocking=True)
            out = out.index_copy(0, index, turn_hue(out[index], amount[turned]))
    gray = drawn[:, 1] < p_gray
    out = blend(out, np.where(gray, 0.0, 1.0), np.full(len(drawn), 2))
    blurred = np.flatnonzero(drawn[:, 2] < p_blur)
    if len(blurred):
        index = torch.from_numpy(blurred).to(out.device, non_blocking=True)
        sigmas = sigma[0] + (sigma[1] - sigma[0]) * drawn[blurred, 7]
        out = out.index_copy(0, index, blur(out[index], sigmas, radius=int(np.ceil(3 * sigma[1]))))
    return out


def _host(values: np.ndarray, like: Tensor) -> Tensor:
    """Per-image numbers as (n, 1, 1, 1) on the images' device."""
    return torch.from_numpy(values).to(like.device, like.dtype, non_blocking=True).view(-1, 1, 1, 1)


def blend(images: Tensor, factor: np.ndarray, operation: np.ndarray) -> Tensor:
    """Brightness, contrast and saturation are one formula: factor * image + (1 - factor) * base, cut to 0..1.

    The base is black (operation 0), the image's mean grey (1) or each pixel's grey (2); a factor of 1 changes nothing.
    """
    red, green, blue = images.unbind(1)
    gray = (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]
    base = _host(operation == 1, images) * gray.mean((1, 2, 3), keepdim=True) + _host(operation == 2, images) * gray
    weight = _host(factor, images)
    return (weight * images + (1 - weight) * base).clamp_(0, 1)


def turn_hue(images: Tensor, turn: np.ndarray) -> Tensor:
    """Value and saturation of every pixel stay, its hue moves by ``turn`` full turns (one number per image)."""
    value, minimum = images.amax(1), images.amin(1)
    chroma = value - minimum
    red, green, blue = images.unbind(1)
    sixth = torch.where(
        value == red,
        (green - blue),
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    ) / chroma.clamp_min(1e-12)
    sixth = sixth[:, None] + 6 * _host(turn, images)
    # A channel falls from value to minimum with its distance, round the circle, from its own hue: 0, 2 and 4 sixths.
    own = torch.tensor([0.0, 2.0, 4.0], device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    away = ((sixth - own + 3) % 6 - 3).abs()
    return value[:, None] - chroma[:, None] * (away - 1).clamp_(0, 1)


def blur(images: Tensor, sigma: np.ndarray, radius: int) -> Tensor:
    """Gaussian blur with a sigma per image, in pixels, cut at ``radius`` and mirrored at the border; two passes of one axis."""
    n, channels, height, width = images.shape
    radius = min(radius, height - 1, width - 1)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / np.maximum(sigma, 1e-3)[:, None]) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    weights = torch.from_numpy(kernel).to(images.device, images.dtype, non_blocking=True).repeat_interleave(channels, 0)
    x = F.pad(images.reshape(1, n * channels, height, width), [radius] * 4, mode="reflect")
    x = F.conv2d(x, weights[:, None, :, None], groups=n * channels)
    return F.conv2d(x, weights[:, None, None, :], groups=n * channels).view_as(images)
