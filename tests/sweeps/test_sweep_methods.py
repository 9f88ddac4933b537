"""The sweeps that choose a reading: equal trials for every method, the reported set unread, and a page that says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_sweep_page import Page, lambdas, shown

from viladiff.experiments.compare_sweeps import _tuned
from viladiff.methods import METHODS
from viladiff.report.sweep.sweep_page import render_sweep
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import PlannedRun
from viladiff.sweeps.finals import Finalist, Tuned, chosen, compare_finalists
from viladiff.sweeps.finals import format_verdict as said
from viladiff.sweeps.spec import SweepPlanner, changes, common, load_sweep

TUNE = Path(__file__).resolve().parents[2] / "tune"
FILES = [path for path in sorted(TUNE.glob("sweep_*.toml")) if path.stem.removeprefix("sweep_") in METHODS]
FILES += [TUNE / "sweep_semibaseline_tags.toml"]


def test_every_method_has_as_many_trials_and_seeds() -> None:
    found = {path.stem.removeprefix("sweep_"): load_sweep(path) for path in FILES}
    main = found["viladiff"]
    assert {one.base["method.name"] for one in found.values()} >= {"viladiff", "semibaseline", "unimatch", "semivl"}
    assert set(main.beside) == found.keys() - {"viladiff"}, "the page lists every one"
    for sweep in found.values():
        assert (sweep.trials, sweep.seeds, sweep.final_seeds) == (12, (0,), (1, 2, 3))
        assert sweep.finals_split == "dev" and sweep.base["data.split"] == "183"
        assert "method.pseudo.threshold" in sweep.space
        momentum = {"method.teacher.momentum": 0.99} if sweep.base["method.name"] == "fixmatch_tags" else {}
        for name, scale in sweep.scale.items():
            own = momentum if name in ("quick", "digits") else {}
            assert scale.set == {**main.scale[name].set, **own}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_run_reads_the_reported_set(path: Path) -> None:
    sweep = load_sweep(path)
    for scale in sweep.scale:
        for select in ("holdout", "val") if scale == "paper" else ("holdout",):
            trial, final = changes(sweep, scale, {}, select), common(sweep, scale, {})  # type: ignore[arg-type]
            parts = {override(RunConfig(), {**one, **sweep.initial_point}).eval.split for one in (trial, final)}
            assert parts == ({"holdout"} if scale == "paper" else {"dev"})


@pytest.mark.usefixtures("prints_once")
def test_trials_and_finals_are_runs_on_dev() -> None:
    sweep = load_sweep(TUNE / "sweep_semibaseline.toml")
    namer = SweepPlanner(sweep, "smoke", {}, "holdout")
    found = [namer.planned(sweep.initial_point, 0), namer.final(sweep.initial_point, 1)]
    assert [override(RunConfig(), one.changes).eval.split for one in found] == ["dev", "dev"]
    assert [one.changed.get("eval.split", "dev") for one in found] == ["dev", "dev"]


def test_other_sweeps_still_end_on_the_reported_set() -> None:
    sweep = load_sweep(TUNE / "sweep_lambda.toml")
    assert common(sweep, "digits", {})["eval.split"] == "test" and "eval.split" not in common(sweep, "paper", {})


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("unimatch", "trials = 12", "trials = 11", r"unimatch': trials = 11 there, and 12 here"),
        ("semivl", "[1, 2, 3]", "[1, 2, 3, 4]", r"semivl': final_seeds = \(1, 2, 3, 4\) there"),
        ("viladiff", '"unimatch"', '"unimach"', r"there is no sweep_unimach.toml beside"),
        ("semivl", "[1, 2, 3]", "[1, 2]", r"final_seeds = \[1, 2\]: 3 seeds or more"),
        ("semivl", 'finals_split = "dev"', 'finals_split = "test"', r"final_seeds = .*: 5 seeds or more"),
        ("viladiff", 'finals_split = "dev"', 'finals_split = "val"', r"finals_split = 'val': allowed"),
    ],
)  # fmt: skip
def test_unequal_tuning_is_refused(tmp_path: Path, name: str, old: str, new: str, said: str) -> None:
    for path in FILES:
        text = path.read_text()
        assert old in text or path.stem != f"sweep_{name}"
        (tmp_path / path.name).write_text(text.replace(old, new) if path.stem == f"sweep_{name}" else text)
    with pytest.raises(ValueError, match=said):
        load_sweep(tmp_path / "sweep_viladiff.toml")


def finalist(role: str, trial: int, values: list[float | None]) -> tuple[Finalist, dict[str, Any]]:
    runs = {seed: PlannedRun(f"{role}-{seed}", {}, "", 4, {}) for seed in (1, 2, 3)}
    records = {
        f"{role}-{seed}": SimpleNamespace(miou=value)
        for seed, value in zip((1, 2, 3), values, strict=True)
        if value is not None
    }
    roles: Any = tuple(role.split(" and "))
    return Finalist(roles, trial, {"method.pseudo.threshold": trial / 10}, runs), records


def test_chosen_is_the_highest_mean_on_fresh_seeds_once_all_are_there() -> None:
    best, a = finalist("winner", 7, [0.60, 0.62, 0.61])
    paper, b = finalist("paper", 0, [0.58, 0.60, 0.59])
    second, c = finalist("runner-up", 4, [0.63, 0.62, 0.64])
    found, records = [best, paper, second], {**a, **b, **c}
    assert chosen(found, records) is second and chosen([], {}) is None
    assert chosen(found, {name: one for name, one in records.items() if name != "paper-2"}) is None
    same, d = finalist("paper", 0, [0.63, 0.62, 0.64])
    assert chosen([best, second, same], {**records, **d}) is same, "of equal ones the first reading"
    assert compare_finalists(found, records) == [] and len(compare_finalists(found, records, 3)) == 2
    assert sum("against" in line for line in said(found, records, 3)) == 2
    assert not any("against" in line for line in said(found, records, 5))


def test_a_row_of_the_page_has_the_first_point_beside_the_chosen_one() -> None:
    sweep = load_sweep(TUNE / "sweep_viladiff.toml")
    best, a = finalist("winner", 7, [0.60, 0.62, 0.61])
    paper, b = finalist("paper", 0, [0.58, 0.60, 0.59])
    trials: Any = [
        SimpleNamespace(origin="paper", value=0.57, state="complete"),
        SimpleNamespace(origin="tpe", value=0.61, state="complete"),
        SimpleNamespace(origin="tpe", value=None, state="failed"),
    ]
    job: Any = SimpleNamespace(sweep=sweep, trials=12)
    row = _tuned(job, trials, [best, paper], {**a, **b})
    assert (row.wanted, row.complete, row.first_trial) == (12, 2, "57.0")
    assert (row.first, row.chosen, row.kept) == ("59.0 ± 1.0 (3)", "61.0 ± 1.0 (3)", False)
    assert row.point == best.point
    none = _tuned(job, [], [], {})
    assert (none.complete, none.first_trial, none.first, none.chosen, none.point) == (0, "—", "—", "—", {})


def test_the_page_lists_every_method_and_calls_nothing_a_result(tmp_path: Path) -> None:
    sweep = load_sweep(TUNE / "sweep_lambda.toml")
    point = {"method.pseudo.threshold": 0.7}
    rows = (
        Tuned("The <reading>", 12, 12, "57.0", "59.0 ± 1.0 (3)", "61.0 ± 1.0 (3)", point, False),
        Tuned("SemiVL, tuned as ViLaDiff is", 12, 3, "50.0", "—", "—", {}, False),
    )
    mine = sweep.model_copy(update={"finals_split": "dev"})
    text = render_sweep(shown(mine, lambdas(), tuned=rows), tmp_path / "dev").read_text()
    section = Page(text).said["tuned"]
    for word in ("The <reading>", "57.0", "59.0 ± 1.0 (3)", "61.0 ± 1.0 (3)", "threshold = 0.7", "not chosen yet"):
        assert word in section
    assert "none of them is a result" in text and "the reported set was not looked at" in text
    assert (tmp_path / "dev" / "chosen.toml").read_text() == '"method.vila.lam" = 0.6\n'
    plain = render_sweep(shown(sweep, lambdas()), tmp_path / "test").read_text()
    assert not (tmp_path / "test" / "chosen.toml").exists()
    assert 'id="tuned"' not in plain and "these scores alone are quoted" in plain
    assert "the reported set was looked at for the finalists alone" in plain
