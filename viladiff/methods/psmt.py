"""PS-MT: two teachers in turn, confidence-weighted labels, adversarial noise on features (Liu et al., CVPR 2022).

Differences from the released code. Its lengths in epochs are shares of training here: warm-up 5, turns 1, ramp 12, of
80. All networks start from the same pretrained encoder, and the teachers' heads from other seeds; there whole teachers
start at random. The teachers that the warm-up trains by gradient are networks of their own (``founders``), copied into
the averages, since a network under DDP can get a gradient always or never. Noise is a share of the length of the
decoder's whole input: the published 2.0 is 0.0015 of the length, about 1381, of the 304 channels that it is added to.
Its probe step is one that float32 can resolve, not the published 1e-6. An average is no longer than a turn
(``teacher.bounded``): 0.996 averages over 250 steps where a turn on VOC has some 330, and in a short run a teacher
would be left behind within its turn. The assistant's top classes are chosen on the decoder's grid. An image is never
mixed with itself.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from viladiff.config.base import Section
from viladiff.core import keyed_random
from viladiff.data.batch import Batch, Losses, Step, TextBatch, Views
from viladiff.data.transforms.mixing import apply_cutmix, beta_boxes
from viladiff.losses import Logits, distributed_mean, pixel_cross_entropy
from viladiff.methods.base import (
    MethodConfig,
    PredictConfig,
    PseudoConfig,
    Reference,
    StepCost,
    TeacherConfig,
    TwoTeachers,
    keyed_boxes,
    turn,
    turn_length,
)
from viladiff.methods.common.published import PublishedSetting, protocol, sgd
from viladiff.methods.common.resting import resting
from viladiff.models.baselines.perturbations import virtual_adversarial
from viladiff.models.ema import ema_update
from viladiff.models.segmenter import Network, NetworkFactory


class PsmtTeacherConfig(TeacherConfig):
    momentum: float = Field(0.996, ge=0, le=1)
    """The first steps use min(momentum, 1 - 1 / (step + 1))."""
    bounded: bool = True
    """Whether momentum is at most 1 - 1 / (steps of a turn) (ours); that leaves 0.996 where turns have 250 steps."""
    switch_period: float = Field(1 / 80, gt=0, le=1)
    """Share of training after which the other teacher is active."""
    assistant_classes: int = Field(7, ge=1)
    """Classes of a pixel at which the inactive teacher is heard, its highest; elsewhere the active one counts twice."""


class PsmtPseudoConfig(PseudoConfig):
    threshold: float = Field(0.6, ge=0, le=1)
    weight: float = Field(0.6, ge=0)
    """At 183 to 732 labelled VOC images; 0.06 at 92, 1.5 on augmented VOC, 3 on Cityscapes."""
    rampup: float = Field(12 / 80, ge=0, le=1)
    """Share of training, from the end of the warm-up, over which the weight rises."""


class VatConfig(Section):
    """Adversarial noise on what the student's decoder reads, found with the teachers' decoders."""

    epsilon: float = Field(0.0015, ge=0)
    """Length of the noise as a share of the features'; 2.0 on maps of length 1381 as published. 0 turns it off."""
    xi: float = Field(0.1, gt=0)
    """Length of the random step that finds its direction, likewise (ours); shorter ones find more of the rounding."""


class PsmtConfig(MethodConfig):
    """Perturbed and strict mean teachers."""

    name: Literal["psmt"] = "psmt"
    cutmix: bool = True
    warmup: float = Field(5 / 80, ge=0, lt=1)
    """Share of training in which three networks learn from labels alone; with 0 both teachers start as the student."""
    vat: VatConfig = VatConfig()
    teacher: PsmtTeacherConfig = PsmtTeacherConfig()
    pseudo: PsmtPseudoConfig = PsmtPseudoConfig()
    predict: PredictConfig = PredictConfig()


class PsMt(TwoTeachers):
    Config = PsmtConfig
    published = (
        PublishedSetting(("voc",), {"method.pseudo.weight": 0.06}, "PS-MT 058cdc3", splits=("92",), families=("hq",)),
        PublishedSetting(
            ("voc",), {"method.pseudo.weight": 0.6}, "PS-MT 058cdc3", splits=("183", "366", "732"), families=("hq",)
        ),
        PublishedSetting(("voc",), {"method.pseudo.weight": 1.5}, "PS-MT 058cdc3", families=("aug_cps", "aug_u2pl")),
        PublishedSetting(
            ("cityscapes",), {"method.pseudo.weight": 3.0}, "PS-MT 058cdc3", not_available="CutMix with three boxes"
        ),
    )
    protocols = (
        protocol(("voc",), "PS-MT 058cdc3", 512, 80.0, 32, sgd(1e-2)),
        protocol(("voc",), "PS-MT 058cdc3", 512, 200.0, 32, sgd(1e-2))._replace(splits=("2646",)),
        protocol(("voc",), "PS-MT 058cdc3", 512, 300.0, 32, sgd(1e-2))._replace(splits=("5291",)),
        protocol(("cityscapes",), "PS-MT 058cdc3", 800, batch=8),
    )
    views = Views(strong=1, strong_labelled=True, pairs=True)
    paper = Reference("Perturbed and Strict Mean Teachers for Semi-supervised Semantic Segmentation", "CVPR", 2022)
    step_cost = StepCost(4, 2, 8, 4)
    revision = 2
    extra_state = "two teachers, two networks of the warm-up"
    exact = ("founders", *(f"teachers.members.{i}.{part}" for i in (0, 1) for part in ("decoder", "classifier")))

    def __init__(self, cfg: PsmtConfig, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        self.founders = nn.ModuleList([self.build_student(build) for _ in range(2)] if cfg.warmup else [])
        """What the teachers are until the warm-up ends; then they rest."""
        self._copy_founders()

    def required_views(self) -> Views:
        return Views(strong=1, strong_labelled=True, pairs=self.cfg.cutmix)

    def forward(self, batch: Batch, step: Step) -> Losses:
        assert batch.image_strong is not None  # as ``views`` asks
        return self._warm(batch) if step.progress < self.cfg.warmup else self._teach(batch, batch.image_strong, step)

    def _warm(self, batch: Batch) -> Losses:
        """Train with masks alone: the student on coloured images, each later teacher on plain ones."""
        networks: list[tuple[Any, Any]] = [
            (self.student, batch.image_strong),
            *((founder, batch.image) for founder in self.founders),
        ]
        losses = [self.supervised(network.predicted(image), batch.target) for network, image in networks]
        zero = torch.zeros((), device=losses[0].device)
        terms = {"sup": losses[0].detach(), "pseudo": zero, "coverage": zero, "weight": zero}
        total = torch.stack(losses).sum()
        return Losses(total, terms, {"sup": total})

    def _teach(self, batch: Batch, image: Tensor, step: Step) -> Losses:
        cfg, labelled, size = self.cfg, len(image), image.shape[-2:]
        with torch.no_grad():
            confidence, labels = self.student.at_pixels(self._pseudo_logits(batch.weak[0], step), size).top()
        strong, valid = batch.strong[0], batch.valid
        if cfg.cutmix:
            mix = keyed_boxes(batch, step, "psmt-boxes", lambda draws, _, size: beta_boxes(draws, size))
            strong, confidence, labels, valid = (apply_cutmix(x, mix) for x in (strong, confidence, labels, valid))
        features = self.student.encode(torch.cat([image, strong]))
        if cfg.vat.epsilon:
            noise = self._noise(features, batch, step)
            features = [level + added for level, added in zip(features, noise, strict=True)]
        logits = self.student.at_pixels(self.student.grid_logits(features), size)

        sup = self.supervised(logits[:labelled], batch.target)
        accepted = (confidence >= cfg.pseudo.threshold) & valid
        pseudo = strict_consistency(logits[labelled:], labels, confidence, accepted)
        weight = cfg.pseudo.weight * ramp(step.progress - cfg.warmup, cfg.pseudo.rampup)
        rest = resting(self.founders) if self.founders else 0
        coverage = distributed_mean(accepted.sum(), valid.sum())
        terms = {"sup": sup.detach(), "pseudo": pseudo.detach(), "coverage": coverage}
        terms["weight"] = torch.full((), weight, device=sup.device)
        parts = {"sup": sup, "pseudo": weight * pseudo}
        return Losses(parts["sup"] + parts["pseudo"] + rest, terms, parts)

    def after_step(self, step: Step) -> None:
        if step.progress < self.cfg.warmup:
            self._copy_founders()
        else:
            cfg = self.cfg.teacher
            length = turn_length(step, cfg.switch_period)
            momentum = bounded_momentum(cfg.momentum, length) if cfg.bounded else cfg.momentum
            ema_update(self.teachers[self._active(step)], self.student, step.index, momentum)

    def _copy_founders(self) -> None:
        for i, founder in enumerate(self.founders):
            ema_update(self.teachers[i], founder, step=0)

    def _active(self, step: Step) -> int:
        return turn(step, self.cfg.teacher.switch_period)[0] % 2

    def _pseudo_logits(self, images: Tensor, step: Step) -> Tensor:
        """Return the mean of the active teacher's grid logits and the strict assistant's: (U, C, h, w)."""
        active = self._active(step)
        mine, other = (self.teachers[i].streams(images)["visual"].logits for i in (active, 1 - active))
        return (mine + strict(other, mine, self.cfg.teacher.assistant_classes)) / 2

    def _noise(self, features: list[Tensor], batch: Batch, step: Step) -> list[Tensor]:
        keys = [*(f"l{key}" for key in batch.keys), *(f"u{key}" for key in batch.keys_u)]
        sizes = [level[0].numel() for level in features]
        name = (step.seed, "psmt-vat", step.index)
        uniform = keyed_random.uniform(keys, (sum(sizes),), *name, device=features[0].device) - 0.5
        start = [part.view_as(level) for part, level in zip(uniform.split(sizes, 1), features, strict=True)]
        vat = self.cfg.vat
        return virtual_adversarial(features, self.teachers.grid_logits, start, vat.epsilon, vat.xi)

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        return {"before": self.student.upsample(self._pseudo_logits(images, step), images.shape[-2:]).softmax(1)}

    def eval_network(self) -> Network:
        """Return the mean of both teachers, as the paper evaluates."""
        return self.teachers if self.cfg.predict.network == "teacher" else self.student

    def eval_networks(self) -> dict[str, Network]:
        return {"student": self.student, "teacher": self.teachers}


def bounded_momentum(momentum: float, turn_steps: float) -> float:
    """Return min(m, 1 - 1 / T): an average over 1 / (1 - m) steps is no longer than the turn of T steps."""
    return min(momentum, 1 - 1 / turn_steps)


def strict(assistant: Tensor, active: Tensor, classes: int) -> Tensor:
    """Return the assistant's logits (U, C, h, w) at its top ``classes`` of each pixel, else the active teacher's."""
    if classes >= assistant.shape[1]:
        return assistant
    lowest = assistant.topk(classes, 1).values[:, -1:]
    return torch.where(assistant >= lowest, assistant, active)


def strict_consistency(logits: Logits, labels: Tensor, confidence: Tensor, accepted: Tensor) -> Tensor:
    """Return cross-entropy times confidence, a mean over the accepted pixels alone; 0 without any.

    ``logits`` (U, C, H, W), ``labels`` int64, ``confidence`` and bool ``accepted`` (U, H, W).
    """
    loss = pixel_cross_entropy(logits, labels) * confidence.float()
    return distributed_mean((loss * accepted).sum(), accepted.sum())


def ramp(progress: float, length: float) -> float:
    """Return half a cosine from 0 to 1 over ``length``, both shares of training."""
    return (1 - math.cos(math.pi * min(1.0, progress / length))) / 2 if length else 1.0
