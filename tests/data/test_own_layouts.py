"""Folders as people have them: masks of other names and types, groups, files that are no images, read-only data."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tifffile
from PIL import Image

from viladiff.cli import main
from viladiff.data.files.file_cache import Contents
from viladiff.data.files.groups import groups_of
from viladiff.data.files.images import read_mask
from viladiff.data.files.make_split import SplitOptions, draw_grouped, make_split, write_lists
from viladiff.data.files.run_checks import check_files
from viladiff.data.files.validate import inspect_images, validate_dataset
from viladiff.data.registry import load_dataset
from viladiff.data.sources.detect import open_tree
from viladiff.data.sources.folder import read_classes


@pytest.fixture
def root(photo_folder: Callable[..., Path]) -> Path:
    return photo_folder(8, labelled=4, val=2, sizes=(40, 60), unlabelled_masks=True)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("_mask.png", np.uint8),
        (".tif", np.uint8),
        (".tif", np.uint16),
        (".tif", np.float32),
        (".npy", np.int64),
        ("_l.TIFF", np.int32),
    ],
)
def test_masks_of_other_names_and_types(root: Path, suffix: str, kind: type) -> None:
    wanted = {}
    for path in sorted((root / "masks").iterdir()):
        wanted[path.stem] = read_mask(path, 6)
        new = path.with_name(f"{path.stem}{suffix}")
        path.unlink()
        if suffix.endswith("png"):
            Image.fromarray(wanted[path.stem]).save(new)
        elif suffix.endswith("npy"):
            np.save(new, wanted[path.stem].astype(kind))
        else:
            tifffile.imwrite(new, wanted[path.stem].astype(kind))
    data = load_dataset("folder", "labelled", root=str(root), own={"mask_suffix": suffix})
    assert data.files is not None
    for index in data.labelled.tolist():
        assert np.array_equal(data.target(index), wanted[data.files.ids[index]])
    check_files(data)
    report = validate_dataset(root, processes=1, fields={"mask_suffix": suffix})
    assert report.errors == 0 and int(report.pixels().sum()) == sum(mask.size for mask in wanted.values())
    with pytest.raises(ValueError, match="4 of 4 images have no mask"):
        load_dataset("folder", "labelled", root=str(root))


def test_masks_beside_the_images_are_none_of_them(root: Path) -> None:
    for path in sorted((root / "masks").iterdir()):
        path.rename(root / "images" / f"{path.stem}_mask.png")
    tree, _ = open_tree(root, mask_suffix="_mask.png")
    assert len(tree.images) == len(tree.masks) == 8 and tree.images.keys() == tree.masks.keys()


@pytest.mark.parametrize("suffix", ["_mask.jpg", "png", "", "../.png", "_mask"])
def test_masks_that_lose_numbers_are_refused(root: Path, suffix: str) -> None:
    with pytest.raises(ValueError, match=r"data\.mask_suffix: must be an end .*as _mask\.png, got"):
        open_tree(root, mask_suffix=suffix)


def test_masks_of_numbers_that_are_no_class(tmp_path: Path) -> None:
    for name, mask, message in (
        ("half", np.full((4, 5), 0.5, np.float32), "20 pixels are no whole number"),
        ("bands", np.zeros((4, 5, 2), np.uint16), "a mask of 2 bands"),
        ("class", np.full((4, 5), 6, np.uint16), r"20 pixels are of no class \(6\)"),
        ("minus", np.full((4, 5), -1, np.int16), r"20 pixels are of no class \(-1\)"),
    ):
        np.save(tmp_path / f"{name}.npy", mask)
        with pytest.raises(ValueError, match=rf"{name}\.npy: {message}"):
            read_mask(tmp_path / f"{name}.npy", 6)


def test_an_empty_line_moves_no_class(root: Path) -> None:
    (root / "classes.txt").write_text("ground\nsky\n\nplant\n")
    with pytest.raises(ValueError, match=r"classes\.txt, line 3: is empty; .*'plant' would move up to 2"):
        read_classes(root)
    (root / "classes.txt").write_text("ground\nsky\nplant\n\n  \n")
    assert read_classes(root).names == ("ground", "sky", "plant"), "at the end they move none"


def test_files_that_are_not_used_are_counted_and_named(root: Path, photographs: ModuleType) -> None:
    first = sorted((root / "images").iterdir())[0]
    (root / "images" / "notes.txt").write_text("x")
    (root / "images" / "scan.heic").write_bytes(b"x")
    (root / "masks" / "a.xml").write_text("x")
    photographs.save_mask(root / "masks" / "lost.png", np.zeros((4, 4), np.uint8))
    (root / "images" / ".hidden").write_text("x")
    report = validate_dataset(root, processes=1)
    faults = {Path(fault.path).name: fault.reason for fault in report.faults}
    assert "images end in .jpg" in faults["notes.txt"] and "images end in .jpg" in faults["scan.heic"]
    assert faults["a.xml"] == "is not read: masks are PNG files"
    assert faults["lost.png"] == "there is no image of this name" and ".hidden" not in faults
    data = load_dataset("folder", "labelled", root=str(root))
    note = "4 files are not used: images/notes.txt, images/scan.heic, masks/a.xml, masks/lost.png"
    assert data.unused == (note,) and note in data.notes
    first.rename(first.with_suffix(".jfif"))
    assert load_dataset("folder", "labelled", root=str(root)).unused == (note,), "a JPEG, whatever it is called"


def grouped(photographs: ModuleType, root: Path) -> Path:
    """24 images of 6 patients, of which one has images without a mask."""
    photographs.write(root, 24, labelled=4, val=2, sizes=(40, 50), unlabelled_masks=True)
    for i, path in enumerate(sorted((root / "images").iterdir())):
        name = f"p{i % 6}/{path.stem}"
        for folder, suffix in (("images", ".jpg"), ("masks", ".png")):
            (root / folder / f"p{i % 6}").mkdir(exist_ok=True)
            (root / folder / f"{path.stem}{suffix}").rename(root / folder / f"{name}{suffix}")
    return root


@pytest.mark.parametrize("how", ["folder", "^p[0-9]", "^(p[0-9])/", ",", ";", "\t"])
def test_no_group_is_on_both_sides(photographs: ModuleType, tmp_path: Path, how: str) -> None:
    root = grouped(photographs, tmp_path / "photos")
    tree, classes = open_tree(root)
    if len(how) == 1:  # what separates the columns of a table
        separator, how = how, str(tmp_path / "groups.csv")
        with open(how, "w", newline="") as file:
            csv.writer(file, delimiter=separator).writerows(
                [("image", "group"), *((f"{name}.jpg", name[:2]) for name in tree.images)]
            )
    assert groups_of(tree, how) == {name: name[:2] for name in tree.images}
    for name in [name for name in tree.masks if name.startswith("p0")][1:]:
        tree.masks[name].unlink()
    seen = inspect_images(open_tree(root)[0], classes, 1)
    sizes = set()
    for seed in range(4):
        options = SplitOptions(groups=how, split_dir=tmp_path / "lists")
        found = make_split(root, seen, 5, 4, seed, options)
        labelled, rest, val = found.lists
        sizes.add(val[0][:2])
        assert len(labelled) == 5 and len(val) >= 4 and not {n[:2] for n in val} & {n[:2] for n in (*labelled, *rest)}
        assert found.left_out == 24 - sum(map(len, found.lists))
        write_lists(root, f"s{seed}", found.lists, options)
        data = load_dataset("folder", f"s{seed}", root=str(root), own={"split_dir": str(tmp_path / "lists")})
        assert data.files is not None and set(data.files.ids) == {*labelled, *rest}
    assert len(sizes) > 1, "the seed chooses"


def test_what_is_no_group_is_named(photographs: ModuleType, tmp_path: Path) -> None:
    tree, _ = open_tree(grouped(photographs, tmp_path / "photos"))
    table = tmp_path / "groups.csv"
    table.write_text("p0/china_0000,a\n")
    for how, message in (
        ("p[", "neither a file, nor 'folder', nor a regular expression"),
        ("x[0-9]", "has no such part"),
        ("p", "all 24 images are in one group, 'p'"),
        (str(table), "23 images have no group"),
    ):
        with pytest.raises(ValueError, match=message):
            groups_of(tree, how)
    first, second, *_ = tree.images
    table.write_text(f"image,group\n{first},a\n{second}, \n")
    with pytest.raises(ValueError, match=rf"groups\.csv, row 3: '{second}' has no group; write one"):
        groups_of(tree, str(table))


def test_read_only_data_has_its_lists_elsewhere(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    command = ["data", "split", str(root), "--labelled", "3", "--name", "mine", "--split-dir", "lists", "--quiet"]
    assert main.main(command) == 0
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*")) == before
    data = load_dataset("folder", "mine", root=str(root), own={"split_dir": "lists"})
    assert len(data.labelled) == 3
    report = json.loads(json.dumps([split.name for split in validate_dataset(root, Path("lists"), 1).splits]))
    assert report == ["mine"]


def test_a_check_under_other_fields_is_another(root: Path) -> None:
    """What was found of a file under one declaration says nothing of another."""
    check_files(load_dataset("folder", "labelled", root=str(root)))
    wrong = load_dataset("folder", "labelled", root=str(root), own={"channels": 4})
    with pytest.raises(ValueError, match=r"3 bands, and data\.channels = 4"):
        check_files(wrong)
    assert isinstance(wrong.contents, Contents)


@pytest.mark.parametrize("seed", range(4))
def test_a_large_group_is_not_taken_from_training(seed: int) -> None:
    groups = ["long"] * 9 + ["a", "b", "c"]
    labelled, val = draw_grouped(np.ones((12, 2), bool), groups, 8, 2, seed)
    assert len(labelled) == 8 and len(val) == 2 and "long" not in {groups[i] for i in val}


def test_a_table_of_groups_that_is_missing(root: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.csv: cannot be read as a table of groups: .*No such file"):
        groups_of(open_tree(root)[0], "none.csv")
