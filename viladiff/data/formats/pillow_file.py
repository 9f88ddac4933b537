"""Files that Pillow opens, upright by their EXIF orientation.

Every function raises ValueError that names the file and what is wrong with it.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

# Photoshop and others write histories and profiles that unpack to more than Pillow's 1 MB; the pixels do not need them.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "PPM")
"""What Pillow may open; it knows formats that start other programs, and they are left out."""
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
)
"""All that Pillow raises for bytes that are not the image that their header promises."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the value of EXIF's orientation, what shows the image as it was taken."""
TURNED = (5, 6, 7, 8)
"""Orientations that swap height and width."""


MAX_PIXELS = 2**30
"""Of an image to label, which is done in windows; 3 GB in RGB."""
_allowed: ContextVar[int | None] = ContextVar("pixels", default=None)
_opening = threading.RLock()
_usual = Image.MAX_IMAGE_PIXELS
_limit: int | None = None
"""That of all threads of this process, where no ``allow_pixels`` is in force."""


def limit_pixels(most: int | None) -> None:
    """Read images of up to so many pixels in this process from here on; None restores Pillow's limit (179 million)."""
    global _limit, _usual
    if most is not None and _limit is None:
        _usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours holds in its place
    elif most is None and _limit is not None:
        Image.MAX_IMAGE_PIXELS = _usual
    _limit = most


@contextmanager
def allow_pixels(most: int) -> Iterator[None]:
    """Read images of up to so many pixels within the context, in place of the limit of the process."""
    token = _allowed.set(most)
    try:
        yield
    finally:
        _allowed.reset(token)


def check_pixels(path: Path | str, size: tuple[int, int]) -> None:
    """Raise ValueError for an image of (height, width) that is larger than the context allows."""
    usual: int | None = Image.MAX_IMAGE_PIXELS
    most = _allowed.get() or _limit or (None if usual is None else 2 * usual)
    if most is not None and size[0] * size[1] > most:
        raise ValueError(f"{path}: cannot be read: {size[1]} x {size[0]} pixels, more than {most:,} ({_LARGER})")


_LARGER = (
    "cut it into tiles to train on, or raise runtime.max_pixels; viladiff predict labels it in windows, with a higher "
    "--max-pixels"
)


@contextmanager
def _own_limit() -> Iterator[None]:
    """Lift Pillow's limit, which is one of the whole process, where the context has its own; one image at a time.

    Pillow asks for it when a file is opened, and of some formats again when its pixels are read.
    """
    if _allowed.get() is None or Image.MAX_IMAGE_PIXELS is None:
        yield
        return
    with _opening:
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = usual


@contextmanager
def open_image(path: Path | str) -> Iterator[Image.Image]:
    """Open the file with Pillow, its header read and its pixels not yet; close it at the end.

    Raises ValueError also for an image of more pixels than ``allow_pixels``, ``limit_pixels`` or Pillow admits.
    """
    try:
        with _own_limit(), Image.open(path, formats=FORMATS) as image:
            check_pixels(path, (image.height, image.width))
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: cannot be read: {error} ({_LARGER})") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        known = f"not an image of a known format ({', '.join(FORMATS)})"
        raise ValueError(f"{path}: {known if Path(path).stat().st_size else 'an empty file'}") from None
    except _UNREADABLE as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"{path}: ") else f"{path}: cannot be read: {text}") from error


def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation that is still to be applied, 1 if there is none, from the header alone."""
    # Pillow decodes a whole PNG to look for EXIF behind its pixels; only what stands before them counts here. A TIFF
    # it turns by itself, size and all.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in UPRIGHT else 1


def turned_unseen(path: Path | str) -> bool:
    """Return whether EXIF turns an image that has the same size either way, so that a mask's size cannot tell.

    Raises ValueError as ``open_image``.
    """
    with open_image(path) as image:
        found = orientation(image)
        return found != 1 and (found not in TURNED or image.width == image.height)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) once turned by EXIF, from the header alone."""
    return (image.width, image.height) if orientation(image) in TURNED else (image.height, image.width)
