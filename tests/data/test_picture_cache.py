"""Decoded pictures on disk: the same bits as from the files, whatever has become of an entry or of its file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_module
from PIL import Image

from viladiff.cli.main import main
from viladiff.config.pixel_format import RGB_8, PixelFormat
from viladiff.data import registry
from viladiff.data.batch import Views
from viladiff.data.decode_workers import ROOT, CropRecipe, DecodeRequest, DecodeWorkers, decode_all
from viladiff.data.files.images import PaletteEncoding, read_image, read_mask
from viladiff.data.loader import BatchLoader
from viladiff.data.loading import picture_cache as module
from viladiff.data.loading import picture_space
from viladiff.data.loading.picture_cache import HEAD, PictureCache, StoredPixels, entry_path, survey
from viladiff.runs.config import RunConfig, override

OLD = 1_000_000_000
Make = Callable[..., Path]


def aged(path: Path) -> Path:
    """A file that has lain there, whose time a later change must alter."""
    os.utime(path, (OLD, OLD))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "sür fácé.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(path)
    return aged(path)


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    path = tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 3, (90, 70), dtype=np.uint8)).save(path)
    return aged(path)


def entry(folder: Path) -> Path:
    (found,) = folder.glob("??/*.raw")
    return found


def requests(image: Path, mask: Path | None, count: int = 12) -> list[DecodeRequest]:
    rng = np.random.default_rng(5)
    return [DecodeRequest(str(image), mask and str(mask), tuple(rng.random(4))) for _ in range(count)]


def same(one: Any, other: Any, masked: bool = True) -> bool:
    equal = np.array_equal(one.images, other.images) and one.shown == other.shown
    return equal and (not masked or np.array_equal(one.masks, other.masks))


# The same bits


@pytest.mark.parametrize(("height", "width", "crop"), [(90, 70, 32), (40, 160, 64), (20, 24, 48), (64, 64, 64)])
def test_crops_of_entries_are_those_of_files(tmp_path: Path, height: int, width: int, crop: int) -> None:
    rng = np.random.default_rng(height)
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(image)
    Image.fromarray(rng.integers(0, 4, (height, width), dtype=np.uint8)).save(mask)
    asked = requests(aged(image), aged(mask))
    plain = CropRecipe(crop, (0.5, 2.0), 0.5, 4, None)
    cached = plain._replace(pictures=str(tmp_path / "pictures"))
    wanted = decode_all(asked, plain)
    assert same(decode_all(asked, cached), wanted)
    image.write_bytes(b"x" * image.stat().st_size)  # of the same size and time: only the entries can be read
    mask.write_bytes(b"x" * mask.stat().st_size)
    aged(image), aged(mask)
    with pytest.raises(ValueError, match="not an image"):
        decode_all(asked, plain)
    assert same(decode_all(asked, cached), wanted)
    workers = DecodeWorkers(cached, 2, 12, 0)
    assert same(workers.take(asked), wanted)
    workers.close()


def test_channels_of_other_kinds_and_masks_in_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image, mask = tmp_path / "image.npy", tmp_path / "mask.png"
    np.save(image, rng.integers(0, 4096, (50, 60, 5), dtype=np.uint16))
    colours = PaletteEncoding(((0, 0, 0), (200, 10, 30)), (1, 255))
    Image.fromarray(np.array(colours.rgb, np.uint8)[rng.integers(0, 2, (50, 60))]).save(mask)
    pixels = PixelFormat(channels=5, value_range="12bit")
    plain = CropRecipe(32, (0.5, 2.0), 0.5, 2, colours, pixels)
    cached = plain._replace(pictures=str(tmp_path / "pictures"))
    asked = requests(aged(image), aged(mask))
    wanted = decode_all(asked, plain)
    assert wanted.images.dtype == np.float32
    for _ in range(2):
        assert same(decode_all(asked, cached), wanted)
    # The same file read otherwise has another entry.
    other = cached._replace(pixels=PixelFormat(channels=5, value_range="16bit"))
    assert same(decode_all(asked, other), decode_all(asked, other._replace(pictures=None)))
    assert len(list((tmp_path / "pictures").glob("??/*.raw"))) == 3


def test_batches_are_the_same_with_the_cache(
    photo_folder: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    root = photo_folder(16, labelled=6, val=2, sizes=(40, 120))
    for path in root.rglob("*.*"):
        aged(path)
    fields = {"data.dataset": "folder", "data.crop": 64, "runtime.data_root": str(root), "train.steps": 6}
    batches = []
    for cached in (False, True, True):
        cfg = override(RunConfig(), {**fields, "runtime.picture_cache": cached})
        dataset = registry.load_dataset(*registry.dataset_spec(cfg))
        made = BatchLoader(cfg, dataset, Views(weak=1, strong=1), None, 16, torch.device("cpu"))
        batches.append([batch for step in range(6) for batch in made.micro_batches(step)])
    assert len(list((tmp_path / "cache" / "pictures").glob("??/*.raw"))) == 14 + 6
    for plain, *others in zip(*batches, strict=True):
        for other in others:
            assert torch.equal(plain.image, other.image) and torch.equal(plain.target, other.target)
            assert torch.equal(plain.weak[0], other.weak[0])


# What becomes of entries


def read(cache: PictureCache, path: Path) -> np.ndarray:
    with cache.image(str(path), RGB_8) as found:
        return np.asarray(found[0 : found.shape[0], 0 : found.shape[1]])


def stored(cache: PictureCache, path: Path) -> bool:
    with cache.image(str(path), RGB_8) as found:
        return isinstance(found, StoredPixels)


def test_a_changed_file_replaces_its_entry(image: Path, tmp_path: Path) -> None:
    cache = PictureCache(tmp_path / "pictures")
    read(cache, image)
    assert stored(cache, image)
    first = entry(cache.folder or Path())
    Image.fromarray(np.full((30, 20, 3), 7, np.uint8)).save(image)
    os.utime(image, (OLD + 1, OLD + 1))
    assert (read(cache, image) == 7).all() and read(cache, image).shape == (30, 20, 3)
    assert stored(cache, image) and entry(cache.folder or Path()) == first, "no old pixels stay behind"


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[: HEAD // 2],
        lambda data: b"",
        lambda data: b"\0" * len(data),
        lambda data: data.replace(b"uint8", b"float"),
        lambda data: data.replace(b"[1,", b"[0,", 1).replace(b"[1, ", b"[9, ", 1),
    ],
)
def test_a_damaged_entry_is_made_again(image: Path, tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    cache = PictureCache(tmp_path / "pictures")
    read(cache, image)
    place = entry(tmp_path / "pictures")
    whole = place.read_bytes()
    harmed = harm(whole)
    assert harmed != whole
    place.write_bytes(harmed)
    assert not stored(cache, image) and place.read_bytes() == whole
    assert stored(cache, image) and np.array_equal(read(cache, image), read_image(image))


def test_an_entry_that_shrinks_while_it_is_read_is_an_error(image: Path, tmp_path: Path) -> None:
    cache = PictureCache(tmp_path / "pictures")
    read(cache, image)
    with cache.image(str(image), RGB_8) as found:
        os.truncate(entry(tmp_path / "pictures"), HEAD + 10)
        with pytest.raises(ValueError, match=r"\.raw: became shorter"):
            found[0:20, 0:20]


def test_a_file_that_was_just_written_is_not_stored(image: Path, tmp_path: Path) -> None:
    cache = PictureCache(tmp_path / "pictures")
    os.utime(image, (time.time(), time.time()))
    assert np.array_equal(read(cache, image), read_image(image))
    assert not (tmp_path / "pictures").exists()


def test_a_folder_that_cannot_be_written_is_said_once(
    image: Path, mask: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").write_text("a file")
    cache = PictureCache(tmp_path / "pictures")
    for _ in range(2):
        assert np.array_equal(read(cache, image), read_image(image))
        with cache.mask(str(mask), 3, None) as found:
            assert np.array_equal(found, read_mask(mask, 3))
    (said,) = capfd.readouterr().err.splitlines()
    assert "runtime.picture_cache" in said and str(tmp_path / "pictures") in said and "decoded each time" in said


def test_files_that_cannot_be_read_are_errors_as_without(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path / "pictures")
    for path in (tmp_path / "no.png", aged(_broken(tmp_path / "broken.png"))):
        with pytest.raises(ValueError) as plain:
            read_image(path)
        with pytest.raises(ValueError) as cached, cache.image(str(path), RGB_8):
            pass
        assert str(plain.value) == str(cached.value)


def _broken(path: Path) -> Path:
    path.write_bytes(b"nothing")
    return path


FILL = """
import sys
from pathlib import Path
from viladiff.config.pixel_format import RGB_8
from viladiff.data.loading.picture_cache import PictureCache
for _ in range(20):
    with PictureCache(Path(sys.argv[2])).image(sys.argv[1], RGB_8) as found:
        print(int(found[0:90, 0:70].astype(int).sum()))
    if sys.argv[3] == "unlink":
        for path in Path(sys.argv[2]).glob("??/*.raw"):
            path.unlink(missing_ok=True)
"""


def test_several_processes_fill_one_folder(image: Path, tmp_path: Path) -> None:
    """One of them keeps deleting the entry, as somebody who makes room."""
    command = [sys.executable, "-c", FILL, str(image), str(tmp_path / "pictures")]
    running = [
        subprocess.Popen([*command, what], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for what in ("keep", "keep", "unlink")
    ]
    said = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert {line for lines in said for line in lines} == {str(int(read_image(image).astype(int).sum()))}
    assert [len(lines) for lines in said] == [20] * 3


def test_entries_of_files_that_are_gone_changed_or_read_by_another_pillow_are_outdated(
    image: Path, mask: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PictureCache(tmp_path / "pictures")
    second = aged(Path(shutil.copy(image, tmp_path / "second.png")))
    for path in (image, second):
        read(cache, path)
    with cache.mask(str(mask), 3, None):
        pass

    folder = tmp_path / "pictures"
    third = entry_path(folder, str(image), "x")
    third.parent.mkdir(exist_ok=True)
    third.write_bytes(b"not an entry")
    writing = third.with_name(".x.raw.1.abcd.tmp")
    writing.write_bytes(b"half")
    assert survey(folder)[:3:2] == (4, 1), "the one that is being written is not counted"
    second.unlink()
    os.utime(mask, (OLD + 5, OLD + 5))
    assert survey(folder)[:3:2] == (4, 3)
    assert survey(folder, "outdated").removed == 3 and survey(folder)[:3:2] == (1, 0) and writing.exists()
    assert stored(cache, image)
    os.utime(writing, (OLD, OLD))
    monkeypatch.setattr(module, "pillow", "99.0")
    assert survey(folder)[:3:2] == (2, 2)
    assert not stored(cache, image), "another Pillow may decode to other pixels"
    found = survey(folder, "all")
    assert found.removed == 3 and found.removed_bytes == found.total
    assert not list(folder.glob("??/*")) and survey(folder) == (0,) * 6 == survey(tmp_path / "none")


def test_the_command_lists_and_deletes(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path))
    read(PictureCache(tmp_path / "pictures"), image)
    assert main(["data", "pictures"]) == 0
    assert "pictures: 1 files, 0.00 GB\noutdated or incomplete: 0," in capsys.readouterr().out
    image.unlink()
    assert main(["data", "pictures", "--remove", "outdated"]) == 0
    assert capsys.readouterr().out.endswith("incomplete: 1, 0.00 GB\ndeleted: 1, 0.00 GB\n")
    assert not list((tmp_path / "pictures").glob("??/*"))


# Its size


def test_the_size_that_is_said_is_that_of_the_files(
    photo_folder: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    root = photo_folder(12, labelled=4, val=2, sizes=(40, 120))
    for path in root.rglob("*.*"):
        aged(path)
    cfg = override(RunConfig(), {"data.dataset": "folder", "data.crop": 64, "runtime.data_root": str(root)})
    dataset = registry.load_dataset(*registry.dataset_spec(cfg))
    space = picture_space.picture_space(dataset)
    assert (len(space.images), len(space.masks)) == (10, 4) and space.missing() == space.total
    assert len(picture_space.picture_space(dataset, unlabelled=False).images) == 4
    both = picture_space.planned_space(
        (override(cfg, {"runtime.picture_cache": seed > 0, "seed": seed}), True) for seed in (0, 1, 2)
    )
    assert both == space, "each picture counts once"
    assert picture_space.planned_space([(cfg, True)]) is None
    cache = PictureCache(space.folder)
    assert dataset.files is not None
    for i in range(10):
        with cache.image(str(dataset.files.paths[i]), RGB_8):
            pass
    for i in dataset.labelled.tolist():
        with cache.mask(str(dataset.files.masks[i]), dataset.num_classes, dataset.masks.coding):  # type: ignore[attr-defined]
            pass
    there = [path.stat().st_size for path in space.folder.glob("??/*.raw")]
    assert len(there) == 14 and sum(there) == space.total
    assert {path.stat().st_size for path in space.masks} == set(space.masks.values())
    assert space.missing() == 0 and "to be written" in space.text()
    monkeypatch.setattr(picture_space.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    picture_space.refuse_full_disk(picture_space.picture_space(dataset))
    next(space.folder.glob("??/*.raw")).unlink()
    wanted = r"runtime.picture_cache = true: 10 images and 4 masks .* but 0.00 GB are free; free some"
    with pytest.raises(ValueError, match=wanted):
        picture_space.picture_notes(dataset, True)


def test_built_in_data_have_no_files_to_store() -> None:
    dataset = registry.load_dataset(*registry.dataset_spec(RunConfig()))
    with pytest.raises(ValueError, match=r"runtime.picture_cache = true: digits is not in files; set it to false"):
        picture_space.picture_space(dataset)


def test_the_benchmark_of_the_loader_runs(capsys: pytest.CaptureFixture[str]) -> None:
    bench = load_module(ROOT / "benchmarks" / "loader.py")
    small = {name: kind._replace(height=60, width=90, crop=48) for name, kind in bench.KINDS.items()}
    bench.KINDS.update(small)
    assert bench.main(["--rounds", "1", "--batches", "1", "--images", "2"]) in (0, 1)
    said = capsys.readouterr().out
    assert said.count("images a second and core") == 10 and said.count("aim") == 2
    pair = bench.Pair(Path("a"), Path("b"))
    assert [one.mask for one in bench.requests([pair], 0)] == ["b"] * 4 + [None] * 4
