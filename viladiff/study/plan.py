"""What a table needs run: equal cells once, finished ones not again, and what the rest will cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from viladiff.study.spec import Table

State = Literal["done", "stale", "failed", "running", "begun", "missing"]


@dataclass(frozen=True)
class Planned:
    """One unique run."""

    run_id: str
    changes: dict[str, object]
    """``override(RunConfig(), changes)`` is its configuration; ``runtime.*`` included."""
    title: str
    """Row, column and seed of its first cell, for people."""
    steps: int
    workers: int = 1


@dataclass(frozen=True)
class PlannedCell:
    row: int
    column: int
    seed: int
    run_id: str


@dataclass(frozen=True)
class Plan:
    table: Table
    scale: str
    rows: tuple[int, ...]
    """Places in ``table.rows`` that were asked for, controls last."""
    columns: tuple[int, ...]
    seeds: tuple[int, ...]
    cells: tuple[PlannedCell, ...]
    runs: dict[str, Planned]
