"""Encoded captions of all images in one memory-mapped array: in training a caption is a look-up."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path

import numpy as np
import torch

from viladiff.core.progress import Advance
from viladiff.data.batch import TextBatch
from viladiff.data.cache import Facts, cache_dir, fingerprint, open_checked, open_or_make
from viladiff.data.captions.simulated import Captions, CaptionTable, Control, Images
from viladiff.data.dataset import Dataset
from viladiff.text.base import LONGEST, TextEncoder, unit
from viladiff.text.encoders import WORDS_DIM, build_text_encoder

_REVISION = 1
CHUNK = 1024
"""Images whose words are encoded, and held in memory, at once."""
UNEVEN = 0.5
"""A difference between the shares of labelled and of unlabelled images with a caption above which a run says so."""
NO_CAPTIONS = "no captions"
"""Stands for the fingerprint of a bank without a word."""


@dataclass(eq=False)
class EmbeddingBank:
    """Encoded captions of N images, by place; words of all of an image's captions follow one another."""

    tokens: np.ndarray
    """(R, L, D) float16."""
    mask: np.ndarray
    """(R, L) bool; a row of False is an image without text."""
    pooled: np.ndarray
    """(R, D) float16, length 1, or 0 for an image without text."""
    fingerprint: str
    """Names captions and encoder."""
    encoder: str
    source: str
    """Who wrote the captions."""
    unknown: int
    """Words that the encoder does not know, in all rows."""
    cut: int = 0
    """Captions that were longer than the encoder reads."""
    rows: np.ndarray | None = None
    """(N,) int64, the row of each image, where images share rows; else they are numbered alike."""
    _file: FileIO | None = field(default=None, repr=False)
    """Where ``tokens`` is mapped from, kept open: reading a row costs one call, and through the map a fault a page."""

    @property
    def dim(self) -> int:
        """D, channels of a word."""
        return int(self.tokens.shape[2])

    def __len__(self) -> int:
        return len(self.tokens if self.rows is None else self.rows)

    def batch(self, indices: Sequence[int] | np.ndarray) -> TextBatch:
        """Return the texts of these images: tokens (B, L, D) float32 and mask (B, L), on the CPU."""
        rows = self._rows(indices)
        mask = torch.from_numpy(self.mask[rows])
        return TextBatch(torch.from_numpy(self._tokens_of(rows)).float(), mask)

    def pooled_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return (B, D) float32: the pooled vectors of these images."""
        return self.pooled[self._rows(indices)].astype(np.float32)

    def share_with_text(self, indices: Sequence[int] | np.ndarray) -> float:
        """Return the share of these images that have text; there must be some."""
        return float(self.mask[self._rows(indices)].any(axis=1).mean())

    def notes(self) -> tuple[str, ...]:
        """Return a note for each loss of the encoder."""
        lost = []
        if self.unknown:
            lost.append(f"text encoder {self.encoder!r}: does not know {self.unknown} words of the captions")
        if self.cut:
            lost.append(
                f"text encoder {self.encoder!r}: {self.cut} captions are longer than {LONGEST} tokens and were cut"
            )
        return tuple(lost)

    def _tokens_of(self, rows: np.ndarray) -> np.ndarray:
        """Return (B, L, D) float16. Raises ValueError that names the file if it has been truncated since."""
        if self._file is None or not isinstance(self.tokens, np.memmap):
            return self.tokens[rows]
        found = np.empty((len(rows), *self.tokens.shape[1:]), self.tokens.dtype)
        size = self.tokens[:1].nbytes
        for into, row in zip(found, (int(row) % len(self.tokens) for row in rows), strict=True):
            got = os.preadv(self._file.fileno(), [into], self.tokens.offset + row * size)
            if got < size:
                raise ValueError(f"{self._file.name}: {got} of {size} bytes of row {row} are there; the file was cut")
        return found

    def _rows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        places = np.asarray(indices, dtype=np.int64)
        return places if self.rows is None else self.rows[places]


def uneven_notes(bank: EmbeddingBank, dataset: Dataset, labels_read_text: bool) -> tuple[str, ...]:
    """Return a note if labelled and unlabelled images differ in having captions, and pseudo-labels are read from them.

    Then the network labels images of a kind that it learned nothing about from masks: ``ablations/captions.toml``.
    """
    if not labels_read_text or not len(dataset.labelled) or not len(dataset.unlabelled):
        return ()
    shares = [bank.share_with_text(part) for part in (dataset.labelled, dataset.unlabelled)]
    if abs(shares[0] - shares[1]) <= UNEVEN:
        return ()
    return (
        f"captions: {shares[0]:.0%} of the labelled and {shares[1]:.0%} of the unlabelled images have one, and "
        "pseudo-labels come from the fusion stream: training collapsed where one of the two had none; caption both, "
        "or set method.pseudo.source=visual",
    )


def build_bank(
    captions: CaptionTable, encoder: TextEncoder, directory: Path, advance: Advance | None = None
) -> EmbeddingBank:
    """Build the bank of these captions, unless it exists below ``directory`` in a folder named by captions and encoder.

    ``advance`` is called with the number of encoded images and their total. Raises ValueError if the folder is damaged
    or cannot be written.
    """
    place = directory / bank_name(captions, encoder)

    def make(draft: Path) -> Facts:
        texts = tuple(captions.values())
        write_all(draft, texts, encoder, advance)
        every = [text for lines in texts for text in lines]
        lost = {"unknown": encoder.unknown(every), "cut": encoder.cut(every)}
        return {"encoder": encoder.name, "source": captions.source, **lost}

    if not place.exists():
        with _alone(directory):
            open_or_make(place, make)
    return open_bank(place)


def bank_name(captions: CaptionTable, encoder: TextEncoder) -> str:
    """Return the folder of ``build_bank``, whether it exists or not."""
    return fingerprint("bank", _REVISION, captions.hash(), encoder.name, encoder.fingerprint)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Admit one process of a machine at a time, so that several workers do not all encode a bank."""
    with suppress(OSError):  # where it cannot be made, open_or_make says so
        directory.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):  # some network file systems have no locks; the second to finish throws its copy away
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_bank(directory: Path) -> EmbeddingBank:
    """Open an existing bank. Raises ValueError that names the file if one is missing, truncated or altered."""
    arrays, facts = open_checked(directory)
    return EmbeddingBank(
        _file=FileIO(directory / "tokens.npy"),
        tokens=arrays["tokens"],
        mask=arrays["mask"],
        pooled=arrays["pooled"],
        fingerprint=directory.name,
        encoder=str(facts["encoder"]),
        source=str(facts["source"]),
        unknown=int(facts["unknown"]),
        cut=int(facts.get("cut", 0)),
    )


def write_all(draft: Path, captions: Captions, encoder: TextEncoder, advance: Advance | None = None) -> None:
    """Write the arrays of an ``EmbeddingBank`` to ``draft``; only CHUNK images are in memory at a time."""
    lengths = encoder.lengths([text for lines in captions for text in lines])
    ends = np.concatenate([[0], np.cumsum(lengths)])[np.cumsum([0, *map(len, captions)])]
    shape = len(captions), max(1, int(np.diff(ends).max(initial=0)))
    kinds = {
        "tokens": ((*shape, encoder.dim), np.float16),
        "mask": (shape, bool),
        "pooled": ((shape[0], encoder.dim), np.float16),
    }
    files = {
        name: np.lib.format.open_memmap(draft / f"{name}.npy", "w+", dtype, wide)
        for name, (wide, dtype) in kinds.items()
    }
    for start in range(0, len(captions), CHUNK):
        some = slice(start, start + CHUNK)
        for name, array in encode_all(captions[some], encoder).items():
            into = files[name][some]
            (into if name == "pooled" else into[:, : array.shape[1]])[...] = array
        if advance is not None:
            advance(min(start + CHUNK, len(captions)), len(captions))
    for file in files.values():
        file.flush()


def encode_all(captions: Captions, encoder: TextEncoder) -> dict[str, np.ndarray]:
    """Return tokens, mask and pooled of an ``EmbeddingBank``; each distinct text is encoded once."""
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


def load_text(
    dataset: Dataset,
    encoder: str = "words",
    variant: Control = "own",
    seed: int = 0,
    model: str | None = None,
    advance: Advance | None = None,
    on: Images = "both",
) -> tuple[EmbeddingBank, EmbeddingBank]:
    """Load banks of the training pool and of validation under one control; ``on``: see ``Dataset.caption_table``.

    ``words`` learns from the pool's own captions whatever the control, so that only the pairing changes; ``model`` is
    the directory of a pretrained encoder. If no image has a caption, no encoder is needed, and both banks are empty.
    Raises ValueError for an unknown encoder or control, for a directory that holds no such encoder, and for a damaged
    or unwritable cache.
    """
    if not any(dataset.captions) and not any(dataset.val_captions):
        return empty_bank(len(dataset.images)), empty_bank(len(dataset.val_images))
    made, tables = build_text_encoder(encoder, dataset.captions, model), _tables(dataset, variant, seed, on)
    if encoder == "words":
        train, val = (build_bank(table, made, cache_dir() / "text") for table in tables)
        return train, val
    each = _distinct(tables)
    whole = build_bank(each, made, cache_dir() / "text", advance)
    places = {lines: place for place, lines in enumerate(each.values())}
    train, val = (
        replace(
            whole,
            source=table.source,
            rows=np.array([places[lines] for lines in table.values()], np.int64),
            fingerprint=_view(whole.fingerprint, table),
        )
        for table in tables
    )
    return train, val


def text_fingerprint(
    dataset: Dataset,
    encoder: str = "words",
    variant: Control = "own",
    seed: int = 0,
    model: str | None = None,
    on: Images = "both",
) -> str:
    """Return the fingerprint of the first bank of ``load_text``, encoding nothing. Raises ValueError as that does."""
    if not any(dataset.captions) and not any(dataset.val_captions):
        return NO_CAPTIONS
    made, tables = build_text_encoder(encoder, dataset.captions, model), _tables(dataset, variant, seed, on)
    if encoder == "words":
        return bank_name(tables[0], made)
    return _view(bank_name(_distinct(tables), made), tables[0])


def is_encoded(
    dataset: Dataset,
    encoder: str = "words",
    variant: Control = "own",
    seed: int = 0,
    model: str | None = None,
    on: Images = "both",
) -> bool:
    """Return whether ``load_text`` would find everything encoded."""
    if not any(dataset.captions) and not any(dataset.val_captions):
        return True
    made, tables = build_text_encoder(encoder, dataset.captions, model), _tables(dataset, variant, seed, on)
    needed = tables if encoder == "words" else [_distinct(tables)]
    return all((cache_dir() / "text" / bank_name(table, made)).is_dir() for table in needed)


def _tables(dataset: Dataset, variant: Control, seed: int, on: Images) -> list[CaptionTable]:
    return [dataset.caption_table("train", variant, seed, on), dataset.caption_table("val", variant, seed)]


def _distinct(tables: Sequence[CaptionTable]) -> CaptionTable:
    """Return each image's texts once: a pretrained encoder's bank serves every split and every exchange of captions."""
    each = sorted({lines for table in tables for lines in table.values()})
    return CaptionTable({str(place): lines for place, lines in enumerate(each)}, "")


def _view(whole: str, table: CaptionTable) -> str:
    return fingerprint("view", whole, table.hash())


def text_vectors(
    dataset: Dataset, encoder: str = "words", model: str | None = None
) -> Callable[[Sequence[str]], torch.Tensor]:
    """Return a function from texts to pooled vectors (n, D) float32, by the captions' encoder, built at the first call.

    If no image has a caption, an encoder that learns does so from the requested texts. A text without a known word has
    a vector of 0. Raises ValueError as ``build_encoder``.
    """

    def encode(texts: Sequence[str]) -> torch.Tensor:
        captions = dataset.captions if any(dataset.captions) else [(text,) for text in texts]
        learned = build_text_encoder(encoder, captions, model)
        return torch.from_numpy(learned.encode(texts)[2].astype(np.float32))

    return encode


def empty_bank(images: int) -> EmbeddingBank:
    """Return the bank of images without text, as wide as the ``words`` encoder's, so that networks can be built."""
    return EmbeddingBank(
        tokens=np.zeros((images, 1, WORDS_DIM), np.float16),
        mask=np.zeros((images, 1), bool),
        pooled=np.zeros((images, WORDS_DIM), np.float16),
        fingerprint=NO_CAPTIONS,
        encoder="none",
        source="no captions",
        unknown=0,
    )
