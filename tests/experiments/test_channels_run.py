"""A folder of 5 bands and 12 bits, from the check to the exported network, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import viladiff
from viladiff.cli import main
from viladiff.data.files.images import read_image, read_mask
from viladiff.inference.export import ONNX

FIELDS = ["data.channels=5", "data.value_range=12bit", "data.shown=4,2,1"]
RUN = ["data.dataset=folder", "runtime.data_root=photos", "method.name=semibaseline", "model.encoder=digits_vit"]
RUN += ["model.pretrained=shipped", "model.decoder_width=16", "data.crop=32", "train.steps=3", "data.batch_labelled=2"]
RUN += ["data.batch_unlabelled=2", "runtime.visualizations=1", "train.precision=fp32"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, photographs: object) -> Path:
    """A directory with the folder ``photos``, of which a command was not yet run."""
    place = tmp_path_factory.mktemp("channels")
    root = Path(photographs.write(place / "photos", 12, "folder", labelled=4, val=3, sizes=(40, 60)))  # type: ignore[attr-defined]
    for path in sorted((root / "images").iterdir()):
        rgb = np.asarray(Image.open(path).convert("RGB")).astype(np.uint16) * 16
        five = np.dstack([rgb, rgb[::-1, :, 0], 4095 - rgb[..., 1]])
        tifffile.imwrite(path.with_suffix(".tif"), five, photometric="minisblack", planarconfig="contig")
        path.unlink()
    return root


def test_5_bands_of_12_bits_from_check_to_export(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(photos.parent)
    assert main.main(["data", "check", "photos", "--quiet"]) == 1
    assert "5 bands: set data.channels=5" in capsys.readouterr().out
    assert main.main(["data", "check", "photos", *FIELDS, "--quiet"]) == 0
    assert (photos.parent / "data-check" / "mosaic.png").is_file()
    capsys.readouterr()

    assert main.main(["train", *RUN, *FIELDS, "--threads", "1", "--quiet"]) == 0
    assert "red, green and blue repeated in turn over 5 and scaled by 3 / 5" in capsys.readouterr().err
    run = next(path for path in Path("runs").iterdir() if (path / "record.json").is_file())
    record = json.loads((run / "record.json").read_text())
    assert record["config"]["data.channels"] == 5 and record["config"]["data.value_range"] == "12bit"
    assert "repeated in turn over 5" in record["pretrained"]
    stages = np.load(run / "pictures.npz")
    shown = next(stages[name] for name in stages.files if name.endswith("image"))
    assert shown.dtype == np.uint8 and shown.shape[-1] == 3 and len(np.unique(shown)) > 50

    model = viladiff.load_model(run, "cpu")
    file = sorted((photos / "images").iterdir())[0]
    wanted = model.predict(file)
    assert np.array_equal(model.predict(tifffile.imread(file)).labels, wanted.labels)
    with pytest.raises(ValueError, match=r"3 bands, and data\.channels = 5"):
        model.predict(np.zeros((40, 40, 3), np.uint16))
    assert main.main(["predict", "photos/images", "--model", str(run), "--out", "made", "--quiet"]) == 0
    assert np.array_equal(read_mask(Path("made/masks") / f"{file.stem}.png", 6), wanted.labels)
    assert read_image(Path("made/overlays") / f"{file.stem}.jpg").shape == (*wanted.labels.shape, 3)

    assert main.main(["evaluate", str(run), "--quiet"]) == 0
    assert "as in training" in capsys.readouterr().out
    assert main.main(["export", str(run), "model"]) == 0
    again = viladiff.load_model("model", "cpu")
    assert again.pixels == model.pixels and np.array_equal(again.predict(file).labels, wanted.labels)
    card = Path("model/README.md").read_text()
    assert "5 channels in 0..1 by data.value_range = 12bit" in card


@pytest.mark.slow
def test_5_bands_in_onnx(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported is run by onnxruntime and compared before it is accepted."""
    monkeypatch.chdir(photos.parent)
    words = [*RUN, *FIELDS, "runtime.runs_dir=onnx-runs", "--threads", "1", "--quiet"]
    assert main.main(["train", *words]) == 0
    (run,) = (path.parent for path in Path("onnx-runs").glob("*/record.json"))
    assert main.main(["export", str(run), "onnx-model", "--onnx"]) == 0
    assert Path("onnx-model", ONNX).is_file()
    assert "(batch, 5, height, width)" in Path("onnx-model", "README.md").read_text()


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("data.channels=0", "data.channels"),
        ("data.bands=1,1", "data.bands = (1, 1): must be different"),
        ("data.value_range=12", "data.value_range = '12': must be a depth as 12bit"),
        ("data.shown=1,2", "data.shown = (1, 2): must be three channels"),
        ("data.chanels=5", "data.chanels: folder has no such field; did you mean 'channels'?"),
        ("train.steps=5", "train.steps: only fields of data"),
    ],
)
def test_wrong_fields_are_named(
    photos: Path, field: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos.parent)
    assert main.main(["data", "check", "photos", field, "--quiet"]) != 0
    assert reason in capsys.readouterr().err


def test_what_needs_red_green_and_blue_is_refused_by_name() -> None:
    changes = {"data.dataset": "folder", "data.channels": 4, "method.name": "semivl", "method.clip.weights": "clip.pt"}
    with pytest.raises(ValueError, match=r"method\.clip\.weights = 'clip\.pt': CLIP sees red, green and blue.* 4"):
        viladiff.override(viladiff.RunConfig(), changes)
