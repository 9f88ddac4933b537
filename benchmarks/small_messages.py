"""Messages of a training step besides the gradients, with two workers on gloo: number, size and share of the step.

OMP_NUM_THREADS=1 python benchmarks/small_messages.py [--methods viladiff daw ...] [--steps 20] [FIELD=VALUE ...]

Each collective that the package calls within a step is timed, which includes waiting for the other worker: an upper
bound. The same messages are then sent again with nothing in between, after a barrier: what they cost by themselves.
Step and messages alone are the least of repeats, since a busy machine delays each message more than the work. An NCCL
collective of some kilobytes takes about 20 microseconds of a GPU's stream within a machine (``NCCL``); the last column
is their number times that, to be compared with a step on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from viladiff.runs.config import RunConfig, override
from viladiff.training.launch import run_in_processes
from viladiff.training.trainer import Trainer

NCCL = 20e-6
"""Seconds of an all-reduce of less than 64 KB between GPUs of one machine: NCCL's latency plus a launch."""
NAMES = ("all_reduce", "all_gather", "broadcast")


class Messages:
    """Collectives that Python calls, each with its bytes and seconds; DDP sends gradients from C++, past these."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int, float]] = []
        self.real = {name: getattr(dist, name) for name in NAMES}
        for name, call in self.real.items():
            setattr(dist, name, self.timed(name, call))

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def send(*given: Any, **more: Any) -> Any:
            begun = time.perf_counter()
            result = call(*given, **more)
            tensor = given[1] if name == "all_gather" else given[0]
            self.found.append((name, tensor.nbytes, time.perf_counter() - begun))
            return result

        return send


def measure(cfg: RunConfig) -> str:
    """Train in a worker of two; return a line of a table."""
    messages, seconds, waits = Messages(), [], []
    inside: list[tuple[str, int, float]] = []
    real = Trainer._step

    def step(self: Trainer, batches: Any) -> Any:
        messages.found.clear()
        dist.barrier()
        begun = time.perf_counter()
        result = real(self, batches)
        seconds.append(time.perf_counter() - begun)
        waits.append(sum(took for _, _, took in messages.found))
        inside[:] = messages.found
        return result

    Trainer._step = step  # type: ignore[method-assign]  # this process ends with the measurement
    run = Trainer(cfg)
    run.directory.mkdir(parents=True, exist_ok=True)
    run._build()
    run._train()
    alone = [again(messages, inside) for _ in range(100)]
    took, bare = min(seconds[2:]), min(alone)
    wait = statistics.median(waits[2:]) / statistics.median(seconds[2:])
    kinds = ", ".join(f"{count} {name}" for name, count in Counter(name for name, _, _ in inside).items())
    sizes = sorted(size for _, size, _ in inside) or [0]
    return (f"{cfg.method.name:14} {len(inside):3} ({kinds or 'none'}), {sizes[0]} to {sizes[-1]} B | step "
            f"{1000 * took:6.0f} ms | with waits {100 * wait:4.1f} % | alone {1000 * bare:5.2f} ms, "
            f"{100 * bare / took:4.1f} % | NCCL {1000 * NCCL * len(inside):.2f} ms")  # fmt: skip


def again(messages: Messages, inside: Sequence[tuple[str, int, float]]) -> float:
    """Send the messages of a step with nothing in between; return the seconds."""
    dist.barrier()
    begun = time.perf_counter()
    for name, size, _ in inside:
        data = torch.zeros(max(1, size // 4))
        if name == "all_gather":
            messages.real[name]([torch.zeros_like(data) for _ in range(2)], data)
        else:
            messages.real[name](data, *([0] if name == "broadcast" else []))
    return time.perf_counter() - begun


def main() -> None:
    """Print a line a method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["viladiff", "unimatch", "u2pl", "allspark", "corrmatch"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("fields", nargs="*", help="fields of the runs, as data.crop=96")
    given = parser.parse_args()
    fields = dict(field.split("=", 1) for field in given.fields)
    for method in given.methods:
        with tempfile.TemporaryDirectory() as place:
            flat = {"method.name": method, "train.steps": given.steps, "runtime.workers": 2, "runtime.threads": 1}
            flat |= {"runtime.runs_dir": place, "runtime.progress": False, "eval.max_images": 2, **fields}
            print(run_in_processes(measure, override(RunConfig(), flat), 2), flush=True)


if __name__ == "__main__":
    main()
