"""The labelled lists of one data set are prefixes of a single permutation, so a larger split only ever adds images."""

from __future__ import annotations

from collections.abc import Callable, Container

import numpy as np

from viladiff.config.base import did_you_mean
from viladiff.core import keyed_random
from viladiff.data.files.split_lists import Lists

SPLITS: dict[str, tuple[str, ...]] = {
    "digits": ("92", "183", "366", "732", "1464"),
    "dense": ("232", "463", "925", "1849"),
}
"""Sizes of the labelled lists, named as the data sets that they stand for (VOC, COCO) name theirs."""

VISIBLE = 12
"""Fewest pixels of a class in an image for the image to count as showing it."""


def classes_present(masks: np.ndarray, num_classes: int, least: int = VISIBLE) -> np.ndarray:
    """(N, C) bool from (N, H, W) masks: whether at least ``least`` pixels of the image have the class."""
    flat = masks.reshape(len(masks), -1)
    return np.stack([np.count_nonzero(flat == c, axis=1) >= least for c in range(num_classes)], axis=1)


def split_size(dataset: str, split: str, pool: int) -> int:
    """Labelled images of a published split. Raises ValueError for one that is unknown or larger than the pool."""
    allowed = SPLITS[dataset]
    if split.isascii() and split.isdigit() and int(split) > pool:
        raise ValueError(
            f"data.split = {split!r}: more labelled images than the pool of {dataset!r} has ({pool}); "
            f"allowed: {', '.join(allowed)}{did_you_mean(split, allowed)}"
        )
    if split not in allowed:
        raise ValueError(
            f"data.split = {split!r}: no split of {dataset!r}; allowed: {', '.join(allowed)}"
            f"{did_you_mean(split, allowed)}"
        )
    return int(split)


def labelled_order(dataset: str, present: np.ndarray, seed: int | None = None) -> np.ndarray:
    """(N,) int64 permutation of the pool whose first images show every class; ``None`` is the published order.

    present: (N, C) bool. At most C images move to the front: for each class in turn that the ones moved do not show
    yet, the first in the drawn order that does. Raises ValueError where a class is in no image.
    """
    drawn = keyed_random.numpy_generator("split", dataset, "published" if seed is None else seed).permutation(
        len(present)
    )
    first: list[int] = []
    for c in range(present.shape[1]):
        if not present[first, c].any():
            showing = drawn[present[drawn, c]]
            if len(showing) == 0:
                raise ValueError(f"data set {dataset!r}: class {c} is in none of the {len(present)} images of the pool")
            first.append(int(showing[0]))
    return np.concatenate([np.array(first, np.int64), drawn[~np.isin(drawn, first)]])


def resample(lists: Lists, masked: Container[str], seed: int, shows: Callable[[str], np.ndarray]) -> Lists:
    """As many labelled images as the list has, drawn from the pool: all images of both lists that have a mask.

    shows: (C,) bool, which classes the mask of an image of the pool shows. One that shows none is passed over. Where
    the draw lacks a class, the first image further on in the drawn order that shows it takes the place of the last one
    that can be spared, so that with as many images as classes every class of the pool is labelled. Masks are looked at
    in the drawn order and no further than that takes. ValueError where too few show a class.
    """
    pool = sorted((*lists.labelled, *lists.unlabelled))
    able, size = [name for name in pool if name in masked], len(lists.labelled)
    names: list[str] = []
    present: list[np.ndarray] = []
    counts = np.zeros(1, np.int64)  # of the images drawn that show each class
    for place in keyed_random.numpy_generator("split", "files", seed).permutation(len(able)):
        if len(names) == size and counts.all():
            break
        row = shows(able[place])
        into = None
        if len(names) < size and row.any():
            into = len(names)
        elif len(names) == size and row[counts == 0].any():
            lost = (counts == 1) & ~row
            into = max((i for i in range(size) if not present[i][lost].any()), default=None)
        if into is not None:
            counts = counts + row - sum(present[into : into + 1])
            names[into : into + 1], present[into : into + 1] = [able[place]], [row]
    if len(names) < size:
        raise ValueError(f"data.split_seed = {seed}: only {len(names)} masks show a class, and {size} are to be drawn")
    return lists._replace(labelled=tuple(names), unlabelled=tuple(sorted({*pool} - {*names})))
