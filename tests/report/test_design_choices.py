"""Open choices and rows that wait for their method: what the tables vary, and what their pages say of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from record_kit import name_of, told

from viladiff.methods.viladiff import BUILT_IN_PRESET
from viladiff.report.sections import design_choices
from viladiff.report.table import exports, long_form
from viladiff.report.table import results as tables
from viladiff.report.table.table_page import render_table
from viladiff.runs.config import RunConfig, flatten, override, schema
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import RunRecord, save_record
from viladiff.runs.store import Store
from viladiff.tables.cells import cells
from viladiff.tables.claims import evaluate_claims
from viladiff.tables.consistency import Inconsistency
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.spec import Claim, Column, Row, Scale, Table
from viladiff.tables.spec_file import load_table

ROOT = Path(__file__).resolve().parents[2]
NOTES = (ROOT / "docs" / "paper-notes.md").read_text(encoding="utf-8")


# What is varied


def varied() -> dict[str, set[str]]:
    """By field, every value that a cell of any table gives it besides the default, on the built-in data sets."""
    found: dict[str, set[str]] = {}
    ours = flatten(override(RunConfig(), {"method.name": "viladiff"}))
    for path in sorted((ROOT / "ablations").glob("*.toml")):
        table = load_table(path)
        for cell in cells(table, "digits", [0], [row.label for row in table.rows], [table.columns[0].label]):
            full = flatten(override(RunConfig(), cell.changes))
            for name in full.keys() & ours.keys():
                if full["method.name"] == "viladiff" and full[name] != ours[name]:
                    found.setdefault(name, set()).add(str(full[name]))
        for row in table.rows:
            found.setdefault("method.predict.stream", set()).add(row.stream)
            found.setdefault("method.predict.network", set()).add(row.network)
    return found


def test_every_choice_of_the_notes_is_varied_in_some_table() -> None:
    """Each alternative of each field of the method, and the open ones of the optimiser."""
    there, known = varied(), schema("voc", "viladiff")
    listed = re.findall(r"^\| `(method\.[a-z_.]+)` \| .*? \| (.*?) \|", NOTES, re.MULTILINE)
    lacking = []
    for field, others in listed:
        kind: Any = known[field].annotation if field in known else None
        if field == "method.name" or others == "—":
            continue
        wanted = set(others.split(", ")) if get_origin(kind) is Literal else {"False"} if kind is bool else set()
        assert not wanted or kind is bool or wanted <= {str(one) for one in get_args(kind)}
        lacking += [f"{field} = {value}" for value in wanted - there.get(field, set())]
        lacking += [field] if not wanted and field not in there else []
    theirs = {field.partition(" ")[0] for field in lacking}
    ours = {"method.cutmix", "method.ohem.enabled", "method.pseudo.oracle", "method.predict.refine"}
    added = ("refine_where", "confidence", "labelled_views", "unlabelled_views", "condition")
    ours |= {f"method.mixe.{name}" for name in added}
    assert theirs == ours, "these are no choices of this paper's text"
    numbers = ("vila.temperature", "vila.depth", "pseudo.threshold", "mixe.refine_from", "mixe.refine_steps",
               "mixe.tau_start", "mixe.tau_end", "mixe.tau_ramp", "mixe.condition_noise", "mixe.loss_weights",
               "vila.lam", "mixe.timesteps")  # fmt: skip
    assert {f"method.{name}" for name in numbers} <= there.keys()
    others = {"optim.encoder_lr_scale", "optim.weight_decay", "optim.schedule", "data.crop", "train.steps"}
    assert others | {"data.batch_labelled", "data.batch_unlabelled"} <= there.keys()


def test_each_row_of_the_choices_changes_what_its_heading_is_about_and_nothing_else() -> None:
    table = load_table(ROOT / "ablations" / "choices.toml")
    rows = [row.label for row in table.rows if not row.scales or "digits" in row.scales]
    found = {cell.row: flatten(override(RunConfig(), cell.changes)) for cell in cells(table, "digits", [0], rows)}
    base = found.pop(0)
    assert table.rows[0].label == table.reference and not table.rows[0].set
    assert len(found) == len(rows) - 1
    for place, full in found.items():
        row = table.rows[place]
        differ = {path for path in full if full[path] != base[path]}
        assert row.group and "efault" in row.group and row.control is False and row.paper == ()
        if row.stream or row.network:
            assert not differ, "read from the runs of the defaults, which cost nothing more"
        elif row.label == "Initial settings":
            assert differ == {"method." + path for path in BUILT_IN_PRESET if path != "pseudo.threshold"}
        else:
            views = {f"method.mixe.{kind}_views" for kind in ("labelled", "unlabelled")}
            differ -= views if "method.mixe.train_images" in differ else set()  # views of images that are left out
            assert len(differ) == 1 or differ == {"data.batch_labelled", "data.batch_unlabelled"}
    groups = [row.group for row in table.rows]
    assert len(set(groups)) == sum(a != b for a, b in zip(groups, ["", *groups], strict=False)) + 1, "each in one place"


# What a page says


def record(run_id: str, points: float) -> RunRecord:
    share = points / 100
    scores = {"teacher": {"visual": {"miou": share, "per_class": [share]}, "fusion": {"miou": share + 0.05}}}
    return RunRecord(
        **told(run_id), steps=6, miou=share, network="teacher",
        stream="visual", scores=scores, best=None, history=[], pseudo_labels={}, class_names=["sky"], captions="c",
        text_encoder="words", encoder="vit", pretrained="shipped", wall_seconds=2, train_seconds=1,
        seconds_per_step=None, peak_memory_bytes=1, workers=1, threads=1, device="cpu", versions={}, git={}, scale="s",
    )  # fmt: skip


ROWS = (
    Row(label="Defaults"),
    Row(label="other norm", group="Eq. 1. Default: mean"),
    Row(label="third <norm>", group="Eq. 1. Default: mean"),
    Row(label="fusion", group="Streams. Default: visual", stream="fusion"),
    Row(label="late", group="Later. Default: now"),
    Row(label="few", group="Few. Default: many"),
)
DIFFERS = Claim(text="something matters", kind="differs", source="ours", rows=("Defaults",))
LEVELS = {0: 50.0, 1: 53.0, 2: 50.1, 5: 50.0}


def opened(tmp_path: Path, **changes: Any) -> tuple[Plan, Store]:
    """Defaults and a heading of each outcome; the row "late" waits for its method, "few" has one seed of three."""
    fields = {"name": "t", "title": "Choices", "scale": {"s": Scale()}, "reference": "Defaults", "headline": "Defaults"}
    columns = (Column(label="1/8"),)
    table = Table(**{**fields, "columns": columns, "rows": ROWS, "claims": (DIFFERS,), **changes})
    store = Store(tmp_path / "runs")
    found = []
    for row in (0, 1, 2, 3, 5):
        for seed in range(3):
            name = name_of(x=0 if row == 3 else row, seed=seed)
            found.append(PlannedCell(row, 0, seed, name))
            if row != 3 and (row != 5 or seed == 0):
                store.directory(name).mkdir(parents=True, exist_ok=True)
                points = LEVELS[row] + 0.1 * ((seed + row % 5) % 3 - 1)
                save_record(record(name, points), store.directory(name) / "record.json")
    runs = {cell.run_id: PlannedRun(cell.run_id, {}, "t", 6, told(cell.run_id)["changed"]) for cell in found}
    every = tuple(range(len(ROWS)))
    return Plan(table, "s", every, (0,), (0, 1, 2), tuple(found), runs, {4: "requires method.clip.weights"}), store


def test_each_choice_is_answered_with_what_was_and_what_could_have_been_seen(tmp_path: Path) -> None:
    plan, store = opened(tmp_path)
    found = design_choices.build_choices(tables.collect_results(plan, store), evaluate_claims(plan, store.records()))
    assert [one.where for one in found] == [row.group for i, row in enumerate(ROWS) if i in (1, 3, 4, 5)]
    said = [one.said for one in found]
    assert said[:2] == ["It matters: other norm, +3.0 (1/8).", "It matters: fusion, +5.0 (1/8)."]
    assert said[2:] == ["Not decided.", "Not decided."]
    norm, third = found[0].alternatives
    assert (norm.outcome, third.outcome) == ("higher", "no difference shown")
    assert third.tested is not None and 0.1 < third.tested.least < 2 and third.tested.p > 0.05
    (late,), (few,) = found[2].alternatives, found[3].alternatives
    assert late.why == "requires method.clip.weights" and late.gap is None and late.tested is None
    assert few.gap == pytest.approx(0.0) and "not run yet" in few.why and few.outcome == "not decided"
    assert design_choices.answer(found) == (
        "Of 5 alternatives 2 are higher, 0 are lower, 2 are not decided; for 1 no difference is shown."
    )


def test_where_nothing_is_shown_the_answer_names_the_size_that_would_have_been(tmp_path: Path) -> None:
    plan, store = opened(tmp_path, rows=(ROWS[0], *(Row(label=f"r{i}", group="g") for i in range(1, 6))))
    alike = [cell for cell in plan.cells if cell.row in (0, 2)]
    results = tables.collect_results(Plan(plan.table, "s", (0, 2), (0,), (0, 1, 2), tuple(alike), plan.runs), store)
    (found,) = design_choices.build_choices(results, evaluate_claims(results.plan, store.records()))
    least = found.alternatives[0].tested
    assert least is not None and found.said == (
        f"No difference shown; the test has 80 % power for {least.least:.1f} points."
    )


def test_rows_that_the_question_leaves_out_are_none_of_its_alternatives(tmp_path: Path) -> None:
    plan, store = opened(tmp_path, claims=(DIFFERS.model_copy(update={"among": ("other norm",)}),))
    found = design_choices.build_choices(tables.collect_results(plan, store), evaluate_claims(plan, store.records()))
    assert [one.label for choice in found for one in choice.alternatives] == ["other norm"]
    assert design_choices.answer(found).startswith("Of 1 alternative 1 is higher")


def test_a_table_of_the_papers_has_no_such_section(tmp_path: Path) -> None:
    plan, store = opened(tmp_path, rows=(Row(label="Defaults", paper=(50.0,)), *ROWS[1:]))
    assert (
        design_choices.build_choices(tables.collect_results(plan, store), evaluate_claims(plan, store.records())) == []
    )
    assert design_choices.answer([]) == "" and design_choices.choices_markdown([]) == []


class Text(HTMLParser):
    """Words outside of styles, with the tags seen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: set[str] = set()
        self.style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.style = tag == "style"
        self.ids |= {value for name, value in attrs if name == "id" and value}

    def handle_data(self, data: str) -> None:
        self.words += [] if self.style else [data]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def render(plan: Plan, store: Store, out: Path, **more: Any) -> tuple[Text, Path]:
    index = render_table(plan, store, out, command="make", verdicts=evaluate_claims(plan, store.records()), **more)
    return Text(index.read_text(encoding="utf-8")), index.parent


def test_the_page_of_choices_has_their_answers_and_nothing_of_a_papers_table(tmp_path: Path) -> None:
    plan, store = opened(tmp_path)
    page, folder = render(plan, store, tmp_path / "out")
    assert "choices" in page.ids and not {"order", "printed"} & page.ids
    assert "Of 5 alternatives 2 are higher" in page.text and "It matters: other norm, +3.0 (1/8)." in page.text
    assert "not decided: requires method.clip.weights" in page.text and "third <norm>" in page.text
    assert "Bold:" not in page.text and "as printed there" not in page.text
    markdown = (folder / "table.md").read_text(encoding="utf-8")
    assert "## What each choice is worth" in markdown and "## Agreement" not in markdown and "**5" not in markdown
    assert "fusion, 1/8: +5.0 (95 % interval" in markdown and "80 % power for" in markdown
    assert "requires method.clip.weights: row 5" in markdown.replace("\\", "")
    tex = (folder / "table.tex").read_text(encoding="utf-8")
    assert "Grey" not in tex and r"\textcolor" not in tex
    assert {line.count("&") for line in tex.splitlines() if "pm" in line and line.endswith("\\\\")} == {3}


def test_rows_that_wait_have_a_dash_a_reason_and_no_run(tmp_path: Path) -> None:
    plan, store = opened(tmp_path)
    results = tables.collect_results(plan, store)
    found = tables.summary(results.at(4, 0), "miou")
    assert str(found) == "—" and set(found.missing.values()) == {"requires method.clip.weights"}
    assert results.counts() == {"missing": 2, "done": 10}, (
        "unique runs; the row that waits has none, streams share theirs"
    )
    lines = [line for line in long_form.to_rows(results) if line["row"] == "late"]
    assert {(line["state"], line["run_id"], line["miou"]) for line in lines} == {("unavailable", "", None)}
    assert [reason for reason in exports.reasons(results) if "requires " in reason] == [
        "requires method.clip.weights: row 5"
    ]


def test_a_page_whose_rows_all_wait_can_be_written(tmp_path: Path) -> None:
    plan, store = opened(tmp_path)
    later = dict.fromkeys(range(len(ROWS)), "requires method.clip.weights")
    page, _ = render(Plan(plan.table, "s", plan.rows, (0,), (0,), (), {}, later), store, tmp_path / "out")
    assert "No run of this table has finished yet." in page.text and "requires method.clip.weights" in page.text


def test_encoders_groups_reference_and_contradictions_are_on_the_page_of_a_printed_table(tmp_path: Path) -> None:
    rows = (
        Row(label="base", paper=(50.0,), encoder="ResNet-101", group="Upper block"),
        Row(label="Defaults", paper=("-",), encoder="ViT-B/16", group="Upper block"),
        Row(label="third†", paper=(51.0,), encoder="ViT-B/16", group="Lower block"),
        *ROWS[3:],
    )
    plan, store = opened(tmp_path, rows=rows)
    wrong = Inconsistency("repeated", "The numbers of <x> are those of “y”.")
    page, folder = render(plan, store, tmp_path / "out", printed=[wrong])
    assert {"order", "printed"} <= page.ids and "choices" not in page.ids
    assert "Encoder, paper" in page.text and page.text.count("Upper block") == 3, "one heading in each of three tables"
    assert "to row 2" in page.text and "Repeated. The numbers of <x> are those of “y”." in page.text
    assert "Row 2 (Defaults) reaches 53.0 ± 0.1 (3) on 1/8, 2.0 below the highest, fusion." in page.text
    markdown = (folder / "table.md").read_text(encoding="utf-8")
    assert (
        "| encoder (paper) |" in markdown and "| ResNet-101 |" in markdown and "## The paper's own numbers" in markdown
    )
    tex = (folder / "table.tex").read_text(encoding="utf-8")
    assert r"\textcolor{gray}{ViT-B/16}" in tex and r"third$\dagger$" in tex
    body = tex.split(r"\midrule")[1].strip().splitlines()
    assert {line.count("&") for line in body if line.endswith(r"\\")} == {5}
    csv = (folder / "table.csv").read_text(encoding="utf-8")
    assert "paper_encoder" in csv.splitlines()[0] and "ResNet-101" in csv


def test_a_headline_that_is_the_reference_says_where_it_stands(tmp_path: Path) -> None:
    rows = tuple(Row(label=row.label, paper=(50.0,), stream=row.stream) for row in ROWS)
    plan, store = opened(tmp_path, rows=rows, headline="other norm", reference="other norm")
    assert tables.headline_sentence(tables.collect_results(plan, store)).endswith(
        "53.0 ± 0.1 (3) on 1/8, 2.0 below the highest, fusion."
    )
    plan, store = opened(tmp_path, rows=rows, headline="fusion", reference="fusion")
    assert tables.headline_sentence(tables.collect_results(plan, store)).endswith("(3) on 1/8, the highest of 4 rows.")
    # A fifth row lacks one of these seeds.
    plan, store = opened(tmp_path, headline="late")
    assert (
        tables.headline_sentence(tables.collect_results(plan, store))
        == "Some runs are done, but none of row 5 (late) yet."
    )
