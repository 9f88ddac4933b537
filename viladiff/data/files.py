"""Which files a directory of images and masks holds; no path that leads out of the directory is ever followed."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from viladiff.data.images import SUFFIXES
from viladiff.fields import nearest


class Layout(NamedTuple):
    """Folders below a root; an image and its mask have the same relative name apart from the suffix."""

    images: str
    masks: str


FOLDER = Layout("images", "masks")
VOC = Layout("JPEGImages", "SegmentationClass")


@dataclass(frozen=True)
class FileList:
    """Images with their masks, by place."""

    ids: tuple[str, ...]
    """Relative name below the folder of images, without suffix, "/" between folders."""
    paths: tuple[Path, ...]
    masks: tuple[Path, ...]
    """Where each image's mask is or would be; an unlabelled image need not have one."""

    def __len__(self) -> int:
        return len(self.ids)


class Tree(NamedTuple):
    """All files of a layout, by id, in order of id."""

    root: Path
    layout: Layout
    images: dict[str, Path]
    masks: dict[str, Path]

    def files(self, ids: Sequence[str]) -> FileList:
        """The images of these ids, with the place of each mask, whether it exists or not."""
        folder = self.root / self.layout.masks
        masks = tuple(self.masks.get(name) or folder / f"{name}.png" for name in ids)
        return FileList(tuple(ids), tuple(self.images[name] for name in ids), masks)


def scan(root: Path | str, layout: Layout) -> Tree:
    """Names alone are read. Raises ValueError where the root or its images are missing, where two files have the same
    id, and where a symbolic link leads out of the root."""
    top = Path(root).expanduser()
    if not top.is_dir():
        raise ValueError(f"{top}: there is no such directory; set runtime.data_root to the one that holds the data")
    top = Path(os.path.realpath(top))
    if not (top / layout.images).is_dir():
        there = [entry.name for entry in os.scandir(top) if entry.is_dir()]
        raise ValueError(f"{top}: has no folder {layout.images!r} of images{nearest(layout.images, there)}")
    images = _by_id(top, layout.images, SUFFIXES)
    if not images:
        raise ValueError(f"{top / layout.images}: holds no image ({', '.join(SUFFIXES)})")
    masks = _by_id(top, layout.masks, (".png",)) if (top / layout.masks).is_dir() else {}
    return Tree(top, layout, images, masks)


def image_id(text: str) -> str:
    """A relative name without suffix of an image, in the one of Unicode's two spellings that lists are compared in."""
    path = PurePosixPath(text)
    return unicodedata.normalize("NFC", str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else str(path))


def _by_id(root: Path, folder: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    top = root / folder
    inside(root, top)
    found: dict[str, Path] = {}
    for path in _walk(root, top):
        if path.suffix.lower() in suffixes:
            name = image_id(path.relative_to(top).as_posix())
            if name in found:
                raise ValueError(f"{path} and {found[name]}: two files for one image, {name!r}; remove or rename one")
            found[name] = path
    return dict(sorted(found.items()))


def _walk(root: Path, folder: Path) -> Iterator[Path]:
    """Files below ``folder``, hidden ones left out; a link is followed where it stays below the root."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_symlink():
            inside(root, path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, path)
        elif entry.is_file():
            yield path


def inside(root: Path, path: Path) -> Path:
    """``path``, if what it finally leads to is below the root (a real path itself); ValueError otherwise."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise ValueError(f"{path}: leads to {real}, out of {root}; copy the file, or set runtime.data_root further up")
    return path
