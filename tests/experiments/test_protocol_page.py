"""The page of the runs on ``dev``: it follows from its records, and refuses those that it cannot compare."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_module
from record_kit import bound, made

from viladiff.runs.record import RunRecord, save_record

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "reports" / "published"


@pytest.fixture
def page() -> ModuleType:
    return load_module(ROOT / "reports" / "render_protocol.py")


def on_dev(name: str) -> RunRecord:
    """A record of a short run as if it had been scored on ``dev``, with its seed's own list."""
    record = made(name)
    fields = {"eval.split": "dev", "data.split_seed": record.config["seed"]}
    return bound(record, **{key: getattr(record, key) | fields for key in ("config", "changed")})


def test_the_page_follows_from_its_records(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--report-dir", str(tmp_path)])
    page.main()
    committed = (PUBLISHED / "protocol" / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == committed


def test_fields_are_compared_with_the_first_run_with_defaults(page: ModuleType) -> None:
    first = on_dev("supervised-183-0")
    first = first.model_copy(update={"changed": {"data.split": "183"}, "config": {**first.config, "data.holdout": 0.0}})
    later = first.model_copy(
        update={
            "config": {**first.config, "optim.lr": 2.0, "data.holdout": 0.25, "method.new": 3, "method.old": 4},
            "changed": {"data.holdout": 0.25, "method.new": 3},
        }
    )
    assert page.own_fields(first, [first, later]) == {}
    told = {"optim.lr": 2.0, "data.holdout": 0.25, "method.new": 3}
    assert page.own_fields(later, [first, later]) == told, "also a default that later code has changed"
    assert page.own_fields(later, [later]) == {"data.holdout": 0.25, "method.new": 3}


def test_a_run_on_reported_images_is_refused(page: ModuleType, tmp_path: Path) -> None:
    reported = next((PUBLISHED / "table5" / "records").glob("*.json"))
    (tmp_path / reported.name).write_bytes(reported.read_bytes())
    with pytest.raises(ValueError, match=r"eval\.split = 'test'; this page is of dev alone"):
        page.read_records(tmp_path)


def test_a_run_with_another_list_than_its_seed_s_own_is_refused(page: ModuleType, tmp_path: Path) -> None:
    one = on_dev("supervised-183-0")
    other = bound(one, **{key: getattr(one, key) | {"data.split_seed": None} for key in ("config", "changed")})
    save_record(other, tmp_path / f"{other.run_id}.json")
    with pytest.raises(ValueError, match=r"data\.split_seed = None, seed = 0; this page is of each seed's own list"):
        page.read_records(tmp_path)


def test_runs_of_two_precisions_or_of_other_defaults_are_refused(page: ModuleType, tmp_path: Path) -> None:
    one = on_dev("supervised-183-0")
    save_record(one, tmp_path / "fp32.json")
    assert [record.run_id for record in page.read_records(tmp_path)] == [one.run_id]
    save_record(on_dev("supervised-183-0-bf16"), tmp_path / "bf16.json")
    with pytest.raises(ValueError, match="runs of different precision are not averaged, got bf16; fp32"):
        page.read_records(tmp_path)
    forged = RunRecord(**{**one.model_dump(), "config": {**one.config, "data.holdout": 0.5}})
    save_record(forged, tmp_path / "fp32.json")
    with pytest.raises(ValueError, match=r"does not match its name: data\.holdout is 0\.5 in config, 0\.0 by default"):
        page.read_records(tmp_path)


def test_another_encoder_is_no_trial_and_has_a_row_of_its_own(page: ModuleType) -> None:
    first = on_dev("supervised-183-0")
    config = {**first.config, "train.steps": 1500, "data.split": "183", "seed": 0}
    first = first.model_copy(update={"config": config, "changed": {}, "miou": 0.5})
    bare = {"model.pretrained": "none"}
    other = first.model_copy(update={"run_id": "f" * 16, "config": {**config, **bare}, "changed": bare, "miou": 0.25})
    whole = {"data.split": "all"}
    labelled = [
        one.model_copy(update={"run_id": name * 16, "config": {**one.config, **whole}, "changed": one.changed | whole})
        for name, one in (("d", first), ("e", other))
    ]
    records = [first, other, *labelled]
    assert page.trial_numbers(records) == {first.run_id: ("supervised", 1)}
    assert page.encoders(records)[2:] == [
        "| the shipped encoder | 50.0 |  | 50.0 |",
        "| `model.pretrained=none` | 25.0 |  | 25.0 |",
    ]
