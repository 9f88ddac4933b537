"""What tests of methods share: a small instance of any method, a batch, a few steps, and loss formulas in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, CutMix, Step, TextBatch, Views
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.segmenter import NetworkFactory
from viladiff.runs.config import RunConfig, override

PAPER_DEFAULTS: dict[str, object] = {
    "vila.temperature": 2.0,
    "vila.logit_weight": 1.0,
    "vila.path_weights.teacher_logits": 1.0,
    "mixe.refine_where": "all",
    "mixe.labelled_views": "weak",
    "mixe.unlabelled_views": "weak",
}
"""ViLaDiff's fields as the class has them, without the reading that built-in data run."""
CLASSES, SIDE, WORDS = 5, 32, 6
NAMES = ("background", "one", "two", "three", "four")
STEP = Step(index=7, progress=0.9, seed=3)


def make(name: str, **changes: object) -> Method:
    """A method with an encoder of random weights; every pixel's pseudo-label is accepted unless told otherwise.

    Nor is a branch dropped: that is drawn from torch's own generator, which the loop seeds and tests do not.
    """
    cfg = override(RunConfig(), {"method.name": name, "model.pretrained": "none", "model.decoder_width": 16})
    plain = PAPER_DEFAULTS if name == "viladiff" else {}
    flat = {f"method.{path}": value for path, value in {**plain, **changes}.items()}
    if "threshold" not in str(changes) and hasattr(cfg.method, "pseudo"):
        flat["method.pseudo.threshold"] = 0.0
    if hasattr(cfg.method, "drop_path"):
        flat.setdefault("method.drop_path", 0.0)
    cfg = override(cfg, flat)
    torch.manual_seed(0)
    build = NetworkFactory(cfg.model, CLASSES, 12, class_names=NAMES, crop=SIDE, texts=vectors)
    return METHODS[name](cfg.method, build).train()


def vectors(texts: Sequence[str]) -> Tensor:
    """(n, 12) of length 1, each a text's own."""
    found = torch.stack([torch.randn(12, generator=keyed_random.torch_generator("text", text)) for text in texts])
    return found / found.norm(dim=1, keepdim=True)


def make_uneven(name: str, **changes: object) -> Method:
    """The same as if half-trained, each network in its own way, so that networks, pixels and confidences differ."""
    method, gen = make(name, **changes), torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=gen))
    return method


def make_batch(size: int = 4, seed: int = 0, views: Views | None = None) -> Batch:
    """Noise with blocks of labels, some padding, boxes on some images and words; one view of each kind by default."""
    gen = keyed_random.torch_generator("batch", seed)
    image, weak, strong = (torch.randn(size, 3, SIDE, SIDE, generator=gen) for _ in range(3))
    target = (
        torch.randint(0, CLASSES, (size, SIDE // 8, SIDE // 8), generator=gen)
        .repeat_interleave(8, 1)
        .repeat_interleave(8, 2)
    )
    target[:, :, -3:] = 255
    valid = torch.ones(size, SIDE, SIDE, dtype=torch.bool)
    valid[0, -8:] = False
    texts = [
        TextBatch(torch.randn(size, WORDS, 12, generator=gen), torch.rand(size, WORDS, generator=gen) < 0.7)
        for _ in range(2)
    ]
    keys = tuple(range(size))
    views = views or Views(weak=1, strong=1, cutmix=True)
    strongs = (strong, *(_noise(size, "strong", view, seed) for view in range(1, views.strong)))
    mix = tuple(_boxes(size, view) for view in range(max(1, views.strong))) if views.cutmix else ()
    coloured = _noise(size, "labelled", 0, seed) if views.strong_labelled else None
    tags = (_tags(size, seed, 0), _tags(size, seed, 1)) if views.tags else (None, None)
    return Batch(image, target, keys, (weak,), strongs, mix, valid, keys, *texts, coloured, *tags)


def _noise(size: int, *name: str | int) -> Tensor:
    return torch.randn(size, 3, SIDE, SIDE, generator=keyed_random.torch_generator(*name))


def _tags(size: int, *name: int) -> Tensor:
    """Some classes are mentioned, class 0 is not known."""
    tags = (torch.rand(size, CLASSES, generator=keyed_random.torch_generator("tags", *name)) < 0.4).float()
    tags[:, 0] = -1
    return tags


def _boxes(size: int, view: int) -> CutMix:
    boxes = torch.zeros(size, 4, dtype=torch.int64)
    boxes[view % size] = torch.tensor([0, 8, 16, 24])
    boxes[(3 + view) % size] = torch.tensor([8, 8, 32, 24])
    return CutMix(boxes, torch.arange(size) ^ 1)


def share(batch: Batch, rank: int, world: int) -> Batch:
    """The part of a global batch that a worker gets."""
    n = len(batch.image) // world
    cut = slice(rank * n, (rank + 1) * n)
    text, text_u = (TextBatch(t.tokens[cut], t.mask[cut]) for t in (batch.text, batch.text_u))  # type: ignore[union-attr]
    return Batch(
        batch.image[cut],
        batch.target[cut],
        batch.keys[cut],
        tuple(x[cut] for x in batch.weak),
        tuple(x[cut] for x in batch.strong),
        tuple(CutMix(mix.boxes[cut], mix.partner[:n]) for mix in batch.mix),
        batch.valid[cut],
        batch.keys_u[cut],
        text,
        text_u,
        *(None if x is None else x[cut] for x in (batch.image_strong, batch.tags, batch.tags_u)),
    )


def take_steps(method: Method, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
    """The totals of steps start ... stop - 1, each on a batch of its own."""
    totals = []
    for index in range(start, stop):
        step = Step(index, index / 10, 3)
        losses = method(make_batch(seed=index, views=method.required_views()), step)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            method.after_step(step)
        totals.append(losses.total.item())
    return totals


# Formulas, written from the papers


def softmax(x: np.ndarray, axis: int = 1) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(e / e.sum(axis=axis, keepdims=True))


def cross_entropy_map(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(B, H, W), 0 where the label is 255."""
    known = labels != 255
    p = np.take_along_axis(softmax(logits), np.where(known, labels, 0)[:, None], 1)[:, 0]
    return np.asarray(-np.log(p) * known)


def mean_over(x: np.ndarray, counted: np.ndarray) -> float:
    """Mean of the counted pixels, 0 where there are none."""
    return float((x * counted).sum() / max(1, counted.sum()))


def mixed(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Neighbours 2k and 2k + 1 of (n, ..., H, W) exchange what is ``inside`` (n, H, W)."""
    return np.where(inside if x.ndim == 3 else inside[:, None], x[np.arange(len(x)) ^ 1], x)
