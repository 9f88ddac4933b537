"""Checkpoints of a run in training: when one is due, its copy in host memory, and the thread that writes the copy."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from viladiff.data.loading.pace import LoaderPace
from viladiff.evaluation.evaluator import PeakMemory
from viladiff.methods.base import Method
from viladiff.runs.checkpoint import load_checkpoint, previous, save_checkpoint
from viladiff.training.gradients import GradientShares
from viladiff.training.optim import Optimizer


class HostCopy:
    """Copies of a state's tensors in host memory; the next copy reuses the memory of tensors of the same place."""

    def __init__(self, device: torch.device) -> None:
        """``device``: of the state. For a GPU's the memory is page-locked, so that it copies at the rate of its bus."""
        self._device, self._pinned = device, device.type == "cuda"
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a copy that later changes of ``state`` do not reach; the copy of the last call is overwritten."""
        used: dict[str, Tensor] = {}
        copied: dict[str, Any] = self._copied(state, "", used)
        if self._pinned:
            torch.cuda.synchronize(self._device)
        self._buffers = used
        return copied

    def release(self) -> None:
        """Let go of the memory."""
        self._buffers = {}

    def _copied(self, value: Any, place: str, used: dict[str, Tensor]) -> Any:
        if isinstance(value, Tensor):
            buffer = self._buffers.get(place)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty_like(value, device="cpu", pin_memory=self._pinned, requires_grad=False)
            used[place] = buffer
            return buffer.copy_(value, non_blocking=self._pinned)
        if isinstance(value, dict):
            made = copy.copy(value)  # with the attributes of a module's state
            for name, item in value.items():
                made[name] = self._copied(item, f"{place}/{name}", used)
            return made
        if isinstance(value, list | tuple):
            return type(value)(self._copied(item, f"{place}/{i}", used) for i, item in enumerate(value))
        return value


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time, each from a copy of the state, beside the last whole one.

    An error of the thread is raised by the next call of ``due``, ``save`` or ``wait``. As a context it waits for the
    thread when it ends, so that no thread outlives the lease under which it writes; an interrupt abandons the write.
    """

    def __init__(self, path: Path, minutes: float, device: torch.device, proceed: Callable[[], None]) -> None:
        """``minutes``: between two checkpoints by time; ``proceed`` raises where nothing may be written any more."""
        self.path, self.minutes = path, minutes
        self._copy = HostCopy(device)
        self._allowed = proceed
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._begun = time.monotonic()

    def due(self) -> bool:
        """Return whether a checkpoint is due by time; never while one is being written, so that none waits for it."""
        self._raise()
        writing = self._thread is not None and self._thread.is_alive()
        return not writing and time.monotonic() - self._begun >= 60 * self.minutes

    def save(self, state: dict[str, Any]) -> None:
        """Copy the state and begin to write the copy, after the end of the write before.

        Raises OSError, or what ``proceed`` raised, if that write failed.
        """
        self.wait()
        self._begun = time.monotonic()
        given = (self._copy.take(state),)
        self._thread = threading.Thread(target=self._write, args=given, name=f"writer of {self.path}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the end of the write. Raises as ``save``."""
        self._join()
        self._raise()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # A checkpoint from before an error in training is worth its seconds; a second Ctrl-C is not to wait for it.
        self._abandoned = error is not None and not isinstance(error, Exception)
        self._join()
        self._copy.release()
        if error is None:
            self._raise()

    def _join(self) -> None:
        if self._thread is not None:
            try:
                self._thread.join()
            except BaseException:
                self._abandoned = True
                raise
            self._thread = None

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, state: dict[str, Any]) -> None:
        try:
            self._proceed()
            if self.path.exists():  # else the previous one is all there is
                previous(self.path).unlink(missing_ok=True)
            save_checkpoint(self.path, state, proceed=self._proceed)
        except BaseException as error:
            self._error = error

    def _proceed(self) -> None:
        if self._abandoned:
            raise InterruptedError(f"{self.path}: not written, since the run was interrupted")
        self._allowed()


class Resumable(Protocol):
    """A run in training, as a checkpoint keeps it."""

    directory: Path
    method: Method
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    shares: GradientShares
    memory: PeakMemory
    history: list[dict[str, Any]]
    step: int
    steps: int
    train_seconds: float
    cpu_seconds: float | None
    pace: LoaderPace
    wall_before: float | None

    def wall_seconds(self) -> float | None:
        """Return the seconds of all legs; None if unknown."""
        ...


def state_of(run: Resumable) -> dict[str, Any]:
    """Return what a run goes on from; after its last step without the optimiser's state, which nothing reads again."""
    done = run.step == run.steps
    return {
        "method": run.method.state_dict(),
        "optimizer": {"name": run.optimizer.name} if done else run.optimizer.state_dict(),
        "scaler": {} if done else run.scaler.state_dict(),
        "step": run.step,
        "history": run.history,
        "gradient_shares": run.shares.found,
        "train_seconds": run.train_seconds,
        "cpu_seconds": run.cpu_seconds,
        "waited_seconds": run.pace.waited,
        "wall_seconds": run.wall_seconds(),
        "peak_memory": run.memory.bytes(),
    }


def restore(run: Resumable) -> None:
    """Bring a run to its newest checkpoint; without one it stays as it is.

    Raises ValueError, with the file and what to do, for a checkpoint that is damaged, of another version of the model
    or of another optimiser, and for one without the optimiser's state that is not at the last step.
    """
    here = run.directory / "checkpoint.pt"
    state = load_checkpoint(here)
    if state is None:
        return
    try:
        run.method.load_state_dict(state["method"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{here} is of another version of this model ({reason}); "
            "start over (viladiff train --restart), or go back to the version that wrote it"
        ) from error
    try:
        run.optimizer.check_name(state["optimizer"])
        if state["step"] < run.steps:
            run.optimizer.load_state_dict(state["optimizer"])
            run.scaler.load_state_dict(state["scaler"])
    except ValueError as error:
        raise ValueError(f"{here}: {error}; start over (viladiff train --restart)") from error
    run.step, run.history, run.train_seconds = state["step"], state["history"], state["train_seconds"]
    run.wall_before, run.memory.before = state.get("wall_seconds"), state.get("peak_memory")
    run.cpu_seconds, run.pace.waited = state.get("cpu_seconds"), state.get("waited_seconds")
    run.shares.found = state.get("gradient_shares", [])
