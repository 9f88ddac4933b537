"""What unlabelled images could be worth at best: the split under which every training image with a mask is labelled."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from viladiff.data.cache import fingerprint
from viladiff.data.sources.base import ALL, DataSource

if TYPE_CHECKING:
    from viladiff.data.dataset import Dataset
    from viladiff.data.files.index import FileList


def base_split(source: DataSource, split: str, family: str = "") -> str:
    """Return the list that a data set opens for a split: its longest for ``all``, unless that is a list itself."""
    if split != ALL or not source.largest:
        return split
    return source.largest.get(family) or next(iter(source.largest.values()))


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
