"""The outputs of one stream of a segmenter."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StreamOutput(NamedTuple):
    """The output of one stream for a batch, on the decoder's grid (h = H / stride)."""

    features: Tensor
    """(B, N, W) tokens of ViLa, or the encoder's last tokens where there is no ViLa."""
    mid: Tensor
    """(B, decoder width, h, w) the map that the classifier reads."""
    logits: Tensor
    """(B, C, h, w)."""
