"""Augmentation of batches on any device; parameters are drawn per image on the host, so nothing waits for a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from viladiff.data.batch import IGNORE
from viladiff.data.loading.device_copies import send

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey value (ITU-R BT.601)."""

Range = tuple[float, float]


def unit_images(images: Tensor) -> Tensor:
    """Convert uint8 of any shape to float32 in 0..1; float32 is in 0..1 already and stays."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one number a channel from those of red, green and blue: in turn, as timm repeats weights; 1 has the mean.

    Raises ValueError if there are not three.
    """
    if len(values) != 3:
        raise ValueError(f"{tuple(values)}: must be three numbers")
    return (sum(values) / 3,) if channels == 1 else tuple(values[i % 3] for i in range(channels))


def normalise(images: Tensor) -> Tensor:
    """Convert (n, N, H, W) in 0..1 to the units of ImageNet encoders: mean 0, standard deviation 1 per channel.

    Channels beyond red, green and blue have their mean and deviation in turn, one channel the mean of the three.
    """
    units = [of_channels(value, images.shape[1]) for value in (IMAGENET_MEAN, IMAGENET_STD)]
    mean, std = send(torch.tensor(units, dtype=images.dtype), images.device).view(2, -1, 1, 1)
    return images.sub(mean).div_(std)


def geometric(
    images: Tensor | np.ndarray,
    masks: Tensor | np.ndarray | None,
    crop: int,
    scale: Range,
    hflip: float,
    draws: Sequence[np.random.Generator],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Resize by a factor from ``scale``, pad at the bottom and right, crop, mirror with probability ``hflip``.

    images (n, H, W, 3) uint8, masks (n, H, W) integers or None, one generator per image. Returns images
    (n, 3, crop, crop) in 0..1, not normalised, 0 in the padding; masks int64, 255 there; valid (n, crop, crop) bool,
    False there, which depends on the geometry alone. The resize is bilinear, spread over more source pixels where it
    shrinks, as PIL does; masks take the nearest pixel. Both axes are independent, so a batch is two matrix products,
    exact at scale 1. Raises ValueError for a scale that is not positive, or another number of generators.
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
    planes = pixels.permute(0, 3, 1, 2).contiguous().float()
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
    """Draw per axis (1 + crop,) int64: the resized length, then the resized coordinate of each output pixel."""
    factor = rng.uniform(*scale)
    lengths = [max(1, round(side * factor)) for side in (height, width)]
    starts = [int(rng.integers(max(length - crop, 0) + 1)) for length in lengths]
    flipped = rng.random() < hflip
    places = np.arange(crop)
    rows = np.concatenate([[lengths[0]], places + starts[0]])
    columns = np.concatenate([[lengths[1]], (places[::-1] if flipped else places) + starts[1]])
    return rows, columns


def _axis(window: np.ndarray, source: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Prepare one axis of the resize of n images: weights (n, crop, source), nearest source index and valid, (n, crop).

    Pixel centres lie at half-integers: output k shows source position (k + 0.5) * source / length - 0.5.
    """
    window_on = send(torch.from_numpy(window), device)
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
    and so on, the turn of the hue from ± hue (in full turns), sigma is in pixels. Defaults: UniMatch V2. With other
    than 3 channels the same numbers are drawn, and saturation, hue and grey are left out.
    """
    if len(draws) != len(images):
        raise ValueError(f"{len(images)} images, {len(draws)} generators: must be equal")
    drawn = np.array([[*rng.random(8), *rng.permutation(4)] for rng in draws])
    out = list(images)
    for some in _groups(np.flatnonzero(drawn[:, 0] < p_jitter).tolist(), images):
        amounts = (2 * drawn[some, 3:7] - 1) * (brightness, contrast, saturation, hue)
        _put(out, some, jitter(_stacked([out[i] for i in some]), amounts, drawn[some, 8:].astype(int)))
    for i in np.flatnonzero(drawn[:, 1] < p_gray) if images.shape[1] == 3 else ():
        out[i] = _gray(out[i]).expand_as(out[i])
    for some in _groups(np.flatnonzero(drawn[:, 2] < p_blur).tolist(), images):
        sigmas = sigma[0] + (sigma[1] - sigma[0]) * drawn[some, 7]
        _put(out, some, blur(_stacked([out[i] for i in some]), sigmas, radius=math.ceil(3 * sigma[1])))
    return torch.stack(out)


def _groups(places: list[int], images: Tensor) -> list[list[int]]:
    """Split the positions into groups that fit the CPU's cache: single images from 363 x 363 pixels on."""
    size = max(1, 2**18 // (images.shape[-2] * images.shape[-1])) if images.device.type == "cpu" else len(places)
    return [places[start : start + size] for start in range(0, len(places), size or 1)]


def _stacked(images: list[Tensor]) -> Tensor:
    """Stack the images; a single one is not copied."""
    return images[0].unsqueeze(0) if len(images) == 1 else torch.stack(images)


def _put(into: list[Tensor], places: list[int], images: Tensor) -> None:
    for place, image in zip(places, images, strict=True):
        into[place] = image


def jitter(images: Tensor, amounts: np.ndarray, order: np.ndarray) -> Tensor:
    """Change brightness, contrast, saturation and hue of (n, 3, H, W), each image in its own order.

    amounts (n, 4): factor minus 1 three times, then the turn of the hue; order (n, 4): a permutation of 0..3 per image.
    Steps before and after the hue are cheap and done image by image; the hue is expensive and done for all at once.
    Of other than 3 channels brightness and contrast alone change.
    """
    if images.shape[1] != 3:
        return _cheap(images, amounts, [[one for one in mine if one < 2] for mine in order.tolist()])
    before, after = [], []
    for operations in order.tolist():
        place = operations.index(3)
        before.append(operations[:place])
        after.append(operations[place + 1 :])
    turned = turn_hue(_cheap(images, amounts, before), amounts[:, 3])
    return _cheap(turned, amounts, after)


def _cheap(images: Tensor, amounts: np.ndarray, operations: list[list[int]]) -> Tensor:
    out = []
    for image, amount, mine in zip(images, amounts.tolist(), operations, strict=True):
        for operation in mine:
            image = (brighten, contrasted, saturated)[operation](image, 1 + amount[operation])
        out.append(image)
    return _stacked(out)


def _gray(image: Tensor) -> Tensor:
    """Return the grey value (1, H, W)."""
    red, green, blue = image.unbind()
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(0)


def brighten(image: Tensor, factor: float) -> Tensor:
    """Scale the brightness; factor 0 gives black."""
    return (image * factor).clamp_(0, 1)


def contrasted(image: Tensor, factor: float) -> Tensor:
    """Blend with the image's mean grey, of other than 3 channels each with its mean; factor 0 gives that alone."""
    if len(image) != 3:
        return torch.lerp(image.mean((1, 2), keepdim=True).expand_as(image), image, factor).clamp_(0, 1)
    return torch.lerp(_gray(image).mean().expand_as(image), image, factor).clamp_(0, 1)


def saturated(image: Tensor, factor: float) -> Tensor:
    """Blend with each pixel's grey; factor 0 gives the grey alone."""
    return torch.lerp(_gray(image).expand_as(image), image, factor).clamp_(0, 1)


def turn_hue(images: Tensor, turns: np.ndarray) -> Tensor:
    """Rotate the hue of (n, 3, H, W) by each image's number of full turns; value and saturation stay."""
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    ahead = torch.where(value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4))
    hue = torch.where(value == red, green - blue, ahead).div_((chroma * 6).clamp_min_(1e-12))
    # A channel falls from value to minimum with its distance, round the circle, from its own hue: 0, 1/3 and 2/3 turns.
    shift = torch.from_numpy(turns[:, None] - np.array([0, 1 / 3, 2 / 3])).to(images.dtype)
    away = hue.unsqueeze(1) + send(shift, images.device)[..., None, None]
    away = away.sub_(away.round()).abs_().mul_(6).sub_(1).clamp_(0, 1)
    return torch.addcmul(value.unsqueeze(1), chroma.unsqueeze(1), away, value=-1)


BLOCK = 64


def blur(images: Tensor, sigma: np.ndarray, radius: int) -> Tensor:
    """Blur (n, 3, H, W) with one sigma an image in pixels, cut at ``radius`` and mirrored at the border."""
    distances = np.arange(radius + 1)
    kernel = np.exp(-0.5 * (distances / np.maximum(sigma, 1e-3)[:, None]) ** 2)
    kernel /= kernel.sum(1, keepdims=True) + kernel[:, 1:].sum(1, keepdims=True)
    weights = send(torch.from_numpy(kernel).to(images.dtype), images.device)
    return _blur_axis(_blur_axis(images, weights, radius, -2), weights, radius, -1)


def _blur_axis(images: Tensor, weights: Tensor, radius: int, axis: int) -> Tensor:
    """Blur along an axis with matrix products, mirrored without a padded copy; on a CPU in blocks of pixels.

    All blocks but the ends have one matrix. At 513 pixels that takes a third of the time of the dense product and half
    of a grouped convolution's; below 193 the dense one is as fast.
    """
    length = images.shape[axis]
    blocks = images.device.type == "cpu" and length > 3 * BLOCK and radius <= BLOCK // 2
    side = 3 * BLOCK if blocks else length
    matrix = (weights @ _shifts(side, radius, images.device).to(images.dtype)).view(-1, 1, side, side)

    def product(part: Tensor, seen: Tensor) -> Tensor:
        return part @ seen if axis == -2 else seen @ part.mT

    if not blocks:
        return product(matrix, images)
    done = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        low, high = max(0, start - radius), min(length, stop + radius)
        # Where the small matrix has the same neighbourhood: at its start, in its middle or at its end.
        shift = 0 if start == 0 else BLOCK - start if high < length else side - length
        part = matrix[..., start + shift : stop + shift, low + shift : high + shift]
        done.append(product(part, images.narrow(axis, low, high - low)))
    return torch.cat(done, axis)  # several times faster than copying narrow columns one by one


@lru_cache(maxsize=4)
def _shifts(length: int, radius: int, device: torch.device) -> Tensor:
    """Return (radius + 1, length * length) how often output i (row) reads source j at each distance, mirrored."""
    if radius >= length:
        raise ValueError(f"blur radius {radius}: the image must be larger, it has {length} pixels on one side")
    out = torch.zeros(radius + 1, length, length)
    places = torch.arange(length)
    for distance in range(radius + 1):
        for source in {places - distance, places + distance} if distance else {places}:
            source = source.abs()
            source = torch.where(source < length, source, 2 * (length - 1) - source)
            out[distance, places, source] += 1
    return out.view(radius + 1, -1).to(device)
