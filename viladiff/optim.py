"""How long a run is, and how fast each of its parameters learns at each step."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from viladiff.config import RunConfig
    from viladiff.data.datasets import Dataset
    from viladiff.methods.base import Method


def total_steps(cfg: RunConfig, dataset: Dataset, uses_unlabelled: bool) -> int:
    """Optimiser steps of the run; an epoch is one pass over the unlabelled list, or the labelled one if it is alone."""
    if cfg.train.steps is not None:
        return cfg.train.steps
    assert cfg.train.epochs is not None
    images, batch = len(dataset.labelled), cfg.data.batch_labelled
    if uses_unlabelled and len(dataset.unlabelled):
        images, batch = len(dataset.unlabelled), cfg.data.batch_unlabelled
    return max(1, math.ceil(cfg.train.epochs * images / batch))


def lr_factor(cfg: RunConfig, step: int, steps: int) -> float:
    """Share of the base learning rate at ``step`` of ``steps``: linear warm-up, then poly, cosine or constant."""
    optim = cfg.optim
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    if optim.schedule == "poly":
        return float((1 - progress) ** optim.poly_power)
    return 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1.0


def rate_scale(options: dict[str, Any], cfg: RunConfig) -> float:
    """Takes ``lr`` or ``lr_scale`` out of the options of ``Method.own_rates``: the rate as a factor of ``optim.lr``."""
    if "lr" in options:
        return float(options.pop("lr") / cfg.optim.lr)
    scale = options.pop("lr_scale")
    return float(cfg.optim.encoder_lr_scale if scale == "encoder" else scale)


def part_of(name: str, paths: Iterable[str]) -> str:
    """The longest of the dotted ``paths`` that a parameter's name lies below, or ""."""
    return max((path for path in paths if f"{name}.".startswith(f"{path}.")), key=len, default="")


def check_paths(paths: Iterable[str], method: Method) -> None:
    """ValueError, with the nearest part, for a path without a parameter below it."""
    names = [name for name, _ in method.named_parameters()]
    for path in paths:
        if not any(part_of(name, [path]) for name in names):
            parts = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
            near = difflib.get_close_matches(path, sorted(parts), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"own_rates of method.name = {method.cfg.name!r}: no parameter lies below this path, got {path!r}; "
                f"nearest: {near!r}"
            )


def param_groups(method: Method, cfg: RunConfig) -> list[dict[str, Any]]:
    """Four groups: encoder or not, with weight decay (matrices and kernels) or without (biases, norms).

    Parts with rates of their own (``Method.own_rates``) are groups beside these; the schedule is that of the run for
    all. ValueError for a path that names no part of the method.
    """
    own = method.own_rates()
    check_paths(own, method)
    groups: dict[tuple[str, bool, bool], list[Tensor]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            kind = (part_of(name, own), ".encoder." in f".{name}", parameter.ndim >= 2)
            groups.setdefault(kind, []).append(parameter)
    found = []
    for (part, encoder, decays), parameters in groups.items():
        options = dict(own.get(part, {"lr_scale": "encoder" if encoder else 1.0}))
        scale = rate_scale(options, cfg)
        decay = cfg.optim.weight_decay if decays else 0.0
        found.append({"params": parameters, "scale": scale, "weight_decay": decay, **options})
    return found
