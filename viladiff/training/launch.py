"""The device of each worker, and several workers on one machine without a launcher."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import SimpleQueue, get_context
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from viladiff.core.atomic import hold
from viladiff.core.distributed import autocast, join_here, tf32
from viladiff.core.messages import print_text
from viladiff.data.batch import Losses, Step
from viladiff.data.sources import embedded_datasets
from viladiff.methods.base import Method
from viladiff.models.cast_weights import CastWeights
from viladiff.models.compiled import Compiling, compile_parts
from viladiff.runs.config import RunConfig
from viladiff.training.errors import TrainingError
from viladiff.training.step_work import LATE, TEXT_DIM, empty_batch, empty_method


def select_device(cfg: RunConfig) -> torch.device:
    """Return the device of this worker. Raises ValueError if CUDA is requested and absent."""
    available = torch.cuda.is_available()
    if cfg.runtime.device == "cuda" and not available:
        raise ValueError('runtime.device = "cuda": this machine has no usable CUDA device (use auto or cpu)')
    if cfg.runtime.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap this worker's copy of a module so that its gradients are those of the global batch.

    Gradients lie in the buckets that are sent, so that none is held twice. Buffers are not sent at each step: each
    worker computes the same, or averages its own (``viladiff.models.batch_norm``).
    """
    kind = nn.parallel.DistributedDataParallel
    # The field has another name from torch 2.13 on, where the old one warns at each use.
    new = "forward_sync_buffers" in inspect.signature(kind).parameters
    quiet: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    ids = [device.index] if device.type == "cuda" else None
    return kind(module, device_ids=ids, gradient_as_bucket_view=True, **quiet)


def join_group(cfg: RunConfig) -> None:
    """Join the group that torchrun announces in the environment. Raises ValueError if it has another size."""
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        return
    announced = int(os.environ["WORLD_SIZE"])
    if announced != cfg.runtime.workers:
        raise ValueError(f"runtime.workers = {cfg.runtime.workers}, but the launcher started {announced} processes")
    if announced > 1:
        dist.init_process_group(_backend(cfg, announced))


def _backend(cfg: RunConfig, workers: int) -> str:
    """Return the backend; nccl needs a GPU of its own for every worker of this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", workers))
    return "nccl" if select_device(cfg).type == "cuda" and torch.cuda.device_count() >= here else "gloo"


BUDGET = 120.0
"""Seconds that compilation may take: in a process that tries it, and once more in the run."""


MANY = 30_000
"""Steps from which a run may spend two budgets on compilation: 8 ms a step, a fifth of ViLaDiff's estimate."""


def compiles(cfg: RunConfig, classes: int, device: torch.device, steps: int) -> bool:
    """Return whether the networks of a run of ``steps`` are compiled; with auto a process tries it first.

    To be called before the run takes memory of the GPU, since the trial needs as much. All workers must call it; the
    first one's answer holds. Raises ValueError for ``runtime.compile`` = on where it cannot be.
    """
    choice, shares = cfg.runtime.compile, cfg.runtime.gradient_shares
    if choice == "on" and shares:
        raise ValueError(
            f"runtime.compile = on: a compiled part goes backwards once, and runtime.gradient_shares = {shares} needs "
            "it more often; set one of the two to off or 0"
        )
    if choice != "auto":
        return choice == "on"
    if device.type != "cuda" or shares or steps < MANY or cfg.data.dataset in embedded_datasets():
        return False
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return trial_passes(cfg, classes, device)
    passed = torch.tensor(float(dist.get_rank() == 0 and trial_passes(cfg, classes, device)), device=device)
    dist.broadcast(passed, 0)
    return bool(passed)


def trial_passes(
    cfg: RunConfig, classes: int, device: torch.device, budget: float = BUDGET, backend: str = "inductor"
) -> bool:
    """Return whether a step of these networks compiles within ``budget`` seconds in a process of its own.

    What ends or hangs that process leaves the run alone; what it compiles is in the compiler's cache. A line says why
    if not.
    """
    given = json.dumps([cfg.model_dump(mode="json"), classes, str(device), backend])
    command, pipe = [sys.executable, "-c", f"from {__name__} import try_compiled; try_compiled()"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True, start_new_session=True) as child:
        try:
            lines = child.communicate(given, budget)[1].strip().splitlines() or [f"exit status {child.returncode}"]
            faults = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")] or lines[-1:]
            why = faults[0] if child.returncode else ""
        except subprocess.TimeoutExpired:
            why = f"it took more than {budget:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # the compiler's own processes too
    if why:
        print_text(f"note: nothing is compiled ({why})", error=True)
    return not why


def try_compiled() -> None:
    """Take a first and a late step of a run's method, with weights that are drawn, in the process of a trial."""
    signal.alarm(int(2 * BUDGET))  # whoever waits for it may be gone
    dump, classes, place, backend = json.load(sys.stdin)
    cfg, device = RunConfig(**dump), torch.device(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    method = empty_method(cfg, [f"class {i}" for i in range(classes)], TEXT_DIM).to(device).train()
    batch = empty_batch(cfg, method.required_views(), classes).to(device)
    compiling = Compiling()
    parts = compile_parts(method, compiling, backend)
    forward = CastWeights(method, device, cfg.train.precision, method.exact)
    with tf32(cfg.train.tf32):
        for step in (Step(0, 0.0, 0), LATE):
            with autocast(device, cfg.train.precision), compiling.step():
                total = forward(batch, step).total
            torch.autograd.grad(total, [x for x in method.parameters() if x.requires_grad], allow_unused=True)
    sys.exit(int(any(part.failed for part in parts)))


def step_forward(
    cfg: RunConfig, model: nn.Module, method: Method, device: torch.device, compiled: bool
) -> Callable[..., Losses]:
    """Return ``model`` as a step calls it: with weights cast at once and, if asked for, with ``compiled`` parts.

    Only within these calls are parts compiled: elsewhere they see images of other sizes.
    """
    forward = CastWeights(model, device, cfg.train.precision, method.exact)
    if not compiled:
        return forward
    compiling = Compiling(BUDGET if cfg.runtime.compile == "auto" else None)
    compile_parts(method, compiling)

    def in_step(*args: object) -> Losses:
        with compiling.step():
            found: Losses = forward(*args)
        return found

    return in_step


def run_in_processes(work: Callable[..., str], cfg: RunConfig, workers: int, *arguments: object) -> str:
    """Run ``work(cfg, *arguments)`` in ``workers`` new processes that form a group; return the first's short answer.

    work is a function of a module, since new processes look it up by name. A worker's error is raised here.
    """
    _refuse_unguarded()
    queue: SimpleQueue = get_context("spawn").SimpleQueue()
    # Workers get a terminal's Ctrl-C themselves and stop together; this process only waits for them.
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[_STARTING] = str(os.getpid())
    failure: Exception | None = None
    held: int | None = None
    try:
        dump = cfg.model_dump(mode="json")
        with tempfile.TemporaryDirectory(prefix=f"viladiff-{os.getpid()}-", ignore_cleanup_errors=True) as meeting:
            held = hold(Path(meeting))  # else a driver in another container removes it as a dead one's
            spawn(_worker, (work, dump, workers, arguments, _backend(cfg, workers), meeting, queue), workers)
    except ProcessRaisedException as error:
        failure = error
    except ProcessExitedException as error:
        failure = ValueError(_UNGUARDED.format(workers)) if error.exit_code == UNGUARDED_EXIT else error
    finally:
        os.environ.pop(_STARTING, None)
        signal.signal(signal.SIGINT, old)
        if held is not None:
            os.close(held)
    kind, text = ("", "") if queue.empty() else queue.get()
    if kind == "done":
        return text
    if kind in _RAISED:
        raise _RAISED[kind](text) from None
    raise failure or RuntimeError("the workers ended without a result")


def _refuse_unguarded() -> None:
    """End a new process that reads the caller's script again and comes to the call that started it."""
    if os.environ.get(_STARTING) == str(os.getppid()):
        os._exit(UNGUARDED_EXIT)  # an error here would be one more traceback for each worker


_STARTING = "VILADIFF_STARTING_WORKERS"
"""Process that is starting workers; each of them leaves it once it has come to its own work."""
UNGUARDED_EXIT = 83
"""Exit status of a worker that did not come to its own work."""
_UNGUARDED = (
    "runtime.workers = {}: each worker imports the script that started it, which calls again; put the call under "
    'if __name__ == "__main__": in the script'
)

_RAISED: dict[str, type[BaseException]] = {
    "KeyboardInterrupt": KeyboardInterrupt,
    "OSError": OSError,
    "TrainingError": TrainingError,
    "ValueError": ValueError,
}


def _worker(
    rank: int,
    work: Callable[..., str],
    dump: dict,
    workers: int,
    arguments: tuple,
    backend: str,
    meeting: str,
    queue: SimpleQueue,
) -> None:
    os.environ.pop(_STARTING, None)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent ignores it, and children inherit that
    os.environ |= {"LOCAL_RANK": str(rank)}
    threads = dump["runtime"]["threads"] or max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    join_here(backend, Path(meeting) / "store", rank, workers)
    try:
        answer = work(RunConfig(**dump), *arguments)
        if rank == 0:
            queue.put(("done", answer))
    except KeyboardInterrupt as stop:
        queue.put(("KeyboardInterrupt", str(stop)))
        raise
    except (OSError, ValueError) as error:
        kind = next(name for name in ("TrainingError", "OSError", "ValueError") if isinstance(error, _RAISED[name]))
        queue.put((kind, str(error)))
        raise
    finally:
        dist.destroy_process_group()
