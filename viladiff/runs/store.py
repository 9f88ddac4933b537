"""Runs on disk: the user's own store, and below it published records that are only read.

A run is the directory ``<root>/<run_id>/``: record.json once it is finished, checkpoints, the log of its steps,
pictures, ``failure.json`` after a failure, ``lease-*.json`` while a process works on it. A layer is a directory such as
``reports/published``: records in ``*/records/*.json``, pictures in ``*/pictures/<run_id>.npz``. Nothing here loads
torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from viladiff.core.atomic import abandoned, write_atomically
from viladiff.core.messages import one_line, print_text
from viladiff.runs import lease as leases
from viladiff.runs.lease import Holder, Lease
from viladiff.runs.record import CorruptRecordError, RunRecord, parse_record

RUN_ID = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Failure(BaseModel):
    """Why a run did not finish; kept beside it until it does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["nan", "memory", "hang", "killed", "stale", "error"]
    message: str
    step: int | None
    """Last step known; None if it failed before the first."""
    attempts: int
    when: str
    """UTC, as 2026-01-31T12:00:00Z."""


class _Stamp(NamedTuple):
    """A file with an equal stamp is not read again."""

    modified: int
    size: int
    inode: int


_UNREADABLE = _Stamp(-1, -1, -1)


def _to_stderr(text: str) -> None:
    print_text(text, error=True)


class Store:
    """Records, failures and leases of runs; safe between threads, and between processes that share ``root``.

    Records of ``root`` that cannot be used are set aside, damaged ones under ``damaged`` and sound ones of another
    version under ``other-version``, unless ``repair`` is False, as it is where somebody only looks.
    """

    def __init__(
        self,
        root: Path,
        layers: Sequence[Path] = (),
        say: Callable[[str], None] = _to_stderr,
        repair: bool = True,
    ) -> None:
        # Absolute, since a Ray worker sits in another working directory.
        self.root = Path(root).expanduser().absolute()
        self.layers = tuple(Path(layer).expanduser().absolute() for layer in layers)
        self._say: Callable[[str], None] = lambda text: say(one_line(text))
        self._repair = repair
        self._lock = threading.RLock()
        self._read: dict[Path, tuple[_Stamp, RunRecord | None]] = {}
        self._watch = leases.HeartbeatMonitor()

    # Records

    def records(self) -> dict[str, RunRecord]:
        """Return every finished run by id: the store's own first, then the layers' in order.

        Files that have not changed since the last call are not read again.
        """
        found = {record.run_id: record for record in self.published()}
        for run_id in self.local_run_ids():
            record = self._own_record(run_id)
            if record is not None:
                found[run_id] = record
        return found

    def get(self, run_id: str) -> RunRecord | None:
        """Return the record of a finished run; None if there is none, also after setting an unusable one aside."""
        record = self._own_record(run_id)
        if record is not None:
            return record
        return next((record for record in self.published() if record.run_id == run_id), None)

    def published(self) -> list[RunRecord]:
        """Return the records of the layers, one a run."""
        found: dict[str, RunRecord] = {}
        for path in self.layer_files():
            record = self._load(path)
            if record is not None:
                found.setdefault(record.run_id, record)
        return list(found.values())

    def local_run_ids(self) -> list[str]:
        """Return the ids of all runs that have a directory under ``root``, finished or not."""
        try:
            with os.scandir(self.root) as entries:
                found = [one for one in entries if RUN_ID.fullmatch(one.name)]
        except FileNotFoundError:
            return []
        return sorted(one.name for one in found if one.is_dir(follow_symlinks=False) or os.path.isdir(one.path))

    def directory(self, run_id: str) -> Path:
        """Return the run's directory, whether or not it exists.

        Raises ValueError for an invalid run id: no path escapes.
        """
        if not RUN_ID.fullmatch(run_id):
            raise ValueError(f"run {run_id!r}: a run's name is 16 digits of 0-9 and a-f")
        return self.root / run_id

    def file(self, run_id: str, name: str) -> Path | None:
        """Return a file of a run from its directory or, as ``*/<stem>/<run_id><suffix>``, from a layer;

        None if in neither. ``file(run_id, "pictures.npz")`` is ``reports/published/table5/pictures/<run_id>.npz``, for
        example.
        """
        if not _FILE.fullmatch(name):
            raise ValueError(f"file {name!r}: must be the plain name of a file in a run's directory")
        mine = self.directory(run_id) / name
        if os.path.isfile(mine):  # no error for a private run of another user
            return mine
        if name == "record.json":
            found = (path for path in self.layer_files() if (one := self._load(path)) and one.run_id == run_id)
            return next(found, None)
        stem, suffix = os.path.splitext(name)
        return next((path for layer in self.layers for path in sorted(layer.glob(f"**/{stem}/{run_id}{suffix}"))), None)

    def layer_files(self) -> Iterator[Path]:
        for layer in self.layers:
            yield from sorted(layer.glob("**/records/*.json"))

    def _own_record(self, run_id: str) -> RunRecord | None:
        path = self.directory(run_id) / "record.json"
        try:
            record = self._load(path)
        except ValueError as error:
            self._set_aside(path, str(error), "damaged" if isinstance(error, CorruptRecordError) else "other-version")
            return None
        if record is not None and record.run_id != run_id:
            if self._repair:
                self._set_aside(path, f"{path} is the record of another run, {record.run_id}", "damaged")
            return None
        return record

    def _load(self, path: Path) -> RunRecord | None:
        """Load the record in a file; None if it is gone or unusable, with one warning for each state of the file.

        Raises ValueError as ``parse_record`` for the store's own file, which the caller sets aside.
        """
        with self._lock:
            try:
                stamp = _stamp(path)
                known = self._read.get(path)
                if known is not None and known[0] == stamp:
                    return known[1]
                data = path.read_bytes()
            except FileNotFoundError:
                self._read.pop(path, None)
                return None
            except OSError as error:  # a private run of another user hides no other run from whoever looks
                if self._repair:
                    raise
                if self._read.get(path) != (_UNREADABLE, None):
                    self._say(f"{path}: cannot be read ({error.strerror}); its run counts as missing")
                self._read[path] = _UNREADABLE, None
                return None
            record = None
            try:
                record = parse_record(data, path)
            except ValueError as error:
                if self._repair and path.parent.parent == self.root:
                    raise
                self._say(f"{error}. It is read-only, so it is skipped and its run counts as missing")
            self._read[path] = stamp, record
            return record

    def _set_aside(self, path: Path, why: str, where: str) -> None:
        # The checkpoint stays: it has a checksum of its own, and a finished run's is of its last step, so that the
        # run only has to be evaluated again to give the same numbers. If it is damaged too, loading it says so.
        run_id = path.parent.name
        aside = self.root / where / f"{run_id}-{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**9:09d}"
        try:
            aside.mkdir(parents=True)
            path.rename(aside / path.name)
        except FileNotFoundError:
            return  # another process was faster
        except OSError as error:
            self._say(f"{why}. It could not be moved to damaged/ ({error.strerror}); move it away to rerun the run")
            return
        if self._put_back(aside / path.name, path):
            return
        self._say(f"{why}. It was moved to {aside}; the run will be finished again from its checkpoint, or run again")

    def _put_back(self, moved: Path, path: Path) -> bool:
        """Restore a valid record that was written between check and move, as by two processes that find the damage."""
        try:
            sound = parse_record(moved.read_bytes(), moved).run_id == path.parent.name
        except ValueError:
            return False
        if sound:
            moved.rename(path)
            moved.parent.rmdir()
        return sound

    # Failures

    def failure(self, run_id: str) -> Failure | None:
        """Return the run's last failure; None if there is none or it is unreadable."""
        path = self.directory(run_id) / "failure.json"
        try:
            return Failure.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValidationError, PermissionError, IsADirectoryError):
            self._say(f"{path} is not a failure's note and is passed over; the run counts as one that did not fail")
            return None

    def record_failure(self, run_id: str, failure: Failure) -> None:
        """Replace the note of an earlier failure."""
        directory = self.directory(run_id)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "failure.json", failure.model_dump_json(indent=1).encode())

    def clear_failure(self, run_id: str) -> None:
        (self.directory(run_id) / "failure.json").unlink(missing_ok=True)

    # Leases

    def lease(self, run_id: str) -> Lease | None:
        """Acquire the lease of a run; None if another process holds it. A dead holder's is taken over.

        Look again for the record afterwards: the previous holder may just have finished.
        """
        return leases.acquire(self.directory(run_id), self._watch)

    def holder(self, run_id: str) -> Holder | None:
        """Return the current holder of the run, from one look; None also if the only lease cannot be read."""
        held = leases.live_leases(self.directory(run_id), self._watch)
        return next((holder for holder in held.values() if holder is not None), None)

    def held(self, run_id: str) -> bool:
        """Return whether ``lease`` would be refused now; a holder that may be dead is watched and later taken over."""
        return leases.held(self.directory(run_id), self._watch)

    def clean(self, gone: Collection[int] = ()) -> list[Path]:
        """Remove what killed processes left behind: their leases and half-written files; return the paths.

        Drivers call it when they start and end; ``gone`` are processes of this machine that the driver has ended
        itself.
        """
        removed = []
        for path in self.stale_files(gone, sure=True):
            with contextlib.suppress(OSError):  # a run of another user is left to that one
                path.unlink(missing_ok=True)
                removed.append(path)
        return removed

    def stale_files(self, gone: Collection[int] = (), sure: bool = False) -> list[Path]:
        """List what ``sweep`` would remove; unless ``sure``, also what a longer look might find to be in use."""
        found: list[Path] = []
        for run_id in self.local_run_ids():
            directory = self.directory(run_id)
            if not os.access(directory, os.R_OK | os.X_OK):  # a private run of another user
                continue
            state = leases.read_leases(directory, self._watch)
            dead = [lease.path for lease in state if (lease.sure if sure else lease.dead)]
            found += dead
            if len(dead) == len(state):
                found += abandoned(directory, gone)
        return found


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise OSError(errno.EINVAL, "not a file", str(path))
    return _Stamp(found.st_mtime_ns, found.st_size, found.st_ino)
