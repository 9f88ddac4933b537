"""Trackers get each step and each evaluation of a run once, as its record has them, however often it is interrupted."""

from __future__ import annotations

import json
import math
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from viladiff.cluster.executor import run_jobs
from viladiff.runs.checkpoint import StepLog
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import ExecutionSettings, PlannedRun
from viladiff.runs.record import RunRecord
from viladiff.runs.store import Store
from viladiff.trackers import weights_and_biases
from viladiff.trackers.base import Callback, RunInfo, scalars
from viladiff.trackers.build import TRACKERS
from viladiff.trackers.weights_and_biases import WeightsAndBiases
from viladiff.training.trainer import Trainer, fit

ROOT = Path(__file__).resolve().parents[2]
STEPS, KEPT = 8, 3
SHORT: dict[str, object] = {
    "method.name": "semibaseline",
    "data.batch_labelled": 4,
    "train.steps": STEPS,
    "eval.max_images": 5,
    "eval.every_steps": 3,
    "eval.boundary": False,
    "runtime.threads": 1,
    "runtime.log_every": 1,
    "runtime.checkpoint_every": KEPT,
    "runtime.progress": False,
}


class KilledError(Exception):
    """Ends a run at once, as a kill does, after steps that no checkpoint has."""


class Memory(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def on_start(self, run: RunInfo) -> None:
        self.told.append(("start", run.step))
        self.info = run

    def on_log(self, rows: Sequence[Mapping[str, float]]) -> None:
        self.told += [("row", dict(row)) for row in rows]

    def on_evaluation(self, step: int, miou: float | None) -> None:
        self.told.append(("evaluation", (step, miou)))

    def on_end(self, record: RunRecord | None) -> None:
        self.told.append(("end", record))


def kill_at(step: int) -> Any:
    def report(update: dict[str, Any]) -> None:
        if update["step"] == step and "evaluating" not in update:
            raise KilledError

    return report


def interrupted(out: Path, **fields: object) -> tuple[Path, RunRecord]:
    """A run that is ended at once after its second, fifth and seventh step; checkpoints are at 3 and 6."""
    cfg = override(RunConfig(), {**SHORT, **fields, "runtime.runs_dir": str(out)})
    for step in (2, 5, 7):
        with pytest.raises(KilledError):
            fit(cfg, report=kill_at(step))
    found = fit(cfg)
    return found.directory, found.record


def expected(directory: Path, record: RunRecord) -> dict[str, list[tuple[int, float]]]:
    """What a tracker should have: each term by step from the log, mIoU by step from the record."""
    rows = StepLog(directory / "steps.jsonl").read()
    assert [row["step"] for row in rows] == list(range(STEPS))
    found = {name: [(row["step"], row[name]) for row in rows] for name in rows[0] if name != "step"}
    found["miou"] = [(entry["step"], entry["miou"]) for entry in record.history]
    assert [step for step, _ in found["miou"]] == [3, 6, 8]
    return found


def test_a_callback_follows_a_run_from_leg_to_leg(tmp_path: Path) -> None:
    cfg = override(RunConfig(), {**SHORT, "runtime.runs_dir": str(tmp_path)})
    first, second = Memory(), Memory()
    with pytest.raises(KilledError):
        fit(cfg, report=kill_at(5), callbacks=[first])
    found = fit(cfg, callbacks=[second])
    want = expected(found.directory, found.record)
    assert [kind for kind, _ in first.told] == ["start", *["row"] * 3, "evaluation", *["row"] * 2, "end"]
    assert first.told[0] == ("start", 0) and first.told[-1] == ("end", None)
    assert second.told[0] == ("start", KEPT) and second.told[-1][0] == "end"
    assert second.told[-1][1].run_id == found.record.run_id and scalars(second.told[-1][1]) == scalars(found.record)
    rows = [row for kind, row in second.told if kind == "row"]
    assert [row["step"] for row in rows] == list(range(KEPT, STEPS))
    for name in ("total", "lr"):
        assert [(row["step"], row[name]) for row in rows] == want[name][KEPT:]
    assert [told for kind, told in second.told if kind == "evaluation"] == want["miou"][1:2]
    assert second.info.evaluations == found.record.history[:1] and second.info.name == found.record.run_id
    assert not any(str(tmp_path) in str(value) for value in second.info.config.values())
    fit(cfg, callbacks=[third := Memory()])
    assert third.told == []  # finished: nothing to follow


def test_callbacks_do_not_change_a_run_and_their_errors_are_the_callers(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_log(self, rows: Sequence[Mapping[str, float]]) -> None:
            raise ZeroDivisionError("mine")

    cfg = override(RunConfig(), {**SHORT, "runtime.runs_dir": str(tmp_path / "a")})
    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(cfg, callbacks=[Broken()])
    followed = fit(cfg, callbacks=[Memory()]).record
    alone = fit(override(cfg, {"runtime.runs_dir": str(tmp_path / "b")})).record
    assert followed.scores == alone.scores and followed.history == alone.history
    with pytest.raises(ValueError, match="callbacks: cannot be sent to other processes"):
        fit(override(cfg, {"runtime.workers": 2}), callbacks=[Memory()])


def test_a_restart_that_cannot_begin_leaves_the_old_run(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_start(self, run: RunInfo) -> None:
            raise ZeroDivisionError("mine")

    cfg = override(RunConfig(), {**SHORT, "runtime.runs_dir": str(tmp_path)})
    directory = fit(cfg).directory
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert {"record.json", "checkpoint.pt", "steps.jsonl"} <= {*before}
    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(cfg, callbacks=[Broken()], resume=False)
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before
    memory = Memory()
    again = fit(cfg, callbacks=[memory], resume=False).record
    assert memory.told[0] == ("start", 0) and len([kind for kind, _ in memory.told if kind == "row"]) == STEPS
    assert again.finished >= json.loads(before["record.json"])["finished"] and again.history == fit(cfg).record.history
    assert len(StepLog(directory / "steps.jsonl").read()) == STEPS


def test_all_are_told_the_end_once_whoever_raises(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_end(self, record: RunRecord | None) -> None:
            raise ZeroDivisionError("mine")

    cfg = override(RunConfig(), {**SHORT, "runtime.runs_dir": str(tmp_path)})
    before, after = Memory(), Memory()
    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(cfg, callbacks=[before, Broken(), after])
    for memory in (before, after):
        ends = [told for kind, told in memory.told if kind == "end"]
        assert len(ends) == 1 and ends[0] is not None and ends[0].steps == STEPS


def test_a_tracker_that_fails_on_the_way_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def fails(self: object, rows: object) -> None:
        calls.append(rows)
        raise OSError("no space\nleft")

    monkeypatch.setattr("viladiff.trackers.tensorboard.TensorBoard.on_log", fails)
    cfg = override(RunConfig(), {**SHORT, "runtime.runs_dir": str(tmp_path), "runtime.tensorboard": True})
    assert fit(cfg).record.steps == STEPS and len(calls) == 1
    assert capsys.readouterr().err.count("note: TensorBoard is left out from here on: no space left\n") == 1


def test_tensorboard_has_each_point_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    directory, record = interrupted(tmp_path, **{"runtime.tensorboard": True})
    found = accumulator.EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    want = expected(directory, record)
    final = {name: [(STEPS, value)] for name, value in scalars(record).items() if name != "miou"}
    assert {*found.Tags()["scalars"]} == {*want, *final}
    for name, points in {**want, **final}.items():
        read = [(event.step, event.value) for event in found.Scalars(name)]
        assert read == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name


def packed_records(path: Path) -> Iterator[bytes]:
    """Read W&B's file: a header of 7 bytes, then LevelDB's log, pieces in blocks of 32 KiB."""
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for the head of a piece
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])  # kind: whole, first, middle, last
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def history(leg: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and the summary in an offline folder of Weights & Biases."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = leg.glob("run-*.wandb")
    rows, summary = [], {}
    for data in packed_records(file):
        packed = Record()
        packed.ParseFromString(data)
        read = lambda items: {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}  # noqa: E731
        if packed.HasField("history"):
            rows.append(read(packed.history.item))
        if packed.HasField("summary"):
            summary |= read(packed.summary.update)
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows], summary


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "own"))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def compare_rows(directory: Path, record: RunRecord) -> dict[str, Any]:
    (leg,) = (directory / "wandb").glob("offline-run-*")
    (data,) = (path.read_bytes() for path in leg.glob("run-*.wandb"))
    for told in ("site-packages", str(ROOT), sys.executable, socket.gethostname()):
        assert told.encode() not in data
    assert leg.name.endswith(record.run_id)
    rows, summary = history(leg)
    want = expected(directory, record)
    for name, points in want.items():
        assert [(row["step"], row[name]) for row in rows if name in row] == points, name
    assert len(rows) == STEPS + len(want["miou"])
    assert summary["miou"] == record.miou and summary["complete"] is True
    name = f"{record.network}/{record.stream}/miou"
    assert summary[name] == scalars(record)[name]
    return summary


@pytest.mark.usefixtures("offline")
def test_weights_and_biases_has_each_row_once(tmp_path: Path) -> None:
    compare_rows(*interrupted(tmp_path / "runs", **{"runtime.wandb": True}))


class Hub:
    """What W&B keeps of one run, and the part of its library that is used, online."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        self.offline, self.dir = False, "."

    def init(self, **given: Any) -> Hub:
        self.asked = given
        return self

    @property
    def step(self) -> int:
        return len(self.rows)

    def Settings(self, **given: Any) -> None: ...
    def define_metric(self, name: str, step_metric: str) -> None: ...
    def finish(self) -> None: ...
    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def test_online_a_leg_sends_what_is_missing_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in that counts rows as W&B does; the real one was never reached from a test."""
    hub = Hub()
    monkeypatch.setitem(sys.modules, "wandb", hub)
    directory, record = interrupted(tmp_path, **{"runtime.wandb": True, "runtime.group": "table5 digits"})
    want = expected(directory, record)
    for name, points in want.items():
        assert [(row["step"], row[name]) for row in hub.rows if name in row] == points
    assert hub.asked["id"] == record.run_id and hub.asked["resume"] == "allow" and hub.asked["project"] == "viladiff"
    assert hub.asked["group"] == "table5 digits" and hub.summary["complete"] is True
    assert not any(str(tmp_path) in str(value) for value in hub.asked["config"].values())


def test_rows_that_never_arrived_are_sent_by_the_next_leg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "wandb", hub)
    rows = [{"step": i, "total": i / 2} for i in range(6)]
    evaluations = [{"step": 2, "miou": 0.5}, {"step": 4, "miou": None}, {"step": 6, "miou": 0.75}]
    in_order = [*rows[:2], evaluations[0], *rows[2:4], {"step": 4}, *rows[4:], evaluations[2]]
    for arrived in range(len(in_order) + 2):
        hub.rows = in_order[:arrived]
        tracker = WeightsAndBiases()
        tracker.on_start(RunInfo("run", tmp_path, "", "", {}, 6, lambda: rows, evaluations))
        assert hub.rows == in_order and tracker.skip == 0
    hub.rows = [*in_order, {"step": 6, "total": 3.0}]  # a step that the checkpoint has not
    tracker.on_start(RunInfo("run", tmp_path, "", "", {}, 6, lambda: rows, evaluations))
    tracker.on_log([{"step": 6, "total": 3.0}, {"step": 7, "total": 3.5}])
    assert [row["step"] for row in hub.rows[-2:]] == [6, 7]


def test_the_flag_of_tables_and_sweeps_knows_each_tracker() -> None:
    text = (ROOT / "tests" / "cli" / "help.txt").read_text(encoding="utf-8")
    assert f"--track {{{','.join(TRACKERS)}}}" in " ".join(text.split())


@pytest.mark.parametrize("name", [*TRACKERS])
def test_a_tracker_that_is_not_there_is_said_before_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    cfg = override(RunConfig(), {**SHORT, "runtime.runs_dir": str(tmp_path), f"runtime.{name}": True})
    said = rf"runtime.{name} = true: the package {name} is not installed; pip install 'viladiff\[trackers\]'"
    with pytest.raises(ValueError, match=said):
        fit(cfg)
    assert not list(tmp_path.glob("*/steps.jsonl"))


@pytest.mark.usefixtures("offline")
def test_without_an_account_the_line_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fails(**given: Any) -> None:
        raise wandb.Error("no API key configured.\nUse wandb login")

    monkeypatch.setattr(wandb, "init", fails)
    cfg = override(RunConfig(), {**SHORT, "runtime.runs_dir": str(tmp_path), "runtime.wandb": True})
    with pytest.raises(ValueError, match=r"configured. Use wandb login; WANDB_MODE=offline needs no account"):
        fit(cfg)


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("offline")
def test_the_runs_of_a_table_are_tracked_as_a_group(tmp_path: Path) -> None:
    """What ``--track`` of tables and sweeps sets, on a real Ray."""
    jobs = []
    for seed in (0, 1):
        changes = {name: value for name, value in SHORT.items() if name != "runtime.progress"} | {"seed": seed}
        run_id = Trainer(override(RunConfig(), changes)).name
        jobs.append(PlannedRun(run_id=run_id, changes=changes, title=f"seed {seed}", steps=STEPS, changed={}))
    store = Store(tmp_path / "runs")
    settings = ExecutionSettings(track=("tensorboard", "wandb"), group="table5 smoke")
    assert [found.state for found in run_jobs(jobs, store, settings, lambda event: None)] == ["done", "done"]
    for job in jobs:
        record = store.get(job.run_id)
        assert record is not None and record.config["runtime.group"] == "table5 smoke"
        compare_rows(store.root / job.run_id, record)
        assert any((store.root / job.run_id / "tensorboard").iterdir())


@pytest.mark.slow
def test_the_example_of_the_documentation_follows_a_run_in_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    page = (ROOT / "docs" / "trackers.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?mlflow.*?)```", page, re.S)
    assert len(example.splitlines()) <= 40
    script = tmp_path / "follow.py"
    monkeypatch.chdir(tmp_path)
    words = [f"{name}={value}" for name, value in SHORT.items()] + ["runtime.runs_dir=runs"]
    end = "\ndef stop(update):\n    assert update['step'] != 3 or 'evaluating' in update, 'killed'\n\n\nfit("
    killed = example.replace("\nfit(", end).replace("callbacks=", "report=stop, callbacks=")
    for text, said in ((killed, "killed"), (example, "")):  # after an evaluation that no checkpoint has
        script.write_text(text, encoding="utf-8")
        command = [sys.executable, str(script), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**_environment()})
        assert done.returncode == bool(said) and said in done.stderr, done.stderr[-2000:]
    (directory,) = (path.parent for path in (tmp_path / "runs").glob("*/record.json"))
    record = RunRecord.model_validate_json((directory / "record.json").read_text(encoding="utf-8"))
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("viladiff").experiment_id])  # type: ignore[union-attr]
    assert found.data.tags["mlflow.runName"] == record.run_id and found.info.status == "FINISHED"
    for name, points in expected(directory, record).items():
        read = [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, name)]
        assert read == points, name


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "GIT_PYTHON_REFRESH": "quiet"}


def test_in_order_is_the_order_of_a_run_without_interruption(tmp_path: Path) -> None:
    memory = Memory()
    cfg = override(RunConfig(), {**SHORT, "runtime.runs_dir": str(tmp_path)})
    found = fit(cfg, callbacks=[memory])
    sent = [
        {"step": told[0], "miou": told[1]} if kind == "evaluation" else told
        for kind, told in memory.told
        if kind in ("row", "evaluation")
    ]
    log, evaluations = StepLog(found.directory / "steps.jsonl").read(), found.record.history[:-1]
    assert [*weights_and_biases._in_order(log, evaluations)] == sent
    assert not any(math.isnan(row["total"]) for row in log)
