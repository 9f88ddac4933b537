"""Small trees of real photographs in the layouts of Cityscapes, COCO and ADE20K, with lists in ``splits/``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from photographs import piece, save_mask
from PIL import Image

from viladiff.data.sources.cityscapes import IDS
from viladiff.data.sources.coco import CATEGORY_IDS, CLASS_NAMES

TRAIN_IDS = np.array([0, 10, 2, 8, 9, 11], np.uint8)
"""Cityscapes classes that stand for ``photographs.CLASSES``."""
THINGS = np.array([0, 0, 0, 1, 80, 12], np.uint8)
"""COCO classes: person, toothbrush, stop sign; 12 is the last before the first gap in the category ids."""
SCENE = np.array([0, 2, 1, 149, 66, 12], np.uint8)
"""ADE20K classes; foliage stands for the last one."""


class Made(NamedTuple):
    """Where the tree is, and the class of every pixel by image."""

    root: Path
    labels: dict[str, np.ndarray]
    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    val: tuple[str, ...]


def _draw(names: Sequence[str], classes: np.ndarray, rim: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Pixels, and labels whose first row is 255 with ``rim``, by name."""
    pixels, labels = {}, {}
    for i, name in enumerate(names):
        photo = piece(i)
        pixels[name], labels[name] = photo.pixels, classes[photo.labels]
        if rim:
            labels[name] = labels[name].copy()
            labels[name][0] = 255
    return pixels, labels


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _list(root: Path, name: str, lines: Sequence[str]) -> None:
    path = root / "splits" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def cityscapes(
    root: Path, *, kinds: Sequence[str] = ("labelTrainIds",), split: str = "372", labelled: int = 3, rest: int = 4
) -> Made:
    """Two cities to train on and one for validation; masks of the given kinds, beside the other files of gtFine."""
    train = [f"{('jena', 'ulm')[i % 2]}_{i:06}_000019" for i in range(labelled + rest)]
    val = [f"frankfurt_{i:06}_000294" for i in range(2)]
    pixels, labels = _draw([*train, *val], TRAIN_IDS, rim=True)
    for name in labels:
        place = f"{'val' if name in val else 'train'}/{name.split('_')[0]}/{name}"
        _save(root / "leftImg8bit" / f"{place}_leftImg8bit.png", pixels[name])
        target = root / "gtFine" / f"{place}_gtFine_color.png"
        _save(target, pixels[name])
        for kind in kinds:
            found = labels[name]
            if kind == "labelIds":
                found = np.where(found == 255, 1, np.array([*IDS, *[0] * 237])[found]).astype(np.uint8)
            Image.fromarray(found).save(target.with_name(f"{name}_gtFine_{kind}.png"))
    form = "leftImg8bit/train/{0}/{1}_leftImg8bit.png gtFine/train/{0}/{1}_gtFine_labelTrainIds.png"
    _list(root, f"{split}/labeled", [form.format(name.split("_")[0], name) for name in train[:labelled]])
    return Made(root, labels, tuple(train[:labelled]), tuple(sorted(train[labelled:])), tuple(val))


def instances(made: Made, part: Sequence[str]) -> dict[str, Any]:
    """COCO's JSON for these images: each class of an image is one instance, run-length encoded."""
    from pycocotools import mask

    images, annotations = [], []
    for name in part:
        height, width = made.labels[name].shape
        images.append({"id": int(name), "file_name": f"{name}.jpg", "height": height, "width": width})
        for label in np.unique(made.labels[name]).tolist():
            if label:
                encoded = mask.encode(np.asfortranarray(made.labels[name] == label, np.uint8))
                encoded["counts"] = encoded["counts"].decode()
                one = {"id": len(annotations) + 1, "image_id": int(name), "category_id": CATEGORY_IDS[label - 1]}
                annotations.append(one | {"iscrowd": 0, "segmentation": encoded, "area": int(mask.area(encoded))})
    categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, CLASS_NAMES[1:], strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco(root: Path, *, masks: bool = True, split: str = "463", labelled: int = 3, rest: int = 4) -> Made:
    """Images, instances of both parts and, unless they are to be made, masks."""
    train = [f"{100 + i:012}" for i in range(labelled + rest)]
    val = [f"{i:012}" for i in range(1, 3)]
    pixels, labels = _draw([*train, *val], THINGS, rim=False)
    for name, image in pixels.items():
        _save(root / ("val2017" if name in val else "train2017") / f"{name}.jpg", image)
        if masks:
            (root / "masks").mkdir(exist_ok=True)
            save_mask(root / "masks" / f"{name}.png", labels[name])
    _list(root, f"{split}/labeled", [f"train2017/{name}.jpg masks/{name}.png" for name in train[:labelled]])
    made = Made(root, labels, tuple(train[:labelled]), tuple(train[labelled:]), tuple(val))
    (root / "annotations").mkdir()
    for part, names in (("train", train), ("val", val)):
        text = json.dumps(instances(made, names))
        (root / "annotations" / f"instances_{part}2017.json").write_text(text, encoding="utf-8")
    return made


def ade20k(root: Path, *, shifted: bool = False, split: str = "1263", labelled: int = 3, rest: int = 4) -> Made:
    """Masks as published, 0 for no class and 1 ... 150, or shifted to 255 and 0 ... 149."""
    train = [f"ADE_train_{i:08}" for i in range(1, labelled + rest + 1)]
    val = [f"ADE_val_{i:08}" for i in range(1, 3)]
    pixels, labels = _draw([*train, *val], SCENE, rim=True)
    for name, image in pixels.items():
        part = "validation" if name in val else "training"
        _save(root / "images" / part / f"{name}.jpg", image)
        found = labels[name] if shifted else (labels[name] + 1).astype(np.uint8)  # 255 + 1 is 0
        _save(root / "annotations" / part / f"{name}.png", found)
    form = "images/training/{0}.jpg annotations/training/{0}.png"
    _list(root, f"{split}/labeled", [form.format(name) for name in train[:labelled]])
    return Made(root, labels, tuple(train[:labelled]), tuple(train[labelled:]), tuple(val))
