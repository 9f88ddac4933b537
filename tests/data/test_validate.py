"""``viladiff data check`` and ``split``: what they find is what is there, and nothing half-written stays behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from viladiff.cli import main
from viladiff.data import registry
from viladiff.data.files import make_split
from viladiff.data.files import validate as module
from viladiff.data.files.images import read_mask
from viladiff.data.files.validate import DatasetReport, inspect_images, validate_dataset
from viladiff.data.sources.detect import open_tree
from viladiff.report import dataset_page

Make = Callable[..., Path]


def reasons(report: DatasetReport, level: str = "error") -> dict[str, str]:
    return {Path(fault.path).name: fault.reason for fault in report.faults if fault.level == level}


def test_counts_sizes_and_the_histogram_are_those_of_the_files(photo_folder: Make) -> None:
    root = photo_folder(24, "voc")
    heard: list[tuple[int, int]] = []
    report = validate_dataset(root, processes=1, advance=lambda done, of: heard.append((done, of)))
    pixels, shown, sizes = np.zeros(256, int), np.zeros(256, int), []
    for path in (root / "JPEGImages").iterdir():
        with Image.open(path) as image:
            sizes.append(image.size[::-1])
    for path in (root / "SegmentationClass").iterdir():
        with Image.open(path) as image:
            found = np.bincount(np.asarray(image).ravel(), minlength=256)
        pixels, shown = pixels + found, shown + (found > 0)
    assert np.array_equal(report.pixels(), pixels) and np.array_equal(report.images(), shown)
    assert sorted(report.sizes().elements()) == sorted(sizes) and report.errors == 0
    assert [split.counts for split in report.splits] == [(6, 12, 6)] and report.splits[0].name == "92"
    assert heard == [(16, 24), (24, 24)]
    rows = dataset_page.class_rows(report)
    assert sum(row["share"] for row in rows[:21]) == pytest.approx(100)
    assert rows[16]["share"] == pytest.approx(100 * pixels[16] / pixels[:255].sum())
    assert rows[-1]["name"] == "ignored" and rows[-1]["share"] == pytest.approx(100 * pixels[255] / pixels.sum())


def test_two_processes_find_what_one_does(photo_folder: Make) -> None:
    root = photo_folder(40)
    (root / "images" / "flower_0004.jpg").write_bytes(b"\xff\xd8\xff")
    one, two = (validate_dataset(root, processes=count) for count in (1, 2))
    assert one.seen == two.seen and one.faults == two.faults and one.errors == 1


def test_each_fault_is_named_with_its_reason(photo_folder: Make, photographs: ModuleType) -> None:
    root = photo_folder(16, labelled=6)
    images, masks = root / "images", root / "masks"
    whole = (images / "china_0000.jpg").read_bytes()
    (images / "china_0000.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    labels = read_mask(masks / "flower_0001.png", 6)
    photographs.save_mask(masks / "flower_0001.png", labels[:, 1:])
    photographs.save_mask(masks / "grace_0002.png", np.full_like(read_mask(masks / "grace_0002.png", 6), 99))
    photographs.save_mask(masks / "china_0003.png", np.full_like(read_mask(masks / "china_0003.png", 6), 255))
    (masks / "flower_0004.png").write_bytes(b"no mask")
    photographs.save_mask(masks / "lost.png", labels)
    shutil.copy(images / "grace_0005.jpg", masks / "grace_0005.jpg")
    (root / "splits" / "typo.txt").write_text("china_0000\nchina_9999\n")
    shutil.copy(root / "splits" / "labelled" / "val.txt", root / "splits" / "val.txt")
    report = validate_dataset(root, processes=1)
    errors, warnings = reasons(report), reasons(report, "warning")
    assert "truncated" in errors.pop("china_0000.jpg")
    height, width = labels.shape
    wanted = f"the mask is {width - 1} x {height} pixels (width x height), its image {width} x {height}"
    assert errors.pop("flower_0001.png") == wanted
    assert "pixels are of no class (99); allowed: 0 ... 5" in errors.pop("grace_0002.png")
    assert "not an image of a known format" in errors.pop("flower_0004.png")
    assert "'china_9999' is not an image of 'images'" in errors.pop("typo")
    assert errors == {} and report.errors == 5
    assert warnings.pop("china_0003.png") == "every pixel is 255: nothing is labelled"
    assert warnings.pop("lost.png") == "there is no image of this name"
    assert warnings.pop("grace_0005.jpg") == "is not read: masks are PNG files"
    assert set(warnings) <= {"masks"}
    assert [split.name for split in report.splits] == ["labelled"]


def test_a_class_that_never_occurs_and_masks_without_a_label(photo_folder: Make, photographs: ModuleType) -> None:
    root = photo_folder(6)
    (root / "classes.txt").write_text("\n".join([*photographs.CLASSES, "unicorn"]))
    assert "unicorn" in reasons(validate_dataset(root, processes=1))["masks"]
    for path in (root / "masks").iterdir():
        photographs.save_mask(path, np.full_like(read_mask(path, 7), 255))
    assert "every pixel of all 2 masks is 255" in reasons(validate_dataset(root, processes=1))["masks"]
    shutil.rmtree(root / "masks")
    found = reasons(validate_dataset(root, processes=1))
    assert found["masks"] == "there is no mask that can be read, so nothing to learn from"


def test_masks_of_0_and_255_are_a_trap(photo_folder: Make) -> None:
    root = photo_folder(6)
    (root / "classes.txt").write_text("ground\ntree\n")
    for path in (root / "masks").iterdir():
        labels = read_mask(path, 6)
        Image.fromarray(np.where(labels == labels[0, 0], 0, 255).astype(np.uint8)).save(path)
    found = [fault.reason for fault in validate_dataset(root, processes=1).faults if "palette.txt" in fault.reason]
    assert len(found) == 1 and "'0 0 0 ground' and '255 255 255 tree'" in found[0]
    (root / "palette.txt").write_text("0 0 0 ground\n255 255 255 tree\n")
    report = validate_dataset(root, processes=1)
    assert report.errors == 0 and report.pixels()[1] > 0 and report.pixels()[255] == 0


def test_a_process_that_dies_is_an_error(photo_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "inspect_image", lambda *job: os._exit(9))
    tree, classes = open_tree(photo_folder(40))
    with pytest.raises(ValueError, match=r"one of the 2 processes that read images has died.*--processes 1"):
        inspect_images(tree, classes, 2)


def test_processes_end_with_the_one_that_asked_for_them(photo_folder: Make) -> None:
    root = photo_folder(40)
    script = (
        "import os, sys, time\n"
        "from viladiff.data.files import validate\nfrom viladiff.data.sources import detect\n"
        "def look(*job):\n"
        "    os.write(1, b'%d\\n' % os.getpid())\n"
        "    time.sleep(60)\n"
        "validate.inspect_image = look\n"
        "validate.inspect_images(*detect.open_tree(sys.argv[1]), 2)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = {int(parent.stdout.readline()) for _ in range(2)}
    assert len(children) == 2 and parent.pid not in children
    parent.kill()
    assert parent.stdout.read() == "", "the pipe closes once nobody holds it"
    parent.wait()


def test_the_page_escapes_names_and_shows_every_fault(photo_folder: Make, tmp_path: Path) -> None:
    root = photo_folder(12)
    (root / "classes.txt").write_text("background\nsky\nbuilding\n<b>foliage\nflower\nperson\n")
    (root / "images" / "<script>alert(1)<.jpg").write_bytes(b"x")
    page = dataset_page.write_page(validate_dataset(root, processes=1), tmp_path / "page", "viladiff data check photos")
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;alert(1)&lt;.jpg" in text and "&lt;b&gt;foliage" in text
    assert "1 file or list would stop a run" in text and "not an image of a known format" in text
    with Image.open(tmp_path / "page" / "mosaic.png") as mosaic, Image.open(tmp_path / "page" / "images.png") as images:
        assert mosaic.size == images.size == (6 * 196 - 4, 192)
        changed = (np.asarray(mosaic) != np.asarray(images)).any(-1)
        assert 0 < changed.mean() < 1  # labels over the same images; background is as it was
    assert text.count('class="wipe"') == 1 and 'type="range"' in text


def test_an_overlay_is_the_class_colour_over_the_image() -> None:
    image = np.full((2, 3, 3), 100, np.uint8)
    labels = np.array([[0, 1, 2], [0, 255, 1]], np.uint8)
    found = dataset_page.overlay(image, labels, 3)
    colours = dataset_page.colormap.class_colours(3)
    assert (found[:, 0] == 100).all(), "background is left as it is"
    assert np.abs(found[0, 2] - (0.55 * colours[2] + 45)).max() <= 0.5
    assert len(np.unique(found[1, 1])) == 1 or found[1, 1, 2] - found[1, 1, 0] < 10, "ignored is grey"


def run(*words: object) -> int:
    return main.main(["data", *map(str, words), "--quiet"])


def test_the_commands(photo_folder: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = photo_folder(24, unlabelled_masks=True)
    shutil.rmtree(root / "splits")
    assert run("check", root, "--out", tmp_path / "page", "--processes", 1) == 0
    said = capsys.readouterr().out
    assert "no lists of images yet; `viladiff data split` makes some" in said
    assert str(tmp_path / "page" / "index.html") in said and "foliage" in said
    assert run("split", root, "--labelled", 6, "--val", 0.25, "--processes", 1) == 0
    assert "6 labelled, 12 unlabelled, 6 validation images" in capsys.readouterr().out
    assert run("check", root, "--out", tmp_path / "page", "--processes", 1) == 0
    said = capsys.readouterr().out
    assert "data.split=labelled: 6 labelled, 12 unlabelled, 6 validation images" in said and "error" not in said
    data = registry.load_dataset("folder", "labelled", root=str(root))
    assert (len(data.labelled), len(data.unlabelled), len(data.val_images)) == (6, 12, 6)
    (root / "images" / "china_0000.jpg").write_bytes(b"")
    assert run("check", root, "--out", tmp_path / "page", "--processes", 1) == 1
    assert "error: " in capsys.readouterr().out
    assert run("check", tmp_path / "nowhere") == 2
    assert "there is no such directory" in capsys.readouterr().err


# Lists


def make_lists(root: Path, labelled: int | None = 6, val: float | None = 4, seed: int = 0) -> make_split.NewSplit:
    tree, classes = open_tree(root)
    return make_split.make_split(root, inspect_images(tree, classes, 1), labelled, val, seed)


def test_lists_are_seeded_disjoint_and_cover_every_class(photo_folder: Make) -> None:
    root = photo_folder(48, unlabelled_masks=True, sizes=(90, 200))
    found = [make_lists(root, 8, 8, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    for one in found:
        parts = [set(part) for part in one.lists]
        assert [len(part) for part in parts] == [8, 32, 8] and len(set.union(*parts)) == 48
        assert one.uncovered == {}
        for part in (one.lists.labelled, one.lists.val):
            shown = {int(k) for name in part for k in np.unique(read_mask(root / "masks" / f"{name}.png", 6))}
            assert shown == set(range(6))


def test_a_rare_class_is_labelled_first_then_validated_on() -> None:
    present = np.zeros((200, 4), bool)
    present[:, 0] = True
    present[[7, 90], 2] = True
    present[[7, 8, 9, 10], 3] = True
    for seed in range(20):
        first, last = make_split.draw_split(present, 5, 5, seed)
        assert len({*first, *last}) == 10
        assert present[first][:, [0, 2, 3]].any(0).all() and present[last][:, [0, 2, 3]].any(0).all()
        assert len({7, 90} & {*first}) == 1 and len({7, 90} & {*last}) == 1
    assert len({tuple(make_split.draw_split(present, 5, 5, seed)[0]) for seed in range(20)}) > 10
    first, last = make_split.draw_split(present, 1, 1, 0)
    assert len(first) == len(last) == 1


def test_the_last_image_that_shows_a_class_is_left_to_validation() -> None:
    """Image 3, for the third class, also shows the second; then 0, which shows the first, is the second one's last."""
    present = np.array([(1, 1, 0), (1, 0, 0), (1, 0, 0), (0, 1, 1)], bool)
    for seed in range(20):
        first, last = make_split.draw_split(present, 2, 1, seed)
        assert 3 in first and last == [0]


def test_what_cannot_be_labelled_is_left_unlabelled(photo_folder: Make, photographs: ModuleType) -> None:
    root = photo_folder(16, unlabelled_masks=True)
    (root / "masks" / "china_0000.png").unlink()
    photographs.save_mask(root / "masks" / "flower_0001.png", np.full((9, 9), 1, np.uint8))
    path = root / "masks" / "grace_0002.png"
    photographs.save_mask(path, np.full_like(read_mask(path, 6), 255))
    found = make_lists(root, None, 0.2)
    assert set(found.lists.unlabelled) == {"china_0000", "flower_0001", "grace_0002"}
    assert (len(found.lists.labelled), len(found.lists.val)) == (10, 3)


def test_a_validation_list_that_exists_is_kept(photo_folder: Make) -> None:
    root = photo_folder(16, unlabelled_masks=True)
    shutil.move(root / "splits" / "labelled" / "val.txt", root / "splits" / "val.txt")
    kept = make_lists(root, 4, None)
    assert kept.lists.val == tuple((root / "splits" / "val.txt").read_text().split())
    assert kept.kept_val is not None and not {*kept.lists.labelled} & {*kept.lists.val}
    assert make_lists(root, 4, 4).kept_val is None


@pytest.mark.parametrize(
    ("labelled", "val", "message"),
    [
        (13, 4, "16 images have a valid mask, but 13 labelled and 4 validation images are asked for"),
        (0, 4, "--labelled 0: must be a whole number, 1 or more"),
        (-3, 4, "--labelled -3: must be a whole number, 1 or more"),
        (None, 16, "16 images have a valid mask"),
        (4, 0, r"--val 0: must be a share between 0 and 1, or a whole number"),
        (4, 2.5, r"--val 2\.5: must be a share"),
        (4, -1, r"--val -1: must be a share"),
    ],
)
def test_impossible_numbers_are_refused(photo_folder: Make, labelled: int | None, val: float, message: str) -> None:
    root = photo_folder(16, unlabelled_masks=True)
    with pytest.raises(ValueError, match=message):
        make_lists(root, labelled, val)


def test_one_image_cannot_be_split(photo_folder: Make) -> None:
    root = photo_folder(2, unlabelled_masks=True)
    (root / "images" / "flower_0001.jpg").unlink()
    with pytest.raises(ValueError, match="1 images have a valid mask, but 1 labelled and 1 validation"):
        make_lists(root, None, None)


@pytest.mark.parametrize("name", [" a", "a\nb", "a\tb", os.fsdecode(b"a\xff"), "images/a"])
def test_names_that_no_list_can_hold(photo_folder: Make, capsys: pytest.CaptureFixture[str], name: str) -> None:
    root = photo_folder(8)
    (root / "images" / "images").mkdir()
    shutil.copy(root / "images" / "china_0000.jpg", root / "images" / f"{name}.jpg")
    assert main.main(["data", "split", str(root), "--name", "other", "--labelled", "2", "--processes", "1"]) != 0
    told = capsys.readouterr().err
    assert "no list can hold this name; rename the image" in told and str(root / "images") in told
    assert not (root / "splits" / "other").exists()


def test_lists_are_written_whole_or_not_at_all(photo_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = photo_folder(16, unlabelled_masks=True)
    lists = make_lists(root).lists
    before = sorted(path.name for path in (root / "splits").iterdir())
    with pytest.raises(ValueError, match="labelled: exists already; choose another --name"):
        make_split.write_lists(root, "labelled", lists)
    for name in ("../up", "", "a/b", ".."):
        with pytest.raises(ValueError, match="must be a single name"):
            make_split.write_lists(root, name, lists)
    real, calls = Path.write_text, []

    def full(path: Path, *args: Any, **options: Any) -> int:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match=r"other: the lists cannot be written \(No space left on device\)"):
        make_split.write_lists(root, "other", lists)
    assert sorted(path.name for path in (root / "splits").iterdir()) == before
    monkeypatch.undo()
    make_split.write_lists(root, "other", lists)
    assert registry.load_dataset("folder", "other", root=str(root)).files.ids[:6] == lists.labelled  # type: ignore[union-attr]


def test_a_directory_that_cannot_be_written(
    photo_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photo_folder(12, unlabelled_masks=True)

    def read_only(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert run("check", root, "--out", tmp_path / "page", "--processes", 1) == 2
    assert "page: cannot be written (Read-only file system); name another with --out" in capsys.readouterr().err
    assert run("split", root, "--labelled", 4, "--name", "b", "--processes", 1) == 2
    assert "the lists cannot be written (Read-only file system)" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(dataset_page, "write_atomically", read_only)
    assert run("check", root, "--out", tmp_path / "page", "--processes", 1) == 2
