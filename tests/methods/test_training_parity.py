"""Fifty steps of training beside the same steps in straight-line torch, on photographs, in float64.

``fit`` trains UniMatch V2 with DINOv2's shape and a DPT head, UniMatch and FixMatch with a ResNet and DeepLabV3+, as the
recipes ``strong`` and ``resnet`` say. Batches, first weights and the uniform numbers behind dropped channels are taken
from that run; all else is written again below: labels, boxes, dropped channels, losses, optimisers, rates, averages.
Only the networks' own forward passes are shared, which tests of models compare.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
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
from viladiff.methods import base as methods_base
from viladiff.methods import unimatch_v2
from viladiff.methods.base import Method
from viladiff.models.baselines.perturbations import half_of_pairs
from viladiff.models.segmenter import Segmenter
from viladiff.runs.config import RunConfig, override
from viladiff.tables.recipes.recipe import recipe_fields
from viladiff.training import optim, trainer
from viladiff.training.trainer import fit

Make = Callable[..., Path]
State = dict[str, Tensor]
STEPS, THRESHOLD, TOLERANCE = 50, 0.4, 1e-4
RESNET = "resnet_femto_deep"
__all__ = [RESNET]


def resnet_femto_deep(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-101's shape with a deep stem, one block a stage, an eighth as wide."""
    shape = {"block": Bottleneck, "layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}
    return build_model_with_cfg(ResNet, RESNET, pretrained, stem_type="deep", stem_width=8, **shape, **options)


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the package keeps in float32 is float64: new tensors, and those that it converts with ``float``."""
    tiny_vits.register()
    if not is_model(RESNET):
        register_model(resnet_femto_deep)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# The run


def config(root: Path, method: str, recipe: str, **changes: object) -> RunConfig:
    """The recipe's fields for VOC, but for what makes the run small."""
    chosen = {"data.dataset": "voc", "data.split": "92", "method.name": method}
    fields = {path: one.value for path, one in recipe_fields(recipe, chosen).items()}
    del fields["train.epochs"], fields["eval.every_epochs"]
    small = {
        "data.batch_labelled": 2,
        "data.batch_unlabelled": 2,
        "data.captions": "none",
        "train.steps": STEPS,
        "train.precision": "fp32",
        "method.pseudo.threshold": THRESHOLD,
        "model.pretrained": "none",
        "eval.boundary": False,
        "runtime.data_root": str(root / "photos"),
        "runtime.runs_dir": str(root / "runs"),
        "runtime.progress": False,
        "runtime.threads": 1,
        "runtime.device": "cpu",
    }
    return override(RunConfig(), {**chosen, **fields, **small, **changes})


def strong(root: Path, **changes: object) -> RunConfig:
    """UniMatch V2; the rates are ten times the recipe's, in whose steps random weights would learn too little."""
    model = {"model.encoder": tiny_vits.DINO[0], "model.decoder_width": 64, "data.crop": 42, "optim.lr": 2e-3}
    return config(root, "unimatch_v2", "strong", **{**model, **changes})


def resnet(root: Path, method: str, **changes: object) -> RunConfig:
    model = {"model.encoder": RESNET, "data.crop": 33, "data.cutmix_grid": "pixel"}
    return config(root, method, "resnet", **{**model, **changes})


@dataclass
class Run:
    """What a run was given and what came of it."""

    cfg: RunConfig
    start: Segmenter
    """The student before the first step."""
    batches: list[Batch] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    weights: dict[int, State] = field(default_factory=dict)
    """The method's state after every tenth step."""


def trained(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Train with ``fit`` and note batches, totals and weights."""
    kind = METHODS[cfg.method.name]
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
        if step.index % 10 == 9 or step.index == cfg.train.steps - 1:  # type: ignore[operator]
            runs[0].weights[step.index] = {name: value.clone() for name, value in self.state_dict().items()}

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", noting_forward)
        patch.setattr(kind, "after_step", noting_after)
        patch.setattr(trainer, "refuse_infeasible", lambda *_: None)  # its images without content are float32
        result = fit(cfg)
    lines = (result.directory / "steps.jsonl").read_text().splitlines()
    logged = [json.loads(line)["total"] for line in lines]
    assert logged == runs[0].totals, "the log has what was trained on"
    return runs[0]


# The same, written from the publications


def pasted(x: Tensor, mix: CutMix) -> Tensor:
    """CutMix with slices: a box of the other picture of the pair."""
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


def consistency(logits: Tensor, labels: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    """Sum over sure pixels outside the padding, divided by all pixels outside the padding."""
    return surprise(logits, labels)[(confidence >= THRESHOLD) & valid].sum() / valid.sum()


class StraightLine:
    """One student, its optimiser, and the average of its weights where the method has a teacher."""

    momentum = 0.996

    def __init__(self, run: Run, teacher: bool) -> None:
        self.cfg = run.cfg
        self.student = copy.deepcopy(run.start).train()
        self.teacher = copy.deepcopy(run.start).eval() if teacher else None
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.accepted: list[float] = []

    def step(self, batch: Batch, i: int) -> float:
        total = self.loss(batch, i)
        names, weights = zip(*self.student.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, weights)
        poly = (1 - i / STEPS) ** 0.9
        with torch.no_grad():
            for name, weight, gradient in zip(names, weights, gradients, strict=True):
                self.move(name, weight, gradient, poly, i + 1)
            self.average(i)
        return total.item()

    def loss(self, batch: Batch, i: int) -> Tensor:
        raise NotImplementedError

    def move(self, name: str, weight: Tensor, gradient: Tensor, poly: float, t: int) -> None:
        raise NotImplementedError

    def sure(self, probabilities: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence and labels of the weak views; notes how many count."""
        confidence, labels = probabilities.max(1)
        self.accepted.append(((confidence >= THRESHOLD) & valid).sum().item() / valid.sum().item())
        return confidence, labels

    def average(self, i: int) -> None:
        """Teacher after step i, from 0: parameters and running statistics; counts are copied."""
        if self.teacher is None:
            return
        m = min(1 - 1 / (i + 1), self.momentum)
        mine = self.student.state_dict()
        for name, value in self.teacher.state_dict().items():
            value.copy_(m * value + (1 - m) * mine[name] if value.is_floating_point() else mine[name])

    def state(self) -> State:
        found = {f"student.{name}": value for name, value in self.student.state_dict().items()}
        if self.teacher is not None:
            found |= {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        return found


class AdamW(StraightLine):
    """5e-6 for the encoder and 40 times that for the head in the recipe; ten times both here."""

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
    def loss(self, batch: Batch, i: int) -> Tensor:
        assert self.teacher is not None
        size, (weak,) = batch.image.shape[-2:], batch.weak
        with torch.no_grad():
            confidence, labels = self.sure(self.teacher(weak)["visual"].softmax(1), batch.valid)
        mine = self.student(batch.image)["visual"]
        both = torch.cat([pasted(x, mix) for x, mix in zip(batch.strong, batch.mix, strict=True)])
        maps = self.student.encode(both)
        width = max(level.shape[1] for level in maps)
        uniform = keyed_random.uniform(batch.keys_u, (width,), self.cfg.seed, "complementary", i)
        whole = half_of_pairs(batch.keys_u, self.cfg.seed, "complementary-whole", i)
        factors = torch.ones(len(both), width)
        for j, spared in enumerate(whole):
            if not spared:
                factors[j] = 2.0 * (uniform[j] >= 0.5)
                factors[j + len(whole)] = 2 - factors[j]
        dropped = [level * factors[:, : level.shape[1], None, None] for level in maps]
        streams = self.student.logits(dropped, size).chunk(2)
        unlabelled = [
            consistency(logits, pasted(labels, mix), pasted(confidence, mix), pasted(batch.valid, mix))
            for logits, mix in zip(streams, batch.mix, strict=True)
        ]
        return (labelled_loss(mine, batch.target) + (unlabelled[0] + unlabelled[1]) / 2) / 2


class UniMatch(Sgd):
    def loss(self, batch: Batch, i: int) -> Tensor:
        (b, u), size, (weak,) = (len(batch.image), len(batch.weak[0])), batch.image.shape[-2:], batch.weak
        views = [pasted(x, mix) for x, mix in zip(batch.strong, batch.mix, strict=True)]
        maps = self.student.encode(torch.cat([batch.image, weak, *views]))
        width = max(level.shape[1] for level in maps)
        uniform = keyed_random.uniform(batch.keys_u, (width,), self.cfg.seed, "feature-dropout", i)
        perturbed = [level[b : b + u] * 2 * (uniform[:, : level.shape[1], None, None] >= 0.5) for level in maps]
        joined = [torch.cat([level, lost]) for level, lost in zip(maps, perturbed, strict=True)]
        mine, clean, first, second, lost = self.student.logits(joined, size).split([b, u, u, u, u])
        confidence, labels = self.sure(clean.detach().softmax(1), batch.valid)
        quarter = [
            consistency(logits, pasted(labels, mix), pasted(confidence, mix), pasted(batch.valid, mix))
            for logits, mix in zip((first, second), batch.mix, strict=True)
        ]
        half = consistency(lost, labels, confidence, batch.valid)
        return (labelled_loss(mine, batch.target) + quarter[0] / 4 + quarter[1] / 4 + half / 2) / 2


class FixMatch(Sgd):
    momentum = 0.996

    def loss(self, batch: Batch, i: int) -> Tensor:
        assert self.teacher is not None
        (weak,), (view,), (mix,) = batch.weak, batch.strong, batch.mix
        with torch.no_grad():
            confidence, labels = self.sure(self.teacher(weak)["visual"].softmax(1), batch.valid)
        logits = self.student(torch.cat([batch.image, pasted(view, mix)]))["visual"]
        mine, other = logits[: len(batch.image)], logits[len(batch.image) :]
        unlabelled = consistency(other, pasted(labels, mix), pasted(confidence, mix), pasted(batch.valid, mix))
        return (labelled_loss(mine, batch.target) + unlabelled) / 2


SIDES = {"unimatch_v2": (UniMatchV2, True), "unimatch": (UniMatch, False), "fixmatch": (FixMatch, True)}


def followed(run: Run) -> tuple[StraightLine, list[float], dict[int, float]]:
    """Take the run's steps again; return relative differences of losses, and of weights by step.

    A tensor's difference is a share of the furthest that one of its numbers has gone since the first step.
    """
    kind, teacher = SIDES[run.cfg.method.name]
    side = kind(run, teacher)
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


def make_run(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Run:
    cfg = strong(root, **changes) if name == "unimatch_v2" else resnet(root, name, **changes)
    return trained(cfg, monkeypatch)


@pytest.mark.parametrize("name", sorted(SIDES))
def test_losses_and_weights_are_those_of_straight_line_torch(
    name: str, photo_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo_folder(13, "voc", labelled=4, val=1, sizes=(30, 90))
    run = make_run(name, tmp_path, monkeypatch)
    side, losses, weights = followed(run)
    print(name, "loss", max(losses), "weights", max(weights.values()), "accepted", side.accepted)
    print(run.totals)
    assert len(losses) == STEPS and list(weights) == [9, 19, 29, 39, 49]
    assert max(losses) < TOLERANCE and max(weights.values()) < TOLERANCE
    # The comparison is of something: labels count and are refused, boxes are pasted, crops have padding.
    assert sum(0 < share < 1 for share in side.accepted) > 10
    assert all(any(batch.mix[view].boxes.any() for batch in run.batches) for view in range(len(run.batches[0].mix)))
    assert any(not batch.valid.all() for batch in run.batches)
    assert sum(run.totals[-10:]) < sum(run.totals[:10])
