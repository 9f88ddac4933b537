"""Each method's step against the sum of its passes, and its peak memory, each method in a process of its own.

OMP_NUM_THREADS=1 python benchmarks/bench_methods.py                    all methods, medians of interleaved repeats
OMP_NUM_THREADS=1 python benchmarks/bench_methods.py cps psmt --repeats 5 -- data.crop=96 data.batch_labelled=4

A pass is every call of a network, or of a part of one, that a step makes, and every resizing to pixels: they are noted
in one step with what went in, and timed alone on the same tensors, backwards too where the step goes backwards. What a
step adds to them is losses, mixing, draws, averages and the optimiser. Words after -- are fields as in viladiff train.
Peak memory is that of the first steps, before any pass is timed: on a CPU the process's, less what it held before the
first step; on a GPU what torch allocated.

--json FILE times a step of `supervised` between those of each method as well, and keeps everything with machine and
date: the leaderboard's page shows what is in reports/published/leaderboard/steps.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from viladiff.cli.methods import written
from viladiff.core.atomic import write_atomically
from viladiff.core.environment import git_state, peak_memory, versions
from viladiff.data.batch import Batch
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import Trainer

AIM = 1.2


@dataclass
class Call:
    """One outermost call of a module, or of interpolate, with copies of its tensors."""

    function: Callable[..., Any]
    given: tuple[Any, ...]
    options: dict[str, Any]
    graph: bool

    def repeat(self) -> None:
        """Forward, and backward from a gradient of ones where the step had one."""
        with torch.set_grad_enabled(self.graph):
            found = [x for x in tensors(self.function(*self.given, **self.options)) if x.requires_grad]
        if found:
            torch.autograd.backward(found, [torch.ones_like(x) for x in found])
        for x in tensors((self.given, self.options)):
            x.grad = None


def tensors(value: Any) -> list[Tensor]:
    """Every tensor inside nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [x for part in parts for x in tensors(part)]


def copied(value: Any) -> Any:
    """Leaves with the same content, which want a gradient where the originals did."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: copied(x) for name, x in value.items()}
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value


@contextmanager
def noting(method: Method) -> Iterator[list[Call]]:
    """Collects the outermost calls inside ``method`` in the order they begin in."""
    calls: list[Call] = []
    depth = 0
    resize = F.interpolate

    def enter(module: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal depth
        if depth == 0:
            calls.append(Call(module, copied(given), copied(options), torch.is_grad_enabled()))
        depth += 1

    def leave(module: Any, given: Any, found: Any) -> None:
        nonlocal depth
        depth -= 1

    def resized(*given: Any, **options: Any) -> Tensor:
        if depth == 0:
            calls.append(Call(resize, copied(given), copied(options), torch.is_grad_enabled()))
        return resize(*given, **options)

    inner = [module for module in method.modules() if module is not method]
    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in inner]
    hooks += [module.register_forward_hook(leave) for module in inner]
    F.interpolate = resized
    try:
        yield calls
    finally:
        F.interpolate = resize
        for hook in hooks:
            hook.remove()


def ready(name: str, words: list[str]) -> tuple[Trainer, list[Batch]]:
    """A run of the method in the later part of training, and the batches of a step."""
    fields = dict(word.split("=", 1) for word in words)
    with tempfile.TemporaryDirectory() as out:
        cfg = override(RunConfig(), {"method.name": name, "runtime.threads": 1, "runtime.runs_dir": out, **fields})
        run = Trainer(cfg)
        run._build()
    run.method.train()
    run.step = int(0.7 * run.steps)  # after warm-ups, and with what begins in the later part of training
    return run, run.loader.micro_batches(run.step)


def one(name: str, words: list[str], repeats: int, reference: bool = False) -> dict[str, Any]:
    """Medians in ms, wall time and processor time, and peak memory in MB, of one method in this process.

    ``reference``: also of a step of ``supervised``, with the same fields as far as it has them.
    """
    run, batches = ready(name, words)
    cuda = run.device.type == "cuda"
    before = 0 if cuda else peak_memory()
    for _ in range(3):
        run._step(batches)
    memory = torch.cuda.max_memory_allocated() if cuda else peak_memory() - before
    with noting(run.method) as calls:
        run._step(batches)
    actions: dict[str, Callable[[], object]] = {
        "step": functools.partial(run._step, batches),
        "passes": lambda: repeat(run, calls),
    }
    if reference:
        other, its = ready("supervised", [word for word in words if not word.startswith("method.")])
        actions["reference"] = functools.partial(other._step, its)
    times = medians(actions, repeats, cuda)
    passes = METHODS[name].step_cost
    about = {"method": name, "device": str(run.device), "threads": torch.get_num_threads()}
    about["passes"] = written(passes) if passes else ""
    return {**about, **times, "memory_mb": memory / 2**20, "calls": len(calls)}


def repeat(run: Trainer, calls: list[Call]) -> None:
    for call in calls:
        call.repeat()
    run.optimizer.zero_grad()


def medians(actions: dict[str, Callable[[], object]], repeats: int, cuda: bool) -> dict[str, float]:
    """Milliseconds of wall and processor time by action, interleaved, so that a drift of speed meets both alike."""
    found: dict[str, list[float]] = {}
    for i in range(repeats + 2):
        for name, action in actions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            if cuda:
                torch.cuda.synchronize()
            if i >= 2:
                found.setdefault(f"{name}_ms", []).append(1000 * (time.perf_counter() - wall))
                found.setdefault(f"{name}_cpu_ms", []).append(1000 * (time.process_time() - cpu))
    return {name: statistics.median(values) for name, values in found.items()}


def keep(path: Path, methods: dict[str, dict[str, Any]], repeats: int, words: list[str]) -> None:
    """Writes what was measured with machine, date and versions; what the file has of other methods is not kept."""
    first = next(iter(methods.values()))
    about = {
        "made": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": processor(),
        "device": first["device"],
        "threads": first["threads"],
        "repeats": repeats,
        "fields": words,
        "versions": versions(),
        "git": git_state(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({**about, "methods": methods}, indent=1) + "\n").encode())


def processor() -> str:
    """What the machine computes with, as the kernel calls it, and how many of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def main() -> int:
    """Prints a line a method; returns 0 where every ratio of processor times (on a GPU: wall times) meets the aim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; all by default")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep what is measured")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    given, words = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if given.one:
        print(json.dumps(one(given.one, words, given.repeats, given.json is not None)))
        return 0
    unknown = [name for name in given.methods if name not in METHODS]
    if unknown:
        parser.error(f"{unknown[0]}: no such method; there are {', '.join(METHODS)}")
    print(f"{'method':<12} {'step ms':>8} {'passes':>8} {'ratio':>6} {'cpu ratio':>9} {'peak MB':>8}", flush=True)
    worst, kept = 0.0, {}
    options = ["--repeats", str(given.repeats), *(["--json", str(given.json)] if given.json else [])]
    for name in given.methods or METHODS:
        command = [sys.executable, __file__, "--one", name, *options, "--", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        wall, cpu = (row[f"step_{kind}"] / row[f"passes_{kind}"] for kind in ("ms", "cpu_ms"))
        kept[name] = row
        worst = max(worst, wall if row["device"].startswith("cuda") else cpu)
        numbers = f"{row['step_ms']:8.1f} {row['passes_ms']:8.1f} {wall:6.2f} {cpu:9.2f} {row['memory_mb']:8.0f}"
        print(f"{name:<12} {numbers}", flush=True)
    if given.json:
        keep(given.json, kept, given.repeats, words)
    print(f"largest ratio {worst:.2f} (aim: at most {AIM})")
    return 0 if worst <= AIM else 1


if __name__ == "__main__":
    raise SystemExit(main())
