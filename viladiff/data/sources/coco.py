"""COCO 2017: 80 things and a background, under PseudoSeg's lists."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from viladiff.config.sections import DataConfig
from viladiff.data.files.index import FileIndex, Layout, locate, scan
from viladiff.data.files.open_lists import read_lists, refuse_other, split_directory
from viladiff.data.files.split_lists import SplitKey
from viladiff.data.sources.base import Classes, FileSource, SourceFiles, photograph_sizes, pretrained

_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
    "laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush"
)
CLASS_NAMES = ("background", *_NAMES.split(", "))
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Category ids up to 90 that no annotation has; classes are the others, in order."""
CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in UNUSED)
"""Of each class from 1 on."""
PLACES = ("", "coco", "COCO", "coco2017")
"""Where below the root the folders may lie."""
LAYOUT = Layout("coco", "train2017", "masks", "val2017", "masks")
_FRACTION = {"232": "512", "463": "256", "925": "128", "1849": "64", "3697": "32"}


class CocoData(DataConfig):
    """COCO 2017 things and background: 81 classes."""

    dataset: Literal["coco"] = "coco"
    split: Literal["232", "463", "925", "1849", "3697", "all"] = "463"
    split_dir: str | None = None
    """Directory of the lists; none is ``splits`` below the data."""


def open_coco(root: Path | str, data: CocoData) -> SourceFiles:
    """Open ``train2017``, ``val2017`` and the PNGs in ``masks``, with lists in ``splits/`` or in ``split_dir``.

    Lists are found as in ``folder``, also under the names ``1_512`` and ``512_all`` or by their images. Without a list,
    all of ``val2017`` are validated on, and the unlabelled are all others of ``train2017``. Raises ValueError as
    ``folder`` does, and for a published list of another size.
    """
    tree, classes = coco_tree(root, data)
    split = data.split
    names = [split, f"1_{_FRACTION[split]}", f"{_FRACTION[split]}_all"]
    directory = split_directory(tree, data.split_dir)
    tree, lists, sources = read_lists(tree, directory, names, SplitKey("coco", "", split))
    refuse_other(lists, sources[0], "", split, "coco")
    return SourceFiles(tree, classes, lists, sources)


def coco_tree(root: Path | str, data: CocoData) -> tuple[FileIndex, Classes]:
    """Index the files; ids are bare names such as ``000000177254``. Raises ValueError if there is no mask."""
    tree = scan(locate(root, PLACES, LAYOUT), LAYOUT)
    if not tree.masks:
        raise ValueError(
            f"{tree.root}: has no PNGs in {LAYOUT.masks!r}; `viladiff data coco-masks {tree.root}` makes them from "
            "annotations/instances_*2017.json"
        )
    return tree, Classes(CLASS_NAMES, None)


COCO_SOURCE = FileSource(
    config=CocoData,
    num_classes=len(CLASS_NAMES),
    largest={"": "3697"},
    presets=pretrained(epochs=20.0),
    method_presets=photograph_sizes(len(CLASS_NAMES)),
    layout=LAYOUT,
    places=PLACES,
    scan=coco_tree,
    read=open_coco,
)
