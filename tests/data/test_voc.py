"""VOC's layout: its lists in both forms, its families, and what a record says of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from viladiff.data import registry
from viladiff.data.dataset import Dataset
from viladiff.data.files import known_splits
from viladiff.data.files.known_splits import Published, list_hash
from viladiff.data.files.run_checks import check_files
from viladiff.data.files.validate import validate_dataset
from viladiff.runs.config import ConfigError, RunConfig, override
from viladiff.runs.record import RunRecord

Make = Callable[..., Path]


def load(root: Path, split: str = "92", family: str = "hq", split_seed: int | None = None, **own: object) -> Dataset:
    return registry.load_dataset("voc", split, split_seed, str(root), own={"split_family": family, **own})


def ids(data: Dataset) -> tuple[str, ...]:
    assert data.files is not None
    return data.files.ids


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Published]:
    """Puts small lists in place of the published ones."""
    lists: list[Published] = []

    def add(names: list[str], family: str, split: str, used_by: str = "us") -> Published:
        one = Published("voc", family, split, len(names), list_hash(names)[:16], used_by)
        lists.append(one)
        monkeypatch.setattr(known_splits, "LISTS", tuple(lists))
        monkeypatch.setattr(known_splits, "_BY_HASH", {each.sha256: each for each in lists})
        return one

    return add


def test_both_columns_and_bare_ids_are_the_same_list(photo_folder: Make, photographs: ModuleType) -> None:
    root = photo_folder(12, "voc")
    data = load(root)
    assert data.num_classes == 21 and data.class_names[15] == "person" and not data.uniform
    assert (len(data.labelled), len(data.unlabelled), len(data.val_images)) == (3, 6, 3)
    labels = np.unique(np.concatenate([data.target(i).ravel() for i in range(3)]))
    assert 255 in labels and set(labels.tolist()) <= {0, 6, 15, 16, 255}
    lists = root / "splits" / "92"
    for path in lists.iterdir():
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(line.split()[0].removeprefix("JPEGImages/").removesuffix(".jpg") for line in lines))
    bare = load(root)
    assert bare.fingerprint == data.fingerprint and ids(bare) == ids(data)
    shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug")
    for path in lists.iterdir():
        text = path.read_text(encoding="utf-8")
        path.write_text("\n".join(f"/JPEGImages/{one}.jpg /SegmentationClassAug/{one}.png" for one in text.split()))
    assert load(root).fingerprint == data.fingerprint


@pytest.mark.parametrize("below", ["VOC", "VOCdevkit/VOC2012"])
def test_the_root_may_be_one_further_up(photo_folder: Make, tmp_path: Path, below: str) -> None:
    root = photo_folder(8, "voc", root=f"data/{below}")
    assert load(tmp_path / "data").fingerprint == load(root).fingerprint


def test_without_a_list_the_unlabelled_are_those_with_a_mask(photo_folder: Make) -> None:
    root = photo_folder(12, "voc", unlabelled_masks=True)
    listed = load(root)
    (root / "splits" / "92" / "unlabelled.txt").unlink()
    (root / "SegmentationClass" / "grace_0005.png").unlink()
    rest = load(root)
    assert set(ids(listed)) - set(ids(rest)) == {"grace_0005"}, "an image of the test set has no mask"


def test_masks_of_unlabelled_images_may_be_missing(photo_folder: Make) -> None:
    data = load(photo_folder(12, "voc"))
    assert data.files is not None and not any(data.files.masks[i].exists() for i in data.unlabelled)
    check_files(data)
    assert all(data.images[i].ndim == 3 for i in range(9))


def test_families_are_found_under_their_names(photo_folder: Make) -> None:
    root = photo_folder(12, "voc", unlabelled_masks=True)
    lists = root / "splits"
    names = [line.split()[0] for line in (lists / "92" / "labelled.txt").read_text().splitlines()]
    others = [line.split()[0] for line in (lists / "92" / "unlabelled.txt").read_text().splitlines()]
    shutil.move(lists / "92" / "val.txt", lists / "val.txt")
    for name, some in (("1_16", names), ("u2pl_1_16", others[:3])):
        (lists / name).mkdir()
        (lists / name / "labeled.txt").write_text("\n".join(some))
    cps, u2pl = (load(root, "662", family) for family in ("aug_cps", "aug_u2pl"))
    assert ids(cps)[:3] != ids(u2pl)[:3] and cps.fingerprint != u2pl.fingerprint
    shutil.move(lists / "u2pl_1_16", lists / "662")
    assert load(root, "662", "aug_u2pl").fingerprint == u2pl.fingerprint
    assert load(root, "662", "aug_cps").fingerprint == cps.fingerprint, "the unambiguous name comes first"


def test_lists_under_the_names_of_cps_and_ps_mt(photo_folder: Make, tmp_path: Path) -> None:
    root = photo_folder(20, "voc", labelled=4, val=4, unlabelled_masks=True)
    names, lists = ids(load(root)), tmp_path / "lists"
    shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug")
    val = (root / "splits" / "92" / "val.txt").read_text(encoding="utf-8")
    files = {
        "cps/train_aug_labeled_1-16.txt": "\n".join(names[:3]),
        "cps/train_aug_unlabeled_1-16.txt": "\n".join(names[3:9]),
        "cps/pseudoseg_labeled_1-2.txt": "\n".join(names[5:9]),
        "cps/pseudoseg_unlabeled_1-2.txt": "\n".join(names[9:12]),
        "cps/val.txt": val,
        "psmt/662_train_supervised.txt": _columns(names[2:5]),
        "psmt/662_train_unsupervised.txt": _columns(names[5:]),
        "psmt/6620_train_supervised.txt": _columns(names[7:9]),
        "psmt/val.txt": val,
    }
    for name, text in files.items():
        (lists / name).parent.mkdir(parents=True, exist_ok=True)
        (lists / name).write_text(text, encoding="utf-8")

    def read(below: str, *asked: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        data = load(root, *asked, split_dir=str(lists / below))
        return ids(data)[: len(data.labelled)], ids(data)[len(data.labelled) :]

    assert read("cps", "662", "aug_cps") == (names[:3], names[3:9])
    assert read("cps", "732") == (names[5:9], names[9:12])
    assert read("psmt", "662", "aug_cps") == (names[2:5], names[5:])
    labelled, others = read("psmt", "662", "aug_u2pl")
    assert labelled == names[7:9] and set(others) == {*names} - {*labelled}, "no list of others, so all others"
    with pytest.raises(ValueError, match=r"no list 183/labelled\.txt or 183\.txt, nor a file of its images; there are"):
        read("cps", "183")
    report = validate_dataset(root, lists / "psmt", 1)
    counts = {one.name: one.counts for one in report.splits}
    assert counts == {"662_train_supervised": (3, 11, 4), "6620_train_supervised": (2, 14, 4)} and not report.errors


def _columns(names: tuple[str, ...]) -> str:
    return "\n".join(f"/JPEGImages/{one}.jpg /SegmentationClassAug/{one}.png" for one in names)


def test_a_published_list_is_found_by_its_images(
    photo_folder: Make, tmp_path: Path, known: Callable[..., Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photo_folder(16, "voc", unlabelled_masks=True)
    names, lists = ids(load(root)), tmp_path / "lists"
    shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug")
    (lists / "some" / "where").mkdir(parents=True)
    shutil.move(root / "splits" / "92" / "val.txt", lists / "some" / "val.txt")
    for file, some in {"a_labeled": names[1:4], "a_unlabeled": names[4:9], "b": names[4:7], "c": names[1:3]}.items():
        (lists / "some" / "where" / f"{file}.txt").write_text(_columns(some), encoding="utf-8")
    (lists / "notes.txt").write_bytes(b"\xff\xfe no list \x00")
    both = known(list(names[1:4]), "aug_u2pl", "662"), known(list(names[4:7]), "aug_cps", "662")
    monkeypatch.setattr(known_splits, "IN_COMMON", {frozenset(one.sha256 for one in both): 0})
    u2pl, cps = (load(root, "662", family, split_dir=str(lists)) for family in ("aug_u2pl", "aug_cps"))
    assert ids(u2pl) == (*names[1:4], *names[4:9]) and u2pl.split_name.startswith("voc aug_u2pl 662 (3 images")
    assert ids(cps)[:3] == names[4:7] and len(cps.unlabelled) == len(names) - 3
    (lists / "some" / "val.txt").unlink()
    with pytest.raises(ValueError, match=r"has no val\.txt"):
        load(root, "662", "aug_u2pl", split_dir=str(lists))


def test_a_list_of_another_family_is_refused(photo_folder: Make, known: Callable[..., Published]) -> None:
    root = photo_folder(12, "voc")
    shutil.copytree(root / "splits" / "92", root / "splits" / "662")
    known(list(ids(load(root))[:3]), "aug_u2pl", "662")
    assert load(root, "662", "aug_u2pl").split_name == "voc aug_u2pl 662 (3 images; us)"
    with pytest.raises(ValueError, match=r"is the list voc aug_u2pl 662 .*but data\.split_family = 'aug_cps'"):
        load(root, "662", "aug_cps")
    with pytest.raises(ValueError, match=r"is the list voc aug_u2pl 662 .*data\.split = '92'"):
        load(root)


def test_look_alikes_draw_a_warning(
    photo_folder: Make, known: Callable[..., Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photo_folder(12, "voc", split="732")
    names = list(ids(load(root, "732")))
    one, other = known(names[:3], "hq", "732", "most"), known(names[2:5], "pseudoseg", "732", "some")
    monkeypatch.setattr(known_splits, "IN_COMMON", {frozenset((one.sha256, other.sha256)): 1})
    data = load(root, "732")
    assert data.split_name == "voc hq 732 (3 images; most)"
    assert "look-alike: voc pseudoseg 732 (3 images; some) shares 1 of its images" in data.notes[0]
    assert "3 images, which are not the validation list of voc" in data.notes[1]
    told = check_files(data)
    assert told[:2] == data.notes, "a run says so when it starts"
    lists = root / "splits" / "732"
    (lists / "labelled.txt").write_text("\n".join(names[2:5]))
    (lists / "unlabelled.txt").write_text("\n".join((*names[:2], *names[5:])))
    for name in names[3:5]:
        shutil.copy(root / "SegmentationClass" / f"{names[2]}.png", root / "SegmentationClass" / f"{name}.png")
    assert load(root, "732").split_name == "voc pseudoseg 732 (3 images; some)", "named as what it is"
    (lists / "labelled.txt").write_text("\n".join((names[0], *names[3:5])))
    (lists / "unlabelled.txt").write_text("\n".join((*names[1:3], *names[5:])))
    unknown = load(root, "732")
    assert unknown.split_name.startswith("no published list: 3 images, SHA-256 ")
    assert [note.partition(",")[0] for note in unknown.notes] == ["3 labelled images"] * 2
    assert "this is not that list" in unknown.notes[0]


def test_a_resampled_list_is_not_called_published(photo_folder: Make, known: Callable[..., Published]) -> None:
    root = photo_folder(12, "voc", unlabelled_masks=True)
    known(list(ids(load(root))[:3]), "hq", "92")
    assert load(root).split_name == "voc hq 92 (3 images; us)"
    drawn = load(root, split_seed=1).split_name
    assert drawn.startswith("no published list: 3 images") and drawn.endswith("drawn with data.split_seed = 1")


def test_the_configuration_of_voc(photo_folder: Make) -> None:
    cfg = override(RunConfig(), {"data.dataset": "voc", "data.split": "662", "data.split_family": "aug_u2pl"})
    assert (
        dict(registry.dataset_spec(cfg).own)["split_family"] == "aug_u2pl"
        and cfg.model.encoder == "vit_base_patch16_224"
    )
    with pytest.raises(ConfigError, match=r"data\.split = '662' is not a list of split_family = 'hq'"):
        override(RunConfig(), {"data.dataset": "voc", "data.split": "662"})
    root = photo_folder(12, "voc")
    changes = {"data.dataset": "voc", "data.split": "92", "runtime.data_root": str(root)}
    assert (
        registry.load_dataset(*registry.dataset_spec(override(RunConfig(), changes))).fingerprint
        == load(root).fingerprint
    )
    changes["data.split_dir"] = str(root / "nowhere")
    with pytest.raises(ValueError, match=r"data\.split_dir = .*there is no such directory"):
        registry.load_dataset(*registry.dataset_spec(override(RunConfig(), changes)))


def test_records_without_the_name_of_a_list_still_load() -> None:
    field = RunRecord.model_fields["split_name"]
    assert not field.is_required() and field.default == ""
