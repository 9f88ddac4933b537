"""The forms of mixing beside CutMix-A (tests/data/test_augment.py), each against its definition pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import CutMix, TextBatch
from viladiff.data.transforms.mixing import (
    apply_cutmix,
    beta_boxes,
    box_mask,
    class_mask,
    half_boxes,
    join_text,
    mix_text,
    pair_partner,
    parity_boxes,
    parity_mask,
    paste,
)


def rngs(n: int, name: str = "mix") -> list[np.random.Generator]:
    return [keyed_random.numpy_generator(0, name, i) for i in range(n)]


def area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def inside(boxes: Tensor, size: int) -> bool:
    return bool((boxes >= 0).all() and (boxes <= size).all() and (boxes[..., :2] <= boxes[..., 2:]).all())


@pytest.mark.parametrize("size", [48, 49])
def test_half_boxes_have_half_the_area_and_come_for_the_whole_batch_or_not_at_all(size: int) -> None:
    seen = []
    for i in range(300):
        boxes = half_boxes(rngs(4, f"half{i}"), keyed_random.numpy_generator(0, "coin", i), size)
        assert boxes.shape == (4, 4) and boxes.dtype == torch.int64 and inside(boxes, size)
        drawn = area(boxes) > 0
        assert drawn.all() or not drawn.any()
        seen.append(boxes if drawn.all() else None)
    found = [boxes for boxes in seen if boxes is not None]
    assert len(found) / 300 == pytest.approx(0.5, abs=0.08)
    boxes = torch.cat(found)
    assert (area(boxes) / size**2 - 0.5).abs().max() < 0.5 / size + 1e-9
    widths = boxes[:, 3] - boxes[:, 1]
    assert widths.min() == -(-size // 2) and widths.max() == size
    assert boxes[:, 0].min() == 0 and boxes[:, 2].max() == size


def test_probability_of_half_boxes_is_that_of_getting_them() -> None:
    assert area(half_boxes(rngs(4), keyed_random.numpy_generator(0, "coin"), 32, p=1.0)).all()
    assert not half_boxes(rngs(4), keyed_random.numpy_generator(0, "coin"), 32, p=0.0).any()


def test_beta_boxes_are_clipped_squares_around_their_centre() -> None:
    size, n = 64, 4000
    boxes = beta_boxes(rngs(n), size)
    assert inside(boxes, size) and (area(boxes) > 0).all()
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    whole = (boxes[:, 0] > 0) & (boxes[:, 1] > 0) & (boxes[:, 2] < size) & (boxes[:, 3] < size)
    assert whole.any() and (height == width)[whole].all()
    lam = 1 - (height[whole] / size).double() ** 2  # small boxes fit more often, so only the range is certain
    assert lam.min() > 0.2 and lam.max() < 1
    # The centre is uniform in [S / 8, S) along each side; clipped boxes still contain it.
    assert (boxes[:, 2] > size // 8).all() and (boxes[:, 0] < size).all()
    sides = np.sqrt(1 - np.random.default_rng(0).beta(4, 4, 100_000)) * size
    expected = np.minimum(np.random.default_rng(1).integers(8, 64, 100_000) + sides / 2, size)
    assert float(boxes[:, 2].double().mean()) == pytest.approx(expected.mean(), abs=0.6)
    expected = np.maximum(np.random.default_rng(1).integers(8, 64, 100_000) - sides / 2, 0)
    assert float(boxes[:, 0].double().mean()) == pytest.approx(expected.mean(), abs=0.6)


def test_parity_boxes_have_their_area_together_and_the_mask_is_their_xor() -> None:
    size, n = 64, 600
    boxes = parity_boxes(rngs(n), size)
    assert boxes.shape == (n, 3, 4) and inside(boxes, size)
    total = area(boxes).sum(1) / size**2
    assert (
        0.23 < total.min() < 0.27
        and 0.48 < total.max() < 0.53
        and float(total.mean()) == pytest.approx(0.375, abs=0.01)
    )
    assert (boxes[..., 2] - boxes[..., 0]).max() > 0.8 * size and (boxes[..., 3] - boxes[..., 1]).max() > 0.8 * size
    mask = parity_mask(boxes[:20], size, size)
    for found, three in zip(mask, boxes[:20].tolist(), strict=True):
        expected = np.zeros((size, size), bool)
        for top, left, bottom, right in three:
            expected[top:bottom, left:right] ^= True
        assert np.array_equal(found.numpy(), expected)
    assert (mask.flatten(1).sum(1) <= area(boxes[:20]).sum(1)).all()


@pytest.mark.parametrize("draw", [half_boxes, beta_boxes, parity_boxes])
def test_an_image_has_the_same_boxes_in_any_batch(draw: object) -> None:
    extra = (keyed_random.numpy_generator(0, "coin", 1),) if draw is half_boxes else ()
    whole = draw(rngs(6), *extra, 32)  # type: ignore[operator]
    extra = (keyed_random.numpy_generator(0, "coin", 1),) if draw is half_boxes else ()
    part = draw(rngs(6)[2:4], *extra, 32)  # type: ignore[operator]
    assert torch.equal(whole[2:4], part)
    assert len(draw([], *((keyed_random.numpy_generator(0, "coin", 1),) if draw is half_boxes else ()), 32)) == 0  # type: ignore[operator]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7))
def test_class_mask_takes_half_of_the_classes_that_are_there(seed: int, classes: int) -> None:
    gen = np.random.default_rng(seed)
    labels = torch.from_numpy(gen.integers(0, classes, (4, 6, 5))) // torch.tensor([1, 2, 3, classes]).view(4, 1, 1)
    valid = torch.from_numpy(gen.random((4, 6, 5)) < 0.8)
    valid[0] = seed % 3 > 0
    uniform = torch.from_numpy(gen.random((4, classes), np.float32))
    mask = class_mask(labels, valid, uniform)
    for i in range(4):
        there = sorted(set(labels[i][valid[i]].tolist()), key=lambda k, i=i: float(uniform[i, k]))
        chosen = there[: len(there) // 2]
        expected = np.isin(labels[i].numpy(), chosen) & valid[i].numpy()
        assert np.array_equal(mask[i].numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_paste_takes_the_partner_s_pixels(dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(0)
    mask, partner = torch.rand(4, 8, 6, generator=gen) < 0.5, torch.tensor([2, 3, 1, 0])
    for shape in ((4, 3, 8, 6), (4, 8, 6)):
        x = torch.randint(0, 2, shape, generator=gen).to(dtype)
        before, expected = x.clone(), x.clone()
        for i in range(4):
            expected[i, ..., mask[i]] = x[partner[i]][..., mask[i]]
        assert torch.equal(paste(x, mask, partner), expected) and torch.equal(x, before)


def test_paste_of_a_box_is_cutmix() -> None:
    boxes, partner = beta_boxes(rngs(4), 32), pair_partner(4)
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(paste(x, box_mask(boxes, 32, 32), partner), apply_cutmix(x, CutMix(boxes, partner)))


def test_paste_refuses_what_would_mix_wrongly() -> None:
    x, mask = torch.rand(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="image 1 is its own"):
        paste(x, mask, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="sizes must agree"):
        paste(x, mask[:, :4], pair_partner(2))
    with pytest.raises(ValueError, match="3 partners"):
        paste(x, mask, torch.tensor([1, 0, 1]))


def words(n: int, length: int, seed: int) -> TextBatch:
    gen = torch.Generator().manual_seed(seed)
    return TextBatch(torch.rand(n, length, 3, generator=gen), torch.rand(n, length, generator=gen) < 0.7)


def test_words_come_with_a_box_and_only_with_a_box() -> None:
    text = words(4, 5, 0)
    boxes = torch.tensor([[0, 0, 8, 8], [0, 0, 0, 0], [0, 0, 0, 0], [8, 0, 16, 8]])
    found = mix_text(text, CutMix(boxes, pair_partner(4)))
    assert found is not None and mix_text(None, CutMix(boxes, pair_partner(4))) is None
    for i, boxed in enumerate((True, False, False, True)):
        assert torch.equal(found.tokens[i, :5], text.tokens[i]) and torch.equal(found.mask[i, :5], text.mask[i])
        partner = text.mask[i ^ 1] if boxed else torch.zeros(5, dtype=torch.bool)
        assert torch.equal(found.mask[i, 5:], partner) and text.mask[i ^ 1].any()
        assert torch.equal(found.tokens[i, 5:][partner], text.tokens[i ^ 1][partner])


def test_joined_batches_of_words_keep_each_image_s_own() -> None:
    first, second = words(2, 3, 1), words(3, 5, 2)
    for one, other in ((first, second), (second, first)):
        found = join_text(one, other)
        assert found is not None and found.tokens.shape == (5, 5, 3) and join_text(one, None) is None
        mine = [(text.tokens[i][text.mask[i]]) for text in (one, other) for i in range(len(text.mask))]
        for i, tokens in enumerate(mine):
            assert torch.equal(found.tokens[i][found.mask[i]], tokens)
