"""A trained network on photographs: any size, any name, from a run or from a folder; nothing is unpickled."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from run_kit import short_run

import viladiff
from viladiff.cli import main
from viladiff.core.colormap import class_colours
from viladiff.data import registry
from viladiff.data.files.images import read_image, read_mask
from viladiff.data.transforms.augment import normalise
from viladiff.evaluation.protocols import predict_logits
from viladiff.inference import predict
from viladiff.inference.export import export_run
from viladiff.inference.predict import Model, label_files
from viladiff.inference.pretrained import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a short run with two streams."""
    return short_run(tmp_path_factory.mktemp("runs"), "viladiff")


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    return load_model(run)


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    return Path(export_run(run, run.parent / "model")["model folder"])


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_three_lines_of_python(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data set is opened, and the folder stands alone."""
    monkeypatch.setattr(registry, "DATASETS", {})
    alone = folder.parent / "moved"
    shutil.copytree(folder, alone)
    assert sorted(path.name for path in alone.iterdir()) == [
        *("README.md", "classes.txt", "config.json", "manifest.json", "metrics.json", "model.safetensors"),
        "preprocessor_config.json",
    ]
    image = noise(70, 50)
    labels, confidence = viladiff.load_model(alone).predict(image)
    assert labels.shape == confidence.shape == (70, 50)
    assert labels.dtype == np.uint8 and confidence.dtype == np.float32
    again = viladiff.load_model(run).predict(image)
    assert np.array_equal(labels, again.labels) and np.array_equal(confidence, again.confidence)


def test_the_run_s_own_network_is_what_predicts(model: Model, run: Path) -> None:
    """The teacher's visual stream, as ``viladiff evaluate`` scores it."""
    from viladiff.inference.load import load_method, load_run

    teacher = load_method(load_run(run)).eval_networks()["teacher"]
    image = noise(64, 72)
    tensor = normalise(torch.tensor(image).permute(2, 0, 1)[None].float() / 255)
    with torch.no_grad():
        expected = predict_logits(teacher, tensor).softmax(1).max(1)
    found = model.predict(image, "original")
    assert np.array_equal(found.labels, expected.indices[0].numpy())
    np.testing.assert_allclose(found.confidence, expected.values[0].numpy(), atol=1e-6)
    student = load_method(load_run(run)).eval_networks()["student"]
    with torch.no_grad():
        other = predict_logits(student, tensor).softmax(1).max(1)
    assert np.abs(found.confidence - other.values[0].numpy()).max() > 1e-4


@pytest.mark.parametrize("size", [(1, 1), (3, 130), (97, 96), (97, 95), (150, 61)])
def test_any_size_whole_or_in_windows(model: Model, size: tuple[int, int]) -> None:
    image = noise(*size)
    found = model.predict(image)
    assert found.labels.shape == size and found.labels.max() < 11
    assert ((found.confidence > 1 / 11 - 1e-6) & (found.confidence <= 1)).all()
    windows = size[0] * size[1] > 4 * 48**2
    assert model.protocol_for(*size) == ("sliding_window" if windows else "original")
    tensor = normalise(torch.tensor(image).permute(2, 0, 1)[None].float() / 255)
    with torch.no_grad():
        logits = predict_logits(model.network, tensor, None, model.protocol_for(*size), 48)
    assert np.array_equal(found.labels, logits.argmax(1)[0].numpy())


def test_a_run_scored_in_windows_predicts_in_windows(model: Model) -> None:
    from dataclasses import replace

    assert replace(model, protocol="sliding_window").protocol_for(10, 10) == "sliding_window"


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_that_of_the_run(model: Model, monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    flags, seen = (torch.backends.cuda.matmul, torch.backends.cudnn), []
    before, real = [flag.allow_tf32 for flag in flags], Model._forward

    def forward(self: Model, images: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.extend(flag.allow_tf32 for flag in flags)
        return real(self, images)

    monkeypatch.setattr(Model, "_forward", forward)
    replace(model, tf32=allowed).predict(np.zeros((16, 16, 3), np.uint8))
    assert seen == [allowed, allowed] and [flag.allow_tf32 for flag in flags] == before


def test_what_is_no_image_is_refused(model: Model, tmp_path: Path) -> None:
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"must be uint8 \(h, w, 3\)"):
            model.predict(wrong)
    with pytest.raises(ValueError, match="did you mean 'sliding_window'"):
        model.predict(noise(8, 8), "sliding")
    with pytest.raises(ValueError, match=r"none.jpg"):
        model.predict(tmp_path / "none.jpg")


def test_too_little_memory_names_the_way_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Model, "_forward", full)
    with pytest.raises(ValueError, match=r"8 x 9 pixels: out of memory .* sliding_window needs less"):
        model.predict(noise(8, 9), "original")
    monkeypatch.setattr(Model, "_forward", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.predict(noise(8, 9))


def photographs(root: Path) -> Path:
    """Names with spaces and in other scripts, an upright and a turned one, a file that is no image."""
    (root / "süß & klein").mkdir(parents=True)
    Image.fromarray(noise(60, 90)).save(root / "a b.jpg")
    Image.fromarray(noise(40, 30, 1)).save(root / "süß & klein" / "花.PNG")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(noise(50, 80, 2)).save(root / "turned.jpeg", exif=exif)
    (root / "broken.jpg").write_bytes((root / "a b.jpg").read_bytes()[:300])
    (root / "notes.txt").write_text("not a photograph")
    return root


def test_a_directory_becomes_masks_overlays_and_confidence(
    model: Model,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predict, "_ROWS", 32)  # of which each picture has several and a rest
    source, out = photographs(tmp_path / "in"), tmp_path / "out put"
    assert main.main(["predict", str(source), "--model", str(folder), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1 and str(source / "broken.jpg") in said.err
    assert "labelling: 4/4" in said.err and "3" in said.out
    names = {"a b": (60, 90), "süß & klein/花": (40, 30), "turned": (80, 50)}
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {"classes.csv"} | {
        f"{kind}/{name}.{end}"
        for kind, end in (("masks", "png"), ("overlays", "jpg"), ("confidence", "png"))
        for name in names
    }
    colours, counts = class_colours(11), np.zeros(11, int)
    for name, size in names.items():
        (path,) = [path for path in source.rglob("*") if path.with_suffix("") == source / name]
        labels, confidence = model.predict(path)
        mask = out / "masks" / f"{name}.png"
        assert labels.shape == size and np.array_equal(read_mask(mask, 11), labels)
        with Image.open(mask) as image:
            assert image.mode == "P" and np.array_equal(np.asarray(image.convert("RGB")), colours[labels])
        with Image.open(out / "confidence" / f"{name}.png") as image:
            assert image.mode == "L" and np.abs(np.asarray(image) / 255 - confidence).max() <= 0.5 / 255 + 1e-6
        overlay = read_image(out / "overlays" / f"{name}.jpg").astype(int)
        photo = read_image(path).astype(int)
        # JPEG costs much on noise; half of each is nearer than either of the two.
        far = [np.abs(overlay - x).mean() for x in ((photo + colours[labels]) // 2, photo, colours[labels])]
        assert far[0] < min(far[1:]) / 1.5
        counts += np.bincount(labels.ravel(), minlength=11)
    with (out / "classes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["pixels"]) for row in rows] == counts.tolist()
    assert rows[1]["name"] == "zero" and rows[1]["colour"] == "#332288"


def test_one_photograph(model: Model, tmp_path: Path) -> None:
    photographs(tmp_path / "in")
    found = label_files(model, tmp_path / "in" / "a b.jpg", tmp_path / "out", show=False)
    assert (found.images, found.failed, int(found.pixels.sum())) == (1, (), 60 * 90)
    assert (tmp_path / "out" / "masks" / "a b.png").is_file()
    with pytest.raises(ValueError, match=r"broken.jpg"):
        label_files(model, tmp_path / "in" / "broken.jpg", tmp_path / "out", show=False)


def test_sources_that_cannot_be_labelled_are_refused_before_anything_is_written(model: Model, tmp_path: Path) -> None:
    root = tmp_path / "in"
    with pytest.raises(ValueError, match="no such file or directory"):
        label_files(model, root, tmp_path / "out")
    with pytest.raises(ValueError, match=r"example\.org/a\.jpg: an address, not a file; download it"):
        label_files(model, Path("https://example.org/a.jpg"), tmp_path / "out")
    root.mkdir()
    with pytest.raises(ValueError, match="no photograph in it"):
        label_files(model, root, tmp_path / "out")
    Image.fromarray(noise(8, 8)).save(root / "a.png")
    with pytest.raises(ValueError, match="taken for photographs"):
        label_files(model, root, root / "masks")
    Image.fromarray(noise(8, 8)).save(root / "a.jpg")
    with pytest.raises(ValueError, match=r"a.jpg and .*a.png: their masks"):
        label_files(model, root, tmp_path / "out")
    (root / "a.jpg").unlink()
    Image.fromarray(noise(8, 8)).save(tmp_path / "secret.png")
    (root / "b.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=r"b.png: leads out of"):
        label_files(model, root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_photograph_is_counted_and_what_is_hidden_passed_over(model: Model, tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / ".thumbnails").mkdir(parents=True)
    for name in ("a.png", ".thumbnails/a.png"):
        Image.fromarray(noise(32, 40)).save(root / name)
    os.mkfifo(root / "pipe.png")
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "loop.png").symlink_to("loop.png")
    found = label_files(model, root, tmp_path / "out", show=False)
    assert found.images == 1 and [path.name for path in found.unused] == ["gone.png", "loop.png", "pipe.png"]
    with pytest.raises(ValueError, match=r"pipe\.png: is neither a file nor a directory"):
        label_files(model, root / "pipe.png", tmp_path / "out", show=False)


def test_the_longest_name_that_a_file_system_allows(model: Model, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    name = "x" * 251
    Image.fromarray(noise(32, 40)).save(tmp_path / "in" / f"{name}.png")
    label_files(model, tmp_path / "in", tmp_path / "out", show=False)
    labels = model.predict(tmp_path / "in" / f"{name}.png").labels
    assert np.array_equal(read_mask(tmp_path / "out" / "masks" / f"{name}.png", 11), labels)


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_damaged_and_foreign_folders_are_refused_by_file(folder: Path, tmp_path: Path) -> None:
    def changed(name: str, data: bytes) -> Path:
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(data)
        (copy / "manifest.json").unlink()
        return copy

    def other(fields: dict[str, str]) -> bytes:
        return json.dumps({**config, "fields": {**config["fields"], **fields}}).encode()

    weights, config = (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())
    sprung = tmp_path / "sprung"
    for data in (weights[:-100], b"", pickle.dumps(Trap(sprung))):
        with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file"):
            load_model(changed("model.safetensors", data))
    assert not sprung.exists()
    with pytest.raises(ValueError, match=r"model.safetensors: does not fit"):
        load_model(changed("classes.txt", b"one\ntwo\n"))
    for data, match in (
        (b"{", "not JSON"),
        (b"[]", "format = None"),
        (json.dumps({**config, "format": 2}).encode(), "format = 2; this version"),
        (other({"method.name": "viladif"}), "did you mean"),
        (other({"model.encoder": "x" * 9, "model.pretrained": "none"}), "timm has no such"),
        (json.dumps({"format": 1}).encode(), "describes no model"),
    ):
        with pytest.raises(ValueError, match=match) as error:
            load_model(changed("config.json", data))
        assert "config.json" in str(error.value)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "model.pt").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match=r"no model.safetensors and no record.json"):
        load_model(pickled)
    with pytest.raises(ValueError, match="no such directory"):
        load_model(tmp_path / "nowhere")
    assert not sprung.exists()


def test_a_checkpoint_that_carries_code_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    torch.save({"method": Trap(tmp_path / "sprung")}, copy / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint.pt"):
        load_model(copy)
    assert not (tmp_path / "sprung").exists()
