"""CutMix between neighbours of a batch, with boxes on the patch grid, so that tokens and logits can be cut alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from viladiff.batch import CutMix, TextBatch

TRIES = 1000


def pair_partner(n: int) -> Tensor:
    """Image 2k is cut from 2k + 1 and the other way round: (n,) int64. ValueError for an odd n."""
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
    """One box per generator for crops of size x size: (n, 4) int64 top, left, bottom, right; all zero without a box.

    With probability p an area is drawn (share of the crop), then aspect (height / width) and place until the box fits,
    as UniMatch does. Edges are multiples of ``snap`` pixels, so the area is met up to rounding; a box has at least one
    cell of the grid. ValueError where snap does not divide size or no box of that shape fits.
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


def box_mask(boxes: Tensor, height: int, width: int, stride: int = 1) -> Tensor:
    """(n, height, width) bool, True inside the box, for a map whose cells are ``stride`` pixels wide."""
    rows = torch.arange(height, device=boxes.device) * stride
    columns = torch.arange(width, device=boxes.device) * stride
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def apply_cutmix(x: Tensor, cutmix: CutMix, stride: int = 1) -> Tensor:
    """Pastes each partner's box into (n, ..., H, W) of any type, cells being ``stride`` pixels wide, in a new tensor.

    ValueError where sizes differ, and, for boxes on the CPU (looking at them on a GPU would stall it), where a box has
    an edge inside a cell or an image with a box is its own partner.
    """
    if len(x) != len(cutmix.boxes) or len(x) != len(cutmix.partner):
        raise ValueError(f"{len(x)} images, {len(cutmix.boxes)} boxes, {len(cutmix.partner)} partners: must be equal")
    where = (stride, x.shape[-2], x.shape[-1])
    if where not in cutmix.masks:
        if cutmix.boxes.device.type == "cpu":
            _check(cutmix, stride)
        cutmix.masks[where] = box_mask(cutmix.boxes, x.shape[-2], x.shape[-1], stride)
    mask = cutmix.masks[where].view(len(x), *[1] * (x.ndim - 3), *x.shape[-2:])
    return torch.where(mask, x[cutmix.partner], x)


def _check(cutmix: CutMix, stride: int) -> None:
    if bool((cutmix.boxes % stride).any()):
        raise ValueError(f"stride = {stride}: must divide every edge of the boxes {cutmix.boxes.tolist()}")
    alone = (cutmix.partner == torch.arange(len(cutmix.partner))) & cutmix.boxes.any(1)
    if bool(alone.any()):
        raise ValueError(f"image {int(alone.nonzero()[0])} is its own CutMix partner: nothing would be mixed")


def mix_text(text: TextBatch | None, cutmix: CutMix) -> TextBatch | None:
    """Where a box is pasted in, the partner's words belong to the picture too: (U, L, D) to (U, 2 L, D)."""
    if text is None:
        return None
    pasted = (cutmix.boxes.sum(1) > 0)[:, None]
    return TextBatch(
        torch.cat([text.tokens, text.tokens[cutmix.partner]], dim=1),
        torch.cat([text.mask, text.mask[cutmix.partner] & pasted], dim=1),
    )


def join_text(first: TextBatch | None, second: TextBatch | None) -> TextBatch | None:
    """One batch from two, the one with fewer words padded; None where either has no text."""
    if first is None or second is None:
        return None
    length = max(first.mask.shape[1], second.mask.shape[1])
    padded = [
        TextBatch(F.pad(text.tokens, (0, 0, 0, missing)), F.pad(text.mask, (0, missing)))
        for text in (first, second)
        for missing in [length - text.mask.shape[1]]
    ]
    return TextBatch(torch.cat([text.tokens for text in padded]), torch.cat([text.mask for text in padded]))
