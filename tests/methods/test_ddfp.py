"""DDFP against straight-line NumPy: stages, what its flow learns from, where features move, and who teaches whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_kit import SIDE, cross_entropy_map, make, make_batch, make_uneven, mean_over, mixed, softmax
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, Step
from viladiff.data.transforms.mixing import box_mask, half_boxes
from viladiff.methods.base import keyed_boxes
from viladiff.methods.ddfp import Ddfp, lower_density
from viladiff.runs.config import ConfigError, RunConfig, override
from viladiff.training.optim import param_groups

STEP = Step(index=71, progress=0.5, seed=3)
"""Its boxes are drawn."""
BETWEEN = Step(index=71, progress=0.02, seed=3)
"""After the warm-up, before features move."""


def ready(**changes: object) -> tuple[Ddfp, Batch]:
    method = make_uneven("ddfp", **{"pseudo.threshold": 0.5} | changes)
    assert isinstance(method, Ddfp)
    return method, make_batch(views=method.required_views())


def on_grid(x: np.ndarray) -> np.ndarray:
    return np.asarray(x[:, ::2, ::2].reshape(len(x), -1))


@pytest.mark.parametrize("step", [BETWEEN, STEP], ids=["plain", "moved"])
@pytest.mark.parametrize("cutmix", [True, False])
def test_loss_is_that_of_the_formula(step: Step, cutmix: bool) -> None:
    method, batch = ready(cutmix=cutmix, radius=0.8, **{"pseudo.weight": 0.7, "flow.samples": 9999, "flow.noise": 0.5})
    losses = method(batch, step)
    valid, target = batch.valid.numpy(), batch.target.numpy()
    inside = np.zeros_like(valid)
    if cutmix:
        inside = box_mask(keyed_boxes(batch, step, "ddfp-cut", half_boxes).boxes, SIDE, SIDE).numpy()
        assert inside.reshape(4, -1).mean(1) == pytest.approx([0.5] * 4, abs=0.05)
    with torch.no_grad():
        p = softmax(method.teacher(batch.weak[0])["visual"].numpy())
        mid = method.teacher.streams(torch.cat([batch.image, batch.weak[0]]))["visual"].mid
    labels = np.where((p.max(1) >= np.float32(0.5)) & valid, p.argmax(1), 255)
    assert 0.1 < (labels == 255).mean() < 0.9
    strong, labels, counted = mixed(batch.strong[0].numpy(), inside), mixed(labels, inside), mixed(valid, inside)

    features = method.student.encode(torch.from_numpy(strong))
    streams = [features]
    if step is STEP:
        streams.append(descended(method, features, on_grid(labels) != 255))
    with torch.no_grad():
        sup = mean_over(cross_entropy_map(method.student(batch.image)["visual"].numpy(), target), target != 255)
        z = [method.student.logits(given, (SIDE, SIDE)).numpy() for given in streams]
    pseudo = [mean_over(cross_entropy_map(given, labels), labels != 255) for given in z]
    assert step is BETWEEN or abs(pseudo[1] / pseudo[0] - 1) > 0.01

    nll = likelihood(method, mid, step, batch, np.concatenate([target, np.where(valid, -1, 255)]))
    named = {"sup": sup, "pseudo": pseudo[0], "perturbed": pseudo[-1], "nll": nll}
    named["coverage"] = (labels != 255).sum() / counted.sum()
    assert {k: float(losses.terms[k]) for k in named} == pytest.approx(named, rel=2e-3)
    assert float(losses.total.detach()) == pytest.approx(sup + 0.7 * np.mean(pseudo) + nll, rel=1e-3)


def descended(method: Ddfp, features: list[Tensor], counted: np.ndarray) -> list[Tensor]:
    """Maps after a move of 0.8 mean lengths along the gradient of the summed likelihood, taken in float64."""
    network, flow = (module.double() for module in (method.student, method.flow))
    moved = [level.detach().double().requires_grad_() for level in features]
    mid = network.decode(moved)["visual"].mid.flatten(2).mT[torch.from_numpy(counted)]
    slopes = torch.autograd.grad(flow.nll(mid).sum(), moved)
    found = []
    for level, slope in zip(moved, slopes, strict=True):
        x, g = level.detach().numpy(), slope.numpy()
        length = np.linalg.norm(x, axis=1).mean((1, 2))[:, None, None, None]
        norm = np.linalg.norm(g, axis=1, keepdims=True)
        found.append(
            torch.from_numpy(x + 0.8 * length * np.where(norm > 0, g / np.where(norm > 0, norm, 1), 0)).float()
        )
    network.float(), flow.float()
    return found


def likelihood(method: Ddfp, mid: Tensor, step: Step, batch: Batch, classes: np.ndarray) -> float:
    """Mean -log p per channel over all positions of the teacher's map but those of class 255, one by one."""
    vectors, classes = mid.flatten(2).mT, on_grid(classes)
    keys = [*(f"l{key}" for key in batch.keys), *(f"u{key}" for key in batch.keys_u)]
    name = (step.seed, "ddfp", step.index)
    order = keyed_random.uniform(keys, classes.shape[1:], *name, "order")
    noise = keyed_random.normal(keys, vectors.shape[1:], *name, "noise")
    found = []
    for x, kinds, rank, added in zip(vectors, classes, order, noise, strict=True):
        score = torch.where(torch.from_numpy(kinds) != 255, rank, -1.0)
        for place, extra in zip(score.topk(len(score)).indices.tolist(), added, strict=True):
            if kinds[place] != 255:
                found.append((x[place] + 0.5 * extra, int(kinds[place])))
    with torch.no_grad():
        nll = method.flow.nll(torch.stack([x for x, _ in found]), torch.tensor([k for _, k in found]))
    return float(nll.mean() / vectors.shape[2])


def gradients(method: Ddfp) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def test_flow_teaches_no_network_and_no_network_teaches_the_flow() -> None:
    """What the likelihood weighs changes the flow's gradient alone; what labels weigh, the network's alone."""
    found = []
    for weight, width in ((1.0, 1), (0.0, 1), (1.0, 3)):
        method, batch = ready(**{"pseudo.weight": weight})
        likelihood_of = method._likelihood
        method._likelihood = lambda *given, f=likelihood_of, w=width: w * f(*given)  # type: ignore[method-assign]
        method(batch, STEP).total.backward()
        found.append(gradients(method))
    plain, unlabelled, tripled = found
    for name in plain:
        of_flow = name.startswith("flow.")
        assert of_flow or torch.equal(tripled[name], plain[name])
        if of_flow:
            assert plain[name].any()
            torch.testing.assert_close(tripled[name], 3 * plain[name])
            assert torch.equal(unlabelled[name], plain[name])
    assert not torch.equal(unlabelled["student.decoder.norm.weight"], plain["student.decoder.norm.weight"])


def test_features_move_where_the_flow_finds_them_rarer() -> None:
    method, batch = ready()
    labels = torch.zeros(4, SIDE, SIDE, dtype=torch.int64)
    rarity = method._rarity(labels)
    with torch.no_grad():
        features = method.student.encode(batch.strong[0])
    moves = lower_density(features, rarity, 0.05)
    with torch.no_grad():
        before = float(rarity(features))
        gained = float(rarity([f + d for f, d in zip(features, moves, strict=True)])) - before
        others = []
        for seed in range(8):
            gen = torch.Generator().manual_seed(seed)
            noise = [torch.nn.functional.normalize(torch.randn(d.shape, generator=gen), dim=1) for d in moves]
            given = [f + n * d.norm(dim=1, keepdim=True) for f, n, d in zip(features, noise, moves, strict=True)]
            others.append(abs(float(rarity(given)) - before))
    assert gained > 3 * max(others)


def test_moved_features_teach_the_encoder_too() -> None:
    method, batch = ready(cutmix=False)
    method(batch, STEP).total.backward()
    found = gradients(method)
    method.zero_grad()
    with torch.no_grad():
        p = method.teacher(batch.weak[0])["visual"].softmax(1)
        labels = p.argmax(1).masked_fill((p.amax(1) < 0.5) | ~batch.valid, 255)
    own = method.student.encode(batch.strong[0])
    moved = [f + d for f, d in zip(own, lower_density(own, method._rarity(labels), 0.3), strict=True)]
    losses = [F.cross_entropy(method.student.logits(x, (SIDE, SIDE)), labels, ignore_index=255) for x in (own, moved)]
    sup = F.cross_entropy(method.student(batch.image)["visual"], batch.target, ignore_index=255)
    (sup + (losses[0] + losses[1]) / 2).backward()
    for name, expected in gradients(method).items():
        if name.startswith("student.encoder"):
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5)


def test_positions_without_a_label_are_not_asked_how_rare_they_are() -> None:
    method, batch = ready()
    labels = torch.full((4, SIDE, SIDE), 255)
    labels[1, :8, :8] = 2
    with torch.no_grad():
        features = method.student.encode(batch.strong[0])
        all_four = method._rarity(labels)(features)
        one = method._rarity(labels[1:2])([level[1:2] for level in features])
        torch.testing.assert_close(all_four, one)
        assert method._rarity(labels.fill_(255))(features) == 0


def test_stages() -> None:
    method, batch = ready()
    early = method(batch, Step(0, 0.0, 3))
    early.total.backward()
    assert float(early.total.detach()) == pytest.approx(float(early.terms["sup"]))
    assert all(p.grad is not None and not p.grad.any() for p in method.flow.parameters())
    between = method(batch, BETWEEN)
    assert between.terms["nll"] != 0 and torch.equal(between.terms["pseudo"], between.terms["perturbed"])
    later = method(batch, STEP)
    assert not torch.equal(later.terms["pseudo"], later.terms["perturbed"])
    never, _ = ready(perturb_from=1.0)
    terms = never(batch, Step(71, 0.999, 3)).terms
    assert torch.equal(terms["pseudo"], terms["perturbed"])
    with pytest.raises(ConfigError, match=r"perturb_from = 0.1: must be at least warmup = 0.2"):
        override(RunConfig(), {"method.name": "ddfp", "method.warmup": 0.2, "method.perturb_from": 0.1})


def test_flow_has_its_own_rate_and_betas_and_does_not_decay() -> None:
    cfg = override(RunConfig(), {"method.name": "ddfp", "optim.lr": 4e-3, "optim.weight_decay": 0.1})
    assert cfg.optim.encoder_lr_scale != 0.5
    method = make("ddfp", **{"flow.lr": 2e-3})
    groups = param_groups(method, cfg)
    of_flow = {id(p) for p in method.flow.parameters()}
    count = 0
    for group in groups:
        inside = {id(p) in of_flow for p in group["params"]}
        assert len(inside) == 1
        if inside == {True}:
            count += len(group["params"])
            assert (group["scale"], group["betas"], group["weight_decay"]) == (0.5, (0.5, 0.9), 0.0)
        else:
            assert group["scale"] in (1.0, cfg.optim.encoder_lr_scale) and "betas" not in group
    assert count == len(of_flow) and {g["weight_decay"] for g in groups} == {0.0, 0.1}
    optimizer = torch.optim.AdamW(groups, cfg.optim.lr, cfg.optim.betas)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.9), (0.9, 0.999)}


def test_the_average_begins_after_the_warm_up() -> None:
    """With min(1 - 1 / (n + 1), 0.999), n the steps since its end: the first one copies the student."""
    method, _ = ready(warmup=0.5, perturb_from=0.5)
    after = [(0, 0.0, 0.0), (49, 0.49, 0.0), (50, 0.5, 0.0), (51, 0.51, 0.5), (54, 0.54, 0.8), (99, 0.99, 0.98)]
    for index, progress, keep in [*after, (5000, 0.999, 0.9996)]:
        before = [p.clone() for p in method.teacher.parameters()]
        with torch.no_grad():
            for parameter in method.student.parameters():
                parameter.add_(0.1)
            method.after_step(Step(index, progress, 3))
        keep = min(keep, 0.999)
        for old, new, own in zip(before, method.teacher.parameters(), method.student.parameters(), strict=True):
            torch.testing.assert_close(new, keep * old + (1 - keep) * own)


def test_no_confident_pixel_gives_a_loss_of_zero_and_no_move() -> None:
    method, batch = ready(**{"pseudo.threshold": 1.0})
    losses = method(batch, STEP)
    losses.total.backward()
    assert losses.terms["pseudo"] == losses.terms["perturbed"] == losses.terms["coverage"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_a_sample_of_positions_tells_the_likelihood_of_all() -> None:
    every, some = (ready(**{"flow.samples": n})[0] for n in (999, 100))
    batch = make_batch(views=every.required_views())
    a, b = (float(method(batch, STEP).terms["nll"]) for method in (every, some))
    assert a != b and b == pytest.approx(a, rel=0.05)
