"""From a table's file to its page: what is asked for is checked first, what is done is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from record_kit import content_of, made

from viladiff.cli.tables import table_parser
from viladiff.experiments import publish, tables
from viladiff.report.table.results import CEILING
from viladiff.runs.job import ExecutionSettings, Outcome, PlannedRun
from viladiff.runs.record import save_record
from viladiff.runs.store import Failure, Store

EXAMPLE = made("supervised-92-0")
ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "ablations" / "table5.toml"


def job(tmp_path: Path, *words: str) -> tables.TableJob:
    args = table_parser(TABLE, "t").parse_args(
        ["--runs-dir", str(tmp_path / "runs"), "--report-dir", str(tmp_path / "page"), *words]
    )
    return tables.plan_table(TABLE, args, "python ablations/run_table5.py")


def test_a_plan_holds_what_was_asked_for(tmp_path: Path) -> None:
    found = job(
        tmp_path, "--scale", "smoke", "--rows", "1", "8", "--columns", "1", "--seeds", "2", "--", "train.steps=3"
    )
    assert len(found.plan.runs) == 4
    assert {run.steps for run in found.plan.runs.values()} == {3}
    assert {run.changes["runtime.scale"] for run in found.plan.runs.values()} == {"smoke"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "quik"], "quick"),
        (["--rows", "9000"], "9000"),
        (["--seeds", "0"], "--seeds 0"),
        (["--seeds", "many"], "--seeds many"),
        (["--", "train.step=3"], "train.steps"),
        (["--encoder", "digits_vit", "--", "method.mixe.beta=2"], "method.mixe.beta"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_said_before_anything_runs(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(tmp_path, *words)


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for words in (["--restart", "--render"], ["--publish"], ["--publish", "--scale", "digits", "--rows", "1"]):
        args = table_parser(TABLE, "t").parse_args(["--runs-dir", str(tmp_path), *words])
        with pytest.raises(ValueError, match=words[0]):
            tables.run_table(TABLE, args, "t")


def test_the_command_can_be_pasted_and_its_printed_form_names_no_directory() -> None:
    command = tables.shell_command(
        "python ablations/run_table5.py", ["--rows", "ViLa + q_G", "--restart", "--runs-dir", "/me/a/runs"]
    )
    assert command == "python ablations/run_table5.py --rows 'ViLa + q_G' --runs-dir /me/a/runs"
    assert tables.public_command(command) == "python ablations/run_table5.py --rows 'ViLa + q_G' --runs-dir …/runs"
    assert (
        tables.public_command("x -- runtime.data_root=/data/voc --report-dir ~/p/q")
        == "x -- runtime.data_root=…/voc --report-dir …/q"
    )


def put(found: tables.TableJob, value: Callable[[PlannedRun], float] = lambda run: 0.5) -> None:
    """A record for every run of a job."""
    for run in found.plan.runs.values():
        record = type(EXAMPLE)(**{**EXAMPLE.model_dump(), **content_of(run), "miou": value(run)})
        found.store.directory(run.run_id).mkdir(parents=True)
        save_record(record, found.store.directory(run.run_id) / "record.json")


def test_seeds_are_a_number_or_a_list() -> None:
    assert tables.seeds_of("3") == (0, 1, 2)
    assert tables.seeds_of("4,7") == (4, 7)
    assert tables.seeds_of(None) is None


def test_only_the_first_seed_keeps_pictures(tmp_path: Path) -> None:
    found = job(tmp_path, "--scale", "smoke", "--rows", "8", "--columns", "1", "--seeds", "2,5")
    extras = [tables._with_extras(found, run).changes for run in found.plan.runs.values()]
    assert [one.get("runtime.visualizations") for one in extras] == [tables.PICTURES, None]
    assert all(one["runtime.log_every"] == 10 for one in extras)


def test_nothing_left_to_run_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viladiff.cluster.executor.run_jobs", lambda *given: pytest.fail("Ray was asked"))
    found = job(tmp_path, "--scale", "digits", "--rows", "1", "--columns", "1", "--seeds", "1")
    put(found)
    assert tables.run_missing(found, ExecutionSettings()) == []


@pytest.mark.parametrize(
    ("words", "gpus", "said"),
    [
        ([], 0, ["2 runs", "8 at once, 1 thread each"]),
        (["--max-concurrent", "3"], 0, ["3 at once, 1 thread each"]),
        (["--workers", "2"], 0, ["4 at once, 2 workers with 1 thread each"]),
        ([], 2, ["2 at once", "2 GPUs here, one for each run; --gpus-per-trial says otherwise"]),
        (["--gpus-per-trial", "0.5"], 2, ["4 at once"]),
        (["--address", "auto"], 0, ["as many at once as the cluster can run", "of sequential work"]),
        (["--address", "auto", "--max-concurrent", "5"], 0, ["5 at once"]),
    ],
    ids=str,
)
def test_dry_run_says_what_would_go_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    gpus: int,
    said: list[str],
) -> None:
    monkeypatch.setattr("viladiff.cluster.resources.visible_cpus", lambda: 8)
    monkeypatch.setattr("viladiff.cluster.resources.visible_gpus", lambda: gpus)
    what = ["--scale", "smoke", "--rows", "1", "8", "--columns", "1", "--seeds", "1", "--runs-dir", str(tmp_path)]
    assert tables.run_table(TABLE, table_parser(TABLE, "t").parse_args([*what, "--dry-run", *words]), "t") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [one for one in said if one not in text] == []


def test_a_control_has_the_letter_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--scale", "smoke", "--rows", "8", "a", "--columns", "1", "--seeds", "1", "--runs-dir", str(tmp_path)]
    assert tables.run_table(TABLE, table_parser(TABLE, "t").parse_args([*words, "--dry-run"]), "t") == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["8", "ViLaDiff"] in lines and ["a", "supervised"] in lines
    with pytest.raises(ValueError, match="rows = 9: no such number"):
        tables.run_table(TABLE, table_parser(TABLE, "t").parse_args([*words, "--dry-run", "--rows", "9"]), "t")


def test_what_a_second_ctrl_c_leaves_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = job(tmp_path, "--scale", "smoke", "--rows", "1", "--columns", "1", "--seeds", "1")
    run_id = next(iter(found.plan.runs))
    gone = subprocess.Popen(["true"])
    gone.wait()

    def ended(jobs: object, store: Store, *rest: object) -> None:
        directory = store.directory(run_id)
        directory.mkdir(parents=True)
        (directory / f".checkpoint.pt.{gone.pid}.tmp").write_bytes(b"half")
        os.utime(directory / f".checkpoint.pt.{gone.pid}.tmp", (1, 1))
        raise KeyboardInterrupt

    monkeypatch.setattr("viladiff.cluster.executor.run_jobs", ended)
    words = ["--scale", "smoke", "--rows", "1", "--columns", "1", "--seeds", "1", "--runs-dir", str(tmp_path / "runs")]
    with pytest.raises(KeyboardInterrupt):
        tables.run_table(
            TABLE, table_parser(TABLE, "t").parse_args([*words, "--report-dir", str(tmp_path / "page")]), "t"
        )
    assert list(found.store.directory(run_id).iterdir()) == []


def test_a_page_is_rewritten_beside_the_runs_and_survives_its_own_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "REWRITE", 0.01)
    calls, twice = [], threading.Event()

    def write() -> None:
        calls.append(time.monotonic())
        if len(calls) == 2:
            twice.set()
            raise OSError("disk full")

    with tables.PageWriter(write) as pages:
        while not calls:
            time.sleep(0.01)
        pages.dirty.set()
        assert twice.wait(10)
    assert "disk full" in capsys.readouterr().err
    assert not pages.thread.is_alive()


def test_exit_status_tells_failed_and_stopped_runs_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = job(tmp_path, "--scale", "smoke", "--rows", "1", "--columns", "1", "--seeds", "1")
    run_id = next(iter(found.plan.runs))
    index = tmp_path / "page" / "index.html"
    index.parent.mkdir()
    (index.parent / "table.md").write_text("# Table\n\nfinding\n\n## rest\n")
    failure = Failure(kind="nan", message="the loss is nan", step=3, attempts=1, when="now")
    assert tables.print_summary(found, [Outcome(run_id, "failed", failure)], index) == 1
    assert "SemiBaseline, 1/8 (183), seed 0: the loss is nan" in capsys.readouterr().err
    assert tables.print_summary(found, [Outcome(run_id, "stopped")], index) == 130
    assert "python ablations/run_table5.py" in capsys.readouterr().err
    assert tables.print_summary(found, [Outcome(run_id, "done")], index) == 0


def test_a_plan_with_names_of_old_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--scale", "smoke", "--rows", "1", "--columns", "1", "--seeds", "1"]
    found = job(tmp_path, *words)
    index = tmp_path / "page" / "index.html"
    index.parent.mkdir()
    (index.parent / "table.md").write_text("# Table\n")
    assert found.plan.file is not None and found.plan.file.is_file()
    for kind, there in (("nan", True), ("stale", False)):
        failure = Failure.model_validate({"kind": kind, "message": "m", "step": 3, "attempts": 1, "when": "now"})
        tables.print_summary(found, [Outcome(next(iter(found.plan.runs)), "failed", failure)], index)
        assert found.plan.file.exists() is there
    assert "re-run to plan again" in capsys.readouterr().err
    assert job(tmp_path, *words).plan == found.plan and found.plan.file.exists()


def test_fresh_sets_older_runs_aside_and_deletes_nothing(tmp_path: Path) -> None:
    found = job(tmp_path, "--scale", "smoke", "--rows", "1", "--columns", "1", "--seeds", "1")
    run_id = next(iter(found.plan.runs))
    old = found.store.directory(run_id)
    old.mkdir(parents=True)
    (old / "steps.jsonl").write_text("{}\n")
    tables._set_aside(found)
    assert not any(old.iterdir())
    assert [path.name for path in (tmp_path / "runs" / "replaced").glob(f"*/{run_id}/*")] == ["steps.jsonl"]


def test_a_frame_counts_seeds_and_lets_rows_be_compared_within_a_seed(tmp_path: Path) -> None:
    some = job(tmp_path, "--scale", "digits", "--rows", "1", "5", "--columns", "1", "2", "--seeds", "2")
    put(some, lambda run: 0.4 + 0.05 * list(some.plan.runs).index(run.run_id))
    tmp_path = some.store.root
    wide = tables.table(5, "digits", runs_dir=str(tmp_path))
    lines = tables.table(5, "digits", runs_dir=str(tmp_path), long_form=True)
    done = lines[lines["state"] == "done"]
    marked = done["row"] + f" ({CEILING})"  # the long form has a column of its own for that
    done = done.assign(row=done["row"].where(~done["ceiling"].astype(bool), marked))
    column = done["column"].iloc[0]
    counts = done[done["column"] == column].groupby("row")["seed"].nunique()
    assert {row: n for row, n in wide[(column, "n")].items() if n} == counts.to_dict()
    by_seed = done[done["column"] == column].pivot(index="seed", columns="row", values="miou")
    assert by_seed.mean().round(9).to_dict() == wide[(column, "mean")].dropna().round(9).to_dict()
    assert not (tmp_path / "damaged").exists()


def test_a_table_is_found_by_number_name_and_path() -> None:
    assert tables.find_table(5) == tables.find_table("5") == tables.find_table("table5") == TABLE
    assert tables.find_table(TABLE) == TABLE
    with pytest.raises(ValueError, match="table5"):
        tables.find_table(99)


def test_published_runs_are_thin_and_read_back(tmp_path: Path) -> None:
    found = job(tmp_path, "--scale", "smoke", "--rows", "1", "--columns", "1", "--seeds", "1")
    run_id = next(iter(found.plan.runs))
    some = EXAMPLE
    directory = found.store.directory(run_id)
    directory.mkdir(parents=True)
    content = content_of(found.plan.runs[run_id], **{"runtime.runs_dir": "/somewhere"})
    save_record(type(some)(**{**some.model_dump(), **content}), directory / "record.json")
    rows = [{"step": step, "total": float(step)} for step in range(100)]
    (directory / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "published" / "table5"
    assert len(publish.publish(found.plan, found.store, out)) == 1
    layer = Store(tmp_path / "none", [tmp_path / "published"])
    record = layer.get(run_id)
    assert record is not None and record.miou == some.miou and "/somewhere" not in record.model_dump_json()
    log = layer.file(run_id, "steps.jsonl")
    assert log is not None
    thin = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(thin) <= publish.POINTS and thin[0] == {"step": 3, "total": 1.5} and thin[-1]["step"] == 99
    again = Store(found.store.root, [tmp_path / "published"])
    assert publish.publish(found.plan, again, out) == []


def test_a_plan_that_was_made_before_is_rendered_without_torch(tmp_path: Path) -> None:
    words = ["--scale", "smoke", "--rows", "1", "--columns", "1", "--runs-dir", str(tmp_path / "runs")]
    job(tmp_path, *words)  # makes the plan
    code = f"""
import sys
from pathlib import Path
from viladiff.cli import tables
status = tables.main(Path({str(TABLE)!r}), {[*words, "--render", "--report-dir", str(tmp_path / "page")]!r}, "t")
assert not any(name in sys.modules for name in ("torch", "ray", "viladiff.runs.config")), "too much was imported"
raise SystemExit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page" / "index.html").is_file()


def test_planned_runs_keep_their_names(tmp_path: Path) -> None:
    """Pictures and logs are not part of what a run is."""
    from viladiff.runs.config import RunConfig, override
    from viladiff.training.trainer import Trainer

    found = job(tmp_path, "--scale", "smoke", "--rows", "8", "--columns", "1", "--seeds", "1")
    one: PlannedRun = tables._with_extras(found, next(iter(found.plan.runs.values())))
    assert Trainer(override(RunConfig(), one.changes)).name == one.run_id


def test_runs_start_in_the_order_of_the_scales_rows(tmp_path: Path) -> None:
    """The longest first, so that two at once end together."""
    quick = job(tmp_path, "--scale", "quick").plan
    rows = {cell.run_id: quick.table.rows[cell.row].label for cell in quick.cells}
    assert [rows[run.run_id] for run in tables.in_order_of_scale(quick)] == [
        "ViLaDiff", "ViLa", "SemiBaseline", "supervised",
    ]  # fmt: skip
    smoke = job(tmp_path, "--scale", "smoke", "--seeds", "1").plan
    assert tables.in_order_of_scale(smoke) == list(smoke.runs.values())
