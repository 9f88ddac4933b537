"""Prediction on any photograph: a model from a run's directory, or from an exported folder.

>>> import viladiff
>>> model = viladiff.load_model("model")  # doctest: +SKIP
>>> labels, confidence = model.predict("holiday.jpg")  # doctest: +SKIP
"""

from __future__ import annotations

import csv
import io
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from viladiff.config.base import did_you_mean
from viladiff.config.pixel_format import RGB_8, PixelFormat
from viladiff.core.atomic import write_atomically
from viladiff.core.colormap import class_colours, css
from viladiff.core.distributed import autocast, tf32
from viladiff.core.messages import plain_cell
from viladiff.core.progress import Progress
from viladiff.data.files.images import SUFFIXES, image_size, pixels_of_array, read_image
from viladiff.data.files.index import FOLDER
from viladiff.data.formats.pillow_file import MAX_PIXELS, allow_pixels
from viladiff.data.formats.values import displayed
from viladiff.data.transforms.augment import normalise, unit_images
from viladiff.evaluation.protocols import bands
from viladiff.models.segmenter import Network
from viladiff.training.feasibility import check_prediction

WHOLE = ("original", "sliding_window")
"""Protocols that label a whole image."""
_MASK_ENDS = ("_mask", "_masks", "_label", "_labels", "_gt", "_seg", "-mask", "_segmentation")
"""What stands behind a photograph's name in that of its mask."""
LARGE = 4
"""An image of more than so many crops' pixels is done in windows: attention's memory grows with the area squared."""


class Prediction(NamedTuple):
    """The network's prediction for an image of (h, w) pixels."""

    labels: np.ndarray
    """(h, w) uint8 class ids."""
    confidence: np.ndarray
    """(h, w) float32 probability of that class, in 0..1."""


@dataclass(eq=False)
class Model:
    """A network that labels photographs without captions; ``Segmenter`` is one that is loaded and saved."""

    network: Network
    class_names: tuple[str, ...]
    crop: int
    """Side of the windows in which large images are done: that of training."""
    protocol: str
    """The one that the run was scored by."""
    device: torch.device
    tf32: bool = False
    """``train.tf32`` of the run, so that a GPU labels as it was scored."""
    pixels: PixelFormat = RGB_8
    """What the pixels of its training images were, and those of images to label are."""
    palette: tuple[tuple[int, int, int], ...] | None = None
    """The colour of each class in the masks that it was trained on, where these are in colours."""
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that it reads."""
    precision: str = "fp32"
    """In which the run was scored (fp32, bf16 or fp16), so that images are labelled as they were scored."""

    @property
    def colours(self) -> np.ndarray:
        """(C, 3) uint8: those of the training masks, else the package's own."""
        if self.palette is None:
            return class_colours(len(self.class_names))
        return np.array(self.palette, np.uint8)

    def predict(self, image: np.ndarray | Path | str, protocol: str | None = None) -> Prediction:
        """Predict the classes of an image: a file, or (h, w, 3) uint8 RGB, of any size.

        For a run that declared channels or a range of values, a file is read as in training, and an array is (h, w) or
        (h, w, bands) of the numbers that such a file has.

        ``original`` reads the image as a whole, ``sliding_window`` in windows. By default windows are used if the run
        was scored so, and for images of more than 4 crops' pixels. Raises ValueError for another protocol, for an array
        of another kind, for a file that cannot be read, and for insufficient memory.
        """
        if isinstance(image, str | Path):
            with allow_pixels(self.max_pixels):
                pixels = read_image(image, self.pixels)
            return self.labelled(pixels, protocol)
        return self.labelled(pixels_of_array(np.asarray(image), self.pixels), protocol)

    def labelled(self, pixels: np.ndarray, protocol: str | None = None) -> Prediction:
        """Predict the classes of an image (h, w, N) as ``read_image`` gives it. Raises ValueError as ``predict``."""
        chosen = protocol or self.protocol_for(*pixels.shape[:2])
        if chosen not in WHOLE:
            raise ValueError(f"protocol = {chosen!r}: allowed: {', '.join(WHOLE)}{did_you_mean(chosen, WHOLE)}")
        try:
            with tf32(self.tf32), autocast(self.device, self.precision):
                return self._predicted(pixels, chosen)
        except (MemoryError, RuntimeError) as error:
            if not _memory_is_short(error):
                raise
            raise ValueError(
                f"image of {pixels.shape[0]} x {pixels.shape[1]} pixels: out of memory with protocol = {chosen!r}; "
                f"{'sliding_window needs less' if chosen == 'original' else 'make it smaller first'}"
            ) from error

    def protocol_for(self, height: int, width: int) -> str:
        """Return ``original`` for an image that fits, else ``sliding_window``."""
        windows = self.protocol == "sliding_window" or height * width > LARGE * self.crop**2
        return "sliding_window" if windows else "original"

    @torch.inference_mode()
    def _predicted(self, pixels: np.ndarray, protocol: str) -> Prediction:
        image = torch.tensor(pixels).permute(2, 0, 1)[None]
        labels, confidence = np.empty(pixels.shape[:2], np.uint8), np.empty(pixels.shape[:2], np.float32)
        for top, logits in bands(self._forward, image, self.network.side_multiple, protocol, self.crop, self._prepared):
            found = logits["visual"][0].softmax(0).max(0)
            rows = slice(top, top + len(found.values))
            confidence[rows], labels[rows] = found.values.cpu().numpy(), found.indices.cpu().numpy()
        return Prediction(labels, confidence)

    def _prepared(self, image: Tensor) -> Tensor:
        return normalise(unit_images(image.to(self.device)))

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"visual": self.network.logits(self.network.encode(images), images.shape[-2:]).float()}


def _memory_is_short(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Labelled(NamedTuple):
    """The result of labelling photographs."""

    images: int
    failed: tuple[str, ...]
    """A sentence for each that could not be read or labelled."""
    pixels: np.ndarray
    """(C,) int64 pixels of each class."""
    unused: tuple[Path, ...] = ()
    """Files in the directory that are no photographs: of other types, masks beside photographs, broken links, pipes."""


def label_files(
    model: Model, source: Path | str, out: Path | str, protocol: str | None = None, show: bool = True
) -> Labelled:
    """Label a photograph, or all in a directory and below it; write to ``out`` as ``_write`` does, and ``classes.csv``.

    Raises ValueError if there is nothing to label, two photographs would share a name, or ``out`` lies where the next
    call would take masks for photographs; also if the only photograph cannot be read, or the network cannot take
    pictures of their sizes.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    found, unused = _photographs(source, out)
    usual = protocol or model.protocol_for(model.crop, model.crop)
    check_prediction(model.network, model.crop, usual, _sizes(found.values()))
    colours = model.colours
    pixels, failed = np.zeros(len(model.class_names), np.int64), []
    with Progress(len(found), 0, "labelling", show) as bar:
        for name, path in found.items():
            try:
                with allow_pixels(model.max_pixels):
                    image = read_image(path, model.pixels)
                prediction = model.labelled(image, protocol)
            except ValueError as error:
                if source.is_file():
                    raise
                failed.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            else:
                _write(out, name, displayed(image, model.pixels), prediction, colours)
                pixels += np.bincount(prediction.labels.ravel(), minlength=len(pixels))
            bar.advance()
    _write_classes(out / "classes.csv", model.class_names, colours, pixels)
    return Labelled(len(found) - len(failed), tuple(failed), pixels, unused)


def _sizes(paths: Iterable[Path]) -> Iterator[tuple[int, int]]:
    """Yield (height, width) of the photographs that can be read."""
    for path in paths:
        with suppress(ValueError, OSError):
            with allow_pixels(MAX_PIXELS):
                size = image_size(path)
            yield size


def _photographs(source: Path, out: Path) -> tuple[dict[str, Path], tuple[Path, ...]]:
    """Return paths by name without suffix, relative to a directory, and the files there that are no photographs.

    Masks beside photographs are none: below ``masks`` beside ``images``, or of a photograph's name and ``_mask`` or the
    like.
    """
    if source.is_file():
        return {source.stem: source}, ()
    if not source.is_dir():
        what = "is neither a file nor a directory" if source.exists() else "there is no such file or directory"
        if source.parts[:1] in (("http:",), ("https:",), ("s3:",), ("gs:",)):  # Path leaves one slash of two
            what = "an address, not a file; download it, and name the file"
        raise ValueError(f"{source}: {what}")
    root = source.resolve()
    if out.resolve().is_relative_to(root):
        raise ValueError(f"out = {str(out)!r} lies in {source}: next time its pictures would be taken for photographs")
    shown = [path for path in sorted(source.rglob("*")) if not _hidden(path.relative_to(source))]
    files = [path for path in shown if path.is_file()]
    names = {path.with_suffix("") for path in files}
    unused = [path for path in files if path.suffix.lower() not in SUFFIXES or _is_mask(path, source, names)]
    unused += [path for path in shown if not path.exists() or not (path.is_file() or path.is_dir())]
    found: dict[str, Path] = {}
    for path in (path for path in files if path not in {*unused}):
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{path}: leads out of {source}, to {path.resolve()}")
        name = path.relative_to(source).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{found[name]} and {path}: their masks would have one name; rename one of the two")
        found[name] = path
    if not found:
        raise ValueError(f"{source}: no photograph in it or below ({', '.join(SUFFIXES)})")
    return found, tuple(unused)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_mask(path: Path, source: Path, names: Container[Path]) -> bool:
    below = path.relative_to(source).parts
    if below[0] == FOLDER.masks and (source / FOLDER.images).is_dir():
        return True
    ends = [end for end in _MASK_ENDS if path.stem.lower().endswith(end)]
    return any(path.with_name(path.stem[: -len(end)]) in names for end in ends)


_ROWS = 1024


def _write(out: Path, name: str, image: np.ndarray, found: Prediction, colours: np.ndarray) -> None:
    """Write masks/NAME.png with a palette, overlays/NAME.jpg, half image half classes, confidence/NAME.png in grey."""
    mask = Image.fromarray(found.labels)
    mask.putpalette(colours.tobytes())
    blend, grey = np.empty_like(image), np.empty_like(found.labels)
    for top in range(0, len(image), _ROWS):  # a few bytes a pixel, not a dozen
        rows = slice(top, top + _ROWS)
        blend[rows] = (image[rows].astype(np.uint16) + colours[found.labels[rows]]) // 2
        grey[rows] = np.rint(found.confidence[rows] * 255)
    for kind, suffix, picture in (
        ("masks", "png", mask),
        ("overlays", "jpg", Image.fromarray(blend)),
        ("confidence", "png", Image.fromarray(grey)),
    ):
        path = out / kind / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO()
        picture.save(packed, "JPEG" if suffix == "jpg" else "PNG", quality=90)
        write_atomically(path, packed.getvalue())


def _write_classes(path: Path, names: tuple[str, ...], colours: np.ndarray, pixels: np.ndarray) -> None:
    """Write each class's id and colour, and its pixels in all masks."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("id", "name", "colour", "pixels"))
    rows.writerows((i, plain_cell(name), css(colours[i]), int(pixels[i])) for i, name in enumerate(names))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())
