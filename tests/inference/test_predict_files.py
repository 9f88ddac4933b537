"""Prediction on folders as people have them: colours of one's own, masks beside photographs, huge images."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from viladiff.cli import main
from viladiff.data.files.images import PaletteEncoding, read_image, read_mask
from viladiff.data.formats.pillow_file import allow_pixels
from viladiff.data.sources.folder import read_classes
from viladiff.evaluation.protocols import bands
from viladiff.inference.export import export_run
from viladiff.inference.predict import Model, label_files
from viladiff.inference.pretrained import load_model
from viladiff.runs.config import RunConfig, override
from viladiff.training.result import Result
from viladiff.training.trainer import fit

COLOURS = ((10, 20, 30), (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250))
TINY: dict[str, object] = {
    "data.dataset": "folder", "model.encoder": "digits_vit", "model.pretrained": "shipped", "model.decoder_width": 16,
    "data.crop": 32, "train.steps": 1, "train.precision": "fp32", "runtime.threads": 1, "runtime.progress": False,
    "data.batch_labelled": 2, "data.batch_unlabelled": 2, "eval.boundary": False,
}  # fmt: skip


@pytest.fixture
def coloured(photo_folder: Callable[..., Path]) -> Path:
    """A folder whose masks are in colours, one of which is ignored."""
    root = photo_folder(8, labelled=4, val=2, sizes=(40, 60))
    names = (root / "classes.txt").read_text().split()
    table = np.zeros((256, 3), np.uint8)
    table[: len(COLOURS)], table[255] = COLOURS, (1, 1, 1)
    for path in (root / "masks").iterdir():
        Image.fromarray(table[read_mask(path, 6)]).save(path)
    lines = [f"{r} {g} {b} {name}" for (r, g, b), name in zip(COLOURS, names, strict=True)]
    (root / "palette.txt").write_text("\n".join(["1 1 1 void", *lines]) + "\n")
    (root / "classes.txt").unlink()
    return root


def test_predictions_of_coloured_masks_can_be_trained_on(coloured: Path, tmp_path: Path) -> None:
    cfg = override(
        RunConfig(), {**TINY, "runtime.data_root": str(coloured), "runtime.runs_dir": str(tmp_path / "runs")}
    )
    found: Result = fit(cfg)
    folder = export_run(found.directory, tmp_path / "model")["model folder"]
    assert json.loads((found.directory / "record.json").read_text())["palette"] == [list(one) for one in COLOURS]
    coding = read_classes(coloured).coding
    assert isinstance(coding, PaletteEncoding) and coding.colours == COLOURS
    for source, out in ((found.directory, "a"), (folder, "b")):
        model = load_model(source, "cpu")
        label_files(model, coloured / "images", tmp_path / out, show=False)
        for path in (coloured / "images").iterdir():
            mask = tmp_path / out / "masks" / f"{path.stem}.png"
            assert np.array_equal(read_mask(mask, 6, coding), model.predict(path).labels)
        assert "#0a141e" in (tmp_path / out / "classes.csv").read_text()
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "manifest.json").unlink()
    for wrong in ([[0, 0, 256]] * 6, [[0, 0, 0]], "red", [[0, 0]] * 6):
        (Path(folder) / "config.json").write_text(json.dumps({**config, "palette": wrong}))
        with pytest.raises(ValueError, match=r"config\.json: palette: must be three levels"):
            load_model(folder)


class Stub(torch.nn.Module):
    """Class 1 where the first channel is above its mean."""

    side_multiple = patch = 1
    vila = None

    class encoder(torch.nn.Module):  # an attribute of the network
        inputs = 3

    def encode(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images]

    def logits(self, features: list[torch.Tensor], size: torch.Size) -> torch.Tensor:
        first = features[0][:, :1]
        return torch.cat([-first, first], 1)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr("viladiff.inference.predict.check_prediction", lambda *_: None)
    return Model(Stub(), ("dark", "bright"), 32, "original", torch.device("cpu"))  # type: ignore[arg-type]


def picture(path: Path, height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_masks_and_other_files_beside_photographs_are_not_labelled(
    stub: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("photos/images/a.png", "photos/masks/a.png", "flat/b.jpg", "flat/b_mask.png", "flat/mask_c.png"):
        picture(tmp_path / name)
    (tmp_path / "flat" / "list.txt").write_text("b")
    found = label_files(stub, tmp_path / "photos", tmp_path / "out", show=False)
    assert found.images == 1 and [path.parent.name for path in found.unused] == ["masks"]
    assert [path.as_posix() for path in (tmp_path / "out/masks").rglob("*.png")] == [
        (tmp_path / "out/masks/images/a.png").as_posix()
    ]
    found = label_files(stub, tmp_path / "flat", tmp_path / "two", show=False)
    assert found.images == 2 and [path.name for path in found.unused] == ["b_mask.png", "list.txt"]
    assert found.images + len(found.unused) == 4, "every file is labelled or named"


def test_huge_images_are_labelled_in_windows_up_to_a_limit(
    stub: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = picture(tmp_path / "in" / "a.png", 130, 170)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"a\.png: cannot be read: .*--max-pixels"):
        read_image(tmp_path / "in" / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = stub.predict(tmp_path / "in" / "a.png")
    assert stub.protocol_for(130, 170) == "sliding_window" and Image.MAX_IMAGE_PIXELS == 1000
    assert np.array_equal(found.labels, pixels[..., 0] > 0.485 * 255)
    assert label_files(stub, tmp_path / "in", tmp_path / "out", show=False).failed == ()
    small = replace(stub, max_pixels=130 * 170 - 1)
    with pytest.raises(ValueError, match=r"a\.png: cannot be read: 170 x 130 pixels, more than 22,099"):
        small.predict(tmp_path / "in" / "a.png")
    np.save(tmp_path / "a.npy", pixels)
    with allow_pixels(1000), pytest.raises(ValueError, match=r"a\.npy: .*170 x 130 pixels, more than 1,000"):
        read_image(tmp_path / "a.npy")


def test_the_command_takes_the_limit(coloured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["predict", str(coloured), "--model", "none", "--max-pixels", "many"])
    assert "--max-pixels" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(50, 70), (20, 70), (50, 20), (32, 32)])
def test_normalising_in_windows_changes_no_bit(size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def prepare(x: torch.Tensor) -> torch.Tensor:
        return x.float() / 255 - 0.4

    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"visual": torch.cat([x, x.square()], 1)}

    for protocol in ("original", "center_crop", "sliding_window"):
        for crop in (32, 30):
            whole = [band.logits["visual"] for band in bands(forward, prepare(image), 4, protocol, crop)]
            parts = [band.logits["visual"] for band in bands(forward, image, 4, protocol, crop, prepare)]
            assert len(whole) == len(parts) and all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
