"""Compilation of a method's networks, part by part: for calls that were tried, within a step, with fixed sizes.

A compiler's failure never ends a run. Each part is tried with each new kind of call, forwards and backwards and against
the part itself, before the call that trains; where that fails, the part stays as it is, and a line says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from viladiff.core.messages import print_text
from viladiff.models.mixe.denoiser import Denoiser
from viladiff.models.segmenter import Segmenter

CALLS = 6
"""Kinds of calls (sizes, types, gradients or not) that a part is compiled for; below torch's own limit of 8."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference that a compiled part may have, as a share of the largest number of its result."""


class Compiling:
    """What the parts of a method share: whether a step is under way, and the seconds left for trials."""

    def __init__(self, budget: float | None = None) -> None:
        self.on = False
        self.left = budget
        """None: no limit."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Compile within this context alone: elsewhere, as in evaluation, parts see images of other sizes."""
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on = before


class CompiledForward:
    """A part's ``forward`` that is compiled within steps; arguments and results are its own."""

    def __init__(self, path: str, part: nn.Module, compiling: Compiling, compiled: Callable[..., Any]) -> None:
        self.path, self.part, self.compiling = path, part, compiling
        self.plain, self.compiled = part.forward, compiled
        self.failed = False
        self._tried: set[Hashable] = set()

    def __call__(self, *args: Any) -> Any:
        if not self.compiling.on or self.failed or not self._admitted(args):
            return self.plain(*args)
        try:
            return self.compiled(*args)
        except Exception as error:  # a compiler's, or else that of the part, which is raised here once more
            found = self.plain(*args)
            self._give_up(error)
            return found

    def _admitted(self, args: tuple[Any, ...]) -> bool:
        """Return whether the part is compiled for this kind of call; try a new one."""
        kind = _kind(self.part, args)
        if kind in self._tried:
            return True
        left = self.compiling.left
        if len(self._tried) == CALLS or (left is not None and left <= 0):
            return False
        begun = time.monotonic()
        try:
            self._try(args)
        except Exception as error:
            self._give_up(error)
            return False
        finally:
            self._spend(time.monotonic() - begun)
        self._tried.add(kind)
        return True

    def _spend(self, seconds: float) -> None:
        if self.compiling.left is not None:
            self.compiling.left -= seconds
            if self.compiling.left <= 0 < self.compiling.left + seconds:
                print_text("note: the time for compilation is over; what is not compiled stays so", error=True)

    def _try(self, args: tuple[Any, ...]) -> None:
        """Compile the call forwards and backwards; leave neither gradients nor changed statistics nor draws behind.

        Raises ValueError if its numbers are others than those of the part; of a part that draws they are not compared.
        """
        given = _apart(args)
        with _undone(self.part, given), torch.no_grad():
            before = _generator_states(given)
            expected = list(_tensors(self.plain(*given)))
            drawn = any(not torch.equal(a, b) for a, b in zip(before, _generator_states(given), strict=True))
        with _undone(self.part, given):
            found = list(_tensors(self.compiled(*given)))
            for mine, theirs in zip(found, () if drawn else expected, strict=not drawn):
                _compare(mine.detach(), theirs)
            ends = [x for x in found if x.requires_grad]
            starts = [x for x in (*_tensors(given), *self.part.parameters()) if x.requires_grad]
            if ends:
                torch.autograd.grad(ends, starts, [torch.ones_like(x) for x in ends], allow_unused=True)

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        why = " ".join(said[:2] if said[0].endswith(":") else said[:1])
        print_text(f"note: {self.path} is not compiled: {why}", error=True)


def _kind(part: nn.Module, args: tuple[Any, ...]) -> Hashable:
    """Return all that a compiled call depends on beside numbers, as far as it changes within a run."""
    tensors = list(_tensors(args))
    device = tensors[0].device.type if tensors else "cpu"
    cast = torch.is_autocast_enabled(device) if torch.amp.is_autocast_available(device) else False
    modes = torch.is_grad_enabled(), part.training, cast
    return modes, tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in tensors)


def _compare(mine: Tensor, theirs: Tensor) -> None:
    limit = TOLERANCE.get(theirs.dtype)
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        raise ValueError("its result has another shape or type")
    if limit is None or not theirs.numel():
        return
    largest = theirs.abs().max().float()
    apart = (mine.float() - theirs.float()).abs().max()
    if largest.isfinite() and not bool(apart <= limit * largest):
        raise ValueError(f"its numbers are off by {float(apart):.2g} of {float(largest):.2g}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _apart(value: Any) -> Any:
    """Return arguments whose gradient ends with them."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    return type(value)(map(_apart, value)) if type(value) in (tuple, list) else value


def _generator_states(value: Any) -> list[Tensor]:
    gpus = {x.device for x in _tensors(value) if x.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in gpus)]


@contextmanager
def _undone(part: nn.Module, value: Any) -> Iterator[None]:
    """Restore statistics and generators at the end."""
    kept = [(buffer, buffer.clone()) for buffer in part.buffers()]
    with torch.random.fork_rng({x.device for x in _tensors(value) if x.is_cuda}):
        try:
            yield
        finally:
            for buffer, old in kept:
                buffer.data.copy_(old)  # a pass that is still to go backwards may have saved the buffer


def compiled_parts(method: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield dotted paths and parts that are compiled: encoders and decoders of networks, and a denoiser's body.

    What reads words, draws or chooses images stays outside, and so does what exchanges messages with other workers, who
    may not have compiled it.
    """
    for path, part in method.named_modules():
        if isinstance(part, Segmenter):
            found = [(f"{path}.encoder", part.encoder), (f"{path}.decoder", part.decoder)]
        else:
            found = [(path, part)] if isinstance(part, Denoiser) else []
        yield from (one for one in found if not any(isinstance(x, nn.SyncBatchNorm) for x in one[1].modules()))


def compile_parts(
    method: nn.Module,
    compiling: Compiling,
    backend: str | Callable[..., Any] = "inductor",
    fullgraph: bool = False,
) -> list[CompiledForward]:
    """Let the parts be compiled in steps of ``compiling``. Weights and their names stay as they are.

    ``fullgraph`` makes a graph break a failure.
    """
    found = []
    for path, part in compiled_parts(method):
        compiled = torch.compile(part.forward, backend=backend, dynamic=False, fullgraph=fullgraph)
        found.append(CompiledForward(path, part, compiling, compiled))
        setattr(part, "forward", found[-1])  # noqa: B010  (an attribute of this one, not its class's method)
    return found
