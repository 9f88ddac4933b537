"""A data set's files are checked once on a machine; a file that has changed is looked at again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from viladiff.data.dataset import Dataset
from viladiff.data.files import run_checks, stamps
from viladiff.data.files.file_cache import Contents
from viladiff.data.files.run_checks import check_files
from viladiff.data.registry import load_dataset

Make = Callable[..., Path]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were looked at, in a cache of the test's own."""
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    found: list[Path] = []
    plain = Contents.find

    def find(self: Contents, path: Path, what: str, look: Callable[[], Any]) -> Any:
        if what != "sha256":
            found.append(path)
        return plain(self, path, what, look)

    monkeypatch.setattr(Contents, "find", find)
    return found


def opened(root: Path) -> Dataset:
    return load_dataset("folder", "labelled", root=str(root))


def test_a_second_start_looks_at_no_file(photo_folder: Make, asked: list[Path]) -> None:
    root = photo_folder(12)
    told = check_files(opened(root))
    assert len(asked) == 12 + 6
    asked.clear()
    assert check_files(opened(root)) == told and asked == []


@pytest.mark.parametrize("kind", ["image", "mask", "labelled list"])
def test_a_changed_file_is_noticed(photo_folder: Make, asked: list[Path], kind: str) -> None:
    root = photo_folder(12)
    check_files(opened(root))
    asked.clear()
    if kind == "labelled list":
        path = root / "splits" / "labelled" / "unlabelled.txt"
        path.write_text("\n".join(path.read_text(encoding="utf-8").split()[1:]), encoding="utf-8")
        check_files(opened(root))
        assert len(asked) == 11 + 6
        return
    path = sorted((root / ("images" if kind == "image" else "masks")).iterdir())[0]
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
    with pytest.raises(ValueError, match=path.name):
        check_files(opened(root))
    with pytest.raises(ValueError, match=path.name):
        check_files(opened(root))


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "\x00"])
def test_a_damaged_stamp_is_made_again(photo_folder: Make, asked: list[Path], damage: str) -> None:
    data = opened(photo_folder(8))
    told = check_files(data)
    stamps.stamp_path(data).write_text(damage, encoding="utf-8")
    asked.clear()
    assert check_files(data) == told and asked
    asked.clear()
    assert check_files(data) == told and not asked


def test_equal_files_at_another_place_have_a_stamp_of_their_own(photo_folder: Make, asked: list[Path]) -> None:
    one, two = opened(photo_folder(8)), opened(photo_folder(8, root="other"))
    assert one.fingerprint == two.fingerprint and stamps.stamp_path(one) != stamps.stamp_path(two)


def test_a_cache_that_cannot_be_written_costs_time_only(
    photo_folder: Make, asked: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened(photo_folder(8))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "file"))
    assert check_files(data) == check_files(data) and asked


def test_another_state_of_the_checks_has_no_stamp(
    photo_folder: Make, asked: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened(photo_folder(8))
    old = stamps.stamp_path(data)
    monkeypatch.setattr(stamps, "code_digest", lambda: "other")
    assert stamps.stamp_path(data) != old


def test_other_workers_only_read_the_stamp(
    photo_folder: Make, asked: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photo_folder(8)
    check_files(opened(root))
    monkeypatch.setattr(run_checks, "_checked", lambda *given: pytest.fail("looked again"))
    check_files(opened(root))
