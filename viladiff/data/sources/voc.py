"""Pascal VOC 2012: official and augmented training images, under the literature's lists."""

from __future__ import annotations

from pathlib import Path

from viladiff.data.files.index import VOC, locate, scan
from viladiff.data.files.split_lists import Wanted
from viladiff.data.sources.folder import Classes, SourceFiles, read_lists, refuse_other, split_directory

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
_FRACTION = {"662": "1_16", "1323": "1_8", "2646": "1_4", "5291": "1_2"}
_CLEAN = {"92": "1-16", "183": "1-8", "366": "1-4", "732": "1-2"}
"""Parts of the official masks, as CPS calls PseudoSeg's lists; its 732 are other images than most papers'."""


def open_voc(root: Path | str, split: str, family: str = "hq", split_dir: Path | str | None = None) -> SourceFiles:
    """Open ``JPEGImages/`` and ``SegmentationClass/`` (index PNGs), with lists in ``splits/`` or in ``split_dir``.

    Lists are found as in ``folder``, those of the literature also under the names that its repositories give them, or
    else by the images that they hold. Where none lists the unlabelled images, they are all others that have a mask,
    which is how the usual archives tell training images from test images; the masks are not opened. Raises ValueError
    as ``folder`` does, and for a published list of another family than the one asked for.
    """
    tree = scan(voc_root(root), VOC)
    names, wanted = list_names(split, family), Wanted("voc", family, split)
    tree, lists, sources = read_lists(tree, split_directory(tree, split_dir), names, masked=True, wanted=wanted)
    refuse_other(lists, sources[0], family, split, "voc")
    return SourceFiles(tree, Classes(CLASS_NAMES, None), lists, sources)


def voc_root(root: Path | str) -> Path:
    """Return the folder with the images: the root, a folder of a usual name below it, or the root itself if neither."""
    return locate(root, PLACES, VOC)


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
