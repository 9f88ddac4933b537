"""U2PL against straight-line NumPy: which pixels are kept, anchors, negatives, what the queues hold, and the loss."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from method_kit import CLASSES, SIDE, cross_entropy_map, make, make_batch, make_uneven, mean_over, mixed, share, softmax
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, Step
from viladiff.data.transforms.mixing import box_mask, half_boxes
from viladiff.methods.base import keyed_boxes
from viladiff.methods.u2pl import (
    Representation,
    U2pl,
    class_prototypes,
    contrast,
    entropy,
    kept_consistency,
    not_of,
    percentiles,
    shared_sample,
)
from viladiff.models.baselines.memory_bank import MemoryBank, gather_at, sample_positions

STEP = Step(index=71, progress=0.5, seed=3)
"""Its boxes are drawn; half of the percentages are left."""


def ready(**changes: object) -> tuple[U2pl, Batch]:
    method = make_uneven("u2pl", **changes)
    assert isinstance(method, U2pl)
    return method, make_batch(views=method.required_views())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


# Its pieces


@pytest.mark.parametrize("share_counted", [1.0, 0.4, 0.01])
def test_percentiles_are_numpys_over_counted_values(share_counted: float) -> None:
    values = torch.rand(3, 20, 17, generator=generator()).square()
    counted = torch.rand(values.shape, generator=generator(1)) < share_counted
    shares = (0.0, 3.7, 20.0, 50.0, 91.3, 100.0)
    expected = np.percentile(values[counted].double().numpy(), shares)
    assert [float(x) for x in percentiles(values, counted, shares)] == pytest.approx(expected, rel=1e-5)


def test_percentiles_of_nothing_are_infinite_and_of_one_value_that_value() -> None:
    values, counted = torch.rand(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    assert all(x == torch.inf for x in percentiles(values, counted, (0.0, 50.0, 100.0)))
    counted[1, 2, 3] = True
    assert all(x == values[1, 2, 3] for x in percentiles(values, counted, (0.0, 50.0, 100.0)))


def test_entropy_in_numpy_also_of_sure_pixels() -> None:
    logits = 4 * torch.randn(2, 5, 3, 3, generator=generator())
    logits[0, 1, 0, 0] = 300.0
    p = softmax(logits.double().numpy())
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = -np.nansum(np.where(p > 0, p * np.log(p), 0), 1)
    np.testing.assert_allclose(entropy(logits).numpy(), expected, atol=1e-5)


def test_kept_consistency_in_numpy_and_of_nothing() -> None:
    logits = torch.randn(2, 5, 4, 4, generator=generator(), requires_grad=True)
    labels = torch.randint(0, 5, (2, 4, 4), generator=generator(1))
    valid = torch.rand(2, 4, 4, generator=generator(2)) < 0.8
    kept = valid & (torch.rand(2, 4, 4, generator=generator(3)) < 0.5)
    losses = cross_entropy_map(logits.detach().numpy(), labels.numpy())
    expected = valid.sum().item() / kept.sum().item() * mean_over(losses, kept.numpy())
    found = kept_consistency(logits, labels, kept, valid)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    nothing = kept_consistency(logits, labels, kept & False, valid)
    nothing.backward()
    assert nothing == 0 and logits.grad is not None and not logits.grad.any()


def test_contrast_in_numpy_teaches_anchors_alone() -> None:
    anchors, positives = (torch.randn(6, 4, generator=generator(i), requires_grad=True) for i in (0, 1))
    negatives = torch.nn.functional.normalize(torch.randn(6, 3, 4, generator=generator(2)), dim=2).requires_grad_()
    a, b, c = (unit(x.detach().numpy()) for x in (anchors, positives, negatives))
    alike = np.concatenate([(a * b).sum(1)[:, None], np.einsum("nd,nmd->nm", a, c)], 1) / 0.5
    found = contrast(anchors, positives, negatives, 0.5)
    np.testing.assert_allclose(found.detach().numpy(), -np.log(softmax(alike)[:, 0]), rtol=1e-5)
    found.sum().backward()
    assert anchors.grad is not None and anchors.grad.any() and positives.grad is negatives.grad is None


def test_class_means_in_numpy() -> None:
    vectors = torch.randn(40, 3, generator=generator())
    classes = torch.randint(0, 4, (40,), generator=generator(1))
    counted = torch.rand(40, generator=generator(2)) < 0.6
    found = class_prototypes(vectors, classes, counted, 6)
    for k in range(6):
        here = (classes == k) & counted
        expected = vectors[here].mean(0) if here.any() else torch.zeros(3)
        torch.testing.assert_close(found[k], expected)


def test_not_of_pixel_by_pixel() -> None:
    p = torch.rand(3, 6, 10, generator=generator()).softmax(1)
    target = torch.randint(0, 6, (3, 10), generator=generator(1))
    found = not_of(p, target, labelled=2, first=2, last=5).numpy()
    for n, k, i in np.ndindex(3, 6, 10):
        rank = int((p[n, :, i] > p[n, k, i]).sum())
        expected = (rank < 2 and target[n, i] != k) if n < 2 else 2 <= rank < 5
        assert found[n, k, i] == expected


def test_sample_takes_what_counts_by_chance() -> None:
    counted = torch.rand(3, 2, 30, generator=generator()) < 0.3
    order = torch.rand(3, 1, 30, generator=generator(1))
    at, given = sample_positions(counted, order, 8)
    for i, j in np.ndindex(3, 2):
        places = at[i, j][given[i, j]].tolist()
        eligible = counted[i, j].nonzero().flatten().tolist()
        assert len(places) == min(8, len(eligible))
        assert sorted(places) == sorted(sorted(eligible, key=lambda place: -order[i, 0, place].item())[:8])
    assert sample_positions(counted, order, 99)[0].shape == (3, 2, 30)


def test_shared_sample_gives_classes_equal_shares() -> None:
    classes = torch.tensor([[0] * 20 + [1] * 3 + [2] * 20, [1] * 43])
    counted = torch.ones(2, 43, dtype=torch.bool)
    counted[0, :5] = False
    order = torch.rand(2, 43, generator=generator())
    at, given = shared_sample(classes, counted, order, 13)
    assert given.all() and at.shape == (2, 13)
    assert torch.bincount(classes[0][at[0]], minlength=3).tolist() == [5, 3, 5]
    assert (at[0][classes[0][at[0]] == 0] >= 5).all()
    assert all(len(set(row.tolist())) == 13 for row in at)
    first = [order[1, place].item() for place in at[1]]
    assert sorted(first) == sorted(order[1].tolist())[:13]
    at, given = shared_sample(classes, counted & False, order, 13)
    assert not given.any()
    at, given = shared_sample(classes, counted, order, 99)
    assert at.shape == (2, 43) and given.sum().item() == 38 + 43


# Queues


def test_banks_are_queues_of_fixed_length() -> None:
    banks, size = MemoryBank(3, 7, 2), 7
    expected: list[deque[tuple[float, ...]]] = [deque(maxlen=size) for _ in range(3)]
    gen = generator()
    for _ in range(12):
        vectors = torch.randn(2, 3, 6, 2, generator=gen)
        counted = torch.rand(2, 3, 6, generator=gen) < torch.rand(1, generator=gen)
        counted[:, 2] &= bool(torch.rand(1, generator=gen) < 0.3)
        banks.push(vectors, counted)
        for n, k, m in np.ndindex(2, 3, 6):
            if counted[n, k, m]:
                expected[k].append(tuple(vectors[n, k, m].half().tolist()))
        for k in range(3):
            count = int(banks.filled[k])
            assert count == len(expected[k]) and not banks.vectors[k, count:].any()
            places = [(int(banks.following[k]) - count + i) % size for i in range(count)]
            assert [tuple(banks.vectors[k, place].tolist()) for place in places] == list(expected[k])


def test_more_new_vectors_than_places_leave_the_last_ones() -> None:
    banks = MemoryBank(1, 3, 1)
    banks.push(torch.arange(10.0).view(1, 1, 10, 1), torch.ones(1, 1, 10, dtype=torch.bool))
    assert sorted(banks.vectors.flatten().tolist()) == [7, 8, 9] and banks.filled.tolist() == [3]


def test_draws_come_from_filled_places_of_the_right_class() -> None:
    banks = MemoryBank(3, 50, 1)
    banks.push(
        torch.arange(8.0).view(1, 1, 8, 1) + torch.tensor([0.0, 100.0, 200.0]).view(1, 3, 1, 1),
        torch.tensor([[[True] * 8, [True] * 3 + [False] * 5, [False] * 8]]),
    )
    uniform = torch.rand(1, 3, 400, generator=generator())
    uniform[0, :, 0] = 1 - 2**-24
    found = banks.draw(torch.tensor([[0, 1, 2]]), uniform)[..., 0]
    assert set(found[0, 0].tolist()) == set(range(8)) and set(found[0, 1].tolist()) == {100, 101, 102}
    assert not found[0, 2].any()
    counts = np.bincount(found[0, 0].int().numpy())
    assert counts.min() > 25


def test_queues_are_bounded_by_vectors_and_by_megabytes() -> None:
    assert make("u2pl", queue_size=100, width=32).banks.vectors.shape == (CLASSES, 100, 32)
    big = make("u2pl", queue_size=10**6, queue_megabytes=1, width=64).banks.vectors
    assert big.shape[1] == 2**20 // (2 * CLASSES * 64) and 0.99 * 2**20 < big.numel() * 2 <= 2**20


# The whole


def draws_of(batch: Batch, shape: tuple[int, ...], what: str) -> Tensor:
    keys = [*(f"l{key}" for key in batch.keys), *(f"u{key}" for key in batch.keys_u)]
    return keyed_random.uniform(keys, shape, 3, "u2pl", STEP.index, what)


@pytest.mark.parametrize("cutmix", [True, False])
def test_loss_is_that_of_the_formula(cutmix: bool) -> None:
    """One vector in each queue but one, so that which is drawn does not matter; every anchor counts."""
    changes = {
        "anchors": 999,
        "negatives": 3,
        "queue_size": 1,
        "width": 8,
        "entropy_percent": 40.0,
        "contrast_weight": 0.5,
    }
    method, batch = ready(cutmix=cutmix, unsup_weight=0.7, confidence=0.1, **changes)
    banked = torch.randn(1, CLASSES, 1, 8, generator=generator())
    has = torch.tensor([True, True, False, True, True])
    method.banks.push(torch.nn.functional.normalize(banked, dim=3), has[None, :, None])
    losses = method(batch, STEP)

    valid, target = batch.valid.numpy(), batch.target.numpy()
    inside = np.zeros_like(valid)
    if cutmix:
        inside = box_mask(keyed_boxes(batch, STEP, "u2pl-cutmix", half_boxes).boxes, SIDE, SIDE).numpy()
        assert inside.reshape(4, -1).mean(1) == pytest.approx([0.5] * 4, abs=0.05)
    images = torch.cat([batch.image, torch.from_numpy(mixed(batch.weak[0].numpy(), inside))])
    with torch.no_grad():
        labels = mixed(method.teacher(batch.weak[0])["visual"].argmax(1).numpy(), inside)
        theirs, mine = (net.streams(images)["visual"] for net in (method.teacher, method.student))
        reps = method.teacher_head(theirs.mid).numpy()
        anchors = unit(method.head(mine.mid, draws_of(batch, (16,), "dropout")).numpy())
        seen, z = method.teacher(images)["visual"].numpy(), method.student(images)["visual"].numpy()
        p = softmax(theirs.logits.numpy())
    valid = mixed(valid, inside)
    h = -(softmax(seen[4:]) * np.log(softmax(seen[4:]))).sum(1)
    highest, low, high = np.percentile(h[valid], (90, 20, 80))
    kept = valid & (h <= highest)
    sup = mean_over(cross_entropy_map(z[:4], target), target != 255)
    pseudo = valid.sum() / kept.sum() * mean_over(cross_entropy_map(z[4:], labels), kept)

    of = np.concatenate([target, np.where(valid, labels, 255)])[:, ::2, ::2].reshape(8, -1)
    sure = np.concatenate([target != 255, valid & (h <= low)])[:, ::2, ::2].reshape(8, -1)
    p = p.reshape(8, CLASSES, -1)
    terms, seen_of = [], []
    for k in range(CLASSES):
        positive = unit(reps[(of == k) & sure].mean(0))
        chosen = anchors[(of == k) & sure & (p[:, k] > np.float32(0.1))]
        seen_of.append(len(chosen))
        if not has[k] or not len(chosen):
            continue
        negative = method.banks.vectors[k, 0].float().numpy()
        up, down = np.exp(chosen @ positive / 0.5), np.exp(chosen @ negative / 0.5)
        terms.append(-np.log(up / (up + 3 * down)).mean())
    assert len(terms) > 1 and seen_of[2] > 5, seen_of
    named = {"sup": sup, "pseudo": pseudo, "contrast": np.mean(terms), "coverage": kept.sum() / valid.sum()}
    assert {k: float(losses.terms[k]) for k in named} == pytest.approx(named, rel=2e-3)
    assert float(losses.total.detach()) == pytest.approx(sup + 0.7 * pseudo + 0.5 * np.mean(terms), rel=1e-3)

    method.after_step(STEP)
    uncertain = np.concatenate([target != 255, valid & (h >= high)])[:, ::2, ::2].reshape(8, -1)
    rank = (p[:, None] > p[:, :, None]).sum(2)
    far = np.concatenate([(rank[:4] < 3) & (of[:4, None] != np.arange(CLASSES)[:, None]), rank[4:] >= 3])
    far &= uncertain[:, None]
    for k in range(CLASSES):
        candidates = unit(reps)[far[:, k]]
        apart = np.abs(candidates - method.banks.vectors[k, 0].float().numpy()).max(1)
        assert apart.min() < 2e-3


def test_queues_get_the_uncertain_pixels_of_a_step_when_it_is_done() -> None:
    method, batch = ready(max_enqueue=20, queue_size=1000, width=8)
    method(batch, STEP)
    assert not method.banks.filled.any()
    method.after_step(STEP)
    filled = method.banks.filled.clone()
    assert filled.min() > 0 and filled.max() <= 20 * 8
    for k in range(CLASSES):
        norms = method.banks.vectors[k].float().norm(dim=1)
        torch.testing.assert_close(norms, (torch.arange(1000) < filled[k]).float(), atol=2e-3, rtol=0)
    method.after_step(STEP._replace(index=72))
    assert torch.equal(method.banks.filled, filled)
    method.eval()(batch, STEP)
    method.after_step(STEP)
    assert torch.equal(method.banks.filled, filled)


def test_micro_batches_of_a_step_go_into_the_queues_together() -> None:
    """Labelled pixels have no percentile: the same ones as of the whole batch."""
    whole, parts = (ready(max_enqueue=999, queue_size=5000, width=8, entropy_percent=0.0)[0] for _ in range(2))
    batch = make_batch(views=whole.required_views())
    whole(batch, STEP)
    for rank in range(2):
        parts(share(batch, rank, 2), STEP)
    for method in (whole, parts):
        method.after_step(STEP)
    few = (whole.banks.filled - parts.banks.filled).abs().max()
    assert few <= 4 and whole.banks.filled.min() > 50  # the most uncertain pixel of a batch, or of each part


def test_warm_up_learns_from_labels_alone_and_the_average_begins_after_it() -> None:
    method, batch = ready(warmup=0.5)
    early = Step(49, 0.49, 3)
    losses = method(batch, early)
    assert float(losses.total.detach()) == pytest.approx(float(losses.terms["sup"])) and losses.terms["pseudo"] == 0
    losses.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in method.head.parameters())
    for step, keep in ((early, 0.0), (Step(50, 0.5, 3), 0.0), (Step(51, 0.51, 3), 0.5), (Step(99, 0.99, 3), 0.98)):
        before = [p.clone() for p in (*method.teacher.parameters(), *method.teacher_head.parameters())]
        with torch.no_grad():
            for parameter in (*method.student.parameters(), *method.head.parameters()):
                parameter.add_(0.1)
            method.after_step(step)
        after = (*method.teacher.parameters(), *method.teacher_head.parameters())
        student = (*method.student.parameters(), *method.head.parameters())
        for old, new, own in zip(before, after, student, strict=True):
            torch.testing.assert_close(new, keep * old + (1 - keep) * own)


def test_fewer_pixels_are_dropped_and_fewer_are_sure_as_training_goes_on() -> None:
    method, batch = ready(width=8, queue_size=50)
    found = []
    for progress in (0.1, 0.9):
        step = Step(70, progress, 3)
        method(batch, step)
        method.after_step(step)
        found.append(method(batch, step).terms)
    assert float(found[0]["coverage"]) == pytest.approx(0.82, abs=0.01)
    assert float(found[1]["coverage"]) == pytest.approx(0.98, abs=0.01)
    assert found[0]["anchors"] > found[1]["anchors"] > 0


def test_representation_drops_channels_only_where_told() -> None:
    torch.manual_seed(0)
    head, mid = Representation(16, 8), torch.randn(2, 16, 4, 4)
    plain = head(mid)
    assert plain.shape == (2, 16, 8) and torch.equal(plain, head(mid))
    assert torch.equal(head(mid, torch.ones(2, 16), p=0.0), plain)
    assert not torch.equal(head(mid, torch.linspace(0, 0.99, 32).view(2, 16)), plain)


def test_contrast_reaches_student_and_head_and_no_teacher() -> None:
    method, batch = ready(unsup_weight=0.0, width=8, queue_size=20)
    method(batch, STEP)
    method.after_step(STEP)
    batch.target[:, ::2] = 255
    method(batch, STEP).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.head.parameters())
    assert all(p.grad is None for p in (*method.teacher.parameters(), *method.teacher_head.parameters()))


def test_pick_takes_rows() -> None:
    x = torch.arange(24.0).view(2, 4, 3)
    found = gather_at(x, torch.tensor([[3, 0], [1, 1]]))
    assert torch.equal(found, torch.stack([x[0, [3, 0]], x[1, [1, 1]]]))
