"""The words of all images, encoded once into one memory-mapped array: in training a caption costs a look-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from viladiff.batch import TextBatch
from viladiff.data.cache import Facts, cache_dir, fingerprint, open_checked, open_or_make
from viladiff.data.datasets import Dataset
from viladiff.text.captions import Captions, CaptionTable, Control
from viladiff.text.encoders import WORDS_DIM, TextEncoder, build_encoder, unit

_REVISION = 1


@dataclass(frozen=True, eq=False)
class Bank:
    """Encoded captions of N images, by place; words of all of an image's captions follow one another."""

    tokens: np.ndarray
    """(N, L, D) float16."""
    mask: np.ndarray
    """(N, L) bool; a row of False is an image without text."""
    pooled: np.ndarray
    """(N, D) float16, length 1, or 0 for an image without text."""
    fingerprint: str
    """Names captions and encoder."""
    encoder: str
    source: str
    """Who wrote the captions."""
    unknown: int
    """Words that the encoder dropped."""

    @property
    def dim(self) -> int:
        """D, channels of a word."""
        return int(self.tokens.shape[2])

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Sequence[int] | np.ndarray) -> TextBatch:
        """Words of these images: tokens (B, L, D) float32 and mask (B, L), on the CPU."""
        rows = np.asarray(indices, dtype=np.int64)
        return TextBatch(torch.from_numpy(self.tokens[rows].astype(np.float32)), torch.from_numpy(self.mask[rows]))


def build_bank(captions: CaptionTable, encoder: TextEncoder, directory: Path) -> Bank:
    """The bank of these captions, made if missing, in a folder below ``directory`` named by captions and encoder.

    Raises ValueError where the folder is damaged or cannot be written.
    """
    name = fingerprint("bank", _REVISION, captions.hash(), encoder.name, encoder.fingerprint)

    def make(draft: Path) -> Facts:
        texts = tuple(captions.values())
        for file, array in encode_all(texts, encoder).items():
            np.save(draft / f"{file}.npy", array, allow_pickle=False)
        unknown = encoder.unknown([text for lines in texts for text in lines])
        return {"encoder": encoder.name, "source": captions.source, "unknown": unknown}

    open_or_make(directory / name, make)
    return open_bank(directory / name)


def open_bank(directory: Path) -> Bank:
    """A bank that exists. Raises ValueError that names the file where one is missing, truncated or altered."""
    arrays, facts = open_checked(directory)
    return Bank(
        **arrays,
        fingerprint=directory.name,
        encoder=str(facts["encoder"]),
        source=str(facts["source"]),
        unknown=int(facts["unknown"]),
    )


def encode_all(captions: Captions, encoder: TextEncoder) -> dict[str, np.ndarray]:
    """tokens, mask and pooled of a ``Bank``; each distinct text is encoded once."""
    places: dict[str, int] = {}
    for lines in captions:
        for text in lines:
            places.setdefault(text, len(places))
    each_tokens, each_mask, each_pooled = encoder.encode(list(places))
    lengths = each_mask.sum(1)
    total = max([1, *(sum(int(lengths[places[text]]) for text in lines) for lines in captions)])
    tokens = np.zeros((len(captions), total, encoder.dim), np.float16)
    mask = np.zeros((len(captions), total), bool)
    pooled = np.zeros((len(captions), encoder.dim), np.float32)
    for image, lines in enumerate(captions):
        end = 0
        for place in (places[text] for text in lines):
            start, end = end, end + int(lengths[place])
            tokens[image, start:end] = each_tokens[place, each_mask[place]]
            pooled[image] += each_pooled[place]
        mask[image, :end] = True
    return {"tokens": tokens, "mask": mask, "pooled": unit(pooled).astype(np.float16)}


def load_text(dataset: Dataset, encoder: str = "words", variant: Control = "own", seed: int = 0) -> tuple[Bank, Bank]:
    """Banks of the training pool and of validation, both under the same control.

    The encoder learns from the pool's own captions whatever the control, so that only the pairing changes. Where no
    image has a caption no encoder is needed, and both banks are silent. Raises ValueError for an unknown encoder or
    control, and for a damaged or unwritable cache.
    """
    if not any(dataset.captions) and not any(dataset.val_captions):
        return silent(len(dataset.images)), silent(len(dataset.val_images))
    learned = build_encoder(encoder, dataset.captions)
    train, val = (
        build_bank(_table(part, texts, dataset.caption_source).variant(variant, seed), learned, cache_dir() / "text")
        for part, texts in (("train", dataset.captions), ("val", dataset.val_captions))
    )
    return train, val


def text_vectors(dataset: Dataset, encoder: str = "words") -> Callable[[Sequence[str]], torch.Tensor]:
    """Texts to their pooled vectors (n, D) float32; the encoder is that of the captions and is made when it is asked.

    Where no image has a caption, an encoder that learns does so from the texts asked for. A text of which no word is
    known has a vector of 0. Raises ValueError as ``build_encoder``.
    """

    def encode(texts: Sequence[str]) -> torch.Tensor:
        learned = build_encoder(encoder, dataset.captions if any(dataset.captions) else [(text,) for text in texts])
        return torch.from_numpy(learned.encode(texts)[2].astype(np.float32))

    return encode


def silent(images: int) -> Bank:
    """The bank of images without a word; its width is that of the ``words`` encoder, so that networks can be built."""
    return Bank(
        tokens=np.zeros((images, 1, WORDS_DIM), np.float16),
        mask=np.zeros((images, 1), bool),
        pooled=np.zeros((images, WORDS_DIM), np.float16),
        fingerprint="no captions",
        encoder="none",
        source="no captions",
        unknown=0,
    )


def _table(part: str, captions: Captions, source: str) -> CaptionTable:
    return CaptionTable({f"{part}/{index}": lines for index, lines in enumerate(captions)}, source)
