"""New lists for a directory of images: seeded, with every class in the labelled and validation lists."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from viladiff.core import keyed_random
from viladiff.core.atomic import draft_of
from viladiff.data.constants import IGNORE
from viladiff.data.files.groups import groups_of
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
    left_out: int = 0
    """Images of a group in validation that are in no list."""


@dataclass(frozen=True)
class SplitOptions:
    """How a directory is read and split, beyond sizes and seed."""

    fields: Mapping[str, object] = field(default_factory=dict)
    """Of ``data``, as of ``open_tree``."""
    split_dir: Path | None = None
    """Where lists are; none is ``splits`` below the data."""
    groups: str | None = None
    """What keeps images together, as of ``groups_of``."""

    def lists_below(self, tree: FileIndex) -> Path:
        """Return the directory of lists."""
        return tree.root / "splits" if self.split_dir is None else self.split_dir


def make_split(
    root: Path | str,
    seen: dict[str, ImageReport],
    labelled: int | None,
    val: float | None,
    seed: int,
    options: SplitOptions = SplitOptions(),  # immutable
) -> NewSplit:
    """Split the images with a valid mask into labelled and validation images; all others are unlabelled.

    labelled: their number, or all that validation leaves. val: their number, or a share below 1; None keeps the
    directory's val.txt, or the layout's own validation images, or takes a fifth. Both lists cover rare classes first,
    the rest is drawn by ``seed``. With groups, no other image of a validation image's group is in any list. Raises
    ValueError for too few masks or invalid numbers.
    """
    if labelled is not None and labelled < 1:
        raise ValueError(f"--labelled {labelled}: must be a whole number, 1 or more")
    tree, classes = open_tree(root, **options.fields)
    if tree.apart and val is not None:
        raise ValueError(f"--val {val:g}: {tree.layout.dataset} is validated on all of {tree.layout.val_images!r}")
    able = [name for name in tree.pool() if _sound(seen[name])]
    kept = find_list(options.lists_below(tree), VALIDATION[1:], [""]) if val is None else None
    fixed = read_list(kept, tree.layout, tree.images) if kept else tuple(sorted(tree.apart))
    groups = {name: name for name in tree.images} if options.groups is None else groups_of(tree, options.groups)
    shut = {groups[name] for name in fixed}
    free = [name for name in able if groups[name] not in shut]
    present = np.array([[_shows(seen[name], label) for label in range(len(classes.names))] for name in free], bool)
    wanted = 0 if fixed else _count("--val", 0.2 if val is None else val, len(free))
    count = len(free) - wanted if labelled is None else labelled
    if count < 1 or count + wanted > len(free):
        raise ValueError(
            f"{tree.root}: {len(free)} images have a valid mask, but {max(count, 1)} labelled and {wanted} "
            "validation images are asked for; lower --labelled or --val, or label more images"
        )
    if options.groups is None:
        first, last = draw_split(present, count, wanted, seed)
    else:
        first, last = draw_grouped(present, [groups[name] for name in free], count if labelled else None, wanted, seed)
    val_names = fixed or [free[i] for i in last]
    apart = {groups[name] for name in val_names} if options.groups else set()
    lists = _lists(tree, [free[i] for i in first], val_names, {name for name in tree.images if groups[name] in apart})
    covered = {"labelled": present[first].any(0)} | ({} if fixed else {"validation": present[last].any(0)})
    absent = {name: tuple(np.array(classes.names)[present.any(0) & ~shown].tolist()) for name, shown in covered.items()}
    left_out = (
        0 if options.groups is None else len(tree.pool()) - sum(map(len, lists)) + (len(fixed) if tree.apart else 0)
    )
    return NewSplit(lists, {name: names for name, names in absent.items() if names}, kept, left_out)


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


def draw_grouped(
    present: np.ndarray, groups: Sequence[str], labelled: int | None, val: int, seed: int
) -> tuple[list[int], list[int]]:
    """Return the places of labelled and validation images, no group in both; validation consists of whole groups.

    present: (N, C) bool, groups: that of each image. Validation groups are added in an order drawn by ``seed``, classes
    first, until there are ``val`` images; one that would leave fewer than ``labelled`` is passed over. labelled: their
    number, or all that are left. Raises ValueError if no group can be spared, or too few images are left.
    """
    names = list(dict.fromkeys(groups))
    members = {name: [i for i, one in enumerate(groups) if one == name] for name in names}
    shown = np.array([present[members[name]].any(0) for name in names])
    order = keyed_random.numpy_generator("deal", seed).permutation(len(names)).tolist()
    first = _essential(shown, order, len(names))
    taken: list[int] = []
    last: list[int] = []
    for i in (*first, *(i for i in order if i not in first)):
        rest = [j for j in order if j != i and j not in taken]
        enough = len(groups) - len(last) - len(members[names[i]]) >= (labelled or 1)
        if len(last) < val and rest and enough and (shown[rest].any(0) >= shown[i]).all():
            taken.append(i)
            last += members[names[i]]
    free = [i for i in range(len(groups)) if i not in {*last}]
    if val and not last:
        raise ValueError(
            f"--groups: none of the {len(names)} groups can be validated on without a class leaving training, "
            f"or fewer than {labelled or 1} images (--labelled)"
        )
    if (labelled or 1) > len(free):
        raise ValueError(f"--labelled {labelled}: {len(free)} images are left beside the groups of validation")
    chosen, _ = draw_split(present[free], labelled or len(free), 0, seed)
    return [free[i] for i in chosen], last


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


def write_lists(
    root: Path | str,
    name: str,
    lists: Lists,
    options: SplitOptions = SplitOptions(),  # immutable
) -> Path:
    """Write ``NAME/{labelled,unlabelled,val}.txt`` below the directory of lists, all or none.

    Raises ValueError if the folder exists or cannot be written, and for an image whose name no line of a list can hold.
    """
    if not name or name != Path(name).name or name in (".", ".."):
        raise ValueError(f"--name {name!r}: must be a single name, such as 'labelled'")
    tree, _ = open_tree(root, **options.fields)
    unfit = next((one for ids in lists for one in ids if not listable(one, tree.layout, tree.images)), None)
    if unfit is not None:
        raise ValueError(f"{str(tree.images[unfit])!r}: no list can hold this name; rename the image and its mask")
    directory = options.lists_below(tree) / name
    draft = draft_of(directory)
    try:
        draft.mkdir(parents=True)
        for file, ids in zip(("labelled", "unlabelled", "val"), lists, strict=True):
            # With groups, images that no list has are not to be found in the pool.
            if ids or (file == "unlabelled" and options.groups is not None):
                (draft / f"{file}.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
        if directory.exists():
            raise ValueError(f"{directory}: exists already; choose another --name, or delete it first")
        draft.rename(directory)
    except OSError as error:
        raise ValueError(
            f"{directory}: the lists cannot be written ({error.strerror or error}); --split-dir names another place"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return directory


def _lists(tree: FileIndex, labelled: Sequence[str], val: Sequence[str], apart: set[str]) -> Lists:
    taken = {*labelled, *val, *apart}
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
