"""Complexity of a network per image: parameters, arithmetic and time, with captions and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from viladiff.data.batch import TextBatch
from viladiff.models.segmenter import Network

WORDS = 32
"""Words of the caption that the cost with text is measured with."""


class Cost(NamedTuple):
    """Of one image of one size."""

    parameters: int
    """That the answer depends on."""
    flops: int
    """Of matrix products, convolutions and attention; a multiplication and an addition are two."""
    seconds: float
    """Median of a few passes after a first one."""


class TextFree(nn.Module):
    """(B, 3, H, W) normalised images to the visual stream's full-size logits (B, C, H, W); nothing else is computed."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.logits(self.network.encode(images), images.shape[-2:])


class WithText(nn.Module):
    """Images and captions to the logits of both streams."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(images, TextBatch(tokens, mask)).values())


def costs(network: Network, side: int, text_dim: int, words: int = WORDS, passes: int = 5) -> dict[str, Cost]:
    """Return the costs ``without text``, and for a network with ViLa ``with text``: both streams, ``words`` words.

    The image is side x side, the network in evaluation mode; a word has ``text_dim`` channels.
    """
    device = next(network.parameters()).device
    image = torch.zeros(1, network.encoder.inputs, side, side, device=device)
    found = {"without text": _cost(TextFree(network), (image,), passes)}
    if network.vila is not None:
        tokens = torch.zeros(1, words, text_dim, device=device)
        mask = torch.ones(1, words, dtype=torch.bool, device=device)
        found["with text"] = _cost(WithText(network), (image, tokens, mask), passes)
    return found


def _cost(module: TextFree | WithText, inputs: tuple[Tensor, ...], passes: int) -> Cost:
    parameters = _reached(module, inputs)
    # As two matrix products: not every version of the counter knows the fused attention of a CPU.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return Cost(parameters, counter.get_total_flops(), _seconds(lambda: module(*inputs), inputs[0].device, passes))


def _reached(module: TextFree | WithText, inputs: tuple[Tensor, ...]) -> int:
    """Count the parameters that the outputs depend on, by a backward pass on a small image, since size changes none."""
    side = 2 * module.network.patch
    small = (inputs[0][..., :side, :side], *inputs[1:])
    weights = {name: value.detach().requires_grad_() for name, value in module.named_parameters()}
    outputs = functional_call(module, weights, small)
    total = sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
    grads = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return sum(value.numel() for value, grad in zip(weights.values(), grads, strict=True) if grad is not None)


@torch.inference_mode()
def _seconds(once: Callable[[], object], device: torch.device, passes: int) -> float:
    times = []
    for _ in range(passes + 1):
        begun = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def cost_facts(found: dict[str, Cost], side: int, device: torch.device) -> dict[str, str]:
    """Format the costs as facts to print, one a line."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        f"{side} x {side} {name}": f"{cost.parameters:,} parameters, {cost.flops / 1e9:.3g} GFLOPs, "
        f"{cost.seconds * 1000:.3g} ms ({where})"
        for name, cost in found.items()
    }
