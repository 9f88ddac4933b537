"""Folders of arrays named by a hash of their inputs, opened only if complete and unaltered.

The rendered data sets and the text banks are stored this way: written to a temporary folder, then renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from viladiff.core.atomic import draft_of, sync_directory, sync_file
from viladiff.core.hashing import sha256_hex
from viladiff.core.messages import shown

MANIFEST = "manifest.json"
LARGE = 2**26
"""Bytes from which a file is known by evenly spaced pieces of it: to read all of it would take longer than its use."""
PIECES, PIECE = 256, 2**16
"""How many pieces, and bytes of each."""

Facts = dict[str, str | int | float]
"""What a maker wants to be read back with its arrays."""


class Opened(NamedTuple):
    """Arrays of one folder, memory-mapped and read-only."""

    arrays: dict[str, np.ndarray]
    """By file name without ``.npy``."""
    facts: Facts


def cache_dir() -> Path:
    """Return $VILADIFF_CACHE, or ~/.cache/viladiff, without creating it."""
    given = os.environ.get("VILADIFF_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "viladiff"


def fingerprint(*parts: object) -> str:
    """Return 16 hexadecimal digits that name ``parts`` (any JSON values); equal on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_hex(text)[:16]


def open_or_make(directory: Path, make: Callable[[Path], Facts]) -> Opened:
    """Open ``directory``; if it is missing, let ``make`` fill a temporary folder that is then renamed to it.

    Two processes may race: the one that renames second throws its copy away. Raises ValueError as ``open_checked``
    does, and where the folder cannot be written.
    """
    if not directory.exists():
        with _writable(directory), _beside(directory) as draft:
            _write_manifest(draft, directory.name, make(draft))
            with contextlib.suppress(FileExistsError):
                _publish(draft, directory)
    return open_checked(directory)


def open_checked(directory: Path) -> Opened:
    """Open a folder after comparing every file with the manifest's size and SHA-256 (``digest``).

    Raises ValueError that names the file, the expected value and the actual one.
    """
    manifest = _read_manifest(directory)
    for name, entry in manifest["files"].items():
        _check(directory / name, entry["bytes"], entry["sha256"])
    arrays = {
        name.removesuffix(".npy"): np.load(directory / name, mmap_mode="r", allow_pickle=False)
        for name in manifest["files"]
    }
    return Opened(arrays, manifest["facts"])


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sound = manifest["fingerprint"] == directory.name and all(
            Path(name).name == name and {"bytes", "sha256"} <= entry.keys() for name, entry in manifest["files"].items()
        )
        sound = sound and isinstance(manifest["facts"], dict)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; {_remedy(directory)}") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest ({shown(error)}); {_remedy(directory)}") from None
    if not sound:
        raise ValueError(
            f"{path}: names {shown(manifest['fingerprint'])}, not {directory.name!r}; {_remedy(directory)}"
        )
    return manifest


def digest(path: Path) -> str:
    """Return the SHA-256 of a file; for LARGE bytes or more, of PIECES evenly spaced pieces with the first and last.

    The sampled digest detects a truncated, replaced or unfilled file, but hardly a few altered bytes.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        total = hashlib.sha256(str(size).encode())
        for place in range(PIECES):
            file.seek(place * (size - PIECE) // (PIECES - 1))
            total.update(file.read(PIECE))
        return total.hexdigest()


def _check(path: Path, size: int, wanted: str) -> None:
    try:
        found = path.stat().st_size
        if found != size:
            raise ValueError(f"{path}: {found} bytes found, {size} expected; {_remedy(path.parent)}")
        checksum = digest(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing, {size} bytes expected; {_remedy(path.parent)}") from None
    if checksum != wanted:
        raise ValueError(
            f"{path}: altered, its SHA-256 begins {checksum[:12]} instead of {wanted[:12]}; {_remedy(path.parent)}"
        )


def _remedy(directory: Path) -> str:
    return f"delete the directory {directory} and it is made again"


def _write_manifest(draft: Path, name: str, facts: Facts) -> None:
    files = {}
    for path in sorted(draft.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    text = json.dumps({"fingerprint": name, "facts": facts, "files": files}, indent=1)
    (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for path in draft.iterdir():  # a rename that outlives a power cut must not name files without content
        sync_file(path)
    sync_directory(draft)


def _publish(draft: Path, directory: Path) -> None:
    try:
        draft.rename(directory)
        sync_directory(directory.parent)
    except OSError:
        # Which code a rename onto a full folder gives (EEXIST, ENOTEMPTY, ...) differs between systems.
        if directory.exists():
            raise FileExistsError(directory) from None
        raise


@contextlib.contextmanager
def _beside(directory: Path) -> Iterator[Path]:
    draft = draft_of(directory)
    draft.mkdir(parents=True)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{directory}: cannot be written ({error.strerror or error}); "
            "set the environment variable VILADIFF_CACHE to a folder that can"
        ) from error
