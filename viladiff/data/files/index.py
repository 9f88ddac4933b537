"""Index of a directory's images and masks; no path that leads out of the directory is ever followed."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from viladiff.config.base import did_you_mean
from viladiff.config.pixel_format import RGB_8, PixelFormat
from viladiff.data.files.images import SUFFIXES

SHOWN = 5
"""Unused files that a sentence names; the rest are counted."""


class Layout(NamedTuple):
    """Folders below a root, and how an image's id is found in a file's name.

    With one folder of images an id is the name relative to it, without suffix, and masks have the same. Where the
    validation images have a folder of their own, an id is the bare name without folders and endings.
    """

    dataset: str
    """What ``data.dataset`` calls it."""
    images: str
    """Of those to train on, where others are apart."""
    masks: str
    val_images: str = ""
    val_masks: str = ""
    image_end: str = ""
    """What stands behind the id in an image's name, before the suffix; other files are no images."""
    mask_end: str = ""
    same_ends: tuple[str, ...] = ()
    """What else may stand behind the id in the name of the same mask: in another coding, or in lists for a layout that
    another repository has."""
    pool_has_masks: bool = False
    """Whether unlabelled images that no list names are only those that have a mask."""
    mask_suffix: str = ".png"
    """What a mask's name ends in, behind ``mask_end``."""

    def image_id(self, text: str) -> str:
        """Return the id in a relative path of an image, as files and lists spell it."""
        if not self.val_images:
            return image_id(text)
        return PurePosixPath(image_id(text)).name.removesuffix(self.image_end)

    def is_at(self, root: Path, places: Sequence[str]) -> bool:
        """Return whether the root, or one of ``places`` below it, has the folder of images."""
        return (locate(root, places, self) / self.images).is_dir()

    def mask_name(self, name: str) -> str:
        """Return the mask's path for an image, relative to the folder of masks."""
        return f"{name}{self.mask_end}{self.mask_suffix}"


FOLDER = Layout("folder", "images", "masks")


@dataclass(frozen=True)
class FileList:
    """Images with their masks, by place."""

    ids: tuple[str, ...]
    """Relative name below the folder of images, without suffix, "/" between folders."""
    paths: tuple[Path, ...]
    masks: tuple[Path, ...]
    """Where each image's mask is or would be; an unlabelled image need not have one."""
    unmasked: frozenset[str] = frozenset()
    """Ids of which a list says that they have none."""

    def __len__(self) -> int:
        return len(self.ids)


class FileIndex(NamedTuple):
    """All files of a layout, by id, in order of id."""

    root: Path
    layout: Layout
    images: dict[str, Path]
    masks: dict[str, Path]
    apart: frozenset[str] = frozenset()
    """Images that are for validation alone, where the layout says which."""
    notes: tuple[str, ...] = ()
    """What its reader took otherwise than one might think, a sentence each."""
    unmasked: frozenset[str] = frozenset()
    """Images of which a list says that they have no mask."""
    pixels: PixelFormat = RGB_8
    """What the pixels of the images are."""
    unused: tuple[Path, ...] = ()
    """Files in the folders of images and masks that are neither, and masks without an image."""

    def unused_note(self) -> tuple[str, ...]:
        """Return a sentence that counts the unused files and names the first."""
        if not self.unused:
            return ()
        first = ", ".join(path.relative_to(self.root).as_posix() for path in self.unused[:SHOWN])
        more = " ..." if len(self.unused) > SHOWN else ""
        return (f"{len(self.unused)} files are not used: {first}{more}",)

    def pool(self) -> list[str]:
        """Return the images that may be trained on."""
        return [name for name in self.images if name not in self.apart]

    def files(self, ids: Sequence[str]) -> FileList:
        """Return the images of these ids with the path of each mask, whether it exists or not."""
        folder = self.root / self.layout.masks
        masks = tuple(self.masks.get(name) or folder / self.layout.mask_name(name) for name in ids)
        return FileList(tuple(ids), tuple(self.images[name] for name in ids), masks, self.unmasked)


def scan(root: Path | str, layout: Layout) -> FileIndex:
    """Index the files below a root by name, opening none.

    Raises ValueError if the root or its images are missing, two files have the same id, or a symbolic link leads out of
    the root.
    """
    top = Path(root).expanduser()
    if not top.is_dir():
        raise ValueError(f"{top}: there is no such directory; set runtime.data_root to the one that holds the data")
    top = Path(os.path.realpath(top))
    others: list[Path] = []
    parts = [_images(top, layout, folder, others) for folder in (layout.images, layout.val_images) if folder]
    folders = dict.fromkeys(folder for folder in (layout.masks, layout.val_masks) if (top / folder).is_dir() and folder)
    ends = layout.mask_end, (layout.mask_suffix.lower(),)
    beside = _masks_beside(parts[0], layout)
    here = (_by_id(top, layout, folder, *ends, others).items() for folder in folders)
    masks = _unique(chain(beside.items(), *here))
    images = _unique(chain(*(part.items() for part in parts)))
    lost = [path for name, path in masks.items() if name not in images] if layout.dataset == FOLDER.dataset else []
    return FileIndex(top, layout, images, masks, frozenset(*parts[1:]), unused=(*sorted(others), *lost))


def _masks_beside(images: dict[str, Path], layout: Layout) -> dict[str, Path]:
    """Take masks out of the images that stand beside them: of one's own folder, where they have an end of their own."""
    if layout.dataset != FOLDER.dataset or not layout.mask_end:
        return {}
    end = f"{layout.mask_end}{layout.mask_suffix}".lower()
    found = {name: path for name, path in images.items() if path.name.lower().endswith(end)}
    return {name.removesuffix(layout.mask_end): images.pop(name) for name in found}


def _images(top: Path, layout: Layout, folder: str, others: list[Path]) -> dict[str, Path]:
    if not (top / folder).is_dir():
        there = [entry.name for entry in os.scandir(top) if entry.is_dir()]
        names = ", ".join(sorted(there)[:SHOWN]) or "none"
        raise ValueError(
            f"{top}: has no folder {folder!r} of images{did_you_mean(folder, there) or f'; its folders: {names}'}"
        )
    found = _by_id(top, layout, folder, layout.image_end, SUFFIXES, others)
    if not found:
        named = f" whose name ends in {layout.image_end!r}" if layout.image_end else ""
        raise ValueError(f"{top / folder}: holds no image{named} ({', '.join(SUFFIXES)})")
    return found


def locate(root: Path | str, places: Sequence[str], layout: Layout) -> Path:
    """Return the first of ``places`` below the root that has the folder of images; the root itself if none has."""
    top = Path(root).expanduser()
    return next((top / place for place in places if (top / place / layout.images).is_dir()), top)


def image_id(text: str) -> str:
    """Return an image's relative name without suffix, in the Unicode spelling in which lists are compared."""
    path = PurePosixPath(text)
    return unicodedata.normalize("NFC", str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else str(path))


def _by_id(
    root: Path, layout: Layout, folder: str, end: str, suffixes: tuple[str, ...], others: list[Path]
) -> dict[str, Path]:
    """Return the files of a folder with the given ending; by bare name if the layout keeps validation images apart.

    The other files are added to ``others``, unless a published layout has such beside the wanted ones.
    """
    usual = bool(end) and layout.dataset != FOLDER.dataset
    inside(root, root / folder)
    top, found = str(root / folder), []
    for path in _walk(root, top):
        # Text alone, since COCO has a quarter of a million files.
        name, suffix = os.path.splitext(os.path.basename(path) if layout.val_images else path[len(top) + 1 :])
        if suffix.lower() in suffixes and name.endswith(end):
            found.append((unicodedata.normalize("NFC", name.removesuffix(end)), Path(path)))
        elif not usual:
            others.append(Path(path))
    return _unique(found)


def _unique(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Sort the files by id. Raises ValueError if two have the same."""
    found: dict[str, Path] = {}
    for name, path in named:
        if name in found:
            raise ValueError(f"{path} and {found[name]}: two files for one image, {name!r}; remove or rename one")
        found[name] = path
    return dict(sorted(found.items()))


def _walk(root: Path, folder: str, within: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the files below ``folder`` but hidden ones; broken links are included, and refused by their reader.

    A link is followed if it stays below the root. Raises ValueError if it leads out, to a folder that contains it or
    to itself, and for what is neither file nor folder, which would block its reader.
    within: real folders that hold the links on the way here.
    """
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        linked = entry.is_symlink()
        if linked:
            inside(root, Path(entry.path))
        if _is_directory(entry):
            here = (*within, os.path.realpath(folder)) if linked else within
            real = os.path.realpath(entry.path) if linked else ""
            if linked and any(Path(one).is_relative_to(real) for one in here):
                raise ValueError(f"{entry.path}: leads to {real}, which it is in; remove it")
            yield from _walk(root, entry.path, here)
        elif entry.is_file() or (linked and not os.path.exists(entry.path)):
            yield entry.path
        else:
            raise ValueError(f"{entry.path}: is no file but a pipe, a socket or a device; remove it")


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # of a link that leads back to itself
        raise ValueError(f"{entry.path}: cannot be followed ({error.strerror}); remove it") from error


def below(root: Path, folder: str) -> Iterator[tuple[str, Path]]:
    """Yield each file below a folder of the root with its relative path; none if the folder is hidden or missing.

    The separator is "/". Raises ValueError if a link leads out of the root.
    """
    try:
        there = not folder.startswith(".") and (root / folder).is_dir()
    except OSError:  # no name that a folder can have
        there = False
    if not there:
        return
    inside(root, root / folder)
    cut = len(os.fspath(root)) + 1
    for path in _walk(root, os.fspath(root / folder)):
        yield path[cut:].replace(os.sep, "/"), Path(path)


def inside(root: Path, path: Path) -> Path:
    """Return ``path`` if its real path is below the root, itself a real path. Raises ValueError otherwise."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise ValueError(f"{path}: leads to {real}, out of {root}; copy the file, or set runtime.data_root further up")
    return path


_FOREIGN = (
    ("labels/**/*.txt", "labels/ has YOLO's polygons or boxes"),
    ("images/**/*.txt", "images/ has YOLO's polygons or boxes"),
    ("images/**/*.json", "images/ has labelme's JSON"),
    ("labels/**/*.json", "labels/ has JSON"),
    ("ann/*.json", "ann/ has Supervisely's JSON"),
    ("Annotations/*.xml", "Annotations/ has boxes of VOC's XML"),
    ("annotations.xml", "annotations.xml is CVAT's"),
)
"""Files of annotation programs, and what they are."""


def foreign_labels(root: Path) -> str:
    """Return the end of a message on data without masks that has annotations of other programs; empty without them."""
    for pattern, what in _FOREIGN:
        if next(root.glob(pattern), None) is not None:
            return (
                f"; {what}, which is not read: export polygons as COCO JSON, and `viladiff data coco-masks --own` "
                "makes masks and classes.txt"
            )
    return ""
