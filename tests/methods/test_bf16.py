"""The gradient of each method's step under bf16 autocast points where that in fp32 does."""

from __future__ import annotations

import pytest
import torch
from method_kit import STEP, make_batch, make_uneven
from torch import Tensor

from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.baselines.allspark import nearest_class

LEAST = 0.99


def gradient(method: Method, bf16: bool) -> Tensor:
    """The gradient of one step with respect to all parameters, as one vector; the method's state is put back."""
    state = {name: value.clone() for name, value in method.state_dict().items()}
    method.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = method(make_batch(views=method.required_views()), STEP)
    losses.total.backward()
    method.load_state_dict(state)
    return torch.cat([p.grad.flatten().double() for p in method.parameters() if p.grad is not None])


def cosine(method: Method) -> float:
    exact, rounded = gradient(method, bf16=False), gradient(method, bf16=True)
    return float(exact @ rounded / (exact.norm() * rounded.norm()))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "allspark"])
def test_bf16_keeps_the_direction_of_the_gradient(name: str) -> None:
    assert cosine(make_uneven(name)) >= LEAST


def test_bf16_keeps_allsparks_but_for_the_classes_of_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """AllSpark gives each channel to the nearest class. In a random network rounding moves one in 25 to another class,
    and the step is another one; with these choices held, the gradient is the same."""
    assert cosine(make_uneven("allspark")) < LEAST, "the choices make a difference"
    chosen: list[Tensor] = []

    def first(channels: Tensor, maps: Tensor) -> Tensor:
        chosen.append(nearest_class(channels, maps))
        return chosen[-1]

    method = make_uneven("allspark")
    monkeypatch.setattr("viladiff.methods.allspark.nearest_class", first)
    exact = gradient(method, bf16=False)
    replay = iter(chosen)
    monkeypatch.setattr("viladiff.methods.allspark.nearest_class", lambda channels, maps: next(replay))
    rounded = gradient(method, bf16=True)
    assert float(exact @ rounded / (exact.norm() * rounded.norm())) >= LEAST
