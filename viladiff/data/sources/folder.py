"""A user's own directory of images and masks, with lists of the labelled images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from viladiff.config.pixel_format import MOST_CHANNELS, PixelFormat, check_pixel_format
from viladiff.config.sections import DataConfig
from viladiff.core.messages import names_file, shown
from viladiff.data.constants import IGNORE
from viladiff.data.files.images import MASK_SUFFIXES, PaletteEncoding
from viladiff.data.files.index import FOLDER, FileIndex, foreign_labels, scan
from viladiff.data.files.open_lists import read_lists, split_directory
from viladiff.data.files.split_lists import numbered
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
    mask_suffix: str = ".png"
    """What follows an image's name in the name of its mask: an end of one's own and the type, as _mask.png or .tif."""
    channels: int | None = Field(None, ge=1, le=MOST_CHANNELS)
    """Bands of an image file, pages of a TIFF counted together, all of them channels of the network; none is red, green
    and blue, with grey repeated. The first layer's pretrained weights for 3 are repeated over others as timm does."""
    bands: tuple[int, ...] | None = None
    """Bands of a file that are the channels, from 1, in this order; none is all. Three count as red, green and blue."""
    value_range: str | None = None
    """Which values of a file are black and white: a depth as 12bit, values as -1000..400 (one pair, or one a channel
    with commas), or percentiles of each channel of each image as p1..p99; none is 8 bits."""
    shown: tuple[int, ...] | None = None
    """Channels, from 1, that pages and overlays show as red, green and blue; none is the first, or all if 3."""

    @property
    def pixels(self) -> PixelFormat:
        """What the pixels of image files are."""
        return PixelFormat(self.channels, self.bands, self.value_range, self.shown)

    @field_validator("mask_suffix")
    @classmethod
    def _masks_without_loss(cls, suffix: str) -> str:
        end, dot, kind = suffix.rpartition(".")
        if not dot or f".{kind.lower()}" not in MASK_SUFFIXES or "/" in end or "\\" in end:
            allowed = ", ".join(MASK_SUFFIXES)
            raise ValueError(f"must be an end of a name and one of {allowed}, as _mask.png, got {suffix!r}")
        return suffix

    @model_validator(mode="after")
    def _check_pixels(self) -> FolderData:
        check_pixel_format(self.pixels)
        return self


def open_folder(root: Path | str, data: FolderData) -> SourceFiles:
    """Open ``images/``, ``masks/``, ``classes.txt`` or ``palette.txt``, and lists in ``splits/`` or in ``split_dir``.

    The labelled images of split NAME are listed in ``NAME/labelled.txt`` (or ``labeled.txt``) or ``NAME.txt``, the
    validation images in ``NAME/val.txt`` or ``val.txt``; ``NAME/unlabelled.txt`` may list the others. Raises
    ValueError for what is missing, empty, listed twice or outside of the root.
    """
    tree, classes = folder_tree(root, data)
    tree, lists, sources = read_lists(tree, split_directory(tree, data.split_dir), [data.split])
    return SourceFiles(tree, classes, lists, sources)


def folder_tree(root: Path | str, data: FolderData) -> tuple[FileIndex, Classes]:
    """Return the files, and the classes of ``classes.txt`` or ``palette.txt``. Raises ValueError as ``scan`` and
    ``read_classes``."""
    end, _, kind = data.mask_suffix.rpartition(".")
    tree = scan(root, FOLDER._replace(mask_end=end, mask_suffix=f".{kind}"))._replace(pixels=data.pixels)
    return tree, read_classes(tree.root)


@names_file
def read_classes(root: Path) -> Classes:
    """Read ``palette.txt`` ("r g b name" a line) if it exists, else ``classes.txt`` (a name a line, id 0 first).

    Raises ValueError if neither is there, or both are and name other classes.
    """
    path = root / "classes.txt"
    if (root / "palette.txt").is_file():
        found = _read_palette(root / "palette.txt")
        if path.is_file() and (others := tuple(name for _, name in numbered(path))) != found.names:
            raise ValueError(
                f"{root}: palette.txt has the classes {', '.join(found.names)}, and classes.txt has "
                f"{', '.join(others)}; remove classes.txt if masks are in colours, else palette.txt"
            )
        return found
    if not path.is_file():
        cvat = (root / "labelmap.txt").is_file()
        raise ValueError(
            f"{root}: has no classes.txt (a class name a line, id 0 first), and no palette.txt ('r g b name' a line)"
            + ("; of CVAT's labelmap.txt, 'cat:128,0,0::' is '128 0 0 cat' there" if cvat else foreign_labels(root))
        )
    lines = numbered(path)
    for wanted, (number, name) in enumerate(lines, 1):
        if number != wanted:
            raise ValueError(
                f"{path}, line {wanted}: is empty; a name's line is its class id, and {shown(name)} would move up to "
                f"{wanted - 1}; name the class, or remove the line"
            )
    _refuse_no_names(path, [name for _, name in lines])
    return Classes(_checked([name for _, name in lines], path), None)


def _refuse_no_names(path: Path, names: Sequence[str]) -> None:
    """Raise ValueError for lines that are more than a name, since a line's place is its class id."""
    for number, name in enumerate(names, 1):
        if name.startswith("#"):
            raise ValueError(f"{path}, line {number}: {shown(name)} is a comment, and each line is a class; remove it")
    if names and all(re.match(r"\d+[\s:.,)]+\S", name) for name in names):
        told = "the place of a line is its class id, 0 first; write the names alone"
        raise ValueError(f"{path}: every name begins with a number ({names[0]!r}), and {told}")
    if len(names) == 1 and "," in names[0]:
        raise ValueError(f"{path}: one line with commas; write a class a line, id 0 first")


def _read_palette(path: Path) -> Classes:
    names: list[str] = []
    rgb: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, line in numbered(path):
        *channels, name = line.split(maxsplit=3)
        if len(channels) != 3 or not all(one.isascii() and one.isdigit() and int(one[:9]) < 256 for one in channels):
            raise ValueError(
                f"{path}, line {number}: {shown(line)} is not 'r g b name' with three numbers from 0 to 255, as in "
                "'128 0 0 cat'"
            )
        colour = (int(channels[0]), int(channels[1]), int(channels[2]))
        if colour in rgb:
            raise ValueError(f"{path}, line {number}: the colour {colour} stands for two classes")
        rgb.append(colour)
        labels.append(IGNORE if name.lower() in IGNORED else len(names))
        if name.lower() not in IGNORED:
            names.append(name)
    return Classes(_checked(names, path), PaletteEncoding(tuple(rgb), tuple(labels)))


def _checked(names: Sequence[str], path: Path) -> tuple[str, ...]:
    for name in names:
        if " # " in name:
            told = f"a comment would be a part of the class's name; write {name.partition(' # ')[0].strip()!r} alone"
            raise ValueError(f"{path}: {shown(name)}: {told}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: the class {shown(twice[0])} is named twice")
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
