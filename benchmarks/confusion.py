"""The confusion matrix against a NumPy bincount (ratio >= 1.0) and torchmetrics (>= 3), on one thread.

Run: python benchmarks/confusion.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from viladiff.data.batch import IGNORE
from viladiff.evaluation.pixel_counts import confusion_matrix

CLASSES = 21
SHAPE = (8, 512, 512)
ROUNDS = 15


def numpy_bincount(pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The usual few lines: mask the ignored pixels out, then one bincount."""
    known = target != IGNORE
    return np.bincount(CLASSES * target[known] + pred[known], minlength=CLASSES**2).reshape(CLASSES, CLASSES)


def numpy_unmasked(pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The fastest NumPy found: like ours it gives ignored pixels rows of their own; unlike ours it checks nothing."""
    counts = np.bincount((CLASSES * target + pred).ravel(), minlength=CLASSES * 256)
    return counts[: CLASSES**2].reshape(CLASSES, CLASSES)


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """Blocky labels with 5 % of the pixels ignored, and a prediction that is right for 80 %."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, CLASSES, (SHAPE[0], SHAPE[1] // 32, SHAPE[2] // 32), generator=generator)
    target = blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)
    noise = torch.randint(0, CLASSES, SHAPE, generator=generator)
    pred = torch.where(torch.rand(SHAPE, generator=generator) < 0.8, target, noise)
    return pred, target.masked_fill(torch.rand(SHAPE, generator=generator) < 0.05, IGNORE)


def main() -> None:
    torch.set_num_threads(1)
    pred, target = scene()
    metric = MulticlassConfusionMatrix(CLASSES, ignore_index=IGNORE, validate_args=False)
    contenders: dict[str, Callable[[], object]] = {
        "viladiff": lambda: confusion_matrix(pred, target, CLASSES),
        "NumPy bincount": lambda: numpy_bincount(pred.numpy(), target.numpy()),
        "NumPy bincount, unmasked": lambda: numpy_unmasked(pred.numpy(), target.numpy()),
        "torchmetrics": lambda: metric(pred, target),
    }
    results = {name: np.asarray(run()) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):  # interleaved, so that a busy machine slows all alike
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    ours = statistics.median(times["viladiff"])
    print(f"{SHAPE} labels, {CLASSES} classes, one thread, medians of {ROUNDS} interleaved rounds")
    for name, taken in times.items():
        equal = "equal counts" if np.array_equal(results[name], results["viladiff"]) else "DIFFERENT COUNTS"
        middle = statistics.median(taken)
        print(f"{name:26s} {middle * 1e3:7.2f} ms   ratio to viladiff {middle / ours:5.2f}   {equal}")


if __name__ == "__main__":
    main()
