"""What other programs and file systems leave in a folder of images: the right pixels, or one line with file and fix."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from viladiff.data.files.images import PaletteEncoding, read_image, read_mask
from viladiff.data.files.index import FOLDER, scan
from viladiff.data.files.validate import validate_dataset
from viladiff.data.formats.pillow_file import allow_pixels
from viladiff.data.sources.folder import read_classes

Make = Callable[..., Path]
COLOURS = PaletteEncoding(((0, 0, 0), (255, 0, 0), (0, 255, 0)), (0, 1, 2))
IDS = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_mask_that_jpeg_has_changed_is_refused_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    path, mask = tmp_path / f"a{suffix}", np.kron(IDS, np.ones((9, 9), np.uint8))
    if suffix == ".png":
        Image.fromarray(mask).save(path, "JPEG")
    else:
        tifffile.imwrite(path, mask, compression="jpeg")
    for coding in (None, COLOURS):
        with pytest.raises(ValueError, match=rf"a\{suffix}: a mask compressed as JPEG, .*; write it as PNG"):
            read_mask(path, 3, coding)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("first", [False, True])
def test_colours_of_an_array_are_classes_under_a_palette(tmp_path: Path, dtype: type, first: bool) -> None:
    mask = np.array(COLOURS.rgb)[np.kron(IDS, np.ones((4, 4), np.int64))].astype(dtype)
    np.save(tmp_path / "a.npy", mask.transpose(2, 0, 1) if first else mask)
    assert np.array_equal(read_mask(tmp_path / "a.npy", 3, COLOURS), np.kron(IDS, np.ones((4, 4), np.uint8)))


def test_colours_of_an_array_that_are_none(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((8, 8, 3), 256))
    with pytest.raises(ValueError, match=r"a\.npy: colours \(int64\) must be whole numbers from 0 to 255"):
        read_mask(tmp_path / "a.npy", 3, COLOURS)
    np.save(tmp_path / "b.npy", np.eye(3, dtype=np.uint8)[np.kron(IDS, np.ones((4, 4), np.int64))])
    with pytest.raises(ValueError, match=r"b\.npy: a mask of 3 bands; .*of a band a class, np\.argmax"):
        read_mask(tmp_path / "b.npy", 3)


def test_two_files_of_classes_must_agree(tmp_path: Path) -> None:
    (tmp_path / "palette.txt").write_text("0 0 0 ground\n255 0 0 tree\n9 9 9 void\n")
    (tmp_path / "classes.txt").write_text("ground\ntree\n")
    assert read_classes(tmp_path).names == ("ground", "tree")
    (tmp_path / "classes.txt").write_text("tree\nground\n")
    with pytest.raises(ValueError, match=r"palette\.txt has the classes ground, tree, and classes\.txt has tree, grou"):
        read_classes(tmp_path)


def test_what_is_no_file_is_refused_and_not_read(photo_folder: Make) -> None:
    root = photo_folder(4)
    os.mkfifo(root / "images" / "pipe.jpg")
    with pytest.raises(ValueError, match=r"pipe\.jpg: is no file but a pipe, a socket or a device; remove it"):
        scan(root, FOLDER)


def test_a_link_that_leads_to_itself_is_named(photo_folder: Make) -> None:
    root = photo_folder(4)
    (root / "images" / "a.jpg").symlink_to("b.jpg")
    (root / "images" / "b.jpg").symlink_to("a.jpg")
    with pytest.raises(
        ValueError, match=r"[ab]\.jpg: cannot be followed \(Too many levels of symbolic links\); remove"
    ):
        scan(root, FOLDER)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("labels/a.txt", "YOLO's polygons"),
        ("labels/train/a.txt", "YOLO's polygons"),
        ("images/a.json", "labelme's JSON"),
        ("Annotations/a.xml", "VOC's XML"),
        ("annotations.xml", "CVAT's"),
    ],
)
def test_annotations_of_other_programs_are_told_with_the_way_to_masks(photo_folder: Make, file: str, what: str) -> None:
    root = photo_folder(4)
    for path in (root / "masks").iterdir():
        path.unlink()
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    faults = [
        fault.reason for fault in validate_dataset(root, processes=1).faults if "nothing to learn" in fault.reason
    ]
    assert len(faults) == 1 and what in faults[0] and "data coco-masks --own" in faults[0]
    (root / "classes.txt").unlink()
    with pytest.raises(ValueError, match=rf"has no classes\.txt .*{what}.*coco-masks --own"):
        read_classes(root)


def test_a_tiled_tiff_beyond_pillows_limit_is_read_where_more_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 96), compression="zlib", photometric="rgb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"more than 2,000|exceeds limit"):
        read_image(tmp_path / "a.tif")
    with allow_pixels(64 * 96):
        assert np.array_equal(read_image(tmp_path / "a.tif"), pixels)
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("profile", [False, True])
def test_large_metadata_of_a_png_do_not_matter(tmp_path: Path, profile: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type xmp", "x" * 1_050_000, zip=True)
    more = {"icc_profile": b"\0" * 1_100_000} if profile else {"pnginfo": info}
    Image.fromarray(pixels).save(tmp_path / "a.png", **more)
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)


def test_blended_colours_of_a_mask_are_told_apart_from_a_forgotten_class(tmp_path: Path) -> None:
    mask = np.array(COLOURS.rgb, np.uint8)[np.kron(IDS, np.ones((9, 9), np.int64))]
    Image.fromarray(mask).resize((50, 40), Image.Resampling.BILINEAR).save(tmp_path / "blended.png")
    mask[2:4, 5] = 7, 7, 7
    Image.fromarray(mask).save(tmp_path / "more.png")
    with pytest.raises(
        ValueError, match=r"blended\.png: .*colours, as of blended edges: export masks without anti-alias"
    ):
        read_mask(tmp_path / "blended.png", 3, COLOURS)
    with pytest.raises(
        ValueError, match=r"more\.png: .*2 pixels .* \(7, 7, 7\) at row 2, column 5; .*a line of palette\.txt"
    ):
        read_mask(tmp_path / "more.png", 3, COLOURS)
