"""Operations of small networks against counts made by hand, and memory against what a CPU allocates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.evaluation.meta_precision import MetaPrecision
from viladiff.evaluation.operations import LiveMemory, OperationCounter, outline
from viladiff.evaluation.step_time import Load

F32, B16 = 4, 2


def count(net: nn.Module, work: Callable[[], Tensor]) -> OperationCounter:
    """The operations of a forward and a backward pass."""
    counter = OperationCounter(net)
    with counter, counter.modules():
        out = work()
        counter.begin("backward")
        out.backward()
    return counter


def totals(loads: Iterable[Load]) -> tuple[int, int, int]:
    """FLOPs, bytes and launches."""
    loads = list(loads)
    return (
        sum(x.flops * x.times for x in loads),
        sum(x.bytes * x.times for x in loads),
        sum(x.times for x in loads),
    )


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def test_a_linear_layer_without_bias() -> None:
    """X (8, 16) W' (16, 4): the product, its sum, the gradient at the sum, and the product that is W's gradient."""
    with torch.device("meta"):
        net = nn.Linear(16, 4, bias=False)
    x, out = 8 * 16 * F32, 8 * 4 * F32
    weight = 16 * 4 * F32
    counter = count(net, lambda: net(meta(8, 16)).sum())
    flops, size, launches = totals(line.load for line in counter.lines())
    assert flops == 2 * (2 * 8 * 16 * 4), "forward, and the gradient of the weight; that of the input is not needed"
    ones, expanded = F32, F32  # the gradient of the sum is expanded, one number in memory
    forward, total = x + weight + out, out + F32
    backward = (expanded + x + weight) + (F32 + ones)
    assert size == forward + total + backward
    assert launches == 4


def test_a_convolution_and_its_activation() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    lines = count(net, lambda: net(meta(2, 3, 10, 12)).mean()).lines()
    parts = {name: totals(loads) for name, loads in outline(lines, 1).items()}
    pixels, weights = 2 * 10 * 12, (8 * 27 + 8) * F32
    image, maps = 3 * pixels * F32, 8 * pixels * F32
    product = 2 * pixels * 8 * 27
    forward, backward = image + weights + maps, maps + image + weights - 8 * F32 + weights
    assert parts["0"] == (2 * product, forward + backward, 2), "forward, and the gradient of the weights"
    assert parts["1"] == (0, 2 * maps + 3 * maps, 2), "backward reads the gradient and the result, and writes one"


@pytest.mark.parametrize(
    ("layer", "maps"),
    [(nn.Conv2d(8, 8, 3, padding=1, groups=8), 30), (nn.ConvTranspose2d(8, 4, 2, stride=2), 30)],
    ids=["grouped", "transposed"],
)
def test_gradients_of_other_convolutions_cost_as_much_as_the_maps(layer: nn.Module, maps: int) -> None:
    net, image = nn.Sequential(layer).to("meta"), meta(2, 8, 5, 6).requires_grad_()
    lines = count(net, lambda: net(image).mean()).lines()
    product = 2 * (2 * maps) * net[0].weight.numel()
    assert sorted(line.load.flops for line in lines if line.load.flops) == [product, 2 * product]


def test_attention_is_one_operation() -> None:
    """Scores and values, 2 N^2 D a head each; five such products backwards, where the scores are computed again."""
    net = nn.Identity()
    q, k, v = (meta(2, 4, 16, 8).requires_grad_() for _ in range(3))
    with MetaPrecision(torch.float32):
        lines = count(net, lambda: F.scaled_dot_product_attention(q, k, v).sum()).lines()
    one = 2 * (2 * 4) * 16 * 16 * 8
    loads = [line.load for line in lines if line.load.kind == "attention"]
    assert [(load.flops, load.times) for load in loads] == [(2 * one, 1), (5 * one, 1)]


def test_autocast_casts_each_weight_once() -> None:
    """Two passes of a layer in bf16: two casts of inputs and one of the weight; the norm goes back to fp32."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16, elementwise_affine=False))
    counter, precision = OperationCounter(net), MetaPrecision(torch.bfloat16)
    with counter, precision, counter.modules():
        with precision.autocast():
            first, second = net(meta(8, 16)), net(meta(8, 16))
        assert first.dtype == second.dtype == torch.float32
    found = {(line.module, line.operation): line.load for line in counter.lines()}
    product = found["0", "aten::mm"]
    assert product == Load("product", True, 2 * 8 * 16 * 16, (2 * 8 * 16 + 16 * 16) * B16, 2)
    casts = [line.load for line in counter.lines() if line.operation == "aten::_to_copy"]
    assert sum(load.times for load in casts) == 2 + 1 + 2
    assert not found["1", "aten::native_layer_norm"].half


def step_of(trained: nn.Module, precision: MetaPrecision | None, x: Tensor) -> OperationCounter:
    """A pass without gradient, as of pseudo-labels, before one of the same weights that is trained."""
    counter = OperationCounter(trained)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision is None else precision.autocast()
    with counter, precision or nullcontext(), counter.modules():
        with autocast:
            with torch.no_grad():
                trained(x)
            out = trained(x).sum()
        counter.begin("backward")
        out.backward()
    return counter


def test_a_pass_without_gradient_leaves_the_weights_their_gradient() -> None:
    """By hand: two products forwards and that of the weight's gradient, one cast of the weight there and one back."""
    lines = {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            net, x = nn.Sequential(nn.Linear(16, 4, bias=False)), torch.ones(8, 16, dtype=torch.bfloat16)
        precision = MetaPrecision(torch.bfloat16) if device == "meta" else None
        lines[device] = step_of(net, precision, x).lines()
    for found in lines.values():
        assert sum(line.load.flops * line.load.times for line in found) == 3 * (2 * 8 * 16 * 4)
        casts = [line for line in found if line.operation == "aten::_to_copy" and line.load.bytes == 64 * (F32 + B16)]
        assert sum(line.load.times for line in casts) == 2, "as torch's own autocast does"


def test_modules_own_their_backward_passes() -> None:
    with torch.device("meta"):
        net = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8), "frozen": nn.Linear(8, 8)})
    net["frozen"].requires_grad_(False)

    def work() -> Tensor:
        with torch.no_grad():
            aim = net["frozen"](meta(4, 8))
        return (net["second"](net["first"](meta(4, 8)).relu()) - aim).square().sum()

    flops = {name: totals(loads)[0] for name, loads in outline(count(net, work).lines()).items()}
    one = 2 * 4 * 8 * 8
    assert flops["first"] == 2 * one and flops["second"] == 3 * one and flops["frozen"] == one
    assert flops.get("", 0) == flops.get("backward", 0) == 0


def test_views_and_allocations_start_nothing() -> None:
    counter = OperationCounter(nn.Identity())
    with counter:
        x = torch.empty(4, 6, device="meta")
        x.view(6, 4).t()[None, 1:].expand(2, 3, 6).detach()
        torch.empty_like(x)
    assert counter.lines() == []
    with counter:
        x.add_(1)
        torch._foreach_lerp_([x, x], [x, x], 0.5)
    assert sorted((line.operation, line.load.bytes) for line in counter.lines()) == [
        ("aten::_foreach_lerp_", 6 * 24 * F32),
        ("aten::add_", 2 * 24 * F32),
    ]


# Memory


class Small(nn.Module):
    """Convolutions, attention and a residual, so that what is saved differs from what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 48)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 5))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).mT
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        return self.mlp(x + F.scaled_dot_product_attention(q, k, v)[:, 0])


def step(net: nn.Module, images: Tensor, target: Tensor) -> None:
    F.cross_entropy(net(images).flatten(0, 1), target).backward()


def allocated(work: Callable[[], None], path: Path) -> int:
    """The most bytes of torch's allocator above those at the start, by its own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    profile.export_chrome_trace(str(path))
    events = [x for x in json.loads(path.read_text())["traceEvents"] if x.get("name") == "[memory]"]
    events.sort(key=lambda x: x["ts"])
    live = peak = 0
    for event in events:
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("side", [16, 32])
def test_peak_memory_is_that_of_a_real_step(side: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, images = Small(), torch.randn(2, 3, side, side)
    target = torch.randint(5, (2 * side * side,))
    real = allocated(lambda: step(net, images, target), tmp_path / "trace.json")
    empty = Small().to("meta")
    held = [*empty.parameters(), images.to("meta"), target.to("meta")]
    memory = LiveMemory(held)
    before = memory.live
    with memory, MetaPrecision(torch.float32):
        step(empty, *held[-2:])
    assert before == sum(x.numel() * x.element_size() for x in held)
    assert memory.peak - before == pytest.approx(real, rel=0.15)
    gradients = sum(x.numel() * F32 for x in empty.parameters())
    assert memory.live - before == gradients, "what is left at the end"
