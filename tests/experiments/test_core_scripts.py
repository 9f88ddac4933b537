"""The campaign of the core's curves: what is left of it, and its page from records or from none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_module
from record_kit import CORE, bound, made

from viladiff.runs.config import RunConfig, override
from viladiff.runs.record import RunRecord, save_record
from viladiff.training.fingerprints import name_runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page() -> ModuleType:
    return load_module(ROOT / "reports" / "render_core.py")


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *words])
    script.main()


def test_a_page_of_records_and_of_none(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call(page, monkeypatch, "--records", str(tmp_path / "absent"), "--report-dir", str(out))
    assert "no records yet, nothing is drawn" in capsys.readouterr().out and not out.exists()
    for name in ("supervised-92-0", "supervised-92-1", "viladiff-183-0"):
        one = made(name)
        measured = {"boundary_iou": 0.1, "trimap_miou": 0.2}
        scores = {n: {s: found | measured for s, found in streams.items()} for n, streams in one.scores.items()}
        save_record(one.model_copy(update={"scores": scores}), tmp_path / f"{name}.json")
    call(page, monkeypatch, "--records", str(tmp_path), "--report-dir", str(out))
    assert {path.name for path in out.iterdir()} == {"curves.png", "table.md", "table.csv"}
    assert "(2)" in (out / "table.md").read_text()


def test_records_of_two_precisions_or_of_other_defaults_are_refused(page: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs of different precision are not averaged, got bf16; fp32"):
        page.read(CORE)
    one = made("supervised-92-0")
    forged = RunRecord(**{**one.model_dump(), "config": {**one.config, "data.holdout": 0.5}})
    save_record(forged, tmp_path / "one.json")
    with pytest.raises(ValueError, match=r"does not match its name: data\.holdout is 0\.5 in config, 0\.0 by default"):
        page.read(tmp_path)


def test_what_is_left_of_the_campaign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_module(ROOT / "scripts" / "core_curves.py")
    monkeypatch.setattr(script, "RECORDS", tmp_path / "none")
    words = ["--dry-run", "--methods", "supervised", "--splits", "92", "--seeds", "0", "--runs-dir", str(tmp_path)]
    left = "supervised 92 seed 0 is to be run\n"
    call(script, monkeypatch, *words)
    assert capsys.readouterr().out == left
    monkeypatch.setattr(script, "RECORDS", tmp_path)
    path = tmp_path / "supervised-92-0.json"
    save_record(RunRecord(**{**made("supervised-92-0").model_dump(), "run_id": "0" * 16}), path)
    call(script, monkeypatch, *words)
    assert "does not match its name" in (said := capsys.readouterr().out) and said.endswith(left)
    fields = {"data.dataset": "digits", "data.split": "92", "method.name": "supervised", "eval.split": "test"}
    fields |= {"data.split_seed": 0}
    named = name_runs([override(RunConfig(), fields)])[0]
    done = bound(made("supervised-92-0"), changed=fields, fingerprints=named.fingerprints)
    save_record(done, path)
    call(script, monkeypatch, *words)
    assert capsys.readouterr().out == ""


def test_the_page_of_the_protocol_is_that_of_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, committed = (
        load_module(ROOT / "reports" / "render_protocol.py"),
        ROOT / "reports" / "published" / "protocol",
    )
    call(script, monkeypatch, "--report-dir", str(tmp_path))
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == (committed / "table.md").read_text(encoding="utf-8")
    reported = next((committed.parent / "table5" / "records").glob("*.json"))
    (tmp_path / reported.name).write_bytes(reported.read_bytes())
    with pytest.raises(ValueError, match=r"eval\.split = 'test'; this page is of dev alone"):
        script.read_records(tmp_path)
