"""What a checkpoint of a ViT-B with its average and AdamW costs training: written in between, and by a thread.

OMP_NUM_THREADS=1 python benchmarks/checkpoints.py [--saves 3] [--minutes 10] [--folder DIR]

What training waits for is the whole write before, and the copy to host memory now. Where no core is free beside
training, the thread's processor time is taken from it too: the share of a run is given without and with that. Training
is played by products of matrices, with a line of the log synced to the disk after each; how long a line takes beside
the write says whether the disk holds training up. ``--folder`` is on the disk to measure. Needs 4 GB of memory and
3 GB of disk.
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

from viladiff.core.environment import peak_memory, reset_peak_memory
from viladiff.runs.checkpoint import StepLog, save_checkpoint
from viladiff.training.saving import CheckpointWriter

CPU = torch.device("cpu")


class Cost(NamedTuple):
    """Seconds of one checkpoint."""

    waited: float
    """That training stood still."""
    log: float
    """The longest that a line of the log took beside the write."""
    wall: float
    """Of the write."""
    cpu: float
    """Of all threads but training's, or of the write in between."""


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

    def step(self) -> float:
        """Take a step; return the seconds of the log."""
        for _ in range(2):
            self.matrix @ self.matrix
        begun = time.perf_counter()
        self.log.append({"step": 0})
        self.log.flush()
        return time.perf_counter() - begun


def writer_alive() -> bool:
    """Return whether a checkpoint is being written."""
    return any(thread.name.startswith("writer of") for thread in threading.enumerate())


def asynchronous(writer: CheckpointWriter, state: dict[str, Any], training: Training) -> Cost:
    """Save as a run does, and train beside the write."""
    begun, used, mine = time.perf_counter(), time.process_time(), time.thread_time()
    writer.save(state)
    waited, lines = time.perf_counter() - begun, [0.0]
    while writer_alive():
        lines.append(training.step())
    wall = time.perf_counter() - begun - waited
    cpu = time.process_time() - used - (time.thread_time() - mine)
    writer.wait()
    return Cost(waited, max(lines), wall, cpu)


def synchronous(path: Path, state: dict[str, Any]) -> Cost:
    """Save while training stands still, which is then the CPU time too."""
    begun, used = time.perf_counter(), time.process_time()
    save_checkpoint(path, state)
    wall = time.perf_counter() - begun
    return Cost(wall, 0.0, wall, time.process_time() - used)


def show(title: str, costs: Sequence[Cost], minutes: float, beside: bool) -> float:
    """Print medians; return the share of a run that they cost where no core is free."""
    waited, log, wall, cpu = (statistics.median(values) for values in zip(*costs, strict=True))
    least, most = (100 * seconds / (60 * minutes) for seconds in (waited, waited + cpu * beside))
    each = ", ".join(f"{cost.waited:.2f}" for cost in costs)
    print(f"{title}: training waits {waited:.2f} s ({each}); the write takes {wall:.1f} s, {cpu:.1f} s of processor")
    print(f"    {least:.2f} to {most:.2f} % of a run with one every {minutes:g} minutes", end="")
    print(f"; a line of the log at most {1000 * log:.0f} ms" if beside else "")
    return most


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
        print(
            f"a line of the log without a write takes {1000 * max(training.step() for _ in range(20)):.0f} ms at most"
        )
        reset_peak_memory()
        held = peak_memory()
        with CheckpointWriter(path, given.minutes, CPU, lambda: None) as writer:
            first = asynchronous(writer, state, training)
            after = [asynchronous(writer, state, training) for _ in range(given.saves)]
        more = peak_memory() - held
        show("in between", before, given.minutes, False)
        show("by a thread, the first", [first], given.minutes, True)
        most = show("by a thread, the next ones", after, given.minutes, True)
        pinned = sum(1 << (size - 1).bit_length() for size in sizes if size)
        print(f"the copy takes {more / 1e9:.2f} GB more; page-locked, in torch's powers of two, {pinned / 1e9:.2f}")
    return int(most > 1)


if __name__ == "__main__":
    raise SystemExit(main())
