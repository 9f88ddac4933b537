"""What text costs: looking words up in a step, opening a bank of COCO's size, and captioning with one and two models.

OMP_NUM_THREADS=1 python benchmarks/text.py [--parts step bank caption] [--images 64]

step: the looked-up words of a batch against the null token alone (a bank without a word), as a share of one ViLaDiff
step on the built-in data set and of one with the tokens of CLIP; medians of alternating repeats. bank: 118,000 images
with two captions of 77 tokens and 512 channels, 18.6 GB as a sparse file, so that reading it costs no disk but every
page that a real one costs. caption: BLIP-2 with the real classes and tiny random weights, which measures everything but
the model; images a second of a model in this process, and of one and two actors through Ray Data, start not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from viladiff.data import cache
from viladiff.runs.config import RunConfig, override
from viladiff.text.embedding_bank import EmbeddingBank, empty_bank, open_bank
from viladiff.training.trainer import Trainer

STEP_AIM, OPEN_AIM, MEMORY_AIM = 0.02, 1.0, 200
IMAGES, TOKENS, WIDTH = 118_000, 2 * 77, 512


def part(name: str) -> ModuleType:
    """A module of the tests, which is in no package."""
    path = Path(__file__).resolve().parent.parent / "tests" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def median_ms(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians of alternating calls, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(repeats + 2):
        for name, action in actions.items():
            begun = time.perf_counter()
            action()
            if i >= 2:
                times[name].append(1000 * (time.perf_counter() - begun))
    return {name: statistics.median(values) for name, values in times.items()}


def sparse_bank(directory: Path, images: int = IMAGES) -> Path:
    """A bank of zeros that takes no disk, with the manifest of a real one."""

    def make(draft: Path) -> cache.Facts:
        kinds = {
            "tokens": ((images, TOKENS, WIDTH), np.float16),
            "mask": ((images, TOKENS), bool),
            "pooled": ((images, WIDTH), np.float16),
        }
        for name, (shape, kind) in kinds.items():
            np.lib.format.open_memmap(draft / f"{name}.npy", "w+", kind, shape)
        return {"encoder": "open_clip", "source": "nobody", "unknown": 0, "cut": 0}

    cache.open_or_make(directory / "sparse", make)
    return directory / "sparse"


def resident() -> float:
    """MiB of this process in main memory now, mapped files among them."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) / 1024


def looked_up(run: Trainer, bank: EmbeddingBank) -> Callable[[], object]:
    """The words of a step's labelled and unlabelled images, at other places each time, on the run's device."""
    rng, data = np.random.default_rng(0), run.cfg.data

    def look() -> None:
        for size in (data.batch_labelled, data.batch_unlabelled):
            text = bank.batch(rng.integers(0, len(bank), size))
            text.tokens.to(run.device), text.mask.to(run.device)

    return look


def bench_step(repeats: int) -> bool:
    with tempfile.TemporaryDirectory() as out:
        run = Trainer(override(RunConfig(), {"method.name": "viladiff", "runtime.threads": 1, "runtime.runs_dir": out}))
        run._build()
        run.method.train()
        coco = open_bank(sparse_bank(Path(out), 20_000))
        batches = run.loader.micro_batches(0)
        found = median_ms(
            {
                "step": lambda: run._step(batches),
                "words": looked_up(run, run.bank),
                "clip": looked_up(run, coco),
                "null": looked_up(run, empty_bank(len(run.bank))),
            },
            repeats,
        )
    good = True
    for name, title in (("words", "words of the built-in data set"), ("clip", "2 x 77 tokens of 512 channels")):
        share = (found[name] - found["null"]) / found["step"]
        print(f"{title}: {found[name]:.2f} ms, null token {found['null']:.2f} ms: {share:+.2%} of a step of")
        print(f"{found['step']:.0f} ms (aim {STEP_AIM:.0%})")
        good &= share <= STEP_AIM
    return good


def bench_bank(batches: int = 1000, size: int = 8) -> bool:
    with tempfile.TemporaryDirectory() as out:
        place = sparse_bank(Path(out))
        disk = sum(path.stat().st_blocks * 512 for path in place.iterdir()) / 2**20
        before, begun, busy = resident(), time.perf_counter(), time.process_time()
        bank = open_bank(place)
        opened, computed, rng, most = (
            time.perf_counter() - begun,
            time.process_time() - busy,
            np.random.default_rng(0),
            0.0,
        )
        after = resident() - before
        begun = time.perf_counter()
        for _ in range(batches):
            bank.batch(rng.integers(0, len(bank), size))
            most = max(most, resident() - before)
        each = (time.perf_counter() - begun) / batches
    print(f"{len(bank):,} images, {bank.tokens.nbytes / 1e9:.1f} GB of tokens (sparse: {disk:.0f} MiB on disk)")
    print(f"opened in {opened:.2f} s (aim {OPEN_AIM:g} s), of which it computed {computed:.2f} s")
    print(
        f"{after:.0f} MiB resident then, at most {most:.0f} MiB (aim {MEMORY_AIM} MiB) in {batches} batches of {size},"
    )
    print(f"{1000 * each:.2f} ms each")
    return opened < OPEN_AIM and most < MEMORY_AIM


def note(heard: list[tuple[float, int]], done: int, of: int) -> None:
    heard.append((time.perf_counter(), done))


def bench_caption(images: int) -> bool:
    from viladiff.cluster import captioning
    from viladiff.text.captioning.blip2 import Captioner, caption_batch, reader, writer
    from viladiff.text.captioning.job import CaptioningJob, pictures

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory)
        part("photographs").write(top / "photos", images, sizes=(330, 500))
        who = writer(part("tiny_models").blip(top / "blip2-tiny"))
        name, all_ = pictures(str(top / "photos"))
        captioner, read = Captioner(who), reader(name)
        caption_batch(captioner, all_[:8], read)
        begun = time.perf_counter()
        for start in range(0, len(all_), 8):
            caption_batch(captioner, all_[start : start + 8], read)
        rates = {"in this process": len(all_) / (time.perf_counter() - begun)}
        for actors in (1, 2):
            heard: list[tuple[float, int]] = []
            job = CaptioningJob(name, all_, who, top / f"{actors}.parquet")
            captioning.run_job(
                job,
                actors=actors,
                batch=8,
                advance=partial(note, heard),
            )
            # From the first batch of each model on: before it, Ray and the models were starting.
            (begun, first), (ended, last) = heard[actors], heard[-1]
            rates[f"{actors} actor{'s' * (actors > 1)}"] = (last - first) / (ended - begun)
    for title, rate in rates.items():
        print(f"captioning, {title}: {rate:.1f} images a second, two prompts each")
    ratio = rates["2 actors"] / rates["1 actor"]
    print(f"two actors {ratio:.2f} times as fast as one, on {len(os.sched_getaffinity(0))} processors")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where the aims are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["step", "bank", "caption"], choices=["step", "bank", "caption"])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--images", type=int, default=192, help="to be captioned")
    args = parser.parse_args(arguments)
    parts = {
        "step": lambda: bench_step(args.repeats),
        "bank": bench_bank,
        "caption": lambda: bench_caption(args.images),
    }
    met = {name: parts[name]() for name in args.parts}
    print(json.dumps(met))
    return int(not all(met.values()))


if __name__ == "__main__":
    raise SystemExit(main())
