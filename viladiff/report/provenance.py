"""Provenance of a table's numbers, and unintended differences between its runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from viladiff.core.messages import format_seconds
from viladiff.report.sections import pretraining_data
from viladiff.report.table.results import CellRun, Results, number
from viladiff.runs.record import RunRecord, mismatch

if TYPE_CHECKING:
    from viladiff.runs.store import Store


NOTES = "Said by runs"
"""Fact of which not every run has a value."""


@dataclass(frozen=True)
class Fact:
    name: str
    values: tuple[tuple[str, int], ...]
    """Each with the number of runs that have it, most frequent first."""
    mixed: bool = False
    """More than one value where one table should have one."""

    def __str__(self) -> str:
        if len(self.values) == 1 and self.name != NOTES:
            return self.values[0][0]
        return "; ".join(f"{value} ({n} runs)" if n > 1 else f"{value} (1 run)" for value, n in self.values)


_SAME: dict[str, Callable[[RunRecord], object]] = {
    "Encoder": lambda r: r.encoder,
    "Pretraining": lambda r: r.pretrained,
    "Text encoder": lambda r: r.text_encoder,
    "Steps": lambda r: r.steps,
    "Precision": lambda r: r.precision,
    "Workers a run": lambda r: r.workers,
    "Threads": lambda r: r.threads,
    "Device": lambda r: r.device,
    "Code revision": lambda r: _revision(r),
    "Records": lambda r: mismatch(r) or "configuration matches name",
    "Versions": lambda r: ", ".join(f"{name} {version}" for name, version in sorted(r.versions.items())),
}
_MAY_DIFFER: dict[str, Callable[[RunRecord], object]] = {
    "Data set": lambda r: f"{r.config.get('data.dataset')} (fingerprint {r.fingerprints.get('data', 'unknown')})",
    "Split (labelled images)": lambda r: r.config.get("data.split"),
    "Labelled list": lambda r: labelled_list(r),
    "Captions": lambda r: captions(r),
    "Evaluated network and stream": lambda r: f"{r.network}, {r.stream}",
    "Evaluation protocol": lambda r: r.config.get("eval.protocol"),
    "Processor": lambda r: r.processor or None,
    "Validation images": lambda r: r.scores.get(r.network, {}).get(r.stream, {}).get("images"),
}


def _revision(record: RunRecord) -> str:
    revision = str(record.git.get("revision") or "unknown")[:12]
    return f"{revision} with uncommitted changes" if record.git.get("dirty") else revision


def labelled_list(record: RunRecord) -> str:
    """Describe the labelled list of a run."""
    drawn = record.config.get("data.split_seed")
    if drawn is None:
        return "one for all seeds"
    own = drawn == record.config.get("seed", 0)
    return "each seed's own (data.split_seed is the seed)" if own else f"drawn (data.split_seed={drawn})"


def captions(record: RunRecord) -> str:
    """Describe the record's captions, and the control that replaced them, if any."""
    kind, on = record.config.get("data.captions", "own"), record.config.get("data.captions_on", "both")
    said = record.captions if kind in ("own", None) else f"{kind}: {record.captions}"
    return said if on in ("both", None) else f"{said}, on {on} images alone"


def run_facts(results: Results) -> list[Fact]:
    """Return the facts that the runs share, and how many have which where they differ."""
    records = list(results.records().values())
    if not records:
        return []
    found = shared_facts(records)
    scale = results.plan.scale
    others = [r.scale or "none" for r in records if r.scale != scale]
    if others:
        same = len(records) - len(others)
        found.append(_fact("Made for scale", [scale] * same + others, True))
    seeds = ", ".join(map(str, sorted({e.cell.seed for e in results.entries})))
    totals = {"Scale": scale, "Seeds": seeds, **spent(records)}
    return [*found, *(Fact(name, ((value, len(records)),)) for name, value in totals.items())]


def shared_facts(records: Sequence[RunRecord]) -> list[Fact]:
    """Return the facts of records, shared or not: data, evaluation, pretraining data, notes, encoder, code."""
    found = [_fact(name, map(read, records), False) for name, read in _MAY_DIFFER.items()]
    told = [pretraining_data.pretraining_overlap(record) for record in records]
    names = dict.fromkeys(name for one in told for name in one)
    found += [_fact(name, (one[name] for one in told if name in one), False) for name in names]
    notes = [note for record in records for note in dict.fromkeys(record.notes)]
    found += [_fact(NOTES, notes, False)] if notes else []
    return found + [_fact(name, map(read, records), True) for name, read in _SAME.items()]


def spent(records: Sequence[RunRecord]) -> dict[str, str]:
    """Return time and memory of all runs together."""
    walls = [record.wall_seconds for record in records if record.wall_seconds is not None]
    peaks = [record.peak_memory_bytes for record in records if record.peak_memory_bytes is not None]
    unknown = len(records) - len(walls)
    return {
        "Wall time, all runs added": format_seconds(sum(walls)) + (f", {unknown} runs not known" if unknown else ""),
        "Training time, all runs added": format_seconds(sum(record.train_seconds for record in records)),
        "Most memory of a run's process": f"{max(peaks) / 2**30:.1f} GiB" if peaks else "not known",
    }


def _fact(name: str, values: Iterable[object], one: bool) -> Fact:
    said = sorted("not recorded" if value is None else str(value) for value in values)
    counted = sorted(((value, len(list(same))) for value, same in groupby(said)), key=lambda pair: (-pair[1], pair[0]))
    return Fact(name, tuple(counted), one and len(counted) > 1)


@dataclass(frozen=True)
class Origin:
    """One run behind the page, and the cells that it stands in."""

    entry: CellRun
    cells: tuple[str, ...]
    link: str
    """Path of its record relative to the page; empty where there is none nearby."""


def origins(results: Results, store: Store, out: Path) -> list[Origin]:
    """Return the unique runs in the order of the table."""
    seen: dict[str, list[CellRun]] = {}
    for entry in results.entries:
        seen.setdefault(entry.cell.run_id, []).append(entry)
    table = results.plan.table
    return [
        Origin(
            same[0],
            tuple(f"row {number(results, e.cell.row)}, {table.columns[e.cell.column].label}" for e in same),
            _link(store.file(run_id, "record.json"), out) if same[0].record is not None else "",
        )
        for run_id, same in seen.items()
    ]


def _link(path: Path | None, out: Path) -> str:
    """Return a relative path of a file near the page; no other path is shown, since the page may be published."""
    relative = Path(os.path.relpath(path, out)).as_posix() if path is not None else ""
    return "" if relative.count("../") > 3 else relative
