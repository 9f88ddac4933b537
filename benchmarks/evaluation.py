"""All scores of a run from one pass over the images, and photographs of several sizes in batches that are read ahead.

python benchmarks/evaluation.py passes [--images 100] [--repeats 3]    medians of interleaved repeats, one thread
python benchmarks/evaluation.py sizes [--images 96] [--repeats 5]

``passes``: a ViLaDiff run against a pass for each network and for the pseudo-labels. Both sides use the same networks
and scores; what differs is what they compute more than once. Also prints how many images go through each encoder for
one image that is scored (aim: 1).

``sizes``: photographs of several sizes from files, one by one and each read when it is its turn, against batches of one
size with a thread that reads ahead; wall and processor time, which counts all threads. Then reading alone, as for a GPU
that computes meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from viladiff.data.loading import eval_loader
from viladiff.evaluation import evaluator
from viladiff.evaluation.pixel_counts import evaluate_network
from viladiff.evaluation.protocols import STREAMS
from viladiff.models.segmenter import Segmenter
from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import Trainer

PHOTOS = {"small": ((96, 128), (128, 96), (112, 112)), "VOC": ((375, 500), (500, 375), (333, 500))}
"""Heights and widths of images."""


def separately(run: Trainer) -> None:
    """A pass over the images for each network, and one for the pseudo-labels."""
    cfg = run.cfg.eval
    given = run.dataset.num_classes, cfg.boundary, cfg.protocol, run.cfg.data.crop
    for network in run.method.eval_networks().values():
        evaluate_network(network, evaluator.eval_batches(run), STREAMS, *given)
    pseudo = evaluator.PseudoLabels(run)
    run.method.eval()
    for batch in evaluator.eval_batches(run):
        pseudo.add(batch)
    pseudo.shares()


def encoder_passes(run: Trainer, action: Callable[[Trainer], object], images: int) -> dict[str, float]:
    """Images that go through each network's encoder for one that is scored."""
    found: Counter[str] = Counter()

    def counter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        def count(_: nn.Module, given: tuple[Tensor, ...], __: object) -> None:
            found[name] += len(given[0])

        return count

    encoders = {name: m.encoder for name, m in run.method.named_modules() if isinstance(m, Segmenter)}
    hooks = [encoder.register_forward_hook(counter(name)) for name, encoder in encoders.items()]
    action(run)
    for hook in hooks:
        hook.remove()
    return {name: count / images for name, count in found.items()}


def passes(images: int, repeats: int) -> None:
    """Prints passes an image and the ratio of processor times."""
    fields = {"method.name": "viladiff", "runtime.threads": 1, "runtime.device": "cpu", "eval.max_images": images}
    with tempfile.TemporaryDirectory() as out:
        run = Trainer(override(RunConfig(), {**fields, "runtime.runs_dir": out}))
        run._build()
    sides: dict[str, Callable[[Trainer], object]] = {"one pass": evaluator.evaluated, "a pass for each": separately}
    for name, action in sides.items():
        print(f"{name}: {encoder_passes(run, action, images)} encoder passes an image")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, action in sides.items():
            start = time.process_time()
            action(run)
            times[name].append(time.process_time() - start)
    ratios = [apart / one for one, apart in zip(times["one pass"], times["a pass for each"], strict=True)]
    print(
        f"one pass {1000 * statistics.median(times['one pass']) / images:.1f} ms of CPU an image; "
        f"a pass for each takes {statistics.median(ratios):.2f} times as long"
    )


def write_photos(root: Path, images: int, sizes: tuple[tuple[int, int], ...]) -> None:
    """Pieces of two photographs, with masks by brightness; the first four are labelled, the rest scored."""
    rng, photos = np.random.default_rng(0), load_sample_images().images
    lists = root / "splits" / "four"
    for folder in (root / "images", root / "masks", lists):
        folder.mkdir(parents=True)
    for i in range(images + 4):
        height, width = sizes[i % len(sizes)]
        photo = photos[i % 2]
        # Its height of 427 is less than that of some pieces.
        photo = np.concatenate([photo, photo[::-1]])
        top, left = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
        piece = photo[top : top + height, left : left + width]
        Image.fromarray(piece).save(root / "images" / f"{i:04}.jpg", quality=90)
        Image.fromarray((piece.mean(2) // 64).astype(np.uint8)).save(root / "masks" / f"{i:04}.png")
    (root / "classes.txt").write_text("dark\ndim\nbright\nwhite\n", encoding="utf-8")
    for name, some in (("labelled", range(4)), ("val", range(4, images + 4))):
        (lists / f"{name}.txt").write_text("\n".join(f"{i:04}" for i in some), encoding="utf-8")


def measured(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of all threads."""
    begun = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def compared(title: str, sides: dict[str, Callable[[], object]], images: int, repeats: int) -> None:
    """Prints the medians of alternating repeats, in ms an image, and ratios to the first side."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, action in sides.items():
            times[name].append(measured(action))
    first = next(iter(times.values()))
    for name, found in times.items():
        wall, cpu = (1000 * statistics.median(one[k] for one in found) / images for k in (0, 1))
        ratios = [statistics.median(one[k] / base[k] for one, base in zip(found, first, strict=True)) for k in (0, 1)]
        print(
            f"{title}, {name}: {wall:.1f} ms an image by the clock, {cpu:.1f} ms of CPU; "
            f"{ratios[0]:.2f} and {ratios[1]:.2f} of the first"
        )


def sizes(images: int, repeats: int) -> None:
    """Prints times of photographs of several sizes, and fails where the scores differ."""
    for kind, some in PHOTOS.items():
        with tempfile.TemporaryDirectory() as place:
            root = Path(place) / "photos"
            write_photos(root, images, some)
            fields = {
                "data.dataset": "folder", "data.split": "four", "data.crop": 64, "data.captions": "none",
                "data.text_encoder": "words", "method.name": "supervised", "model.encoder": "digits_vit",
                "model.pretrained": "none", "train.precision": "fp32", "runtime.device": "cpu",
                "runtime.threads": 1, "runtime.data_root": str(root), "runtime.runs_dir": place,
            }  # fmt: skip
            if kind == "VOC":
                fields |= {"model.encoder": "mobilenetv3_small_100", "model.encoder_stride": 16}
            run = Trainer(override(RunConfig(), fields))
            run._build()
            ahead = Trainer(override(run.cfg, {"runtime.loader_workers": 1}))
            ahead.method = run.method
            scores: dict[str, object] = {}

            def one_by_one(run: Trainer = run, scores: dict[str, object] = scores) -> None:
                together, eval_loader.BATCH_PIXELS = eval_loader.BATCH_PIXELS, 1
                try:
                    scores["one by one"] = evaluator.evaluated(run)[0]["student"]["visual"]["miou"]
                finally:
                    eval_loader.BATCH_PIXELS = together

            def batched(run: Trainer = ahead, scores: dict[str, object] = scores) -> None:
                scores["batched"] = evaluator.evaluated(run)[0]["student"]["visual"]["miou"]

            compared(kind, {"one by one": one_by_one, "batches read ahead": batched}, images, repeats)
            if len(set(scores.values())) > 1:
                print(f"scores differ by rounding: {scores}")
            planned = eval_loader.plan_batches(run.dataset, range(images), lambda size: 8)

            def read(threads: int, run: Trainer = run, planned: list = planned) -> None:
                for _ in eval_loader.validation(run.dataset, None, run.device, planned, threads):
                    pass

            sides: dict[str, Callable[[], object]] = {
                f"{threads} threads": lambda threads=threads: read(threads)  # type: ignore[misc]
                for threads in (0, 1, 2)
            }
            compared(f"{kind}, reading alone", sides, images, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("passes", "sizes"), nargs="?", default="passes")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    {"passes": passes, "sizes": sizes}[args.what](args.images, args.repeats)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
