"""Checkpoints and step logs that survive a kill at any moment: a reader finds the old state or the new one, whole."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from viladiff.core.atomic import name_file_in_errors, sync_directory
from viladiff.core.messages import names_file, shown

MAGIC = b"VILADIFF"
VERSION = 1
_TRAILER = struct.Struct("<8sIQ32s")
"""Magic, format version, bytes before the trailer, their SHA-256. At the end, so that one pass writes the file."""

_CHUNK = 1 << 20

_CODE = re.compile(r"(?i)GLOBAL \S+|unsupported operand \d+")

_PLAIN = (torch.Tensor, torch.nn.Parameter, int, float, str, bool, bytes, type(None))


def save_checkpoint(
    path: Path | str, state: dict[str, Any], keep_previous: bool = True, proceed: Callable[[], None] = lambda: None
) -> None:
    """Write ``state`` so that ``path`` holds either the old or the new checkpoint, whole, whenever the process dies.

    The previous one is kept as ``<stem>.prev<suffix>``. One process writes to a path at a time. Raises ValueError for a
    value that is not a tensor, number, text, None, or a dict, list or tuple of those: loading it would mean running
    code. OSError (disk full, no permission) leaves the old checkpoint as it was; so does what ``proceed`` raises, which
    is called before each piece is written and once before the new file takes its name.
    """
    path = Path(path)
    _check_plain(state, "state")
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with name_file_in_errors(path), open(temporary, "wb") as file:
            _write(file, state, proceed)
            file.flush()
            os.fsync(file.fileno())
        proceed()
        if keep_previous and path.exists():
            _duplicate(path, previous(path))
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def previous(path: Path | str) -> Path:
    """Return the path of ``save``'s previous checkpoint: ``checkpoint.pt`` -> ``checkpoint.prev.pt``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def load_checkpoint(path: Path | str) -> dict[str, Any] | None:
    """Return the newest state to go on from: ``path``, else the previous one if only that is there, else None.

    A damaged file is an error, never skipped: resuming from an older state is the user's choice. Raises ValueError as
    ``load_file``.
    """
    path = Path(path)
    for candidate in (path, previous(path)):
        if candidate.exists():
            return load_file(candidate)
    return None


@names_file
def load_file(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load exactly this checkpoint, checked against its checksum, without running any code in it.

    Raises FileNotFoundError if it is missing; ValueError, with name, size and what to do, if it is truncated or
    changed, carries code, has a newer format, or is not a checkpoint.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _TRAILER.size))
        tail = file.read()
        file.seek(0)
        if len(tail) < _TRAILER.size or not tail.startswith(MAGIC):
            raise _foreign(path, size, file)
        _, version, length, digest = _TRAILER.unpack(tail)
        if version != VERSION:
            raise ValueError(f"checkpoint {path}: format {version}; this version of viladiff reads format {VERSION}")
        if length != size - _TRAILER.size or _digest(file, length) != digest:
            raise _damaged(path, size, "its checksum does not match")
        file.seek(0)
        try:
            state = torch.load(file, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise _refused(path, error) from error
        except MemoryError:
            raise
        except Exception as error:  # whatever torch makes of an archive that is sealed and is none
            raise _damaged(path, size, "what its checksum seals is no archive of torch") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path}: holds a {type(state).__name__}, not a state")
    return state


class _Hashing:
    """A file that hashes what torch.save writes, with no second copy in memory."""

    def __init__(self, file: IO[bytes], proceed: Callable[[], None]) -> None:
        self.file, self.proceed = file, proceed
        self.hash, self.length = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.proceed()
        self.hash.update(data)
        self.length += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write(file: IO[bytes], state: dict[str, Any], proceed: Callable[[], None]) -> None:
    hashing = _Hashing(file, proceed)
    try:
        torch.save(state, hashing)  # type: ignore[arg-type]
    except RuntimeError as error:
        if error.__context__ is not None:  # a write that failed; torch then complains of its file's length
            raise error.__context__ from None
        raise
    file.write(_TRAILER.pack(MAGIC, VERSION, hashing.length, hashing.hash.digest()))


def _digest(file: IO[bytes], length: int) -> bytes:
    found = hashlib.sha256()
    for start in range(0, length, _CHUNK):
        found.update(file.read(min(_CHUNK, length - start)))
    return found.digest()


def _duplicate(path: Path, to: Path) -> None:
    """Give the file a second name, put in place by a rename, so that ``path`` itself is never missing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.prev.tmp")
    try:
        os.link(path, temporary)
    except OSError:  # no hard links on this file system
        shutil.copyfile(path, temporary)
        _sync_file(temporary)
    os.replace(temporary, to)
    # Where both were already one file, the rename does nothing and leaves the temporary name.
    temporary.unlink(missing_ok=True)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _check_plain(value: object, where: str) -> None:
    # Exact types: subclasses, such as NumPy's float64 of float, load only by running their code.
    if type(value) in (dict, OrderedDict):
        for name, item in value.items():  # type: ignore[attr-defined]
            _check_plain(name, f"a key of {where}")
            _check_plain(item, f"{where}[{name!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):  # type: ignore[arg-type]
            _check_plain(item, f"{where}[{i}]")
    elif type(value) not in _PLAIN:
        raise ValueError(
            f"checkpoint: {where} is a {type(value).__module__}.{type(value).__qualname__}; allowed are tensors, "
            "numbers, text, None, and dicts, lists and tuples of them"
        )


def _damaged(path: Path, size: int, why: str) -> ValueError:
    older = previous(path)
    then = f"training then resumes from {older.name}" if older.exists() else "training then starts from scratch"
    return ValueError(f"checkpoint {path} ({size} bytes) is truncated or damaged: {why}. Delete it: {then}")


def _refused(path: Path, error: Exception) -> ValueError:
    # Torch's own text advises to load it all the same, so only the finding is quoted.
    found = _CODE.search(str(error))
    what = f" ({found.group()})" if found else ""
    return ValueError(f"checkpoint {path} carries code and is refused{what}; nothing in it was run. Delete the file")


def _foreign(path: Path, size: int, file: IO[bytes]) -> ValueError:
    """Return the error of a file that carries code, or of one that was truncated."""
    head = file.read(2)
    file.seek(0)
    try:
        if head == b"PK" or head.startswith(b"\x80"):  # else none of torch, in whose words any letter may be code
            torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        if _CODE.search(str(error)):
            return _refused(path, error)
    except Exception:
        pass  # whatever is wrong with it, the checksum is missing
    return _damaged(path, size, "no checksum at its end, so it was cut off, or another program wrote it")


class StepLog:
    """One JSON object a line, in memory until ``flush``; a crash can tear only the last line, which readers drop."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lines: list[str] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row with an int under "step". Raises ValueError otherwise, and for a value that JSON cannot hold."""
        if type(row.get("step")) is not int:
            raise ValueError(f"step log: step = {row.get('step')!r}; every row needs an integer step")
        try:
            self._lines.append(json.dumps(row) + "\n")
        except TypeError as error:
            raise ValueError(f"step log: {error} ({dict(row)})") from error

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows and write all that are pending."""
        for row in rows:
            self.append(row)
        self.flush()

    def flush(self) -> None:
        """Write the pending rows to the disk, so that a checkpoint written afterwards is never ahead of the log."""
        if not self._lines:
            return
        with name_file_in_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(self._lines))
            file.flush()
            os.fsync(file.fileno())
        self._lines.clear()

    def truncate_to(self, step: int) -> None:
        """Keep the rows of steps 0 ... step - 1, the state of the log at the checkpoint of ``step``."""
        self._lines.clear()
        if not self.path.exists():
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with name_file_in_errors(self.path), open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self._rows() if row["step"] < step)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def read(self) -> list[dict[str, Any]]:
        """Return all rows that were flushed; ``pandas.DataFrame(log.read())`` is a table. Empty without a file."""
        return list(self._rows()) if self.path.exists() else []

    def _rows(self) -> Iterator[dict[str, Any]]:
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    return  # torn by a crash
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict) or type(row.get("step")) is not int:
                    raise ValueError(f"{self.path}, line {number}: {shown(line, 60)} is not a row of a step log")
                yield row
