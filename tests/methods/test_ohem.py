"""The supervised loss of hard pixels alone: against NumPy, in every method, and over two workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_kit import STEP, make_batch, make_uneven
from torch._subclasses import FakeTensorMode

from viladiff import losses
from viladiff.losses import ignore_aware_mean, ohem_mean, pixel_cross_entropy
from viladiff.methods import METHODS
from viladiff.runs.config import RunConfig, override

SHARE = 0.156


def drawn(known: float = 0.8, easy: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (2, 5, 16, 12) that are right more often the higher ``easy`` is, and a target with 255 in it."""
    gen = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 5, (2, 16, 12), generator=gen)
    logits = torch.randn(2, 5, 16, 12, generator=gen) + easy * torch.nn.functional.one_hot(target, 5).movedim(3, 1)
    return logits, target.masked_fill(torch.rand(2, 16, 12, generator=gen) > known, 255)


def in_numpy(logits: torch.Tensor, target: torch.Tensor, threshold: float, share: float) -> tuple[float, int]:
    """The loss and the number of pixels kept, from sorted probabilities of the true class."""
    z, y = logits.double().numpy(), target.numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    known = y != 255
    true = np.take_along_axis(p, np.where(known, y, 0)[:, None], 1)[:, 0][known]
    n = max(1, round(share * y.size))
    kept = true if n > true.size else true[true <= max(threshold, np.sort(true)[n - 1])]
    return float(-np.log(kept).mean()), kept.size


@pytest.mark.parametrize("easy", [0.0, 3.0, 6.0, 9.0])
@pytest.mark.parametrize("share", [0.01, SHARE, 0.6])
@pytest.mark.parametrize("known", [0.05, 0.8, 1.0])
def test_the_loss_is_numpys(easy: float, share: float, known: float) -> None:
    logits, target = drawn(known, easy)
    wanted, kept = in_numpy(logits, target, 0.7, share)
    loss = pixel_cross_entropy(logits, target)
    torch.testing.assert_close(ohem_mean(loss, target, 0.7, share), torch.tensor(wanted, dtype=torch.float32))
    assert kept <= int((target != 255).sum())


def test_cases_differ() -> None:
    """The draws above decide by the threshold, by the share, and by neither."""
    total = {easy: int((drawn(easy=easy)[1] != 255).sum()) for easy in (0.0, 9.0)}
    least = round(SHARE * drawn()[1].numel())
    assert in_numpy(*drawn(easy=9.0), 0.7, SHARE)[1] == least < total[9.0]
    assert least < in_numpy(*drawn(easy=0.0), 0.7, SHARE)[1] < total[0.0]
    few = drawn(known=0.05)
    assert in_numpy(*few, 0.7, SHARE)[1] == int((few[1] != 255).sum()) < least


def test_only_what_is_kept_has_a_gradient_and_an_ignored_batch_gives_zero() -> None:
    logits, target = drawn(easy=9.0)
    logits.requires_grad_()
    ohem_mean(pixel_cross_entropy(logits, target), target, 0.7, SHARE).backward()
    assert logits.grad is not None
    moved = logits.grad.abs().sum(1) > 0
    assert int(moved.sum()) == in_numpy(logits.detach(), target, 0.7, SHARE)[1] and not moved[target == 255].any()
    logits.grad = None
    nothing = torch.full_like(target, 255)
    loss = ohem_mean(pixel_cross_entropy(logits, nothing), nothing, 0.7, SHARE)
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


def test_with_a_threshold_of_one_it_is_the_plain_mean() -> None:
    logits, target = drawn(easy=6.0)
    loss = pixel_cross_entropy(logits, target)
    assert torch.equal(ohem_mean(loss, target, 1.0, SHARE), ignore_aware_mean(loss, target))


def test_two_workers_keep_what_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = drawn(easy=9.0)
    logits[1] += 6 * torch.nn.functional.one_hot(target[1].clamp(max=4), 5).movedim(2, 0)  # one share is easier
    loss = pixel_cross_entropy(logits, target)
    whole = ohem_mean(loss, target, 0.7, SHARE)
    ranked = loss.masked_fill(target == 255, -1.0)
    monkeypatch.setattr(losses, "all_gather", lambda values: ranked)
    monkeypatch.setattr(losses, "distributed_mean", lambda total, count: torch.stack([total, count]))
    totals, counts = sum(ohem_mean(loss[i : i + 1], target[i : i + 1], 0.7, SHARE) for i in range(2))
    torch.testing.assert_close(totals / counts, whole)


def test_nothing_waits_for_the_device() -> None:
    with FakeTensorMode():
        loss = torch.empty(2, 16, 12, device="cuda")
        assert ohem_mean(loss, torch.empty(2, 16, 12, dtype=torch.int64, device="cuda"), 0.7, SHARE).is_cuda


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_hard_pixels_where_asked(name: str) -> None:
    """A tenth of the pixels at least, and none for being below the threshold: the supervised term must grow."""
    found = {}
    for enabled in (False, True):
        changes = {"ohem.enabled": enabled, "ohem.threshold": 0.001, "ohem.min_kept": 0.1}
        method = make_uneven(name, **changes)
        with torch.no_grad():
            found[enabled] = float(method(make_batch(views=method.required_views()), STEP).terms["sup"])
    assert found[True] > found[False] * 1.05


def test_it_is_off_unless_asked_for_and_changes_the_name() -> None:
    plain = override(RunConfig(), {"method.name": "semibaseline"})
    assert not plain.method.ohem.enabled
    with pytest.raises(ValueError, match=r"method\.ohem\.min_kept = 0\.0: must be > 0"):
        override(plain, {"method.ohem.min_kept": 0.0})
    with pytest.raises(ValueError, match=r"method\.ohem\.threshold = 1\.2: must be ≤ 1"):
        override(plain, {"method.ohem.threshold": 1.2})


def test_the_published_share() -> None:
    assert override(RunConfig(), {}).method.ohem.min_kept == pytest.approx(200_000 / (2 * 801**2), abs=5e-4)
