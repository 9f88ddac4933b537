"""Digest of the package's sources, which names cached plans."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from viladiff.core.hashing import file_sha256

_PACKAGE = Path(__file__).resolve().parent.parent


def plan_stem() -> str:
    """Return the prefix of plans by this code; plans of other code are never used again."""
    return f"plan-{code_digest()[:12]}"


def code_digest(without: Collection[str] = ()) -> str:
    """Return the digest of the package's sources and shipped weights, but for those of the folders ``without``."""
    total = hashlib.sha256()
    for path in sorted(path for kind in ("*.py", "*.safetensors") for path in _PACKAGE.rglob(kind)):
        if path.relative_to(_PACKAGE).parts[0] in without:
            continue
        total.update(f"{path.relative_to(_PACKAGE).as_posix()} {file_digest(path)}\n".encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or ``missing`` where it cannot be read."""
    try:
        return file_sha256(path)
    except OSError:
        return "missing"
