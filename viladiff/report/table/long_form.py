"""A table in long form, one line a row, column and seed, and its cells as a pandas table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from viladiff.evaluation.metrics import shown_metrics
from viladiff.report.table.results import (
    CellRun,
    Results,
    collect_results,
    number,
    paper_value,
    per_class,
    row_name,
)
from viladiff.tables.plan import Plan
from viladiff.tables.significance import score

if TYPE_CHECKING:
    import pandas as pd

    from viladiff.runs.store import Store


def to_rows(results: Results) -> list[dict[str, object]]:
    """Return a line a row, column and seed, with every number of its record; shares in percent; None if missing."""
    found = [_line(results, entry) for entry in results.entries]
    names = dict.fromkeys(name for line in found for name in line)
    return [{name: line.get(name) for name in names} for line in found]


def _line(results: Results, entry: CellRun) -> dict[str, object]:
    cell, table = entry.cell, results.plan.table
    row, paper = table.rows[cell.row], paper_value(results, cell.row, cell.column)
    out: dict[str, object] = {
        "number": number(results, cell.row),
        "row": row.label,
        "components": " + ".join(row.components),
        "control": row.control,
        "ceiling": cell.row in results.plan.ceilings,
        "column": table.columns[cell.column].label,
        "seed": cell.seed,
        "run_id": cell.run_id,
        "state": entry.state,
        "why": entry.why,
        "scale": results.plan.scale,
        "paper": paper if isinstance(paper, float | int) else None,
        "paper_encoder": row.encoder,
    }
    for metric in shown_metrics(table.metric):
        out[metric] = score(entry.record, metric, entry.network, entry.stream) if entry.record else None
    return out | (dict(_measured(entry, table.metric)) if entry.record else {})


def _measured(entry: CellRun, own: str) -> Iterator[tuple[str, Any]]:
    record = entry.record
    assert record is not None
    yield from {"network": entry.network or record.network, "stream": entry.stream or record.stream}.items()
    yield from {"dataset": record.config.get("data.dataset"), "split": record.config.get("data.split")}.items()
    for network, streams in record.scores.items():
        for stream in streams:
            for metric in shown_metrics(own):
                yield f"{network}/{stream}/{metric}", score(record, metric, network, stream)
    for name in ("silhouette", "davies_bouldin", "image_silhouette", "tokens"):
        for key in (name, f"{name}_before"):
            if key in (scores := record.scores.get(record.network, {}).get(record.stream, {})):
                yield f"clusters/{key}", scores[key]
    for name, share in record.pseudo_labels.items():
        yield f"pseudo/{name}", None if share is None else 100 * share
    for name, iou in per_class(record).items():
        yield f"class/{name}", iou
    for name in (
        "steps",
        "train_seconds",
        "cpu_seconds",
        "wall_seconds",
        "peak_memory_bytes",
        "workers",
        "threads",
        "device",
    ):
        yield name, getattr(record, name)
    for name in ("captions", "text_encoder", "encoder", "pretrained"):
        yield name, getattr(record, name)
    yield from {"revision": record.git.get("revision"), "dirty": record.git.get("dirty")}.items()


def frame(plan: Plan, store: Store, *, metric: str = "", long_form: bool = False) -> pd.DataFrame:
    """Return rows of the table by (column, mean | sd | n | paper) in percent; or, in the long form, a line a run.

    ``metric`` is one of ``shown_metrics``, by default the table's own. A cell without runs has NaN and n = 0. Raises
    ValueError for another metric.
    """
    metric = metric or plan.table.metric
    if metric not in (shown := shown_metrics(plan.table.metric)):
        raise ValueError(f"metric = {metric!r}: must be one of {', '.join(shown)}")
    import pandas as pd  # takes longer to load than a page takes to make, so pages do without

    results = collect_results(plan, store)
    lines = pd.DataFrame(to_rows(results))
    if long_form:
        return lines
    lines = lines.assign(value=pd.to_numeric(lines[metric]), paper=pd.to_numeric(lines["paper"]))
    grouped = lines.groupby(["number", "column"], sort=False)
    parts = {"mean": grouped["value"].mean(), "sd": grouped["value"].std(), "n": grouped["value"].count()}
    if metric == plan.table.metric:
        parts["paper"] = grouped["paper"].first()
    numbers = [number(results, row) for row in plan.rows]
    found = {
        (label, kind): values.unstack("column").reindex(index=numbers)[label]
        for label in (plan.table.columns[c].label for c in plan.columns)
        for kind, values in parts.items()
    }
    wide = pd.DataFrame(
        {key: values.fillna(0).astype(int) if key[1] == "n" else values for key, values in found.items()}
    )
    return wide.set_axis([row_name(results, row) for row in plan.rows], axis=0)
