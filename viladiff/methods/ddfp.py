"""DDFP: features pushed to where few are (Wang et al., Density-Descending Feature Perturbation, CVPR 2024).

A normalizing flow learns the density of the teacher's features. The student's are moved, at each position, in the
direction in which the flow finds them rarer, and must still get the teacher's labels there. The flow's likelihood is
one more term of the loss; what it reads carries no gradient, and the direction is found apart, so that it teaches no
network and no network teaches it.

L = L_sup + 1/2 CE(strong) + 1/2 CE(strong, moved), each over the pixels with a label, plus the flow's NLL.

Differences from the released code. There the teacher's parameters are the student's own tensors from the end of the
warm-up on, so that its average moves nothing and the student labels for itself; here the teacher is the moving average
that the paper describes. Stages are shares of training, not epochs. All four maps that the decoder reads are
moved, each by a share of its vectors' mean length in the picture (``radius``); there one map of 304 channels is, by a
length of 4. The flow is a parameter group of AdamW, with its own rate and betas, but on the run's
schedule, and its gradient is not clipped by itself; its likelihood is taken per channel. It has as many hidden units as
channels, and samples positions image by image. Labelled positions without a class are left out. There is no auxiliary
BatchNorm for moved maps; a network with BatchNorm has one for all, which counts the passes of the search as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from viladiff.config.base import Section
from viladiff.core import keyed_random
from viladiff.core.distributed import full_precision
from viladiff.data.batch import IGNORE, Batch, Losses, Step, Views
from viladiff.data.transforms.mixing import apply_cutmix, half_boxes
from viladiff.losses import cross_entropy, distributed_mean
from viladiff.methods.base import (
    SHARED_THRESHOLD,
    MeanTeacher,
    MethodConfig,
    PredictConfig,
    PseudoConfig,
    Reference,
    StepCost,
    TeacherConfig,
    keyed_boxes,
    steps_after,
)
from viladiff.methods.common.published import PublishedSetting, protocol, sgd
from viladiff.methods.common.resting import resting
from viladiff.models.baselines.memory_bank import gather_at, sample_positions
from viladiff.models.baselines.normalizing_flow import Flow
from viladiff.models.blocks import at_cells
from viladiff.models.ema import ema_update
from viladiff.models.segmenter import NetworkFactory


class DdfpTeacherConfig(TeacherConfig):
    momentum: float = Field(0.999, ge=0, le=1)
    """The first steps after the warm-up, counted from 0 there, use min(momentum, 1 - 1 / (step + 1))."""


class FlowConfig(Section):
    """The density of the decoder's features."""

    depth: int = Field(2, ge=1)
    """Couplings."""
    hidden: int | None = Field(None, ge=1)
    """Units of each of a coupling's networks; none takes as many as there are channels, as 256 there."""
    clamp: float = Field(2.0, gt=0)
    """Limit c of the logarithm of a coupling's scales, which is 0.636 c atan(.) of what its network says."""
    lr: float = Field(1e-3, gt=0)
    """In place of ``optim.lr``; betas are 0.5 and 0.9, and nothing decays."""
    noise: float = Field(0.05, ge=0)
    """Standard deviation of what is added to the features that the flow learns from."""
    samples: int = Field(2560, ge=1)
    """Most positions of an image that it learns from: 20480 of 8 images, as there."""


class DdfpConfig(MethodConfig):
    """Density-descending feature perturbation."""

    name: Literal["ddfp"] = "ddfp"
    cutmix: bool = True
    """One box of half the picture in every second batch."""
    warmup: float = Field(1 / 80, ge=0, lt=1)
    """Share of training in which labels alone teach, and the flow rests: one of 80 epochs."""
    perturb_from: float = Field(2 / 80, ge=0, le=1)
    """Share of training from which features are moved; until then the plain strong view counts twice. 1 is never."""
    radius: float = Field(0.3, gt=0)
    """Length of a move as a share of the vectors' mean length (ours; there 4.0, where a vector has 304 channels after a
    norm and ReLU, hence a length of about 12)."""
    flow: FlowConfig = FlowConfig()
    teacher: DdfpTeacherConfig = DdfpTeacherConfig()
    pseudo: PseudoConfig = PseudoConfig()
    predict: PredictConfig = PredictConfig()

    @model_validator(mode="after")
    def _stages_in_order(self) -> DdfpConfig:
        if self.perturb_from < self.warmup:
            raise ValueError(
                f"perturb_from = {self.perturb_from}: must be at least warmup = {self.warmup}, where the flow begins"
            )
        return self


class Ddfp(MeanTeacher):
    Config = DdfpConfig
    embedded = SHARED_THRESHOLD
    revision = 2
    views = Views(strong=1, pairs=True)
    paper = Reference(
        "Towards the Uncharted: Density-Descending Feature Perturbation for Semi-supervised Semantic Segmentation",
        "CVPR",
        2024,
    )
    step_cost = StepCost(4, 2, 2, 2, "flow: 2 forward and backward")
    published = (
        PublishedSetting(("voc",), {"method.pseudo.threshold": 0.95, "method.teacher.momentum": 0.999}, "DDFP 7956c72"),
    )
    protocols = (
        protocol(("voc",), "DDFP 7956c72", 513, 80.0, 16, sgd(1e-3, 10)),
        protocol(("cityscapes",), "DDFP 7956c72", 801),
    )
    extra_state = "teacher, flow"
    exact = ("student.decoder", "student.classifier")

    def __init__(self, cfg: DdfpConfig, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        width, flow = self.student.decoder.width, cfg.flow
        self.flow = Flow(width, build.num_classes, flow.hidden or width, flow.depth, flow.clamp)

    def extra_param_groups(self) -> dict[str, dict[str, Any]]:
        return {"flow": {"lr": self.cfg.flow.lr, "betas": (0.5, 0.9), "weight_decay": 0.0}}

    def shared(self) -> dict[str, list[nn.Parameter]]:
        return {**super().shared(), "flow": list(self.flow.parameters())}

    def required_views(self) -> Views:
        return Views(strong=1, pairs=self.cfg.cutmix)

    def forward(self, batch: Batch, step: Step) -> Losses:
        return self._warm(batch) if step.progress < self.cfg.warmup else self._teach(batch, step)

    def _warm(self, batch: Batch) -> Losses:
        sup = self.supervised(self.student.predicted(batch.image), batch.target)
        rest = resting(self.flow)
        zero = torch.zeros((), device=sup.device)
        names = ("pseudo", "perturbed", "nll", "coverage")
        return Losses(sup + rest, {"sup": sup.detach(), **dict.fromkeys(names, zero)}, {"sup": sup})

    def _teach(self, batch: Batch, step: Step) -> Losses:
        cfg, labelled, size = self.cfg, len(batch.image), batch.image.shape[-2:]
        strong, valid = batch.strong[0], batch.valid
        mix = keyed_boxes(batch, step, "ddfp-cut", half_boxes) if cfg.cutmix else None
        with torch.no_grad():
            seen = self.teacher.streams(torch.cat([batch.image, batch.weak[0]]))["visual"]
            confidence, labels = self.student.at_pixels(seen.logits[labelled:], size).top()
            labels = labels.masked_fill((confidence < cfg.pseudo.threshold) | ~valid, IGNORE)
        if mix is not None:
            strong, labels, valid = (apply_cutmix(x, mix) for x in (strong, labels, valid))
        nll = self._likelihood(seen.mid, batch, step)
        features = self.student.encode(torch.cat([batch.image, strong]))
        if step.progress >= cfg.perturb_from:
            mine = [level[labelled:] for level in features]
            moves = lower_density(mine, self._rarity(labels), cfg.radius)
            features = [torch.cat([f, m + d]) for f, m, d in zip(features, mine, moves, strict=True)]
        logits = self.student.at_pixels(self.student.grid_logits(features), size)

        sup = self.supervised(logits[:labelled], batch.target)
        streams = [cross_entropy(z, labels) for z in logits[labelled:].split(len(labels))]
        total = sup + cfg.pseudo.weight * torch.stack(streams).mean() + nll
        halves = [cfg.pseudo.weight / len(streams) * stream for stream in streams]
        parts = {"sup": sup, "pseudo": halves[0], **({"perturbed": halves[1]} if len(streams) > 1 else {}), "nll": nll}
        terms = {"sup": sup, "pseudo": streams[0], "perturbed": streams[-1], "nll": nll}
        terms["coverage"] = distributed_mean((labels != IGNORE).sum(), valid.sum())
        return Losses(total, {name: value.detach() for name, value in terms.items()}, parts)

    def after_step(self, step: Step) -> None:
        """Update the teacher, restarted at the end of the warm-up."""
        ema_update(self.teacher, self.student, steps_after(self.cfg.warmup, step), self.cfg.teacher.momentum)

    def _likelihood(self, mid: Tensor, batch: Batch, step: Step) -> Tensor:
        """Return mean -log p per channel of the teacher's vectors ``mid`` (B + U, D, h, w) with noise; detached."""
        stride, width = self.student.decoder.stride, mid.shape[1]
        target, valid = (at_cells(x, stride).flatten(1) for x in (batch.target, batch.valid))
        counted = torch.cat([target != IGNORE, valid])
        classes = torch.cat([target.masked_fill(target == IGNORE, -1), torch.full_like(valid, -1, dtype=torch.int64)])
        keys = [*(f"l{key}" for key in batch.keys), *(f"u{key}" for key in batch.keys_u)]
        name, device = (step.seed, "ddfp", step.index), mid.device
        order = keyed_random.uniform(keys, counted.shape[1:], *name, "order", device=device)
        at, given = sample_positions(counted, order, self.cfg.flow.samples)
        noise = keyed_random.normal(keys, (at.shape[1], width), *name, "noise", device=device)
        vectors = gather_at(mid.detach().flatten(2).mT.float(), at) + self.cfg.flow.noise * noise
        nll = self.flow.nll(vectors.flatten(0, 1), classes.gather(1, at).flatten())
        return distributed_mean((nll * given.flatten()).sum() / width, given.sum())

    def _rarity(self, labels: Tensor) -> Callable[[list[Tensor]], Tensor]:
        """Return a function from the decoder's four maps to the summed -log p of its vectors at labelled positions."""
        stride = self.student.decoder.stride
        counted = at_cells(labels != IGNORE, stride).flatten()

        def rarity(features: list[Tensor]) -> Tensor:
            mid = self.student.decode(features)["visual"].mid
            return (self.flow.nll(mid.flatten(2).mT.flatten(0, 1)) * counted).sum()

        return rarity


def lower_density(features: list[Tensor], nll: Callable[[list[Tensor]], Tensor], radius: float) -> list[Tensor]:
    """Return a move of each vector along the gradient of ``nll``, a function of all maps: shaped like them, detached.

    At every position of a map (B, D_i, h_i, w_i) its length is ``radius`` times the mean length of the image's vectors
    there, or 0 where nothing changes ``nll``. Autocast is off in here: small gradients would be lost.
    """
    with full_precision(features[0].device), torch.enable_grad():
        base = [level.detach().float() for level in features]
        moved = [level.clone().requires_grad_() for level in base]
        slopes = torch.autograd.grad(nll(moved), moved, materialize_grads=True)
    found = []
    for level, own, slope in zip(features, base, slopes, strict=True):
        length = own.norm(dim=1, keepdim=True).mean((2, 3), keepdim=True)
        largest = slope.abs().amax(1, keepdim=True)
        direction = slope / torch.where(largest > 0, largest, 1.0)  # squares of tiny gradients vanish in float32
        found.append((radius * length * direction / direction.norm(dim=1, keepdim=True).clamp(min=1)).to(level.dtype))
    return found
