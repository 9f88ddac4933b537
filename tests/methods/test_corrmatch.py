"""CorrMatch against straight-line NumPy: its map, its regions taken one by one, its threshold and its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_kit import CLASSES, SIDE, STEP, cross_entropy_map, make_batch, make_uneven, mixed, share, softmax
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import Batch
from viladiff.data.transforms.mixing import box_mask
from viladiff.losses import cross_entropy
from viladiff.methods.corrmatch import (
    Correlation,
    CorrMatch,
    correlated,
    highest_by_class,
    region_maps,
    region_votes,
    token_votes,
)
from viladiff.models.baselines.perturbations import channel_dropout
from viladiff.models.blocks import upsample

PATCH, TAU = 8, 0.45


def ready(**changes: object) -> tuple[CorrMatch, Batch]:
    """A small method whose regions vote in full sequence, and a batch with its views."""
    method = make_uneven("corrmatch", **{"width": 16, "regions": 10, "rounds": 10, "pseudo.threshold": TAU} | changes)
    assert isinstance(method, CorrMatch)
    return method, make_batch(views=method.required_views())


def one_by_one(regions: np.ndarray, labels: np.ndarray, sure: np.ndarray, may: np.ndarray, tau: float) -> np.ndarray:
    """The published order on one image's pixels: (H, W) labels, -1 where no region held. ``regions`` (R, H, W)."""
    labels, held = labels.copy(), np.full(labels.shape, -1)
    for region in regions & may:
        chosen = region & sure
        if not chosen.any() or chosen.sum() < np.float32(tau) * np.float32(region.sum()):
            continue
        counts = np.bincount(labels[chosen])
        if counts.max() > np.float32(tau) * np.float32(chosen.sum()):
            labels[region] = held[region] = counts.argmax()
    return held


def smooth(shape: tuple[int, ...], gen: torch.Generator, coarse: int = 3) -> Tensor:
    small = torch.randn(*shape[:-2], coarse, coarse, generator=gen)
    return torch.nn.functional.interpolate(small, shape[-2:], mode="bicubic")


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6, 0.85])
def test_regions_vote_as_if_one_by_one_on_pixels(tau: float) -> None:
    gen = torch.Generator().manual_seed(int(100 * tau))
    tokens, side, some = 8, 32, 0
    for _ in range(4):
        regions = smooth((2, 24, tokens, tokens), gen) > 0.4
        confidence, labels = (3 * smooth((2, CLASSES, side, side), gen)).softmax(1).max(1)
        labels = torch.where(torch.rand(labels.shape, generator=gen) < 0.1, 0, labels)
        may = smooth((2, 1, side, side), gen)[:, 0] < 1
        sure = confidence > 0.4
        votes = token_votes(labels, sure & may, side // tokens, CLASSES)
        pixels = token_votes(torch.zeros_like(labels), may, side // tokens, 1)[..., 0]
        found = region_votes(regions.flatten(2), votes, pixels, torch.tensor(tau), rounds=24)
        large = np.kron(regions.numpy(), np.ones((1, 1, 4, 4), bool))
        expected = np.stack(
            [one_by_one(large[i], labels[i].numpy(), sure[i].numpy(), may[i].numpy(), tau) for i in range(2)]
        )
        held = np.kron(found.view(2, tokens, tokens).numpy(), np.ones((1, 4, 4), int))
        assert np.array_equal(np.where(may, held, -1), expected)
        some += (expected >= 0).sum()
    assert some > 100


def test_eight_rounds_are_enough_at_the_published_threshold_and_one_is_not_everywhere() -> None:
    gen, wrong = torch.Generator().manual_seed(0), dict.fromkeys((1, 8), 0.0)
    for tau in (0.85, 0.4):
        regions = (smooth((4, 64, 16, 16), gen, 5) > 1).flatten(2)
        labels = smooth((4, 3, 64, 64), gen, 2).argmax(1)
        sure = smooth((4, 1, 64, 64), gen)[:, 0] > -1
        votes = token_votes(labels, sure, 4, CLASSES)
        pixels = torch.full((4, 256), 16.0)
        exact = region_votes(regions, votes, pixels, torch.tensor(tau), rounds=64)
        assert (exact >= 0).any()
        wrong = {
            r: float((region_votes(regions, votes, pixels, torch.tensor(tau), r) != exact).float().mean())
            for r in wrong
        }
        assert wrong[8] <= (0 if tau == 0.85 else wrong[1])
    assert wrong[1] > 0


def test_later_regions_see_what_earlier_ones_decided() -> None:
    """Token 1 is class 1, until the first region gives it class 0; only then is the second region sure of class 0."""
    votes = torch.tensor([[[9.0, 0], [0, 1], [1, 0], [0, 0]]])
    regions = torch.tensor([[[True, True, False, False], [False, True, True, True]]])
    pixels = votes.sum(2)
    tau = torch.tensor(0.85)
    assert region_votes(regions, votes, pixels, tau, rounds=1).tolist() == [[0, 0, -1, -1]]
    assert region_votes(regions, votes, pixels, tau, rounds=2).tolist() == [[0, 0, 0, 0]]
    assert region_votes(regions.flip(1), votes, pixels, tau, rounds=2).tolist() == [[0, 0, -1, -1]]


def test_votes_are_counted_in_whole_pixels_under_autocast() -> None:
    votes = torch.tensor([[[1000.0, 151.0], [1.0, 0.0]]])
    regions, pixels = torch.ones(1, 1, 2, dtype=torch.bool), torch.tensor([[1151.0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        # 1001 of 1152 pixels are above the share 0.8688 by a hair; in bfloat16 they are below it.
        assert region_votes(regions, votes, pixels, torch.tensor(0.8688), 1).tolist() == [[0, 0]]
        assert region_votes(regions, votes, pixels, torch.tensor(0.8690), 1).tolist() == [[-1, -1]]


def test_region_maps_are_different_rows_cut_at_the_middle_of_their_range() -> None:
    gen = torch.Generator().manual_seed(1)
    a = torch.rand(2, 9, 9, generator=gen).softmax(2)
    uniform = torch.rand(2, 9, generator=gen)
    found = region_maps(a, uniform, 4).numpy()
    for i in range(2):
        for j, row in enumerate(np.argsort(uniform[i].numpy())[:4]):
            values = a[i, row].numpy()
            scaled = (values - values.min()) / (values.max() - values.min())
            assert np.array_equal(found[i, j], scaled > 0.5)
    assert region_maps(a, uniform, 128).shape == (2, 9, 9)
    flat = torch.full((1, 4, 4), 0.25)
    assert not region_maps(flat, uniform[:1, :4], 4).any()
    last = sum(bool((torch.rand(1, 9, generator=gen).argsort(1)[:, :4] == 8).any()) for _ in range(50))
    assert last > 5  # the last token becomes a region too


def test_correlation_map_and_its_scores() -> None:
    torch.manual_seed(0)
    head, top, uniform = Correlation(6, 16, 3), torch.randn(2, 6, 4, 4), torch.rand(2, 16)
    found = head(top, uniform, p=0.3).detach()
    x = channel_dropout([head.project(top)], uniform, 0.3)[0].detach()
    first, second = (f(x).detach().flatten(2).numpy() for f in (head.first, head.second))
    expected = np.zeros((2, 16, 16))
    for b in range(2):
        for i in range(16):
            expected[b, i] = softmax(first[b, :, i] @ second[b] / 3**0.5, axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert not np.allclose(expected.sum(1), 1, atol=1e-3)  # rows sum to 1, columns do not
    logits = torch.randn(2, 3, 4, 4)
    scores = np.stack([logits[b].flatten(1).numpy() @ expected[b] for b in range(2)]).reshape(2, 3, 4, 4)
    np.testing.assert_allclose(correlated(logits, found, top.shape[-2:]), scores, rtol=1e-4, atol=1e-5)


def test_threshold_follows_the_highest_confidence_of_each_predicted_class() -> None:
    confidence = torch.tensor([[[0.9, 0.5], [0.7, 0.99]]])
    labels = torch.tensor([[[0, 0], [2, 2]]])
    valid = torch.tensor([[[True, True], [True, False]]])
    torch.testing.assert_close(highest_by_class(confidence, labels, valid, 4), torch.tensor([0.9, 0, 0.7, 0]))
    method, _ = ready(**{"pseudo.threshold": 0.5})
    method.highest.copy_(torch.tensor([0.9, 0, 0.7, 0, 0]))
    method.after_step(STEP)
    assert method.threshold() == pytest.approx(0.999 * 0.5 + 0.001 * 0.8, rel=1e-6)
    assert not method.highest.any()
    before = method.threshold()
    method.after_step(STEP)  # nothing was seen
    assert method.threshold() == before
    assert "tau" in method.state_dict() and "highest" not in method.state_dict()


def test_micro_batches_move_the_threshold_once() -> None:
    (whole, batch), (parts, _) = ready(), ready()
    whole(batch, STEP)
    whole.after_step(STEP)
    for part in (0, 1):
        parts(share(batch, part, 2), STEP)
    parts.after_step(STEP)
    assert parts.threshold() == pytest.approx(whole.threshold(), abs=1e-7) and whole.threshold() != pytest.approx(TAU)


@pytest.mark.parametrize("changes", [{}, {"faithful_kl": True}, {"cutmix": False}], ids=str)
def test_loss_is_that_of_the_formula(changes: dict[str, object]) -> None:
    method, batch = ready(**changes)
    batch.valid[1, :9] = False  # padding that is pasted into image 0
    losses = method(batch, STEP)

    none = np.zeros((4, SIDE, SIDE), bool)
    inside = box_mask(batch.mix[0].boxes, SIDE, SIDE).numpy() if batch.mix else none
    tau = np.float32(TAU)
    with torch.no_grad():
        picture = torch.from_numpy(mixed(batch.strong[0].numpy(), inside))
        views = [method.student.encode(x) for x in (batch.image, batch.weak[0], picture)]
        dropped = method.student.logits(method._dropped(views[1], batch, STEP), (SIDE, SIDE)).numpy()
        grids = [method.student.decode(x)["visual"].logits for x in views]
        keys = [f"{kind}{key}" for kind in "lws" for key in range(4)]
        uniform = keyed_random.uniform(keys, (16,), 3, "corrmatch-dropout", 7).split(4)
        maps = [method.correlation(x[-1], u) for x, u in zip(views, uniform, strict=True)]
        scores = [
            upsample(correlated(g, a, torch.Size((4, 4))), (SIDE, SIDE)).numpy()
            for g, a in zip(grids, maps, strict=True)
        ]
        regions = region_maps(maps[1], keyed_random.uniform(range(4), (16,), 3, "corrmatch-regions", 7), 10)
    z, weak, strong = (upsample(g, (SIDE, SIDE)).numpy() for g in grids)
    r, r_weak, r_strong = scores
    target, valid = batch.target.numpy(), batch.valid.numpy()
    p = softmax(weak)
    confidence, labels = p.max(1), p.argmax(1)
    sure, sure_mixed, labels_mixed, valid_mixed = (
        confidence >= tau,
        mixed(confidence, inside) >= tau,
        mixed(labels, inside),
        mixed(valid, inside),
    )
    held = np.full(labels.shape, -1)
    large = np.kron(regions.view(4, -1, 4, 4).numpy(), np.ones((1, 1, PATCH, PATCH), bool))
    for i in range(4):
        held[i] = one_by_one(large[i], labels_mixed[i], sure_mixed[i], valid_mixed[i] & ~inside[i], TAU)
    taught, accepted = np.where(held >= 0, held, labels_mixed), sure_mixed | (held >= 0)
    assert 0.05 < (held >= 0).mean() < 0.95 and 0.05 < sure.mean() < 0.95 and (taught != labels_mixed).any()

    def hard(logits: np.ndarray, y: np.ndarray, weight: np.ndarray, v: np.ndarray) -> float:
        return float((cross_entropy_map(logits, y) * weight * v).sum() / v.sum())

    teacher = p if changes.get("faithful_kl") else mixed(p, inside)
    apart = (teacher * (np.log(teacher) - np.log(softmax(strong)))).sum(1)
    kl = (apart * sure_mixed * valid_mixed).sum() / valid_mixed.sum()
    l_s, l_fp = hard(strong, taught, accepted, valid_mixed), hard(dropped, labels, sure, valid)
    l_corr = (hard(r_strong, taught, accepted, valid_mixed) + hard(r_weak, labels, sure, valid)) / 2
    sup, sup_r = (cross_entropy_map(x, target).sum() / (target != 255).sum() for x in (z, r))
    expected = 0.5 * (0.5 * sup + 0.5 * sup_r + 0.25 * l_s + 0.25 * kl + 0.25 * l_fp + 0.25 * l_corr)
    named = {"sup": sup, "sup_correlation": sup_r, "pseudo": l_s, "kl": kl, "dropped": l_fp, "correlation": l_corr}
    assert {k: float(losses.terms[k]) for k in named} == pytest.approx(named, rel=2e-3, abs=1e-5)
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-3)


def test_the_classifier_does_not_learn_from_the_scores_that_are_spread() -> None:
    """Without a clean loss or a strong view's, no gradient is left for it; the correlation head still gets one."""
    method, batch = ready(**{"pseudo.weight": 0.0})
    method(batch, STEP).total.backward()
    both = method.student.classifier.fine.weight.grad.clone()
    method.zero_grad()
    logits = method.student(batch.image)["visual"]
    (cross_entropy(logits, batch.target) / 4).backward()
    torch.testing.assert_close(method.student.classifier.fine.weight.grad, both, rtol=1e-3, atol=1e-6)
    assert method.correlation.first.weight.grad is None or not method.correlation.first.weight.grad.any()


def test_correlation_learns_but_does_not_teach_the_scores_it_spreads() -> None:
    """Scores go into r = z A detached: the classifier learns from A's loss only through nothing."""
    method, batch = ready()
    features = method.student.encode(batch.image)
    grid = method.student.decode(features)["visual"].logits
    a = method.correlation(features[-1], torch.ones(4, 16))
    correlated(grid.detach(), a, torch.Size((4, 4))).square().mean().backward()
    assert method.student.classifier.fine.weight.grad is None
    assert method.correlation.first.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
