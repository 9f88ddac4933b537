"""TIFF files of any depth, bands and pages.

Overviews and masks of pixels that a file holds beside its image (as those of cloud-optimised GeoTIFF) are passed over.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""What a file begins with; the last two are BigTIFF."""
_OTHER_PLANES = 1 | 4
"""Bits of NewSubfileType: an overview, a mask of pixels."""
WHITE_IS_ZERO, _GREY, _RGB = 0, 1, 2
_ALPHA = (1, 2)
_PILLOW_READS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000, 50001)
"""Compressions: none, CCITT, LZW, JPEG, deflate, PackBits, LZMA, Zstandard, WebP."""
JPEG_COMPRESSIONS = (6, 7)
"""Of TIFF 6.0 and of its second technical note."""
_LAST_OF_AN_EXIF_TURN = 8


class TiffFacts(NamedTuple):
    """The header of a TIFF."""

    size: tuple[int, int]
    """(height, width), upright by its orientation."""
    bands: int
    """Of one page."""
    pages: int
    dtype: np.dtype[Any]
    alpha: bool
    """Whether the last band is marked as transparency."""
    photometric: int
    turn: int
    """Orientation by TIFF 6.0, as in EXIF."""
    compression: int = 1

    @property
    def eight_bits(self) -> bool:
        """Whether it is one page of grey, colours or a palette in up to 8 bits, which Pillow reads whole."""
        plain = self.bands - self.alpha in ((1, 3) if self.photometric in (WHITE_IS_ZERO, _GREY, _RGB) else (1, 3, 4))
        plain = plain and self.compression in _PILLOW_READS
        return plain and self.pages == 1 and self.dtype in (np.uint8, np.bool_)


def tiff_facts(path: Path | str) -> TiffFacts | None:
    """Return the header; None if it cannot be read."""
    try:
        with _opened(path) as file:
            return _facts(file)
    except Exception:  # whatever a damaged file makes the library raise
        return None


def read_tiff(path: Path | str) -> tuple[np.ndarray, TiffFacts]:
    """Return (h, w, pages x bands) as the file has them, not turned, and the header. Raises ValueError if damaged."""
    try:
        with _opened(path) as file:
            facts = _facts(file)
            first = file.series[0]
            planes = [axis for axis in first.axes if axis not in "YXS"]
            found = _from_series(first) if planes and len(first.pages) >= facts.pages else _from_pages(_real(file))
    except Exception as error:
        raise ValueError(f"cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if facts.photometric == WHITE_IS_ZERO and found.dtype != np.bool_:
        raise ValueError("0 is white in it (photometric MINISWHITE); write it with 0 as black")
    return found, facts


def _opened(path: Path | str) -> Any:
    import tifffile  # a fifth of a second that files of other kinds do not need

    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # a problem is raised or harmless
    return tifffile.TiffFile(path)


def _real(file: Any) -> list[Any]:
    """Return the pages of the image itself. Raises ValueError for a page that comes again, as it would without end."""
    pages: dict[int, Any] = {}
    for page in file.pages:
        if page.offset in pages:
            raise ValueError(f"page {len(pages) + 1} of it is one of those before")
        pages[page.offset] = page
    return [page for page in pages.values() if not page.subfiletype & _OTHER_PLANES] or [file.pages[0]]


def _facts(file: Any) -> TiffFacts:
    pages = _real(file)
    page, first = pages[0], file.series[0]
    if page.imagedepth != 1:
        raise ValueError("a volume in one page; write one slice a file")
    planes = int(np.prod([n for n, axis in zip(first.shape, first.axes, strict=True) if axis not in "YXS"], dtype=int))
    height, width = page.imagelength, page.imagewidth
    tag = page.tags.get("Orientation")
    turn = 1 if tag is None or not 1 <= int(tag.value) <= _LAST_OF_AN_EXIF_TURN else int(tag.value)
    size = (width, height) if turn > 4 else (height, width)
    alpha = bool(page.extrasamples) and int(page.extrasamples[-1]) in _ALPHA
    count = max(planes, len(pages))
    return TiffFacts(
        size,
        page.samplesperpixel,
        count,
        np.dtype(page.dtype),
        alpha,
        int(page.photometric),
        turn,
        int(page.compression),
    )


def _from_series(series: Any) -> np.ndarray:
    """Return (h, w, n) of a series, of which tifffile knows the meaning of each axis; the others are in their order."""
    axes = list(series.axes)
    others = [i for i, axis in enumerate(axes) if axis not in "YX"]
    array = series.asarray().transpose(axes.index("Y"), axes.index("X"), *others)
    return array.reshape(*array.shape[:2], -1)


def _from_pages(pages: list[Any]) -> np.ndarray:
    shapes = {(page.shape, page.dtype) for page in pages}
    if len(shapes) > 1:
        raise ValueError(f"its {len(pages)} pages differ in size or type; write one image a file")
    found = []
    for page in pages:
        plane = page.asarray()
        if page.axes == "SYX":
            plane = plane.transpose(1, 2, 0)
        found.append(plane.reshape(*plane.shape[:2], -1))
    return np.concatenate(found, axis=2) if len(found) > 1 else found[0]
