"""The size of a run's picture cache, and whether the disk has room for it, before a picture is decoded."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from viladiff.data.dataset import Dataset
from viladiff.data.files.images import FileMasks
from viladiff.data.files.run_checks import image_sizes
from viladiff.data.loading.picture_cache import HEAD, entry_path, image_reading, mask_reading, picture_folder


class PictureSpace(NamedTuple):
    """The entries that a run reads."""

    folder: Path
    images: int
    masks: int
    total: int
    """Bytes of all of them."""
    missing: int
    """Bytes of those that are not there."""

    @property
    def text(self) -> str:
        """The size in words."""
        there = f", {self.missing / 1e9:.2f} GB of it to be written" if self.missing < self.total else ""
        of = f"{self.images:,} images and {self.masks:,} masks"
        return f"{of} decoded, {self.total / 1e9:.2f} GB in {self.folder}{there}"


def picture_space(dataset: Dataset, unlabelled: bool = True, folder: Path | None = None) -> PictureSpace:
    """Return the size of the cache for training on a data set, from the headers of its images.

    unlabelled: whether the method reads images without labels. Raises ValueError for a data set that is not in files,
    and for an image that cannot be read.
    """
    files, masks = dataset.files, dataset.masks
    if files is None or not isinstance(masks, FileMasks):
        raise ValueError(f"runtime.picture_cache = true: {dataset.name} is not in files; set it to false")
    folder = picture_folder() if folder is None else folder
    labelled = dataset.labelled.tolist()
    used = [*labelled, *(dataset.unlabelled.tolist() if unlabelled else ())]
    sizes = image_sizes(dataset, used)
    each = dataset.pixels.inputs * (1 if dataset.pixels.value_range is None else 4)
    reading = image_reading(dataset.pixels), mask_reading(masks.num_classes, masks.coding)
    entries = [(files.paths[i], reading[0], each * math.prod(size)) for i, size in zip(used, sizes, strict=True)]
    entries += [(files.masks[i], reading[1], math.prod(size)) for i, size in zip(labelled, sizes, strict=False)]
    needed = [(entry_path(folder, os.path.abspath(path), what), HEAD + pixels) for path, what, pixels in entries]
    missing = sum(size for place, size in needed if not place.exists())
    return PictureSpace(folder, len(used), len(labelled), sum(size for _, size in needed), missing)


def refuse_full_disk(space: PictureSpace) -> None:
    """Raise ValueError if the disk has less room than the missing entries need."""
    there = next(folder for folder in _upwards(space.folder) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < space.missing:
        raise ValueError(
            f"runtime.picture_cache = true: {space.text}, but {free / 1e9:.2f} GB are free; free some, set "
            "VILADIFF_CACHE to a folder on a larger disk, or runtime.picture_cache=false"
        )


def picture_notes(dataset: Dataset, unlabelled: bool) -> tuple[str, ...]:
    """Return the size of a run's cache as a note. Raises ValueError as ``picture_space`` and ``refuse_full_disk``."""
    space = picture_space(dataset, unlabelled)
    refuse_full_disk(space)
    return (f"runtime.picture_cache: {space.text}",)


def _upwards(folder: Path) -> Iterable[Path]:
    folder = folder.absolute()
    return folder, *folder.parents
