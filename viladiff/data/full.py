"""The split ``all``, in which every training image with a mask is labelled: an upper bound for unlabelled images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from viladiff.data.cache import fingerprint

if TYPE_CHECKING:
    from viladiff.data.dataset import Dataset
    from viladiff.data.files.index import FileList

ALL = "all"
"""Name of the split; in ``folder`` it is a list of that name, as any other."""
LARGEST = {"digits": "1464", "dense": "1849", "cityscapes": "1488", "coco": "3697", "ade20k": "10105"}
"""The list that is opened in its place: the pool is the same under each."""


def base_split(name: str, split: str, family: str = "") -> str:
    """Return the list that a reader opens for a split: another one for ``all``, on any data set but ``folder``."""
    if split != ALL or name == "folder":
        return split
    if name == "voc":
        return "1464" if family in ("", "hq") else "5291"
    return LARGEST[name]


def label_all(dataset: Dataset) -> Dataset:
    """Return the data set with labels for all images of its pool; for images in files, those with a mask."""
    files = dataset.files
    able = np.array([files is None or _has_mask(files, i) for i in dataset.unlabelled], bool)
    added = dataset.unlabelled[able]
    paths = [] if files is None else [files.masks[i] for i in added]
    masks = [] if dataset.contents is None else dataset.contents.digests(paths)
    labelled = np.concatenate([dataset.labelled, added])
    named = "" if files is None else f"all {len(labelled)} of {len(dataset.images)} training images that have a mask"
    return replace(
        dataset,
        labelled=labelled,
        unlabelled=dataset.unlabelled[~able],
        fingerprint=fingerprint(ALL, dataset.fingerprint, added.tolist(), masks),
        split_name=named,
        notes=(),
    )


def _has_mask(files: FileList, index: int) -> bool:
    return files.ids[index] not in files.unmasked and files.masks[index].is_file()
