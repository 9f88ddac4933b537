"""Errors of training and checks before it: unusable inputs, interruption, memory, losses that are not finite."""

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
    from viladiff.data.batch import Views
    from viladiff.methods.base import Method
    from viladiff.models.segmenter import Segmenter
    from viladiff.runs.config import RunConfig
    from viladiff.runs.job import DataFacts


class TrainingError(ValueError):
    """Training cannot go on; the message says where it stopped and what to change."""


class StopRequested(RuntimeError):  # noqa: N818 - a signal, as StopIteration is
    """A request of the run's observer to end it early; its checkpoint is saved, and the same command resumes it."""


class RunIdMismatchError(ValueError):
    """A run's name is not the one that it was planned under: code, data or weights have changed since."""


def check_inputs(cfg: RunConfig, method: Method, data: DataFacts) -> None:
    """Raise ValueError, with what to change, for problems that only network and data together show.

    Too few images for the method, no captions, boxes that cut through cells of mixed maps, a crop that the networks
    or the method cannot take.
    """
    views, patch = method.required_views(), method.student.patch
    method.check_images(data.unlabelled)
    if (views.text or views.tags) and cfg.data.captions != "none" and not data.captions:
        raise ValueError(
            f"data.captions = {cfg.data.captions!r}: the data set {cfg.data.dataset!r} has no captions, which "
            f"method.name={cfg.method.name} reads; give a file of them (runtime.captions), or set "
            "data.captions=none to train it without words"
        )
    if views.cutmix and views.whole_cells and cfg.data.cutmix_grid == "pixel":
        raise ValueError(
            f"data.cutmix_grid: method.name={cfg.method.name} mixes feature maps, whose cells are patches, got 'pixel'"
            "; set data.cutmix_grid=patch"
        )
    _check_crop(cfg, views, patch, method.student)


def _check_crop(cfg: RunConfig, views: Views, patch: int, network: Segmenter) -> None:
    """Raise ValueError for a crop that is no multiple of the patch where encoder, decoder, boxes or method need one."""
    boxes = views.cutmix and cfg.data.cutmix_grid == "patch"
    light = views.unlabelled and not network.decoder.any_size
    if not cfg.data.crop % patch or not (boxes or light or views.whole_patches or not network.encoder.any_size):
        return
    below = cfg.data.crop // patch * patch
    fits = f"{below} or {below + patch}" if below else f"{patch}"
    free = network.side_multiple == 1 and not views.whole_patches
    raise ValueError(
        f"data.crop = {cfg.data.crop}: must be a multiple of the patch of model.encoder = {cfg.model.encoder!r}, "
        f"{patch}; nearest: {fits}{', or set data.cutmix_grid=pixel' if free else ''}"
    )


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
    """Turn a failed allocation into an error that names the fields to lower."""
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
            f"train.grad_accum_steps = {cfg.train.grad_accum_steps} on {cfg.runtime.workers} workers: raise "
            f"train.grad_accum_steps (much the same result, less memory), lower data.crop or the batch "
            f"({str(error).splitlines()[0]})"
        ) from error


def check_finite(values: dict[str, float], step: int, steps: int, cfg: RunConfig, directory: Path) -> None:
    """Raise TrainingError if a loss term of this step is not finite; the message names the term and possible fixes."""
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
