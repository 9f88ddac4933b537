"""Cityscapes: street scenes with fine annotations, under two families of lists that share their names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from viladiff.config.sections import DataConfig
from viladiff.data.constants import IGNORE
from viladiff.data.files.images import IdEncoding
from viladiff.data.files.index import FileIndex, Layout, locate, scan
from viladiff.data.files.open_lists import read_lists, refuse_other, split_directory
from viladiff.data.files.split_lists import SplitKey
from viladiff.data.sources.base import Classes, FileSource, SourceFiles, photograph_sizes, pretrained

CLASS_NAMES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""In ``labelIds`` files, the number of each class; all other numbers up to 33 are ignored."""
PLACES = ("", "cityscapes", "Cityscapes")
"""Where below the root the folders may lie."""
LAYOUT = Layout(
    "cityscapes",
    "leftImg8bit/train",
    "gtFine/train",
    "leftImg8bit/val",
    "gtFine/val",
    "_leftImg8bit",
    "_gtFine_labelTrainIds",
    ("_gtFine_labelTrainIds", "_gtFine_labelIds", "_gtFine"),
)
LABEL_IDS = LAYOUT._replace(mask_end="_gtFine_labelIds")
_CODINGS = {
    LAYOUT: IdEncoding(
        (*range(19), IGNORE),
        (*range(19), IGNORE),
        "a labelTrainIds file holds 0 ... 18 and 255, a labelIds file 0 ... 33: is it one under the other's name?",
    ),
    LABEL_IDS: IdEncoding(
        tuple(range(34)),
        tuple(IDS.index(number) if number in IDS else IGNORE for number in range(34)),
        "a labelIds file holds 0 ... 33, a labelTrainIds file 0 ... 18 and 255: is it one under the other's name?",
    ),
}
_FRACTION = {"100": "1_30", "186": "1_16", "372": "1_8", "744": "1_4", "1488": "1_2"}


class CityscapesData(DataConfig):
    dataset: Literal["cityscapes"] = "cityscapes"
    split: Literal["100", "186", "372", "744", "1488", "all"] = "372"
    split_family: Literal["cps", "u2pl"] = "cps"
    """Two published families of lists share their names and few of their images."""
    crop: int = Field(800, ge=16)
    split_dir: str | None = None
    """Directory of the lists; none is ``splits`` below the data."""


def open_cityscapes(root: Path | str, data: CityscapesData) -> SourceFiles:
    """Open ``leftImg8bit/{train,val}/<city>`` with ``gtFine`` and lists in ``splits/`` or in ``split_dir``.

    Lists are found as in ``folder``, also under the names ``1_16`` (CPS's) and ``u2pl_1_16``, or by their images.
    Without a list, all of ``val`` are validated on, and the unlabelled are all others of ``train``. Raises ValueError
    as ``folder`` does, and for a published list of the other family.
    """
    tree, classes = city_tree(root, data)
    split, family = data.split, data.split_family
    names = [("" if family == "cps" else "u2pl_") + _FRACTION[split], split]
    wanted = SplitKey("cityscapes", family, split)
    tree, lists, sources = read_lists(tree, split_directory(tree, data.split_dir), names, wanted)
    refuse_other(lists, sources[0], family, split, "cityscapes")
    return SourceFiles(tree, classes, lists, sources)


def city_tree(root: Path | str, data: CityscapesData) -> tuple[FileIndex, Classes]:
    """Return the files, read as ``labelTrainIds``, or as ``labelIds`` if more of those exist; then a note says so.

    Ids are bare names such as ``jena_000078_000019``. Raises ValueError if there is no mask of either kind.
    """
    top = locate(root, PLACES, LAYOUT)
    by_train, by_id = scan(top, LAYOUT), scan(top, LABEL_IDS)
    if not by_train.masks and not by_id.masks:
        raise ValueError(
            f"{by_train.root}: has no gtFine/train/<city>/*{LAYOUT.mask_end}.png and no *{LABEL_IDS.mask_end}.png; "
            "unpack gtFine_trainvaltest.zip beside leftImg8bit"
        )
    if len(by_train.masks) >= len(by_id.masks):
        return by_train, Classes(CLASS_NAMES, _CODINGS[LAYOUT])
    told = (
        f"{len(by_id.masks)} masks are labelIds files, brought to the 19 classes as they are read; "
        f"{len(by_train.masks)} of them have a labelTrainIds file, which is not read"
    )
    return by_id._replace(notes=(told,)), Classes(CLASS_NAMES, _CODINGS[LABEL_IDS])


CITYSCAPES_SOURCE = FileSource(
    config=CityscapesData,
    num_classes=len(CLASS_NAMES),
    largest={"": "1488"},
    presets={**pretrained(epochs=180.0), "eval": {"protocol": "sliding_window"}},
    method_presets=photograph_sizes(len(CLASS_NAMES)),
    layout=LAYOUT,
    places=PLACES,
    scan=city_tree,
    read=open_cityscapes,
)
