"""One run of a plan: its name, its configuration and its title."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlannedRun:
    """One unique run."""

    run_id: str
    changes: dict[str, object]
    """``override(RunConfig(), changes)`` is its configuration; ``runtime.*`` included."""
    title: str
    """Row, column and seed of its first cell, for people."""
    steps: int
    changed: dict[str, Any]
    """Fields outside ``runtime`` that differ from their defaults, as a record has them."""
    workers: int = 1
    threads: int | None = None
    precision: str = "fp32"
    """As ``RunRecord.precision``."""
