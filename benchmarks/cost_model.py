"""The cost model against measured steps of this machine's core and published throughputs of GPUs.

OMP_NUM_THREADS=1 python benchmarks/cost_model.py measure    steps of every method on this core, into step_times.json
python benchmarks/cost_model.py core                         fits the core's rates to half of them; errors on the others
python benchmarks/cost_model.py gpu                          published throughputs beside the model's
python benchmarks/cost_model.py page                         writes both tables into docs/performance.md

A measured step is forward, backward, optimiser and moving averages at 90 % of training, without its data, in processor
time: other work on the machine lengthens that less than the clock's. Its work is counted without content, as a plan's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import nn

from viladiff.core.atomic import write_atomically
from viladiff.core.environment import processor
from viladiff.evaluation.devices import DEVICES
from viladiff.evaluation.meta_precision import MetaPrecision
from viladiff.evaluation.operations import OperationCounter
from viladiff.evaluation.step_time import CORE, CoreRates, Load, step_seconds
from viladiff.methods import METHODS
from viladiff.runs.config import RunConfig, override
from viladiff.training.step_work import count_step
from viladiff.training.trainer import Trainer

HERE = Path(__file__).parent
TIMES, PAGE = HERE / "step_times.json", HERE.parent / "docs" / "performance.md"
PLACES = [
    *(("digits_vit", 32), ("vit_tiny_patch16_224", 64), ("resnet18", 64), ("digits_vit", 64)),
    *(("mobilenetv3_small_100", 64), ("vit_tiny_patch16_224", 32), ("convnext_atto", 64), ("resnet18", 96)),
    ("digits_vit", 96),
]
"""Encoders and crops; each method has two of them."""
AIM = 0.3
RATES = CoreRates._fields


def combinations(each: int = 2) -> list[tuple[str, str, int]]:
    """(method, encoder, crop), the first of each method before the second of any."""
    names = list(METHODS)
    found = [
        (j, name, *PLACES[(3 * i + 4 * j + i // len(PLACES)) % len(PLACES)])
        for i, name in enumerate(names)
        for j in range(each)
    ]
    return [(name, encoder, crop) for _, name, encoder, crop in sorted(found)]


def config(method: str, encoder: str, crop: int) -> RunConfig:
    fields: dict[str, object] = {
        **{"method.name": method, "model.encoder": encoder, "data.crop": crop, "runtime.threads": 1},
        **{"data.batch_labelled": 2, "data.batch_unlabelled": 2},
    }
    return override(RunConfig(), fields if encoder == "digits_vit" else {**fields, "model.pretrained": "none"})


def measure(repeats: int) -> None:
    """Writes processor seconds of a step, and its counted work, of each combination."""
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    first = combinations()
    for method, encoder, crop in [first[-1], *first]:  # a process's first steps take longer than all others
        cfg = config(method, encoder, crop)
        with tempfile.TemporaryDirectory() as out:
            run = Trainer(override(cfg, {"runtime.runs_dir": out}))
            run._build()
        run.method.train()
        run.step = int(0.9 * run.steps)
        batches, times = run.loader.micro_batches(run.step), []
        for _ in range(repeats + 1):
            begun = time.process_time()
            run._step(batches)
            times.append(time.process_time() - begun)
        about: dict[str, Any] = {"method": method, "encoder": encoder, "crop": crop}
        about["seconds"] = statistics.median(times[1:])
        found = [one for one in found if (one["method"], one["encoder"], one["crop"]) != (method, encoder, crop)]
        found.append({**about, "work": work(cfg, run.dataset.num_classes)})
        print(f"{method} {encoder} {crop}: {1000 * about['seconds']:.0f} ms", flush=True)
        body = {"processor": processor(), "torch": torch.__version__, "steps": found}
        write_atomically(TIMES, json.dumps(body, indent=1).encode())


def work(cfg: RunConfig, classes: int) -> list[float]:
    """What each of ``RATES`` multiplies in a step."""
    return features(line.load for line in count_step(cfg, classes).lines)


def features(loads: Iterable[Load]) -> list[float]:
    loads = list(loads)
    flops = {
        kind: sum(x.flops * x.times for x in loads if x.kind == kind)
        for kind in ("product", "convolution", "attention")
    }
    return [*flops.values(), sum(x.bytes * x.times for x in loads), sum(x.times for x in loads)]


# The core


def fit(steps: Sequence[dict[str, Any]]) -> np.ndarray:
    """Rates that make relative errors small: least squares of the ratios, none negative."""
    a = np.array([one["work"] for one in steps], float) / np.array([[one["seconds"]] for one in steps])
    scale = a.mean(0)
    return nnls(a / scale, np.ones(len(steps)))[0] / scale


def errors(rates: np.ndarray, steps: Sequence[dict[str, Any]]) -> list[float]:
    """Estimated over measured, less one."""
    return [float(rates @ np.array(one["work"])) / one["seconds"] - 1 for one in steps]


class Errors(NamedTuple):
    """How far estimates of some combinations are off."""

    label: str
    found: list[float]

    def row(self) -> str:
        sizes = sorted(abs(x) for x in self.found)
        within = sum(x <= AIM for x in sizes)
        return (
            f"| {self.label} | {len(sizes)} | {statistics.median(sizes):.0%} | {sizes[-1]:.0%} | "
            f"{within} of {len(sizes)} |"
        )


def core() -> list[str]:
    """Lines of the page: errors where half was fitted, and with each method left out."""
    body = json.loads(TIMES.read_text())
    steps = body["steps"]
    half, other = steps[::2], steps[1::2]
    left_out = {
        name: errors(fit([x for x in steps if x["method"] != name]), [x for x in steps if x["method"] == name])
        for name in METHODS
        if any(x["method"] == name for x in steps)
    }
    rates = fit(steps)
    rows = [
        Errors("fitted half", errors(fit(half), half)),
        Errors("other half", errors(fit(half), other)),
        Errors("each method left out", [x for some in left_out.values() for x in some]),
        Errors("the package's rates, all combinations", errors(np.array(CORE), steps)),
    ]
    one_by_one = [f"| {name} | {', '.join(f'{x:+.0%}' for x in found)} |" for name, found in left_out.items()]
    given = ", ".join(f"{name} {rate:.2g}" for name, rate in zip(RATES, rates, strict=True))
    return [
        f"{len(steps)} combinations of method, encoder and crop, {body['processor']}, torch {body['torch']}.",
        f"Fitted to all: {given} seconds a FLOP, byte or operation.",
        "",
        "| combinations | number | median error | largest | within 30 % |",
        "| --- | --- | --- | --- | --- |",
        *(row.row() for row in rows),
        "",
        "| method left out | error of its combinations |",
        "| --- | --- |",
        *one_by_one,
    ]


# GPUs


class Published(NamedTuple):
    """A throughput that somebody published."""

    device: str
    what: str
    milliseconds: float
    loads: Callable[[], list[Load]]


def classifier(name: str, batch: int, side: int = 224, train: bool = True, fused: bool = True) -> list[Load]:
    """Work of a timm classifier in fp16, forward or with a step of training."""
    import timm

    with torch.device("meta"):
        options: dict[str, Any] = {"img_size": side} if name.startswith("vit") else {}
        net = timm.create_model(name, **options)
        images, labels = torch.empty(batch, 3, side, side), torch.empty(batch, dtype=torch.int64)
    for module in net.train(train).modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", fused)  # noqa: B010, not declared in the base class
    counter, precision = OperationCounter(net), MetaPrecision(torch.float16)
    with counter, precision, torch.set_grad_enabled(train):
        with precision.autocast():
            loss = F.cross_entropy(net(images), labels)
        if train:
            loss.backward()
    return [line.load for line in counter.lines()] + ([optimiser(net)] if train else [])


def optimiser(net: nn.Module) -> Load:
    return Load("other", False, 0, 20 * sum(x.numel() for x in net.parameters()), 1)


def segmenter(method: str, size: str, data: str, batch: int, crop: int = 518) -> list[Load]:
    """Work of one GPU's share of UniMatch-V2's published runs: fp32, with convolutions in TF32, torch's default."""
    split, classes = {"voc": ("92", 21), "coco": ("1849", 81), "cityscapes": ("186", 19)}[data]
    fields: dict[str, object] = {
        **{"data.dataset": data, "data.split": split, "method.name": method, "data.crop": crop},
        **{"model.encoder": f"vit_{size}_patch14_dinov2", "model.pretrained": "none", "train.precision": "fp32"},
        **{"model.decoder": "dpt", "model.decoder_width": 128 if size == "base" else 64, "data.batch_labelled": batch},
    }
    if METHODS[method].views.unlabelled:
        fields["data.batch_unlabelled"] = batch
    if data == "cityscapes":
        fields["method.ohem.enabled"] = True
    return [line.load for line in count_step(override(RunConfig(), fields), classes).lines]


def _timm(device: str, train: bool, times: dict[str, tuple[int, int, float]]) -> list[Published]:
    kind = "training" if train else "inference"

    def loads(name: str, batch: int, side: int) -> Callable[[], list[Load]]:
        return lambda: classifier(name, batch, side, train, fused=not train)

    return [
        Published(device, f"{name} {side}, {kind}, fp16, batch {batch} [1]", ms, loads(name, batch, side))
        for name, (batch, side, ms) in times.items()
    ]


def _logs(times: dict[tuple[str, str, str, int, int], float]) -> list[Published]:
    def loads(method: str, size: str, data: str, batch: int, crop: int) -> Callable[[], list[Load]]:
        return lambda: segmenter(method, size, data, batch, crop)

    return [
        Published(
            "a100", f"{key[0]}, DINOv2 {key[1]}, {key[2]} {key[4]}, fp32, batch {key[3]} a GPU [2]", ms, loads(*key)
        )
        for key, ms in times.items()
    ]


FIGURES = [
    *_timm(
        "rtx3090",
        True,
        {
            "vit_small_patch16_224": (384, 224, 363.9),
            "vit_base_patch16_224": (192, 224, 490.4),
            "vit_large_patch16_224": (64, 224, 545.0),
            "vit_base_patch16_384": (32, 384, 329.2),
            "resnet50": (512, 224, 619.0),
            "resnet101": (256, 224, 448.3),
            "convnext_base": (128, 224, 378.1),
        },
    ),
    *_timm(
        "rtx4090",
        False,
        {
            "vit_small_patch16_224": (1024, 224, 124.6),
            "vit_base_patch16_224": (1024, 224, 342.1),
            "vit_large_patch16_224": (1024, 224, 1073.2),
            "vit_base_patch14_dinov2": (512, 518, 1461.5),
            "resnet50": (1024, 224, 238.0),
            "resnet101": (1024, 224, 368.2),
            "convnext_base": (1024, 224, 487.2),
        },
    ),
    *_timm(
        "rtx5090",
        False,
        {
            "vit_small_patch16_224": (1024, 224, 93.3),
            "vit_base_patch16_224": (1024, 224, 261.5),
            "vit_large_patch16_224": (1024, 224, 924.1),
            "vit_base_patch14_dinov2": (768, 518, 1785.5),
            "resnet50": (1024, 224, 161.1),
            "resnet101": (1024, 224, 246.7),
            "convnext_base": (1024, 224, 391.1),
        },
    ),
    *_logs(
        {
            ("supervised", "base", "voc", 8, 518): 613.0,
            ("supervised", "small", "voc", 8, 518): 264.0,
            ("fixmatch", "base", "voc", 4, 518): 840.0,
            ("unimatch", "base", "voc", 4, 518): 1148.0,
            ("unimatch_v2", "base", "voc", 4, 518): 1160.0,
            ("unimatch_v2", "small", "voc", 4, 518): 494.5,
            ("unimatch_v2", "base", "cityscapes", 2, 798): 2177.0,
            ("unimatch_v2", "base", "coco", 4, 518): 1199.5,
            ("unimatch_v2", "small", "coco", 4, 518): 519.6,
            ("supervised", "base", "coco", 8, 518): 707.5,
        }
    ),
    *(
        Published(
            device,
            "vit_giant_patch14_224, training on 8 GPUs, batch 64 a GPU assumed [3]",
            1000 * 64 * 8 / images,
            lambda: classifier("vit_giant_patch14_224", 64),
        )
        for device, images in (("a100", 693.0), ("h100", 1428.0))
    ),
]
SOURCES = [
    "[1] timm aa4b585, results: benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv (attention not fused), "
    "benchmark-infer-amp-nchw-pt291-cu128-4090.csv, benchmark-infer-amp-nchw-pt291-cu130-5090.csv; step times.",
    "[2] UniMatch-V2 f6afb4d, training-logs: median seconds an iteration; the author names A100 of 40 and 80 GB "
    "(issue 21).",
    "[3] NVIDIA NeMo, user guide, performance of ViT g/14: 693 images/s on a node of 8 A100, 1,428 of 8 H100.",
]


def estimated(figure: Published) -> float:
    """The model's milliseconds; convolutions of [2] in TF32."""
    device = DEVICES[figure.device]
    loads = figure.loads()
    tf32 = [x for x in loads if "[2]" in figure.what and x.kind == "convolution"]
    rest = [x for x in loads if x not in tf32]
    return 1000 * (step_seconds(rest, device) + step_seconds(tf32, device, tf32=True))


def gpu() -> list[str]:
    """Lines of the page: published against estimated."""
    rows, ratios = [], []
    for figure in FIGURES:
        ms = estimated(figure)
        ratios.append(ms / figure.milliseconds)
        rows.append(
            f"| {figure.device} | {figure.what} | {figure.milliseconds:.0f} | {ms:.0f} | {ratios[-1] - 1:+.0%} |"
        )
        print(rows[-1], flush=True)
    off = [abs(x - 1) for x in ratios]
    spread = math.exp(statistics.fmean(abs(math.log(x)) for x in ratios)) - 1
    within = sum(x <= AIM for x in off)
    return [
        f"{len(rows)} figures: mean error {spread:.0%}, largest {max(off):.0%}, within 30 %: {within}.",
        "",
        "| device | what | published, ms | estimated, ms | error |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        *SOURCES,
    ]


def put(name: str, lines: Sequence[str]) -> None:
    """Writes the lines between two marks of the page."""
    text, body = PAGE.read_text(encoding="utf-8"), "\n".join(lines)
    pattern = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{PAGE}: has no marks for {name}")
    write_atomically(PAGE, pattern.sub(lambda found: found[1] + body + found[2], text).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "core", "gpu", "page"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.what == "measure":
        measure(args.repeats)
    if args.what in ("core", "page"):
        print("\n".join(found := core()))
        if args.what == "page":
            put("core", found)
    if args.what in ("gpu", "page"):
        found = gpu()
        print(found[0])
        if args.what == "page":
            put("gpu", found)


if __name__ == "__main__":
    main()
