"""Prediction on any photograph: a model from a run's directory, or from an exported folder.

>>> import viladiff
>>> model = viladiff.load_model("model")  # doctest: +SKIP
>>> labels, confidence = model.predict("holiday.jpg")  # doctest: +SKIP
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from viladiff.config.base import did_you_mean, unflatten
from viladiff.core.atomic import write_atomically
from viladiff.core.colormap import class_colours, css
from viladiff.core.distributed import tf32
from viladiff.core.progress import Progress
from viladiff.data.files.images import SUFFIXES, image_size, read_image
from viladiff.data.transforms.augment import normalise
from viladiff.evaluation.protocols import bands
from viladiff.inference.load import last_line, load_method, load_run
from viladiff.models.segmenter import Network
from viladiff.runs.config import RunConfig, override
from viladiff.training.feasibility import check_prediction
from viladiff.training.launch import select_device
from viladiff.training.meta_step import empty_method

FORMAT = 1
"""Of a model folder."""
WEIGHTS, CONFIG, CLASSES = "model.safetensors", "config.json", "classes.txt"
"""Files of a model folder that are read; the others are for people."""
WHOLE = ("original", "sliding_window")
"""Protocols that label a whole image."""
LARGE = 4
"""An image of more than so many crops' pixels is done in windows: attention's memory grows with the area squared."""


class Prediction(NamedTuple):
    """The network's prediction for an image of (h, w) pixels."""

    labels: np.ndarray
    """(h, w) uint8 class ids."""
    confidence: np.ndarray
    """(h, w) float32 probability of that class, in 0..1."""


@dataclass(frozen=True, eq=False)
class Model:
    """A network that labels photographes without captions; made by ``load_model``."""

    network: Network
    class_names: tuple[str, ...]
    crop: int
    """Side of the windows in which large images are done: that of training."""
    protocol: str
    """The one that the run was scored by."""
    device: torch.device
    tf32: bool = False
    """``train.tf32`` of the run, so that a GPU labels as it was scored."""

    @torch.inference_mode()
    def predict(self, image: np.ndarray | Path | str, protocol: str | None = None) -> Prediction:
        """Predict the classes of an image: a file, or (h, w, 3) uint8 RGB, of any size.

        ``original`` reads the image as a whole, ``sliding_window`` in windows. By default windows are used if the run
        was scored so, and for images of more than 4 crops' pixels. Raises ValueError for another protocol, for an array
        of another kind, for a file that cannot be read, and for insufficient memory.
        """
        pixels = read_image(image) if isinstance(image, str | Path) else np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"image: an array {pixels.dtype} {pixels.shape}; must be uint8 (h, w, 3), red first")
        chosen = protocol or self.protocol_for(*pixels.shape[:2])
        if chosen not in WHOLE:
            raise ValueError(f"protocol = {chosen!r}: allowed: {', '.join(WHOLE)}{did_you_mean(chosen, WHOLE)}")
        try:
            with tf32(self.tf32):
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

    def _predicted(self, pixels: np.ndarray, protocol: str) -> Prediction:
        image = torch.tensor(pixels).to(self.device).permute(2, 0, 1)[None].float() / 255
        labels, confidence = np.empty(pixels.shape[:2], np.uint8), np.empty(pixels.shape[:2], np.float32)
        for top, logits in bands(self._forward, normalise(image), self.network.side_multiple, protocol, self.crop):
            found = logits["visual"][0].softmax(0).max(0)
            rows = slice(top, top + len(found.values))
            confidence[rows], labels[rows] = found.values.cpu().numpy(), found.indices.cpu().numpy()
        return Prediction(labels, confidence)

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"visual": self.network.logits(self.network.encode(images), images.shape[-2:])}


def _memory_is_short(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def load_model(path: Path | str, device: str = "auto") -> Model:
    """Load the network of a finished run's directory, or of a folder that ``viladiff export`` made.

    No data set is opened, and no file is unpickled but a run's own checkpoint, as tensors alone. device: auto, cpu or
    cuda. Raises ValueError that names the file if there is neither, or one is damaged or does not fit.
    """
    folder = Path(path)
    if (folder / WEIGHTS).is_file():
        network, cfg, names = _from_folder(folder)
    elif (folder / "record.json").is_file():
        run = load_run(folder)
        network, cfg, names = load_method(run).eval_network(), run.cfg, tuple(run.record.class_names)
    else:
        wrong = "there is no such directory" if not folder.is_dir() else f"no {WEIGHTS} and no record.json in it"
        raise ValueError(f"{folder}: {wrong}; give a model folder (viladiff export) or the directory of a finished run")
    place = select_device(override(cfg, {"runtime.device": device}))
    network = network.requires_grad_(False).eval().to(place)
    return Model(network, names, cfg.data.crop, cfg.eval.protocol, place, cfg.train.tf32)


def _from_folder(folder: Path) -> tuple[Network, RunConfig, tuple[str, ...]]:
    facts = _read_config(folder / CONFIG)
    names = tuple(_read_text(folder / CLASSES).removesuffix("\n").split("\n"))
    try:
        cfg = RunConfig(**unflatten(facts["fields"]))
        network = empty_method(cfg, names, int(facts["text_dim"])).eval_network()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: describes no model that can be built: {error}") from error
    path = folder / WEIGHTS
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    except RuntimeError as error:
        raise ValueError(f"{path}: does not fit {CONFIG} and {CLASSES} beside it: {last_line(error)}") from error
    return network, cfg, names


def _read_config(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else None
        raise ValueError(f"{path}: format = {found!r}; this version of viladiff reads format {FORMAT}")
    return facts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error


class Labelled(NamedTuple):
    """The result of labelling photographs."""

    images: int
    failed: tuple[str, ...]
    """A sentence for each that could not be read or labelled."""
    pixels: np.ndarray
    """(C,) int64 pixels of each class."""


def label_files(
    model: Model, source: Path | str, out: Path | str, protocol: str | None = None, show: bool = True
) -> Labelled:
    """Label a photograph, or all in a directory and below it; write to ``out`` as ``_write`` does, and ``classes.csv``.

    Raises ValueError if there is nothing to label, two photographs would share a name, or ``out`` lies where the next
    call would take masks for photographs; also if the only photograph cannot be read, or the network cannot take
    pictures of their sizes.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    found = _photographs(source, out)
    usual = protocol or model.protocol_for(model.crop, model.crop)
    check_prediction(model.network, model.crop, usual, _sizes(found.values()))
    colours = class_colours(len(model.class_names))
    pixels, failed = np.zeros(len(model.class_names), np.int64), []
    with Progress(len(found), 0, "labelling", show) as bar:
        for name, path in found.items():
            try:
                image = read_image(path)
                prediction = model.predict(image, protocol)
            except ValueError as error:
                if source.is_file():
                    raise
                failed.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            else:
                _write(out, name, image, prediction, colours)
                pixels += np.bincount(prediction.labels.ravel(), minlength=len(pixels))
            bar.advance()
    _write_classes(out / "classes.csv", model.class_names, colours, pixels)
    return Labelled(len(found) - len(failed), tuple(failed), pixels)


def _sizes(paths: Iterable[Path]) -> Iterator[tuple[int, int]]:
    """Yield (height, width) of the photographs that can be read."""
    for path in paths:
        with suppress(ValueError, OSError):
            yield image_size(path)


def _photographs(source: Path, out: Path) -> dict[str, Path]:
    """Return paths by name without suffix, relative to a directory."""
    if source.is_file():
        return {source.stem: source}
    if not source.is_dir():
        raise ValueError(f"{source}: there is no such file or directory")
    root = source.resolve()
    if out.resolve().is_relative_to(root):
        raise ValueError(f"out = {str(out)!r} lies in {source}: next time its pictures would be taken for photographs")
    found: dict[str, Path] = {}
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{path}: leads out of {source}, to {path.resolve()}")
        name = path.relative_to(source).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{found[name]} and {path}: their masks would have one name; rename one of the two")
        found[name] = path
    if not found:
        raise ValueError(f"{source}: no photograph in it or below ({', '.join(SUFFIXES)})")
    return found


def _write(out: Path, name: str, image: np.ndarray, found: Prediction, colours: np.ndarray) -> None:
    """Write masks/NAME.png with a palette, overlays/NAME.jpg, half image half classes, confidence/NAME.png in grey."""
    mask = Image.fromarray(found.labels)
    mask.putpalette(colours.tobytes())
    blend = ((image.astype(np.uint16) + colours[found.labels]) // 2).astype(np.uint8)
    grey = np.rint(found.confidence * 255).astype(np.uint8)
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
    rows.writerows((i, name, css(colours[i]), int(pixels[i])) for i, name in enumerate(names))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())
