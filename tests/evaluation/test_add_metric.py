"""A metric is one function and one entry: one is added to the package, and is scored, stored, tested and shown."""

from __future__ import annotations

import json
from pathlib import Path

from overlay import overlay, replaced, run_python

TABLE = "METRICS: dict[str, Metric] = {\n"
FUNCTION = '''def pixel_error(counts: PixelCounts) -> float | None:
    """Share of pixels whose class is wrong."""
    right = pixel_accuracy(counts)
    return None if right is None else 1 - right


'''
ENTRY = '    "pixel_error": Metric(name="pixel error", title="Pixel error", better="lower", compute=pixel_error),\n'

SPEC = """
title = "Two rates"
metric = "pixel_error"
seeds = [0]
[base]
"method.name" = "supervised"
[scale.tiny]
[[columns]]
label = "183"
set = { "data.split" = "183" }
[[rows]]
label = "slow"
paper = [20.0]
[[rows]]
label = "fast"
set = { "optim.lr" = 0.01 }
paper = [10.0]
[[claims]]
text = "the slow one errs more"
kind = "higher"
rows = ["slow", "fast"]
metric = "pixel_error"
"""
READ = """
import sys
from pathlib import Path
from viladiff.tables.spec_file import load_table
try:
    table = load_table(Path("table.toml"))
except ValueError as error:
    sys.exit(str(error))
"""
USE = (
    READ
    + """
import json
from viladiff.report.table.table_page import render_table
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import load_record
from viladiff.runs.store import Store
from viladiff.tables.claims import evaluate_claims
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.training.trainer import fit

small = {"train.steps": 2, "data.batch_labelled": 4, "eval.max_images": 5, "runtime.runs_dir": "runs",
         "runtime.progress": False, "runtime.threads": 1}
results = [fit(override(RunConfig(), {**small, **row.set})) for row in table.rows]
records = [load_record(result.directory / "record.json") for result in results]
cells = tuple(PlannedCell(row, 0, 0, record.run_id) for row, record in enumerate(records))
runs = {record.run_id: PlannedRun(record.run_id, {}, "title", record.steps, record.changed) for record in records}
plan = Plan(table, "tiny", (0, 1), (0,), (0,), cells, runs)
store = Store(Path("runs"))
verdicts = evaluate_claims(plan, store.records())
render_table(plan, store, Path("page"), command="python run.py", verdicts=verdicts)
scores = [record.scores[record.network][record.stream] for record in records]
print(json.dumps({
    "scores": [[one["pixel_error"], one["pixel_accuracy"]] for one in scores],
    "printed": verdicts[0].printed,
    "page": Path("page/table.md").read_text(),
    "csv": Path("page/table.csv").read_text(),
}))
"""
)


def package(directory: Path, entry: bool) -> Path:
    """The package with the function, and with its entry or without; and the table's file beside it."""
    text = replaced("evaluation/metrics.py", (TABLE, FUNCTION + TABLE + (ENTRY if entry else "")))
    overlay(directory, {"evaluation/metrics.py": text})
    (directory / "table.toml").write_text(SPEC, encoding="utf-8")
    return directory


def test_one_function_and_one_entry_add_a_metric(tmp_path: Path) -> None:
    done = run_python(package(tmp_path / "with", entry=True), USE)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert all(error is not None and error == 1 - right for error, right in told["scores"])
    assert told["printed"] == "holds" and "on Pixel error." in told["page"]
    heading, lines = "## Pixel error (lower is better) (%)", told["page"].splitlines()
    rows = {
        name: line for line in lines[lines.index(heading) :][:8] for name in ("slow", "fast") if f" {name} " in line
    }
    errors = {name: round(100 * error, 1) for name, (error, _) in zip(("slow", "fast"), told["scores"], strict=True)}
    for name, error in errors.items():
        assert (f"**{error:.1f} (1)**" in rows[name]) == (error == min(errors.values())), "the lower one is bold"
    assert "pixel_error" in told["csv"].splitlines()[0].split(",")


def test_without_the_entry_it_is_refused(tmp_path: Path) -> None:
    done = run_python(package(tmp_path / "without", entry=False), READ)
    assert done.returncode == 1
    assert done.stderr.count("metric = 'pixel_error': allowed: miou, boundary_iou, trimap_miou") == 2
