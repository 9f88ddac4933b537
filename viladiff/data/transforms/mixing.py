"""Mixing of neighbours in a batch: CutMix in the four published forms, ClassMix, and CutOut's squares.

The pasted part is either a ``CutMix`` (one box an image, also on coarser maps) or a mask of any shape. Boxes are drawn
on the host, each from its own generator, so that an image is mixed alike in any batch, on any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from viladiff.data.batch import CutMix, TextBatch

TRIES = 1000


def pair_partner(n: int) -> Tensor:
    """Pair image 2k with 2k + 1: (n,) int64. Raises ValueError for an odd n."""
    if n % 2:
        raise ValueError(f"{n} unlabelled images: CutMix pairs neighbours, so every worker needs an even number")
    return torch.arange(n) ^ 1


def cutmix_boxes(
    draws: Sequence[np.random.Generator],
    size: int,
    snap: int,
    p: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """Draw one box per generator for crops of size x size: (n, 4) int64 top, left, bottom, right; all zero for none.

    With probability p an area is drawn (share of the crop), then aspect (height / width) and position until the box
    fits, as in UniMatch. Edges are multiples of ``snap`` pixels, so the area is met up to rounding; a box has at least
    one cell of the grid. Raises ValueError if snap does not divide size or no box of that shape fits.
    """
    if snap < 1 or size % snap:
        raise ValueError(f"snap = {snap}: must divide the crop's side, {size}")
    boxes = [_box(rng, size // snap, area, aspect) if rng.random() < p else (0, 0, 0, 0) for rng in draws]
    return torch.tensor(boxes, dtype=torch.int64).view(-1, 4) * snap


def _box(
    rng: np.random.Generator, cells: int, area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    share = rng.uniform(*area) * cells**2
    for _ in range(TRIES):
        ratio = rng.uniform(*aspect)
        height, width = max(1, round((share * ratio) ** 0.5)), max(1, round((share / ratio) ** 0.5))
        top, left = int(rng.integers(cells)), int(rng.integers(cells))
        if top + height <= cells and left + width <= cells:
            return top, left, top + height, left + width
    raise ValueError(f"CutMix area {area} and aspect {aspect}: no such box fits into {cells} x {cells} cells")


def half_boxes(draws: Sequence[np.random.Generator], coin: np.random.Generator, size: int, p: float = 0.5) -> Tensor:
    """Draw boxes of half the crop's area, or with probability 1 - p none in the whole batch: (n, 4) int64 as above.

    U2PL's form. The width is uniform between S / 2 and S, the height follows, the position is uniform; edges are whole
    pixels. ``coin`` decides for all images, so every worker must pass the same one.
    """
    if coin.random() >= p:
        return torch.zeros(len(draws), 4, dtype=torch.int64)
    boxes = []
    for rng in draws:
        width = int(rng.integers(-(-size // 2), size + 1))
        height = min(size, round(size**2 / (2 * width)))
        top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
        boxes.append((top, left, top + height, left + width))
    return torch.tensor(boxes, dtype=torch.int64).view(-1, 4)


def beta_boxes(draws: Sequence[np.random.Generator], size: int, concentration: float = 4.0) -> Tensor:
    """Draw one square per generator, clipped at the border: (n, 4) int64 as above, never without a pixel.

    The form of PS-MT and SwiTh: λ ~ Beta(4, 4), side S sqrt(1 - λ), centre uniform in [S / 8, S).
    """
    boxes = []
    for rng in draws:
        side = size * float(1 - rng.beta(concentration, concentration)) ** 0.5
        row, column = (int(x) for x in rng.integers(size // 8, size, 2))
        low, high = int(side / 2), max(1, round(side - int(side / 2)))
        edges = (row - low, column - low, row + high, column + high)
        boxes.append(tuple(min(max(edge, 0), size) for edge in edges))
    return torch.tensor(boxes, dtype=torch.int64).view(-1, 4)


def square_boxes(draws: Sequence[np.random.Generator], size: int, share: float) -> Tensor:
    """Draw one square per generator, its side ``share`` of the crop's: (n, 4) int64 as above, uniform within the crop.

    CutOut's form, with whole pixels; a share of 0 gives no box.
    """
    side = round(share * size)
    corners = [rng.integers(size - side + 1, size=2) for rng in draws] if side else [np.zeros(2, int)] * len(draws)
    return torch.tensor([[*corner, *(corner + side)] for corner in corners], dtype=torch.int64).view(-1, 4)


def parity_boxes(
    draws: Sequence[np.random.Generator], size: int, count: int = 3, area: tuple[float, float] = (0.25, 0.5)
) -> Tensor:
    """Draw several boxes per generator for ``parity_mask``: (n, count, 4) int64, of ``area`` of the crop together.

    CPS's form; the boxes have equal areas, heights log-uniform from that share to the whole side (ours), whole pixels.
    Where boxes overlap, less than ``area`` is pasted.
    """
    boxes = []
    for rng in draws:
        share = rng.uniform(*area) / count
        heights = share ** rng.random(count)
        sides = np.stack([heights, share / heights], 1)
        cells = np.maximum(1, np.round(sides * size)).astype(int)
        start = np.round(rng.random((count, 2)) * (size - cells)).astype(int)
        boxes.append(np.concatenate([start, start + cells], 1))
    return torch.from_numpy(np.stack(boxes)) if boxes else torch.zeros(0, count, 4, dtype=torch.int64)


def parity_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return (n, height, width) bool: pixels inside an odd number of an image's boxes (n, k, 4)."""
    inside = box_mask(boxes.flatten(0, 1), height, width)
    return inside.view(*boxes.shape[:2], height, width).sum(1) % 2 == 1


def class_mask(labels: Tensor, valid: Tensor, uniform: Tensor) -> Tensor:
    """Return (n, H, W) bool: the pixels of half of the classes of each image, rounded down.

    ClassMix's choice. ``labels`` (n, H, W) int64 in 0 .. C-1, ``valid`` (n, H, W) bool, False where no pixel may be
    pasted, ``uniform`` (n, C) random numbers that order the classes. Paste with ``paste(x, mask[partner], partner)``.
    """
    flat = labels.flatten(1)
    present = torch.zeros_like(uniform).scatter_reduce_(1, flat, valid.flatten(1).to(uniform.dtype), "amax")
    rank = (uniform + 2 * (1 - present)).argsort(1).argsort(1)  # absent classes come last
    chosen = rank < (present.sum(1, keepdim=True) / 2).floor()
    return chosen.gather(1, flat).view_as(labels) & valid


def paste(x: Tensor, mask: Tensor, partner: Tensor) -> Tensor:
    """Paste each partner's pixels where ``mask`` (n, H, W) is True, in (n, ..., H, W) of any type; a new tensor.

    Raises ValueError if sizes differ, and, for partners on the CPU, if an image is its own.
    """
    if len(x) != len(mask) or len(x) != len(partner) or x.shape[-2:] != mask.shape[-2:]:
        raise ValueError(f"x {tuple(x.shape)}, mask {tuple(mask.shape)}, {len(partner)} partners: sizes must agree")
    if partner.device.type == "cpu":
        _check_partner(partner, torch.ones_like(partner, dtype=torch.bool))
    return _pasted(x, mask, partner)


def _pasted(x: Tensor, mask: Tensor, partner: Tensor) -> Tensor:
    return torch.where(mask.view(len(x), *[1] * (x.ndim - 3), *x.shape[-2:]), x[partner], x)


def box_mask(boxes: Tensor, height: int, width: int, stride: float = 1) -> Tensor:
    """Return (n, height, width) bool, True inside the box, for a map whose cells are ``stride`` pixels wide."""
    rows = torch.arange(height, device=boxes.device) * stride
    columns = torch.arange(width, device=boxes.device) * stride
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def apply_cutmix(x: Tensor, cutmix: CutMix, stride: float = 1) -> Tensor:
    """Paste each partner's box into (n, ..., H, W) of any type, cells being ``stride`` pixels wide, in a new tensor.

    Raises ValueError if sizes differ, and, for boxes on the CPU (reading them on a GPU would stall it), if a box has an
    edge inside a cell or an image with a box is its own partner.
    """
    if len(x) != len(cutmix.boxes) or len(x) != len(cutmix.partner):
        raise ValueError(f"{len(x)} images, {len(cutmix.boxes)} boxes, {len(cutmix.partner)} partners: must be equal")
    where = (stride, x.shape[-2], x.shape[-1])
    if where not in cutmix.masks:
        if cutmix.boxes.device.type == "cpu":
            _check(cutmix, stride)
        cutmix.masks[where] = box_mask(cutmix.boxes, x.shape[-2], x.shape[-1], stride)
    return _pasted(x, cutmix.masks[where], cutmix.partner)


def _check(cutmix: CutMix, stride: float) -> None:
    if bool((cutmix.boxes % stride).any()):
        raise ValueError(f"stride = {stride}: must divide every edge of the boxes {cutmix.boxes.tolist()}")
    _check_partner(cutmix.partner, cutmix.boxes.any(1))


def _check_partner(partner: Tensor, mixed: Tensor) -> None:
    alone = (partner == torch.arange(len(partner))) & mixed
    if bool(alone.any()):
        raise ValueError(f"image {int(alone.nonzero()[0])} is its own CutMix partner: nothing would be mixed")


def mix_text(text: TextBatch | None, cutmix: CutMix) -> TextBatch | None:
    """Append the partner's text to images into which a box was pasted: (U, L, D) to (U, 2 L, D)."""
    if text is None:
        return None
    pasted = (cutmix.boxes.sum(1) > 0)[:, None]
    return TextBatch(
        torch.cat([text.tokens, text.tokens[cutmix.partner]], dim=1),
        torch.cat([text.mask, text.mask[cutmix.partner] & pasted], dim=1),
    )


def join_text(first: TextBatch | None, second: TextBatch | None) -> TextBatch | None:
    """Join two batches, the one with fewer words padded; None if either has no text."""
    if first is None or second is None:
        return None
    length = max(first.mask.shape[1], second.mask.shape[1])
    padded = [
        TextBatch(F.pad(text.tokens, (0, 0, 0, missing)), F.pad(text.mask, (0, missing)))
        for text in (first, second)
        for missing in [length - text.mask.shape[1]]
    ]
    return TextBatch(torch.cat([text.tokens for text in padded]), torch.cat([text.mask for text in padded]))
