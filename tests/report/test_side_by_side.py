"""The paper, committed records and this machine's runs side by side, with committed records and without."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from record_kit import name_of, told
from test_table_page import Reader, record

from viladiff.experiments.dry_run import print_dry_run
from viladiff.report.charts import figures
from viladiff.report.sections import side_by_side
from viladiff.report.sections.side_by_side import SideBySide
from viladiff.report.table import table_page
from viladiff.report.table.results import Results, collect_results
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import save_record
from viladiff.runs.store import Store
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.spec import Column, Criterion, Row, Scale, Table
from viladiff.tables.spec_file import load_table

TABLE = Table(
    name="t",
    title="Table 5. Modules",
    scale={
        "quick": Scale(datasets={"voc": "digits"}, published_runs="digits", rows=("base", "all", "supervised")),
        "digits": Scale(datasets={"voc": "digits"}),
    },
    columns=(Column(label="183", set={"data.dataset": "voc"}), Column(label="732", set={"data.dataset": "voc"})),
    rows=(
        Row(label="base", components=("B",), paper=(70.0, 75.0)),
        Row(label="part", components=("B", "P"), paper=(73.0, 77.0)),
        Row(label="all", components=("B", "P", "Q"), paper=(80.5, 82.4)),
        Row(label="supervised", control=True),
    ),
    criteria=(
        Criterion(row="base", above="supervised", deviations=2.0),
        Criterion(row="base", points=5.0),
    ),
)
LEVEL = (60.0, 61.0, 62.5, 55.0)
HERE = {0: 0.56, 2: 0.57, 3: 0.50}


def plan_of(scale: str, rows: Sequence[int], columns: Sequence[int], seeds: Sequence[int]) -> Plan:
    def named(row: int, column: int, seed: int) -> str:
        return name_of(scale=scale, row=row, column=column, seed=seed)

    cells = [PlannedCell(r, c, s, named(r, c, s)) for s, r, c in itertools.product(seeds, rows, columns)]
    runs = {c.run_id: PlannedRun(c.run_id, {}, f"{c.row} {c.column}", 6, told(c.run_id)["changed"]) for c in cells}
    return Plan(TABLE, scale, tuple(rows), tuple(columns), tuple(seeds), tuple(cells), runs)


def study(
    root: Path,
    published: Callable[[PlannedCell], float | None],
    here: dict[int, float] = HERE,
) -> tuple[Plan, Store, Plan, Store]:
    """This machine's plan and store, and those of the committed records."""
    mine = plan_of("quick", (0, 2, 3), (0,), (0,))
    other = plan_of("digits", (0, 1, 2, 3), (0, 1), (0, 1, 2))
    store = Store(root / "runs")
    for cell in mine.cells:
        if cell.row in here:
            store.directory(cell.run_id).mkdir(parents=True)
            one = record(cell.run_id, here[cell.row], processor="Own 1, family 6", steps=1000)
            save_record(one, store.directory(cell.run_id) / "record.json")
    layer = root / "reports" / "published"
    (layer / "t" / "records").mkdir(parents=True)
    for cell in other.cells:
        share = published(cell)
        if share is not None:
            one = record(cell.run_id, share, processor="Far 2, family 6", steps=2400)
            save_record(one, layer / "t" / "records" / f"{cell.run_id}.json")
    return mine, store, other, Store(root / "nothing", [layer])


def levels(cell: PlannedCell) -> float:
    """Half a point from seed to seed; the second column is four points higher."""
    return round((LEVEL[cell.row] + 4 * cell.column + (cell.seed - 1) / 2) / 100, 5)


def both_of(root: Path, published: Callable[[PlannedCell], float | None], here: dict[int, float] = HERE) -> SideBySide:
    mine, store, other, committed = study(root, published, here)
    return table_page.load_both(collect_results(mine, store), other, committed, root / "reports" / "quick" / "t")


def render(root: Path, published: Callable[[PlannedCell], float | None]) -> Path:
    mine, store, other, committed = study(root, published)
    out = root / "reports" / "quick" / "t"
    return table_page.render_table(mine, store, out, command="make", verdicts=(), published=(other, committed))


def nothing(cell: PlannedCell) -> None:
    return None


def test_three_sources_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    found = {line.label: line for line in side_by_side.both_rows(both_of(tmp_path, levels))}
    assert list(found) == ["base", "part", "all", "supervised"]
    cell = found["all"].cells[0]
    assert (cell.paper, str(cell.published.found), cell.own) == ("80.5", "62.5 ± 0.5 (3)", "57.0 (1)")
    assert cell.published.gap is not None and cell.here.gap is not None
    gaps = cell.paper_gap, cell.published.gap.mean, cell.here.gap.mean
    assert gaps == pytest.approx((10.5, 2.5, 1.0))
    assert [one.own for one in found["part"].cells] == ["records", "records"], "not trained here, and marked so"
    assert found["supervised"].cells[0].paper == "" and found["supervised"].control
    assert [line.trained for line in found.values()] == [True, False, True, True]


def test_the_first_sentence_speaks_of_the_published_numbers_first(tmp_path: Path) -> None:
    assert side_by_side.headline_of_both(both_of(tmp_path, levels)) == (
        "In the published runs all (row 3) reaches 62.5 ± 0.5 (3) on 183, 2.5 above base (paper: 10.5 above); "
        "66.5 ± 0.5 (3) on 732, 2.5 above base (paper: 7.4 above). "
        "On this machine all (row 3) reaches 57.0 (1) on 183, 1.0 above base."
    )


def test_without_published_records_it_says_so_and_speaks_of_this_machine(tmp_path: Path) -> None:
    both = both_of(tmp_path, nothing)
    assert side_by_side.headline_of_both(both) == (
        "No published records of this table are there yet. "
        "On this machine all (row 3) reaches 57.0 (1) on 183, 1.0 above base (paper: 10.5 above)."
    )
    own = [cell.own for line in side_by_side.both_rows(both) for cell in line.cells]
    assert "records" not in own and own.count("—") == 5
    assert {one.verdict for one in side_by_side.criteria(both)} == {"not decided"}
    assert "the difference here is +6.0 points" in side_by_side.criteria(both)[0].text


@pytest.mark.parametrize(
    ("base", "supervised", "verdicts"),
    [
        (0.56, 0.50, ["holds", "holds"]),
        (0.56, 0.5500, ["holds", "holds"]),
        (0.56, 0.5501, ["fails", "holds"]),
        (0.5499, 0.50, ["holds", "fails"]),
        (0.6501, 0.50, ["holds", "fails"]),
        (0.55, 0.50, ["holds", "holds"]),
    ],
    ids=str,
)
def test_criteria_are_judged_by_the_published_runs(
    tmp_path: Path, base: float, supervised: float, verdicts: list[str]
) -> None:
    """The published spread is 0.5 points, so 1.0 is asked for; the published baseline is at 60."""
    found = side_by_side.criteria(both_of(tmp_path, levels, {**HERE, 0: base, 3: supervised}))
    assert [one.verdict for one in found] == verdicts
    assert "at least 2 × 0.50 = 1.00 wanted" in found[0].text and "60.0 published" in found[1].text
    assert found[1].text.endswith(" apart; 1,000 steps here, 2,400 published.")


def test_the_spread_is_pooled_over_cells_by_their_degrees_of_freedom(tmp_path: Path) -> None:
    def wide(cell: PlannedCell) -> float | None:
        if (cell.row, cell.seed) == (3, 2):
            return None
        return round((LEVEL[cell.row] + (cell.seed - 1) * (2 if cell.row == 3 else 0.5)) / 100, 5)

    both = both_of(tmp_path, wide)
    assert side_by_side.pooled_spread(both.published, (0, 3), 0) == pytest.approx(((0.5 + 2.0) / 3) ** 0.5)
    assert side_by_side.pooled_spread(both.here, (0, 3), 0) is None, "one seed has no spread"


def test_the_page_shows_them(tmp_path: Path) -> None:
    index = render(tmp_path, levels)
    text = index.read_text()
    read = Reader(text)
    assert read.column("of-paper")[:2] == ["paper", "paper"]
    papers = [one for one in read.column("of-paper")[2:] if one]
    assert papers == ["70.0", "75.0", "73.0+3.0", "77.0+2.0", "80.5+10.5", "82.4+7.4"]
    published, here = read.column("of-published")[2:], read.column("of-here")[2:]
    assert published[4] == "62.5 ± 0.5 (3)+2.5" and here[4] == "57.0 (1)+1.0"
    assert here[2] == here[3] == here[1] == "← records"
    words = " ".join(" ".join(read.words).split())
    assert "In the published runs" in words and "24 of 24 runs of scale digits" in words
    assert "2,400 steps; seeds 0, 1, 2; Far 2" in words and "1,000 steps; seed 0; Own 1" in words
    assert words.count("holds") >= 2 and "Of the published runs." in words
    links = [one["href"] for tag, one in read.tags if tag == "a" and "published" in str(one.get("href"))]
    assert len(links) == 24 and all((index.parent / str(link)).is_file() for link in links)


@pytest.mark.parametrize("published", [levels, nothing])
def test_the_picture_of_differences_is_of_the_runs_that_claims_are_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Callable[[PlannedCell], float | None]
) -> None:
    asked: list[Results] = []
    monkeypatch.setattr(figures, "save_differences", lambda results, _: asked.append(results) or {})
    render(tmp_path, published)
    assert [one.plan.scale for one in asked] == ["digits" if published is levels else "quick"]


def test_the_page_without_published_records_has_no_marks(tmp_path: Path) -> None:
    words = " ".join(Reader(render(tmp_path, nothing).read_text()).words)
    assert "No published records of this table are there yet." in words
    assert "← records" not in words and "Of the published runs." not in words


def test_exports_carry_the_three_columns(tmp_path: Path) -> None:
    out = render(tmp_path, levels).parent
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [row["source"] for row in rows].count("published") == 24 and len(rows) == 27
    mine = {row["row"]: row["miou"] for row in rows if row["source"] == "this machine"}
    assert {name: float(value) for name, value in mine.items()} == pytest.approx(
        {"base": 56.0, "all": 57.0, "supervised": 50.0}
    )
    assert {row["paper"] for row in rows if row["row"] == "part"} == {"73.0", "77.0"}
    assert {row["scale"] for row in rows if row["source"] == "published"} == {"digits"}
    line = next(one for one in (out / "table.tex").read_text().splitlines() if one.startswith("3 & all"))
    assert line == (
        r"3 & all & \textcolor{gray}{80.5} & 62.5 $\pm$ 0.5 (3) & 57.0 (1) & "
        r"\textcolor{gray}{82.4} & 66.5 $\pm$ 0.5 (3) & records \\"
    )
    told = (out / "table.md").read_text()
    assert "| 2 | part | 73.0 | 61.0 ± 0.5 (3) | records | 77.0 | 65.0 ± 0.5 (3) | records |" in told
    assert told.index("Paper, published runs, this machine (%)") < told.index("## mIoU (%)")


def test_the_terminal_shows_the_columns_that_are_trained_here(tmp_path: Path) -> None:
    said = side_by_side.to_terminal(both_of(tmp_path, levels)).splitlines()
    assert said[0].split() == ["183:", "paper", "published", "this", "machine"]
    assert said[2].split() == ["2", "part", "73.0", "61.0", "±", "0.5", "(3)", "records"]
    assert said[4].split()[:2] == ["a", "supervised"] and said[5].startswith("records: not trained")
    assert [line.split(":")[0] for line in said[7:]] == ["holds", "holds"]
    assert "records:" not in side_by_side.to_terminal(both_of(tmp_path / "b", nothing))


def test_a_dry_run_says_what_runs_here_and_what_is_committed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from viladiff.runs.job import ExecutionSettings

    mine, store, other, committed = study(tmp_path, lambda c: levels(c) if c.column == 0 else None, {0: 0.5})
    print_dry_run(mine, store, ExecutionSettings(), tmp_path / "page", beside=(other, committed))
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "base", "done", "3", "of", "3", "records", "–", "no", "record"] in said
    assert ["2", "part", "–", "3", "of", "3", "records", "–", "no", "record"] in said
    assert ["3", "all", "to", "run", "3", "of", "3", "records", "–", "no", "record"] in said
    assert ["records", "12", "of", "24", "runs", "of", "scale", "digits", "are", "committed"] in said


# What a file may say


TOML = """
title = "t"
seeds = [0]
{criteria}
[scale.digits]
[scale.quick]
published_runs = "{scale}"
rows = ["{row}"]
[[columns]]
label = "183"
[[rows]]
label = "base"
[[rows]]
label = "supervised"
control = true
"""


def load(tmp_path: Path, criteria: str = "", scale: str = "digits", row: str = "base") -> Any:
    path = tmp_path / "t.toml"
    path.write_text(TOML.format(criteria="", scale=scale, row=row) + criteria)
    return load_table(path)


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    both = '[[criteria]]\nrow = "base"\nabove = "supervised"\ndeviations = 2\n[[criteria]]\nrow = "base"\npoints = 5'
    found = load(tmp_path, both)
    assert found.scale["quick"].published_runs == "digits" and [one.points for one in found.criteria] == [None, 5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": "digit"}, r"scale.quick: published_runs = 'digit': no such scale.*digits.*Allowed: digits, quick"),
        ({"scale": "quick"}, r"published_runs = 'quick': the scale itself"),
        ({"row": "bose"}, r"scale.quick: rows = 'bose': no such label.*base"),
        (
            {"criteria": '[[criteria]]\nrow = "bas"\npoints = 5'},
            r"criteria\[1\] 'bas': row = 'bas': no such label",
        ),
        (
            {"criteria": '[[gaps]]\nrow = "base"\nlow = "supervizd"\nhigh = "base"'},
            r"gaps\[1\] 'base': low = 'supervizd': no such label.*supervised",
        ),
        (
            {"criteria": '[[criteria]]\nrow = "base"'},
            r"deviations = None, points = None: give one",
        ),
        ({"criteria": '[[criteria]]\nrow = "base"\ndeviations = 2'}, r"above = '': another row"),
        ({"criteria": '[[criteria]]\nrow = "base"\nabove = "base"\ndeviations = 2'}, r"above = 'base': another row"),
        ({"criteria": '[[criteria]]\nrow = "base"\npoints = 0'}, r"criteria\[1\] 'base': points = 0"),
        ({"criteria": '[[criteria]]\nrow = "base"\npoint = 5'}, r"criteria\[1\] 'base': point: no such key.*points"),
        ({"scale": "", "criteria": '[[criteria]]\nrow = "base"\npoints = 5'}, r"criteria: no scale has published_runs"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line(tmp_path: Path, given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, **given)
    assert len(str(error.value).splitlines()) == 1


def test_a_scale_without_published_runs_has_the_page_that_it_had(tmp_path: Path) -> None:
    mine, store, _, _ = study(tmp_path, nothing)
    plain = replace(mine, table=TABLE.model_copy(update={"criteria": ()}))
    out = table_page.render_table(plain, store, tmp_path / "out", command="make", verdicts=())
    assert "source" not in (out.parent / "table.csv").read_text().splitlines()[0].split(",")
    assert 'id="beside"' not in out.read_text()


def test_an_oracle_is_marked_and_meets_no_criterion(tmp_path: Path) -> None:
    """The baseline reads true masks on this machine alone, as where the command line sets it."""
    both = both_of(tmp_path, levels)
    plan = both.here.plan
    (name,) = plan.run_ids(0, 0)
    oracle = replace(plan.runs[name], changed={"method.pseudo.oracle": "edges"})
    both = replace(both, here=replace(both.here, plan=replace(plan, runs={**plan.runs, name: oracle})))
    found = side_by_side.criteria(both)
    assert [one.verdict for one in found] == ["not decided", "not decided"]
    assert found[0].text.endswith("No result of a method: base reads true masks.")
    assert side_by_side.both_rows(both)[0].label == "base (this machine: ceiling: reads true masks)"
    assert any("base (this machine: ceiling: reads true masks) |" in line for line in side_by_side.both_markdown(both))


def test_equal_scores_are_not_above_each_other_without_any_spread(tmp_path: Path) -> None:
    found = side_by_side.criteria(both_of(tmp_path, lambda cell: 0.6, {**HERE, 0: 0.5, 3: 0.5}))
    assert found[0].verdict == "fails" and "0.0 points here, at least 2 × 0.00 = 0.00 wanted" in found[0].text
