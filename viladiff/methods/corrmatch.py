"""CorrMatch: one network whose token correlations spread its labels (Sun et al., CVPR 2024).

Differences from the released code. Regions vote where the correlation map lives, on tokens, and their edits are brought
to pixels as blocks; the original enlarges every region to pixels first, which moves the loss by 0.005 to 0.008 on equal
tensors and takes ``regions`` maps of the size of the crop for each image. A region sees the edits of earlier ones, as
there, but all vote at once in a few rounds, where it takes them one by one (``region_votes``). Rows of the map become
regions without the last token left out, and none twice. Pasted pixels get the labels of the neighbour in the batch, so
there is no pass for a second unlabelled batch. KL compares the student with labels mixed as its picture was mixed
(``faithful_kl`` restores the released form). The threshold is fed confidences with the padding that belongs to them,
once a step, for the next step. CutMix boxes lie on the patch grid, on any pixel there (``data.cutmix_grid``).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from viladiff.core import keyed_random
from viladiff.core.distributed import full_precision
from viladiff.data.batch import Batch, Losses, Step, TextBatch, Views
from viladiff.data.transforms.mixing import box_mask
from viladiff.losses import all_reduce_max, distributed_mean, logit_distillation, pseudo_label_cross_entropy
from viladiff.methods.base import Method, MethodConfig, PseudoConfig, Reference, StepCost, apply_cutmix_to
from viladiff.methods.common.published import PublishedSetting, protocol, sgd
from viladiff.models.baselines.perturbations import channel_dropout, widest
from viladiff.models.fused.norms import NormActs
from viladiff.models.segmenter import NetworkFactory


class CorrMatchPseudoConfig(PseudoConfig):
    threshold: float = Field(0.85, ge=0, le=1)
    """τ at the start; 0 with ``threshold_momentum`` 1 on Cityscapes."""
    threshold_momentum: float = Field(0.999, ge=0, le=1)
    """τ follows the mean, over predicted classes, of the highest confidence in each; 1 keeps it where it starts."""


class CorrMatchConfig(MethodConfig):
    """Label propagation by correlation maps, on one strong view and one view with dropped channels."""

    name: Literal["corrmatch"] = "corrmatch"
    cutmix: bool = True
    width: int = Field(256, ge=8, multiple_of=8)
    """Channels of the correlation head."""
    regions: int = Field(128, ge=1)
    """Rows of the correlation map that become regions; all of them where there are fewer tokens."""
    rounds: int = Field(8, ge=1)
    """Rounds of the regions' vote; as many as there are regions make it sequential in full (ours)."""
    faithful_kl: bool = False
    """Whether KL compares mixed pictures with labels that were not mixed, as the released code does."""
    pseudo: CorrMatchPseudoConfig = CorrMatchPseudoConfig()


class Correlation(nn.Module):
    """A = softmax over columns of f1^T f2 / sqrt(C), from the encoder's last map (paper, Eq. 3)."""

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.project = NormActs(nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU())
        self.first, self.second = nn.Conv2d(width, num_classes, 1), nn.Conv2d(width, num_classes, 1)

    def forward(self, top: Tensor, uniform: Tensor, p: float = 0.1) -> Tensor:
        """Return the correlation map (B, N, N) of top (B, D, h, w); rows sum to 1.

        ``uniform`` (B, width) draws the dropout of whole channels.
        """
        (x,) = channel_dropout([self.project(top)], uniform, p)
        first, second = (f(x).flatten(2).float() for f in (self.first, self.second))
        return (first.mT @ second / first.shape[1] ** 0.5).softmax(2)


class CorrMatch(Method):
    Config = CorrMatchConfig
    published = (
        PublishedSetting(
            ("voc",),
            {"method.pseudo.threshold": 0.85, "method.pseudo.threshold_momentum": 0.999},
            "CorrMatch 44f9f9e",
        ),
        # OHEM there keeps 100,000 pixels of two crops of 801 x 801 at least.
        PublishedSetting(
            ("cityscapes",),
            {
                "method.pseudo.threshold": 0.0,
                "method.pseudo.threshold_momentum": 1.0,
                "method.ohem.enabled": True,
                "method.ohem.min_kept": 0.078,
            },
            "CorrMatch 44f9f9e; threshold: its issue 12",
        ),
    )
    protocols = (
        protocol(("voc",), "CorrMatch 44f9f9e", 321, 80.0, rates=sgd(1e-3, 10)),
        protocol(("cityscapes",), "CorrMatch 44f9f9e", 801, 240.0, rates=sgd(5e-3, 1)),
    )
    views = Views(strong=1, cutmix=True)
    trains_on_weak = True
    paper = Reference(
        "CorrMatch: Label Propagation via Correlation Matching for Semi-Supervised Semantic Segmentation", "CVPR", 2024
    )
    step_cost = StepCost(3, 3, 1, 1, "correlation head: 3 forward and backward")
    extra_state = "correlation head, threshold"
    tau: Tensor
    highest: Tensor

    def __init__(self, cfg: CorrMatchConfig, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        self.correlation = Correlation(self.student.encoder.channels[-1], cfg.width, build.num_classes)
        self.register_buffer("tau", torch.tensor(cfg.pseudo.threshold))
        # Highest confidence by class in this step so far, over all of its micro-batches; 0 between steps.
        self.register_buffer("highest", torch.zeros(build.num_classes), persistent=False)

    def required_views(self) -> Views:
        return Views(strong=1, cutmix=self.cfg.cutmix)

    def forward(self, batch: Batch, step: Step) -> Losses:
        size, counts = batch.image.shape[-2:], [len(batch.image), len(batch.weak[0]), len(batch.strong[0])]
        features = self.student.encode(
            torch.cat([batch.image, batch.weak[0], *apply_cutmix_to(batch, 0, batch.strong[0])])
        )
        dropped = self._dropped([level.split(counts)[1] for level in features], batch, step)
        grid = self.student.decode([torch.cat(pair) for pair in zip(features, dropped, strict=True)])["visual"].logits
        z, weak, z_strong, z_dropped = self.student.at_pixels(grid, size).split([*counts, counts[1]])
        a = self._correlations(features[-1], batch, step)
        r, r_weak, r_strong = self.student.at_pixels(
            correlated(grid[: len(a)].detach(), a, features[-1].shape[-2:]), size
        ).split(counts)

        with torch.no_grad():
            confidence, labels = weak.top()
            self.highest.copy_(
                torch.maximum(self.highest, highest_by_class(confidence, labels, batch.valid, self.student.num_classes))
            )
            sure, weak_logits = (confidence >= self.tau).float(), weak.tensor()
            mixed_confidence, mixed_labels, valid, mixed_weak = apply_cutmix_to(
                batch, 0, confidence, labels, batch.valid, weak_logits
            )
            mixed_sure = mixed_confidence >= self.tau
            taught, accepted = self._spread(a[counts[0] :][: counts[1]], mixed_labels, mixed_sure, valid, batch, step)

        sup, sup_r = self.supervised(z, batch.target), self.supervised(r, batch.target)
        source = weak_logits if self.cfg.faithful_kl else mixed_weak
        terms = {
            "pseudo": pseudo_label_cross_entropy(z_strong, taught, accepted, valid),
            "kl": logit_distillation(source, z_strong.tensor(), 1.0, weight=mixed_sure * valid, count=valid.sum()),
            "dropped": pseudo_label_cross_entropy(z_dropped, labels, sure, batch.valid),
            "correlation": (
                pseudo_label_cross_entropy(r_strong, taught, accepted, valid)
                + pseudo_label_cross_entropy(r_weak, labels, sure, batch.valid)
            )
            / 2,
        }
        consistency = torch.stack(list(terms.values())).mean()
        total = ((sup + sup_r) / 2 + self.cfg.pseudo.weight * consistency) / 2
        parts = {"sup": sup / 4, "sup_correlation": sup_r / 4}
        parts |= {name: self.cfg.pseudo.weight / (2 * len(terms)) * value for name, value in terms.items()}
        terms |= {"sup": sup, "sup_correlation": sup_r, "tau": self.tau.clone()}
        terms["coverage"] = distributed_mean((mixed_sure * valid).sum(), valid.sum())
        terms["spread"] = distributed_mean((accepted * valid).sum(), valid.sum())
        return Losses(total, {name: value.detach() for name, value in terms.items()}, parts)

    def after_step(self, step: Step) -> None:
        """Set τ <- m τ + (1 - m) mean of the highest confidences, over the classes that any worker predicted."""
        highest = all_reduce_max(self.highest)
        seen = highest > 0
        momentum = self.cfg.pseudo.threshold_momentum
        self.tau.lerp_(highest.sum() / seen.sum().clamp(min=1), (1 - momentum) * seen.any())
        self.highest.zero_()

    def threshold(self) -> float:
        return float(self.tau)

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        return {"before": self.student(images)["visual"].softmax(1)}

    def _dropped(self, features: list[Tensor], batch: Batch, step: Step) -> list[Tensor]:
        name = (step.seed, "corrmatch-channels", step.index)
        uniform = keyed_random.uniform(batch.keys_u, (widest(features),), *name, device=batch.valid.device)
        return channel_dropout(features, uniform)

    def _correlations(self, top: Tensor, batch: Batch, step: Step) -> Tensor:
        """Return (B + 2 U, N, N) of the labelled, weak and mixed strong images."""
        keys = [f"{kind}{key}" for kind, keys in _kinds(batch) for key in keys]
        name = (step.seed, "corrmatch-dropout", step.index)
        return self.correlation(top, keyed_random.uniform(keys, (self.cfg.width,), *name, device=top.device))

    def _spread(
        self, a: Tensor, labels: Tensor, sure: Tensor, valid: Tensor, batch: Batch, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Return labels (U, H, W) and weights (U, H, W) after the votes of the weak views' regions on their pixels."""
        patch, classes = self.student.patch, self.student.num_classes
        uniform = keyed_random.uniform(
            batch.keys_u, (a.shape[1],), step.seed, "corrmatch-regions", step.index, device=a.device
        )
        own = valid if not batch.mix else valid & ~box_mask(batch.mix[0].boxes, *valid.shape[-2:])
        votes = token_votes(labels, sure & own, patch, classes)
        pixels = F.avg_pool2d(own.float()[:, None], patch, ceil_mode=True, divisor_override=1).flatten(1)
        answer = region_votes(region_maps(a, uniform, self.cfg.regions), votes, pixels, self.tau, self.cfg.rounds)
        spread_labels = _to_pixels(answer, labels.shape[-2:], patch)
        edited = (spread_labels >= 0) & own
        return torch.where(edited, spread_labels, labels), (sure | edited).float()


def _kinds(batch: Batch) -> list[tuple[str, tuple[int, ...]]]:
    return [("l", batch.keys), ("w", batch.keys_u), ("s", batch.keys_u)]


def correlated(logits: Tensor, a: Tensor, grid: torch.Size) -> Tensor:
    """Return r = z A (B, C, h', w'): a token's scores are the sum of all tokens' scores, weighted by correlation.

    ``logits`` (B, C, h, w) are resized to the ``grid`` (h', w') of the N tokens of ``a`` (B, N, N) first. The columns
    of A do not sum to 1, so neither do the weights.
    """
    coarse = F.interpolate(logits, tuple(grid), mode="bilinear", align_corners=False)
    return (coarse.flatten(2) @ a).view_as(coarse)


def highest_by_class(confidence: Tensor, labels: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """Return (C,) the highest confidence of a valid pixel with that label, 0 without one; maps are (U, H, W)."""
    zeros = torch.zeros(num_classes, device=confidence.device)
    return zeros.scatter_reduce_(0, labels.flatten(), (confidence * valid).flatten(), "amax")


def region_maps(a: Tensor, uniform: Tensor, count: int) -> Tensor:
    """``count`` different random rows of A (U, N, N), each cut at the middle of its range: (U, R, N) bool.

    ``uniform`` (U, N) in [0, 1) orders the rows; where N is below ``count``, all become regions.
    """
    rows = uniform.argsort(1)[:, :count, None].expand(-1, -1, a.shape[2])
    maps = a.gather(1, rows)
    low, high = maps.aminmax(dim=2, keepdim=True)
    return maps - low > (high - low) / 2


def token_votes(labels: Tensor, keep: Tensor, patch: int, num_classes: int) -> Tensor:
    """Return (U, N, C) pixels of each class in each token's ``patch`` x ``patch`` block, only those with ``keep``.

    ``labels`` (U, H, W) int64 and ``keep`` (U, H, W) bool. Blocks at the lower and right edges may be cut.
    """
    below, right = (-side % patch for side in labels.shape[-2:])
    labels, keep = (F.pad(x, (0, right, 0, below)) for x in (labels, keep))
    blocks = [x.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3).flatten(3) for x in (labels, keep)]
    index, weight = (x.flatten(1, 2) for x in blocks)
    zeros = torch.zeros(*index.shape[:2], num_classes, device=labels.device)
    return zeros.scatter_add_(2, index, weight.float())


@torch.no_grad()
def region_votes(regions: Tensor, votes: Tensor, pixels: Tensor, tau: Tensor, rounds: int) -> Tensor:
    """Let regions sure of one class assign it to all of their tokens: (U, N) int64 classes, -1 where none did.

    ``regions`` (U, R, N) bool, ``votes`` (U, N, C) confident pixels by class, ``pixels`` (U, N) all pixels that may
    vote. A region is accepted if at least τ of its pixels are confident and more than τ of these are of one class; the
    vote counts the tokens of earlier accepted regions with their class, and of several the last one applies.

    Region j depends on regions before it. All vote at once on the result of the previous round, so that after r rounds
    the first r regions, and all whose chain of dependence is shorter than r, are as if taken one by one.
    """
    inside, sure = regions.to(votes.dtype), votes.sum(2)
    order = torch.arange(1, regions.shape[1] + 1, device=regions.device)[:, None]
    before = torch.zeros_like(regions, dtype=torch.int64)  # the last region before this one that took the token, or 0
    classes = torch.zeros_like(before[..., 0])
    with full_precision(votes.device):  # bfloat16 would round counts of pixels
        confident = (inside @ sure[..., None])[..., 0]
        possible = confident >= tau * (inside @ pixels[..., None])[..., 0]
        for _ in range(rounds):
            tally = (inside * (before == 0)) @ votes
            taken = classes.gather(1, (before - 1).clamp(min=0).flatten(1)).view_as(before)
            tally.scatter_add_(2, taken, inside * (before > 0) * sure[:, None])
            most, classes = tally.max(2)
            accepted = possible & (most > tau * confident)
            upto = torch.where(accepted[..., None] & regions, order, 0).cummax(1).values
            before = F.pad(upto[:, :-1], (0, 0, 1, 0))
    last = upto[:, -1]
    return torch.where(last > 0, classes.gather(1, (last - 1).clamp(min=0)), -1)


def _to_pixels(tokens: Tensor, size: torch.Size, patch: int) -> Tensor:
    """Expand (U, N) to (U, H, W), each token as a block."""
    height, width = (math.ceil(side / patch) for side in size)
    blocks = tokens.view(-1, height, 1, width, 1).expand(-1, -1, patch, -1, patch)
    return blocks.reshape(-1, height * patch, width * patch)[:, : size[0], : size[1]]
