"""The second column of a list: the mask that it names is the one that is read, or the list is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import published_layouts as layouts
import pytest
from PIL import Image

from viladiff.data import registry
from viladiff.data.dataset import Dataset
from viladiff.data.files.images import read_mask

Make = Callable[..., Path]


def voc(root: Path, split: str = "92", **options: Any) -> Dataset:
    return registry.load_dataset("voc", split, root=str(root), **options)


def relabelled(root: Path, source: str, target: str) -> None:
    """A folder of other masks of the same images: every pixel is of class 1."""
    shutil.copytree(root / source, root / target)
    for path in (root / target).rglob("*.png"):
        Image.fromarray(np.ones_like(read_mask(path, 255))).save(path)


def lines(root: Path, form: str, split: str = "92", *files: str) -> None:
    """Writes the lists anew, ``form`` with each image's id."""
    for path in (root / "splits" / split).glob("*.txt"):
        if not files or path.stem in files:
            ids = [Path(line.split()[0]).stem for line in path.read_text(encoding="utf-8").splitlines()]
            path.write_text("\n".join(form.format(one) for one in ids), encoding="utf-8")


FORMS = {
    "unimatch": "JPEGImages/{0}.jpg SegmentationClassAug/{0}.png",
    "tabs": "JPEGImages/{0}.jpg\tSegmentationClassAug/{0}.png",
    "ps-mt": "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png",
    "dots": "JPEGImages/{0}.jpg ./SegmentationClassAug//{0}.png",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_mask_that_a_list_names_is_read(photo_folder: Make, form: str) -> None:
    root = photo_folder(12, "voc")
    plain = voc(root)
    relabelled(root, "SegmentationClass", "SegmentationClassAug")
    assert voc(root).fingerprint == plain.fingerprint, "a folder that no list names changes nothing"
    lines(root, form)
    named = voc(root)
    assert named.files is not None and plain.files is not None and named.files.ids == plain.files.ids
    assert named.target_path(0) == root / "SegmentationClassAug" / "china_0000.png"
    assert (named.target(0) == 1).all() and (named.val_masks[0] == 1).all()
    assert named.fingerprint != plain.fingerprint and named.split_name == plain.split_name
    lines(root, "JPEGImages/{0}.jpg SegmentationClass/{0}.png", "92", "val")
    assert (voc(root).target(0) == 1).all() and not (voc(root).val_masks[0] == 1).all(), "each list by itself"


def test_a_mask_that_is_not_there_is_refused(photo_folder: Make) -> None:
    root = photo_folder(12, "voc")
    lines(root, FORMS["ps-mt"])
    told = (
        r"labelled\.txt, line 1: names the mask '/SegmentationClassAug/china_0000\.png', which is not a PNG called "
        r"'china_0000\.png' below .*; the mask there is 'SegmentationClass/china_0000\.png'; .*leave the second column"
    )
    with pytest.raises(ValueError, match=told):
        voc(root)
    lines(root, "JPEGImages/{0}.jpg SegmentationClass/{0}.png", "92", "labelled", "val")
    voc(root)  # masks of unlabelled images are not read, and need not be there


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("../secret.png", r"line 1: the mask '\.\./secret\.png' climbs out of "),
        ("SegmentationClass/../../secret.png", "climbs out of "),
        ("/etc/passwd", r"names the mask '/etc/passwd', which is not a PNG"),
        (".hidden/china_0000.png", "which is not a PNG"),
        ("SegmentationClass/flower_0001.png", r"which is not a PNG called 'china_0000\.png'"),
        ("SegmentationClass/china_00.png", r"the mask there is 'SegmentationClass/china_0000\.png'"),
        ("None", r"'china_0000' has None in place of a mask, and needs one"),
    ],
)
def test_masks_that_cannot_be_named(photo_folder: Make, tmp_path: Path, mask: str, message: str) -> None:
    root = photo_folder(12, "voc")
    shutil.copytree(root / "SegmentationClass", root / ".hidden")
    shutil.copy(root / "SegmentationClass" / "china_0000.png", tmp_path / "secret.png")
    path = root / "splits" / "92" / "labelled.txt"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("SegmentationClass/china_0000.png", mask), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        voc(root)


def test_links_out_of_the_root_are_refused(photo_folder: Make, tmp_path: Path) -> None:
    root = photo_folder(12, "voc")
    relabelled(root, "SegmentationClass", "Aug")
    lines(root, "JPEGImages/{0}.jpg Aug/{0}.png")
    voc(root)
    (root / "Aug" / "china_0000.png").rename(tmp_path / "mask.png")
    os.symlink(tmp_path / "mask.png", root / "Aug" / "china_0000.png")
    with pytest.raises(ValueError, match=r"china_0000\.png: leads to .*mask\.png, out of "):
        voc(root)
    shutil.move(root / "Aug", tmp_path / "Aug")
    os.symlink(tmp_path / "Aug", root / "Aug")
    with pytest.raises(ValueError, match=r"Aug: leads to .*, out of "):
        voc(root)


def test_a_folder_of_ones_own_may_pair_any_mask(photo_folder: Make) -> None:
    root = photo_folder(8)
    wanted = read_mask(root / "masks" / "china_0000.png", 6)
    (root / "corrected").mkdir()
    Image.fromarray(np.flip(wanted, 1)).save(root / "corrected" / "erste Maske.png")
    listed = root / "splits" / "labelled" / "labelled.txt"
    for mask, flipped in (
        ("corrected/erste Maske.png", True),
        ("masks/china_0000.png", False),
        ("china_0000.png", False),
    ):
        for gap in (" ", "\t"):
            listed.write_text(f"images/china_0000.jpg{gap}{mask}\nflower_0001", encoding="utf-8")
            found = registry.load_dataset("folder", "labelled", root=str(root)).target(0)
            assert np.array_equal(found, np.flip(wanted, 1) if flipped else wanted), (mask, gap)
    listed.write_text("china_0000 0.93\nflower_0001", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: names the mask '0\.93', which is not a PNG below"):
        registry.load_dataset("folder", "labelled", root=str(root))
    listed.write_text("china_0000 masks/china_000.png\nflower_0001", encoding="utf-8")
    with pytest.raises(ValueError, match=r"leave the second column out; did you mean 'masks/china_000\d\.png'\?$"):
        registry.load_dataset("folder", "labelled", root=str(root))


def test_what_all_and_a_draw_label_is_what_the_lists_name(photo_folder: Make) -> None:
    root = photo_folder(12, "voc", split="1464", unlabelled_masks=True)
    relabelled(root, "SegmentationClass", "Aug")
    lines(root, "JPEGImages/{0}.jpg Aug/{0}.png", "1464")
    every = voc(root, "all")
    assert len(every.labelled) == 9 and all((every.target(i) == 1).all() for i in range(9))
    drawn = voc(root, "1464", split_seed=3)
    assert len(drawn.labelled) == 3 and all((drawn.target(i) == 1).all() for i in range(3))
    lines(root, "JPEGImages/{0}.jpg None", "1464", "unlabelled")
    assert len(voc(root, "all").labelled) == 3, "None is no mask, though there is a file"
    assert {voc(root, "1464", split_seed=seed).files.ids[:3] for seed in range(3)} <= {  # type: ignore[union-attr]
        tuple(np.roll(["china_0000", "flower_0001", "grace_0002"], k)[::step]) for k in range(3) for step in (1, -1)
    }


def test_without_a_list_of_others_the_named_folder_tells_training_images(photo_folder: Make) -> None:
    root = photo_folder(12, "voc", unlabelled_masks=True)
    shutil.copytree(root / "SegmentationClass", root / "Aug")
    (root / "SegmentationClass" / "grace_0005.png").unlink()
    lines(root, "JPEGImages/{0}.jpg Aug/{0}.png", "92", "labelled")
    (root / "splits" / "92" / "unlabelled.txt").unlink()
    data = voc(root)
    assert data.files is not None and "grace_0005" in data.files.ids


@pytest.mark.parametrize("read", ["labelTrainIds", "labelIds"])
def test_another_coding_of_cityscapes_is_the_same_mask(tmp_path: Path, read: str) -> None:
    made = layouts.cityscapes(tmp_path / "city", kinds=["labelTrainIds", "labelIds"])
    if read == "labelIds":
        next((made.root / "gtFine" / "train").rglob("*labelTrainIds.png")).unlink()
    path = made.root / "splits" / "372" / "labeled.txt"
    image = "leftImg8bit/train/{0}/{1}_leftImg8bit.png "

    def found(form: str) -> Dataset:
        text = "\n".join((image + form).format(name.split("_")[0], name) for name in made.labelled)
        path.write_text(text, encoding="utf-8")
        return registry.load_dataset("cityscapes", "372", root=str(made.root))

    same = [found(f"gtFine/train/{{0}}/{{1}}_gtFine_{kind}.png") for kind in ("labelTrainIds", "labelIds")]
    assert len({one.fingerprint for one in same}) == 1
    assert same[0].target_path(0).name.endswith(f"_gtFine_{read}.png")
    for form in ("gtFine/train/{0}/{1}_gtFine_color.png", "gtCoarse/train/{0}/{1}_gtCoarse_labelTrainIds.png", "None"):
        with pytest.raises(ValueError, match=r"labeled\.txt, line 1: .*the mask there is 'gtFine/train/jena/"):
            found(form)
    (made.root / "splits" / "372" / "unlabeled.txt").write_text(
        "\n".join(f"{image.format(name.split('_')[0], name)}None" for name in made.unlabelled), encoding="utf-8"
    )
    data = found("gtFine/train/{0}/{1}_gtFine_labelTrainIds.png")
    assert data.files is not None and data.files.ids[3:] == made.unlabelled


@pytest.mark.parametrize(
    ("name", "split", "wrong"),
    [("coco", "463", "stuff/{}.png"), ("ade20k", "1263", "annotations_v2/training/{}.png")],
)
def test_layouts_of_bare_names(tmp_path: Path, name: str, split: str, wrong: str) -> None:
    made = getattr(layouts, name)(tmp_path / name)
    plain = registry.load_dataset(name, split, root=str(made.root))
    path = next((made.root / "splits").rglob("labeled.txt"))
    images = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines()]
    text = "\n".join(f"{image} {wrong.format(one)}" for image, one in zip(images, made.labelled, strict=True))
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: names the mask"):
        registry.load_dataset(name, split, root=str(made.root))
    source = next(place for place in ("masks", "annotations/training") if (made.root / place).is_dir())
    relabelled(made.root, source, Path(wrong).parent.as_posix())
    assert (registry.load_dataset(name, split, root=str(made.root)).target(0) == 1).all() == (name == "coco")
    assert registry.load_dataset(name, split, root=str(made.root)).fingerprint != plain.fingerprint
