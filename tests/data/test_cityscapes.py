"""Cityscapes' layout: two kinds of masks, two families of lists, and what is told apart by more than a file's name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import published_layouts as layouts
import pytest
from PIL import Image

from viladiff.data import registry
from viladiff.data.dataset import Dataset
from viladiff.data.decode_workers import CropRecipe, DecodeRequest, DecodeWorkers, decode_all
from viladiff.data.files import known_splits, make_split
from viladiff.data.files.images import FileMasks, image_size
from viladiff.data.files.known_splits import Published, list_hash
from viladiff.data.files.run_checks import check_files
from viladiff.data.files.validate import inspect_images, validate_dataset
from viladiff.data.sources import cityscapes
from viladiff.data.sources.detect import open_tree
from viladiff.runs.config import RunConfig, override

BY_ID = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
BY_ID |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
"""As the benchmark's own scripts have it: label id to training id."""


def load(root: Path, split: str = "372", family: str = "cps", **own: object) -> Dataset:
    return registry.load_dataset("cityscapes", split, root=str(root), own={"split_family": family, **own})


def ids(data: Dataset) -> tuple[str, ...]:
    assert data.files is not None
    return data.files.ids


def mask_files(root: Path, kind: str) -> list[Path]:
    return sorted((root / "gtFine").rglob(f"*_gtFine_{kind}.png"))


def test_the_table_of_label_ids_is_the_benchmarks(tmp_path: Path) -> None:
    Image.fromarray(np.arange(34, dtype=np.uint8)[None]).save(tmp_path / "a_gtFine_labelIds.png")
    coding = cityscapes._CODINGS[cityscapes.LABEL_IDS]
    found = FileMasks([tmp_path / "a_gtFine_labelIds.png"], 19, coding)[0][0]
    assert found.tolist() == [BY_ID.get(number, 255) for number in range(34)]


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_both_kinds_of_masks_are_the_same_classes(tmp_path: Path, kind: str) -> None:
    made = layouts.cityscapes(tmp_path / "city", kinds=[kind])
    data = load(made.root)
    assert data.num_classes == 19 and data.class_names[18] == "bicycle" and not data.uniform
    assert ids(data) == (*made.labelled, *made.unlabelled)
    assert data.val_files is not None and data.val_files.ids == made.val
    for i, name in enumerate(made.labelled):
        assert np.array_equal(data.target(i), made.labels[name])
    for i, name in enumerate(made.val):
        assert np.array_equal(data.val_masks[i], made.labels[name])
    told = [note for note in check_files(data) if "labelIds" in note]
    assert bool(told) == (kind == "labelIds")
    assert not told or ("9 masks are labelIds files" in told[0] and "0 of them have a labelTrainIds" in told[0])


def test_training_ids_are_read_where_both_are_there_and_the_rest_is_counted(tmp_path: Path) -> None:
    made = layouts.cityscapes(tmp_path / "city", kinds=["labelTrainIds", "labelIds"])
    data = load(made.root)
    assert data.notes == () and data.target_path(0).name.endswith("_gtFine_labelTrainIds.png")
    before = data.target(0)
    mask_files(made.root, "labelTrainIds")[0].unlink()
    fallen = load(made.root)
    assert fallen.target_path(0).name.endswith("_gtFine_labelIds.png")
    assert "9 masks are labelIds files" in fallen.notes[0] and "8 of them have a labelTrainIds" in fallen.notes[0]
    assert np.array_equal(fallen.target(0), before) and fallen.fingerprint != data.fingerprint


def test_one_kind_under_the_others_name_is_refused(tmp_path: Path) -> None:
    made = layouts.cityscapes(tmp_path / "ids", kinds=["labelIds"])
    for path in mask_files(made.root, "labelIds"):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    with pytest.raises(ValueError, match=r"pixels hold (19|2\d).*; a labelTrainIds file holds 0 \.\.\. 18 and 255"):
        check_files(load(made.root))
    made = layouts.cityscapes(tmp_path / "train-ids")
    for path in mask_files(made.root, "labelTrainIds"):
        path.rename(path.with_name(path.name.replace("labelTrainIds", "labelIds")))
    with pytest.raises(ValueError, match=r"pixels hold 255; a labelIds file holds 0 \.\.\. 33, a labelTrainIds"):
        check_files(load(made.root))
    for path in mask_files(made.root, "labelIds"):
        labels = np.asarray(Image.open(path)).copy()
        Image.fromarray(np.where(labels == 255, 7, labels).astype(np.uint8)).save(path)
    told = check_files(load(made.root))
    assert not any("no mask has an ignored pixel" in note for note in told), "ids such as 0 are ignored in labelIds"


def test_training_ids_without_an_ignored_pixel_draw_a_warning(tmp_path: Path) -> None:
    made = layouts.cityscapes(tmp_path / "city")
    assert not any("ignored pixel" in note for note in check_files(load(made.root)))
    for part, wanted in (("train", False), ("val", True)):
        for path in mask_files(made.root, "labelTrainIds"):
            labels = np.asarray(Image.open(path)).copy()
            if part in path.parts:
                Image.fromarray(np.where(labels == 255, 0, labels).astype(np.uint8)).save(path)
        told = check_files(load(made.root))
        assert any("no mask has an ignored pixel" in note for note in told) == wanted, "one in either list is enough"


def test_missing_annotations_are_named(tmp_path: Path) -> None:
    made = layouts.cityscapes(tmp_path / "city")
    shutil.rmtree(made.root / "gtFine" / "val")
    with pytest.raises(
        ValueError, match=r"2 of 2 images have no mask.* 'frankfurt_000000_000294'.*_gtFine_labelTrainIds"
    ):
        load(made.root)
    shutil.rmtree(made.root / "gtFine")
    with pytest.raises(ValueError, match=r"has no gtFine/train/<city>/\*_gtFine_labelTrainIds\.png and no"):
        load(made.root)
    shutil.rmtree(made.root / "leftImg8bit" / "val")
    with pytest.raises(ValueError, match=r"has no folder 'leftImg8bit/val' of images"):
        load(made.root)
    (made.root / "leftImg8bit" / "val").mkdir()
    (made.root / "leftImg8bit" / "val" / "a.png").touch()
    with pytest.raises(ValueError, match=r"leftImg8bit/val: holds no image whose name ends in '_leftImg8bit'"):
        load(made.root)


def test_masks_of_unlabelled_images_are_not_needed(tmp_path: Path) -> None:
    made = layouts.cityscapes(tmp_path / "city")
    before = load(made.root)
    for path in mask_files(made.root, "labelTrainIds"):
        if path.name.removesuffix("_gtFine_labelTrainIds.png") in made.unlabelled:
            path.unlink()
    data = load(made.root)
    assert data.fingerprint == before.fingerprint and ids(data) == ids(before)
    check_files(data)


@pytest.mark.parametrize(
    "form",
    [
        "{1}",
        "leftImg8bit/train/{0}/{1}_leftImg8bit.png",
        "leftImg8bit/train/{0}/{1}_leftImg8bit.png gtFine/train/{0}/{1}_gtFine_labelTrainIds.png",
        "/images/train/{1}.png\t/segmentation/train/{1}_gtFine.png",
        "/images/city_gt_fine/train/{1}_leftImg8bit.png /annotation/city_gt_fine/train/{1}_gtFine.png",
    ],
)
def test_lists_in_every_form(tmp_path: Path, form: str) -> None:
    made = layouts.cityscapes(tmp_path / "city")
    wanted = load(made.root).fingerprint
    path = made.root / "splits" / "372" / "labeled.txt"
    path.write_text("\n".join(form.format(name.split("_")[0], name) for name in made.labelled))
    assert load(made.root).fingerprint == wanted
    path.write_text(f"{made.labelled[0]}\n{made.val[0]}\n")
    with pytest.raises(ValueError, match=rf"line 2: '{made.val[0]}' is not an image of 'leftImg8bit/train'"):
        load(made.root)
    path.write_text(f"{made.labelled[0]}\nleftImg8bit/train/../../{made.labelled[1]}.png\n")
    with pytest.raises(ValueError, match="climbs out of the folder"):
        load(made.root)


def test_two_families_share_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layouts.cityscapes(tmp_path / "city", split="1_8")
    others = (*made.labelled[:1], *made.unlabelled[:2])
    lists = made.root / "splits"
    (lists / "372").mkdir()
    (lists / "372" / "labeled.txt").write_text("\n".join(others))
    known = tuple(
        Published("cityscapes", family, "372", 3, list_hash(names)[:16], "us")
        for family, names in (("cps", made.labelled), ("u2pl", others))
    )
    monkeypatch.setattr(known_splits, "LISTS", known)
    monkeypatch.setattr(known_splits, "_BY_HASH", {one.sha256: one for one in known})
    monkeypatch.setattr(known_splits, "IN_COMMON", {frozenset(one.sha256 for one in known): 1})
    cps, u2pl = load(made.root), load(made.root, family="u2pl")
    assert ids(cps)[:3] == made.labelled and ids(u2pl)[:3] == others and cps.fingerprint != u2pl.fingerprint
    assert cps.split_name == "cityscapes cps 372 (3 images; us)"
    assert "look-alike: cityscapes u2pl 372 (3 images; us) shares 1 of its images" in cps.notes[0]
    assert "leftImg8bit/val: 2 images, which are not the validation list of cityscapes" in cps.notes[1]
    shutil.rmtree(lists / "1_8")
    with pytest.raises(ValueError, match=r"is the list cityscapes u2pl 372 .*but data\.split_family = 'cps'"):
        load(made.root)
    shutil.copytree(lists / "372", lists / "744")
    with pytest.raises(ValueError, match=r"is the list cityscapes u2pl 372 .*and data\.split = '744'"):
        load(made.root, "744", "u2pl")


def test_its_configuration_reaches_the_reader(tmp_path: Path) -> None:
    made = layouts.cityscapes(tmp_path / "data" / "cityscapes")
    changes = {"data.dataset": "cityscapes", "data.split": "372", "runtime.data_root": str(tmp_path / "data")}
    cfg = override(RunConfig(), changes)
    assert (cfg.eval.protocol, cfg.data.crop) == ("sliding_window", 800)
    assert registry.load_dataset(*registry.dataset_spec(cfg)).fingerprint == load(made.root).fingerprint
    changes |= {"data.split_dir": str(tmp_path / "nowhere"), "data.split_family": "u2pl"}
    with pytest.raises(ValueError, match=r"data\.split_dir = .*there is no such directory"):
        registry.load_dataset(*registry.dataset_spec(override(RunConfig(), changes)))
    with pytest.raises(ValueError, match=r"has no list 1_16/labelled\.txt"):
        load(made.root, "186")


def test_decoding_processes_read_label_ids_too(tmp_path: Path) -> None:
    made = layouts.cityscapes(tmp_path / "city", kinds=["labelIds"])
    data = load(made.root)
    assert isinstance(data.masks, FileMasks) and data.files is not None
    recipe = CropRecipe(32, (1.0, 1.0), 0.5, 19, data.masks.coding)
    draws = np.random.default_rng(0).random((3, 4)).tolist()
    samples = [
        DecodeRequest(str(data.files.paths[i]), str(data.target_path(i)), tuple(draw)) for i, draw in enumerate(draws)
    ]
    decoders = DecodeWorkers(recipe, 1, 3, 0)
    try:
        there = decoders.take(samples)
        here = decode_all(samples, recipe)
        assert np.array_equal(there.masks, here.masks) and np.array_equal(there.images, here.images)
    finally:
        decoders.close()
    assert {*np.unique(here.masks).tolist()} <= {*layouts.TRAIN_IDS.tolist(), 255}


def test_check_and_split_know_the_layout(tmp_path: Path) -> None:
    made = layouts.cityscapes(tmp_path / "city", kinds=["labelIds"])
    report = validate_dataset(made.root, processes=1)
    assert report.errors == 0 and set(report.seen) == set(made.labels)
    assert [split.counts for split in report.splits] == [(3, 4, 2)]
    assert any("labelIds files" in fault.reason for fault in report.faults)
    assert not any("masks are PNG files" in fault.reason for fault in report.faults), "gtFine holds other files as well"
    tree, classes = open_tree(made.root)
    seen = inspect_images(tree, classes, 1)
    dealt = make_split.make_split(made.root, seen, 4, None, 0)
    assert len(dealt.lists.labelled) == 4 and dealt.lists.val == made.val
    assert not set(made.val) & {*dealt.lists.labelled, *dealt.lists.unlabelled}
    make_split.write_lists(made.root, "186", dealt.lists)
    assert ids(load(made.root, "186"))[:4] == dealt.lists.labelled
    (made.root / "splits" / "val.txt").write_text(made.val[0], encoding="utf-8")
    dealt = make_split.make_split(made.root, seen, 7, None, 0)
    assert dealt.lists.val == made.val[:1] and not dealt.lists.unlabelled
    assert made.val[1] not in dealt.lists.labelled, "what is for validation is not dealt, whether listed or not"
    dealt = make_split.make_split(made.root, seen, 3, None, 0)
    make_split.write_lists(made.root, "744", dealt.lists)
    assert len(load(made.root, "744").unlabelled) == 4
    with pytest.raises(ValueError, match=r"--val 3: cityscapes is validated on all of 'leftImg8bit/val'"):
        make_split.make_split(made.root, seen, 4, 3, 0)


def test_two_files_of_one_image_are_refused(tmp_path: Path) -> None:
    made = layouts.cityscapes(tmp_path / "city")
    name = f"{made.labelled[0]}_leftImg8bit.png"
    path = next((made.root / "leftImg8bit").rglob(name))
    shutil.copy(path, made.root / "leftImg8bit" / "val" / "frankfurt" / name)
    with pytest.raises(ValueError, match=f"two files for one image, '{made.labelled[0]}'"):
        load(made.root)
    assert image_size(path) == made.labels[made.labelled[0]].shape
