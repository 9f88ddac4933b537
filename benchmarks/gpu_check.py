"""Steps on this machine's GPU: time, memory, share of the peak, loader and synchronisations, eager and compiled.

scripts/gpu_check.sh                                   all cells, at most 12 minutes, the table on stdout
python benchmarks/gpu_check.py --tiny                  two steps of small networks on any device
python benchmarks/gpu_check.py -- data.crop=512        other fields

Each method and scale runs in a process of its own, on made-up photographs that it reads from files: eagerly and
compiled, each with the recipe's batch and then with the one that fills the card, which is searched. A step is one late
in training, with all parts of its loss. Its time is the median between CUDA's events, its share of the peak the counted
FLOPs a second over those that the maker states; the loader's share is the time that training waits for it.
Synchronisations are those of one step that torch.cuda.set_sync_debug_mode sees.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from viladiff.config.base import parse_overrides
from viladiff.data.batch import Batch
from viladiff.evaluation.devices import device_called
from viladiff.runs.config import RunConfig, override
from viladiff.tables.recipes.recipe import recipe_fields
from viladiff.training.launch import step_forward
from viladiff.training.step_work import count_step
from viladiff.training.trainer import Trainer

METHODS = ("supervised", "unimatch_v2", "viladiff")
"""The cheapest first: what it leaves of its time goes to the others."""
SCALES = ("paper", "strong")
SECONDS = 660
"""That all of it may take, with imports and compilation; scripts/gpu_check.sh ends it after 720."""
CLASSES, WARM, TIMED, LATE = 21, 4, 16, 0.9
LARGEST = 64
"""Times the recipe's batch, at the most; on a CPU, which no batch fills, 2."""
STAGES = ("eager", "eager, full", "compiled", "compiled, full")
Found = dict[str, Any]
TINY: dict[str, object] = {
    **{"model.encoder": "digits_vit", "model.decoder_width": 16, "data.crop": 32, "data.batch_labelled": 2},
    **{"data.batch_unlabelled": 2, "model.weights": None},
}


def write_photographs(root: Path, count: int, size: tuple[int, int]) -> None:
    """Write a folder data set of noise with masks of vertical bands, half of it labelled."""
    rng = np.random.default_rng(0)
    names = [f"made_up_{i:03}" for i in range(count)]
    for folder in ("images", "masks", "splits/half"):
        (root / folder).mkdir(parents=True)
    bands = np.tile(np.arange(size[1]) * CLASSES // size[1], (size[0], 1)).astype(np.uint8)
    for name in names:
        small = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
        Image.fromarray(small).resize(size[::-1]).save(root / "images" / f"{name}.jpg")
        Image.fromarray(bands).save(root / "masks" / f"{name}.png")
    (root / "classes.txt").write_text("\n".join(f"class {i}" for i in range(CLASSES)) + "\n", encoding="utf-8")
    captions = [f"{name},a photograph of class {i % CLASSES}" for i, name in enumerate(names)]
    (root / "captions.csv").write_text("\n".join(["image,text", *captions]) + "\n", encoding="utf-8")
    parts = {"labelled": names[: count // 2], "unlabelled": names[count // 2 : -2], "val": names[-2:]}
    for part, listed in parts.items():
        (root / "splits" / "half" / f"{part}.txt").write_text("\n".join(listed), encoding="utf-8")


def settings(method: str, scale: str, tiny: bool, changes: dict[str, object]) -> dict[str, object]:
    asked = {"data.dataset": "voc", "data.split": "183", "method.name": method}
    found = {path: field.value for path, field in recipe_fields(scale, asked).items()}
    return {
        **found,
        **(TINY if tiny else {}),
        **{"method.name": method, "data.dataset": "folder", "data.split": "half", "model.pretrained": "none"},
        **{"data.text_encoder": "words"},
        **{"runtime.compile": "off", "runtime.progress": False, "train.steps": 10_000, "train.epochs": None},
        **changes,
    }


class Bench:
    """A run that is built once and takes the steps of all stages."""

    def __init__(self, given: dict[str, object], root: Path, steps: tuple[int, int]) -> None:
        data = root / "data"
        write_photographs(data, 32, (96, 128) if steps[0] < WARM else (375, 500))
        places = {"data_root": data, "captions": data / "captions.csv", "runs_dir": root / "runs"}
        cfg = override(RunConfig(), {**given, **{f"runtime.{name}": str(place) for name, place in places.items()}})
        self.run, self.cfg, self.steps = Trainer(cfg), cfg, steps
        self.run._build()
        self.run.method.train()
        self.gpu = self.run.device.type == "cuda"
        self.name = torch.cuda.get_device_name() if self.gpu else "cpu"
        self.flops = sum(line.load.flops * line.load.times for line in count_step(cfg, CLASSES).lines)
        self.factor: int | None = None
        self.forwards: dict[bool, Callable[..., Any]] = {}

    def stage(self, how: str) -> Found:
        """Measure one stage; its batch is ``factor`` times the recipe's if the card is to be full."""
        compiled, full = how.startswith("compiled"), how.endswith("full")
        run = self.run
        if compiled not in self.forwards:  # parts are compiled once
            self.forwards[compiled] = step_forward(self.cfg, run.model, run.method, run.device, compiled)
        run.forward = self.forwards[compiled]
        if full and self.factor is None:
            self.factor = largest(self.fits, LARGEST if self.gpu else 2)
        factor = self.factor if full and self.factor is not None else 1
        found = self.timed(factor)
        left_out = [part for part in run.method.modules() if getattr(part.forward, "failed", False)]
        return found | ({"note": f"{len(left_out)} parts not compiled"} if left_out else {})

    def fits(self, factor: int) -> None:
        self.step(repeated(self.batches(), factor))
        finish(self.gpu)

    def batches(self) -> list[Batch]:
        return self.run.loader.micro_batches(0)

    def step(self, batches: list[Batch]) -> None:
        """Take a step of late training, whatever was taken before."""
        self.run.step = int(LATE * self.run.steps)
        self.run._step(batches)

    def timed(self, factor: int) -> Found:
        """Warm up and time steps, with batches of the loader, or with one that is there if it is larger."""
        warm, timed = self.steps
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        marks: list[Any] = []
        waited = 0.0
        held = repeated(self.batches(), factor) if factor > 1 else None
        with closing(self.run.loader.stream(0, warm + timed, 2 if self.gpu else 0)) as stream:
            for place in range(warm + timed):
                if place == warm:
                    finish(self.gpu)
                    marks, waited, began = [mark(self.gpu)], 0.0, time.perf_counter()
                asked = time.perf_counter()
                batches = held or next(stream)
                waited += time.perf_counter() - asked
                self.step(batches)
                marks.append(mark(self.gpu))
        finish(self.gpu)
        wall = time.perf_counter() - began
        marks = marks[-timed - 1 :]
        seconds = statistics.median(between(*pair) for pair in pairwise(marks))
        device = device_called(self.name)
        peak = device.half if device is not None and self.cfg.train.precision != "fp32" else 0.0
        return {
            "device": self.name,
            "batch": f"{factor * self.cfg.data.batch_labelled} + {factor * self.cfg.data.batch_unlabelled}",
            "ms": 1000 * seconds,
            "gib": torch.cuda.max_memory_allocated() / 2**30 if self.gpu else None,
            "peak": factor * self.flops / seconds / peak if peak else None,
            "loader": None if held else min(1.0, waited / wall),
            "waits": synchronisations(self.step, batches) if self.gpu else None,
        }


def finish(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()


def mark(gpu: bool) -> Any:
    """A moment of the device."""
    if not gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, second: Any) -> float:
    """Seconds between two marks."""
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


def largest(fits: Callable[[int], None], limit: int) -> int:
    """The largest factor that fits: doubled until memory is short, then one and a half times the last that was not."""
    best, tried = 1, 2
    while tried <= limit:
        try:
            fits(tried)
        except RuntimeError:  # memory, or a kernel's largest index
            break
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        best, tried = tried, 2 * tried
    if best > 1 and tried <= limit:
        try:
            fits(best * 3 // 2)
            best = best * 3 // 2
        except RuntimeError:
            pass
    return best


def repeated(batches: list[Batch], factor: int) -> list[Batch]:
    """Batches of so many times the images."""

    def more(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if name == "partner":  # an index into the batch
                return torch.cat([value + i * len(value) for i in range(factor)])
            return torch.cat([value] * factor) if value.ndim else value
        if isinstance(value, tuple):
            return value * factor if value and isinstance(value[0], int | str) else tuple(more(name, x) for x in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: more(f.name, getattr(value, f.name)) for f in fields(value) if f.init})
        return value

    return [more("", batch) for batch in batches]


def synchronisations(step: Callable[[list[Batch]], None], batches: list[Batch]) -> int:
    """Return how often one step makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


def staged(bench: Callable[[], Bench], stages: Sequence[str], until: float) -> Iterator[Found]:
    """Yield what each stage found, or why it did not; a stage that fails leaves the next ones alone."""
    made: Bench | None = None
    for how in stages:
        if time.monotonic() > until:
            yield {"how": how, "failed": "no time is left"}
            continue
        try:
            made = made or bench()
            found = made.stage(how)
        except Exception as error:
            found = {"failed": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}
        if "failed" in found and made is not None:
            made.run.optimizer.zero_grad()
            gc.collect()
        yield {"how": how, **found}


def row(method: str, scale: str, found: Found) -> str:
    def shown(name: str, form: str, factor: float = 1.0) -> str:
        value = found.get(name)
        return "-" if value is None else format(factor * float(value), form)

    cells = [str(found.get("batch", "-")), shown("ms", ".1f"), shown("gib", ".1f"), shown("peak", ".1f", 100)]
    cells += [shown("loader", ".0f", 100), shown("waits", ".0f"), str(found.get("failed", found.get("note", "")))]
    return f"| {method} | {scale} | {found['how']} | {' | '.join(cells)} |"


def cell(method: str, scale: str, args: argparse.Namespace, seconds: float) -> Iterator[Found]:
    """Yield a method's stages at a scale as a process of its own finds them, for so many seconds at the most."""
    given = [sys.executable, __file__, "--cell", method, scale, "--seconds", str(int(0.9 * seconds))]
    given += [*(["--tiny"] if args.tiny else []), "--how", *args.how, "--", *args.changes]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        why = ""
        try:
            code = subprocess.run(given, stdout=said, stderr=errors, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code, why = 1, f"more than {seconds:.0f} s"
        said.seek(0)
        errors.seek(0)
        found = [json.loads(line) for line in said.read().splitlines() if line.startswith('{"how"')]
        why = why or (errors.read().strip().splitlines() or [f"exit status {code}"])[-1][:200]
    yield from found
    for how in args.how[len(found) :]:
        yield {"how": how, "failed": why}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "SCALE"), help=argparse.SUPPRESS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--scales", nargs="+", default=SCALES)
    parser.add_argument("--how", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="that all of it may take")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(arguments)
    until = time.monotonic() + args.seconds
    if args.cell:
        method, scale = args.cell
        given = settings(method, scale, args.tiny, dict(parse_overrides(args.changes)))
        with tempfile.TemporaryDirectory() as root:
            steps = (1, 1) if args.tiny else (WARM, TIMED)
            for found in staged(lambda: Bench(given, Path(root), steps), args.how, until):
                print(json.dumps(found), flush=True)
        return 0
    print("| method | scale | how | batch | ms a step | memory, GiB | of the peak, % | loader, % | waits | |")
    print("| --- |" + " --- |" * 9, flush=True)
    failed, cells = 0, [(method, scale) for scale in args.scales for method in args.methods]
    for place, (method, scale) in enumerate(cells):
        for found in cell(method, scale, args, max(1.0, (until - time.monotonic()) / (len(cells) - place))):
            failed += "failed" in found
            print(row(method, scale, found), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
