"""Archives of runs: records, pictures and step logs in one file, checked before anything is imported.

Inside: ``records/<run_id>.json``, ``pictures/<run_id>.npz``, ``steps/<run_id>.jsonl`` and ``sums.json`` with the
SHA-256 of each; no checkpoints. Records have no machine paths. Equal runs give equal bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from viladiff.core.atomic import write_atomically, writer_token
from viladiff.core.hashing import file_sha256, sha256_hex
from viladiff.core.messages import one_line, shown
from viladiff.data.formats.npz import check_arrays
from viladiff.runs.record import parse_record, record_bytes, strip_local_paths
from viladiff.runs.store import Store
from viladiff.runs.verify_and_gc import CHECKPOINTS, contradiction

PARTS = {"records": "record.json", "pictures": "pictures.npz", "steps": "steps.jsonl"}
LIMITS = {"records": 16 << 20, "pictures": 512 << 20, "steps": 512 << 20, "": 16 << 20}
"""Most bytes of one file, ``sums.json`` last; the packed size says nothing of the unpacked one."""
TOTAL = 8 << 30
"""Most bytes of all files."""
MEMBERS = 100_000
"""Most files of an archive."""
HEADER = 64 << 10
"""Most bytes of a header that other programs write before a file, as of its times; what it says is passed over."""
ROWS = 2_000_000
"""Most rows of a log of steps."""
ROW = 64 << 10
"""Most bytes of one of them."""
_MEMBER = re.compile(r"(records|pictures|steps)/([0-9a-f]{16})(\.[a-z]+)")
_SUMS = "sums.json"
_BLOCK = tarfile.BLOCKSIZE
_EXTRA = (tarfile.XHDTYPE, tarfile.XGLTYPE)
_CHUNK = 1 << 20


def export(store: Store, run_ids: Iterable[str], path: Path) -> int:
    """Pack finished runs and return their number. Raises ValueError if the file exists or a run is not finished."""
    if not path.name.endswith((".tar.gz", ".tgz")):
        raise ValueError(f"{path}: an archive of runs ends in .tar.gz; write {path.name}.tar.gz")
    if path.exists():
        raise ValueError(f"{path}: exists and is not overwritten; choose another name or remove it")
    members: dict[str, bytes] = {}
    for run_id in sorted(run_ids):
        record = store.get(run_id)
        if record is None:
            raise ValueError(f"run {run_id}: has no record to pack; see viladiff runs show {run_id}")
        members[f"records/{run_id}.json"] = record_bytes(strip_local_paths(record))
        for part in ("pictures", "steps"):
            file = store.file(run_id, PARTS[part])
            if file is not None:
                members[f"{part}/{run_id}{file.suffix}"] = file.read_bytes()
    sums = {name: sha256_hex(data) for name, data in members.items()}
    write_atomically(path, _pack({**members, _SUMS: json.dumps(sums, indent=1).encode()}))
    return sum(name.startswith("records/") for name in members)


def import_archive(store: Store, path: Path) -> dict[str, str]:
    """Import the runs of an archive into the store and return the outcome of each; a good record is never replaced.

    Raises ValueError, with nothing written, if the archive holds anything but the files named above, one of them is
    damaged, or a record's configuration does not match its name. Loads torch.
    """
    store.root.mkdir(parents=True, exist_ok=True)
    # Inside the store, so that each file is put in place by a rename.
    with tempfile.TemporaryDirectory(dir=store.root, prefix=f".import-{os.getpid()}-{writer_token()}-") as folder:
        try:
            found = _unpack(path, Path(folder))
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is not an archive of runs, or is damaged: {one_line(str(error))}") from error
        runs = _checked(path, Path(folder), found)
        return {run_id: _place(store, run_id, files) for run_id, files in runs.items()}


def _pack(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, data in sorted(members.items()):
            info = tarfile.TarInfo(name)  # no owner, no time
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _unpack(path: Path, folder: Path) -> list[str]:
    """Unpack the archive and return the members' names: each an expected plain file, once, within its size limit.

    The blocks are read here, since tarfile takes memory for headers and lists of whatever length they claim.
    """
    names: dict[str, None] = {}
    for part in PARTS:
        (folder / part).mkdir()
    total = 0
    with gzip.open(path) as packed:
        for member in _members(path, packed):
            match = _MEMBER.fullmatch(member.name)
            part = match[1] if match else ""
            expected = match is not None and match[3] == Path(PARTS[part]).suffix
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
            if not (expected or member.name == _SUMS) or not plain or member.name in names:
                what = f"{shown(member.name)} is nothing that viladiff runs export writes"
                raise ValueError(f"{path}: {what}; nothing was imported")
            names[member.name] = None
            total += member.size
            most = min(LIMITS[part], TOTAL - total + member.size)
            if member.size > most:
                what = f"{member.name!r} unpacks to {member.size} bytes, at most {most} are allowed"
                raise ValueError(f"{path}: {what}; nothing was imported")
            _copy(packed, member.size, folder / member.name)
    return list(names)


def _members(path: Path, packed: gzip.GzipFile) -> Iterator[tarfile.TarInfo]:
    """Yield the header of each file, whose content is to be read before the next. Raises ValueError, TarError."""
    number = 0
    while len(block := packed.read(_BLOCK)) == _BLOCK and any(block):
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if (number := number + 1) > MEMBERS:
            what = f"{shown(member.name)} is member {number}, at most {MEMBERS} are allowed"
            raise ValueError(f"{path}: {what}; nothing was imported")
        if member.type not in _EXTRA:
            yield member
            continue
        if not 0 <= member.size <= HEADER:
            what = f"{shown(member.name)} is a header of {member.size} bytes, at most {HEADER} are allowed"
            raise ValueError(f"{path}: {what}; nothing was imported")
        packed.read(_padded(member.size))
    if len(block) % _BLOCK:
        raise EOFError("it ends within a block")


def _copy(packed: gzip.GzipFile, size: int, into: Path) -> None:
    """Write the next ``size`` bytes to a file, and pass over the rest of the last block."""
    if size < 0:
        raise tarfile.HeaderError("a file of negative size")
    left = size
    with into.open("wb") as file:
        while left:
            if not (data := packed.read(min(left, _CHUNK))):
                raise EOFError("it ends within a file")
            file.write(data)
            left -= len(data)
    packed.read(_padded(size) - size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _checked(path: Path, folder: Path, names: list[str]) -> dict[str, dict[str, Path]]:
    """Return run_id, name in the run's directory, unpacked file. Raises ValueError if any was not packed so."""
    if _SUMS not in names:
        raise ValueError(f"{path}: has no {_SUMS}, so viladiff runs export did not write it; nothing was imported")
    try:
        sums = json.loads((folder / _SUMS).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_SUMS} cannot be read; nothing was imported") from error
    if not isinstance(sums, dict):
        raise ValueError(f"{path}: {_SUMS} cannot be read as one; nothing was imported")
    found = {name: file_sha256(folder / name) for name in names if name != _SUMS}
    if sums != found:
        wrong = sorted(set(found) ^ set(sums)) or [name for name in found if sums[name] != found[name]]
        raise ValueError(f"{path}: {shown(wrong[0])} does not match {_SUMS}; nothing was imported")
    runs: dict[str, dict[str, Path]] = {}
    for name in sorted(found, key=lambda name: not name.startswith("records/")):
        part, _, file = name.partition("/")
        run_id = file.partition(".")[0]
        if part == "records":
            record = parse_record((folder / name).read_bytes(), f"{path}: {name}")
            if record.run_id != run_id:
                raise ValueError(f"{path}: {name} is the record of {record.run_id}; nothing was imported")
            if why := contradiction(record):
                raise ValueError(f"{path}: {name} contradicts its name or itself: {why}; nothing was imported")
        elif run_id not in runs:
            raise ValueError(f"{path}: {name} belongs to no record in it; nothing was imported")
        else:
            _check_part(path, folder / name, name)
        runs.setdefault(run_id, {})[PARTS[part]] = folder / name
    return runs


def _check_part(path: Path, file: Path, name: str) -> None:
    """Raise ValueError that names the member unless it holds what its name says."""
    try:
        (check_arrays if name.startswith("pictures/") else _check_log)(file)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}; nothing was imported") from error


def _check_log(path: Path) -> None:
    """Raise ValueError for a log that is none, or is longer than logs are; holds one row at a time."""
    number = 0
    with path.open("rb") as file:
        while line := file.readline(ROW + 1):
            number += 1
            if number > ROWS or len(line) > ROW:
                raise ValueError(f"row {number}: at most {ROWS} rows of {ROW} bytes are allowed")
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            step = row.get("step") if isinstance(row, dict) else None
            if type(step) is not int or not 0 <= step < 2**63:
                raise ValueError(f"row {number} cannot be read as one of a log of steps")


def _place(store: Store, run_id: str, files: dict[str, Path]) -> str:
    """Import a run and return the outcome."""
    lease = store.lease(run_id)
    if lease is None:
        return f"not imported: in work here ({store.holder(run_id) or 'by an unknown process'})"
    with lease:
        here, directory = store.get(run_id), store.directory(run_id)
        if here is not None:
            same = strip_local_paths(here) == parse_record(files["record.json"].read_bytes(), run_id)
            return "already here" if same else "not imported: another record of it is here, which stays"
        begun = [directory / name for name in CHECKPOINTS if (directory / name).exists()]
        for name, file in files.items():
            if name != "record.json":
                file.replace(directory / name)
        for path in begun:
            path.unlink(missing_ok=True)  # of a half-trained network, which the record is not about
        store.clear_failure(run_id)
        write_atomically(directory / "record.json", files["record.json"].read_bytes())  # last: with it a run is done
    return "imported" + ("; it was begun here, and its checkpoint was removed" if begun else "")
