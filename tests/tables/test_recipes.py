"""Recipes of the scales paper, strong and resnet: their fields, who goes first, what pages and commands say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_table_page import rising
from test_table_page import study as a_study

from viladiff.cli import main
from viladiff.config.base import ConfigError
from viladiff.methods import METHODS
from viladiff.methods.common.published import adamw, sgd
from viladiff.report.sections import training
from viladiff.report.table import table_page
from viladiff.report.table.results import collect_results
from viladiff.runs.config import RunConfig, flatten, override, schema
from viladiff.sweeps.spec import load_sweep
from viladiff.tables.cells import Cell, cells
from viladiff.tables.recipes import recipe as recipes
from viladiff.tables.recipes.listing import recipe_lines
from viladiff.tables.recipes.recipe import Recipe, check_recipe, load_recipe, read_recipe, recipe_names, shared
from viladiff.tables.spec import Column, Row, Scale, Table
from viladiff.tables.spec_file import load_table
from viladiff.tables.stated import stated
from viladiff.training.fingerprints import sizes_fingerprint

ROOT = Path(__file__).resolve().parents[2]
TABLES = [f"table{number}" for number in range(1, 8)]
NAMES = ("paper", "resnet", "strong")


@cache
def table(name: str) -> Table:
    return load_table(ROOT / "ablations" / f"{name}.toml")


@cache
def found(name: str, scale: str) -> list[Cell]:
    rows = [row.label for row in table(name).rows if not row.scales or scale in row.scales]
    return cells(table(name), scale, [0], rows, [column.label for column in table(name).columns])


def runs(name: str, scale: str, row: str) -> list[dict[str, object]]:
    """Whole configurations of a row, one a column."""
    place = [one.label for one in table(name).rows].index(row)
    return [flatten(override(RunConfig(), one.changes)) for one in found(name, scale) if one.row == place]


# The files


@pytest.mark.parametrize("name", NAMES)
def test_each_field_of_a_recipe_exists_and_has_a_source(name: str) -> None:
    recipe = load_recipe(name)
    check_recipe(recipe)
    known = {path for dataset in recipe.datasets for method in METHODS for path in schema(dataset, method)}
    for entry in recipe.entries:
        assert entry.source and entry.fields.keys() <= known
        assert entry.ours == bool(entry.why), "what is ours has a reason"
    assert all(one.text and one.source for one in recipe.not_expressed)
    assert len(recipe_lines(recipe)) == sum(len(entry.fields) for entry in recipe.entries)
    assert recipe_names() == NAMES


def test_what_the_publications_print() -> None:
    """By hand, of UniMatch-V2 f6afb4d and UniMatch 0324f3d."""

    def some(one: dict[str, object], *paths: str) -> tuple[object, ...]:
        return tuple(one[path] for path in paths)

    size = ("data.crop", "train.epochs", "data.batch_labelled", "data.batch_unlabelled")
    rates = ("optim.name", "optim.lr", "optim.encoder_lr_scale", "optim.weight_decay")
    model = ("model.encoder", "model.decoder", "model.decoder_width", "model.encoder_stride")
    for name, wanted in (("table1", (518, 60, 16, 16)), ("table3", (798, 180, 8, 8)), ("table4", (518, 20, 16, 16))):
        (one, *_) = runs(name, "strong", "ViLaDiff")
        assert some(one, *size) == wanted
        assert some(one, *rates) == ("adamw", 2e-4, 0.025, 0.01)
        assert one["optim.lr"] * one["optim.encoder_lr_scale"] == pytest.approx(5e-6)  # type: ignore[operator]
        assert some(one, *model) == ("vit_base_patch14_dinov2", "dpt", 128, None)
        assert some(one, "method.teacher.momentum", "optim.decay_norm_and_bias") == (0.996, True)
    for name, wanted, lrs in (
        ("table1", (321, 80, 8, 8), (1e-3, 1e-2)),
        ("table2", (513, 80, 8, 8), (1e-3, 1e-2)),
        ("table3", (801, 240, 8, 8), (5e-3, 5e-3)),
        ("table4", (513, 30, 8, 8), (4e-3, 4e-2)),
    ):
        (one, *_) = runs(name, "resnet", "ViLaDiff")
        assert some(one, *size, "data.cutmix_grid") == (wanted[0] - 1, *wanted[1:], "patch"), "whole cells, ours"
        (other, *_) = runs(name, "resnet", "UniMatch†" if name == "table2" else "UniMatch")
        assert some(other, *size, "data.cutmix_grid") == (*wanted, "pixel")
        assert some(one, "optim.name", "optim.momentum", "optim.weight_decay") == ("sgd", 0.9, 1e-4)
        assert one["optim.lr"] == lrs[1]
        assert one["optim.lr"] * one["optim.encoder_lr_scale"] == pytest.approx(lrs[0])  # type: ignore[operator]
        assert some(one, *model) == ("resnet101s", "deeplabv3plus", 256, 16)
    for row, crop in (("UniMatch†", 513), ("ViLaDiff†", 512)):
        assert {one["data.crop"] for one in runs("table2", "resnet", row)} == {crop}
    (one, *_) = runs("table1", "strong", "SupBaseline")
    assert some(one, "data.batch_labelled", "train.epoch_images", "train.epochs") == (32, 3000, 60)
    assert adamw(5e-6, 40) == {"optim.name": "adamw", "optim.lr": 2e-4, "optim.encoder_lr_scale": 0.025}
    assert sgd(5e-3, 1) == {"optim.name": "sgd", "optim.lr": 5e-3, "optim.encoder_lr_scale": 1.0}
    assert sgd(5e-3) == {"optim.name": "sgd", "optim.lr": 5e-3}


def test_the_recipe_of_the_paper_is_what_the_data_sets_preset() -> None:
    """Apart from how often a run is evaluated, so that ``viladiff train`` runs it too."""
    for dataset in load_recipe("paper").datasets:
        for method in ("viladiff", "semibaseline", "cps"):
            chosen = {"data.dataset": dataset, "method.name": method}
            plain = flatten(override(RunConfig(), chosen))
            fields = {path: one.value for path, one in recipes.recipe_fields("paper", chosen).items()}
            whole = flatten(override(RunConfig(), {**chosen, **fields}))
            other = {path for path, value in whole.items() if value != plain[path]}
            hard = {"method.ohem.enabled"} if dataset == "cityscapes" else set()
            assert other == {"eval.every_epochs"} | hard, (dataset, method)


@pytest.mark.parametrize(
    ("dataset", "vila", "mixe"),
    [
        ("digits", (64, 4, 1), (32, 2)),
        ("dense", (64, 4, 1), (32, 2)),
        ("voc", (384, 6, 2), (64, 4)),
        ("cityscapes", (384, 6, 2), (64, 4)),
        ("coco", (384, 6, 2), (128, 4)),
        ("ade20k", (384, 6, 2), (128, 4)),
        ("folder", (384, 6, 2), (64, 4)),
    ],
)
def test_sizes_of_vila_and_mixe_follow_from_the_classes(dataset: str, vila: Any, mixe: Any) -> None:
    fields = flatten(override(RunConfig(), {"data.dataset": dataset, "method.name": "viladiff"}))
    assert tuple(fields[f"method.vila.{name}"] for name in ("width", "heads", "depth")) == vila
    assert tuple(fields[f"method.mixe.{name}"] for name in ("width", "depth")) == mixe
    narrow = {"method.vila.width": "64", "method.vila.heads": "4"}
    fields = flatten(override(RunConfig(), {"data.dataset": dataset, "method.name": "viladiff", **narrow}))
    assert (fields["method.vila.width"], fields["method.vila.depth"]) == (64, vila[2])


def test_a_runs_name_has_the_sizes_that_its_data_set_presets() -> None:
    """They are defaults, which are in no name by themselves; built-in data and methods without them have old names."""

    def sizes(dataset: str, method: str, **more: object) -> dict[str, str]:
        return sizes_fingerprint(override(RunConfig(), {"data.dataset": dataset, "method.name": method, **more}))

    for dataset, method in (("digits", "viladiff"), ("dense", "viladiff"), ("voc", "cps"), ("coco", "semibaseline")):
        assert sizes(dataset, method) == {}
    assert sizes("voc", "viladiff").keys() == {"sizes"}
    assert sizes("voc", "viladiff") == sizes("cityscapes", "viladiff") != sizes("coco", "viladiff")


def test_protocols_of_publications_are_of_real_data_sets_and_fields() -> None:
    declared = [(name, one) for name, method in METHODS.items() for one in method.protocols]
    assert len(declared) > 30 and {"unimatch", "u2pl", "psmt"} <= {name for name, _ in declared}
    for name, one in declared:
        assert one.source and one.fields and all(shared(path) for path in one.fields)
        for dataset in one.datasets:
            where = {"data.dataset": dataset, "method.name": name}
            if one.splits:
                where |= {"data.split_family": "aug_cps", "data.split": one.splits[0]}
            cfg = flatten(override(RunConfig(), {**where, **one.fields}))
            assert {path: cfg[path] for path in one.fields} == dict(one.fields)


# Cells


@pytest.mark.parametrize("scale", NAMES)
@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_all_scales_and_one_protocol_for_its_rows(name: str, scale: str) -> None:
    """Of one column; what a row sets itself, or names for its method, may differ."""
    columns: dict[int, set[str]] = {}
    for cell in found(name, scale):
        row = table(name).rows[cell.row]
        cfg = flatten(override(RunConfig(), cell.changes))
        free = {*row.set, "train.steps", "train.epochs", "train.epoch_images", "optim.encoder_lr_scale", "data.split"}
        free |= {"data.batch_labelled"} if cfg["method.name"] == "supervised" else set()
        free |= {"data.split_family"}
        common = {path: value for path, value in cfg.items() if not path.startswith("method.") and path not in free}
        if scale == "resnet" and cfg["method.name"] in ("viladiff", "semibaseline", "semivl"):
            # Maps of features are mixed, in whole cells: one less along each side, as the recipe says.
            assert common["data.cutmix_grid"] == "patch" and common["data.crop"] % 16 == 0  # type: ignore[operator]
            common |= {"data.cutmix_grid": "pixel", "data.crop": common["data.crop"] + 1}  # type: ignore[operator]
        text = {path: str(value) for path, value in common.items() if not path.startswith("data.caption")}
        columns.setdefault(cell.column, set()).add(json.dumps(text, sort_keys=True))
    keys = [{frozenset(json.loads(text).items()) for text in texts} for texts in columns.values()]
    for texts in keys:
        every = dict.fromkeys(path for text in texts for path, _ in text)
        for path in every:
            values = {dict(text)[path] for text in texts if path in dict(text)}
            assert len(values) == 1, (path, values)


def test_the_protocol_goes_before_a_publication_and_after_it_for_its_own_fields() -> None:
    (daw, *_) = runs("table1", "strong", "DAW")
    assert (daw["method.teacher.momentum"], daw["data.crop"]) == (0.996, 518), "published: 0.999, 513"
    assert runs("table1", "paper", "DAW")[0]["method.teacher.momentum"] == 0.999
    assert {one["method.pseudo.weight"] for one in runs("table1", "strong", "PS-MT")} == {0.06, 0.6}
    for scale in ("strong", "resnet"):
        for row in ("UniMatch", "CorrMatch"):
            assert {one["method.pseudo.threshold"] for one in runs("table3", scale, row)} == {0.0}, "theirs"
        assert {one["method.pseudo.threshold"] for one in runs("table3", scale, "FixMatch-EMA")} == {0.95}
        assert {one["method.ohem.enabled"] for one in runs("table3", scale, "SemiVL†")} == {False}
        assert {one["method.ohem.enabled"] for one in runs("table3", scale, "ViLaDiff")} == {True}
        assert runs("table3", scale, "CPS")[0]["method.pseudo.weight"] == 5.0
        assert runs("table3", scale, "CPS")[0]["method.ohem.min_kept"] == 0.078
    assert [shared(path) for path in ("optim.lr", "method.teacher.momentum")] == [True, True]
    assert not shared("method.pseudo.threshold") and not shared("method.ohem.enabled")


def test_lengths_that_rows_set_are_twice_those_of_the_recipe() -> None:
    for name in ("table1", "table2", "table3", "table4"):
        for scale in NAMES:
            once = runs(name, scale, "FixMatch-EMA")[0]["train.epochs"]
            assert runs(name, scale, "FixMatch-EMA, twice the steps")[0]["train.epochs"] == 2 * once  # type: ignore[operator]


def small(**scale: Any) -> Table:
    return Table(
        name="t",
        title="T",
        base={"optim.weight_decay": 0.5},
        scale={"s": Scale(published=True, recipe="strong", **scale)},
        columns=(Column(label="92", set={"data.dataset": "voc", "data.split": "92"}),),
        rows=(
            Row(label="plain", set={"method.name": "daw"}),
            Row(label="own", set={"method.name": "daw", "method.teacher.momentum": 0.9, "train.steps": 7}),
        ),
    )


def values(of: Table, path: str, **changes: object) -> list[object]:
    typed = {name.replace("__", "."): value for name, value in changes.items()}
    return [flatten(override(RunConfig(), one.changes))[path] for one in cells(of, "s", [0], changes=typed)]


@pytest.mark.parametrize(
    ("encoder", "width"),
    [
        ("vit_small_patch14_dinov2", 64),
        ("vit_small_patch14_dinov2.lvd142m", 64),
        ("vit_small_patch14_reg4_dinov2", 64),
        ("vit_large_patch14_dinov2.lvd142m", 256),
        ("vit_base_patch14_reg4_dinov2.lvd142m", 128),
    ],
)
def test_the_decoder_is_as_wide_as_the_encoder_s_size_asks(encoder: str, width: int) -> None:
    assert values(small(), "model.decoder_width", model__encoder=encoder) == [width, width]


def test_scale_column_row_and_command_line_override_a_recipe() -> None:
    assert values(small(), "optim.weight_decay") == [0.01, 0.01], "the base does not"
    assert values(small(), "method.teacher.momentum") == [0.996, 0.9]
    assert values(small(), "train.epochs") == [60.0, None]
    assert values(small(), "train.steps") == [None, 7]
    assert values(small(set={"optim.lr": 0.3}), "optim.lr") == [0.3, 0.3]
    assert values(small(), "data.crop", data__crop="504") == [504, 504]
    assert values(small(), "train.epochs", train__steps="9") == [None, None]
    small_size = {"model__encoder": "vit_small_patch14_dinov2"}
    assert values(small(), "model.decoder_width", **small_size) == [64, 64]
    assert values(small(), "model.decoder_width", model__encoder="vit_large_patch14_dinov2") == [256, 256]


def test_faults_of_a_recipe_are_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "odd.toml"
    text = 'title = "T"\ndatasets = ["voc"]\n[[entries]]\nlabel = "a"\nsource = "s"\nfields = { "optim.lr" = 0.1 }\n'

    def fault(old: str, new: str) -> str:
        path.write_text(text.replace(old, new))
        with pytest.raises((ValueError, ConfigError)) as error:
            check_recipe(read_recipe(path))
        assert "\n" not in str(error.value)
        return str(error.value)

    path.write_text(text)
    check_recipe(read_recipe(path))
    assert "entries[1] 'a': optim.lrr: no such field; did you mean 'optim.lr'?" in fault("optim.lr", "optim.lrr")
    assert "did you mean 'source'?" in fault('source = "s"', 'source = "s"\nsourc = "x"')
    assert "source: " in fault('source = "s"\n', "")
    assert "did you mean 'voc'?" in fault('["voc"]', '["vocc"]')
    assert "datasets = 'cocoo': allowed: voc" in fault('label = "a"', 'label = "a"\ndatasets = ["cocoo"]')
    assert "did you mean 'daw'?" in fault('label = "a"', 'label = "a"\nmethods = ["dawn"]')
    assert "one at least of each" in fault('["voc"]', "[]")
    assert "the reason of what is ours" in fault('label = "a"', 'label = "a"\nours = true')
    assert "write the whole path in quotes" in fault('"optim.lr" = 0.1', "optim.lr = 0.1")
    with pytest.raises(ValueError, match=r"recipe = 'strng': allowed: .*did you mean 'strong'\?"):
        load_recipe("strng")
    with pytest.raises(ValueError, match=r"t\.toml: scale\.s: recipe resnet: data\.dataset = 'ade20k': allowed"):
        ade = Column(label="a", set={"data.dataset": "ade20k"})
        cells(Table(**{**dict(small()), "columns": (ade,), "scale": {"s": Scale(recipe="resnet")}}), "s", [0])
    wrong = ({"label": "x", "source": "y", "fields": {"optim.lr": "fast"}},)
    bad = Recipe(**{**load_recipe("strong").model_dump(), "entries": wrong})
    monkeypatch.setattr(recipes, "load_recipe", lambda name: bad)
    with pytest.raises(ValueError, match=r"t\.toml: recipe strong: entries\[1\] 'x': optim\.lr = 'fast'"):
        cells(small(), "s", [0])


def test_a_table_or_sweep_that_names_a_recipe_wrongly_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    text = (ROOT / "ablations" / "table5.toml").read_text().replace('recipe = "strong"', 'recipe = "stronk"')
    path.write_text(text)
    with pytest.raises(ValueError, match=r"scale\.strong: recipe = 'stronk': allowed: .*did you mean 'strong'"):
        load_table(path)
    path.write_text(text.replace('recipe = "stronk"', 'recipe = "strong"\nsplit_per_seed = true'))
    with pytest.raises(ValueError, match=r"scale\.strong: split_per_seed = true: the paper's lists are published"):
        load_table(path)
    path.write_text(text.replace('recipe = "stronk"', 'recipe = "strong"\ndatasets = { voc = "digits" }'))
    with pytest.raises(ValueError, match=r"scale\.strong: recipe = 'strong': of the literature's data sets"):
        load_table(path)
    sweep = tmp_path / "sweep_x.toml"
    lambdas = (ROOT / "tune" / "sweep_lambda.toml").read_text()
    sweep.write_text(lambdas.replace("[scale.paper]", '[scale.paper]\nrecipe = "paper"'))
    with pytest.raises(ValueError, match=r"scale\.paper: recipe = 'paper': of tables alone"):
        load_sweep(sweep)


# Told


def test_pages_say_what_yields_to_the_protocol(tmp_path: Path) -> None:
    said = {(one.row, one.path): one for one in stated(small(), cells(small(), "s", [0]))}
    assert said[0, "method.teacher.momentum"].yields and said[0, "method.teacher.momentum"].value == 0.999
    assert said[0, "data.crop"][4:] == (513, 518, True)
    assert not said[0, "train.epochs"].applied and said[0, "optim.name"].yields
    own = said[1, "method.teacher.momentum"]
    assert not own.yields and not own.applied and own.runs == 0.9, "the row's own, not the protocol's"
    plain = Table(**{**dict(small()), "scale": {"s": Scale(published=True)}})
    without = stated(plain, cells(plain, "s", [0]))
    assert not any(one.yields for one in without) and {one.path for one in without} == {"method.teacher.momentum"}
    plan, store = a_study(tmp_path, rising)
    of = plan.table.model_copy(update={"scale": {**plan.table.scale, plan.scale: Scale(recipe="strong")}})
    kept = replace(plan, table=of, published=tuple(replace_row(one, 0) for one in said.values() if one.row == 0))
    (line,) = training.settings_rows(collect_results(kept, store))
    assert "method.teacher.momentum = 0.999 (here 0.996)" in line.yields and "data.crop = 513 (here 518)" in line.yields
    assert line.lacks == ""
    table_page.render_table(kept, store, tmp_path / "out", command="c", verdicts=())
    html, text = ((tmp_path / "out" / name).read_text() for name in ("index.html", "table.md"))
    for page in (html, text):
        assert "recipe strong" in page and "513 (here 518)" in page
    assert "Yields to the protocol" in html and "yields to the protocol" in text
    bare = replace(kept, published=())
    table_page.render_table(bare, store, tmp_path / "bare", command="c", verdicts=())
    assert "recipe strong" in (tmp_path / "bare" / "index.html").read_text()


def replace_row(one: Any, column: int) -> Any:
    return one._replace(column=column)


def test_the_command_lists_a_recipe_and_docs_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["methods", "--recipe", "strong"]) == 0
    text = capsys.readouterr().out
    assert "optim.encoder_lr_scale" in text and "UniMatch-V2 f6afb4d" in text and "not expressed: " in text
    assert main.main(["methods", "--recipe", "resnet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"][0]["fields"]["model.encoder"] == "resnet101s"
    assert main.main(["methods", "--recipe", "resnett"]) == 2
    assert "did you mean 'resnet'?" in capsys.readouterr().err
    assert main.main(["methods", "daw", "--recipe", "resnet"]) == 2
    assert "give one of the two" in capsys.readouterr().err
    script = [sys.executable, str(ROOT / "scripts" / "write_recipe_docs.py"), "--check"]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
