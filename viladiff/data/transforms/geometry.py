"""UniMatch's geometric augmentation of real images: resize, pad, crop, mirror, one image at a time on the host.

Only the pixels that the crop shows are computed. NumPy and Pillow suffice: a decoding process needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from viladiff.data.constants import IGNORE

BILINEAR = Image.Resampling.BILINEAR
Range = tuple[float, float]


class Pixels(Protocol):
    """An array of rows and columns, or what can be cut like one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, part: Any, /) -> np.ndarray: ...


class Window(NamedTuple):
    """The part of a resized image in a square crop; all in pixels."""

    source: tuple[int, int]
    """Height and width before the resize."""
    resized: tuple[int, int]
    """Height and width after it."""
    start: tuple[int, int]
    """Row and column of the resized image at the crop's upper left."""
    shown: tuple[int, int]
    """Rows and columns of the crop that show the image; what is left, below and on the right, is padding."""
    flip: bool
    """Whether the crop, padding and all, is mirrored left and right."""


def window(size: tuple[int, int], crop: int, scale: Range, hflip: float, draws: Sequence[float]) -> Window:
    """Return the window that four uniform numbers in [0, 1) choose for an image of this height and width.

    draws: long side, row, column, mirroring. The long side L becomes an integer in int(scale[0] L) .. int(scale[1] L),
    each as likely; the short side keeps the aspect, rounded half up (UniMatch). No side is shorter than 1 pixel.
    Raises ValueError for a scale that is not positive, and for a crop or side below 1.
    """
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale = {scale}: must be low, high with 0 < low <= high")
    if min(crop, *size) < 1:
        raise ValueError(f"crop = {crop}, height and width = {size}: must be at least 1")
    height, width = size
    low, high = (max(1, int(max(size) * factor)) for factor in scale)
    side = low + int(draws[0] * (high - low + 1))
    if height > width:
        resized = side, max(1, int(width * side / height + 0.5))
    else:
        resized = max(1, int(height * side / width + 0.5)), side
    rows, columns = (int(draw * (max(length - crop, 0) + 1)) for draw, length in zip(draws[1:3], resized, strict=True))
    shown = min(crop, resized[0]), min(crop, resized[1])
    return Window(size, resized, (rows, columns), shown, bool(draws[3] < hflip))


def crop_image(pixels: Pixels, to: Window, out: np.ndarray) -> None:
    """Write the window of pixels (h, w, N) to out (N, crop, crop), both uint8 or float32, 0 in the padding.

    Bilinear, spread over more source pixels where it shrinks; columns first and rounded, then rows, as Pillow did when
    the published results were made. A crop of the whole image resized so differs by 2 of 255 at most, in values that
    lie half-way between two levels.
    """
    edges = [_edges(*axis) for axis in zip(to.source, to.resized, to.start, to.shown, strict=True)]
    (top, bottom, first, last), (left, right, west, east) = edges
    rows, columns = to.shown

    def resized(part: np.ndarray) -> np.ndarray:
        image = Image.fromarray(part)
        if to.source != to.resized:
            image = image.resize((columns, last - first), BILINEAR, box=(left, 0, right, last - first))
            image = image.resize((columns, rows), BILINEAR, box=(0, top, columns, bottom))
        return np.asarray(image)

    seen = pixels[first:last, west:east]
    if seen.dtype == np.uint8 and seen.shape[2] == 3:
        _put(out, resized(seen).transpose(2, 0, 1), to, 0)
    else:  # Pillow has no image of other kinds, but each channel is one
        planes = [resized(np.ascontiguousarray(plane)) for plane in seen.transpose(2, 0, 1)]
        _put(out, np.stack(planes), to, 0)


def _edges(source: int, resized: int, start: int, shown: int) -> tuple[float, float, int, int]:
    """Return one axis of the window: its source pixels, first and one past the last, and its start and end there."""
    step = source / resized
    low, high = start * step, (start + shown) * step
    reach = max(1.0, step) + 1 if source != resized else 0
    first, last = max(0, math.floor(low - reach)), min(source, math.ceil(high + reach))
    return low - first, min(high - first, last - first), first, last


def crop_mask(labels: Pixels, to: Window, out: np.ndarray) -> None:
    """Write the window of labels (h, w) uint8 to out (crop, crop) uint8, 255 in the padding.

    The nearest label: row k of the resized mask shows source row floor((k + 0.5) h / resized), in integers.
    """
    rows, columns = (
        (2 * (np.arange(count) + start) + 1) * source // (2 * resized)
        for count, start, source, resized in zip(to.shown, to.start, to.source, to.resized, strict=True)
    )
    seen = labels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    _put(out, seen.take(columns - columns[0], 1).take(rows - rows[0], 0), to, IGNORE)


def _put(out: np.ndarray, seen: np.ndarray, to: Window, padding: int) -> None:
    rows, columns = to.shown
    if to.flip:
        out = out[..., ::-1]
    out[..., :rows, :columns] = seen
    out[..., rows:, :] = padding
    out[..., :rows, columns:] = padding
