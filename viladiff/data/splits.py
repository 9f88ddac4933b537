"""Splits: labelled lists, images held out of training, and ``all``, in which every image with a mask is labelled.

The labelled lists of the built-in data are prefixes of one permutation, so that a larger split only adds images.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from viladiff.config.base import did_you_mean
from viladiff.core import keyed_random
from viladiff.data.cache import fingerprint
from viladiff.data.files.split_lists import Lists

if TYPE_CHECKING:
    from viladiff.data.dataset import Dataset


VISIBLE = 12
"""Fewest pixels of a class in an image for the image to count as showing it."""


def classes_present(masks: np.ndarray, num_classes: int, least: int = VISIBLE) -> np.ndarray:
    """Return (N, C) bool from (N, H, W) masks: whether at least ``least`` pixels of the image have the class."""
    flat = masks.reshape(len(masks), -1)
    return np.stack([np.count_nonzero(flat == c, axis=1) >= least for c in range(num_classes)], axis=1)


def split_size(dataset: str, split: str, allowed: tuple[str, ...], pool: int) -> int:
    """Return the labelled images of a split. Raises ValueError if it is not ``allowed`` or larger than the pool."""
    if split.isascii() and split.isdigit() and int(split) > pool:
        raise ValueError(
            f"data.split = {split!r}: more labelled images than the pool of {dataset!r} has ({pool}); "
            f"allowed: {', '.join(allowed)}{did_you_mean(split, allowed, 0.5)}"
        )
    if split not in allowed:
        raise ValueError(
            f"data.split = {split!r}: no split of {dataset!r}; allowed: {', '.join(allowed)}"
            f"{did_you_mean(split, allowed, 0.5)}"
        )
    return int(split)


def labelled_order(dataset: str, present: np.ndarray, seed: int | None = None) -> np.ndarray:
    """Return (N,) int64 permutation of the pool whose first images show every class; ``None`` is the published order.

    present: (N, C) bool. At most C images move to the front: for each class in turn that the ones moved do not show
    yet, the first in the drawn order that does. Raises ValueError if a class is in no image.
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
    """Draw as many labelled images as the list has from the pool: all images of both lists that have a mask.

    shows: (C,) bool, the classes in the mask of an image of the pool. An image without any is skipped. If the draw
    lacks a class, the next image in the drawn order that shows it replaces the last one that can be spared, so that
    with as many images as classes every class of the pool is labelled. Masks are read in the drawn order and no further
    than needed. Raises ValueError if too few show a class.
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


class Subset:
    """Some of a sequence, opened when they are asked for."""

    def __init__(self, whole: Any, places: np.ndarray) -> None:
        self.whole, self.places = whole, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.whole[int(self.places[index])]


def hold_out(dataset: Dataset, share: float, scored: bool) -> Dataset:
    """Return the data set with ``share`` of its labelled list removed from training, labelled and unlabelled.

    The images are the same for every run on that list. ``scored``: they replace the validation images. Raises
    ValueError if the list is too short.
    """
    held = dataset.labelled[choose_holdout(_present(dataset), share, dataset.name)]
    if len(held) == 0:
        raise ValueError(
            f"data.holdout = {share:g}: none of the {len(dataset.labelled)} labelled images of {dataset.name!r} can be "
            "held out without a class leaving training; take a longer list (data.split), or data.holdout=0"
        )
    kept = dataset.labelled[~np.isin(dataset.labelled, held)]
    named = fingerprint("holdout", dataset.fingerprint, held.tolist(), scored)
    rest = replace(dataset, labelled=kept, fingerprint=named)
    if not scored:
        return rest
    return replace(
        rest,
        val_images=_some(dataset.images, held),
        val_masks=_some(dataset.masks, held),
        val_captions=tuple(dataset.captions[i] for i in held),
        val_files=None,
    )


def set_apart(dataset: Dataset, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the labelled list into all but one image in ``period``, and those; equal for every run on that list.

    For a method that leaves labelled images out of its supervised loss. Raises ValueError if the list is too short.
    """
    held = dataset.labelled[choose_holdout(_present(dataset), 1 / period, dataset.name, "set apart")]
    if len(held) == 0:
        raise ValueError(
            f"method.mixe.holdout = {1 / period:g}: none of the {len(dataset.labelled)} labelled images of "
            f"{dataset.name!r} can be held out without a class leaving training; take a longer list (data.split), or "
            "method.mixe.holdout=0"
        )
    return dataset.labelled[~np.isin(dataset.labelled, held)], held


def choose_holdout(present: np.ndarray, share: float, *key: keyed_random.Part) -> np.ndarray:
    """Return sorted positions, about ``share`` of n, in an order drawn by ``key``; rare classes are covered first.

    present: (n, C) bool, the classes of each labelled image. No class leaves training altogether, and each class that
    two images show is shown by one held out, as far as ``share`` allows.
    """
    wanted = max(1, round(share * len(present)))
    left = present.sum(0)
    order = keyed_random.numpy_generator("holdout", *key).permutation(len(present))
    held = np.zeros(len(present), bool)

    def take(candidates: np.ndarray, most: int) -> None:
        # One pass is enough: what is left of a class only shrinks, so an image that was refused stays refused.
        for i in candidates:
            if most <= 0:
                return
            if not held[i] and (left[present[i]] > 1).all():
                held[i] = True
                left[present[i]] -= 1
                most -= 1

    for c in np.argsort(left, kind="stable"):
        if held.sum() < wanted and not present[held, c].any():
            take(order[present[order, c]], 1)
    take(order, wanted - int(held.sum()))
    return np.flatnonzero(held)


def _present(dataset: Dataset) -> np.ndarray:
    present = np.stack([_counts(dataset, i)[: dataset.num_classes] >= VISIBLE for i in dataset.labelled])
    if dataset.contents is not None:
        dataset.contents.save()
    return present


def _counts(dataset: Dataset, index: int) -> np.ndarray:
    """Return (256,) pixels by label of a labelled image."""
    if dataset.contents is None:
        return np.bincount(dataset.target(index).ravel(), minlength=256)
    coding = getattr(dataset.masks, "coding", None)
    return dataset.contents.mask(dataset.target_path(index), dataset.num_classes, coding).counts


def _some(whole: Any, places: np.ndarray) -> Any:
    return whole[places] if isinstance(whole, np.ndarray) else Subset(whole, places)
