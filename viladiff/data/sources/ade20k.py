"""ADE20K of the scene parsing challenge: 150 classes without a background."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from viladiff.config.sections import DataConfig
from viladiff.data.constants import IGNORE
from viladiff.data.files.images import IdEncoding
from viladiff.data.files.index import FileIndex, Layout, locate, scan
from viladiff.data.files.open_lists import read_lists, refuse_other, split_directory
from viladiff.data.files.split_lists import SplitKey
from viladiff.data.sources.base import Classes, FileSource, SourceFiles, photograph_sizes, pretrained

_NAMES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, "
    "table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, "
    "armchair, seat, fence, queue, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, "
    "chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, "
    "case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, "
    "book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, "
    "hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, "
    "dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, "
    "fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, "
    "minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, "
    "screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, "
    "monitor, bulletin board, shower, radiator, glass, clock, flag"
)
CLASS_NAMES = tuple(_NAMES.split(", "))
PLACES = ("", "ADE", "ade20k", "ADE20K", "ADEChallengeData2016")
"""Where below the root the folders may lie."""
LAYOUT = Layout("ade20k", "images/training", "annotations/training", "images/validation", "annotations/validation")
AS_PUBLISHED = IdEncoding(
    tuple(range(151)),
    (IGNORE, *range(150)),
    "masks as ADE20K has them hold 0 (no class) ... 150; if these are shifted already, to 0 ... 149 and 255, set "
    "data.reduce_zero_label=false",
)
SHIFTED = IdEncoding(
    (*range(150), IGNORE),
    (*range(150), IGNORE),
    "shifted masks hold 0 ... 149 and 255; if these are as ADE20K has them, 0 (no class) ... 150, set "
    "data.reduce_zero_label=true",
)
_FRACTION = {
    "158": "1_128",
    "316": "1_64",
    "631": "1_32",
    "632": "1_32",
    "1263": "1_16",
    "2526": "1_8",
    "5052": "1_4",
    "10105": "1_2",
}


class Ade20kData(DataConfig):
    dataset: Literal["ade20k"] = "ade20k"
    split: Literal["158", "316", "631", "632", "1263", "2526", "5052", "10105", "all"] = "1263"
    """158 and 632 are SemiVL's lists; its others are those of UniMatch V2."""
    split_dir: str | None = None
    """Directory of the lists; none is ``splits`` below the data."""
    reduce_zero_label: bool = True
    """Masks are as published: 0 is no class and 1 ... 150 are the classes; false where they are shifted already."""


def open_ade20k(root: Path | str, data: Ade20kData) -> SourceFiles:
    """Open ``images/{training,validation}`` with ``annotations`` and lists in ``splits/`` or in ``split_dir``.

    Lists are found as in ``folder``, also under names such as ``1_64`` or by their images. Without a list, all of
    ``validation`` are validated on, and the unlabelled are all others of ``training``. Raises ValueError as ``folder``
    does, and for a published list of another size.
    """
    tree, classes = ade_tree(root, data)
    split = data.split
    wanted = SplitKey("ade20k", "semivl" if split in ("158", "632") else "unimatch_v2", split)
    directory = split_directory(tree, data.split_dir)
    tree, lists, sources = read_lists(tree, directory, [split, _FRACTION[split]], wanted)
    refuse_other(lists, sources[0], "", split, "ade20k")
    return SourceFiles(tree, classes, lists, sources)


def ade_tree(root: Path | str, data: Ade20kData) -> tuple[FileIndex, Classes]:
    """Return the files; ids are bare names such as ``ADE_train_00001609``. Raises ValueError where there is no mask.

    ``data.reduce_zero_label``: masks are as published, 0 for what is in no class; else they are shifted already.
    """
    tree = scan(locate(root, PLACES, LAYOUT), LAYOUT)
    if not tree.masks:
        raise ValueError(f"{tree.root}: has no PNGs in {LAYOUT.masks!r}, beside {LAYOUT.images!r}")
    return tree, Classes(CLASS_NAMES, AS_PUBLISHED if data.reduce_zero_label else SHIFTED)


ADE20K_SOURCE = FileSource(
    config=Ade20kData,
    num_classes=len(CLASS_NAMES),
    largest={"": "10105"},
    presets=pretrained(epochs=60.0),
    method_presets=photograph_sizes(len(CLASS_NAMES)),
    layout=LAYOUT,
    places=PLACES,
    scan=ade_tree,
    read=open_ade20k,
)
