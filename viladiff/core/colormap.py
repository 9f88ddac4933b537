"""Class colours that colour-blind readers can tell apart, as far as a dozen allows."""

from __future__ import annotations

import colorsys

import numpy as np

BACKGROUND = (221, 221, 224)
_MUTED = (
    "#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#44aa99", "#882255", "#ee7733", "#aa4499", "#77771f",
)  # fmt: skip
"""Paul Tol's muted scheme, ordered so that neighbours differ in lightness, with an orange for a tenth."""
MISTAKE, RIGHT = (196, 24, 60), (232, 232, 234)
HATCH = ((120, 120, 124), (190, 190, 194))
"""Dark and light of the stripes over ignored pixels."""
SERIES = ("#3b7dd8", "#c8731c", "#2a9d74", "#a05fc9", "#c2455a", "#7a7a80")
"""Lines of charts, one a column; each has a contrast of 3 to 1 or more on white and on near-black."""


def class_colours(count: int) -> np.ndarray:
    """Return (count, 3) uint8; 0 is the background. After ten, hues follow the golden ratio in three lightnesses."""
    colours = [BACKGROUND, *(tuple(bytes.fromhex(text[1:])) for text in _MUTED)]
    for i in range(len(colours), count):
        rgb = colorsys.hls_to_rgb(i * 0.618034 % 1, (0.35, 0.55, 0.72)[i % 3], 0.6)
        colours.append(tuple(round(255 * level) for level in rgb))
    return np.array(colours[:count], np.uint8)


def hatch(height: int, width: int) -> np.ndarray:
    """Return (height, width, 3) uint8 diagonal stripes."""
    stripe = (np.add.outer(np.arange(height), np.arange(width)) % 4) < 2
    return np.array(HATCH, np.uint8)[stripe.astype(int)]


def css(colour: tuple[int, ...] | np.ndarray) -> str:
    return "#" + bytes(int(level) for level in colour).hex()
