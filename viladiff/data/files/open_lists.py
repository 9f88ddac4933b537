"""The labelled, unlabelled and validation images of a split, from the lists in a directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from viladiff.config.base import did_you_mean
from viladiff.data.files.index import FileIndex
from viladiff.data.files.known_splits import identify_split
from viladiff.data.files.mask_column import named_masks
from viladiff.data.files.split_lists import (
    LABELLED,
    Lists,
    SplitKey,
    check_disjoint,
    find_lists,
    read_columns,
    read_lines,
)


def split_directory(tree: FileIndex, given: Path | str | None) -> Path:
    """Return the directory of lists that the user names, or ``splits`` below the root. Raises ValueError if missing."""
    directory = tree.root / "splits" if given is None else Path(given).expanduser()
    if directory.is_dir():
        return directory
    if given is not None:
        raise ValueError(f"data.split_dir = {str(given)!r}: there is no such directory")
    raise ValueError(f"{directory}: no lists of images; make some with `viladiff data split`, or set data.split_dir")


def read_lists(
    tree: FileIndex, directory: Path, names: Sequence[str], wanted: SplitKey | None = None
) -> tuple[FileIndex, Lists, tuple[Path | None, ...]]:
    """Return a split's lists under the first of its ``names`` that exists, or a published list of whatever name; the
    tree is given back with the masks that they name. ValueError where one cannot be used.

    Unlabelled images that no list names are all others, or all others that have a mask (``Layout.pool_has_masks``).
    Where a layout keeps validation images apart, those are never among them, and are all validated on if no list says
    which.
    """
    for name in names:
        if not name or ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"data.split = {name!r}: must be the name of a list in {directory}")
    labelled, rest, val = find_lists(directory, names, wanted)
    if labelled is None:
        other = ", nor a file of its images" if wanted else ""
        there = sorted({path.stem if path.is_file() else path.name for path in directory.iterdir()} - {"val"})
        raise ValueError(
            f"data.split = {names[0]!r}: {directory} has no list {LABELLED[0].format(names[0])}"
            f" or {LABELLED[2].format(names[0])}{other}; there are: {', '.join(there[:20]) or 'none'}"
            f"{did_you_mean(names[0], there)}"
        )
    if val is None and not tree.apart:
        raise ValueError(f"{directory}: has no val.txt, the list of validation images; `viladiff data split` makes one")
    pool = dict.fromkeys(tree.pool())
    first = read_columns(labelled, tree.layout, pool)
    tree = named_masks(tree, labelled, first, needed=True)
    last = tuple(sorted(tree.apart))
    if val is not None:
        listed = read_columns(val, tree.layout, tree.apart or tree.images, tree.layout.val_images)
        tree, last = named_masks(tree, val, listed, needed=True), tuple(listed)
    if rest is not None and not read_lines(rest):  # as a split by groups leaves it
        others: tuple[str, ...] = ()
    elif rest is not None:
        found = read_columns(rest, tree.layout, pool)
        tree, others = named_masks(tree, rest, found, needed=False), tuple(found)
    else:
        taken = {*first, *last}
        others = tuple(
            name for name in pool if name not in taken and (name in tree.masks or not tree.layout.pool_has_masks)
        )
    lists, sources = Lists(tuple(first), others, last), (labelled, rest, val)
    check_disjoint(lists, [str(path or tree.root / tree.layout.val_images) for path in sources])
    _check_masks(tree, lists, sources)
    return tree, lists, sources


def _check_masks(tree: FileIndex, lists: Lists, sources: tuple[Path | None, ...]) -> None:
    for ids, source in ((lists.labelled, sources[0]), (lists.val, sources[2])):
        missing = [name for name in ids if name not in tree.masks]
        if missing:
            raise ValueError(
                f"{source or tree.layout.val_images}: {len(missing)} of {len(ids)} images have no mask, first "
                f"{missing[0]!r}: there is no {tree.layout.mask_name(missing[0])} below {tree.root / tree.layout.masks}"
            )


def refuse_other(lists: Lists, source: Path | None, family: str, split: str, dataset: str) -> None:
    """Raise ValueError if the labelled images are a published list of another data set, split or family.

    family: empty if the data set has no such field, and any is accepted.
    """
    known = identify_split(lists.labelled)
    if known is None:
        return
    families = (family or known.family, "pseudoseg")
    if (known.dataset, known.split) == (dataset, split) and known.family in families:
        return
    asked = f"data.split_family = {family!r} and " if family else ""
    raise ValueError(
        f"{source}: is the list {known}, but {asked}data.split = {split!r}; "
        "set them to what the list is, or data.split_dir to where the other lists are"
    )
