"""Corruption as in Eq. 7, chains whose answer is known, and a refinement that must beat leaving the labels alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from viladiff.models.mixe import denoiser as mixe
from viladiff.models.mixe.denoiser import MixeConfig


def kernel(beta: float, classes: int) -> np.ndarray:
    """Eq. 6, row = before, column = after."""
    out = np.full((classes, classes), beta / (classes - 1))
    np.fill_diagonal(out, 1 - beta)
    return out


# Corruption (Eq. 7)


def soft_labels(classes: int = 5, batch: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(batch, classes, size // 4, size // 4, generator=gen) * 2, scale_factor=4).softmax(
        1
    )


def draws_for(soft: Tensor, steps: int | None = None, seed: int = 1) -> tuple[Tensor, Tensor]:
    gen, (batch, classes, *size) = torch.Generator().manual_seed(seed), soft.shape
    length = mixe.class_codes(classes).shape[1]
    noise = torch.randn(batch, length, *size, generator=gen)
    return noise, torch.rand(*(() if steps is None else (steps,)), batch, *size, generator=gen)


@pytest.mark.parametrize("region", ["confident", "uncertain"])
@pytest.mark.parametrize(("gaussian", "flips"), [(True, True), (True, False), (False, True), (False, False)])
def test_eq_7_corruption_pixel_by_pixel(region: str, gaussian: bool, flips: bool) -> None:
    cfg = MixeConfig(gaussian_region=region, gaussian=gaussian, flips=flips)
    soft, t, tau = soft_labels(), torch.tensor([1, 5, 10]), 0.6
    noise, uniform = draws_for(soft)
    got = mixe.corrupt(soft, t, tau, cfg, noise=noise, uniform=uniform)
    codes, kept = mixe.class_codes(5).numpy(), mixe.alpha_bar(10).numpy()
    labels = soft.argmax(1)
    assert torch.equal(got.edges, mixe.edge_mask(labels))
    seen = set()
    for b, h, w in np.ndindex(*labels.shape):
        p, label = soft[b, :, h, w].numpy(), int(labels[b, h, w])
        is_gaussian = (p.max() > tau) == (region == "confident")
        assert bool(got.gaussian[b, h, w]) == is_gaussian
        seen.add(is_gaussian)
        if is_gaussian:
            a = kept[t[b]] if gaussian else 1
            expected = np.sqrt(a) * (p @ codes) + np.sqrt(1 - a) * noise[b, :, h, w].numpy()
            assert int(got.labels[b, h, w]) == label
        else:
            rate = 0.1 + 0.1 * bool(got.edges[b, h, w])
            leaves = 1 - np.linalg.matrix_power(kernel(rate, 5), int(t[b]))[0, 0]
            stays = not flips or float(uniform[b, h, w]) >= leaves
            assert (int(got.labels[b, h, w]) == label) == stays
            expected = codes[int(got.labels[b, h, w])]
        np.testing.assert_allclose(got.codes[b, :, h, w], expected, atol=1e-4)
    assert seen == {True, False}


def test_corruption_is_float32_under_autocast_and_checks_the_edge_bonus() -> None:
    soft = soft_labels()
    noise, uniform = draws_for(soft)
    plain = mixe.corrupt(soft, 5, 0.6, MixeConfig(), noise=noise, uniform=uniform)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mixe.corrupt(soft, 5, 0.6, MixeConfig(), noise=noise, uniform=uniform)
    assert torch.equal(plain.codes, mixed.codes)
    with pytest.raises(ValueError, match=r"beta = 0.85.*0.8"):
        mixe.corrupt(soft, 5, 0.6, MixeConfig(beta=0.45, edge_bonus=0.4), noise=noise, uniform=uniform)


# Denoiser and the reverse chain


@pytest.mark.parametrize("width", [8, 12, 64])
def test_denoiser_shapes_gradients_and_what_it_looks_at(width: int) -> None:
    torch.manual_seed(0)
    net = mixe.Denoiser(5, cond_channels=6, width=width, depth=2, timesteps=10)
    features, logits = torch.randn(2, 6, 4, 4, requires_grad=True), torch.randn(2, 5, 8, 8, requires_grad=True)
    cond = net.prepare(features, logits)
    assert cond.shape == (2, width, 8, 8)
    codes, t = torch.randn(2, 8, 8, 8), torch.tensor([1, 10])
    on, off = torch.ones(2, 8, 8).bool(), torch.zeros(2, 8, 8).bool()
    base = net(codes, on, off, t, cond)
    assert base[0].shape == (2, 5, 8, 8) and base[1].shape == codes.shape
    for other in (
        net(codes + 1, on, off, t, cond),
        net(codes, off, off, t, cond),
        net(codes, on, on, t, cond),
        net(codes, on, off, t.flip(0), cond),
        net(codes, on, off, t, cond.flip(0)),
    ):
        assert not torch.allclose(base[0], other[0]) and not torch.allclose(base[1], other[1])
    (base[0].square().mean() + base[1].square().mean()).backward()
    assert features.grad is None and logits.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(codes, on, off, t, net.prepare(features, logits))
    assert out[0].dtype == out[1].dtype == torch.float32


def test_reverse_times() -> None:
    assert mixe.reverse_times(10, None) == list(range(10, -1, -1))
    assert mixe.reverse_times(10, 5) == [10, 8, 6, 4, 2, 0]
    assert mixe.reverse_times(10, 1) == [10, 0]
    for steps in range(1, 11):
        times = mixe.reverse_times(10, steps)
        assert len(times) == steps + 1 and times == sorted(set(times), reverse=True)
    with pytest.raises(ValueError, match="refine_steps = 11"):
        mixe.reverse_times(10, 11)


class Oracle(nn.Module):
    """Knows the clean soft labels and the noise, and writes down all that it is shown."""

    def __init__(self, soft: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.soft, self.noise = soft, noise
        self.shown: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def chain(
        self, gaussian: Tensor, edges: Tensor, times: Tensor, cond: Tensor
    ) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        assert times.ndim == 1 and times.dtype == torch.int64

        def answer(codes: Tensor, i: int) -> tuple[Tensor, Tensor]:
            self.shown.append((int(times[i]), codes, gaussian, edges))
            return (self.soft * 50).log_softmax(1), self.noise

        return answer


def decode(codes: Tensor, classes: int) -> Tensor:
    table = mixe.class_codes(classes)
    scores = torch.einsum("bdhw,cd->bchw", codes, table) / table.shape[1]
    assert torch.allclose(scores.amax(1), torch.ones(()))
    return scores.argmax(1)


@pytest.mark.parametrize(
    ("timesteps", "refine_steps", "schedule"),
    [(10, None, "cumulative"), (10, 4, "cumulative"), (4, None, "matched"), (4, None, "constant")],
)
def test_a_chain_that_knows_x0_walks_the_forward_marginals_backwards(
    timesteps: int, refine_steps: int | None, schedule: str
) -> None:
    """If every step is right, z_t has the law of the forward process at each t; one wrong factor and it drifts away."""
    classes, size = 4, 96
    labels = torch.randint(0, classes, (4, size // 4, size // 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    soft = F.one_hot(labels, classes).permute(0, 3, 1, 2).float()
    cfg = MixeConfig(
        timesteps=timesteps, refine_steps=refine_steps, flip_schedule=schedule, gaussian_region="uncertain"
    )
    times = mixe.reverse_times(timesteps, refine_steps)[:-1]
    noise, uniforms = draws_for(soft, len(times), seed=3)
    oracle = Oracle(soft, noise)
    out = mixe.refine(oracle, torch.empty(0), soft, 0.5, cfg, noise, uniforms)
    assert torch.equal(out.argmax(1), labels)
    assert [t for t, *_ in oracle.shown] == times
    for t, codes, gaussian, edges in oracle.shown:
        assert not gaussian.any() and torch.equal(edges, mixe.edge_mask(labels))
        left = decode(codes, classes) != labels
        for beta, where in ((0.1, ~edges), (0.2, edges)):
            p, n = float(mixe.flip_probability(t, beta, classes, schedule, timesteps)), int(where.sum())
            assert stats.binomtest(int(left[where].sum()), n, p).pvalue > 1e-4, (t, beta)


def test_gaussian_pixels_walk_back_along_their_own_noise() -> None:
    soft = soft_labels()
    noise, uniforms = draws_for(soft, 10)
    embedded, kept = torch.einsum("bchw,cd->bdhw", soft, mixe.class_codes(5)), mixe.alpha_bar(10)
    for tau, region in ((0.0, "confident"), (1.0, "uncertain")):
        oracle = Oracle(soft, noise)
        mixe.refine(oracle, torch.empty(0), soft, tau, MixeConfig(gaussian_region=region), noise, uniforms)
        for t, codes, gaussian, _ in oracle.shown:
            assert gaussian.all()
            expected = mixe.add_gaussian_noise(embedded, t, kept, noise)
            torch.testing.assert_close(codes, expected, rtol=0, atol=2e-2 if t == 9 else 5e-3)


def test_regions_stay_put_and_regions_that_are_off_stay_clean() -> None:
    soft = soft_labels()
    noise, uniforms = draws_for(soft, 10)
    clean = torch.einsum("bchw,cd->bdhw", soft, mixe.class_codes(5))
    argmax = mixe.class_codes(5)[soft.argmax(1)].permute(0, 3, 1, 2)
    for gaussian, flips in ((True, False), (False, True)):
        oracle = Oracle(soft.flip(1), noise)
        cfg = MixeConfig(gaussian=gaussian, flips=flips)
        mixe.refine(oracle, torch.empty(0), soft, 0.6, cfg, noise, uniforms)
        region = mixe.regions(soft, 0.6, "confident")
        for t, codes, shown_region, _ in oracle.shown:
            assert torch.equal(region, shown_region)
            off = (~region if gaussian else region).unsqueeze(1).expand_as(codes)
            torch.testing.assert_close(codes[off], (argmax if gaussian else clean)[off])
            assert not torch.allclose(codes[~off], (clean if gaussian else argmax)[~off]), t


def test_direct_reverse_samples_the_output_itself() -> None:
    soft, wanted = soft_labels(), soft_labels(seed=9)
    noise, uniforms = draws_for(soft, 10)
    oracle = Oracle(wanted, noise)
    cfg = MixeConfig(reverse="direct", gaussian_region="uncertain")
    mixe.refine(oracle, torch.empty(0), soft, 0.0, cfg, noise, uniforms)
    sampled = mixe.sample_classes((wanted * 50).softmax(1), uniforms[1])
    assert torch.equal(decode(oracle.shown[1][1], 5), sampled)
    with pytest.raises(ValueError, match="9 entries"):
        mixe.refine(oracle, torch.empty(0), soft, 0.0, cfg, noise, uniforms[1:])


def pictures(seed: int, batch: int = 8, classes: int = 4, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """True labels, a noisy picture of them, and soft labels that are wrong on about a fifth of the pixels."""
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (batch, size // 4, size // 4), generator=gen)
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    one_hot = F.one_hot(labels, classes).permute(0, 3, 1, 2).float()
    picture = one_hot + 0.5 * torch.randn(one_hot.shape, generator=gen)
    wrong = mixe.flip_labels(labels, 0.2, classes, gen)
    conflict_weight = torch.rand(labels.shape, generator=gen).unsqueeze(1)
    soft = (F.one_hot(wrong, classes).permute(0, 3, 1, 2) * (1 + 4 * conflict_weight)).softmax(1)
    return labels, picture, soft


@pytest.fixture(scope="module", params=["confident", "uncertain"])
def trained(request: pytest.FixtureRequest) -> Iterator[tuple[mixe.Denoiser, MixeConfig]]:
    """A small denoiser after some seconds of training on the two losses of the method."""
    torch.manual_seed(0)
    cfg = MixeConfig(gaussian_region=request.param)
    net = mixe.Denoiser(4, cond_channels=4, width=16, depth=2, timesteps=cfg.timesteps)
    optim = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(100):
        labels, picture, soft = pictures(step)
        noise, uniform = draws_for(soft, seed=step)
        t = torch.randint(1, cfg.timesteps + 1, (len(soft),))
        state = mixe.corrupt(soft, t, 0.6, cfg, noise=noise, uniform=uniform)
        logits, eps = net(state.codes, state.gaussian, state.edges, t, net.prepare(picture, picture))
        error = (eps - noise).square().mean(1)
        loss = F.cross_entropy(logits, labels) + 0.5 * error[state.gaussian].mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
    yield net.eval(), cfg


Refiner = Callable[..., Tensor]


def accuracy_gain(refiner: Refiner, net: mixe.Denoiser, cfg: MixeConfig) -> float:
    labels, picture, soft = pictures(10_000, batch=32)
    noise, uniforms = draws_for(soft, cfg.refine_steps or cfg.timesteps, seed=10_000)
    out = refiner(net, net.prepare(picture, picture), soft, 0.6, cfg, noise, uniforms)
    before, after = ((x.argmax(1) == labels).float().mean() for x in (soft, out))
    assert 0.7 < before < 0.9
    return float(after - before)


@pytest.mark.parametrize("steps", [None, 3])
def test_refinement_corrects_labels_that_the_identity_leaves(
    trained: tuple[mixe.Denoiser, MixeConfig], steps: int | None
) -> None:
    net, cfg = trained
    cfg = cfg.model_copy(update={"refine_steps": steps})
    assert accuracy_gain(mixe.refine, net, cfg) > 0.1
    assert accuracy_gain(lambda net, cond, soft, *rest: soft, net, cfg) == 0


def test_refinement_is_the_same_alone_or_in_a_batch(trained: tuple[mixe.Denoiser, MixeConfig]) -> None:
    net, cfg = trained
    _, picture, soft = pictures(3)
    noise, uniforms = draws_for(soft, 10)
    together = mixe.refine(net, net.prepare(picture, picture), soft, 0.6, cfg, noise, uniforms)
    alone = mixe.refine(net, net.prepare(picture[2:3], picture[2:3]), soft[2:3], 0.6, cfg, noise[2:3], uniforms[:, 2:3])
    torch.testing.assert_close(together[2:3], alone, rtol=1e-3, atol=1e-3)
    assert not together.requires_grad
