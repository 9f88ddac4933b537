"""Learning curves from the step logs of runs: means over bins of steps, over seeds with the band between extremes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from viladiff.report.table.results import Results

if TYPE_CHECKING:
    from viladiff.runs.store import Store

TERMS = {
    "sup": "Supervised loss",
    "total": "Sum of all loss terms",
    "coverage": "Share of pixels with a pseudo-label",
}
UNFINISHED = ("running", "begun")
BINS = 48
MOST_LINES = 300
"""Of a longer log every n-th line is read."""


@dataclass(frozen=True)
class Curve:
    row: int
    column: int
    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int
    running: int = 0
    """How many of the seeds have not finished."""


def curves(results: Results, store: Store) -> dict[str, list[Curve]]:
    """Return curves by term, for each cell with logs of runs, finished or not, whose method has the term."""
    logs: dict[str, dict[str, np.ndarray]] = {}
    finished = {run_id: record.step_log for run_id, record in results.records().items()}
    running = {e.cell.run_id: "steps.jsonl" for e in results.entries if e.state in UNFINISHED and e.cell.run_id}
    for run_id, name in {**running, **finished}.items():
        path = store.file(run_id, name)
        if path is not None and (log := read_log(path)):
            logs[run_id] = log
    found: dict[str, list[Curve]] = {}
    for term in TERMS:
        drawn = [_curve(results, logs, term, row, column) for row in results.rows() for column in results.plan.columns]
        found[term] = [curve for curve in drawn if curve is not None]
    evaluated = [_history(results, row, column) for row in results.rows() for column in results.plan.columns]
    found["miou"] = [curve for curve in evaluated if curve is not None]
    return {term: those for term, those in found.items() if those}


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Read columns by name; a line cut short by a kill is skipped, as are the terms of a log without steps."""
    lines = path.read_bytes().splitlines()
    lines = lines[:: max(1, len(lines) // MOST_LINES)]
    if lines and _entry(lines[-1]) is None:
        lines.pop()
    try:
        entries = json.loads(b"[" + b",".join(lines) + b"]")  # several times as fast as line by line
    except (ValueError, RecursionError):
        entries = [_entry(line) for line in lines]
    kept = [entry for entry in entries if isinstance(entry, dict) and _is_step(entry.get("step"))]
    names = ("step", *TERMS)
    return {
        name: np.array([_number(entry.get(name)) for entry in kept])
        for name in names
        if any(name in entry for entry in kept)
    }


def _entry(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_step(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _number(value: object) -> float:
    # An integer may be beyond all floats.
    return float(value) if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1000) else np.nan


def _curve(results: Results, logs: dict[str, dict[str, np.ndarray]], term: str, row: int, column: int) -> Curve | None:
    entries = [e for e in results.at(row, column) if term in logs.get(e.cell.run_id, ())]
    mine = [logs[e.cell.run_id] for e in entries]
    if not mine:
        return None
    last = max(float(log["step"].max()) for log in mine)
    edges = np.linspace(0, last + 1, min(BINS, int(last) + 1) + 1)
    values = [_binned(log["step"], log[term], edges) for log in mine]
    found = _over_seeds(row, column, (edges[:-1] + edges[1:]) / 2, values)
    return found and replace(found, running=sum(e.record is None for e in entries))


def _binned(steps: np.ndarray, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    good = np.isfinite(values)
    place = np.digitize(steps[good], edges) - 1
    size = len(edges) - 1
    sums, counts = (np.bincount(place, weights, minlength=size)[:size] for weights in (values[good], None))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _history(results: Results, row: int, column: int) -> Curve | None:
    """Return the evaluations during training; None for a run that was evaluated at its end alone."""
    logs = [e.record.history for e in results.at(row, column) if e.record and len(e.record.history) > 1]
    if not logs:
        return None
    steps = sorted({int(entry["step"]) for log in logs for entry in log})
    values = []
    for log in logs:
        by_step = {int(entry["step"]): _number(entry.get("miou")) for entry in log}
        values.append(np.array([100 * by_step.get(step, np.nan) for step in steps]))
    return _over_seeds(row, column, np.array(steps, float), values)


def _over_seeds(row: int, column: int, steps: np.ndarray, values: Sequence[np.ndarray]) -> Curve | None:
    stacked = np.stack(values)
    some = np.isfinite(stacked).any(0)
    if not some.any():
        return None
    steps, stacked = steps[some], stacked[:, some]
    mean, low, high = (f(stacked, axis=0) for f in (np.nanmean, np.nanmin, np.nanmax))
    return Curve(row, column, steps, mean, low, high, len(values))
