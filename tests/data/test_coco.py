"""COCO's layout, and masks made from its instances: painted as stated, resumed, refused where they would be wrong."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import published_layouts as layouts
import pytest
from PIL import Image
from torchvision.models._meta import _COCO_CATEGORIES

from viladiff.cli import main
from viladiff.data import registry
from viladiff.data.dataset import Dataset
from viladiff.data.files import known_splits
from viladiff.data.files.images import read_mask
from viladiff.data.files.known_splits import Published, list_hash
from viladiff.data.files.run_checks import check_files
from viladiff.data.files.validate import validate_dataset
from viladiff.data.sources import coco_masks
from viladiff.data.sources.coco import CATEGORY_IDS, CLASS_NAMES
from viladiff.data.sources.coco_masks import (
    MANIFEST,
    Made,
    Region,
    Task,
    make_masks,
    paint,
    read_instances,
    read_own_instances,
)
from viladiff.data.sources.coco_regions import unpacked_runs
from viladiff.runs.config import RunConfig, override

SQUARE, WHOLE = [2, 2, 6, 2, 6, 6, 2, 6], [0, 0, 10, 0, 10, 8, 0, 8]
"""Polygons (x, y, ...) of rows and columns 2 ... 5, and of all of an image of 8 rows and 10 columns."""


def load(root: Path, split: str = "463", **options: Any) -> Dataset:
    return registry.load_dataset("coco", split, root=str(root), **options)


def painted(*regions: tuple[int, Any]) -> tuple[np.ndarray, int]:
    return paint(Task("a", 8, 10, tuple(Region(label, what, "annotation 7") for label, what in regions)))


def square(label: int, inside: int) -> np.ndarray:
    wanted = np.full((8, 10), label, np.uint8)
    wanted[2:6, 2:6] = inside
    return wanted


def test_classes_are_the_80_things_in_order_of_category() -> None:
    """The same as torchvision's table, gaps and all."""
    names = {number: name for number, name in enumerate(_COCO_CATEGORIES) if name not in ("__background__", "N/A")}
    assert dict(zip(CATEGORY_IDS, CLASS_NAMES[1:], strict=True)) == names
    assert (CLASS_NAMES[0], len(CLASS_NAMES), CATEGORY_IDS[0], CATEGORY_IDS[-1]) == ("background", 81, 1, 90)


def test_the_layout_and_its_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layouts.coco(tmp_path / "data" / "coco", split="1_256")
    data = load(tmp_path / "data")
    assert data.num_classes == 81 and data.files is not None and data.val_files is not None
    assert data.files.ids == (*made.labelled, *made.unlabelled) and data.val_files.ids == made.val
    for i, name in enumerate(made.labelled):
        assert np.array_equal(data.target(i), made.labels[name])
    check_files(data)
    lists = made.root / "splits"
    (lists / "256_all.txt").write_text("\n".join(made.labelled), encoding="utf-8")
    shutil.rmtree(lists / "1_256")
    assert load(made.root).fingerprint == data.fingerprint, "PseudoSeg's own list, of bare ids"
    (lists / "val.txt").write_text(f"val2017/{made.val[1]}.jpg masks/{made.val[1]}.png", encoding="utf-8")
    assert len(load(made.root).val_images) == 1
    known = Published("coco", "pseudoseg", "232", 3, list_hash(made.labelled)[:16], "us")
    monkeypatch.setattr(known_splits, "LISTS", (known,))
    monkeypatch.setattr(known_splits, "_BY_HASH", {known.sha256: known})
    with pytest.raises(ValueError, match=r"is the list coco pseudoseg 232 .*but data\.split = '463'"):
        load(made.root)
    shutil.copy(lists / "256_all.txt", lists / "232.txt")
    assert load(made.root, "232").split_name == "coco pseudoseg 232 (3 images; us)"


def test_its_configuration_reaches_the_reader(tmp_path: Path) -> None:
    made = layouts.coco(tmp_path / "coco")
    cfg = override(RunConfig(), {"data.dataset": "coco", "runtime.data_root": str(made.root)})
    assert cfg.eval.protocol == "original" and cfg.train.epochs == 20
    assert registry.load_dataset(*registry.dataset_spec(cfg)).fingerprint == load(made.root).fingerprint


def test_masks_are_those_that_the_instances_were_made_of(tmp_path: Path) -> None:
    made = layouts.coco(tmp_path / "coco", masks=False)
    with pytest.raises(ValueError, match=r"has no PNGs in 'masks'; `viladiff data coco-masks .*coco` makes them"):
        load(made.root)
    heard: list[tuple[int, int]] = []
    found = make_masks(made.root, processes=1, advance=lambda done, of: heard.append((done, of)))
    assert found == Made(written=9) and heard == [(7, 7), (2, 2)]
    for name, labels in made.labels.items():
        assert np.array_equal(read_mask(made.root / "masks" / f"{name}.png", 81), labels)
    check_files(load(made.root))
    assert validate_dataset(made.root, processes=1).errors == 0


def test_smaller_instances_lie_on_top_in_whatever_order_they_come() -> None:
    for regions in (((5, [SQUARE]), (9, [WHOLE])), ((9, [WHOLE]), (5, [SQUARE]))):
        labels, hollow = painted(*regions)
        assert np.array_equal(labels, square(9, 5)) and hollow == 0
    labels, _ = painted((5, [SQUARE]), (6, [SQUARE]))
    assert np.array_equal(labels, square(0, 6)), "of equal ones the later"


def test_crowds_are_ignored_and_painted_by_area_too() -> None:
    counts = {"size": [8, 10], "counts": [0, 80]}  # uncompressed, as crowds are
    assert np.array_equal(painted((255, counts), (5, [SQUARE]))[0], square(255, 5))
    assert np.array_equal(painted((9, [WHOLE]), (255, [SQUARE]))[0], square(9, 255))


def test_several_polygons_are_one_region_and_those_without_an_area_are_counted() -> None:
    labels, hollow = painted((5, [SQUARE, [8, 0, 10, 0, 10, 8, 8, 8], [1, 1, 4, 4], [3, 3]]))
    wanted = square(0, 5)
    wanted[:, 8:] = 5
    assert np.array_equal(labels, wanted) and hollow == 2, "four numbers are no box"
    assert painted((5, []))[1] == painted((5, [[1, 1, 4, 4]]))[1] == 1
    assert painted((5, {"size": [8, 10], "counts": [80]}))[1] == 1
    assert not painted()[0].any()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [10, 8], "counts": [80]}, r"its size is \[10, 8\], the image's \[8, 10\]"),
        ({"counts": [80]}, "'size'"),
        ([["a"] * 6], "could not convert"),
        (None, "not iterable"),
        (7, "not iterable"),
        ({"size": [8, 10], "counts": [1000]}, "its runs do not make up the image"),
        ({"size": [8, 10], "counts": [10, 20]}, "its runs do not make up the image"),
        ({"size": [8, 10], "counts": "zzzz"}, "its runs do not make up the image|nvalid RLE"),
        ({"size": [8, 10], "counts": "P2"}, "its runs do not make up the image"),
    ],
)
def test_what_is_no_segmentation_is_named(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"annotation 7: its segmentation cannot be read: .*{message}"):
        painted((5, segmentation))


def test_images_without_annotation_and_crowds_are_counted(tmp_path: Path) -> None:
    made = layouts.coco(tmp_path / "coco", masks=False)
    content = layouts.instances(made, made.val)
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != int(made.val[0])]
    content["annotations"][0]["iscrowd"] = 1
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    found = make_masks(made.root, [path], tmp_path / "masks", 1)
    assert (found.written, found.empty, found.crowds, found.hollow) == (2, 1, 1, 0)
    assert not read_mask(tmp_path / "masks" / f"{made.val[0]}.png", 81).any()
    assert (read_mask(tmp_path / "masks" / f"{made.val[1]}.png", 81) == 255).any()


def changed(content: dict[str, Any], where: str, **fields: Any) -> dict[str, Any]:
    return content | {where: [content[where][0] | fields, *content[where][1:]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [c], "has no list 'images'"),
        (lambda c: {k: v for k, v in c.items() if k != "categories"}, "has no list 'categories'"),
        (lambda c: c | {"annotations": {}}, "has no list 'annotations'"),
        (lambda c: c | {"categories": c["categories"][:1]}, "not COCO's 80 things: 2 is 'missing' here and 'bicycle'"),
        (lambda c: changed(c, "categories", name="people"), "1 is 'people' here and 'person' there"),
        (lambda c: c | {"categories": [*c["categories"], {"id": 92, "name": "banner"}]}, "92 is 'banner' .* 'unused'"),
        (
            lambda c: changed(c, "annotations", category_id=12),
            "annotation 1 of 1.jpg: category_id = 12 is none of COCO's 80",
        ),
        (lambda c: changed(c, "annotations", image_id=99), "annotation 1: is of image 99, which the file does not"),
        (lambda c: changed(c, "annotations", image_id=[1]), "unhashable"),
        (lambda c: changed(c, "images", file_name="../1.jpg"), "file_name = '../1.jpg' must be a bare name"),
        (lambda c: changed(c, "images", file_name="/1.jpg"), "must be a bare name"),
        (lambda c: changed(c, "images", file_name=".hidden.jpg"), "must be a bare name"),
        (lambda c: changed(c, "images", height=0), "height and width are 0"),
        (lambda c: c | {"images": [{"id": 1}]}, "an entry lacks 'file_name'"),
        (lambda c: c | {"annotations": ["a"]}, "not a file of COCO's instances"),
    ],
)
def test_a_file_that_is_not_of_cocos_instances(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 8, "width": 10}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [SQUARE]}],
        "categories": [
            {"id": number, "name": name} for number, name in zip(CATEGORY_IDS, CLASS_NAMES[1:], strict=True)
        ],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert len(read_instances(path)) == 1
    path.write_text(json.dumps(change(content)), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"captions\.json: .*{message}"):
        make_masks(tmp_path, [path], tmp_path / "masks", 1)
    assert not (tmp_path / "masks").exists()


def test_files_that_are_no_json_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    with pytest.raises(ValueError, match=r"annotations/instances_train2017\.json: there is no such file; unpack"):
        make_masks(tmp_path)
    with pytest.raises(ValueError, match=r"instances\.json: cannot be read \(No such file"):
        make_masks(tmp_path, [path])
    for text in (b'{"images": [', b"\x89PNG\r\n", b""):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"instances\.json: not JSON: "):
            make_masks(tmp_path, [path])


def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layouts.coco(tmp_path / "coco", masks=False)
    monkeypatch.setattr(coco_masks, "CHUNK", 2)

    def stop(done: int, of: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_masks(made.root, processes=1, advance=stop)
    folder = made.root / "masks"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(before) == 4
    assert make_masks(made.root, processes=1) == Made(written=5, there=4)
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert make_masks(made.root, processes=1) == Made(there=9)
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *(f"{name}.png" for name in made.labels)}


def test_masks_of_other_instances_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    made = layouts.coco(tmp_path / "coco")
    with pytest.raises(ValueError, match=r"7 masks, first 000000000100\.png, were not made from this instances_train"):
        make_masks(made.root, processes=1)
    shutil.rmtree(made.root / "masks")
    make_masks(made.root, processes=1)
    path = made.root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"annotations": content["annotations"][1:]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"2 masks, first 000000000001\.png, were not made from this instances_val"):
        make_masks(made.root, processes=1)


def test_two_processes_make_the_same_and_leave_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layouts.coco(tmp_path / "coco", masks=False)
    monkeypatch.setattr(coco_masks, "CHUNK", 2)
    assert make_masks(made.root, processes=2) == Made(written=9)
    assert make_masks(made.root, out=tmp_path / "other", processes=1) == Made(written=9)
    for name in made.labels:
        one, other = ((folder / f"{name}.png").read_bytes() for folder in (made.root / "masks", tmp_path / "other"))
        assert one == other
        assert Image.open(io.BytesIO(one)).size == made.labels[name].shape[::-1]
    assert not multiprocessing.active_children()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = layouts.coco(tmp_path / "coco", masks=False)
    words = ["data", "coco-masks", str(made.root), "--processes", "1", "--quiet"]
    assert main.main(words) == 0
    assert "9 masks written, 0 existed already\n0 images have no annotation" in capsys.readouterr().out
    assert main.main(words) == 0
    assert "0 masks written, 9 existed already" in capsys.readouterr().out
    assert main.main(["data", "coco-masks", str(tmp_path / "nowhere")]) == 2
    assert "instances_train2017.json: there is no such file" in capsys.readouterr().err


FAR = 1_000_000_000


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, float("nan"), 1, 2, 2]], "x = nan of a point, and the image has 10 x 8 pixels"),
        ([[0, 0, 5, float("inf"), 2, 2]], "y = inf of a point"),
        ([[0, 0, FAR, 0, FAR, FAR, 0, FAR]], "x = 1000000000 of a point"),
        ([[0, 0, 5, -9, 2, 2]], "y = -9 of a point"),
        ([[True, 0, 5, 5, 2, 2]], "could not convert 'True'"),
        ({"size": [8, 10], "counts": [80, FAR, -FAR]}, "its runs do not make up the image"),
        ({"size": [8, 10], "counts": [float("nan"), 80]}, "its runs must be whole numbers"),
        ({"size": [FAR, FAR], "counts": [FAR * FAR]}, r"its size is \[1000000000, 1000000000\]"),
        ({"size": [8, 10], "counts": "o" * 40}, "invalid RLE"),
        ({"size": [8, 10], "counts": None}, "its counts must be a list"),
    ],
)
def test_numbers_that_would_hang_or_end_the_process_are_refused_first(
    segmentation: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pycocotools import mask

    monkeypatch.setattr(mask, "frPyObjects", lambda *_: pytest.fail("reached pycocotools"))
    monkeypatch.setattr(mask, "decode", lambda *_: pytest.fail("reached pycocotools"))
    with pytest.raises(ValueError, match=rf"annotation 7: its segmentation cannot be read: .*{message}"):
        painted((5, segmentation))


def test_packed_runs_are_those_of_pycocotools() -> None:
    from pycocotools import mask

    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels = np.asfortranarray((rng.random((37, 53)) > rng.random()).astype(np.uint8))
        packed = mask.encode(pixels)["counts"].decode()
        edges = np.flatnonzero(np.diff(pixels.ravel("F"))) + 1
        runs = np.diff([0, *edges, pixels.size]).tolist()
        assert unpacked_runs(packed) == ([0, *runs] if pixels[0, 0] else runs)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (100_000, 100_000, "more than 178,956,970 pixels"),
        (0, 5, "height and width are 0 and 5"),
        ("8", 5, "must be whole numbers"),
        (8.5, 5, "must be whole numbers"),
        (True, 5, "must be whole numbers"),
    ],
)
def test_sides_that_no_mask_can_have_are_refused(tmp_path: Path, height: Any, width: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"own\.json: image 1: .*{message}"):
        read_own_instances(own_json(tmp_path / "own.json", height=height, width=width))


def test_json_that_is_no_json_of_numbers(tmp_path: Path) -> None:
    path = own_json(tmp_path / "own.json")
    path.write_text(path.read_text().replace('"height": 8', '"height": NaN'))
    with pytest.raises(ValueError, match=r"own\.json: not JSON: it holds NaN, which is no number"):
        read_own_instances(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"own\.json: not JSON"):
        read_own_instances(path)


def own_json(path: Path, **image: Any) -> Path:
    """Instances of one's own: categories 0 (of none, as Roboflow's), 3 and 7; images in a subfolder."""
    images = [{"id": 1, "file_name": "images/day 1/a.jpg", "height": 8, "width": 10, **image}]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 7, "segmentation": [WHOLE], "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 3, "segmentation": [SQUARE], "iscrowd": 0},
    ]
    categories = [{"id": 0, "name": "things"}, {"id": 7, "name": "leaf"}, {"id": 3, "name": "stem"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_ones_own_instances_become_masks_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "photos"
    (root / "images" / "day 1").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(root / "images" / "day 1" / "a.jpg")
    file = own_json(tmp_path / "own.json")
    assert main.main(["data", "coco-masks", str(root), "--own", "--instances", str(file), "--quiet"]) == 0
    assert (root / "classes.txt").read_text() == "background\nstem\nleaf\n"
    assert np.array_equal(read_mask(root / "masks" / "day 1" / "a.png", 3), square(2, 1))
    report = validate_dataset(root, processes=1)
    assert [fault.reason for fault in report.faults if fault.level == "error"] == [
        "1 classes are in no mask: background"
    ]
    capsys.readouterr()
    (root / "classes.txt").write_text("cat\ndog\n")
    assert main.main(["data", "coco-masks", str(root), "--own", "--instances", str(file), "--quiet"]) != 0
    assert "another classes.txt" in capsys.readouterr().err


def test_a_file_that_fails_leaves_no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    file = own_json(tmp_path / "own.json")

    def fail(*given: Any) -> None:
        raise ValueError("a region that cannot be painted")

    monkeypatch.setattr(coco_masks, "_made", fail)
    with pytest.raises(ValueError, match="cannot be painted"):
        coco_masks.make_own_masks(tmp_path, [file])
    assert not (tmp_path / "classes.txt").exists()


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "images/../../a.jpg", ".hidden/a.jpg", "a"])
def test_ones_own_names_lie_below_the_images(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"image 1: file_name = .* must lie below images/"):
        read_own_instances(own_json(tmp_path / "own.json", file_name=name))


def changed_own(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write ``own_json`` with a change of its content."""
    content = json.loads(own_json(path).read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_ids_that_are_text_or_fractions_are_numbers(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["images"][0]["id"] = "1"
        content["categories"][1]["id"] = "7"
        content["annotations"][1] |= {"image_id": 1.0, "category_id": 3.0}

    (task,), classes = read_own_instances(changed_own(tmp_path / "own.json", change))
    assert classes == ("background", "stem", "leaf")
    assert np.array_equal(paint(task)[0], square(2, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"].append({**c["images"][0], "file_name": "b.jpg"}), "image 1: two entries have this id"),
        (lambda c: c["images"].append({**c["images"][0], "id": 2}), "images 1 and 2 would have one mask, day 1/a.png"),
        (
            lambda c: c["annotations"][0].update(category_id=8, iscrowd=0) or c["categories"].append({"id": 8}),
            r"an entry lacks 'name': number 4 of categories, \{'id': 8\}",
        ),
        (
            lambda c: c["annotations"][0].pop("segmentation"),
            r"annotation 1 of images/day 1/a\.jpg: has no segmentation; a box alone makes no mask",
        ),
        (
            lambda c: [one.update(segmentation=[]) for one in c["annotations"]],
            "none of its 2 annotations has a segmentation; boxes alone",
        ),
        (
            lambda c: [one.update(segmentation=[[0.1, 0, 1, 0.5, 0, 1]]) for one in c["annotations"]],
            r"all points of its 2 segmentations lie in 0\.\.1, .*; multiply x by the image's width",
        ),
        (lambda c: c["images"][0].update(file_name="https://x.org/a.jpg"), "must lie below images/"),
    ],
)
def test_ones_own_files_that_would_give_other_masks_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"own\.json: .*{message}"):
        read_own_instances(changed_own(tmp_path / "own.json", change))


def test_images_beside_ones_own_file_are_compared_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "photos"
    (root / "images" / "day 1").mkdir(parents=True)
    for name, size in (("day 1/a.jpg", (8, 10)), ("more.jpg", (8, 10))):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(root / "images" / name)

    def change(content: dict[str, Any]) -> None:
        content["images"].append({**content["images"][0], "id": 2, "file_name": "gone.jpg"})
        content["annotations"].append({**content["annotations"][0], "id": 3, "image_id": 2, "segmentation": [[1, 1]]})

    words = ["data", "coco-masks", str(root), "--own", "--instances", "", "--quiet"]
    words[5] = str(changed_own(tmp_path / "own.json", change))
    assert main.main(words) == 0
    said = capsys.readouterr().out
    assert "1 images of the file are not in images/, first 'gone'" in said
    assert "1 images are not in the file and have no mask of it, first 'more'" in said
    assert "were skipped, in 1 images, first 'gone'" in said
    Image.fromarray(np.zeros((10, 8, 3), np.uint8)).save(root / "images" / "day 1" / "a.jpg")
    assert main.main(words) == 2
    assert "image 'day 1/a' has 10 x 8 pixels (width x height) in it, and " in capsys.readouterr().err
    (root / "images" / "day 1" / "a.jpg").unlink()
    assert main.main(words) == 2
    assert "none of its 2 images is in " in capsys.readouterr().err
