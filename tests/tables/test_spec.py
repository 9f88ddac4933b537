"""Tables read from TOML: what is refused and how it is said, which layer wins, and Table 5 itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from viladiff.config import renamed
from viladiff.runs.config import TAGS, RunConfig, non_default_fields, override
from viladiff.tables.cells import CHOOSERS, cells, choose, paper_settings, select_labels, unavailable
from viladiff.tables.plan import make_plan
from viladiff.tables.spec import Row, Table
from viladiff.tables.spec_file import load_table

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted((ROOT / "ablations").glob("*.toml"))

SMALL = """
title = "A table"
[base]
"method.name" = "viladiff"
"method.mixe.timesteps" = 4
"data.crop" = 32
[scale.tiny]
datasets = { voc = "digits" }
threads = 1
set = { "train.steps" = 7, "eval.max_images" = 8 }
[scale.real]
seeds = [5]
controls = false
[[columns]]
label = "first"
set = { "data.dataset" = "voc", "data.split" = "183" }
[[columns]]
label = "second"
set = { "data.dataset" = "voc", "data.split" = "732" }
[[rows]]
label = "plain"
set = { "method.name" = "semibaseline" }
paper = [70.1, "-"]
components = ["a"]
[[rows]]
label = "whole"
paper = [72, 75.5]
components = ["a", "b"]
[[rows]]
label = "without words"
control = true
set = { "data.captions" = "none" }
[[claims]]
text = "the whole is higher"
kind = "higher"
rows = ["whole", "plain"]
"""


def read(tmp_path: Path, *changes: tuple[str, str], text: str = SMALL) -> Table:
    for old, new in changes:
        assert old in text, f"{old!r} is not in the table, so the test would test nothing"
        text = text.replace(old, new, 1)
    path = tmp_path / "small.toml"
    path.write_text(text, encoding="utf-8")
    return load_table(path)


def by_place(table: Table, scale: str = "tiny", **asked: object) -> dict[tuple[int, int, int], dict[str, object]]:
    return {(cell.row, cell.column, cell.seed): cell.changes for cell in cells(table, scale, **asked)}  # type: ignore[arg-type]


def test_a_table_is_named_by_its_file_and_keeps_numbers_as_printed(tmp_path: Path) -> None:
    table = read(tmp_path)
    assert table.name == "small" and table.seeds == (0, 1, 2)
    assert table.rows[0].paper == (70.1, "-") and str(table.rows[1].paper[0]) == "72.0"
    assert table.rows[2].control and table.rows[2].paper == ()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('label = "whole"', 'lable = "whole"', "rows[2] '': lable: no such key; did you mean 'label'?"),
        ('label = "whole"', 'label = "plain"', "rows[2] 'plain': rows[1] is called the same"),
        ('label = "second"', 'label = "first"', "columns[2] 'first': columns[1] is called the same"),
        ("paper = [72, 75.5]", "paper = [72]", "rows[2] 'whole': paper = [72.0]: 1 numbers for 2 columns"),
        (
            "paper = [72, 75.5]",
            "paper = [72, true]",
            "rows[2] 'whole': paper[2] = True: must be a number from 0 to 100",
        ),
        ("paper = [72, 75.5]", 'paper = [72, "75.5"]', "paper[2] = '75.5': must be a number from 0 to 100, or \"-\""),
        ("paper = [72, 75.5]", "paper = [72, 755]", "paper[2] = 755: must be a number from 0 to 100"),
        ("paper = [72, 75.5]", "paper = [72, nan]", "rows[2].paper[2] = nan: must be text, a finite number"),
        ("control = true", "control = true\npaper = [1, 2]", "rows[3] 'without words': paper = [1.0, 2.0]: a control"),
        ("control = true", "control = 1", "rows[3] 'without words': control = 1: input should be a valid boolean"),
        (
            'components = ["a", "b"]',
            'components = ["a", "a"]',
            "rows[2] 'whole': components = ['a', 'a']: a component is named twice",
        ),
        ("seeds = [5]", "seeds = [5.0]", "scale.real: seeds[1] = 5.0: a seed must be a whole number"),
        ("seeds = [5]", "seeds = [true]", "scale.real: seeds[1] = True: a seed must be a whole number"),
        ("seeds = [5]", "seeds = [-1]", "scale.real: seeds[1] = -1: a seed must be a whole number"),
        (
            "seeds = [5]",
            'seeds = [5]\ncolumn_seeds = { "second" = [5, 6] }',
            "scale.real: column_seeds: 'second' has [6]; allowed: [5], the seeds of the scale",
        ),
        (
            "seeds = [5]",
            'seeds = [5]\ncolumn_seeds = { "second" = [5, 5] }',
            "scale.real: column_seeds: 'second' has [5, 5]: a seed is named twice",
        ),
        (
            "seeds = [5]",
            'seeds = [5]\ncolumn_seeds = { "secnd" = [5] }',
            "scale.real: column_seeds: 'secnd': no such label; did you mean 'second'",
        ),
        ("seeds = [5]", "seeds = [5, 5]", "scale.real.seeds = [5, 5]: a seed is named twice"),
        ("seeds = [5]", "seeds = []", "scale.real: seeds = []: tuple should have at least 1 item"),
        ("threads = 1", "threads = true", "scale.tiny: threads = True"),
        ("threads = 1", "thread = 1", "scale.tiny: thread: no such key; did you mean 'threads'?"),
        ('"train.steps" = 7', '"runtime.threads" = 2', "scale.tiny: threads = 1 and runtime.threads = 2: keep one"),
        (
            '"train.steps" = 7',
            "train.steps = 7",
            "scale.tiny: train = {'steps': 7}: write the whole path in quotes, as",
        ),
        ('"train.steps" = 7', '"Train steps" = 7', "scale.tiny: Train steps = 7: not a dotted path"),
        (
            "seeds = [5]",
            "shared_method_fields = { method.ohem = 1 }",
            "scale.real: shared_method_fields: method = {'ohem': 1}: write the whole path",
        ),
        (
            "seeds = [5]",
            'shared_method_fields = { "seed" = 1 }',
            "scale.real: shared_method_fields: seed = 1: not set here: write seeds",
        ),
        ('"train.steps" = 7', '"train.steps" = 2024-01-01', "scale.tiny.set.train.steps = 2024-01-01: must be text"),
        ('"train.steps" = 7', '"seed" = 7', "scale.tiny: seed = 7: not set here: write seeds = [...]"),
        ('"data.crop" = 32', '"runtime.scale" = "x"', "base: runtime.scale = 'x': not set here: it is the name"),
        ('title = "A table"', 'title = "A table"\nname = "x"', "name = 'x': a table is named by its file"),
        ('title = "A table"', "", "title: missing"),
        (
            'title = "A table"',
            'title = "A table"\nreference = "hole"',
            "reference = 'hole': no such label; did you mean 'whole",
        ),
        ('title = "A table"', 'title = "A table"\nheadline = "x"', "headline = 'x': no such label. Allowed: 'plain'"),
        ('title = "A table"', 'title = "A table"\nsupervised = "x"', "supervised = 'x': no such label"),
        ("seeds = [5]", 'rows = ["hole"]', "scale.real: rows = 'hole': no such label; did you mean 'whole'?"),
        ("seeds = [5]", 'columns = ["third"]', "scale.real: columns = 'third': no such label"),
        (
            "seeds = [5]",
            'substitute = { "data.split=138" = { "data.split" = "92" } }',
            "scale.real: substitute: 'data.split=138': nothing in the table sets this; did you mean 'data.split=183'?",
        ),
        (
            "seeds = [5]",
            'substitute = { "data.split=183" = { "seed" = 3 } }',
            "scale.real: substitute for data.split=183: seed = 3: not set here",
        ),
        (
            'kind = "higher"',
            'kind = "higher"\namong = ["whole"]',
            "among = ['whole']: only best_row, worst_rows, differs compare",
        ),
        ('kind = "higher"', 'kind = "higher"\ntolerance = 0.4\nmargin = 1', "tolerance = 0.4 and margin = 1: keep one"),
        ('kind = "higher"', 'kind = "less_stable"\nmargin = 1', "less_stable takes neither tolerance nor margin"),
        ('kind = "higher"', 'kind = "gain_exceeds"', "2 rows, but gain_exceeds names 4"),
        ('kind = "higher"', 'kind = "returns_diminish"', "2 rows, but returns_diminish names 3 or more"),
        (
            'title = "A table"',
            'title = "A table"\nmetrik = "miou"',
            "metrik: no such key; did you mean 'metric'? Allowed",
        ),
        (
            'title = "A table"',
            'title = "A table"\nmetric = "iou"',
            "metric = 'iou': allowed: miou, boundary_iou, trimap_miou, pixel_accuracy,",
        ),
        ('title = "A table"', 'title = "A table"\nzzz = 1', "zzz: no such key. Allowed: title, metric,"),
        ('title = "A table"', 'title = "A table"\ntitle = "B"', "not TOML, or a key twice:"),
        ('title = "A table"', 'title = "C:\\Users\\x"', "stands between single quotes: 'C:\\Users\\x'"),
        ('datasets = { voc = "digits" }', 'datasets = { vok = "digits" }', "does not say what becomes of 'voc', which"),
        (
            'kind = "higher"',
            'kind = "hihger"',
            "claims[1] 'the whole is higher': kind = 'hihger': allowed: superset_incr",
        ),
        ('kind = "higher"', 'kind = "hihger"', "did you mean 'higher'?"),
        ('rows = ["whole", "plain"]', 'rows = ["whole"]', "rows = ['whole']: 1 rows, but higher names 2"),
        (
            'rows = ["whole", "plain"]',
            'rows = ["whole", "plane"]',
            "rows = 'plane': no such label; did you mean 'plain'?",
        ),
        ('rows = ["whole", "plain"]', 'rows = ["whole", "whole"]', "rows = ['whole', 'whole']: a label is named twice"),
        ('kind = "higher"', 'kind = "higher"\ncolumns = ["third"]', "columns = 'third': no such label"),
        ('kind = "higher"', 'kind = "gain_shrinks"\ncolumns = ["first"]', "so it takes two at least"),
    ],
)
def test_what_is_wrong_is_said_with_file_entry_value_and_remedy(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, (old, new))
    text = str(error.value)
    assert said in text
    assert all(line.startswith(f"{tmp_path / 'small.toml'}: ") for line in text.splitlines())


def test_all_faults_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, ("seeds = [5]", "seeds = [5, 5]"), ("paper = [72, 75.5]", "paper = [72]"))
    assert len(str(error.value).splitlines()) == 2


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml: cannot be read \(No such file"):
        load_table(tmp_path / "none.toml")
    (tmp_path / "odd.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"odd\.toml: cannot be read"):
        load_table(tmp_path / "odd.toml")


# Meaning of fields


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            '"method.mixe.timesteps" = 4',
            '"method.mixe.timestep" = 4',
            "small.toml: base: method.mixe.timestep: no such",
        ),
        ('"train.steps" = 7', '"train.step" = 7', "small.toml: scale.tiny: train.step: no such field; did you mean"),
        (
            '"data.split" = "732"',
            '"data.split" = 732',
            "small.toml: columns[2] 'second': data.split = 732: must be text",
        ),
        (
            '"data.captions" = "none"',
            '"data.captions" = "nil"',
            "rows[3] 'without words': data.captions = 'nil': allowed",
        ),
        ('"data.captions" = "none"', '"method.mixe.enabled" = 1', "rows[3] 'without words': method.mixe.enabled = 1"),
        (
            '"data.captions" = "none"',
            '"method.mixe.refine_steps" = 9',
            "rows[3] 'without words': method.mixe.refine_st",
        ),
        ('"method.name" = "semibaseline"', '"method.name" = "semi"', "rows[1] 'plain': method.name = 'semi': allowed"),
    ],
)
def test_a_field_that_is_wrong_is_blamed_on_the_entry_that_sets_it(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    table = read(tmp_path, (old, new))
    with pytest.raises(ValueError) as error:
        cells(table, "tiny")
    assert said in str(error.value)
    assert len(set(str(error.value).splitlines())) == len(str(error.value).splitlines())


def test_a_fault_of_two_layers_is_blamed_on_the_later(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        ('"method.mixe.timesteps" = 4', '"method.mixe.beta" = 0.6'),
        ('"data.captions" = "none"', '"method.mixe.edge_bonus" = 0.35'),
    )
    with pytest.raises(ValueError, match=r"small\.toml: rows\[3\] 'without words': method\.mixe\.beta \+ method\.mixe"):
        cells(table, "tiny")


def test_every_layer_goes_before_the_ones_above_it(tmp_path: Path) -> None:
    """base, scale, column, row, seed, command line: each sets a field that all earlier ones set too."""
    table = read(
        tmp_path,
        (
            '"data.crop" = 32',
            '"data.crop" = 32\n"optim.lr" = 0.1\n"optim.weight_decay" = 0.1\n"optim.poly_power" = 0.1',
        ),
        ('"train.steps" = 7', '"train.steps" = 7, "optim.lr" = 0.2, "optim.weight_decay" = 0.2'),
        ('{ "data.dataset" = "voc", "data.split" = "732" }', '{ "data.dataset" = "voc", "optim.lr" = 0.3 }'),
        ('"data.captions" = "none"', '"data.captions" = "none", "optim.lr" = 0.4'),
    )
    found = by_place(table, seeds=[3])
    assert [found[row, column, 3]["optim.lr"] for row, column in ((1, 0), (1, 1), (2, 0), (2, 1))] == [
        0.2,
        0.3,
        0.4,
        0.4,
    ]
    assert found[1, 1, 3]["optim.weight_decay"] == 0.2 and found[1, 1, 3]["optim.poly_power"] == 0.1
    assert {changes["seed"] for changes in found.values()} == {3}
    typed = by_place(table, seeds=[3], changes={"optim.lr": "0.5"})
    assert {changes["optim.lr"] for changes in typed.values()} == {"0.5"}


def test_another_method_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    found = by_place(read(tmp_path))
    assert found[0, 0, 0]["method.name"] == "semibaseline" and "method.mixe.timesteps" not in found[0, 0, 0]
    assert found[1, 0, 0]["method.mixe.timesteps"] == 4
    again = by_place(read(tmp_path, ('"data.captions" = "none"', '"method.name" = "viladiff"')))
    assert again[2, 0, 0]["method.mixe.timesteps"] == 4, "the same method again is not another one"


def test_another_data_set_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    kept = by_place(read(tmp_path))
    assert kept[1, 0, 0]["data.crop"] == 32, "base names no data set, so its crop is meant for any"
    named = by_place(read(tmp_path, ('"data.crop" = 32', '"data.crop" = 32\n"data.dataset" = "voc"')))
    assert named[1, 0, 0]["data.crop"] == 32 and named[1, 0, 0]["data.dataset"] == "digits"
    changed_ = read(tmp_path, ('"data.captions" = "none"', '"data.dataset" = "voc", "data.captions" = "none"'))
    assert by_place(changed_)[2, 0, 0]["data.split"] == "183", (
        "voc is digits at this scale, in the row as in the column"
    )
    other = by_place(read(tmp_path), changes={"data.dataset": "dense"})
    assert "data.split" not in other[1, 0, 0] and "data.crop" not in other[1, 0, 0]


def test_a_later_length_replaces_an_earlier_one(tmp_path: Path) -> None:
    found = by_place(read(tmp_path, ('"data.captions" = "none"', '"train.epochs" = 2')))
    assert "train.steps" not in found[2, 0, 0] and found[2, 0, 0]["train.epochs"] == 2
    with pytest.raises(ValueError, match=r"scale\.tiny: steps = 7|scale\.tiny: train\.steps = 7"):
        cells(read(tmp_path, ('"train.steps" = 7', '"train.steps" = 7, "train.epochs" = 1.0')), "tiny")


def test_a_scale_maps_data_sets_fixes_threads_and_says_its_name(tmp_path: Path) -> None:
    table = read(tmp_path)
    tiny = by_place(table)[1, 1, 0]
    assert tiny["data.dataset"] == "digits" and tiny["data.split"] == "732" and tiny["runtime.threads"] == 1
    assert tiny["runtime.scale"] == "tiny" and tiny["train.steps"] == 7
    real = by_place(table, "real")
    assert set(real) == {(row, column, 5) for row in (0, 1) for column in (0, 1)}, "its seed, no controls"
    assert real[1, 1, 5]["data.dataset"] == "voc" and "runtime.threads" not in real[1, 1, 5]


def test_a_scale_has_stand_ins_for_lists_and_lengths_that_it_lacks(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        (
            'datasets = { voc = "digits" }',
            'datasets = { voc = "digits" }\nsubstitute = { "data.split=5291" = {}, '
            '"data.split_family=aug_cps" = { "data.split_seed" = 4, "data.split" = "92" } }',
        ),
        ('"data.split" = "732" }', '"data.split" = "5291", "data.split_family" = "aug_cps" }'),
    )
    found = by_place(table, seeds=[0])[1, 1, 0]
    assert found["data.split"] == "92" and found["data.split_seed"] == 4 and "data.split_family" not in found
    real = by_place(table, "real")[1, 1, 5]
    assert real["data.split"] == "5291" and real["data.split_family"] == "aug_cps", "of its own scale alone"
    first = by_place(table, seeds=[0])[1, 0, 0]
    assert first["data.split"] == "183" and "data.split_seed" not in first


def test_what_all_methods_share_goes_to_those_that_have_it_and_do_not_set_it(tmp_path: Path) -> None:
    shared = '[scale.tiny]\nshared_method_fields = { "method.teacher.momentum" = 0.9, "method.mixe.timesteps" = 6 }'
    table = read(
        tmp_path,
        ("[scale.tiny]", shared),
        ('"method.name" = "semibaseline" }', '"method.name" = "supervised" }'),
        ('"data.captions" = "none"', '"data.captions" = "none", "method.teacher.momentum" = 0.5'),
    )
    found = by_place(table, seeds=[0])
    momenta = [found[row, 0, 0].get("method.teacher.momentum") for row in range(3)]
    assert momenta == [None, 0.9, 0.5], "a method without it, one with it, and one whose row sets it"
    assert found[1, 0, 0]["method.mixe.timesteps"] == 6, "base is the paper's, a scale's goes before it"
    assert "method.teacher.momentum" not in by_place(table, "real")[1, 0, 5]
    assert (
        by_place(table, seeds=[0], changes={"method.teacher.momentum": "0.7"})[1, 0, 0]["method.teacher.momentum"]
        == "0.7"
    )
    typed = by_place(table, seeds=[0], changes={"method.name": "fixmatch"})
    assert [typed[row, 0, 0].get("method.teacher.momentum") for row in range(3)] == [0.9] * 3, "a method that is typed"
    typed = by_place(table, seeds=[0], changes={"method.name": "supervised"})
    assert all("method.teacher.momentum" not in one for one in typed.values())
    own = '"data.split" = "183", "method.teacher.momentum" = 0.8'
    table = read(tmp_path, ("[scale.tiny]", shared), ('"data.split" = "183"', own))
    assert [by_place(table, seeds=[0])[1, k, 0]["method.teacher.momentum"] for k in (0, 1)] == [0.8, 0.9], "a column's"
    for field, said in (
        ("method.teacher.momentun", r"method\.teacher\.momentun: not a field of any method.*momentum"),
        ("method.name", r"method\.name: not a field of any method"),
        ("train.epochs", r"train\.epochs: not a field of any method"),
        ("method.mixe.timesteps", r"method\.mixe\.timesteps: set has it too; keep one"),
    ):
        both = (
            f'[scale.tiny]\nshared_method_fields = {{ "{field}" = 3 }}',
            'set = { "train.steps" = 7, "method.mixe.timesteps" = 2,',
        )
        wrong = read(tmp_path, ("[scale.tiny]", both[0]), ('set = { "train.steps" = 7,', both[1]))
        with pytest.raises(ValueError, match=rf"scale\.tiny: shared_method_fields: {said}"):
            cells(wrong, "tiny")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"method.name" = "semibaseline"', '"method.name" = "semibaselin"', "small.toml: rows[1] 'plain': method.name"),
        ('voc = "digits"', 'voc = "digit"', "small.toml: columns[1] 'first': data.dataset"),
    ],
)
def test_with_shared_fields_too_a_misspelt_method_or_data_set_is_blamed_on_its_entry(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    table = read(
        tmp_path,
        ("[scale.tiny]", '[scale.tiny]\nshared_method_fields = { "method.teacher.momentum" = 0.9 }'),
        (old, new),
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        cells(table, "tiny")


def test_a_scale_names_the_rows_and_columns_that_it_runs_by_itself(tmp_path: Path) -> None:
    table = read(tmp_path, ("seeds = [5]", 'seeds = [5]\nrows = ["whole"]\ncolumns = ["second"]'))
    assert choose(table, "real") == ((1,), (1,), (5,))
    assert choose(table, "real", rows=[1, 2], columns=["first"]) == ((0, 1), (0,), (5,))
    assert choose(table, "tiny")[:2] == ((0, 1, 2), (0, 1))


def test_a_column_has_fewer_seeds_unless_seeds_are_named(tmp_path: Path) -> None:
    table = read(tmp_path, ("[scale.tiny]", '[scale.tiny]\nseeds = [0, 1, 2]\ncolumn_seeds = { "second" = [1] }'))
    found = {(cell.column, cell.seed) for cell in cells(table, "tiny")}
    assert found == {(0, 0), (0, 1), (0, 2), (1, 1)}
    plan = make_plan(table, "tiny", cache=tmp_path)
    assert {(cell.column, cell.seed) for cell in plan.cells} == found and plan.seeds == (0, 1, 2)
    assert make_plan(table, "tiny", cache=tmp_path).cells == plan.cells
    named = {(cell.column, cell.seed) for cell in make_plan(table, "tiny", seeds=[0, 2], cache=tmp_path).cells}
    assert named == {(0, 0), (0, 2), (1, 0), (1, 2)}, "on the command line they are those of all columns"
    every = make_plan(table, "tiny", seeds=[0, 1, 2], cache=tmp_path).cells
    assert {cell.seed for cell in every if cell.column == 1} == {0, 1, 2}, "another plan, though its seeds are the same"


@pytest.mark.parametrize("old", ["guess_step", "instead", "shared"])
def test_a_former_key_is_refused_and_the_error_gives_the_present_one(tmp_path: Path, old: str) -> None:
    with pytest.raises(ValueError, match=rf"scale\.tiny: {old}: renamed; write {renamed.KEYS[old]}$"):
        read(tmp_path, ("[scale.tiny]", f"[scale.tiny]\n{old} = 1"))


def test_a_row_waits_for_the_field_that_it_needs(tmp_path: Path) -> None:
    table = read(tmp_path, ('label = "plain"', 'label = "plain"\nrequires = "runtime.data_root"'))
    assert unavailable(table) == {0: "requires runtime.data_root"}
    assert {cell.row for cell in cells(table, "tiny")} == {1, 2}
    given = {"runtime.data_root": str(tmp_path)}
    assert unavailable(table, given) == {} and len(cells(table, "tiny", changes=given)) == 18
    assert unavailable(read(tmp_path)) == {}, "a row that needs nothing"
    with pytest.raises(ValueError, match=r"rows\[1\] 'plain': method\.name = 'dremas': allowed"):
        cells(read(tmp_path, ('"method.name" = "semibaseline"', '"method.name" = "dremas"')), "tiny")


def test_cells_set_the_same_where_they_are_one_run() -> None:
    """``settings``, which loads no torch, against whole configurations: over all cells of all tables."""
    tables = [table for path in TABLES if "paper" in (table := load_table(path)).scale]
    by_settings: dict[str, set[str]] = {}
    for table in tables:
        rows = [row.label for row in table.rows if not row.scales or "paper" in row.scales]
        columns = [column.label for column in table.columns]
        for cell in cells(table, "paper", [0], rows, columns):
            run = non_default_fields(override(RunConfig(), cell.changes))
            key = str(sorted(paper_settings(table, cell.row, cell.column).items()))
            by_settings.setdefault(key, set()).add(str(sorted((k, str(v)) for k, v in run.items())))
    assert all(len(runs) == 1 for runs in by_settings.values())
    assert len(set.union(*by_settings.values())) == len(by_settings), "a row sets what is the default anyway"


def test_a_typed_field_reaches_the_cells_that_have_it(tmp_path: Path) -> None:
    table = read(tmp_path)
    found = by_place(table, changes={"method.vila.lam": "0.1"})
    assert "method.vila.lam" not in found[0, 0, 0] and found[1, 0, 0]["method.vila.lam"] == "0.1"
    with pytest.raises(ValueError, match=r"the command line: method\.vila\.lamb: no such field; did you mean"):
        cells(table, "tiny", changes={"method.vila.lamb": "0.1"})
    with pytest.raises(ValueError, match=r"the command line: method\.name = 'vila': allowed"):
        cells(table, "tiny", changes={"method.name": "vila"})
    with pytest.raises(ValueError, match=r"the command line: optim\.lr = 'fast': must be a number"):
        cells(table, "tiny", changes={"optim.lr": "fast"})
    with pytest.raises(ValueError, match="seed = 3: not set here"):
        cells(table, "tiny", changes={"seed": "3"})


def test_cells_come_seed_by_seed_and_can_be_built(tmp_path: Path) -> None:
    found = cells(read(tmp_path), "tiny")
    assert [cell.seed for cell in found] == [0] * 6 + [1] * 6 + [2] * 6
    for cell in found:
        cfg = override(RunConfig(), cell.changes)
        assert (cfg.seed, cfg.runtime.scale) == (cell.seed, "tiny")


def test_choosers_are_the_configurations() -> None:
    assert set(CHOOSERS) == {f"{section}.{tag}" for section, tag in TAGS.items()}


# Selection


def test_selection_by_label_number_and_beginning() -> None:
    labels = ["ViLa", "ViLa + q_G", "Baseline", "10", "5"]
    assert select_labels("rows", labels, ["Baseline", "ViLa"]) == (0, 2)
    assert select_labels("rows", labels, ["base", "2", 1]) == (0, 1, 2)
    assert select_labels("rows", labels, ["ViLa +"]) == (1,), "a label that is whole goes before those it begins"
    assert select_labels("rows", labels, ["5", "10"]) == (3, 4), "a label goes before a number"
    assert select_labels("rows", labels, [3, "Baseline"]) == (2,)
    with pytest.raises(
        ValueError, match=r"rows = 'Basline': no such label; did you mean 'Baseline'\? Allowed: 1 'ViLa'"
    ):
        select_labels("rows", labels, ["Basline"])
    with pytest.raises(ValueError, match="rows = 'vil': ambiguous, matches 1 'ViLa', 2 'ViLa"):
        select_labels("rows", labels, ["vil"])
    with pytest.raises(ValueError, match="rows = 6: no such number"):
        select_labels("rows", labels, ["6"])
    with pytest.raises(ValueError, match="rows = 0: no such number"):
        select_labels("rows", labels, [0])
    with pytest.raises(ValueError, match="rows = '': no such label"):
        select_labels("rows", labels, [""])


def test_rows_are_selected_by_the_numbers_of_the_page() -> None:
    table = load_table(ROOT / "ablations" / "table5.toml")
    assert table.row_numbers[7:10] == ("8", "a", "b")
    labels = [row.label for row in table.rows]
    assert select_labels("rows", labels, ["8", "a", "B"], table.row_numbers) == (7, 8, 9)
    assert choose(table, "digits", rows=["a", 1])[0] == (0, 8)
    with pytest.raises(ValueError, match=r"rows = 9: no such number.* 8 'ViLaDiff', a 'supervised'"):
        choose(table, "digits", rows=[9])
    with pytest.raises(ValueError, match="rows = 'xyz': no such label"):
        choose(table, "digits", rows=["xyz"])
    rows = [Row(label=f"r{i}", control=i % 2 == 1) for i in range(60)]
    numbers = table.model_copy(update={"rows": tuple(rows)}).row_numbers
    assert numbers[:4] == ("1", "a", "2", "b") and numbers[53] == "aa" and len(set(numbers)) == 60


def test_controls_come_last_and_a_named_one_is_run_also_where_the_scale_leaves_them_out(tmp_path: Path) -> None:
    text = SMALL.replace("control = true\n", "", 1).replace('label = "plain"', 'label = "plain"\ncontrol = true', 1)
    table = read(tmp_path, ('paper = [70.1, "-"]\n', ""), text=text)
    assert choose(table, "tiny") == ((1, 2, 0), (0, 1), (0, 1, 2))
    assert choose(table, "real") == ((1, 2), (0, 1), (5,))
    assert choose(table, "real", rows=["plain"], columns=[2], seeds=[1, 1]) == ((0,), (1,), (1,))
    with pytest.raises(ValueError, match=r"small\.toml: scale = 'tinny': allowed: tiny, real; did you mean 'tiny'"):
        choose(table, "tinny")
    with pytest.raises(ValueError, match="no rows selected"):
        choose(table, "tiny", rows=[])
    with pytest.raises(ValueError, match=r"seeds = \[-1\]: a seed must not be negative"):
        choose(table, "tiny", seeds=[-1])


def test_reading_a_table_loads_no_torch() -> None:
    code = "import sys; from viladiff.tables.spec_file import load_table; "
    code += f"load_table({str(TABLES[0])!r}); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# The tables that are there


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_can_be_run_at_every_scale_with_cells_that_differ(path: Path) -> None:
    table = load_table(path)
    # Captions of known rates are simulated, on built-in data alone.
    assert {"smoke", "quick", "digits", "paper"} - set(table.scale) == ({"paper"} if path.stem == "captions" else set())
    whole = {i for i, row in enumerate(table.rows) if row.set.get("data.split") == "all"}
    long = {i for i, row in enumerate(table.rows) if "train.epoch_images" in row.set}
    for scale in table.scale:
        fit = {i for i, row in enumerate(table.rows) if not row.scales or scale in row.scales}
        rows, columns = [table.rows[i].label for i in sorted(fit)], [column.label for column in table.columns]
        every = cells(table, scale, [0], rows, columns)
        # With all labels one run stands in every column.
        found = [one for one in every if one.row not in whole or one.column == 0]
        # Where steps are counted, not epochs, a supervised row of as many steps is the supervised row.
        counted = override(RunConfig(), every[0].changes).train.epochs is None
        plain = {one.column: one.changes for one in every if table.rows[one.row].label == table.supervised}
        for one in every:
            assert one.row not in long or (one.changes == plain[one.column]) == counted
        found = [one for one in found if not (counted and one.row in long)]
        read = [(table.rows[one.row].network, table.rows[one.row].stream) for one in found]
        sets = [sorted(non_default_fields(override(RunConfig(), one.changes)).items()) for one in found]
        assert len({str(key) for key in zip(read, sets, strict=True)}) == len(found)
        there = {one.row for one in every} | set(unavailable(table))
        assert there == fit, "a row runs, or waits for what it needs"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_scale_quick_is_a_matter_of_minutes(path: Path) -> None:
    """On two cores, by the guesses that the table states itself."""
    table = load_table(path)
    size = table.scale["quick"]
    rows, columns, seeds = choose(table, "quick")
    assert size.seconds_per_step is not None and seeds == (0,)
    assert len(rows) * len(columns) * (100 * size.seconds_per_step + size.seconds_overhead) / 2 < 8 * 60


def test_table5_has_the_printed_numbers_and_parts() -> None:
    table = load_table(ROOT / "ablations" / "table5.toml")
    printed = [(72.2, 75.0), (74.5, 77.3), (73.7, 76.1), (75.3, 77.4), (77.8, 79.6), (78.1, 80.5), (79.6, 81.8)]
    papers = [row for row in table.rows if not row.control]
    assert [row.paper[:2] for row in papers] == [*printed, (80.1, 82.4)]
    assert [len(row.components) for row in papers] == [1, 2, 2, 3, 4, 4, 5, 6]
    assert [column.label for column in table.columns] == ["1/8 (183)", "1/2 (732)", "1/16 (92)"]
    assert sum(row.control for row in table.rows) == 14 and not any(row.control for row in table.rows[:8])


def test_table5_rows_are_the_runs_that_they_stand_for() -> None:
    table = load_table(ROOT / "ablations" / "table5.toml")
    found = [override(RunConfig(), cell.changes) for cell in cells(table, "digits", [0], columns=[1])]
    at_defaults = {
        path: value for path, value in non_default_fields(found[7]).items() if not path.startswith("runtime.")
    }
    at_defaults_of_tables = {"data.dataset": "digits", "method.name": "viladiff", "eval.split": "test"}
    at_defaults_of_tables |= {"data.split_seed": 0}
    assert at_defaults == at_defaults_of_tables, "other campaigns share this run"
    assert (
        non_default_fields(found[0]).items() >= {("method.name", "semibaseline")}
        and len(non_default_fields(found[0])) == 6
    )
    on = [
        (
            cfg.method.vila.enabled,  # type: ignore[attr-defined]
            *(f"teacher_{kind}" in cfg.method.vila.distillation_paths for kind in ("features", "logits")),  # type: ignore[attr-defined]
            *(
                getattr(cfg.method.mixe, part) and cfg.method.mixe.enabled
                for part in ("gaussian", "flips", "edge_loss")
            ),  # type: ignore[attr-defined]
        )
        for cfg in found[1:8]
    ]
    o, x = False, True
    assert on == [
        (x, x, o, o, o, o),
        (x, o, x, o, o, o),
        (x, x, x, o, o, o),
        (x, x, x, x, o, o),
        (x, x, x, o, x, o),
        (x, x, x, x, x, o),
        (x, x, x, x, x, x),
    ]
    for cfg in found[1:8]:
        assert {"student_features", "student_logits"} <= set(cfg.method.vila.distillation_paths)  # type: ignore[attr-defined]
    controls = [non_default_fields(cfg) for cfg in found[8:]]
    mine = [{k: v for k, v in one.items() if k not in non_default_fields(found[7])} for one in controls]
    assert [one["method.name"] for one in controls] == [
        "supervised",
        *["viladiff"] * 6,
        *["semibaseline"] * 3,
        *["viladiff"] * 2,
    ]
    assert len(controls[0]) == 6
    assert mine[1:] == [
        {"data.captions": "shuffled"},
        {"data.captions": "generic"},
        {"data.captions": "none"},
        {"method.mixe.timesteps": 1},
        {"method.mixe.denoiser": "plain"},
        {"method.mixe.denoiser": "guided"},
        {"method.pseudo.weight": 0.5},
        {"method.pseudo.oracle": "edges", "method.pseudo.oracle_from": 0.5},
        {"method.pseudo.oracle": "everywhere"},
        {"method.mixe.enabled": False, "method.pseudo.oracle": "edges", "method.pseudo.oracle_from": 0.5},
        {"method.mixe.enabled": False, "method.pseudo.oracle": "everywhere"},
    ]


def test_table5_at_paper_scale_is_the_papers_own_data() -> None:
    table = load_table(ROOT / "ablations" / "table5.toml")
    cfg = override(RunConfig(), cells(table, "paper", [0], rows=["ViLaDiff"], columns=[2])[0].changes)
    assert (cfg.data.dataset, cfg.data.split, cfg.model.encoder) == ("voc", "732", "vit_base_patch16_224")
    assert (cfg.optim.lr, cfg.data.batch_labelled, cfg.data.batch_unlabelled) == (1e-3, 4, 4)
    assert len(choose(table, "quick")[0]) == 4 and choose(table, "quick")[2] == (0,)
    assert len(cells(table, "digits")) == (6 + 3 + 3) * 20, "seeds of the three columns"


def test_comments_of_table5_name_fields_that_exist() -> None:
    from viladiff.runs.config import schema

    text = (ROOT / "ablations" / "table5.toml").read_text(encoding="utf-8")
    paths = set(re.findall(r'"((?:data|method|train|optim|eval|model|runtime)\.[a-z_.]+)"', text))
    assert paths <= set(schema("voc", "viladiff")) and len(paths) > 8
