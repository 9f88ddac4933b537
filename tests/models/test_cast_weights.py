"""Weights that are cast all at once against autocast's own casts: every loss and gradient, bit for bit."""

from __future__ import annotations

import pytest
import torch
from method_kit import STEP, make, make_batch
from torch import Tensor, nn

from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.cast_weights import CastWeights, cast_all

GPU = torch.device("cuda")
"""Named alone: on it weights are cast, and the casts of a CPU are the same."""


def step_of(method: Method, together: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
    torch.manual_seed(1)
    call = CastWeights(method, GPU if together else torch.device("cpu"), "bf16", method.exact)
    assert bool(call.names) is together
    with torch.autocast("cpu", torch.bfloat16):
        total = call(make_batch(views=method.required_views()), STEP).total
    total.backward()
    return total.detach(), {name: x.grad for name, x in method.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_autocast_bit_for_bit(name: str) -> None:
    mine, theirs = (step_of(make(name), together) for together in (True, False))
    assert torch.equal(mine[0], theirs[0])
    assert mine[1].keys() == theirs[1].keys()
    for path, gradient in theirs[1].items():
        found = mine[1][path]
        assert (found is None) is (gradient is None), path
        assert gradient is None or (found.dtype == gradient.dtype and torch.equal(found, gradient)), path  # type: ignore[union-attr]


def test_parts_in_float32_keep_their_weights() -> None:
    method = make("psmt")
    names = CastWeights(method, GPU, "bf16", method.exact).names
    assert any(name.startswith("student.decoder.") for name in names)
    assert not any(name.startswith("teachers.members.0.decoder.") for name in names)
    assert not any("norm" in name for name in names), "autocast leaves norms in float32"
    assert CastWeights(method, GPU, "fp32").names == CastWeights(method, torch.device("cpu"), "bf16").names == []


def test_a_model_of_several_workers_has_the_same_weights() -> None:
    method = make("ddfp")
    both = method, nn.ModuleDict({"module": method})
    alone, spread = (CastWeights(model, GPU, "bf16", method.exact).names for model in both)
    assert spread == [f"module.{name}" for name in alone]


def test_an_unused_copy_has_no_gradient() -> None:
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    first, second = cast_all([a, b], torch.bfloat16)
    assert first.dtype == second.dtype == torch.bfloat16
    (2 * first).sum().backward()
    assert a.grad is not None and a.grad.tolist() == [2, 2] and a.grad.dtype == torch.float32
    assert b.grad is None
