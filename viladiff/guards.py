"""What ends a run early: Ctrl-C between two steps, too little memory, a loss that is not finite."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from viladiff.config import RunConfig


class TrainingError(ValueError):
    """Training cannot go on; the message says where it stopped and what to change."""


class Stopped(RuntimeError):
    """Whoever watches a run asked it to end early; its checkpoint is saved, and the same command goes on from it."""


class Renamed(ValueError):
    """A run's name is not the one that it was planned under: code, data or weights have changed since."""


@contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM, so that a step is never torn; a second one stops at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # trials of a sweep run in other threads, where no handler can be set
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    for number in old:
        signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def memory_errors(cfg: RunConfig) -> Iterator[None]:
    """Turns an allocation that fails into an error that names what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not out:
            raise
        data = cfg.data
        raise TrainingError(
            f"out of memory with data.batch_labelled = {data.batch_labelled}, "
            f"data.batch_unlabelled = {data.batch_unlabelled}, data.crop = {data.crop}, "
            f"train.accumulate = {cfg.train.accumulate} on {cfg.runtime.workers} workers: raise train.accumulate "
            f"(much the same result, less memory), lower data.crop or the batch ({str(error).splitlines()[0]})"
        ) from error


def check_finite(values: dict[str, float], step: int, steps: int, cfg: RunConfig, directory: Path) -> None:
    """Raises TrainingError if a loss term of this step is not finite; the message names the term and what to try."""
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if not broken:
        return
    terms = [name for name in broken if name != "total"] or broken
    kept = f"the checkpoint in {directory} is from before it" if (directory / "checkpoint.pt").exists() else ""
    raise TrainingError(
        f"the loss is {values[broken[0]]} at step {step} of {steps} (terms: {', '.join(terms)}) "
        f'with optim.lr = {cfg.optim.lr:g}, train.precision = "{cfg.train.precision}"; '
        f"try a lower optim.lr, optim.clip_norm=1 or train.precision=fp32. {kept}".strip()
    )
