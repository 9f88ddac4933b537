"""The flow: exactly invertible, its determinant that of the Jacobian, its likelihood against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from viladiff.methods.ddfp import lower_density
from viladiff.models.baselines.normalizing_flow import Coupling, Flow, soft_clamp


def strong_flow(width: int = 7, classes: int = 4, depth: int = 2) -> Flow:
    """In float64, with weights large enough that scales reach their limits."""
    torch.manual_seed(0)
    flow = Flow(width, classes, 9, depth).double()
    with torch.no_grad():
        for parameter in flow.couplings.parameters():
            parameter.mul_(12)
    return flow


def vectors(n: int = 20, width: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [2, 7, 8])
def test_inverse_undoes_the_flow_both_ways(width: int) -> None:
    flow, x = strong_flow(width), vectors(width=width)
    z, _ = flow(x)
    assert (z - x).abs().max() > 0.5
    torch.testing.assert_close(flow.inverse(z), x)
    torch.testing.assert_close(flow(flow.inverse(x))[0], x)


def test_log_determinant_is_that_of_autograds_jacobian() -> None:
    flow, x = strong_flow(), vectors()
    _, found = flow(x)
    for i, row in enumerate(x):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], row)
        assert found[i].item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), rel=1e-9)
    assert found.std() > 0.1


def test_coupling_in_numpy() -> None:
    torch.manual_seed(0)
    coupling, x = Coupling(5, 3, clamp=2.0).double(), vectors(4, 5)
    a, b = x[:, :2].numpy(), x[:, 2:].numpy()

    def subnet(net: torch.nn.Module, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = [p.detach().numpy() for p in net.parameters()]
        for w, shift in zip(weights[0::2], weights[1::2], strict=True):
            given = given @ w.T + shift
            if w is not weights[-2]:
                given = np.maximum(given, 0)
        scale, shift = np.split(given, 2, 1)
        return 2 * 0.636 * np.arctan(scale), shift

    s, t = subnet(coupling.by_second, b)
    a = a * np.exp(s) + t
    r, t = subnet(coupling.by_first, a)
    b = b * np.exp(r) + t
    found, log_det = coupling(x)
    np.testing.assert_allclose(
        found.detach().numpy(), np.concatenate([a, b], 1)[:, coupling.permutation.numpy()], rtol=1e-10
    )
    np.testing.assert_allclose(log_det.detach().numpy(), s.sum(1) + r.sum(1), rtol=1e-10)
    assert sorted(coupling.permutation.tolist()) == list(range(5))


def test_likelihood_in_numpy() -> None:
    flow, x = strong_flow(), vectors()
    classes = torch.tensor([-1, 0, 1, 2, 3] * 4)
    z, log_det = (v.detach().numpy() for v in flow(x))
    means = flow.means.detach().numpy()
    log_p = np.stack([-0.5 * ((z - m) ** 2).sum(1) - 3.5 * np.log(2 * np.pi) for m in means], 1)
    mixture = logsumexp(log_p, 1) - np.log(4)
    expected = [-(mixture[i] if k < 0 else log_p[i, k]) - log_det[i] for i, k in enumerate(classes.tolist())]
    np.testing.assert_allclose(flow.nll(x, classes).detach().numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(flow.nll(x).detach().numpy(), -mixture - log_det, rtol=1e-9)


def test_density_integrates_to_one() -> None:
    torch.manual_seed(0)
    flow = Flow(2, 3, 8).double()
    with torch.no_grad():
        for parameter in flow.couplings.parameters():
            parameter.mul_(5)
        steps = torch.arange(-12, 12, 0.05, dtype=torch.float64)
        grid = torch.cartesian_prod(steps, steps)
        for classes in (None, torch.full((len(grid),), 1)):
            assert (-flow.nll(grid, classes)).exp().sum().item() * 0.05**2 == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("limit", [0.5, 2.0, 3.0])
def test_soft_clamp_keeps_its_limit_and_its_slope_follows_the_limit(limit: float) -> None:
    x = torch.tensor([-1e9, -1.7, -1e-4, 0.0, 1e-4, 0.6, 1e9], dtype=torch.float64)
    found = soft_clamp(x, limit)
    np.testing.assert_allclose(found.numpy(), limit * 0.636 * np.arctan(x.numpy()), rtol=1e-12)
    assert 0.999 * limit < float(found[-1]) < limit and float(found[0]) == -float(found[-1])
    torch.testing.assert_close(found[2:5], 0.636 * limit * x[2:5])


def test_class_means_start_a_unit_apart_and_couplings_nearly_as_nothing() -> None:
    torch.manual_seed(0)
    flow = Flow(256, 21, 256).requires_grad_(False)
    assert float(flow.means.std()) == pytest.approx(1, rel=0.03) and abs(float(flow.means.mean())) < 0.05
    for parameter in flow.couplings.parameters():
        assert float(parameter.std()) == pytest.approx(0.05, rel=0.2)


def test_likelihood_is_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    flow, x = Flow(8, 3, 16), vectors(width=8).float()
    plain = flow.nll(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow.nll(x), plain) and plain.dtype == torch.float32
        assert flow.nll(x.bfloat16()).dtype == torch.float32


def test_a_flow_learns_a_density() -> None:
    """Two curved clusters: likelier than under one Gaussian fitted to all, and labels find their class."""
    torch.manual_seed(0)
    gen = torch.Generator().manual_seed(3)
    angle = torch.rand(600, generator=gen) * 2
    classes = torch.arange(600) % 2
    x = torch.stack([angle.cos(), angle.sin()], 1) * (1 + classes[:, None]) + 0.1 * torch.randn(600, 2, generator=gen)
    flow = Flow(2, 2, 16)
    adam = torch.optim.Adam(flow.parameters(), 3e-2, betas=(0.5, 0.9))
    for _ in range(120):
        adam.zero_grad()
        flow.nll(x, classes).mean().backward()
        adam.step()
    covariance = np.cov(x.numpy().T, bias=True)
    gaussian = 1 + math.log(2 * math.pi) + 0.5 * math.log(np.linalg.det(covariance))
    with torch.no_grad():
        assert flow.nll(x).mean() < gaussian - 0.2
        each = torch.stack([flow.nll(x, torch.full_like(classes, k)) for k in (0, 1)], 1)
    assert (each.argmin(1) == classes).float().mean() > 0.95


def test_a_move_to_lower_density_raises_nll_more_than_a_random_one() -> None:
    torch.manual_seed(0)
    flow = Flow(6, 3, 12)
    maps = [torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)]

    def nll(given: list[Tensor]) -> Tensor:
        return flow.nll((given[0] + 0.5 * given[1]).flatten(2).mT.flatten(0, 1)).sum()

    moves = lower_density(maps, nll, 0.3)
    for level, move in zip(maps, moves, strict=True):
        length = level.norm(dim=1).mean((1, 2))[:, None, None].expand(2, 4, 4)
        torch.testing.assert_close(move.norm(dim=1), 0.3 * length)
    before, after = nll(maps).detach(), nll([m + d for m, d in zip(maps, moves, strict=True)]).detach()
    others = []
    for seed in range(20):
        gen = torch.Generator().manual_seed(seed)
        noise = [torch.nn.functional.normalize(torch.randn(d.shape, generator=gen), dim=1) for d in moves]
        noise = [n * d.norm(dim=1, keepdim=True) for n, d in zip(noise, moves, strict=True)]
        others.append(float(nll([m + n for m, n in zip(maps, noise, strict=True)]).detach() - before))
    assert float(after - before) > 3 * max(others) and float(after - before) > 0


def test_tiny_and_absent_gradients_give_whole_and_no_moves() -> None:
    maps = [torch.ones(1, 3, 2, 2)]
    (found,) = lower_density(maps, lambda given: 1e-30 * given[0][:, 0, 0].sum(), 0.5)
    assert found[0, 0, 0].tolist() == pytest.approx([0.5 * 3**0.5] * 2) and not found[0, 1:].any()
    assert not found[0, :, 1].any()


def test_one_channel_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="width = 1"):
        Flow(1, 3, 4)
