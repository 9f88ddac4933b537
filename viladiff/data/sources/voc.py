"""Pascal VOC 2012: official and augmented training images, under the literature's lists."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from viladiff.config.sections import DataConfig
from viladiff.data.files.index import FileIndex, Layout, locate, scan
from viladiff.data.files.open_lists import read_lists, refuse_other, split_directory
from viladiff.data.files.split_lists import SplitKey
from viladiff.data.sources.base import Classes, FileSource, SourceFiles, photograph_sizes, pretrained

CLASS_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
PLACES = ("", "VOC", "voc", "VOC2012", "VOCdevkit/VOC2012")
"""Where below the root the folder of images may lie."""
LAYOUT = Layout("voc", "JPEGImages", "SegmentationClass", pool_has_masks=True)
_FRACTION = {"662": "1_16", "1323": "1_8", "2646": "1_4", "5291": "1_2"}
_CLEAN = {"92": "1-16", "183": "1-8", "366": "1-4", "732": "1-2"}
"""Parts of the official masks, as CPS calls PseudoSeg's lists; its 732 are other images than most papers'."""


class VocData(DataConfig):
    """Crop of UniMatch V2 (518 there, for patches of 14), brought to a multiple of 16."""

    dataset: Literal["voc"] = "voc"
    split: Literal["92", "183", "366", "732", "1464", "662", "1323", "2646", "5291", "all"] = "183"
    split_family: Literal["hq", "aug_cps", "aug_u2pl"] = "hq"
    """Which published lists: official masks (Table 1), or the augmented set as CPS or U2PL draws from it (Table 2)."""
    split_dir: str | None = None
    """Directory of the lists; none is ``splits`` below the data."""

    @model_validator(mode="after")
    def _check_family(self) -> VocData:
        hq = ("92", "183", "366", "732", "1464")
        if self.split != "all" and (self.split in hq) != (self.split_family == "hq"):
            fits = "hq" if self.split in hq else "aug_cps or aug_u2pl"
            here = f"split = {self.split!r} is not a list of split_family = {self.split_family!r}"
            raise ValueError(f"{here}; set data.split_family to {fits}")
        return self


def open_voc(root: Path | str, data: VocData) -> SourceFiles:
    """Open ``JPEGImages/`` and ``SegmentationClass/`` (index PNGs), with lists in ``splits/`` or in ``split_dir``.

    Lists are found as in ``folder``, those of the literature also under the names that its repositories give them, or
    else by the images that they hold. Where none lists the unlabelled images, they are all others that have a mask,
    which is how the usual archives tell training images from test images; the masks are not opened. Raises ValueError
    as ``folder`` does, and for a published list of another family than the one asked for.
    """
    tree, classes = voc_tree(root, data)
    split, family = data.split, data.split_family
    names, wanted = list_names(split, family), SplitKey("voc", family, split)
    tree, lists, sources = read_lists(tree, split_directory(tree, data.split_dir), names, wanted)
    refuse_other(lists, sources[0], family, split, "voc")
    return SourceFiles(tree, classes, lists, sources)


def voc_tree(root: Path | str, data: VocData) -> tuple[FileIndex, Classes]:
    """Return the files; ids are bare names such as ``2007_000032``. Raises ValueError as ``scan``."""
    return scan(locate(root, PLACES, LAYOUT), LAYOUT), Classes(CLASS_NAMES, None)


def list_names(split: str, family: str) -> list[str]:
    """Return the names of a list in the repositories that publish it, unambiguous names first.

    UniMatch and AllSpark say ``1_16`` and ``u2pl_1_16``, CPS ``train_aug_labeled_1-16``, PS-MT ``662_train_supervised``
    and with a 0 appended ``6620_train_supervised`` for U2PL's images.
    """
    if family == "hq":
        return [split, *([f"pseudoseg_labeled_{_CLEAN[split]}"] if split in _CLEAN else [])]
    part = _FRACTION[split]
    if family == "aug_cps":
        return [part, f"train_aug_labeled_{part.replace('_', '-')}", split]
    return [f"u2pl_{part}", f"{split}0", split]


VOC_SOURCE = FileSource(
    config=VocData,
    num_classes=len(CLASS_NAMES),
    largest={"hq": "1464", "aug_cps": "5291", "aug_u2pl": "5291"},
    presets=pretrained(epochs=60.0),
    method_presets=photograph_sizes(len(CLASS_NAMES)),
    layout=LAYOUT,
    places=PLACES,
    scan=voc_tree,
    read=open_voc,
)
