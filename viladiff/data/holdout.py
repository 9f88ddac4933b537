"""Labelled images held out of training, to choose between runs without the reported set."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from viladiff.core import keyed_random
from viladiff.data.cache import fingerprint
from viladiff.data.splits import VISIBLE

if TYPE_CHECKING:
    from viladiff.data.dataset import Dataset


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
    """Sorted places, about ``share`` of n, in an order drawn by ``key``; rare classes are seen to first.

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
