"""LayerNorm after a sum, and GroupNorm with an activation, as one or two operations in autocast's type.

Autocast runs norms in float32, with a cast before and one after them, and as many on the way back. On a GPU Triton's
kernels (``norm_kernels``) compute in float32 and read and write each tensor once in its own type, where they agree with
torch on a small example. Elsewhere, and under a compiler, which joins such operations itself, torch's own are called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.models.fused.agreement import kernels_agree, stands_for_gpu

ACTIVATIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "none": (0, lambda x: x),
    "relu": (1, F.relu),
    "silu": (2, F.silu),
}
"""Activations after a GroupNorm: their numbers in the kernels, and torch's functions."""
_READ = (torch.float32, torch.bfloat16, torch.float16)
"""Types that the kernels read."""


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Return LayerNorm ``norm`` of x (..., D), for a linear layer to read."""
    if not joins_norms(norm, x):
        found: Tensor = norm(x)
        return found
    assert isinstance(norm, nn.LayerNorm)
    out: Tensor = torch.ops.viladiff.layer_norm(x.contiguous(), norm.weight, norm.bias, norm.eps, _type())[0]
    return out


def added_and_normed(norm: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return x + y (..., D), and LayerNorm ``norm`` of it for a linear layer to read."""
    if not joins_norms(norm, x) or x.shape != y.shape:
        total = x + y
        return total, norm(total)
    assert isinstance(norm, nn.LayerNorm)
    given = x.contiguous(), y.contiguous(), norm.weight, norm.bias, norm.eps, _type()
    total, inner = torch.ops.viladiff.add_layer_norm(*given)[:2]
    return total, inner


def norm_act(norm: nn.GroupNorm, x: Tensor, act: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return an activation of ``ACTIVATIONS`` of GroupNorm ``norm`` of x (B, W, h, w), for a convolution to read.

    ``dtype``: the result's type where kernels make it; by default that of autocast.
    """
    number, function = ACTIVATIONS[act]
    if not _kernels(norm, x):
        return function(norm(x))
    given = norm.weight, norm.bias, [norm.num_groups, norm.eps, number], dtype or _type()
    x = x.contiguous()
    found: Tensor = torch.ops.viladiff.group_norm_act(x, torch.ops.viladiff.group_statistics(x.detach()), *given)
    return found


class NormActs(nn.Sequential):
    """Layers in order; a GroupNorm and a ReLU after it are one operation where ``norm_act`` has one."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's result."""
        layers = list(self)
        after = [*layers[1:], None]
        for layer, following, before in zip(layers, after, [None, *layers], strict=False):
            if isinstance(layer, nn.GroupNorm) and isinstance(following, nn.ReLU):
                x = norm_act(layer, x, "relu")
            elif not (isinstance(layer, nn.ReLU) and isinstance(before, nn.GroupNorm)):
                x = layer(x)
        return x


def _type() -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32


def joins_norms(norm: nn.Module, x: Tensor) -> bool:
    """Return whether LayerNorm ``norm`` of x (..., D) is an operation of kernels here."""
    if not isinstance(norm, nn.LayerNorm) or norm.bias is None or len(norm.normalized_shape) != 1:
        return False
    return _kernels(norm, x)


def _kernels(norm: nn.LayerNorm | nn.GroupNorm, x: Tensor) -> bool:
    # A network that was cast itself, as by half(), has numbers of that type throughout.
    if torch.compiler.is_compiling() or norm.weight.dtype != torch.float32 or x.dtype not in _READ:
        return False
    return stands_for_gpu(x) or (x.device.type == "cuda" and _agrees(x.device))


@lru_cache
def _agrees(device: torch.device) -> bool:
    """Try each kernel on a small example, the gradients too, and in half precision."""
    return kernels_agree(device, _example)


_Function = Callable[..., list[Tensor]]


def _example(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return results and gradients by the kernels and by torch."""
    drawn = torch.Generator().manual_seed(0)
    rows, more, maps, given = (
        torch.randn(*shape, generator=drawn).to(device) for shape in ((9, 24), (9, 24), (2, 6, 5, 7), (2, 6, 5, 7))
    )
    weights = [(torch.rand(n, generator=drawn) + 0.5).to(device) for n in (24, 24, 6, 6)]
    ops, full = torch.ops.viladiff, torch.float32

    def added(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
        return list(ops.add_layer_norm(x, y, w, b, 1e-5, full)[:2])

    def plain(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
        return [x + y, F.layer_norm(x + y, (24,), w, b, 1e-5)]

    def grouped(act: int) -> Callable[..., list[Tensor]]:
        return lambda x, w, b: [ops.group_norm_act(x, ops.group_statistics(x.detach()), w, b, [2, 1e-5, act], full)]

    def expected(act: int) -> Callable[..., list[Tensor]]:
        after = next(function for number, function in ACTIVATIONS.values() if number == act)
        return lambda x, w, b: [after(F.group_norm(x.float(), 2, w, b, 1e-5))]

    both: tuple[list[Tensor], list[Tensor]] = [], []
    half = maps.bfloat16()
    tried: tuple[tuple[_Function, _Function, tuple[Tensor, ...]], ...] = (
        *((added, plain, (rows, other, *weights[:2])) for other in (more, more.bfloat16())),
        (lambda x, w, b: [ops.layer_norm(x, w, b, 1e-5, full)[0]], lambda x, w, b: [F.layer_norm(x, (24,), w, b, 1e-5)],
         (rows, *weights[:2])),
        *((grouped(act), expected(act), (x, *weights[2:])) for act in (0, 1, 2) for x in (maps, half)),
    )  # fmt: skip
    for mine, theirs, inputs in tried:
        for found, function in zip(both, (mine, theirs), strict=True):
            found += _with_gradients(function, inputs, given if inputs[0].ndim == 4 else rows)
    return both


def _with_gradients(function: Callable[..., list[Tensor]], inputs: tuple[Tensor, ...], slope: Tensor) -> list[Tensor]:
    """Return results and gradients; those in half precision divided by 500, since they are rounded at the end."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    total = torch.stack([(slope * (i + 1) * x).sum() for i, x in enumerate(results)]).sum()
    slopes = torch.autograd.grad(total, leaves)
    return [x.detach() for x in results] + [x if x.dtype == torch.float32 else x.float() / 500 for x in slopes]


# Triton, as operations that torch knows


@torch.library.custom_op("viladiff::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from viladiff.models.fused.norm_kernels import layer_norm

    rows = x.flatten(0, -2)
    out = torch.empty_like(rows, dtype=dtype), *(torch.empty_like(rows[:, 0], dtype=torch.float32) for _ in range(2))
    layer_norm(rows, None, (weight, bias), eps, out)
    return out[0].view_as(x), out[1], out[2]


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    moments = (x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x, dtype=dtype), *moments  # type: ignore[return-value]


@torch.library.custom_op("viladiff::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from viladiff.models.fused.norm_kernels import layer_norm

    rows, other = x.flatten(0, -2), y.flatten(0, -2)
    total = torch.empty_like(rows, dtype=torch.promote_types(x.dtype, y.dtype))
    moments = (torch.empty_like(rows[:, 0], dtype=torch.float32) for _ in range(2))
    out = total, torch.empty_like(rows, dtype=dtype), *moments
    layer_norm(rows, other, (weight, bias), eps, out)
    return total.view_as(x), out[1].view_as(x), out[2], out[3]


@_add_layer_norm.register_fake
def _(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype))
    moments = (x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2))
    return total, torch.empty_like(x, dtype=dtype), *moments  # type: ignore[return-value]


@torch.library.custom_op("viladiff::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    slope: Tensor, straight: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    from viladiff.models.fused.norm_kernels import layer_gradient

    given = slope.contiguous().flatten(0, -2), None if straight is None else straight.contiguous().flatten(0, -2)
    at_x, _, parts = layer_gradient(*given, x.flatten(0, -2), weight, (mean, scale), x.dtype)
    return at_x.view_as(x), parts


@_layer_norm_backward.register_fake
def _(
    slope: Tensor, straight: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(2, min(len(mean), 512), len(weight))


@torch.library.custom_op("viladiff::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
    slope: Tensor, straight: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from viladiff.models.fused.norm_kernels import layer_gradient

    given = slope.contiguous().flatten(0, -2), None if straight is None else straight.contiguous().flatten(0, -2)
    at_x, at_y, parts = layer_gradient(*given, x.flatten(0, -2), weight, (mean, scale), dtype)
    return at_x.view_as(x), at_y.view_as(x), parts


@_add_layer_norm_backward.register_fake
def _(
    slope: Tensor, straight: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype), weight.new_empty(2, min(len(mean), 512), len(weight))


def _keep_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], *output[1:])


def _layer_backward(ctx: Any, slope: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    at_x, parts = torch.ops.viladiff.layer_norm_backward(slope, None, *ctx.saved_tensors)
    weight, bias = parts.sum(1).unbind(0)
    return at_x, weight, bias, None, None


_layer_norm.register_autograd(_layer_backward, setup_context=_keep_layer)


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.types = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(output[0], inputs[2], *output[2:])


def _sum_backward(ctx: Any, straight: Tensor | None, slope: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    first, second = ctx.types
    if slope is None:  # the norm was not read
        return straight, None if straight is None else straight.to(second), None, None, None, None
    given = slope, straight, *ctx.saved_tensors
    if ctx.saved_tensors[0].dtype == second:
        at_x, parts = torch.ops.viladiff.layer_norm_backward(*given)
        at_y = at_x
    else:
        at_x, at_y, parts = torch.ops.viladiff.add_layer_norm_backward(*given, second)
    weight, bias = parts.sum(1).unbind(0)
    return at_x.to(first), at_y, weight, bias, None, None


_add_layer_norm.register_autograd(_sum_backward, setup_context=_keep_sum)


@torch.library.custom_op("viladiff::group_statistics", mutates_args=())
def _group_statistics(x: Tensor) -> Tensor:
    from viladiff.models.fused.norm_kernels import group_statistics

    return group_statistics(x)


@_group_statistics.register_fake
def _(x: Tensor) -> Tensor:
    # The second one's true length is the kernels' own affair.
    return x.new_empty(x.shape[0] * x.shape[1], 1, 2, dtype=torch.float32)


@torch.library.custom_op("viladiff::group_norm_act", mutates_args=())
def _group_norm_act(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, rule: list[float], dtype: torch.dtype
) -> Tensor:
    from viladiff.models.fused.norm_kernels import group_norm

    out = torch.empty_like(x, dtype=dtype)
    group_norm(x, stats, (weight, bias), rule, out)
    return out


@_group_norm_act.register_fake
def _(x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, rule: list[float], dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("viladiff::group_norm_sums", mutates_args=())
def _group_norm_sums(
    slope: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, rule: list[float]
) -> Tensor:
    from viladiff.models.fused.norm_kernels import group_sums

    return group_sums(slope, x, stats, (weight, bias), rule)


@_group_norm_sums.register_fake
def _(slope: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, rule: list[float]) -> Tensor:
    return torch.empty_like(stats)


@torch.library.custom_op("viladiff::group_norm_backward", mutates_args=())
def _group_norm_backward(
    slope: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    parts: Tensor,
    rule: list[float],
) -> Tensor:
    from viladiff.models.fused.norm_kernels import group_gradient

    return group_gradient(slope, x, stats, (weight, bias), parts, rule)


@_group_norm_backward.register_fake
def _(
    slope: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    parts: Tensor,
    rule: list[float],
) -> Tensor:
    return torch.empty_like(x)


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rule = inputs[4]


def _group_backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    x, stats, weight, bias = ctx.saved_tensors
    slope = slope.contiguous()
    parts = torch.ops.viladiff.group_norm_sums(slope, x, stats, weight, bias, ctx.rule)
    at_x = torch.ops.viladiff.group_norm_backward(slope, x, stats, weight, bias, parts, ctx.rule)
    at_weight, at_bias = parts.view(len(x), x.shape[1], -1, 2).sum((0, 2)).unbind(1)
    return at_x, None, at_weight, at_bias, None, None


_group_norm_act.register_autograd(_group_backward, setup_context=_keep_group)
