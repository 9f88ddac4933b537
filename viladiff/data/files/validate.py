"""Validation of a directory of images and masks: every problem that would stop training or evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from viladiff.config.pixel_format import RGB_8, PixelFormat
from viladiff.data.constants import IGNORE
from viladiff.data.files.images import SUFFIXES, MaskEncoding, label_counts, read_image, read_mask
from viladiff.data.files.index import FOLDER, FileIndex, foreign_labels
from viladiff.data.files.open_lists import read_lists
from viladiff.data.files.split_lists import LABELLED
from viladiff.data.formats.bands import file_kind
from viladiff.data.formats.pillow_file import open_image, turned_unseen, upright_size
from viladiff.data.process_pool import map_in_processes
from viladiff.data.sources.base import Classes, SourceFiles, describe_lists
from viladiff.data.sources.detect import open_tree

if TYPE_CHECKING:
    pass

Advance = Callable[[int, int], None]
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
    deep: bool = False
    """Whether it has 16 bits a channel, and nothing says which values are black and white."""
    turned: bool = False
    """Whether EXIF turns it, and the size of its mask cannot tell if the mask is of the upright image."""


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
    fields: Mapping[str, object] = MappingProxyType({}),
) -> DatasetReport:
    """Decode every image and mask below ``root`` and read every list, in ``processes`` (one for each core).

    ``advance`` is called with the number of images done and their total; fields: of ``data``, as of ``open_tree``.
    Raises ValueError if there is nothing to check: no layout, no classes, two files of one name, a link that leads out
    of the root.
    """
    tree, classes = open_tree(root, **fields)
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
    same = len(classes.names), classes.coding, tree.pixels
    jobs = [(path, tree.masks.get(name), *same) for name, path in tree.images.items()]
    chunks = [jobs[start : start + 16] for start in range(0, len(jobs), 16)]
    found: list[ImageReport] = []
    with map_in_processes(processes, len(chunks)) as run:
        for some in run(_look_at_some, chunks):
            found += some
            advance(len(found), len(jobs))
    return dict(zip(tree.images, found, strict=True))


def _look_at_some(jobs: Sequence[tuple[Path, Path | None, int, MaskEncoding | None, PixelFormat]]) -> list[ImageReport]:
    return [inspect_image(*job) for job in jobs]


def inspect_image(
    image: Path,
    mask: Path | None,
    num_classes: int,
    coding: MaskEncoding | None,
    pixels: PixelFormat = RGB_8,
) -> ImageReport:
    """Decode an image and its mask and compare them."""
    faults = []
    size: tuple[int, int] | None = None
    counts: dict[int, int] | None = None
    deep = turned = False
    try:
        size, deep = decoded_size(image, pixels), undeclared_depth(image, pixels)
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
            faults += [DataProblem("error", str(mask), text) for text in size_mismatch(size, labels.shape)]
            turned = size == labels.shape and file_kind(image).name == "pillow" and turned_unseen(image)
            if counts.keys() == {IGNORE}:
                faults.append(DataProblem("warning", str(mask), f"every pixel is {IGNORE}: nothing is labelled"))
    return ImageReport(size, counts, tuple(faults), deep, turned)


def decoded_size(path: Path, pixels: PixelFormat = RGB_8) -> tuple[int, int]:
    """Decode a whole image; return (height, width). A JPEG is decoded at an eighth of its size, reading all bytes."""
    kind = file_kind(path)
    if not (pixels.plain and kind.name == "pillow"):
        height, width = read_image(path, pixels).shape[:2]
        return height, width
    with open_image(path) as image:
        size = upright_size(image)
        plain = image.mode in ("L", "RGB", "RGBA", "P", "CMYK", "1", "LA") and getattr(image, "n_frames", 1) == 1
        whole = image.format == "JPEG" or plain
        if image.format == "JPEG":
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    if not whole:
        read_image(path)  # says which depths cannot be brought to 8 bits, and which files are animations
    return size


def undeclared_depth(path: Path, pixels: PixelFormat) -> bool:
    """Return whether a file has 16 bits a channel and no field says which values are black and white."""
    return pixels.value_range is None and file_kind(path).sixteen_bits


def depth_note(count: int) -> list[str]:
    """Return a sentence for so many images of ``undeclared_depth``."""
    if not count:
        return []
    what = "images have 16 bits a channel and data.value_range is not set"
    return [f"{count} {what}: 0 ... 65535 are read as black ... white, as data.value_range=16bit says"]


def size_mismatch(size: tuple[int, int] | None, shape: tuple[int, ...]) -> list[str]:
    """Return the problem of a mask of ``shape`` beside an image of ``size``, (height, width) both; none if it fits."""
    if size is None or size == shape:
        return []
    text = f"the mask is {shape[1]} x {shape[0]} pixels (width x height), its image {size[1]} x {size[0]}"
    return [text + ("; turned by EXIF, is the image's other way round" if size == shape[::-1] else "")]


def _reason(path: Path, error: ValueError) -> str:
    return str(error).removeprefix(f"{path}: ")


def _strays(tree: FileIndex) -> list[DataProblem]:
    """Report masks without an image, and files beside the images and masks that are neither."""
    lost = [DataProblem("warning", str(path), "there is no image of this name") for name, path in tree.masks.items()]
    lost = [fault for fault, name in zip(lost, tree.masks, strict=True) if name not in tree.images]
    masks = tree.root / tree.layout.masks
    for path in tree.unused:
        if path in tree.masks.values():
            continue
        if path.is_relative_to(masks):
            end = f"{tree.layout.mask_end}{tree.layout.mask_suffix}"
            what = "masks are PNG files" if end == ".png" else f"masks end in {end} (data.mask_suffix)"
        else:
            what = f"images end in {', '.join(SUFFIXES)}"
        lost.append(DataProblem("warning", str(path), f"is not read: {what}"))
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
        return [
            DataProblem("error", root, f"there is no mask that can be read, so nothing to learn from{_hint(report)}")
        ]
    shown = report.images()
    absent = [name for label, name in enumerate(names) if not shown[label]]
    level: Level = "error" if report.tree.layout.dataset == FOLDER.dataset else "warning"
    if absent:
        faults.append(DataProblem(level, root, f"{len(absent)} classes are in no mask: {', '.join(absent)}"))
    if not shown[:IGNORE].any():
        faults.append(
            DataProblem("error", root, f"every pixel of all {len(masks)} masks is {IGNORE}: nothing is labelled")
        )
    elif (hint := zero_or_ignored(names, shown)) is not None:
        faults.append(DataProblem(level, root, hint))
    deep = depth_note(sum(one.deep for one in report.seen.values()))
    faults += [DataProblem("warning", str(report.tree.root / report.tree.layout.images), text) for text in deep]
    turned = [name for name, one in report.seen.items() if one.turned]
    if turned:
        which = f"{len(turned)} images are turned by EXIF, first {turned[0]!r}, and have the same size either way"
        faults.append(DataProblem("warning", root, f"{which}; their masks must be of the upright image"))
    unsure = sum(one.keys() == {0, IGNORE} for one in masks)
    if (hint := some_ignored(report.classes, shown, unsure, len(masks))) is not None:
        faults.append(DataProblem("warning", root, hint))
    return faults


def _hint(report: DatasetReport) -> str:
    """Return where masks may be if their folder is missing."""
    top, masks = report.tree.root, report.tree.layout.masks
    known = {PurePosixPath(masks).parts[0], PurePosixPath(report.tree.layout.images).parts[0], "splits"}
    there = sorted(entry.name for entry in top.iterdir() if entry.is_dir() and entry.name not in known)
    moved = f"; there is no folder {masks!r}, but {', '.join(there)}" if there and not (top / masks).is_dir() else ""
    return foreign_labels(top) or moved


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
