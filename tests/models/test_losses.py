"""Losses against straight-line NumPy written from the paper, their gradients, and two workers against one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from viladiff import losses

RNG = np.random.default_rng(0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def pixel_ce(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(B, H, W) by loops, 0 where ignored."""
    p, out = softmax(logits), np.zeros(target.shape)
    for index in np.ndindex(*target.shape):
        if target[index] != 255:
            out[index] = -np.log(p[index[0], target[index], *index[1:]])
    return out


def scene(seed: int = 0, batch: int = 2, classes: int = 5, size: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, (batch, size, size))
    target[rng.random(target.shape) < 0.2] = 255
    return rng.normal(size=(batch, classes, size, size)) * 2, target


def as_torch(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x) if x.dtype in (np.int64, np.bool_) else torch.from_numpy(x).float()


@pytest.mark.parametrize("lam", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_eq_1_features(lam: float, reduction: str) -> None:
    t, s = RNG.normal(size=(2, 3, 7))
    cosine = np.mean([1 - t[b] @ s[b] / np.linalg.norm(t[b]) / np.linalg.norm(s[b]) for b in range(3)])
    squared = ((t - s) ** 2).mean() if reduction == "mean" else np.linalg.norm(t - s) ** 2
    got = losses.feature_distillation(as_torch(t), as_torch(s), lam, reduction)
    assert float(got) == pytest.approx(squared + lam * cosine, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_eq_1_gate_selects_samples_and_count_is_the_divisor(reduction: str) -> None:
    t, s = torch.randn(2, 4, 7)
    gate = torch.tensor([1.0, 0, 1, 0])
    kept = losses.feature_distillation(t[[0, 2]], s[[0, 2]], 0.5, reduction)
    torch.testing.assert_close(losses.feature_distillation(t, s, 0.5, reduction, weight=gate), kept)
    by_all = losses.feature_distillation(t, s, 0.5, weight=gate, count=torch.tensor(4))
    torch.testing.assert_close(by_all, losses.feature_distillation(t[[0, 2]], s[[0, 2]], 0.5) / 2)
    assert losses.feature_distillation(t, s, 0.5, reduction, weight=gate * 0) == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 4, 3)])
def test_eq_2_logits(temperature: float, shape: tuple[int, ...]) -> None:
    t, s = RNG.normal(size=(2, *shape)) * 3
    p, q = softmax(t / temperature), softmax(s / temperature)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    got = losses.logit_distillation(as_torch(t), as_torch(s), temperature)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_eq_2_weights_and_count() -> None:
    t, s = torch.randn(2, 2, 5, 4, 3)
    mask = torch.rand(2, 4, 3) > 0.5
    columns = [x.movedim(1, -1)[mask] for x in (t, s)]
    selected = losses.logit_distillation(columns[0], columns[1], 2.0)
    torch.testing.assert_close(losses.logit_distillation(t, s, 2.0, weight=mask), selected)
    gate = torch.tensor([0.0, 1.0])[:, None, None]
    torch.testing.assert_close(
        losses.logit_distillation(t, s, 2.0, weight=gate, count=torch.tensor(24)),
        losses.logit_distillation(t[1:], s[1:], 2.0) / 2,
    )


def test_no_gradient_reaches_a_teacher() -> None:
    for call in (
        lambda t, s: losses.feature_distillation(t, s, 0.5),
        lambda t, s: losses.feature_distillation(t, s, 0.5, "sum", weight=torch.ones(3)),
        lambda t, s: losses.logit_distillation(t, s, 2.0),
        lambda t, s: losses.noise_loss(s[..., None, None], t[..., None, None], torch.ones(3, 1, 1, dtype=torch.bool)),
    ):
        t, s = torch.randn(2, 3, 7).unbind()
        t.requires_grad_(), s.requires_grad_()
        call(t, s).backward()
        assert t.grad is None
        assert s.grad is not None and s.grad.abs().sum() > 0


def test_gradient_of_eq_2_keeps_its_size_over_temperatures() -> None:
    t, s = torch.randn(2, 64, 5).unbind()
    sizes = []
    for temperature in (20.0, 40.0):
        s = s.detach().requires_grad_()
        losses.logit_distillation(t, s, temperature).backward()
        assert s.grad is not None
        sizes.append(float(s.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


@pytest.mark.parametrize("norm", ["labelled", "all"])
def test_eq_10_cross_entropy(norm: str) -> None:
    logits, target = scene()
    count = (target != 255).sum() if norm == "labelled" else target.size
    weight = RNG.random(target.shape)
    for w in (None, weight):
        expected = (pixel_ce(logits, target) * (1 if w is None else w)).sum() / count
        got = losses.cross_entropy(as_torch(logits), as_torch(target), None if w is None else as_torch(w), norm)
        assert float(got) == pytest.approx(expected, rel=1e-5)


def test_all_ignored_is_zero_with_a_gradient_graph() -> None:
    logits, target = torch.randn(2, 5, 4, 4, requires_grad=True), torch.full((2, 4, 4), 255)
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    total = losses.cross_entropy(logits, target) + losses.edge_cross_entropy(logits, target, ~nothing)
    total = total + losses.pseudo_label_cross_entropy(logits, target, torch.ones(2, 4, 4), nothing)
    total = total + losses.noise_loss(logits, torch.randn(2, 5, 4, 4), nothing)
    total.backward()
    assert total == 0 and logits.grad is not None and logits.grad.abs().sum() == 0


def test_hard_consistency_divides_by_valid_not_by_selected_pixels() -> None:
    logits, labels = scene(1)
    labels[labels == 255] = 0
    weight, valid = (RNG.random(labels.shape) > 0.7).astype(float), RNG.random(labels.shape) > 0.3
    expected = (pixel_ce(logits, labels) * weight * valid).sum() / valid.sum()
    got = losses.pseudo_label_cross_entropy(*map(as_torch, (logits, labels, weight, valid)))
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_edge_cross_entropy_counts_edge_pixels_only() -> None:
    logits, target = scene(2)
    edges = RNG.random(target.shape) > 0.6
    counted = edges & (target != 255)
    got = losses.edge_cross_entropy(*map(as_torch, (logits, target, edges)))
    assert float(got) == pytest.approx(pixel_ce(logits, target)[counted].mean(), rel=1e-5)


def test_eq_4_noise_loss_on_masked_pixels() -> None:
    pred, noise = RNG.normal(size=(2, 2, 8, 3, 3))
    mask = RNG.random((2, 3, 3)) > 0.4
    expected = np.moveaxis((pred - noise) ** 2, 1, -1)[mask].mean()
    assert float(losses.noise_loss(*map(as_torch, (pred, noise, mask)))) == pytest.approx(expected, rel=1e-5)


def test_per_image_cross_entropy() -> None:
    logits, labels = scene(3, batch=3)
    valid = RNG.random(labels.shape) > 0.3
    valid[2] = False
    counted = valid & (labels != 255)
    expected = [pixel_ce(logits, labels)[b][counted[b]].mean() if counted[b].any() else 0 for b in range(3)]
    got = losses.per_image_cross_entropy(*map(as_torch, (logits, labels, valid)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_float32_even_under_autocast() -> None:
    t, s = torch.randn(2, 4, 16).unbind()
    logits, target = (as_torch(x) for x in scene())
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: losses.feature_distillation(t, s, 0.5),
        lambda: losses.logit_distillation(t, s, 2.0),
        lambda: losses.cross_entropy(logits, target),
        lambda: losses.noise_loss(logits, logits.flip(0), target < 3),
    )
    for call in calls:
        plain = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = call()
        assert mixed.dtype == torch.float32
        assert torch.equal(plain, mixed)
    half, same = logits.bfloat16(), logits.bfloat16().float()
    for loss in (losses.cross_entropy(half, target), losses.logit_distillation(half, half.flip(0), 2.0)):
        assert loss.dtype == torch.float32
    assert torch.equal(losses.cross_entropy(half, target), losses.cross_entropy(same, target))


def test_bad_input_is_named() -> None:
    x = torch.randn(2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"reduction = 'men'.*did you mean 'mean'"):
        losses.feature_distillation(x[..., 0, 0], x[..., 0, 0], 0.5, "men")
    with pytest.raises(ValueError, match="temperature = 0"):
        losses.logit_distillation(x, x, 0)
    with pytest.raises(ValueError, match=r"teacher \(1, 5, 4, 4\)"):
        losses.logit_distillation(x[:1], x, 1)
    with pytest.raises(ValueError, match=r"target \(2, 2, 2\)"):
        losses.cross_entropy(x, torch.zeros(2, 2, 2).long())


# Two workers


def _share_gradient(data: tuple[Tensor, ...], rows: slice) -> Tensor:
    """Gradient of every count-normalised loss with respect to one scale that all workers share."""
    logits, teacher, target, noise = (x[rows] for x in data)
    scale = torch.ones((), requires_grad=True)
    x = logits * scale
    gate = (target.flatten(1) == 255).any(1).logical_not().float()
    total = losses.cross_entropy(x, target) + losses.edge_cross_entropy(x, target, target < 2)
    total = total + losses.ohem_mean(losses.pixel_cross_entropy(x, target), target, 0.01, 0.3)
    total = total + losses.pseudo_label_cross_entropy(x, target, (target < 3).float(), target != 255)
    total = total + losses.noise_loss(x, noise, target == 1)
    total = total + losses.logit_distillation(teacher, x, 2.0, weight=(target != 255).float())
    total = total + losses.feature_distillation(teacher.flatten(1), x.flatten(1), 0.5, weight=gate)
    total = total + losses.feature_distillation(teacher.flatten(1), x.flatten(1), 0.5, "sum")
    total.backward()
    assert scale.grad is not None
    return scale.grad


def _worker(rank: int, data: tuple[Tensor, ...], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        gradient = _share_gradient(data, slice(2 * rank, 2 * rank + 2))
        dist.all_reduce(gradient)
        if rank == 0:
            torch.save(gradient / 2, f"{folder}/gradient.pt")
    finally:
        dist.destroy_process_group()


def test_two_workers_equal_one(tmp_path: Path) -> None:
    logits, target = (as_torch(x) for x in scene(4, batch=4))
    target[0, :4] = 255  # the shares have unlike numbers of labelled pixels
    target[3] = target[3].where(target[3] != 255, 0)
    data = (logits, torch.randn(logits.shape), target, torch.randn(logits.shape))
    mp.start_processes(_worker, args=(data, str(tmp_path)), nprocs=2, start_method="fork")
    got = torch.load(tmp_path / "gradient.pt", weights_only=True)
    torch.testing.assert_close(got, _share_gradient(data, slice(0, 4)), rtol=1e-5, atol=1e-6)
