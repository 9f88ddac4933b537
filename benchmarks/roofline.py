"""What a step asks of a device: FLOPs, bytes and launches by module, the arithmetic's limit, and estimated times.

python benchmarks/roofline.py viladiff --scale strong -- data.crop=518     one method, by module, ten costliest lines
python benchmarks/roofline.py                                              all methods, a line each
python benchmarks/roofline.py --page                                       the same table, into docs/performance.md

--scale takes a recipe's fields for VOC (paper, strong, resnet). Nothing is computed, so a laptop will do.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.checkpoint import CheckpointError

from viladiff.config.base import parse_overrides
from viladiff.core.atomic import write_atomically
from viladiff.data.sources import DATASETS
from viladiff.evaluation.devices import DEVICES
from viladiff.evaluation.operations import Line, outline
from viladiff.evaluation.step_time import Load, arithmetic_seconds, step_seconds
from viladiff.methods import METHODS
from viladiff.runs.config import RunConfig, override
from viladiff.tables.recipes.recipe import recipe_fields
from viladiff.training.step_work import StepWork, count_step

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BASE: dict[str, object] = {"data.dataset": "voc", "data.split": "183", "model.pretrained": "none"}
DEFAULTS: dict[str, object] = {"model.encoder": "vit_base_patch16_224", "data.crop": 512, "train.precision": "bf16"}
COSTLIEST = 10
MANY: dict[str, object] = {"data.dataset": "ade20k", "data.split": "1263"}
"""The data set of the last column, which has many classes."""


def counted(method: str, scale: str | None, changes: Mapping[str, object]) -> tuple[RunConfig, StepWork]:
    fields = {**BASE, "method.name": method}
    if scale is None:
        fields |= DEFAULTS
    else:
        fields |= {path: found.value for path, found in recipe_fields(scale, {**fields, **changes}).items()}
    cfg = override(RunConfig(), {**fields, **BASE, **changes})
    return cfg, count_step(cfg, DATASETS[cfg.data.dataset].num_classes or 21)


def sums(loads: Sequence[Load]) -> tuple[float, float, int]:
    """TFLOP, GB and launches."""
    return (
        sum(x.flops * x.times for x in loads) / 1e12,
        sum(x.bytes * x.times for x in loads) / 1e9,
        sum(x.times for x in loads),
    )


def by_module(work: StepWork, names: Sequence[str], depth: int) -> list[str]:
    every = [line.load for line in work.lines]
    lines = [f"{'module':<28}{'TFLOP':>8}{'GB':>8}{'launches':>9}"]
    for module, loads in {**outline(work.lines, depth), "all": every}.items():
        flops, size, launches = sums(loads)
        lines.append(f"{module or 'method':<28}{flops:8.3f}{size:8.2f}{launches:9}")
    lines += [
        "",
        f"peak memory {work.peak_bytes / 2**30:.2f} GiB, checkpoint {work.checkpoint_bytes / 2**30:.2f} GiB",
        "",
    ]
    for name in names:
        device = DEVICES[name]
        limit, about = arithmetic_seconds(every, device), step_seconds(every, device)
        lines.append(f"{name:<12} arithmetic {1000 * limit:.1f} ms, estimated {1000 * about:.1f} ms")
    return [*lines, "", f"costliest lines on {names[0]}:", *costliest(work.lines, names[0])]


def costliest(lines: Sequence[Line], name: str) -> list[str]:
    times = [(step_seconds([line.load], DEVICES[name]), line) for line in lines]
    times.sort(key=lambda pair: -pair[0])
    return [
        f"{1000 * seconds:8.2f} ms  {line.load.times:4} x {line.operation} in {line.module or 'method'}"
        for seconds, line in times[:COSTLIEST]
    ]


def per_flop(loads: Sequence[Load], device: str = "h100") -> float:
    """Estimated ms a TFLOP."""
    return 1000 * step_seconds(loads, DEVICES[device]) / sums(loads)[0]


def at_many_classes(method: str, scale: str | None, changes: Mapping[str, object]) -> float:
    """Estimated ms a TFLOP at many classes; 0 where what checkpoints compute again is not counted in half precision."""
    try:
        return per_flop([line.load for line in counted(method, scale, {**changes, **MANY})[1].lines])
    except CheckpointError:
        return 0.0


def table(scale: str | None, changes: Mapping[str, object]) -> list[str]:
    rows = []
    floor: list[float] = []
    for method in METHODS:
        cfg, work = counted(method, scale, changes)
        loads = [line.load for line in work.lines]
        flops, size, launches = sums(loads)
        times = [1000 * step_seconds(loads, DEVICES[name]) for name in ("h100", "a100", "rtx4090")]
        limit = 1000 * arithmetic_seconds(loads, DEVICES["h100"])
        rates = [per_flop(loads), at_many_classes(method, scale, changes)]
        floor = floor or rates  # of supervised, the first
        rows.append(
            f"| {method} | {flops:.2f} | {size:.0f} | {launches:,} | {work.peak_bytes / 2**30:.1f} | "
            f"{work.checkpoint_bytes / 2**30:.2f} | {limit:.0f} | {' | '.join(f'{x:.0f}' for x in times)} | "
            f"{' | '.join(f'{mine / first:.2f}' if mine else '-' for mine, first in zip(rates, floor, strict=True))} |"
        )
        print(rows[-1], flush=True)
    data = cfg.data
    about = f"{cfg.model.encoder}, crop {data.crop}, {data.batch_labelled} + {data.batch_unlabelled} images"
    return [
        f"{about}, {cfg.train.precision}, {DATASETS[data.dataset].num_classes} classes. Times in ms, estimated.",
        "",
        "| method | TFLOP | GB | launches | peak, GiB | checkpoint, GiB | arithmetic, h100 | h100 | a100 | rtx4090 "
        f"| time a FLOP, of supervised | at {DATASETS['ade20k'].num_classes} classes |",
        "| --- |" + " --- |" * 11,
        *rows,
    ]


def put(lines: Sequence[str]) -> None:
    """Writes the table between its marks of the page."""
    pattern = re.compile("(<!-- methods -->\n).*?(\n?<!-- end of methods -->)", re.DOTALL)
    text = PAGE.read_text(encoding="utf-8")
    body = "\n".join(lines)
    write_atomically(PAGE, pattern.sub(lambda found: f"{found[1]}{body}\n<!-- end of methods -->", text).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", choices=list(METHODS))
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--scale", choices=("paper", "strong", "resnet"))
    parser.add_argument("--devices", nargs="+", default=["h100", "a100", "rtx4090"], choices=list(DEVICES))
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    changes = dict(parse_overrides(args.changes))
    if args.method:
        _, work = counted(args.method, args.scale, changes)
        print("\n".join(by_module(work, args.devices, args.depth)))
        return
    found = table(args.scale, changes)
    if args.page:
        put(found)


if __name__ == "__main__":
    main()
