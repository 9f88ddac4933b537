"""A step without content: networks, batches and pictures on the meta device, which has shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from viladiff.data.batch import Batch, CutMix, Step, TextBatch, Views
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.segmenter import NetworkFactory
from viladiff.runs.config import RunConfig, override

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


def empty_picture(height: int, width: int, inputs: int = 3) -> Tensor:
    return _empty(1, inputs, height, width)


def empty_text(count: int) -> TextBatch:
    return TextBatch(_empty(count, WORDS, TEXT_DIM), _empty(count, WORDS, dtype=torch.bool))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)
