"""Words of a caption."""

from __future__ import annotations

import re


def split_words(text: str) -> list[str]:
    """Return lower-case words without punctuation; digits count as letters."""
    return re.findall(r"\w+", text.lower())
