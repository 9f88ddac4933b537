"""Readers of photographs and masks: 8-bit RGB, or class ids, from the files of cameras and editors.

Every function raises ValueError that names the file and what is wrong with it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from viladiff.data.constants import IGNORE

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "PPM")
"""What Pillow may open; it knows formats that start other programs, and they are left out."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm")
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""All that Pillow raises for bytes that are not the image that their header promises."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the value of EXIF's orientation, what shows the image as it was taken."""
_TURNED = (5, 6, 7, 8)
"""Orientations that swap height and width."""


@dataclass(frozen=True)
class PaletteEncoding:
    """The class of each colour of a mask."""

    rgb: tuple[tuple[int, int, int], ...]
    labels: tuple[int, ...]
    """As many: 0 ... C - 1, or 255 for a colour that is ignored."""

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        codes = _codes(np.array(self.rgb, np.uint8))
        order = codes.argsort()
        return codes[order], np.array(self.labels, np.uint8)[order]

    def labels_of(self, pixels: np.ndarray) -> np.ndarray:
        """Map (h, w, 3) uint8 to (h, w) uint8. Raises ValueError that names the first colour that is in no class."""
        known, labels = self._sorted
        codes = _codes(pixels)
        places = np.searchsorted(known, codes).clip(max=len(known) - 1)
        wrong = known[places] != codes
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            colour = tuple(pixels[row, column].tolist())
            raise ValueError(
                f"{np.count_nonzero(wrong)} pixels have a colour of no class, first {colour} "
                f"at row {row}, column {column}; the palette has {len(known)} colours"
            )
        return labels[places]


@dataclass(frozen=True)
class IdEncoding:
    """The class of each number of a mask, if some numbers are not allowed or are not the class itself."""

    numbers: tuple[int, ...]
    """From 0 to 255."""
    labels: tuple[int, ...]
    """As many: 0 ... C - 1, or 255 for a number that is ignored."""
    hint: str
    """What it tells of a file that it holds another number."""

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """Map (h, w) integers to (h, w) uint8. Raises ValueError that names numbers which are not allowed."""
        found = np.flatnonzero(label_counts(ids)) if ids.dtype == np.uint8 else np.unique(ids)
        wrong = sorted(set(found.tolist()) - set(self.numbers))
        if wrong:
            raise ValueError(f"{np.isin(ids, wrong).sum()} pixels hold {_some(wrong)}; {self.hint}")
        table = np.zeros(256, np.uint8)
        table[list(self.numbers)] = self.labels
        return table[ids]


MaskEncoding = PaletteEncoding | IdEncoding
"""How the pixels of a mask say their class, where they are not class ids with 255 for what is ignored."""


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")


def _codes(rgb: np.ndarray) -> np.ndarray:
    wide = rgb.astype(np.uint32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


@contextmanager
def open_image(path: Path | str) -> Iterator[Image.Image]:
    """Open the file with Pillow, its header read and its pixels not yet; close it at the end."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image of a known format ({', '.join(FORMATS)})") from None
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
    return found if found in _UPRIGHT else 1


def image_size(path: Path | str) -> tuple[int, int]:
    """Return (height, width) of ``read_image(path)``, from the header alone."""
    with open_image(path) as image:
        return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) once turned by EXIF, from the header alone."""
    return (image.width, image.height) if orientation(image) in _TURNED else (image.height, image.width)


def read_image(path: Path | str) -> np.ndarray:
    """Return (h, w, 3) uint8, upright by its EXIF orientation.

    Grey, palette and CMYK images are converted as Pillow does, transparency is dropped, and 16 bits a channel are
    brought to 8 so that the brightest value stays the brightest.
    """
    with open_image(path) as image:
        turn = _UPRIGHT.get(orientation(image))
        image.load()
        upright = image if turn is None else image.transpose(turn)
        if upright.mode.startswith("I") or upright.mode == "F":
            return np.repeat(_to_8_bits(np.asarray(upright), upright.mode)[..., None], 3, axis=2)
        # A palette with transparency goes by way of RGBA, or Pillow warns where it is given for each colour.
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return np.array(upright.convert("RGB"))


def _to_8_bits(pixels: np.ndarray, mode: str) -> np.ndarray:
    low, high = pixels.min(), pixels.max()
    if mode == "F" or low < 0 or high > 65535:
        raise ValueError(f"grey values {low} ... {high} (Pillow's mode {mode}): 8 or 16 bits a channel can be read")
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def read_mask(path: Path | str, num_classes: int, coding: MaskEncoding | None = None) -> np.ndarray:
    """Return (h, w) uint8 of class ids and 255, upright by its EXIF orientation.

    A pixel is a number: the index of a palette image, the value of a grey one (1 to 16 bits), or the value common to
    all channels of an RGB one. It is the class id, unless ``coding`` says what it stands for. Where that is of colours,
    the colour counts, whatever the file's mode.
    """
    with open_image(path) as image:
        turn, step = _UPRIGHT.get(orientation(image)), _step(image)
        image.load()
        upright = image if turn is None else image.transpose(turn)
        if isinstance(coding, PaletteEncoding):
            return coding.labels_of(np.asarray(upright.convert("RGB")))
        ids = _indices(upright) // step
        if coding is not None:
            return coding.labels_of(ids)
        wrong = ids >= num_classes
        wrong &= ids != IGNORE
        if ids.dtype.kind == "i":
            wrong |= ids < 0
        if wrong.any():
            raise ValueError(
                f"{np.count_nonzero(wrong)} pixels are of no class ({_some(np.unique(ids[wrong]).tolist())}); "
                f"allowed: 0 ... {num_classes - 1}, and {IGNORE} for what is ignored"
            )
        return ids.astype(np.uint8)


def label_counts(labels: np.ndarray) -> np.ndarray:
    """Return (256,) int64 pixels by label; many times faster than NumPy, which would widen the labels first."""
    return np.array(Image.fromarray(labels).histogram(), np.int64)


def _step(image: Image.Image) -> int:
    """Return Pillow's factor for the values of a grey PNG with 2 or 4 bits a pixel, by which the largest becomes 255.

    1 for all other files. Call it before the pixels are loaded.
    """
    packed = {"L;2": 85, "L;4": 17}
    return max((packed.get(str(tile[3]), 1) for tile in getattr(image, "tile", ())), default=1)


def _indices(image: Image.Image) -> np.ndarray:
    """Return (h, w) integers."""
    if image.mode in ("P", "L", "1") or image.mode.startswith("I"):
        return np.asarray(image).astype(np.int64 if image.mode.startswith("I") else np.uint8)
    if image.mode in ("LA", "PA"):
        return np.asarray(image)[..., 0]
    if image.mode in ("RGB", "RGBA"):
        channels = np.asarray(image)
        if (channels[..., 0] == channels[..., 1]).all() and (channels[..., 0] == channels[..., 2]).all():
            return channels[..., 0]
        raise ValueError("a mask in colour: palette.txt must say which colour is which class, as in '128 0 0 cat'")
    raise ValueError(f"a mask of Pillow's mode {image.mode}: index, grey and colour images can be read")


class FileImages(Sequence[np.ndarray]):
    """Images of different sizes, each (h, w, 3) uint8, decoded when asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]  # one at a time, no slices
        return read_image(self.paths[index])


class FileMasks(Sequence[np.ndarray]):
    """Masks of such images, each (h, w) uint8, opened when asked for."""

    def __init__(self, paths: Sequence[Path], num_classes: int, coding: MaskEncoding | None) -> None:
        self.paths, self.num_classes, self.coding = tuple(paths), num_classes, coding

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        return read_mask(self.paths[index], self.num_classes, self.coding)
