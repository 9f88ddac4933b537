"""Text encoders by name; they encode captions once, offline, and are not in memory during training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from viladiff.config.base import did_you_mean
from viladiff.data.cache import fingerprint
from viladiff.data.captions.words import split_words
from viladiff.text.base import LONGEST, TextEncoder, unit

WORDS_DIM = 48
_WORDS_REVISION = 1


class WordEncoder:
    """One fixed unit vector per word, learned from which words share an image's captions.

    The vectors are the singular vectors, times the root of the singular value, of the matrix of positive pointwise
    mutual information log(N n_ij / (n_i n_j)) over N images, n_i of which mention word i and n_ij both. A word
    co-occurs with itself (n_ii = n_i), and the diagonal is raised by one more, or a word of every caption would have
    no vector. Where there are fewer than ``dim`` words, the last components are 0. A text's pooled vector is the mean
    of its words' at unit length.
    """

    name = "words"

    def __init__(self, captions: Iterable[Sequence[str]], dim: int = WORDS_DIM) -> None:
        """Learn the vectors. captions: the texts of each *training* image. Raises ValueError if they hold no word."""
        bags = Counter(frozenset(word for text in texts for word in split_words(text)) for texts in captions)
        bags.pop(frozenset(), None)
        words = sorted(frozenset().union(*bags))
        if not words:
            raise ValueError("text encoder 'words': the training captions hold no word to learn from")
        self.dim = dim
        self.vocabulary = {word: place for place, word in enumerate(words)}
        self.vectors = word_vectors(*self._counts(bags), dim)
        counts = sorted((sorted(bag), count) for bag, count in bags.items())
        self.fingerprint = fingerprint(self.name, _WORDS_REVISION, dim, counts)

    def _counts(self, bags: Counter[frozenset[str]]) -> tuple[np.ndarray, int]:
        mentions = np.zeros((len(bags), len(self.vocabulary)))
        for row, bag in zip(mentions, bags, strict=True):
            row[[self.vocabulary[word] for word in bag]] = 1
        weights = np.array(list(bags.values()), float)
        return mentions.T @ (mentions * weights[:, None]), int(weights.sum())

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens (n, L, D) float32, mask (n, L) bool, pooled (n, D) float32, which is 0 if no word is known."""
        known = self._places(texts)
        mask = np.arange(max([1, *map(len, known)])) < np.array([len(places) for places in known], int)[:, None]
        tokens = np.zeros((*mask.shape, self.dim), np.float32)
        tokens[mask] = self.vectors[[place for places in known for place in places]]
        return tokens, mask, unit(tokens.sum(1))

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Return the number of words that a training caption holds; see ``TextEncoder``."""
        return np.array([len(places) for places in self._places(texts)], np.int64)

    def unknown(self, texts: Sequence[str]) -> int:
        """Return how many words of ``texts`` no training caption holds."""
        return sum(word not in self.vocabulary for text in texts for word in split_words(text))

    def cut(self, texts: Sequence[str]) -> int:
        """Return how many of ``texts`` have more than LONGEST known words."""
        return sum(sum(word in self.vocabulary for word in split_words(text)) > LONGEST for text in texts)

    def _places(self, texts: Sequence[str]) -> list[list[int]]:
        known = ([self.vocabulary[word] for word in split_words(text) if word in self.vocabulary] for text in texts)
        return [places[:LONGEST] for places in known]


def word_vectors(together: np.ndarray, images: int, dim: int) -> np.ndarray:
    """Return (V, dim) float32 unit vectors from (V, V) counts of images that mention two words; see ``WordEncoder``."""
    alone = np.diag(together)
    with np.errstate(divide="ignore"):
        information = np.log(together * images / np.outer(alone, alone))
    values, axes = np.linalg.eigh(np.maximum(information, 0) + np.eye(len(together)))
    # For a symmetric matrix these are the singular vectors and, up to sign, the singular values.
    strongest = np.argsort(-np.abs(values), kind="stable")[:dim]
    axes = axes[:, strongest]
    axes *= np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    vectors = np.zeros((len(together), dim))
    vectors[:, : len(strongest)] = axes * np.sqrt(np.abs(values[strongest]))
    return unit(vectors).astype(np.float32)


def build_text_encoder(name: str, captions: Iterable[Sequence[str]], model: str | None = None) -> TextEncoder:
    """Build the encoder of that name; one that is trained learns from ``captions``, those of the training images.

    model: directory of a pretrained encoder (runtime.text_model). Raises ValueError for an unknown name, and as
    ``viladiff.text.pretrained`` for a directory that is missing or of another kind.
    """
    if name == "words":
        return WordEncoder(captions)
    if name not in ENCODERS:
        raise ValueError(f"data.text_encoder = {name!r}: allowed: {', '.join(ENCODERS)}{did_you_mean(name, ENCODERS)}")
    from viladiff.text import pretrained  # transformers and open_clip take seconds to load

    return pretrained.open_encoder(name, model)


def model_name(directory: Path | str) -> str:
    """Return a model's name: that of its directory, or of its folder in a model hub's cache."""
    real = Path(directory).expanduser().resolve()
    hub = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    return real.parent.parent.name.removeprefix("models--").replace("--", "/") if hub else real.name


def describe_text_encoder(name: str, model: str | None) -> str:
    """Describe the encoder for a record: its kind and, if it comes from a directory, the model's name."""
    return f"{name} {model_name(model)}" if model is not None and name in ("open_clip", "transformers") else name


ENCODERS = ("words", "minilm", "open_clip", "transformers")
