"""SHA-256 of text, bytes and files, as 64 hexadecimal digits."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_hex(data: str | bytes) -> str:
    """Return the SHA-256 of bytes, or of text in UTF-8; ValueError for text that UTF-8 cannot hold."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, read in pieces. OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
