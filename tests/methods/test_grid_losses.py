"""Losses and labels that are read of the grid, without enlarged logits, against those of enlarged ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_kit import CLASSES, make, make_batch
from torch import Tensor, nn

from viladiff.data.batch import Losses, Step
from viladiff.losses import cross_entropy, pixel_cross_entropy
from viladiff.methods import METHODS
from viladiff.methods.common.resting import resting
from viladiff.models import segmenter
from viladiff.models.blocks import upsample
from viladiff.models.cast_weights import CastWeights
from viladiff.models.fused import pixel_logits, pixel_loss
from viladiff.models.fused.pixel_logits import PixelLogits, reweighted
from viladiff.runs.config import RunConfig, override
from viladiff.training.step_work import count_step

LATE = Step(300, 0.9, 3)
ENLARGED = {"corrmatch": 2, "logicdiag": 1, "pseudoseg": 2, "u2pl": 1}
"""Times that logits are enlarged all the same: for KL of both streams, losses of all nodes of a hierarchy, soft labels
of each pixel and what learns them, and entropy."""


def step(name: str) -> tuple[Losses, dict[str, Tensor]]:
    torch.manual_seed(0)
    method = make(name)
    batch = make_batch(views=method.required_views())
    batch.target[0, :3] = 255
    losses = method(replace(batch), LATE)
    losses.total.backward()
    return losses, {key: x.grad for key, x in method.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_are_those_of_enlarged_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, slopes = step(name)
    enlarged: list[Tensor] = []

    def counting(x: Tensor, size: tuple[int, ...], align_corners: bool = False) -> Tensor:
        enlarged.append(x)
        return upsample(x, size, align_corners)

    monkeypatch.setattr(pixel_loss, "MANY", 1)  # as with so many classes: in pieces, which hold no enlarged logits
    for module in (pixel_logits, segmenter):
        monkeypatch.setattr(module, "upsample", counting)
    found, mine = step(name)
    assert len(enlarged) == ENLARGED.get(name, 0)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-6, atol=0)
    assert mine.keys() == slopes.keys()
    largest = max(float(x.abs().max()) for x in slopes.values())
    for key, slope in slopes.items():
        torch.testing.assert_close(mine[key], slope, rtol=1e-4, atol=1e-6 * largest, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_takes_every_hard_label_by_kernels(name: str) -> None:
    changes = {"method.name": name, "data.crop": 64, "data.batch_labelled": 2, "data.batch_unlabelled": 2}
    lines = count_step(override(RunConfig(), changes), CLASSES).lines
    names = {line.operation for line in lines}
    assert "viladiff::grid_cross_entropy" in names or name == "viladiff"
    assert not any("nll_loss" in operation for operation in names)


def test_weights_that_rest_get_zeros() -> None:
    """As a sum times 0 gives them, in one operation instead of one for each weight."""
    part = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).bfloat16())
    weights = list(part.parameters())
    (2 * resting(part) + weights[0].sum()).backward()
    assert float(resting(part).detach()) == 0 and torch.equal(weights[0].grad, torch.ones(4, 3))
    for weight in weights[1:]:
        assert weight.grad is not None and weight.grad.dtype == weight.dtype
        assert weight.grad.shape == weight.shape and not weight.grad.any()


def test_networks_that_rest_are_not_cast_with_the_others() -> None:
    method = make("psmt")
    names = CastWeights(method, torch.device("meta"), "bf16", method.exact).names
    parts = {name.split(".")[0] for name in names}
    assert parts == {"student", "teachers"} and len(list(method.founders.parameters())) > 0  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [5, pixel_loss.MANY])
def test_parts_labels_and_losses_are_those_of_the_tensor(classes: int) -> None:
    gen = torch.Generator().manual_seed(classes)
    grid = (4 * torch.randn(5, classes, 6, 7, generator=gen)).requires_grad_()
    target = torch.randint(classes, (5, 24, 28), generator=gen)
    target[0, :3], factor = 255, torch.rand(classes, generator=gen) + 0.1
    seen, whole = PixelLogits(grid, (24, 28)), upsample(grid, (24, 28))
    assert (seen._enlarged is None) == (classes == pixel_loss.MANY)
    first, rest = seen.split([2, 3])
    assert len(rest) == 3 and len(seen[1:]) == 4
    torch.testing.assert_close(rest.cross_entropy(target[2:]), pixel_cross_entropy(whole[2:], target[2:]))
    torch.testing.assert_close(cross_entropy(first, target[:2]), cross_entropy(whole[:2], target[:2]))
    torch.testing.assert_close(seen[1:].detach().tensor(), whole[1:].detach())
    assert torch.equal(seen.classes(), whole.argmax(1)) and not seen.detach().tensor().requires_grad
    fewer = seen.channels(3)
    torch.testing.assert_close(fewer.tensor(), whole[:, :3])
    for found, p in ((seen.top(), whole.softmax(1)), (seen.top(factor), reweighted(whole.softmax(1), factor))):
        torch.testing.assert_close(found[0], p.amax(1))
        assert torch.equal(found[1], p.argmax(1)) and not found[0].requires_grad
