"""A folder of one's own images: every kind of file that people have, and every way in which lists can be wrong."""

from __future__ import annotations

import os
import shutil
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from viladiff.cli import main
from viladiff.data import registry
from viladiff.data.dataset import Dataset
from viladiff.data.files import file_cache, images
from viladiff.data.files.images import PaletteEncoding, image_size, label_counts, read_image, read_mask
from viladiff.data.files.run_checks import check_files
from viladiff.data.files.split_lists import Lists
from viladiff.data.files.validate import validate_dataset
from viladiff.data.splits import VISIBLE, resample
from viladiff.runs.config import RunConfig, override, run_id
from viladiff.text.embedding_bank import load_text
from viladiff.training.trainer import fit

Make = Callable[..., Path]


def load(root: Path, split: str = "labelled", split_seed: int | None = None, **own: object) -> Dataset:
    return registry.load_dataset("folder", split, split_seed, str(root), own=own)


@pytest.fixture
def pixels(photographs: ModuleType) -> np.ndarray:
    """(40, 60, 3) uint8 of a photograph with every grey value far from the others' neighbours."""
    return np.ascontiguousarray(photographs.photos()[0].pixels[100:140, 200:260])


# Images


def test_what_pillow_opens_without_loss_is_read_without_loss(tmp_path: Path, pixels: np.ndarray) -> None:
    grey = pixels[..., 1]
    alpha = np.dstack([pixels, 255 - pixels[..., :1]])
    cases = {
        "rgb.png": (Image.fromarray(pixels), pixels),
        "rgb.bmp": (Image.fromarray(pixels), pixels),
        "rgb.tif": (Image.fromarray(pixels), pixels),
        "grey.png": (Image.fromarray(grey), np.dstack([grey] * 3)),
        "rgba.png": (Image.fromarray(alpha), pixels),
        "rgba.webp": (Image.fromarray(alpha), None),
        "la.png": (Image.fromarray(alpha).convert("LA"), None),
        "bit.png": (Image.fromarray(grey > 100), np.dstack([np.where(grey > 100, 255, 0)] * 3)),
    }
    for name, (image, wanted) in cases.items():
        image.save(tmp_path / name, **({"lossless": True, "exact": True} if name.endswith("webp") else {}))
        found = read_image(tmp_path / name)
        assert found.dtype == np.uint8 and found.shape == pixels.shape and found.flags.writeable, name
        assert image_size(tmp_path / name) == (40, 60)
        if wanted is not None:
            assert np.array_equal(found, wanted), name
    assert np.array_equal(read_image(tmp_path / "rgba.webp"), pixels), "hidden colours stay, transparency is dropped"
    assert np.array_equal(read_image(tmp_path / "la.png")[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))


def test_palette_images(tmp_path: Path, pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels).quantize(32)
    image.save(tmp_path / "palette.png")
    image.save(tmp_path / "clear.png", transparency=3)
    wanted = np.asarray(image.convert("RGB"))
    assert np.array_equal(read_image(tmp_path / "palette.png"), wanted)
    image.save(tmp_path / "half.png", transparency=bytes(range(0, 256, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("clear", "half"):
            assert np.array_equal(read_image(tmp_path / f"{name}.png"), wanted), (
                "a transparent colour is still that colour"
            )


def test_cmyk_jpeg(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "a.jpg", quality=98)
    found = read_image(tmp_path / "a.jpg")
    assert found.shape == pixels.shape
    assert np.abs(found.astype(int) - pixels).mean() < 4, "an image read as RGB, or inverted, is far off"


def test_16_bits_a_channel_keep_black_and_white(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 40 * 60).round().astype(np.uint16).reshape(40, 60)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        found = read_image(tmp_path / name)
        assert (found[0, 0] == 0).all() and (found[-1, -1] == 255).all()
        assert np.abs(found[..., 0] - ramp / 257).max() <= 0.5
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "wide.tif")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "real.tif")
    for name in ("wide.tif", "real.tif"):
        with pytest.raises(ValueError, match=rf"{name}.*grey values.*8 or 16 bits a channel"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_images_and_their_sizes(tmp_path: Path, pixels: np.ndarray, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    for name in ("a.jpg", "a.png", "a.tif"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as image:
            wanted = np.asarray(ImageOps.exif_transpose(image))
        found = read_image(tmp_path / name)
        assert np.array_equal(found, wanted)
        assert image_size(tmp_path / name) == found.shape[:2] == ((60, 40) if turn > 4 else (40, 60))
    mask = Image.fromarray(pixels[..., 0] // 100)
    mask.save(tmp_path / "mask.png", exif=exif)
    exif_turned = ImageOps.exif_transpose(Image.open(tmp_path / "mask.png"))
    assert np.array_equal(read_mask(tmp_path / "mask.png", 3), np.asarray(exif_turned))


def test_broken_images_are_named_with_the_reason(tmp_path: Path, pixels: np.ndarray) -> None:
    for name in ("a.jpg", "a.png", "a.tif"):
        Image.fromarray(pixels).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{name}.*(truncated|cannot be read)"):
            read_image(tmp_path / name)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("text", "script"):
        with pytest.raises(ValueError, match=rf"{name}\.jpg: not an image of a known format"):
            read_image(tmp_path / f"{name}.jpg")
    with pytest.raises(ValueError, match=r"none\.jpg: there is no such file"):
        image_size(tmp_path / "none.jpg")


def test_an_image_that_would_fill_memory_is_refused(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"a\.png: cannot be read: .*pixels"):
        read_image(tmp_path / "a.png")


# Masks


def test_masks_of_every_mode_give_the_same_labels(tmp_path: Path, photographs: ModuleType) -> None:
    labels = np.arange(24, dtype=np.uint8).reshape(4, 6) % 6
    labels[0, 0] = 255
    photographs.save_mask(tmp_path / "index.png", labels)
    Image.fromarray(labels).save(tmp_path / "grey.png")
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([labels] * 3)).save(tmp_path / "same.png")
    Image.fromarray(np.dstack([labels] * 3 + [np.full_like(labels, 255)])).save(tmp_path / "clear.png")
    Image.fromarray(labels).convert("LA").save(tmp_path / "la.png")
    for name in ("index", "grey", "deep", "same", "clear", "la"):
        found = read_mask(tmp_path / f"{name}.png", 6)
        assert np.array_equal(found, labels) and found.dtype == np.uint8, name
    rgb = (*photographs.PALETTE, (224, 224, 192))
    colours = PaletteEncoding(rgb, (0, 1, 2, 3, 4, 5, 255))
    shown = np.array(rgb, np.uint8)[np.where(labels == 255, 6, labels)]
    Image.fromarray(shown).save(tmp_path / "rgb.png")
    assert np.array_equal(read_mask(tmp_path / "rgb.png", 6, colours), labels)
    assert np.array_equal(read_mask(tmp_path / "index.png", 6, colours), labels), "the colours of its own palette count"


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_masks_of_few_bits_hold_class_numbers(tmp_path: Path, bits: int) -> None:
    labels = np.arange(2**bits, dtype=np.uint8).repeat(8)[None].repeat(3, 0)
    packed = np.packbits(np.unpackbits(labels[..., None], axis=-1)[..., -bits:].reshape(3, -1), axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", labels.shape[1], 3, bits, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    path = tmp_path / "mask.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert np.array_equal(read_mask(path, 2**bits), labels)


def test_colours_are_told_apart_by_all_three_channels() -> None:
    rng = np.random.default_rng(0)
    levels = np.array([(r, g, b) for r in (0, 1, 2, 255) for g in (0, 1, 2, 255) for b in (0, 1, 2, 255)], np.uint8)
    rng.shuffle(levels)
    colours = PaletteEncoding(tuple(map(tuple, levels.tolist())), tuple(range(64)))
    labels = rng.integers(0, 64, (20, 30)).astype(np.uint8)
    assert np.array_equal(colours.labels_of(levels[labels]), labels)


def test_unknown_ids_and_colours_are_named(tmp_path: Path) -> None:
    labels = np.zeros((4, 6), np.uint8)
    labels[2, 3:] = 7, 9, 255
    Image.fromarray(labels).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png.*2 pixels are of no class \(7, 9\); allowed: 0 \.\.\. 5, and 255"):
        read_mask(tmp_path / "a.png", 6)
    Image.fromarray(np.full((4, 6), 300, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"24 pixels are of no class \(300\)"):
        read_mask(tmp_path / "deep.png", 6)
    colours = PaletteEncoding(((0, 0, 0), (128, 0, 0)), (0, 1))
    with pytest.raises(ValueError, match=r"3 pixels have a colour of no class, first \(7, 7, 7\) at row 2, column 3"):
        read_mask(tmp_path / "a.png", 2, colours)
    Image.fromarray(np.dstack([labels, labels, labels // 2])).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"a mask in colour: palette\.txt must say"):
        read_mask(tmp_path / "rgb.png", 6)


# The folder


def test_a_folder_is_read_on_demand(photo_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = photo_folder(12)
    opened: list[Path] = []
    real = images.open_image
    monkeypatch.setattr(images, "open_image", lambda path: opened.append(path) or real(path))
    data = load(root)
    assert opened == [], "names alone are read"
    assert (len(data.images), len(data.labelled), len(data.unlabelled), len(data.val_images)) == (9, 3, 6, 3)
    assert data.num_classes == 6 and data.class_names[3] == "foliage" and not data.uniform
    assert data.files is not None and data.files.ids[0] == "china_0000"
    shapes = {data.images[i].shape[:2] for i in range(9)}
    assert len(shapes) > 3 and all(data.target(i).shape == data.images[i].shape[:2] for i in range(3))
    assert [mask.shape for mask in data.val_masks] == [image.shape[:2] for image in data.val_images]
    with pytest.raises(ValueError, match="image 5 is not among the 3 labelled"):
        data.target(5)


def test_masks_of_unlabelled_images_are_never_opened(photo_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = photo_folder(12, unlabelled_masks=True)
    whole = load(root)
    for i in whole.unlabelled.tolist():
        assert whole.files is not None
        whole.files.masks[i].write_bytes(b"not a mask")
    spoilt = load(root)
    check_files(spoilt)
    for i in spoilt.unlabelled.tolist():
        assert spoilt.files is not None
        spoilt.files.masks[i].unlink()
    gone = load(root)
    check_files(gone)
    assert whole.fingerprint == spoilt.fingerprint == gone.fingerprint


def test_the_fingerprint_names_lists_files_and_classes(photo_folder: Make, tmp_path: Path) -> None:
    root = photo_folder(12)
    prints = [load(root).fingerprint]
    shutil.copytree(root, tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere").fingerprint == prints[0], "where it lies does not matter"

    def changed(path: Path, data: bytes) -> None:
        before = path.read_bytes()
        path.write_bytes(data)
        prints.append(load(root).fingerprint)
        path.write_bytes(before)
        assert load(root).fingerprint == prints[0]

    lists = root / "splits" / "labelled"
    changed(lists / "unlabelled.txt", b"grace_0005\nflower_0004\n")
    changed(lists / "labelled.txt", b"china_0000\nflower_0001\n")
    changed(root / "classes.txt", b"background\nsky\nbuilding\ngreen\nflower\nperson\n")
    image = root / "images" / "grace_0005.jpg"
    changed(image, image.read_bytes() + b" ")
    mask = root / "masks" / "china_0000.png"
    changed(mask, mask.read_bytes() + b" ")
    judge = next(root / "masks" / f"{name}.png" for name in (root / "splits/labelled/val.txt").read_text().split())
    changed(judge, judge.read_bytes() + b" ")
    assert len(set(prints)) == 7


def test_another_split_seed_draws_another_list_of_that_size(photo_folder: Make) -> None:
    root = photo_folder(24, unlabelled_masks=True)
    listed, *drawn = (load(root, split_seed=seed) for seed in (None, 0, 0, 1))
    names = [frozenset(np.array(one.files.ids)[one.labelled]) for one in (listed, *drawn)]  # type: ignore[union-attr]
    assert [len(some) for some in names] == [6] * 4 and names[1] == names[2] and len(set(names)) == 3
    assert len({one.fingerprint for one in (listed, *drawn)}) == 3
    assert drawn[2].split_name.endswith("drawn with data.split_seed = 1")
    assert drawn[2].val_files == listed.val_files
    assert set(drawn[2].files.ids) == set(listed.files.ids)  # type: ignore[union-attr]


def test_only_images_with_masks_can_be_drawn(photo_folder: Make) -> None:
    root = photo_folder(24)
    data = load(root, split_seed=5)
    assert data.files is not None
    assert {data.files.ids[i] for i in data.labelled} == {data.files.ids[i] for i in range(6)} and len(
        data.labelled
    ) == 6
    assert all(data.files.masks[i].is_file() for i in data.labelled)


def test_a_drawn_list_shows_every_class_and_looks_no_further() -> None:
    """Six images of 28 with masks, five classes of which some are rare or in no mask."""
    names = [f"{i:02}" for i in range(30)]
    lists, swapped = Lists(tuple(names[:6]), tuple(names[6:]), ()), 0
    for seed in range(100):
        present = np.random.default_rng(seed).random((30, 5)) < (0.6, 0.3, 0.1, 0.05, 0.03)
        looked: list[int] = []

        def shows(name: str, present: np.ndarray = present, looked: list[int] = looked) -> np.ndarray:
            looked.append(int(name))
            return present[int(name)]

        found = resample(lists, names[:28], seed, shows)
        rows = present[[int(name) for name in found.labelled]]
        assert len(rows) == 6 and rows.any(1).all() and (rows.any(0) == present[:28].any(0)).all()
        assert sorted((*found.labelled, *found.unlabelled)) == names and not {"28", "29"} & {*found.labelled}
        assert len({*looked}) == len(looked) and {*map(int, found.labelled)} <= {*looked}
        before = present[looked[:-1]]
        assert before.any(1).sum() < 6 or not before.any(0).all(), "the last look was needed"
        plain = [i for i in looked if present[i].any()][:6]
        swapped += sorted(plain) != sorted(map(int, found.labelled))
        assert not present[plain].any(0).all() or sorted(plain) == sorted(map(int, found.labelled))
    assert 20 < swapped < 100
    with pytest.raises(ValueError, match=r"data\.split_seed = 3: only 0 masks show a class, and 6 are to be drawn"):
        resample(lists, names, 3, lambda name: np.zeros(5, bool))


def test_the_last_image_that_can_be_spared_makes_room() -> None:
    """Seen in this order: one class, another, and an image that shows it and the third; so the second one goes."""
    rows, looked = [(1, 0, 0), (0, 1, 0), (0, 0, 0), (0, 1, 1), (1, 1, 1)], []

    def shows(name: str) -> np.ndarray:
        looked.append(name)
        return np.array(rows[len(looked) - 1], bool)

    found = resample(Lists(("a", "b"), ("c", "d", "e"), ()), "abcde", 0, shows)
    assert found.labelled == (looked[0], looked[3]) and len(looked) == 4
    looked.clear()
    rows[2:] = [(0, 0, 1)] * 3
    found = resample(Lists(("a", "b"), ("c", "d", "e"), ()), "abcde", 0, shows)
    assert found.labelled == (*looked[:2],) and len(looked) == 5, "none can be spared: each shows a class alone"


def test_a_draw_opens_masks_of_the_pool_alone(photo_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = photo_folder(24, unlabelled_masks=True)
    opened: set[str] = set()

    def spy(path: Path, *rest: Any) -> np.ndarray:
        opened.add(path.stem)
        return read_mask(path, *rest)

    monkeypatch.setattr(file_cache, "read_mask", spy)
    data = load(root, split_seed=2)
    assert data.files is not None and data.val_files is not None
    pool, names = set(data.files.ids), [data.files.ids[i] for i in data.labelled]
    assert set(names) <= opened <= pool and not opened & set(data.val_files.ids)
    shown, there = (
        np.any([label_counts(read_mask(root / "masks" / f"{name}.png", 6))[:6] >= VISIBLE for name in some], 0)
        for some in (names, pool)
    )
    assert np.array_equal(shown, there)
    opened.clear()
    load(root)
    assert not opened


# Lists


def test_names_with_spaces_and_other_letters(photo_folder: Make) -> None:
    root = photo_folder(8)
    spelt = "Übung 1/ein Bild ☀.b"
    for folder, suffix in (("images", "jpg"), ("masks", "png")):
        (root / folder / "Übung 1").mkdir()
        (root / folder / f"china_0000.{suffix}").rename(root / folder / f"{spelt}.{suffix}")
    for line in (
        spelt,
        f"{spelt}.jpg",
        f"images/{spelt}.jpg masks/{spelt}.png",
        f"/images/{spelt}.jpg\t/masks/{spelt}.png",
        unicodedata.normalize("NFD", f"images/{spelt}.jpg"),
    ):
        (root / "splits" / "labelled" / "labelled.txt").write_text(f"{line}\r\n\nflower_0001", encoding="utf-8-sig")
        data = load(root)
        assert data.files is not None and data.files.ids[:2] == (spelt, "flower_0001")
        assert data.target(0).shape == data.images[0].shape[:2]


def test_a_decomposed_file_name_is_the_same_image(photo_folder: Make) -> None:
    root = photo_folder(8)
    for folder, suffix in (("images", "jpg"), ("masks", "png")):
        name = unicodedata.normalize("NFD", "café")
        (root / folder / f"china_0000.{suffix}").rename(root / folder / f"{name}.{suffix}")
    (root / "splits" / "labelled" / "labelled.txt").write_text("café\n", encoding="utf-8")
    assert load(root).target(0).any()


def test_plain_list_files_and_a_directory_of_lists_elsewhere(photo_folder: Make, tmp_path: Path) -> None:
    root = photo_folder(8)
    wanted = load(root)
    (tmp_path / "lists").mkdir()
    for source, name in (("labelled", "few"), ("val", "val")):
        shutil.copy(root / "splits" / "labelled" / f"{source}.txt", tmp_path / "lists" / f"{name}.txt")
    shutil.rmtree(root / "splits")
    data = load(root, "few", split_dir=str(tmp_path / "lists"))
    assert data.files is not None and wanted.files is not None
    assert sorted(data.files.ids) == sorted(wanted.files.ids), "unlabelled images that no list names are all others"
    assert data.target(1).shape == wanted.target(1).shape and data.val_files == wanted.val_files
    names = [
        run_id(override(RunConfig(), {"data.dataset": "folder", "data.split_dir": place, "seed": seed}))
        for place, seed in (("none", 0), ("lists", 0), ("lists", 1))
    ]
    assert names[0] == names[1] != names[2], "a run is named by what its lists hold, not by where they lie"


def test_a_name_that_two_images_may_have(photo_folder: Make) -> None:
    root = photo_folder(8)
    for folder in ("images", "masks"):
        suffix = ".png" if folder == "masks" else ".jpg"
        (root / folder / f"china_0000{suffix}").rename(root / folder / f"china_0000.jpg{suffix}")
    _spoil(root, labelled="china_0000.jpg\nflower_0001")
    assert load(root).files.ids[0] == "china_0000.jpg", "of china_0000.jpg.jpg, as `data split` writes it"
    shutil.copy(root / "images" / "flower_0001.jpg", root / "images" / "china_0000.jpg")
    with pytest.raises(ValueError, match=r"line 1: may mean the images 'china_0000\.jpg' and 'china_0000'; rename one"):
        load(root)


def test_a_copy_of_a_training_image_in_validation_is_told(photo_folder: Make) -> None:
    root = photo_folder(8)
    assert load(root).notes == ()
    (first, second), trained = read_text(root / "splits" / "labelled" / "val.txt"), "china_0000"
    for folder, suffix in (("images", ".jpg"), ("masks", ".png")):
        shutil.copy(root / folder / f"{trained}{suffix}", root / folder / f"{first}{suffix}")
    shutil.copy(root / "images" / "grace_0002.jpg", root / "images" / f"{second}.jpg")
    (note,) = load(root).notes
    assert note.startswith(
        f"2 validation images are training images under another name, first {first!r} (as {trained!r})"
    )


def test_folders_that_links_lead_to(photo_folder: Make) -> None:
    root = photo_folder(8)
    (root / "splits" / "labelled" / "unlabelled.txt").unlink()
    ids = {*load(root).files.ids}
    (root / "more").mkdir()
    shutil.copy(root / "images" / "grace_0002.jpg", root / "more" / "a.jpg")
    (root / "images" / "sub").symlink_to("../more")
    assert {*load(root).files.ids} == ids | {"sub/a"}
    (root / "images" / "gone.jpg").symlink_to("../more/b.jpg")
    with pytest.raises(ValueError, match=r"images/gone\.jpg: cannot be read: No such file"):
        load(root)
    (root / "images" / "gone.jpg").unlink()
    for place in (root / "images" / "round", root / "more" / "round"):
        place.symlink_to(root / "images")
        with pytest.raises(ValueError, match=r"round: leads to .*/images, which it is in; remove it"):
            load(root)
        place.unlink()


def _spoil(root: Path, **lists: str) -> None:
    for name, text in lists.items():
        (root / "splits" / "labelled" / f"{name}.txt").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"labelled": "\n \n"}, r"labelled\.txt: the list is empty"),
        ({"val": ""}, r"val\.txt: the list is empty"),
        ({"val": "china_0000"}, r"labelled\.txt and .*val\.txt: 1 images are in both lists, first 'china_0000'"),
        ({"unlabelled": "grace_0002\ngrace_0007"}, r"grace_0007' is not an image of 'images'; did you mean 'grace_000"),
        ({"unlabelled": "grace_0002\nflower_0001"}, r"labelled\.txt and .*unlabelled\.txt: 1 images are in both"),
        ({"unlabelled": "grace_0002\nchina_0006"}, r"unlabelled\.txt and .*val\.txt: 1 images are in both"),
        ({"labelled": "china_0000\nchina_0000.jpg"}, r"line 2: 'china_0000' is listed before, as line 1"),
        ({"labelled": "grace_0002", "unlabelled": "china_0000"}, r"1 of 1 images have no mask, first 'grace_0002'"),
        ({"labelled": "../../secret"}, r"line 1: '\.\./\.\./secret' climbs out of the folder"),
        ({"labelled": "china_0000\n\n\nflower_0001\nchina_0000"}, r"line 5: 'china_0000' is listed before, as line 1"),
        ({"labelled": "/etc/passwd"}, r"'/etc/passwd' is not an image of 'images'; names are relative to 'images'"),
        ({"labelled": "china_000"}, r"line 1: 'china_000' is not an image of 'images'; did you mean 'china_000"),
    ],
)
def test_lists_that_cannot_be_used(photo_folder: Make, lists: dict[str, str], message: str) -> None:
    root = photo_folder(8)
    _spoil(root, **lists)
    with pytest.raises(ValueError, match=message):
        load(root)


def test_a_list_that_is_no_text(photo_folder: Make) -> None:
    root = photo_folder(8)
    (root / "splits" / "labelled" / "labelled.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"labelled\.txt: cannot be read as a list of images"):
        load(root)


def test_splits_that_are_not_there(photo_folder: Make, tmp_path: Path) -> None:
    root = photo_folder(8)
    with pytest.raises(ValueError, match=r"data\.split = 'labeled'.*there are: labelled; did you mean 'labelled'"):
        load(root, "labeled")
    for name in ("../labelled", str(root / "splits" / "labelled"), ".."):
        with pytest.raises(ValueError, match="must be the name of a list"):
            load(root, name)
    with pytest.raises(ValueError, match=r"data\.split_dir = .*there is no such directory"):
        load(root, split_dir=str(tmp_path / "nowhere"))
    (root / "splits" / "labelled" / "val.txt").unlink()
    with pytest.raises(ValueError, match=r"has no val\.txt, the list of validation images"):
        load(root)
    shutil.rmtree(root / "splits")
    with pytest.raises(ValueError, match=r"no lists of images; make some with `viladiff data split`"):
        load(root)


# Files that are missing, double, or elsewhere


def test_roots_that_hold_nothing(photo_folder: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runtime\.data_root: must be set"):
        registry.load_dataset("folder", "labelled")
    with pytest.raises(ValueError, match=r"nowhere: there is no such directory; set runtime\.data_root"):
        load(tmp_path / "nowhere")
    (tmp_path / "other" / "image").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no folder 'images' of images; did you mean 'image'"):
        load(tmp_path / "other")
    root = photo_folder(8)
    shutil.copy(root / "images" / "china_0000.jpg", root / "images" / "china_0000.png")
    with pytest.raises(ValueError, match=r"china_0000\.(jpg|png) and .*: two files for one image, 'china_0000'"):
        load(root)
    shutil.rmtree(root / "images")
    (root / "images").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        load(root)


@pytest.mark.parametrize("what", ["image", "mask", "folder", "images"])
def test_links_that_climb_out_of_the_root(photo_folder: Make, tmp_path: Path, what: str) -> None:
    root, outside = photo_folder(8), tmp_path / "outside"
    outside.mkdir()
    place = {
        "image": "images/china_0000.jpg",
        "mask": "masks/china_0000.png",
        "folder": "images/more",
        "images": "images",
    }
    path = root / place[what]
    if path.exists():
        path.rename(outside / path.name)
        target = outside / path.name
    else:
        target = outside
    os.symlink(target, path)
    with pytest.raises(ValueError, match=rf"{path.name}: leads to .*outside.*, out of .*photos"):
        load(root)


def test_links_within_the_root_and_to_the_root_are_followed(photo_folder: Make, tmp_path: Path) -> None:
    root = photo_folder(8)
    wanted = load(root).fingerprint
    (root / "kept").mkdir()
    (root / "images" / "china_0000.jpg").rename(root / "kept" / "a.jpg")
    os.symlink("../kept/a.jpg", root / "images" / "china_0000.jpg")
    os.symlink(root, tmp_path / "link")
    data = load(tmp_path / "link")
    assert data.fingerprint == wanted and data.images[0].ndim == 3


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("classes.txt", "sky\n", r"classes\.txt: names 1 classes; 2 to 255"),
        ("classes.txt", "sky\ntree\nsky\n", r"the class 'sky' is named twice"),
        ("classes.txt", "sky\ntree\nSky\n", "the classes 'sky' and 'Sky' differ in capitals alone"),
        ("palette.txt", "0 0 0 sky\n0 0 0 tree\n", r"line 2: the colour \(0, 0, 0\) stands for two classes"),
        ("palette.txt", "0 0 0 sky\n0 0 300 tree\n", r"line 2: '0 0 300 tree' is not 'r g b name'"),
        ("palette.txt", "0 0 sky\n", r"line 1: '0 0 sky' is not 'r g b name'"),
        ("palette.txt", "0 0 0 sky\n9 9 9 void # edges\n0 0 9 tree\n", "'void # edges': a comment would be"),
    ],
)
def test_classes_that_cannot_be_used(photo_folder: Make, file: str, text: str, message: str) -> None:
    root = photo_folder(8)
    (root / file).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(root)


def test_without_classes(photo_folder: Make) -> None:
    root = photo_folder(8)
    (root / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"has no classes\.txt .*and no palette\.txt"):
        load(root)


def test_masks_by_colour(photo_folder: Make, photographs: ModuleType) -> None:
    root = photo_folder(8)
    wanted = load(root)
    targets = [wanted.target(i) for i in range(2)]
    for path in (root / "masks").iterdir():
        labels = read_mask(path, 6)
        Image.fromarray(np.array(photographs.PALETTE, np.uint8)[labels]).save(path)
    lines = [f"{r} {g} {b} {name}" for (r, g, b), name in zip(photographs.PALETTE, photographs.CLASSES, strict=True)]
    (root / "palette.txt").write_text("\n".join([*lines, "9 9 9 void"]), encoding="utf-8")
    data = load(root)
    assert data.class_names == photographs.CLASSES
    assert all(np.array_equal(data.target(i), targets[i]) for i in range(2))


# What a run is told before it starts


def test_the_start_of_a_run_names_what_would_break_it(photo_folder: Make) -> None:
    root = photo_folder(12)
    data = load(root)
    absent = set(range(6)) - {int(label) for mask in data.val_masks for label in np.unique(mask)}
    told = check_files(data)[0]
    assert absent and told == "no validation image shows " + ", ".join(data.class_names[i] for i in sorted(absent))
    jpeg = root / "images" / "flower_0004.jpg"
    whole = jpeg.read_bytes()
    jpeg.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"flower_0004\.jpg: cannot be read: .*truncated"):
        check_files(load(root))
    jpeg.write_bytes(whole + b"\0" * 70_000)
    check_files(load(root))  # what follows the image is no fault
    jpeg.write_bytes(whole)
    mask = root / "masks" / "china_0000.png"
    labels = read_mask(mask, 6)
    Image.fromarray(labels[:-1]).save(mask)
    with pytest.raises(ValueError, match=r"china_0000\.png: the mask is \d+ x \d+ pixels .*its image \d+ x \d+"):
        check_files(load(root))
    Image.fromarray(np.where(labels == labels[0, 0], 77, labels).astype(np.uint8)).save(mask)
    with pytest.raises(ValueError, match=r"china_0000\.png.*of no class \(77\)"):
        check_files(load(root))


def test_a_mask_drawn_on_the_unturned_image(photo_folder: Make) -> None:
    root = photo_folder(8, sizes=(60, 90))
    path = root / "images" / "china_0000.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        assert image.width != image.height
        image.save(path, exif=exif)
    with pytest.raises(ValueError, match="turned by EXIF, is the image's other way round"):
        check_files(load(root))


def test_zero_labelled_pixels(photo_folder: Make) -> None:
    root = photo_folder(8)
    for name in ("china_0000", "flower_0001"):
        path = root / "masks" / f"{name}.png"
        Image.fromarray(np.full_like(read_mask(path, 6), 255)).save(path)
    with pytest.raises(ValueError, match="none of the 2 labelled images has a labelled pixel"):
        check_files(load(root))


@pytest.mark.parametrize("file", ["classes.txt", "palette.txt"])
def test_a_class_that_no_labelled_mask_shows_stops_a_run(
    photo_folder: Make, photographs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    root = photo_folder(8, sizes=(40, 60))
    (root / "classes.txt").write_text("\n".join([*photographs.CLASSES, "unicorn", "yeti"]), encoding="utf-8")
    if file == "palette.txt":
        colours = [*photographs.PALETTE, (1, 2, 3), (4, 5, 6)]
        lines = [
            f"{r} {g} {b} {name}" for (r, g, b), name in zip(colours, read_text(root / "classes.txt"), strict=True)
        ]
        (root / "palette.txt").write_text("\n".join(lines), encoding="utf-8")
    told = (
        rf"masks: no mask of the 2 labelled images shows 'unicorn', 'yeti', 2 of the 8 classes of {file}; "
        rf"label an image that shows it \(data\.split\), or remove the class from {file} and the masks$"
    )
    with pytest.raises(ValueError, match=told):
        fit(small(root, tmp_path / "runs", "supervised"))
    assert not list((tmp_path / "runs").rglob("steps.jsonl")) and not list((tmp_path / "runs").rglob("*.pt"))
    words = ["data.dataset=folder", f"runtime.data_root={root}", "model.encoder=digits_vit", "model.pretrained=shipped"]
    assert main.main(["train", *words, "data.crop=32", "method.name=supervised", "--dry-run"]) != 0
    assert "labelled images shows 'unicorn', 'yeti'" in " ".join(capsys.readouterr().err.split())


def read_text(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split()


def binary(root: Path, pixel: int) -> Path:
    """Masks of 0 and ``pixel`` under two classes."""
    (root / "classes.txt").write_text("ground\nplant", encoding="utf-8")
    for path in (root / "masks").iterdir():
        labels = read_mask(path, 6)
        Image.fromarray(np.where(labels == labels[-1, -1], 0, pixel).astype(np.uint8)).save(path)
    return root


def test_masks_of_0_and_255_stop_a_run_with_the_way_out(photo_folder: Make, tmp_path: Path) -> None:
    root = binary(photo_folder(8, sizes=(40, 60)), 255)
    hint = (
        r"no mask of the 2 labelled images shows 'plant', .*the masks hold 0 and 255 only, and 255 is ignored; if it "
        r"means 'plant', say so in palette\.txt: '0 0 0 ground' and '255 255 255 plant'$"
    )
    with pytest.raises(ValueError, match=hint):
        fit(small(root, tmp_path / "runs", "supervised"))
    faults = [fault for fault in validate_dataset(root, processes=1).faults if fault.path == str(root / "masks")]
    assert [fault.level for fault in faults] == ["error"] * 2 and "1 classes are in no mask: plant" in faults[0].reason
    (root / "palette.txt").write_text("0 0 0 ground\n255 255 255 plant", encoding="utf-8")
    assert fit(small(root, tmp_path / "runs", "supervised")).record.miou is not None, "and then it works"


def test_masks_of_0_and_255_among_others_are_told(photo_folder: Make) -> None:
    root = binary(photo_folder(8, sizes=(40, 60)), 1)
    assert not any("255" in note for note in check_files(load(root)))
    name = read_text(root / "splits" / "labelled" / "val.txt")[0]
    path = root / "masks" / f"{name}.png"
    labels = read_mask(path, 2)
    Image.fromarray(np.where(labels == 1, 255, 0).astype(np.uint8)).save(path)
    told = "1 of 4 masks hold 0 and 255 only, others 1, and 255 is ignored; if it means 'plant' there, write 1"
    assert any(note.startswith(f"{root / 'masks'}: {told}") for note in check_files(load(root)))
    faults = [fault for fault in validate_dataset(root, processes=1).faults if fault.path == str(root / "masks")]
    assert [fault.level for fault in faults] == ["warning"] and "and 255 is ignored" in faults[0].reason


def test_a_third_class_that_is_255_is_explained(photo_folder: Make) -> None:
    root = binary(photo_folder(8, sizes=(40, 60)), 255)
    (root / "classes.txt").write_text("ground\nplant\nstone", encoding="utf-8")
    with pytest.raises(ValueError, match=r"masks hold 255, which is ignored: if it is a class, palette\.txt says"):
        check_files(load(root))


def test_validation_masks_of_one_class_stop_a_run(photo_folder: Make, tmp_path: Path) -> None:
    root = binary(photo_folder(8, sizes=(40, 60)), 1)
    check_files(load(root))
    for name in read_text(root / "splits" / "labelled" / "val.txt"):
        path = root / "masks" / f"{name}.png"
        Image.fromarray(np.zeros_like(read_mask(path, 2))).save(path)
    with pytest.raises(ValueError, match=r"the 2 validation images show 'ground' alone, .*validate on more images"):
        check_files(load(root))


def test_under_a_published_layout_a_class_may_be_missing(photo_folder: Make) -> None:
    data = registry.load_dataset("voc", "92", root=str(photo_folder(12, "voc")))
    assert any(note.startswith("no labelled image shows aeroplane, bicycle") for note in check_files(data))


def test_one_image(photo_folder: Make) -> None:
    root = photo_folder(2, labelled=1, val=1)
    data = load(root)
    assert (len(data.labelled), len(data.unlabelled), len(data.val_images)) == (1, 0, 1)
    check_files(data)
    _spoil(root, val="china_0000")
    with pytest.raises(ValueError, match="1 images are in both lists"):
        load(root)


# Training


def small(root: Path, out: Path, method: str, **changes: object) -> RunConfig:
    fields: dict[str, object] = {
        "data.dataset": "folder",
        "runtime.data_root": str(root),
        "runtime.runs_dir": str(out),
        "runtime.progress": False,
        "runtime.threads": 1,
        "method.name": method,
        "model.encoder": "digits_vit",
        "model.pretrained": "shipped",
        "model.decoder_width": 8,
        "data.crop": 32,
        "data.batch_labelled": 2,
        "data.batch_unlabelled": 2,
        "train.steps": 2,
        "eval.max_images": 2,
        "eval.boundary": False,
    }
    return override(RunConfig(), {**fields, **changes})


@pytest.mark.parametrize("method", ["supervised", "semibaseline", "viladiff"])
def test_methods_train_without_captions_and_without_other_masks(
    photo_folder: Make, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photo_folder(10, labelled=3, val=1, sizes=(40, 70))
    words = {"data.captions": "none"} if method == "viladiff" else {}
    record = fit(small(root, tmp_path / "runs", method, **words)).record
    data = load(root)
    assert record.miou is not None and record.class_names == list(data.class_names)
    assert record.split_name == data.split_name and record.split_name.startswith("no published list: 3 images")
    assert record.fingerprints["data"] == data.fingerprint and record.captions == "no captions"
    assert "note: no validation image shows" in capsys.readouterr().err


def test_a_method_that_reads_captions_says_that_there_are_none(photo_folder: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'folder' has no captions, .*viladiff reads; .*set data\.captions=none"):
        fit(small(photo_folder(8), tmp_path / "runs", "viladiff"))


def test_a_run_on_a_broken_file_does_not_start(photo_folder: Make, tmp_path: Path) -> None:
    root = photo_folder(12)
    path = root / "images" / "grace_0005.jpg"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"grace_0005\.jpg: cannot be read"):
        fit(small(root, tmp_path / "runs", "supervised"))
    assert not list((tmp_path / "runs").rglob("steps.jsonl")) and not list((tmp_path / "runs").rglob("record.json"))


# Words


def test_a_data_set_without_captions_has_silent_banks(photo_folder: Make) -> None:
    data = load(photo_folder(8))
    for encoder in ("open_clip", "words"):
        train, val = load_text(data, encoder)
        assert (len(train), len(val)) == (6, 2) and not train.mask.any() and train.fingerprint == "no captions"
        assert train.batch([0, 5]).tokens.shape == (2, 1, train.dim)


def test_lists_with_backslashes_are_those_of_windows(photo_folder: Make) -> None:
    root = photo_folder(12)
    listed = load(root)
    for path in (root / "splits").rglob("*.txt"):
        path.write_text("\r\n".join(f"images\\{line}" for line in path.read_text().splitlines()))
    found = load(root)
    assert found.fingerprint == listed.fingerprint
    assert [len(part) for part in (found.labelled, found.unlabelled)] == [len(listed.labelled), len(listed.unlabelled)]
    name = next(path for path in (root / "splits").rglob("*.txt") if path.name == "labelled.txt")
    name.write_text("C:\\data\\images\\a.jpg\n")
    with pytest.raises(ValueError, match="is not an image of 'images'; names are relative to 'images'"):
        load(root)
    name.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="save it as UTF-8"):
        load(root)
