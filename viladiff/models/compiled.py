"""Compilation of a method's networks, part by part, where shapes stay the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import contextmanager

import torch
from torch import nn

from viladiff.core.messages import print_text
from viladiff.models.mixe.denoiser import Denoiser
from viladiff.models.segmenter import Segmenter

BUDGET = 120.0
"""Seconds within which a compiler has to have shown that it works, before a method is compiled."""


def compiled_parts(method: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield dotted paths and parts that are compiled: encoders and decoders of networks, and a denoiser's body.

    What reads words, draws or chooses images stays outside, and so do sizes that change within a run.
    """
    for path, part in method.named_modules():
        if isinstance(part, Segmenter):
            yield f"{path}.encoder", part.encoder
            yield f"{path}.decoder", part.decoder
        elif isinstance(part, Denoiser):
            yield path, part


def compile_parts(method: nn.Module, backend: str = "inductor", fullgraph: bool = False) -> list[str]:
    """Compile the parts in place, with fixed sizes; return their paths. Weights and their names stay as they are.

    The first call of each part compiles. ``fullgraph`` makes a graph break an error.
    """
    found = []
    for path, part in compiled_parts(method):
        part.compile(backend=backend, dynamic=False, fullgraph=fullgraph)
        found.append(path)
    return found


def compiler_works(device: torch.device, budget: float = BUDGET, try_it: Callable[[], object] | None = None) -> bool:
    """Return whether a small layer compiles and runs, both ways, within ``budget`` seconds; say why if not."""

    def small() -> object:
        layer = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)).to(device)
        total = torch.compile(layer, dynamic=False)(torch.ones(4, 8, device=device)).sum()
        return torch.autograd.grad(total, list(layer.parameters()))

    started, pool = time.monotonic(), ThreadPoolExecutor(1)
    try:
        pool.submit(try_it or small).result(budget)
        return True
    except Late:
        why = f"it took more than {budget:.0f} s"
    except Exception as error:  # whatever a compiler says of a system that it does not know
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    print_text(f"note: nothing is compiled ({why}, after {time.monotonic() - started:.0f} s)", error=True)
    return False


_forced = False


def force_eager() -> None:
    """Let compiled parts run eagerly in this process, but where another stance is set, until ``stance_restored``."""
    global _forced
    torch.compiler.set_stance("force_eager")
    _forced = True


@contextmanager
def stance_restored() -> Iterator[None]:
    """Undo ``force_eager`` at the end: other code of the process may compile as well."""
    global _forced
    try:
        yield
    finally:
        if _forced:
            torch.compiler.set_stance("default")
            _forced = False
