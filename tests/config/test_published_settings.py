"""What publications set by data set: valid fields, used by the tables at scale paper, told by page and command."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_table_page import record, rising
from test_table_page import study as a_study

from viladiff.cli import main
from viladiff.methods import METHODS
from viladiff.report.sections import training
from viladiff.report.table import results as tables
from viladiff.report.table import table_page
from viladiff.runs.config import RunConfig, flatten, override, schema
from viladiff.runs.record import save_record
from viladiff.tables.cells import Cell, cells, paper_settings
from viladiff.tables.plan import _dumps, _Kept, _loads
from viladiff.tables.published import published
from viladiff.tables.spec import Column, Row, Scale, Table
from viladiff.tables.spec_file import load_table
from viladiff.tables.stated import Stated, stated

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("table1", "table2", "table3", "table4", "table5", "table6", "table7", "leaderboard", "rates")
DECLARED = [(name, one) for name, method in METHODS.items() for one in method.published]


@cache
def table(name: str) -> Table:
    return load_table(ROOT / "ablations" / f"{name}.toml")


@cache
def found(name: str, scale: str = "paper") -> list[Cell]:
    whole = [row.label for row in table(name).rows if not row.scales or scale in row.scales]
    return cells(table(name), scale, [0], whole, [column.label for column in table(name).columns])


def runs(name: str, row: str, scale: str = "paper") -> list[dict[str, object]]:
    """Whole configurations of a row, one a column."""
    place = [one.label for one in table(name).rows].index(row)
    return [flatten(override(RunConfig(), one.changes)) for one in found(name, scale) if one.row == place]


# The declarations


@pytest.mark.parametrize(("name", "setting"), DECLARED, ids=[f"{n}-{i}" for i, (n, _) in enumerate(DECLARED)])
def test_each_setting_is_of_real_lists_fields_and_values(name: str, setting: Any) -> None:
    assert setting.source and setting.fields and setting.datasets
    for dataset in setting.datasets:
        known = schema(dataset, name)
        assert set(setting.fields) | set(setting.given) <= known.keys()
        for split in setting.splits or (None,):
            for family in setting.families or (None,):
                where = {"data.dataset": dataset, "method.name": name, **dict(setting.given)}
                where |= {k: v for k, v in (("data.split_family", family), ("data.split", split)) if v is not None}
                if family and family != "hq" and split is None:
                    where["data.split"] = "662"
                cfg = flatten(override(RunConfig(), {**where, **setting.fields}))
                assert {path: cfg[path] for path in setting.fields} == dict(setting.fields)
                assert setting in published(where)


def test_what_the_publications_say() -> None:
    """Of the authors' repositories, by hand."""
    assert [one["method.pseudo.weight"] for one in runs("table1", "PS-MT")] == [0.06, 0.6, 0.6, 0.6, 0.6]
    assert {one["method.pseudo.weight"] for one in runs("table2", "PS-MT")} == {1.5}
    assert {one["method.pseudo.weight"] for one in runs("table1", "CPS") + runs("table2", "CPS")} == {1.0}
    cps = runs("table3", "CPS")
    assert {one["method.pseudo.weight"] for one in cps} == {5.0}
    assert cps[0]["method.ohem.min_kept"] == pytest.approx(50_000 / 800**2, abs=2e-4)
    for row in ("UniMatch", "CorrMatch"):
        assert {one["method.pseudo.threshold"] for one in runs("table3", row)} == {0.0}
    assert {one["method.pseudo.threshold_momentum"] for one in runs("table3", "CorrMatch")} == {1.0}
    for one in runs("table3", "CorrMatch"):
        assert one["method.ohem.min_kept"] == pytest.approx(100_000 / (2 * 801**2), abs=2e-4)
    assert {one["method.pseudo.threshold"] for one in runs("table1", "UniMatch")} == {0.95}
    for one in runs("table3", "SemiVL†"):
        assert (one["method.pseudo.weighting"], one["method.ohem.enabled"]) == ("image", False)
    assert {one["method.ohem.enabled"] for one in cps + runs("table3", "AllSpark") + runs("table3", "DAW")} == {True}
    lengths = {name: runs(name, "SupBaseline")[0]["train.epoch_images"] for name in ("table1", "table3", "table4")}
    assert lengths == {"table1": 3000, "table3": 3000, "table4": 30_000}
    city = {"data.dataset": "cityscapes", "method.name": "u2pl"}
    assert {path: v for one in published(city) for path, v in one.fields.items()}["method.warmup"] == 0
    assert published({"data.dataset": "cityscapes", "method.name": "psmt"})[0].not_available
    for text in ("false", False):
        plain = {"data.dataset": "cityscapes", "method.name": "cps", "method.cutmix": text}
        assert [one.fields["method.pseudo.weight"] for one in published(plain)] == [6.0], "typed text is read"


@pytest.mark.parametrize("name", TABLES)
def test_each_table_at_scale_paper_runs_what_is_declared(name: str) -> None:
    assert table(name).scale["paper"].published
    assert {scale for scale, one in table(name).scale.items() if one.published} <= {"paper", "strong", "resnet"}
    count = 0
    for cell in found(name):
        cfg = flatten(override(RunConfig(), cell.changes))
        explicit = paper_settings(table(name), cell.row, cell.column)
        for setting in METHODS[str(cfg["method.name"])].published:
            if setting.holds(cfg):
                for path, value in setting.fields.items():
                    count += 1
                    assert cfg[path] == explicit.get(path, value), (table(name).rows[cell.row].label, path)
    assert count > 0 or name in ("table5", "table6", "table7")


def test_other_scales_have_the_methods_own_defaults() -> None:
    assert {one["method.pseudo.weight"] for one in runs("table1", "PS-MT", "digits")} == {0.6}
    assert all("train.epoch_images" not in one.changes for one in found("table1", "digits"))


# Layers


def small(**scale: Any) -> Table:
    fields = {"published": True, **scale}
    return Table(
        name="t",
        title="T",
        scale={"s": Scale(**fields)},
        columns=(Column(label="92", set={"data.dataset": "voc", "data.split": "92"}),),
        rows=(
            Row(label="plain", set={"method.name": "psmt"}),
            Row(label="own", set={"method.name": "psmt", "method.pseudo.weight": 0.2}),
        ),
    )


def weights(of: Table, changes: dict[str, object] | None = None) -> list[object]:
    return [one.changes.get("method.pseudo.weight") for one in cells(of, "s", [0], changes=changes or {})]


def test_a_publication_goes_before_base_and_scale_and_after_all_else() -> None:
    assert weights(small()) == [0.06, 0.2]
    assert weights(small(published=False)) == [None, 0.2]
    assert weights(small(set={"method.pseudo.weight": 0.9})) == [0.06, 0.2]
    assert weights(small(shared_method_fields={"method.pseudo.weight": 0.7})) == [0.7, 0.2]
    assert weights(small(), {"method.pseudo.weight": "0.3"}) == ["0.3", "0.3"]
    assert weights(small(), {"data.split": "183"}) == [0.6, 0.2], "the list that is run"
    assert weights(small(), {"method.name": "cps"})[0] == 1.0, "the method that is run"
    above = small().model_copy(update={"columns": (Column(label="c", set={"data.dataset": "voc", "data.split": "92",
                                                                         "method.pseudo.weight": 0.4}),)})  # fmt: skip
    assert weights(above) == [0.4, 0.2]


# Told


def test_what_is_stated_is_compared_with_what_is_run() -> None:
    of = small()
    said = stated(of, cells(of, "s", [0, 1]))
    assert [(one.row, one.path, one.value, one.runs, one.applied) for one in said] == [
        (0, "method.pseudo.weight", 0.06, 0.06, True),
        (1, "method.pseudo.weight", 0.06, 0.2, False),
    ]
    mapped = small(datasets={"voc": "digits"})
    assert [one.runs for one in stated(mapped, cells(mapped, "s", [0]))] == [0.6, 0.2], "digits is no published list"
    assert _loads(_dumps(_Kept((), (), {}, said))).published == said


def test_page_says_of_each_row_what_it_runs_and_what_not(tmp_path: Path) -> None:
    plan, store = a_study(tmp_path, rising)
    said = (
        Stated(0, 0, "Authors 123", "method.pseudo.weight", 0.06, 0.06),
        Stated(0, 1, "Authors 123", "method.pseudo.weight", 0.6, 0.6),
        Stated(0, 0, "Authors 123", "method.teacher.momentum", 0.996, 0.99),
        Stated(0, 1, "Authors 123", "method.teacher.momentum", 0.996, 0.99),
        Stated(0, 1, "Authors 123", "", "three boxes", None),
    )
    plan = replace(plan, published=said)
    (line,) = training.settings_rows(tables.collect_results(plan, store))
    assert line.runs == "method.pseudo.weight = 0.06 (1/8 (183)), 0.6 (1/2)"
    assert line.lacks == "method.teacher.momentum = 0.996 (here 0.99); not available: three boxes (1/2)"
    rest = training.undeclared(tables.collect_results(plan, store))
    assert rest.startswith("No setting by data set is declared for 2 ") and rest.endswith("a own.")
    table_page.render_table(plan, store, tmp_path / "out", command="c", verdicts=())
    html, text = ((tmp_path / "out" / name).read_text() for name in ("index.html", "table.md"))
    assert 'id="settings"' in html and "0.06 (1/8 (183)), 0.6 (1/2)" in html and "0.996 (here 0.99)" in html
    assert "## Published settings" in text and "Authors 123" in text
    bare = replace(plan, published=())
    table_page.render_table(bare, store, tmp_path / "bare", command="c", verdicts=())
    assert 'id="settings"' not in (tmp_path / "bare" / "index.html").read_text()


def test_the_command_prints_a_methods_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["methods", "psmt"]) == 0
    text = capsys.readouterr().out
    assert "voc (92, hq): method.pseudo.weight=0.06 [PS-MT 058cdc3]" in text
    assert "not available: CutMix with three boxes" in text and "\ncps " not in text
    assert "voc (2646): data.crop=512, train.epochs=200.0, data.batch_labelled=32" in text
    assert main.main(["methods", "cps", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["published"][3]["given"] == {"method.cutmix": False} and row["published"][3]["fields"]
    assert main.main(["methods", "cpss"]) != 0
    assert "did you mean 'cps'?" in capsys.readouterr().err


# Steps, last and best


def test_page_has_both_numbers_of_steps_and_last_and_best_of_both(tmp_path: Path) -> None:
    plan, store = a_study(tmp_path, rising)
    equal = tables.collect_results(plan, store)
    assert training.lengths(equal) == [] and not training.shows_best(equal)
    second_row = {run_id for column in range(len(plan.columns)) for run_id in plan.run_ids(1, column)}
    longer = {
        name: replace(run, steps=157_350 if name in second_row else 45_000, changed={"eval.every_epochs": 1})
        for name, run in plan.runs.items()
    }
    plan = replace(plan, runs=longer)
    for run_id, one in store.records().items():
        best = {
            "step": 3,
            "miou": (one.miou or 0) + 0.05,
            "evaluations": 9,
            "picked_on": "val",
            "picked_on_reported": True,
        }
        save_record(record(run_id, one.miou or 0, best=best), store.directory(run_id) / "record.json")
    results = tables.collect_results(plan, store)
    first, second, _ = training.lengths(results)
    assert (first.steps, second.steps) == (("45,000", "45,000"), ("157,350", "157,350"))
    assert (str(first.last[0]), str(first.best[0])) == ("41.0 ± 1.0 (3)", "46.0 ± 1.0 (3)")
    assert str(tables.summary(results.at(0, 0), "miou")) == "41.0 ± 1.0 (3)", "the table's number is the last"
    table_page.render_table(plan, store, tmp_path / "out", command="c", verdicts=())
    html, text, tex = ((tmp_path / "out" / name).read_text() for name in ("index.html", "table.md", "table.tex"))
    assert "45,000" in html and "157,350" in html and html.count(">best epoch<") == 2
    head = next(line for line in text.splitlines() if "measured" in line)
    assert "measured | 1/8 (183) best epoch |" in head
    assert "picked on the images that it reports" in html and "0.35 points above" in text
    assert tex.count("best epoch") == 2
    scores = html.split('<table class="scores">')[1].split("</table>")[0]
    body = [row for row in scores.split("<tbody")[1].split("<tr") if 'scope="row"' in row]
    assert {row.count("<td") for row in body} == {1 * 2 + 4 * 2}, "a tick a part; last, best, gap and paper a column"
    assert set(re.findall(r'class="group">|colspan="(\d+)" class="group"', scores)) == {"4"}
    lines = [line for line in tex.splitlines() if line.endswith(r"\\") and "&" in line]
    widths = {len(re.findall(r"(?<!\\)&", line)) for line in lines if "multicolumn" not in line}
    assert len(widths) == 1, "each line of the table has as many cells"


def test_rows_that_read_another_network_have_no_best(tmp_path: Path) -> None:
    plan, store = a_study(tmp_path, rising, seeds=(0,))
    for run_id in list(store.records()):
        best = {"step": 3, "miou": 0.9}
        save_record(record(run_id, 0.4, best=best), store.directory(run_id) / "record.json")
    rows = (plan.table.rows[0].model_copy(update={"network": "student"}), *plan.table.rows[1:])
    results = tables.collect_results(replace(plan, table=plan.table.model_copy(update={"rows": rows})), store)
    assert training.best_epoch(results.at(0, 0)).mean is None
    assert training.best_epoch(results.at(1, 0)).mean == pytest.approx(90)


def test_costs_of_evaluations_in_the_notes_are_those_of_images_times_passes() -> None:
    """(validation images × windows) / (images an epoch × (f + 2 b)) / epochs between evaluations."""
    data = {  # validation images, windows of each, training images, of which labelled in the first column
        "table1": (1449, 1, 10_582, 92), "table2": (1449, 1, 10_582, 92), "leaderboard": (1449, 1, 10_582, 92),
        "table3": (500, 8, 2975, 186), "table4": (5000, 1, 118_287, 232),
    }  # fmt: skip
    told: dict[str, list[str]] = defaultdict(list)
    for name, (images, windows, pool, labelled) in data.items():
        every = runs(name, table(name).supervised)[0]["eval.every_epochs"]
        epochs = {
            "fixmatch": pool - labelled,
            "supervised": runs(name, table(name).supervised)[0]["train.epoch_images"],
        }
        for method, length in epochs.items():
            passes = METHODS[method].step_cost
            assert passes is not None
            cost = 100 * images * windows / (length * (passes.forward + 2 * passes.backward)) / every  # type: ignore[operator]
            told[name].append(f"{cost:.1f} %")
        (note,) = (one for one in table(name).notes if "evaluated after" in one)
        assert f"adds {told[name][0]} to the images that FixMatch-EMA passes" in note, told[name]
        assert f"{told[name][1]} to those of {table(name).supervised}" in note, told[name]
