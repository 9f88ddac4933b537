from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from viladiff.core import keyed_random
from viladiff.data.batch import CutMix
from viladiff.data.transforms import augment
from viladiff.data.transforms.augment import (
    blur,
    brighten,
    contrasted,
    geometric,
    jitter,
    normalise,
    saturated,
    strong,
    turn_hue,
)
from viladiff.data.transforms.mixing import apply_cutmix, box_mask, cutmix_boxes, pair_partner


def rngs(n: int, name: str = "test", seed: int = 0) -> list[np.random.Generator]:
    return [keyed_random.numpy_generator(seed, name, i) for i in range(n)]


def photos(n: int, h: int = 48, w: int = 48, seed: int = 0) -> Tensor:
    """Random uint8 images without any smoothness, so that a shift by one pixel cannot hide."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8))


# Geometry


@pytest.mark.parametrize("size", [(48, 48), (37, 53), (64, 31)])
def test_scale_one_is_the_identity_bit_for_bit(size: tuple[int, int]) -> None:
    images = photos(3, *size)
    masks = torch.randint(0, 11, (3, *size))
    crop = max(size)
    out, labels, valid = geometric(images, masks, crop, (1.0, 1.0), 0.0, rngs(3))
    assert labels is not None and out.shape == (3, 3, crop, crop) and labels.dtype == torch.int64
    inside = (..., slice(size[0]), slice(size[1]))
    assert torch.equal(out[inside], images.permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(labels[inside], masks)
    assert valid[inside].all() and valid.sum() == 3 * size[0] * size[1]
    assert (out.permute(0, 2, 3, 1)[~valid] == 0).all() and (labels[~valid] == 255).all()


def test_flip_is_the_mirror_image_of_the_crop() -> None:
    images, masks = photos(2), torch.randint(0, 11, (2, 48, 48))
    plain = geometric(images, masks, 32, (1.0, 1.0), 0.0, rngs(2))
    mirrored = geometric(images, masks, 32, (1.0, 1.0), 1.0, rngs(2))
    for a, b in zip(plain, mirrored, strict=True):
        assert a is not None and b is not None and torch.equal(a.flip(-1), b)


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.0, 1.31, 2.0])
def test_resize_equals_torchvision(factor: float) -> None:
    images = photos(2, 40, 52)
    height, width = round(40 * factor), round(52 * factor)
    out, _, valid = geometric(images, None, 110, (factor, factor), 0.0, rngs(2))
    expected = TF.resize(images.permute(0, 3, 1, 2).float() / 255, [height, width], antialias=True)
    torch.testing.assert_close(out[..., :height, :width], expected, atol=2e-5, rtol=0)
    assert valid.sum() == 2 * height * width and valid[:, :height, :width].all()


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.31, 2.0])
def test_mask_and_image_stay_aligned(factor: float) -> None:
    """Red counts the columns of blocks, green the rows: where the nearest label changes, the image must be half-way."""
    block = torch.arange(4).repeat_interleave(12)
    labels = (4 * block[:, None] + block).repeat(5, 1, 1)
    images = torch.stack([labels % 4, labels // 4, labels], -1).mul(16).to(torch.uint8)
    out, masks, valid = geometric(images, labels, 40, (factor, factor), 0.5, rngs(5))
    assert masks is not None
    for channel, truth in ((0, masks % 4), (1, masks // 4)):
        away = (out[:, channel] * 255 / 16 - truth).abs()[valid]
        assert away.max() <= 0.5001 and away.max() > 0.1  # a shift by half a pixel would show as 0.5 + 0.5 / step


def test_mask_equals_nearest_exact_resize() -> None:
    masks = torch.randint(0, 11, (2, 40, 52))
    for factor in (0.6, 1.7):
        height, width = round(40 * factor), round(52 * factor)
        _, labels, _ = geometric(photos(2, 40, 52), masks, 90, (factor, factor), 0.0, rngs(2))
        assert labels is not None
        expected = TF.resize(masks, [height, width], TF.InterpolationMode.NEAREST_EXACT)
        assert (labels[:, :height, :width] == expected).float().mean() > 0.999  # ties may round either way


def test_windows_reach_every_place_and_scales_the_whole_range() -> None:
    images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    rows = torch.arange(32).view(1, 32, 1).expand(1, 32, 32)
    starts, sides = set(), []
    for i in range(300):
        _, labels, _ = geometric(images, rows, 24, (1.0, 1.0), 0.0, rngs(1, "start", i))
        assert labels is not None
        starts.add(int(labels[0, 0, 0]))
        _, _, valid = geometric(images, None, 64, (0.5, 2.0), 0.0, rngs(1, "side", i))
        sides.append(int(valid[0].any(1).sum()))
    assert starts == set(range(9))
    assert min(sides) < 20 and max(sides) > 60 and 36 < np.mean(sides) < 44


def test_an_image_is_augmented_alike_in_any_batch() -> None:
    images, masks = photos(6), torch.randint(0, 11, (6, 48, 48))
    whole = geometric(images, masks, 40, (0.5, 2.0), 0.5, rngs(6))
    part = geometric(images[2:4], masks[2:4], 40, (0.5, 2.0), 0.5, rngs(6)[2:4])
    for a, b in zip(whole, part, strict=True):
        assert a is not None and b is not None and torch.equal(a[2:4], b)
    colours = strong(whole[0], rngs(6, "strong"))
    torch.testing.assert_close(colours[2:4], strong(part[0], rngs(6, "strong")[2:4]), atol=1e-6, rtol=0)
    assert not torch.equal(colours[2:4], whole[0][2:4])


def test_validity_comes_from_geometry_alone() -> None:
    void = torch.full((3, 48, 48), 255)
    _, _, without = geometric(photos(3), None, 64, (0.5, 1.5), 0.5, rngs(3))
    _, labels, valid = geometric(photos(3), void, 64, (0.5, 1.5), 0.5, rngs(3))
    assert torch.equal(valid, without) and valid.any() and labels is not None and (labels == 255).all()


def test_numpy_and_tensor_inputs_agree_and_bad_ones_are_named() -> None:
    images, masks = photos(2), torch.randint(0, 11, (2, 48, 48), dtype=torch.uint8)
    a = geometric(images, masks, 40, (0.5, 2.0), 0.5, rngs(2))
    b = geometric(images.numpy(), masks.numpy(), 40, (0.5, 2.0), 0.5, rngs(2))
    assert all(x is not None and y is not None and torch.equal(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(ValueError, match=r"scale = \(0\.0, 1\.0\)"):
        geometric(images, None, 40, (0.0, 1.0), 0.5, rngs(2))
    with pytest.raises(ValueError, match="2 images, 3 generators"):
        geometric(images, None, 40, (0.5, 1.0), 0.5, rngs(3))
    with pytest.raises(ValueError, match="2 images, 1 generators"):
        strong(a[0], rngs(1))


# Colour


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.37])
def test_single_operations_equal_torchvision(factor: float) -> None:
    image = torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(brighten(image, factor), TF.adjust_brightness(image, factor))
    # Their grey weights have four digits.
    torch.testing.assert_close(contrasted(image, factor), TF.adjust_contrast(image, factor), atol=1e-4, rtol=0)
    torch.testing.assert_close(saturated(image, factor), TF.adjust_saturation(image, factor), atol=1.5e-4, rtol=0)


def test_hue_equals_torchvision_also_on_grey_and_pure_colours() -> None:
    images = torch.rand(4, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    images[:, :, 0] = 0.4
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).T
    images[:, :, 1, :8] = corners
    turns = np.array([-0.25, 0.1, 0.25, 0.5])
    found = turn_hue(images, turns)
    for image, turn, out in zip(images, turns, found, strict=True):
        torch.testing.assert_close(out, TF.adjust_hue(image, turn), atol=1e-5, rtol=0)
    torch.testing.assert_close(turn_hue(images, np.zeros(4)), images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("radius", [3, 6])
def test_blur_equals_torchvision_with_a_sigma_per_image(radius: int) -> None:
    images = torch.rand(3, 3, 20, 33, generator=torch.Generator().manual_seed(1))
    sigma = np.array([0.1, 0.9, 2.0])
    found = blur(images, sigma, radius)
    for image, s, out in zip(images, sigma.tolist(), found, strict=True):
        torch.testing.assert_close(out, TF.gaussian_blur(image, [2 * radius + 1] * 2, [s, s]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="blur radius 20"):
        blur(images, sigma, 20)


def test_jitter_follows_each_image_s_own_order() -> None:
    images = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    rng = np.random.default_rng(0)
    amounts = rng.uniform(-0.4, 0.4, (6, 4))
    order = np.stack([rng.permutation(4) for _ in range(6)])
    found = jitter(images, amounts, order)
    theirs = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]
    results = []
    for image, amount, mine in zip(images, amounts.tolist(), order.tolist(), strict=True):
        for operation in mine:
            if operation == 3:
                image = TF.adjust_hue(image, amount[3])
            else:
                image = theirs[operation](image, 1 + amount[operation])
        results.append(image)
    torch.testing.assert_close(found, torch.stack(results), atol=2e-3, rtol=0)
    assert (found - jitter(images, amounts, order[:, ::-1])).abs().amax((1, 2, 3)).min() > 0.01  # order matters


def test_strong_applies_each_part_as_often_as_asked() -> None:
    n = 600
    images = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    before = images.clone()
    only = partial(strong, images, p_jitter=0.0, p_gray=0.0, p_blur=0.0, sigma=(0.5, 1.5))

    def changed(out: Tensor) -> float:
        return float(((out - images).abs().amax((1, 2, 3)) > 1e-4).float().mean())

    def gray(out: Tensor) -> float:
        return float(((out.amax(1) - out.amin(1)).amax((1, 2)) < 1e-6).float().mean())

    assert torch.equal(only(draws=rngs(n)), images)
    assert changed(only(draws=rngs(n), p_jitter=0.8)) == pytest.approx(0.8, abs=0.05)
    assert changed(only(draws=rngs(n), p_blur=0.5)) == pytest.approx(0.5, abs=0.06)
    assert gray(only(draws=rngs(n), p_gray=0.2)) == pytest.approx(0.2, abs=0.05)
    out = strong(images, rngs(n), sigma=(0.1, 1.5))
    assert out.min() >= 0 and out.max() <= 1 and torch.isfinite(out).all()
    assert torch.equal(images, before)


def test_strong_factors_span_their_ranges() -> None:
    images = torch.full((400, 3, 8, 8), 0.3)
    out = strong(images, rngs(400), 1.0, contrast=0.0, saturation=0.0, hue=0.0, p_gray=0.0, p_blur=0.0)
    factors = out[:, 0, 0, 0] / 0.3
    assert 0.5 <= factors.min() < 0.53 and 1.47 < factors.max() <= 1.5001
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.05)


def test_normalise_is_imagenet_s() -> None:
    images = torch.rand(2, 3, 5, 5)
    expected = TF.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalise(images), expected)


def test_strong_is_quick() -> None:
    """Eight 64 x 64 images take some 3 ms of one core; four times that is allowed, since other work shares it."""
    images = torch.rand(8, 3, 64, 64)
    taken = []
    for i in range(30):
        generators = rngs(8, "quick", i)
        start = time.thread_time()
        strong(images, generators)
        taken.append(time.thread_time() - start)
    assert min(taken) < 0.012 * torch.get_num_threads()
    assert augment._shifts.cache_info().hits > 10


# CutMix


def test_boxes_fit_lie_on_the_grid_and_are_never_empty() -> None:
    size, snap = 64, 4
    boxes = cutmix_boxes(rngs(3000), size, snap)
    assert boxes.shape == (3000, 4) and boxes.dtype == torch.int64
    assert (boxes % snap == 0).all() and (boxes >= 0).all() and (boxes <= size).all()
    drawn = boxes[boxes.any(1)]
    assert len(drawn) / 3000 == pytest.approx(0.5, abs=0.03)
    height, width = drawn[:, 2] - drawn[:, 0], drawn[:, 3] - drawn[:, 1]
    assert (height >= snap).all() and (width >= snap).all()
    share = (height * width).double() / size**2
    assert 0.01 < share.min() < 0.04 and 0.37 < share.max() < 0.46
    assert float(share.mean()) == pytest.approx(0.21, abs=0.02)
    ratio = height.double() / width.double()
    assert ratio.min() < 0.5 and ratio.max() > 2.5
    assert float((ratio > 1).double().mean()) > 0.6, "height over width is uniform in 0.3 .. 3.3: mostly above 1"
    assert set(drawn[:, 0].tolist()) >= set(range(0, 48, snap)) and drawn[:, 2].max() == size


def test_boxes_depend_on_their_own_generator_only() -> None:
    assert torch.equal(cutmix_boxes(rngs(8), 64, 8)[3:5], cutmix_boxes(rngs(8)[3:5], 64, 8))
    assert not torch.equal(cutmix_boxes(rngs(8), 64, 8), cutmix_boxes(rngs(8, seed=1), 64, 8))


def test_coarse_grids_still_give_boxes_and_bad_ones_are_named() -> None:
    coarse = cutmix_boxes(rngs(50), 32, 16, p=1.0)
    assert ((coarse[:, 2:] - coarse[:, :2]) >= 16).all()
    with pytest.raises(ValueError, match="snap = 5: must divide the crop's side, 64"):
        cutmix_boxes(rngs(2), 64, 5)
    with pytest.raises(ValueError, match="no such box"):
        cutmix_boxes(rngs(2), 64, 4, p=1.0, area=(0.9, 1.0), aspect=(4.0, 5.0))
    assert cutmix_boxes([], 64, 4).shape == (0, 4)


def test_partners_are_neighbours_and_nobody_s_own() -> None:
    assert pair_partner(6).tolist() == [1, 0, 3, 2, 5, 4]
    with pytest.raises(ValueError, match="5 unlabelled images"):
        pair_partner(5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_cutmix_equals_slices(dtype: torch.dtype) -> None:
    boxes = cutmix_boxes(rngs(8), 32, 4, p=0.8)
    cutmix = CutMix(boxes, pair_partner(8))
    for shape in ((8, 3, 32, 32), (8, 32, 32)):
        x = torch.randint(0, 2, shape).to(dtype)
        before, expected = x.clone(), x.clone()
        for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
            expected[i, ..., top:bottom, left:right] = x[i ^ 1, ..., top:bottom, left:right]
        assert torch.equal(apply_cutmix(x, cutmix), expected) and torch.equal(x, before)
        assert not torch.equal(expected, x)


@pytest.mark.parametrize("stride", [2, 4])
def test_a_coarser_map_is_cut_exactly_where_the_pixels_are(stride: int) -> None:
    cutmix = CutMix(cutmix_boxes(rngs(6), 32, 4, p=1.0), pair_partner(6))
    grid = torch.rand(6, 5, 32 // stride, 32 // stride)
    pixels = grid.repeat_interleave(stride, -1).repeat_interleave(stride, -2)
    mixed = apply_cutmix(grid, cutmix, stride)
    assert torch.equal(mixed.repeat_interleave(stride, -1).repeat_interleave(stride, -2), apply_cutmix(pixels, cutmix))
    mask = box_mask(cutmix.boxes, 32 // stride, 32 // stride, stride)
    assert mask.sum() * stride**2 == box_mask(cutmix.boxes, 32, 32).sum()


def test_cutmix_refuses_what_would_mix_wrongly() -> None:
    x = torch.rand(2, 3, 32, 32)
    box = torch.tensor([[4, 4, 12, 12], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match="stride = 8: must divide"):
        apply_cutmix(x[..., ::8, ::8], CutMix(box, pair_partner(2)), 8)
    with pytest.raises(ValueError, match="image 0 is its own CutMix partner"):
        apply_cutmix(x, CutMix(box, torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="2 images, 4 boxes"):
        apply_cutmix(x, CutMix(box.repeat(2, 1), pair_partner(4)))
