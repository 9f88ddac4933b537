"""Tags of images from captions: which classes are found, and FixMatch that learns them, against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_kit import CLASSES, STEP, cross_entropy_map, make_batch, make_uneven, mean_over, softmax

from viladiff.data.batch import CutMix, Views
from viladiff.data.captions.simulated import CaptionTable
from viladiff.data.captions.tags import caption_tags, dataset_tags
from viladiff.data.dataset import Dataset
from viladiff.data.loader import BatchLoader
from viladiff.data.registry import load_dataset
from viladiff.methods.common.tags import of_both, shown_mean, tag_cross_entropy
from viladiff.runs.config import RunConfig, override

NAMES = ("background", "person", "dining table", "pottedplant", "bus")


def test_names_are_found_as_words_in_plurals_and_apart() -> None:
    captions = (
        ("A Person and two buses.", "A photo of a dining-table"),
        ("a potted plant, busy background", "persons"),
        ("someone on a businessman's table",),
        (),
        ("",),
    )
    assert caption_tags(captions, NAMES).tolist() == [
        [-1, 1, 1, 0, 1],
        [-1, 1, 0, 1, 0],
        [-1, 0, 0, 0, 0],
        [-1, -1, -1, -1, -1],
        [-1, 0, 0, 0, 0],
    ]
    assert caption_tags(captions[:1], ("road", "bus"))[0].tolist() == [0, 1], "data without a background"


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset("digits", "92")


def test_tags_are_of_the_words_that_a_method_reading_captions_is_given(dataset: Dataset) -> None:
    own, shuffled = dataset_tags(dataset), dataset_tags(dataset, "shuffled")
    assert own.shape == (len(dataset.images), 11) and set(np.unique(own)) == {-1, 0, 1}
    present = np.stack(
        [[(mask == c).sum() >= 12 for c in range(1, 11)] for mask in map(dataset.masks.__getitem__, range(300))]
    )
    named = own[:300, 1:] > 0
    assert 0.8 < named[present].mean() < 0.9 and 0.0 < named[~present].mean() < 0.04, "as often as the source says"
    table = CaptionTable({f"train/{i}": lines for i, lines in enumerate(dataset.captions)}, "").variant("shuffled")
    assert (shuffled != own).any() and np.array_equal(
        shuffled, caption_tags(tuple(table.values()), dataset.class_names)
    )
    assert (dataset_tags(dataset, "none") == -1).all()
    assert (dataset_tags(dataset, "generic")[:, 1:] == 0).all()


def test_the_loader_hands_out_the_tags_of_its_images(dataset: Dataset) -> None:
    cfg = override(RunConfig(), {"method.name": "fixmatch_tags", "data.batch_labelled": 4, "data.batch_unlabelled": 4})
    views = Views(strong=1, cutmix=True, tags=True)
    loader = BatchLoader(cfg, dataset, views, None, 8, torch.device("cpu"))
    (batch,) = loader.micro_batches(3)
    own = dataset_tags(dataset)
    drawn = [loader.labelled[3 * 4 + k][1] for k in range(4)], [loader.unlabelled[3 * 4 + k][1] for k in range(4)]
    for found, images in zip((batch.tags, batch.tags_u), drawn, strict=True):
        assert found is not None and found.tolist() == own[images].tolist()
    (plain,) = BatchLoader(cfg, dataset, Views(), None, 8, torch.device("cpu")).micro_batches(3)
    assert plain.tags is None and plain.tags_u is None


def test_a_picture_of_two_images_has_the_tags_of_both() -> None:
    tags = torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, -1], [1, 0, 0, 0], [0, 0, 1, 1]])
    boxes = torch.tensor([[0, 0, 8, 8], [0, 8, 8, 16], [0, 0, 0, 0], [0, 0, 0, 0]])
    mix = CutMix(boxes, torch.tensor([1, 0, 3, 2]))
    assert of_both(tags, mix).tolist() == [[1, 1, -1, -1], [1, 1, -1, -1], [1, 0, 0, 0], [0, 0, 1, 1]]


def test_the_mean_is_of_cells_that_show_something() -> None:
    top = torch.arange(16.0).view(1, 1, 4, 4).repeat(3, 2, 1, 1)
    shown = torch.zeros(3, 16, 16, dtype=torch.bool)
    shown[0, 0, 0] = shown[0, 15, 7] = True  # cells 0 and 13
    shown[1] = True
    mean, seen = shown_mean(top, shown)
    assert mean[:, 0].tolist() == [6.5, 7.5, 0.0] and seen.tolist() == [True, True, False]


def test_losses_are_those_of_numpy() -> None:
    method = make_uneven("fixmatch_tags")
    batch = make_batch(views=method.required_views())
    with torch.no_grad():
        half = float(method.teacher(batch.weak[0])["visual"].softmax(1).amax(1).median())  # type: ignore[operator]
    method = make_uneven("fixmatch_tags", **{"pseudo.threshold": half, "tags.weight": 1.4})
    found = method(batch, STEP)

    with torch.no_grad():
        weak = method.teacher(batch.weak[0])["visual"].numpy()  # type: ignore[operator]
        p = softmax(weak)
        confidence, labels, valid, strong = p.max(1), p.argmax(1), batch.valid.numpy(), batch.strong[0].numpy()
        tags_u = batch.tags_u.numpy()  # type: ignore[union-attr]
        both = tags_u.copy()
        pasted = [x.copy() for x in (strong, confidence, labels, valid)]
        for i, (top, left, bottom, right) in enumerate(batch.mix[0].boxes.tolist()):
            j = i ^ 1
            for into, whole in zip(pasted, (strong, confidence, labels, valid), strict=True):
                into[i, ..., top:bottom, left:right] = whole[j, ..., top:bottom, left:right]
            if bottom > top:
                for c in range(CLASSES):
                    pair = (tags_u[i, c], tags_u[j, c])
                    both[i, c] = 1 if 1 in pair else min(pair)
        strong, confidence, labels, valid = pasted
        image = torch.cat([batch.image, torch.from_numpy(strong)])
        features = method.student.encode(image)
        logits = method.student.logits(features, image.shape[-2:]).numpy()
        top_map = features[-1].numpy()
    sup = mean_over(cross_entropy_map(logits[:4], batch.target.numpy()), batch.target.numpy() != 255)
    pseudo = mean_over(cross_entropy_map(logits[4:], labels) * (confidence >= half), valid)

    weight, bias = (x.detach().numpy() for x in method.tagger.parameters())  # type: ignore[union-attr]
    tags = np.concatenate([batch.tags.numpy(), both])  # type: ignore[union-attr]
    shown = np.concatenate([batch.target.numpy() != 255, valid])
    side, total, count = image.shape[-1] // top_map.shape[-1], 0.0, 0
    for n in range(8):
        cells = [
            top_map[n, :, y, x]
            for y in range(top_map.shape[2])
            for x in range(top_map.shape[3])
            if shown[n, y * side : (y + 1) * side, x * side : (x + 1) * side].any()
        ]
        scores = weight @ np.mean(cells, 0) + bias
        for c in range(CLASSES):
            if tags[n, c] >= 0:
                total += np.log1p(np.exp(-scores[c] if tags[n, c] else scores[c]))
                count += 1
    assert count == 8 * (CLASSES - 1), "class 0 is not known"
    terms = {name: float(value) for name, value in found.terms.items()}
    assert terms["sup"] == pytest.approx(sup, rel=1e-4)
    assert terms["pseudo"] == pytest.approx(pseudo, rel=1e-4) and 0 < terms["coverage"] < 1
    assert terms["tags"] == pytest.approx(total / count, rel=1e-4)
    assert found.total.item() == pytest.approx((sup + pseudo) / 2 + 0.7 * total / count, rel=1e-4)


def test_without_a_known_tag_it_is_fixmatch() -> None:
    mine, plain = make_uneven("fixmatch_tags"), make_uneven("fixmatch")
    mine.student.load_state_dict(plain.student.state_dict())
    mine.teacher.load_state_dict(plain.teacher.state_dict())  # type: ignore[union-attr]
    batch = make_batch(views=mine.required_views())
    silent = replace(batch, tags=torch.full_like(batch.tags, -1), tags_u=torch.full_like(batch.tags_u, -1))  # type: ignore[arg-type]
    found, other = mine(silent, STEP), plain(batch, STEP)
    torch.testing.assert_close(found.total, other.total)
    found.total.backward()
    other.total.backward()
    for a, b in zip(mine.student.parameters(), plain.student.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert not torch.allclose(mine(batch, STEP).total, other.total)


def test_unknown_tags_and_unseen_images_do_not_count() -> None:
    logits = torch.zeros(3, 2)
    tags = torch.tensor([[1.0, -1.0], [0.0, 1.0], [0.0, 0.0]])
    seen = torch.tensor([True, True, False])
    assert tag_cross_entropy(logits, tags, seen).item() == pytest.approx(np.log(2))
    logits[0, 1], logits[2, 0] = 9.0, 9.0
    assert tag_cross_entropy(logits, tags, seen).item() == pytest.approx(np.log(2))
    assert tag_cross_entropy(logits, 0 * tags - 1, seen).item() == 0
