"""Images that one core of the host prepares in a second, against torch's DataLoader with UniMatch-V2's transforms.

python benchmarks/loader.py [--rounds 5]      aims: 1.5 times on VOC's sizes, 3 times on Cityscapes' with the cache

VOC's sizes: JPEGs of 500 x 375 (about 100 KB) with palette PNGs, crop 518. Cityscapes': PNGs of 2048 x 1024 (about 2.2
MB) with PNGs of label ids, crop 798. All are made up. Half of a batch is labelled: a weak view and its mask. The other
half is not: a weak and two strong views. Beside the main process, which receives batches, this package has one process
that loads and the other side one for each half, as published; the unit is the processor time of all. The sides take
turns in each round; figures are medians of rounds.

*host* is what this package leaves to the processor beside a GPU: files to uint8 crops, and the numbers that strong
views and CutMix draw. Colours, grey and blur are the GPU's; *all on the CPU* has them done here, as DataLoader's side
has, by one thread of the main process. *cached* is the same with ``runtime.picture_cache``, filled beforehand.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from viladiff.core import keyed_random
from viladiff.data.decode_workers import CropRecipe, DecodedBatch, DecodeRequest, DecodeWorkers, decode_all
from viladiff.data.loader import valid_pixels
from viladiff.data.transforms.augment import IMAGENET_MEAN, IMAGENET_STD, normalise, strong, unit_images
from viladiff.data.transforms.mixing import cutmix_boxes

SCALE, VIEWS, BATCH = (0.5, 2.0), 2, 8
Side = Callable[[int], Iterator[object]]
"""The batches of one way to load, as many as asked for."""
BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


class Kind(NamedTuple):
    """A data set's sizes."""

    height: int
    width: int
    crop: int
    classes: int
    jpeg: bool
    noise: float
    images: int
    aim: float


KINDS = {
    "voc": Kind(375, 500, 518, 21, True, 8.0, 24, 1.5),
    "cityscapes": Kind(1024, 2048, 798, 19, False, 1.0, 8, 3.0),
}


class Pair(NamedTuple):
    image: Path
    mask: Path


def photograph(rng: np.random.Generator, height: int, width: int, noise: float) -> np.ndarray:
    """(height, width, 3) uint8: smooth shapes of several sizes, and grain that decides how far it compresses."""
    out = np.full((height, width, 3), 110, np.float32)
    for octave in range(2, 8):
        cells = max(2, height * 2**octave // width), 2**octave
        shapes = rng.normal(size=(*cells, 3)).astype(np.float32)
        shapes = 0.6 * shapes.mean(2, keepdims=True) + 0.4 * shapes
        for channel in range(3):
            part = Image.fromarray(np.ascontiguousarray(shapes[..., channel]))
            part = part.resize((width, height), Image.Resampling.BICUBIC)
            out[..., channel] += np.asarray(part) * 60 / octave**1.2
    out += rng.normal(0, noise, (height, width, 1)) + rng.normal(0, noise / 3, (height, width, 3))
    return out.clip(0, 255).astype(np.uint8)


def write_files(folder: Path, kind: Kind) -> list[Pair]:
    """Photographs with masks of a few regions; both as the data set stores them."""
    rng, pairs = np.random.default_rng(0), []
    for i in range(kind.images):
        pair = Pair(folder / f"{i}.{'jpg' if kind.jpeg else 'png'}", folder / f"{i}_labels.png")
        pixels = Image.fromarray(photograph(rng, kind.height, kind.width, kind.noise))
        options: dict[str, Any] = {"quality": 95} if kind.jpeg else {}
        pixels.save(pair.image, **options)
        regions = rng.integers(0, kind.classes, (6, 10), dtype=np.uint8)
        mask = Image.fromarray(regions).resize((kind.width, kind.height), NEAREST)
        if kind.jpeg:
            mask.putpalette([value for colour in range(256) for value in (colour, colour * 7 % 256, colour * 31 % 256)])
        mask.save(pair.mask)
        pairs.append(pair)
        for path in pair:  # as of files that have lain there, which a cache may know by their time
            os.utime(path, (1e9, 1e9))
    return pairs


# DataLoader with UniMatch-V2's transforms, by its published description

JITTER = transforms.ColorJitter(0.5, 0.5, 0.5, 0.25)
FINISH = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


class Published(Dataset[dict[str, Tensor]]):
    """Pictures image by image: even places are labelled, odd ones are not, and their masks are not opened."""

    def __init__(self, pairs: Sequence[Pair], kind: Kind, length: int) -> None:
        self.pairs, self.kind, self.length = pairs, kind, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        pair, labelled = self.pairs[place // 2 % len(self.pairs)], place % 2 == 0
        with Image.open(pair.image) as file:
            image = file.convert("RGB")
        if labelled:
            with Image.open(pair.mask) as file:
                mask = Image.fromarray(np.array(file))
        else:
            mask = Image.new("L", image.size)
        image, mask = weak_view(image, mask, self.kind.crop, 255 if labelled else 254)
        labels = torch.from_numpy(np.array(mask)).long()
        if labelled:
            return {"image": FINISH(image), "mask": labels}
        views = {f"strong{i}": FINISH(strong_view(image)) for i in range(VIEWS)}
        boxes = {f"box{i}": cut_box(self.kind.crop) for i in range(VIEWS)}
        return {"weak": FINISH(image), "mask": labels, **views, **boxes}


def weak_view(image: Image.Image, mask: Image.Image, crop: int, padding: int) -> tuple[Image.Image, Image.Image]:
    """Resize the whole image, pad it to the crop, cut, mirror."""
    side = random.randint(int(max(image.size) * SCALE[0]), int(max(image.size) * SCALE[1]))
    factor = side / max(image.size)
    size = int(image.width * factor + 0.5), int(image.height * factor + 0.5)
    image, mask = image.resize(size, BILINEAR), mask.resize(size, NEAREST)
    border = (0, 0, max(0, crop - size[0]), max(0, crop - size[1]))
    image, mask = ImageOps.expand(image, border, fill=0), ImageOps.expand(mask, border, fill=padding)
    left, top = (random.randint(0, length - crop) for length in image.size)
    image, mask = (each.crop((left, top, left + crop, top + crop)) for each in (image, mask))
    return (ImageOps.mirror(image), ImageOps.mirror(mask)) if random.random() < 0.5 else (image, mask)


def strong_view(image: Image.Image) -> Image.Image:
    if random.random() < 0.8:
        image = JITTER(image)
    if random.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if random.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    return image


def cut_box(crop: int) -> Tensor:
    """(crop, crop) with 1 in a box of 2 to 40 % of the area, in half of all cases."""
    box = torch.zeros(crop, crop)
    if random.random() < 0.5:
        return box
    while True:
        area, ratio = random.uniform(0.02, 0.4) * crop**2, random.uniform(0.3, 1 / 0.3)
        width, height = int((area / ratio) ** 0.5), int((area * ratio) ** 0.5)
        left, top = random.randrange(crop), random.randrange(crop)
        if left + width <= crop and top + height <= crop:
            box[top : top + height, left : left + width] = 1
            return box


def published(pairs: Sequence[Pair], kind: Kind, batches: int) -> Iterator[object]:
    """Batches of ``BATCH`` images, half of them labelled, by one worker."""
    places = Published(pairs, kind, batches * BATCH)
    sets = [torch.utils.data.Subset(places, range(first, batches * BATCH, 2)) for first in (0, 1)]
    # One loader for each half, as published, with half a batch each; the worker of either does half of the work.
    loaders: list[DataLoader[Any]] = [DataLoader(part, BATCH // 2, num_workers=1) for part in sets]
    yield from zip(*loaders, strict=True)


# This package's


def requests(pairs: Sequence[Pair], step: int) -> list[DecodeRequest]:
    found = []
    for key in range(BATCH):
        labelled, place = key < BATCH // 2, key % (BATCH // 2)
        pair = pairs[(step * BATCH // 2 + place) % len(pairs)]
        rng = keyed_random.numpy_generator(0, "crop-labelled" if labelled else "crop-unlabelled", step, key)
        found.append(
            DecodeRequest(str(pair.image), str(pair.mask) if labelled else None, tuple(rng.random(4).tolist()))
        )
    return found


def recipe(kind: Kind) -> CropRecipe:
    return CropRecipe(kind.crop, SCALE, 0.5, kind.classes, None)


def draws(step: int, view: int) -> list[np.random.Generator]:
    return [keyed_random.numpy_generator(0, f"strong-{view}", step, key) for key in range(BATCH // 2)]


def copied(found: DecodedBatch, kind: Kind) -> list[object]:
    """What the main process sends to the device: crops and masks, copied as into pinned memory, and small tensors."""
    unlabelled = found.shown[BATCH // 2 :]
    drawn = [np.array([[*rng.random(8), *rng.permutation(4)] for rng in draws(0, view)]) for view in range(VIEWS)]
    boxes = [cutmix_boxes(draws(0, view), kind.crop, 1) for view in range(VIEWS)]
    return [torch.from_numpy(found.images).clone(), torch.from_numpy(found.masks).clone(), unlabelled, drawn, boxes]


def host(pairs: Sequence[Pair], kind: Kind, batches: int, asked: CropRecipe) -> Iterator[object]:
    """Decoded batches by one process, which is ahead by two."""
    with closing(DecodeWorkers(asked, 1, BATCH, 2)) as workers:
        ahead = [requests(pairs, step) for step in range(batches)]
        for step in range(batches + 2):
            if step < batches:
                workers.ask(ahead[step])
            if step >= 2:
                yield copied(workers.take(ahead[step - 2]), kind)


def on_the_cpu(pairs: Sequence[Pair], kind: Kind, batches: int, asked: CropRecipe) -> Iterator[object]:
    """The same views as DataLoader's side, by this process alone."""
    half = BATCH // 2
    for step in range(batches):
        found = decode_all(requests(pairs, step), asked)
        pixels = unit_images(torch.from_numpy(found.images))
        views = [normalise(strong(pixels[half:], draws(step, view))) for view in range(VIEWS)]
        boxes = [cutmix_boxes(draws(step, view), kind.crop, 1) for view in range(VIEWS)]
        valid = valid_pixels(found.shown[half:], kind.crop, pixels.device)
        yield normalise(pixels), torch.from_numpy(found.masks[:half]).long(), views, boxes, valid


class Taken(NamedTuple):
    """Seconds an image."""

    cpu: float
    wall: float


def spent() -> tuple[float, float]:
    """Seconds of processor of this process and its children, and of the clock. Needs Linux."""
    total = time.process_time()
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return total, time.perf_counter()


EDGE = 4
"""Batches before and behind those that are timed: processes start in the former, and look ahead into the latter."""


def timed(side: Side, batches: int) -> Taken:
    """Return the time of ``batches`` batches while every process has work all the time."""
    marks = []
    for i, _ in enumerate(side(batches + 2 * EDGE)):
        if i + 1 in (EDGE, EDGE + batches):
            marks.append(spent())
    (cpu, wall), (cpu_end, wall_end) = marks
    return Taken((cpu_end - cpu) / batches / BATCH, (wall_end - wall) / batches / BATCH)


def compare(kind: Kind, rounds: int, batches: int) -> dict[str, Taken]:
    """Medians over rounds of every side."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_files(Path(folder), kind)
        sizes = [statistics.mean(path.stat().st_size for path in paths) / 1e3 for paths in zip(*pairs, strict=True)]
        print(f"  {kind.images} images of {sizes[0]:.0f} KB, masks of {sizes[1]:.0f} KB, crop {kind.crop}")
        plain = recipe(kind)
        cached = plain._replace(pictures=str(Path(folder) / "pictures"))
        for step in range(len(pairs)):  # fills it
            decode_all(requests(pairs, step), cached)
        sides: dict[str, Side] = {
            "DataLoader": lambda n: published(pairs, kind, n),
            "host": lambda n: host(pairs, kind, n, plain),
            "host, cached": lambda n: host(pairs, kind, n, cached),
            "all on the CPU": lambda n: on_the_cpu(pairs, kind, n, plain),
            "all on the CPU, cached": lambda n: on_the_cpu(pairs, kind, n, cached),
        }
        taken: dict[str, list[Taken]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                taken[name].append(timed(side, batches))
    return {name: Taken(*map(statistics.median, zip(*found, strict=True))) for name, found in taken.items()}


def report(kind: Kind, found: dict[str, Taken]) -> bool:
    """Print every side; return whether the aim is met."""
    base = found["DataLoader"]
    for side, taken in found.items():
        ratio = "" if side == "DataLoader" else f"  {base.cpu / taken.cpu:5.2f} times DataLoader's"
        print(
            f"  {side:23}{1 / taken.cpu:7.1f} images a second and core ({1e3 * taken.cpu:6.1f} ms of processor, "
            f"{1e3 * taken.wall:6.1f} ms on the clock){ratio}"
        )
    plain, cached = (base.cpu / found[side].cpu for side in ("host", "host, cached"))
    met = (plain if kind.jpeg else cached) >= kind.aim
    print(f"  aim {kind.aim} times{'' if kind.jpeg else ', cached'}: {'met' if met else 'not met'}")
    return met


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--images", type=int, help="distinct ones; by default 24 and 8")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS))
    args = parser.parse_args(arguments)
    met = []
    for name in args.only:
        kind = KINDS[name]._replace(**({} if args.images is None else {"images": args.images}))
        print(name)
        met.append(report(kind, compare(kind, args.rounds, args.batches)))
    return int(not all(met))


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
