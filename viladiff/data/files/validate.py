"""Validation of a directory of images and masks: every problem that would stop training or evaluation."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from viladiff.data.constants import IGNORE
from viladiff.data.files.contents import Contents
from viladiff.data.files.images import (
    IdEncoding,
    MaskEncoding,
    image_size,
    label_counts,
    open_image,
    read_image,
    read_mask,
    upright_size,
)
from viladiff.data.files.index import FOLDER, FileIndex, FileList
from viladiff.data.files.open_lists import read_lists
from viladiff.data.files.split_lists import LABELLED
from viladiff.data.files.stamps import stamped
from viladiff.data.processes import map_in_processes
from viladiff.data.sources.base import Classes, SourceFiles, describe_lists
from viladiff.data.sources.detect import open_tree

if TYPE_CHECKING:
    from viladiff.data.dataset import Dataset

Advance = Callable[[int, int], None]
SHOWN = 5
"""Faults that a message quotes; the rest are counted."""
_ENDS = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"}
"""What a whole file has near its end. In a JPEG's pixels FF is always followed by 00 or a restart, never by D9."""
_TAIL = 4096


Level = Literal["error", "warning"]


class DataProblem(NamedTuple):
    """Something about a file that somebody should look at."""

    level: Level
    """An error would stop a run that uses the file."""
    path: str
    reason: str


class ImageReport(NamedTuple):
    """The content of one image and its mask."""

    size: tuple[int, int] | None
    """(height, width) of the image; None where it cannot be read."""
    pixels: dict[int, int] | None
    """Pixels of the mask by label; None where there is no mask or it cannot be read."""
    faults: tuple[DataProblem, ...]


class Split(NamedTuple):
    """A list of labelled images with what belongs to it."""

    name: str
    counts: tuple[int, int, int]
    """Labelled, unlabelled, validation images."""
    published: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DatasetReport:
    """All that ``check`` finds out."""

    tree: FileIndex = field(repr=False)
    classes: Classes
    seen: dict[str, ImageReport] = field(repr=False)
    """By image id."""
    splits: tuple[Split, ...]
    faults: tuple[DataProblem, ...]

    @property
    def errors(self) -> int:
        return sum(fault.level == "error" for fault in self.faults)

    def pixels(self) -> np.ndarray:
        """Return (256,) int64 pixels by label in all masks."""
        total = np.zeros(256, np.int64)
        for counts in self._masks():
            total[list(counts)] += list(counts.values())
        return total

    def images(self) -> np.ndarray:
        """Return (256,) int64 masks that show a label."""
        total = np.zeros(256, np.int64)
        for counts in self._masks():
            total[list(counts)] += 1
        return total

    def sizes(self) -> Counter[tuple[int, int]]:
        """Count the images of each (height, width)."""
        return Counter(one.size for one in self.seen.values() if one.size is not None)

    def _masks(self) -> Iterator[dict[int, int]]:
        return (one.pixels for one in self.seen.values() if one.pixels is not None)


def validate_dataset(
    root: Path | str,
    split_dir: Path | str | None = None,
    processes: int | None = None,
    advance: Advance = lambda done, of: None,
    reduce_zero_label: bool = True,
) -> DatasetReport:
    """Decode every image and mask below ``root`` and read every list, in ``processes`` (one for each core).

    ``advance`` is called with the number of images done and their total. Raises ValueError if there is nothing to
    check: no layout, no classes, two files of one name, a link that leads out of the root.
    """
    tree, classes = open_tree(root, reduce_zero_label=reduce_zero_label)
    seen = inspect_images(tree, classes, processes, advance)
    faults = [fault for one in seen.values() for fault in one.faults]
    faults += [DataProblem("warning", str(tree.root / tree.layout.masks), note) for note in tree.notes]
    faults += _strays(tree)
    splits, more = _read_splits(tree, Path(split_dir).expanduser() if split_dir else tree.root / "splits")
    report = DatasetReport(tree, classes, seen, tuple(splits), ())
    faults += more + _doubts(report)
    return DatasetReport(tree, classes, seen, tuple(splits), tuple(sorted(faults, key=lambda fault: fault.level)))


def inspect_images(
    tree: FileIndex, classes: Classes, processes: int | None, advance: Advance = lambda done, of: None
) -> dict[str, ImageReport]:
    """Return ``inspect_image`` of every image, by id. Raises ValueError if a process dies."""
    jobs = [(path, tree.masks.get(name), len(classes.names), classes.coding) for name, path in tree.images.items()]
    chunks = [jobs[start : start + 16] for start in range(0, len(jobs), 16)]
    found: list[ImageReport] = []
    with map_in_processes(processes, len(chunks)) as run:
        for some in run(_look_at_some, chunks):
            found += some
            advance(len(found), len(jobs))
    return dict(zip(tree.images, found, strict=True))


def _look_at_some(jobs: Sequence[tuple[Path, Path | None, int, MaskEncoding | None]]) -> list[ImageReport]:
    return [inspect_image(*job) for job in jobs]


def inspect_image(image: Path, mask: Path | None, num_classes: int, coding: MaskEncoding | None) -> ImageReport:
    """Decode an image and its mask and compare them."""
    faults = []
    size: tuple[int, int] | None = None
    counts: dict[int, int] | None = None
    try:
        size = decoded_size(image)
    except ValueError as error:
        faults.append(DataProblem("error", str(image), _reason(image, error)))
    if mask is not None:
        try:
            labels = read_mask(mask, num_classes, coding)
        except ValueError as error:
            faults.append(DataProblem("error", str(mask), _reason(mask, error)))
        else:
            found = label_counts(labels)
            counts = {int(label): int(found[label]) for label in np.flatnonzero(found)}
            faults += [DataProblem("error", str(mask), text) for text in _mismatch(size, labels.shape)]
            if counts.keys() == {IGNORE}:
                faults.append(DataProblem("warning", str(mask), f"every pixel is {IGNORE}: nothing is labelled"))
    return ImageReport(size, counts, tuple(faults))


def decoded_size(path: Path) -> tuple[int, int]:
    """Decode a whole image; return (height, width). A JPEG is decoded at an eighth of its size, reading all bytes."""
    with open_image(path) as image:
        size = upright_size(image)
        whole = image.format == "JPEG" or image.mode in ("L", "RGB", "RGBA", "P", "CMYK", "1", "LA")
        if image.format == "JPEG":
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    if not whole:
        read_image(path)  # says which depths cannot be brought to 8 bits
    return size


def _mismatch(size: tuple[int, int] | None, shape: tuple[int, ...]) -> list[str]:
    if size is None or size == shape:
        return []
    text = f"the mask is {shape[1]} x {shape[0]} pixels (width x height), its image {size[1]} x {size[0]}"
    return [text + ("; turned by EXIF, is the image's other way round" if size == shape[::-1] else "")]


def _reason(path: Path, error: ValueError) -> str:
    return str(error).removeprefix(f"{path}: ")


def _strays(tree: FileIndex) -> list[DataProblem]:
    """Report masks without an image, and files beside the masks that are no PNG."""
    lost = [DataProblem("warning", str(path), "there is no image of this name") for name, path in tree.masks.items()]
    lost = [fault for fault, name in zip(lost, tree.masks, strict=True) if name not in tree.images]
    known = set(tree.masks.values())
    folder = tree.root / tree.layout.masks
    for path in sorted(folder.rglob("*.*")) if folder.is_dir() else ():
        if path not in known and path.is_file() and not path.name.startswith(".") and not tree.layout.mask_end:
            lost.append(DataProblem("warning", str(path), "is not read: masks are PNG files"))
    return lost


def _read_splits(tree: FileIndex, directory: Path) -> tuple[list[Split], list[DataProblem]]:
    """Read every list of labelled images in the directory, with its validation list and the rest."""
    if not directory.is_dir():
        return [], [DataProblem("warning", str(directory), "no lists of images yet; `viladiff data split` makes some")]
    names = {path.relative_to(directory).as_posix().removesuffix(".txt") for path in directory.glob("*.txt")}
    for pattern in LABELLED[:2]:
        names |= {path.parent.relative_to(directory).as_posix() for path in directory.rglob(pattern.format("*"))}
    splits, faults = [], []
    others = {name for name in names if "unlabel" in name or "unsupervised" in name}
    for name in sorted(names - others - {"val", "train"}):
        try:
            _, lists, sources = read_lists(tree, directory, [name])
        except ValueError as error:
            faults.append(DataProblem("error", str(directory / name), str(error)))
            continue
        published, notes = describe_lists(tree.layout.dataset, SourceFiles(tree, Classes((), None), lists, sources))
        splits.append(Split(name, (len(lists.labelled), len(lists.unlabelled), len(lists.val)), published, notes))
    return splits, faults


def _doubts(report: DatasetReport) -> list[DataProblem]:
    """Return the problems that belong to no single file."""
    faults = []
    root, names = str(report.tree.root / report.tree.layout.masks), report.classes.names
    masks = [one.pixels for one in report.seen.values() if one.pixels is not None]
    if not masks:
        return [DataProblem("error", root, "there is no mask that can be read, so nothing to learn from")]
    shown = report.images()
    absent = [name for label, name in enumerate(names) if not shown[label]]
    level: Level = "error" if report.tree.layout == FOLDER else "warning"
    if absent:
        faults.append(DataProblem(level, root, f"{len(absent)} classes are in no mask: {', '.join(absent)}"))
    if not shown[:IGNORE].any():
        faults.append(
            DataProblem("error", root, f"every pixel of all {len(masks)} masks is {IGNORE}: nothing is labelled")
        )
    elif (hint := zero_or_ignored(names, shown)) is not None:
        faults.append(DataProblem(level, root, hint))
    unsure = sum(one.keys() == {0, IGNORE} for one in masks)
    if (hint := some_ignored(report.classes, shown, unsure, len(masks))) is not None:
        faults.append(DataProblem("warning", root, hint))
    return faults


def some_ignored(classes: Classes, shown: np.ndarray, unsure: int, masks: int) -> str | None:
    """Return advice if ``unsure`` of the masks of two classes hold 0 and 255 alone, and others 1."""
    if len(classes.names) != 2 or classes.coding is not None or not unsure or not shown[1]:
        return None
    return (
        f"{unsure} of {masks} masks hold 0 and {IGNORE} only, others 1, and {IGNORE} is ignored; "
        f"if it means {classes.names[1]!r} there, write 1 in its place"
    )


def zero_or_ignored(names: Sequence[str], shown: np.ndarray) -> str | None:
    """Return advice on masks of 0 and 255 with two classes; shown: (256,) occurrences of each label."""
    if len(names) != 2 or shown[1] or not shown[IGNORE]:
        return None
    return (
        f"the masks hold 0 and {IGNORE} only, and {IGNORE} is ignored; if it means {names[1]!r}, say so in "
        f"palette.txt: '0 0 0 {names[0]}' and '255 255 255 {names[1]}'"
    )


# The part that every run begins with


def check_files(dataset: Dataset) -> tuple[str, ...]:
    """Return warnings for a run on these files, after reading every header and the masks that the run uses.

    Files are judged by their header and their end; a file in which either is odd is decoded. Masks of labelled and
    validation images are read, all others are not opened. Results are stored by file (``data.files.contents``), so that
    each is read once, and a stamp (``data.files.stamps``) spares other workers and starts the look at each. Raises
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
    return found.counts, [f"{path}: {text}" for text in _mismatch(size, found.shape)]


def _never(dataset: Dataset, counts: Sequence[np.ndarray]) -> list[str]:
    """Return a sentence for the classes that no labelled or no validation image shows."""
    told = []
    for where, shown in zip(("labelled", "validation"), counts, strict=False):
        absent = [name for label, name in enumerate(dataset.class_names) if not shown[label]]
        if absent:
            told.append(f"no {where} image shows {', '.join(absent)}")
    return told
