"""Escaping of text for markdown."""

from __future__ import annotations

import re

from viladiff.core.messages import printable


def markdown(text: str) -> str:
    """Escape text so that no renderer takes it for markup, a cell's border or HTML."""
    escaped = re.sub(r"([\\`*_\[\]|$~#!^])", r"\\\1", " ".join(printable(text).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
