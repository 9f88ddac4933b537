"""Norms that are joined with what is around them against torch's own operations, forwards and backwards."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from interpreted import check_kernels
from torch import Tensor, nn

from viladiff.evaluation.operations import OperationCounter
from viladiff.models.fused import norms
from viladiff.models.fused.norms import added_and_normed, norm_act, normed


@pytest.mark.parametrize(("act", "function"), [("none", lambda x: x), ("relu", F.relu), ("silu", F.silu)])
def test_a_cpu_calls_torch_bit_for_bit(act: str, function: object) -> None:
    gen = torch.Generator().manual_seed(0)
    layer, group = nn.LayerNorm(12), nn.GroupNorm(3, 12)
    x, y, maps = (torch.randn(*shape, generator=gen) for shape in ((2, 5, 12), (2, 5, 12), (2, 12, 4, 5)))
    assert torch.equal(normed(layer, x), layer(x))
    total, inner = added_and_normed(layer, x, y)
    assert torch.equal(total, x + y) and torch.equal(inner, layer(x + y))
    assert torch.equal(norm_act(group, maps, act), function(group(maps)))  # type: ignore[operator]


def test_layers_in_order_are_those_of_a_sequential() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
    x = torch.randn(2, 3, 6, 5)
    joined = norms.NormActs(*layers)
    assert torch.equal(joined(x), nn.Sequential(*layers)(x))
    with pytest.MonkeyPatch.context() as patch:
        seen: list[str] = []
        patch.setattr(norms, "norm_act", lambda norm, x, act: seen.append(act) or F.relu(norm(x)))
        assert torch.equal(joined(x), nn.Sequential(*layers)(x)) and seen == ["relu"]


def test_a_gpu_reads_and_writes_each_tensor_once() -> None:
    moved = []
    for joined in (True, False):
        layer, group = nn.LayerNorm(64, device="meta"), nn.GroupNorm(8, 64, device="meta")
        x = torch.empty(4, 100, 64, device="meta", requires_grad=True)
        y = torch.empty(4, 100, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
        maps = torch.empty(4, 64, 20, 20, device="meta", dtype=torch.bfloat16, requires_grad=True)
        counter = OperationCounter(layer)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with counter:
                if joined:
                    total, inner = added_and_normed(layer, x, y)
                    grid = norm_act(group, maps, "relu")
                else:
                    total = x + y
                    inner = layer(total).bfloat16()
                    grid = F.relu(F.group_norm(maps.float(), 8, group.weight, group.bias)).bfloat16()
                torch.autograd.backward([total, inner, grid], [torch.empty_like(part) for part in (total, inner, grid)])
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", torch.float16)
        assert inner.dtype == grid.dtype == torch.bfloat16 and total.dtype == torch.float32
        lines = counter.lines()
        moved.append([sum(line.load.bytes * line.load.times for line in lines), sum(line.load.times for line in lines)])
    assert 2 * moved[0][0] < moved[1][0] and moved[0][1] < moved[1][1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_that_was_cast_itself_keeps_its_type(dtype: torch.dtype) -> None:
    layer, group = nn.LayerNorm(12, device="meta", dtype=dtype), nn.GroupNorm(3, 12, device="meta", dtype=dtype)
    x, maps = (torch.empty(*shape, device="meta", dtype=dtype) for shape in ((2, 5, 12), (2, 12, 4, 5)))
    assert (
        normed(layer, x).dtype == added_and_normed(layer, x, x)[1].dtype == norm_act(group, maps, "relu").dtype == dtype
    )


def vit() -> tuple[nn.Module, nn.Module]:
    """A ViT of timm's own blocks, and its copy with joined ones."""
    from timm.models.vision_transformer import VisionTransformer

    from viladiff.models.encoders.vit_block import join_norms

    torch.manual_seed(0)
    plain = VisionTransformer(16, 8, embed_dim=24, depth=3, num_heads=2, num_classes=0, init_values=0.5)
    joined = copy.deepcopy(plain)
    join_norms(joined)
    return plain, joined


def results(network: nn.Module) -> list[Tensor]:
    gen = torch.Generator().manual_seed(1)
    maps = network.forward_intermediates(torch.randn(2, 3, 16, 16, generator=gen), intermediates_only=True)  # type: ignore[operator]
    total = torch.stack([(x * torch.randn(x.shape, generator=gen)).sum() for x in maps]).sum()
    used = [x for name, x in network.named_parameters() if not name.startswith(("norm.", "fc_norm."))]
    return [*(x.detach() for x in maps), *torch.autograd.grad(total, used)]


def test_joined_blocks_are_timms() -> None:
    plain, joined = vit()
    assert joined.state_dict().keys() == plain.state_dict().keys()
    blocks = list(joined.blocks)  # type: ignore[arg-type]
    assert all(one.following == (other,) for one, other in pairwise(blocks)) and blocks[-1].following == ()
    again = list(copy.deepcopy(joined).blocks)  # type: ignore[arg-type]
    assert again[0].following == (again[1],) and again[1] is not blocks[1]
    for found, expected in zip(results(joined), results(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_sum_of_other_tokens_has_its_own_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block leaves for the next one is used for that sum alone, and once."""
    _, joined = vit()
    expected = results(joined)
    from viladiff.models.encoders import vit_block

    monkeypatch.setattr(vit_block, "joins_norms", lambda norm, x: True)
    for block in joined.blocks:  # type: ignore[union-attr]
        block.ahead = torch.ones(1), torch.full((2, 5, 24), 9.0)  # type: ignore[union-attr, assignment]
    for found, wanted in zip(results(joined), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert all(block.ahead is None for block in joined.blocks)  # type: ignore[union-attr]


KERNELS = """
import torch
from test_norms import results, vit
from viladiff.models.fused import norm_kernels, norms
norm_kernels.SUMMED, norm_kernels.PROGRAMS = 16, 4  # several blocks a channel and rows a program, the last not full
cpu = torch.device("cpu")
assert norms._agrees(cpu)
plain, joined = vit()
norms._kernels = lambda norm, x: True
for found, expected in zip(results(joined), results(plain), strict=True):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
for name in ("layer_norm", "layer_gradient", "group_norm", "group_sums", "group_gradient"):
    right = getattr(norm_kernels, name)

    def wrong(*given):
        found = right(*given)
        if found is None:
            return given[-1][-3].add_(1) if name == "layer_norm" else given[-1].add_(1)
        return found + 1 if isinstance(found, torch.Tensor) else tuple(part + 1 for part in found)

    setattr(norm_kernels, name, wrong)
    norms._agrees.cache_clear()
    assert not norms._agrees(cpu), name
    setattr(norm_kernels, name, right)
print("kernels agree")
"""


@pytest.mark.slow
def test_kernels_agree_with_torch() -> None:
    check_kernels(KERNELS)
