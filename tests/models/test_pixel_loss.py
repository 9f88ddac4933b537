"""Cross-entropy of enlarged logits as one operation against torch's own operations, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from interpreted import check_kernels
from torch import Tensor, nn

from viladiff.evaluation.operations import OperationCounter
from viladiff.losses import pixel_cross_entropy
from viladiff.models.blocks import upsample
from viladiff.models.fused import pixel_loss
from viladiff.models.fused.pixel_loss import MANY, grid_cross_entropy, grid_top

SHAPES = [
    ((16, 5), (64, 20), False),
    ((5, 4), (17, 13), False),
    ((4, 5), (16, 20), True),
    ((1, 3), (4, 12), False),
    ((1, 3), (4, 12), True),
    ((9, 7), (5, 5), False),
    ((6, 6), (6, 6), False),
]
"""Cells, pixels, whether corners are aligned: whole and other factors, one cell, fewer pixels than cells."""


def example(classes: int, cells: tuple[int, int], pixels: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Grid logits, labels with ignored pixels, and a weight of each pixel, 0 in some."""
    gen = torch.Generator().manual_seed(classes)
    grid = 4 * torch.randn(2, classes, *cells, generator=gen)
    target = torch.randint(classes, (2, *pixels), generator=gen)
    target[0, :2], weight = 255, torch.rand(2, *pixels, generator=gen)
    return grid, target, weight * (weight > 0.2)


def plain(grid: Tensor, target: Tensor, align: bool) -> Tensor:
    return pixel_cross_entropy(upsample(grid, target.shape[-2:], align), target)


def check(classes: int, cells: tuple[int, int], pixels: tuple[int, int], align: bool, new: object) -> None:
    grid, target, weight = example(classes, cells, pixels)
    mine, theirs = (grid.clone().requires_grad_() for _ in range(2))
    found, expected = new(mine, target, align), plain(theirs, target, align)  # type: ignore[operator]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    assert (found[target == 255] == 0).all()
    for loss in (found, expected):
        (loss * weight).sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("cells", "pixels", "align"), SHAPES)
def test_pieces_are_the_whole(
    cells: tuple[int, int], pixels: tuple[int, int], align: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_loss, "PIECE", MANY * 100)
    monkeypatch.setattr(pixel_loss, "pixel_cross_entropy", None)  # not the way that is compared with
    check(MANY, cells, pixels, align, grid_cross_entropy)


def test_few_classes_are_as_ever_bit_for_bit() -> None:
    grid, target, _ = example(5, (16, 16), (64, 64))
    assert torch.equal(grid_cross_entropy(grid, target), plain(grid, target, False))
    top, expected = grid_top(grid, (64, 64)), upsample(grid, (64, 64)).softmax(1).max(1)
    assert torch.equal(top[0], expected.values) and torch.equal(top[1], expected.indices)


def test_a_target_of_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target \(3, 8, 8\) does not fit grid \(2, 5, 4, 4\)"):
        grid_cross_entropy(torch.zeros(2, 5, 4, 4), torch.zeros(3, 8, 8, dtype=torch.int64))


@pytest.mark.parametrize("classes", [81, 150])
def test_a_gpu_moves_less_than_half_the_bytes(classes: int) -> None:
    moved = []
    for loss in (grid_cross_entropy, plain):
        grid = torch.empty(4, classes, 32, 32, device="meta", requires_grad=True)
        target = torch.empty(4, 128, 128, dtype=torch.int64, device="meta")
        counter = OperationCounter(nn.Identity())
        with counter:
            loss(grid, target, False).sum().backward()
        moved.append(sum(line.load.bytes * line.load.times for line in counter.lines()))
    assert 2 * moved[0] < moved[1]


KERNELS = """
import torch
from test_pixel_loss import SHAPES, check, example, upsample
SHAPES = SHAPES[1:]  # without the largest
ops = torch.ops.viladiff
for cells, pixels, align in SHAPES:
    check(5, cells, pixels, align, lambda grid, target, align: ops.grid_cross_entropy(grid, target, align)[0])
    grid = example(5, cells, pixels)[0]
    confidence, label = ops.grid_top(grid, *pixels, align)
    expected = upsample(grid, pixels, align).softmax(1).max(1)
    torch.testing.assert_close(confidence, expected.values, rtol=1e-6, atol=1e-6)
    assert torch.equal(label, expected.indices)
from viladiff.models.fused import pixel_kernels, pixel_loss
assert pixel_loss._agrees(torch.device("cpu"))
for name in ("loss_gradient", "top_maps"):  # one that is wrong is noticed before its first use
    right = getattr(pixel_kernels, name)
    setattr(pixel_kernels, name, lambda *given: 2 * right(*given) if name == "loss_gradient" else right(*given)[::-1])
    pixel_loss._agrees.cache_clear()
    assert not pixel_loss._agrees(torch.device("cpu")), name
    setattr(pixel_kernels, name, right)
print("kernels agree")
"""


@pytest.mark.slow
def test_kernels_agree_with_torch() -> None:
    check_kernels(KERNELS)
