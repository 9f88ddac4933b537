"""From the numbers in a file to 0 ... 1, and to the 8 bits that pictures show."""

from __future__ import annotations

import numpy as np

from viladiff.config.pixel_format import Depth, Percentiles, PixelFormat, Windows, parse_value_range

SIXTEENTH_BIT = 2**15


def in_range(bands: np.ndarray, value_range: str) -> np.ndarray:
    """Return (h, w, N) float32 in 0..1 of numbers (h, w, N) by ``data.value_range``.

    A depth admits integers of that many bits alone. Windows and percentiles clip what lies outside of them; a channel
    of one value is 0 under percentiles. Raises ValueError for numbers beyond the depth, NaN and infinity.
    """
    meant = parse_value_range(value_range)
    _refuse_other_kinds(bands)
    if isinstance(meant, Depth):
        return _of_depth(bands, meant.bits)
    if isinstance(meant, Windows):
        low, high = (np.array(side, np.float64) for side in zip(*meant.pairs, strict=True))
    else:
        low, high = _percentiles(bands, meant)
    span = np.where(high > low, high - low, 1)
    return np.clip((bands - low) / span, 0, 1).astype(np.float32)


def _of_depth(bands: np.ndarray, bits: int) -> np.ndarray:
    if bands.dtype.kind == "f":
        raise ValueError(f"values are {bands.dtype}, and data.value_range = '{bits}bit' is of integers; give low..high")
    if 8 * bands.dtype.itemsize < bits:
        raise ValueError(f"a file of {bands.dtype}, which cannot hold data.value_range = '{bits}bit' as the others do")
    low, high = (int(bands.min()), int(bands.max())) if bands.size else (0, 0)
    if low < 0 or high >= 2**bits:
        raise ValueError(f"values {low} ... {high}, and data.value_range = '{bits}bit' has 0 ... {2**bits - 1}")
    return (bands / (2**bits - 1)).astype(np.float32)


def _percentiles(bands: np.ndarray, meant: Percentiles) -> tuple[np.ndarray, np.ndarray]:
    # NumPy has no percentiles of bits.
    bands = bands.astype(np.uint8) if bands.dtype == np.bool_ else bands
    low, high = np.percentile(bands, [meant.low, meant.high], axis=(0, 1))
    return low, high


def undeclared_8_bits(bands: np.ndarray) -> np.ndarray:
    """Return (h, w, N) uint8 where no field says which values are black and white.

    8 bits stay. 16 bits of which the highest is used in the image can only be meant as 0 ... 65535; all other numbers
    may have been meant in several ways. Raises ValueError for these, with the values that were found.
    """
    if bands.dtype == np.uint8:
        return bands
    _refuse_other_kinds(bands)
    if bands.dtype == np.bool_:
        return bands.astype(np.uint8) * 255
    low, high = bands.min(), bands.max()
    if bands.dtype.kind in "iu" and low >= 0 and SIXTEENTH_BIT <= high < 2 * SIXTEENTH_BIT:
        return of_16_bits(bands)
    raise ValueError(
        f"grey values {low:g} ... {high:g} ({bands.dtype}): without data.value_range only 8 or 16 bits a channel can "
        f"be read, the latter if the highest bit is used; set data.value_range to {_suggested(bands, low, high)}"
    )


def _refuse_other_kinds(bands: np.ndarray) -> None:
    if bands.dtype.kind not in "biuf":
        raise ValueError(f"values are {bands.dtype}; must be real numbers")
    if bands.dtype.kind == "f" and not np.isfinite(bands).all():
        wrong = np.count_nonzero(~np.isfinite(bands).all(2))
        raise ValueError(
            f"{wrong:,} pixels are NaN or infinite; write a number in their place, as the lower end of data.value_range"
        )


def of_16_bits(numbers: np.ndarray) -> np.ndarray:
    """Return uint8 of integers from 0 to 65535, of which the largest becomes 255."""
    return ((numbers.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _suggested(bands: np.ndarray, low: float, high: float) -> str:
    if bands.dtype.kind in "iu" and low >= 0:
        fitting = [bits for bits in (8, 10, 12, 14, 16, 32) if high < 2**bits]
        depths = " or ".join(f"{bits}bit (0 ... {2**bits - 1})" for bits in fitting[:3])
        return f"the depth that is meant, as {depths}, or to low..high"
    return f"the values that are black and white, as {low:g}..{high:g}, the same for all images"


def displayed(image: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """Return (h, w, 3) uint8 of an image (h, w, N), uint8 or float32 in 0..1, as pictures show it."""
    if image.dtype == np.uint8 and image.shape[2] == 3 and pixels.shown is None:
        return image
    chosen = image[..., list(pixels.display())]
    return np.ascontiguousarray(chosen if chosen.dtype == np.uint8 else np.rint(chosen * 255).astype(np.uint8))
