"""MixE's reverse chain in kernels against the loop of torch's operations, and how few launches it takes."""

from __future__ import annotations

import pytest
import torch
from interpreted import check_kernels
from torch import Tensor

from viladiff.evaluation.operations import OperationCounter
from viladiff.models.mixe import denoiser as mixe
from viladiff.models.mixe.config import MixeConfig
from viladiff.models.mixe.denoiser import Denoiser, refine

Chain = tuple[Denoiser, Tensor, Tensor, float, MixeConfig, Tensor, Tensor]


def chain(device: str, timesteps: int = 10, classes: int = 5) -> Chain:
    """What ``refine`` is called with: a denoiser whose heads say something, and a tau that makes two regions."""
    torch.manual_seed(0)
    network = Denoiser(classes, 6, 8, 2, timesteps)
    length = network.noise_head.out_channels
    cond, soft = torch.randn(2, 8, 9, 7), (2 * torch.randn(2, classes, 9, 7)).softmax(1)
    noise, uniforms = torch.randn(2, length, 9, 7), torch.rand(2, timesteps, 9, 7).transpose(0, 1)
    tensors = (x.to(device) for x in (cond, soft, noise, uniforms))
    cond, soft, noise, uniforms = tensors
    cfg = MixeConfig(timesteps=timesteps, beta=0.2, edge_bonus=0.3)
    return network.to(device), cond, soft, 0.5, cfg, noise, uniforms


def test_a_gpu_takes_at_most_200_launches() -> None:
    given = chain("meta")
    counter = OperationCounter(given[0])
    with counter:
        refine(*given)
    assert sum(line.load.times for line in counter.lines()) <= 200


def test_a_cpu_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixe, "reverse_step", None)
    monkeypatch.setattr(mixe, "FoldedChain", None)
    assert refine(*chain("cpu", 2)).isfinite().all()


KERNELS = """
import torch
from test_fused_chain import chain, mixe, refine
from viladiff.models.fused import chain_kernels, norm_kernels
norm_kernels.SUMMED = 32  # several blocks a channel, the last one not full
for timesteps in (2, 4):
    given = chain("cpu", timesteps)
    expected, labels = refine(*given), []
    steps = mixe.reverse_step

    def noting(*args):
        found = steps(*args)
        labels.append(found[1])
        return found

    mixe.fused = lambda x: True
    assert mixe._kernels(given[1])  # tried before its steps are counted
    mixe.reverse_step = noting
    found = refine(*given)
    mixe.fused, mixe.reverse_step = (lambda x: False), steps
    assert len(labels) == timesteps - 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
mixe.fused = lambda x: True
refine(*chain("cpu", 2))
assert mixe._chain_agrees.cache_info().misses == 1 and mixe._chain_agrees(torch.device("cpu"))
for name in ("reversed_maps", "added_maps"):  # one that is wrong is noticed before its first use
    right = getattr(chain_kernels, name)
    setattr(chain_kernels, name, lambda *given: [part + 1 for part in right(*given)])
    mixe._chain_agrees.cache_clear()
    assert not mixe._chain_agrees(torch.device("cpu")), name
    setattr(chain_kernels, name, right)
print("kernels agree")
"""


@pytest.mark.slow
def test_kernels_agree_with_torch() -> None:
    """One label that is drawn otherwise would change the logits of its neighbours by far more than the tolerance."""
    check_kernels(KERNELS)
