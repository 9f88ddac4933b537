"""A data set as training reads it: images, masks, the labelled list, captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from viladiff.config.pixel_format import RGB_8, PixelFormat
from viladiff.data.captions.simulated import Captions, CaptionTable, Control, Images
from viladiff.data.files.file_cache import Contents
from viladiff.data.files.index import FileList


class Arrays(Protocol):
    """An array of arrays, or what looks like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Dataset:
    """A pool of training images with a labelled list, and a validation set.

    Images are memory-mapped arrays, or files that are decoded when they are asked for.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    images: Arrays = field(repr=False)
    """N times (H, W, 3) uint8; as ``pixels`` says for files that declare other channels or values."""
    masks: Arrays = field(repr=False)
    """N times (H, W) uint8, of the whole pool; training reads masks through ``target`` alone, and those of unlabelled
    files need not exist."""
    val_images: Arrays = field(repr=False)
    val_masks: Arrays = field(repr=False)
    labelled: np.ndarray
    """(n,) int64 indices into the pool."""
    unlabelled: np.ndarray
    """(N - n,) int64: the rest of the pool."""
    captions: Captions = field(repr=False)
    """Per image of the pool, one text per prompt."""
    val_captions: Captions = field(repr=False)
    fingerprint: str
    """Names pixels, labelled list and captions."""
    caption_source: str
    """Who wrote the captions, in words that a page can print."""
    pixels: PixelFormat = RGB_8
    """What the pixels of its files are."""
    uniform: bool = True
    """Whether all images have one size and lie in arrays; those in files have any."""
    files: FileList | None = field(default=None, repr=False)
    """Name and path of each image of the pool, where there are files."""
    val_files: FileList | None = field(default=None, repr=False)
    scored: str = "val"
    """Which part of the data the validation images are."""
    split_name: str = ""
    """Which list the labelled images are, in words, where it comes from a file."""
    contents: Contents | None = field(default=None, repr=False)
    """What is known of the files, where there are some."""
    notes: tuple[str, ...] = ()
    """What a reader of the results should know of the lists, a sentence each."""
    unused: tuple[str, ...] = ()
    """A sentence that counts the files below its folders that are not used, for the record."""

    @cached_property
    def _labels(self) -> frozenset[int]:
        return frozenset(self.labelled.tolist())

    def target(self, index: int) -> np.ndarray:
        """Return the (H, W) uint8 mask of a labelled image. Raises ValueError for any other image."""
        self._check_labelled(index)
        return self.masks[index]

    def target_path(self, index: int) -> Path:
        """Return the path of ``target(index)`` without opening it.

        Raises ValueError if there are no files, and as ``target``.
        """
        self._check_labelled(index)
        if self.files is None:
            raise ValueError(f"{self.name}: its masks are not in files")
        return self.files.masks[index]

    def oracle_masks(self, indices: Sequence[int]) -> np.ndarray:
        """Return (n, H, W) uint8 true masks of the pool, for oracle controls. Raises ValueError for data in files."""
        if self.files is not None:
            raise ValueError(f"method.pseudo.oracle: masks of unlabelled images of {self.name!r} are never read")
        return np.stack([self.masks[i] for i in indices])

    def caption_table(
        self, part: Literal["train", "val"], control: Control = "own", seed: int = 0, on: Images = "both"
    ) -> CaptionTable:
        """Return the texts of the pool or of validation under a control, by ``train/0`` or ``val/0`` on.

        on: images of the pool that keep their texts, after captions have been exchanged. Raises ValueError as
        ``variant``.
        """
        texts = self.captions if part == "train" else self.val_captions
        own = CaptionTable({f"{part}/{i}": lines for i, lines in enumerate(texts)}, self.caption_source)
        found = own.variant(control, seed)
        if part == "val" or on == "both":
            return found
        kept = {f"train/{i}" for i in (self.labelled if on == "labelled" else self.unlabelled).tolist()}
        return found.silenced(image for image in found if image not in kept)

    def _check_labelled(self, index: int) -> None:
        if int(index) not in self._labels:
            raise ValueError(f"{self.name}: image {index} is not among the {len(self.labelled)} labelled ones")
