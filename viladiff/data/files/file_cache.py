"""Cache of facts about a data set's files, so that a later start reads sizes and times alone.

A file beside the data, or in the cache folder if that is not writable, stores each file's SHA-256 and results of
checks, under its size, its times of modification and change in nanoseconds and its inode. An entry is ignored if one of
these has changed, and none is written for a file read within RACY of the later of the two times: a second change within
the clock's granularity would leave all four as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from viladiff.core.atomic import write_atomically
from viladiff.core.hashing import file_sha256, sha256_hex
from viladiff.core.messages import print_text
from viladiff.core.progress import counter
from viladiff.data.cache import cache_dir, fingerprint
from viladiff.data.files.images import MaskEncoding, label_counts, read_mask

NAME = ".viladiff-contents.txt"
"""Hidden, so that no scan takes it for an image."""
RACY = 3 * 10**9
"""Nanoseconds; file systems round times of modification to 2 s at most."""
FORMAT = 3
"""Raised when what is kept would mean something else, or a check would find something else in the same file."""
_THREADS = 4
"""That hash at once; hashlib and reading release the interpreter's lock."""
_SAY_AFTER, _SAY_EVERY = 3.0, 10.0
"""Seconds of hashing before the first word, and between words where there is no terminal."""

Stat = tuple[int, int, int, int]
Known = dict[str, str]
"""By path below the root, "/" between folders, escaped as in JSON: the file's ``Stat``, a space behind each number, and
what was found in it, JSON. It is parsed where it is asked for, since there may be 100,000."""
_unkept: dict[Path, Known] = {}
"""By root, what could be written nowhere."""


class MaskFacts(NamedTuple):
    """The results of checking a mask."""

    shape: tuple[int, int]
    """(height, width)."""
    counts: np.ndarray
    """(256,) int64 pixels by label."""


class Contents:
    """The stored facts of the files below one root."""

    def __init__(self, root: Path) -> None:
        self.root, self._cut = root, len(os.fspath(root)) + 1
        self.places = (root / NAME, cache_dir() / "contents" / f"{fingerprint(str(root))}.txt")
        self._kept: dict[Path, Known] = {}
        self._new: Known = dict(_unkept.get(root, {}))
        self._seen: dict[Path, Stat] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have stored since."""
        for place in self.places:
            with suppress(ValueError):
                stat = _stat(place)
                if self._seen.get(place) != stat:
                    self._seen[place], self._kept[place] = stat, _read(place)

    def digests(self, paths: Sequence[Path]) -> list[str]:
        """Return the SHA-256 of each file, its first 32 hexadecimal digits; print a note if reading takes seconds.

        Raises ValueError that names a file which is missing or cannot be read.
        """
        kept = [self._facts(self._name(path), _stat(path)).get("sha256") for path in paths]
        missing = [path for path, digest in zip(paths, kept, strict=True) if digest is None]
        try:
            fresh = dict(zip(missing, self._hash_all(missing), strict=True))
        finally:
            self.save()
        return [digest or fresh[path] for path, digest in zip(paths, kept, strict=True)]

    def find(self, path: Path, what: str, look: Callable[[], Any]) -> Any:
        """Return the stored entry ``what`` of the file, any JSON value; if there is none, let ``look`` read it.

        Raises ValueError as ``look``, and for a file that cannot be read or is changed meanwhile.
        """
        now, stat, name = time.time_ns(), _stat(path), self._name(path)
        facts = self._facts(name, stat)
        if facts.get(what) is not None:
            return facts[what]
        found = look()
        if _stat(path) != stat:
            raise ValueError(f"{path}: was changed while it was read; start again once nothing writes to it")
        if max(stat[1:3]) < now - RACY:
            self._new[name] = _start(stat) + json.dumps({**facts, what: found}, separators=(",", ":"))
        return found

    def mask(self, path: Path, num_classes: int, coding: MaskEncoding | None) -> MaskFacts:
        """Return size and pixels by label of a mask. Raises ValueError as ``read_mask``."""

        def look() -> list[Any]:
            labels = read_mask(path, num_classes, coding)
            counts = label_counts(labels)
            shown = np.flatnonzero(counts)
            return [*labels.shape, shown.tolist(), counts[shown].tolist()]

        height, width, shown, pixels = self.find(path, f"mask {fingerprint(num_classes, repr(coding))}", look)
        counts = np.zeros(256, np.int64)
        counts[shown] = pixels
        return MaskFacts((height, width), counts)

    def save(self) -> None:
        """Store the new entries beside those of other processes; if neither place is writable, in this process only."""
        if not self._new:
            return
        for place in self.places:
            with suppress(OSError, ValueError):
                there = {name: one for name, one in _read(place).items() if self._exists(name)} | self._new
                place.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(place, _packed(there))
                self._seen[place], self._kept[place], self._new = _stat(place), there, {}
                return
        _unkept.setdefault(self.root, {}).update(self._new)

    def _name(self, path: Path) -> str:
        return json.dumps(os.fspath(path)[self._cut :].replace(os.sep, "/"))[1:-1]  # pathlib's way is slow

    def _exists(self, name: str) -> bool:
        return (self.root / json.loads(f'"{name}"')).exists()

    def _facts(self, name: str, stat: Stat) -> dict[str, Any]:
        """Merge the entries of both places for the file's current state; either may be older or know less."""
        found: dict[str, Any] = {}
        for known in (*self._kept.values(), self._new):
            found |= _facts(known.get(name), stat)
        return found

    def _hash_all(self, paths: Sequence[Path]) -> list[str]:
        size = sum(path.stat().st_size for path in paths)
        title = f"reading {len(paths):,} new or changed files of {self.root}, {size / 1e9:.1f} GB"
        begun = spoken = time.monotonic()
        found: list[str] = []
        pool = ThreadPoolExecutor(_THREADS)
        try:
            with counter(title, True) as advance:
                for digest in pool.map(lambda path: self.find(path, "sha256", lambda: _sha256(path)), paths):
                    found.append(digest)
                    now = time.monotonic()
                    if now - begun < _SAY_AFTER:
                        continue
                    advance(len(found), len(paths))
                    if not sys.stderr.isatty() and (spoken == begun or now - spoken > _SAY_EVERY):
                        spoken = now
                        print_text(f"{title}: {len(found):,} read", error=True, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
        return found


def _stat(path: Path) -> Stat:
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)[:32]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def _start(stat: Stat) -> str:
    return "".join(f"{number} " for number in stat)


def _facts(line: str | None, stat: Stat) -> dict[str, Any]:
    """Return the entries of a line; empty if it is of another file or has none of this module's."""
    start = _start(stat)
    if line is None or not line.startswith(start):
        return {}
    with suppress(ValueError, RecursionError):
        found = json.loads(line[len(start) :])
        return found if isinstance(found, dict) else {}
    return {}


def _packed(known: Known) -> bytes:
    text = "".join(f"{name}\t{line}\n" for name, line in sorted(known.items())).encode()
    return _head(sha256_hex(text)) + text


def _head(checksum: str) -> bytes:
    return f"{FORMAT} {checksum}\n".encode()


def _read(place: Path) -> Known:
    """Read a stored table; empty if the file is missing, damaged, of another format or no file.

    A damaged file is not held in memory.
    """
    try:
        if not place.is_file():  # a pipe would be waited for
            return {}
        with place.open("rb") as file:
            head = file.readline(len(_head("0" * 64)))
            begins = file.tell()
            if not head.startswith(_head("")[:-1]) or head != _head(hashlib.file_digest(file, "sha256").hexdigest()):
                return {}
            file.seek(begins)
            text = file.read().decode("ascii")
    except (OSError, ValueError):
        return {}
    parts = (line.partition("\t") for line in text.splitlines())
    return {name: line for name, _, line in parts}
