"""What a checkpoint of a ViT-B with its average and AdamW costs training: written in between, and by a thread.

OMP_NUM_THREADS=1 python benchmarks/checkpoints.py [--saves 3] [--minutes 10] [--folder DIR]

Training is played by products of matrices on one thread, with a line of the log synced to the disk after each. What it
waits for: the write itself before, the copy to host memory after; and how much longer its steps and the log's lines
take while the thread writes. ``--folder`` is on the disk to measure. Needs 4 GB of memory and 3 GB of disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from viladiff.core.environment import peak_memory
from viladiff.runs.checkpoint import StepLog, save_checkpoint
from viladiff.training.saving import CheckpointWriter

CPU = torch.device("cpu")


class Cost(NamedTuple):
    """Seconds of one checkpoint."""

    waited: float
    """That training stood still."""
    slower: float
    """By which the steps beside the write took longer than as many without."""
    log: float
    """The longest that a line of the log took beside the write."""
    wall: float
    """Of the write."""
    cpu: float
    """Of all threads but training's."""


def training_state() -> dict[str, Any]:
    """Return the state of a ViT-B, its average, and AdamW after a step."""
    student, teacher = (timm.create_model("vit_base_patch16_224", num_classes=0) for _ in range(2))
    optimizer = torch.optim.AdamW(student.parameters(), 1e-5, fused=True)
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return {
        "method": {f"{i}.{k}": v for i, net in enumerate((student, teacher)) for k, v in net.state_dict().items()},
        "optimizer": optimizer.state_dict(),
    }


def count_bytes(value: Any) -> list[int]:
    """Return the bytes of each tensor in a state."""
    if isinstance(value, torch.Tensor):
        return [value.nbytes]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [size for item in items for size in count_bytes(item)]


class Training:
    """Steps of about a tenth of a second, and the log."""

    def __init__(self, folder: Path) -> None:
        self.matrix, self.log = torch.randn(1500, 1500), StepLog(folder / "steps.jsonl")

    def step(self) -> tuple[float, float]:
        """Take a step; return its seconds, and those of the log."""
        begun = time.perf_counter()
        for _ in range(2):
            self.matrix @ self.matrix
        ended = time.perf_counter()
        self.log.append({"step": 0})
        self.log.flush()
        return ended - begun, time.perf_counter() - ended


def writer_alive() -> bool:
    """Return whether a checkpoint is being written."""
    return any(thread.name.startswith("writer of") for thread in threading.enumerate())


def asynchronous(writer: CheckpointWriter, state: dict[str, Any], training: Training, usual: float) -> Cost:
    """Save as a run does, and train beside the write."""
    begun, used, mine = time.perf_counter(), time.process_time(), time.thread_time()
    writer.save(state)
    waited, steps = time.perf_counter() - begun, []
    while writer_alive():
        steps.append(training.step())
    wall = time.perf_counter() - begun - waited
    cpu = time.process_time() - used - (time.thread_time() - mine)
    writer.wait()
    slower = sum(seconds for seconds, _ in steps) - usual * len(steps)
    return Cost(waited, slower, max((log for _, log in steps), default=0.0), wall, cpu)


def synchronous(path: Path, state: dict[str, Any]) -> Cost:
    """Save while training stands still, which is then the CPU time too."""
    begun, used = time.perf_counter(), time.process_time()
    save_checkpoint(path, state)
    wall = time.perf_counter() - begun
    return Cost(wall, 0.0, 0.0, wall, time.process_time() - used)


def show(title: str, costs: Sequence[Cost], minutes: float) -> float:
    """Print medians; return the share of a run that they cost."""
    waited, slower, log, wall, cpu = (statistics.median(values) for values in zip(*costs, strict=True))
    share = (waited + max(0.0, slower)) / (60 * minutes)
    each = ", ".join(f"{cost.waited:.2f}" for cost in costs)
    print(f"{title}: training waits {waited:.2f} s ({each}), its steps take {slower:.2f} s more, a line of the log at")
    print(f"    most {log:.2f} s; the write takes {wall:.1f} s, {cpu:.1f} s of processor;", end=" ")
    print(f"{100 * share:.2f} % of a run with one every {minutes:g} minutes")
    return share


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what a checkpoint costs in both ways; return 0 if the thread's costs at most 1 % of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    state = training_state()
    sizes = count_bytes(state)
    last = sum(count_bytes(state["method"]))
    print(f"{len(sizes)} tensors, {sum(sizes) / 1e9:.2f} GB; of a finished run {last / 1e9:.2f} GB")
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        path, training = Path(place) / "checkpoint.pt", Training(Path(place))
        before = [synchronous(path, state) for _ in range(given.saves)]
        steps = [training.step() for _ in range(60)]
        usual = statistics.mean(seconds for seconds, _ in steps)
        print(
            f"a step takes {1000 * usual:.0f} ms, a line of the log {1000 * max(log for _, log in steps):.0f} at most"
        )
        held = peak_memory()
        with CheckpointWriter(path, given.minutes, CPU, lambda: None) as writer:
            first = asynchronous(writer, state, training, usual)
            after = [asynchronous(writer, state, training, usual) for _ in range(given.saves)]
            more = peak_memory() - held
        show("in between", before, given.minutes)
        show("by a thread, the first", [first], given.minutes)
        share = show("by a thread, the next ones", after, given.minutes)
        pinned = sum(1 << (size - 1).bit_length() for size in sizes if size)
        print(f"the copy takes {more / 1e9:.2f} GB more; page-locked, in torch's powers of two, {pinned / 1e9:.2f}")
    return int(share > 0.01)


if __name__ == "__main__":
    raise SystemExit(main())
