"""A data set is named by what its files hold, and each file is read once."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import published_layouts as layouts
import pytest
from PIL import Image

from viladiff.core.distributed import in_turn
from viladiff.data import registry
from viladiff.data.dataset import Dataset
from viladiff.data.files import file_cache
from viladiff.data.files.file_cache import NAME, Contents
from viladiff.data.files.images import read_mask
from viladiff.data.files.run_checks import check_files
from viladiff.inference.load import preview_run
from viladiff.runs.config import RunConfig, override
from viladiff.runs.lease import acquire_or_raise
from viladiff.training.errors import RunIdMismatchError
from viladiff.training.launch import run_in_processes
from viladiff.training.trainer import fit

Make = Callable[..., Path]
RACY = file_cache.RACY
"""As it is for users."""
_opened: list[str] = []
_listening = threading.Event()


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _listening.is_set() and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_hear)


@contextmanager
def opens(root: Path) -> Iterator[list[str]]:
    """Images and masks below the root that anything in this process opens, by whatever call."""
    found: list[str] = []
    _opened.clear()
    _listening.set()
    try:
        yield found
    finally:
        _listening.clear()
        suffixes = (".jpg", ".png", ".bmp")
        found += [path for path in _opened if path.startswith(str(root)) and path.endswith(suffixes)]


def aged(root: Path) -> Path:
    """The root, all of its files an hour older."""
    for path in root.rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime_ns - 3600 * 10**9
            os.utime(path, ns=(then, then))
    return root


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test has just written counts as old: no call sets the time of change back."""
    monkeypatch.setattr(file_cache, "RACY", 0)


def load(root: Path, split: str = "labelled", **options: Any) -> Dataset:
    return registry.load_dataset("folder", split, root=str(root), **options)


def invert(path: Path) -> None:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    before = path.stat().st_size
    Image.fromarray(255 - pixels).save(path)
    assert path.stat().st_size == before


def swap(path: Path, a: int, b: int) -> None:
    """Exchanges two class ids in a mask, whose file keeps its size."""
    labels = read_mask(path, 255)
    before = path.stat().st_size
    Image.fromarray(np.where(labels == a, b, np.where(labels == b, a, labels)).astype(np.uint8)).save(path)
    short = before - path.stat().st_size
    assert short >= 0
    path.write_bytes(path.read_bytes() + b"\0" * short)


def bitmaps(root: Path) -> Path:
    for path in [*(root / "images").iterdir()]:
        with Image.open(path) as image:
            image.save(path.with_suffix(".bmp"))
        path.unlink()
    return root


def small(root: Path, out: Path, **changes: object) -> RunConfig:
    fields: dict[str, object] = {
        "data.dataset": "folder",
        "runtime.data_root": str(root),
        "runtime.runs_dir": str(out),
        "runtime.progress": False,
        "runtime.threads": 1,
        "method.name": "supervised",
        "model.encoder": "digits_vit",
        "model.pretrained": "shipped",
        "model.decoder_width": 8,
        "data.crop": 32,
        "data.batch_labelled": 2,
        "train.steps": 2,
        "eval.max_images": 2,
        "eval.boundary": False,
    }
    return override(RunConfig(), {**fields, **changes})


# What a run is named by


def test_inverted_pictures_and_exchanged_classes_are_another_run(photo_folder: Make, tmp_path: Path) -> None:
    root = bitmaps(photo_folder(8, sizes=(40, 60)))
    first = fit(small(root, tmp_path / "runs"))
    again = fit(small(root, tmp_path / "runs"))
    assert again.directory == first.directory and again.record.finished == first.record.finished
    for path in (root / "images").iterdir():
        invert(path)
    inverted = fit(small(root, tmp_path / "runs"))
    assert inverted.directory != first.directory and inverted.record.run_id != first.record.run_id
    swap(root / "masks" / "china_0000.png", 1, 3)
    assert preview_run(small(root, tmp_path / "runs"))["state"] == "new"
    swap(root / "masks" / "china_0000.png", 1, 3)


def test_a_planned_run_is_refused_once_a_file_has_changed(photo_folder: Make, tmp_path: Path) -> None:
    root = bitmaps(photo_folder(8, sizes=(40, 60)))
    cfg = small(root, tmp_path / "runs")
    planned = preview_run(cfg)
    planned["directory"].mkdir(parents=True)
    (planned["directory"] / "checkpoint.pt").write_bytes(b"of an interrupted run")
    assert preview_run(cfg)["state"].startswith("interrupted")
    invert(root / "images" / "grace_0002.bmp")
    assert preview_run(cfg)["state"] == "new", "the checkpoint is not gone on from"
    with (
        acquire_or_raise(planned["directory"]) as lease,
        pytest.raises(
            RunIdMismatchError, match=rf"planned as {planned['run']}, it would be .* data or weights have changed"
        ),
    ):
        fit(cfg, lease=lease)


LAYOUTS = {"cityscapes": ("372", "gtFine/train"), "coco": ("463", "masks"), "ade20k": ("1263", "annotations/training")}


@pytest.mark.parametrize("name", ["voc", *LAYOUTS])
def test_every_layout_is_named_by_content_and_read_once(photo_folder: Make, tmp_path: Path, name: str) -> None:
    if name == "voc":
        root, split, masks = photo_folder(12, "voc"), "92", "SegmentationClass"
    else:
        split, masks = LAYOUTS[name]
        root = getattr(layouts, name)(tmp_path / name).root
    aged(root)

    def start() -> Dataset:
        data = registry.load_dataset(name, split, root=str(root))
        check_files(data)
        return data

    with opens(root) as first:
        data = start()
    with opens(root) as second:
        again = start()
    assert first and not second and again.fingerprint == data.fingerprint
    assert data.files is not None and data.val_files is not None
    for path in (data.files.paths[0], data.files.paths[-1], data.target_path(0), data.val_files.masks[0]):
        before, then = path.read_bytes(), path.stat()
        path.write_bytes(before[:-20] + bytes([before[-20] ^ 1]) + before[-19:])
        changed = registry.load_dataset(name, split, root=str(root))
        assert changed.fingerprint != data.fingerprint, path
        path.write_bytes(before)
        os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert start().fingerprint == data.fingerprint and str(data.target_path(0)).startswith(str(root / masks))


def test_masks_that_all_adds_are_named_by_content(photo_folder: Make) -> None:
    root = photo_folder(12, "voc", split="1464", unlabelled_masks=True)
    every = registry.load_dataset("voc", "all", root=str(root))
    few = registry.load_dataset("voc", "1464", root=str(root))
    assert few.files is not None
    mask = few.files.masks[int(few.unlabelled[0])]
    data = mask.read_bytes()
    mask.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    assert registry.load_dataset("voc", "all", root=str(root)).fingerprint != every.fingerprint
    assert registry.load_dataset("voc", "1464", root=str(root)).fingerprint == few.fingerprint


def test_masks_of_unlabelled_images_are_opened_by_nothing(photo_folder: Make, tmp_path: Path) -> None:
    root = aged(photo_folder(8, sizes=(40, 60), unlabelled_masks=True))
    hidden = {str(root / "masks" / f"{name}.png") for name in ("grace_0002", "china_0003", "flower_0004", "grace_0005")}
    changes = {"method.name": "semibaseline", "data.batch_unlabelled": 2, "train.steps": 1}
    with opens(root) as found:
        result = fit(small(root, tmp_path / "runs", **changes))
    assert found and not hidden & set(found) and all(os.path.exists(path) for path in hidden)
    for path in hidden:
        os.unlink(path)
    again = fit(small(root, tmp_path / "other", **changes))
    assert again.record.run_id == result.record.run_id and again.record.miou == result.record.miou


# What is kept


@pytest.mark.parametrize("options", [{}, {"split_seed": 1}, {"holdout": 0.4, "scored": "holdout"}])
def test_the_second_start_opens_no_file(photo_folder: Make, options: dict[str, Any]) -> None:
    root = aged(photo_folder(24, unlabelled_masks=True))

    def start() -> tuple[str, ...]:
        data = load(root, **options)
        return data.fingerprint, *check_files(data)

    with opens(root) as first:
        told = start()
    assert {Path(path).parent.name for path in first} == {"images", "masks"}
    with opens(root) as second:
        assert start() == told
    assert second == []
    path = root / "images" / "china_0003.jpg"
    path.write_bytes(path.read_bytes() + b" ")
    with opens(root) as third:
        assert start()[0] != told[0]
    assert {*third} == {str(path)}, "the file that has changed, and no other"


@pytest.mark.parametrize("restored", [False, True])
def test_a_second_change_in_the_same_tick_is_seen(
    photo_folder: Make, monkeypatch: pytest.MonkeyPatch, restored: bool
) -> None:
    root = photo_folder(8)
    path = root / "images" / "china_0000.jpg"
    plain, data, now = file_cache._stat, path.read_bytes(), time.time_ns()
    then = 10**18 if restored else now
    monkeypatch.setattr(file_cache, "RACY", RACY)
    # As on a file system whose clock ticks rarely: nothing but the content shows the second change.
    monkeypatch.setattr(file_cache, "_stat", lambda path: (*plain(path)[:2], now if restored else 0, 0))

    def found(last: bytes) -> str:
        path.write_bytes(data + last)
        os.utime(path, ns=(then, then))
        return load(root).fingerprint

    assert found(b"1") != found(b"2")
    monkeypatch.setattr(file_cache, "RACY", -(10**12))
    assert found(b"3") == found(b"4"), "without the pause this goes unseen, so the test can fail"


def test_a_file_that_takes_its_old_time_back_is_read_again(photo_folder: Make) -> None:
    root = aged(bitmaps(photo_folder(8)))
    before, path = load(root).fingerprint, root / "images" / "china_0000.bmp"
    then = path.stat()
    invert(path)
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert path.stat().st_ino == then.st_ino and path.stat().st_mtime_ns == then.st_mtime_ns
    assert load(root).fingerprint != before


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "binary", "format", "empty"])
def test_what_is_kept_and_damaged_is_read_anew(
    photo_folder: Make, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = aged(photo_folder(8))
    wanted, kept = load(root).fingerprint, root / NAME
    data, known = kept.read_bytes(), file_cache._read(kept)
    place = data.index(b'"sha256":"') + 12
    with monkeypatch.context() as patch:
        patch.setattr(file_cache, "FORMAT", 9)
        other = file_cache._packed(known)
    kept.write_bytes(
        {
            "cut": data[: len(data) // 2],
            "bit": data[:place] + (b"0" if data[place : place + 1] != b"0" else b"1") + data[place + 1 :],
            "text": b"what is this\n{}",
            "binary": b"\xff\xfe\x00\n\x80",
            "format": other,
            "empty": b"",
        }[damage]
    )
    with opens(root) as found:
        assert load(root).fingerprint == wanted
    assert found and load(root).fingerprint == wanted and kept.read_bytes() == data


def test_where_the_data_cannot_be_written_the_cache_folder_is(
    photo_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = aged(photo_folder(8))
    (root / NAME).mkdir()  # takes the place of the file, for root as well
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    wanted = load(root).fingerprint
    assert len(list((tmp_path / "cache" / "contents").iterdir())) == 1
    with opens(root) as found:
        assert load(root).fingerprint == wanted
    assert not found
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(file_cache, "_unkept", {})
    with opens(root) as first:
        assert load(root).fingerprint == wanted
    with opens(root) as second:
        assert load(root).fingerprint == wanted
    assert first and not second, "kept for as long as the process lives"


def test_of_two_places_either_may_know_more(
    photo_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photo_folder(8)
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    load(root)  # the owner of the data has hashed them, and has checked nothing
    kept = (root / NAME).read_bytes()
    changed = root / "images" / "flower_0001.jpg"
    changed.write_bytes(changed.read_bytes() + b" ")
    (root / NAME).unlink()
    (root / NAME).mkdir()
    data = load(root)  # one who cannot write there, of a file that has changed since
    check_files(data)
    (root / NAME).rmdir()
    (root / NAME).write_bytes(kept)
    with opens(root) as found:
        assert load(root).fingerprint == data.fingerprint
        check_files(load(root))
    assert not found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["pipe", "endless", "lines"])
def test_what_lies_in_the_place_of_what_is_kept(photo_folder: Make, tmp_path: Path, what: str) -> None:
    root = photo_folder(8)
    wanted = load(root).fingerprint
    kept = root / NAME
    data = kept.read_bytes()
    kept.unlink()
    if what == "pipe":
        os.mkfifo(kept)
    elif what == "endless":
        kept.symlink_to("/dev/zero")
    else:
        stat = file_cache._stat(root / "images" / "china_0000.jpg")
        lines = {"images/china_0000.jpg": file_cache._start(stat) + "null", "images/flower_0001.jpg": "", '"': "x"}
        kept.write_bytes(file_cache._packed(lines))
    assert load(root).fingerprint == wanted
    assert load(root).fingerprint == wanted and (what == "lines" or kept.read_bytes() == data)


def test_of_a_large_file_that_was_not_written_here_nothing_is_held(photo_folder: Make) -> None:
    root = photo_folder(8)
    wanted, kept = load(root).fingerprint, root / NAME
    head, size = kept.read_bytes().partition(b"\n")[0], 2**25
    for garbage in (b"", head + b"\n"):
        kept.write_bytes(garbage + b"a" * size)
        tracemalloc.start()
        assert file_cache._read(kept) == {}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < size / 8
    assert load(root).fingerprint == wanted


def test_two_that_write_at_once_keep_what_the_other_found(photo_folder: Make) -> None:
    root = aged(photo_folder(8))
    one, other = Contents(root), Contents(root)
    paths = sorted((root / "images").iterdir())
    for known, path in ((one, paths[0]), (other, paths[1])):
        assert known.find(path, "x", lambda path=path: path.name) == path.name
    one.save()
    other.save()
    third = Contents(root)
    assert [third.find(path, "x", lambda: "anew") for path in paths[:3]] == [paths[0].name, paths[1].name, "anew"]
    paths[0].unlink()
    third.save()
    assert paths[0].name not in (root / NAME).read_text(), "of a file that is gone nothing is kept"
    assert [path.name for path in root.iterdir() if "tmp" in path.name] == []


def test_links_and_names_in_other_letters(photo_folder: Make) -> None:
    root = photo_folder(8)
    for folder, suffix in (("images", "jpg"), ("masks", "png")):
        (root / folder / f"china_0000.{suffix}").rename(root / folder / f"ein Bild ☀.{suffix}")
    shutil.move(root / "images" / "ein Bild ☀.jpg", root / "kept.jpg")
    os.symlink("../kept.jpg", root / "images" / "ein Bild ☀.jpg")
    (root / "splits" / "labelled" / "labelled.txt").write_text("ein Bild ☀\nflower_0001", encoding="utf-8")
    before = load(aged(root)).fingerprint
    with opens(root) as found:
        assert load(root).fingerprint == before
    assert not found
    (root / "kept.jpg").write_bytes((root / "kept.jpg").read_bytes() + b" ")
    assert load(root).fingerprint != before


def test_files_that_cannot_be_read_are_named(photo_folder: Make, tmp_path: Path) -> None:
    known = Contents(tmp_path)
    with pytest.raises(ValueError, match=r"none\.jpg: cannot be read: No such file"):
        known.digests([tmp_path / "none.jpg"])
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(ValueError, match=r"folder\.jpg: cannot be read: Is a directory"):
        known.digests([tmp_path / "folder.jpg"])


def test_a_file_that_changes_while_it_is_read(photo_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = photo_folder(8)
    path, plain = root / "images" / "china_0000.jpg", file_cache._sha256

    def written(read: Path) -> str:
        found = plain(read)
        if read == path:
            path.write_bytes(path.read_bytes() + b" ")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(file_cache, "_sha256", written)
        with pytest.raises(ValueError, match=r"china_0000\.jpg: was changed while it was read; start again"):
            load(root)
    load(root)


def test_reading_for_long_says_so(
    photo_folder: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = aged(photo_folder(8))
    monkeypatch.setattr(file_cache, "_SAY_AFTER", -1.0)
    load(root)
    told = capsys.readouterr().err
    assert told.count("reading 12 new or changed files of ") == 1 and f"{root}, 0.0 GB: 1 read" in told
    load(root)
    assert capsys.readouterr().err == ""


def _reads(cfg: RunConfig, out: str) -> str:
    """Writes how many files this worker has opened to load and check the data."""
    root = Path(str(cfg.runtime.data_root))
    with opens(root) as found:
        data = in_turn(lambda: registry.load_dataset(*registry.dataset_spec(cfg)))
        in_turn(lambda: check_files(data))
    (Path(out) / os.environ["LOCAL_RANK"]).write_text(f"{len(found)} {data.fingerprint}")
    return out


def test_of_several_workers_one_reads(photo_folder: Make, tmp_path: Path) -> None:
    root = photo_folder(8)
    time.sleep(1.1 * RACY / 1e9)
    run_in_processes(_reads, small(root, tmp_path / "runs", **{"runtime.workers": 2}), 2, str(tmp_path))
    first, second = ((tmp_path / rank).read_text().split() for rank in "01")
    assert int(first[0]) >= 12 and second == ["0", first[1]]
    (root / "masks" / "china_0000.png").unlink()
    with pytest.raises(ValueError, match="1 of 2 images have no mask, first 'china_0000'"):
        run_in_processes(_reads, small(root, tmp_path / "runs", **{"runtime.workers": 2}), 2, str(tmp_path))
