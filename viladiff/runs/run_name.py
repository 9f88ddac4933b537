"""The name of a run: a hash of the inputs that decide its numbers. Records hold them, so no check needs torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import NamedTuple

from viladiff.core.hashing import sha256_hex

PLACES = ("runtime.", "data.split_dir")
"""Where and how a run happens, by the beginning of a path: no part of its name."""
WEIGHTS = ("model.weights", "method.clip.weights")
"""Files whose content is in the fingerprints: of their paths, the last part alone counts."""


class Content(NamedTuple):
    """The hashed content of a run's name."""

    core: int
    """``viladiff.runs.config.CORE_REVISION``."""
    method: int
    """``revision`` of the run's method."""
    changed: Mapping[str, object]
    """Fields that differ from their defaults, by dotted path; those of ``PLACES`` are passed over."""
    seed: int
    precision: str
    tf32: bool
    fingerprints: Mapping[str, str]
    """Of data, text and weights."""


def arithmetic(precision: str, tf32: bool) -> str:
    """Format ``train.precision`` and ``train.tf32``: ``bf16``, ``fp32, TF32``."""
    return f"{precision}, TF32" if tf32 else precision


def run_name(content: Content) -> str:
    """Return 16 hex digits; ``1`` and ``1.0`` in a float field, -0.0 and 0.0, a tuple and a list give one name."""
    named = {
        "core": content.core,
        "revision": content.method,
        "fields": {path: hashed(path, value) for path, value in content.changed.items() if not path.startswith(PLACES)},
        "seed": content.seed,
        "precision": content.precision,
        "fingerprints": dict(content.fingerprints),
        # Said only where it is on: names from before the field stay.
        **({"tf32": True} if content.tf32 else {}),
    }
    text = json.dumps(named, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_hex(text)[:16]


def hashed(path: str, value: object) -> object:
    """Return a field's value as it enters the name: plain JSON."""
    if path in WEIGHTS and isinstance(value, str):
        return PurePath(value).name
    if isinstance(value, tuple | list):
        return [hashed("", item) for item in value]
    return value + 0.0 if isinstance(value, float) else value  # -0.0 equals 0.0, but is other text
