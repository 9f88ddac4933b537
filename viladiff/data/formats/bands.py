"""All bands of an image file as numbers, and the choice of those that are channels."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from viladiff.config.pixel_format import MOST_CHANNELS, PixelFormat
from viladiff.data.formats.pillow_file import UPRIGHT, check_pixels, open_image, orientation, upright_size
from viladiff.data.formats.tiff import TIFF_MAGIC, TiffFacts, read_tiff, tiff_facts

_NPY, _PNG = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"
_DEPTH_AT = 24
"""Where a PNG has its bits a channel."""


class FileBands(NamedTuple):
    """What a file holds."""

    numbers: np.ndarray
    """(h, w, bands), upright; of the type that the file has."""
    alpha: bool
    """Whether the last band is transparency."""
    pages: int = 1


class FileKind(NamedTuple):
    """How a file is to be read."""

    name: str
    """``npy``, ``tiff``, ``png16`` or ``pillow``."""
    tiff: TiffFacts | None = None

    @property
    def eight_bits(self) -> bool:
        """Whether Pillow reads it as 8 bits of grey or colours, and loses nothing."""
        return self.name == "pillow" or (self.tiff is not None and self.tiff.eight_bits)

    @property
    def sixteen_bits(self) -> bool:
        return self.name == "png16" or (self.tiff is not None and self.tiff.dtype == np.uint16)


def file_kind(path: Path | str) -> FileKind:
    """Return the kind of a file by its first bytes; ``pillow`` for one that cannot be read, which then says why."""
    try:
        with open(path, "rb") as file:
            head = file.read(_DEPTH_AT + 1)
    except OSError:
        return FileKind("pillow")
    if head.startswith(_NPY):
        return FileKind("npy")
    if head.startswith(_PNG) and head[_DEPTH_AT:] == b"\x10":
        return FileKind("png16")
    facts = tiff_facts(path) if head.startswith(TIFF_MAGIC) else None
    return FileKind("pillow") if facts is None else FileKind("tiff", facts)


def bands_size(path: Path | str, kind: FileKind) -> tuple[int, int]:
    """Return (height, width) of ``read_bands`` from the header alone. Raises ValueError as it does."""
    if kind.name == "npy":
        height, width = _array(path).shape[:2]
        return height, width
    if kind.tiff is not None:
        return kind.tiff.size
    with open_image(path) as image:
        return upright_size(image)


def read_bands(path: Path | str, kind: FileKind) -> FileBands:
    """Read all bands of a file. Raises ValueError for one that is damaged or no image; it need not name the file."""
    check_pixels(path, bands_size(path, kind))
    if kind.name == "npy":
        return FileBands(_array(path), False)
    if kind.name == "png16":
        return _deep_png(path)
    if kind.tiff is not None and not (kind.tiff.eight_bits and kind.tiff.photometric not in (1, 2)):
        found, facts = read_tiff(path)
        return FileBands(_upright(found, facts.turn), facts.alpha, facts.pages)
    with open_image(path) as image:
        turn = UPRIGHT.get(orientation(image))
        if image.format == "PPM" and _white(path) > 255:
            told = "a PNM of more than 8 bits says itself which value is white"
            raise ValueError(f"{path}: {told}; for data.value_range and data.channels write it as TIFF, PNG or .npy")
        image.load()
        upright = image if turn is None else image.transpose(turn)
        if upright.mode == "P":
            upright = upright.convert("RGBA" if "transparency" in upright.info else "RGB")
        if upright.mode not in ("L", "LA", "RGB", "RGBA") and not upright.mode.startswith(("I", "F")):
            upright = upright.convert("L" if upright.mode == "1" else "RGB")
        numbers = np.array(upright)
        return FileBands(numbers if numbers.ndim == 3 else numbers[..., None], upright.mode in ("LA", "RGBA"))


def choose_channels(found: FileBands, pixels: PixelFormat) -> np.ndarray:
    """Return (h, w, N) of the bands that ``data.channels`` and ``data.bands`` make the channels.

    Transparency is no band, unless ``data.channels`` counts it or ``data.bands`` names it. Without these fields grey is
    repeated to red, green and blue. Raises ValueError, which names the field that decides, where a band would be lost.
    """
    numbers, whole = found.numbers, found.numbers.shape[2]
    counted = pixels.channels == whole or (pixels.channels is None and max(pixels.bands or (0,)) == whole)
    numbers = numbers[..., :-1] if found.alpha and not counted else numbers
    count = numbers.shape[2]
    what = f"{found.pages} pages, {count} bands in all" if found.pages > 1 else f"{count} band{'s' * (count != 1)}"
    if pixels.channels is not None and count != pixels.channels:
        if_grey = " (data.bands=1 takes the first alone)" if count == 3 and pixels.channels == 1 else ""
        raise ValueError(f"{what}, and data.channels = {pixels.channels}{if_grey}; all images must have as many")
    if pixels.bands is not None:
        if max(pixels.bands) > count:
            raise ValueError(f"{what}, and data.bands = {','.join(map(str, pixels.bands))}")
        return numbers[..., [place - 1 for place in pixels.bands]]
    if pixels.channels is None and found.pages == 1 and count == 1:
        return np.repeat(numbers, 3, axis=2)
    if pixels.channels is None and (found.pages > 1 or count != 3):
        raise ValueError(
            f"{what}: set data.channels={count} to use all as channels, or data.bands to those that are wanted, as "
            f"data.bands={','.join(map(str, range(1, min(count, 3) + 1)))}; nothing is dropped unasked"
        )
    return numbers


def _white(path: Path | str) -> int:
    """Return the value that a PNM has for white."""
    with open(path, "rb") as file:
        head = re.sub(rb"#[^\n]*", b"", file.read(1024)).split()
    return int(head[3]) if head[0] in (b"P2", b"P3", b"P5", b"P6") and len(head) > 3 and head[3].isdigit() else 1


def _array(path: Path | str) -> np.ndarray:
    """Return (h, w, n) of a NumPy file, mapped; the shorter of first and last axis is that of the bands."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever NumPy's parser makes of a damaged header
        raise ValueError(f"cannot be read as an array: {error}") from error
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3) or not array.size:
        what = f"an array {array.dtype} {array.shape}"
        raise ValueError(f"{what}; must be numbers (h, w), (h, w, bands) or (bands, h, w)")
    if array.ndim == 2:
        return array[..., None]
    array = array.transpose(1, 2, 0) if array.shape[0] < array.shape[2] else array
    if array.shape[2] > MOST_CHANNELS:
        raise ValueError(f"an array {array.shape}: {array.shape[2]} bands, at most {MOST_CHANNELS}")
    return array


def _deep_png(path: Path | str) -> FileBands:
    """Return a PNG of 16 bits a channel, of which Pillow would keep 8."""
    import imagecodecs

    with open_image(path) as image:
        turn = orientation(image)
        frames, size = getattr(image, "n_frames", 1), image.size
    if frames > 1:
        raise ValueError(f"{frames} frames; write one picture a file")
    try:
        numbers: Any = imagecodecs.png_decode(Path(path).read_bytes())
    except Exception as error:
        raise ValueError(f"cannot be read: {error}") from error
    numbers = numbers.reshape(size[1], size[0], -1)
    return FileBands(_upright(numbers, turn), numbers.shape[2] in (2, 4))


def decoded_rgb(path: Path | str, image: Image.Image) -> np.ndarray | None:
    """Return (h, w, 3) uint8 of a PNG of 8 bits of red, green and blue, in three quarters of the time of Pillow's.

    image: the file, open. None for a PNG of another kind, and for one that is damaged, of which Pillow says how.
    """
    import imagecodecs

    if image.mode != "RGB" or "transparency" in image.info:
        return None
    with contextlib.suppress(imagecodecs.PngError, OSError):
        found: Any = imagecodecs.png_decode(Path(path).read_bytes())
        if found.dtype == np.uint8 and found.shape == (image.height, image.width, 3):
            return found
    return None


def _upright(numbers: np.ndarray, turn: int) -> np.ndarray:
    """Turn (h, w, n) by an orientation of EXIF, as Pillow's ``transpose`` does."""
    method = UPRIGHT.get(turn)
    if method is None:
        return numbers
    swapped = numbers.swapaxes(0, 1)
    return {
        Image.Transpose.FLIP_LEFT_RIGHT: numbers[:, ::-1],
        Image.Transpose.ROTATE_180: numbers[::-1, ::-1],
        Image.Transpose.FLIP_TOP_BOTTOM: numbers[::-1],
        Image.Transpose.TRANSPOSE: swapped,
        Image.Transpose.ROTATE_270: swapped[:, ::-1],
        Image.Transpose.TRANSVERSE: swapped[::-1, ::-1],
        Image.Transpose.ROTATE_90: swapped[::-1],
    }[method]
