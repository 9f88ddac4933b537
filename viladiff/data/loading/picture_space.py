"""The size of a run's picture cache, and whether the disk has room for it, before a picture is decoded."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from viladiff.config.pixel_format import PixelFormat
from viladiff.config.sections import Sections
from viladiff.data.dataset import Dataset
from viladiff.data.files.images import FileMasks
from viladiff.data.files.run_checks import image_sizes
from viladiff.data.loading.picture_cache import HEAD, entry_path, image_reading, mask_reading, picture_folder
from viladiff.data.registry import dataset_spec, load_dataset


class PictureSpace(NamedTuple):
    """The entries that runs read."""

    folder: Path
    images: dict[Path, int]
    """Bytes of each entry, by its place."""
    masks: dict[Path, int]

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(self.images.values()) + sum(self.masks.values())

    def missing(self) -> int:
        """Return the bytes of those that are not there."""
        return sum(size for place, size in (*self.images.items(), *self.masks.items()) if not place.exists())

    def text(self) -> str:
        """Return the size in words."""
        missing = self.missing()
        written = f", {missing / 1e9:.2f} GB of it to be written" if missing < self.total else ""
        of = f"{len(self.images):,} images and {len(self.masks):,} masks"
        return f"{of} decoded, {self.total / 1e9:.2f} GB in {self.folder}{written}"


def decoded_bytes(size: tuple[int, int], pixels: PixelFormat | None) -> int:
    """Return the bytes of the entry of an image of (height, width), or of a mask if there is no format."""
    each = 1 if pixels is None else pixels.inputs * (1 if pixels.value_range is None else 4)
    return HEAD + each * math.prod(size)


def picture_space(dataset: Dataset, unlabelled: bool = True) -> PictureSpace:
    """Return the size of the cache for training on a data set, from the headers of its images.

    unlabelled: whether the method reads images without labels. Raises ValueError for a data set that is not in files,
    and for an image that cannot be read.
    """
    files, masks = dataset.files, dataset.masks
    if files is None or not isinstance(masks, FileMasks):
        raise ValueError(f"runtime.picture_cache = true: {dataset.name} is not in files; set it to false")
    folder, labelled = picture_folder(), dataset.labelled.tolist()
    used = [*labelled, *(dataset.unlabelled.tolist() if unlabelled else ())]
    sizes = dict(zip(used, image_sizes(dataset, used), strict=True))
    image, mask = image_reading(dataset.pixels), mask_reading(masks.num_classes, masks.coding)

    def place(path: Path, what: str) -> Path:
        return entry_path(folder, os.path.abspath(path), what)

    return PictureSpace(
        folder,
        {place(files.paths[i], image): decoded_bytes(sizes[i], dataset.pixels) for i in used},
        {place(files.masks[i], mask): decoded_bytes(sizes[i], None) for i in labelled},
    )


def planned_space(runs: Iterable[tuple[Sections, bool]]) -> PictureSpace | None:
    """Return the size of the cache of those runs that ask for one, each entry once; None if none does.

    runs: a configuration each, and whether its method reads images without labels. Raises ValueError as
    ``picture_space``.
    """
    asked = dict.fromkeys((dataset_spec(cfg), unlabelled) for cfg, unlabelled in runs if cfg.runtime.picture_cache)
    found = [picture_space(load_dataset(*spec), unlabelled) for spec, unlabelled in asked]
    if not found:
        return None
    images = {place: size for one in found for place, size in one.images.items()}
    masks = {place: size for one in found for place, size in one.masks.items()}
    return PictureSpace(found[0].folder, images, masks)


def refuse_full_disk(space: PictureSpace) -> None:
    """Raise ValueError if the disk has less room than the missing entries need."""
    there = next(folder for folder in _upwards(space.folder) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < space.missing():
        raise ValueError(
            f"runtime.picture_cache = true: {space.text()}, but {free / 1e9:.2f} GB are free; free some, set "
            "VILADIFF_CACHE to a folder on a larger disk, or runtime.picture_cache=false"
        )


def picture_notes(dataset: Dataset, unlabelled: bool) -> tuple[str, ...]:
    """Return the size of a run's cache as a note. Raises ValueError as ``picture_space`` and ``refuse_full_disk``."""
    space = picture_space(dataset, unlabelled)
    refuse_full_disk(space)
    return (f"runtime.picture_cache: {space.text()}",)


def _upwards(folder: Path) -> Iterable[Path]:
    folder = folder.absolute()
    return folder, *folder.parents
