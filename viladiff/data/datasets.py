"""A data set is known by name through one table; what is not rendered here is read by a reader of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from viladiff.data.cache import fingerprint
from viladiff.data.digits import CLASS_NAMES, SCENES, Part, open_pixels, scene_kind, variant_fingerprint
from viladiff.data.splits import classes_present, labelled_order, nearest, split_size
from viladiff.text.captions import SIMULATED, Captions, simulate


@dataclass(frozen=True, eq=False)
class Dataset:
    """A pool of training images with a labelled list, and a validation set; arrays are memory-mapped and read-only."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    images: np.ndarray
    """(N, H, W, 3) uint8."""
    masks: np.ndarray = field(repr=False)
    """(N, H, W) uint8 of the whole pool; training reads masks through ``target`` alone."""
    val_images: np.ndarray
    val_masks: np.ndarray
    labelled: np.ndarray
    """(n,) int64 indices into the pool."""
    unlabelled: np.ndarray
    """(N - n,) int64: the rest of the pool."""
    captions: Captions
    """Per image of the pool, one text per prompt."""
    val_captions: Captions
    fingerprint: str
    """Names pixels, labelled list and captions."""
    caption_source: str
    """Who wrote the captions, in words that a page can print."""

    @cached_property
    def _labels(self) -> frozenset[int]:
        return frozenset(self.labelled.tolist())

    def target(self, index: int) -> np.ndarray:
        """(H, W) uint8 mask of a labelled image. Raises ValueError for any other: its mask is not for training."""
        if int(index) not in self._labels:
            raise ValueError(f"{self.name}: image {index} is not among the {len(self.labelled)} labelled ones")
        return self.masks[index]


def load(name: str, split: str, split_seed: int | None = None) -> Dataset:
    """Opens a data set under one of its labelled splits; ``split_seed`` draws another labelled list of the same size.

    Raises ValueError for an unknown data set or split, and for a cache that is damaged or cannot be written.
    """
    if name in LATER:
        raise ValueError(f"data.dataset = {name!r}: its reader comes later; {nearest(name, tuple(READERS))}")
    if name not in READERS:
        raise ValueError(f"data.dataset = {name!r}: unknown; {nearest(name, (*READERS, *LATER))}")
    return READERS[name](name, split, split_seed)


def _embedded(name: str, split: str, split_seed: int | None) -> Dataset:
    arrays = open_pixels(name).arrays
    images, masks, val_masks = arrays["images"], arrays["masks"], arrays["val_masks"]
    size = split_size(name, split, len(images))
    present = classes_present(masks, len(CLASS_NAMES))
    order = labelled_order(name, present, split_seed)
    captions = _captions(name, "train", present)
    val_captions = _captions(name, "val", classes_present(val_masks, len(CLASS_NAMES)))
    return Dataset(
        name=name,
        num_classes=len(CLASS_NAMES),
        class_names=CLASS_NAMES,
        images=images,
        masks=masks,
        val_images=arrays["val_images"],
        val_masks=val_masks,
        labelled=order[:size],
        unlabelled=order[size:],
        captions=captions,
        val_captions=val_captions,
        fingerprint=fingerprint(variant_fingerprint(name), split, order[:size].tolist(), captions, val_captions),
        caption_source=str(SIMULATED),
    )


def _captions(name: str, part: Part, present: np.ndarray) -> Captions:
    scenes = [SCENES[scene_kind(name, part, index)] for index in range(len(present))]
    return simulate(present, scenes, CLASS_NAMES, name, part)


READERS: dict[str, Callable[[str, str, int | None], Dataset]] = {
    "digits": _embedded,
    "dense": _embedded,
}
LATER = ("voc", "cityscapes", "coco", "ade20k", "folder")
"""Known to the configuration; their readers do not exist yet."""
