"""Images of a run's labels at every stage, from its ``pictures.npz``, for a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from viladiff.core import colormap
from viladiff.core.messages import first_names
from viladiff.data.formats.npz import read_arrays
from viladiff.report.table.results import CellRun, Results
from viladiff.runs.record import RunRecord

if TYPE_CHECKING:
    from viladiff.runs.store import Store

IGNORE = 255
MOST = 4
"""Validation images a strip."""


@dataclass(frozen=True)
class Tile:
    source: str
    """A data URI."""
    words: str
    """What a reader who cannot see it is told."""


@dataclass(frozen=True)
class Strip:
    entry: CellRun
    stages: tuple[str, ...]
    tiles: tuple[tuple[Tile, ...], ...]
    """By image, then stage."""
    side: tuple[int, int]
    """Height and width of a tile in its own pixels."""

    @property
    def compared(self) -> tuple[int, int] | None:
        """Places of the image and of the prediction among the stages; None without both."""
        both = "image", "prediction"
        return None if {*both} - {*self.stages} else (self.stages.index(both[0]), self.stages.index(both[1]))


def build_strips(results: Results, store: Store, most: int = MOST) -> tuple[list[Strip], list[str]]:
    """Return the strips of the reference and the headline, first column and seed that have pictures; and problems."""
    found, wrong = [], []
    for row in dict.fromkeys((results.reference, results.headline)):
        for entry in results.of_row(row):
            path = store.file(entry.cell.run_id, "pictures.npz") if entry.record is not None else None
            if path is None or entry.record is None:
                continue
            try:
                found.append(strip(entry, entry.record, load(path), most))
                break
            except ValueError as error:
                wrong.append(f"{entry.cell.run_id}: {error}")
    return found, wrong


def load(path: Path) -> dict[str, np.ndarray]:
    """Return arrays by stage, in order. Raises ValueError that names the file if one is invalid."""
    arrays = {name.partition("/")[2] or name: array for name, array in sorted(read_arrays(path).items())}
    image = arrays.get("image")
    if image is None or image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(f"{path.name}: needs an array image of shape (K, H, W, 3)")
    for name, array in arrays.items():
        shape = image.shape if name == "image" else image.shape[:3]
        if array.dtype != np.uint8 or array.shape != shape:
            raise ValueError(f"{path.name}: {name} is {array.dtype} {array.shape}; must be uint8 {shape}")
    return arrays


def strip(entry: CellRun, record: RunRecord, arrays: dict[str, np.ndarray], most: int) -> Strip:
    names, colours = record.class_names, colormap.class_colours(len(record.class_names))
    stages = [*arrays, *(["mistakes"] if {"truth", "prediction"} <= arrays.keys() else [])]
    rows = []
    for k in _worst_first(arrays)[:most]:
        drawn = {name: _draw(name, array[k], names, colours) for name, array in arrays.items()}
        if "mistakes" in stages:
            drawn["mistakes"] = _mistakes(arrays["truth"][k], arrays["prediction"][k])
        rows.append(
            tuple(Tile(_uri(pixels), f"Image {k + 1}, {name}: {words}") for name, (pixels, words) in drawn.items())
        )
    height, width = arrays["image"].shape[1:3]
    return Strip(entry, tuple(stages), tuple(rows), (height, width))


def _worst_first(arrays: dict[str, np.ndarray]) -> list[int]:
    """Return the images, the one with the largest share of wrong pixels first; in order without truth or prediction."""
    count = len(arrays["image"])
    if not {"truth", "prediction"} <= arrays.keys():
        return [*range(count)]
    known = arrays["truth"] != IGNORE
    wrong = (known & (arrays["truth"] != arrays["prediction"])).sum((1, 2)) / np.maximum(known.sum((1, 2)), 1)
    return np.argsort(-wrong, kind="stable").tolist()


def _draw(name: str, array: np.ndarray, names: list[str], colours: np.ndarray) -> tuple[np.ndarray, str]:
    if name == "image":
        return array, "the photograph"
    if name.startswith("edges"):
        # Any level above 0 is an edge, so that maps of 0/1 and of 0/255 look alike.
        return np.where(array[..., None] > 0, 255, 24).astype(np.uint8).repeat(3, -1), f"{(array > 0).mean():.0%} edges"
    unknown = array >= len(names)
    pixels = np.where(unknown[..., None], colormap.hatch(*array.shape), colours[np.where(unknown, 0, array)])
    there = [names[i] for i in np.unique(array[~unknown])]
    return pixels.astype(np.uint8), first_names(there, 8) + (f"; {unknown.mean():.0%} ignored" if unknown.any() else "")


def _mistakes(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, str]:
    wrong, ignored = prediction != truth, truth == IGNORE
    pixels = np.where(wrong[..., None], np.array(colormap.MISTAKE), np.array(colormap.RIGHT))
    pixels = np.where(ignored[..., None], colormap.hatch(*truth.shape), pixels)
    known = ~ignored
    share = wrong[known].mean() if known.any() else 0.0
    return pixels.astype(np.uint8), f"{share:.1%} of the pixels are wrong"


def _uri(pixels: np.ndarray) -> str:
    """Encode a PNG as a data URI, with a palette if 256 colours suffice: a tenth of the size."""
    image = Image.fromarray(pixels)
    flat = image.getcolors(256)
    if flat is not None:
        image = image.quantize(256, dither=Image.Dither.NONE) if len(flat) > 2 else image.quantize(2)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def legend(results: Results) -> list[tuple[str, str]]:
    """Return (name, CSS colour) of each class of the first record."""
    record = next(iter(results.records().values()), None)
    if record is None:
        return []
    colours = colormap.class_colours(len(record.class_names))
    return [(name, colormap.css(colour)) for name, colour in zip(record.class_names, colours, strict=True)]
