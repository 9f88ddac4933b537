"""A segmenter is saved, read again and pushed with its preprocessing, scores and card; what was changed is noticed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from run_kit import short_run

import viladiff
from viladiff.cli import main
from viladiff.inference import pretrained
from viladiff.inference.export import PROGRAM, Standalone, export_program, export_run
from viladiff.inference.model_folder import preprocessing
from viladiff.inference.predict import Model
from viladiff.inference.pretrained import FETCHED, Segmenter, load_model
from viladiff.models.segmenter import NetworkFactory
from viladiff.runs.config import RunConfig, override
from viladiff.runs.record import load_record

PIXELS = np.random.default_rng(0).integers(0, 256, (56, 72, 3), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a short run with captions."""
    return short_run(tmp_path_factory.mktemp("runs"), "viladiff")


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "model"
    Segmenter.from_pretrained(run).save_pretrained(out)
    return out


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def same(one: Segmenter, other: Segmenter) -> bool:
    (labels, confidence), (labels_2, confidence_2) = one.predict(PIXELS), other.predict(PIXELS)
    return bool((labels == labels_2).all() and np.array_equal(confidence, confidence_2))


def test_three_lines_predict_what_the_run_predicts(run: Path, folder: Path) -> None:
    segmenter = viladiff.Segmenter.from_pretrained(folder)
    labels, confidence = segmenter.predict(PIXELS)
    assert labels.shape == confidence.shape == PIXELS.shape[:2] and labels.dtype == np.uint8
    assert same(segmenter, Segmenter.from_pretrained(str(run))) and same(segmenter, load_model(folder))


def test_what_is_saved_again_is_the_same_folder(folder: Path, tmp_path: Path) -> None:
    Segmenter.from_pretrained(folder).save_pretrained(tmp_path / "again")
    names = {path.name for path in folder.iterdir()}
    assert names == {*FETCHED} == {path.name for path in (tmp_path / "again").iterdir()}
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_the_folder_says_what_becomes_of_an_image(folder: Path) -> None:
    """By hand from the file alone: the same logits as the network that was read."""
    facts = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    segmenter = Segmenter.from_pretrained(folder)
    size = facts["size_divisor"]
    pixels = PIXELS[: PIXELS.shape[0] // size * size, : PIXELS.shape[1] // size * size]
    image = (pixels * facts["rescale_factor"] - facts["image_mean"]) / facts["image_std"]
    ready = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    network = segmenter.network
    with torch.no_grad():
        expected = network.logits(network.encode(ready), ready.shape[-2:]).softmax(1).max(1)
    found = segmenter.predict(pixels, "original")
    assert (found.labels == expected.indices[0].numpy()).mean() > 0.999
    np.testing.assert_allclose(found.confidence, expected.values[0], atol=1e-5)
    assert facts["crop_size"] == segmenter.crop and facts["protocol"] == segmenter.protocol


def test_the_card_is_read_by_a_hub(run: Path, folder: Path) -> None:
    card, record = ModelCard.load(folder / "README.md"), load_record(run / "record.json")
    assert card.data.library_name == "viladiff" and card.data.license == "unknown"
    assert card.data.pipeline_tag == "image-segmentation"
    (result,) = card.data.eval_results or []
    assert result.metric_type == "mean_iou"
    assert result.metric_value == pytest.approx(record.scores[record.network]["visual"]["miou"])
    for fact in ("## Licence", f"captions: in training {record.captions}", record.encoder, record.fingerprints["data"]):
        assert fact in card.text


@pytest.mark.parametrize("name", ["classes.txt", "model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_changed_file_is_named(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    changed = b"\n".join([*content.split(b"\n")[1::-1], *content.split(b"\n")[2:]]) if name == "classes.txt" else None
    (copy / name).write_bytes(changed or content.replace(b"0.", b"1.", 1) if b"0." in content else content + b" ")
    with pytest.raises(ValueError, match=rf"{name}: changed since the folder was written: SHA-256 \w{{12}}"):
        Segmenter.from_pretrained(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_model(copy)


def test_other_preprocessing_than_the_networks_is_refused(copy: Path) -> None:
    facts = json.loads((copy / "preprocessor_config.json").read_text(encoding="utf-8"))
    (copy / "preprocessor_config.json").write_text(json.dumps({**facts, "image_mean": [0.5, 0.5, 0.5]}))
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"image_mean = \[0.5, 0.5, 0.5\], but this network is fed with \[0.485"):
        Segmenter.from_pretrained(copy)
    (copy / "preprocessor_config.json").unlink()  # a folder of an earlier version
    assert same(Segmenter.from_pretrained(copy), Segmenter.from_pretrained(copy))


@pytest.mark.parametrize("text", ["[]", '{"sha256": ["model.safetensors"]}', '{"sha256": {"../../etc/passwd": "0"}}'])
def test_a_manifest_names_no_other_files(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest.json: not the manifest of a model folder"):
        load_model(copy)


def test_a_manifest_leaves_out_no_file_such_as_the_order_of_classes(copy: Path) -> None:
    sums = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))["sha256"]
    assert {*sums} == {"classes.txt", "config.json", "model.safetensors", "preprocessor_config.json"}
    names = (copy / "classes.txt").read_text(encoding="utf-8").split("\n")
    (copy / "classes.txt").write_text("\n".join([names[1], names[0], *names[2:]]), encoding="utf-8")
    del sums["classes.txt"]
    (copy / "manifest.json").write_text(json.dumps({"sha256": sums}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest.json: not the manifest of a model folder"):
        load_model(copy)


@pytest.mark.parametrize("field", ["method.name", "model.decoder_width"])
def test_a_field_and_one_below_it_are_refused(copy: Path, field: str) -> None:
    (copy / "manifest.json").unlink()
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["fields"][f"{field}.more"] = 1
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"config.json: .*{field}.more: a field below .*keep one of the two") as error:
        load_model(copy)
    assert "\n" not in str(error.value)


def test_no_memory_is_taken_for_a_network_that_the_weights_are_not_of(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["fields"]["model.decoder_width"] = 1 << 20  # 38 TB of weights
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"config.json: .*its network has \d+ bytes of weights, and model.safetensors has"
    ):
        load_model(copy)


def test_no_score_stands_on_changed_weights(run: Path, folder: Path, tmp_path: Path) -> None:
    for source in (run, folder):
        segmenter = Segmenter.from_pretrained(source)
        with torch.no_grad():
            next(segmenter.network.parameters()).add_(0.5)
        out = tmp_path / source.name
        segmenter.save_pretrained(out)
        card = (out / "README.md").read_text(encoding="utf-8")
        assert "no score is known" in card and "mean_iou" not in card and not (out / "metrics.json").exists()
        assert same(segmenter, Segmenter.from_pretrained(out)) and not same(
            segmenter, Segmenter.from_pretrained(source)
        )


def test_without_an_origin_nothing_is_written(folder: Path, copy: Path, tmp_path: Path) -> None:
    made = Segmenter.from_pretrained(folder)
    alone = Segmenter(made.network, made.class_names, made.crop, made.protocol, made.device)
    with pytest.raises(ValueError, match="made from a network alone"):
        alone.save_pretrained(tmp_path / "out")
    moved = Segmenter.from_pretrained(copy)
    shutil.rmtree(copy)
    with pytest.raises(ValueError, match="copy is gone"):
        moved.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_is_asked_for_these_files_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, **given: Any) -> str:
        asked.update(given, name=name)
        return str(folder)

    monkeypatch.setattr(pretrained, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert same(Segmenter.from_pretrained("someone/roads", revision="v1"), Segmenter.from_pretrained(folder))
    assert asked["name"] == "someone/roads" and asked["revision"] == "v1" and asked["allow_patterns"] == FETCHED

    def absent(name: str, **given: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\nand more")

    monkeypatch.setattr(pretrained, "snapshot_download", absent)
    with pytest.raises(
        ValueError, match=r"^someone/roads: no such folder here, and no model hub gives it: Cannot find"
    ):
        Segmenter.from_pretrained("someone/roads")
    for name in ("roads", "./some/roads", "/some/roads", "a/b/c"):
        with pytest.raises(ValueError, match=r"there is no such directory; give a model folder"):
            Segmenter.from_pretrained(name)


def test_what_would_be_pushed_is_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a hub that only writes down what it is given; a real one was never pushed to."""
    pushed: dict[str, bytes] = {}

    class Url:
        repo_id = "someone/roads"

    def upload(api: HfApi, *, repo_id: str, folder_path: Path, **given: Any) -> str:
        pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return repo_id

    monkeypatch.setattr(HfApi, "create_repo", lambda api, **given: Url())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert Segmenter.from_pretrained(folder).push_to_hub("someone/roads") == "someone/roads"
    assert pushed == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_exported_program_needs_torch_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    assert main.main(["export", str(run), str(out), "--pt2"]) == 0
    assert "torch.export against torch" in capsys.readouterr().out
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "`model.pt2` (torch.export): input `image` (batch, 3, height, width), RGB in 0..1" in card
    segmenter = Segmenter.from_pretrained(out)
    pixels = PIXELS[:48, :64]
    np.save(tmp_path / "image.npy", pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    script = (
        "import sys, numpy, torch\n"
        "image = torch.from_numpy(numpy.load('image.npy'))\n"
        "logits = torch.export.load('model/model.pt2').module(check_guards=False)(image)\n"
        "assert not any(name.startswith('viladiff') for name in sys.modules)\n"
        "numpy.save('logits.npy', logits.detach().numpy())\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, check=True)
    shares = torch.from_numpy(np.load(tmp_path / "logits.npy")).softmax(1).max(1)
    found = segmenter.predict(pixels, "original")
    assert (shares.indices[0].numpy() == found.labels).mean() > 0.999
    np.testing.assert_allclose(shares.values[0], found.confidence, atol=1e-5)


def test_a_program_that_computes_something_else_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Program:
        def module(self, check_guards: bool) -> Any:
            return lambda image: torch.zeros(len(image), 11, *image.shape[-2:])

    monkeypatch.setattr(torch.export, "load", lambda path: Program())
    with pytest.raises(ValueError, match=r"model.pt2: its logits differ from torch's by"):
        export_run(run, tmp_path / "model", torch_export=True)
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_a_program_is_one_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(run)
    asks = lambda self, image: image if image.sum() > 0 else -image  # noqa: E731
    monkeypatch.setattr(Standalone, "forward", asks)
    with pytest.raises(ValueError, match=r"^\w+ has no form for torch.export: "):
        export_program(model, tmp_path / PROGRAM)


def test_preprocessing_of_other_pixels_is_in_their_words() -> None:
    changes = {"data.dataset": "folder", "data.channels": 5, "data.bands": [1, 4], "data.value_range": "12bit"}
    cfg = override(RunConfig(), {**changes, "model.pretrained": "none"})
    network = NetworkFactory(cfg.model, 3, 12, inputs=cfg.data.pixels.inputs)(None)
    facts = preprocessing(network, cfg)
    assert facts["bands"] == [1, 4] and facts["value_range"] == "12bit" and "rescale_factor" not in facts


@pytest.mark.parametrize("crop", [48, 64])
def test_a_program_takes_sides_of_all_kinds(crop: int, tmp_path: Path) -> None:
    """64 is the grid that positions were learned on: there the network resamples nothing, elsewhere it does."""
    cfg = override(RunConfig(), {"model.pretrained": "none"})
    network = NetworkFactory(cfg.model, 7, 12)(None).eval().requires_grad_(False)
    model = Model(network, tuple("abcdefg"), crop, "original", torch.device("cpu"))
    assert export_program(model, tmp_path / PROGRAM) < 1e-5
    program, module = torch.export.load(tmp_path / PROGRAM).module(check_guards=False), Standalone(network)
    for size in ((1, 64, 64), (2, 16, 200), (3, 224, 64)):
        image = torch.rand(size[0], 3, *size[1:])
        torch.testing.assert_close(program(image), module(image), atol=1e-5, rtol=0)


def test_images_are_labelled_in_the_precision_of_the_scores(folder: Path, copy: Path) -> None:
    plain = Segmenter.from_pretrained(folder)
    half = Segmenter.from_pretrained(folder)
    half.precision = "bf16"
    (labels, confidence), (labels_2, confidence_2) = plain.predict(PIXELS), half.predict(PIXELS)
    assert (labels == labels_2).mean() > 0.9 and confidence_2.dtype == np.float32
    assert 0 < np.abs(confidence - confidence_2).max() < 0.1
    half.save_pretrained(copy)
    assert Segmenter.from_pretrained(copy).precision == "bf16" and same(Segmenter.from_pretrained(copy), half)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "scored_in": "int8"}))
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"config.json: scored_in = 'int8': allowed: fp32, bf16, fp16"):
        load_model(copy)


def test_a_file_in_the_way_and_a_folder_that_is_not_whole_are_said(folder: Path, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: a file; a model folder is a directory"):
        Segmenter.from_pretrained(folder).save_pretrained(tmp_path / "file")
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json: missing, so the model folder is not whole"):
        load_model(copy)


def test_a_folder_is_saved_over_itself_and_over_others(
    run: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    segmenter = Segmenter.from_pretrained(copy)
    segmenter.save_pretrained(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    (copy / "model.pt2").write_bytes(b"of the same network")
    Segmenter.from_pretrained(copy).save_pretrained(tmp_path / "with")
    assert (tmp_path / "with" / "model.pt2").read_bytes() == b"of the same network"
    with torch.no_grad():
        next(segmenter.network.parameters()).add_(0.5)
    segmenter.save_pretrained(tmp_path / "with")
    assert not {"model.pt2", "metrics.json"} & {path.name for path in (tmp_path / "with").iterdir()}
    assert same(Segmenter.from_pretrained(tmp_path / "with"), segmenter)
    with pytest.raises(ValueError, match="the directory of a run, which a model folder would hide"):
        segmenter.save_pretrained(run)
    with pytest.raises(ValueError, match="model_card_kwargs: the card is made of the run's record"):
        segmenter.save_pretrained(tmp_path / "card", model_card_kwargs={"license": "mit"})
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    moved = Segmenter.from_pretrained(copy.name)
    monkeypatch.chdir(run)
    moved.save_pretrained("~/model")
    assert (tmp_path / "home" / "model" / "config.json").is_file()


def test_exported_networks_name_no_place_of_this_machine(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    export_run(run, tmp_path / "model", onnx=True, torch_export=True)
    for path in (tmp_path / "model").iterdir():
        data = path.read_bytes()
        assert b"site-packages" not in data and str(Path(viladiff.__file__).parent).encode() not in data, path.name
