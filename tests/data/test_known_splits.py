"""Published lists are recognised whatever their form, and what looks like one and is not says so."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from viladiff.data.files import known_splits
from viladiff.data.files.known_splits import (
    LISTS,
    Published,
    identify_split,
    list_hash,
    missing_unlabelled,
    same_size,
    similarly_named,
)
from viladiff.data.files.split_lists import SplitKey, find_lists

SHARED = Path(os.environ.get("VILADIFF_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "splits"
LISTED = {
    "unimatch-v2/pascal/92/labeled.txt": ("voc", "hq", "92"),
    "unimatch-v2/pascal/183/labeled.txt": ("voc", "hq", "183"),
    "unimatch-v2/pascal/366/labeled.txt": ("voc", "hq", "366"),
    "unimatch-v2/pascal/732/labeled.txt": ("voc", "hq", "732"),
    "unimatch-v2/pascal/1464/labeled.txt": ("voc", "hq", "1464"),
    "unimatch-v2/pascal/val.txt": ("voc", "val", "val"),
    "allspark-aug/1_16/labeled.txt": ("voc", "aug_cps", "662"),
    "allspark-aug/1_8/labeled.txt": ("voc", "aug_cps", "1323"),
    "allspark-aug/1_4/labeled.txt": ("voc", "aug_cps", "2646"),
    "allspark-aug/1_2/labeled.txt": ("voc", "aug_cps", "5291"),
    "allspark-aug/u2pl_1_16/labeled.txt": ("voc", "aug_u2pl", "662"),
    "allspark-aug/u2pl_1_8/labeled.txt": ("voc", "aug_u2pl", "1323"),
    "allspark-aug/u2pl_1_4/labeled.txt": ("voc", "aug_u2pl", "2646"),
    "unimatch-v2/cityscapes/1_30/labeled.txt": ("cityscapes", "cps", "100"),
    "unimatch-v2/cityscapes/1_16/labeled.txt": ("cityscapes", "cps", "186"),
    "unimatch-v2/cityscapes/1_8/labeled.txt": ("cityscapes", "cps", "372"),
    "unimatch-v2/cityscapes/1_4/labeled.txt": ("cityscapes", "cps", "744"),
    "unimatch-v2/cityscapes/1_2/labeled.txt": ("cityscapes", "cps", "1488"),
    "unimatch-v2/cityscapes/val.txt": ("cityscapes", "val", "val"),
    "unimatch-v2/coco/1_512/labeled.txt": ("coco", "pseudoseg", "232"),
    "unimatch-v2/coco/1_256/labeled.txt": ("coco", "pseudoseg", "463"),
    "unimatch-v2/coco/1_128/labeled.txt": ("coco", "pseudoseg", "925"),
    "unimatch-v2/coco/1_64/labeled.txt": ("coco", "pseudoseg", "1849"),
    "unimatch-v2/coco/1_32/labeled.txt": ("coco", "pseudoseg", "3697"),
    "unimatch-v2/coco/val.txt": ("coco", "val", "val"),
    "unimatch-v2/ade20k/1_64/labeled.txt": ("ade20k", "unimatch_v2", "316"),
    "unimatch-v2/ade20k/1_32/labeled.txt": ("ade20k", "unimatch_v2", "631"),
    "unimatch-v2/ade20k/1_16/labeled.txt": ("ade20k", "unimatch_v2", "1263"),
    "unimatch-v2/ade20k/1_8/labeled.txt": ("ade20k", "unimatch_v2", "2526"),
    "unimatch-v2/ade20k/1_4/labeled.txt": ("ade20k", "unimatch_v2", "5052"),
    "unimatch-v2/ade20k/val.txt": ("ade20k", "val", "val"),
}


def named(dataset: str, family: str, split: str) -> Published:
    return next(one for one in LISTS if one[:3] == (dataset, family, split))


def first_column(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published lists are not on this machine")
def test_the_published_lists_themselves() -> None:
    found = {path.relative_to(SHARED).as_posix(): identify_split(first_column(path)) for path in SHARED.rglob("*.txt")}
    assert {name: one and one[:3] for name, one in found.items()} == LISTED
    assert all(one is not None and one.size == len(first_column(SHARED / name)) for name, one in found.items())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published lists are not on this machine")
def test_a_published_list_in_other_forms_and_one_image_short() -> None:
    paths = first_column(SHARED / "unimatch-v2/pascal/92/labeled.txt")
    ids = [Path(path).stem for path in paths]
    hq = named("voc", "hq", "92")
    assert (
        identify_split(ids)
        == identify_split(reversed(ids))
        == identify_split(f"/JPEGImages/{one}.jpg" for one in ids)
        == hq
    )
    assert identify_split(ids[1:]) is None
    city = first_column(SHARED / "unimatch-v2/cityscapes/1_16/labeled.txt")
    bare = [Path(path).name.removesuffix("_leftImg8bit.png") for path in city]
    assert identify_split(f"/images/train/{one}.png" for one in bare) == named("cityscapes", "cps", "186")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published lists are not on this machine")
def test_overlaps_of_look_alikes_that_are_here() -> None:
    ids = {LISTED[name]: {Path(path).stem for path in first_column(SHARED / name)} for name in LISTED}
    shown = 0
    for pair, common in known_splits.IN_COMMON.items():
        keys = [one[:3] for one in LISTS if one.sha256 in pair]
        if all(key in ids for key in keys):
            assert len(ids[keys[0]] & ids[keys[1]]) == common
            shown += 1
    assert shown == 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published lists are not on this machine")
def test_each_list_is_found_by_what_it_holds_wherever_it_lies() -> None:
    for name in ("allspark-aug/1_8", "allspark-aug/u2pl_1_8", "unimatch-v2/pascal/732", "unimatch-v2/coco/1_512"):
        wanted = SplitKey(*LISTED[f"{name}/labeled.txt"])
        found = find_lists(SHARED, ["nowhere"], wanted)
        assert found.labelled == SHARED / name / "labeled.txt"
        assert (
            found.val == (SHARED / name).parent / "val.txt" or not (SHARED / name).parent.joinpath("val.txt").is_file()
        )
    assert find_lists(SHARED, ["nowhere"], SplitKey("voc", "hq", "5291")).labelled is None


def test_a_small_list_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always runs: a table of its own in place of the published one."""
    ids = ["2007_000032", "2008_000001", "2010_004000"]
    mine = Published("voc", "hq", "3", 3, list_hash(ids)[:16], "us")
    monkeypatch.setattr(known_splits, "_BY_HASH", {mine.sha256: mine})
    forms = [
        ids,
        ids[::-1],
        [f"JPEGImages/{one}.jpg" for one in ids],
        [f"/JPEGImages/{one}.jpg" for one in ids],
        [f"JPEGImages/{one}.png" for one in ids],
    ]
    assert [identify_split(form) for form in forms] == [mine] * len(forms)
    assert identify_split([*ids, ids[0]]) == mine, "a list with an image twice holds the same images"
    assert identify_split(ids[:2]) is None and identify_split([*ids, "2011_000001"]) is None
    assert list_hash(["leftImg8bit/train/jena/jena_000078_000019_leftImg8bit.png"]) == list_hash(["jena_000078_000019"])
    assert str(mine) == "voc hq 3 (3 images; us)"


def test_look_alikes_are_the_ones_known() -> None:
    assert "shares 371 of its images" in similarly_named(named("voc", "hq", "732"))[0]
    assert "voc aug_u2pl 662" in similarly_named(named("voc", "aug_cps", "662"))[0]
    assert "cityscapes u2pl 744" in similarly_named(named("cityscapes", "cps", "744"))[0]
    assert similarly_named(named("voc", "hq", "92")) == []
    assert len(same_size("voc", 732)) == 2 and "this is not that list" in same_size("voc", 732)[0]
    assert same_size("voc", 733) == same_size("folder", 732) == []


def test_every_pair_that_shares_a_name_has_its_overlap() -> None:
    assert len({one.sha256 for one in LISTS}) == len(LISTS)
    names = Counter((one.dataset, one.split) for one in LISTS)
    assert sum(count == 2 for count in names.values()) == len(known_splits.IN_COMMON) and max(names.values()) == 2
    assert all(similarly_named(one) for one in LISTS if names[one.dataset, one.split] == 2)


def test_unlabelled_images_that_are_not_all_others_draw_a_note() -> None:
    hq = named("voc", "hq", "92")
    assert missing_unlabelled(hq, 10490) == [] == missing_unlabelled(named("coco", "pseudoseg", "232"), 5)
    assert missing_unlabelled(hq, 1373) == [f"1373 unlabelled images; the training set has 10490 beside {hq}"]
    assert missing_unlabelled(named("cityscapes", "u2pl", "186"), 2790)[0].endswith(
        "the training set has 2789 beside cityscapes u2pl 186 (186 images; U2PL, DDFP)"
    )
