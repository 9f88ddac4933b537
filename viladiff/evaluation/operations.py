"""Counts of what a piece of work asks of a device: operations by module, and the memory that is alive at once.

Both look at every operation below autograd, forward and backward, on real tensors and on those without content.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from viladiff.evaluation.step_time import Kind, Load

NO_KERNEL = frozenset(
    [
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"),
        *("_unsafe_view", "alias", "lift", "lift_fresh", "is_same_size"),
    ]
)
"""Operations that are no views by name and start no kernel: they allocate, or they say what is known."""
_ATTENTION = ("scaled_dot_product", "_flash_attention", "_efficient_attention")
_FLOAT16 = (torch.bfloat16, torch.float16)


class Line(NamedTuple):
    """Equal operations of one module."""

    module: str
    """Dotted path of the innermost module that the operation belongs to; "" outside of all."""
    operation: str
    """Its name in torch's list, as ``aten::addmm``."""
    load: Load


class OperationCounter(TorchDispatchMode):
    """Counts the operations that start a kernel within its context, by module.

    Views, and operations that only allocate, start none. Composite operations are counted as those that they are made
    of. Bytes are those of all inputs and outputs; of an expanded tensor those that it has in memory. FLOPs are those of
    products, convolutions and attention: a multiplication and an addition are two. In a backward pass an operation
    belongs to the module whose output's gradient was computed last.

    root: the module whose parts are told apart.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._names = {id(module): name for name, module in root.named_modules()}
        self._meta = any(x.is_meta for x in root.parameters())
        self._counts: Counter[tuple[str, str, Kind, bool, int, int]] = Counter()
        self._stack = [""]
        self._nodes: dict[object, None] = {}
        self.phase = ""
        """Name that work outside of all modules gets."""
        self._backward: str | None = None

    def lines(self) -> list[Line]:
        """Return what was counted, equal operations together."""
        return [
            Line(module, name, Load(kind, half, flops, size, count))
            for (module, name, kind, half, flops, size), count in self._counts.items()
        ]

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Follow which module is at work."""
        hooks = register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._nodes.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace != "prim" and not func.is_view and name not in NO_KERNEL:
            self._count(func, name, (args, kwargs), out)
        return out

    def _count(self, func: Any, name: str, given: tuple[Any, dict[str, Any]], out: Any) -> None:
        # A copy does not read its place.
        inputs = (given[0][1:], given[1]) if name in ("copy_", "_foreach_copy_") else given
        read = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if self._meta and not any(x.is_meta for x in (*read, *written)):
            return  # the host's own, beside a device that tensors without content stand for
        if not written and name.endswith("_"):
            written = list(_written(name, given[0]))
        formula = flop_registry.get(func.overloadpacket)
        if name == "convolution_backward":
            flops = _convolution_backward(*given[0])
        else:
            flops = 0 if formula is None else int(formula(*given[0], **given[1], out_val=out))
        floats = [x.dtype for x in (*read, *written) if x.is_floating_point()]
        key = (
            self._where(),
            f"{func.namespace}::{name}",
            _kind(name, formula is not None),
            bool(floats) and floats[0] in _FLOAT16,
            flops,
            sum(map(_in_memory, (*read, *written))),
        )
        self._counts[key] += 1

    def _where(self) -> str:
        if len(self._stack) > 1:
            return self._stack[-1]
        return self.phase if self._backward is None else self._backward

    # Which module is at work: the stack of calls forwards; backwards, marks at the nodes between modules.

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._mark(args, self._stack[-1])
        self._stack.append(self._names.get(id(module), self._stack[-1]))

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._mark(out, self._stack[-1])
        self._stack.pop()

    def _mark(self, value: Any, name: str) -> None:
        for tensor in _tensors(value):
            node = tensor.grad_fn
            if node is not None and node not in self._nodes:
                self._nodes[node] = None
                node.register_prehook(self._entering(name))

    def _entering(self, name: str) -> Callable[[Any], None]:
        def note(grads: Any) -> None:
            self._backward = name

        return note

    def begin(self, phase: str) -> None:
        """Call what follows, outside of modules, by this name."""
        self.phase, self._backward = phase, None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a module's arguments or result, one level of containers deep and in dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (x for x in value.values() if isinstance(x, Tensor))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _written(name: str, args: tuple[Any, ...]) -> Iterator[Tensor]:
    """Yield the tensors that an operation over lists of tensors changes in place: the first; all but the gradients."""
    lists = [x for x in args if isinstance(x, list | tuple)]
    chosen = [lists[0], *lists[2:]] if name.startswith("_fused") else lists[:1]
    yield from (x for some in chosen for x in some if isinstance(x, Tensor))


def _convolution_backward(gradient: Tensor, image: Tensor, weight: Tensor, *rest: Any) -> int:
    """Return the FLOPs of the gradients of input and weight that are asked for, each as many as the forward pass has.

    torch's own formula counts those of grouped convolutions as if they were not grouped.
    """
    transposed, asked = rest[4], rest[-1]
    maps = image if transposed else gradient
    forward = 2 * weight.numel() * maps.shape[0] * math.prod(maps.shape[2:])
    return forward * (int(asked[0]) + int(asked[1]))


def _kind(name: str, counted: bool) -> Kind:
    if not counted:
        return "other"
    if any(part in name for part in _ATTENTION):
        return "attention"
    return "convolution" if "conv" in name else "product"


def _in_memory(x: Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class LiveMemory(TorchDispatchMode):
    """Follows the bytes of all tensors that are alive: those ``held`` before and those that operations make within.

    What a kernel allocates for itself alone is not seen, and no fragment of an allocator.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        """The most bytes at once."""
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in held:
            self._follow(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._follow(x)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, size).atexit = False

    def _gone(self, size: int) -> None:
        self.live -= size


def outline(lines: Iterable[Line], depth: int = 2) -> dict[str, list[Load]]:
    """Return the loads by the first ``depth`` names of their modules, the largest in bytes first."""
    found: dict[str, list[Load]] = {}
    for line in lines:
        found.setdefault(".".join(line.module.split(".")[:depth]), []).append(line.load)
    return dict(sorted(found.items(), key=lambda item: -math.fsum(x.bytes * x.times for x in item[1])))
