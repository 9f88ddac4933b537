"""What a run says of its loader: the size of a picture cache before it, the share of waiting in its record."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from viladiff.data.loading import picture_space
from viladiff.evaluation import evaluator
from viladiff.experiments import dry_run
from viladiff.inference.load import preview_run
from viladiff.runs import listing
from viladiff.runs.checkpoint import load_checkpoint, save_checkpoint
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import impossible, load_record
from viladiff.training.errors import StopRequested
from viladiff.training.trainer import fit


def fields(root: Path, out: Path, **changes: Any) -> RunConfig:
    given = {
        "data.dataset": "folder", "runtime.data_root": str(root), "data.crop": 64, "runtime.device": "cpu",
        "data.batch_labelled": 2, "data.batch_unlabelled": 2, "method.name": "fixmatch", "model.encoder": "digits_vit",
        "model.pretrained": "none", "model.decoder_width": 8, "data.text_encoder": "words", "train.steps": 4,
        "train.precision": "fp32", "runtime.runs_dir": str(out), "eval.boundary": False, "optim.warmup_steps": 0,
        "data.captions": "none",
    }  # fmt: skip
    return override(RunConfig(), {**given, **{path.replace("__", "."): value for path, value in changes.items()}})


def test_a_run_with_the_cache_says_its_size_first_and_has_the_same_weights(
    photo_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluator, "LIMITING", -1.0)
    root = photo_folder(12, labelled=4, val=2, sizes=(64, 100))
    for path in root.rglob("*.*"):
        os.utime(path, (1e9, 1e9))
    plain = fit(fields(root, tmp_path / "plain"))
    assert "picture_cache" not in capsys.readouterr().err
    cached = fields(root, tmp_path / "cached", runtime__picture_cache=True)
    said = preview_run(cached)["picture cache"]
    assert said.startswith("10 images and 4 masks decoded, 0.00 GB in ") and "picture cache" not in preview_run(
        fields(root, tmp_path / "plain")
    )
    result = fit(cached)
    assert f"note: runtime.picture_cache: {said}\n" in capsys.readouterr().err
    states = [load_checkpoint(one.directory / "checkpoint.pt") for one in (plain, result)]
    assert states[0] is not None and states[1] is not None and plain.record.run_id == result.record.run_id
    assert all(torch.equal(states[0]["method"][name], tensor) for name, tensor in states[1]["method"].items())
    assert list((tmp_path / "cache" / "pictures").glob("??/*.raw"))
    record = result.record
    assert record.loader_share is not None and 0 < record.loader_share < 1
    assert record.notes[-1] == f"training waited {100 * record.loader_share:.0f} % of its time for images"
    assert listing._facts(record)["loader"] == f"waited for {100 * record.loader_share:.0f} % of the training"
    monkeypatch.setattr(picture_space, "refuse_full_disk", _full)
    with pytest.raises(ValueError, match="no room"):
        fit(fields(root, tmp_path / "third", runtime__picture_cache=True))


def test_the_dry_run_of_a_table_counts_each_picture_once(
    photo_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    root = photo_folder(12, labelled=4, val=2, sizes=(64, 100))
    given = {"data.dataset": "folder", "runtime.data_root": str(root), "runtime.picture_cache": True}
    changes = [{**given, "seed": seed, "method.name": name} for seed in (0, 1) for name in ("supervised", "fixmatch")]
    runs = [PlannedRun(f"{i:016x}", dict(one), "", 4, {}) for i, one in enumerate(changes)]
    assert dry_run._pictures(runs)["pictures"].startswith("10 images and 4 masks decoded, ")
    assert dry_run._pictures(runs[:1])["pictures"].startswith("4 images and 4 masks decoded, ")
    assert dry_run._pictures([PlannedRun("0" * 16, {}, "", 4, {})]) == {}


def _full(space: object) -> None:
    raise ValueError("no room")


def test_waiting_is_that_of_all_legs_and_unknown_after_one_that_did_not_note_it(tmp_path: Path) -> None:
    changes = {"train.steps": 4, "runtime.log_every": 2, "eval.max_images": 2, "eval.boundary": False}
    cfg = override(RunConfig(), {**changes, "runtime.runs_dir": str(tmp_path), "runtime.device": "cpu"})
    with pytest.raises(StopRequested):
        fit(cfg, report=lambda news: "loss" in news)
    (place,) = tmp_path.glob("*/checkpoint.pt")
    state = load_checkpoint(place)
    assert state is not None and state["step"] == 2 and state["waited_seconds"] > 0
    save_checkpoint(place, {**state, "waited_seconds": 0.9 * state["train_seconds"] + 1e6, "train_seconds": 2e6})
    record = fit(cfg).record
    assert record.loader_share == pytest.approx(0.5, abs=0.01)
    assert impossible(record.model_copy(update={"loader_share": 1.5})).startswith("loader_share: must be")
    assert load_record(place.parent / "record.json").loader_share == record.loader_share
    (place.parent / "record.json").unlink()
    save_checkpoint(place, {name: value for name, value in state.items() if name != "waited_seconds"})
    assert fit(cfg).record.loader_share is None
    assert not listing._facts(fit(cfg).record)["loader"]
