"""Geometry and colours of real images, against the same steps written straight down with Pillow and torchvision."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision import tv_tensors
from torchvision.transforms import v2

from viladiff.core import keyed_random
from viladiff.data.transforms import augment
from viladiff.data.transforms.augment import blur, brighten, contrasted, saturated, strong, turn_hue
from viladiff.data.transforms.geometry import Window, crop_image, crop_mask, window

SIZES = [(37, 53), (64, 31), (90, 90), (120, 200), (7, 160), (1, 9)]
CROPS = [16, 48, 96]


def noise(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels without any smoothness, so that nothing that is out of place can hide."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 21, (height, width), dtype=np.uint8)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), np.where(labels == 20, 255, labels).astype(
        np.uint8
    )


def cut(pixels: np.ndarray, labels: np.ndarray, to: Window, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Ours: (crop, crop, 3) and (crop, crop)."""
    image, mask = np.full((3, crop, crop), 77, np.uint8), np.full((crop, crop), 77, np.uint8)
    crop_image(pixels, to, image)
    crop_mask(labels, to, mask)
    return image.transpose(1, 2, 0), mask


def straight(pixels: np.ndarray, labels: np.ndarray, to: Window, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """UniMatch's steps: the whole image is resized (columns, then rows), padded, cropped and mirrored by Pillow."""
    (height, width), (row, column) = to.resized, to.start
    image = Image.fromarray(pixels).resize((width, pixels.shape[0]), Image.Resampling.BILINEAR)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    mask = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    border = (0, 0, max(0, crop - width), max(0, crop - height))
    image, mask = ImageOps.expand(image, border, fill=0), ImageOps.expand(mask, border, fill=255)
    place = (column, row, column + crop, row + crop)
    image, mask = image.crop(place), mask.crop(place)
    if to.flip:
        image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
    return np.asarray(image), np.asarray(mask)


def windows(size: tuple[int, int], crop: int, n: int = 20) -> list[Window]:
    return [
        window(size, crop, (0.5, 2.0), 0.5, keyed_random.numpy_generator(i, "test", *size, crop).random(4).tolist())
        for i in range(n)
    ]


def ties(to: Window, crop: int) -> np.ndarray:
    """(crop, crop) bool: pixels whose place in the source is on the border of two of its pixels, exactly."""
    axes = []
    for source, resized, start, shown in zip(to.source, to.resized, to.start, to.shown, strict=True):
        found = np.zeros(crop, bool)
        found[:shown] = (2 * (np.arange(shown) + start) + 1) * source % (2 * resized) == 0
        axes.append(found)
    either = axes[0][:, None] | axes[1]
    return either[:, ::-1] if to.flip else either


# The window


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (300, 300), (333, 11)])
def test_the_long_side_takes_every_length_alike_and_the_aspect_is_kept(size: tuple[int, int]) -> None:
    low, high = int(max(size) * 0.5), int(max(size) * 2.0)
    n = high - low + 1
    seen = set()
    for k in range(n):
        to = window(size, 321, (0.5, 2.0), 0.5, ((k + 0.5) / n, 0.0, 0.0, 0.9))
        long = low + k
        height, width = size
        short = int((width if height > width else height) * long / max(size) + 0.5)
        assert to.resized == ((long, short) if height > width else (short, long))
        seen.add(long)
    assert seen == set(range(low, high + 1))
    ends = [window(size, 321, (0.5, 2.0), 0.5, (u, 0.0, 0.0, 0.9)).resized for u in (0.0, 1 - 2**-53)]
    assert [max(end) for end in ends] == [low, high]


def test_the_crop_starts_everywhere_and_is_mirrored_as_often_as_asked() -> None:
    found = [
        window((60, 80), 48, (1.0, 1.0), 0.3, keyed_random.numpy_generator(i, "w").random(4).tolist())
        for i in range(3000)
    ]
    assert {to.start[0] for to in found} == set(range(13)) and {to.start[1] for to in found} == set(range(33))
    assert np.mean([to.flip for to in found]) == pytest.approx(0.3, abs=0.03)
    assert np.std([np.mean([to.start[1] == c for to in found]) for c in range(33)]) < 0.01
    last = window((60, 80), 48, (1.0, 1.0), 0.3, (1 - 2**-53,) * 4)
    assert last.start == (12, 32) and not last.flip


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_no_image_is_too_small_or_too_thin(size: tuple[int, int]) -> None:
    pixels, labels = noise(*size)
    for to in windows(size, 16):
        assert min(to.resized) >= 1 and min(to.shown) >= 1
        _, mask = cut(pixels, labels, to, 16)
        assert not (mask == 77).any() and (mask != 255).sum() <= to.shown[0] * to.shown[1]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"scale = \(0\.0, 1\.0\)"):
        window((5, 5), 16, (0.0, 1.0), 0.5, (0.1,) * 4)
    with pytest.raises(ValueError, match=r"crop = 0"):
        window((5, 5), 0, (0.5, 1.0), 0.5, (0.1,) * 4)
    with pytest.raises(ValueError, match=r"\(0, 5\)"):
        window((0, 5), 16, (0.5, 1.0), 0.5, (0.1,) * 4)


# Only the window is resized


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", CROPS)
def test_a_resized_window_equals_the_window_of_a_resized_image(size: tuple[int, int], crop: int) -> None:
    """Pillow holds a window's edges in 32 bits, which decides how values half-way between two levels are rounded: in
    noise, 2 of 255 at most (1 for each axis), and 2 % of the pixels even where simple ratios make such values frequent.
    """
    pixels, labels = noise(*size)
    off = []
    for to in windows(size, crop):
        image, mask = cut(pixels, labels, to, crop)
        wanted, wanted_mask = straight(pixels, labels, to, crop)
        apart = np.abs(image.astype(int) - wanted)
        assert apart.max() <= 2, to
        off.append((apart > 0).mean())
        # Pillow adds up its step, and lands on either side of a border between two source pixels.
        assert np.array_equal(mask[~ties(to, crop)], wanted_mask[~ties(to, crop)]), to
    assert np.mean(off) < 0.025


def test_a_photograph_hardly_shows_the_difference(photographs: ModuleType) -> None:
    for photo in photographs.photos():
        pixels, labels = photo.pixels[:300, :400], photo.labels[:300, :400]
        for to in windows(labels.shape, 161, 8):
            image, mask = cut(pixels, labels, to, 161)
            wanted, wanted_mask = straight(pixels, labels, to, 161)
            apart = np.abs(image.astype(int) - wanted)
            assert apart.max() <= 2 and (apart > 0).mean() < 0.03
            assert (mask != wanted_mask).mean() < 0.002


def test_either_order_of_the_axes_is_within_two_levels() -> None:
    """Newer Pillows resize rows first where that is less work, and round in between."""
    pixels, labels = noise(120, 80)
    for to in windows((120, 80), 48):
        height, width = to.resized
        whole = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)).astype(int)
        rows, columns = to.shown
        seen = whole[to.start[0] : to.start[0] + rows, to.start[1] : to.start[1] + columns]
        image, _ = cut(pixels, labels, to._replace(flip=False), 48)
        assert np.abs(image[:rows, :columns].astype(int) - seen).max() <= 2


@pytest.mark.parametrize("size", SIZES)
def test_torchvision_agrees_on_tv_tensors(size: tuple[int, int]) -> None:
    """Its weights have 8 to 15 bits, so two levels of 255; labels agree but on borders between source pixels."""
    crop = 48
    pixels, labels = noise(*size)
    both = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(labels))
    for to in windows(size, crop, 8):
        steps = v2.Compose(
            [
                v2.Pad(
                    [0, 0, max(0, crop - to.resized[1]), max(0, crop - to.resized[0])],
                    fill={tv_tensors.Image: 0, tv_tensors.Mask: 255},
                ),
                v2.Lambda(lambda x, to=to: v2.functional.crop(x, *to.start, crop, crop)),
                v2.RandomHorizontalFlip(float(to.flip)),
            ]
        )
        resized = (
            v2.functional.resize(both[0], list(to.resized), antialias=True),
            v2.functional.resize(both[1], list(to.resized), v2.InterpolationMode.NEAREST_EXACT),
        )
        wanted, wanted_mask = steps(resized[0], tv_tensors.Mask(resized[1]))
        image, mask = cut(pixels, labels, to, crop)
        assert np.abs(image.astype(int) - wanted.permute(1, 2, 0).numpy()).max() <= 2
        away = ~ties(to, crop)
        assert (mask[away] != wanted_mask.numpy()[away]).mean() < 1e-3  # its places are in 32 bits


def test_scale_one_moves_pixels_and_changes_none() -> None:
    pixels, labels = noise(70, 50)
    for crop in (40, 96):
        for i in range(8):
            to = window((70, 50), crop, (1.0, 1.0), 0.5, keyed_random.numpy_generator(i, "one").random(4).tolist())
            image, mask = cut(pixels, labels, to, crop)
            wanted, wanted_mask = straight(pixels, labels, to, crop)
            assert np.array_equal(image, wanted) and np.array_equal(mask, wanted_mask)


@pytest.mark.parametrize("factor", [0.5, 0.81, 1.31, 2.0])
def test_mask_and_image_stay_aligned(factor: float) -> None:
    """Red counts blocks of columns, green of rows: where the nearest label changes, the image must be half-way."""
    block = np.arange(4).repeat(12)
    labels = (4 * block[:, None] + block).astype(np.uint8)
    pixels = np.stack([labels % 4, labels // 4, labels], -1) * np.uint8(16)
    worst = 0.0
    for i in range(6):
        to = window((48, 48), 40, (factor, factor), 0.5, keyed_random.numpy_generator(i, "aligned").random(4).tolist())
        image, mask = cut(pixels, labels, to, 40)
        for channel, truth in ((0, mask % 4), (1, mask // 4)):
            away = np.abs(image[..., channel] / 16 - truth.astype(float))[mask != 255]
            worst = max(worst, away.max())
    assert 0.1 < worst <= 0.5 + 1.01 / 16


# Padding


def test_padding_is_black_ignored_and_mirrored_with_the_crop() -> None:
    pixels, labels = np.full((20, 30, 3), 200, np.uint8), np.full((20, 30), 3, np.uint8)
    for flip in (False, True):
        to = window((20, 30), 48, (1.0, 1.0), 0.5, (0.5, 0.5, 0.5, 0.1 if flip else 0.9))
        image, mask = cut(pixels, labels, to, 48)
        assert to.flip == flip and to.shown == (20, 30)
        inside = np.zeros((48, 48), bool)
        inside[:20, slice(18, 48) if flip else slice(0, 30)] = True
        assert (image[inside] == 200).all() and (mask[inside] == 3).all()
        assert (image[~inside] == 0).all() and (mask[~inside] == 255).all()


# Colours: ours in 32-bit floats, Pillow's in 8 bits a step


def levels(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def apart(ours: torch.Tensor, theirs: Image.Image) -> np.ndarray:
    """(h, w, 3) in levels of 255."""
    return np.abs(ours.permute(1, 2, 0).numpy() * 255 - np.asarray(theirs).astype(float))


@pytest.fixture
def photo(photographs: ModuleType) -> np.ndarray:
    """(120, 160, 3) of a colourful photograph."""
    return np.ascontiguousarray(photographs.photos()[1].pixels[150:270, 200:360])


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.5])
def test_brightness_contrast_and_saturation_equal_pillow(photo: np.ndarray, factor: float) -> None:
    """Pillow rounds the grey value, its mean and the result: 2 levels with factors up to 1.5."""
    image, plain = levels(photo), Image.fromarray(photo)
    assert apart(brighten(image, factor), ImageEnhance.Brightness(plain).enhance(factor)).max() <= 1.01
    assert apart(contrasted(image, factor), ImageEnhance.Contrast(plain).enhance(factor)).max() <= 2
    assert apart(saturated(image, factor), ImageEnhance.Color(plain).enhance(factor)).max() <= 2


@pytest.mark.parametrize("turn", [-0.25, -0.1, 0.0, 0.17, 0.25])
def test_hue_equals_pillow(photo: np.ndarray, turn: float) -> None:
    """Pillow's hue has 256 steps, 8.5 of which make a channel fall from 255 to 205; its value and saturation 8 bits."""
    hue, saturation, value = Image.fromarray(photo).convert("HSV").split()
    moved = Image.fromarray((np.asarray(hue).astype(int) + int(turn * 255)).astype(np.uint8))
    wanted = Image.merge("HSV", (moved, saturation, value)).convert("RGB")
    off = apart(turn_hue(levels(photo)[None], np.array([int(turn * 255) / 256]))[0], wanted)
    assert off.mean() < 1.5 and off.max() <= 9


def test_grey_equals_pillow(photo: np.ndarray) -> None:
    grey = augment._gray(levels(photo))[0].numpy() * 255
    assert np.abs(grey - np.asarray(Image.fromarray(photo).convert("L"))).max() <= 1.01


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.3, 2.0])
def test_blur_is_near_pillow_s(photo: np.ndarray, sigma: float) -> None:
    """Pillow's is three box blurs, which only resemble a Gaussian, and repeats the border instead of mirroring it."""
    theirs = Image.fromarray(photo).filter(ImageFilter.GaussianBlur(sigma))
    inner = (slice(8, -8), slice(8, -8))
    off = apart(blur(levels(photo)[None], np.array([sigma]), 6)[0], theirs)[inner].mean()
    for other in (0.6 * sigma, 1.5 * sigma):
        assert off < apart(blur(levels(photo)[None], np.array([other]), 6)[0], theirs)[inner].mean()
    assert off < 1.2


@pytest.mark.parametrize("length", [193, 255, 256, 257, 321, 384, 513])
def test_blur_by_blocks_equals_the_convolution(length: int) -> None:
    """Lengths at which the last block is one pixel wide, full, or sees the mirrored end from the block before."""
    images = torch.rand(2, 3, length, 200, generator=torch.Generator().manual_seed(1))
    sigma = np.array([0.4, 2.0])
    for turned in (images, images.mT.contiguous()):
        found = blur(turned, sigma, 6)
        for image, s, out in zip(turned, sigma.tolist(), found, strict=True):
            wanted = v2.functional.gaussian_blur(image, [13, 13], [s, s])
            torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)


def test_large_views_do_not_depend_on_their_neighbours() -> None:
    """A CPU takes large images in groups; what an image becomes is the same in any batch."""
    images = torch.rand(5, 3, 257, 257, generator=torch.Generator().manual_seed(2))
    assert len(augment._groups([0, 1, 2, 3, 4], images)) == 2

    def rngs(places: range) -> list[np.random.Generator]:
        return [keyed_random.numpy_generator(0, "large", i) for i in places]

    whole = strong(images, rngs(range(5)))
    for i in range(5):
        torch.testing.assert_close(whole[i], strong(images[i : i + 1], rngs(range(i, i + 1)))[0], atol=2e-6, rtol=0)
    assert (whole - images).abs().amax((1, 2, 3)).gt(0.01).sum() >= 4
