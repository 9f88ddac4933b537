"""ADE20K's layout: masks as published and shifted ones, and that neither is taken for the other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import published_layouts as layouts
import pytest
from PIL import Image

from viladiff.cli import main
from viladiff.data import registry
from viladiff.data.dataset import Dataset
from viladiff.data.files import known_splits
from viladiff.data.files.images import FileMasks
from viladiff.data.files.known_splits import Published, list_hash
from viladiff.data.files.run_checks import check_files
from viladiff.data.files.validate import validate_dataset
from viladiff.data.sources import ade20k
from viladiff.runs.config import RunConfig, override


def load(root: Path, split: str = "1263", **own: object) -> Dataset:
    return registry.load_dataset("ade20k", split, root=str(root), own=own)


def test_all_numbers_of_a_published_mask(tmp_path: Path) -> None:
    Image.fromarray(np.arange(151, dtype=np.uint8)[None]).save(tmp_path / "a.png")
    found = FileMasks([tmp_path / "a.png"], 150, ade20k.AS_PUBLISHED)[0][0]
    assert found.tolist() == [255, *range(150)]
    with pytest.raises(ValueError, match=r"pixels hold 150; .*data\.reduce_zero_label=true"):
        FileMasks([tmp_path / "a.png"], 150, ade20k.SHIFTED)[0]
    Image.fromarray(np.array([[*range(150), 255]], np.uint8)).save(tmp_path / "b.png")
    assert FileMasks([tmp_path / "b.png"], 150, ade20k.SHIFTED)[0][0].tolist() == [*range(150), 255]
    with pytest.raises(ValueError, match=r"pixels hold 255; .*data\.reduce_zero_label=false"):
        FileMasks([tmp_path / "b.png"], 150, ade20k.AS_PUBLISHED)[0]


def test_names_are_150_in_the_benchmarks_order() -> None:
    names = ade20k.CLASS_NAMES
    assert len(names) == len(set(names)) == 150
    known = {0: "wall", 1: "building", 2: "sky", 12: "person", 20: "car", 65: "toilet", 89: "television receiver"}
    known |= {115: "bag", 136: "traffic light", 148: "clock", 149: "flag"}
    assert {place: names[place] for place in known} == known


@pytest.mark.parametrize("shifted", [False, True])
def test_both_kinds_of_masks_are_the_same_classes(tmp_path: Path, shifted: bool) -> None:
    made = layouts.ade20k(tmp_path / "ADE", shifted=shifted)
    data = load(made.root, reduce_zero_label=not shifted)
    assert data.num_classes == 150 and data.files is not None and data.val_files is not None
    assert data.files.ids == (*made.labelled, *made.unlabelled) and data.val_files.ids == made.val
    for i, name in enumerate(made.labelled):
        assert np.array_equal(data.target(i), made.labels[name])
    assert not any("ignored pixel" in note for note in check_files(data))
    wrong = load(made.root, reduce_zero_label=shifted)
    with pytest.raises(ValueError, match=rf"data\.reduce_zero_label={'false' if shifted else 'true'}"):
        check_files(wrong)
    assert wrong.fingerprint != data.fingerprint


def test_published_masks_that_are_taken_for_shifted_ones_draw_a_warning(tmp_path: Path) -> None:
    """Without a pixel of the last class, nothing in a single file gives them away."""
    made = layouts.ade20k(tmp_path / "ADE")
    for path in (made.root / "annotations").rglob("*.png"):
        labels = np.asarray(Image.open(path)).copy()
        Image.fromarray(np.where(labels == 150, 5, labels).astype(np.uint8)).save(path)
    told = check_files(load(made.root, reduce_zero_label=False))
    assert any("no mask has an ignored pixel" in note and "reduce_zero_label=true" in note for note in told)


def test_its_configuration_reaches_the_reader(tmp_path: Path) -> None:
    made = layouts.ade20k(tmp_path / "data" / "ADEChallengeData2016", shifted=True)
    changes = {"data.dataset": "ade20k", "runtime.data_root": str(tmp_path / "data"), "data.reduce_zero_label": "false"}
    cfg = override(RunConfig(), changes)
    assert cfg.eval.protocol == "original"
    data = registry.load_dataset(*registry.dataset_spec(cfg))
    assert data.fingerprint == load(made.root, reduce_zero_label=False).fingerprint
    check_files(data)


def test_lists_are_found_under_their_usual_names_and_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layouts.ade20k(tmp_path / "ADE", split="1_32")
    path = made.root / "splits" / "1_32" / "labeled.txt"
    path.write_text("\n".join(made.labelled), encoding="utf-8")
    assert load(made.root, "631").split_name.startswith("no published list: 3 images")
    known = Published("ade20k", "semivl", "632", 3, list_hash(made.labelled)[:16], "us")
    monkeypatch.setattr(known_splits, "LISTS", (known,))
    monkeypatch.setattr(known_splits, "_BY_HASH", {known.sha256: known})
    assert load(made.root, "632").split_name == "ade20k semivl 632 (3 images; us)"
    with pytest.raises(ValueError, match=r"is the list ade20k semivl 632 .*but data\.split = '631'"):
        load(made.root, "631")


def test_missing_folders_are_named(tmp_path: Path) -> None:
    made = layouts.ade20k(tmp_path / "ADE")
    shutil.rmtree(made.root / "annotations" / "validation")
    with pytest.raises(ValueError, match=r"images/validation: 2 of 2 images have no mask, first 'ADE_val_00000001'"):
        load(made.root)
    shutil.rmtree(made.root / "annotations")
    with pytest.raises(ValueError, match=r"has no PNGs in 'annotations/training'"):
        load(made.root)
    shutil.rmtree(made.root / "images" / "training")
    with pytest.raises(ValueError, match=r"has no folder 'images/training' of images"):
        load(made.root)


def test_check_knows_both_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = layouts.ade20k(tmp_path / "ADE", shifted=True)
    report = validate_dataset(made.root, processes=1)
    wrong = [fault.reason for fault in report.faults if fault.path.endswith(".png")]
    assert len(wrong) == 9 and all("reduce_zero_label=false" in reason for reason in wrong)
    words = ["data", "check", str(made.root), "--out", str(tmp_path / "page"), "--processes", "1", "--quiet"]
    assert main.main([*words, "--shifted"]) == 0
    told = capsys.readouterr().out
    assert "data.split=1263: 3 labelled, 4 unlabelled, 2 validation images" in told and "flag" in told
