"""The built-in data sets: what a scene depends on, how the cache fails, which images are labelled."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from viladiff.core import progress
from viladiff.data import cache, registry, scenes, splits
from viladiff.data.scenes import SceneRecipe, render
from viladiff.data.sources import digits
from viladiff.data.sources.base import split_names
from viladiff.data.sources.digits import DENSE, DENSE_SOURCE, DIGITS, DIGITS_SOURCE, Variant

SMALL = {"digits": Variant(DIGITS, 120, 12, 15), "dense": Variant(DENSE, 40, 4, 5)}


@pytest.fixture
def forget() -> Iterator[None]:
    """Lets a test change what scikit-learn hands out."""
    scenes.load_sources.cache_clear()
    scenes._scans.cache_clear()
    yield
    scenes.load_sources.cache_clear()
    scenes._scans.cache_clear()


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("VILADIFF_CACHE", str(folder))
        patch.setattr(digits, "VARIANTS", SMALL)
        digits.open_pixels("digits")
        yield folder


def same(one: scenes.Scene, other: scenes.Scene) -> bool:
    return np.array_equal(one.image, other.image) and np.array_equal(one.mask, other.mask)


@pytest.mark.parametrize(("name", "recipe"), [("digits", DIGITS), ("dense", DENSE)])
def test_a_scene_depends_on_its_index_alone(name: str, recipe: SceneRecipe) -> None:
    forward = [render(recipe, name, "train", index) for index in range(6)]
    backward = [render(recipe, name, "train", index) for index in reversed(range(6))][::-1]
    assert all(map(same, forward, backward))
    assert len({scene.image.tobytes() for scene in forward}) == 6


def test_parts_and_variants_draw_differently() -> None:
    drawn = [render(DIGITS, name, part, 3) for name in ("digits", "dense") for part in scenes.MATERIAL]
    assert len({scene.image.tobytes() for scene in drawn}) == 8


def test_scene_shapes_and_labels() -> None:
    masks = []
    for index in range(80):
        image, mask = render(DIGITS, "digits", "train", index)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and mask.shape == (64, 64)
        masks.append(mask)
    assert np.array_equal(np.unique(masks), np.arange(11))
    shown = splits.classes_present(np.stack(masks), 11)[:, 1:].sum(1)
    assert shown.min() >= 1 and shown.max() == 3


def test_parts_share_no_handwriting_and_scored_parts_no_photo_columns() -> None:
    scans = [np.concatenate(scenes.load_sources(part).scans) for part in scenes.MATERIAL]
    assert np.array_equal(np.sort(np.concatenate(scans)), np.arange(scenes.SCANS))
    columns = {part: material.columns for part, material in scenes.MATERIAL.items()}
    assert columns["pretrain"] == columns["train"]
    (_, end), (first, last), (start, stop) = columns["test"], columns["train"], columns["dev"]
    assert end + 16 <= first and last + 16 <= start and stop == 640
    assert all(edge % 16 == 0 for edge in (end, first, last, start)), "a range begins and ends with a block of the JPEG"


@pytest.mark.parametrize("spoilt", ["pretrain", "train", "dev", "test"])
def test_no_part_sees_the_material_of_another(
    spoilt: scenes.Part, monkeypatch: pytest.MonkeyPatch, forget: None
) -> None:
    import sklearn.datasets

    def render_parts() -> dict[scenes.Part, list[scenes.Scene]]:
        scenes.load_sources.cache_clear()
        scenes._scans.cache_clear()
        return {part: [render(DIGITS, "digits", part, i) for i in range(20)] for part in scenes.MATERIAL}

    before = render_parts()
    scans, photos = sklearn.datasets.load_digits(), sklearn.datasets.load_sample_images()
    rows, columns = (slice(*span) for span in scenes.MATERIAL[spoilt])
    scans.images = scans.images.copy()
    scans.images[rows] = 16 - scans.images[rows]
    photos.images = [photo.copy() for photo in photos.images]
    if spoilt in ("dev", "test"):  # the two parts of training share their photographs
        for photo in photos.images:
            photo[:, columns] = 255 - photo[:, columns]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: scans)
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: photos)
    after = render_parts()
    for part in scenes.MATERIAL:
        changed = [not same(*pair) for pair in zip(before[part], after[part], strict=True)]
        assert all(changed) if part == spoilt else not any(changed)


def test_the_mask_is_the_topmost_digit_with_half_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[np.ndarray] = []
    places: list[tuple[int, int]] = []
    write, place = scenes.write_digits, scenes._place

    def spy_write(*args: object) -> list[tuple[np.ndarray, np.ndarray]]:
        found = write(*args)
        written.extend(alpha for _, alpha in found)
        return found

    def spy_place(*args: object) -> tuple[int, int]:
        places.append(place(*args))
        return places[-1]

    monkeypatch.setattr(scenes, "write_digits", spy_write)
    monkeypatch.setattr(scenes, "_place", spy_place)
    crowded = dataclasses.replace(DENSE, overlap=1.0)
    for index in range(10):
        written.clear()
        places.clear()
        mask = render(crowded, "dense", "train", index).mask
        top = np.zeros((64, 64), int)
        for number, (alpha, (row, column)) in enumerate(zip(written, places, strict=True), 1):
            for (y, x), value in np.ndenumerate(alpha):
                if value >= 0.5 and 0 <= row + y < 64 and 0 <= column + x < 64:
                    top[row + y, column + x] = number
        assert len(written) >= 4
        assert np.array_equal(top > 0, mask > 0)
        for number in range(1, len(written) + 1):
            assert len(np.unique(mask[top == number])) <= 1, "one digit, one class"


def test_the_mask_lies_where_the_digit_was_painted() -> None:
    flat = dataclasses.replace(
        DIGITS, objects=(1, 1), texture=0, own_chroma=0, noise=0, shadow=(0, 0), contrast=(0.3, 0.3), chroma=(0.2, 0.2)
    )
    for index in range(20):
        image, mask = render(flat, "digits", "train", index)
        inside = ndimage.binary_erosion(mask > 0, iterations=2)
        if inside.any():
            colours = np.unique(image[inside], axis=0)
            assert len(colours) == 1, "the inside of a digit without texture has one colour"
            beyond = ~ndimage.binary_dilation(mask > 0, iterations=3)
            assert (image[beyond] == colours[0]).all(-1).mean() < 0.02, "the background has not"


def test_deformed_handwriting_keeps_its_digit_and_replaces_the_scan() -> None:
    sources = scenes.load_sources("pretrain")
    deformed = scenes.deform_handwriting(sources, 3, 0.4, seed=1)
    assert len(deformed.ink) == 3 * 600
    places = np.concatenate(deformed.scans)
    assert np.array_equal(np.sort(places), np.arange(1800))
    for digit in range(10):
        scan, copies = sources.scans[digit][5], deformed.scans[digit][15:18]
        near = [np.corrcoef(sources.ink[scan].ravel(), deformed.ink[copy].ravel())[0, 1] for copy in copies]
        assert min(near) > 0.5 and max(near) < 0.999
    still = scenes.deform_handwriting(sources, 1, 0.0, seed=1)
    for before, after in zip(sources.scans, still.scans, strict=True):
        assert np.allclose(sources.ink[before], still.ink[after], atol=1e-6)
    assert not same(*(render(DIGITS, "x", "pretrain", 0, material) for material in (sources, deformed)))
    with pytest.raises(ValueError, match="copies = 0"):
        scenes.deform_handwriting(sources, 0, 0.4, seed=1)


def test_a_scene_without_a_digit_is_background() -> None:
    empty = dataclasses.replace(DIGITS, objects=(0, 0))
    assert not render(empty, "digits", "train", 0).mask.any()


def test_edges_are_smooth() -> None:
    rng = np.random.default_rng(0)
    for _, alpha in scenes.write_digits(rng, DIGITS, list(scenes.load_sources("train").ink[:20])):
        partial = ((alpha > 0.05) & (alpha < 0.95)).sum()
        assert 0.1 < partial / (alpha >= 0.5).sum() < 1.5


def test_mean_colour_does_not_give_the_class_away() -> None:
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

    single = dataclasses.replace(DIGITS, objects=(1, 1))

    def colours(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = [render(single, "digits", "train", index) for index in range(start, stop)]
        features = [scene.image[scene.mask > 0].mean(0) for scene in drawn]
        return np.stack(features), np.array([scene.mask.max() for scene in drawn])

    model = QuadraticDiscriminantAnalysis(reg_param=0.01).fit(*colours(0, 600))
    accuracy = model.score(*colours(600, 900))
    assert 0.12 < accuracy < 0.45, "better than guessing among ten, far from enough"


def test_every_recipe_field_is_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {digits.variant_fingerprint("digits")}
    fields = dataclasses.fields(SceneRecipe)
    for field in fields:
        value = getattr(DIGITS, field.name)
        changed = (value[0], value[1] + 1) if isinstance(value, tuple) else value + 1
        recipe = dataclasses.replace(DIGITS, **{field.name: changed})
        monkeypatch.setitem(digits.VARIANTS, "digits", Variant(recipe, 4000, 600, 1000))
        names.add(digits.variant_fingerprint("digits"))
    monkeypatch.setitem(digits.VARIANTS, "digits", Variant(DIGITS, 4000, 600, 1001))
    names.add(digits.variant_fingerprint("digits"))
    assert len(names) == len(fields) + 2


# The cache


def test_rendering_is_silent_but_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(digits.VARIANTS, "digits", Variant(DIGITS, 3, 1, 1))
    told: list[tuple[int, int]] = []

    @contextmanager
    def counter(title: str, show: bool) -> Iterator[Callable[[int, int], None]]:
        with progress.counter(title, show) as advance:
            yield lambda done, of: (told.append((done, of)), advance(done, of))[1]

    monkeypatch.setattr(digits, "counter", counter)
    digits._fill("digits", tmp_path)
    assert capfd.readouterr() == ("", "") and told == [(done, 5) for done in range(1, 6)]


def test_the_cache_holds_what_is_rendered(rendered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [render(DIGITS, "digits", part, 7) for part in ("train", "dev", "test")]
    monkeypatch.setattr(digits, "render", None)
    arrays = digits.open_pixels("digits").arrays
    assert {name: len(array) for name, array in arrays.items()} == {
        "images": 120,
        "masks": 120,
        "dev_images": 12,
        "dev_masks": 12,
        "test_images": 15,
        "test_masks": 15,
    }
    assert same(expected[0], scenes.Scene(arrays["images"][7], arrays["masks"][7]))
    assert same(expected[1], scenes.Scene(arrays["dev_images"][7], arrays["dev_masks"][7]))
    assert same(expected[2], scenes.Scene(arrays["test_images"][7], arrays["test_masks"][7]))
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in arrays.values())


def make_small(draft: Path) -> cache.Facts:
    np.save(draft / "numbers.npy", np.arange(1000))
    return {"made": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "name"
    assert np.array_equal(cache.open_or_make(directory, make_small).arrays["numbers"], np.arange(1000))
    return directory


def test_a_truncated_file_is_named_with_its_sizes(folder: Path) -> None:
    path = folder / "numbers.npy"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=rf"numbers\.npy: {size - 100} bytes found, {size} expected; delete the directory"
    ):
        cache.open_or_make(folder, make_small)


def test_an_altered_file_fails_its_checksum(folder: Path) -> None:
    content = bytearray((folder / "numbers.npy").read_bytes())
    content[-5] ^= 1
    (folder / "numbers.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"numbers\.npy: altered, its SHA-256 begins .* delete the directory"):
        cache.open_or_make(folder, make_small)


@pytest.mark.parametrize("name", ["numbers.npy", "manifest.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: missing.*delete the directory"):
        cache.open_or_make(folder, make_small)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', '{"fingerprint": "name", "files": {"a": 1}}', "\xff"])
def test_a_spoilt_manifest_is_named(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"manifest\.json: .*delete the directory"):
        cache.open_or_make(folder, make_small)


def test_a_manifest_of_another_folder_or_pointing_outside_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in ({"fingerprint": "other"}, {"files": {"../x": manifest["files"]["numbers.npy"]}}):
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=r"manifest\.json"):
            cache.open_checked(folder)


def test_an_unwritable_cache_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(digits, "VARIANTS", SMALL)
    with pytest.raises(ValueError, match=r"cannot be written.*VILADIFF_CACHE"):
        digits.open_pixels("dense")


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(draft: Path) -> cache.Facts:
        make_small(draft)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        cache.open_or_make(tmp_path / "name", fail)
    assert list(tmp_path.iterdir()) == []


def _race(directory: Path, barrier: object, results: object) -> None:
    def make(draft: Path) -> cache.Facts:
        facts = make_small(draft)
        barrier.wait(20)  # both have filled a draft, neither has published one
        return facts

    results.put(int(cache.open_or_make(directory, make).arrays["numbers"].sum()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_that_race_both_end_well(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path / "name", barrier, results)) for _ in range(2)]
    for racer in racers:
        racer.start()
    assert [results.get(timeout=30) for _ in racers] == [499500, 499500]
    for racer in racers:
        racer.join(30)
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["name"], "the loser's copy is gone"


# Splits and data sets


def presence(images: int = 4000, rare: int = 3) -> np.ndarray:
    present = np.random.default_rng(0).random((images, 11)) < 0.2
    present[:, 0] = True
    present[:, 10] = False
    present[-rare:, 10] = True
    return present


def test_split_names_are_nested_and_cover_every_class() -> None:
    for name, source in (("digits", DIGITS_SOURCE), ("dense", DENSE_SOURCE)):
        sizes = split_names(source.config)
        order = splits.labelled_order(name, presence())
        assert np.array_equal(np.sort(order), np.arange(4000))
        assert np.array_equal(order, splits.labelled_order(name, presence()))
        assert presence()[order[: int(sizes[0])]].any(0).all()
        assert [int(size) for size in sizes] == sorted(int(size) for size in sizes)
    unlabelled = presence()
    unlabelled[:, 10] = False
    with pytest.raises(ValueError, match="class 10 is in none"):
        splits.labelled_order("digits", unlabelled)


def test_other_seeds_draw_other_lists_that_cover_every_class() -> None:
    lists = [splits.labelled_order("digits", presence(), seed)[:92] for seed in (None, 0, 1, 2)]
    assert all(presence()[chosen].any(0).all() for chosen in lists)
    assert len({tuple(sorted(chosen)) for chosen in lists}) == 4


def test_presence_counts_pixels() -> None:
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[0, :3, :4] = 2
    masks[1, 0, :3] = 2
    assert splits.classes_present(masks, 3, least=12).tolist() == [[True, False, True], [True, False, False]]


def test_a_data_set_and_its_labelled_list(rendered: Path) -> None:
    data = registry.load_dataset("digits", "92")
    assert data.num_classes == 11 == len(data.class_names) and data.class_names[:2] == ("background", "zero")
    assert len(data.labelled) == 92 and data.labelled.dtype == np.int64
    assert np.array_equal(np.sort(np.concatenate([data.labelled, data.unlabelled])), np.arange(120))
    assert len(data.captions) == 120 and len(data.val_captions) == 12
    assert np.array_equal(data.target(int(data.labelled[3])), data.masks[data.labelled[3]])
    with pytest.raises(ValueError, match=f"image {data.unlabelled[0]} is not among the 92 labelled"):
        data.target(int(data.unlabelled[0]))
    other = registry.load_dataset("digits", "92", split_seed=1)
    assert set(other.labelled) != set(data.labelled) and other.fingerprint != data.fingerprint
    assert registry.load_dataset("digits", "92").fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("digts", "92", "'digts'.*did you mean 'digits'"),
        ("coco", "232", "runtime.data_root: must be set .* 'coco'"),
        ("voc", "92", "runtime.data_root: must be set"),
        ("folder", "92", "runtime.data_root: must be set"),
        ("digits", "93", "'93'.*allowed: 92, 183, 366, 732, 1464; did you mean '92'"),
        ("digits", "1464", "more labelled images than the pool of 'digits' has \\(120\\)"),
        ("digits", "", "no split"),
    ],
)
def test_unknown_names_say_what_is_allowed(rendered: Path, name: str, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.load_dataset(name, split)
