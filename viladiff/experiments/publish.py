"""Publication of finished runs: records without machine paths, pictures, and thinned logs."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from viladiff.core.atomic import write_atomically
from viladiff.runs.record import save_record, strip_local_paths
from viladiff.runs.store import Store
from viladiff.tables.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LARGEST = 2.0**1000
"""A number beyond it is none of a log, and a sum of such would be none either."""
POINTS = 30
"""Lines that a published log has at most; each is the mean over a stretch of steps."""


def _thin_log(log: Path) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in thinned(_rows(log))).encode()


BESIDE = {"steps.jsonl": _thin_log, "pictures.npz": Path.read_bytes, "plane.npz": Path.read_bytes}
"""What of a run goes with its record, and in which form."""


def publish(plan: Plan, store: Store, out: Path) -> list[Path]:
    """Copy finished runs into ``out``/records, and logs and pictures beside, unless a layer has them.

    Returns the new records.
    """
    layers = Store(store.root / "nothing", store.layers)
    done = [run_id for run_id in plan.runs if store.get(run_id) is not None]
    for run_id in done:
        for name, made in BESIDE.items():
            own, stem = store.directory(run_id) / name, Path(name)
            if own.is_file() and layers.file(run_id, name) is None:
                target = out / stem.stem / f"{run_id}{stem.suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(target, made(own))
    # Records come last: with its record a run counts as published, and the rest is there.
    return publish_records(done, store, out)


def publish_records(runs: Iterable[str], store: Store, out: Path) -> list[Path]:
    """Copy records of finished runs into ``out``/records unless a layer has them; return the new ones."""
    published = {record.run_id for record in store.published()}
    new = []
    for run_id in runs:
        record = None if run_id in published else store.get(run_id)
        if record is not None:
            (out / "records").mkdir(parents=True, exist_ok=True)
            new.append(out / "records" / f"{run_id}.json")
            save_record(strip_local_paths(record), new[-1])
    return new


def _rows(log: Path) -> Iterator[dict[str, float]]:
    for line in log.read_bytes().splitlines():
        with suppress(ValueError, RecursionError):  # the last line of a run that was killed may be torn
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int and _is_number(row["step"]):
                yield {name: value for name, value in row.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < _LARGEST


def thinned(rows: Iterable[dict[str, float]], points: int = POINTS) -> list[dict[str, float]]:
    """Average rows over equal intervals; ``step`` is the last of its interval, so that a curve ends where it did."""
    every = list(rows)
    length = max(1, -(-len(every) // points))
    found = []
    for start in range(0, len(every), length):
        stretch = every[start : start + length]
        values = {name: [row[name] for row in stretch if name in row] for name in stretch[0]}
        means = {name: sum(found) / len(found) for name, found in values.items()}
        found.append({name: float(f"{value:.5g}") for name, value in means.items()} | {"step": stretch[-1]["step"]})
    return found
