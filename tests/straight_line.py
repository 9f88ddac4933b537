"""Steps of three methods in straight-line torch, and what a run of ``fit`` gives them to start from.

Written from the publications and from each method's stated differences. Batches, first weights and the uniform numbers
behind dropped channels are the run's; labels, boxes, dropped channels, losses, optimisers, rates and averages are not.
The networks' own forward passes are shared: tests of models compare those.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_vits
import torch
from timm.models import build_model_with_cfg, is_model, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, CutMix, Losses, Step
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.baselines.perturbations import half_of_pairs
from viladiff.models.segmenter import Segmenter
from viladiff.runs.config import RunConfig, override
from viladiff.tables.recipes.recipe import recipe_fields
from viladiff.training import trainer

State = dict[str, Tensor]
STEPS = 50
RESNET = "resnet_femto_deep"
__all__ = [RESNET]


def resnet_femto_deep(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-101's shape with a deep stem, one block a stage, an eighth as wide."""
    shape = {"block": Bottleneck, "layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}
    return build_model_with_cfg(ResNet, RESNET, pretrained, stem_type="deep", stem_width=8, **shape, **options)


@contextmanager
def in_float64() -> Iterator[None]:
    """Keep in float64 what the package keeps in float32: new tensors, and those that it converts with ``float``.

    Rounding then is far below any difference that matters, also where steps amplify it. The small encoders are known
    to timm from here on.
    """
    tiny_vits.register()
    if not is_model(RESNET):
        register_model(resnet_femto_deep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


# The run

SMALL: dict[str, dict[str, object]] = {
    # Ten times the recipe's rates, in whose steps random weights would learn too little.
    "unimatch_v2": {"model.encoder": tiny_vits.DINO[0], "model.decoder_width": 64, "data.crop": 42, "optim.lr": 2e-3},
    "unimatch": {"model.encoder": RESNET, "data.crop": 33, "data.cutmix_grid": "pixel"},
    # Its teacher, the mean of random weights and of what they became, is never sure within fifty steps.
    "fixmatch": {
        "model.encoder": RESNET,
        "data.crop": 33,
        "data.cutmix_grid": "pixel",
        "method.pseudo.threshold": 0.12,
    },
}
"""What differs from the recipe so that a run is small, by method."""


def config(root: Path, method: str, **changes: object) -> RunConfig:
    """The recipe's fields for VOC, below ``root / "photos"``, but for what makes the run small."""
    chosen = {"data.dataset": "voc", "data.split": "92", "method.name": method}
    recipe = "strong" if method == "unimatch_v2" else "resnet"
    fields = {path: one.value for path, one in recipe_fields(recipe, chosen).items()}
    del fields["train.epochs"], fields["eval.every_epochs"]
    small = {
        "data.batch_labelled": 2,
        "data.batch_unlabelled": 2,
        "data.captions": "none",
        "train.steps": STEPS,
        "train.precision": "fp32",
        "method.pseudo.threshold": 0.4,
        "model.pretrained": "none",
        "eval.boundary": False,
        "runtime.data_root": str(root / "photos"),
        "runtime.runs_dir": str(root / "runs"),
        "runtime.progress": False,
        "runtime.threads": 1,
        "runtime.device": "cpu",
    }
    return override(RunConfig(), {**chosen, **fields, **small, **SMALL[method], **changes})


@dataclass
class Run:
    """What a run was given and what came of it."""

    cfg: RunConfig
    start: Segmenter
    """The student before the first step."""
    batches: list[Batch] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    weights: dict[int, State] = field(default_factory=dict)
    """The method's state after every tenth step and after the last, by the step's index."""
    directory: Path = Path()


def trained(cfg: RunConfig) -> Run:
    """Train with ``fit`` and note batches, totals and weights."""
    kind, last = METHODS[cfg.method.name], (cfg.train.steps or 0) - 1
    forward, after = kind.forward, kind.after_step
    runs: list[Run] = []

    def noting_forward(self: Method, batch: Batch, step: Step) -> Losses:
        if step.index == 0:
            runs.append(Run(cfg, copy.deepcopy(self.student)))
        runs[0].batches.append(batch)
        losses = forward(self, batch, step)
        runs[0].totals.append(losses.total.item())
        return losses

    def noting_after(self: Method, step: Step) -> None:
        after(self, step)
        if step.index % 10 == 9 or step.index == last:
            runs[0].weights[step.index] = {name: value.clone() for name, value in self.state_dict().items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", noting_forward)
        patch.setattr(kind, "after_step", noting_after)
        patch.setattr(trainer, "refuse_infeasible", lambda *_: None)  # its images without content are float32
        directory = trainer.fit(cfg).directory
    runs[0].directory = directory
    return runs[0]


# The same, written from the publications


def pasted(x: Tensor, mix: CutMix) -> Tensor:
    """CutMix with slices: a box of the pair's other picture."""
    out = x.clone()
    for i, (top, left, bottom, right) in enumerate(mix.boxes.tolist()):
        out[i, ..., top:bottom, left:right] = x[mix.partner[i], ..., top:bottom, left:right]
    return out


def surprise(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of each pixel's label (n, H, W)."""
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    return -log_p.gather(1, labels.where(labels != 255, 0)[:, None])[:, 0]


def labelled_loss(logits: Tensor, target: Tensor) -> Tensor:
    known = target != 255
    return surprise(logits, target)[known].sum() / known.sum()


@dataclass
class PseudoLabels:
    """Labels of unlabelled pictures (U, H, W), with their confidence and the pixels outside the padding."""

    confidence: Tensor
    labels: Tensor
    valid: Tensor

    def pasted(self, mix: CutMix) -> PseudoLabels:
        return PseudoLabels(*(pasted(x, mix) for x in (self.confidence, self.labels, self.valid)))

    def loss(self, logits: Tensor, threshold: float) -> Tensor:
        """Sum over sure pixels outside the padding, divided by all pixels outside the padding."""
        sure = (self.confidence >= threshold) & self.valid
        return surprise(logits, self.labels)[sure].sum() / self.valid.sum()


class StraightLine:
    """One student, its optimiser, and the average of its weights where the method has a teacher."""

    has_teacher = True
    momentum = 0.996
    delay = 0
    """Steps by which the rates come later than those of the schedule."""

    def __init__(self, run: Run) -> None:
        self.steps, self.seed = len(run.batches), run.cfg.seed
        self.threshold: float = run.cfg.method.pseudo.threshold  # type: ignore[attr-defined]
        self.student = copy.deepcopy(run.start).train()
        self.teacher = copy.deepcopy(run.start).eval() if self.has_teacher else None
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.accepted: list[float] = []
        """Share of unlabelled pixels whose label counts, by step."""

    def step(self, batch: Batch, i: int) -> float:
        """Take step i, from 0, and return its loss."""
        total = self.loss(batch, i)
        names, weights = zip(*self.student.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, weights)
        poly = (1 - max(i - self.delay, 0) / self.steps) ** 0.9
        with torch.no_grad():
            for name, weight, gradient in zip(names, weights, gradients, strict=True):
                self.move(name, weight, gradient, poly, i + 1)
            self.average(i)
        return total.item()

    def loss(self, batch: Batch, i: int) -> Tensor:
        raise NotImplementedError

    def move(self, name: str, weight: Tensor, gradient: Tensor, poly: float, t: int) -> None:
        """Move one weight in the t-th step, from 1."""
        raise NotImplementedError

    def labelled_by(self, logits: Tensor, valid: Tensor) -> PseudoLabels:
        """Labels from logits of the weak views; notes how many count."""
        confidence, labels = logits.detach().softmax(1).max(1)
        self.accepted.append(((confidence >= self.threshold) & valid).sum().item() / valid.sum().item())
        return PseudoLabels(confidence, labels, valid)

    def average(self, i: int) -> None:
        """Teacher after step i, from 0: parameters and running statistics; counts are copied."""
        if self.teacher is None:
            return
        m = min(1 - 1 / (i + 1), self.momentum)
        mine = self.student.state_dict()
        for name, value in self.teacher.state_dict().items():
            value.copy_(m * value + (1 - m) * mine[name] if value.is_floating_point() else mine[name])

    def state(self) -> State:
        """The method's state by its names; the tensors are not copied."""
        found = {f"student.{name}": value for name, value in self.student.state_dict().items()}
        if self.teacher is not None:
            found |= {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        return found


class AdamW(StraightLine):
    """The recipe has 5e-6 for the encoder and 40 times that for the head; ten times both here."""

    encoder, head, decay, betas = 5e-5, 2e-3, 0.01, (0.9, 0.999)

    def move(self, name: str, weight: Tensor, gradient: Tensor, poly: float, t: int) -> None:
        rate = poly * (self.encoder if name.startswith("encoder.") else self.head)
        one, two = self.betas
        zero = torch.zeros_like(weight)
        first, second = self.moments.get(name, (zero, zero))
        first, second = one * first + (1 - one) * gradient, two * second + (1 - two) * gradient**2
        self.moments[name] = first, second
        weight.mul_(1 - rate * self.decay)
        weight.sub_(rate * (first / (1 - one**t)) / ((second / (1 - two**t)).sqrt() + 1e-8))


class Sgd(StraightLine):
    """1e-3 for the encoder and 10 times that for the head."""

    encoder, head, decay, inertia = 1e-3, 1e-2, 1e-4, 0.9

    def move(self, name: str, weight: Tensor, gradient: Tensor, poly: float, t: int) -> None:
        rate = poly * (self.encoder if name.startswith("encoder.") else self.head)
        velocity = gradient + self.decay * weight
        if t > 1:
            velocity += self.inertia * self.moments[name][0]
        self.moments[name] = velocity, velocity
        weight.sub_(rate * velocity)


class UniMatchV2(AdamW):
    """L = 1/2 [L_x + 1/2 (L_s1 + L_s2)], with complementary dropout of channels."""

    def loss(self, batch: Batch, i: int) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            pseudo = self.labelled_by(self.teacher(batch.weak[0])["visual"], batch.valid)
        sup = labelled_loss(self.student(batch.image)["visual"], batch.target)
        both = torch.cat([pasted(x, mix) for x, mix in zip(batch.strong, batch.mix, strict=True)])
        maps = self.student.encode(both)
        width = max(level.shape[1] for level in maps)
        uniform = keyed_random.uniform(batch.keys_u, (width,), self.seed, "complementary", i)
        whole = half_of_pairs(batch.keys_u, self.seed, "complementary-whole", i)
        factors = torch.ones(len(both), width)
        for j, spared in enumerate(whole):
            if not spared:
                factors[j] = 2.0 * (uniform[j] >= 0.5)
                factors[j + len(whole)] = 2 - factors[j]
        dropped = [level * factors[:, : level.shape[1], None, None] for level in maps]
        first, second = self.student.logits(dropped, batch.image.shape[-2:]).chunk(2)
        one, two = (pseudo.pasted(mix) for mix in batch.mix)
        return (sup + (one.loss(first, self.threshold) + two.loss(second, self.threshold)) / 2) / 2


class UniMatch(Sgd):
    """L = 1/2 [L_x + 1/4 L_s1 + 1/4 L_s2 + 1/2 L_fp], in one pass, labels of the student itself."""

    has_teacher = False

    def loss(self, batch: Batch, i: int) -> Tensor:
        mine, clean, first, second, lost = self.logits(batch, i)
        pseudo = self.labelled_by(clean, batch.valid)
        one, two = (pseudo.pasted(mix) for mix in batch.mix)
        unlabelled = one.loss(first, self.threshold) / 4 + two.loss(second, self.threshold) / 4
        return (labelled_loss(mine, batch.target) + unlabelled + pseudo.loss(lost, self.threshold) / 2) / 2

    def logits(self, batch: Batch, i: int) -> tuple[Tensor, ...]:
        """Logits of labelled pictures, weak views, strong views and weak views with dropped channels."""
        b, u = len(batch.image), len(batch.weak[0])
        views = [pasted(x, mix) for x, mix in zip(batch.strong, batch.mix, strict=True)]
        maps = self.student.encode(torch.cat([batch.image, batch.weak[0], *views]))
        perturbed = self.dropped([level[b : b + u] for level in maps], batch, i)
        joined = [torch.cat([level, lost]) for level, lost in zip(maps, perturbed, strict=True)]
        return self.student.logits(joined, batch.image.shape[-2:]).split([b, u, u, u, u])

    def dropped(self, maps: list[Tensor], batch: Batch, i: int) -> list[Tensor]:
        """Maps of the weak views without half of their channels."""
        width = max(level.shape[1] for level in maps)
        uniform = keyed_random.uniform(batch.keys_u, (width,), self.seed, "feature-dropout", i)
        return [level * 2 * (uniform[:, : level.shape[1], None, None] >= 0.5) for level in maps]


class FixMatch(Sgd):
    """L = 1/2 [L_x + L_s]."""

    def loss(self, batch: Batch, i: int) -> Tensor:
        assert self.teacher is not None
        (mix,) = batch.mix
        with torch.no_grad():
            pseudo = self.labelled_by(self.teacher(batch.weak[0])["visual"], batch.valid).pasted(mix)
        mine, strong = self.logits(batch.image, pasted(batch.strong[0], mix))
        return (labelled_loss(mine, batch.target) + pseudo.loss(strong, self.threshold)) / 2

    def logits(self, image: Tensor, strong: Tensor) -> tuple[Tensor, ...]:
        return self.student(torch.cat([image, strong]))["visual"].split([len(image), len(strong)])


SIDES: dict[str, type[StraightLine]] = {"unimatch_v2": UniMatchV2, "unimatch": UniMatch, "fixmatch": FixMatch}


# The comparison


def followed(run: Run) -> tuple[StraightLine, list[float], dict[int, float]]:
    """Take the run's steps again; return differences of losses, and of weights by step.

    Those of losses are relative. A tensor's is a share of the furthest that one of its numbers has gone since the
    start: at an encoder's rate, fifty steps lead nowhere near a weight's own size.
    """
    side = SIDES[run.cfg.method.name](run)
    before = {name: value.clone() for name, value in side.state().items()}
    losses, weights = [], {}
    for i, (batch, total) in enumerate(zip(run.batches, run.totals, strict=True)):
        losses.append(abs(side.step(batch, i) - total) / total)
        if i in run.weights:
            state = side.state()
            assert state.keys() == run.weights[i].keys()
            weights[i] = max(apart(run.weights[i][name], state[name], before[name]) for name in state)
    return side, losses, weights


def apart(found: Tensor, expected: Tensor, before: Tensor) -> float:
    assert found.dtype == expected.dtype and found.dtype in (torch.float64, torch.int64)
    moved, difference = (expected - before).abs().max().item(), (found - expected).abs().max().item()
    return difference / moved if moved else difference
