"""The two noises against brute force: transition matrices, Bayes' rule, one-hot Laplacians, straight-line NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from viladiff.models.mixe import denoiser as mixe

SCHEDULES = ("cumulative", "constant", "matched")
STEPS = 6


def kernel(beta: float, classes: int) -> np.ndarray:
    """Eq. 6, row = before, column = after."""
    out = np.full((classes, classes), beta / (classes - 1))
    np.fill_diagonal(out, 1 - beta)
    return out


def step_kernels(schedule: str, beta: float, classes: int) -> list[np.ndarray]:
    """The matrices of steps 1 ... STEPS, from the words of each schedule."""
    if schedule == "cumulative":
        return [kernel(beta, classes)] * STEPS
    if schedule == "constant":
        return [kernel(beta, classes)] + [np.eye(classes)] * (STEPS - 1)
    ten = np.linalg.matrix_power(kernel(beta, classes), 10)  # its STEPS-th root, by eigenvalues
    values, vectors = np.linalg.eigh(ten)
    return [vectors @ np.diag(np.where(values < 1e-12, 0, values) ** (1 / STEPS)) @ vectors.T] * STEPS


def cumulated(kernels: list[np.ndarray], t: int) -> np.ndarray:
    out = np.eye(len(kernels[0]))
    for k in kernels[:t]:
        out = out @ k
    return out


# Schedules


@pytest.mark.parametrize("timesteps", [1, 7, 10, 50, 1000])
def test_alpha_bar_is_ddpm_respaced(timesteps: int) -> None:
    kept = np.ones(1001)
    for i, beta in enumerate(np.linspace(1e-4, 0.02, 1000)):
        kept[i + 1] = kept[i] * (1 - beta)
    got = mixe.alpha_bar(timesteps)
    expected = [kept[round(1000 * t / timesteps)] for t in range(timesteps + 1)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got.dtype == torch.float32 and got[0] == 1 and float(got[-1]) == pytest.approx(4.04e-5, rel=1e-2)


@pytest.mark.parametrize("timesteps", [0, -1, 1001])
def test_alpha_bar_refuses(timesteps: int) -> None:
    with pytest.raises(ValueError, match=f"timesteps = {timesteps}"):
        mixe.alpha_bar(timesteps)


def test_eq_3_gaussian_noise() -> None:
    x0, noise = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 5))
    kept = mixe.alpha_bar(10)
    t = torch.tensor([0, 4, 10])
    a = kept.numpy().astype(np.float64)[t.numpy()][:, None, None, None]
    expected = np.sqrt(a) * x0 + np.sqrt(1 - a) * noise
    x, n = torch.from_numpy(x0).float(), torch.from_numpy(noise).float()
    np.testing.assert_allclose(mixe.add_gaussian_noise(x, t, kept, n), expected, atol=1e-6)
    np.testing.assert_allclose(mixe.add_gaussian_noise(x, 4, kept, n)[1], expected[1], atol=1e-6)
    with pytest.raises(ValueError, match="same shape"):
        mixe.add_gaussian_noise(x, 4, kept, n[:1])


@pytest.mark.parametrize(
    ("progress", "options", "expected"),
    [
        (0.0, {}, 0.0),
        (0.25, {}, 0.4),
        (0.5, {}, 0.8),
        (0.9, {}, 0.8),
        (0.0, {"ramp": 0.0}, 0.8),
        (0.1, {"start": 0.2, "maximum": 0.6, "ramp": 0.2}, 0.4),
        (0.125, {"shape": "cosine"}, 0.8 * (1 - np.cos(np.pi / 4)) / 2),
        (0.49, {"shape": "step"}, 0.0),
        (0.5, {"shape": "step"}, 0.8),
    ],
)
def test_confidence_threshold(progress: float, options: dict[str, Any], expected: float) -> None:
    assert mixe.confidence_threshold(progress, **options) == pytest.approx(expected)


def test_confidence_threshold_refuses() -> None:
    for progress in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="progress"):
            mixe.confidence_threshold(progress)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        mixe.confidence_threshold(0.5, shape="cosin")


# Flips (Eqs. 5-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.35, "max"])
def test_flip_probability_is_a_matrix_power(schedule: str, classes: int, beta: float | str) -> None:
    rate = (classes - 1) / classes if beta == "max" else float(beta)
    kernels = step_kernels(schedule, rate, classes)
    for t in range(STEPS + 1):
        expected = cumulated(kernels, t)
        p = float(mixe.flip_probability(t, rate, classes, schedule, STEPS))
        np.testing.assert_allclose(kernel(p, classes), expected, atol=1e-7)
        if t:
            step = float(mixe.step_probability(t, rate, classes, schedule, STEPS))
            np.testing.assert_allclose(cumulated(kernels, t - 1) @ kernel(step, classes), expected, atol=1e-7)
        for s in range(t):
            jump = float(mixe.step_probability(t, rate, classes, schedule, STEPS, t_prev=s))
            np.testing.assert_allclose(cumulated(kernels, s) @ kernel(jump, classes), expected, atol=1e-7)


def test_flip_probability_of_tensors_equals_that_of_numbers() -> None:
    t, beta = torch.tensor([0, 1, 5]), torch.tensor([[[0.1, 0.2]], [[0.0, 0.3]], [[0.75, 0.5]]])
    for schedule in SCHEDULES:
        got = mixe.flip_probability(t, beta, 4, schedule, STEPS)
        assert got.shape == (3, 1, 2) and got.dtype == torch.float32
        for b, _, w in np.ndindex(3, 1, 2):
            expected = mixe.flip_probability(int(t[b]), float(beta[b, 0, w]), 4, schedule, STEPS)
            assert float(got[b, 0, w]) == pytest.approx(float(expected), abs=1e-6)


def test_matched_flips_as_many_at_the_end_for_every_number_of_steps() -> None:
    ten = float(mixe.flip_probability(10, 0.1, 21))
    assert [float(mixe.flip_probability(n, 0.1, 21, "matched", n)) for n in (1, 5, 10, 50)] == pytest.approx([ten] * 4)
    for t in range(11):
        assert float(mixe.flip_probability(t, 0.1, 21, "matched", 10)) == pytest.approx(
            float(mixe.flip_probability(t, 0.1, 21))
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0.7, 3), r"beta = 0.7.*0.6667"),
        ((1, -0.1, 3), "beta = -0.1"),
        ((1, torch.tensor([0.1, 0.7]), 3), r"beta = 0.1 \.\.\. 0.7"),
        ((-1, 0.1, 3), "t = -1"),
        ((1, 0.1, 1), "num_classes = 1"),
        ((1, 0.1, 3, "matchd"), "did you mean 'matched'"),
        ((1, 0.1, 3, "matched"), "timesteps = None"),
    ],
)
def test_flip_probability_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixe.flip_probability(*arguments)
    with pytest.raises(ValueError, match="t_prev = 3"):
        mixe.step_probability(2, 0.1, 3, t_prev=3)


def test_flips_are_uniform_over_the_other_classes() -> None:
    gen, classes, p = torch.Generator().manual_seed(0), 5, 0.3
    labels = torch.randint(0, classes, (200_000,), generator=gen)
    flipped = mixe.flip_labels(labels, p, classes, gen)
    table = np.zeros((classes, classes))
    np.add.at(table, (labels.numpy(), flipped.numpy()), 1)
    expected = table.sum(1, keepdims=True) * kernel(p, classes)
    assert stats.chisquare(table.ravel(), expected.ravel(), ddof=classes - 1).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_flip_labels_edges_ignored_pixels_and_extremes(dtype: torch.dtype) -> None:
    gen, classes = torch.Generator().manual_seed(1), 200
    labels = torch.randint(0, classes, (2, 200, 200), generator=gen).to(dtype)
    labels[0, :50] = 255
    before, known = labels.clone(), labels != 255
    assert torch.equal(mixe.flip_labels(labels, 0.0, classes, gen), labels)
    always = mixe.flip_labels(labels, 1.0, classes, gen)
    assert torch.equal(always == labels, ~known) and bool((always[known] < classes).all()) and always.dtype == dtype
    rate = torch.where(torch.arange(200) < 100, 0.1, 0.2).expand(2, 200, 200)
    moved = (mixe.flip_labels(labels, rate, classes, gen) != labels)[1].float()
    assert float(moved[:, :100].mean()) == pytest.approx(0.1, abs=0.01)
    assert float(moved[:, 100:].mean()) == pytest.approx(0.2, abs=0.01)
    assert torch.equal(labels, before)
    for u in (0.0, 1 - 2**-24):  # the ends of the uniform draw
        end = mixe.flip_labels(labels, 1.0, classes, uniform=torch.full(labels.shape, u))
        assert bool((end[known] < classes).all()) and bool((end[known] != labels[known]).all())


def test_flip_labels_takes_named_draws_and_refuses_nonsense() -> None:
    labels, u = torch.zeros(3, 4, 4).long(), torch.rand(3, 4, 4)
    together = mixe.flip_labels(labels, 0.5, 7, uniform=u)
    assert torch.equal(together[1:2], mixe.flip_labels(labels[1:2], 0.5, 7, uniform=u[1:2]))
    for probability, classes, message in ((1.5, 7, "probability = 1.5"), (0.5, 1, "num_classes = 1")):
        with pytest.raises(ValueError, match=message):
            mixe.flip_labels(labels, probability, classes)
    with pytest.raises(ValueError, match="uniform"):
        mixe.flip_labels(labels, 0.5, 7, uniform=u[0])


class Largest(TorchDispatchMode):
    """Records the most elements that any tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_memory_has_no_factor_of_classes() -> None:
    labels = torch.randint(0, 81, (2, 16, 16))
    with Largest() as made:
        mixe.flip_labels(labels, torch.rand(2, 16, 16), 81)
        mixe.edge_mask(labels)
    assert made.elements == labels.numel()
    probs = torch.rand(2, 81, 16, 16)
    with Largest() as made:
        mixe.posterior(labels, probs, 3, torch.rand(2, 16, 16) / 2, 81)
    assert made.elements == probs.numel()


# Edges


def laplacian_edges(labels: np.ndarray) -> np.ndarray:
    """One-hot Laplacians, class by class; at 255 and beyond the border a neighbour counts as the pixel itself."""
    out = np.zeros(labels.shape, dtype=bool)
    cross = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    for c in np.unique(labels[labels != 255]):
        here, known = (labels == c).astype(int), (labels != 255).astype(int)
        neighbours = ndimage.convolve(here, cross, mode="constant")
        counted = ndimage.convolve(known, cross, mode="constant")
        out |= (neighbours - counted * here) != 0
    return out & (labels != 255)


def test_edge_mask_is_the_one_hot_laplacian() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(0, 4, (5, 7)).repeat(2, 0).repeat(2, 1)
        labels[rng.random(labels.shape) < 0.1] = 255
        expected = laplacian_edges(labels)
        got = mixe.edge_mask(torch.from_numpy(labels))
        np.testing.assert_array_equal(got, expected)
        renamed = np.where(labels == 255, 255, np.array([17, 3, 0, 80])[np.minimum(labels, 3)])
        np.testing.assert_array_equal(mixe.edge_mask(torch.from_numpy(renamed)), expected)
        for dtype in (torch.uint8, torch.int32):
            assert torch.equal(mixe.edge_mask(torch.from_numpy(labels).to(dtype)[None])[0], got)


def test_edge_mask_where_differences_of_ids_would_cancel() -> None:
    ramp = torch.arange(5).repeat(5, 1)  # a Laplacian of the ids themselves is 0 inside
    assert bool(mixe.edge_mask(ramp).all())
    assert not mixe.edge_mask(torch.full((1, 5, 5), 3)).any()
    with pytest.raises(ValueError, match="height and width"):
        mixe.edge_mask(torch.zeros(3).long())


# Posterior


def bayes(z: int, probs: np.ndarray, kernels: list[np.ndarray], t: int, s: int) -> np.ndarray:
    """Sum over x0 of probs[x0] q(z_s | z_t, x0), each q normalised."""
    before, between = cumulated(kernels, s), cumulated(kernels[s:], t - s)
    out = np.zeros(len(probs))
    for x0, p in enumerate(probs):
        q = before[x0] * between[:, z]
        out += p * q / q.sum()
    return out


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("classes", [3, 4])
def test_posterior_is_bayes_rule_with_matrices(schedule: str, classes: int) -> None:
    rng = np.random.default_rng(classes)
    z = torch.arange(classes).repeat(2, 5, 1)
    probs = rng.dirichlet(np.ones(classes), (2, 5, classes))
    probs[0, 0] = np.eye(classes)
    x0 = torch.from_numpy(probs).float().permute(0, 3, 1, 2)
    for beta in (1e-4, 0.1, (classes - 1) / classes):
        kernels = step_kernels(schedule, beta, classes)
        for t in range(1, STEPS + 1):
            for s in range(t):
                got = mixe.posterior(z, x0, t, beta, classes, schedule, STEPS, t_prev=s)
                as_map = mixe.posterior(
                    z, x0, torch.tensor([t, t]), torch.full((2, 5, classes), beta), classes, schedule, STEPS, t_prev=s
                )
                torch.testing.assert_close(got, as_map, rtol=2e-4, atol=1e-5)
                assert s != t - 1 or torch.equal(got, mixe.posterior(z, x0, t, beta, classes, schedule, STEPS))
                for b, h, w in np.ndindex(*z.shape):
                    expected = bayes(int(z[b, h, w]), probs[b, h, w], kernels, t, s)
                    np.testing.assert_allclose(got[b, :, h, w], expected, rtol=2e-4, atol=1e-5)


def test_posterior_with_a_beta_per_pixel_and_a_time_per_image() -> None:
    probs = torch.rand(2, 4, 3, 3).softmax(1)
    z, beta, t = torch.randint(0, 4, (2, 3, 3)), torch.rand(2, 3, 3) * 0.7, torch.tensor([2, 5])
    got = mixe.posterior(z, probs, t, beta, 4)
    for b, h, w in np.ndindex(2, 3, 3):
        kernels = step_kernels("cumulative", float(beta[b, h, w]), 4)
        expected = bayes(int(z[b, h, w]), probs[b, :, h, w].numpy(), kernels, int(t[b]), int(t[b]) - 1)
        np.testing.assert_allclose(got[b, :, h, w], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_at_its_corners(schedule: str) -> None:
    probs = torch.rand(1, 4, 2, 2).softmax(1)
    z = torch.tensor([[[0, 3], [255, 1]]])
    for beta in (0.0, 0.3, 0.75, torch.tensor([[[0.0, 0.3], [0.0, 0.75]]])):
        for t in (1, 2, STEPS):
            got = mixe.posterior(z, probs, t, beta, 4, schedule, STEPS)
            torch.testing.assert_close(got.sum(1), torch.ones(1, 2, 2))
            torch.testing.assert_close(got[..., 1, 0], probs[..., 1, 0])
            assert float(got.min()) >= 0
            if t == 1:
                torch.testing.assert_close(got, probs)
    limit = mixe.posterior(z, probs, 4, 1e-5, 4, schedule, STEPS)
    torch.testing.assert_close(mixe.posterior(z, probs, 4, 0.0, 4, schedule, STEPS), limit, rtol=0, atol=2e-4)


def test_posterior_refuses() -> None:
    probs = torch.rand(1, 4, 2, 2)
    with pytest.raises(ValueError, match="t = 0"):
        mixe.posterior(torch.zeros(1, 2, 2).long(), probs, 0, 0.1, 4)
    with pytest.raises(ValueError, match=r"want \(B, h, w\) and \(B, 5, h, w\)"):
        mixe.posterior(torch.zeros(1, 2, 2).long(), probs, 1, 0.1, 5)


def test_sample_classes_follows_the_probabilities() -> None:
    gen = torch.Generator().manual_seed(0)
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    probs = (3 * p)[None, :, None, None].expand(1, 6, 300, 300)
    drawn = mixe.sample_classes(probs, torch.rand(1, 300, 300, generator=gen)).flatten()
    counts = torch.bincount(drawn, minlength=6)
    assert counts[p == 0].sum() == 0
    expected = 90_000 * p[p > 0].double()
    assert stats.chisquare(counts[p > 0], expected * (90_000 / expected.sum())).pvalue > 1e-3
    for u, wanted in ((0.0, 1), (0.4999, 1), (0.5001, 3), (1 - 2**-24, 4)):
        assert mixe.sample_classes(probs[..., :1, :1], torch.full((1, 1, 1), u)).item() == wanted
    with pytest.raises(ValueError, match="uniform"):
        mixe.sample_classes(probs, torch.rand(1, 2, 2))


# Codes and DDIM


@pytest.mark.parametrize(("classes", "length"), [(2, 4), (3, 4), (4, 8), (11, 16), (21, 32), (81, 128)])
def test_class_codes_are_orthogonal_signs(classes: int, length: int) -> None:
    codes = mixe.class_codes(classes)
    assert codes.shape == (classes, length)
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(codes @ codes.T, length * torch.eye(classes))
    assert bool((codes.sum(1) == 0).all())  # the constant row is not used


def test_ddim_recovers_x0_from_the_true_noise() -> None:
    kept = mixe.alpha_bar(10)
    x0, noise = torch.rand(2, 4, 3, 3) * 2 - 1, torch.randn(2, 4, 3, 3)
    for t in range(1, 9):
        x_t = mixe.add_gaussian_noise(x0, t, kept, noise)
        for s in range(t):
            x_s, x0_hat = mixe.ddim_step(x_t, noise, t, kept, s)
            torch.testing.assert_close(x0_hat, x0, rtol=0, atol=2e-4)
            torch.testing.assert_close(x_s, mixe.add_gaussian_noise(x0, s, kept, noise), rtol=0, atol=2e-4)
    torch.testing.assert_close(mixe.ddim_step(x_t, noise, 8, kept)[0], mixe.ddim_step(x_t, noise, 8, kept, 7)[0])
    with pytest.raises(ValueError, match="t_prev = 3"):
        mixe.ddim_step(x_t, noise, 3, kept, 3)


def test_ddim_against_numpy_with_clipping() -> None:
    kept = mixe.alpha_bar(10)
    x, eps = np.random.default_rng(0).normal(size=(2, 2, 4, 3, 3)) * 2
    now, then = float(kept[7]), float(kept[4])
    x0 = np.clip((x - np.sqrt(1 - now) * eps) / np.sqrt(now), -1, 1)
    again = (x - np.sqrt(now) * x0) / np.sqrt(1 - now)
    got, got_x0 = mixe.ddim_step(torch.from_numpy(x), torch.from_numpy(eps), 7, kept, 4)
    np.testing.assert_allclose(got_x0, x0, atol=1e-5)
    np.testing.assert_allclose(got, np.sqrt(then) * x0 + np.sqrt(1 - then) * again, atol=1e-5)
