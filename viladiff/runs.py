"""A run seen from outside: what it would be before it starts, and its scores once more after it is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from viladiff.config import ConfigError, RunConfig, override
from viladiff.fields import nest


def preview(cfg: RunConfig) -> dict[str, Any]:
    """Name, place, length, images and parameters of what ``fit(cfg)`` would do; may render data, trains nothing."""
    from viladiff.methods import METHODS
    from viladiff.models.segmenter import Build
    from viladiff.train import Run, total_steps

    run = Run(cfg)
    method = METHODS[cfg.method.name](cfg.method, Build(cfg.model, run.dataset.num_classes, run.bank.dim))
    done, begun = (run.directory / name for name in ("record.json", "checkpoint.pt"))
    state = "finished" if done.exists() else "interrupted; would go on" if begun.exists() else "new"
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in method.networks().items()}
    return {
        "run": run.name,
        "directory": run.directory,
        "state": state,
        "device": run.device,
        "steps": total_steps(cfg, run.dataset, method.views_wanted().unlabelled),
        "labelled images": len(run.dataset.labelled),
        "unlabelled images": len(run.dataset.unlabelled) if method.views_wanted().unlabelled else "not used",
        "validation images": len(run.dataset.val_images),
        "captions": run.dataset.caption_source,
        **{f"parameters of {name}": f"{count:,}" for name, count in counts.items()},
        "trained parameters": f"{sum(p.numel() for p in method.parameters() if p.requires_grad):,}",
    }


def evaluate_run(directory: Path | str, changes: Mapping[str, object]) -> dict[str, Any]:
    """``network/stream/score`` of a finished run, with other fields under ``eval`` and ``runtime`` if wanted.

    The record is left as it is. Raises ConfigError for other fields, ValueError where there is no finished run.
    """
    from viladiff.protocols import STREAMS
    from viladiff.record import load_record
    from viladiff.scoring import scores
    from viladiff.train import Run

    directory = Path(directory)
    if not (directory / "record.json").is_file():
        raise ValueError(f"{directory}: no record.json in it, so it is not the directory of a finished run")
    wrong = [path for path in changes if path.split(".")[0] not in ("eval", "runtime")]
    if wrong:
        raise ConfigError(f"{wrong[0]}: would be another run; of a finished one only eval and runtime can be changed")
    if not (directory / "checkpoint.pt").is_file():
        raise ValueError(f"{directory}: no checkpoint.pt in it (viladiff runs gc removes it), so no network to score")
    record = load_record(directory / "record.json")
    run = Run(override(RunConfig(**nest(record.config)), {"runtime.workers": 1, **changes}))
    run.directory = directory.resolve()
    run._build()
    run._restore()
    found: dict[str, Any] = {"run": record.run_id, "protocol": run.cfg.eval.protocol}
    for name, network in run.method.networks().items():
        for stream, measured in scores(run, network, STREAMS, run.cfg.eval.boundary).items():
            found |= {
                f"{name}/{stream}/{what}": value
                for what, value in measured.items()
                if not isinstance(value, list | tuple)
            }
    return found
