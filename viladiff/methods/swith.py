"""SwiTh: two temporary teachers in turn, one for CutMix, one for ClassMix (Na et al., Dual Teacher, NeurIPS 2023).

A teacher's moving average begins anew with its turn, so that its first step finds the student as it is. The student
drops residual branches, the teachers do not.

Differences from the released code. A turn is a share of training, not an epoch. Pictures are mixed from strong views,
whose colours were drawn one by one, where CutMix there comes before colour, blur and flip. The padding that counts is
that of the unlabelled images; the released consistency reads the labelled ones' by mistake. One pass of the teacher
serves both losses, and images are mixed with their neighbours, never with themselves. The loss of a picture with CutMix
is a mean over its valid pixels, over those with a loss above 0 there.
Colours of labelled images do not change, where there they do (photometric distortion).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, Losses, Step, TextBatch, Views
from viladiff.data.loading.device_copies import send
from viladiff.data.transforms.mixing import beta_boxes, box_mask, class_mask, pair_partner, paste
from viladiff.losses import all_reduce_sum, distributed_mean, pseudo_label_cross_entropy
from viladiff.methods.base import (
    SHARED_THRESHOLD,
    MethodConfig,
    PredictConfig,
    PseudoConfig,
    Reference,
    StepCost,
    TeacherConfig,
    TwoTeachers,
    turn,
)
from viladiff.methods.common.published import PublishedSetting
from viladiff.models.ema import ema_update
from viladiff.models.segmenter import Network, NetworkFactory, Segmenter


class SwithTeacherConfig(TeacherConfig):
    momentum: float = Field(0.99, ge=0, le=1)
    """The first steps of each turn use min(momentum, 1 - 1 / (steps of the turn + 1))."""
    switch_period: float = Field(1 / 60, gt=0, le=1)
    """Share of training after which the other teacher takes over: one of 60 epochs (of 200 in the released code)."""


class SwithPseudoConfig(PseudoConfig):
    threshold: float = Field(0.95, ge=0, le=1)
    """The share of pixels at or above it weighs a mixed picture; in the consistency term it chooses pixels.

    With CutMix the share is that of the picture before anything is pasted, with ClassMix that of the mixed batch.
    """
    consistency_weight: float = Field(0.2, ge=0)
    """Weight of the term without mixing (implicit consistency)."""


class SwithPredictConfig(PredictConfig):
    network: Literal["teacher", "student"] = "student"
    """The paper's is the student; ``teacher`` is the mean of both."""


class SwithConfig(MethodConfig):
    """Switching temporary teachers."""

    name: Literal["swith"] = "swith"
    drop_path: float = Field(0.1, ge=0, lt=1)
    """The student's, in place of ``model.drop_path``."""
    teacher: SwithTeacherConfig = SwithTeacherConfig()
    pseudo: SwithPseudoConfig = SwithPseudoConfig()
    predict: SwithPredictConfig = SwithPredictConfig()


class Swith(TwoTeachers):
    Config = SwithConfig
    embedded = SHARED_THRESHOLD
    published = (
        PublishedSetting(
            ("ade20k",),
            {"method.teacher.momentum": 0.99, "method.teacher.switch_period": 1 / 200},
            "dual-teacher 868e6e7, which has ADE20K alone",
        ),
    )
    views = Views(strong=2, pairs=True)
    paper = Reference("Switching Temporary Teachers for Semi-Supervised Semantic Segmentation", "NeurIPS", 2023)
    step_cost = StepCost(4, 3)
    revision = 2
    extra_state = "two teachers"

    def build_student(self, build: NetworkFactory) -> Segmenter:
        return build(drop_path=self.cfg.drop_path)

    def forward(self, batch: Batch, step: Step) -> Losses:
        count, cfg = len(batch.image), self.cfg.pseudo
        active = self._active(step)
        with torch.no_grad():
            confidence, labels = self.teachers[active].predicted(batch.weak[0]).top()
            partner = send(pair_partner(len(labels)), labels.device)
            mask = (self._class_masks if active else self._box_masks)(batch, labels, partner, step)
            sure = confidence >= cfg.threshold
            mixed_labels, mixed_sure, valid = (paste(x, mask, partner) for x in (labels, sure, batch.valid))
            share = sure_share(mixed_sure, valid, True) if active else sure_share(sure, batch.valid, False)
        mixed, strong = paste(batch.strong[0], mask, partner), batch.strong[1]
        logits = self.student.predicted(torch.cat([batch.image, mixed, strong]))
        z, z_mixed, z_strong = logits.split([count, len(mixed), len(strong)])

        sup = self.supervised(z, batch.target)
        pseudo = pseudo_label_cross_entropy(z_mixed, mixed_labels, share.expand_as(confidence), valid)
        accepted = sure.float()
        consistency = pseudo_label_cross_entropy(z_strong, labels, accepted, batch.valid)
        weighted = cfg.consistency_weight * consistency
        total = sup + cfg.weight * (pseudo + weighted)
        parts = {"sup": sup, "pseudo": cfg.weight * pseudo, "consistency": cfg.weight * weighted}
        terms = {"sup": sup.detach(), "pseudo": pseudo.detach(), "consistency": consistency.detach()}
        terms["coverage"] = distributed_mean((accepted * batch.valid).sum(), batch.valid.sum())
        return Losses(total, terms, parts)

    def after_step(self, step: Step) -> None:
        """Update the teacher of the next step; at the start of its turn it is set to the student."""
        number, done = turn(step, self.cfg.teacher.switch_period, ahead=1)
        ema_update(self.teachers[number % 2], self.student, done, self.cfg.teacher.momentum)

    def _active(self, step: Step) -> int:
        """Return 0 in turns of CutMix, 1 in turns of ClassMix."""
        return turn(step, self.cfg.teacher.switch_period)[0] % 2

    def _box_masks(self, batch: Batch, labels: Tensor, partner: Tensor, step: Step) -> Tensor:
        height, width = labels.shape[-2:]
        rngs = [keyed_random.numpy_generator(step.seed, "swith-boxes", step.index, key) for key in batch.keys_u]
        return box_mask(send(beta_boxes(rngs, width), labels.device), height, width)

    def _class_masks(self, batch: Batch, labels: Tensor, partner: Tensor, step: Step) -> Tensor:
        """Return the pixels of half of the classes that the teacher predicts in each image's partner."""
        shape, name = (self.student.num_classes,), (step.seed, "swith-classes", step.index)
        uniform = keyed_random.uniform(batch.keys_u, shape, *name, device=labels.device)
        return class_mask(labels, batch.valid, uniform)[partner]

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        return {"before": self.teachers[self._active(step)](images)["visual"].softmax(1)}

    def eval_network(self) -> Network:
        return self.teachers if self.cfg.predict.network == "teacher" else self.student

    def eval_networks(self) -> dict[str, Network]:
        return {"student": self.student, "teacher": self.teachers}


def sure_share(sure: Tensor, valid: Tensor, whole_batch: bool) -> Tensor:
    """Return the share of valid pixels that are sure: (U, 1, 1) by image, or (1, 1, 1) over all images of all workers.

    ``sure`` and ``valid`` (U, H, W) bool; 0 where nothing is valid.
    """
    counts = torch.stack([sure & valid, valid]).flatten(2).sum(2).float()
    if whole_batch:
        counts = all_reduce_sum(counts.sum(1, keepdim=True))
    return (counts[0] / counts[1].clamp(min=1)).view(-1, 1, 1)
