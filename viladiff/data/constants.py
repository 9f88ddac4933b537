"""Constants of labels and images; apart from the batch, so that decoding processes need no torch."""

from __future__ import annotations

IGNORE = 255
"""The label of pixels that no loss and no metric counts."""
