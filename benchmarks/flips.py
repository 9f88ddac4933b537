"""Flipping labels and undoing it, against the dense C x C matrices that the equations are written with.

Run ``python benchmarks/flips.py``. Each line is a ratio of medians of one run on one thread; times alternate between
the two routes, so that a busy machine slows both. Peak memory is that of a fresh process which does the one thing
once.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from viladiff.models.mixe.denoiser import edge_mask, flip_labels, flip_probability, posterior, step_probability

BETA, BONUS, TIME = 0.1, 0.1, 3
FLIP_SHAPE, POSTERIOR_SHAPE = (4, 512, 512), (4, 64, 64)


def labels_with_edges(shape: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor]:
    """Blocks of 16 x 16 pixels of one class, a tenth of them 255, and their edges."""
    gen = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, classes, (shape[0], shape[1] // 16, shape[2] // 16), generator=gen)
    coarse[torch.rand(coarse.shape, generator=gen) < 0.1] = 255
    labels = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return labels, edge_mask(labels)


def matrix(probability: float, classes: int) -> Tensor:
    """(C, C) of Eq. 6: row = class before, column = class after."""
    off = probability / (classes - 1)
    return torch.full((classes, classes), off) + torch.eye(classes) * (1 - probability - off)


def flip_ours(labels: Tensor, edges: Tensor, classes: int) -> Tensor:
    rate = [float(flip_probability(TIME, beta, classes)) for beta in (BETA, BETA + BONUS)]
    return flip_labels(labels, torch.where(edges, rate[1], rate[0]), classes)


def flip_dense(labels: Tensor, edges: Tensor, classes: int) -> Tensor:
    rate = [float(flip_probability(TIME, beta, classes)) for beta in (BETA, BETA + BONUS)]
    known = labels != 255
    one_hot = F.one_hot(labels.where(known, 0), classes).float()
    probs = torch.where(edges.unsqueeze(-1), one_hot @ matrix(rate[1], classes), one_hot @ matrix(rate[0], classes))
    drawn = torch.multinomial(probs.flatten(0, -2), 1).view_as(labels)
    return torch.where(known, drawn, labels)


def posterior_ours(z: Tensor, probs: Tensor, edges: Tensor) -> Tensor:
    return posterior(z, probs, TIME, BETA + BONUS * edges, probs.shape[1])


def posterior_dense(z: Tensor, probs: Tensor, edges: Tensor) -> Tensor:
    """The C x C posterior of every pixel, q(z_prev | z_t, x0) for all z_prev and x0, then the mixture over x0."""
    classes = probs.shape[1]
    tables = []
    for beta in (BETA, BETA + BONUS):
        step = matrix(float(step_probability(TIME, beta, classes)), classes)
        before = matrix(float(flip_probability(TIME - 1, beta, classes)), classes)
        joint = step.T[:, None, :] * before[None]  # z_t, x0, z_prev
        tables.append(joint / joint.sum(-1, keepdim=True))
    per_pixel = torch.where(edges[..., None, None], tables[1][z], tables[0][z])
    return torch.einsum("bkhw,bhwkj->bjhw", probs, per_pixel)


def cases(
    classes: int, flip_shape: tuple[int, ...] = FLIP_SHAPE, posterior_shape: tuple[int, ...] = POSTERIOR_SHAPE
) -> dict[str, Callable[[], Tensor]]:
    """The four routes as functions of nothing, on the same inputs."""
    labels, edges = labels_with_edges(flip_shape, classes)
    z, z_edges = labels_with_edges(posterior_shape, classes)
    z = z.where(z != 255, 0)
    probs = torch.randn((z.shape[0], classes, *z.shape[1:]), generator=torch.Generator().manual_seed(1)).softmax(1)
    return {
        "flip_ours": lambda: flip_ours(labels, edges, classes),
        "flip_dense": lambda: flip_dense(labels, edges, classes),
        "posterior_ours": lambda: posterior_ours(z, probs, z_edges),
        "posterior_dense": lambda: posterior_dense(z, probs, z_edges),
    }


def alternating_medians(first: Callable[[], Tensor], second: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    """Seconds of each, medians over ``repeats`` alternations after one warm-up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats + 1):
        for call, record in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            call()
            if i:
                record.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def peak_mebibytes(case: str, classes: int) -> float:
    """Growth of the resident peak while a fresh process runs ``case`` once; NaN where Linux's /proc is missing."""
    command = [sys.executable, __file__, "--peak", case, "--classes", str(classes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(case: str, classes: int) -> float:
    call = cases(classes)[case]
    cases(classes, (1, 16, 16), (1, 16, 16))[case]()  # loads what the first call of anything loads
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")
    clear.write_text("5")  # the peak starts again at what is resident now
    before = _kibibytes(status.read_text(), "VmRSS")
    call()
    return (_kibibytes(status.read_text(), "VmHWM") - before) / 1024


def _kibibytes(status: str, field: str) -> int:
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--classes", type=int, nargs="+", default=[21, 81])
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(measure_peak(options.peak, options.classes[0]))
        return
    for classes in options.classes:
        calls = cases(classes)
        error = (calls["posterior_ours"]() - calls["posterior_dense"]()).abs().max()
        print(f"C = {classes}: the posteriors differ by at most {error:.1e}")
        for name, shape in (("flip", FLIP_SHAPE), ("posterior", POSTERIOR_SHAPE)):
            ours, dense = alternating_medians(calls[f"{name}_ours"], calls[f"{name}_dense"], options.repeats)
            peaks = [peak_mebibytes(f"{name}_{route}", classes) for route in ("ours", "dense")]
            print(
                f"{name:9} {shape}: {dense / ours:6.1f} x faster ({ours * 1e3:.1f} against {dense * 1e3:.1f} ms), "
                f"peak {peaks[0]:.0f} against {peaks[1]:.0f} MiB"
            )


if __name__ == "__main__":
    main()
