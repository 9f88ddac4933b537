"""New lists for a directory of images: seeded, with every class in the labelled and validation lists."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from viladiff.core import keyed_random
from viladiff.data.constants import IGNORE
from viladiff.data.files.index import FileIndex
from viladiff.data.files.split_lists import VALIDATION, Lists, find_list, listable, read_list
from viladiff.data.files.validate import ImageReport
from viladiff.data.sources.detect import open_tree
from viladiff.data.splits import VISIBLE


@dataclass(frozen=True)
class NewSplit:
    """Lists and what they show."""

    lists: Lists
    uncovered: dict[str, tuple[str, ...]]
    """By list, classes that some mask shows and none of the list's does."""
    kept_val: Path | None
    """The validation list that was there before and is kept; none where it is new."""


def make_split(
    root: Path | str,
    seen: dict[str, ImageReport],
    labelled: int | None,
    val: float | None,
    seed: int,
) -> NewSplit:
    """Split the images with a valid mask into labelled and validation images; all others are unlabelled.

    labelled: their number, or all that validation leaves. val: their number, or a share below 1; None keeps the
    directory's val.txt, or the layout's own validation images, or takes a fifth. Both lists cover rare classes first,
    the rest is drawn by ``seed``. Raises ValueError for too few masks or invalid numbers.
    """
    tree, classes = open_tree(root)
    if tree.apart and val is not None:
        raise ValueError(f"--val {val:g}: {tree.layout.dataset} is validated on all of {tree.layout.val_images!r}")
    able = [name for name in tree.pool() if _sound(seen[name])]
    kept = find_list(tree.root / "splits", VALIDATION[1:], [""]) if val is None else None
    fixed = read_list(kept, tree.layout, tree.images) if kept else tuple(sorted(tree.apart))
    free = [name for name in able if name not in set(fixed)]
    present = np.array([[_shows(seen[name], label) for label in range(len(classes.names))] for name in free], bool)
    wanted = 0 if fixed else _count("--val", 0.2 if val is None else val, len(free))
    count = len(free) - wanted if labelled is None else labelled
    if count < 1 or count + wanted > len(free):
        raise ValueError(
            f"{tree.root}: {len(free)} images have a valid mask, but {max(count, 1)} labelled and {wanted} "
            "validation images are asked for; lower --labelled or --val, or label more images"
        )
    first, last = draw_split(present, count, wanted, seed)
    lists = _lists(tree, [free[i] for i in first], fixed or [free[i] for i in last])
    covered = {"labelled": present[first].any(0)} | ({} if fixed else {"validation": present[last].any(0)})
    absent = {name: tuple(np.array(classes.names)[present.any(0) & ~shown].tolist()) for name, shown in covered.items()}
    return NewSplit(lists, {name: names for name, names in absent.items() if names}, kept)


def draw_split(present: np.ndarray, labelled: int, val: int, seed: int) -> tuple[list[int], list[int]]:
    """Places of so many labelled and validation images, in an order drawn by ``seed``; no place is in both.

    present: (N, C) bool, the classes of each image. As far as the numbers allow, each class is in a labelled image, and
    then in one for validation, before either list is filled up.
    """
    order = keyed_random.numpy_generator("deal", seed).permutation(len(present)).tolist()
    first = _essential(present, order, labelled)
    last = _essential(present, [i for i in order if i not in first], val)
    rest = [i for i in order if i not in {*first, *last}]
    more = labelled - len(first)
    return first + rest[:more], last + rest[more : more + val - len(last)]


def _essential(present: np.ndarray, order: Sequence[int], most: int) -> list[int]:
    """Return the first image in order for each class that the selection lacks; rare classes come first.

    The last image left to show another class is only taken if there is no other.
    """
    chosen: list[int] = []
    left = present[list(order)].sum(0)
    for label in np.argsort(left, kind="stable"):
        showing = [i for i in order if present[i, label]]
        if showing and len(chosen) < most and not present[chosen, label].any():
            last = present[showing] & (left == 1)
            chosen.append(showing[int(last.sum(1).argmin())])
            left = left - present[chosen[-1]]
    return chosen


def write_lists(root: Path | str, name: str, lists: Lists) -> Path:
    """Write ``splits/NAME/{labelled,unlabelled,val}.txt``, all or none.

    Raises ValueError if the folder exists or cannot be written, and for an image whose name no line of a list can hold.
    """
    if not name or name != Path(name).name or name in (".", ".."):
        raise ValueError(f"--name {name!r}: must be a single name, such as 'labelled'")
    tree, _ = open_tree(root)
    unfit = next((one for ids in lists for one in ids if not listable(one, tree.layout, tree.images)), None)
    if unfit is not None:
        raise ValueError(f"{str(tree.images[unfit])!r}: no list can hold this name; rename the image and its mask")
    directory = tree.root / "splits" / name
    draft = directory.with_name(f".{name}-{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        for file, ids in zip(("labelled", "unlabelled", "val"), lists, strict=True):
            if ids:
                (draft / f"{file}.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
        if directory.exists():
            raise ValueError(f"{directory}: exists already; choose another --name, or delete it first")
        draft.rename(directory)
    except OSError as error:
        raise ValueError(f"{directory}: the lists cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return directory


def _lists(tree: FileIndex, labelled: Sequence[str], val: Sequence[str]) -> Lists:
    taken = {*labelled, *val}
    pool = (name for name in tree.pool() if name in tree.masks or not tree.layout.pool_has_masks)
    others = (name for name in pool if name not in taken)
    return Lists(tuple(labelled), tuple(others), tuple(val))


def _sound(one: ImageReport) -> bool:
    return not any(fault.level == "error" for fault in one.faults) and _labelled(one)


def _labelled(one: ImageReport) -> bool:
    return one.pixels is not None and one.pixels.keys() != {IGNORE}


def _shows(one: ImageReport, label: int) -> bool:
    return one.pixels is not None and one.pixels.get(label, 0) >= VISIBLE


def _count(option: str, value: float, images: int) -> int:
    """Convert an option to a number of images: a share of ``images`` below 1, at least one, or a whole number."""
    if 0 < value < 1:
        return max(1, round(value * images))
    if value < 1 or value != int(value):
        raise ValueError(f"{option} {value:g}: must be a share between 0 and 1, or a whole number of images")
    return int(value)
