"""docs/your-data.md does what it says: its own commands, on a small folder of real photographs."""

from __future__ import annotations

import csv
import glob
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import viladiff
from viladiff.cli import main
from viladiff.data.files.images import image_size, read_mask
from viladiff.runs.config import RunConfig, override, parse_overrides

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "your-data.md"
QUICK = ("train.steps=2", "data.batch_labelled=2", "data.batch_unlabelled=2", "eval.boundary=false")
"""Replaces the length that the page gives; nothing else of a command is changed."""


def commands() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```sh\n(viladiff .*?)\n```$", text, re.MULTILINE | re.DOTALL)


def words(command: str) -> list[str]:
    """As a shell splits it: lines joined, ``*`` replaced by what there is."""
    split = shlex.split(command.replace("\\\n", " "))
    return [found for word in split for found in (sorted(glob.glob(word)) if "*" in word else [word])]


def test_the_page_has_five_commands_and_one_more() -> None:
    names = [" ".join(command.split()[1:3]) for command in commands()]
    assert names == [
        "data check",
        "data split",
        "train data.dataset=folder",
        "evaluate runs/*",
        "predict new",
        "export runs/*",
    ]


def test_the_train_command_is_a_valid_run() -> None:
    fields = words(commands()[2])[2:]
    assert override(RunConfig(), parse_overrides(fields)).train.steps == 300


def test_pictures_of_the_page_exist_and_are_small() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(pictures) == 2
    for name in pictures:
        path = PAGE.parent / name
        assert min(image_size(path)) > 200 and path.stat().st_size < 400_000


def test_from_a_folder_to_masks(
    photo_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each command is as it stands there but for the training's length, and ONNX, which is tested elsewhere."""
    shutil.rmtree(photo_folder(40, labelled=16, val=9, sizes=(40, 90)) / "splits")
    new = tmp_path / "new" / "my holiday"
    new.mkdir(parents=True)
    sizes = {}
    for i, path in enumerate(sorted((tmp_path / "photos" / "images").iterdir())[30:33]):
        shutil.copy(path, new / f"Übung {i}.jpg")
        sizes[f"my holiday/Übung {i}.png"] = image_size(path)
    monkeypatch.chdir(tmp_path)
    check, split, train, evaluate, predict, export = commands()

    assert main.main([*words(check)[1:], "--quiet"]) == 0
    assert (tmp_path / "data-check" / "index.html").is_file()
    assert main.main([*words(split)[1:], "--quiet"]) == 0
    lists = {path.stem: path.read_text().split() for path in (tmp_path / "photos" / "splits" / "labelled").iterdir()}
    assert {name: len(names) for name, names in lists.items()} == {"labelled": 15, "unlabelled": 20, "val": 5}
    capsys.readouterr()

    quick = [word for word in words(train)[1:] if not word.startswith("train.steps=")]
    assert main.main([*quick, *QUICK, "--threads", "1", "--quiet"]) == 0
    assert "teacher/visual" in capsys.readouterr().out
    assert main.main([*words(evaluate)[1:], "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "as in training" in said and "protocol  original" in said
    assert main.main([*words(evaluate)[1:], "eval.protocol=sliding_window", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    truth = [read_mask(tmp_path / "photos" / "masks" / f"{name}.png", 6) for name in lists["val"]]
    counts = np.bincount(np.concatenate([mask.ravel() for mask in truth]), minlength=6)[:6]
    assert np.array(found["confusion"]["teacher"]["visual"]).sum(1).tolist() == counts.tolist()

    assert main.main([*words(predict)[1:], "--quiet"]) == 0
    written = {
        path.relative_to("predictions/masks").as_posix(): path for path in Path("predictions/masks").rglob("*.png")
    }
    assert {name: read_mask(path, 6).shape for name, path in written.items()} == sizes
    with open("predictions/classes.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == (tmp_path / "photos" / "classes.txt").read_text().split()
    assert sum(int(row["pixels"]) for row in rows) == sum(h * w for h, w in sizes.values())

    assert main.main([word for word in words(export)[1:] if word != "--onnx"]) == 0
    shutil.rmtree(tmp_path / "photos")
    photograph = new / "Übung 0.jpg"
    labels, _ = viladiff.load_model("model").predict(photograph)
    with Image.open(written["my holiday/Übung 0.png"]) as mask:
        assert np.array_equal(np.asarray(mask), labels)


OWN = ("model.encoder=digits_vit", "model.pretrained=shipped")
TIMM = ("model.encoder=vit_tiny_patch16_224", "model.pretrained=none")
HUNDREDS = [
    pytest.param(layout, method, 240, TIMM, marks=(pytest.mark.slow, pytest.mark.timeout(1200)))
    for layout in ("folder", "voc")
    for method in ("supervised", "semibaseline", "viladiff")
]


@pytest.mark.parametrize(("layout", "method", "images", "encoder"), [("voc", "viladiff", 30, OWN), *HUNDREDS])
def test_every_method_goes_from_photographs_to_a_model_folder(
    layout: str,
    method: str,
    images: int,
    encoder: tuple[str, ...],
    photo_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Checked, split, trained on, scored, labelled, exported; what the folder predicts is what the run scored."""
    root, voc = photo_folder(images, layout, unlabelled_masks=True, sizes=(50, 160)), layout == "voc"
    pictures, masks = ((root / one) for one in (("JPEGImages", "SegmentationClass") if voc else ("images", "masks")))
    assert len({image_size(path) for path in pictures.iterdir()}) > images * 0.9
    shutil.rmtree(root / "splits")
    assert main.main(["data", "check", str(root), "--out", str(tmp_path / "check"), "--quiet"]) == 0
    split = ["--labelled", str(images // 6), "--val", "0.2", "--name", "92" if voc else "labelled"]
    assert main.main(["data", "split", str(root), *split, "--quiet"]) == 0
    lists = {path.stem: path.read_text(encoding="utf-8").split() for path in (root / "splits").rglob("*.txt")}
    assert [len(lists[name]) for name in ("labelled", "val")] == [images // 6, images // 5]
    assert sum(map(len, lists.values())) == images
    for name in lists["unlabelled"]:
        (masks / f"{name}.png").unlink()  # never opened from here on

    words = [f"data.dataset={layout}", f"runtime.data_root={root}", f"method.name={method}", *encoder, *QUICK]
    words += ["model.decoder_width=16", "data.crop=64", *(["data.split=92"] if voc else [])]
    words += ["data.captions=none"] if method == "viladiff" else []
    assert main.main(["train", *words, "--runs-dir", str(tmp_path / "runs"), "--threads", "1", "--quiet"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    capsys.readouterr()
    assert main.main(["evaluate", str(run), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    network = "student" if method == "supervised" else "teacher"
    assert main.main(["export", str(run), str(tmp_path / "model")]) == 0
    out = ["--out", str(tmp_path / "out"), "--protocol", "original", "--quiet"]
    assert main.main(["predict", str(pictures), "--model", str(tmp_path / "model"), *out]) == 0
    assert len(list((tmp_path / "out" / "masks").iterdir())) == images
    classes = 21 if voc else 6
    counts = np.zeros((classes, classes), int)
    for name in lists["val"]:
        truth, labels = (read_mask(folder / f"{name}.png", classes) for folder in (masks, tmp_path / "out" / "masks"))
        np.add.at(counts, (truth[truth < 255], labels[truth < 255]), 1)
    assert np.array_equal(counts, found["confusion"][network]["visual"])
