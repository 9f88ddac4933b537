"""The page of ``viladiff data check``: counts, sizes, classes, problems, and labels laid over their images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from viladiff.core import colormap
from viladiff.core.atomic import write_atomically
from viladiff.data.constants import IGNORE
from viladiff.data.files.images import read_image, read_mask
from viladiff.data.formats.values import displayed
from viladiff.data.loading.picture_space import decoded_bytes

if TYPE_CHECKING:
    from viladiff.data.files.validate import DatasetReport

TEMPLATES = Path(__file__).parent / "templates"
TILES, ACROSS, SIDE = 24, 6, 192
"""Most tiles of the mosaic, tiles in a row, and the side of a tile in pixels."""
GAP = 4
STRENGTH = 0.55
"""How much of an overlay is label; what is background keeps the image as it is."""


def write_page(report: DatasetReport, out: Path, command: str) -> Path:
    """Write images.png, mosaic.png and index.html into ``out``; return the path of index.html.

    Raises ValueError if that fails.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        mosaics = draw_mosaics(report)
        for name, mosaic in zip(("images.png", "mosaic.png"), mosaics or (), strict=False):
            packed = io.BytesIO()
            Image.fromarray(mosaic).save(packed, "PNG")
            write_atomically(out / name, packed.getvalue())
        write_atomically(out / "index.html", dataset_html(report, mosaics is not None, command).encode())
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror or error}); name another with --out") from error
    return out / "index.html"


def draw_mosaics(report: DatasetReport) -> tuple[np.ndarray, np.ndarray] | None:
    """Return evenly chosen images, and these under their labels, each (H, W, 3) uint8; None without a valid mask."""
    names = [name for name, one in report.seen.items() if one.pixels is not None and not one.faults]
    if not names:
        return None
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, TILES).round().astype(int))]
    across = min(ACROSS, len(chosen))
    rows = -(-len(chosen) // across)
    step = SIDE + GAP
    canvases = np.full((2, rows * step - GAP, across * step - GAP, 3), 255, np.uint8)
    for place, name in enumerate(chosen):
        for canvas, tile in zip(canvases, _tiles(report, name), strict=True):
            top, left = (step * at for at in divmod(place, across))
            top, left = top + (SIDE - tile.shape[0]) // 2, left + (SIDE - tile.shape[1]) // 2
            canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return canvases[0], canvases[1]


def _tiles(report: DatasetReport, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and its overlay, SIDE long."""
    classes = report.classes
    image = displayed(read_image(report.tree.images[name], report.tree.pixels), report.tree.pixels)
    mask = read_mask(report.tree.masks[name], len(classes.names), classes.coding)
    factor = SIDE / max(mask.shape)
    size = (max(1, round(mask.shape[1] * factor)), max(1, round(mask.shape[0] * factor)))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    labels = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return small, overlay(small, labels, len(classes.names))


def overlay(image: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return (h, w, 3) uint8: each class but background in its colour over the image, ignored pixels hatched."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:num_classes] = colormap.class_colours(num_classes)
    shown = np.where((labels == IGNORE)[..., None], colormap.hatch(*labels.shape), colours[labels])
    mixed = STRENGTH * shown + (1 - STRENGTH) * image
    return np.where((labels == 0)[..., None], image, np.rint(mixed)).astype(np.uint8)


def dataset_html(report: DatasetReport, mosaic: bool, command: str) -> str:
    """Render the page; names of files are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("datacheck.html.j2").render(
        css=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        root=report.tree.root.name,
        command=command,
        facts=dataset_facts(report),
        classes=class_rows(report),
        splits=report.splits,
        faults=report.faults,
        errors=report.errors,
        mosaic=mosaic,
    )


def dataset_facts(report: DatasetReport) -> dict[str, str]:
    """Return counts and sizes, one a line."""
    masks = sum(one.pixels is not None for one in report.seen.values())
    found = {"images": f"{len(report.seen):,}", "with a mask that can be read": f"{masks:,}"}
    found["files not used"] = f"{len(report.tree.unused):,}"
    pixels = report.tree.pixels
    if not pixels.plain:
        found["channels"] = str(pixels.inputs)
        found["black and white"] = pixels.value_range or "0 and 255"
    sizes = report.sizes()
    if sizes:
        count = np.array(list(sizes.values()))
        for name, side in zip(("height", "width"), np.array(list(sizes)).T, strict=True):
            sides = np.repeat(side, count)
            found[f"{name} in pixels"] = f"{sides.min()} to {sides.max()}, median {np.median(sides):g}"
        (height, width), often = sizes.most_common(1)[0]
        found["different sizes"] = f"{len(sizes):,}; most often {width} x {height} ({often:,} images)"
        decoded = sum(decoded_bytes(size, pixels) * times for size, times in sizes.items())
        found["decoded"] = f"{decoded / 1e9:.2f} GB, of which runtime.picture_cache stores those that a run trains on"
    return {**found, "classes": str(len(report.classes.names))}


def class_rows(report: DatasetReport) -> list[dict[str, Any]]:
    """Return each class's share of labelled pixels and number of masks, and the ignored share of all pixels."""
    pixels, images = report.pixels(), report.images()
    total, valid = int(pixels.sum()), int(pixels[:IGNORE].sum())
    colours = colormap.class_colours(len(report.classes.names))
    rows = [
        {
            "id": label,
            "name": name,
            "colour": colormap.css(colours[label]),
            "share": 100 * int(pixels[label]) / valid if valid else None,
            "images": int(images[label]),
        }
        for label, name in enumerate(report.classes.names)
    ]
    share = 100 * int(pixels[IGNORE]) / total if total else None
    return [*rows, {"id": IGNORE, "name": "ignored", "colour": "", "share": share, "images": int(images[IGNORE])}]
