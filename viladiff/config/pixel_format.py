"""What the pixels of a data set's image files are: which bands are channels, and which values are black and white."""

from __future__ import annotations

import re
from typing import NamedTuple

MOST_CHANNELS = 256
"""Of an image; a limit against sides of arrays that are taken for channels."""
_DEPTH = re.compile(r"([1-9]\d?)bit")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_WINDOW = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_PERCENTILES = re.compile(rf"p({_NUMBER})\.\.p({_NUMBER})")
RANGES = "a depth as 12bit, values as -1000..400 (one pair, or one a channel with commas), or percentiles as p1..p99"
"""What ``data.value_range`` may be."""


class PixelFormat(NamedTuple):
    """Meaning of the pixels of image files; the default is 8 bits of red, green and blue, or grey."""

    channels: int | None = None
    """Bands of a file; None is 3, with grey repeated and transparency left out."""
    bands: tuple[int, ...] | None = None
    """Bands that are the channels, from 1, in this order; None is all."""
    value_range: str | None = None
    """Which values become 0 and 1; None is 8 bits."""
    shown: tuple[int, ...] | None = None
    """Channels, from 1, that pictures show as red, green and blue."""

    @property
    def inputs(self) -> int:
        """Channels of an image as networks get it."""
        return len(self.bands) if self.bands else self.channels or 3

    @property
    def plain(self) -> bool:
        """Whether no field says anything of the values or bands of a file."""
        return self[:3] == (None, None, None)

    def display(self) -> tuple[int, int, int]:
        """Return the places of the channels that pictures show as red, green and blue: the first alone but for 3."""
        if self.shown:
            red, green, blue = (place - 1 for place in self.shown)
            return red, green, blue
        return (0, 1, 2) if self.inputs == 3 else (0, 0, 0)


RGB_8 = PixelFormat()
"""Where no field says anything."""


class Depth(NamedTuple):
    """Integers from 0 to 2^bits - 1."""

    bits: int


class Windows(NamedTuple):
    """The values that become 0 and 1, a pair for all channels or one for each; what lies outside is clipped."""

    pairs: tuple[tuple[float, float], ...]


class Percentiles(NamedTuple):
    """The percentiles of each channel of each image that become 0 and 1; what lies outside is clipped."""

    low: float
    high: float


ValueRange = Depth | Windows | Percentiles


def parse_value_range(text: str) -> ValueRange:
    """Parse ``data.value_range``. Raises ValueError that says what is allowed."""
    depth, percentiles = _DEPTH.fullmatch(text), _PERCENTILES.fullmatch(text)
    if depth and int(depth[1]) <= 32:
        return Depth(int(depth[1]))
    if percentiles:
        low, high = map(float, percentiles.groups())
        if 0 <= low < high <= 100:
            return Percentiles(low, high)
    windows = [_WINDOW.fullmatch(part.strip()) for part in text.split(",")]
    pairs = tuple((float(one[1]), float(one[2])) for one in windows if one)
    if len(pairs) == len(windows) and all(low < high < float("inf") and low > -float("inf") for low, high in pairs):
        return Windows(pairs)
    raise ValueError(f"value_range = {text!r}: must be {RANGES}")


def check_pixel_format(found: PixelFormat) -> None:
    """Raise ValueError that names the field which contradicts the others or itself."""
    channels, bands, value_range, shown = found
    if bands is not None and (not bands or min(bands) < 1 or len(set(bands)) < len(bands)):
        raise ValueError(f"bands = {bands}: must be different numbers of bands, from 1")
    if bands is not None and channels is not None and max(bands) > channels:
        raise ValueError(
            f"bands = {bands}: data.channels = {channels} is how many a file has, and {max(bands)} is more"
        )
    if shown is not None and (len(shown) != 3 or min(shown) < 1 or max(shown) > found.inputs):
        raise ValueError(f"shown = {shown}: must be three channels from 1 to {found.inputs}: red, green and blue")
    if value_range is None:
        return
    windows = parse_value_range(value_range)
    if isinstance(windows, Windows) and len(windows.pairs) not in (1, found.inputs):
        pairs = f"{len(windows.pairs)} pairs for {found.inputs} channels"
        raise ValueError(f"value_range = {value_range!r}: {pairs}; give one, or one each")
