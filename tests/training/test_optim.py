"""Length of runs, evaluations on the way, and the optimisers: against arithmetic by hand and straight-line NumPy."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from method_kit import make

from viladiff.runs.config import ConfigError, RunConfig, override, run_id
from viladiff.training.optim import Optimizer, epoch, evaluation_steps, lr_factor, param_groups, total_steps

VOC = {"data.dataset": "voc", "data.split": "92"}


def dataset(labelled: int = 92, whole: int = 10_582) -> Any:
    return SimpleNamespace(labelled=np.arange(labelled), unlabelled=np.arange(labelled, whole))


def supervised(**changes: Any) -> RunConfig:
    flat = {path.replace("__", "."): value for path, value in changes.items()}
    return override(RunConfig(), {**VOC, "method.name": "supervised", **flat})


# Length


def test_an_epoch_of_92_labels_is_the_list_or_3000_images_or_the_unlabelled_list() -> None:
    assert total_steps(supervised(), dataset(), False) == 1380 == 60 * 92 // 4
    assert total_steps(supervised(train__epoch_images=3000), dataset(), False) == 45_000 == 60 * 3000 // 4
    equal = total_steps(supervised(train__epoch_images="unlabelled"), dataset(), False)
    assert equal == 157_350 == 60 * (10_582 - 92) // 4
    semi = override(RunConfig(), {**VOC, "method.name": "semibaseline"})
    assert total_steps(semi, dataset(), True) == equal


def test_a_list_is_repeated_and_never_cut() -> None:
    assert epoch(supervised(train__epoch_images=3000), dataset(5291), False) == (5291, 4)
    assert epoch(supervised(train__epoch_images=3000), dataset(2999), False) == (3000, 4)
    cfg = supervised(train__epoch_images="unlabelled", data__batch_unlabelled=8)
    assert epoch(cfg, dataset(), False) == (10_490, 8), "as a method that uses them counts"
    with pytest.raises(ValueError, match=r"^train\.epoch_images = 'unlabelled': data\.split leaves no unlabelled"):
        epoch(cfg, dataset(10_582), False)


def test_bad_lengths_are_one_line() -> None:
    for value in (0, -3, 2.5, True, "some"):
        with pytest.raises(ConfigError) as error:
            supervised(train__epoch_images=value)
        assert "\n" not in str(error.value) and str(error.value).startswith("train.epoch_images: must be a number of")
    with pytest.raises(ConfigError, match=r"train\.epoch_images = 3000: not with method\.name = 'fixmatch'"):
        override(RunConfig(), {"method.name": "fixmatch", "train.epoch_images": 3000})


# Evaluations


def test_evaluations_follow_the_step_that_completes_an_epoch() -> None:
    cfg = override(RunConfig(), {**VOC, "method.name": "semibaseline", "eval.every_epochs": 1})
    steps = total_steps(cfg, dataset(), True)
    found = sorted(evaluation_steps(cfg, dataset(), True, steps))
    assert found == [math.ceil(2622.5 * k) for k in range(1, 60)], "the last step is evaluated anyway"
    assert len(evaluation_steps(override(cfg, {"eval.every_epochs": 0.5}), dataset(), True, steps)) == 119
    assert evaluation_steps(override(cfg, {"eval.every_epochs": 61}), dataset(), True, steps) == frozenset()
    assert evaluation_steps(override(cfg, {"eval.every_epochs": 1e-6}), dataset(), True, 9) == set(range(1, 9))
    third = override(cfg, {"eval.every_epochs": 0.1, "data.batch_unlabelled": 6, "data.batch_labelled": 6})
    assert evaluation_steps(third, dataset(2, 92), True, 15) == {math.ceil(1.5 * k) for k in range(1, 10)}


def test_steps_between_evaluations_are_what_they_were() -> None:
    plain = supervised(train__steps=10)
    assert evaluation_steps(plain, dataset(), False, 10) == frozenset()
    assert evaluation_steps(supervised(train__steps=10, eval__every_steps=5), dataset(), False, 10) == {5}
    with pytest.raises(ConfigError, match=r"^eval\.every_steps = 5 and eval\.every_epochs = 2: give one of the two$"):
        supervised(eval__every_steps=5, eval__every_epochs=2)


# Optimisers


def sgd_by_hand(w: np.ndarray, grads: list[np.ndarray], rates: list[float], decay: float, nesterov: bool) -> np.ndarray:
    """Update v <- 0.9 v + g, from v = g at first; w <- w - lr (g + 0.9 v if nesterov else v); g has the decay."""
    velocity = None
    for gradient, rate in zip(grads, rates, strict=True):
        g = gradient + decay * w
        velocity = g if velocity is None else 0.9 * velocity + g
        w = w - rate * (g + 0.9 * velocity if nesterov else velocity)
    return w


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("every", [False, True])
def test_sgd_against_numpy(nesterov: bool, decay: float, every: bool) -> None:
    changes = {"optim.name": "sgd", "optim.lr": 0.05, "optim.nesterov": nesterov, "optim.weight_decay": decay}
    cfg = override(
        RunConfig(), {**changes, "optim.encoder_lr_scale": 0.1, "optim.decay_norm_and_bias": every, "train.steps": 9}
    )
    method, rng = make("supervised"), np.random.default_rng(0)
    named = {name: p for name, p in method.named_parameters() if p.requires_grad}
    before = {name: p.detach().numpy().astype(np.float64) for name, p in named.items()}
    grads = {name: [rng.normal(size=w.shape) for _ in range(3)] for name, w in before.items()}
    optimizer, scaler = Optimizer(param_groups(method, cfg), cfg), torch.amp.GradScaler("cpu", enabled=False)
    factors = [lr_factor(cfg, step, 9) for step in range(3)]
    assert factors[2] < factors[1] or cfg.optim.warmup_steps
    for step, factor in enumerate(factors):
        for group in optimizer.param_groups:
            group["lr"] = cfg.optim.lr * factor * group["scale"]
        for name, p in named.items():
            p.grad = torch.from_numpy(grads[name][step]).float()
        optimizer.step(scaler)
    assert {p.ndim for p in named.values()} >= {1, 4}
    for name, p in named.items():
        rates = [0.05 * factor * (0.1 if ".encoder." in name else 1.0) for factor in factors]
        wanted = sgd_by_hand(before[name], grads[name], rates, decay if p.ndim > 1 or every else 0.0, nesterov)
        np.testing.assert_allclose(p.detach().numpy(), wanted, rtol=2e-5, atol=2e-6, err_msg=name)


def test_every_parameter_decays_once_asked() -> None:
    for every, wanted in ((False, {0.0, 0.3}), (True, {0.3})):
        cfg = override(RunConfig(), {"optim.weight_decay": 0.3, "optim.decay_norm_and_bias": every})
        groups = param_groups(make("supervised"), cfg)
        assert {group["weight_decay"] for group in groups} == wanted and len(groups) == 4 - 2 * every
        assert all(
            p.ndim >= 2 or group["weight_decay"] in (0.0, wanted) or every for group in groups for p in group["params"]
        )


def test_fields_of_the_other_optimiser_are_refused() -> None:
    wrong = {
        "optim.betas = (0.8, 0.9): not a field of optim.name = 'sgd'; remove it, or set optim.name to adamw": {
            "optim.name": "sgd", "optim.betas": "0.8,0.9"
        },
        "optim.momentum = 0.8: not a field of optim.name = 'adamw'; remove it, or set optim.name to sgd": {
            "optim.momentum": 0.8
        },
        "optim.nesterov = True: not a field of optim.name = 'adamw'; remove it, or set optim.name to sgd": {
            "optim.nesterov": True
        },
        "optim.nesterov = True: needs a momentum above 0, got optim.momentum = 0; remove it": {
            "optim.name": "sgd", "optim.nesterov": True, "optim.momentum": 0
        },
    }  # fmt: skip
    for message, changes in wrong.items():
        with pytest.raises(ConfigError) as error:
            override(RunConfig(), changes)
        assert str(error.value) == message


def test_a_part_with_betas_has_adamw_under_sgd_and_the_rest_has_not() -> None:
    cfg = override(RunConfig(), {"method.name": "ddfp", "optim.name": "sgd", "optim.lr": 4e-3})
    method = make("ddfp", **{"flow.lr": 2e-3})
    optimizer = Optimizer(param_groups(method, cfg), cfg)
    sgd, adam = optimizer.parts
    assert isinstance(sgd, torch.optim.SGD) and isinstance(adam, torch.optim.AdamW)
    inside = {id(p) for group in adam.param_groups for p in group["params"]}
    assert inside == {id(p) for p in method.flow.parameters()}  # type: ignore[union-attr]
    assert {(group["betas"], group["scale"], group["weight_decay"]) for group in adam.param_groups} == {
        ((0.5, 0.9), 0.5, 0.0)
    }
    assert {group["momentum"] for group in sgd.param_groups} == {0.9}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    (alone,) = Optimizer(
        param_groups(method, override(cfg, {"optim.name": "adamw"})), override(cfg, {"optim.name": "adamw"})
    ).parts
    assert isinstance(alone, torch.optim.AdamW)


def test_states_go_on_bit_for_bit_and_never_into_the_other_optimiser() -> None:
    for name in ("sgd", "adamw"):
        cfg = override(RunConfig(), {"method.name": "ddfp", "optim.name": name})
        found = []
        for resumed in (False, True):
            method = make("ddfp")
            optimizer, scaler = Optimizer(param_groups(method, cfg), cfg), torch.amp.GradScaler("cpu", enabled=False)
            for step in range(4):
                if resumed and step == 2:
                    state = optimizer.state_dict()
                    optimizer = Optimizer(param_groups(method, cfg), cfg)
                    optimizer.load_state_dict(state)
                for i, p in enumerate(method.parameters()):
                    p.grad = torch.full_like(p, 0.01 * (i % 7) + step) if p.requires_grad else None
                optimizer.step(scaler)
            found.append([p.detach().clone() for p in method.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        other = override(cfg, {"optim.name": "adamw" if name == "sgd" else "sgd"})
        with pytest.raises(ValueError, match=rf"^written with optim\.name = '{name}', got '{other.optim.name}'$"):
            Optimizer(param_groups(method, other), other).load_state_dict(optimizer.state_dict())
        assert run_id(cfg) != run_id(other)


def test_the_schedule_is_one_for_both() -> None:
    base = {"optim.warmup_steps": 2, "train.steps": 10}
    one, other = (override(RunConfig(), {**base, "optim.name": name}) for name in ("adamw", "sgd"))
    wanted = [0.5, 1.0, *((1 - k / 8) ** 0.9 for k in range(8))]
    for cfg in (one, other):
        assert [lr_factor(cfg, step, 10) for step in range(10)] == pytest.approx(wanted)
