"""Curves, charts, pictures and colours of reports, from arrays and logs made here."""

from __future__ import annotations

import base64
import colorsys
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from viladiff.core import colormap
from viladiff.report.charts import differences, figures
from viladiff.report.sections import learning_curves, qualitative
from viladiff.report.sections.learning_curves import Curve
from viladiff.report.table.results import CellRun, Results
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.spec import Column, Row, Scale, Table

ROOT = Path(__file__).resolve().parents[2]

NAMES = ["background", "zero", "one"]


def results(entries: tuple[CellRun, ...] = ()) -> Results:
    table = Table(
        name="t",
        title="T",
        scale={"tiny": Scale()},
        columns=(Column(label="a $1$ <"), Column(label="b_{")),
        rows=(Row(label="first $x"), Row(label="second")),
    )
    return Results(Plan(table, "tiny", (0, 1), (0, 1), (0, 1), (), {}), entries)


def run(row: int, seed: int, **fields: Any) -> CellRun:
    record: Any = SimpleNamespace(step_log="steps.jsonl", history=[], class_names=NAMES, **fields)
    return CellRun(PlannedCell(row, 0, seed, f"{row}{seed}".rjust(16, "0")), "done", record)


def scored(row: int, miou: float) -> CellRun:
    return run(row, 0, precision="fp32", miou=miou)


class Files:
    """As much of a store as figures ask for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, run_id: str, name: str) -> Path | None:
        path = self.root / run_id / name
        return path if path.is_file() else None

    def write(self, entry: CellRun, name: str, data: bytes) -> None:
        (self.root / entry.cell.run_id).mkdir(exist_ok=True)
        (self.root / entry.cell.run_id / name).write_bytes(data)


def log(values: list[float | None]) -> bytes:
    lines = [json.dumps({"step": i, "sup": value}) for i, value in enumerate(values)]
    return "\n".join(lines).encode()


def test_a_log_cut_short_or_damaged_gives_the_lines_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(log([1, None, 3]) + b'\n{"step": 3, "su')
    np.testing.assert_array_equal(learning_curves.read_log(path)["sup"], [1, np.nan, 3])
    path.write_bytes(b"noise\n[1]\n" + log([1, 2]) + b"\n")
    np.testing.assert_array_equal(learning_curves.read_log(path)["step"], [0, 1])
    path.write_bytes(b"")
    assert learning_curves.read_log(path) == {}


def test_curves_are_means_over_bins_and_seeds_with_their_extremes(tmp_path: Path) -> None:
    store, entries = Files(tmp_path), (run(0, 0), run(0, 1))
    steps = 2 * learning_curves.BINS
    store.write(entries[0], "steps.jsonl", log([1.0, 3.0] * learning_curves.BINS))
    store.write(entries[1], "steps.jsonl", log([4.0] * steps))
    found = learning_curves.curves(results(entries), store)  # type: ignore[arg-type]
    assert found.keys() == {"sup"}
    (curve,) = found["sup"]
    assert len(curve.steps) == learning_curves.BINS and curve.seeds == 2
    np.testing.assert_allclose(curve.mean, 3)
    np.testing.assert_allclose([curve.low, curve.high], [[2] * learning_curves.BINS, [4] * learning_curves.BINS])


def test_evaluations_along_the_way_are_a_curve_and_one_at_the_end_is_none(tmp_path: Path) -> None:
    entry = run(0, 0)
    entry.record.history = [{"step": 2, "miou": 0.2}, {"step": 4, "miou": None}, {"step": 6, "miou": 0.4}]  # type: ignore
    (curve,) = learning_curves.curves(results((entry,)), Files(tmp_path))["miou"]  # type: ignore[arg-type]
    np.testing.assert_allclose([curve.steps, curve.mean], [[2, 6], [20, 40]])
    entry.record.history = [{"step": 6, "miou": 0.4}]  # type: ignore
    assert learning_curves.curves(results((entry,)), Files(tmp_path)) == {}  # type: ignore[arg-type]


def curve(values: list[float], seeds: int = 2) -> Curve:
    mean = np.array(values)
    return Curve(0, 0, np.arange(1.0, len(values) + 1), mean, mean * 0.9, mean * 1.1, seeds)


def test_limits_hold_every_value_and_go_logarithmic_over_a_decade() -> None:
    _, (low, high), log_scale = figures.limits([curve([2.0, 0.1])])
    assert log_scale and low < 0.09 and high > 2.2
    _, (low, high), log_scale = figures.limits([curve([0.0, 0.5])])
    assert not log_scale and low == 0 and high > 0.55


@pytest.mark.parametrize("reach", [(0.0, 1.0, False), (42.6, 48.0, False), (0.09, 2.2, True), (0.001, 90.0, True)])
def test_ticks_are_a_few_round_values_inside(reach: tuple[float, float, bool]) -> None:
    found = figures.ticks(*reach)
    assert 2 <= len(found) <= 8 and all(reach[0] <= value <= reach[1] for value in found)
    assert all(float(f"{value:.2g}") == pytest.approx(value) for value in found)


def test_a_panel_stays_in_its_box_and_says_what_it_is() -> None:
    curves_ = [curve([2.0, 1.0, 0.5])]
    svg = figures.panel(curves_, ["red"], figures.limits(curves_), 'loss of <row> & "x"')
    assert "<title>loss of &lt;row&gt; &amp; &#34;x&#34;</title>" in svg
    line = svg.split('<polyline points="')[1].split('"')[0]
    points = np.array([[float(part) for part in pair.split(",")] for pair in line.split()])
    assert len(points) == 3 and (points >= 0).all() and (points <= [figures.WIDTH, figures.HEIGHT]).all()
    assert (np.diff(points[:, 1]) > 0).all(), "a falling loss falls"
    assert "<polygon" in svg and "<polygon" not in figures.panel(
        [curve([1.0, 2.0], 1)], ["red"], ((0, 2), (0, 3), False), ""
    )


def test_figures_are_drawn_again_only_when_their_numbers_change(tmp_path: Path) -> None:
    drawn = {"sup": [curve([2.0, 1.0])]}
    paths = figures.save_figures(results(), drawn, tmp_path)
    assert sorted(path.name for path in paths) == ["curves.png", "curves.svg", "scores.png", "scores.svg"]
    first = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    figures.save_figures(results(), drawn, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in paths} == {path: when for path, (_, when) in first.items()}
    figures.save_figures(results(), {"sup": [curve([2.0, 1.5])]}, tmp_path)
    changed = {path.name for path, (data, _) in first.items() if path.read_bytes() != data}
    assert changed == {"curves.png", "curves.svg"}
    (tmp_path / "scores.png").write_bytes(b"damaged")
    figures.save_figures(results(), drawn, tmp_path)
    assert all(path.read_bytes() == data for path, (data, _) in first.items()), "equal numbers, equal bytes"
    assert not list(tmp_path.glob(".*"))


def test_rows_and_columns_without_a_score_are_left_out_of_the_figure(tmp_path: Path) -> None:
    figures.save_figures(results((scored(1, 0.5),)), {}, tmp_path)
    drawn = (tmp_path / "scores.svg").read_text()
    assert "second" in drawn and "first" not in drawn and "b_{" not in drawn
    figures.save_figures(results(), {}, tmp_path)
    assert "first" in (tmp_path / "scores.svg").read_text(), "an empty frame shows what is to come"


def pictures(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    truth = np.zeros((2, 4, 6), np.uint8)
    truth[:, 1:3, 2:4] = 1
    truth[:, 0, 0] = 255
    prediction = truth.copy()
    prediction[:, 1, 2] = 2
    prediction[:, 0, 0] = 0
    arrays: dict[str, np.ndarray | None] = {
        "00/image": np.full((2, 4, 6, 3), 9, np.uint8),
        "01/truth": truth,
        "04/edges": (truth == 1).astype(np.uint8),
        "08/prediction": prediction,
    }
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def saved(path: Path, **changes: np.ndarray | None) -> Path:
    np.savez(path, **pictures(**changes))  # type: ignore[arg-type]
    return path


def pixels(tile: qualitative.Tile) -> np.ndarray:
    data = base64.b64decode(tile.source.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_strip_shows_each_stage_in_its_true_colours(tmp_path: Path) -> None:
    entry = run(0, 0)
    found = qualitative.strip(entry, entry.record, qualitative.load(saved(tmp_path / "p.npz")), 1)  # type: ignore[arg-type]
    assert found.stages == ("image", "truth", "edges", "prediction", "mistakes") and len(found.tiles) == 1
    image, truth, edges, _, mistakes = (pixels(tile) for tile in found.tiles[0])
    colours = colormap.class_colours(3)
    assert (image == 9).all() and (truth[1, 2] == colours[1]).all() and (truth[3, 5] == colours[0]).all()
    assert tuple(truth[0, 0]) in colormap.HATCH, "ignored pixels have no class's colour"
    assert (edges[1, 2] == 255).all() and (edges[3, 5] < 30).all()
    assert tuple(mistakes[1, 2]) == colormap.MISTAKE and (mistakes[1, 3] == colormap.RIGHT).all()
    assert tuple(mistakes[0, 0]) in colormap.HATCH, "where the truth is ignored nothing is a mistake"
    words = [tile.words for tile in found.tiles[0]]
    assert words[1] == "Image 1, truth: background, zero; 4% ignored" and "4.3% of the pixels are wrong" in words[4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"00/image": None}, "needs an array image"),
        ({"01/truth": np.zeros((2, 4, 5), np.uint8)}, "truth is uint8"),
        ({"08/prediction": np.zeros((2, 4, 6))}, "prediction is float64"),
        ({"08/prediction": np.array([object()])}, "cannot be read"),
    ],
)
def test_pictures_that_are_not_as_they_should_be_are_refused_by_name(
    tmp_path: Path, changes: dict[str, np.ndarray | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        qualitative.load(saved(tmp_path / "pictures.npz", **changes))


def test_strips_are_of_the_first_and_last_row_and_pass_over_what_is_damaged(tmp_path: Path) -> None:
    store, entries = Files(tmp_path), tuple(run(row, seed) for row in (0, 1) for seed in (0, 1))
    for entry in entries:
        store.write(entry, "pictures.npz", saved(tmp_path / "p.npz").read_bytes())
    store.write(entries[0], "pictures.npz", b"PK\x03\x04 cut")
    found, wrong = qualitative.build_strips(results(entries), store)  # type: ignore[arg-type]
    assert [(strip.entry.cell.row, strip.entry.cell.seed) for strip in found] == [(0, 1), (1, 0)]
    assert len(wrong) == 1 and entries[0].cell.run_id in wrong[0]


def contrast(one: str, other: str) -> float:
    levels = []
    for text in (one, other):
        parts = [part / 255 for part in bytes.fromhex(text[1:])]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def css(dark: bool) -> dict[str, str]:
    text = (ROOT / "viladiff" / "report" / "templates" / "page.css").read_text(encoding="utf-8")
    block = text.split("prefers-color-scheme: dark")[dark].split("}")[0]
    return {
        word.split(":")[0].strip(): word.split(":")[1].strip()
        for word in block.replace("{", ";").split(";")
        if word.strip().startswith("--") and "#" in word
    }


@pytest.mark.parametrize("dark", [False, True])
def test_words_and_lines_can_be_read_on_both_backgrounds(dark: bool) -> None:
    found = {name: value if len(value) == 7 else "#ffffff" for name, value in css(dark).items()}
    for name in ("--ink", "--ink2", "--accent", "--up", "--down", "--flag"):
        assert min(contrast(found[name], found[ground]) for ground in ("--bg", "--panel", "--zebra")) >= 4.5, name
    assert contrast(found["--paper-ink"], found["--paper-bg"]) >= 4.5
    assert all(contrast(line, found["--bg"]) >= 3 for line in colormap.SERIES)


@pytest.mark.parametrize("count", [2, 11, 21, 81, 150])
def test_every_class_has_a_colour_of_its_own(count: int) -> None:
    colours = colormap.class_colours(count)
    assert colours.shape == (count, 3) and len({colormap.css(colour) for colour in colours}) == count
    if count == 11:
        lab = [colorsys.rgb_to_hls(*(colour / 255)) for colour in colours]
        apart = [np.linalg.norm(colours[i].astype(float) - colours[j]) for i in range(11) for j in range(i)]
        assert min(apart) > 40 and len({round(light, 1) for _, light, _ in lab}) >= 4


# Differences


def with_seeds(values: dict[int, list[float]], ours: frozenset[int] = frozenset()) -> Results:
    """Rows by place with a score a seed; ``ours``: those that are controls."""
    rows = tuple(
        Row(label=f"row {row}", control=row in ours, paper=() if row in ours else (50 + row,)) for row in values
    )
    table = Table(name="t", title="T", scale={"tiny": Scale()}, columns=(Column(label="c"),), rows=rows)
    cells = [
        run(row, seed, precision="fp32", miou=v / 100) for row, those in values.items() for seed, v in enumerate(those)
    ]
    seeds = tuple(range(max(map(len, values.values()))))
    planned = tuple(one.cell for one in cells)
    return Results(Plan(table, "tiny", tuple(values), (0,), seeds, planned, {}), tuple(cells))


def test_differences_are_paired_by_seed_and_stand_beside_the_printed_ones() -> None:
    found = differences.gaps_of(with_seeds({0: [40, 42, 47.0], 1: [41, 44, 48.0], 2: [40.5, 42]}, frozenset({2})))
    one, other = found["c"]
    assert one.values == pytest.approx([1, 2, 1]) and one.mean == pytest.approx(4 / 3)
    wanted = stats.ttest_1samp([1, 2, 1], 0).confidence_interval(0.95)
    assert one.interval == pytest.approx(tuple(wanted)) and (one.kind, one.printed) == ("row", 1.0)
    assert other.values == pytest.approx([0.5, 0]) and (other.kind, other.printed) == ("control", None)
    assert differences.gaps_of(with_seeds({0: [40.0], 1: []})) == {}, "nothing to compare"
    alone = with_seeds({0: [40.0], 1: [43.0]}, frozenset({0, 1}))
    columns = (*alone.plan.table.columns, Column(label="d"))
    table = alone.plan.table.model_copy(update={"columns": columns, "rows": (*alone.plan.table.rows, Row(label="m"))})
    entries = tuple(replace(one, cell=replace(one.cell, column=1)) for one in alone.entries)
    method = run(2, 0, precision="fp32", miou=0.5)
    both = Results(replace(alone.plan, table=table, columns=(0, 1)), (*alone.entries, *entries, method))
    assert differences.gaps_of(both).keys() <= {"c"}, "a column of controls alone"
    (single,) = differences.gaps_of(with_seeds({0: [40.0], 1: [43.0]}))["c"]
    assert single.values == pytest.approx([3]) and single.interval is None


def test_a_row_far_from_all_others_leaves_the_axis_of_differences_to_them() -> None:
    near = [differences.RowDifference(str(i), "row", (i / 10, i / 5), None, None) for i in range(6)]
    far = differences.RowDifference("far", "control", (-12.0, -11.0), None, None)
    low, high = differences.bounds([*near, far])
    assert -1 < low < 0 and 1 < high < 2
    low, high = differences.bounds([differences.RowDifference("same", "row", (0.0, 0.0), None, None)])
    assert low < 0 < high, "an axis has a length"
    drawn = differences.draw_differences({"c": [*near, far]}, "first", "mIoU")
    texts = [text.get_text() for axes in drawn.axes for text in axes.texts]
    assert "← −11.5" in texts and "+0.2" in texts
    assert drawn.axes[0].get_xlabel() == "mIoU minus first, points"


def test_panels_of_differences_stand_one_below_another_with_their_own_rows() -> None:
    gaps = [differences.RowDifference(name, "row", (i + 0.0, i + 1.0), None, None) for i, name in enumerate("abc")]
    drawn = differences.draw_differences({"first": gaps, "second": gaps[1:]}, "base", "mIoU")
    one, two = drawn.axes
    boxes = one.get_position(), two.get_position()
    assert boxes[0].x0 == boxes[1].x0 and boxes[0].y0 > boxes[1].y1, "no panel widens the figure"
    assert all(box.y0 > 0 and box.y1 < 1 for box in boxes), "inside the figure"
    assert boxes[0].height == pytest.approx(1.5 * boxes[1].height), "rows are equally high"
    assert [text.get_text() for text in two.get_yticklabels()] == ["b", "c"]
    assert drawn.get_figwidth() == differences.draw_differences({"first": gaps}, "base", "mIoU").get_figwidth()


def test_the_figure_of_differences_is_written_where_there_are_any(tmp_path: Path) -> None:
    there = with_seeds({0: [40, 42.0], 1: [41, 44.0]})
    paths = figures.save_differences(there, tmp_path)
    assert {kind: path.name for kind, path in paths.items()} == {
        "light": "differences-light.svg",
        "dark": "differences-dark.svg",
        "png": "differences.png",
    }
    svg = paths["light"].read_text()
    assert "row 1" in svg and "paper +1.0" in svg
    first = {path: path.stat().st_mtime_ns for path in paths.values()}
    assert figures.save_differences(there, tmp_path) == paths
    assert {path: path.stat().st_mtime_ns for path in paths.values()} == first, "drawn from the same numbers"
    picture = paths["png"].read_bytes()
    figures.save_differences(with_seeds({0: [40, 42.0], 1: [45, 48.0]}), tmp_path)
    assert paths["png"].read_bytes() != picture and "paper +1.0" in paths["light"].read_text(), "drawn anew"
    assert figures.save_differences(with_seeds({0: [40.0], 1: []}), tmp_path / "none") == {}


def test_the_png_of_differences_has_the_first_column_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = with_seeds({0: [40, 42.0], 1: [41, 44.0]})
    alone = figures.save_differences(there, tmp_path / "one")
    (gaps,) = differences.gaps_of(there).values()
    monkeypatch.setattr(differences, "gaps_of", lambda _: {"c": gaps, "another": gaps})
    both = figures.save_differences(there, tmp_path / "two")
    assert both["png"].read_bytes() == alone["png"].read_bytes()
    assert "another" in both["light"].read_text() and "another" not in alone["light"].read_text()


def test_many_curves_have_a_colour_and_dash_of_their_own() -> None:
    rows = tuple(Row(label=f"row {i}") for i in range(24))
    table = Table(name="t", title="T", scale={"tiny": Scale()}, columns=(Column(label="c"),), rows=rows)
    drawn = Results(Plan(table, "tiny", tuple(range(24)), (0,), (0,), (), {}), ())
    lines = [Curve(i, 0, np.arange(2.0), np.arange(2.0), np.arange(2.0), np.arange(2.0), 1) for i in range(24)]
    (axes,) = figures._lines(drawn, lines, "loss").axes
    styles = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    legend = axes.get_legend()
    assert len(styles) == 24 and legend is not None and len(legend.get_texts()) == 24
