"""DAW's running values, its threshold and its alignment, each against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from method_kit import CLASSES, STEP, make, make_batch, make_uneven, share, take_steps
from scipy.stats import norm
from torch import Tensor

from viladiff.data.batch import Step
from viladiff.methods import unimatch
from viladiff.methods.base import Method
from viladiff.methods.daw import class_confidence, crossing, moved, right_and_wrong
from viladiff.models.fused.pixel_logits import reweighted


def probabilities(n: int = 3, seed: int = 0, classes: int = CLASSES) -> Tensor:
    return torch.randn(n, classes, 7, 5, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


def test_class_confidence_in_numpy() -> None:
    p, counted = probabilities(), torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    found = class_confidence(*p.max(1), counted, CLASSES).numpy()
    confidence, labels = p.max(1).values.numpy(), p.argmax(1).numpy()
    for k in range(CLASSES):
        here = (labels == k) & counted.numpy()
        assert found[0, k] == here.sum() and found[1, k] == pytest.approx(confidence[here].sum(), rel=1e-5)


def test_right_and_wrong_in_numpy() -> None:
    p = probabilities()
    target = torch.randint(0, CLASSES, (3, 7, 5), generator=torch.Generator().manual_seed(2))
    target[0, :3] = 255
    found = right_and_wrong(*p.max(1), target).numpy()
    conflict_weight, labels, y = 1 - p.max(1).values.numpy(), p.argmax(1).numpy(), target.numpy()
    for row, here in zip(found, (labels == y, (labels != y) & (y != 255)), strict=True):
        assert row == pytest.approx(
            [here.sum(), conflict_weight[here].sum(), (conflict_weight[here] ** 2).sum()], rel=1e-5
        )


@pytest.mark.parametrize("near_one", [0.2, 1e-3])
def test_gaussians_move_towards_mean_and_variance_also_of_confidences_near_one(near_one: float) -> None:
    conflict_weight = near_one * torch.rand(2, 400, generator=torch.Generator().manual_seed(1))
    sums = torch.stack([torch.full((2,), 400.0), conflict_weight.sum(1), conflict_weight.square().sum(1)], 1)
    before = torch.tensor([[0.4, 0.3], [0.6, 0.2]])
    after = moved(before, sums, 0.0).double().numpy()
    confidence = 1 - conflict_weight.double().numpy()
    assert after[:, 0] == pytest.approx(confidence.mean(1), rel=1e-6)
    assert after[:, 1] == pytest.approx(confidence.var(1), rel=1e-3)
    torch.testing.assert_close(moved(before, sums, 0.9), 0.9 * before + 0.1 * moved(before, sums, 0.0))


def test_too_few_pixels_move_nothing() -> None:
    before = torch.tensor([[0.4, 0.3], [0.6, 0.2]])
    after = moved(before, torch.tensor([[9.0, 1.0, 0.5], [10.0, 1.0, 0.5]]), 0.9)
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def pair(m: float, v: float) -> Tensor:
    return torch.tensor([m, v])


@settings(max_examples=200, deadline=None)
@given(st.floats(0.5, 0.99), st.floats(0.2, 0.9), st.floats(1e-4, 0.3), st.floats(1e-4, 0.3))
def test_threshold_is_where_the_densities_cross_between_the_means(m: float, n: float, v: float, w: float) -> None:
    """Where each density is the higher one at its own mean, they cross once between the means."""
    right, wrong = norm(m, v**0.5), norm(n, w**0.5)
    assume(m - n > 0.02 and right.logpdf(m) > wrong.logpdf(m) + 1e-3 and wrong.logpdf(n) > right.logpdf(n) + 1e-3)
    found = float(crossing(pair(m, v), pair(n, w), 0.0))
    assert n <= found <= m
    assert right.logpdf(found) == pytest.approx(wrong.logpdf(found), abs=1e-2 * (1 + (m - n) ** 2 / min(v, w)))
    grid = np.linspace(n, m, 20_001)
    root = grid[np.argmin(np.abs(right.logpdf(grid) - wrong.logpdf(grid)))]
    assert found == pytest.approx(root, abs=2e-3)


def test_equal_variances_give_the_midpoint_and_nearly_equal_ones_nearly_that() -> None:
    assert float(crossing(pair(0.9, 0.04), pair(0.5, 0.04), 0.2)) == pytest.approx(0.7)
    for factor in (1 + 1e-6, 1 - 1e-6, 1 + 1e-4):
        near = float(crossing(pair(0.9, 0.04 * factor), pair(0.5, 0.04), 0.2))
        assert near == pytest.approx(0.7, abs=1e-4)
    start = torch.tensor([1 / CLASSES, 0.5])
    assert float(crossing(start, start, 1 / CLASSES)) == pytest.approx(1 / CLASSES)


def test_threshold_keeps_its_limits() -> None:
    assert float(crossing(pair(1.0, 1e-9), pair(0.99, 1e-9), 0.2)) == pytest.approx(0.995)
    assert float(crossing(pair(0.1, 0.01), pair(0.05, 0.01), 0.2)) == pytest.approx(0.2)
    assert float(crossing(pair(0.9, 0.0), pair(0.5, 0.0), 0.2)) == pytest.approx(0.7)
    assert float(crossing(pair(0.99, 1e-5), pair(0.999, 0.2), 0.2)) <= 1


def test_alignment_raises_classes_that_unlabelled_images_show_too_little_of() -> None:
    p = probabilities()
    labelled, unlabelled = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.5]), torch.tensor([0.3, 0.5, 0.5, 0.5, 0.5])
    found = reweighted(p, labelled / unlabelled)
    expected = p.numpy().copy()
    expected[:, 0] *= 3
    np.testing.assert_allclose(found.numpy(), expected / expected.sum(1, keepdims=True), rtol=1e-5)
    torch.testing.assert_close(reweighted(p, labelled / labelled), p)


def state(method: Method) -> dict[str, Tensor]:
    return {name: getattr(method, name).clone() for name in ("distributions", "gaussians", "tau")}


def test_a_step_moves_the_running_values_and_reads_those_before_it() -> None:
    method = make("daw", **{"pseudo.threshold": 0.4})
    batch = make_batch(views=method.required_views())
    before = state(method)
    assert before["tau"] == pytest.approx(0.4) and (before["distributions"] == 1 / CLASSES).all()
    first = method(batch, STEP)
    assert first.terms["tau"] == pytest.approx(0.4)
    assert all(torch.equal(value, before[name]) for name, value in state(method).items())
    with torch.no_grad():
        clean = method.student(batch.weak[0])["visual"].softmax(1)
        own = method.student(batch.image)["visual"].softmax(1)
    method.after_step(STEP)
    for row, p, counted in ((0, own, batch.target != 255), (1, clean, batch.valid)):
        confidence, labels = p.max(1)
        for k in range(CLASSES):
            here = (labels == k) & counted
            seen = confidence[here].mean().item() if here.any() else 1 / CLASSES
            expected = 0.99 / CLASSES + 0.01 * seen
            assert method.distributions[row, k].item() == pytest.approx(expected, rel=1e-4)
    right = own.max(1).values[own.argmax(1) == batch.target]
    assert method.gaussians[0, 0].item() == pytest.approx(0.99 / CLASSES + 0.01 * right.mean().item(), rel=1e-4)
    assert method.gaussians[0, 1].item() == pytest.approx(0.99 * 0.5 + 0.01 * right.var(correction=0).item(), rel=1e-4)
    assert method.tau.item() == pytest.approx(float(crossing(*method.gaussians, 1 / CLASSES)))
    assert method.threshold() == method.tau.item() != pytest.approx(0.4)


def test_micro_batches_of_a_step_count_together() -> None:
    whole, parts = make("daw"), make("daw")
    batch = make_batch(views=whole.required_views())
    whole(batch, STEP)
    for rank in range(2):
        parts(share(batch, rank, 2), STEP)
    for method in (whole, parts):
        method.after_step(STEP)
    for name, value in state(whole).items():
        torch.testing.assert_close(state(parts)[name], value, rtol=1e-4, atol=1e-6)
    before = state(whole)
    whole.after_step(Step(8, 0.9, 3))
    assert all(torch.equal(value, before[name]) for name, value in state(whole).items())


def test_evaluation_tells_nothing_to_the_running_values() -> None:
    method = make("daw").eval()
    method(make_batch(views=method.required_views()), STEP)
    before = state(method)
    method.after_step(STEP)
    assert all(torch.equal(value, before[name]) for name, value in state(method).items())


def test_running_values_are_part_of_the_state() -> None:
    first, second = make("daw", **{"pseudo.threshold": 0.7}), make("daw")
    with torch.no_grad():
        for i, value in enumerate((first.distributions, first.gaussians, first.tau)):
            value.add_(0.01 * (i + 1))
    second.load_state_dict(first.state_dict())
    assert second.threshold() == pytest.approx(0.73)
    assert all(torch.equal(value, state(second)[name]) for name, value in state(first).items())


def test_daw_without_its_two_parts_is_unimatch_bit_for_bit() -> None:
    bare = make("daw", distribution_alignment=False, adaptive_threshold=False, **{"pseudo.threshold": 0.3})
    base = make("unimatch", **{"pseudo.threshold": 0.3})
    totals = [take_steps(m, torch.optim.AdamW(m.parameters(), 1e-3), 0, 4) for m in (bare, base)]
    assert totals[0] == totals[1]
    assert bare.eval_network() is bare.teacher and bare.cfg.teacher.momentum == 0.999


@pytest.mark.parametrize(
    "changes", [{"distribution_alignment": False}, {"adaptive_threshold": False}, {"momentum": 0.5}], ids=str
)
def test_each_part_of_daw_changes_training(changes: dict[str, object]) -> None:
    totals = []
    for method in (make("daw", **{"pseudo.threshold": 0.5}), make("daw", **{"pseudo.threshold": 0.5, **changes})):
        totals.append(take_steps(method, torch.optim.AdamW(method.parameters(), 3e-3), 0, 3))
    assert totals[0] != totals[1]


def test_a_step_judges_aligned_labels_by_the_running_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels and confidence both, the latter against τ, not against the field."""
    method, seen = make_uneven("daw", **{"pseudo.threshold": 0.95}), []
    batch = make_batch(views=method.required_views())
    with torch.no_grad():
        method.distributions.copy_(torch.rand(2, CLASSES, generator=torch.Generator().manual_seed(4)) + 0.2)
        method.tau.fill_(0.8)
        raw = method.student(batch.weak[0])["visual"].softmax(1)
    wanted = raw.numpy() * (method.distributions[0] / method.distributions[1]).numpy()[:, None, None]
    wanted /= wanted.sum(1, keepdims=True)
    assert (wanted.argmax(1) != raw.numpy().argmax(1)).mean() > 0.05
    monkeypatch.setattr(
        unimatch, "pseudo_label_cross_entropy", lambda *given: seen.append(given) or given[0].tensor().sum() * 0
    )
    losses = method(batch, STEP)
    _, labels, accepted, valid = seen[-1]  # of the view with dropped channels, which has no boxes
    assert np.array_equal(labels.numpy(), wanted.argmax(1)) and torch.equal(valid, batch.valid)
    sure = wanted.max(1) >= np.float32(0.8)
    assert 0.05 < sure.mean() < 0.95 and np.array_equal(accepted.numpy() > 0, sure)
    assert losses.terms["tau"] == pytest.approx(0.8)

    before = method.distributions.clone()
    with torch.no_grad():
        own = method.student(batch.image)["visual"].softmax(1)
    method.after_step(STEP)
    for row, p, counted in ((0, own, batch.target != 255), (1, raw, batch.valid)):  # both as they were before alignment
        count, total = class_confidence(*p.max(1), counted, CLASSES)
        mean = torch.where(count > 0, total / count.clamp(min=1), before[row])
        torch.testing.assert_close(method.distributions[row], 0.99 * before[row] + 0.01 * mean)


def test_pseudo_labels_are_the_aligned_ones() -> None:
    method = make("daw")
    batch = make_batch()
    method.distributions[0, 2] = 50.0
    found = method.pseudo_labels(batch.weak[0], None, batch.keys_u, STEP)["before"]
    assert (found.argmax(1) == 2).all()
