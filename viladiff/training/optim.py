"""Length of a run, and each parameter's learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from viladiff.config.base import nearest

if TYPE_CHECKING:
    from viladiff.data.dataset import Dataset
    from viladiff.methods.base import Method
    from viladiff.runs.config import RunConfig


def epoch(cfg: RunConfig, dataset: Dataset, uses_unlabelled: bool) -> tuple[int, int]:
    """Return images of an epoch and images of a step: of the unlabelled list, or of the labelled one if it is alone.

    The labelled list is repeated up to ``train.epoch_images``; a longer one is not cut. Raises ValueError if that is
    ``unlabelled`` and there is no such image.
    """
    asked = cfg.train.epoch_images
    if asked == "unlabelled" and not len(dataset.unlabelled):
        raise ValueError("train.epoch_images = 'unlabelled': data.split leaves no unlabelled images; set it to none")
    if (uses_unlabelled or asked == "unlabelled") and len(dataset.unlabelled):
        return len(dataset.unlabelled), cfg.data.batch_unlabelled
    repeated = asked if isinstance(asked, int) else 0
    return max(len(dataset.labelled), repeated), cfg.data.batch_labelled


def total_steps(cfg: RunConfig, dataset: Dataset, uses_unlabelled: bool) -> int:
    """Return the run's optimiser steps: ``train.steps``, or ``train.epochs`` times those of an epoch."""
    if cfg.train.steps is not None:
        return cfg.train.steps
    assert cfg.train.epochs is not None
    images, batch = epoch(cfg, dataset, uses_unlabelled)
    return max(1, math.ceil(cfg.train.epochs * images / batch))


def evaluation_steps(cfg: RunConfig, dataset: Dataset, uses_unlabelled: bool, steps: int) -> frozenset[int]:
    """Return the numbers of steps done, below ``steps``, at which the run is evaluated during training.

    With ``eval.every_epochs`` these are the first steps at which a multiple of that many epochs is complete.
    """
    every = Fraction(cfg.eval.every_steps)
    if cfg.eval.every_epochs is not None:
        every = max(Fraction(1), Fraction(str(cfg.eval.every_epochs)) * Fraction(*epoch(cfg, dataset, uses_unlabelled)))
    if not every:
        return frozenset()
    return frozenset(math.ceil(k * every) for k in range(1, math.floor(steps / every) + 1)) - {steps}


def lr_factor(cfg: RunConfig, step: int, steps: int) -> float:
    """Return the share of the base learning rate at ``step`` of ``steps``: linear warm-up, then the schedule."""
    optim = cfg.optim
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    if optim.schedule == "poly":
        return float((1 - progress) ** optim.poly_power)
    return 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1.0


def rate_scale(options: dict[str, Any], cfg: RunConfig) -> float:
    """Pop ``lr`` or ``lr_scale`` from a value of ``Method.extra_param_groups``; return a factor of ``optim.lr``.

    An ``lr_scale`` with ``optimiser`` holds under that value of ``optim.name`` alone.
    """
    if "lr" in options:
        return float(options.pop("lr") / cfg.optim.lr)
    scale = options.pop("lr_scale")
    if options.pop("optimiser", cfg.optim.name) != cfg.optim.name:
        scale = 1.0
    return float(cfg.optim.encoder_lr_scale if scale == "encoder" else scale)


def part_of(name: str, paths: Iterable[str]) -> str:
    """Return the longest of the dotted ``paths`` that contains a parameter's name, or ""."""
    return max((path for path in paths if f"{name}.".startswith(f"{path}.")), key=len, default="")


def check_paths(paths: Iterable[str], method: Method) -> None:
    """Raise ValueError, with the nearest part, for a path without a parameter below it."""
    names = [name for name, _ in method.named_parameters()]
    for path in paths:
        if not any(part_of(name, [path]) for name in names):
            parts = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
            raise ValueError(
                f"extra_param_groups of method.name = {method.cfg.name!r}: no parameter lies below this path, "
                f"got {path!r}; nearest: {nearest(path, sorted(parts), cutoff=0.0)!r}"
            )


def param_groups(method: Method, cfg: RunConfig) -> list[dict[str, Any]]:
    """Return four groups: encoder or not, with weight decay (matrices and kernels) or without (biases, norms).

    With ``optim.decay_norm_and_bias`` there are two, since all parameters decay. Parts with rates of their own
    (``Method.extra_param_groups``) are groups beside these; the run's schedule applies to all. Raises ValueError for a
    path that names no part of the method.
    """
    own = method.extra_param_groups()
    check_paths(own, method)
    groups: dict[tuple[str, bool, bool], list[Tensor]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 or cfg.optim.decay_norm_and_bias
            kind = (part_of(name, own), ".encoder." in f".{name}", decays)
            groups.setdefault(kind, []).append(parameter)
    found = []
    for (part, encoder, decays), parameters in groups.items():
        options = dict(own.get(part, {"lr_scale": "encoder" if encoder else 1.0}))
        scale = rate_scale(options, cfg)
        decay = cfg.optim.weight_decay if decays else 0.0
        found.append({"params": parameters, "scale": scale, "weight_decay": decay, **options})
    return found


class Optimizer:
    """The optimiser that ``optim.name`` chooses, over the groups of ``param_groups``.

    A group that has ``betas``, as a method may give one of its parts, is AdamW's whatever the run's optimiser is.
    """

    def __init__(self, groups: list[dict[str, Any]], cfg: RunConfig) -> None:
        optim = cfg.optim
        self.name = optim.name
        adam = [group for group in groups if optim.name == "adamw" or "betas" in group]
        rest = [group for group in groups if optim.name == "sgd" and "betas" not in group]
        self.parts: list[torch.optim.Optimizer] = []
        if rest:
            self.parts.append(torch.optim.SGD(rest, optim.lr, optim.momentum, nesterov=optim.nesterov, fused=True))
        if adam:
            self.parts.append(torch.optim.AdamW(adam, optim.lr, optim.betas, fused=True))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        for part in self.parts:
            scaler.unscale_(part)

    def step(self, scaler: torch.amp.GradScaler) -> None:
        for part in self.parts:
            scaler.step(part)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's own state if it is the run's; of SGD ``name`` and the states of ``parts``."""
        states = [part.state_dict() for part in self.parts]
        return states[0] if self.name == "adamw" else {"name": self.name, "parts": states}

    def check_name(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for the state of another optimiser; of a finished run there is no more than its name."""
        name = state.get("name", "adamw")
        if name != self.name:
            raise ValueError(f"written with optim.name = {name!r}, got {self.name!r}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state. Raises ValueError for that of another optimiser, and for that of a finished run."""
        self.check_name(state)
        if state.keys() <= {"name"}:
            raise ValueError("of a finished run, without the state of its optimiser")
        states = [state] if self.name == "adamw" else state["parts"]
        for part, one in zip(self.parts, states, strict=True):
            part.load_state_dict(dict(one))
