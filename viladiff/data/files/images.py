"""Readers of images and masks: channels, or class ids, from the files of cameras, editors and instruments.

Every function raises ValueError that names the file and what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from viladiff.config.pixel_format import RGB_8, PixelFormat
from viladiff.core.messages import names_file
from viladiff.data.constants import IGNORE
from viladiff.data.formats.bands import FileBands, bands_size, choose_channels, decoded_rgb, file_kind, read_bands
from viladiff.data.formats.pillow_file import UPRIGHT, open_image, orientation, upright_size
from viladiff.data.formats.tiff import JPEG_COMPRESSIONS, WHITE_IS_ZERO
from viladiff.data.formats.values import in_range, of_16_bits, undeclared_8_bits

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm", ".pnm", ".npy",
)  # fmt: skip
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".npy")
"""Types of masks that keep every number."""


@dataclass(frozen=True)
class PaletteEncoding:
    """The class of each colour of a mask."""

    rgb: tuple[tuple[int, int, int], ...]
    labels: tuple[int, ...]
    """As many: 0 ... C - 1, or 255 for a colour that is ignored."""

    @property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """The colour of each class, by id."""
        return tuple(self.rgb[self.labels.index(label)] for label in sorted({*self.labels} - {IGNORE}))

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


@names_file
def image_size(path: Path | str) -> tuple[int, int]:
    """Return (height, width) of ``read_image(path)``, from the header alone."""
    kind = file_kind(path)
    if not kind.eight_bits:
        with _named(path):
            return bands_size(path, kind)
    with open_image(path) as image:
        return upright_size(image)


@names_file
def read_image(path: Path | str, pixels: PixelFormat = RGB_8) -> np.ndarray:
    """Return (h, w, N), upright by its EXIF orientation: uint8, or float32 in 0..1 where a range of values is declared.

    Without fields of ``pixels`` N is 3: grey, palette and CMYK images are converted as Pillow does, transparency is
    dropped, and 16 bits a channel are brought to 8 if the highest bit is used. Raises ValueError for other numbers and
    bands, which names the field that decides.
    """
    kind = file_kind(path)
    if pixels.plain and kind.eight_bits:
        return _eight_bits(path)
    with _named(path):
        chosen = choose_channels(read_bands(path, kind), pixels)
        return undeclared_8_bits(chosen) if pixels.value_range is None else in_range(chosen, pixels.value_range)


def pixels_of_array(numbers: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """Return what ``read_image`` gives for a file of these numbers: (h, w, 3) uint8, or (h, w) and (h, w, bands).

    Raises ValueError for another array.
    """
    if pixels.plain:
        if numbers.dtype != np.uint8 or numbers.ndim != 3 or numbers.shape[2] != 3 or not numbers.size:
            raise ValueError(f"image: an array {numbers.dtype} {numbers.shape}; must be uint8 (h, w, 3), red first")
        return numbers
    if numbers.dtype.kind not in "biuf" or numbers.ndim not in (2, 3) or not numbers.size:
        raise ValueError(f"image: an array {numbers.dtype} {numbers.shape}; must be numbers (h, w) or (h, w, bands)")
    with _named("image"):
        chosen = choose_channels(FileBands(numbers if numbers.ndim == 3 else numbers[..., None], False), pixels)
        return undeclared_8_bits(chosen) if pixels.value_range is None else in_range(chosen, pixels.value_range)


def _eight_bits(path: Path | str) -> np.ndarray:
    with open_image(path) as image:
        turn = UPRIGHT.get(orientation(image))
        _check_whole(path, image)
        if image.format == "PNG" and turn is None and (quick := decoded_rgb(path, image)) is not None:
            return quick
        image.load()
        upright = image if turn is None else image.transpose(turn)
        if upright.mode.startswith("I") or upright.mode == "F":
            grey = np.asarray(upright)
            # A PGM says which value is white, and Pillow has brought it to 65535.
            grey = of_16_bits(grey) if image.format == "PPM" else undeclared_8_bits(grey)
            return np.repeat(grey[..., None], 3, axis=2)
        # A palette with transparency goes by way of RGBA, or Pillow warns where it is given for each colour.
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _check_whole(path: Path | str, image: Image.Image) -> None:
    """Raise ValueError for an animation, and for a TIFF whose fourth band may be more than transparency."""
    frames = getattr(image, "n_frames", 1) if image.format in ("PNG", "WEBP") else 1
    if frames > 1:
        raise ValueError(f"{path}: an animation of {frames} frames; write one picture a file")
    if image.format == "TIFF" and image.mode in ("RGBA", "LA"):
        levels = len(set(np.flatnonzero(image.getchannel("A").histogram()).tolist()) - {0, 255})
        if levels:
            bands = len(image.getbands())
            raise ValueError(
                f"{path}: its band {bands} is marked as transparency and has {levels} levels between none and full, as "
                f"infrared has that GDAL wrote; data.bands={','.join(map(str, range(1, bands)))} drops it, "
                f"data.channels={bands} uses it"
            )


@contextmanager
def _named(path: Path | str) -> Iterator[None]:
    """Put the file before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from error


@names_file
def read_mask(path: Path | str, num_classes: int, coding: MaskEncoding | None = None) -> np.ndarray:
    """Return (h, w) uint8 of class ids and 255, upright by its EXIF orientation.

    A pixel is a number: that of an array or of a TIFF of one band, the index of a palette image, the value of a grey
    one (1 to 16 bits), or the value common to all channels of an RGB one. It is the class id, unless ``coding`` says
    what it stands for. Where that is of colours, the colour counts, whatever the file's mode. Raises ValueError also
    for a TIFF in which 0 is white, since its numbers and its greys name opposite classes, and for JPEG, whatever the
    file's suffix.
    """
    kind = file_kind(path)
    if kind.name == "npy" or (kind.tiff is not None and not kind.eight_bits):
        with _named(path):
            if kind.tiff is not None and kind.tiff.compression in JPEG_COMPRESSIONS:
                raise ValueError(_LOSSY)
            found = read_bands(path, kind)
            if isinstance(coding, PaletteEncoding) and found.numbers.shape[2] - found.alpha == 3:
                return coding.labels_of(_levels(found.numbers[..., :3]))
            return _labels(_ids_of_bands(found), num_classes, coding)
    if kind.tiff is not None and kind.tiff.photometric == WHITE_IS_ZERO and not isinstance(coding, PaletteEncoding):
        raise ValueError(
            f"{path}: 0 is white in it (photometric MINISWHITE), so numbers and greys name opposite classes; write it "
            "with 0 as black (tifffile: photometric='minisblack'), or say in palette.txt which grey is which class"
        )
    with open_image(path) as image:
        if image.format in ("JPEG", "MPO") or (kind.tiff and kind.tiff.compression in JPEG_COMPRESSIONS):
            raise ValueError(f"{path}: {_LOSSY}")
        turn, step = UPRIGHT.get(orientation(image)), _step(image)
        image.load()
        upright = image if turn is None else image.transpose(turn)
        if isinstance(coding, PaletteEncoding):
            return coding.labels_of(np.asarray(upright.convert("RGB")))
        return _labels(_indices(upright) // step, num_classes, coding)


_LOSSY = "a mask compressed as JPEG, which changes class numbers and colours where classes meet; write it as PNG"


def _levels(numbers: np.ndarray) -> np.ndarray:
    """Return colours (h, w, 3) of any numbers as uint8. Raises ValueError unless all are whole and in 0..255."""
    with np.errstate(invalid="ignore"):
        levels = numbers.astype(np.uint8)
    if not np.array_equal(levels, numbers):
        raise ValueError(f"colours ({numbers.dtype}) must be whole numbers from 0 to 255, as palette.txt has them")
    return levels


def _labels(ids: np.ndarray, num_classes: int, coding: MaskEncoding | None) -> np.ndarray:
    if isinstance(coding, PaletteEncoding):
        raise ValueError(f"a mask of numbers ({ids.dtype}), and palette.txt is of colours; remove it, or write colours")
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


def _ids_of_bands(found: FileBands) -> np.ndarray:
    """Return (h, w) integers of a file of one band; whole numbers of any type are integers."""
    numbers = found.numbers
    if numbers.shape[2] != 1:
        raise ValueError(
            f"a mask of {numbers.shape[2]} bands; it must have one, of class ids (colours need palette.txt; of a band "
            "a class, np.argmax over the bands is the ids)"
        )
    ids = numbers[..., 0]
    if ids.dtype.kind == "f":
        whole = np.isfinite(ids) & (ids == np.floor(ids))
        if not whole.all():
            raise ValueError(f"{np.count_nonzero(~whole):,} pixels are no whole number ({ids.dtype}); ids are integers")
    return ids.astype(np.int64)


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
    """Images of different sizes, each as ``read_image`` gives it, decoded when asked for."""

    def __init__(self, paths: Sequence[Path], pixels: PixelFormat = RGB_8) -> None:
        self.paths, self.pixels = tuple(paths), pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]  # one at a time, no slices
        return read_image(self.paths[index], self.pixels)


class FileMasks(Sequence[np.ndarray]):
    """Masks of such images, each (h, w) uint8, opened when asked for."""

    def __init__(self, paths: Sequence[Path], num_classes: int, coding: MaskEncoding | None) -> None:
        self.paths, self.num_classes, self.coding = tuple(paths), num_classes, coding

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        return read_mask(self.paths[index], self.num_classes, self.coding)
