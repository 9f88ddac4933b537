"""Atomic writing of files, and which of the files that killed writers left may be removed."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from viladiff.core.watchdog import start

GRACE = 5.0
"""Seconds that a file whose name has no machine may rest before it counts as abandoned by a process of this one."""
GRACE_ELSEWHERE = 3600.0
"""The same of a process on another machine or in another container, which nothing here tells from a dead one; clocks
may be half an hour apart."""
_WRITER = re.compile(r"\..+?\.(\d+)\.(?:([0-9a-f]{8})\.|prev\.)?tmp")
"""Names of files being written: .record.json.<pid>.<token>.tmp, .checkpoint.pt.<pid>.tmp, ..."""
_LONG = 200
"""Bytes of a name beyond which its temporary name has the first letters alone; 255 are allowed."""
_KEPT = 40
"""Letters, of up to four bytes each."""

_DRAFT = re.compile(r"\..+-(\d+)-([0-9a-f]{8})")
"""Names of folders being filled: .digits-<pid>-<token>."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file in one step: readers see the old bytes or the new ones, also after a crash or with many writers.

    A killed writer leaves at most ``.<name>.<pid>.<token>.tmp``, which ``viladiff runs gc`` removes.
    """
    # The longest name that file systems allow leaves no room for more.
    short = path.name if len(os.fsencode(path.name)) <= _LONG else path.name[:_KEPT]
    temporary = path.with_name(f".{short}.{os.getpid()}.{writer_token()}.tmp")
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


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk. Raises OSError, which names the file."""
    with name_file_in_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def hold(directory: Path) -> int | None:
    """Lock a directory until the descriptor is closed or this process ends; return it, None where none can be locked.

    Processes in other containers see the lock, to which the number of this process says nothing.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


@cache
def machine() -> str:
    """Return the boot and the process namespace: process numbers mean the same only where this is equal.

    Empty where the system does not tell.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""  # /proc is of another process namespace, and so are the starts in it
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def writer_token() -> str:
    """Return 8 hexadecimal digits for the name of a file being written, beside a process number.

    The first 4 are of ``machine``, since the number alone names no process where containers share a directory.
    """
    return _tag() + secrets.token_hex(2)


def writer_gone(pid: int, token: str, changed: float) -> bool:
    """Return whether the writer of a file is dead; ``token``: the name's, empty for a file of one lease's holder.

    ``changed``: its modification time in Unix seconds. A writer elsewhere is taken for dead after GRACE_ELSEWHERE.
    """
    if token[:4] == _tag():
        return start(pid) is None
    age = abs(time.time() - changed)
    return age > GRACE_ELSEWHERE if token else start(pid) is None and age > GRACE


def draft_of(folder: Path) -> Path:
    """Return the name of a folder to be filled and then renamed to ``folder``, and remove what killed writers left."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}-*-*"):
        if abandoned_draft(left):
            shutil.rmtree(left, ignore_errors=True)
    return folder.with_name(f".{folder.name}-{os.getpid()}-{writer_token()}")


def abandoned_draft(path: Path) -> bool:
    """Return whether this is a folder under the name of ``draft_of`` whose writer is gone."""
    writer = _DRAFT.fullmatch(path.name)
    try:
        return writer is not None and writer_gone(int(writer[1]), writer[2], path.stat().st_mtime)
    except FileNotFoundError:
        return False


def abandoned(directory: Path, gone: Collection[int] = ()) -> Iterator[Path]:
    """Yield the directory's files whose writer is gone; none if there is no directory.

    ``gone``: processes of this machine that the caller has ended, whose recent files count too.
    """
    for path in directory.iterdir() if directory.is_dir() else ():
        if writer := _WRITER.fullmatch(path.name):
            pid, token = int(writer[1]), writer[2] or ""
            ended = pid in gone and not token and start(pid) is None
            with contextlib.suppress(FileNotFoundError):
                if ended or writer_gone(pid, token, path.stat().st_mtime):
                    yield path


def _tag() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:4]
