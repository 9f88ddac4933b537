"""Numbers of a table: summaries, differences, what is missing, agreement with the printed order, plain files."""

from __future__ import annotations

import csv
import io
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_kit import bound, name_of, told
from scipy import stats

from viladiff.report import provenance
from viladiff.report.charts import figures
from viladiff.report.table import exports, long_form, table_views
from viladiff.report.table import results as tables
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import RunRecord, save_record
from viladiff.runs.store import Failure, Store
from viladiff.tables.claims import evaluate_claims
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.spec import Column, Gap, Row, Scale, Table

NASTY = "<b>A & B_1</b> {x} $y$ | `z` \\ 100%"
LABELS = ("base", NASTY, "all", "own")


def name(row: int, column: int, seed: int) -> str:
    return name_of(row=row, column=column, seed=seed)


def table(**changes: Any) -> Table:
    rows = (
        Row(label="base", components=("Baseline",), paper=(70.0, 75.0)),
        Row(label=NASTY, components=("Baseline", "L_feat (t)"), paper=(71.0, 74.0), note="a <note>"),
        Row(label="all", components=("Baseline", "L_feat (t)", "q_G"), paper=(72.0, "-")),
        Row(label="own", control=True),
    )
    fields = {
        "name": "table",
        "title": "Table 5. <Modules> & more",
        "scale": {"tiny": Scale(datasets={"voc": "digits"})},
        "columns": (Column(label="1/8 (183)", set={"data.dataset": "voc"}), Column(label="1/2_{732}")),
        "rows": rows,
    }
    return Table(**{**fields, **changes})


def record(run_id: str, miou: float | None, **changes: Any) -> RunRecord:
    score = {"miou": miou, "per_class": [miou, None], "boundary_iou": 0.3, "trimap_miou": None, "images": 4}
    fields: dict[str, Any] = {
        "steps": 6, "miou": miou, "network": "teacher", "stream": "visual",
        "scores": {"teacher": {"visual": score}}, "best": None, "history": [],
        "pseudo_labels": {"before/coverage": 0.5, "rescued": None}, "class_names": ["background", "zero"],
        "captions": "simulated captions", "text_encoder": "words", "encoder": "vit", "pretrained": "shipped",
        "wall_seconds": 61.0, "train_seconds": 60.0, "seconds_per_step": 10.0, "peak_memory_bytes": 2**30,
        "workers": 1, "threads": 1, "device": "cpu", "versions": {"torch": "2"},
        "git": {"revision": "abcdef0123456789", "dirty": False}, "scale": "tiny",
    }  # fmt: skip
    about = told(run_id)
    about["config"] |= {"data.dataset": "digits", "data.split": "183"}
    return RunRecord(**{**about, **fields, **changes})


Value = Callable[[int, int, int], float | None]


def study(tmp_path: Path, value: Value, seeds: tuple[int, ...] = (0, 1, 2), **changes: Any) -> tuple[Plan, Store]:
    """A plan and a store with a record wherever ``value(row, column, seed)`` gives a share."""
    store = Store(tmp_path / "runs")
    spec = table(**changes)
    cells = [
        PlannedCell(row, column, seed, name(row, column, seed))
        for seed, row, column in itertools.product(seeds, range(len(spec.rows)), range(len(spec.columns)))
    ]
    runs = {cell.run_id: PlannedRun(cell.run_id, {}, "title", 6, told(cell.run_id)["changed"]) for cell in cells}
    for cell in cells:
        share = value(cell.row, cell.column, cell.seed)
        if share is not None:
            store.directory(cell.run_id).mkdir(parents=True)
            save_record(record(cell.run_id, share), store.directory(cell.run_id) / "record.json")
    rows, columns = tuple(range(len(spec.rows))), tuple(range(len(spec.columns)))
    return Plan(spec, "tiny", rows, columns, seeds, tuple(cells), runs), store


def rising(row: int, column: int, seed: int) -> float:
    return 0.4 + 0.02 * row + 0.1 * column + 0.01 * seed


def test_summary_says_mean_sample_deviation_and_number_of_seeds(tmp_path: Path) -> None:
    results = tables.collect_results(*study(tmp_path, rising))
    found = tables.summary(results.at(0, 0), "miou")
    assert found.mean == pytest.approx(41) and found.spread == pytest.approx(np.std([40, 41, 42], ddof=1))
    assert str(found) == "41.0 ± 1.0 (3)"
    assert str(tables.summary(results.at(0, 0)[:1], "miou")) == "40.0 (1)"


def test_missing_is_a_dash_with_a_reason_and_never_zero(tmp_path: Path) -> None:
    plan, store = study(tmp_path, lambda row, column, seed: None if row == 2 else rising(row, column, seed))
    save = Failure(kind="nan", message="total is nan", step=4, attempts=2, when="2026-01-31T12:00:00Z")
    store.record_failure(name(2, 0, 0), save)
    store.directory(name(2, 0, 1)).mkdir(parents=True)
    (store.directory(name(2, 0, 1)) / "checkpoint.pt").touch()
    older = bound(record(name(2, 1, 0), 0.9), method_revision=1)
    store.directory(older.run_id).mkdir(parents=True)
    save_record(older, store.directory(older.run_id) / "record.json")
    with store.lease(name(2, 1, 1)):  # type: ignore[union-attr]
        results = tables.collect_results(plan, store)
    found = tables.summary(results.at(2, 0), "miou")
    assert str(found) == "—" and found.mean is None and found.n == 0
    assert found.missing[0] == "failed (nan at step 4 after 2 attempts): total is nan"
    assert found.missing[1].startswith("begun") and found.missing[2] == "not run yet"
    other = tables.summary(results.at(2, 1), "miou")
    assert "older revision" in other.missing[0] and "running" in other.missing[1]
    assert results.counts() == {"missing": 2, "begun": 1, "running": 1, "failed": 1, "stale": 1, "done": 18}
    assert not any("90.0" in line for line in exports.to_markdown(results, [], [], "make", "").splitlines())


def test_a_score_that_was_not_measured_is_missing(tmp_path: Path) -> None:
    results = tables.collect_results(*study(tmp_path, lambda row, column, seed: math.nan if row else 0.4, seeds=(0,)))
    assert str(tables.summary(results.at(0, 0), "trimap_miou")) == "—"
    assert tables.summary(results.at(0, 0), "trimap_miou").missing == {0: "not measured in this run"}
    assert str(tables.summary(results.at(0, 0), "boundary_iou")) == "30.0 (1)"


def test_a_gap_is_closed_by_a_share_over_common_seeds(tmp_path: Path) -> None:
    scores = {"low": {0: 0.50, 1: 0.52}, "high": {0: 0.60, 1: 0.62, 2: 0.9}, "row": {0: 0.56, 1: 0.60, 2: 0.1}}
    labels = ["row", "low", "high", "level"]

    def value(row: int, column: int, seed: int) -> float | None:
        return scores.get(labels[row], {}).get(seed) if column == 0 else 0.5

    changes: dict[str, Any] = {
        "rows": tuple(Row(label=label, control=label != "row") for label in labels),
        "gaps": (Gap(row="row", low="low", high="high"), Gap(row="row", low="low", high="level")),
    }
    results = tables.collect_results(*study(tmp_path, value, **changes))
    first, second = tables.gaps(results)
    assert first.startswith(
        "Of the gap from low to high, row closes 70% on 1/8 (183) (7.0 of 10.0 points, 2 seeds); none"
    )
    assert second.endswith("none, since there is no gap on 1/2_{732} (0.0 of 0.0 points, 3 seeds).")
    assert "1/8" not in second, "its column has no seed of all three rows"


def test_texts_name_the_data_set_that_stands_for_a_column_and_the_reading_of_a_row(tmp_path: Path) -> None:
    columns = (Column(label="PASCAL VOC 1/8", set={"data.dataset": "voc"}), Column(label="183 labels"))
    rows = (Row(label="base"), Row(label="words", stream="fusion"))
    plan, store = study(tmp_path, rising, columns=columns, rows=rows, base={"data.dataset": "voc"})
    results = tables.collect_results(plan, store)
    assert tables.swapped(results, 0) == tables.swapped(results, 1) == ("voc", "digits")
    said = "The paper's voc is digits here: compare order and direction with the paper's numbers, not levels."
    assert table_views.stand_ins(results) == [said], "once for both columns"
    assert said in exports.to_latex(results, "", table_views.stand_ins(results))
    assert f"- {said}" in exports.to_markdown(results, [], [], "make", "", table_views.context(results))
    base = tables.collect_results(
        *study(tmp_path / "b", rising, columns=columns, rows=rows, headline="base", reference="base")
    )
    assert "41.0 ± 1.0 (3) on PASCAL VOC 1/8, with digits in its place; 51.0 ± 1.0 (3) on 183 labels." in (
        tables.headline_sentence(base)
    ), "a label that names no data set is as it is"
    lines = list(csv.DictReader(io.StringIO(exports.to_csv(results))))
    assert {(line["row"], line["stream"], line["dataset"], line["split"]) for line in lines} == {
        ("base", "visual", "digits", "183"),
        ("words", "fusion", "digits", "183"),
    }


def test_differences_are_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    def value(row: int, column: int, seed: int) -> float | None:
        return None if (row, seed) == (0, 2) else rising(row, column, seed) + (0.3 if seed == 2 else 0)

    results = tables.collect_results(*study(tmp_path, value))
    first, last = (tables.summary(results.at(row, 0), "miou") for row in (0, 2))
    gap = tables.difference(last, first)
    assert gap is not None and gap.mean == pytest.approx(4) and gap.seeds == (0, 1)
    assert tables.difference(last, tables.summary([], "miou")) is None


@pytest.mark.parametrize("seed", range(3))
def test_agreement_is_kendalls_tau_b_with_exact_chance(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = tuple(Row(label=str(i), paper=(float(i),) * 2) for i in range(5))
    levels = random.permutation(5) if seed else np.array([1, 1, 0, 2, 2])
    plan, store = study(tmp_path, lambda row, column, seed: 0.1 * float(levels[row]) + 0.1, (0,), rows=rows)
    found = tables.agreement(tables.collect_results(plan, store), 0)
    assert found.tau == pytest.approx(stats.kendalltau(levels, range(5)).statistic)
    assert found.same + found.reverse + found.tied == 10 and found.rows == 5
    if seed:
        above = [stats.kendalltau(order, range(5)).statistic >= found.tau - 1e-9 for order in orders()]
        assert found.chance == pytest.approx(np.mean(above))
    else:
        assert found.tied == 2 and found.chance is None


def orders() -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(5)))


def test_agreement_leaves_out_rows_that_are_not_printed_or_not_measured(tmp_path: Path) -> None:
    results = tables.collect_results(
        *study(tmp_path, lambda row, column, seed: None if row == 0 else rising(row, column, seed))
    )
    assert tables.agreement(results, 0).rows == 2
    alone = tables.agreement(results, 1)
    assert alone.rows == 1 and alone.tau is None and "there are 1" in exports.agreement_text(alone)


def test_finding_is_made_from_the_numbers(tmp_path: Path) -> None:
    results = tables.collect_results(*study(tmp_path / "a", rising))
    assert tables.headline_sentence(results) == (
        "Row 3 (all) reaches 45.0 ± 1.0 (3) on 1/8 (183), 4.0 above base; 55.0 ± 1.0 (3) on 1/2_{732}, 4.0 above base."
    )
    falling = tables.collect_results(*study(tmp_path / "b", lambda row, column, seed: 0.5 - 0.01 * row * column, (0,)))
    assert "level with base" in tables.headline_sentence(falling) and "2.0 below base" in tables.headline_sentence(
        falling
    )
    begun = tables.collect_results(*study(tmp_path / "c", lambda row, column, seed: 0.5 if row == 0 else None))
    assert "none of the last row" in tables.headline_sentence(begun)
    assert "No run" in tables.headline_sentence(tables.collect_results(*study(tmp_path / "d", lambda *_: None)))


def test_frame_has_mean_deviation_number_and_the_printed_apart(tmp_path: Path) -> None:
    plan, store = study(
        tmp_path, lambda row, column, seed: None if (row, column) == (1, 1) else rising(row, column, seed)
    )
    found = long_form.frame(plan, store)
    assert list(found.index) == list(LABELS)
    assert found.loc["all", ("1/8 (183)", "mean")] == pytest.approx(45)
    assert found.loc["all", ("1/8 (183)", "sd")] == pytest.approx(1)
    missing = found.loc[NASTY, "1/2_{732}"]
    assert math.isnan(missing["mean"]) and missing["n"] == 0 and missing["paper"] == 74
    assert math.isnan(found.loc["all", ("1/2_{732}", "paper")]) and math.isnan(found.loc["own", ("1/8 (183)", "paper")])
    assert ("1/8 (183)", "paper") not in long_form.frame(plan, store, metric="boundary_iou")
    lines = long_form.frame(plan, store, long_form=True)
    assert len(lines) == 24 and lines["miou"].isna().sum() == 3
    with pytest.raises(ValueError, match="metric = 'mIoU'"):
        long_form.frame(plan, store, metric="mIoU")


def test_csv_has_a_line_a_run_and_empty_cells_for_what_is_missing(tmp_path: Path) -> None:
    results = tables.collect_results(
        *study(tmp_path, lambda row, column, seed: None if row == 1 else rising(row, column, seed))
    )
    lines = list(csv.DictReader(io.StringIO(exports.to_csv(results))))
    assert len(lines) == 24
    assert {line["miou"] for line in lines if line["row"] == NASTY} == {""}
    assert float(lines[0]["miou"]) == pytest.approx(40) and lines[0]["run_id"] == name(0, 0, 0)
    assert lines[0]["class/zero"] == "" and lines[0]["pseudo/rescued"] == ""
    assert float(lines[0]["pseudo/before/coverage"]) == 50


def test_plain_files_escape_everything_and_keep_printed_numbers_apart(tmp_path: Path) -> None:
    plan, store = study(tmp_path, rising)
    results = tables.collect_results(plan, store)
    agreements = [tables.agreement(results, column) for column in plan.columns]
    text = exports.to_markdown(results, evaluate_claims(plan, store.records()), agreements, "make table5", "")
    rows = [line for line in text.splitlines() if line.startswith("| 2 |")]
    assert r"&lt;b&gt;A &amp; B\_1&lt;/b&gt; {x} \$y\$ \| \`z\` \\ 100%" in rows[0]
    cells = [cell.strip() for cell in rows[0].replace(r"\|", "").split("|")]
    assert "43.0 ± 1.0 (3)" in cells and "71.0" in cells
    assert text.count("74.0") == 1 and "simulated captions" in text and "make table5" in text
    tex = exports.to_latex(results, "")
    assert r"\textless{}b\textgreater{}A \& B\_1\textless{}/b\textgreater{} \{x\} \$y\$ \textbar{} `z` " in tex
    assert r"$\mathcal{L}_{\mathrm{feat}}^{(t)}$" in tex and r"\textbf{45.0 $\pm$ 1.0 (3)}" in tex
    bare = tex.replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    body = tex.split(r"\midrule")[1]
    assert {line.replace(r"\&", "").count("&") for line in body.strip().splitlines()} == {10}


def test_controls_come_last_have_letters_and_are_never_the_best(tmp_path: Path) -> None:
    results = tables.collect_results(
        *study(tmp_path, lambda row, column, seed: 0.9 if row == 3 else rising(row, column, seed))
    )
    found = exports.export_rows(results, "miou")
    assert [line.number for line in found] == ["1", "2", "3", "a"]
    assert [[cell[1] for cell in line.cells] for line in found] == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]
    assert found[3].cells[0][3] == "" and found[2].cells[1][3] == "—"


def test_one_measured_row_is_not_the_best_and_an_empty_column_has_no_axis(tmp_path: Path) -> None:
    few = {(0, 0), (3, 0)}  # of the first column one row and a control, of the second none
    results = tables.collect_results(*study(tmp_path, lambda *at: rising(*at) if at[:2] in few else None))
    assert not any(cell[1] for line in exports.export_rows(results, "miou") for cell in line.cells)
    rows, axes = table_views.seed_dots(results, table_views.table_rows(results, "miou", table_views.Reasons()))
    assert axes[0] and axes[1] == [] and all(line.tracks[1] == ([], None) for line in rows)
    assert len(rows[0].tracks[0][0]) == 3 and not rows[1].tracks[0][0]
    drawn = figures._scores(results).axes
    assert len(drawn) == 1 and len(drawn[0].get_yticks()) == 2, "the figure has rows and columns with scores alone"


def test_runs_that_should_be_alike_and_are_not_are_flagged(tmp_path: Path) -> None:
    plan, store = study(tmp_path, rising, (0,))
    assert not any(fact.mixed for fact in provenance.run_facts(tables.collect_results(plan, store)))
    place = store.directory(name(0, 0, 0)) / "record.json"
    save_record(record(name(0, 0, 0), 0.4, threads=4, git={"revision": "f" * 40, "dirty": True}, scale="other"), place)
    results = tables.collect_results(plan, store)
    mixed = {fact.name: str(fact) for fact in provenance.run_facts(results) if fact.mixed}
    assert mixed.keys() == {"Threads", "Code revision", "Made for scale"}
    assert mixed["Code revision"] == "abcdef012345 (7 runs); ffffffffffff with uncommitted changes (1 run)"


def test_a_frame_needs_no_torch() -> None:
    code = "import sys, viladiff.report.table.table_page, viladiff.report.table.results; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_order_of_equal_rows_is_not_defined(tmp_path: Path) -> None:
    rows = tuple(Row(label=str(i), paper=(float(i),) * 2) for i in range(3))
    plan, store = study(tmp_path, lambda row, column, seed: 0.3, (0,), rows=rows)
    found = tables.agreement(tables.collect_results(plan, store), 0)
    assert found.tau is None and found.rows == 3
    assert "all 3 rows are equal" in exports.agreement_text(found)


def test_a_row_that_waits_is_missing_at_its_column_s_own_seeds() -> None:
    places = ((0, 0), (0, 1), (1, 0))
    cells = tuple(PlannedCell(0, column, seed, name(0, column, seed)) for column, seed in places)
    runs = {cell.run_id: PlannedRun(cell.run_id, {}, "t", 6, told(cell.run_id)["changed"]) for cell in cells}
    plan = Plan(table(), "tiny", (0, 1), (0, 1), (0, 1), cells, runs, {1: "requires weights"})
    found = tables.collect_results(plan, Store(Path("nowhere")))
    assert tuple((one.cell.column, one.cell.seed) for one in found.of_row(1)) == places
