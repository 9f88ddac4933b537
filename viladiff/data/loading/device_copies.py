"""Copies from the host to a device that nobody waits for: from page-locked memory, on a stream of the loader's own.

On a CPU nothing is copied and there are no streams.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from viladiff.data.batch import Batch


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on ``device``; on a GPU by a copy in the current stream that the host does not await.

    The tensor's memory may be written again at once: on a GPU it is copied to page-locked memory first, which torch
    keeps until the copy is done. On a CPU the tensor itself is returned.
    """
    # A graph that is being recorded for export has no memory to lock.
    if device.type != "cuda" or torch.compiler.is_compiling():
        return tensor.to(device)
    if not torch.cuda.is_available():  # a device that tensors without content name, which has no memory to lock
        return tensor.to(device, non_blocking=True)
    return tensor.pin_memory().to(device, non_blocking=True)


class Prepared(NamedTuple):
    """Batches of a step, whose tensors the device may still be writing."""

    batches: list[Batch]
    ready: torch.cuda.Event | None
    """Reached once they are written."""


class LoaderStream:
    """The stream on which batches are made beside training, and the way from there to training's stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prepare(self, steps: Generator[list[Batch], None, None]) -> Generator[Prepared, None, None]:
        """Make each step's batches on this stream; for the thread that loads. Closes ``steps`` at the end."""
        with closing(steps):
            while True:
                with self._on_stream():
                    batches = next(steps, None)
                    if batches is None:
                        return
                    ready = None
                    if self._stream is not None:
                        ready = torch.cuda.Event()
                        ready.record(self._stream)
                yield Prepared(batches, ready)

    def receive(self, prepared: Generator[Prepared, None, None]) -> Generator[list[Batch], None, None]:
        """Yield the batches once the current stream waits for them; for the thread that trains.

        Closes ``prepared`` at the end.
        """
        with closing(prepared):
            for batches, ready in prepared:
                if ready is not None:
                    here = torch.cuda.current_stream(self.device)
                    here.wait_event(ready)
                    # Or their memory, which belongs to the loader's stream, is given out again while training reads it.
                    for tensor in (tensor for batch in batches for tensor in batch.tensors()):
                        tensor.record_stream(here)
                yield batches

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
