"""The base class of methods: a module that owns its networks and declares its views.

``backward`` is called in the loop and nowhere else; the loop, the data layer and the evaluator know a method only
through this class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from viladiff.config.base import Section
from viladiff.core import keyed_random
from viladiff.data.batch import Batch, CutMix, Losses, Step, TextBatch, Views
from viladiff.data.loading.device_copies import send
from viladiff.data.transforms.mixing import apply_cutmix, pair_partner
from viladiff.losses import Logits, ignore_aware_mean, ohem_mean, pixel_cross_entropy
from viladiff.models.ema import ema_update, frozen_copy
from viladiff.models.segmenter import DualNetwork, NetworkFactory

if TYPE_CHECKING:
    from viladiff.methods.common.published import PublishedSetting
    from viladiff.models.segmenter import Network, Segmenter


class OhemConfig(Section):
    """Supervised cross-entropy of hard pixels alone (online hard example mining), usual on Cityscapes."""

    enabled: bool = False
    threshold: float = Field(0.7, gt=0, le=1)
    """A pixel is hard up to this probability of its true class."""
    min_kept: float = Field(0.156, gt=0, le=1)
    """Share of the crops' pixels that is kept at least; published as 200,000 of two crops of 801 x 801."""


class MethodConfig(Section):
    """Base of each method's own section; ``name`` tells the sections apart."""

    name: str
    ohem: OhemConfig = OhemConfig()


class TeacherConfig(Section):
    """The moving average of the student that makes the pseudo-labels."""

    momentum: float = Field(0.99, ge=0, le=1)
    """Paper, section 4.1; the first steps use min(momentum, 1 - 1 / (step + 1))."""


class PseudoConfig(Section):
    """The choice of pseudo-labels from teacher predictions."""

    threshold: float = Field(0.95, ge=0, le=1)
    """Pixels below this confidence have weight 0."""
    weight: float = Field(1.0, ge=0)
    """Factor of the weak-to-strong cross-entropy in the total."""


SHARED_THRESHOLD: Mapping[str, object] = {"pseudo.threshold": 0.7}
"""On the built-in data, of all methods with a fixed threshold that is published as 0.9 or more: docs/experiments.md."""


class PredictConfig(Section):
    """The choice of the network that is evaluated and exported."""

    network: Literal["teacher", "student"] = "teacher"


class Reference(NamedTuple):
    """The publication of a method."""

    title: str
    venue: str
    year: int


class StepCost(NamedTuple):
    """The cost of a step, in passes of a batch through encoder and decoder, for equally large batches.

    Of the default configuration, in the phase that most of training is spent in.
    """

    forward: int
    backward: int
    """How many of these forward passes are also gone through backwards."""
    decoder_forward: int = 0
    """Passes through a decoder beyond those of the encoder, likewise."""
    decoder_backward: int = 0
    beside: str = ""
    """Networks of another kind."""


class Method(nn.Module):
    """Base of all methods. ``state_dict()`` is the whole state: students, teachers, running statistics."""

    Config: ClassVar[type[MethodConfig]]
    views: ClassVar[Views] = Views()
    revision: ClassVar[int] = 1
    """Raised together with the golden file whenever the method computes something else than before."""
    paper: ClassVar[Reference | None] = None
    step_cost: ClassVar[StepCost | None] = None
    extra_state: ClassVar[str] = ""
    """What the method has beside its student."""
    exact: ClassVar[tuple[str, ...]] = ()
    """Dotted paths of parts of networks whose weights are not cast with all others: ``forward`` runs them in float32
    also where it is under autocast, or they rest in most steps."""
    published: ClassVar[tuple[PublishedSetting, ...]] = ()
    """What the publication sets by data set and list; scale ``paper`` of the tables applies it."""
    protocols: ClassVar[tuple[PublishedSetting, ...]] = ()
    """What the publication has of optimiser, batch, crop and length, likewise; it yields to a table's own."""
    embedded: ClassVar[Mapping[str, object]] = {}
    """Defaults on the built-in data sets, chosen on their part ``dev``: {path below ``method``: value}."""
    term_fields: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Fields that weigh single parts of the loss or leave them out, by path below ``method``: patterns of their names.
    ``path=value`` is one of several values of a field. A table that varies such a field is told the parts' shares."""
    trains_on_weak: ClassVar[bool] = False
    """Whether a weak view is also an input that trains, as where its features are perturbed."""
    labels_read_batch: ClassVar[bool] = False
    """Whether pseudo-labels of an image depend on the other images of its batch."""

    def __init__(self, cfg: Any, build: NetworkFactory) -> None:
        super().__init__()
        self.cfg = cfg
        self.student = self.build_student(build)

    def build_student(self, build: NetworkFactory) -> Segmenter:
        """Build the trained network; override it to add parts."""
        return build()

    def forward(self, batch: Batch, step: Step) -> Losses:
        raise NotImplementedError

    def supervised(self, logits: Logits, target: Tensor) -> Tensor:
        """Return L_sup, Eq. 10 with the masks of labelled images: all pixels, or with ``cfg.ohem`` the hard ones."""
        return self.supervised_mean(pixel_cross_entropy(logits, target), target)

    def supervised_mean(self, loss: Tensor, target: Tensor) -> Tensor:
        """Reduce a loss map (B, H, W) that is 0 where ``target`` is 255 as ``supervised`` does."""
        ohem = self.cfg.ohem
        if ohem.enabled:
            return ohem_mean(loss, target, ohem.threshold, ohem.min_kept)
        return ignore_aware_mean(loss, target)

    def shared(self) -> dict[str, list[nn.Parameter]]:
        """Return trained parameters at which the gradients of the loss's parts are compared, by place.

        A part counts at the first place that its gradient reaches: the student's encoder and decoder, unless it reaches
        neither; one that reaches no place counts with all other trained parameters.
        """
        both = (*self.student.encoder.parameters(), *self.student.decoder.parameters())
        return {"student": [weight for weight in both if weight.requires_grad]}

    def after_step(self, step: Step) -> None:
        """Update state after each optimiser step, outside autograd: moving averages, queues."""

    def extra_param_groups(self) -> dict[str, dict[str, Any]]:
        """Return options of the optimiser for parts of the method, by dotted path ("flow", "student.spark").

        Each has either ``lr``, the rate itself, or ``lr_scale``, a factor of ``optim.lr`` or "encoder" for the
        encoder's; ``betas`` and ``weight_decay`` are optional. With ``betas`` they are options of AdamW, which the part
        then has whatever ``optim.name`` is. Of two paths to a parameter the longer one applies.
        """
        return {}

    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        """Return class probabilities (B, C, H, W) behind the weak views' labels, by stage; empty without a teacher."""
        return {}

    def visualize(self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step) -> dict[str, Tensor]:
        """Label maps (B, H, W) worth a look, in the order they arise in; by default those of the pseudo-labels."""
        return {name: found.argmax(1) for name, found in self.pseudo_labels(images, text, keys, step).items()}

    def token_features(self, images: Tensor, text: TextBatch | None) -> dict[str, Tensor]:
        """Return features (B, N, W) of the coarsest grid's cells, row by row, by stage; empty if not to be measured.

        ``after`` is the source of the headline's masks, ``before`` the same before the texts are read.
        """
        return {}

    def eval_network(self) -> Network:
        """Return the network that is evaluated, exported and reported."""
        return self.student

    def eval_networks(self) -> dict[str, Network]:
        """Return every network to evaluate, by its name in a record."""
        return {"student": self.student}

    def threshold(self) -> float | None:
        """Return the current confidence above which a pseudo-label counts; None if the method has no such limit."""
        pseudo = getattr(self.cfg, "pseudo", None)
        return getattr(pseudo, "threshold", None)

    def required_views(self) -> Views:
        """Return the views that this configuration of the method needs; the class's own by default."""
        return self.views

    def check_images(self, unlabelled: int) -> None:
        """Raise ValueError before training if there are too few unlabelled images, with what to change."""
        views, name = self.required_views(), f"method.name = {self.cfg.name!r}"
        if views.unlabelled and unlabelled == 0:
            raise ValueError(
                f"{name} learns from unlabelled images, and data.split leaves none; choose a split with fewer labels, "
                "add images without masks, or train method.name=supervised"
            )
        if (views.cutmix or views.pairs) and unlabelled == 1:
            otherwise = ", or set method.cutmix=false" if hasattr(self.cfg, "cutmix") else ""
            raise ValueError(
                f"{name} pastes unlabelled images into one another, and data.split leaves one; "
                f"add images without masks, choose a split with fewer labels{otherwise}"
            )

    def notes(self) -> tuple[str, ...]:
        """Return notes before training, a sentence each: what the method lacks here and how to provide it."""
        return ()

    @property
    def labels_read_text(self) -> bool:
        """Whether pseudo-labels are made from captions as well."""
        return False

    def eval_stream(self) -> str:
        """Return the name of the prediction stream whose mIoU is the run's score."""
        return "visual"


class MeanTeacher(Method):
    """A method whose teacher is the moving average of its student and is always in evaluation mode."""

    def __init__(self, cfg: Any, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        self.teacher = frozen_copy(self.student)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher.eval()
        return self

    def after_step(self, step: Step) -> None:
        ema_update(self.teacher, self.student, step.index, self.cfg.teacher.momentum)

    def eval_network(self) -> Network:
        return self.teacher if self.cfg.predict.network == "teacher" else self.student

    def eval_networks(self) -> dict[str, Network]:
        return {"student": self.student, "teacher": self.teacher}

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        return {"before": self.teacher(images, text)["visual"].softmax(1)}


def apply_cutmix_to(batch: Batch, view: int, *maps: Tensor) -> tuple[Tensor, ...]:
    """Paste the boxes of a strong view into maps (U, ..., H, W); return them unchanged if the method uses no boxes."""
    return tuple(apply_cutmix(x, batch.mix[view]) for x in maps) if batch.mix else maps


def keyed_boxes(
    batch: Batch,
    step: Step,
    name: str,
    draw: Callable[[Sequence[np.random.Generator], np.random.Generator, int], Tensor],
) -> CutMix:
    """Draw the CutMix boxes and partners of the unlabelled images with generators keyed by ``name``.

    draw: (one generator an image, one for the step, side of a crop in pixels) -> boxes (U, 4).
    """
    device, key = batch.valid.device, (step.seed, name, step.index)
    rngs = [keyed_random.numpy_generator(*key, image) for image in batch.keys_u]
    boxes = draw(rngs, keyed_random.numpy_generator(*key, "coin"), batch.valid.shape[-1])
    return CutMix(send(boxes, device), send(pair_partner(len(rngs)), device))


def steps_after(warmup: float, step: Step) -> int:
    """Return the steps between the end of a warm-up, a share of training, and ``step``; 0 within it and at its end."""
    if not step.index or step.progress < warmup:
        return 0
    return step.index - math.ceil(warmup * step.index / step.progress - 1e-6)


class TwoTeachers(Method):
    """``teachers`` start as copies of the student, get no gradient and are always in evaluation mode."""

    def __init__(self, cfg: Any, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        self.teachers = DualNetwork(frozen_copy(self.student), frozen_copy(self.student))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teachers.eval()
        return self


def turn_length(step: Step, period: float) -> float:
    """Return the steps of a teacher's turn: ``period``, a share of training, and at least two steps.

    Published code counts epochs, whose length depends on the data set. At the first step the run's length is unknown:
    2.
    """
    return max(2.0, period * step.index / step.progress) if step.index else 2.0


def turn(step: Step, period: float, ahead: int = 0) -> tuple[int, int]:
    """Return the number of the turn of the step ``ahead`` of this one, from 0, and the turn's steps before it.

    At the first step the run's length is unknown and not needed.
    """
    index = step.index + ahead
    if step.index == 0:
        return 0, index
    length = turn_length(step, period)
    number = int((index + 1e-6) / length)
    return number, index - math.ceil(number * length - 1e-6)
