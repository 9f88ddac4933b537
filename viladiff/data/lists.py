"""Lists of images in text files: an id a line, or ``<image path> <mask path>`` as the published lists have it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from viladiff.data.files import Layout
from viladiff.fields import nearest

LABELLED = ("{}/labelled.txt", "{}/labeled.txt", "{}.txt")
UNLABELLED = ("{}/unlabelled.txt", "{}/unlabeled.txt")
VALIDATION = ("{}/val.txt", "val.txt")


class Lists(NamedTuple):
    """Ids of one split, no image in two of them."""

    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    val: tuple[str, ...]


def read_lines(path: Path) -> list[str]:
    """Lines that are not empty. Raises ValueError for a file that is not UTF-8 text or cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a list of images: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_list(path: Path, layout: Layout, known: Collection[str], folder: str = "") -> tuple[str, ...]:
    """Ids of a list's images, in order; ``known``: those of ``folder``, or of the layout's one folder.

    Raises ValueError that names file and line for an image that is not there, for one that is listed twice, for a name
    that climbs out, and for an empty list.
    """
    places: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), 1):
        found = next((name for name in candidates(line, layout) if name in known), None)
        if found is None:
            raise ValueError(f"{path}, line {number}: {_unknown(line, layout, known, folder or layout.images)}")
        if found in places:
            raise ValueError(f"{path}, line {number}: {found!r} is listed before, as line {places[found]}")
        places[found] = number
    if not places:
        raise ValueError(f"{path}: the list is empty")
    return tuple(places)


def candidates(line: str, layout: Layout) -> Iterator[str]:
    """Ids that a line may mean, most of the line first: names may hold spaces, and a mask's name may follow.

    Where ids are bare names, which hold no spaces, the first word says it all.
    """
    if layout.val_images:
        yield layout.image_id(line.split()[0])
        return
    words = line.split("\t")[0]
    while words:
        path = PurePosixPath(words.lstrip("/"))
        parts = path.parts[1:] if path.parts[:1] == (layout.images,) else path.parts
        yield layout.image_id("/".join(parts))
        words = words.rpartition(" ")[0].rstrip()


def _unknown(line: str, layout: Layout, known: Collection[str], folder: str) -> str:
    if ".." in PurePosixPath(line.split()[0]).parts:
        return f"{line!r} climbs out of the folder; names are relative to {folder!r}"
    first = next(candidates(line, layout))
    return f"{line!r} is not an image of {folder!r}{nearest(first, known)}"


def find_list(directory: Path, patterns: Sequence[str], names: Sequence[str]) -> Path | None:
    """The first file that exists, patterns before names."""
    tried = (directory / pattern.format(name) for pattern in patterns for name in names)
    return next((path for path in tried if path.is_file()), None)


def check_disjoint(lists: Lists, sources: Sequence[str]) -> None:
    """Raises ValueError where an image is in two lists; ``sources`` says where the three come from."""
    for (one, here), (other, there) in (
        ((lists.labelled, sources[0]), (lists.val, sources[2])),
        ((lists.unlabelled, sources[1]), (lists.val, sources[2])),
        ((lists.labelled, sources[0]), (lists.unlabelled, sources[1])),
    ):
        both = sorted(set(one) & set(other))
        if both:
            raise ValueError(f"{here} and {there}: {len(both)} images are in both lists, first {both[0]!r}")
