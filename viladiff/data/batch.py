"""The batch that data layer, method and loop share, and the views that a method requests.

Shape letters used in every docstring: B images of a labelled batch, U of an unlabelled one, C classes, H x W pixels of
a crop, h x w cells of a feature grid, N = h * w tokens, D channels, L words, T diffusion steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from viladiff.data.constants import IGNORE as IGNORE  # most modules that need it need the batch as well


@dataclass(frozen=True)
class Views:
    """The views of each unlabelled image that a method requests from the data layer."""

    weak: int = 1
    strong: int = 0
    cutmix: bool = False
    text: bool = False
    strong_labelled: bool = False
    """Whether labelled images are wanted with the colour changes of a strong view as well."""
    pairs: bool = False
    """Whether the method itself mixes neighbours of a batch, whose number must then be even."""
    whole_cells: bool = False
    """Whether the method mixes feature maps as well, so that boxes must consist of whole patches."""
    cells: bool = False
    """Whether the method pools pixels by cells of a map, so that crops must consist of whole patches."""
    tags: bool = False
    """Whether the classes that each image's captions mention are wanted."""
    truth: bool = False
    """Whether true masks of unlabelled images are wanted: for oracle controls on built-in data alone."""
    apart: int = 1
    """Every such labelled image of a batch is of a part of the labelled list that is set apart; 1 where none is."""

    @property
    def unlabelled(self) -> bool:
        """False for a method that never looks at unlabelled images."""
        return self.weak + self.strong > 0

    @property
    def whole_patches(self) -> bool:
        """Whether sides of images must be multiples of the patch, whatever the network takes."""
        return self.whole_cells or self.cells or self.truth


@dataclass
class TextBatch:
    """Caption tokens of a batch of images, already encoded."""

    tokens: Tensor
    """(B, L, D) float32."""
    mask: Tensor
    """(B, L) bool, True where there is a word."""


class EvalBatch(NamedTuple):
    """Whole images of one size that are scored together."""

    images: Tensor
    """(B, N, H, W), normalised."""
    target: Tensor
    """(B, H, W) int64, 255 = ignore."""
    text: TextBatch | None = None
    places: tuple[int, ...] = ()
    """Of each image in the validation set; what is drawn for an image is named by it, whoever scores it and when."""


class TextBank(Protocol):
    """Encoded captions of a data set's images."""

    def batch(self, indices: Sequence[int]) -> TextBatch:
        """Return the texts of these images, on the CPU."""
        ...


@dataclass
class CutMix:
    """One box per image; the pixels inside come from the partner image of the same batch."""

    boxes: Tensor
    """(U, 4) int64: top, left, bottom, right in pixels, as ``data.cutmix_grid`` snaps them; all zero means no box."""
    partner: Tensor
    """(U,) int64: index of the image that the box is cut from."""
    masks: dict[tuple[float, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What is inside the boxes, by (stride, height, width) of a map; filled by ``apply_cutmix``."""


@dataclass
class Batch:
    """One worker's share of a step."""

    image: Tensor
    """(B, 3, H, W) normalised labelled images."""
    target: Tensor
    """(B, H, W) int64, 255 = ignore."""
    keys: tuple[int, ...]
    """One integer per labelled image that names its random draws: its place in the global batch."""
    weak: tuple[Tensor, ...] = ()
    """Each (U, 3, H, W)."""
    strong: tuple[Tensor, ...] = ()
    """Each (U, 3, H, W), CutMix not yet applied."""
    mix: tuple[CutMix, ...] = ()
    """One per strong view, or empty."""
    valid: Tensor = field(default_factory=lambda: torch.empty(0))
    """(U, H, W) bool, False in the padding of an unlabelled crop."""
    keys_u: tuple[int, ...] = ()
    """As ``keys``, for the unlabelled images."""
    text: TextBatch | None = None
    text_u: TextBatch | None = None
    image_strong: Tensor | None = None
    """(B, 3, H, W) ``image`` with the colour changes of a strong view, where they are wanted."""
    tags: Tensor | None = None
    """(B, C) float32, where wanted: 1 a class that the captions mention, 0 another, -1 where nothing is known."""
    tags_u: Tensor | None = None
    """(U, C) likewise."""
    truth_u: Tensor | None = None
    """(U, H, W) int64 true masks, 255 in padding, where an oracle control wants them."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch with every tensor on ``device``; those without content become zeros."""
        moved: dict[str, Any] = {f.name: _move(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **moved)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of the batch; one that is in two places comes twice."""
        for field_ in fields(self):
            yield from _tensors(getattr(self, field_.name))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, TextBatch | CutMix):
        for field_ in fields(value):
            yield from _tensors(getattr(value, field_.name))


def _move(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return torch.zeros_like(value, device=device) if value.is_meta else value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_move(item, device) for item in value)
    if isinstance(value, TextBatch | CutMix):
        moved: dict[str, Any] = {f.name: _move(getattr(value, f.name), device) for f in fields(value) if f.init}
        return replace(value, **moved)
    return value


class Losses(NamedTuple):
    """The result of a method's forward pass."""

    total: Tensor
    """Scalar with a gradient."""
    terms: dict[str, Tensor]
    """Detached scalars for the log."""
    parts: Mapping[str, Tensor] = MappingProxyType({})
    """Scalars with a gradient, weighted as in ``total``, which is their sum: whose share of the gradient is measured.

    ``sup`` is the supervised one. A part that some step lacks has no weight there.
    """


class Step(NamedTuple):
    """The position of a forward pass in training."""

    index: int  # type: ignore[assignment]  # a tuple has a method of that name, which nobody calls
    """Optimiser steps done so far."""
    progress: float
    """index / steps, in [0, 1)."""
    seed: int
    """The run's seed; draws are named by (seed, index, key of the image)."""
