"""Published runs trained again: what counts as the same, and what is said where there is nothing to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from record_kit import content_of, made

from viladiff.cli.reproduce import main
from viladiff.core.environment import processor, versions
from viladiff.experiments import reproduce, tables
from viladiff.runs.job import Outcome, PlannedRun
from viladiff.runs.record import RunRecord, save_record
from viladiff.runs.store import Store

EXAMPLE = made("viladiff-183-0")
ROOT = Path(__file__).resolve().parents[2]


def changed(**fields: Any) -> RunRecord:
    here = {"processor": processor(), "threads": 1, "versions": versions(), "miou": 0.6}
    return RunRecord(**{**EXAMPLE.model_dump(), **here, **fields})


def scored(value: float) -> dict[str, Any]:
    scores = {net: {stream: dict(one) for stream, one in those.items()} for net, those in EXAMPLE.scores.items()}
    scores[EXAMPLE.network][EXAMPLE.stream]["boundary_iou"] = value
    return scores


@pytest.mark.parametrize(
    ("theirs", "mine", "spread", "verdict", "said"),
    [
        ({}, {}, None, "holds", "bit for bit"),
        ({}, {"miou": 0.6000001}, 1.0, "fails", "mIoU differs although"),
        ({"scores": scored(0.3)}, {"scores": scored(0.30000001)}, 1.0, "fails", "boundary_iou differs although"),
        ({"pseudo_labels": {"x": 0.1}}, {"pseudo_labels": {"x": 0.2}}, 1.0, "fails", "pseudo-labels differs although"),
        ({"processor": "other"}, {"miou": 0.62499}, 1.0, "holds", "processor other there"),
        ({"processor": "other"}, {"miou": 0.62501}, 1.0, "fails", "2.50 points apart, at most 2.5 × 1.00 = 2.50"),
        ({"processor": ""}, {"miou": 0.57501}, 1.0, "holds", "processor not recorded there"),
        ({"threads": 2}, {"miou": 0.61}, 1.0, "holds", "threads 2 there, 1 here"),
        ({"versions": {"torch": "1.0"}}, {"miou": 0.61}, 1.0, "holds", "torch 1.0 there"),
        ({"device": "NVIDIA"}, {"miou": 0.61}, 1.0, "holds", "device NVIDIA there, cpu here"),
        ({"processor": "other"}, {"miou": 0.61}, None, "not decided", "no two published seeds"),
        ({"processor": "other"}, {}, None, "holds", "bit for bit"),
        ({"miou": None}, {}, 1.0, "not decided", "not measured"),
    ],
    ids=str,
)
def test_runs_are_compared_exactly_where_the_machine_is_the_same(
    theirs: dict[str, Any], mine: dict[str, Any], spread: float | None, verdict: str, said: str
) -> None:
    found = reproduce.compare(changed(**theirs), changed(**mine), spread)
    assert found.verdict == verdict and said in found.text


def test_records_name_the_processor() -> None:
    assert processor() and "\n" not in processor()
    assert RunRecord(**{k: v for k, v in EXAMPLE.model_dump().items() if k != "processor"}).processor == ""


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tables and of committed records, of which there are none yet."""
    (tmp_path / "ablations").mkdir()
    text = (ROOT / "ablations" / "table5.toml").read_text(encoding="utf-8")
    (tmp_path / "ablations" / "table5.toml").write_text(text, encoding="utf-8")
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr("viladiff.core.installation._PACKAGE", tmp_path / "viladiff")
    layer = tmp_path / "reports" / "published" / "table5" / "records"
    layer.mkdir(parents=True)
    return layer


WORDS = ("--scale", "smoke", "--rows", "1", "supervised")


def run(tmp_path: Path, *more: str) -> int:
    return main([*WORDS, "--runs-dir", str(tmp_path / "runs"), *more])


def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: dict[str, float]) -> list[PlannedRun]:
    """What was given to the trainer; it leaves records of these scores, by method."""
    trained: list[PlannedRun] = []

    def train(left: Sequence[PlannedRun], store: Store, settings: object, hear: object) -> list[Outcome]:
        trained.extend(left)
        for one in left:
            save(one, store.directory(one.run_id) / "record.json", mine[method(one)])
        return [Outcome(one.run_id, "done") for one in left]

    monkeypatch.setattr("viladiff.cluster.executor.run_jobs", train)
    return trained


def method(one: PlannedRun) -> str:
    return str(one.changed["method.name"])


def save(one: PlannedRun, path: Path, miou: float, **fields: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"processor": processor(), "versions": versions(), "miou": miou, "steps": one.steps}
    save_record(RunRecord(**{**EXAMPLE.model_dump(), **content_of(one), **about, **fields}), path)


def commit(layer: Path, tmp_path: Path, values: dict[str, float], **fields: Any) -> None:
    from viladiff.tables.plan import make_plan
    from viladiff.tables.spec_file import load_table

    found = make_plan(load_table(tables.find_table(5)), "smoke", rows=["1", "supervised"], columns=["1"])
    for one in found.runs.values():
        if method(one) in values:
            save(one, layer / f"{one.run_id}.json", values[method(one)], **fields)


def test_without_a_record_nothing_is_trained_and_it_is_said(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("viladiff.cluster.executor.run_jobs", lambda *given: pytest.fail("something is trained"))
    assert run(tmp_path) == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0].startswith("SemiBaseline, 1/8 (183), seed 0: no published record of run")
    assert run(tmp_path, "--dry-run") == 0


def test_a_line_a_row_and_status_1_where_one_disagrees(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(published, tmp_path, {"semibaseline": 0.6, "supervised": 0.5})
    trained = plan(tmp_path, monkeypatch, {"semibaseline": 0.6, "supervised": 0.51})
    assert run(tmp_path, "--dry-run") == 0 and not trained
    told = capsys.readouterr().out
    assert "2 runs to train and compare" in told and told.count("compared bit for bit") == 2
    assert run(tmp_path) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "seed 0:" in line]
    assert [line.split(":")[0] for line in said] == ["holds", "fails"] and len(trained) == 2
    assert run(tmp_path) == 1 and len(trained) == 2, "a second call compares what is there"
    assert "already trained in" in capsys.readouterr().out


def test_a_row_without_a_record_is_not_trained(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(published, tmp_path, {"semibaseline": 0.6})
    trained = plan(tmp_path, monkeypatch, {"semibaseline": 0.6})
    assert run(tmp_path) == 2 and [method(one) for one in trained] == ["semibaseline"]
    said = capsys.readouterr().out
    assert "not decided: supervised, 1/8 (183), seed 0: no published record" in said and "holds: SemiBaseline" in said
