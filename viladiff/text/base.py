"""The interface of text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

LONGEST = 77
"""Tokens of a text at most, as CLIP reads; what follows is cut off, and counted."""


class TextEncoder(Protocol):
    """The interface of encoders that the text bank needs."""

    name: str
    fingerprint: str
    """Names everything that decides the vectors."""

    @property
    def dim(self) -> int:
        """D, channels of a token."""
        ...

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens (n, L, D) float32, mask (n, L) bool, pooled (n, D) float32; L >= 1 tokens of the longest."""
        ...

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n,) int64 tokens that ``encode`` gives each text, without encoding it."""
        ...

    def cut(self, texts: Sequence[str]) -> int:
        """Return how many of ``texts`` are longer than the encoder reads (LONGEST at most) and are truncated."""
        ...

    def unknown(self, texts: Sequence[str]) -> int:
        """Return how many words of ``texts`` have no vector and are dropped."""
        ...


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale rows (..., D) to length 1; rows of zeros stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
