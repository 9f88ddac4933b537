"""UniMatch V1 and V2, FixMatch: each loss against straight-line NumPy, and what their feature perturbations reach."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_kit import SIDE, STEP, make, make_batch
from torch import Tensor

from viladiff.data.batch import Batch, Step
from viladiff.methods.base import Method


class Seen:
    """Notes what the student is asked and what it answers."""

    def __init__(self, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
        self.features: list[list[Tensor]] = []
        self.logits: list[np.ndarray] = []
        ask = method.student.grid_logits

        def grid_logits(features: list[Tensor]) -> Tensor:
            self.features.append([level.detach() for level in features])
            out = ask(features)
            self.logits.append(method.student.upsample(out.detach(), (SIDE, SIDE)).double().numpy())
            return out

        monkeypatch.setattr(method.student, "grid_logits", grid_logits)


def half_trained(name: str, **changes: object) -> Method:
    """A method whose probabilities differ enough between pixels that thresholds decide something."""
    method = make(name, **{"pseudo.threshold": 0.5, **changes})
    gen = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=gen))
    return method


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cut(x: np.ndarray, batch: Batch, view: int) -> np.ndarray:
    """CutMix with slices."""
    out = x.copy()
    for i, (top, left, bottom, right) in enumerate(batch.mix[view].boxes.tolist()):
        out[i, ..., top:bottom, left:right] = x[i ^ 1, ..., top:bottom, left:right]
    return out


def supervised(z: np.ndarray, target: np.ndarray) -> float:
    total, count = 0.0, 0
    for p, y in zip(softmax(z), target, strict=True):
        for k in range(z.shape[1]):
            total -= np.log(p[k][y == k]).sum()
        count += (y != 255).sum()
    return total / count


def pseudo(z: np.ndarray, labels: np.ndarray, weight: np.ndarray, valid: np.ndarray) -> float:
    total = 0.0
    for p, y, w in zip(softmax(z), labels, weight * valid, strict=True):
        for k in range(z.shape[1]):
            total -= (np.log(p[k]) * w)[y == k].sum()
    return total / valid.sum()


def test_unimatch_loss_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    method = half_trained("unimatch", strong_weight=0.4, feature_weight=0.7)
    batch = make_batch(views=method.required_views())
    seen = Seen(method, monkeypatch)
    losses = method(batch, STEP)
    mine, clean, first, second, dropped = np.split(seen.logits[0], [4, 8, 12, 16])
    p, valid = softmax(clean), batch.valid.numpy()
    labels, weight = p.argmax(1), (p.max(1) >= 0.5).astype(float)
    assert 0.05 < weight.mean() < 0.95
    sup = supervised(mine, batch.target.numpy())
    strong = [
        pseudo(z, *(cut(x, batch, view) for x in (labels, weight, valid))) for view, z in enumerate((first, second))
    ]
    feature = pseudo(dropped, labels, weight, valid)
    assert losses.terms["sup"] == pytest.approx(sup, rel=1e-5)
    assert losses.terms["pseudo"] == pytest.approx(np.mean(strong), rel=1e-5)
    assert losses.terms["feature"] == pytest.approx(feature, rel=1e-5)
    assert losses.terms["coverage"] == pytest.approx((weight * valid).sum() / valid.sum(), rel=1e-5)
    assert losses.total.item() == pytest.approx((sup + 0.4 * np.mean(strong) + 0.7 * feature) / 2, rel=1e-5)


def test_unimatch_defaults_are_the_published_weights() -> None:
    """L = 1/2 [L_x + 1/4 L_s1 + 1/4 L_s2 + 1/2 L_fp]."""
    cfg = make("unimatch").cfg
    assert (cfg.strong_weight, cfg.feature_weight, cfg.feature_dropout, cfg.pseudo.weight) == (0.5, 0.5, 0.5, 1.0)
    assert make("unimatch", **{"pseudo.threshold": 0.95}).cfg.pseudo == type(cfg.pseudo)()


def test_strong_views_enter_with_their_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, start in (("unimatch", 8), ("unimatch_v2", 4)):
        method = make(name)
        batch = make_batch(views=method.required_views())
        given: list[Tensor] = []
        encode = method.student.encode
        monkeypatch.setattr(
            method.student, "encode", lambda x, given=given, encode=encode: given.append(x) or encode(x)
        )
        method(batch, STEP)
        for view, strong in enumerate(given[0][start:].split(4)):
            assert np.array_equal(strong.numpy(), cut(batch.strong[view].numpy(), batch, view))


def test_unimatch_drops_channels_of_the_weak_view_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make("unimatch")
    batch = make_batch(views=method.required_views())
    seen = Seen(method, monkeypatch)
    method(batch, STEP)
    # ReLU leaves zeros of its own on the finer maps; the tokens of the last one are normalised and have none.
    gone = (seen.features[0][-1][16:] == 0).flatten(2).all(2)
    assert 0.4 < gone.float().mean() < 0.6 and not torch.equal(gone[0], gone[1])
    for level in seen.features[0]:
        mask = gone[:, : level.shape[1], None, None]
        torch.testing.assert_close(level[16:], torch.where(mask, 0.0, 2 * level[4:8]))


@pytest.mark.parametrize("name", ["unimatch", "unimatch_v2"])
def test_dropped_channels_are_named_by_step_and_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = make(name)
    batch = make_batch(views=method.required_views())
    seen = Seen(method, monkeypatch)
    for given, step in ((batch, STEP), (batch, Step(8, 0.9, 3)), (replace(batch, keys_u=(4, 5, 6, 7)), STEP)):
        method(given, step)
    torch.manual_seed(5)
    method(batch, STEP)
    first, step, keys, again = (torch.cat([x.flatten() for x in features]) for features in seen.features)
    assert torch.equal(first, again) and not torch.equal(first, step) and not torch.equal(first, keys)


def test_unimatch_labels_pass_no_gradient() -> None:
    """Of the weak view, only the perturbed half trains."""
    batch = make_batch(views=make("unimatch").required_views())
    grads = []
    for weight in (0.0, 0.5):
        method = make("unimatch", feature_weight=weight)
        weak = batch.weak[0].clone().requires_grad_()
        method(replace(batch, weak=(weak,)), STEP).total.backward()
        assert weak.grad is not None
        grads.append(float(weak.grad.abs().sum()))
    assert grads[0] == 0 and grads[1] > 0


def test_unimatch_v2_loss_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    method = half_trained("unimatch_v2", **{"pseudo.weight": 0.8})
    batch = make_batch(views=method.required_views())
    seen = Seen(method, monkeypatch)
    losses = method(batch, STEP)
    mine, first, second = np.split(seen.logits[0], [4, 8])
    p, valid = softmax(method.teacher(batch.weak[0])["visual"].double().numpy()), batch.valid.numpy()
    labels, weight = p.argmax(1), (p.max(1) >= 0.5).astype(float)
    assert 0.05 < weight.mean() < 0.95
    sup = supervised(mine, batch.target.numpy())
    strong = [
        pseudo(z, *(cut(x, batch, view) for x in (labels, weight, valid))) for view, z in enumerate((first, second))
    ]
    assert losses.terms["sup"] == pytest.approx(sup, rel=1e-5)
    assert losses.terms["pseudo"] == pytest.approx(np.mean(strong), rel=1e-5)
    assert losses.total.item() == pytest.approx((sup + 0.8 * np.mean(strong)) / 2, rel=1e-5)


def test_unimatch_v2_streams_lack_each_other_s_channels_in_half_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make("unimatch_v2")
    batch = replace(make_batch(8, views=method.required_views()), mix=())
    batch.strong = (batch.strong[0], batch.strong[0])
    plain = make("unimatch_v2", complementary=False)
    before, after = Seen(plain, monkeypatch), Seen(method, monkeypatch)
    plain(batch, STEP), method(batch, STEP)
    gone = (after.features[0][-1][8:16] == 0).flatten(2).all(2)
    lost = gone.any(1)
    assert (lost[::2] != lost[1::2]).all() and 0.4 < gone[lost].float().mean() < 0.6
    for old, new in zip(before.features[0], after.features[0], strict=True):
        labelled, one, two = new.split(8)
        assert torch.equal(labelled, old[:8])
        first = gone[:, : old.shape[1], None, None]
        whole = ~lost[:, None, None, None]
        torch.testing.assert_close(one, torch.where(whole, old[8:16], torch.where(first, 0.0, 2 * old[8:16])))
        torch.testing.assert_close(two, torch.where(whole, old[8:16], torch.where(first, 2 * old[8:16], 0.0)))


@pytest.mark.parametrize("changes", [{"complementary": False}, {"cutmix": False}, {"pseudo.threshold": 0.9}], ids=str)
def test_each_choice_of_unimatch_v2_changes_the_loss(changes: dict[str, object]) -> None:
    default, other = half_trained("unimatch_v2"), half_trained("unimatch_v2", **changes)
    totals = [method(make_batch(views=method.required_views()), STEP).total for method in (default, other)]
    assert not torch.equal(*totals)


@pytest.mark.parametrize("cutmix", [True, False])
def test_semibaseline_loss_in_numpy(cutmix: bool) -> None:
    """Labels, confidence and padding are cut as the picture is; the teacher makes them."""
    method = half_trained("semibaseline", cutmix=cutmix, **{"pseudo.weight": 0.8})
    batch = make_batch(views=method.required_views())
    losses = method(batch, STEP)

    def boxed(x: np.ndarray) -> np.ndarray:
        return cut(x, batch, 0) if cutmix else x

    with torch.no_grad():
        mine = method.student(batch.image)["visual"].numpy()
        z = method.student(torch.from_numpy(boxed(batch.strong[0].numpy())))["visual"].numpy()
        p = softmax(method.teacher(batch.weak[0])["visual"].numpy())
    labels, weight, valid = (boxed(x) for x in (p.argmax(1), (p.max(1) >= 0.5).astype(float), batch.valid.numpy()))
    assert 0.05 < weight.mean() < 0.95
    sup, unsup = supervised(mine, batch.target.numpy()), pseudo(z, labels, weight, valid)
    assert losses.terms["sup"] == pytest.approx(sup, rel=1e-5)
    assert losses.terms["pseudo"] == pytest.approx(unsup, rel=1e-5)
    assert losses.terms["coverage"] == pytest.approx((weight * valid).sum() / valid.sum(), rel=1e-5)
    assert losses.total.item() == pytest.approx(sup + 0.8 * unsup, rel=1e-5)


def test_fixmatch_is_half_of_semibaseline_with_a_slower_teacher() -> None:
    batch = make_batch()
    found, base = (half_trained(name)(batch, STEP) for name in ("fixmatch", "semibaseline"))
    assert torch.equal(found.total, base.total / 2)
    assert make("fixmatch").cfg.teacher.momentum == 0.996 != make("semibaseline").cfg.teacher.momentum
    assert make("unimatch_v2").cfg.teacher.momentum == 0.996
