"""A data set is one file and one entry: the example of docs/datasets.md is added to the package, and works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from overlay import ROOT, overlay, replaced, run_python
from PIL import Image

FIRST = "from viladiff.data.sources.ade20k import ADE20K_SOURCE\n"
IMPORT = (FIRST, FIRST + "from viladiff.data.sources.discs import DISCS_SOURCE\n")
LAST = '    "folder": FOLDER_SOURCE,\n'
ENTRY = (LAST, LAST + '    "discs": DISCS_SOURCE,\n')

USE = """
import json, sys
from viladiff.cli.main import main
from viladiff.data.registry import dataset_spec, load_dataset
from viladiff.data.sources.detect import open_tree
from viladiff.runs.config import RunConfig, fields_help, flatten, override
from viladiff.training.trainer import fit

root = sys.argv[1]
plain = override(RunConfig(), {"data.dataset": "discs"})
there = {"data.dataset": "discs", "runtime.data_root": root}
every, turned = (load_dataset(*dataset_spec(override(RunConfig(), {**there, **more})))
                 for more in ({"data.split": "all"}, {"data.inverted": True}))
small = {"model.encoder": "digits_vit", "model.pretrained": "none", "model.decoder_width": 16, "data.crop": 32,
         "data.batch_labelled": 2, "data.batch_unlabelled": 2, "data.text_encoder": "words", "train.precision": "fp32",
         "train.steps": 2, "runtime.runs_dir": "runs", "runtime.progress": False, "runtime.threads": 1}
record = fit(override(RunConfig(), {**there, **small})).record
told = {
    "defaults": [flatten(plain)[path] for path in ("train.epochs", "model.pretrained", "data.split", "eval.split")],
    "help": [row.text for row in fields_help("data.inverted")],
    "layout": open_tree(root)[0].layout.dataset,
    "check": main(["data", "check", root, "--quiet", "--out", "page"]),
    "all": [len(every.labelled), len(every.unlabelled), len(every.val_images)],
    "corner": [int(every.target(0)[0, 0]), int(turned.target(0)[0, 0])],
    "record": [record.config["data.dataset"], record.steps, record.class_names, record.miou is not None],
}
print(json.dumps(told))
"""
CHOOSE = """
import sys
from viladiff.runs.config import RunConfig, override
from viladiff.data.sources.detect import open_tree

for use in (lambda: override(RunConfig(), {"data.dataset": "discs"}), lambda: open_tree(sys.argv[1])):
    try:
        use()
    except ValueError as error:
        print(error)
"""


def example() -> str:
    page = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8").split("## Add a data set")[1]
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    return block.group(1)


def package(directory: Path, entry: bool) -> Path:
    """The package with the example's file and its import, and with its entry or without."""
    table = replaced("data/sources/__init__.py", IMPORT, *([ENTRY] if entry else []))
    return overlay(directory, {"data/sources/discs.py": example(), "data/sources/__init__.py": table})


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    """Four images to train on and two to validate on, with a disc each, and a list of two that are labelled."""
    root, rng = tmp_path / "discs", np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :48]
    for part, count in (("train", 4), ("val", 2)):
        for folder in ("photos", "labels"):
            (root / folder / part).mkdir(parents=True)
        for i in range(count):
            mask = ((rows - 20) ** 2 + (columns - 16 - 4 * i) ** 2 < 120).astype(np.uint8)
            image = (60 + 120 * mask[..., None] + rng.integers(0, 40, (40, 48, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / "photos" / part / f"{part}{i}.png")
            Image.fromarray(mask).save(root / "labels" / part / f"{part}{i}.png")
    (root / "splits").mkdir()
    for count in (2, 4):
        names = "\n".join(f"train{i}" for i in range(count))
        (root / "splits" / f"{count}.txt").write_text(names + "\n", encoding="utf-8")
    return root


def test_one_file_and_one_entry_add_a_data_set(discs: Path, tmp_path: Path) -> None:
    done = run_python(package(tmp_path / "with", entry=True), USE, str(discs))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "defaults": [60.0, "timm", "2", "val"],
        "help": ["Whether masks hold 0 for a disc."],
        "layout": "discs",
        "check": 0,
        "all": [4, 0, 2],
        "corner": [0, 1],
        "record": ["discs", 2, ["ground", "disc"], True],
    }


def test_without_the_entry_it_is_unknown(discs: Path, tmp_path: Path) -> None:
    done = run_python(package(tmp_path / "without", entry=False), CHOOSE, str(discs))
    assert done.returncode == 0, done.stderr
    choice, layout = done.stdout.splitlines()
    assert choice.startswith("data.dataset = 'discs': allowed: digits, dense, voc")
    assert "has no folder 'images' of images" in layout
