"""Networks with parts of their own are scored, label photographs and are exported as any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from run_kit import short_run

from viladiff.inference.export import export_run
from viladiff.inference.pretrained import load_model
from viladiff.runs.record import load_record

METHODS = ("allspark", "semivl")


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_run(tmp_path_factory.mktemp("runs"), request.param)


def test_a_run_ends_in_a_folder_that_labels_alike(run: Path, tmp_path: Path) -> None:
    record = load_record(run / "record.json")
    assert record.miou is not None and record.network == "student" and record.steps == 2
    semivl = record.config["method.name"] == "semivl"
    assert [note.split(":")[0] for note in record.notes] == ["semivl without CLIP"] * semivl
    image = np.random.default_rng(0).integers(0, 256, (56, 72, 3), dtype=np.uint8)
    labels, confidence = load_model(run).predict(image)
    facts = export_run(run, tmp_path / "model")
    assert "parameters" in facts["48 x 48 without text"]
    again = load_model(tmp_path / "model").predict(image)
    assert np.array_equal(again.labels, labels) and np.array_equal(again.confidence, confidence)
    assert labels.shape == (56, 72) and len(np.unique(labels)) > 1


@pytest.mark.slow
def test_its_onnx_file_computes_the_same(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert "logits differ" in export_run(run, tmp_path / "model", onnx=True)["ONNX against torch"]
