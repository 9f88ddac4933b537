"""The check that every run begins with: headers and ends of its files, and the masks that it uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from viladiff.config.pixel_format import PixelFormat
from viladiff.data.cache import fingerprint
from viladiff.data.constants import IGNORE
from viladiff.data.dataset import Dataset
from viladiff.data.files.file_cache import Contents
from viladiff.data.files.images import IdEncoding, image_size
from viladiff.data.files.index import FOLDER, FileList
from viladiff.data.files.stamps import stamped
from viladiff.data.files.validate import (
    decoded_size,
    depth_note,
    size_mismatch,
    some_ignored,
    undeclared_depth,
    zero_or_ignored,
)
from viladiff.data.formats.bands import file_kind
from viladiff.data.sources.base import Classes

SHOWN = 5
"""Faults that a message quotes; the rest are counted."""
_ENDS = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"}
"""What a whole file has near its end. In a JPEG's pixels FF is always followed by 00 or a restart, never by D9."""
_TAIL = 4096


def check_files(dataset: Dataset) -> tuple[str, ...]:
    """Return warnings for a run on these files, after reading every header and the masks that the run uses.

    Files are judged by their header and their end; a file in which either is odd is decoded. Masks of labelled and
    validation images are read, all others are not opened. Results are stored by file (``data.files.file_cache``), so
    that each is read once, and a stamp (``data.files.stamps``) spares other workers and starts the look at each. Raises
    ValueError that quotes the first problems; for a user's own folder also if no labelled mask shows a class, or
    validation masks show fewer than two. Reads nothing of a data set that is not in files.
    """
    files, contents = dataset.files, dataset.contents
    if files is None or contents is None:
        return dataset.notes
    return (*dataset.notes, *stamped(dataset, lambda: _checked(dataset, files, contents)))


def _checked(dataset: Dataset, files: FileList, contents: Contents) -> tuple[str, ...]:
    contents.refresh()
    labelled = _some(files, dataset.labelled.tolist())
    parts = [labelled] if dataset.val_files is None else [labelled, dataset.val_files]
    others = _some(files, dataset.unlabelled.tolist())
    try:
        rest = [_odd(path, contents, dataset.pixels) for path in others.paths]
        looked = [_look_at_part(part, dataset, contents) for part in parts]
    finally:
        contents.save()
    faults = [text for one in rest for text in one.faults] + [text for part in looked for text in part.faults]
    counts = [part.shown for part in looked]
    if faults:
        more = f"\n{len(faults) - SHOWN} more; `viladiff data check` lists all" if len(faults) > SHOWN else ""
        raise ValueError("\n".join(faults[:SHOWN]) + more)
    if not counts[0][: dataset.num_classes].any():
        raise ValueError(f"data.split: none of the {len(labelled)} labelled images has a labelled pixel")
    if dataset.name == FOLDER.dataset:
        _refuse_absent(dataset, contents.root, counts)
    coding = getattr(dataset.masks, "coding", None)
    odd = [] if not isinstance(coding, IdEncoding) or any(shown[IGNORE] for shown in counts) else [coding.hint]
    told = [f"no mask has an ignored pixel, which is unusual of {dataset.name}: {hint}" for hint in odd]
    both, unsure = sum(counts, np.zeros(256, np.int64)), sum(part.unsure for part in looked)
    hint = some_ignored(Classes(dataset.class_names, coding), both, unsure, sum(map(len, parts)))
    told += [f"{files.masks[0].parent}: {hint}"] if hint else []
    deep = depth_note(sum(one.deep for one in rest) + sum(part.deep for part in looked))
    return (*told, *_never(dataset, counts), *deep)


def image_sizes(dataset: Dataset, indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return (height, width) of images of the pool, as an earlier check has stored them or from their headers.

    Raises ValueError for data that is not in files, and for an image that cannot be read.
    """
    files, contents = dataset.files, dataset.contents
    if files is None or contents is None:
        raise ValueError(f"{dataset.name}: its images are not in files")
    sizes = []
    for i in indices:
        seen = _odd(files.paths[i], contents, dataset.pixels)
        if seen.size is None:
            raise ValueError(seen.faults[0])
        sizes.append(seen.size)
    return sizes


class _Part(NamedTuple):
    """A look at some images with their masks."""

    shown: np.ndarray
    """(256,) pixels by label."""
    unsure: int
    """Masks that hold 0 and 255 alone."""
    faults: list[str]
    deep: int
    """Images of ``undeclared_depth``."""


def _look_at_part(part: FileList, dataset: Dataset, contents: Contents) -> _Part:
    total, unsure, faults, deep = np.zeros(256, np.int64), 0, [], 0
    for image, mask in zip(part.paths, part.masks, strict=True):
        seen = _odd(image, contents, dataset.pixels)
        found, more = _odd_mask(mask, seen.size, dataset, contents)
        faults += seen.faults + more
        deep += seen.deep
        total += found
        unsure += np.flatnonzero(found).tolist() == [0, IGNORE]
    return _Part(total, unsure, faults, deep)


def _refuse_absent(dataset: Dataset, root: Path, counts: Sequence[np.ndarray]) -> None:
    """Raise ValueError if a class cannot be learnt or a score would be of one class alone, for which mIoU is 1."""
    masks, names = root / FOLDER.masks, dataset.class_names
    file = "palette.txt" if (root / "palette.txt").is_file() else "classes.txt"
    hint = zero_or_ignored(names, sum(counts, np.zeros(256, np.int64)))
    ignored = file == "classes.txt" and any(shown[IGNORE] for shown in counts)
    absent = [name for label, name in enumerate(names) if not counts[0][label]]
    if absent:
        shown = ", ".join(map(repr, absent[:SHOWN])) + (" ..." if len(absent) > SHOWN else "")
        also = f"; masks hold {IGNORE}, which is ignored: if it is a class, palette.txt says so" if ignored else ""
        raise ValueError(
            f"{masks}: no mask of the {len(dataset.labelled)} labelled images shows {shown}, "
            f"{len(absent)} of the {len(names)} classes of {file}; "
            + (
                hint
                or f"label an image that shows it (data.split), or remove the class from {file} and the masks{also}"
            )
        )
    there = np.flatnonzero(counts[-1][: len(names)]).tolist()
    if len(there) < 2:
        only = f"{names[there[0]]!r} alone" if there else "no class"
        raise ValueError(
            f"{masks}: the {len(dataset.val_images)} validation images show {only}, so that mIoU would be of "
            "less than two classes; validate on more images (val.txt)"
        )


def _some(files: FileList, places: Sequence[int]) -> FileList:
    paths, masks = (tuple(every[i] for i in places) for every in (files.paths, files.masks))
    return FileList(tuple(files.ids[i] for i in places), paths, masks, files.unmasked)


class _Seen(NamedTuple):
    """A look at an image."""

    size: tuple[int, int] | None
    """(height, width) of one that seems complete."""
    faults: list[str]
    deep: bool = False
    """As ``undeclared_depth``."""


def _odd(path: Path, contents: Contents, pixels: PixelFormat) -> _Seen:
    def look() -> tuple[int, int, bool]:
        if not pixels.plain or file_kind(path).name != "pillow":
            return (*decoded_size(path, pixels), undeclared_depth(path, pixels))
        size = image_size(path)
        end = _ENDS.get(path.suffix.lower())
        if end is None or end not in _tail(path):
            decoded_size(path)
        return (*size, False)

    entry = "image" if pixels.plain else f"image {fingerprint(*pixels[:3])}"
    try:
        height, width, deep = contents.find(path, entry, look)
    except (ValueError, OSError) as error:
        return _Seen(None, [str(error)])
    return _Seen((height, width), [], deep)


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        return file.read()


def _odd_mask(
    path: Path, size: tuple[int, int] | None, dataset: Dataset, contents: Contents
) -> tuple[np.ndarray, list[str]]:
    try:
        found = contents.mask(path, dataset.num_classes, getattr(dataset.masks, "coding", None))
    except ValueError as error:
        return np.zeros(256, np.int64), [str(error)]
    return found.counts, [f"{path}: {text}" for text in size_mismatch(size, found.shape)]


def _never(dataset: Dataset, counts: Sequence[np.ndarray]) -> list[str]:
    """Return a sentence for the classes that no labelled or no validation image shows."""
    told = []
    for where, shown in zip(("labelled", "validation"), counts, strict=False):
        absent = [name for label, name in enumerate(dataset.class_names) if not shown[label]]
        if absent:
            told.append(f"no {where} image shows {', '.join(absent)}")
    return told
