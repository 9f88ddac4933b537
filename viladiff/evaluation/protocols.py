"""The three published protocols: logits of images of any size, computed in bands from the top down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.config.base import did_you_mean
from viladiff.data.batch import TextBatch
from viladiff.models.segmenter import Segmenter

STREAMS = ("visual", "fusion", "fusion_no_text", "mean")
"""``fusion`` and ``mean`` read the text; ``mean`` averages probabilities; ``fusion_no_text`` reads the null token."""
PROTOCOLS = ("original", "center_crop", "sliding_window")

Forward = Callable[[Tensor], dict[str, Tensor]]
"""Normalised images (B, 3, H, W), of sides that the network takes, to full-size logits (B, C, H, W) by stream."""


class Band(NamedTuple):
    """A few whole rows of the answer."""

    top: int
    logits: dict[str, Tensor]
    """(B, C, rows, W) by stream."""


def _as_it_is(image: Tensor) -> Tensor:
    return image


def bands(
    forward: Forward,
    image: Tensor,
    multiple: int,
    protocol: str = "original",
    crop: int = 0,
    prepare: Callable[[Tensor], Tensor] = _as_it_is,
) -> Iterator[Band]:
    """Yield the logits of ``image`` (B, N, H, W), normalised, from the top down; for ``center_crop`` only its centre's.

    ``original`` resizes to the nearest multiple of the patch and back. ``sliding_window`` steps by floor(2/3 crop),
    snaps the last window to the border and averages probabilities; one band a row of windows, so that memory grows
    with width times crop, not with the number of windows nor with the height. A crop that the patch does not divide is
    resized as in ``original``, window by window. ``prepare`` normalises an image that is not yet, window by window
    where there are some, so that a huge one is never held as floats. Those with a crop pad a smaller image with the
    mean colour at the bottom and right and cut that off again. Raises ValueError for an unknown protocol or a crop that
    is not positive.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"protocol = {protocol!r}: must be one of {', '.join(PROTOCOLS)}{did_you_mean(protocol, PROTOCOLS)}"
        )
    height, width = image.shape[-2:]
    if protocol != "sliding_window" or crop < 1 or min(height, width) < crop:
        image, prepare = prepare(image), _as_it_is
    if protocol == "original":
        yield Band(0, resized_logits(forward, image, multiple))
        return
    if crop < 1:
        raise ValueError(f"crop = {crop}: {protocol} needs a positive one")
    image = center(image, crop) if protocol == "center_crop" else image
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, max(0, crop - width), 0, max(0, crop - height)))

    def window(x: Tensor) -> dict[str, Tensor]:
        return resized_logits(forward, prepare(x), multiple)

    for top, logits in [Band(0, window(padded))] if protocol == "center_crop" else _slid(window, padded, crop):
        yield Band(top, {name: x[..., : height - top, :width] for name, x in logits.items()})


def resized_logits(forward: Forward, image: Tensor, multiple: int) -> dict[str, Tensor]:
    """Apply ``forward`` at the nearest multiples of the patch and resize its maps to the image's own size."""
    back = tuple(image.shape[-2:])
    size = tuple(nearest_multiple(side, multiple) for side in back)
    if size == back:
        return forward(image)
    logits = forward(F.interpolate(image, size, mode="bilinear"))
    return {name: F.interpolate(x, back, mode="bilinear") for name, x in logits.items()}


def nearest_multiple(side: int, multiple: int) -> int:
    """Return the positive multiple nearest to ``side``; halves go to the even one."""
    return max(multiple, round(side / multiple) * multiple)


def _slid(forward: Forward, image: Tensor, crop: int) -> Iterator[Band]:
    """Sum probabilities of overlapping windows in place, in a band one window high that moves down."""
    height, width = image.shape[-2:]
    stride = window_stride(crop)
    sums: dict[str, Tensor] = {}
    for top, below in pairwise([*_snapped_starts(height, crop, stride), height]):
        for left in _snapped_starts(width, crop, stride):
            columns = slice(left, left + crop)
            for name, logits in forward(image[..., top : top + crop, columns]).items():
                if name not in sums:
                    sums[name] = logits.new_zeros((*logits.shape[:2], crop, width), dtype=torch.float32)
                sums[name][..., columns] += logits.float().softmax(1)
        done = below - top  # rows that no later window reaches
        yield Band(top, {name: _log(x[..., :done, :]) for name, x in sums.items()})
        for x in sums.values():
            x[..., : crop - done, :] = x[..., done:, :].clone()
            x[..., crop - done :, :] = 0


def window_stride(crop: int) -> int:
    """Return floor(2/3 crop), as published for Cityscapes."""
    return max(1, 2 * crop // 3)


def _snapped_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the window starts along one side; the last window ends at the border, so that all have one size."""
    return [*range(0, length - window, stride), length - window]


def _log(sums: Tensor) -> Tensor:
    """Return logits of summed probabilities (B, C, H, W), finite, since interpolating an infinity gives NaN."""
    return (sums / sums.sum(1, keepdim=True)).clamp_min_(1e-30).log_()


def center(x: Tensor, crop: int) -> Tensor:
    """Crop (..., H, W) to its centre, at most crop x crop."""
    height, width = x.shape[-2:]
    top, left = max(0, (height - crop) // 2), max(0, (width - crop) // 2)
    return x[..., top : top + crop, left : left + crop]


def stream_logits(
    network: nn.Module, images: Tensor, text: TextBatch | None, streams: Sequence[str] = STREAMS
) -> dict[str, Tensor]:
    """Return the requested streams that are available, each (B, C, H, W) logits, from at most two forward passes.

    A network without ViLa gives ``visual`` alone; without text, ``fusion`` and ``mean`` are left out, not replaced.
    Raises ValueError for an unknown stream.
    """
    for name in streams:
        if name not in STREAMS:
            raise ValueError(f"stream = {name!r}: must be one of {', '.join(STREAMS)}{did_you_mean(name, STREAMS)}")
    text = text if {"fusion", "mean"} & set(streams) else None
    first = network(images, text)
    logits = {"visual": first["visual"]}
    if "fusion" in first and text is not None:
        logits["fusion"] = first["fusion"]
        if "mean" in streams:
            logits["mean"] = _log(first["visual"].float().softmax(1) + first["fusion"].float().softmax(1))
    if "fusion" in first and "fusion_no_text" in streams:
        logits["fusion_no_text"] = first["fusion"] if text is None else _without_text(network, images)
    return {name: logits[name] for name in streams if name in logits}


def _without_text(network: nn.Module, images: Tensor) -> Tensor:
    """Return full-size logits of the fusion stream without text, for a segmenter without that stream the only ones."""
    if isinstance(network, Segmenter):
        return network.upsample(network.streams(images, None, ("fusion",))["fusion"].logits, images.shape[-2:])
    return network(images, None)["fusion"]


def stream_bands(
    network: nn.Module,
    image: Tensor,
    text: TextBatch | None = None,
    streams: Sequence[str] = STREAMS,
    protocol: str = "original",
    crop: int = 0,
) -> Iterator[Band]:
    """Yield ``bands`` of a network's requested streams; ``network.side_multiple`` must divide the
    sides."""

    def forward(x: Tensor) -> dict[str, Tensor]:
        return stream_logits(network, x, text, streams)

    return bands(forward, image, int(getattr(network, "side_multiple", 1)), protocol, crop)


def predict_logits(
    network: nn.Module,
    image: Tensor,
    text: TextBatch | None = None,
    protocol: str = "original",
    crop: int = 0,
    stream: str = "visual",
) -> Tensor:
    """Join one stream's ``stream_bands``: (B, C, H, W) logits, of the centre only for ``center_crop``.

    Raises ValueError if the network or the missing text does not allow the stream.
    """
    found = [band.logits for band in stream_bands(network, image, text, (stream,), protocol, crop)]
    if stream not in found[0]:
        raise ValueError(f"stream = {stream!r}: needs a network with ViLa and, but for 'fusion_no_text', a caption")
    return torch.cat([logits[stream] for logits in found], 2)
