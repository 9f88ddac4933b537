"""The page of a table as a reader gets it: parsed, not only searched for words."""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from record_kit import name_of, told

from viladiff.core.atomic import writer_token
from viladiff.report.charts import figures
from viladiff.report.table import comparisons, results, table_page, table_views
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import RunRecord, save_record
from viladiff.runs.store import Failure, Store
from viladiff.tables.claims import ColumnVerdict, Comparison, Verdict
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.spec import Column, Row, Scale, Table

ROOT = Path(__file__).resolve().parents[2]

NASTY = '<script>alert("1")</script> & _{$} 40 letters'
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


def name(row: int, column: int, seed: int) -> str:
    return name_of(row=row, column=column, seed=seed)


def record(run_id: str, miou: float, **changes: Any) -> RunRecord:
    score = {"miou": miou, "per_class": [0.9, None], "boundary_iou": miou / 2, "trimap_miou": miou / 3, "images": 4}
    fields: dict[str, Any] = {
        "steps": 6, "miou": miou, "network": "teacher", "stream": "visual",
        "scores": {"student": {"visual": score}, "teacher": {"visual": score, "fusion_no_text": score}},
        "best": None, "history": [], "pseudo_labels": {"before/coverage": 0.5, "after/coverage": 0.625},
        "class_names": ["background", NASTY], "captions": "simulated captions (recall 0.85)",
        "text_encoder": "words", "encoder": "vit", "pretrained": "shipped", "wall_seconds": 61.0,
        "train_seconds": 60.0, "seconds_per_step": 10.0, "peak_memory_bytes": 2**30, "workers": 1, "threads": 1,
        "device": "cpu", "versions": {"torch": "2"}, "git": {"revision": "abcdef0123456789", "dirty": False},
        "scale": "tiny",
    }  # fmt: skip
    about = told(run_id)
    about["config"] |= {"data.dataset": "digits"}
    return RunRecord(**{**about, **fields, **changes})


def study(root: Path, value: Callable[[int, int, int], float | None], seeds: Sequence[int] = (0, 1, 2)) -> Any:
    table = Table(
        name="table5",
        title="Table 5. <Modules>",
        notes=("Text is <extra>.",),
        scale={"tiny": Scale(datasets={"voc": "digits"})},
        columns=(Column(label="1/8 (183)", set={"data.dataset": "voc"}), Column(label="1/2")),
        rows=(
            Row(label="base", components=("Baseline",), paper=(70.1, 75.0)),
            Row(label=NASTY, components=("Baseline", "L_feat (t)"), paper=(71.2, "-"), note="a & b"),
            Row(label="own", control=True),
        ),
    )
    store = Store(root / "runs")
    cells = [PlannedCell(r, c, s, name(r, c, s)) for s, r, c in itertools.product(seeds, range(3), range(2))]
    for cell in cells:
        share = value(cell.row, cell.column, cell.seed)
        if share is not None:
            directory = store.directory(cell.run_id)
            directory.mkdir(parents=True)
            save_record(record(cell.run_id, share), directory / "record.json")
            lines = "".join(f'{{"step": {i}, "sup": {2 / (i + 1)}, "total": {3 - i / 9}}}\n' for i in range(9))
            (directory / "steps.jsonl").write_text(lines)
    runs = {cell.run_id: PlannedRun(cell.run_id, {}, "t", 6, told(cell.run_id)["changed"]) for cell in cells}
    return Plan(table, "tiny", (0, 1, 2), (0, 1), tuple(seeds), tuple(cells), runs), store


def rising(row: int, column: int, seed: int) -> float:
    return 0.4 + 0.02 * row + 0.1 * column + 0.01 * seed


class Reader(HTMLParser):
    """Tags with their attributes, cells of tables, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append((dict(attrs).get("class") or "", ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag, at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            kind, text = self.cells[-1]
            self.cells[-1] = kind, text + data

    def column(self, kind: str) -> list[str]:
        return [" ".join(text.split()) for found, text in self.cells if kind in found.split()]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib takes seconds, and tests/report/test_figures.py looks at what it draws."""
    monkeypatch.setattr(figures, "save_figures", lambda *_: [])
    monkeypatch.setattr(figures, "save_differences", lambda *_: {})


def comparison(difference: float) -> Comparison:
    reach = (difference - 1, difference + 1)
    return Comparison(
        "base", NASTY, "1/8 (183)", difference, reach, 0.0004, (3, 3), 0.9, "shown", printed=Decimal("1.1")
    )


VERDICTS = (
    Verdict("first <i>", "holds", "1 of 1 shown", "t test", (comparison(2.0),), 0.8, "paper", "miou", "fails", "no"),
    Verdict("second", "fails", "1 reversed", "t test", (), None, "ours", "boundary_iou", "not printed", "none"),
    Verdict("third", "not decided", "too few", "other", (), None, "paper", "miou", "holds", "all"),
)


def render(root: Path, *args: Any, verdicts: Sequence[Verdict] = (), **kwargs: Any) -> Reader:
    plan, store = study(root, *args, **kwargs)
    found = table_page.render_table(plan, store, root / "out", command="make <table5>", verdicts=verdicts)
    return Reader(found.read_text(encoding="utf-8"))


def test_a_page_is_one_file_that_asks_nothing_of_a_network(tmp_path: Path) -> None:
    reader = render(tmp_path, rising, verdicts=VERDICTS)
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object"}
    sources = [attrs.get("src") for _, attrs in reader.tags if "src" in attrs]
    links = [attrs["href"] for tag, attrs in reader.tags if tag == "a"]
    assert all(str(source).startswith("data:image/png;base64,") for source in sources)
    assert not [link for link in links if str(link).startswith(("http", "/", "file"))]
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {str(x)[1:] for x in links if str(x).startswith("#")} <= set(ids)
    for link in links:
        assert str(link).startswith("#") or (tmp_path / "out" / str(link)).is_file(), link
    style = (ROOT / "viladiff" / "report" / "templates" / "page.css").read_text(encoding="utf-8")
    assert "url(" not in style and "@import" not in style
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert written == {"index.html", "table.md", "table.tex", "table.csv"}


def test_figures_are_files_beside_the_page_and_it_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(_: object, drawn: dict[str, Any], folder: Path) -> list[Path]:
        folder.mkdir()
        (folder / "scores.png").write_bytes(b"")
        assert drawn.keys() == {"sup", "total"}
        return [folder / "scores.png"]

    monkeypatch.setattr(figures, "save_figures", save)
    assert "figures/scores.png" in {attrs.get("href") for _, attrs in render(tmp_path, rising).tags}


def test_a_measured_and_a_printed_number_never_share_a_cell(tmp_path: Path) -> None:
    reader = render(tmp_path, rising)
    scores = [text for text in reader.column("measured") if text]
    assert scores[:4] == ["41.0 ± 1.0 (3)", "51.0 ± 1.0 (3)", "43.0 ± 1.0 (3)", "53.0 ± 1.0 (3)"]
    assert [text for text in reader.column("printed") if text not in ("paper", "")] == ["70.1", "75.0", "71.2", "—"]
    assert not [text for _, text in reader.cells if re.search(r"\d ?±", text) and re.search(r"7[015]\.[012]", text)]
    assert reader.column("best")[:2] == ["43.0 ± 1.0 (3)", "53.0 ± 1.0 (3)"]


def test_a_half_done_table_says_so_and_why_and_shows_no_zero(tmp_path: Path) -> None:
    plan, store = study(
        tmp_path, lambda row, column, seed: rising(row, column, seed) if (row, seed) == (0, 0) else None
    )
    failure = Failure(kind="memory", message="<out of memory>", step=None, attempts=1, when="2026-01-31T12:00:00Z")
    store.record_failure(name(1, 0, 0), failure)
    reader = Reader(table_page.render_table(plan, store, tmp_path / "o", command="make", verdicts=[]).read_text())
    assert "2 of 18 runs done, 1 failed; this page is rewritten as runs finish." in reader.text
    assert reader.column("measured")[:3] == ["40.0 (1)a", "50.0 (1)a", "—b,a"]
    assert "failed (memory): <out of memory>" in reader.text
    assert not [text for text in reader.column("measured") if re.match(r"0\.0|nan", text)]
    assert "± " not in " ".join(reader.column("measured"))


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_an_empty_table_still_is_a_page(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    reader = render(tmp_path, lambda *_: None, seeds=seeds)
    assert "No run of this table has finished yet." in reader.text
    assert set(reader.column("measured")) == {"—a"} and "Pictures" not in reader.text


def test_labels_cannot_write_markup(tmp_path: Path) -> None:
    reader = render(tmp_path, rising, verdicts=VERDICTS)
    assert NASTY in reader.text and "script" not in {tag for tag, _ in reader.tags}
    assert "Table 5. <Modules>" in reader.text and "make <table5>" in reader.text and "first <i>" in reader.text
    titles = [attrs.get("title") or "" for _, attrs in reader.tags]
    assert "seed 0: 40.00; seed 1: 41.00; seed 2: 42.00" in titles


def test_claims_show_whose_they_are_their_verdict_and_the_printed_numbers(tmp_path: Path) -> None:
    reader = render(tmp_path, rising, verdicts=VERDICTS)
    articles = [attrs["class"] for tag, attrs in reader.tags if tag == "article"]
    assert articles == ["claim holds", "claim fails", "claim not-decided"]
    text = reader.text
    assert "The paper's claim. 1 of 1 shown." in text and "Our question, on Boundary IoU." in text
    assert "Fails in the printed numbers: no." in text and "0.8 points" in text and "< 0.001" in text
    assert text.count("Test: t test.") == 1 and "Test as above." in text
    assert "+1.0 to +3.0" in text


def test_a_claim_lists_its_complete_columns_and_each_comparison_once(tmp_path: Path) -> None:
    alone = (ColumnVerdict("1/8 (183)", "fails", "0 of 1 shown", 0.7),)
    told = [replace(VERDICTS[2], by_column=alone, comparisons=VERDICTS[0].comparisons), VERDICTS[0]]
    reader = render(tmp_path, rising, verdicts=told)
    assert [attrs["class"] for tag, attrs in reader.tags if tag == "li" and attrs.get("class")] == ["fails"]
    assert "1/8 (183) alone:" in reader.text and "(0 of 1 shown; 80 % power at 0.7)" in reader.text
    assert [reader.cells[i + 1][1] for i, (_, text) in enumerate(reader.cells) if text == "+1.0 to +3.0"] == [
        "+1.1"
    ] * 2
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert "  - 1/8 (183) alone: **fails** (0 of 1 shown; 80 % power at 0.7)" in lines
    (compared,) = [line for line in lines if "| +1.0 to +3.0 |" in line]
    assert compared.endswith("| mIoU | +2.0 | +1.0 to +3.0 | +1.1 | &lt; 0.001 | 0.0 | 3 | higher |")
    assert [comparisons.power(most) for most in (2.34, 20.0, 68.0)] == ["2.3", "20.0", "> 20"]
    far = replace(VERDICTS[0], detectable=68.0, comparisons=(replace(VERDICTS[0].comparisons[0], least=68.0),))
    assert "68" not in " ".join(comparisons.comparison_grid([far])[1])
    assert any(line.endswith("80 % power at &gt; 20.") for line in comparisons.claim_lines([far]))
    spread = replace(VERDICTS[0].comparisons[0], form="spread", difference=math.inf, interval=(0.5, math.inf))
    (_, ratio) = comparisons.comparison_grid([replace(VERDICTS[0], comparisons=(spread,))])
    assert ratio[4:6] == ["× ∞", "× 0.50 to ∞"]


def test_a_tally_counts_each_comparison_once_and_p_is_that_of_the_verdict() -> None:
    one = VERDICTS[0].comparisons[0]
    lower = replace(one, higher="x", outcome="reversed", p=1.0, p_reversed=0.004)
    verdict = replace(VERDICTS[0], comparisons=(one, lower))
    again = replace(VERDICTS[0], verdict="not decided", comparisons=(one,))
    assert comparisons.tally([verdict, again]) == [
        f"{one.column}: 1 of 2 comparisons shown as claimed, 1 the other way.",
        "A claim is decided when all its comparisons are made and shown, or one is shown the other way.",
    ]
    assert comparisons.p_value(lower) == "0.004" and comparisons.it_is(lower) == "lower"
    assert comparisons.it_is(replace(one, outcome="open")) == "not shown"


def test_forest_puts_all_intervals_on_one_axis_around_zero() -> None:
    placed, reach = table_views.forest(VERDICTS)
    (spot,) = placed.values()
    assert reach == pytest.approx(3.3) and 50 < spot.left < spot.at < spot.right < 100
    assert spot.at == pytest.approx(50 + 50 * 2 / 3.3, abs=0.01)
    assert table_views.forest([])[0] == {}
    (usual,) = VERDICTS[0].comparisons
    wild = replace(usual, difference=-2.5, interval=(-60.0, 55.0))
    placed, reach = table_views.forest([replace(VERDICTS[0], comparisons=(usual, replace(usual, higher="x"), wild))])
    assert reach == pytest.approx(3.3), "an interval of its own kind does not squeeze the others"
    assert (placed[id(wild)].left, placed[id(wild)].right) == (0, 100), "and ends at the edge"


def test_a_table_says_which_images_its_scores_are_of(tmp_path: Path) -> None:
    assert "mIoU (%), validation set" in render(tmp_path, rising).text
    one = record(name(0, 0, 0), 0.5)
    of: list[dict[str, object]] = [{}, {"eval.split": "test"}, {"eval.split": "test"}]
    records = {str(i): one.model_copy(update={"config": config}) for i, config in enumerate(of)}
    for count, said in ((1, "validation set"), (3, "validation set and part test"), (0, "")):
        shown = SimpleNamespace(records=lambda count=count: dict(list(records.items())[:count]))
        assert table_views.scored_images(shown) == said  # type: ignore[arg-type]


def test_provenance_names_the_command_the_captions_and_every_run(tmp_path: Path) -> None:
    reader = render(tmp_path, rising)
    text = reader.text
    for words in (
        "configuration matches name",
        "fp32",
        "simulated captions (recall 0.85)",
        "abcdef012345",
        "vit",
        "shipped",
        "torch 2",
        "18 min",
        "tiny",
    ):
        assert words in text, words
    assert all(
        f"run-{name(r, c, s)}" in {attrs.get("id") for _, attrs in reader.tags}
        for r in (0, 2)
        for c in (0, 1)
        for s in (0, 2)
    )
    assert str(tmp_path) not in (tmp_path / "out" / "index.html").read_text()
    assert "Runs differ" not in text and "The paper's voc is digits here" in text


def test_runs_of_other_revisions_or_machines_are_flagged_at_the_top(tmp_path: Path) -> None:
    plan, store = study(tmp_path, rising)
    changed = record(name(0, 0, 0), 0.4, device="cuda", git={"revision": "f" * 40, "dirty": True})
    save_record(changed, store.directory(name(0, 0, 0)) / "record.json")
    reader = Reader(table_page.render_table(plan, store, tmp_path / "o", command="make", verdicts=[]).read_text())
    assert "Runs differ in device, code revision: see provenance" in reader.text


def test_pictures_stand_in_the_page_and_damaged_ones_are_named(tmp_path: Path) -> None:
    plan, store = study(tmp_path, rising, seeds=(0,))
    truth, prediction = np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)
    prediction[0, 0], prediction[1], truth[2], prediction[2, :2] = 1, 1, 255, 1  # an eighth, all, and nothing known
    maps = {"00/image": np.zeros((3, 8, 8, 3), np.uint8), "01/truth": truth, "08/prediction": prediction}
    np.savez(store.directory(name(0, 0, 0)) / "pictures.npz", **maps)
    (store.directory(name(1, 0, 0)) / "pictures.npz").write_bytes(b"broken")
    page = table_page.render_table(plan, store, tmp_path / "o", command="make", verdicts=[]).read_text()
    reader = Reader(page)
    images = [attrs for tag, attrs in reader.tags if tag == "img" and "title" in attrs]
    assert len(images) == 12 and all(image["alt"] for image in images)
    said = [str(image["alt"]) for image in images if "mistakes" in str(image["alt"])]
    assert said == [
        "Image 2, mistakes: 100.0% of the pixels are wrong",
        "Image 1, mistakes: 12.5% of the pixels are wrong",
        "Image 3, mistakes: 0.0% of the pixels are wrong",
    ]
    sliders = [attrs for tag, attrs in reader.tags if tag == "input"]
    assert [slider["type"] for slider in sliders] == ["range"] * 3
    assert "Image 2, prediction" in str(sliders[0]["aria-label"])
    assert page.count('class="over"') == 3 and "largest share of wrong pixels come first" in reader.text
    assert f"Pictures of run {name(1, 0, 0)}: pictures.npz cannot be read" in reader.text


def test_curves_of_unfinished_runs_are_drawn_and_the_page_of_running_ones_loads_itself(tmp_path: Path) -> None:
    plan, store = study(tmp_path, lambda row, column, seed: 0.4 if (row, seed) == (0, 0) else None)
    going = store.directory(name(0, 0, 1))
    going.mkdir(parents=True)
    (going / "steps.jsonl").write_text("".join(f'{{"step": {i}, "sup": 2.0, "total": 3.0}}\n' for i in range(4)))
    lease = store.lease(name(0, 0, 1))
    assert lease is not None
    with lease:
        page = table_page.render_table(plan, store, tmp_path / "o", command="make", verdicts=[]).read_text()
    assert re.search(r"row 1 base \(1 unfinished\)\. 1/8 \(183\): [\d.]+ so far; 1/2: [\d.]+ at the end", page)
    assert "1 base (1 unfinished)" in page and "also of unfinished runs" in page
    assert '<meta http-equiv="refresh" content="30">' in page and "1 running" in page
    page = table_page.render_table(plan, store, tmp_path / "o", command="make", verdicts=[]).read_text()
    assert "refresh" not in page


def test_the_same_runs_make_the_same_bytes_and_leave_nothing_else(tmp_path: Path) -> None:
    plan, store = study(tmp_path, rising)
    found = []
    for out in (tmp_path / "a", tmp_path / "b", tmp_path / "b"):
        table_page.render_table(plan, store, out, command="make", verdicts=VERDICTS)
        found.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert found[0] == found[1] == found[2]


WRITER = """
import sys
from pathlib import Path
from viladiff.runs.record import write_atomically
out, turn = Path(sys.argv[1]), 0
while True:
    write_atomically(out / "index.html", b"ab"[turn : turn + 1] * 5_000_000)
    turn = 1 - turn
"""


def test_a_writer_that_is_killed_leaves_a_whole_page_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    out, draw = tmp_path / "out", random.Random(3)
    out.mkdir()
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(out)])
        while not (out / "index.html").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0.2, 0.6))
        writer.kill()
        writer.wait()
        assert (out / "index.html").read_bytes() in (b"a" * 5_000_000, b"b" * 5_000_000)
    (out / f".table.md.{writer.pid}.{writer_token()}.tmp").write_bytes(b"half")
    (out / "figures").mkdir()
    (out / "figures" / f".scores.png.{writer.pid}.{writer_token()}.tmp").write_bytes(b"half")
    left = [path for path in out.rglob("*.tmp")]
    assert len(left) >= 2
    for path in left:
        os.utime(path, (1, 1))
    render(tmp_path, rising)
    assert not list(out.rglob("*.tmp")) and "rewritten" not in (out / "index.html").read_text()


def test_headings_tables_and_bars_are_told_to_those_who_cannot_see_them(tmp_path: Path) -> None:
    reader = render(tmp_path, rising, verdicts=VERDICTS)
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("table") == tags.count("caption")
    assert all(attrs.get("scope") for tag, attrs in reader.tags if tag == "th")
    assert all(attrs.get("role") == "img" for tag, attrs in reader.tags if tag == "svg")
    assert ("html", {"lang": "en"}) in reader.tags


def test_banner_is_gone_when_all_is_done(tmp_path: Path) -> None:
    assert table_page.banner(results.collect_results(*study(tmp_path, rising))) == ""
    assert comparisons.signed(-0.04) == "0.0" and comparisons.signed(-0.06) == "−0.1"


def test_a_page_needs_neither_torch_nor_what_is_slow_to_load() -> None:
    code = (
        "import sys; from viladiff.report.table import table_page; from viladiff.runs.store import Store\n"
        "print([name for name in ('torch', 'pandas', 'matplotlib', 'scipy.stats') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_differences_are_shown_in_both_themes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(_: object, folder: Path) -> dict[str, Path]:
        folder.mkdir(exist_ok=True)
        paths = {theme: folder / f"differences-{theme}.svg" for theme in ("light", "dark")} | {"png": folder / "d.png"}
        for path in paths.values():
            path.write_bytes(b"<svg></svg>")
        return paths

    monkeypatch.setattr(figures, "save_differences", save)
    plan, store = study(tmp_path, rising)
    page = table_page.render_table(plan, store, tmp_path / "o", command="make", verdicts=[])
    reader = Reader(page.read_text())
    (image,) = [attrs for tag, attrs in reader.tags if tag == "img" and "title" not in attrs]
    assert str(image["src"]).startswith("data:image/svg+xml") and "+" in str(image["alt"])
    assert "Differences to row" in reader.text
    assert {"figures/d.png", "figures/differences-dark.svg"} <= {str(attrs.get("href")) for _, attrs in reader.tags}


def test_columns_without_a_run_are_named_and_not_drawn(tmp_path: Path) -> None:
    plan, store = study(tmp_path, rising)
    records = store.records()
    controls = {row for row in plan.rows if plan.table.rows[row].control}
    assert controls, "whose runs alone show no column"
    later = {cell.run_id for cell in plan.cells if cell.column == plan.columns[-1] and cell.row not in controls}
    for run_id in later & records.keys():
        (store.directory(run_id) / "record.json").unlink()
    found = results.collect_results(plan, Store(store.root))
    label = plan.table.columns[plan.columns[-1]].label
    assert results.begun_columns(found).plan.columns == plan.columns[:-1]
    assert table_page.banner(found).endswith(f" No run is done for {label}.")
    page = table_page.render_table(plan, Store(store.root), tmp_path / "o", command="make", verdicts=[])
    markdown = (page.parent / "table.md").read_text()
    assert f"{label} measured" not in markdown and f"{label}, seed 0" in markdown, "what is missing is still listed"
    assert f"{label}" in (page.parent / "table.csv").read_text()
    empty = results.collect_results(plan, Store(tmp_path / "none"))
    assert results.begun_columns(empty) is empty and "No run is done" not in table_page.banner(empty)


def test_the_first_sentences_say_whether_the_difference_is_shown() -> None:
    one = replace(VERDICTS[0].comparisons[0], higher="own", lower="base", outcome="open", p=0.185)
    shown = replace(one, column="1/2", outcome="shown", p=0.0001)
    verdicts = [replace(VERDICTS[0], comparisons=(one, shown)), replace(VERDICTS[0], comparisons=(one,))]
    assert comparisons.tested(verdicts, "own", "base", VERDICTS[0].metric) == (
        f"own against base, corrected for all comparisons: not shown on {one.column} (p = 0.185); "
        "higher on 1/2 (p < 0.001)."
    )
    assert comparisons.tested(verdicts, "base", "own", VERDICTS[0].metric) == ""
    assert comparisons.tested(verdicts, "own", "base", "boundary_iou") == ""


def test_a_limit_is_in_the_words_and_two_limits_are_two_comparisons() -> None:
    one = VERDICTS[0].comparisons[0]
    words = {
        (0.0, "shown"): "higher",
        (0.0, "reversed"): "lower",
        (5.0, "shown"): "more than 5 higher",
        (5.0, "reversed"): "less than 5 higher",
        (-1.0, "shown"): "less than 1 lower",
        (-1.0, "reversed"): "more than 1 lower",
        (-1.0, "open"): "not shown",
    }
    for (limit, outcome), said in words.items():
        assert comparisons.it_is(replace(one, limit=limit, outcome=outcome)) == said
    margin = replace(one, limit=5.0, outcome="reversed")
    both = [replace(VERDICTS[0], comparisons=(one,)), replace(VERDICTS[0], comparisons=(margin,))]
    assert comparisons.tally(both)[0] == f"{one.column}: 1 of 2 comparisons shown as claimed, 1 the other way."
    assert len(comparisons.comparison_grid(both)) == 3
    assert "less than 5" not in comparisons.tested(both, one.higher, one.lower, VERDICTS[0].metric)
