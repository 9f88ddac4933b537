"""Small data sets of real photographs for tests: pieces of pictures that installed packages carry, masks by colour."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images

CLASSES = ("background", "sky", "building", "foliage", "flower", "person")
PALETTE = ((0, 0, 0), (120, 170, 230), (180, 60, 40), (40, 140, 60), (240, 160, 60), (200, 120, 200))
VOC_IDS = np.array([0, 0, 6, 16, 16, 15], np.uint8)
"""Class ids that stand for CLASSES in VOC's layout; sky is background there."""


class Photo(NamedTuple):
    name: str
    pixels: np.ndarray
    """(h, w, 3) uint8."""
    labels: np.ndarray
    """(h, w) uint8, index into CLASSES."""


@cache
def photos() -> tuple[Photo, ...]:
    """A pagoda, a flower and a portrait, labelled by smoothed colour and place."""
    china, flower = load_sample_images().images
    grace = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(grace) as image:
        portrait = np.asarray(image.convert("RGB"))
    found = []
    for name, pixels in (("china", china), ("flower", flower), ("grace", portrait)):
        smooth = ndimage.gaussian_filter(pixels.astype(np.float32), (3, 3, 0))
        red, green, blue = np.moveaxis(smooth, -1, 0)
        down, across = np.mgrid[0 : 1 : pixels.shape[0] * 1j, 0 : 1 : pixels.shape[1] * 1j]
        if name == "china":
            pagoda = (across > 0.1) & (across < 0.57) & (down < 0.87)
            labels = np.where(smooth.min(2) > 125, 1, np.where(pagoda, 2, 3))
        elif name == "flower":
            labels = np.where(red > 1.3 * green, 4, 3)
        else:
            flag = (across < 0.28) & (down < 0.62)
            labels = np.where(flag | (blue > red + 40) & (blue > 110), 0, 5)
        found.append(Photo(name, pixels, labels.astype(np.uint8)))
    return tuple(found)


CUTS = {"china": 0.36, "flower": 0.5, "grace": 0.5}
"""Share of the width where a photograph is cut in two; both parts show all its classes."""


@cache
def halves() -> tuple[tuple[Photo, ...], tuple[Photo, ...]]:
    """The left parts of all photographs and the right ones, which share no pixel."""
    parts: tuple[list[Photo], list[Photo]] = ([], [])
    for name, pixels, labels in photos():
        at = round(CUTS[name] * labels.shape[1])
        parts[0].append(Photo(name, pixels[:, :at], labels[:, :at]))
        parts[1].append(Photo(name, pixels[:, at:], labels[:, at:]))
    return tuple(parts[0]), tuple(parts[1])


def piece(
    index: int, sizes: tuple[int, int] = (64, 160), seed: int = 0, source: tuple[Photo, ...] | None = None
) -> Photo:
    """Crop ``index`` of ``source`` (all photographs), with two classes at least; sides in ``sizes``, drawn by (seed,
    index)."""
    photo = (source or photos())[index % 3]
    rng = np.random.default_rng((seed, index))
    while True:
        height, width = (int(min(side, rng.integers(sizes[0], sizes[1] + 1))) for side in photo.labels.shape)
        top, left = (int(rng.integers(s - c + 1)) for s, c in zip(photo.labels.shape, (height, width), strict=True))
        labels = photo.labels[top : top + height, left : left + width]
        if np.bincount(labels.ravel(), minlength=2).astype(bool).sum() > 1:
            return Photo(f"{photo.name}_{index:04}", photo.pixels[top : top + height, left : left + width], labels)


def _with_patches(labels: np.ndarray, classes: list[int]) -> np.ndarray:
    """Squares of 4 x 4 pixels of each class along the top."""
    labels = labels.copy()
    for place, label in enumerate(classes):
        labels[:4, 4 * place : 4 * place + 4] = label
    return labels


def voc_mask(labels: np.ndarray) -> np.ndarray:
    """VOC's ids, with a band of 255 where two classes meet."""
    ids = VOC_IDS[labels]
    ids[ndimage.maximum_filter(ids, 5) != ndimage.minimum_filter(ids, 5)] = 255
    return ids


def save_mask(path: Path, labels: np.ndarray) -> None:
    """An index PNG with a palette, as VOC's are."""
    image = Image.frombytes("P", labels.shape[::-1], labels.tobytes())
    # All 256 entries: Pillow would write fewer bits for a short palette, and 255 would become another class.
    image.putpalette(
        [channel for colour in (*PALETTE, *[(224, 224, 192)] * (256 - len(PALETTE))) for channel in colour]
    )
    image.save(path)


def write(
    root: Path,
    n: int,
    layout: str = "folder",
    *,
    labelled: int | None = None,
    val: int | None = None,
    split: str = "",
    sizes: tuple[int, int] = (64, 160),
    seed: int = 0,
    unlabelled_masks: bool = False,
    halved: bool = False,
) -> Path:
    """Write n pieces: the first ``labelled`` (a quarter) labelled, the last ``val`` (a quarter) for validation.

    layout folder: images, masks, classes.txt and plain lists of ids in splits. layout voc: JPEGImages,
    SegmentationClass and lists of both columns. The split is called ``labelled`` or ``92`` unless given. The others
    have no mask unless ``unlabelled_masks``. In a folder the first mask has a square of each class that no labelled one
    would show. Under ``halved`` those for validation are of the photographs' right parts and all others of the left
    ones, so that no pixel is trained on and scored.
    """
    voc = layout == "voc"
    folders = [root / name for name in (("JPEGImages", "SegmentationClass") if voc else ("images", "masks"))]
    split = split or ("92" if voc else "labelled")
    first, last = (max(1, n // 4) if count is None else count for count in (labelled, val))
    for folder in (*folders, root / "splits" / split):
        folder.mkdir(parents=True)
    names = []
    left, right = halves() if halved else (photos(), photos())
    shown = {int(label) for index in range(first) for label in np.unique(piece(index, sizes, seed, left).labels)}
    for index in range(n):
        name, pixels, labels = piece(index, sizes, seed, right if index >= n - last else left)
        if index == 0 and not voc:
            labels = _with_patches(labels, sorted({*range(len(CLASSES))} - shown))
        names.append(name)
        Image.fromarray(pixels).save(folders[0] / f"{name}.jpg", quality=90)
        if index < first or index >= n - last or unlabelled_masks:
            save_mask(folders[1] / f"{name}.png", voc_mask(labels) if voc else labels)
    if not voc:
        (root / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    form = "JPEGImages/{0}.jpg SegmentationClass/{0}.png" if voc else "{0}"
    for file, part in (
        ("labelled", names[:first]),
        ("unlabelled", names[first : n - last]),
        ("val", names[n - last :]),
    ):
        if part:
            text = "\n".join(form.format(name) for name in part)
            (root / "splits" / split / f"{file}.txt").write_text(text, encoding="utf-8")
    return root


def score_training_images(root: Path, split: str = "labelled") -> Path:
    """Make the validation list of a folder its labelled images, under other names: no image may be in both lists."""
    lists = root / "splits" / split
    names = (lists / "labelled.txt").read_text(encoding="utf-8").split()
    for name in names:
        for folder, suffix in (("images", ".jpg"), ("masks", ".png")):
            shutil.copy(root / folder / f"{name}{suffix}", root / folder / f"again_{name}{suffix}")
    (lists / "val.txt").write_text("\n".join(f"again_{name}" for name in names), encoding="utf-8")
    return root
