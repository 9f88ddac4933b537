"""The table of what captions bring: which rows it has, what it asks of them, and its curve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from record_kit import name_of, told
from scipy import stats

from viladiff.report.sections import caption_quality as caption_dose
from viladiff.report.table.results import Results, collect_results
from viladiff.report.table.table_page import render_table
from viladiff.runs.config import RunConfig, flatten, non_default_fields, override
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import RunRecord, save_record
from viladiff.runs.store import Store
from viladiff.tables.cells import cells
from viladiff.tables.claims import evaluate_claims
from viladiff.tables.contrasts import contrasts
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.spec import Claim, Column, Row, Scale, Table
from viladiff.tables.spec_file import load_table

ABLATIONS = Path(__file__).resolve().parents[2] / "ablations"
BASELINES = ("SemiBaseline", "SemiBaseline, tags", "FixMatch", "FixMatch, tags")


def configs(name: str, column: str = "1/8 (183)") -> dict[str, RunConfig]:
    table = load_table(ABLATIONS / f"{name}.toml")
    found = cells(table, "digits", [0], [row.label for row in table.rows], [column])
    return {table.rows[one.row].label: override(RunConfig(), one.changes) for one in found}


def test_rows_are_doses_of_row_4_and_baselines_at_the_same_captions() -> None:
    found = configs("captions")
    row4, base = configs("table5")["ViLa"], flatten(found["ViLa"])
    assert non_default_fields(row4) == non_default_fields(found["ViLa"]), "the same run"
    differ = {
        label: {path: value for path, value in flatten(cfg).items() if value != base[path]}
        for label, cfg in found.items()
        if cfg.method.name == "viladiff"
    }
    visual = {"method.pseudo.source": "visual"}
    assert differ == {
        "ViLa": {},
        "ViLa, fusion stream": {},
        "ViLa, fusion stream without text": {},
        "ViLa, no captions": {"data.captions": "none"},
        **{f"ViLa, recall {rate}": {"data.caption_recall": rate} for rate in (0.3, 0.5, 0.7, 1.0)},
        "ViLa, false mentions 0.1": {"data.caption_false": 0.1},
        "ViLa, synonyms": {"data.caption_synonyms": 0.5},
        "ViLa, captions on labelled images": {"data.captions_on": "labelled"},
        "ViLa, captions on unlabelled images": {"data.captions_on": "unlabelled"},
        "ViLa, visual labels": visual,
        "ViLa, visual labels, captions on labelled images": visual | {"data.captions_on": "labelled"},
        "ViLa, visual labels, captions on unlabelled images": visual | {"data.captions_on": "unlabelled"},
    }
    assert set(found) - set(differ) == set(BASELINES)
    for label in BASELINES:
        assert found[label].data == found["ViLa"].data and found[label].eval.split == "test"
        assert (found[label].method.tags.weight > 0) is label.endswith("tags")  # type: ignore[attr-defined]
    table = load_table(ABLATIONS / "captions.toml")
    assert [column.label for column in table.columns] == ["1/8 (183)"]


def test_vila_is_claimed_above_the_best_of_the_baselines_and_fusion_apart() -> None:
    table = load_table(ABLATIONS / "captions.toml")
    for claim, row in zip(table.claims[:2], ("ViLa", "ViLa, fusion stream"), strict=True):
        asked = contrasts(table, claim)
        assert {one.higher for one in asked} == {row} and {one.lower for one in asked} == set(BASELINES)
        assert {one.form for one in asked} == {"one_sided"} and {one.limit for one in asked} == {0.0}


# The page


ROWS = (
    Row(label="Base"),
    Row(label="Base, tags"),
    Row(label="V"),
    Row(label="V, 0.3"),
    Row(label="V, 1"),
    Row(label="V, false"),
    Row(label="V, fusion", stream="fusion"),
    Row(label="V, none"),
    Row(label="V, shuffled"),
)
LEVELS = {0: 50.0, 1: 52.0, 2: 53.0, 3: 51.0, 4: 55.0, 5: 49.0, 7: 50.5, 8: 50.7}
CHANGED: dict[int, dict[str, Any]] = {
    0: {"method.name": "b"},
    1: {"method.name": "b", "method.tags.weight": 1.0},
    2: {},
    3: {"data.caption_recall": 0.3},
    4: {"data.caption_recall": 1.0},
    5: {"data.caption_false": 0.1},
    7: {"data.captions": "none"},
    8: {"data.captions": "shuffled"},
}


def record(run_id: str, points: float) -> RunRecord:
    share = points / 100
    return RunRecord(
        **told(run_id), steps=6, miou=share, network="teacher", stream="visual",
        scores={"teacher": {"visual": {"miou": share, "per_class": [share]}, "fusion": {"miou": share + 0.025}}},
        best=None, history=[], pseudo_labels={}, class_names=["sky"], captions="simulated captions",
        text_encoder="words", encoder="vit", pretrained="shipped", wall_seconds=2, train_seconds=1,
        seconds_per_step=None, peak_memory_bytes=1, workers=1, threads=1, device="cpu", versions={}, git={}, scale="s",
    )  # fmt: skip


def opened(tmp_path: Path, done: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 7, 8), **changes: Any) -> tuple[Plan, Store]:
    claim = Claim(text="V is best", kind="best_row", source="ours", rows=("V",), among=("Base", "Base, tags"))
    fields: dict[str, Any] = {"name": "t", "title": "Captions", "scale": {"s": Scale()}, "page": "captions"}
    fields |= {"reference": "Base", "headline": "V", "columns": (Column(label="1/8"),), "claims": (claim,)}
    table = Table(**{**fields, "rows": ROWS, **changes})
    store, found = Store(tmp_path / "runs"), []
    for row in range(len(ROWS)):
        for seed in range(3):
            of = 2 if row == 6 else row
            name = name_of(**{"method.name": "v", "data.dataset": "d", **CHANGED[of], "seed": seed})
            found.append(PlannedCell(row, 0, seed, name))
            if row == of and row in done:
                store.directory(name).mkdir(parents=True, exist_ok=True)
                save_record(record(name, LEVELS[row] + 0.1 * (seed - 1)), store.directory(name) / "record.json")
    runs = {cell.run_id: PlannedRun(cell.run_id, {}, "t", 6, told(cell.run_id)["changed"]) for cell in found}
    plain = {f"d {name}": {"data.caption_recall": 0.85} for name in ("v", "b")}
    every = tuple(range(len(ROWS)))
    return Plan(table, "s", every, (0,), (0, 1, 2), tuple(found), runs, {}, (), plain), store


def made(tmp_path: Path, **changes: Any) -> tuple[Results, caption_dose.Dose]:
    results = collect_results(*opened(tmp_path, **changes))
    found = caption_dose.dose(results, tmp_path / "out")
    assert found is not None
    return results, found


def test_a_ceiling_is_no_baseline(tmp_path: Path) -> None:
    plan, store = opened(tmp_path)
    oracle = {"method.name": "b", "method.pseudo.oracle": "edges"}
    runs = {**plan.runs, **{name: replace(plan.runs[name], changed=oracle) for name in plan.run_ids(1, 0)}}
    found = caption_dose.dose(collect_results(replace(plan, runs=runs), store), tmp_path / "out")
    assert found is not None and "+3.0 points to the best of 1 baseline, Base (50.0 ± 0.1 (3))" in found.said[0]


def test_the_curve_is_of_rows_that_differ_in_recall_alone(tmp_path: Path) -> None:
    _, found = made(tmp_path)
    assert {line.label: line.recall for line in found.lines} == {
        "V": 0.85,
        "V, 0.3": 0.3,
        "V, 1": 1.0,
        "V, false": None,
        "V, none": 0.0,
        "V, shuffled": None,
    }
    for line in found.lines:
        visual, fusion = line.found[0]
        assert visual.mean is not None and fusion.mean == pytest.approx(visual.mean + 2.5)
    assert found.said == (
        "1/8: V's visual stream 53.0 ± 0.1 (3) mIoU, +1.0 points to the best of 2 baselines, Base, tags "
        "(52.0 ± 0.1 (3)). Apart from that, fusion stream, which reads captions, 55.5 ± 0.1 (3) mIoU, +3.5 points to "
        "it.",
    )
    (picture,) = found.pictures
    assert picture.title == "1/8, mean of 3 seeds"
    for word in (
        "visual 50.5 at 0",
        "visual 51.0 at 0.3",
        "visual 53.0 at 0.85",
        "fusion 57.5 at 1",
        "Base, tags 52.0",
    ):
        assert word in picture.words
    assert "49.0" not in picture.words, "false mentions are no place of the curve"
    assert found.files == ("captions-1-light.svg", "captions-1-dark.svg")
    svg = (tmp_path / "out" / "figures" / "captions-1-light.svg").read_text()
    assert "recall of captions" in svg and "Base, tags" in svg and "fusion" in svg


def test_points_are_means_of_the_same_seeds_and_bars_intervals_of_paired_differences(tmp_path: Path) -> None:
    plan, store = opened(tmp_path)
    scores = {2: (53.0, 54.5, 55.0), 3: (51.2, 52.0, 53.9)}  # the headline's and those of recall 0.3
    for row, points in scores.items():
        for cell, value in zip([c for c in plan.cells if c.row == row], points, strict=True):
            save_record(record(cell.run_id, value), store.directory(cell.run_id) / "record.json")
    (last,) = (c.run_id for c in plan.cells if (c.row, c.seed) == (4, 2))
    (store.directory(last) / "record.json").unlink()
    results = collect_results(plan, Store(store.root))
    found = caption_dose.dose(results, tmp_path / "out")
    assert found is not None
    (picture,) = found.pictures
    assert picture.title == "1/8, mean of 2 seeds", "one row lacks the third"
    assert "visual 53.8 at 0.85" in picture.words and "visual 51.6 at 0.3" in picture.words
    head, *_ = (line for line in found.lines if line.label == "V")
    curve = caption_dose._curve(found.lines, head, 0, 0, {0, 1})
    low, high = stats.ttest_rel(scores[3], scores[2]).confidence_interval(0.95)
    assert {one.recall: one.error for one in curve}[0.3] == pytest.approx((high - low) / 2)
    assert {one.recall: one.error for one in curve}[0.85] is None, "no difference to itself"


def test_the_best_baseline_is_found_at_common_seeds(tmp_path: Path) -> None:
    """A baseline that has the easiest list alone has the highest mean, and is not the best."""
    plan, store = opened(tmp_path)
    scores: dict[int, tuple[float | None, ...]] = {0: (50.0, 50.0, 57.0), 1: (None, None, 54.0), 2: (53.0, 53.0, 60.0)}
    for row, points in scores.items():
        for cell, value in zip([c for c in plan.cells if c.row == row], points, strict=True):
            path = store.directory(cell.run_id) / "record.json"
            if value is None:
                path.unlink()
            else:
                save_record(record(cell.run_id, value), path)
    found = caption_dose.dose(collect_results(plan, Store(store.root)), tmp_path / "out")
    assert found is not None and "+3.0 points to the best of 2 baselines, Base (52.3" in found.said[0]


def test_what_is_not_measured_is_missing(tmp_path: Path) -> None:
    _, found = made(tmp_path / "some", done=(0, 2))
    assert "the best of 1 baseline, Base (50.0 ± 0.1 (3)); 1 not measured yet" in found.said[0]
    assert found.pictures == () and found.files == ()
    _, none = made(tmp_path / "none", done=())
    assert none.said == ("1/8: not measured yet.",)
    assert list(caption_dose._cells(none.lines[0])) == ["3 V", "0.85", "—", "—"]
    assert caption_dose.dose(collect_results(*opened(tmp_path / "table", page="table")), tmp_path) is None


def test_the_page_has_the_curve_and_the_answer(tmp_path: Path) -> None:
    plan, store = opened(tmp_path)
    verdicts = evaluate_claims(plan, store.records())
    assert [one.verdict for one in verdicts] == ["holds"]
    out = tmp_path / "page"
    text = render_table(plan, store, out, command="c", verdicts=verdicts).read_text()
    assert 'id="captions"' in text and 'href="#captions"' in text and "data:image/svg+xml" in text
    plain = (out / "table.md").read_text()
    assert "What captions bring" in plain and "| 4 V, 0.3 | 0.3 | 51.0 ± 0.1 (3) | 53.5 ± 0.1 (3) |" in plain
    before = (out / "figures" / "captions-1-dark.svg").stat().st_mtime_ns
    render_table(plan, store, out, command="c", verdicts=verdicts)
    assert (out / "figures" / "captions-1-dark.svg").stat().st_mtime_ns == before, "drawn from the same numbers"
