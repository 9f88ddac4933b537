"""Perturbed features: dropped channels, complementary pairs, and noise against the exact most sensitive direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from viladiff.models.baselines.perturbations import (
    channel_dropout,
    complementary_dropout,
    half_of_pairs,
    virtual_adversarial,
    widest,
)


def maps(n: int = 4, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, s, s, generator=gen) for d, s in ((3, 8), (8, 4), (8, 2))]


def test_channel_dropout_has_one_mask_an_image_for_all_maps() -> None:
    features = maps()
    uniform = torch.rand(4, widest(features), generator=torch.Generator().manual_seed(1))
    found = channel_dropout(features, uniform, 0.3)
    for before, after in zip(features, found, strict=True):
        for i in range(4):
            for d in range(before.shape[1]):
                expected = before[i, d] / 0.7 if uniform[i, d] >= 0.3 else torch.zeros_like(before[i, d])
                torch.testing.assert_close(after[i, d], expected)
    assert all(torch.equal(a, b) for a, b in zip(channel_dropout(features, uniform, 0.0), features, strict=True))


def test_complementary_streams_share_out_the_channels() -> None:
    features = maps(8)
    uniform = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))
    whole = torch.tensor([True, False, False, True])
    first, second = complementary_dropout(features, uniform, whole)
    for level, a, b in zip(features, first, second, strict=True):
        one, two = level.chunk(2)
        assert torch.equal(a[whole], one[whole]) and torch.equal(b[whole], two[whole])
        lost = [(x[~whole] == 0).flatten(2).all(2) for x in (a, b)]
        assert torch.equal(lost[0], ~lost[1]) and lost[0].any() and lost[1].any()
        assert torch.equal(lost[0], uniform[~whole][:, : level.shape[1]] < 0.5)
        torch.testing.assert_close(a[~whole] / 2 + torch.where(lost[0][..., None, None], one[~whole], 0), one[~whole])
        torch.testing.assert_close(b[~whole] / 2 + torch.where(lost[1][..., None, None], two[~whole], 0), two[~whole])


def test_half_of_each_pair_whatever_the_share_of_the_batch() -> None:
    chosen = half_of_pairs(range(400), 3, "kept", 7)
    assert all(chosen[i] != chosen[i + 1] for i in range(0, 400, 2))
    assert 60 < sum(chosen[::2]) < 140
    assert half_of_pairs(range(100, 104), 3, "kept", 7) == chosen[100:104]
    assert half_of_pairs(range(400), 3, "kept", 8) != chosen


def test_adversarial_noise_is_the_exact_power_step_and_has_its_length() -> None:
    """Of a linear classifier, KL's second derivative is known: W (diag(p) - p p^T) W^T."""
    torch.manual_seed(0)
    weight = torch.randn(12, 5)
    features = [torch.randn(3, 8, 1, 1), 1e-3 * torch.randn(3, 4, 1, 1)]
    start = [torch.rand_like(level) - 0.5 for level in features]

    def predict(given: list[Tensor]) -> Tensor:
        return torch.cat([level.flatten(1) for level in given], 1) @ weight

    found = virtual_adversarial(features, predict, start, 0.1, probe=1e-3)
    joined, lengths = (
        torch.cat([x.flatten(1) for x in found], 1),
        torch.cat([x.flatten(1) for x in features], 1).norm(dim=1),
    )
    torch.testing.assert_close(joined.norm(dim=1), 0.1 * lengths)
    p = predict(features).softmax(1)
    begin = torch.cat([x.flatten(1) for x in start], 1)
    for i in range(3):
        hessian = weight @ (torch.diag(p[i]) - torch.outer(p[i], p[i])) @ weight.T
        exact = hessian @ begin[i]
        assert torch.cosine_similarity(joined[i], exact, 0) > 0.999
    assert not any(x.requires_grad for x in found)


def test_adversarial_direction_is_the_gradient_of_kl_from_the_clean_prediction() -> None:
    """At a probe so long that KL(p || q) and KL(q || p) part: W (q - p), q at f + probe |f| d."""
    gen = torch.Generator().manual_seed(1)
    weight, features = torch.randn(12, 5, generator=gen), [torch.randn(3, 12, 1, 1, generator=gen)]
    start = [torch.rand(3, 12, 1, 1, generator=gen) - 0.5]
    found = virtual_adversarial(features, lambda given: given[0].flatten(1) @ weight, start, 0.1, probe=0.7)[0]
    f, d = features[0].flatten(1), torch.nn.functional.normalize(start[0].flatten(1))
    p, q = ((x @ weight).softmax(1) for x in (f, f + 0.7 * f.norm(dim=1, keepdim=True) * d))
    exact = torch.nn.functional.normalize((q - p) @ weight.T)
    torch.testing.assert_close(found.flatten(1), 0.1 * f.norm(dim=1, keepdim=True) * exact, rtol=1e-3, atol=1e-4)


def test_adversarial_noise_hurts_more_than_random_noise_and_touches_no_parameter() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 1))
    features, start = [torch.randn(4, 8, 6, 6)], [torch.rand(4, 8, 6, 6) - 0.5]

    def predict(given: list[Tensor]) -> Tensor:
        return net(given[0])

    def moved(noise: Tensor) -> Tensor:
        with torch.no_grad():
            p, q = net(features[0]).log_softmax(1), net(features[0] + noise).log_softmax(1)
        return (p.exp() * (p - q)).sum()

    found = virtual_adversarial(features, predict, start, 0.1)[0]
    assert all(p.grad is None for p in net.parameters())
    unit = start[0].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    random = 0.1 * features[0].flatten(1).norm(dim=1).view(-1, 1, 1, 1) * start[0] / unit
    assert moved(found) > 3 * moved(random)
    # An image alone gets the noise that it gets in a batch.
    alone = virtual_adversarial([features[0][:1]], predict, [start[0][:1]], 0.1)[0]
    torch.testing.assert_close(alone, found[:1], rtol=1e-3, atol=1e-5)


def test_adversarial_noise_of_a_constant_prediction_is_zero() -> None:
    def predict(given: list[Tensor]) -> Tensor:
        return given[0][:, :2] * 0

    found = virtual_adversarial([torch.randn(2, 4, 3, 3)], predict, [torch.rand(2, 4, 3, 3)], 0.1)
    assert torch.equal(found[0], torch.zeros(2, 4, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_keep_their_precision(dtype: torch.dtype) -> None:
    features = [level.to(dtype) for level in maps()]
    assert all(x.dtype == dtype for x in channel_dropout(features, torch.rand(4, 8)))
    noise = virtual_adversarial(features, lambda given: given[1][:, :3], [torch.rand_like(x) for x in features], 0.1)
    assert all(x.dtype == dtype and x.isfinite().all() for x in noise)
