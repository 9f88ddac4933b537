"""Autocast and fused attention for tensors without content, which torch has for real devices alone.

What is cast, and to what, is that of torch's autocast on CUDA (its documentation, "CUDA Op-Specific Behavior").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOW = (
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.chain_matmul),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
)
_FULL = (
    *(F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.softmax, torch.softmax, Tensor.softmax),
    *(F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.cross_entropy, F.nll_loss, F.cosine_similarity),
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.kl_div, F.softplus, F.normalize, torch.norm, Tensor.norm, torch.cdist),
    *(torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow, Tensor.pow, Tensor.__pow__, torch.cumsum, Tensor.cumsum),
    *(torch.prod, Tensor.prod, torch.rsqrt, Tensor.rsqrt, torch.reciprocal, Tensor.reciprocal, torch.logsumexp),
)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class MetaPrecision(TorchFunctionMode):
    """Computes on the meta device as a GPU would under ``torch.autocast("cuda", dtype)``; float32 casts nothing.

    It holds within ``autocast`` alone; attention is one operation throughout.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Cast within; ``torch.autocast("cuda", enabled=False)`` ends it for a part, as on a GPU."""
        before = torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", self.dtype != torch.float32)
        torch.set_autocast_dtype("cuda", self.dtype if self.dtype != torch.float32 else before)
        try:
            yield
        finally:
            torch.set_autocast_dtype("cuda", before)
            torch.set_autocast_enabled("cuda", False)
            self._casts.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        attention = func is F.scaled_dot_product_attention
        if torch.is_autocast_enabled("cuda"):
            if attention or func in _LOW:
                args, kwargs = self._cast(args, self.dtype), self._cast(kwargs, self.dtype)
            elif func in _FULL:
                args, kwargs = self._cast(args, torch.float32), self._cast(kwargs, torch.float32)
        return _attention(*args, **kwargs) if attention else func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return value if value.dtype == dtype or value.dtype not in _FLOATS else self._to(value, dtype)
        if isinstance(value, tuple | list):
            return type(value)(self._cast(x, dtype) for x in value)
        if isinstance(value, dict):
            return {name: self._cast(x, dtype) for name, x in value.items()}
        return value

    def _to(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast; a weight that is trained is cast once within ``autocast``, with its graph also where none is asked for.

        A pass without gradient may come first, and the trained one reads the same copy.
        """
        if not (value.requires_grad and value.is_leaf):
            return value.to(dtype)
        if id(value) not in self._casts:
            with torch.enable_grad():
                self._casts[id(value)] = value, value.to(dtype)
        return self._casts[id(value)][1]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **rest: Any,
) -> Tensor:
    """Return ``F.scaled_dot_product_attention`` by one kernel: flash attention, or one that takes a mask."""
    if query.ndim != 4:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **rest)
    if attn_mask is None and query.shape[-1] == value.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.empty_like(attn_mask, dtype=query.dtype)
        bias = bias.expand(*query.shape[:2], query.shape[-2], key.shape[-2])
    needs_grad = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_grad, dropout_p, is_causal
    )[0]
