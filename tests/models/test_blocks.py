"""Maps between grids: means over cells, the pixel at a cell's corner, resampling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from viladiff.models.blocks import at_cells, bilinear, cell_means, resampled


def test_whole_cells_are_sliced_and_averaged_as_ever() -> None:
    pixels = torch.rand(2, 12, 20)
    assert torch.equal(at_cells(pixels, 4), pixels[:, ::4, ::4])
    assert torch.equal(cell_means(pixels, 4), F.avg_pool2d(pixels[:, None], 4)[:, 0])


def covered(pixels: Tensor, stride: float) -> Tensor:
    """Means over all pixels that a cell touches, cell by cell."""
    rows, columns = (round(side / stride) for side in pixels.shape[1:])
    found = torch.zeros(len(pixels), rows, columns)
    for i in range(rows):
        for j in range(columns):
            top, left = int(i * stride), int(j * stride)
            bottom, right = -int(-(i + 1) * stride // 1), -int(-(j + 1) * stride // 1)
            found[:, i, j] = pixels[:, top:bottom, left:right].mean((1, 2))
    return found


@pytest.mark.parametrize(("height", "width"), [(14, 28), (56, 42)])
def test_cells_of_no_whole_width(height: int, width: int) -> None:
    pixels = torch.arange(2.0 * height * width).view(2, height, width)
    picked = at_cells(pixels, 1.75)
    assert picked.shape == (2, height * 8 // 14, width * 8 // 14)
    for i, j in ((0, 0), (3, 5), (7, 15)):
        assert torch.equal(picked[:, i, j], pixels[:, int(i * 1.75), int(j * 1.75)])
    torch.testing.assert_close(cell_means(pixels, 1.75), covered(pixels, 1.75))


def test_a_map_shrinks_by_means_and_grows_bilinearly() -> None:
    x = torch.rand(2, 3, 8, 16)
    assert resampled(x, (8, 16)) is x
    expected = x.unflatten(3, (4, 4)).unflatten(2, (4, 2)).mean((3, 5))
    torch.testing.assert_close(resampled(x, (4, 4)), expected)
    torch.testing.assert_close(resampled(x, (16, 32)), bilinear(x, (16, 32)))
