"""A user's own directory of images and masks, with lists of the labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from viladiff.config.sections import DataConfig
from viladiff.data.constants import IGNORE
from viladiff.data.files.images import PaletteEncoding
from viladiff.data.files.index import FOLDER, FileIndex, scan
from viladiff.data.files.open_lists import read_lists, split_directory
from viladiff.data.files.split_lists import numbered, read_lines
from viladiff.data.sources.base import Classes, FileSource, SourceFiles, photograph_sizes, pretrained

IGNORED = ("ignore", "void", "unlabelled", "unlabeled")
"""Names in palette.txt whose colour is no class: its pixels count in no loss and no score."""


class FolderData(DataConfig):
    """A directory of images with lists of which are labelled."""

    dataset: Literal["folder"] = "folder"
    split: str = Field("labelled", min_length=1)
    """Name of the list of labelled images."""
    split_dir: str | None = None
    """Directory of the lists; none is ``splits`` below the data."""


def open_folder(root: Path | str, data: FolderData) -> SourceFiles:
    """Open ``images/``, ``masks/``, ``classes.txt`` or ``palette.txt``, and lists in ``splits/`` or in ``split_dir``.

    The labelled images of split NAME are listed in ``NAME/labelled.txt`` (or ``labeled.txt``) or ``NAME.txt``, the
    validation images in ``NAME/val.txt`` or ``val.txt``; ``NAME/unlabelled.txt`` may list the others. Raises
    ValueError for what is missing, empty, listed twice or outside of the root.
    """
    tree = scan(root, FOLDER)
    tree, lists, sources = read_lists(tree, split_directory(tree, data.split_dir), [data.split])
    return SourceFiles(tree, read_classes(tree.root), lists, sources)


def folder_tree(root: Path | str, data: FolderData) -> tuple[FileIndex, Classes]:
    """Return the files, and the classes of ``classes.txt`` or ``palette.txt``. Raises ValueError as ``scan`` and
    ``read_classes``."""
    tree = scan(root, FOLDER)
    return tree, read_classes(tree.root)


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


FOLDER_SOURCE = FileSource(
    config=FolderData,
    presets=pretrained(epochs=60.0),
    method_presets=photograph_sizes(None),
    layout=FOLDER,
    places=("",),
    scan=folder_tree,
    read=open_folder,
)
"""Lengths are those of ``voc``; ``all`` is a list of that name, as any other."""
