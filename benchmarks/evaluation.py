"""All scores of a ViLaDiff run from one pass over the images against a pass for each network and for the pseudo-labels.

python benchmarks/evaluation.py [--images 100] [--repeats 3]    medians of interleaved repeats, one thread

Both sides use the same networks and scores; what differs is what they compute more than once. Also prints how many
images go through each encoder for one image that is scored (aim: 1).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from viladiff.evaluation import evaluator
from viladiff.evaluation.pixel_counts import evaluate_network
from viladiff.evaluation.protocols import STREAMS
from viladiff.models.segmenter import Segmenter
from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import Trainer


def separately(run: Trainer) -> None:
    """A pass over the images for each network, and one for the pseudo-labels."""
    cfg = run.cfg.eval
    given = run.dataset.num_classes, cfg.boundary, cfg.protocol, run.cfg.data.crop
    for network in run.method.eval_networks().values():
        evaluate_network(network, evaluator.eval_batches(run), STREAMS, *given)
    pseudo = evaluator.PseudoLabels(run)
    run.method.eval()
    for images, target, text in evaluator.eval_batches(run):
        pseudo.add(images, target, text)
    pseudo.shares()


def passes(run: Trainer, action: Callable[[Trainer], object], images: int) -> dict[str, float]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    fields = {"method.name": "viladiff", "runtime.threads": 1, "runtime.device": "cpu", "eval.max_images": args.images}
    with tempfile.TemporaryDirectory() as out:
        run = Trainer(override(RunConfig(), {**fields, "runtime.runs_dir": out}))
        run._build()
    sides: dict[str, Callable[[Trainer], object]] = {"one pass": evaluator.evaluated, "a pass for each": separately}
    for name, action in sides.items():
        print(f"{name}: {passes(run, action, args.images)} encoder passes an image")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, action in sides.items():
            start = time.process_time()
            action(run)
            times[name].append(time.process_time() - start)
    ratios = [apart / one for one, apart in zip(times["one pass"], times["a pass for each"], strict=True)]
    print(
        f"one pass {1000 * statistics.median(times['one pass']) / args.images:.1f} ms of CPU an image; "
        f"a pass for each takes {statistics.median(ratios):.2f} times as long"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
