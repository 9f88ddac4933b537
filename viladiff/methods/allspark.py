"""AllSpark: labelled features are rebuilt from channels of unlabelled ones (Wang et al., CVPR 2024).

L = 1/2 [L_x + CE(u, ŷ)], where ŷ is the network's own answer on the weak view, and no pixel is left out for being
unsure. The encoder's last map goes through a block in which channels, not tokens, attend (``models.spark``). In
training a labelled image asks the channels of unlabelled images, those of the memory, which keeps for each class the
channels that look most like it, those of this step among them; an unlabelled image asks its own. For ŷ an image asks
the channels of the whole unlabelled batch, and in evaluation its own.

Differences from the released code. Under AdamW the block learns at the encoder's rate: AdamW moves each weight by the
rate whatever its gradient, and at the head's rate the answers of the attention outgrow the tokens that they are added
to (15 times their standard deviation by step 300 of a run that collapsed, 0.3 at the encoder's rate); there SGD drives
it, at the head's rate, and under `optim.name=sgd` here too. Padding counts neither in CE(u, ŷ), nor as a token that
others read. The classes' maps that channels are compared with are probabilities, logits there. A place of the memory
that no channel has filled is 0, noise there. All workers' channels go into the one memory that all of them hold, and
where the batch is read, that of all workers is; there each worker has a memory of its own until it is overwritten by
the first one's. Of a step in several micro-batches each reads the memory with its own channels. The block is no wider
than the encoder's last map, as wide there.

Memory at width C, h heads, K classes and N tokens: of each labelled image a map of attention takes 4 (h C) (K h C)
bytes in float32, and four such maps are kept for the backward pass; the queues take 4 K C N bytes for the whole run.
With C = 256, h = 2 and N = 1024 each of these is 22 MB for K = 21 and 85 MB for K = 81. ``width`` bounds both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, Losses, Step, TextBatch, Views
from viladiff.losses import all_gather, all_gather_with_grad, distributed_mean, pseudo_label_cross_entropy
from viladiff.methods.base import Method, MethodConfig, PseudoConfig, Reference, StepCost
from viladiff.methods.common.published import PublishedSetting, protocol, sgd
from viladiff.models.baselines.allspark import (
    AllSparkSegmenter,
    Draw,
    SemanticMemory,
    allspark_segmenter,
    nearest_class,
    resize_tokens,
)
from viladiff.models.segmenter import NetworkFactory, Segmenter


class AllSparkPseudoConfig(PseudoConfig):
    threshold: float = Field(0.0, ge=0, le=1)
    """The paper's has none, on purpose."""


class AllSparkConfig(MethodConfig):
    """One network, one weak view; labelled images in the colours of a strong view."""

    name: Literal["allspark"] = "allspark"
    width: int = Field(256, ge=8)
    """Channels of the block and of each class's queue; the encoder's own number where it has fewer (ours)."""
    attention_heads: int = Field(2, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of the attention between channels, and of its answers."""
    warmup: float = Field(1 / 16, ge=0, le=1)
    """Share of training in which labelled images read the batch's unlabelled ones: 5 of 80 epochs, 15 of 240."""
    pseudo: AllSparkPseudoConfig = AllSparkPseudoConfig()


class AllSpark(Method):
    Config = AllSparkConfig
    published = (
        PublishedSetting(("voc",), {"method.warmup": 5 / 80}, "AllSpark 9da63e2"),
        PublishedSetting(("cityscapes",), {"method.warmup": 15 / 240, "method.ohem.enabled": True}, "AllSpark 9da63e2"),
    )
    protocols = (
        protocol(("voc",), "AllSpark 9da63e2", 513, 80.0, 8, sgd(1e-3, 10)),
        protocol(("cityscapes",), "AllSpark 9da63e2", 801, 240.0, 8, sgd(5e-3, 1)),
        protocol(("coco",), "AllSpark 9da63e2", 513, 10.0, 16, sgd(1e-3, 10)),
    )
    views = Views(weak=1, strong_labelled=True)
    trains_on_weak = True
    labels_read_batch = True
    revision = 2
    paper = Reference(
        "AllSpark: Reborn Labeled Features from Unlabeled in Transformer for Semi-Supervised Semantic Segmentation",
        "CVPR",
        2024,
    )
    step_cost = StepCost(3, 2)
    extra_state = "a queue of channels for each class"
    student: AllSparkSegmenter

    def __init__(self, cfg: AllSparkConfig, build: NetworkFactory) -> None:
        super().__init__(cfg, build)
        side = max(1, math.ceil(build.crop / self.student.patch))
        self.memory = SemanticMemory(build.num_classes, self.student.spark.norm.normalized_shape[0], side)
        self._new: list[tuple[Tensor, Tensor]] = []

    def build_student(self, build: NetworkFactory) -> Segmenter:
        return build(kind=allspark_segmenter(self.cfg.width, self.cfg.attention_heads))

    def extra_param_groups(self) -> dict[str, dict[str, Any]]:
        return {"student.spark": {"lr_scale": "encoder", "optimiser": "adamw"}}

    def forward(self, batch: Batch, step: Step) -> Losses:
        assert batch.image_strong is not None
        size, labelled, weak, valid = batch.image.shape[-2:], len(batch.image), batch.weak[0], batch.valid
        inside = F.max_pool2d(valid.float()[:, None], self.student.patch, ceil_mode=True).flatten(2).mT  # (U, N, 1)
        seen = self._answers(weak, inside)
        confidence, labels = self.student.at_pixels(seen, size).top()

        *fine, top = self.student.encode(torch.cat([batch.image_strong, weak]))
        rebuilt = self._rebuilt(top, seen, labelled, inside, step, self._draws(batch, step))
        z = self.student.at_pixels(self.student.decode_rebuilt([*fine, rebuilt])["visual"].logits, size)

        sup = self.supervised(z[:labelled], batch.target)
        accepted = (confidence >= self.cfg.pseudo.threshold).float()
        pseudo = pseudo_label_cross_entropy(z[labelled:], labels, accepted, valid)
        weighted = self.cfg.pseudo.weight * pseudo
        coverage = distributed_mean((accepted * valid).sum(), valid.sum())
        terms = {"sup": sup.detach(), "pseudo": pseudo.detach(), "coverage": coverage, "filled": self.memory.filled()}
        return Losses((sup + weighted) / 2, terms, {"sup": sup / 2, "pseudo": weighted / 2})

    @torch.no_grad()
    def _answers(self, images: Tensor, inside: Tensor | None = None) -> Tensor:
        """Return grid logits (U, K, h, w) of images that read the channels of the whole batch, with all branches.

        With ``inside`` (U, N, 1), 0 in padding, the batch is that of all workers.
        """
        spark = self.student.spark
        with _evaluating(self.student):
            *fine, top = self.student.encode(images)
            tokens, e = spark.embed(top)
            source = e if inside is None else all_gather(e * inside)
            rebuilt = spark.restore(tokens + spark.cross(e, source[None]), top.shape[-2:])
            return self.student.decode_rebuilt([*fine, rebuilt])["visual"].logits

    def _rebuilt(
        self, top: Tensor, seen: Tensor, labelled: int, inside: Tensor, step: Step, both: tuple[Draw, Draw]
    ) -> Tensor:
        """Pass the last map (B + U, D, h, w) through the block; ``seen`` (U, K, h', w') are the logits behind ŷ."""
        spark, cfg, grid = self.student.spark, self.cfg, top.shape[-2:]
        tokens, e = spark.embed(top)
        own = e[labelled:] * inside
        slots = self._keep(own, seen, grid) if self.training else None
        source = all_gather_with_grad(own) if step.progress < cfg.warmup else self.memory.read(grid, slots)
        found = [
            spark.cross(e[:labelled], source[None], both[0], cfg.dropout),
            spark.own.within(e[labelled:], both[1], cfg.dropout),
        ]
        return spark.restore(tokens + torch.cat(found), grid)

    def _draws(self, batch: Batch, step: Step) -> tuple[Draw, Draw]:
        device = batch.image.device

        def draw(half: str, keys: tuple[int, ...], what: str, shape: tuple[int, ...]) -> Tensor:
            return keyed_random.uniform(keys, shape, step.seed, f"allspark-{half}-{what}", step.index, device=device)

        return partial(draw, "labelled", batch.keys), partial(draw, "unlabelled", batch.keys_u)

    def _keep(self, tokens: Tensor, seen: Tensor, grid: torch.Size) -> Tensor:
        """Store this micro-batch's channels until the end of the step; return the memory's slots with them."""
        channels = tokens.detach().mT
        maps = F.interpolate(seen.softmax(1), grid, mode="bilinear", align_corners=False).flatten(2)
        kept = resize_tokens(channels.float(), tuple(grid), (self.memory.side, self.memory.side)).flatten(0, 1)
        new = (all_gather(kept), all_gather(nearest_class(channels, maps).flatten()))
        self._new.append(new)
        return self.memory.placed(*new)

    def after_step(self, step: Step) -> None:
        for channels, classes in self._new:
            self.memory.push(channels, classes)
        self._new = []

    @torch.no_grad()
    def pseudo_labels(
        self, images: Tensor, text: TextBatch | None, keys: tuple[int, ...], step: Step
    ) -> dict[str, Tensor]:
        return {"before": self.student.upsample(self._answers(images), images.shape[-2:]).softmax(1)}


@contextmanager
def _evaluating(network: Segmenter) -> Iterator[None]:
    """Disable drop path within the context."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
