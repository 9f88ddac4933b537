"""Steps on this machine's GPU: time, memory, share of the peak, loader and synchronisations, eager and compiled.

scripts/gpu_check.sh                                         all cells, at most 12 minutes, the table on stdout
python benchmarks/gpu_check.py --tiny                        two steps of small networks on any device
python benchmarks/gpu_check.py --batch 16 -- data.crop=512   more images a step, and other fields

Each cell runs in a process of its own, on made-up photographs that it reads from files. A step's share of the peak is
its counted FLOPs a second over those that the maker states; the loader's share is the time that training waits for it.
Synchronisations are those of one step that torch.cuda.set_sync_debug_mode sees.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from viladiff.config.base import parse_overrides
from viladiff.evaluation.devices import device_called
from viladiff.runs.config import RunConfig, override
from viladiff.tables.recipes.recipe import recipe_fields
from viladiff.training.step_work import count_step
from viladiff.training.trainer import Trainer

METHODS = ("viladiff", "unimatch_v2", "supervised")
SCALES = ("paper", "strong")
SECONDS = 55
"""That a cell may take; twelve of them are eleven minutes."""
CLASSES, WARM, TIMED = 21, 4, 16
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


def settings(method: str, scale: str, compiled: bool, tiny: bool, changes: dict[str, object]) -> dict[str, object]:
    asked = {"data.dataset": "voc", "data.split": "183", "method.name": method}
    found = {path: field.value for path, field in recipe_fields(scale, asked).items()}
    return {
        **found,
        **(TINY if tiny else {}),
        **{"method.name": method, "data.dataset": "folder", "data.split": "half", "model.pretrained": "none"},
        **{"data.text_encoder": "words"},
        **{
            "runtime.compile": "on" if compiled else "off",
            "runtime.progress": False,
            "train.steps": 10_000,
            "train.epochs": None,
        },
        **changes,
    }


def measure(fields: dict[str, object], root: Path, steps: tuple[int, int]) -> dict[str, object]:
    """Take some steps and return what the table says of them."""
    data = root / "data"
    write_photographs(data, 32, (96, 128) if steps[0] < WARM else (375, 500))
    places = {"data_root": data, "captions": data / "captions.csv", "runs_dir": root / "runs"}
    cfg = override(RunConfig(), {**fields, **{f"runtime.{name}": str(place) for name, place in places.items()}})
    run = Trainer(cfg)
    run._build()
    run.method.train()
    gpu, waits = run.device.type == "cuda", 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    waited = began = 0.0
    with closing(run.loader.stream(0, sum(steps) + 1, 2 if gpu else 0)) as stream:
        for place in range(sum(steps) + 1):
            if place == steps[0]:
                finish(gpu)
                began, waited = time.perf_counter(), 0.0
            asked = time.perf_counter()
            batches = next(stream)
            waited += time.perf_counter() - asked
            if place == sum(steps):
                finish(gpu)
                seconds = (time.perf_counter() - began) / steps[1]
                waits = synchronisations(run, batches) if gpu else 0
            else:
                run._step(batches)
                run.step += 1
    name = torch.cuda.get_device_name() if gpu else "cpu"
    work = sum(line.load.flops * line.load.times for line in count_step(cfg, CLASSES).lines)
    device = device_called(name)
    peak = device.half if device is not None and cfg.train.precision != "fp32" else 0.0
    return {
        "device": name,
        "ms": 1000 * seconds,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "peak": work / seconds / peak if peak else None,
        "loader": min(1.0, waited / (seconds * steps[1])),
        "waits": waits if gpu else None,
    }


def finish(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()


def synchronisations(run: Trainer, batches: list) -> int:
    """Return how often one step makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run._step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


def row(method: str, scale: str, compiled: bool, found: dict[str, object]) -> str:
    def shown(name: str, form: str, factor: float = 1.0) -> str:
        value = found.get(name)
        return "-" if value is None else format(factor * float(value), form)  # type: ignore[arg-type]

    cells = [shown("ms", ".1f"), shown("gib", ".1f"), shown("peak", ".1f", 100), shown("loader", ".0f", 100)]
    failed = f" {found['failed']}" if "failed" in found else ""
    how = "compiled" if compiled else "eager"
    return f"| {method} | {scale} | {how} | {' | '.join([*cells, shown('waits', '.0f')])} |{failed}"


def cell(method: str, scale: str, compiled: bool, args: argparse.Namespace) -> dict[str, object]:
    """Measure one cell in a process of its own."""
    given = [sys.executable, __file__, "--cell", method, scale, str(int(compiled)), "--batch", str(args.batch)]
    given += [*(["--tiny"] if args.tiny else []), "--", *args.changes]
    try:
        found = subprocess.run(given, capture_output=True, text=True, timeout=args.seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {args.seconds} s"}
    if found.returncode:
        return {"failed": (found.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    answer: dict[str, object] = json.loads(found.stdout.splitlines()[-1])
    return answer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--cell", nargs=3, metavar=("METHOD", "SCALE", "COMPILED"), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=0, help="images of each kind a step; 0 is the recipe's")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--scales", nargs="+", default=SCALES)
    parser.add_argument("--how", nargs="+", default=("eager", "compiled"), choices=("eager", "compiled"))
    parser.add_argument("--seconds", type=int, default=SECONDS, help="that a cell may take")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(arguments)
    if args.cell:
        changes: dict[str, object] = {"data.batch_labelled": args.batch, "data.batch_unlabelled": args.batch}
        changes = {**(changes if args.batch else {}), **parse_overrides(args.changes)}
        method, scale, compiled = args.cell
        fields = settings(method, scale, compiled == "1", args.tiny, changes)
        with tempfile.TemporaryDirectory() as root:
            print(json.dumps(measure(fields, Path(root), (1, 1) if args.tiny else (WARM, TIMED))))
        return 0
    print("| method | scale | how | ms a step | memory, GiB | of the peak, % | loader, % | waits |")
    print("| --- |" + " --- |" * 7)
    failed = 0
    for scale in args.scales:
        for method in args.methods:
            for how in args.how:
                found = cell(method, scale, how == "compiled", args)
                failed += "failed" in found
                print(row(method, scale, how == "compiled", found), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
