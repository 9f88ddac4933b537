"""Batches of photographs from files, against the pipeline that the public repositories have: Pillow, image by image.

Run ``python benchmarks/augment.py``. One weak and two strong views of JPEGs of 500 x 375 pixels, on one thread. Each
line is a ratio of medians of one run, whose rounds alternate between the two sides. Beside the time on the clock stands
that of the processor, which other work on the machine hardly changes. What the device does to a batch is done by the
CPU here; *host* is what remains for it beside a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision import transforms

from viladiff.core import keyed_random
from viladiff.data.decode_workers import CropRecipe, DecodeRequest, DecodeWorkers, decode_all
from viladiff.data.loader import valid_pixels
from viladiff.data.transforms.augment import IMAGENET_MEAN, IMAGENET_STD, normalise, strong

SIZE, IMAGES, BATCH, VIEWS = (500, 375), 16, 8, 2
SCALE = (0.5, 2.0)


class Taken(NamedTuple):
    """Seconds an image."""

    wall: float
    cpu: float


def write_photographs(folder: Path) -> list[Path]:
    """JPEGs of pieces of two photographs, brought to one size."""
    rng, paths = np.random.default_rng(0), []
    for i in range(IMAGES):
        whole = Image.fromarray(load_sample_images().images[i % 2])
        left, top = int(rng.integers(whole.width - 480)), int(rng.integers(whole.height - 360))
        paths.append(folder / f"{i}.jpg")
        whole.crop((left, top, left + 480, top + 360)).resize(SIZE, Image.Resampling.BICUBIC).save(
            paths[-1], quality=90
        )
    return paths


# The straight pipeline


JITTER = transforms.ColorJitter(0.5, 0.5, 0.5, 0.25)
FINISH = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def straight(paths: list[Path], crop: int, step: int) -> list[Tensor]:
    """(n, 3, crop, crop) of each view, and what is padding; draws from NumPy's and torch's global generators."""
    np.random.seed(step)
    torch.manual_seed(step)
    views = [straight_views(path, crop) for path in paths]
    return [torch.stack(same) for same in zip(*views, strict=True)]


def straight_views(path: Path, crop: int) -> list[Tensor]:
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = np.random.randint(int(max(image.size) * SCALE[0]), int(max(image.size) * SCALE[1]) + 1)
    factor = side / max(image.size)
    image = image.resize((int(image.width * factor + 0.5), int(image.height * factor + 0.5)), Image.Resampling.BILINEAR)
    border = (0, 0, max(0, crop - image.width), max(0, crop - image.height))
    padding = ImageOps.expand(Image.new("L", image.size), border, fill=254)
    image = ImageOps.expand(image, border, fill=0)
    left, top = (np.random.randint(length - crop + 1) for length in image.size)
    image, padding = (each.crop((left, top, left + crop, top + crop)) for each in (image, padding))
    if np.random.random() < 0.5:
        image, padding = ImageOps.mirror(image), ImageOps.mirror(padding)
    views = [torch.from_numpy(np.array(padding)) != 254, FINISH(image)]
    for _ in range(VIEWS):
        view = JITTER(image) if np.random.random() < 0.8 else image
        if np.random.random() < 0.2:
            view = view.convert("L").convert("RGB")
        if np.random.random() < 0.5:
            view = view.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))
        views.append(FINISH(view))
    return views


# Ours


def samples(paths: list[Path], step: int) -> list[DecodeRequest]:
    return [
        DecodeRequest(str(path), None, tuple(keyed_random.numpy_generator(step, "crop", i).random(4)))
        for i, path in enumerate(paths)
    ]


def recipe(crop: int) -> CropRecipe:
    return CropRecipe(crop, SCALE, 0.5, 2, None)


def host(paths: list[Path], crop: int, step: int) -> np.ndarray:
    return decode_all(samples(paths, step), recipe(crop)).images


def ours(paths: list[Path], crop: int, step: int) -> list[Tensor]:
    found = decode_all(samples(paths, step), recipe(crop))
    weak = torch.from_numpy(found.images).float().div_(255)
    views = [
        strong(weak, [keyed_random.numpy_generator(step, f"strong-{v}", i) for i in range(len(paths))])
        for v in range(VIEWS)
    ]
    return [valid_pixels(found.shown, crop, weak.device), *map(normalise, (weak, *views))]


def medians(sides: dict[str, Callable[[int], object]], rounds: int) -> dict[str, Taken]:
    """Seconds an image of each side, medians over alternating rounds after one that warms up."""
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    for step in range(rounds + 1):
        for name, call in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call(step)
            found = Taken((time.perf_counter() - wall) / BATCH, (time.process_time() - cpu) / BATCH)
            if step:
                taken[name].append(found)
    return {name: Taken(*map(statistics.median, zip(*found, strict=True))) for name, found in taken.items()}


def compare(paths: list[Path], crop: int, rounds: int) -> None:
    part = paths[:BATCH]
    found = medians(
        {
            "straight": lambda step: straight(part, crop, step),
            "ours": lambda step: ours(part, crop, step),
            "host": lambda step: host(part, crop, step),
        },
        rounds,
    )
    base = found["straight"]
    print(f"crop {crop}: the straight pipeline makes {1 / base.cpu:.1f} images per second of processor")
    for name, text in (("ours", "file to device batch"), ("host", "host")):
        mine = found[name]
        print(
            f"crop {crop}: {text:20} {base.cpu / mine.cpu:5.2f} x faster ({mine.cpu * 1e3:.1f} against "
            f"{base.cpu * 1e3:.1f} ms an image); on the clock {base.wall / mine.wall:.2f} x"
        )


# Processes


def throughput(paths: list[Path], crop: int, rounds: int, batches: int = 6) -> None:
    """Images per second of one process and of two, rounds alternating; each has work waiting all the time."""
    batch = samples(paths, 0)
    wall: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, float] = {}
    with (
        closing(DecodeWorkers(recipe(crop), 1, IMAGES, 2)) as one,
        closing(DecodeWorkers(recipe(crop), 2, IMAGES, 2)) as two,
    ):
        for round_ in range(rounds + 1):
            for decoders in (one, two):
                count = len(decoders.pids)
                start, before = time.perf_counter(), processor(decoders)
                for i in range(batches + 2):
                    if i < batches:
                        decoders.ask(batch)
                    if i >= 2:
                        decoders.take(batch)
                if round_:
                    wall[count].append((time.perf_counter() - start) / batches / IMAGES)
                    cpu[count] = cpu.get(count, 0.0) + processor(decoders) - before
    first, second = (statistics.median(wall[count]) for count in (1, 2))
    each = [cpu[count] / rounds / batches / IMAGES for count in (1, 2)]
    print(
        f"crop {crop}: two processes decode {first / second:.2f} x as fast as one ({1 / second:.0f} against "
        f"{1 / first:.0f} images a second; {each[1] * 1e3:.1f} and {each[0] * 1e3:.1f} ms of processor an image)"
    )


def processor(decoders: DecodeWorkers) -> float:
    """Seconds of processor that these processes have used; NaN where Linux's /proc is missing."""
    total = 0.0
    for pid in decoders.pids:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists():
            return float("nan")
        total += sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--crops", type=int, nargs="+", default=[321, 513])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder))
        for crop in options.crops:
            compare(paths, crop, options.rounds)
            throughput(paths, crop, options.rounds)


if __name__ == "__main__":
    main()
