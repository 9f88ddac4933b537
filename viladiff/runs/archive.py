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
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from viladiff.core.atomic import write_atomically, writer_token
from viladiff.core.hashing import file_sha256, sha256_hex
from viladiff.runs.record import parse_record, record_bytes, strip_local_paths
from viladiff.runs.store import Store
from viladiff.runs.verify_and_gc import CHECKPOINTS, contradiction

PARTS = {"records": "record.json", "pictures": "pictures.npz", "steps": "steps.jsonl"}
LIMITS = {"records": 16 << 20, "pictures": 1 << 30, "steps": 1 << 30}
"""Most bytes of one file; the packed size says nothing of the unpacked one."""
TOTAL = 8 << 30
_MEMBER = re.compile(r"(records|pictures|steps)/([0-9a-f]{16})(\.[a-z]+)")
_SUMS = "sums.json"


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
            raise ValueError(f"{path} is not an archive of runs, or is damaged: {error}") from error
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
    """Unpack the archive and return the members' names: each an expected plain file, once, within its size limit."""
    names: list[str] = []
    total = 0
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            match = _MEMBER.fullmatch(member.name)
            part = match[1] if match else ""
            expected = match is not None and match[3] == Path(PARTS[part]).suffix
            if not (expected or member.name == _SUMS) or not member.isreg() or member.name in names:
                raise ValueError(
                    f"{path}: {member.name!r} is nothing that viladiff runs export writes; nothing was imported"
                )
            total += member.size
            if member.size > LIMITS.get(part, LIMITS["records"]) or total > TOTAL:
                raise ValueError(f"{path}: {member.name!r} unpacks to {member.size} bytes, too many; nothing imported")
            tar.extract(member, folder, set_attrs=False, filter="data")
            names.append(member.name)
    return names


def _checked(path: Path, folder: Path, names: list[str]) -> dict[str, dict[str, Path]]:
    """Return run_id, name in the run's directory, unpacked file. Raises ValueError if any was not packed so."""
    if _SUMS not in names:
        raise ValueError(f"{path}: has no {_SUMS}, so viladiff runs export did not write it; nothing was imported")
    try:
        sums = dict(json.loads((folder / _SUMS).read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {_SUMS} cannot be read; nothing was imported") from error
    found = {name: file_sha256(folder / name) for name in names if name != _SUMS}
    if sums != found:
        wrong = sorted(set(found) ^ set(sums)) or [name for name in found if sums[name] != found[name]]
        raise ValueError(f"{path}: {wrong[0]} does not match {_SUMS}; nothing was imported")
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
        elif not (_is_arrays if part == "pictures" else _is_log)(folder / name):
            raise ValueError(f"{path}: {name} cannot be read; nothing was imported")
        runs.setdefault(run_id, {})[PARTS[part]] = folder / name
    return runs


def _is_arrays(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as packed:
            return all(name.endswith(".npy") for name in packed.namelist()) and packed.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError):
        return False


def _is_log(path: Path) -> bool:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError):
        return False
    return all(isinstance(row, dict) and type(row.get("step")) is int for row in rows)


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
