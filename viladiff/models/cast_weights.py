"""Casts of a method's weights to autocast's type: all in one operation a step, and their gradients in another.

Autocast casts each weight at its first use and each gradient on the way back, which starts as many kernels as there are
weights, twice. The numbers are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from viladiff.models.segmenter import Segmenter

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By the name of a precision; fp32 casts nothing."""


class _CastAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        cast = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(cast, list(weights))
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [(gradient, dtype) for gradient, dtype in zip(grads, ctx.dtypes, strict=True) if gradient is not None]
        cast = [torch.empty_like(gradient, dtype=dtype) for gradient, dtype in given]
        if cast:
            torch._foreach_copy_(cast, [gradient for gradient, _ in given])
        rest = iter(cast)
        return None, *(None if gradient is None else next(rest) for gradient in grads)


def cast_all(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the weights in ``dtype``; gradients of the copies reach the weights, in the weights' own type."""
    found: tuple[Tensor, ...] = _CastAll.apply(dtype, *weights)
    return found


class CastWeights:
    """Calls a model with the weights of its networks' linear layers and convolutions in autocast's type.

    ``exact``: dotted paths of parts that compute in float32 within a forward pass, which keep their weights. On a CPU
    and in fp32 the model is called as it is.
    """

    def __init__(self, model: nn.Module, device: torch.device, precision: str, exact: Sequence[str] = ()) -> None:
        self.model, self.dtype = model, TYPES.get(precision)
        on = self.dtype is not None and device.type in ("cuda", "meta")
        self.names = sorted(set(_castable(model, tuple(exact)))) if on else []

    def __call__(self, *args: Any) -> Any:
        """Return the model's result; to be called within autocast."""
        if not self.names:
            return self.model(*args)
        assert self.dtype is not None
        weights = {name: self.model.get_parameter(name) for name in self.names}
        cast: dict[str, Tensor] = {}
        for trained in (True, False):  # apart, since what is not trained needs no graph
            chosen = {name: weight for name, weight in weights.items() if weight.requires_grad is trained}
            if chosen:
                cast |= dict(zip(chosen, cast_all(list(chosen.values()), self.dtype), strict=True))
        return functional_call(self.model, cast, args)


def _castable(model: nn.Module, exact: tuple[str, ...]) -> Iterator[str]:
    """Yield the names of float32 weights that autocast would cast at their use: those of plain layers of networks."""
    for root, network in model.named_modules():
        if not isinstance(network, Segmenter):
            continue
        for path, layer in network.named_modules(prefix=root):
            own = path.removeprefix("module.")  # of a model that is spread over workers
            if type(layer) not in (nn.Linear, nn.Conv2d) or any(f"{own}.".startswith(f"{part}.") for part in exact):
                continue
            for name, weight in layer.named_parameters(prefix=path, recurse=False):
                if weight.dtype == torch.float32:
                    yield name
