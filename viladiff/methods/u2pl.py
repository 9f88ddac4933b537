"""U2PL: unreliable pixels still say which classes they are not (Wang et al., CVPR 2022).

The teacher's entropy sorts the pixels of the unlabelled images. The most uncertain teach no label; those at the upper
end instead enter, through the teacher's representation, the queues of classes that they are almost surely not of. Sure
pixels of a class are pulled to their class's mean and pushed from what its queue holds.

L = L_sup + (N / N_kept) CE_kept + L_c; see ``kept_consistency`` and ``contrast``.

The rule of the negatives is the paper's, which the released code does not follow (its issues 27, 111 and 171): there
the queue of a class takes only pixels that carry that class as their pseudo-label. No labelled pixel does, and of the
others only those of which the teacher thinks otherwise in its second pass. And where a class is absent from a batch,
the anchors of one class there meet the queue of another. Measured on `digits`, two thirds through training, on the same
tensors of 10 batches, after 60 that filled the queues: 2.8 new vectors a class and step by the released rule, 1,438 by
the paper's; L_c 3.1 and 2.7; the gradient of L_c in the student, as a share of that of L_sup, 0.27 and 0.50.

Differences from the released code. L_c is a mean over the classes with an anchor; there a class that has sure pixels
and no anchor counts as 0, which made L_c 0.85 times ours on those tensors. Percentiles and the share of training that
they follow move with every step, and are those of the pixels that all workers see at once: under accumulation of a
micro-batch. A step samples anchors and new negatives image by image and puts the latter away when it is done, for the
next step, so that it does not matter who looks at which image. Queues are in half precision on the device, gathered
over workers, and saved with the rest. The teacher's representation drops no channels. L_c is a plain mean where the
released one shrinks with the number of workers (``contrast_weight``). There is no auxiliary loss on Cityscapes. Padding
is among no pixels, and counts in no N. The background's queue is as long as the others', where there it has 50,000.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from viladiff.core import keyed_random
from viladiff.core.distributed import full_precision
from viladiff.data.batch import IGNORE, Batch, Losses, Step, Views
from viladiff.data.transforms.mixing import apply_cutmix, half_boxes
from viladiff.losses import (
    Logits,
    all_gather,
    all_reduce_sum,
    distributed_mean,
    mean_over_classes,
    pixel_cross_entropy,
)
from viladiff.methods.base import (
    MeanTeacher,
    MethodConfig,
    PredictConfig,
    Reference,
    StepCost,
    TeacherConfig,
    keyed_boxes,
    steps_after,
)
from viladiff.methods.common.published import PublishedSetting, protocol, sgd
from viladiff.methods.common.resting import resting
from viladiff.models.baselines.memory_bank import MemoryBank, gather_at, sample_positions
from viladiff.models.baselines.perturbations import channel_dropout
from viladiff.models.blocks import at_cells
from viladiff.models.ema import ema_update, frozen_copy
from viladiff.models.fused.norms import NormActs
from viladiff.models.segmenter import NetworkFactory
from viladiff.models.stream import StreamOutput


class U2plConfig(MethodConfig):
    """Unreliable pseudo-labels; weak views only, no colour changes."""

    name: Literal["u2pl"] = "u2pl"
    cutmix: bool = True
    """One box of half the picture in every second batch."""
    warmup: float = Field(1 / 80, ge=0, lt=1)
    """Share of training in which labels alone teach: one of 80 epochs on VOC, 0 on Cityscapes."""
    unsup_weight: float = Field(1.0, ge=0)
    """Of the loss on pseudo-labels."""
    drop_percent: float = Field(20.0, ge=0, le=100)
    """Percentage of most uncertain pixels that teach no label, at the start; falls to 0 linearly."""
    entropy_percent: float = Field(20.0, ge=0, le=50)
    """Percentage of pixels that are sure, and that are uncertain enough to be negatives; falls likewise."""
    contrast_weight: float = Field(1.0, ge=0)
    """Of L_c: 1 as released, where W workers make it 1 / W in effect; 0.1, which users quote, is the paper's."""
    temperature: float = Field(0.5, gt=0)
    confidence: float = Field(0.3, ge=0, le=1)
    """Least probability of its class, by the teacher, that makes a pixel an anchor."""
    anchors: int = Field(256, ge=1)
    """Of an image, shared by the classes in it (ours; of a class in a batch there)."""
    negatives: int = Field(50, ge=1)
    """For each anchor. They take 4 * n * anchors * negatives * width bytes in a batch of n images, 105 MB where n is 8,
    at any number of classes."""
    first_rank: int = Field(3, ge=1)
    """A labelled pixel is a negative of classes above this place in its sorted probabilities, others of those below."""
    last_rank: int = Field(20, ge=2)
    """A pixel without a label is a negative of no class from this place on."""
    width: int | None = Field(None, ge=8, multiple_of=8)
    """Channels of a representation; none takes twice the decoder's, hence 256 on real images."""
    queue_size: int = Field(30_000, ge=1)
    """Vectors in a class's queue."""
    queue_megabytes: int = Field(512, ge=1)
    """Limit of all queues together, which shortens them: 322 MB at 21 classes, but 1.24 GB at 81 without it."""
    max_enqueue: int = Field(64, ge=1)
    """Most vectors that an image adds to one queue in a step, by chance (ours; all of them there)."""
    teacher: TeacherConfig = TeacherConfig()
    predict: PredictConfig = PredictConfig()


class Representation(nn.Module):
    """Two 3 x 3 convolutions and a linear map beside the classifier, on the map that it reads."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first, self.second = (
            NormActs(nn.Conv2d(given, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU())
            for given in (channels, width)
        )
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, mid: Tensor, uniform: Tensor | None = None, p: float = 0.1) -> Tensor:
        """Map mid (B, D, h, w) to representations (B, h * w, width) float32;

        ``uniform`` (B, 2 * width) draws dropped channels.
        """
        x = mid
        for i, layer in enumerate((self.first, self.second)):
            x = layer(x)
            if uniform is not None:
                (x,) = channel_dropout([x], uniform.chunk(2, 1)[i], p)
        return self.last(x).flatten(2).mT.float()


class U2pl(MeanTeacher):
    Config = U2plConfig
    published = (
        PublishedSetting(("voc",), {"method.warmup": 1 / 80}, "U2PL ab3d2be"),
        # OHEM there keeps 100,000 pixels of two crops of 769 x 769 at least.
        PublishedSetting(
            ("cityscapes",),
            {"method.warmup": 0.0, "method.ohem.enabled": True, "method.ohem.min_kept": 0.085},
            "U2PL ab3d2be",
            not_available="an auxiliary loss of weight 0.4 on an inner map of the encoder",
        ),
    )
    protocols = (
        protocol(("voc",), "U2PL ab3d2be", 513, 80.0, 16, sgd(1e-3, 10)),
        protocol(("cityscapes",), "U2PL ab3d2be", 769, 200.0, 16, sgd(1e-2, 1)),
    )
    views = Views(weak=1, pairs=True)
    trains_on_weak = True
    paper = Reference("Semi-Supervised Semantic Segmentation Using Unreliable Pseudo-Labels", "CVPR", 2022)
    step_cost = StepCost(5, 2, beside="representation head: 4 forward, 2 backward")
    extra_state = "teacher, representation heads, a queue a class"

    def __init__(self, cfg: U2plConfig, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        channels, classes = self.student.decoder.width, build.num_classes
        width = cfg.width or 2 * channels
        self.head = Representation(channels, width)
        self.teacher_head = frozen_copy(self.head)
        self.banks = MemoryBank(
            classes, max(1, min(cfg.queue_size, (cfg.queue_megabytes << 20) // (2 * classes * width))), width
        )
        self._seen: list[tuple[tuple[Tensor, Tensor], ...]] = []

    def required_views(self) -> Views:
        return Views(weak=1, pairs=self.cfg.cutmix)

    def threshold(self) -> float:
        """Return 0: entropy selects among the pixels of a batch, and no confidence excludes a label."""
        return 0.0

    def forward(self, batch: Batch, step: Step) -> Losses:
        return self._warm(batch) if step.progress < self.cfg.warmup else self._teach(batch, step)

    def _warm(self, batch: Batch) -> Losses:
        sup = self.supervised(self.student.predicted(batch.image), batch.target)
        rest = resting(self.head)
        zero = torch.zeros((), device=sup.device)
        names = ("pseudo", "contrast", "coverage", "anchors")
        return Losses(sup + rest, {"sup": sup.detach(), **dict.fromkeys(names, zero)}, {"sup": sup})

    def _teach(self, batch: Batch, step: Step) -> Losses:
        cfg, labelled, size = self.cfg, len(batch.image), batch.image.shape[-2:]
        weak, valid = batch.weak[0], batch.valid
        mix = keyed_boxes(batch, step, "u2pl-cutmix", half_boxes) if cfg.cutmix else None
        images = torch.cat([batch.image, weak if mix is None else apply_cutmix(weak, mix)])
        with torch.no_grad():
            found = self.teacher.streams(torch.cat([weak, images]))["visual"]
            labels = self.student.at_pixels(found.logits[: len(weak)], size).classes()
            if mix is not None:
                labels, valid = apply_cutmix(labels, mix), apply_cutmix(valid, mix)
            uncertain = entropy(self.student.upsample(found.logits[len(weak) + labelled :], size))
            shrink = 1 - step.progress
            shares = (100 - cfg.drop_percent * shrink, cfg.entropy_percent * shrink, 100 - cfg.entropy_percent * shrink)
            highest, low, high = percentiles(uncertain, valid, shares)
            kept = valid & (uncertain <= highest)

        stream = self.student.streams(images)["visual"]
        z = self.student.at_pixels(stream.logits, size)
        sup = self.supervised(z[:labelled], batch.target)
        pseudo = kept_consistency(z[labelled:], labels, kept, valid)
        classes = torch.cat([batch.target, labels.masked_fill(~valid, IGNORE)])
        limits = [F.pad(x, (0, 0, 0, 0, labelled, 0), value=True) for x in (uncertain <= low, uncertain >= high)]
        contrast, anchors = self._contrast(stream, found, classes, limits, batch, step)
        parts = {"sup": sup, "pseudo": cfg.unsup_weight * pseudo, "contrast": cfg.contrast_weight * contrast}
        total = parts["sup"] + parts["pseudo"] + parts["contrast"]
        terms = {"sup": sup.detach(), "pseudo": pseudo.detach(), "contrast": contrast.detach()}
        terms |= {"coverage": distributed_mean(kept.sum(), valid.sum()), "anchors": anchors.float() / len(images)}
        return Losses(total, terms, parts)

    def _contrast(
        self, stream: StreamOutput, found: StreamOutput, classes: Tensor, limits: list[Tensor], batch: Batch, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Return L_c on the decoder's grid, and the number of its anchors; store the vectors for the queues.

        ``stream`` is the student's of labelled and mixed images, ``found`` the teacher's of the weak views and then of
        these. ``classes`` (B + U, H, W) is 255 where unknown, ``limits`` bound low and high entropy.
        """
        cfg, stride, labelled = self.cfg, self.student.decoder.stride, len(batch.image)
        keys = [*(f"l{key}" for key in batch.keys), *(f"u{key}" for key in batch.keys_u)]
        name, device = (step.seed, "u2pl", step.index), classes.device
        width = self.banks.vectors.shape[2]
        dropped = keyed_random.uniform(keys, (2 * width,), *name, "dropout", device=device)
        mine = self.head(stream.mid, dropped)
        with torch.no_grad(), full_precision(device):
            theirs = self.teacher_head(found.mid[-len(mine) :].float())
            p = found.logits[-len(mine) :].softmax(1).flatten(2)
            grid, low, high = (at_cells(x, stride).flatten(1) for x in (classes, *limits))
            known, index = grid != IGNORE, grid.masked_fill(grid == IGNORE, 0)
            means = class_prototypes(theirs.flatten(0, 1), index.flatten(), (known & low).flatten(), p.shape[1])
            order = keyed_random.uniform(keys, grid.shape[1:], *name, "order", device=device)
            may = known & low & (p.gather(1, index[:, None])[:, 0] > cfg.confidence)
            place, counted = shared_sample(index, may, order, cfg.anchors)
            of = index.gather(1, place)
            counted &= (self.banks.filled > 0)[of]
            uniform = keyed_random.uniform(keys, (place.shape[1], cfg.negatives), *name, "negatives", device=device)
            negatives = self.banks.draw(of, uniform)
            if self.training:
                far = not_of(p, grid, labelled, cfg.first_rank, cfg.last_rank) & (high & known)[:, None]
                at, given = sample_positions(far, order[:, None], cfg.max_enqueue)
                vectors = F.normalize(gather_at(theirs, at.flatten(1)), dim=2).unflatten(1, at.shape[1:])
                self._seen.append(((vectors[:labelled], given[:labelled]), (vectors[labelled:], given[labelled:])))
        with full_precision(device):
            loss = contrast(gather_at(mine, place), means[of], negatives, cfg.temperature)
            total = mean_over_classes(loss.flatten(), of.flatten(), counted.flatten(), p.shape[1])
        return total, counted.sum()

    def after_step(self, step: Step) -> None:
        """Update the teacher, restarted at the end of the warm-up; then add the step's vectors to the queues."""
        done = steps_after(self.cfg.warmup, step)
        for mine, theirs in ((self.teacher, self.student), (self.teacher_head, self.head)):
            ema_update(mine, theirs, done, self.cfg.teacher.momentum)
        seen, self._seen = self._seen, []
        if seen:
            for kind in zip(*seen, strict=True):  # labelled images, then the others
                self.banks.push(*(torch.cat(parts) for parts in zip(*kind, strict=True)))


def entropy(logits: Tensor) -> Tensor:
    """Return (U, H, W) nats of (U, C, H, W)."""
    logs = logits.float().log_softmax(1)
    return -(logs.exp() * logs).sum(1)


def percentiles(values: Tensor, counted: Tensor, shares: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Return scalars below which ``shares`` percent of the counted values of all workers lie, interpolated linearly.

    NumPy's definition; infinite if nothing is counted. ``values`` float and ``counted`` bool of one shape, which must
    be the same on all workers.
    """
    ordered = all_gather(torch.where(counted, values, torch.inf).flatten()).sort().values
    last = (all_reduce_sum(counted.sum()) - 1).clamp(min=0)
    found = []
    for share in shares:
        at = last.double() * (min(max(share, 0.0), 100.0) / 100)
        below = at.floor().long()
        lower, upper = (ordered.gather(0, i.view(1))[0] for i in (below, torch.minimum(below + 1, last)))
        found.append(torch.where(lower < upper, lower + (upper - lower) * (at - below).float(), lower))
    return tuple(found)


def kept_consistency(logits: Logits, labels: Tensor, kept: Tensor, valid: Tensor) -> Tensor:
    """Return (N / N_kept) times the mean cross-entropy of the kept pixels, over all workers; 0 if none is kept.

    ``logits`` (U, C, H, W), ``labels`` (U, H, W) int64, ``kept`` and ``valid`` (U, H, W) bool, N the valid pixels.
    """
    count = all_reduce_sum(torch.stack([valid.sum(), kept.sum()]).float())
    loss = pixel_cross_entropy(logits, labels)
    return count[0] / count[1].clamp(min=1) * distributed_mean((loss * kept).sum(), kept.sum())


def contrast(anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Return -log of the positive's share in exp(cos(anchor, .) / T) over the positive and all negatives: (...).

    ``anchors`` and ``positives`` (..., D), ``negatives`` (..., m, D) of unit length or 0; anchors alone get a gradient.
    """
    anchors, positives = F.normalize(anchors.float(), dim=-1), F.normalize(positives.detach().float(), dim=-1)
    against = (negatives.detach().to(anchors.dtype) @ anchors[..., None])[..., 0]
    alike = torch.cat([(anchors * positives).sum(-1, keepdim=True), against], -1) / temperature
    return alike.logsumexp(-1) - alike[..., 0]


def class_prototypes(vectors: Tensor, classes: Tensor, counted: Tensor, num_classes: int) -> Tensor:
    """Return (C, D) means over the counted vectors of all workers by class, 0 for a class without any.

    ``vectors`` (n, D), ``classes`` (n,) int64, ``counted`` (n,) bool.
    """
    row = torch.where(counted, classes, num_classes)
    sums = vectors.new_zeros(num_classes + 1, vectors.shape[1] + 1)
    sums[:, :-1].index_add_(0, row, vectors)
    sums[:, -1].index_add_(0, row, torch.ones_like(vectors[:, 0]))
    sums = all_reduce_sum(sums[:-1])
    return sums[:, :-1] / sums[:, -1:].clamp(min=1)


def not_of(p: Tensor, target: Tensor, labelled: int, first: int, last: int) -> Tensor:
    """Return (N, C, n) bool: the pixel is almost surely not of the class, yet was mistaken for it, or might have been.

    The first ``labelled`` images have the classes ``target`` (N, n); there the class is another one and among the
    ``first`` of the sorted probabilities ``p`` (N, C, n). In the others its place, from 0, is in [first, last).
    """
    places = torch.arange(p.shape[1], device=p.device)[:, None]
    order = p.argsort(1, descending=True)
    rank = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
    other = places != target[:labelled, None]
    mine, theirs = rank[:labelled], rank[labelled:]
    return torch.cat([(mine < first) & other, (theirs >= first) & (theirs < last)])


def shared_sample(classes: Tensor, counted: Tensor, order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sample (N, n) as ``sample_positions`` does, equally many of each class of an image as far as it has them."""
    at = torch.where(counted, order, 2.0).argsort(dim=1, stable=True)
    group = torch.where(counted, classes, torch.iinfo(torch.int32).max).gather(1, at)
    group, by_class = group.sort(dim=1, stable=True)
    at = at.gather(1, by_class)
    index = torch.arange(group.shape[1], device=group.device).expand_as(group)
    begins = F.pad(group[:, 1:] != group[:, :-1], (1, 0), value=True)
    turn = index - torch.where(begins, index, 0).cummax(1).values  # a pixel's place within its class
    turn = turn + len(index[0]) * (group == torch.iinfo(torch.int32).max)
    chosen = turn.argsort(dim=1, stable=True)[:, :count]
    return at.gather(1, chosen), counted.gather(1, at).gather(1, chosen)
