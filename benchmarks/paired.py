"""Processor time of two ways of the same work, in turns within one run: what the step does now, and did before.

OMP_NUM_THREADS=1 python benchmarks/paired.py chain        MixE's reverse chain: work that its steps share done once
OMP_NUM_THREADS=1 python benchmarks/paired.py casts        casts of a ViT-B's weights: all at once, or by autocast
                                                           each at its first use; --crop is the largest that fits
OMP_NUM_THREADS=1 python benchmarks/paired.py layout       --decoder with maps in NCHW, then in channels_last

Figures are medians of --pairs, each side first in every second one, and of their ratios. A CPU has none of the kernels
of a GPU: what is compared is what both devices do.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from viladiff.models.cast_weights import CastWeights
from viladiff.models.mixe.config import MixeConfig
from viladiff.models.mixe.denoiser import Denoiser, refine
from viladiff.models.segmenter import NetworkFactory
from viladiff.runs.config import RunConfig, override

Side = Callable[[], object]
CLASSES, GRID, IMAGES = 21, 128, 4
"""Of VOC at crop 512: the label grid has a quarter of its side."""


class Plain:
    """A denoiser whose chain is its forward pass, step by step, with nothing shared between steps."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def chain(
        self, gaussian: Tensor, edges: Tensor, times: Tensor, cond: Tensor
    ) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        return lambda codes, i: self.denoiser(codes, gaussian, edges, times[i].expand(len(codes)), cond)


def chain(grid: int, images: int) -> tuple[Side, Side]:
    """The chain at T = 10 on a label grid; both sides get the same draws and must give the same logits."""
    torch.manual_seed(0)
    cfg = MixeConfig(timesteps=10)
    denoiser = Denoiser(CLASSES, 1, cfg.width, cfg.depth, cfg.timesteps)
    length = denoiser.noise_head.out_channels
    cond, soft = torch.randn(images, cfg.width, grid, grid), torch.randn(images, CLASSES, grid, grid).softmax(1)
    noise, uniforms = torch.randn(images, length, grid, grid), torch.rand(cfg.timesteps, images, grid, grid)

    def side(of: Any) -> Side:
        return lambda: refine(of, cond, soft, 0.5, cfg, noise, uniforms)

    before, now = side(Plain(denoiser)), side(denoiser)
    first, second = before(), now()
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    return before, now


def casts(crop: int, images: int, encoder: str) -> tuple[Side, Side]:
    """A forward and backward pass of a network under autocast in bf16; the gradients of both sides are equal."""
    fields = {"model.encoder": encoder, "model.pretrained": "none", "data.crop": crop}
    cfg = override(RunConfig(), {"data.dataset": "voc", "data.split": "92", **fields})
    torch.manual_seed(0)
    network = NetworkFactory(cfg.model, CLASSES, 1, crop=crop)().train()
    holder = nn.ModuleDict({"network": network})
    holder.forward = lambda x: network(x)["visual"].square().mean()
    pictures = torch.randn(images, 3, crop, crop)

    def side(device: str) -> Side:
        call = CastWeights(holder, torch.device(device), "bf16")
        assert bool(call.names) is (device == "cuda")

        def step() -> Tensor:
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = call(pictures)
            loss.backward()
            return torch.stack([x.grad.norm() for x in network.parameters() if x.grad is not None])

        return step

    before, now = side("cpu"), side("cuda")  # named alone: on it weights are cast at once
    assert torch.equal(before(), now())  # type: ignore[arg-type]
    return before, now


def layout(crop: int, images: int, encoder: str, decoder: str) -> tuple[Side, Side]:
    """A decoder and its classifier forwards and backwards, on maps of the encoder; the first side has NCHW."""
    fields = {"model.encoder": encoder, "model.decoder": decoder, "model.decoder_width": 256, "data.crop": crop}
    cfg = override(RunConfig(), {"data.dataset": "voc", "data.split": "92", "model.pretrained": "none", **fields})
    torch.manual_seed(0)
    network = NetworkFactory(cfg.model, CLASSES, 1, crop=crop)().train()
    with torch.no_grad():
        maps = network.encode(torch.randn(images, 3, crop, crop))

    def side(form: torch.memory_format) -> Side:
        own = copy.deepcopy(network).to(memory_format=form)

        def step() -> Tensor:
            given = [one.clone().requires_grad_() for one in maps]  # an encoder's maps are NCHW
            loss = own.grid_logits([one.contiguous(memory_format=form) for one in given]).square().mean()
            loss.backward()
            return loss.detach()

        return step

    before, now = side(torch.contiguous_format), side(torch.channels_last)
    torch.testing.assert_close(before(), now(), rtol=1e-4, atol=0.0)
    return before, now


def paired(before: Side, now: Side, pairs: int) -> list[tuple[float, float]]:
    """Seconds of the processor, (before, now) of each pair."""

    def timed(side: Side) -> float:
        begun = time.process_time()
        side()
        return time.process_time() - begun

    found = []
    for place in range(pairs):
        order = (before, now) if place % 2 == 0 else (now, before)
        times = {id(side): timed(side) for side in order}
        found.append((times[id(before)], times[id(now)]))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("chain", "casts", "layout"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--grid", type=int, default=GRID, help="cells of a side, of the chain")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--encoder", default="vit_base_patch16_224")
    parser.add_argument("--decoder", default="dpt")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sides = {
        "chain": lambda: chain(args.grid, args.images),
        "casts": lambda: casts(args.crop, args.images, args.encoder),
        "layout": lambda: layout(args.crop, args.images, args.encoder, args.decoder),
    }[args.what]()
    times = paired(*sides, args.pairs)
    before, now = (statistics.median(side) for side in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(
        f"{args.what}: before {before:.2f} s, now {now:.2f} s of the processor, ratio {ratio:.3f} ({args.pairs} pairs)"
    )


if __name__ == "__main__":
    main()
