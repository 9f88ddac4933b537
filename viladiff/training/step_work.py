"""The work of one optimiser step, counted without content: forward, backward, optimiser and the method's own update.

Nothing is downloaded and no image is read. What is counted is what a GPU does; on a CPU some operations are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from viladiff.data.batch import Batch, CutMix, Step, TextBatch, Views
from viladiff.evaluation.meta_precision import MetaPrecision
from viladiff.evaluation.operations import Line, LiveMemory, OperationCounter
from viladiff.evaluation.step_time import Load
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.cast_weights import CastWeights
from viladiff.models.segmenter import NetworkFactory
from viladiff.runs.config import RunConfig, override
from viladiff.training.optim import Optimizer, param_groups

META = torch.device("meta")
LATE = Step(9, 0.9, 0)
"""Past every warm-up, where all parts of a loss are computed."""
WORDS, TEXT_DIM = 7, 64
"""Of the captions that are tried; no encoder depends on them."""


def empty_method(cfg: RunConfig, class_names: Sequence[str], text_dim: int) -> Method:
    """Build the method with weights that are still to be loaded; no pretrained file is read.

    ``model.encoder=transformers`` is an exception: its directory alone defines the network. Raises ValueError if it is
    missing.
    """
    gone: dict[str, object] = {} if cfg.model.encoder == "transformers" else {"model.weights": None}
    plain = override(cfg, {"model.pretrained": "none", **gone})
    data, names = cfg.data, tuple(class_names)
    build = NetworkFactory(plain.model, len(names), text_dim, data.dataset, names, data.crop, inputs=data.pixels.inputs)
    return METHODS[cfg.method.name](cfg.method, build)


def method_on_meta(cfg: RunConfig, classes: int) -> Method:
    names = [f"class {i}" for i in range(classes)]
    if cfg.model.encoder != "transformers":  # its directory is read in any case
        try:
            with META:  # nothing is drawn: a ViT-B takes seconds else
                return empty_method(cfg, names, TEXT_DIM).to(META)
        except (RuntimeError, ValueError):
            pass  # some networks look at their own numbers when they are made; a fault shows again below
    return empty_method(cfg, names, TEXT_DIM).to(META)


def empty_batch(cfg: RunConfig, views: Views, classes: int, shared: bool = False) -> Batch:
    """Return a micro-batch with the views that a method asks for: a worker's, or if ``shared`` that of all workers,
    whose BatchNorm is one: an image on each of two GPUs is enough for one that has one value an image.
    """
    parts, crop = cfg.train.grad_accum_steps * (1 if shared else cfg.runtime.workers), cfg.data.crop
    labelled, unlabelled = cfg.data.batch_labelled // parts, cfg.data.batch_unlabelled // parts
    inputs = cfg.data.pixels.inputs
    more: dict[str, Any] = {"text": empty_text(labelled)} if views.text else {}
    more |= {"image_strong": _images(labelled, crop, inputs)} if views.strong_labelled else {}
    more |= {"tags": _empty(labelled, classes)} if views.tags else {}
    if views.unlabelled:
        more |= {
            "weak": (_images(unlabelled, crop, inputs),) * views.weak,
            "strong": tuple(_images(unlabelled, crop, inputs) for _ in range(views.strong)),
            "valid": _empty(unlabelled, crop, crop, dtype=torch.bool),
            "keys_u": tuple(range(unlabelled)),
            "mix": tuple(_boxes(unlabelled) for _ in range(views.strong if views.cutmix else 0)),
        }
        more |= {"text_u": empty_text(unlabelled)} if views.text else {}
        more |= {"tags_u": _empty(unlabelled, classes)} if views.tags else {}
        more |= {"truth_u": _empty(unlabelled, crop, crop, dtype=torch.int64)} if views.truth else {}
    target = _empty(labelled, crop, crop, dtype=torch.int64)
    return Batch(_images(labelled, crop, inputs), target, tuple(range(labelled)), **more)


def _boxes(count: int) -> CutMix:
    return CutMix(_empty(count, 4, dtype=torch.int64), _empty(count, dtype=torch.int64))


def _images(count: int, side: int, inputs: int) -> Tensor:
    return _empty(count, inputs, side, side)


def empty_picture(height: int, width: int, inputs: int) -> Tensor:
    return _empty(1, inputs, height, width)


def empty_text(count: int) -> TextBatch:
    return TextBatch(_empty(count, WORDS, TEXT_DIM), _empty(count, WORDS, dtype=torch.bool))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


# Counting


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FLOAT = 4
"""Bytes of a weight and of each number that an optimiser keeps of it."""
_TENSORS = 48
"""Parameters that one kernel of a fused optimiser updates, about."""


class StepWork(NamedTuple):
    """One worker's work of a step."""

    lines: list[Line]
    peak_bytes: int
    """Weights, averages, gradients, optimiser, batch and what the backward pass needs, at the most at once."""
    checkpoint_bytes: int
    """Weights, buffers and the optimiser's state."""


def count_step(cfg: RunConfig, classes: int) -> StepWork:
    """Count a step past every warm-up, when all parts of the loss are computed.

    Raises NotImplementedError or RuntimeError for a method that reads numbers of its tensors.
    """
    method = method_on_meta(cfg, classes)
    method.train()
    batch = empty_batch(cfg, method.required_views(), classes)
    optimizer = Optimizer(param_groups(method, cfg), cfg)
    state = sum(_moments(cfg, group) * _size(group["params"]) for group in optimizer.param_groups)
    counter = OperationCounter(method)
    memory = LiveMemory([*method.parameters(), *method.buffers(), *batch.tensors()])
    precision = MetaPrecision(_DTYPES[cfg.train.precision])
    parts = cfg.train.grad_accum_steps
    with memory, counter, precision, counter.modules():
        with precision.autocast():
            total = CastWeights(method, META, cfg.train.precision, method.exact)(batch, LATE).total
        counter.begin("backward")
        weights = [x for x in method.parameters() if x.requires_grad]
        gradients = torch.autograd.grad(total / parts, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        del total, gradients, gradient
        counter.begin("gradients")
        if cfg.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(method.parameters(), cfg.optim.clip_norm, foreach=True)
        optimizer.zero_grad()
        counter.begin("update")
        with torch.no_grad():
            method.after_step(LATE)
    lines = [_times(line, parts) for line in counter.lines()]
    lines += [_optimiser_line(cfg, group) for group in optimizer.param_groups]
    # Gradients of all workers are summed in buckets of their own size.
    buckets = _size(method.parameters()) if cfg.runtime.workers > 1 else 0
    kept = sum(x.untyped_storage().nbytes() for x in (*method.parameters(), *method.buffers()))
    return StepWork(lines, memory.peak + state + buckets, kept + state)


def _times(line: Line, parts: int) -> Line:
    """Return the line of a whole step, whose forward and backward passes are done in ``parts``."""
    once = line.module in ("gradients", "update")
    return line if once else line._replace(load=line.load._replace(times=line.load.times * parts))


def _moments(cfg: RunConfig, group: dict[str, object]) -> int:
    """Return the numbers that the optimiser of a group keeps of each weight."""
    return 2 if cfg.optim.name == "adamw" or "betas" in group else int(cfg.optim.momentum > 0)


def _optimiser_line(cfg: RunConfig, group: dict[str, list[Tensor]]) -> Line:
    """Return the update of a group: weight and state are read and written, the gradient is read.

    Fused optimisers do not run without content, so theirs is not traced.
    """
    moments, weights = _moments(cfg, group), group["params"]  # type: ignore[arg-type]
    kernels = -(-len(weights) // _TENSORS)
    size = (2 * (1 + moments) + 1) * _size(weights)
    name = "aten::_fused_adamw_" if moments == 2 else "aten::_fused_sgd_"
    return Line("optimiser", name, Load("other", False, 0, size // kernels, kernels))


def _size(weights: Iterator[nn.Parameter] | list[Tensor]) -> int:
    return sum(_FLOAT * x.numel() for x in weights if x.requires_grad)
