"""What a seed draws, which images settings are chosen by, and how runs that read true masks are kept out of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from record_kit import made

from viladiff.cli.tables import main
from viladiff.report.table import exports, table_views
from viladiff.report.table import results as tables
from viladiff.report.table.long_form import to_rows
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import PlannedRun
from viladiff.runs.store import Store
from viladiff.sweeps.spec import Sweep, SweepPlanner, changes, check, load_sweep
from viladiff.tables import claims
from viladiff.tables.cells import cells, choose
from viladiff.tables.claims import evaluate_claims
from viladiff.tables.contrasts import Term, contrasts
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.significance import cell_samples
from viladiff.tables.spec import OWN_LISTS
from viladiff.tables.spec_file import load_table

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted((ROOT / "ablations").glob("*.toml"))
SWEEPS = sorted((ROOT / "tune").glob("*.toml"))
SMALL = """
title = "A table"
[base]
"method.name" = "viladiff"
"method.mixe.enabled" = false
[scale.tiny]
split_per_seed = true
set = { "data.dataset" = "digits", "train.steps" = 4 }
[scale.shared]
set = { "data.dataset" = "digits", "train.steps" = 4 }
[[columns]]
label = "first"
set = { "data.split" = "183" }
[[columns]]
label = "another list"
set = { "data.split" = "183", "data.split_seed" = 1000 }
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
label = "truth"
control = true
components = ["a", "b", "c"]
set = { "method.pseudo.oracle" = "edges" }
[[claims]]
text = "parts add"
kind = "superset_increases"
[[claims]]
text = "the whole is best"
kind = "best_row"
rows = ["whole"]
[[claims]]
text = "truth is worth more"
kind = "higher"
source = "ours"
rows = ["truth", "whole"]
"""
SEARCH = """
title = "A sweep"
trials = 4
[base]
"method.name" = "semibaseline"
"data.dataset" = "digits"
[space."method.pseudo.threshold"]
low = 0.5
high = 0.95
[initial_point]
"method.pseudo.threshold" = 0.95
[scale.tiny]
split_per_seed = true
set = { "train.steps" = 4, "eval.max_images" = 8 }
[scale.shared]
set = { "train.steps" = 4, "eval.max_images" = 8 }
"""


def written(tmp_path: Path, text: str, *edits: tuple[str, str], name: str = "small.toml") -> Path:
    for old, new in edits:
        assert old in text, f"{old!r} is not in the file, so the test would test nothing"
        text = text.replace(old, new, 1)
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# Lists


def test_each_seed_draws_its_own_list_the_same_for_all_rows(tmp_path: Path) -> None:
    table = load_table(written(tmp_path, SMALL))
    found = cells(table, "tiny", [0, 4])
    drawn = {(one.column, one.seed): one.changes["data.split_seed"] for one in found}
    assert drawn == {(0, 0): 0, (0, 4): 4, (1, 0): 1000, (1, 4): 1004}, "beside what the column draws"
    for one in found:
        assert one.changes["data.split_seed"] == drawn[one.column, one.seed] and one.changes["seed"] == one.seed
    shared = {one.changes.get("data.split_seed") for one in cells(table, "shared", [0, 4]) if one.column == 0}
    assert shared == {None}, "the published list, where a scale does not ask"


def test_data_with_published_lists_shares_them(tmp_path: Path) -> None:
    real = ('"data.dataset" = "digits"', '"data.dataset" = "voc"')
    no_oracle = ('set = { "method.pseudo.oracle" = "edges" }', "")
    claim = ('[[claims]]\ntext = "truth', '[[claims]]\ntext = "a control')
    table = load_table(written(tmp_path, SMALL, real, no_oracle, claim))
    with pytest.raises(ValueError, match=r"scale\.tiny: split_per_seed = true: data\.dataset = 'voc' has published .*"):
        cells(table, "tiny", [0])
    with pytest.raises(ValueError, match=r"scale\.paper: split_per_seed = true: the paper's lists are published"):
        load_table(written(tmp_path, SMALL, ("[scale.tiny]", "[scale.paper]")))
    with pytest.raises(ValueError, match=r"scale\.paper: split_per_seed = true"):
        load_sweep(written(tmp_path, SEARCH, ("[scale.tiny]", "[scale.paper]"), name="sweep_small.toml"))
    sweep = load_sweep(written(tmp_path, SEARCH, ('= "digits"', '= "voc"'), name="sweep_small.toml"))
    with pytest.raises(ValueError, match=r"sweep_small\.toml: scale\.tiny: split_per_seed = true: .* allowed: digits"):
        check(sweep, "tiny")


@pytest.mark.parametrize("path", [*TABLES, *SWEEPS], ids=lambda path: path.stem)
def test_every_spec_draws_lists_at_scale_digits_and_nowhere_else(path: Path) -> None:
    spec = load_table(path) if path in TABLES else load_sweep(path)
    own = {name for name, scale in spec.scale.items() if scale.split_per_seed}
    real = {"paper", "strong", "resnet"}
    many = {name for name, scale in spec.scale.items() if name not in real and len(scale.seeds or spec.seeds) > 1}
    beside = {name for name, scale in spec.scale.items() if getattr(scale, "published_runs", "")}
    assert own == {"digits"} | many | beside


def test_trials_and_finals_of_a_sweep_draw_lists_by_seed(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path, SEARCH, name="sweep_small.toml"))
    point = {"method.pseudo.threshold": 0.7}
    namer, shared = SweepPlanner(sweep, "tiny", {}, "holdout"), SweepPlanner(sweep, "shared", {}, "holdout")
    for seed in (0, 2):
        assert namer.planned(point, seed).changed["data.split_seed"] == seed
        assert namer.final(point, seed).changed["data.split_seed"] == seed
        assert "data.split_seed" not in {**shared.planned(point, seed).changed, **shared.final(point, seed).changed}


def test_the_dry_run_says_that_seeds_draw_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, storage = written(tmp_path, SMALL), ["--runs-dir", str(tmp_path / "runs"), "--dry-run", "--seeds", "1"]
    assert main(path, ["--scale", "tiny", *storage]) == 0
    assert OWN_LISTS in capsys.readouterr().out
    assert main(path, ["--scale", "shared", *storage]) == 0
    assert OWN_LISTS not in capsys.readouterr().out


# What settings are chosen by


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_no_trial_of_a_sweep_is_scored_on_test(path: Path) -> None:
    sweep = load_sweep(path)
    for scale in sweep.scale:
        fixed = changes(sweep, scale, {}, "holdout")
        assert fixed["eval.split"] in ("dev", "holdout") and (fixed["eval.split"] == "dev") == (scale != "paper")
        cfg = override(RunConfig(), {**fixed, **sweep.initial_point})
        assert cfg.eval.split == fixed["eval.split"]


def test_a_sweep_by_hand_cannot_read_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_by(*edits: tuple[str, str]) -> Sweep:
        return load_sweep(written(tmp_path, SEARCH, *edits, name="sweep_small.toml"))

    base, size = '"data.dataset" = "digits"', '"eval.max_images" = 8 }'
    for old, new, where in (
        (base, f'{base}\n"eval.split" = "test"', "base"),
        (size, '"eval.max_images" = 8, "eval.split" = "test" }', "scale.tiny"),
        (
            '[space."method.pseudo.threshold"]',
            '[space."eval.split"]\nchoices = ["test", "dev"]\n[space."m.x"]',
            "space",
        ),
    ):
        with pytest.raises(ValueError, match=r"eval\.split.*not s(et here|earched)") as found:
            made_by((old, new))
        assert where in str(found.value)
    sweep = made_by()
    with pytest.raises(ValueError, match=r"eval\.split = test: not set here"):
        changes(sweep, "tiny", {"eval.split": "test"}, "holdout")
    with pytest.raises(ValueError, match="--select val: trials on 'digits' are scored on dev, and never on test"):
        changes(sweep, "tiny", {}, "val")
    substitute = 'substitute = { "method.name=semibaseline" = { "eval.split" = "test" } }\n'
    sly = made_by(("[scale.tiny]\n", f"[scale.tiny]\n{substitute}"))
    assert changes(sly, "tiny", {}, "holdout")["eval.split"] == "dev"
    namer = SweepPlanner(sweep, "tiny", {}, "holdout")
    monkeypatch.setattr(namer, "fixed", {**namer.fixed, "eval.split": "test"})
    with pytest.raises(ValueError, match="a trial is never scored on the images that finals are quoted from"):
        namer.planned(sweep.initial_point, 0)


def test_tables_that_choose_read_images_for_choices_and_the_others_publish() -> None:
    """rates.toml chooses learning rates; all others, choices.toml too, report what a row is worth."""
    assert [path.stem for path in TABLES if load_table(path).chooses] == ["rates"]
    for path in TABLES:
        table = load_table(path)
        for scale in ("smoke", "quick", "digits"):
            split = {one.changes.get("eval.split") for one in cells(table, scale, [0])}
            assert split == ({"dev"} if table.chooses else {"test"}), (path.stem, scale)


def test_a_table_that_chooses_refuses_what_results_are_quoted_from(tmp_path: Path) -> None:
    chooses = ('title = "A table"', 'title = "A table"\nchooses = true')
    assert cells(load_table(written(tmp_path, SMALL, chooses)), "tiny", [0])
    table = load_table(written(tmp_path, SMALL, chooses, ('"data.split" = "183" }', '"eval.split" = "test" }')))
    with pytest.raises(ValueError, match=r"rows\[1\] 'plain': eval\.split = 'test': settings are chosen by this table"):
        cells(table, "tiny", [0])
    with pytest.raises(ValueError, match=r"eval\.split = 'test'"):
        cells(load_table(ROOT / "ablations" / "rates.toml"), "smoke", changes={"eval.split": "test"})


# Ceilings


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("control = true\n", "", r"rows\[3\] 'truth': method.pseudo.oracle = 'edges': takes control = true"),
        ('rows = ["whole"]', 'rows = ["truth"]', r"'truth' reads true masks .*: a ceiling is in no ranking"),
        ('rows = ["whole"]', 'rows = ["whole"]\namong = ["truth"]', "a ceiling is in no ranking"),
        ('source = "ours"\n', "", "a ceiling is in no ranking"),
        (
            "[base]",
            '[base]\n"method.pseudo.oracle" = "edges"',
            r"base: method\.pseudo\.oracle = 'edges': set it in a row",
        ),
        ('title = "A table"', 'title = "A table"\nheadline = "truth"', r"headline = 'truth': .* is a ceiling"),
    ],
)
def test_a_ceiling_is_a_control_that_no_claim_ranks(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_table(written(tmp_path, SMALL, (old, new)))


def test_a_sweep_tunes_no_ceiling(tmp_path: Path) -> None:
    oracle = ('"data.dataset" = "digits"', '"data.dataset" = "digits"\n"method.pseudo.oracle" = "edges"')
    with pytest.raises(ValueError, match=r"base: method\.pseudo\.oracle = 'edges': not set here: .* a ceiling"):
        load_sweep(written(tmp_path, SEARCH, oracle, name="sweep_small.toml"))


def world(tmp_path: Path, typed: bool = False) -> tuple[Plan, Store]:
    """Records of two rows and a ceiling above them; with ``typed`` the second row has an oracle by the command line."""
    from viladiff.runs.record import RunRecord

    table = load_table(written(tmp_path, SMALL))
    example, records = made("supervised-92-0"), {}
    where, runs = [], {}
    for row, level in enumerate((50.0, 60.0, 90.0)):
        for seed in range(3):
            name = f"{row}{seed}".rjust(16, "0")
            fields = {"method.pseudo.oracle": "edges"} if row == 2 or (typed and row == 1) else {}
            scores = (level + seed + 0.1 * ((row + seed) % 3)) / 100
            records[name] = RunRecord(**{**example.model_dump(), "run_id": name, "miou": scores})
            where.append(PlannedCell(row, 0, seed, name))
            runs[name] = PlannedRun(name, {}, "", 4, fields)
    plan = Plan(table, "tiny", (0, 1, 2), (0,), (0, 1, 2), tuple(where), runs)
    store = Store(tmp_path / "runs", [])
    store.records = lambda: records  # type: ignore[method-assign]
    return plan, store


def test_a_ceiling_is_marked_wherever_its_row_stands_and_is_never_the_best(tmp_path: Path) -> None:
    plan, store = world(tmp_path)
    results = tables.collect_results(plan, store)
    assert plan.ceilings == {2} and results.rows(control=False) == [0, 1]
    assert tables.row_name(results, 2) == "truth (ceiling: reads true masks)"
    best = [[top for _, top, _, _ in row.cells] for row in exports.export_rows(results, "miou")]
    assert best == [[False], [True], [False]], "90 is no result"
    assert "the highest of 2 rows" in tables.headline_sentence(replace_reference(results))
    lines = table_views.table_rows(results, "miou", table_views.Reasons())
    assert [line.section for line in lines] == [0, 0, 2] and "ceiling" in lines[2].label
    assert any(
        "read true masks of unlabelled images and are no results" in text for text in table_views.context(results)
    )
    text = exports.to_markdown(
        results, evaluate_claims(plan, store.records()), [], "x", "", table_views.context(results)
    )
    assert "truth (ceiling: reads true masks)" in text and "(ceiling: reads true masks) (ours)" not in text
    assert "ceiling: reads true masks" in exports.to_latex(results, "")
    assert [line["ceiling"] for line in to_rows(results)] == [False] * 6 + [True] * 3


def replace_reference(results: tables.Results) -> tables.Results:
    """The same, with its headline for its reference, so that the sentence says where it stands among rows."""
    return tables.Results(
        replace(results.plan, table=results.plan.table.model_copy(update={"reference": "whole"})), results.entries
    )


def test_claims_leave_ceilings_out_but_for_our_own_question(tmp_path: Path) -> None:
    plan, store = world(tmp_path)
    asked = [{question.higher for question in contrasts(plan.table, claim)} for claim in plan.table.claims]
    assert asked == [{"whole"}, {"whole"}, {"truth"}]
    assert [one.verdict for one in evaluate_claims(replace(plan), store.records())][2] == "not decided", (
        "one column is missing"
    )
    typed, _ = world(tmp_path, typed=True)
    results = tables.collect_results(typed, store)
    assert typed.ceilings == {1, 2} and results.rows(control=False) == [0]
    assert tables.headline_sentence(results).startswith("Row 1 (plain)"), "the last that is ranked"
    named = replace(typed, table=typed.table.model_copy(update={"headline": "whole"}))
    assert "(whole (ceiling: reads true masks)) reaches" in tables.headline_sentence(
        tables.collect_results(named, store)
    )
    found = evaluate_claims(typed, store.records())
    assert found[0].comparisons == found[1].comparisons == ()
    assert found[1].why.startswith("'whole' reads true masks of unlabelled images here (method.pseudo.oracle): a ceil")
    assert found[1].why.endswith("no difference is counted before that"), "90 points of true masks are not counted"


def test_a_ceiling_lends_no_spread_to_the_papers_claims(tmp_path: Path) -> None:
    plan, store = world(tmp_path)
    ours = [one for one in plan.table.claims if one.source == "ours"]
    paper = [one for one in plan.table.claims if one.source == "paper"]
    assert ours and paper, "our question is about the ceiling"
    measured = cell_samples(plan, store.records())
    told: list[Sequence[Term]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "variance_model", lambda terms, _: told.extend(terms))
        claims.table_variances(plan, measured)
    assert {term.row for terms in told for term in terms} == set(plan.rows) - plan.ceilings != set(plan.rows)


def test_the_ceilings_of_table5_run_at_scale_digits_alone() -> None:
    table = load_table(ROOT / "ablations" / "table5.toml")
    oracles = [i for i, row in enumerate(table.rows) if row.oracle]
    assert len(oracles) == 4 and list(choose(table, "digits")[0][-4:]) == oracles
    for scale in ("smoke", "quick", "paper"):
        assert not set(oracles) & set(choose(table, scale)[0])
