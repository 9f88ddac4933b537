"""A user's own directory of images and masks, with lists of the labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from viladiff.config.base import did_you_mean
from viladiff.data.constants import IGNORE
from viladiff.data.files.images import MaskEncoding, PaletteEncoding
from viladiff.data.files.index import FOLDER, FileIndex, scan
from viladiff.data.files.known_splits import identify_split, list_hash, missing_unlabelled, same_size, similarly_named
from viladiff.data.files.second_column import named_masks
from viladiff.data.files.split_lists import (
    LABELLED,
    Lists,
    Wanted,
    check_disjoint,
    find_lists,
    numbered,
    read_columns,
    read_lines,
)

IGNORED = ("ignore", "void", "unlabelled", "unlabeled")
"""Names in palette.txt whose colour is no class: its pixels count in no loss and no score."""


class Classes(NamedTuple):
    """Names of the classes by id, and what the pixels of masks stand for where they are not class ids."""

    names: tuple[str, ...]
    coding: MaskEncoding | None


class SourceFiles(NamedTuple):
    """What a reader of files finds: everything that ``Dataset`` needs but the pixels."""

    tree: FileIndex
    classes: Classes
    lists: Lists
    sources: tuple[Path | None, ...]
    """The file of each list; none for unlabelled images that are simply all others, and for all of a folder."""


def open_folder(root: Path | str, split: str, split_dir: Path | str | None = None) -> SourceFiles:
    """Open ``images/``, ``masks/``, ``classes.txt`` or ``palette.txt``, and lists in ``splits/`` or in ``split_dir``.

    The labelled images of split NAME are listed in ``NAME/labelled.txt`` (or ``labeled.txt``) or ``NAME.txt``, the
    validation images in ``NAME/val.txt`` or ``val.txt``; ``NAME/unlabelled.txt`` may list the others. Raises
    ValueError for what is missing, empty, listed twice or outside of the root.
    """
    tree = scan(root, FOLDER)
    tree, lists, sources = read_lists(tree, split_directory(tree, split_dir), [split])
    return SourceFiles(tree, read_classes(tree.root), lists, sources)


def split_directory(tree: FileIndex, given: Path | str | None) -> Path:
    """Return the directory of lists that the user names, or ``splits`` below the root. Raises ValueError if missing."""
    directory = tree.root / "splits" if given is None else Path(given).expanduser()
    if directory.is_dir():
        return directory
    if given is not None:
        raise ValueError(f"data.split_dir = {str(given)!r}: there is no such directory")
    raise ValueError(f"{directory}: no lists of images; make some with `viladiff data split`, or set data.split_dir")


def read_lists(
    tree: FileIndex, directory: Path, names: Sequence[str], masked: bool = False, wanted: Wanted | None = None
) -> tuple[FileIndex, Lists, tuple[Path | None, ...]]:
    """Read the lists of a split under the first of its ``names`` that exists, or a published list of any name.

    Returns the index with the masks that the lists name. Raises ValueError for a list that cannot be used.

    Unlabelled images that no list names are all others; with ``masked``, all others that have a mask. Where a layout
    keeps validation images apart, those are never among them, and are all validated on if no list says which.
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
    if rest is not None:
        found = read_columns(rest, tree.layout, pool)
        tree, others = named_masks(tree, rest, found, needed=False), tuple(found)
    else:
        taken = {*first, *last}
        others = tuple(name for name in pool if name not in taken and (name in tree.masks or not masked))
    lists, sources = Lists(tuple(first), others, last), (labelled, rest, val)
    check_disjoint(lists, [str(path or tree.root / tree.layout.val_images) for path in sources])
    _check_masks(tree, lists, sources)
    return tree, lists, sources


def describe_lists(dataset: str, found: SourceFiles) -> tuple[str, tuple[str, ...]]:
    """Return which published list the labelled images are, or that they are none; and notes on possible confusion."""
    labelled, val = identify_split(found.lists.labelled), identify_split(found.lists.val)
    if labelled is None:
        size = len(found.lists.labelled)
        name = f"no published list: {size} images, SHA-256 {list_hash(found.lists.labelled)[:12]}"
        return name, tuple(same_size(dataset, size))
    notes = [*similarly_named(labelled), *missing_unlabelled(labelled, len(found.lists.unlabelled))]
    if val is None or (val.dataset, val.family) != (labelled.dataset, "val"):
        where = found.sources[2] or found.tree.root / found.tree.layout.val_images
        here = f"{where}: {len(found.lists.val)} images"
        notes.append(f"{here}, which are not the validation list of {labelled.dataset}; published scores are of that")
    return str(labelled), tuple(notes)


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


def read_classes(root: Path) -> Classes:
    """Read ``palette.txt`` ("r g b name" a line) if it exists, else ``classes.txt`` (a name a line, id 0 first)."""
    if (root / "palette.txt").is_file():
        return _read_palette(root / "palette.txt")
    path = root / "classes.txt"
    if not path.is_file():
        raise ValueError(
            f"{root}: has no classes.txt (a class name a line, id 0 first), and no palette.txt ('r g b name' a line)"
        )
    return Classes(_checked(read_lines(path), path), None)


def _read_palette(path: Path) -> Classes:
    names: list[str] = []
    rgb: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, line in numbered(path):
        *channels, name = line.split(maxsplit=3)
        if len(channels) != 3 or not all(one.isascii() and one.isdigit() and int(one) < 256 for one in channels):
            raise ValueError(f"{path}, line {number}: {line!r} is not 'r g b name' with three numbers from 0 to 255")
        colour = (int(channels[0]), int(channels[1]), int(channels[2]))
        if colour in rgb:
            raise ValueError(f"{path}, line {number}: the colour {colour} stands for two classes")
        rgb.append(colour)
        labels.append(IGNORE if name.lower() in IGNORED else len(names))
        if name.lower() not in IGNORED:
            names.append(name)
    return Classes(_checked(names, path), PaletteEncoding(tuple(rgb), tuple(labels)))


def _checked(names: Sequence[str], path: Path) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: the class {twice[0]!r} is named twice")
    if not 2 <= len(names) <= IGNORE:
        raise ValueError(f"{path}: names {len(names)} classes; 2 to {IGNORE} are possible, background among them")
    return tuple(names)
