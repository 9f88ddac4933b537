"""Files and folders that people bring, as the issue lists of other projects have them: each is read right or named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from viladiff.config.pixel_format import RGB_8, PixelFormat
from viladiff.data.files.images import PaletteEncoding, image_size, read_image, read_mask
from viladiff.data.files.validate import validate_dataset
from viladiff.data.formats.tiff import read_tiff
from viladiff.data.sources.detect import open_tree

RGB = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
SMOOTH = np.linspace(0, 255, 24 * 32 * 3).reshape(24, 32, 3).astype(np.uint8)
"""What JPEG keeps."""
GREY16 = RGB[..., 0].astype(np.uint16) * 16


def mpo(path: Path) -> None:
    """Drones and telephones put a preview behind the picture."""
    first, second = Image.fromarray(SMOOTH), Image.fromarray(SMOOTH[::2, ::2])
    first.save(path, "MPO", save_all=True, append_images=[second], quality=100)


def other_name(path: Path) -> None:
    Image.fromarray(SMOOTH).save(path, "JPEG", quality=100)


def planar(path: Path) -> None:
    tifffile.imwrite(path, RGB.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate")


def cloud_optimised(path: Path) -> None:
    with tifffile.TiffWriter(path) as file:
        file.write(RGB, photometric="rgb", tile=(16, 16), compression="deflate")
        file.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
        file.write(np.full((24, 32), True), photometric="mask", subfiletype=4)


def compressed(kind: str) -> Callable[[Path], None]:
    return lambda path: tifffile.imwrite(path, RGB, photometric="rgb", compression=kind)


def arrays(numbers: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path, numbers)


@pytest.mark.parametrize(
    ("name", "make", "pixels", "wanted", "off"),
    [
        ("DJI_0001.JPG", mpo, RGB_8, SMOOTH, 2),
        ("really_a_jpeg.png", other_name, RGB_8, SMOOTH, 2),
        ("planar.tif", planar, RGB_8, RGB, 0),
        ("cog.tif", cloud_optimised, RGB_8, RGB, 0),
        ("zstd.tif", compressed("zstd"), RGB_8, RGB, 0),
        ("lzw.tif", compressed("lzw"), RGB_8, RGB, 0),
        ("jpeg2000.tif", compressed("jpeg2000"), RGB_8, RGB, 0),
        ("fortran.npy", arrays(np.asfortranarray(RGB)), RGB_8, RGB, 0),
        ("bigendian.npy", arrays(RGB.astype(">u2")), PixelFormat(value_range="8bit"), RGB / 255, 1e-6),
        ("half.npy", arrays((RGB / 255).astype(np.float16)), PixelFormat(value_range="0..1"), RGB / 255, 1e-3),
        ("nodata.npy", arrays(np.where(RGB < 9, -9999, RGB.astype(np.int16))), PixelFormat(value_range="0..255"),
         np.where(RGB < 9, 0, RGB) / 255, 1e-6),
    ],
)  # fmt: skip
def test_kinds_that_are_read(
    tmp_path: Path, name: str, make: Callable[[Path], None], pixels: PixelFormat, wanted: np.ndarray, off: float
) -> None:
    make(tmp_path / name)
    found = read_image(tmp_path / name, pixels)
    assert found.shape == wanted.shape and image_size(tmp_path / name) == (24, 32)
    assert np.abs(found.astype(float) - wanted).mean() <= off


def thumbnail(path: Path) -> None:
    tifffile.imwrite(path, RGB, photometric="rgb")
    tifffile.imwrite(path, RGB[::4, ::4], photometric="rgb", append=True)


def negative(path: Path) -> None:
    tifffile.imwrite(path, GREY16, photometric="miniswhite")


def deep_pnm(path: Path) -> None:
    path.write_bytes(b"P6 # 12 bits\n32 24 4095\n" + (RGB.astype(np.uint16) * 16).astype(">u2").tobytes())


def eight_bits(path: Path) -> None:
    Image.fromarray(RGB).save(path, "PNG")


@pytest.mark.parametrize(
    ("name", "make", "pixels", "message"),
    [
        ("thumbnail.tif", thumbnail, RGB_8, "its 2 pages differ in size or type"),
        ("negative.tif", negative, PixelFormat(value_range="12bit"), "0 is white in it"),
        ("deep.ppm", deep_pnm, PixelFormat(value_range="12bit"), "a PNM of more than 8 bits says itself"),
        ("mixed.png", eight_bits, PixelFormat(value_range="12bit"), "a file of uint8, which cannot hold"),
        ("complex.npy", arrays(RGB.astype(np.complex64)), PixelFormat(value_range="0..1"), "must be numbers"),
        ("text.npy", arrays(np.array([["a", "b"]])), RGB_8, "must be numbers"),
        ("volume.npy", arrays(np.zeros((3, 4, 5, 6))), RGB_8, r"must be numbers \(h, w\)"),
        ("real.npy", arrays(RGB / 255), RGB_8, "set data.value_range to the values that are black and white, as 0"),
        ("signed.npy", arrays(RGB.astype(np.int16) - 128), RGB_8, "data.value_range"),
    ],
)
def test_kinds_that_are_named(
    tmp_path: Path, name: str, make: Callable[[Path], None], pixels: PixelFormat, message: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        read_image(tmp_path / name, pixels)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# mine\nsky\ntree\n", "'# mine' is a comment, and each line is a class"),
        ("ground\nsky # blue\ntree\n", "'sky # blue': a comment would be a part .* write 'sky' alone"),
        ("1 sky\n2 tree\n", r"every name begins with a number \('1 sky'\)"),
        ("0: sky\n1: tree\n", "every name begins with a number"),
        ("sky, tree, road\n", "one line with commas"),
        ("sky\n", "names 1 classes"),
    ],
)
def test_names_that_would_move_or_join_classes(photo_folder: Callable[..., Path], text: str, message: str) -> None:
    root = photo_folder(4, sizes=(40, 50))
    (root / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"classes\.txt.*{message}"):
        open_tree(root)
    (root / "classes.txt").write_text("0\n1\n2\n3\n4\n5\n")
    assert open_tree(root)[1].names == ("0", "1", "2", "3", "4", "5"), "digits may be names"


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ({"images": "Images"}, "has no folder 'images' of images; did you mean 'Images'"),
        ({"images": "img_dir", "masks": "ann_dir"}, "has no folder 'images' of images; its folders: ann_dir, img_dir"),
        ({"classes.txt": "labelmap.txt"}, "of CVAT's labelmap.txt"),
    ],
)
def test_folders_of_other_projects_are_named(
    photo_folder: Callable[..., Path], moves: dict[str, str], message: str
) -> None:
    root = photo_folder(4, sizes=(40, 50))
    for old, new in moves.items():
        (root / old).rename(root / new)
    with pytest.raises(ValueError, match=message):
        open_tree(root)


def test_masks_of_other_projects_are_named(photo_folder: Callable[..., Path]) -> None:
    root = photo_folder(4, sizes=(40, 50))
    instances = np.full((40, 50), 300, np.uint16)
    tifffile.imwrite(root / "cells_masks.tif", instances)
    with pytest.raises(ValueError, match=r"2000 pixels are of no class \(300\)"):
        read_mask(root / "cells_masks.tif", 6)
    (root / "masks").rename(root / "labels")
    reasons = [fault.reason for fault in validate_dataset(root, processes=1).faults]
    assert any("there is no folder 'masks', but labels" in reason for reason in reasons)
    (root / "labels").rename(root / "masks")
    for path in list((root / "masks").iterdir()):
        Image.open(path).convert("RGB").save(path.with_suffix(".jpg"))
        path.rename(path.with_name(f"{path.stem}.jpg.png"))
    reasons = [fault.reason for fault in validate_dataset(root, processes=1).faults]
    assert reasons.count("is not read: masks are PNG files") == 2, "JPEG changes class ids"
    assert len(open_tree(root, mask_suffix=".jpg.png")[0].masks) == 2


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_a_mask_in_which_0_is_white_is_refused(tmp_path: Path, dtype: type) -> None:
    """Tifffile writes arrays of bool so unless it is told otherwise; Pillow reads them the other way round."""
    ids = RGB[..., 0] > 99
    tifffile.imwrite(tmp_path / "white.tif", ids.astype(dtype), photometric="miniswhite")
    with pytest.raises(ValueError, match=r"white\.tif: 0 is white in it .*'minisblack'"):
        read_mask(tmp_path / "white.tif", 2)
    tifffile.imwrite(tmp_path / "black.tif", ids.astype(dtype), photometric="minisblack")
    assert (read_mask(tmp_path / "black.tif", 2) == ids).all()
    shown = PaletteEncoding(((0, 0, 0), (255, 255, 255)), (1, 0))
    tifffile.imwrite(tmp_path / "colours.tif", ids, photometric="miniswhite")
    assert (read_mask(tmp_path / "colours.tif", 2, shown) == ids).all(), "the colour counts: black is class 1"


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_no_range_is_suggested_that_cannot_be_set(tmp_path: Path, number: float) -> None:
    np.save(tmp_path / "holes.npy", np.where(RGB < 9, number, RGB).astype(np.float32))
    with pytest.raises(ValueError, match=r"holes\.npy: [0-9]+ pixels are NaN or infinite; write a number"):
        read_image(tmp_path / "holes.npy")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.npy", "a.jpg"])
def test_an_empty_file_is_called_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    for read in (read_image, lambda path: read_mask(path, 2)):
        with pytest.raises(ValueError, match=rf"{name}: an empty file"):
            read(tmp_path / name)


def test_a_turn_that_no_size_shows_is_told(photo_folder: Callable[..., Path]) -> None:
    """Tools that draw masks often pass over EXIF; then an image turned by 180 degrees has its mask upside down."""
    root = photo_folder(4, sizes=(40, 50))
    assert not any("EXIF" in fault.reason for fault in validate_dataset(root, processes=1).faults)
    name = next(iter(open_tree(root)[0].masks))
    (image,) = (root / "images").glob(f"{name}.*")
    exif = Image.Exif()
    exif[0x112] = 3
    Image.open(image).save(image, exif=exif)
    (told,) = (fault for fault in validate_dataset(root, processes=1).faults if "EXIF" in fault.reason)
    assert told.level == "warning"
    assert told.reason.startswith(f"1 images are turned by EXIF, first {name!r}") and "upright" in told.reason


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_animations_are_listed_with_the_other_errors(photo_folder: Callable[..., Path], suffix: str) -> None:
    root = photo_folder(4, sizes=(40, 50))
    name = next(iter(open_tree(root)[0].images))
    (image,) = (root / "images").glob(f"{name}.*")
    frames = [Image.open(image).convert("RGB"), Image.new("RGB", Image.open(image).size)]
    image.unlink()
    frames[0].save(root / f"images/{name}{suffix}", save_all=True, append_images=frames[1:])
    errors = [fault for fault in validate_dataset(root, processes=1).faults if "animation" in fault.reason]
    assert [(fault.level, Path(fault.path).name) for fault in errors] == [("error", f"{name}{suffix}")]


@pytest.mark.timeout(60)
def test_pages_that_lead_back_to_the_first_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB[..., 0])
    data = bytearray(path.read_bytes())
    first = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[first : first + 2], "little")
    end = first + 2 + 12 * count
    data[end : end + 4] = data[4:8]
    path.write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read: page 2 of it is one of those before"):
        read_tiff(path)
    assert np.array_equal(read_image(path, RGB_8)[..., 0], RGB[..., 0])
