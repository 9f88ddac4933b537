"""Decoded images and masks on disk: a crop reads the rows that it shows, and decodes nothing.

An entry is a file of raw pixels behind ``HEAD`` bytes that say which file they are of, its size and time, and their
shape. It holds what the reader gave, at full size, so that a crop of it is a crop of the file bit by bit. An entry that
is of another state of its file, incomplete or damaged in its head is made again. Any number of processes and machines
may share a folder: entries are complete before they have their name. NumPy and Pillow suffice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import __version__ as pillow

from viladiff.config.pixel_format import PixelFormat
from viladiff.core.atomic import write_atomically
from viladiff.core.messages import print_text
from viladiff.data.cache import cache_dir, fingerprint
from viladiff.data.files.file_cache import RACY
from viladiff.data.files.images import MaskEncoding, read_image, read_mask
from viladiff.data.transforms.geometry import Pixels

FORMAT = 1
"""Raised when a reader gives other pixels of the same file, or an entry is laid out otherwise."""
GRACE = 3600
"""Seconds in which a file without an entry's name may be one that is being written."""
HEAD = 4096
"""Bytes before the pixels; a page, and room for the longest paths in use."""


def picture_folder() -> Path:
    """Return the folder of all entries, below that of all caches, without creating it."""
    return cache_dir() / "pictures"


class Source(NamedTuple):
    """The state of a file that an entry is of."""

    path: str
    what: str
    """How it was read, which decides the pixels."""
    size: int
    mtime: int
    """Nanoseconds."""


def image_reading(pixels: PixelFormat) -> str:
    """Return what ``Source.what`` is of an image."""
    return f"image {json.dumps(pixels[:3])} of Pillow {pillow}"


def mask_reading(num_classes: int, coding: MaskEncoding | None) -> str:
    """Return what ``Source.what`` is of a mask."""
    return f"mask {fingerprint(num_classes, repr(coding))} of Pillow {pillow}"


def entry_path(folder: Path, path: str, what: str) -> Path:
    """Return the place of an entry; a changed file has the same, so that its old pixels are replaced."""
    name = fingerprint("picture", FORMAT, path, what)
    return folder / name[:2] / f"{name}.raw"


class StoredPixels:
    """An open entry, which reads like an array that is cut by rows and columns."""

    def __init__(self, file: FileIO, source: Source, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.file, self.source, self.shape, self.dtype = file, source, shape, dtype

    def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
        """Return a copy of rows and columns. Raises ValueError for an entry that has become shorter."""
        (first, last, _), (west, east, _) = (cut.indices(size) for cut, size in zip(part, self.shape, strict=False))
        # Whole rows in one go: a read each row takes longer, and a mapped file that shrinks would end the process.
        rows = np.empty((max(0, last - first), *self.shape[1:]), self.dtype)
        self.file.seek(HEAD + first * rows.dtype.itemsize * math.prod(self.shape[1:]))
        if self.file.readinto(rows.reshape(-1).view(np.uint8).data) != rows.nbytes:
            raise ValueError(f"{self.file.name}: became shorter while it was read; start again")
        return rows[:, west:east]


class PictureCache:
    """The readers of images and masks, which take pixels from a folder where they are and put them there if not."""

    def __init__(self, folder: Path | None) -> None:
        """Read from a folder; None reads files alone."""
        self.folder, self.full = folder, False

    def image(self, path: str, pixels: PixelFormat) -> AbstractContextManager[Pixels]:
        """Return a context of what ``read_image`` gives, or can be cut like it. Raises ValueError as ``read_image``."""
        if self.folder is None:
            return nullcontext(read_image(path, pixels))
        return self._opened(self.folder, path, image_reading(pixels), lambda: read_image(path, pixels))

    def mask(self, path: str, num_classes: int, coding: MaskEncoding | None) -> AbstractContextManager[Pixels]:
        """Return a context of what ``read_mask`` gives, likewise."""
        if self.folder is None:
            return nullcontext(read_mask(path, num_classes, coding))
        reading = mask_reading(num_classes, coding)
        return self._opened(self.folder, path, reading, lambda: read_mask(path, num_classes, coding))

    @contextmanager
    def _opened(self, folder: Path, path: str, what: str, read: Callable[[], np.ndarray]) -> Iterator[Pixels]:
        path = os.path.abspath(path)
        place, now = entry_path(folder, path, what), time.time_ns()
        source = _state(path, what)
        if source is None:  # the reader says what is wrong
            yield read()
            return
        with _open(place) as file:
            found = None if file is None else _entry(file)
            if found is not None and found.source == source:
                yield found
                return
        pixels = read()
        # A file that changes within the clock's granularity would keep its time.
        if source.mtime < now - RACY and _state(path, what) == source:
            self._store(place, source, pixels)
        yield pixels

    def _store(self, place: Path, source: Source, pixels: np.ndarray) -> None:
        head = packed_head(source, pixels.shape, pixels.dtype)
        if self.full or len(head) > HEAD:
            return
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, head.ljust(HEAD) + pixels.tobytes())
        except OSError as error:
            self.full = True
            why = f"{self.folder}: cannot be written ({error.strerror or error})"
            print_text(f"note: runtime.picture_cache: {why}; what is not in it is decoded each time", error=True)


@cache
def picture_cache(folder: str | None) -> PictureCache:
    """Return this process's readers for a folder; for None those that read files alone."""
    return PictureCache(None if folder is None else Path(folder))


def packed_head(source: Source, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Return the head of an entry, without the blanks behind it."""
    return json.dumps([FORMAT, *source, list(shape), dtype.name]).encode() + b"\n"


def _open(place: Path) -> AbstractContextManager[FileIO | None]:
    """Open a file as a context; it is of None where there is none that can be read."""
    with suppress(OSError):
        return place.open("rb", buffering=0)
    return nullcontext()


def _state(path: str, what: str) -> Source | None:
    with suppress(OSError):
        found = os.stat(path)
        return Source(path, what, found.st_size, found.st_mtime_ns)
    return None


def _entry(file: FileIO) -> StoredPixels | None:
    """Return the entry in an open file; None for one that is not whole."""
    with suppress(ValueError, TypeError, RecursionError):
        version, path, what, size, mtime, shape, name = json.loads(file.read(HEAD))
        dtype = np.dtype(name)
        whole = HEAD + math.prod(shape) * dtype.itemsize
        if version == FORMAT and os.fstat(file.fileno()).st_size == whole:
            return StoredPixels(file, Source(path, what, size, mtime), tuple(shape), dtype)
    return None


class Survey(NamedTuple):
    """What is in a folder, and what was deleted there; bytes beside numbers of files."""

    entries: int
    total: int
    outdated: int
    outdated_bytes: int
    removed: int
    removed_bytes: int


def survey(folder: Path, remove: Literal["outdated", "all"] | None = None) -> Survey:
    """Look at every file of the folder, and delete those whose file is gone or changed, or all.

    A run that is reading an entry goes on reading it, and makes it again where it is needed later. A file that another
    process may still be writing counts as outdated once it is ``GRACE`` seconds old. Raises OSError for one that cannot
    be deleted.
    """
    kept: list[int] = []
    old: list[int] = []
    removed: list[int] = []
    for place in sorted(folder.glob("??/*")):
        with _open(place) as file:
            if file is None:
                continue
            found, status = _entry(file), os.fstat(file.fileno())
        if place.name.endswith(".tmp") and time.time() - status.st_mtime < GRACE:
            continue
        gone = found is None or outdated(found.source)
        (old if gone else kept).append(status.st_size)
        if remove == "all" or (remove == "outdated" and gone):
            place.unlink(missing_ok=True)
            removed.append(status.st_size)
    return Survey(len(kept) + len(old), sum(kept) + sum(old), len(old), sum(old), len(removed), sum(removed))


def outdated(source: Source) -> bool:
    """Return whether no run reads the entry any more: its file is gone or changed, or the reader is."""
    return _state(source.path, source.what) != source or not source.what.endswith(f"of Pillow {pillow}")
