"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

_LONG = 200
"""Bytes of a name beyond which its temporary name has the first letters alone; 255 are allowed."""
_KEPT = 40
"""Letters, of up to four bytes each."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file in one step: readers see the old bytes or the new ones, also after a crash or with many writers.

    A killed writer leaves at most ``.<name>.<pid>.<token>.tmp``, which ``viladiff runs gc`` removes.
    """
    # The longest name that file systems allow leaves no room for more.
    short = path.name if len(os.fsencode(path.name)) <= _LONG else path.name[:_KEPT]
    temporary = path.with_name(f".{short}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with name_file_in_errors(path):
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Add to the error of a full disk the file or folder that was being written; the error itself names none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync_directory(directory: Path) -> None:
    """Flush a directory to the disk, so that a rename in it survives a power cut; not every platform can open one."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
