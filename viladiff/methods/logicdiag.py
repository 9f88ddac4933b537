"""LogicDiag (reimpl.): pseudo-labels revised where they contradict a hierarchy of classes (Liang et al., ICCV 2023).

No code of the authors is public. This is a reconstruction from the abstract and the introduction, and is named so
wherever it appears: the rules, their fuzzy truth, diagnoses weighed by confidence and conflict, and that there is no
threshold, are the paper's; the rest is ours. L = 1/2 (L_x + L_u) in the loop of ``fixmatch``: a moving-average teacher
labels the weak view, the labels are revised, the student learns them on the strong view with CutMix.

Ours are: a second classifier, for groups of classes, on what the first one reads; L_x is the binary cross-entropy of a
label's path, a sum over classes and groups (``models.hierarchy``), L_u the usual cross-entropy of the classes, so that
groups are learned from masks alone and no revision confirms itself through them. All C consistent states are weighed,
where a search for small diagnoses would leave pixels unresolved. Diagnoses are made on the decoder's grid and their
scores brought to pixels. The network that is evaluated is the segmenter alone: its highest class. A flat softmax cannot
contradict itself; the groups' scores are the method, and ``method.revise=false`` shows what their rules add. There is
no loss on the rules themselves.

CutMix boxes lie on the patch grid, as in ``fixmatch`` (``data.cutmix_grid``). No threshold leaves unsure labels out: in
runs of a few hundred steps on the built-in data, where early labels are poor, they cost 1.5 to 2 points.

Groups are known for the built-in data sets, VOC, Cityscapes and COCO; of other data, ``groups`` says them.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from viladiff.data.batch import Batch, Losses, Step, TextBatch, Views
from viladiff.losses import distributed_mean, pseudo_label_cross_entropy
from viladiff.methods.base import (
    MeanTeacher,
    MethodConfig,
    PredictConfig,
    PseudoConfig,
    Reference,
    StepCost,
    apply_cutmix_to,
)
from viladiff.methods.fixmatch import FixMatchTeacherConfig
from viladiff.models.baselines.class_hierarchy import diagnose, known_groups, node_cross_entropy, parents
from viladiff.models.ema import ema_update, frozen_copy
from viladiff.models.segmenter import NetworkFactory, Segmenter


class LogicDiagPseudoConfig(PseudoConfig):
    threshold: float = Field(0.0, ge=0, le=1)
    """Least share of a pixel's best path among all paths; the method has none."""


class LogicDiagConfig(MethodConfig):
    """A reconstruction: rules of a hierarchy of classes revise the teacher's labels."""

    name: Literal["logicdiag"] = "logicdiag"
    cutmix: bool = True
    revise: bool = True
    """Off takes the class of highest score, so that groups are learned and used for nothing."""
    conflict_weight: float = Field(1.0, ge=0)
    """Weight of the conflict that a changed node is in (γ, ours); 0 weighs diagnoses by confidence alone."""
    groups: tuple[str, ...] | None = None
    """A word for each class in order, equal for classes of one group; none takes those known of the data set."""
    teacher: FixMatchTeacherConfig = FixMatchTeacherConfig()
    pseudo: LogicDiagPseudoConfig = LogicDiagPseudoConfig()
    predict: PredictConfig = PredictConfig()


class LogicDiag(MeanTeacher):
    Config = LogicDiagConfig
    views = Views(strong=1, cutmix=True)
    revision = 2
    paper = Reference(
        "Logic-induced Diagnostic Reasoning for Semi-supervised Semantic Segmentation (reimpl.)", "ICCV", 2023
    )
    step_cost = StepCost(3, 2)
    extra_state = "teacher, classifier of groups"
    parent: Tensor
    """(C,) the group of each class."""

    def __init__(self, cfg: LogicDiagConfig, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        found = cfg.groups or known_groups(build.dataset, build.num_classes)
        self.unknown = "" if found else build.dataset or "this data set"
        names = found or ("any",) * build.num_classes
        if len(names) != build.num_classes:
            raise ValueError(
                f"method.groups = {', '.join(names)!r}: {len(names)} words, must be one for each of the "
                f"{build.num_classes} classes"
            )
        self.register_buffer("parent", parents(names), persistent=False)
        student = self.student
        self.groups = student.decoder.classifier(len(set(names)))
        self.teacher_groups = frozen_copy(self.groups)

    def required_views(self) -> Views:
        return Views(strong=1, cutmix=self.cfg.cutmix)

    def notes(self) -> tuple[str, ...]:
        if not self.unknown:
            return ()
        return (
            f"method.name = 'logicdiag': no groups of {self.unknown}'s classes are known, so all are one group and "
            "only the rules between classes are left; set method.groups to a word for each class, in order",
        )

    def forward(self, batch: Batch, step: Step) -> Losses:
        labelled, size = len(batch.image), batch.image.shape[-2:]
        with torch.no_grad():
            z = _nodes(self.teacher, self.teacher_groups, batch.weak[0])
            before, after = (self.student.at_pixels(x, size) for x in self._stages(z))
            confidence, labels = after.top()
            revised = (labels != before.classes()).float()
            accepted = (confidence >= self.cfg.pseudo.threshold).float()
            changed = distributed_mean((revised * batch.valid).sum(), batch.valid.sum())
        strong, labels, accepted, valid = apply_cutmix_to(batch, 0, batch.strong[0], labels, accepted, batch.valid)

        logits = self.student.at_pixels(_nodes(self.student, self.groups, torch.cat([batch.image, strong])), size)
        mine, taught = logits[:labelled].tensor(), logits[labelled:].channels(len(self.parent))
        sup = self.supervised_mean(node_cross_entropy(mine, batch.target, self.parent), batch.target)
        pseudo = pseudo_label_cross_entropy(taught, labels, accepted, valid)
        coverage = distributed_mean((accepted * valid).sum(), valid.sum())
        terms = {"sup": sup.detach(), "pseudo": pseudo.detach(), "coverage": coverage, "revised": changed}
        weighted = self.cfg.pseudo.weight * pseudo
        return Losses((sup + weighted) / 2, terms, {"sup": sup / 2, "pseudo": weighted / 2})

    def after_step(self, step: Step) -> None:
        super().after_step(step)
        ema_update(self.teacher_groups, self.groups, step.index, self.cfg.teacher.momentum)

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        """Return the teacher's classes before revision, and the shares of their paths after it."""
        stages = self._stages(_nodes(self.teacher, self.teacher_groups, images))
        before, after = (self.student.upsample(x, images.shape[-2:]) for x in stages)
        scores = before.sigmoid()
        return {"before": scores / scores.sum(1, keepdim=True), "after": after.softmax(1)}

    def _stages(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (U, C, h, w) of the classes alone, and after revision, from all nodes' (U, C + S, h, w)."""
        alone = z[:, : len(self.parent)]
        return alone, diagnose(z, self.parent, self.cfg.conflict_weight) if self.cfg.revise else alone


def _nodes(network: Segmenter, groups: nn.Module, images: Tensor) -> Tensor:
    """Return grid logits (B, C + S, h, w): the network's classes, then the groups, from the same maps."""
    features = network.encode(images)
    stream = network.decode(features)["visual"]
    return torch.cat([stream.logits, groups(stream.mid, features[-1]).float()], 1)
