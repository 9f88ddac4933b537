"""One ViLaDiff step against the sum of its passes, each measured alone: what losses, draws and optimiser add.

python benchmarks/step.py              both halves of training, medians of interleaved repeats, one thread
python benchmarks/step.py --profile    also where the time of a step goes
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from viladiff.methods.viladiff import ViLaDiff
from viladiff.models.blocks import upsample
from viladiff.models.mixe.denoiser import Denoiser, class_codes
from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import Trainer


def passes(run: Trainer, late: bool) -> dict[str, Callable[[], object]]:
    """The forwards and backwards that a step cannot do without, on tensors of the step's shapes."""
    method = run.method
    assert isinstance(method, ViLaDiff) and isinstance(method.denoiser, Denoiser)
    data, cfg, denoiser = run.cfg.data, method.cfg.mixe, method.denoiser
    labelled, unlabelled = data.batch_labelled, data.batch_unlabelled
    grid, taught = data.crop // int(method.student.decoder.stride), 2 * min(labelled, unlabelled)
    batch = run.loader.micro_batches(0)[0]
    images = torch.cat([batch.image, batch.strong[0]])
    assert batch.text is not None
    rows = torch.arange(len(images)) % labelled
    text = type(batch.text)(batch.text.tokens[rows], batch.text.mask[rows])
    twice = type(text)(torch.cat([text.tokens] * 2, 1), torch.cat([text.mask] * 2, 1))
    codes = torch.randn(taught, class_codes(run.dataset.num_classes).shape[1], grid, grid)
    region, t = torch.zeros(taught, grid, grid, dtype=torch.bool), torch.ones(taught, dtype=torch.int64)
    few = type(text)(text.tokens[:taught], text.mask[:taught])
    with torch.no_grad():
        stream = method.student.streams(images[:taught], few)["fusion"]

    def student() -> None:
        found = method.student.streams(images, twice)
        sum(upsample(s.logits, images.shape[-2:]).mean() + s.features.mean() for s in found.values()).backward()  # type: ignore[union-attr]

    def teacher() -> None:
        with torch.no_grad():
            method.teacher.streams(images[:taught], few)

    def denoise() -> None:
        clean, noise = denoiser(codes, region, region, t, denoiser.prepare(stream.mid, stream.logits))
        (upsample(clean, images.shape[-2:]).mean() + noise.mean()).backward()

    def refine() -> None:
        cut = slice(0, unlabelled)
        with torch.no_grad():
            condition = denoiser.prepare(stream.mid[cut], stream.logits[cut])
            for _ in range(cfg.timesteps):
                denoiser(codes[cut], region[cut], region[cut], t[cut], condition)

    chosen: dict[str, Callable[[], object]] = {"student": student, "teacher": teacher, "denoiser": denoise}
    return chosen | ({"refinement": refine} if late else {})


def median_ms(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians of interleaved calls, so that a drift of the machine's speed meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(repeats + 2):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if i >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        run = Trainer(override(RunConfig(), {"method.name": "viladiff", "runtime.threads": 1, "runtime.runs_dir": out}))
        run._build()
    run.method.train()
    for half, step in (("first half", 100), ("second half, with refinement", 400)):
        run.step = step
        parts = passes(run, late=step > 300)
        batches = run.loader.micro_batches(run.step)
        data = {"data": functools.partial(run.loader.micro_batches, run.step)}
        whole = {"step": functools.partial(run._step, batches)}
        found = median_ms({**whole, **parts, **data}, args.repeats)
        alone = sum(found[name] for name in parts)
        listed = ", ".join(f"{name} {found[name]:.0f}" for name in parts)
        print(
            f"{half}: step {found['step']:.0f} ms / passes {alone:.0f} ms ({listed}) = {found['step'] / alone:.2f}; "
            f"making the batch {found['data']:.0f} ms"
        )
        if args.profile:
            with torch.profiler.profile() as profile:
                for _ in range(5):
                    run._step(run.loader.micro_batches(run.step))
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=45))


if __name__ == "__main__":
    main()
