"""Archives of NumPy's arrays (.npz), whose sizes are checked before memory is taken for them."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from viladiff.core.messages import one_line, shown

MOST_ARRAYS = 1000
"""In an archive."""
MOST_UNPACKED = 512 << 20
"""Bytes of all arrays of an archive together; 64 pictures of 512 x 512 pixels at nine stages have 200 MB."""
_LIST = 1 << 20
"""Most bytes of an archive's list of its arrays, which a reader of zip files takes as a whole."""
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Those that NumPy writes; one of the others takes memory for a dictionary of whatever size the file names."""
_NAME = 200
"""Most characters of an array's name."""
_HEADERS: dict[tuple[int, int], Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class _ShortReads(io.FileIO):
    """File of which no more than a list of arrays is read at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LIST:
            raise zipfile.BadZipFile(f"its list of arrays has {size} bytes, at most {_LIST}")
        return super().read(size)


def read_arrays(path: Path, most: int = MOST_UNPACKED) -> dict[str, np.ndarray]:
    """Return the arrays of an archive by name, after ``check_arrays``. Raises ValueError as it does."""
    check_arrays(path, most)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path.name} cannot be read: {_first_line(error)}") from error


def check_arrays(path: Path, most: int = MOST_UNPACKED) -> None:
    """Check an archive of arrays; takes no memory for them.

    Raises ValueError that names the file and the array: more than MOST_ARRAYS arrays, more than ``most`` bytes
    unpacked, an array whose header and size contradict each other, one of objects, a name twice, damaged content.
    """
    try:
        with _ShortReads(path) as file, zipfile.ZipFile(file) as packed:
            members = packed.infolist()
            if len(members) > MOST_ARRAYS:
                raise ValueError(f"{len(members)} arrays, at most {MOST_ARRAYS}")
            total, seen = 0, set[str]()
            for member in members:
                total += member.file_size
                if total > most:
                    raise ValueError(f"{shown(member.filename)} makes it {total} bytes unpacked, at most {most}")
                if member.filename in seen or not member.filename.endswith(".npy") or len(member.filename) > _NAME:
                    raise ValueError(f"{shown(member.filename)} is there twice, or is no array")
                if member.compress_type not in _COMPRESSIONS:
                    raise ValueError(f"{shown(member.filename)} is compressed in another way than NumPy's")
                seen.add(member.filename)
                _check_header(packed, member)
            if (damaged := packed.testzip()) is not None:
                raise ValueError(f"{damaged!r} is damaged")
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {_first_line(error)}") from error


def _check_header(packed: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raise ValueError unless the array's header promises as many bytes as there are."""
    with packed.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{member.filename!r}: format {version} of NumPy's arrays")
        try:
            shape, _, dtype = _HEADERS[version](file)
        except Exception as error:  # whatever the parser makes of 10 kB at most
            raise ValueError(f"{member.filename!r}: its header cannot be read") from error
        promised = file.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject or promised != member.file_size:
        what = "holds objects" if dtype.hasobject else f"promises {promised} bytes and has {member.file_size}"
        raise ValueError(f"{member.filename!r}: {what}")


def _first_line(error: Exception) -> str:
    return one_line((str(error).splitlines() or [type(error).__name__])[0], 300)
