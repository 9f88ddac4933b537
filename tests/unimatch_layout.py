"""UniMatch's DeepLabV3+ written down a second time, from its description: names and shapes, the forward pass as one
sequence of functions, and its operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = {"resnet50s": (3, 4, 6, 3), "resnet101s": (3, 4, 23, 3)}
STAGES = (64, 128, 256, 512)
ASPP_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}


class Conv(NamedTuple):
    """A convolution by its names; ``norm`` is that of the BatchNorm behind it, if any."""

    name: str
    norm: str | None
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    rate: int = 1


def stage_plan(output_stride: int) -> list[tuple[int, int, int]]:
    """(stride, dilation of the first block, dilation of the others) of the four stages."""
    return [
        (1, 1, 1),
        (2, 1, 1),
        (2, 1, 1) if output_stride == 16 else (1, 1, 2),
        (1, 1, 2) if output_stride == 16 else (1, 2, 4),
    ]


def stem() -> list[Conv]:
    return [
        Conv("backbone.conv1.0", "backbone.conv1.1", 3, 64, 3, 2),
        Conv("backbone.conv1.3", "backbone.conv1.4", 64, 64, 3),
        Conv("backbone.conv1.6", "backbone.bn1", 64, 128, 3),
    ]


def bottlenecks(encoder: str, output_stride: int, stage: int) -> Iterator[tuple[list[Conv], Conv | None]]:
    """Each block of a stage (from 0): its three convolutions and that of its shortcut."""
    width, (stride, first, others) = STAGES[stage], stage_plan(output_stride)[stage]
    inputs = 128 if stage == 0 else 4 * STAGES[stage - 1]
    for i in range(BLOCKS[encoder][stage]):
        at, step, rate = f"backbone.layer{stage + 1}.{i}", stride if i == 0 else 1, first if i == 0 else others
        three = [
            Conv(f"{at}.conv1", f"{at}.bn1", inputs, width),
            Conv(f"{at}.conv2", f"{at}.bn2", width, width, 3, step, rate),
            Conv(f"{at}.conv3", f"{at}.bn3", width, 4 * width),
        ]
        short = Conv(f"{at}.downsample.0", f"{at}.downsample.1", inputs, 4 * width, 1, step) if i == 0 else None
        yield three, short
        inputs = 4 * width


def aspp(output_stride: int) -> tuple[list[Conv], Conv, Conv]:
    """The four convolutions on the map, that of the pooled image, and the projection."""
    far = [
        Conv(f"head.b{i + 1}.0", f"head.b{i + 1}.1", 2048, 256, 3, 1, rate)
        for i, rate in enumerate(ASPP_RATES[output_stride])
    ]
    pooled = Conv("head.b4.gap.1", "head.b4.gap.2", 2048, 256)
    return (
        [Conv("head.b0.0", "head.b0.1", 2048, 256), *far],
        pooled,
        Conv("head.project.0", "head.project.1", 1280, 256),
    )


REDUCE = Conv("reduce.0", "reduce.1", 256, 48)
FUSE = (Conv("fuse.0", "fuse.1", 304, 256, 3), Conv("fuse.3", "fuse.4", 256, 256, 3))


def convolutions(encoder: str, output_stride: int, classes: int) -> list[Conv]:
    found = stem()
    for stage in range(4):
        for three, short in bottlenecks(encoder, output_stride, stage):
            found += [*three, *([] if short is None else [short])]
    branches, pooled, project = aspp(output_stride)
    return [*found, *branches, pooled, project, REDUCE, *FUSE, Conv("classifier", None, 256, classes)]


def random_state(encoder: str, classes: int, seed: int = 0) -> dict[str, Tensor]:
    """A state dict of the published layout; residual branches are weak, so that values stay near 1."""
    draw, state = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for conv in convolutions(encoder, 16, classes):
        spread = (2 / (conv.inputs * conv.kernel**2)) ** 0.5
        shape = (conv.outputs, conv.inputs, conv.kernel, conv.kernel)
        state[f"{conv.name}.weight"] = spread * torch.randn(shape, generator=draw)
        if conv.norm is None:
            state[f"{conv.name}.bias"] = torch.randn(conv.outputs, generator=draw)
            continue
        gain = 0.3 if conv.norm.endswith("bn3") else 1.0
        state[f"{conv.norm}.weight"] = gain * (0.5 + torch.rand(conv.outputs, generator=draw))
        state[f"{conv.norm}.bias"] = 0.1 * torch.randn(conv.outputs, generator=draw)
        state[f"{conv.norm}.running_mean"] = 0.1 * torch.randn(conv.outputs, generator=draw)
        state[f"{conv.norm}.running_var"] = 0.5 + torch.rand(conv.outputs, generator=draw)
        state[f"{conv.norm}.num_batches_tracked"] = torch.tensor(3)
    return state


def forward(state: Mapping[str, Tensor], x: Tensor, encoder: str, output_stride: int) -> Tensor:
    """Logits (B, K, H, W) of images (B, 3, H, W), in evaluation mode."""

    def run(conv: Conv, x: Tensor) -> Tensor:
        padding = conv.rate * (conv.kernel // 2)
        y = F.conv2d(
            x, state[f"{conv.name}.weight"], state.get(f"{conv.name}.bias"), conv.stride, padding, dilation=conv.rate
        )
        if conv.norm is None:
            return y
        mean, var, weight, bias = (
            state[f"{conv.norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(y, mean, var, weight, bias, training=False, eps=1e-5)

    def enlarged(x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)

    size = x.shape[-2:]
    for conv in stem():
        x = F.relu(run(conv, x))
    x = F.max_pool2d(x, 3, 2, 1)
    maps = []
    for stage in range(4):
        for (first, second, third), short in bottlenecks(encoder, output_stride, stage):
            beside = x if short is None else run(short, x)
            x = F.relu(run(third, F.relu(run(second, F.relu(run(first, x))))) + beside)
        maps.append(x)
    branches, pooled, project = aspp(output_stride)
    seen = [F.relu(run(conv, x)) for conv in branches]
    whole = F.relu(run(pooled, x.mean((2, 3), keepdim=True)))
    x = F.relu(run(project, torch.cat([*seen, enlarged(whole, x.shape[-2:])], 1)))
    fine = F.relu(run(REDUCE, maps[0]))
    x = torch.cat([fine, enlarged(x, fine.shape[-2:])], 1)
    for conv in FUSE:
        x = F.relu(run(conv, x))
    return enlarged(run(Conv("classifier", None, 256, 0), x), size)


def multiplications(encoder: str, output_stride: int, classes: int, side: int) -> int:
    """Multiplications and additions, counted apart, of the convolutions of one square image."""
    halved = [side]
    for _ in range(5):
        halved.append((halved[-1] + 1) // 2)
    half, quarter = halved[1], halved[2]
    outs = {conv.name: half for conv in stem()}
    for stage in range(4):
        before = [quarter, quarter, halved[3], halved[3 if output_stride == 8 else 4]][stage]
        after = [quarter, halved[3], *[halved[3 if output_stride == 8 else 4]] * 2][stage]
        for i, (three, short) in enumerate(bottlenecks(encoder, output_stride, stage)):
            outs[three[0].name] = before if i == 0 else after
            outs |= {conv.name: after for conv in (three[1], three[2], *([] if short is None else [short]))}
    top = halved[3 if output_stride == 8 else 4]
    branches, pooled, project = aspp(output_stride)
    outs |= {conv.name: top for conv in (*branches, project)} | {pooled.name: 1}
    outs |= {conv.name: quarter for conv in (REDUCE, *FUSE)} | {"classifier": quarter}
    return sum(
        2 * conv.inputs * conv.outputs * conv.kernel**2 * outs[conv.name] ** 2
        for conv in convolutions(encoder, output_stride, classes)
    )
