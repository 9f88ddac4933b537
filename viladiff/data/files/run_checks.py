"""The check that every run begins with: headers and ends of its files, and the masks that it uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from viladiff.data.constants import IGNORE
from viladiff.data.dataset import Dataset
from viladiff.data.files.file_cache import Contents
from viladiff.data.files.images import IdEncoding, image_size
from viladiff.data.files.index import FOLDER, FileList
from viladiff.data.files.stamps import stamped
from viladiff.data.files.validate import decoded_size, size_mismatch, some_ignored, zero_or_ignored
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
        faults = [text for path in others.paths for text in _odd(path, contents)[1]]
        looked = [_look_at_part(part, dataset, contents) for part in parts]
    finally:
        contents.save()
    faults += [text for *_, wrong in looked for text in wrong]
    counts = [shown for shown, *_ in looked]
    if faults:
        rest = f"\n{len(faults) - SHOWN} more; `viladiff data check` lists all" if len(faults) > SHOWN else ""
        raise ValueError("\n".join(faults[:SHOWN]) + rest)
    if not counts[0][: dataset.num_classes].any():
        raise ValueError(f"data.split: none of the {len(labelled)} labelled images has a labelled pixel")
    if dataset.name == FOLDER.dataset:
        _refuse_absent(dataset, contents.root, counts)
    coding = getattr(dataset.masks, "coding", None)
    odd = [] if not isinstance(coding, IdEncoding) or any(shown[IGNORE] for shown in counts) else [coding.hint]
    told = [f"no mask has an ignored pixel, which is unusual of {dataset.name}: {hint}" for hint in odd]
    both, unsure = sum(counts, np.zeros(256, np.int64)), sum(one for _, one, _ in looked)
    hint = some_ignored(Classes(dataset.class_names, coding), both, unsure, sum(map(len, parts)))
    told += [f"{files.masks[0].parent}: {hint}"] if hint else []
    return (*told, *_never(dataset, counts))


def _look_at_part(part: FileList, dataset: Dataset, contents: Contents) -> tuple[np.ndarray, int, list[str]]:
    """Read some masks: (256,) pixels by label, how many masks hold 0 and 255 alone, and problems of files."""
    total, unsure, faults = np.zeros(256, np.int64), 0, []
    for image, mask in zip(part.paths, part.masks, strict=True):
        size, wrong = _odd(image, contents)
        found, more = _odd_mask(mask, size, dataset, contents)
        faults += wrong + more
        total += found
        unsure += np.flatnonzero(found).tolist() == [0, IGNORE]
    return total, unsure, faults


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


def _odd(path: Path, contents: Contents) -> tuple[tuple[int, int] | None, list[str]]:
    """Return (height, width) of an image that seems complete, or its problems."""

    def look() -> tuple[int, int]:
        size = image_size(path)
        end = _ENDS.get(path.suffix.lower())
        if end is None or end not in _tail(path):
            decoded_size(path)
        return size

    try:
        height, width = contents.find(path, "image", look)
    except (ValueError, OSError) as error:
        return None, [str(error)]
    return (height, width), []


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
