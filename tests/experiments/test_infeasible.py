"""A plan's rows that cannot run are listed before the first run starts; each distinct network is tried once."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from viladiff.cli.main import main
from viladiff.cli.tables import table_parser
from viladiff.experiments import tables
from viladiff.experiments.infeasible import infeasible, refuse_rows
from viladiff.runs.config import RunConfig, non_default_fields, override
from viladiff.runs.job import DataFacts, PlannedRun
from viladiff.training import feasibility

TABLE = Path(__file__).resolve().parents[2] / "ablations" / "table5.toml"
FACTS = DataFacts(21, 1000, True)


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was tried, in a cache of the test's own; a crop of 320 is told to be a fault."""
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    found: list[str] = []

    def note(cfg: RunConfig, data: DataFacts) -> list[str]:
        found.append(f"{cfg.method.name} {cfg.model.encoder} {cfg.data.crop} {data.classes}")
        return [f"data.crop = {cfg.data.crop}: no"] if cfg.data.crop == 320 else []

    monkeypatch.setattr(feasibility, "try_on_meta", note)
    return found


def planned(place: int, facts: DataFacts = FACTS, **changes: object) -> PlannedRun:
    given = {"data.dataset": "voc", "data.split": "92", "model.pretrained": "none", "seed": place, **changes}
    given = {name.replace("__", "."): value for name, value in given.items()}
    fields = {path: x for path, x in non_default_fields(override(RunConfig(), given)).items() if path[:8] != "runtime."}
    return PlannedRun(f"{place:016x}", given, f"run {place}", 10, fields, data=facts)


def test_fifty_cells_cost_a_check_for_each_distinct_combination(tried: list[str]) -> None:
    runs = []
    for place in range(50):
        method = ("supervised", "fixmatch")[place % 2]
        crop, split = (320, 512)[place // 2 % 2], ("92", "183", "366")[place % 3]
        runs.append(planned(place, method__name=method, data__crop=crop, data__split=split))
    found = infeasible(runs)
    assert len(tried) == len(set(tried)) == 4
    assert set(found) == {run.run_id for run in runs if run.changes["data.crop"] == 320}
    assert infeasible(runs) == found and len(tried) == 4, "kept for the next start"
    infeasible([planned(0, FACTS._replace(classes=5)), planned(1, model__encoder="resnet18")])
    assert len(tried) == 6


def test_plans_for_other_machines_take_it_that_these_have_gpus(
    tried: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(cfg: RunConfig, data: DataFacts) -> list[str]:
        tried.append(cfg.runtime.device)
        return []

    monkeypatch.setattr(feasibility, "try_on_meta", note)
    for workers, device, fetch in ((2, "auto", False), (2, "auto", None), (2, "cpu", None), (1, "auto", None)):
        run = planned(0, runtime__workers=workers, runtime__device=device)
        infeasible([replace(run, workers=workers)], fetch)
    assert tried == ["auto", "cuda", "auto"], "on a CPU two workers of both kinds are one combination"


def test_runs_without_known_data_are_left_to_their_start(tried: list[str]) -> None:
    assert infeasible([replace(planned(0, data__crop=320), data=None)]) == {} and tried == []


def test_a_plan_of_embedded_data_tries_nothing(tried: list[str], tmp_path: Path) -> None:
    words = ["--scale", "smoke", "--seeds", "1", "--runs-dir", str(tmp_path / "runs"), "--dry-run"]
    assert main(["table", "5", *words]) == 0 and tried == []


def test_rows_are_listed_and_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Patches of 8 pixels cut no crop of 20; a method of labelled images alone may do with it."""
    ran = []
    monkeypatch.setattr(tables, "run_missing", lambda job, settings: ran.append(len(job.plan.runs)) or [])
    monkeypatch.setattr(tables, "print_summary", lambda *given: 0)
    monkeypatch.setattr(tables, "write_table_page", lambda *given: tmp_path)
    words = ["table", "5", "--scale", "smoke", "--seeds", "1", "--columns", "1", "2", "--runs-dir", str(tmp_path)]
    for more in (["--dry-run"], []):
        assert main([*words, *more, "data.crop=20", "--rows", "a", "8"]) == 2
        told = capsys.readouterr().err.splitlines()
        assert told[0] == "error: these rows cannot run:" and len(told) == 3
        assert told[1].startswith("error: row 8 'ViLaDiff': data.crop = 20: must be a multiple of the patch")
        assert told[2].startswith("error: 1 rows can run: --rows ")
    assert ran == []
    rest = told[2].rpartition(" ")[2]
    assert main([*words, "data.crop=20", "--rows", rest]) == 0 and ran == [2]


def test_a_row_that_fails_in_some_columns_names_them(tmp_path: Path, tried: list[str]) -> None:
    args = table_parser(TABLE, "t").parse_args(
        ["--scale", "smoke", "--seeds", "1", "--rows", "1", "8", "--columns", "1", "2", "--runs-dir", str(tmp_path)]
    )
    plan = tables.plan_table(TABLE, args, "t").plan
    run_id = plan.run_ids(plan.rows[1], plan.columns[1])[0]
    bad = replace(planned(0, data__crop=320), run_id=run_id)
    label = plan.table.columns[plan.columns[1]].label
    with pytest.raises(ValueError) as refused:
        refuse_rows(plan, [bad])
    lines = str(refused.value).splitlines()
    assert lines[1] == f"row 8 'ViLaDiff', {label}: data.crop = 320: no" and "1 rows can run: --rows 1" in lines[2]


def test_stored_results_are_read_without_torch(tmp_path: Path, tried: list[str]) -> None:
    import subprocess

    runs = [planned(place, data__crop=320) for place in range(3)]
    infeasible(runs)
    code = (
        "import sys; from viladiff.experiments.infeasible import infeasible; from viladiff.runs.job import *; "
        f"run = PlannedRun('a', {{}}, '', 1, {runs[0].changed!r}, data={FACTS!r}); "
        "assert infeasible([run])['a'] == ['data.crop = 320: no']; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_sweep_is_refused_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "lambda", "--scale", "smoke", "--runs-dir", str(tmp_path / "runs")]
    for more in (["--dry-run"], []):
        assert main([*words, *more, "data.crop=20"]) == 2
        assert "error: data.crop = 20: must be a multiple of the patch" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "sweeps").exists()
