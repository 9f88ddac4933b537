"""Depth and channels of image files: each kind gives the right numbers, or names the field that decides."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from viladiff.config.pixel_format import PixelFormat, parse_value_range
from viladiff.data.decode_workers import CropRecipe, DecodeRequest, DecodeWorkers, decode_all
from viladiff.data.files import images
from viladiff.data.files.images import image_size, pixels_of_array, read_image, read_mask
from viladiff.data.formats.bands import decoded_rgb
from viladiff.data.formats.pillow_file import limit_pixels
from viladiff.data.formats.values import displayed
from viladiff.data.registry import dataset_spec, load_dataset
from viladiff.data.transforms.augment import IMAGENET_MEAN, IMAGENET_STD, normalise, of_channels, strong
from viladiff.data.transforms.geometry import crop_image, window
from viladiff.models.encoders.build import build_encoder
from viladiff.runs.config import RunConfig, override

RAMP = np.linspace(0, 4095, 24 * 32).round().astype(np.uint16).reshape(24, 32)
"""12 bits."""
TWELVE = PixelFormat(value_range="12bit")


def bands(count: int, dtype: type = np.uint8) -> np.ndarray:
    """(24, 32, count), each band another."""
    rng = np.random.default_rng(count)
    return rng.integers(0, 250, (24, 32, count)).astype(dtype) + np.arange(count).astype(dtype)


def write(path: Path, numbers: np.ndarray) -> Path:
    """Write an array as the suffix says."""
    if path.suffix == ".npy":
        np.save(path, numbers)
    elif path.suffix == ".tif":
        # Bands of a pixel together, as instruments and GIS write them.
        kind = "rgb" if numbers.ndim == 3 and numbers.shape[2] == 3 else "minisblack"
        tifffile.imwrite(path, numbers, photometric=kind, planarconfig="contig" if numbers.ndim == 3 else None)
    else:
        path.write_bytes(imagecodecs.png_encode(numbers))
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.npy"])
def test_12_bits_in_16_come_out_as_declared_and_are_refused_undeclared(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, RAMP)
    found = read_image(path, TWELVE)
    assert found.dtype == np.float32 and found.shape == (24, 32, 3) and image_size(path) == (24, 32)
    assert np.allclose(found, RAMP[..., None] / 4095, atol=1e-6), "black is 0, 4095 is white, and no level is lost"
    assert len(np.unique(found)) == len(np.unique(RAMP))
    with pytest.raises(ValueError, match=rf"{name}: grey values 0 ... 4095 \(uint16\).*data\.value_range.*12bit"):
        read_image(path)
    with pytest.raises(ValueError, match=rf"{name}: values 0 ... 4095, and data\.value_range = '10bit' has 0 ... 1023"):
        read_image(path, PixelFormat(value_range="10bit"))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_0_to_255_in_wider_numbers(tmp_path: Path, dtype: type) -> None:
    grey = np.arange(24 * 32).reshape(24, 32) % 256
    path = write(tmp_path / "a.tif", grey.astype(dtype))
    wanted = np.repeat((grey / 255)[..., None], 3, 2)
    assert np.allclose(read_image(path, PixelFormat(value_range="0..255")), wanted)
    if dtype is not np.float32:
        assert np.allclose(read_image(path, PixelFormat(value_range="8bit")), wanted)
    with pytest.raises(ValueError, match=r"a\.tif: grey values 0 \.\.\. 255 .*data\.value_range"):
        read_image(path)


def test_12_bits_of_colours_in_a_png_of_16(tmp_path: Path) -> None:
    colours = np.dstack([RAMP, RAMP[::-1], RAMP // 2])
    path = write(tmp_path / "a.png", colours)
    assert np.allclose(read_image(path, TWELVE), colours / 4095, atol=1e-6)
    with pytest.raises(ValueError, match=r"data\.value_range"):
        read_image(path)
    full = write(tmp_path / "full.png", colours * 16)
    assert np.abs(read_image(full) - colours * (16 / 257)).max() <= 0.5, "the highest bit is used: 16 bits"


def test_windows_percentiles_and_their_ends(tmp_path: Path) -> None:
    hounsfield = np.linspace(-1024, 3000, 24 * 32).reshape(24, 32)
    path = write(tmp_path / "a.npy", hounsfield.astype(np.int16))
    found = read_image(path, PixelFormat(channels=1, value_range="-1000..400"))[..., 0]
    assert np.allclose(found, np.clip((hounsfield.astype(np.int16) + 1000) / 1400, 0, 1), atol=1e-6)
    scaled = read_image(path, PixelFormat(channels=1, value_range="p1..p99"))
    low, high = np.percentile(hounsfield.astype(np.int16), [1, 99])
    assert np.allclose(scaled[..., 0], np.clip((hounsfield.astype(np.int16) - low) / (high - low), 0, 1), atol=1e-6)
    both = PixelFormat(channels=2, value_range="0..255,-10..10")
    height = np.dstack([bands(1)[..., 0], np.linspace(-10, 10, 24 * 32).reshape(24, 32)])
    found = read_image(write(tmp_path / "b.npy", height.astype(np.float32)), both)
    assert np.allclose(found[..., 1], (height[..., 1] + 10) / 20, atol=1e-6)
    assert np.allclose(found[..., 0], height[..., 0] / 255, atol=1e-6)


def test_pixels_that_are_no_number_are_refused(tmp_path: Path) -> None:
    real = np.ones((4, 5), np.float32)
    real[1, 2], real[3, 3] = np.nan, np.inf
    for name in ("a.tif", "a.npy"):
        with pytest.raises(ValueError, match=rf"{name}: 2 pixels are NaN or infinite"):
            read_image(write(tmp_path / name, real), PixelFormat(value_range="0..1"))


@pytest.mark.parametrize("count", [2, 4, 5, 12])
@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_no_band_is_lost(tmp_path: Path, count: int, suffix: str) -> None:
    numbers = bands(count)
    path = write(tmp_path / f"a{suffix}", numbers)
    found = read_image(path, PixelFormat(channels=count))
    assert found.dtype == np.uint8 and np.array_equal(found, numbers)
    chosen = read_image(path, PixelFormat(bands=(count, 1)))
    assert np.array_equal(chosen, numbers[..., [count - 1, 0]])
    with pytest.raises(ValueError, match=rf"a\{suffix}: {count} bands: set data\.channels={count} .*data\.bands=1,2"):
        read_image(path)
    with pytest.raises(ValueError, match=rf"{count} bands, and data\.channels = 7"):
        read_image(path, PixelFormat(channels=7))


def test_infrared_that_gdal_marks_as_transparency_is_no_transparency(tmp_path: Path) -> None:
    numbers = bands(4)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, numbers, photometric="rgb", extrasamples=["unassalpha"])
    with pytest.raises(
        ValueError, match=r"a\.tif.*band 4 is marked as transparency.*data\.bands=1,2,3.*data\.channels=4"
    ):
        read_image(path)
    assert np.array_equal(read_image(path, PixelFormat(channels=4)), numbers)
    assert np.array_equal(read_image(path, PixelFormat(bands=(4, 1, 2))), numbers[..., [3, 0, 1]])
    tifffile.imwrite(path, numbers, photometric="rgb", extrasamples=["unspecified"])
    with pytest.raises(ValueError, match=r"a\.tif: 4 bands: set data\.channels=4"):
        read_image(path)
    numbers[..., 3] = 255
    tifffile.imwrite(path, numbers, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(read_image(path), numbers[..., :3]), "of which nothing is seen"


@pytest.mark.parametrize("plan", ["contig", "separate", "pages", "compressed", "big", "imagej", "overview"])
def test_tiffs_of_every_layout(tmp_path: Path, plan: str) -> None:
    numbers, path = bands(5, np.uint16), tmp_path / "a.tif"
    first = np.ascontiguousarray(numbers.transpose(2, 0, 1))
    if plan == "contig":
        tifffile.imwrite(path, numbers, photometric="minisblack", planarconfig="contig")
    elif plan == "separate":
        tifffile.imwrite(path, first, photometric="minisblack", planarconfig="separate")
    elif plan == "pages":
        Image.fromarray(first[0]).save(path, save_all=True, append_images=[Image.fromarray(one) for one in first[1:]])
    elif plan == "compressed":
        options = {"compression": "lzw", "predictor": True, "tile": (16, 16)}
        tifffile.imwrite(path, numbers, photometric="minisblack", planarconfig="contig", **options)
    elif plan == "big":
        tifffile.imwrite(path, numbers, photometric="minisblack", planarconfig="contig", bigtiff=True)
    elif plan == "imagej":
        tifffile.imwrite(path, first, imagej=True, metadata={"axes": "CYX"})
    else:
        with tifffile.TiffWriter(path) as file:
            file.write(numbers, photometric="minisblack", planarconfig="contig")
            file.write(numbers[::2, ::2], photometric="minisblack", planarconfig="contig", subfiletype=1)
    found = read_image(path, PixelFormat(channels=5, value_range="8bit"))
    assert np.allclose(found * 255, numbers) and image_size(path) == (24, 32)


def test_pages_are_channels_only_if_a_field_says_so(tmp_path: Path) -> None:
    pages = bands(3).transpose(2, 0, 1)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ascontiguousarray(pages), photometric="minisblack")
    with pytest.raises(ValueError, match=r"a\.tif: 3 pages, 3 bands in all: set data\.channels=3"):
        read_image(path)
    assert np.array_equal(read_image(path, PixelFormat(channels=3)), pages.transpose(1, 2, 0))
    frames = [Image.fromarray(bands(3)), Image.fromarray(bands(3)[::-1])]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(ValueError, match=r"a\.webp: an animation of 2 frames"):
        read_image(tmp_path / "a.webp")


def test_files_of_8_bits_under_declared_channels(tmp_path: Path) -> None:
    colours = bands(3)
    Image.fromarray(colours).save(tmp_path / "a.png")
    Image.fromarray(colours[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([colours, colours[..., 0]])).save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "grey.png", PixelFormat(channels=1)), colours[..., :1])
    assert np.array_equal(read_image(tmp_path / "a.png", PixelFormat(bands=(1,))), colours[..., :1])
    assert np.array_equal(read_image(tmp_path / "rgba.png", PixelFormat(channels=3)), colours)
    assert np.array_equal(read_image(tmp_path / "rgba.png", PixelFormat(channels=4))[..., 3], colours[..., 0])
    with pytest.raises(ValueError, match=r"3 bands, and data\.channels = 1 \(data\.bands=1 takes the first alone\)"):
        read_image(tmp_path / "a.png", PixelFormat(channels=1))


def test_a_deep_png_is_turned_by_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP).save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png", PixelFormat(channels=1, value_range="12bit"))
    assert found.shape == (32, 24, 1) == (*image_size(tmp_path / "a.png"), 1)
    assert np.allclose(found[..., 0], np.rot90(RAMP, -1) / 4095, atol=1e-6)


def test_arrays_carry_no_code_and_have_their_channels_last_or_first(tmp_path: Path) -> None:
    np.save(tmp_path / "code.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"code\.npy: cannot be read as an array"):
        read_image(tmp_path / "code.npy")
    first = write(tmp_path / "first.npy", bands(5).transpose(2, 0, 1))
    assert np.array_equal(read_image(first, PixelFormat(channels=5)), bands(5))
    with pytest.raises(ValueError, match=r"volume\.npy: .*must be numbers \(h, w\)"):
        read_image(write(tmp_path / "volume.npy", np.zeros((2, 3, 4, 5))))
    (tmp_path / "half.npy").write_bytes(first.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"half\.npy: cannot be read"):
        read_image(tmp_path / "half.npy", PixelFormat(channels=5))


def test_an_array_is_read_as_a_file_of_it(tmp_path: Path) -> None:
    numbers, pixels = bands(5, np.uint16), PixelFormat(channels=5, bands=(5, 2), value_range="8bit")
    file = write(tmp_path / "a.npy", numbers)
    assert np.array_equal(pixels_of_array(numbers, pixels), read_image(file, pixels))


def test_what_pictures_show() -> None:
    image = bands(5)
    assert np.array_equal(displayed(image, PixelFormat(channels=5)), np.repeat(image[..., :1], 3, 2)), "the first"
    chosen = PixelFormat(channels=5, shown=(4, 2, 1))
    assert np.array_equal(displayed(image, chosen), image[..., [3, 1, 0]])
    assert np.array_equal(displayed(image.astype(np.float32) / 255, chosen), image[..., [3, 1, 0]])


@pytest.mark.parametrize(
    "text", ["", "12", "33bit", "0bit", "5..5", "p5..p1", "p1..p101", "a..b", "0..1;2..3", "0..inf"]
)
def test_ranges_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"value_range = .*must be a depth as 12bit"):
        parse_value_range(text)


def test_crops_of_channels_are_those_of_colours(tmp_path: Path) -> None:
    colours = bands(3)
    five = np.dstack([colours, colours[..., :2]])
    to = window((24, 32), 40, (0.5, 2.0), 0.5, (0.9, 0.2, 0.4, 0.1))
    wanted, found, real = np.empty((3, 40, 40), np.uint8), np.empty((5, 40, 40), np.uint8), np.empty((5, 40, 40), "f4")
    crop_image(colours, to, wanted)
    crop_image(five, to, found)
    crop_image(five.astype(np.float32) / 255, to, real)
    assert np.array_equal(found, wanted[[0, 1, 2, 0, 1]])
    assert np.abs(real * 255 - found).max() <= 1, "but for the rounding of 8 bits"


def test_processes_decode_the_same_channels(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.tif", bands(5, np.uint16) + i) for i in range(3)]
    pixels = PixelFormat(channels=5, bands=(5, 1), value_range="8bit")
    recipe = CropRecipe(16, (0.5, 2.0), 0.5, 2, None, pixels)
    asked = [DecodeRequest(str(path), None, (0.3, 0.5, 0.7, 0.2)) for path in files]
    wanted = decode_all(asked, recipe).images
    assert wanted.shape == (3, 2, 16, 16) and wanted.dtype == np.float32 and 0.4 < wanted.mean() < 0.6
    workers = DecodeWorkers(recipe, 2, 3, 1)
    try:
        assert np.array_equal(workers.take(asked).images, wanted)
    finally:
        workers.close()


def test_a_field_sets_the_largest_image_in_every_thread_and_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    path = write(tmp_path / "a.png", bands(3))
    asked, recipe = [DecodeRequest(str(path), None, (0.3, 0.5, 0.7, 0.2))], CropRecipe(16, (1.0, 1.0), 0.0, 2, None)
    wanted = decode_all(asked, recipe).images
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    request.addfinalizer(lambda: limit_pixels(None))
    cfg = override(RunConfig(), {"runtime.max_pixels": 24 * 32})
    for most in (cfg.runtime.max_pixels, 24 * 32 - 1):
        limit_pixels(None)
        with pytest.raises(ValueError, match=r"raise runtime\.max_pixels"):
            read_image(path)
        load_dataset(*dataset_spec(cfg)._replace(max_pixels=most))
        workers = DecodeWorkers(recipe._replace(max_pixels=most), 1, 1, 1)
        with closing(workers), ThreadPoolExecutor(1) as pool:
            if most == 24 * 32:
                assert pool.submit(read_image, path).result().shape == (24, 32, 3)
                assert np.array_equal(workers.take(asked).images, wanted)
                continue
            for read in (pool.submit(read_image, path).result, partial(workers.take, asked)):
                with pytest.raises(ValueError, match=r"32 x 24 pixels, more than 767 .*runtime\.max_pixels"):
                    read()


def test_colour_changes_of_other_channels() -> None:
    images = torch.rand(6, 5, 24, 24, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    found = strong(images, [np.random.default_rng(i) for i in range(6)], p_jitter=1, p_gray=1, p_blur=0)
    assert torch.equal(images, before) and found.shape == images.shape
    for i, image in enumerate(images):
        drawn = np.random.default_rng(i)
        amounts, order = 2 * drawn.random(8)[3:5] - 1, drawn.permutation(4)
        for operation in [int(one) for one in order if one < 2]:
            factor = 1 + 0.5 * float(amounts[operation])
            mean = image.mean((1, 2), keepdim=True) if operation else torch.zeros(5, 1, 1)
            image = (mean + factor * (image - mean)).clamp(0, 1)
        assert torch.allclose(found[i], image, atol=1e-5), "brightness and contrast alone; no grey, hue, saturation"


def test_units_of_channels_are_those_of_colours_in_turn() -> None:
    assert of_channels(IMAGENET_MEAN, 3) == IMAGENET_MEAN
    assert of_channels(IMAGENET_MEAN, 5) == (*IMAGENET_MEAN, *IMAGENET_MEAN[:2])
    assert of_channels(IMAGENET_MEAN, 1) == pytest.approx((0.449,), abs=1e-6)
    found = normalise(torch.full((1, 4, 1, 1), 0.5)).flatten()
    assert found.tolist() == pytest.approx([(0.5 - IMAGENET_MEAN[i % 3]) / IMAGENET_STD[i % 3] for i in range(4)])


def test_pretrained_weights_for_3_channels_serve_others() -> None:
    """The rule of timm, written out: repeated in turn and scaled by 3 / N."""
    plain, five, one = (build_encoder("digits_vit", "shipped", inputs=n) for n in (3, 5, 1))
    first, wide, single = (dict(e.named_parameters())["stem.0.0.weight"] for e in (plain, five, one))
    assert torch.allclose(wide, first[:, [0, 1, 2, 0, 1]] * (3 / 5)) and torch.allclose(single, first.sum(1, True))
    assert five.inputs == 5 and five(torch.zeros(1, 5, 32, 32))[0].shape == plain(torch.zeros(1, 3, 32, 32))[0].shape
    rest = [name for name in plain.state_dict() if name != "stem.0.0.weight"]
    assert all(torch.equal(plain.state_dict()[name], five.state_dict()[name]) for name in rest)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mit_b0"])
def test_encoders_take_any_number_of_channels(name: str) -> None:
    encoder = build_encoder(name, "none", inputs=4)
    assert encoder.inputs == 4 and len(encoder(torch.zeros(1, 4, 64, 64))) == 4


DOCS = Path(__file__).parents[2] / "docs" / "your-data.md"


def snippet(start: str) -> str:
    """The Python block of the page that begins so."""
    return next(
        part.split("```")[0] for part in DOCS.read_text("utf-8").split("```python\n")[1:] if part.startswith(start)
    )


def test_dicom_is_converted_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pydicom = pytest.importorskip("pydicom")
    stored = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32)
    file = pydicom.dataset.FileDataset("scan.dcm", {}, preamble=b"\0" * 128)
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = pydicom.uid.CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = pydicom.uid.generate_uid()
    file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation = 24, 32, 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.RescaleSlope, file.RescaleIntercept, file.PixelData = 2, -1024, stored.tobytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    file.save_as(tmp_path / "scans" / "scan.dcm", enforce_file_format=True)
    exec(snippet("import pydicom"), {})
    found = read_image(tmp_path / "photos" / "images" / "scan.npy", PixelFormat(channels=1, value_range="-1000..400"))
    assert np.allclose(found[..., 0], np.clip((stored * 2.0 - 1024 + 1000) / 1400, 0, 1), atol=1e-6), "Hounsfield units"


def test_nifti_is_converted_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = np.random.default_rng(0).integers(0, 900, (32, 24, 3)).astype(np.int16)
    labels = (volume > 450).astype(np.uint8)
    monkeypatch.chdir(tmp_path)
    for folder, array in (("scans", volume), ("labels", labels)):
        (tmp_path / folder).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / folder / "patient1.nii.gz")
    exec(snippet("import nibabel"), {})
    for k in range(3):
        name = f"patient1_{k:03}"
        found = read_image(
            tmp_path / "photos" / "images" / f"{name}.npy", PixelFormat(channels=1, value_range="0..900")
        )
        assert np.allclose(found[..., 0], volume[..., k].T / 900, atol=1e-6)
        assert np.array_equal(read_mask(tmp_path / "photos" / "masks" / f"{name}.png", 2), labels[..., k].T)


def _png(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def test_a_png_of_colours_is_read_as_pillow_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A faster decoder takes those of 8 bits without transparency; whatever else stands in the file changes nothing."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    more = PngImagePlugin.PngInfo()
    more.add(b"gAMA", (30000).to_bytes(4, "big"))
    more.add(b"sRGB", b"\0")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = [
        _png(tmp_path / "plain.png", pixels),
        _png(tmp_path / "gamma.png", pixels, pnginfo=more),
        _png(tmp_path / "profile.png", pixels, icc_profile=profile),
        _png(tmp_path / "transparent.png", pixels, transparency=(3, 4, 5)),
        _png(tmp_path / "alpha.png", rng.integers(0, 256, (9, 8, 4), dtype=np.uint8)),
        _png(tmp_path / "grey.png", pixels[..., 0]),
    ]
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    files.append(_png(tmp_path / "turned.png", pixels, exif=turned))
    quick = [read_image(path) for path in files]
    asked = []
    monkeypatch.setattr(images, "decoded_rgb", lambda path, image: asked.append(path))
    for path, found in zip(files, quick, strict=True):
        assert np.array_equal(read_image(path), found) and found.flags.writeable, path.name
    assert np.array_equal(quick[0], pixels) and len(asked) == len(files) - 1
    monkeypatch.undo()
    with Image.open(files[0]) as image:
        assert decoded_rgb(files[0], image) is not None, "or the test compares Pillow with itself"


@pytest.mark.parametrize(
    "harm", [lambda data: data[:-30], lambda data: data[:400], lambda data: data[:300] + b"x" + data[301:]]
)
def test_a_damaged_png_has_pillows_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[bytes], bytes]
) -> None:
    path = _png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError) as quick:
        read_image(path)
    monkeypatch.setattr(images, "decoded_rgb", lambda path, image: None)
    with pytest.raises(ValueError) as plain:
        read_image(path)
    assert str(quick.value) == str(plain.value) and str(path) in str(plain.value)
