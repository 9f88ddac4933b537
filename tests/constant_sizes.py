"""How large what a method adds is against what is there: ours, measured, beside the authors', by their formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from method_kit import CLASSES, make, make_batch
from torch import Tensor

from viladiff.data.batch import Batch, Step
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.blocks import upsample
from viladiff.models.segmenter import Segmenter


def hold(ours: float, theirs: float, factor: float = 3.0) -> None:
    """AssertionError unless ours lies between a third and three times theirs."""
    assert theirs / factor <= ours <= theirs * factor, f"ours {ours:.4g}, theirs {theirs:.4g}"


class Answers:
    """Stands in for every classifier of a method: logits of a half-trained network, kept in the order of the calls.

    Nine of ten blocks of 8 x 8 pixels are right, most are sure. Labelled images come first where there are any; what
    follows are views of the same unlabelled images, of which each call is unsure in its own places.
    """

    def __init__(self, batch: Batch) -> None:
        self.labelled, gen = len(batch.image), torch.Generator().manual_seed(11)
        known = batch.target[:, ::8, ::8].clamp(max=CLASSES - 1)
        self.truth = torch.randint(0, CLASSES, (len(batch.weak[0]), *known.shape[1:]), generator=gen)
        self.known, self.gen = known, gen
        self.calls: list[tuple[Segmenter, Tensor]] = []

    def __call__(self, network: Segmenter, mid: Tensor) -> Tensor:
        rows = len(mid) - self.labelled if len(mid) > len(self.truth) else len(mid)
        labels = self.truth.repeat(-(-rows // len(self.truth)), 1, 1)[:rows]
        labels = labels if rows == len(mid) else torch.cat([self.known, labels])
        wrong = torch.rand(labels.shape, generator=self.gen) < 0.1
        labels = torch.where(wrong, (labels + 1) % CLASSES, labels)
        one_hot = torch.nn.functional.one_hot(labels, CLASSES).permute(0, 3, 1, 2).float()
        z = 6 * upsample(one_hot, mid.shape[-2:]) + torch.randn(len(mid), CLASSES, *mid.shape[-2:], generator=self.gen)
        z.requires_grad_(torch.is_grad_enabled() and any(p.requires_grad for p in network.parameters()))
        self.calls.append((network, z))
        return z

    def of(self, network: Segmenter) -> list[Tensor]:
        """Full-size logits of a network's calls, in order; its leaves are where gradients arrive."""
        return [upsample(z, (32, 32)) for seen, z in self.calls if seen is network]


@contextmanager
def answering(answers: Answers) -> Iterator[None]:
    classify = Segmenter.classify
    Segmenter.classify = lambda self, mid, top, name="visual": answers(self, mid)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Segmenter.classify = classify  # type: ignore[method-assign]


Formula = Callable[[Answers, Method, Batch, Step], Tensor]


def pull(name: str, step: Step, formula: Formula, **changes: object) -> tuple[float, float]:
    """Gradient of the loss on what is learned from unlabelled images, over that on labelled ones: ours, theirs.

    Ours is that of the method as it comes, theirs that of ``formula`` on the same logits.
    """
    threshold = {"pseudo.threshold": METHODS[name].Config(name=name).pseudo.threshold}  # type: ignore[attr-defined]
    method = make(name, **threshold, **changes)
    batch = make_batch(views=method.required_views())
    answers = Answers(batch)
    with answering(answers):
        losses = method(batch, step)
    leaves = [z for _, z in answers.calls if z.requires_grad]
    found = []
    for total in (losses.total, formula(answers, method, batch, step)):
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        parts = [torch.zeros_like(z) if g is None else g for z, g in zip(leaves, grads, strict=True)]
        mine = torch.stack([g[: answers.labelled].norm() for g in parts]).norm()
        rest = torch.stack([g[answers.labelled :].norm() for g in parts]).norm()
        assert mine > 0 and rest > 0
        found.append(float(rest / mine))
    return found[0], found[1]
