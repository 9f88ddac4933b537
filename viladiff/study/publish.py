"""Finished runs become committed ones: records without machine paths, pictures, and logs as thin as a page needs."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from viladiff.record import save_record, without_paths, write_atomically
from viladiff.study.plan import Plan
from viladiff.study.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

POINTS = 30
"""Lines that a published log has at most; each is the mean over a stretch of steps."""


def publish(plan: Plan, store: Store, out: Path) -> list[Path]:
    """Copies the plan's finished runs that no layer has yet into ``out``/records, pictures and steps; returns these."""
    published = {record.run_id for record in store.published()}
    new = []
    for run_id in plan.runs:
        record = None if run_id in published else store.get(run_id)
        if record is None:
            continue
        log, pictures = store.directory(run_id) / "steps.jsonl", store.directory(run_id) / "pictures.npz"
        if log.is_file():
            target = out / "steps" / f"{run_id}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row) for row in thinned(_rows(log)))
            write_atomically(target, "".join(f"{line}\n" for line in lines).encode())
        if pictures.is_file():
            (out / "pictures").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pictures, out / "pictures" / f"{run_id}.npz")
        # The record comes last: with it the run counts as published, and the rest is there.
        (out / "records").mkdir(parents=True, exist_ok=True)
        save_record(without_paths(record), out / "records" / f"{run_id}.json")
        new.append(out / "records" / f"{run_id}.json")
    return new


def _rows(log: Path) -> Iterator[dict[str, float]]:
    for line in log.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # the last line of a run that was killed may be torn
            yield json.loads(line)


def thinned(rows: Iterable[dict[str, float]], points: int = POINTS) -> list[dict[str, float]]:
    """Means over stretches of equal length; ``step`` is the last of its stretch, so that a curve ends where it did."""
    every = list(rows)
    length = max(1, -(-len(every) // points))
    found = []
    for start in range(0, len(every), length):
        stretch = every[start : start + length]
        values = {name: [row[name] for row in stretch if name in row] for name in stretch[0]}
        means = {name: sum(found) / len(found) for name, found in values.items()}
        found.append({name: float(f"{value:.5g}") for name, value in means.items()} | {"step": stretch[-1]["step"]})
    return found
