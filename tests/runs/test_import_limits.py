"""An import takes no memory for what an archive claims: rows, headers, members, arrays and totals have limits."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from record_kit import made

from viladiff.data.formats.npz import check_arrays, read_arrays
from viladiff.report.sections.learning_curves import read_log
from viladiff.runs import archive
from viladiff.runs.archive import HEADER, MEMBERS, ROW, import_archive
from viladiff.runs.record import record_bytes
from viladiff.runs.store import Store

ONE = made("supervised-183-0")
RECORD, STEPS, PICTURES = f"records/{ONE.run_id}.json", f"steps/{ONE.run_id}.jsonl", f"pictures/{ONE.run_id}.npz"
MB = 1 << 20


def tarred(files: dict[str, bytes], extra: Callable[[tarfile.TarFile], None] = lambda tar: None) -> bytes:
    """An archive of these files with sums that fit; ``extra`` comes first."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    out = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        extra(tar)
        for name, data in {**files, "sums.json": json.dumps(sums).encode()}.items():
            add(tar, name, data)
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    tar.addfile(info, io.BytesIO(data))


def refused(path: Path, data: bytes, most: int = 24 * MB) -> str:
    """The error of an import, which takes no more memory than ``most`` and leaves nothing."""
    path.write_bytes(data)
    store = Store(path.parent / "store")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            import_archive(store, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak / MB:.0f} MB"
    assert [one for one in store.root.rglob("*")] == []
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and "nothing was imported" in text
    return text


@pytest.fixture(autouse=True)
def loaded() -> None:
    """Load what an import needs, which is no memory of the archive."""
    from viladiff.runs.verify_and_gc import contradiction

    assert contradiction(ONE) == ""


def test_a_sound_archive_is_imported(tmp_path: Path) -> None:
    log = b'{"step": 0, "loss": 1.5}\n'
    (tmp_path / "a.tar.gz").write_bytes(tarred({RECORD: record_bytes(ONE), STEPS: log}))
    store = Store(tmp_path / "store")
    assert import_archive(store, tmp_path / "a.tar.gz") == {ONE.run_id: "imported"}
    assert (store.directory(ONE.run_id) / "steps.jsonl").read_bytes() == log


def test_a_log_is_read_a_row_at_a_time_and_has_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "ROWS", 150_000)
    log = b'{"step": 1}\n' * 200_000  # as Python's rows they are 46 MB
    text = refused(tmp_path / "rows.tar.gz", tarred({RECORD: record_bytes(ONE), STEPS: log}), 8 * MB)
    assert f"{STEPS}: row 150001: at most 150000 rows" in text


def test_a_row_has_so_many_bytes(tmp_path: Path) -> None:
    log = b'{"step": 1, "loss": [' + b"[],[],[],[],[],[],[],[]," * (4 * MB // 24) + b"0]}\n"  # 220 MB once parsed
    text = refused(tmp_path / "row.tar.gz", tarred({RECORD: record_bytes(ONE), STEPS: log}))
    assert f"{STEPS}: row 1: at most {archive.ROWS} rows of {ROW} bytes" in text


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_headers_of_long_names_are_not_held(tmp_path: Path, kind: bytes) -> None:
    data = tarred({RECORD: record_bytes(ONE)}, lambda tar: add(tar, "@LongLink", bytes(64 * MB), kind))
    assert len(data) < MB
    text = refused(tmp_path / "long.tar.gz", data)
    told = f"a header of {64 * MB} bytes, at most {HEADER} are allowed"
    assert "@LongLink" in text and (told if kind in b"xg" else "is nothing that viladiff runs export writes") in text


def test_headers_that_other_programs_write_are_passed_over(tmp_path: Path) -> None:
    times = b"30 mtime=1767225600.123456789\n"
    data = tarred({RECORD: record_bytes(ONE)}, lambda tar: add(tar, "PaxHeaders/x", times, tarfile.XHDTYPE))
    (tmp_path / "a.tar.gz").write_bytes(data)
    assert import_archive(Store(tmp_path / "store"), tmp_path / "a.tar.gz") == {ONE.run_id: "imported"}


def test_members_are_counted(tmp_path: Path) -> None:
    block = tarfile.TarInfo("PaxHeaders/x")
    block.type = tarfile.XGLTYPE
    data = gzip.compress(block.tobuf() * (MEMBERS + 1), 1)
    assert f"is member {MEMBERS + 1}, at most {MEMBERS} are allowed" in refused(tmp_path / "many.tar.gz", data)


def test_a_member_is_there_once(tmp_path: Path) -> None:
    data = tarred({RECORD: record_bytes(ONE)}, lambda tar: add(tar, RECORD, b"{}"))
    assert f"{RECORD!r} is nothing that viladiff runs export writes" in refused(tmp_path / "twice.tar.gz", data)


def test_sizes_and_their_sum_are_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tarfile.TarInfo(STEPS)
    info.size = 1 << 40
    text = refused(tmp_path / "size.tar.gz", gzip.compress(info.tobuf(tarfile.GNU_FORMAT)))
    assert f"{STEPS!r} unpacks to {1 << 40} bytes, at most {archive.LIMITS['steps']} are allowed" in text
    monkeypatch.setattr(archive, "TOTAL", len(record_bytes(ONE)) + 10)
    text = refused(tmp_path / "total.tar.gz", tarred({RECORD: record_bytes(ONE), STEPS: b'{"step": 1}\n'}))
    assert f"{STEPS!r} unpacks to 12 bytes, at most 10 are allowed" in text


def bomb(size: int, shape: tuple[int, ...]) -> bytes:
    """An archive of one array of zeros whose header has this shape."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
        packed.open("image.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for _ in range(size // MB):
            file.write(bytes(MB))
    return out.getvalue()


@pytest.mark.parametrize(
    ("size", "shape", "what"),
    [
        (520 * MB, (520 * MB,), "'image.npy' makes it 545259648 bytes unpacked, at most 536870912"),
        (MB, (3_300_000_000,), "'image.npy': promises 3300000128 bytes and has 1048704"),
        (MB, (10**12, 10**12), "'image.npy': promises"),
    ],
)
def test_arrays_have_the_size_that_they_promise(tmp_path: Path, size: int, shape: tuple[int, ...], what: str) -> None:
    data = bomb(size, shape)
    text = refused(tmp_path / "arrays.tar.gz", tarred({RECORD: record_bytes(ONE), PICTURES: data}))
    assert PICTURES in text and what in text
    (tmp_path / "pictures.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"pictures.npz cannot be read: 'image.npy'"):
        read_arrays(tmp_path / "pictures.npz")


def test_sound_arrays_are_read_and_others_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.arange(6).reshape(2, 3), b=np.zeros((0, 2)), c=np.array(1.5))
    assert {name: array.tolist() for name, array in read_arrays(path).items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": [],
        "c": 1.5,
    }
    with pytest.raises(ValueError, match=r"a.npz cannot be read: 'a.npy' makes it 176 bytes unpacked, at most 100"):
        check_arrays(path, 100)
    np.savez(path, a=np.array([{}], object))
    with pytest.raises(ValueError, match=r"'a.npy': holds objects"):
        check_arrays(path)


@pytest.mark.parametrize("kind", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_arrays_are_compressed_as_numpy_does(tmp_path: Path, kind: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", kind) as packed, packed.open("a.npy", "w") as file:
        np.save(file, np.zeros(4))
    with pytest.raises(ValueError, match=r"a.npz cannot be read: 'a.npy' is compressed in another way"):
        check_arrays(tmp_path / "a.npz")


def test_a_long_list_of_arrays_is_not_held(tmp_path: Path) -> None:
    entry = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, *[0] * 7, 1, *[0] * 6) + b"a"
    count, size = 300_000, 300_000 * len(entry)
    end = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, 0)
    end += struct.pack("<IIQI", 0x07064B50, 0, size, 1)
    end += struct.pack("<IHHHHIIH", 0x06054B50, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "a.npz").write_bytes(entry * count + end)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"a.npz cannot be read: its list of arrays has {size} bytes"):
            check_arrays(tmp_path / "a.npz")
        assert tracemalloc.get_traced_memory()[1] < MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("step", [-1, 2**63, 10**400])
def test_steps_of_a_log_are_of_a_run(tmp_path: Path, step: int) -> None:
    log = b'{"step": 0}\n' + json.dumps({"step": step, "sup": 1.0}).encode() + b"\n"
    text = refused(tmp_path / "steps.tar.gz", tarred({RECORD: record_bytes(ONE), STEPS: log}))
    assert f"{STEPS}: row 2 cannot be read as one of a log of steps" in text
    (tmp_path / "steps.jsonl").write_bytes(log)
    assert read_log(tmp_path / "steps.jsonl")["step"].tolist() == [0.0]
