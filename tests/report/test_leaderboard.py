"""The leaderboard: its runs are those of the tables, and its page says what was measured, what it cost and what not."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_records import TINY
from record_kit import SHORT_RUNS, name_of, told

from viladiff.report.charts import cost_scatter, figures, themes
from viladiff.report.sections import leaderboard, learning_rates, ranking
from viladiff.report.sections.leaderboard import TimedStep, read_costs
from viladiff.report.table.results import Results, collect_results, summary
from viladiff.report.table.table_page import render_table
from viladiff.runs.config import RunConfig, non_default_fields, override, run_id
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import RunRecord, load_record, save_record
from viladiff.runs.store import Store
from viladiff.tables.cells import cells, unavailable
from viladiff.tables.claims import evaluate_claims
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.spec import Claim, Column, Row, Scale, Table
from viladiff.tables.spec_file import load_table

ROOT = Path(__file__).resolve().parents[2]


# The specs


def configs(name: str, scale: str = "digits", seeds: tuple[int, ...] = (0,)) -> dict[tuple[str, str, int], RunConfig]:
    """By row, column and seed, of the rows that the scale has."""
    table = load_table(ROOT / "ablations" / f"{name}.toml")
    rows = [row.label for row in table.rows if not row.scales or scale in row.scales]
    found = cells(table, scale, seeds, rows, [one.label for one in table.columns])
    return {
        (table.rows[one.row].label, table.columns[one.column].label, one.seed): override(RunConfig(), one.changes)
        for one in found
    }


def fields(cfg: RunConfig) -> str:
    return json.dumps(
        {k: v for k, v in non_default_fields(cfg).items() if not k.startswith("runtime.")}, sort_keys=True
    )


def test_cells_are_the_runs_of_the_tables_and_of_records() -> None:
    mine = configs("leaderboard", seeds=(0, 1, 2))
    by_fields = {fields(cfg): cfg for cfg in mine.values()}
    for name, lists in (("table1", {"1/16 (92)", "1/8 (183)", "1/2 (732)"}), ("table5", {"1/8 (183)", "1/2 (732)"})):
        theirs = {key: cfg for key, cfg in configs(name).items() if key[1] in lists}
        same = {row for (row, _, _), cfg in theirs.items() if fields(cfg) in by_fields}
        lacking = {row for row, _, _ in theirs} - same
        if name == "table1":
            assert lacking == set(), "every row of Table 1 is on the leaderboard"
        else:
            assert same >= {"SemiBaseline", "ViLaDiff", "ViLaDiff, shuffled captions", "ViLaDiff, no captions"}
    met, short = (
        0,
        {fields(one): one for one in (override(cfg, {**TINY, "data.split_seed": None}) for cfg in mine.values())},
    )
    for path in SHORT_RUNS.glob("*.json"):
        record = load_record(path)
        changes = {k: v for k, v in record.changed.items() if not k.startswith("runtime.")}
        text = fields(override(RunConfig(), {**changes, "seed": record.config["seed"]}))
        if text in short:
            met += 1
            assert run_id(short[text], record.fingerprints) == record.run_id
    assert met >= 12, "three methods, two lists and two seeds"


def test_rows_of_our_own_stand_in_tables_1_to_4() -> None:
    for name, double in (("table1", 120), ("table2", 120), ("table3", 360), ("table4", 40)):
        table = load_table(ROOT / "ablations" / f"{name}.toml")
        rows = {row.label: row for row in table.rows}
        assert rows["All training images labelled"].set == {"method.name": "supervised", "data.split": "all"}
        assert rows["FixMatch-EMA, twice the steps"].set["train.epochs"] == double
        assert rows["FixMatch-EMA, tags from captions"].set == {
            "method.name": "fixmatch_tags",
            "method.tags.weight": 0.3,
        }
        assert all(
            row.control for row in rows.values() if row.label.startswith(("FixMatch-EMA", "All training", "Zero"))
        )
        zero = [row.label for row in table.rows].index("Zero-shot text (CLIP)")
        assert unavailable(table) == {zero: "requires method.clip.weights"}
        assert unavailable(table, {"method.clip.weights": "some.safetensors"}) == {}
        first = cells(table, "paper", [0], ["FixMatch-EMA", "FixMatch-EMA, twice the steps"], [1])
        lengths = [override(RunConfig(), one.changes).train.epochs for one in first]
        assert lengths[1] == 2 * lengths[0] == double  # type: ignore[operator]
        (twice,) = cells(table, "digits", [0], ["FixMatch-EMA, twice the steps"], [1])
        assert override(RunConfig(), twice.changes).train.steps == 3000


def test_given_weights_are_read_by_the_row_that_needs_them_and_by_semivl() -> None:
    table = load_table(ROOT / "ablations" / "leaderboard.toml")
    given = {"method.clip.weights": "some.safetensors"}
    found = cells(table, "digits", [0], ["Zero-shot", "SemiVL", "ViLaDiff"], ["183 labels"], given)
    read = {table.rows[one.row].label: one.changes.get("method.clip.weights") for one in found}
    assert read == {"SemiVL": "some.safetensors", "ViLaDiff": None, "Zero-shot text (CLIP)": "some.safetensors"}


def test_rates_are_half_and_twice_of_what_the_leaderboard_takes_and_never_see_the_reported_set() -> None:
    board, tried = configs("leaderboard"), configs("rates")
    assert len(tried) == 21
    families = {row.label: row.group for row in load_table(ROOT / "ablations" / "leaderboard.toml").rows}
    table = load_table(ROOT / "ablations" / "rates.toml")
    assert {row.label: row.group for row in table.rows}.items() <= families.items()
    assert {row.group for row in table.rows} == {
        g for r, g in families.items() if g not in ("References", "Captions exchanged")
    }
    for (row, column, _), cfg in tried.items():
        other = board[row, "183 labels", 0]
        apart = {
            k: v
            for k, v in non_default_fields(cfg).items()
            if non_default_fields(other).get(k) != v and not k.startswith("runtime.")
        }
        rate = {"Half": 0.5, "Default": 1, "Double": 2}[column] * other.optim.lr
        assert cfg.optim.lr == pytest.approx(rate) and (cfg.data.holdout, cfg.eval.split) == (0.0, "dev")
        assert apart.keys() - {"optim.lr"} == {"eval.boundary"}, "dev is the default of built-in data"
        assert other.eval.split == "test"


# A page with made-up records


ROWS = (
    Row(label="Plain", group="Labelled", set={"method.name": "supervised"}),
    Row(label="Fix <b>", group="Teacher", set={"method.name": "fixmatch"}),
    Row(label="Vila", group="Language", set={"method.name": "viladiff"}),
    Row(label="All", group="References", control=True, set={"method.name": "supervised", "data.split": "all"}),
    Row(label="Fix twice", group="References", control=True, set={"method.name": "fixmatch"}),
    Row(label="Zero", group="References", control=True, requires="method.clip.weights"),
)
CLAIMS = (
    Claim(text="Something differs", kind="differs", source="ours", rows=("Fix <b>",)),
    Claim(text="Twice is more", kind="higher", source="ours", rows=("Fix twice", "Fix <b>")),
)
MEANS = {0: 40.0, 1: 44.0, 2: 42.0, 3: 50.0, 4: 44.2}


def score(points: float) -> dict[str, Any]:
    return {"miou": points / 100, "boundary_iou": points / 200, "per_class": [0.5]}


def record(name: str, points: float, **more: Any) -> RunRecord:
    batch = {"data.batch_labelled": 12, "data.batch_unlabelled": 4}
    about = told(name)
    known: dict[str, Any] = {
        **about, "config": {"data.dataset": "digits", "optim.lr": 0.006, **batch, **about["config"]},
        "steps": 600, "miou": points / 100, "network": "teacher", "stream": "visual",
        "scores": {"teacher": {"visual": score(points)}}, "best": None, "history": [],
        "pseudo_labels": {"before/ece": 0.05}, "class_names": ["sky"], "captions": "c", "text_encoder": "words",
        "encoder": "vit", "pretrained": "shipped",
        "wall_seconds": 200, "train_seconds": 150, "cpu_seconds": 100, "seconds_per_step": None,
        "peak_memory_bytes": 2**30, "workers": 1, "threads": 1, "device": "cpu", "versions": {}, "git": {},
        "scale": "s",
    }  # fmt: skip
    return RunRecord(**{**known, **more})


def studied(tmp_path: Path, seeds: int = 3, **changes: Any) -> tuple[Plan, Store]:
    """Two columns; the row "Vila" was run by an older version, which noted neither calibration nor processor time."""
    names = {"name": "board", "title": "Board", "page": "leaderboard", "reference": "Fix <b>", "supervised": "Plain"}
    columns = (Column(label="92 labels"), Column(label="183 labels"))
    table = Table(**{**names, "scale": {"s": Scale()}, "columns": columns, "rows": ROWS, "claims": CLAIMS, **changes})
    store, found, runs = Store(tmp_path / "runs", [tmp_path / "published"]), [], {}
    for seed, row, column in itertools.product(range(seeds), range(5), range(2)):
        method = str(ROWS[row].set["method.name"])
        fields = {
            "method.name": method,
            "data.split": "all" if row == 3 else columns[column].label.split()[0],
            "seed": seed,
            **({"train.steps": 1200} if row == 4 else {}),
        }
        name = name_of(**fields)
        found.append(PlannedCell(row, column, seed, name))
        runs[name] = PlannedRun(name, {}, "t", 1200 if row == 4 else 600, fields)
        points = MEANS[row] + (0 if row == 3 else 4 * column) + 0.2 * ((seed + row) % 3 - 1)
        old: dict[str, Any] = {"pseudo_labels": {}, "cpu_seconds": None} if row == 2 else {}
        store.directory(name).mkdir(parents=True, exist_ok=True)
        own: dict[str, Any] = {"network": "student"} if method == "supervised" else {}
        scores = {net: {"visual": score(points - lag)} for net, lag in (("teacher", 0), ("student", 0 if own else 1))}
        one = record(name, points, steps=runs[name].steps, scores=scores, **old, **own)
        save_record(one, store.directory(name) / "record.json")
    later = {5: "requires method.clip.weights"}
    defaults = {f"None {row.set.get('method.name')}": {"optim.lr": 0.006} for row in ROWS}
    about = "s", tuple(range(6)), (0, 1), tuple(range(seeds)), tuple(found), runs, later
    return Plan(table, *about, defaults=defaults), store


def steps_file(path: Path, **changes: Any) -> Path:
    """As the benchmark writes it."""
    times = {"supervised": 80, "fixmatch": 160, "viladiff": 360}
    methods = {
        name: {
            "device": "cpu", "passes": "3f + 2b", "step_ms": 999, "step_cpu_ms": ms, "reference_ms": 1,
            "reference_cpu_ms": 80,
        }
        for name, ms in times.items()
    }  # fmt: skip
    about = {"made": "2026-01-31T12:00:00Z", "machine": "a machine", "device": "cpu", "threads": 1, "repeats": 10}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "fields": [], "methods": methods, **changes}))
    return path


class Page(HTMLParser):
    """Words, cells of rows, and pictures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] = f"{self.rows[-1][-1]}{data}"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, label: str, cells: int) -> list[str]:
        """Texts of the row that begins so and has so many cells."""
        every = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        return next(row for row in every if len(row) == cells and row[0].endswith(label))


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[cost_scatter.Chart]:
    """Charts that were asked for; matplotlib takes seconds."""
    charts: list[cost_scatter.Chart] = []

    def save(chart: cost_scatter.Chart, folder: Path, name: str) -> dict[str, Path]:
        charts.append(chart)
        folder.mkdir(parents=True, exist_ok=True)
        paths = {theme: folder / f"{name}-{theme}.svg" for theme in themes.THEMES}
        for theme, path in paths.items():
            path.write_text(f"<svg>{theme}</svg>")
        return paths

    monkeypatch.setattr(figures, "save_figures", lambda *_: [])
    monkeypatch.setattr(figures, "save_differences", lambda *_: {})
    monkeypatch.setattr(cost_scatter, "save_scatter", save)
    return charts


def render(plan: Plan, store: Store, out: Path) -> tuple[Page, str]:
    verdicts = evaluate_claims(plan, store.records())
    index = render_table(plan, store, out, command="make", verdicts=verdicts)
    return Page(index.read_text(encoding="utf-8")), (out / "table.md").read_text(encoding="utf-8")


def test_the_page_says_what_is_accurate_calibrated_and_cheap(tmp_path: Path, drawn: list[cost_scatter.Chart]) -> None:
    plan, store = studied(tmp_path)
    steps_file(tmp_path / "published" / "leaderboard" / "steps.json")
    page, markdown = render(plan, store, tmp_path / "out")
    fix = page.row("Fix <b>", 15)
    assert fix[1:5] == [f"{points}.0 ± 0.2 (3)" for points in (44, 48, 43, 47)], "the average's, then its network's"
    assert fix[5:9] == ["22.0 ± 0.1 (3)", "24.0 ± 0.1 (3)", *["5.0 ± 0.0 (3)"] * 2]
    assert fix[9:] == ["2.00", "2.00", "3f + 2b", "1024", "100 (6)", "150 (6)"]
    assert page.row("Plain", 15)[3:5] == ["the same", "the same"]
    assert page.row("Fix twice", 15)[9:11] == ["2.00", "4.00"], "twice the steps cost twice"
    vila = page.row("Vila", 15)
    assert vila[7:9] == ["—", "—"] and vila[13:] == ["—", "150 (6)"], "what an older version did not note is not 0"
    assert page.row("Zero", 2)[1] == "requires method.clip.weights"
    assert [row[0].strip() for row in page.rows if len(row) == 1][:4] == [
        "Labelled",
        "Teacher",
        "Language",
        "References",
    ]
    assert "a machine, 1 thread, medians of 10 repeats, 2026-01-31T12:00:00Z" in page.text
    pictures = [attrs for tag, attrs in page.tags if tag in ("img", "source")]
    assert len(pictures) == 4 and all("data:image/svg+xml;base64," in str(one) for one in pictures)
    assert {one.get("media") for one in pictures} == {None, "screen and (prefers-color-scheme: dark)"}
    assert "Fix <b>: 44.0 at 2.0" in str(pictures[1]["alt"])
    assert len(drawn) == 2 and [one.x for one in drawn[0].points] == [1.0, 2.0, 4.5, 1.0, 4.0]
    assert [one.ours for one in drawn[0].points] == [False, False, False, True, True]
    assert "1 thread" in markdown and "| 2 Fix &lt;b&gt; | 43.0 ± 0.2 (3) | 47.0 ± 0.2 (3) | 5.0 ± 0.0 (3)" in markdown
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    links = [str(attrs["href"]) for tag, attrs in page.tags if tag == "a" and str(attrs.get("href")).startswith("#")]
    assert len(ids) == len(set(ids)) and {one[1:] for one in links} <= set(ids)


def test_a_column_of_which_only_references_are_known_has_no_picture(
    tmp_path: Path, drawn: list[cost_scatter.Chart]
) -> None:
    plan, store = studied(tmp_path)
    steps_file(tmp_path / "published" / "leaderboard" / "steps.json")
    for cell in plan.cells:
        if cell.column == 0 and not plan.table.rows[cell.row].control:
            shutil.rmtree(store.directory(cell.run_id), ignore_errors=True)
    render(plan, store, tmp_path / "out")
    assert [chart.title for chart in drawn] == [plan.table.columns[1].label]


def test_the_finding_is_made_of_tests_and_says_what_it_cannot_say(tmp_path: Path) -> None:
    plan, store = studied(tmp_path)
    found = ranking.ranking_sentences(collect_results(plan, store), evaluate_claims(plan, store.records()), [])
    text = " ".join(found)
    assert (
        "3 of 3 methods have been trained, 3 of them in every column" in text and "600 optimiser steps, 3 seeds" in text
    )
    assert "92 labels: the highest of 3 means is Fix <b>'s, 44.0. Shown against Fix <b>" in text
    assert "none above it; below it: Plain (−4.0), Vila (−2.0)." in text
    assert "+10.0 points over Plain; the largest gain of a method is +4.0, 40 % of that." in text
    assert "“Twice is more”: not decided (0 of 2 shown" in text and "+0.2 at 92 labels, +0.2 at 183 labels" in text
    assert "one data set (digits) with one encoder, vit (shipped)" in text
    assert "handwriting" in text and "compared for 0 of 3 families" in text
    assert "an average of weights for Fix <b>, Vila; the trained network itself for Plain." in text
    assert "12 labelled and, in methods that want them, 4 unlabelled images: 600 steps draw 7,200 and 2,400 (" in text
    empty = Plan(plan.table, "s", plan.rows, plan.columns, plan.seeds, plan.cells, plan.runs, plan.unavailable)
    assert ranking.ranking_sentences(collect_results(empty, Store(tmp_path / "none")), [], []) == [
        "Nothing has been measured yet."
    ]


def test_a_method_that_collapses_now_and_then_hides_no_difference_and_shows_none(tmp_path: Path) -> None:
    plan, store = studied(tmp_path)
    for cell, points in zip([c for c in plan.cells if (c.row, c.column) == (2, 1)], (6.0, 9.0, 41.8), strict=True):
        one = store.records()[cell.run_id]
        scores = {"teacher": {"visual": score(points)}}
        save_record(
            one.model_copy(update={"miou": points / 100, "scores": scores}),
            store.directory(cell.run_id) / "record.json",
        )
    store = Store(tmp_path / "runs", [tmp_path / "published"])
    text = " ".join(ranking.ranking_sentences(collect_results(plan, store), evaluate_claims(plan, store.records()), []))
    assert "below it: Plain (−4.0); Vila (−29.1): seeds differ too much for a verdict." in text
    page, _ = render(plan, store, tmp_path / "out")
    assert "each pair's standard deviation at 183 labels is its own" in page.text, "three rows are left, too few"
    assert "standard deviation at 92 labels is 0." in page.text, "the other column keeps its model"


def test_with_one_seed_nothing_is_shown_and_the_page_says_so(tmp_path: Path) -> None:
    plan, store = studied(tmp_path, seeds=1)
    page, _ = render(plan, store, tmp_path / "out")
    assert "Nothing has three seeds on both sides yet, so no difference to Fix <b> is tested." in page.text
    assert "No picture yet: it takes a score and the cost of a step (not measured here;" in page.text
    assert page.row("Fix <b>", 15)[9:12] == ["—", "—", "—"]
    assert "None yet: no run in the store differs from a row in its rate alone" in page.text


def test_a_table_has_none_of_it(tmp_path: Path) -> None:
    plan, store = studied(tmp_path, page="table")
    page, markdown = render(plan, store, tmp_path / "out")
    assert "Accuracy against cost" not in page.text and "What this shows" not in markdown
    assert "What each choice is worth" in page.text, "which a leaderboard leaves to its finding"
    assert not any(one.get("id") == "choices" for _, one in Page(render_board(tmp_path)).tags)


def render_board(tmp_path: Path) -> str:
    plan, store = studied(tmp_path / "board")
    render(plan, store, tmp_path / "board" / "out")
    return (tmp_path / "board" / "out" / "index.html").read_text(encoding="utf-8")


def test_times_of_two_precisions_have_no_mean_and_no_cell_has_two(tmp_path: Path) -> None:
    plan, store = studied(tmp_path)
    results = collect_results(plan, store)

    def in_bf16(*seeds: int) -> Results:
        """With some seeds of the first row in its second column."""
        found = []
        for e in results.entries:
            if e.record and (e.cell.row, e.cell.column) == (0, 1) and e.cell.seed in seeds:
                config = {**e.record.config, "train.precision": "bf16"}
                e = replace(e, record=e.record.model_copy(update={"config": config}))
            found.append(e)
        return replace(results, entries=tuple(found))

    lines = [leaderboard._line(one, 0, read_costs(tmp_path, [])) for one in (results, in_bf16(0, 1, 2))]
    assert [(line.cpu.runs, line.clock.runs) for line in lines] == [(6, 6), (0, 0)] and lines[1].cpu.seconds is None
    with pytest.raises(ValueError, match="a cell: runs of different precision are not averaged, got bf16; fp32"):
        summary(in_bf16(1).at(0, 1), "miou")


# Costs


def test_costs_come_from_a_file_that_a_benchmark_made(tmp_path: Path) -> None:
    out, layer = tmp_path / "out", tmp_path / "published"
    lacking = read_costs(out, [layer])
    assert lacking.measured is None and "bench_methods.py --json" in lacking.why
    steps_file(layer / "leaderboard" / "steps.json", machine="far")
    found = read_costs(out, [layer]).measured
    assert found is not None and found.machine == "far" and found.methods["viladiff"].relative == 4.5
    steps_file(out / "steps.json", machine="near", device="cuda:0")
    near = read_costs(out, [layer]).measured
    assert near is not None and near.machine == "near" and "near (cuda:0), 1 thread" in str(near)
    gpu = near.methods["fixmatch"].model_copy()
    assert TimedStep(**{**gpu.model_dump(), "device": "cuda:0"}).relative == 999, "on a GPU the clock counts"
    (out / "steps.json").write_text('{"made": 1')
    assert "cannot be used" in read_costs(out, []).why and str(tmp_path) not in read_costs(out, []).why
    steps_file(out / "steps.json", methods={"supervised": {"device": "cpu", "passes": "", "step_ms": 0}})
    assert "methods.supervised.step_ms" in read_costs(out, []).why


@pytest.mark.slow
def test_the_benchmark_writes_what_the_page_reads(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "bench_methods.py"
    words = ["supervised", "fixmatch", "--repeats", "2", "--json", str(tmp_path / "steps.json")]
    subprocess.run([sys.executable, script, *words, "--", "data.batch_labelled=4"], check=False, stdout=subprocess.PIPE)
    found = read_costs(tmp_path, []).measured
    assert found is not None and found.fields == ("data.batch_labelled=4",) and found.repeats == 2
    assert 0.5 < found.methods["supervised"].relative < 2 < 2.5 * found.methods["fixmatch"].relative
    assert found.methods["fixmatch"].passes == "3f + 2b"


# Rates


def held_out(
    store: Store,
    points: float,
    rate: float,
    split: str = "92",
    seed: int = 0,
    more: dict[str, Any] | None = None,
) -> None:
    own = {} if rate == 0.006 else {"optim.lr": rate}
    extra = {"data.holdout": 0.25, "eval.split": "holdout", "eval.boundary": False, **(more or {})}
    fields = {"method.name": "fixmatch", "data.split": split, "seed": seed, **own, **extra}
    run = name_of(**fields)
    store.directory(run).mkdir(parents=True)
    save_record(record(run, points), store.directory(run) / "record.json")


def test_rates_that_were_tried_are_those_of_the_store_that_differ_in_nothing_else(tmp_path: Path) -> None:
    plan, store = studied(tmp_path)
    held_out(store, 41.0, 0.003)
    held_out(store, 43.0, 0.006)
    held_out(store, 44.0, 0.006, seed=1)
    held_out(store, 44.5, 0.012)
    held_out(store, 90.0, 0.024, more={"optim.weight_decay": 0.5})
    held_out(store, 90.0, 0.024, more={"eval.split": "val"})
    held_out(store, 90.0, 0.024, split="366")
    (one,) = [
        two for two in learning_rates.tried(collect_results(plan, store), store.records()) if two.label == "Fix <b>"
    ]
    assert (one.family, one.column) == ("Teacher", "92 labels")
    assert [(r.value, str(r.found), r.taken, r.highest) for r in one.rates] == [
        (0.003, "41.0 (1)", False, False),
        (0.006, "43.5 ± 0.7 (2)", True, False),
        (0.012, "44.5 (1)", False, True),
    ]
    assert one.said == "0.012 is 1.0 points above the one that the table takes"
    mixed = dict(store.records())
    for name, one in mixed.items():
        if one.config["optim.lr"] == 0.012:
            mixed[name] = one.model_copy(update={"config": {**one.config, "train.precision": "bf16"}})
    (apart,) = [two for two in learning_rates.tried(collect_results(plan, store), mixed) if two.label == "Fix <b>"]
    assert [r.value for r in apart.rates] == [0.003, 0.006], "a rate that was tried in another precision is none of it"
    page, markdown = render(plan, store, tmp_path / "out")
    assert "0.006: 43.5 ± 0.7 (2) ✓" in page.text and "compared for 1 of 3 families" in page.text
    assert "The table's rate was the highest for 0 of 1." in page.text
    assert "0.006: 43.5 ± 0.7 (2) (taken)" in markdown
    held_out(store, 46.0, 0.006, seed=2)
    again = learning_rates.tried(collect_results(plan, store), store.records())[0]
    assert again.said == "0.012 is 0.2 points above the one that the table takes"


def test_a_default_rate_is_the_plan_s_whatever_a_record_says_of_it(tmp_path: Path) -> None:
    plan, store = studied(tmp_path)
    held_out(store, 43.0, 0.006)
    held_out(store, 44.5, 0.012)
    forged = {
        name: one if "optim.lr" in one.changed else one.model_copy(update={"config": {**one.config, "optim.lr": 0.5}})
        for name, one in store.records().items()
    }
    (found,) = learning_rates.tried(collect_results(plan, store), forged)
    assert [(r.value, r.taken) for r in found.rates] == [(0.006, True), (0.012, False)]


# The picture


def test_every_point_has_its_number_and_its_name_in_the_list_beneath() -> None:
    draw = random.Random(4)
    labels = [f"A method of name {'n' * (i % 9)} {i}" for i in range(23)]
    points = tuple(
        cost_scatter.Point(
            1 + i % 5 * 0.7, 45 + 3 * draw.random(), 0.4 if i % 4 else None, str(i + 1), label, i % 7, i > 18
        )
        for i, label in enumerate(labels)
    )
    chart = cost_scatter.Chart("183 labels", "cost", "mIoU", points, tuple(f"Family {i}" for i in range(7)))
    figure = cost_scatter.draw(chart)
    (axes,), renderer = figure.axes, figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.draw_without_rendering()
    shown = [number for text in axes.texts for number in text.get_text().split(", ")]
    assert sorted(shown, key=int) == [one.number for one in points]
    by_number = {one.number: one for one in points}
    for text in axes.texts:
        first, *others = (by_number[number] for number in text.get_text().split(", "))
        gaps = [axes.transData.transform([one[:2], first[:2]]) for one in others]
        assert all(np.ptp(gap[:, 1]) * 72 / figure.dpi < 7 for gap in gaps), "only points at one place share a text"
    assert [text.get_text() for text in figure.texts] == [f"{one.number}  {one.label}" for one in points]
    boxes = [np.array(text.get_window_extent(renderer).extents) for text in (*figure.texts, *axes.texts)]
    for i, box in enumerate(boxes):
        assert not any(_overlap(box, other) for other in boxes[:i]), "texts overlap"
        assert (box[:2] >= 0).all() and (box[2:] <= figure.bbox.extents[2:]).all()
    under = axes.get_tightbbox(renderer)
    assert under is not None and all(box[3] < under.y0 for box in boxes[: len(points)])


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((np.minimum(one[2:], other[2:]) > np.maximum(one[:2], other[:2])).all())


def test_a_picture_is_drawn_again_only_for_other_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    chart = cost_scatter.Chart("t", "x", "y", (cost_scatter.Point(1.0, 2.0, None, "1", "costs $1", 0),), ("f",))
    paths = cost_scatter.save_scatter(chart, tmp_path, "cost-1")
    assert {path.name for path in paths.values()} == {"cost-1-light.svg", "cost-1-dark.svg"}
    texts = {theme: path.read_text() for theme, path in paths.items()}
    assert all(colour in texts[theme] for theme, look in themes.THEMES.items() for colour in look.values())
    assert not any(colour in texts["dark"] for colour in themes.THEMES["light"].values())
    assert "costs $1" in texts["light"]
    monkeypatch.setattr(cost_scatter, "draw", lambda *_: pytest.fail("drawn again"))
    cost_scatter.save_scatter(chart, tmp_path, "cost-1")
    with pytest.raises(pytest.fail.Exception):
        cost_scatter.save_scatter(chart._replace(title="other"), tmp_path, "cost-1")


def test_the_page_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys, viladiff.report.sections.leaderboard; print({'torch', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_collapse_stands_below_the_others_with_its_number() -> None:
    near = [cost_scatter.Point(1.0, 45.0 + i, 0.5, str(i), str(i), 0) for i in range(6)]
    far = cost_scatter.Point(2.0, 6.0, 0.3, "7", "lost", 0)
    shown = cost_scatter.brought_in([*near, far])
    assert shown[:6] == tuple(near) and shown[6].number == "7 ↓ 6.0" and shown[6].spread is None
    assert 43 < shown[6].y < 44.5 and shown[6].x == 2.0
    assert cost_scatter.brought_in([*near[:4], far]) == (*near[:4], far), "of five, nobody says which is far"
    assert cost_scatter.brought_in([*near, far._replace(y=40.0)])[6].y == 40.0
    figure = cost_scatter.draw(cost_scatter.Chart("t", "x", "y", (*near, far), ("a",)))
    assert min(figure.axes[0].get_yticks()) > shown[6].y, "the axis has no number where it does not hold"
    assert "7 ↓ 6.0" in [one.get_text() for one in figure.axes[0].texts]


def test_numbers_of_points_that_are_near_share_a_text_beside_the_last_of_them() -> None:
    points = [cost_scatter.Point(x, 70.0, None, str(i), f"r{i}", 0) for i, x in ((1, 2.0), (2, 2.05), (3, 4.0))]
    figure = cost_scatter.draw(cost_scatter.Chart("t", "cost", "mIoU", tuple(points), ("g",)))
    labels = cost_scatter.number_labels(figure.axes[0], points)
    assert [(one.at, one.text, one.align) for one in labels] == [
        ((2.05, 70.0), "1, 2", "left"),
        ((4.0, 70.0), "3", "left"),
    ]


def test_numbers_cover_neither_a_marker_nor_other_numbers() -> None:
    rows = [(1, 2.0, 70.0), (2, 2.05, 70.0), (3, 2.15, 70.7), (4, 4.0, 60.0), (5, 3.7, 60.1), (6, 8.0, 50.0)]
    points = [cost_scatter.Point(x, y, None, str(i), f"r{i}", 0) for i, x, y in rows]
    figure = cost_scatter.draw(cost_scatter.Chart("t", "cost", "mIoU", tuple(points), ("g",)))
    axes = figure.axes[0]
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    texts = [one.get_window_extent() for one in axes.texts]
    markers = [axes.transData.transform((one.x, one.y)) for one in points]
    for place, box in enumerate(texts):
        for x, y in markers:
            inside = box.x0 - 2 / scale < x < box.x1 + 2 / scale and box.y0 < y < box.y1
            assert not inside, axes.texts[place].get_text()
        assert not any(box.overlaps(other) for other in texts[place + 1 :]), axes.texts[place].get_text()
    assert len({(one.align, one.offset) for one in cost_scatter.number_labels(axes, points)}) > 1


def test_a_text_avoids_earlier_texts_and_stands_at_the_end_of_its_points() -> None:
    corners = [cost_scatter.Point(x, y, None, "", "", 0) for x, y in ((1.0, 40.0), (9.0, 80.0))]
    figure = cost_scatter.draw(cost_scatter.Chart("t", "cost", "mIoU", tuple(corners), ("g",)))
    axes = figure.axes[0]

    def at(number: str, right: float, up: float) -> cost_scatter.Point:
        """A point so many points of the figure from its middle."""
        middle = axes.transAxes.transform((0.5, 0.5))
        x, y = axes.transData.inverted().transform(middle + figure.dpi / 72 * np.array([right, up]))
        return cost_scatter.Point(float(x), float(y), None, number, number, 0)

    first, second = cost_scatter.number_labels(axes, [at("1", 0, 0), at("3", -11, 2), at("4", -11, 2)])
    assert (first.align, first.offset, second.text) == ("left", (4, 2), "3, 4")
    assert (second.align, second.offset) != ("left", (4, 2)), "it would cover the first number, and no marker"
    left, right, beyond = at("1", 0, 0), at("2", 8, 0), at("3", 20, 0)
    pair, _ = cost_scatter.number_labels(axes, [left, right, beyond])
    assert (pair.text, pair.align, pair.at) == ("1, 2", "right", (left.x, left.y))
