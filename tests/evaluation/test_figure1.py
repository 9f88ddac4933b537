"""Figure 1: attention maps as masks, features of tokens sampled and scored, and a page made of runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from method_kit import STEP, cross_entropy_map, make, make_batch, make_uneven, mean_over
from scipy import special, stats

from viladiff.config.pixel_format import RGB_8
from viladiff.data.batch import EvalBatch, TextBatch
from viladiff.data.registry import load_dataset as load_dataset
from viladiff.evaluation import feature_clusters
from viladiff.experiments.tables import TableJob, write_table_page
from viladiff.inference.load import load_method, load_run, text_dim
from viladiff.methods.textprobe import TextProbe
from viladiff.models.baselines.text_probe import ClassQueryHead, ProbeConfig, attention_maps
from viladiff.report.charts import figures
from viladiff.report.sections import feature_clusters as page
from viladiff.report.table.results import collect_results
from viladiff.runs.config import RunConfig, override
from viladiff.runs.record import RunRecord, load_record
from viladiff.runs.store import Store
from viladiff.tables.cells import cells
from viladiff.tables.plan import Plan, make_plan
from viladiff.tables.spec import Table
from viladiff.tables.spec_file import load_table
from viladiff.training.trainer import fit

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "ablations" / "figure1.toml"


# The network, against NumPy


def array(x: torch.Tensor) -> np.ndarray:
    return np.asarray(x.detach().double().numpy())


def linear(x: np.ndarray, layer: torch.nn.Module) -> np.ndarray:
    return np.asarray(x @ array(layer.weight).T + array(layer.bias))  # type: ignore[arg-type]


def normed(x: np.ndarray, layer: torch.nn.Module) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return np.asarray(x * array(layer.weight) + array(layer.bias))  # type: ignore[arg-type]


def read(x: np.ndarray, words: np.ndarray, mask: np.ndarray, block: Any) -> np.ndarray:
    """One cross-attention block, image by image and head by head."""
    attention, out = block.attention, np.zeros_like(x)
    asked, given = linear(normed(x, block.norm_attention), attention.query), linear(words, attention.key_value)
    width = x.shape[-1]
    size = width // attention.heads
    for image, head in itertools.product(range(len(x)), range(attention.heads)):
        part = slice(head * size, (head + 1) * size)
        there = mask[image]
        key, value = given[image, there, :width][:, part], given[image, there, width:][:, part]
        share = special.softmax(asked[image][:, part] @ key.T / math.sqrt(size), axis=1)
        out[image][:, part] = share @ value
    x = x + linear(out, attention.out)
    hidden = linear(normed(x, block.norm_mlp), block.mlp[0])
    return np.asarray(x + linear(hidden * stats.norm.cdf(hidden), block.mlp[2]))


def masks(net: ClassQueryHead, top: np.ndarray, text: TextBatch | None) -> np.ndarray:
    """(B, C, h, w) scores of every class's query on every token's key."""
    count, _, height, width = top.shape
    x = linear(top.reshape(count, -1, height * width).transpose(0, 2, 1), net.project)
    if net.reads_text:
        words = np.repeat(array(net.null), count, 0)
        mask = np.ones((count, 1), bool)
        if text is not None:
            embedded = linear(normed(array(text.tokens), net.words[0]), net.words[1])
            words, mask = np.concatenate([words, embedded], 1), np.concatenate([mask, text.mask.numpy()], 1)
        for block in net.inject:
            x = read(x, words, mask, block)
    keys = linear(normed(x, net.norm), net.key)
    scores = np.einsum("cw,bnw->bcn", array(net.queries), keys) / math.sqrt(keys.shape[-1])
    return np.asarray(scores.reshape(count, -1, height, width))


def bilinear(x: np.ndarray, size: int) -> np.ndarray:
    """(B, C, h, w) to size x size, from centres of cells to centres of pixels."""
    for axis in (2, 3):
        side = x.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, None)
        low = np.minimum(at.astype(int), side - 1)
        share = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        x = np.take(x, low, axis) * (1 - share) + np.take(x, np.minimum(low + 1, side - 1), axis) * share
    return x


@pytest.mark.parametrize("text", [True, False])
def test_masks_and_loss_are_those_of_the_formulas(text: bool) -> None:
    method, batch = make_uneven("textprobe", **{"probe.text": text, "probe.depth": 2}), make_batch()
    with torch.no_grad():
        top = method.student.encode(batch.image)[-1]
        found = method.student.decode([top], batch.text)[method.eval_stream()].logits
    expected = masks(method.student.decoder, array(top), batch.text)  # type: ignore[arg-type]
    np.testing.assert_allclose(array(found), expected, rtol=1e-3, atol=1e-4)
    target = batch.target.numpy()
    loss = mean_over(cross_entropy_map(bilinear(expected, target.shape[1]), target), target != 255)
    assert method(batch, STEP).total.item() == pytest.approx(loss, rel=1e-4)


def test_a_map_is_a_query_times_a_key_over_the_root_of_the_width() -> None:
    queries, keys = torch.randn(3, 16), torch.randn(2, 5, 16)
    expected = [[[float(q @ k) / 4 for k in image] for q in queries] for image in keys]
    np.testing.assert_allclose(attention_maps(queries, keys).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_words_matter_where_they_are_read_and_nowhere_else() -> None:
    for text in (True, False):
        method, batch = make_uneven("textprobe", **{"probe.text": text}), make_batch()
        assert batch.text is not None
        other = replace(batch, text=TextBatch(batch.text.tokens.flip(0), batch.text.mask.flip(0)))
        assert method.required_views().text == text
        assert torch.equal(method(batch, STEP).total, method(other, STEP).total) != text
        assert not method.required_views().unlabelled


def test_without_a_word_both_streams_are_one_and_padding_is_never_read() -> None:
    method, batch = make_uneven("textprobe").eval(), make_batch()
    assert batch.text is not None
    silent = TextBatch(torch.randn_like(batch.text.tokens), torch.zeros_like(batch.text.mask))
    found = method.student(batch.image, silent)
    torch.testing.assert_close(found["fusion"], found["visual"])
    noise = torch.where(batch.text.mask[..., None], batch.text.tokens, 9.0)
    same = method.student(batch.image, TextBatch(noise, batch.text.mask))["fusion"]
    torch.testing.assert_close(same, method.student(batch.image, batch.text)["fusion"])
    assert not torch.allclose(same, found["visual"])


def test_with_and_without_the_attention_the_rest_starts_alike() -> None:
    one, other = (make("textprobe", **{"probe.text": text}).state_dict() for text in (True, False))
    assert other.keys() < one.keys() and all(torch.equal(one[name], value) for name, value in other.items())
    assert text_dim(one) == 12 and text_dim(other) == 1


def test_features_before_and_after_differ_by_what_was_read() -> None:
    method, batch = make_uneven("textprobe").eval(), make_batch()
    assert isinstance(method, TextProbe)
    with torch.no_grad():
        own, none = (method.token_features(batch.image, text) for text in (batch.text, None))
    assert torch.equal(own["before"], none["before"]) and not torch.allclose(own["after"], none["after"])
    assert own["after"].shape == (4, 16, ProbeConfig().width)
    bare = make_uneven("textprobe", **{"probe.text": False}).eval()
    assert isinstance(bare, TextProbe) and list(bare.token_features(batch.image, None)) == ["after"]


# Which tokens, and their classes


def test_a_cell_has_the_class_of_most_of_its_pixels_that_count() -> None:
    rng = np.random.default_rng(0)
    mask = rng.choice([0, 1, 2, 7, 255], (12, 8), p=[0.2, 0.2, 0.2, 0.1, 0.3])
    mask[:4, :4] = 255
    mask[:4, 4:] = np.repeat([[2], [2], [1], [1]], 4, 1)
    expected = []
    for top, left in itertools.product(range(0, 12, 4), range(0, 8, 4)):
        inside = [label for label in mask[top : top + 4, left : left + 4].ravel().tolist() if label != 255]
        expected.append(max(sorted(set(inside)), key=inside.count) if inside else 255)
    assert feature_clusters.cell_labels(mask, 4).tolist() == expected
    assert expected[0] == 255 and expected[1] == 1, "nothing counts; of equally many the lower class"
    with pytest.raises(ValueError, match="12 x 8 pixels: both sides must be multiples of 8"):
        feature_clusters.cell_labels(mask, 8)


def images_of(counts: dict[int, int], images: int = 20) -> list[np.ndarray]:
    every = np.random.default_rng(1).permutation(np.repeat(list(counts), list(counts.values())))
    return [np.asarray(part) for part in np.array_split(every, images)]


def test_tokens_are_balanced_drawn_alike_each_time_and_never_ignored_ones() -> None:
    labels = images_of({0: 900, 1: 60, 3: 250, 4: feature_clusters.FEWEST - 1, 255: 400})
    found = feature_clusters.sample(labels)
    assert found is not None
    classes, counts = np.unique(found.label, return_counts=True)
    assert classes.tolist() == [0, 1, 3] and counts.tolist() == [60, 60, 60]
    assert [labels[i][c] for i, c in zip(found.image, found.cell, strict=True)] == found.label.tolist()
    assert len(set(zip(found.image.tolist(), found.cell.tolist(), strict=True))) == 180, "without replacement"
    assert found.image.tolist() == sorted(found.image.tolist())
    torch.manual_seed(3)
    np.random.seed(3)
    again = feature_clusters.sample(labels)
    assert again is not None and all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    other = feature_clusters.sample([one.copy() for one in labels[:-1]])
    assert other is not None and not np.array_equal(other.cell, found.cell)
    many = feature_clusters.sample(images_of({k: 120 + k for k in range(30)}))
    assert many is not None and sorted(set(many.label)) == list(range(18, 30)) and len(many.label) == 12 * 100


@pytest.mark.parametrize("counts", [{}, {255: 90}, {0: 90, 255: 10}, {0: 90, 1: feature_clusters.FEWEST - 1}])
def test_below_two_classes_there_is_no_sample(counts: dict[int, int]) -> None:
    assert feature_clusters.sample(images_of(counts) if counts else []) is None


# Scores of clusters, against NumPy


def silhouette(x: np.ndarray, label: np.ndarray) -> float:
    """Mean of (b - a) / max(a, b); a token that is alone in its cluster has 0."""
    found = []
    for i in range(len(x)):
        far = np.sqrt(((x - x[i]) ** 2).sum(1))
        own = (label == label[i]) & (np.arange(len(x)) != i)
        a = far[own].mean() if own.any() else None
        b = min(far[label == other].mean() for other in set(label.tolist()) - {label[i]})
        found.append(0.0 if a is None else (b - a) / max(a, b))
    return float(np.mean(found))


def davies_bouldin(x: np.ndarray, label: np.ndarray) -> float:
    names = sorted(set(label.tolist()))
    centres = np.stack([x[label == k].mean(0) for k in names])
    wide = [np.sqrt(((x[label == k] - c) ** 2).sum(1)).mean() for k, c in zip(names, centres, strict=True)]
    worst = [
        max((wide[i] + wide[j]) / np.sqrt(((centres[i] - centres[j]) ** 2).sum()) for j in range(len(names)) if j != i)
        for i in range(len(names))
    ]
    return float(np.mean(worst))


def test_scores_are_those_of_the_formulas_on_features_of_length_1() -> None:
    rng = np.random.default_rng(2)
    label, image = rng.integers(0, 4, 60), rng.integers(0, 25, 60)
    x = rng.normal(size=(60, 7)) + 2 * np.eye(4, 7)[label] + np.eye(25, 7)[image]
    unit = x / np.sqrt((x**2).sum(1, keepdims=True))
    there = np.bincount(image)[image] > 1
    assert not there.all()
    found = feature_clusters.cluster_scores(x, label, image)
    assert found["silhouette"] == pytest.approx(silhouette(unit, label))
    assert found["davies_bouldin"] == pytest.approx(davies_bouldin(unit, label))
    assert found["image_silhouette"] == pytest.approx(silhouette(unit[there], image[there]))
    longer = feature_clusters.cluster_scores(x * rng.uniform(1, 9, (60, 1)), label, image)
    assert longer == pytest.approx(found), "length does not count"
    tighter = feature_clusters.cluster_scores(x + 9 * np.eye(4, 7)[label], label, image)
    assert tighter["silhouette"] > found["silhouette"] and tighter["davies_bouldin"] < found["davies_bouldin"]


def test_what_cannot_be_told_is_left_out_and_never_0() -> None:
    rng, image = np.random.default_rng(0), np.arange(20) // 4
    x = rng.normal(size=(20, 3))
    assert feature_clusters.cluster_scores(x, np.zeros(20, int), image).keys() == {"image_silhouette"}
    assert feature_clusters.cluster_scores(x, np.arange(20) % 2, np.arange(20)).keys() == {
        "silhouette",
        "davies_bouldin",
    }
    for flat in (np.zeros((20, 3)), np.ones((20, 3)), np.where(np.arange(20)[:, None] == 3, np.nan, x)):
        assert feature_clusters.cluster_scores(flat, np.arange(20) % 2, image) == {}
        assert feature_clusters.tsne(flat) is None, "of features that are all 0, t-SNE ends the process"


def test_a_plane_is_of_features_of_length_1() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3)) + 1
    unit = x / np.sqrt((x**2).sum(1, keepdims=True))
    np.testing.assert_array_equal(
        feature_clusters.tsne(x * rng.uniform(1, 9, (20, 1)).round()), feature_clusters.tsne(unit)
    )


def test_a_mask_of_another_size_is_seen_as_the_network_sees_the_image() -> None:
    mask = np.arange(9)[:, None] * np.ones((1, 20), int)
    fitted = feature_clusters._fitted(mask, 8)
    assert fitted.shape == (8, 16) and (np.diff(fitted[:, 0]) >= 0).all() and fitted[0, 0] == 0 and fitted[-1, 0] == 8
    assert np.array_equal(feature_clusters._fitted(mask[:8, :16], 8), mask[:8, :16])


def test_features_and_classes_are_of_the_same_places_where_sides_are_no_multiples() -> None:
    """A picture's colour is its mask, so that the mean colour of a cell says which class it must have."""
    rng = np.random.default_rng(0)
    sizes = ((43, 30), (24, 61), (40, 40))
    found = [rng.integers(0, 3, (-(-h // 8) + 1, -(-w // 8) + 1)).repeat(8, 0).repeat(8, 1)[:h, :w] for h, w in sizes]
    images = [np.repeat(mask[..., None] * 100, 3, 2).astype(np.uint8) for mask in found]
    data = SimpleNamespace(
        val_images=images, val_masks=found, uniform=False, num_classes=3, pixels=RGB_8, val_files=None
    )

    class Colour(SimpleNamespace):
        def token_features(self, pixels: torch.Tensor, text: None) -> dict[str, torch.Tensor]:
            return {"after": torch.nn.functional.avg_pool2d(pixels, 8).flatten(2).mT}

    method = Colour(
        student=SimpleNamespace(patch=8), eval=lambda: None, required_views=lambda: SimpleNamespace(text=False)
    )
    run: Any = SimpleNamespace(
        dataset=data, method=method, device=torch.device("cpu"), alive=lambda: None, rank=0, world=1, scoring="fp32",
        cfg=SimpleNamespace(runtime=SimpleNamespace(loader_workers=None)),
    )  # fmt: skip
    tokens = feature_clusters.TokenLabels(run)
    for place in (2, 0, 1):  # as they are grouped by size
        tokens.add(EvalBatch(torch.empty(0), torch.from_numpy(found[place])[None], None, (place,)))
    sampled = feature_clusters.collect_features(run, tokens.gathered())
    assert sampled is not None
    chosen, stages = sampled
    assert set(chosen.image) == {0, 1, 2} and stages["after"].shape == (len(chosen.label), 3)
    colour = (stages["after"].mean(1) * 0.2254 + 0.449) * 255 / 100
    assert np.corrcoef(colour, chosen.label)[0, 1] > 0.95


# Runs and their page

FEW = {"data.batch_labelled": 2, "train.steps": 3, "eval.boundary": False, "runtime.progress": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Store]:
    """The spec's first two rows at scale smoke, and the row without attention, each trained for three steps."""
    storage = tmp_path_factory.mktemp("figure1")
    plan = make_plan(load_table(SPEC), "smoke", rows=[1, 2, "c"], changes=FEW)
    for one in plan.runs.values():
        extra = {"runtime.runs_dir": str(storage), "runtime.visualizations": 1}
        fit(override(RunConfig(), {**one.changes, **extra}))
    return plan, Store(storage)


def entry(trained: tuple[Plan, Store], label: str) -> tuple[Path, RunRecord]:
    plan, store = trained
    row = [one.label for one in plan.table.rows].index(label)
    (name,) = plan.run_ids(row, 0)
    return store.directory(name), load_record(store.directory(name) / "record.json")


def test_a_record_has_scores_of_the_headline_alone_and_none_of_what_there_is_not(
    trained: tuple[Plan, Store],
) -> None:
    names = {f"{name}{end}" for name in page.SCORES for end in ("", "_before")}
    for label in ("Without text", "With text", "No attention to words"):
        _, record = entry(trained, label)
        streams = record.scores["student"]
        bare = label == "No attention to words"
        assert record.stream == ("visual" if bare else "fusion")
        for stream, found in streams.items():
            assert (names & found.keys() == names) == (stream == record.stream)
        own = streams[record.stream]
        assert own["tokens"] % own["token_classes"] == 0 and own["token_classes"] >= 5
        assert all(isinstance(own[name], float) for name in page.SCORES)
        assert all((own[f"{name}_before"] is None) == bare for name in page.SCORES)


def test_features_beside_a_run_are_those_of_the_tokens_that_they_say(trained: tuple[Plan, Store]) -> None:
    tokens = []
    for label in ("Without text", "With text"):
        directory, record = entry(trained, label)
        assert (directory / "features.npz").stat().st_size < 2**20
        with np.load(directory / "features.npz", allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        tokens.append((found["image"].tolist(), found["label"].tolist()))
    assert tokens[0] == tokens[1], "the same tokens for every run"
    method = load_method(load_run(directory))
    assert isinstance(method, TextProbe)
    data = load_dataset("digits", "all", scored="test")
    place = int(found["image"][-1])
    mine = found["image"] == place
    labels = feature_clusters.cell_labels(np.asarray(data.val_masks[place]), method.student.patch)
    pixels = torch.tensor(np.asarray(data.val_images[place])).permute(2, 0, 1)[None].float() / 255
    mean, spread = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        before = method.token_features((pixels - mean) / spread, None)["before"][0].numpy()
    for row, label in zip(found["before"][mine], found["label"][mine], strict=True):
        cell = int(np.abs(before - row.astype(np.float32)).sum(1).argmin())
        assert labels[cell] == label
        np.testing.assert_allclose(before[cell], row, atol=5e-3)
    scores = record.scores["student"]["fusion"]
    again = feature_clusters.cluster_scores(found["after"].astype(np.float64), found["label"], found["image"])
    assert again == pytest.approx({name: scores[name] for name in again}, abs=2e-3)


@pytest.fixture
def quiet_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib takes seconds."""
    monkeypatch.setattr(figures, "save_figures", lambda *_: [])
    monkeypatch.setattr(figures, "save_differences", lambda *_: {})


@pytest.mark.usefixtures("quiet_figures")
def test_the_page_has_both_pictures_and_says_what_captions_are(trained: tuple[Plan, Store], tmp_path: Path) -> None:
    plan, store = trained
    text = write_table_page(TableJob(plan.table, plan, store, tmp_path / "out", "make", path=SPEC)).read_text(
        encoding="utf-8"
    )
    assert text.count('<svg xmlns="http://www.w3.org/2000/svg"') == 4
    for title in ("1 Without text", "2 With text, before words are read", "2 With text, as masks are made of them"):
        assert f"<figcaption>{title} <small>" in text
    assert "written from the masks" in text and "told at validation what to look for" in text
    names = sorted(path.name for path in (tmp_path / "out" / "figures").iterdir())
    assert names == [f"tsne-{i}.svg" for i in range(1, 5)]
    assert all(path.stat().st_size < 60_000 for path in (tmp_path / "out" / "figures").iterdir())
    record = entry(trained, "With text")[1].scores["student"]["fusion"]
    shown = {name: f"{value:.3f} (1)".replace("-", "−") for name, value in record.items() if name.startswith("s")}
    assert shown["silhouette"] in text and f"{record['davies_bouldin_before']:.3f} (1)" in text
    markdown = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert f"| {shown['silhouette_before']} | {shown['silhouette']} |" in markdown
    assert "clusters/silhouette_before" in (tmp_path / "out" / "table.csv").read_text(encoding="utf-8")
    assert f"{record['tokens']} tokens, " in text


@pytest.mark.usefixtures("quiet_figures")
def test_a_published_page_needs_nothing_but_what_is_committed(trained: tuple[Plan, Store], tmp_path: Path) -> None:
    plan, store = trained
    layered = Store(store.root, [tmp_path / "published"])
    out = tmp_path / "published" / "figure1"
    first = write_table_page(TableJob(plan.table, plan, layered, out, "make", True, SPEC)).read_text(encoding="utf-8")
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "figures", "pictures", "plane", "records", "steps",
    ]  # fmt: skip
    elsewhere = Store(tmp_path / "empty", [tmp_path / "published"])
    again = write_table_page(TableJob(plan.table, plan, elsewhere, tmp_path / "again", "make", path=SPEC)).read_text(
        encoding="utf-8"
    )
    assert again.count("<path d=") == first.count("<path d=") > 20
    assert not list(out.rglob("features*"))


def test_points_are_drawn_once_each_in_the_colours_of_their_classes() -> None:
    rng = np.random.default_rng(0)
    svg = str(page.drawn(rng.normal(size=(50, 2)) * 40, np.arange(50) % 3 * 2, 11, "a <b>"))
    assert svg.count("M") == 2 * 50 and svg.count("<path") == 2 * 3 and "a &lt;b&gt;" in svg
    assert 'stroke="#dddde0"' in svg and 'stroke="#88ccee"' in svg, "as in pictures of labels"
    places = [
        float(word)
        for part in svg.split('d="')[1:]
        for word in part.split('"')[0].replace("h0", " ").replace("M", " ").split()
    ]
    assert min(places) >= 0 and max(places) <= page.SIDE
    assert "<path" in str(page.drawn(np.zeros((2, 2)), np.array([0, 1]), 3, "one place"))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "needs an array label"),
        ({"label": np.array([0, 11], np.uint8)}, "classes below 11"),
        ({"label": np.array([0, 1], np.int64)}, "uint8"),
        ({"label": np.array([0, 1], np.uint8), "after": np.zeros((3, 2))}, r"after is \(3, 2\)"),
        ({"label": np.array([0, 1], np.uint8), "after": np.full((2, 2), np.nan)}, "must be finite"),
        ({"label": np.array([{}, {}])}, "cannot be read"),
    ],
)
def test_a_plane_that_is_not_one_is_refused(arrays: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "plane.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"plane.npz.*{said}"):
        page.load(tmp_path / "plane.npz", 11)


@pytest.mark.usefixtures("quiet_figures")
def test_a_damaged_plane_is_told_and_the_rest_is_there(trained: tuple[Plan, Store], tmp_path: Path) -> None:
    plan, store = trained
    layer = tmp_path / "published" / "figure1" / "plane"
    write_table_page(
        TableJob(plan.table, plan, Store(store.root, [tmp_path / "published"]), layer.parent, "make", True, SPEC)
    )
    damaged = next(iter(sorted(layer.iterdir())))
    damaged.write_bytes(damaged.read_bytes()[:100])
    elsewhere = Store(tmp_path / "empty", [tmp_path / "published"])
    found = page.build_clusters(collect_results(plan, elsewhere), elsewhere, tmp_path / "out")
    assert found is not None and len(found.wrong) == 1 and damaged.stem in found.wrong[0]
    assert 2 <= len(found.panels) < 4 and all(line.scores[0].after.by_seed for line in found.lines)


def test_differences_are_after_less_before_and_less_the_reference(trained: tuple[Plan, Store]) -> None:
    found = page.build_clusters(collect_results(*trained), trained[1], trained[1].root / "out")
    assert found is not None and [line.label for line in found.lines][:2] == ["Without text", "With text"]
    own, base = (entry(trained, label)[1].scores["student"]["fusion"] for label in ("With text", "Without text"))
    for name, score, none in zip(page.SCORES, found.lines[1].scores, found.lines[0].scores, strict=True):
        assert score.change is not None and score.gap is not None and none.gap is None
        assert score.change.mean == pytest.approx(own[name] - own[f"{name}_before"])
        assert score.gap.mean == pytest.approx(own[name] - base[name])
    names = entry(trained, "With text")[1].class_names
    with np.load(entry(trained, "With text")[0] / "plane.npz", allow_pickle=False) as file:
        assert [name for name, _ in found.legend] == [names[k] for k in np.unique(file["label"])]


def test_differences_are_paired_within_seeds() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=4)
    one, other = dict(enumerate(base + 0.1 + 0.01 * rng.normal(size=4))), dict(enumerate(base))
    found, expected = page.paired(one, other), stats.ttest_rel(list(one.values()), list(other.values()))
    assert found is not None and found.half is not None
    assert found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    two = page.paired({0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.5, 1: 1.0, 7: 3.0})
    assert two == page.Paired(0.75, 2, None, None) and str(two) == "+0.750 (2)"
    assert page.paired({0: 1.0}, {1: 1.0}) is None and str(page.Values({})) == "—"
    assert str(page.Values({0: 0.1, 1: 0.2})) == "0.150 ± 0.071 (2)"


def test_the_spec_compares_equal_runs_but_for_the_words() -> None:
    table: Table = load_table(SPEC)
    labels = [row.label for row in table.rows]
    by_row = {labels[one.row]: override(RunConfig(), one.changes) for one in cells(table, "digits", [0], labels, [1])}
    base = by_row["With text"]
    for label, kind in (
        ("Without text", "none"), ("Another image's captions", "shuffled"), ("One caption for all", "generic"),
    ):  # fmt: skip
        assert by_row[label] == override(base, {"data.captions": kind})
    assert by_row["No attention to words"] == override(base, {"method.probe.text": False})
    plain = {
        "method.name": "textprobe",
        "data.split": "all",
        "data.split_seed": 0,
        "eval.split": "test",
        "runtime.scale": "digits",
        "runtime.threads": 1,
    }
    assert base == override(RunConfig(), plain)
    paper = [override(RunConfig(), one.changes) for one in cells(table, "paper", [0], labels, [1])]
    assert {(cfg.data.dataset, cfg.model.encoder_frozen) for cfg in paper} == {("ade20k", True)}
    assert {claim.metric for claim in table.claims} == {"miou", "silhouette", "davies_bouldin", "image_silhouette"}
    lower = next(claim for claim in table.claims if claim.metric == "davies_bouldin")
    assert lower.rows == ("Without text", "With text"), "less is better"
