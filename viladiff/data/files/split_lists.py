"""Lists of images in text files: an id a line, or ``<image path> <mask path>`` as in published lists."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from viladiff.config.base import did_you_mean
from viladiff.core.messages import names_file, shown
from viladiff.data.files import known_splits
from viladiff.data.files.index import Layout

LABELLED = ("{}/labelled.txt", "{}/labeled.txt", "{}.txt", "{}_train_supervised.txt")
UNLABELLED = ("{}/unlabelled.txt", "{}/unlabeled.txt", "{}_train_unsupervised.txt")
VALIDATION = ("{}/val.txt", "val.txt")


class SplitKey(NamedTuple):
    """The key of a published list."""

    dataset: str
    family: str
    """Empty where the data set has one family only."""
    split: str


class Lists(NamedTuple):
    """Ids of one split, no image in two of them."""

    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    val: tuple[str, ...]


def read_lines(path: Path) -> list[str]:
    """Return the lines that are not empty. Raises ValueError for a file that is not UTF-8 text or cannot be read."""
    return [line for _, line in numbered(path)]


def numbered(path: Path) -> list[tuple[int, str]]:
    """Return ``read_lines``, each with its number in the file, from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fix = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"{path}: cannot be read as a list of images: {error}{fix}") from error
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


class ListLine(NamedTuple):
    """A list's entry for an image besides its name."""

    number: int
    """In the file, from 1."""
    mask: str
    """The second column; empty where there is none."""


def read_list(path: Path, layout: Layout, known: Collection[str], folder: str = "") -> tuple[str, ...]:
    """Return the ids of ``read_columns``, in order."""
    return tuple(read_columns(path, layout, known, folder))


@names_file
def read_columns(path: Path, layout: Layout, known: Collection[str], folder: str = "") -> dict[str, ListLine]:
    """Read a list's images by id, in order; ``known``: those of ``folder``, or of the layout's one folder.

    Raises ValueError that names file and line for an image that is not there, for one that is listed twice, for a name
    that climbs out or that two images have, and for an empty list.
    """
    found: dict[str, ListLine] = {}
    for number, line in numbered(path):
        meant = (one for one in _spellings(line, layout) if one[0] in known)
        name, mask = next(meant, ("", ""))
        other, same = next(meant, ("", ""))
        if not name:
            raise ValueError(f"{path}, line {number}: {_unknown(line, layout, known, folder or layout.images)}")
        if other and same == mask:
            raise ValueError(f"{path}, line {number}: may mean the images {name!r} and {other!r}; rename one of them")
        if name in found:
            raise ValueError(f"{path}, line {number}: {name!r} is listed before, as line {found[name].number}")
        found[name] = ListLine(number, mask)
    if not found:
        raise ValueError(f"{path}: the list is empty")
    return found


def _spellings(line: str, layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield ``candidates``, of a line with backslashes then those with "/" for each, as Windows writes its folders."""
    yield from candidates(line, layout)
    if "\\" in line:
        yield from candidates(line.replace("\\", "/"), layout)


def candidates(line: str, layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield the ids that a line may mean, each with the rest of the line, longest first: names may hold spaces.

    Where ids are bare names, which hold no spaces, the first word is the id.
    """
    if layout.val_images:
        first = line.split()[0]
        if ".." not in PurePosixPath(first).parts:
            yield layout.image_id(first), line.removeprefix(first).strip()
        return
    words = line.split("\t")[0]
    while words:
        path = PurePosixPath(words.lstrip("/"))
        parts = path.parts[1:] if path.parts[:1] == (layout.images,) else path.parts
        text, rest = "/".join(parts), line.removeprefix(words).strip()
        name, whole = layout.image_id(text), unicodedata.normalize("NFC", text)
        if whole != name:  # the id of "a.jpg.png", too, looks like an image
            yield whole, rest
        yield name, rest
        words = words.rpartition(" ")[0].rstrip()


def listable(name: str, layout: Layout, known: Collection[str]) -> bool:
    """Return whether a line with this id, and nothing else, is read as this image."""
    meant = [one for one, rest in candidates(name, layout) if one in known and not rest]
    odd = any(one in "\r\n" or "\ud800" <= one <= "\udfff" for one in name)  # the latter are bytes that are no text
    return meant == [name] and name == name.strip() and not odd


def _unknown(line: str, layout: Layout, known: Collection[str], folder: str) -> str:
    if ".." in PurePosixPath(line.split()[0]).parts:
        return f"{shown(line)} climbs out of the folder; names are relative to {folder!r}"
    relative = f"; names are relative to {folder!r}" if re.match(r"/|[A-Za-z]:[\\/]", line) else ""
    first, _ = next(candidates(line, layout))
    return f"{shown(line)} is not an image of {folder!r}{relative}{did_you_mean(first, known)}"


def find_list(directory: Path, patterns: Sequence[str], names: Sequence[str]) -> Path | None:
    """Return the first file that exists, patterns before names."""
    tried = (directory / pattern.format(name) for pattern in patterns for name in names)
    return next((path for path in tried if path.is_file()), None)


class Places(NamedTuple):
    """The files of a split's lists; None for a missing one."""

    labelled: Path | None
    unlabelled: Path | None
    val: Path | None


def find_lists(directory: Path, names: Sequence[str], wanted: SplitKey | None = None) -> Places:
    """Return the three lists under the first name that has labelled images; else those of the published ``wanted``.

    The published list may be in any file below the directory.
    """
    for name in names:
        labelled = find_list(directory, LABELLED, [name])
        if labelled is not None:
            rest = _others(labelled) or find_list(directory, UNLABELLED, [name])
            return Places(labelled, rest, find_list(directory, VALIDATION, [name]) or _above(directory, labelled))
    same = None if wanted is None else find_published(directory, wanted)
    if same is not None:
        return Places(same, _others(same), _above(directory, same))
    return Places(None, None, find_list(directory, VALIDATION, names))


def find_published(directory: Path, wanted: SplitKey) -> Path | None:
    """Return the first file, by name, below the directory that lists exactly the images of a published list."""
    hashes = {
        one.size: one.sha256
        for one in known_splits.LISTS
        if (one.dataset, one.split) == (wanted.dataset, wanted.split) and wanted.family in ("", one.family)
    }
    for path in sorted(directory.rglob("*.txt")):
        with suppress(ValueError):  # some other text
            images = [line.split()[0] for line in read_lines(path)]
            found = hashes.get(len(images))
            if found is not None and known_splits.list_hash(images).startswith(found):
                return path
    return None


def _others(labelled: Path) -> Path | None:
    """Return the list of unlabelled images beside one of labelled images, under its name with "un" in it."""
    name = labelled.name
    same = (name.replace(word, f"un{word}") for word in ("labelled", "labeled", "supervised") if word in name)
    return next((path for path in map(labelled.with_name, same) if path.is_file()), None)


def _above(directory: Path, labelled: Path) -> Path | None:
    """Return the ``val.txt`` beside a list or in a parent folder up to the directory."""
    tried = [folder / "val.txt" for folder in labelled.parents if folder.is_relative_to(directory)]
    return next((path for path in tried if path.is_file()), None)


def check_disjoint(lists: Lists, sources: Sequence[str]) -> None:
    """Raise ValueError if an image is in two lists; ``sources`` names the origin of the three."""
    for (one, here), (other, there) in (
        ((lists.labelled, sources[0]), (lists.val, sources[2])),
        ((lists.unlabelled, sources[1]), (lists.val, sources[2])),
        ((lists.labelled, sources[0]), (lists.unlabelled, sources[1])),
    ):
        both = sorted(set(one) & set(other))
        if both:
            raise ValueError(f"{here} and {there}: {len(both)} images are in both lists, first {both[0]!r}")
