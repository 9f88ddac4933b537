"""SemiVL: UniMatch with a decoder that reads class names, and labels from text (Hoyer et al., ECCV 2024).

L = L_UniMatch + λ (1/4 L_mc(s1) + 1/4 L_mc(s2) + 1/2 L_mc(fp)), λ falling in a line from 0.1 to 0. L_mc is the
cross-entropy, over all pixels, with labels from text: dense features of the weak view and texts of the classes'
concepts are compared in one space, a class has the likeness of its best concept, and 100 times that makes
probabilities, of which those below 0.9 are left out. Logits come from ``models.vl_decoder``, which reads one text a
class: its name alone, or on Cityscapes the mean of its concepts. A name that the run's text encoder does not know is
replaced by the mean of the concepts that it knows.

With ``clip.weights`` the dense features are MaskCLIP's, and frozen (``models.maskclip``). Without, they are those of
the encoder in training, and encoder and map into the space of the texts, which the decoder needs in any case, also
learn from the labelled pixels (ours, ``guidance.map_weight``), since the decoder tells classes apart by that space
alone; the texts are then the run's text encoder's, and the record says so.

Differences from the released code. The encoder is the one that all methods share; CLIP's own can be had by name from
timm, and ``train_attention_only`` leaves all but its attention and positions as it is. Labels from text are made anew
in each step; in padding there are none. The mean confidence that weighs an image (``pseudo.weighting``) is of its
pixels outside the padding. What UniMatch does otherwise here (``methods.unimatch``) is otherwise here too. The finest
map that joins in the decoder is the encoder's on all data sets, where on Cityscapes a ResNet-101's first stage does.
Concepts are published for VOC and Cityscapes, and for other data a background's are ours (``text.concepts``); means
are of unit vectors, where there of vectors as CLIP gives them. The sizes of the decoder's parts follow its width; what
else differs in it is said there (``models.vl_decoder``). CutMix boxes lie on the patch grid, on any pixel there
(``data.cutmix_grid``).

Memory: the decoder works on K maps an image, each of up to W h w values on the grid of tokens and W / 4 on 16 times as
many cells. At W = 128 and 32 x 32 tokens one such map is 11 MB for K = 21 and 42 MB for K = 81, and 4 times as much on
the finest grid. ``decoder.classes_per_chunk`` bounds what is held within the stages; between them two maps of the
first kind and the encoder's own remain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from viladiff.config.base import Section
from viladiff.data.batch import IGNORE, Batch, Step, TextBatch, Views
from viladiff.losses import cross_entropy, distributed_mean
from viladiff.methods.base import MethodConfig, PseudoConfig, Reference, StepCost, apply_cutmix_to
from viladiff.methods.common.published import PublishedSetting, protocol
from viladiff.methods.unimatch import UniMatch
from viladiff.models.baselines.maskclip import MaskClip, load_clip
from viladiff.models.baselines.vl_decoder import VlDecoderConfig, VlSegmenter, similarity, vl_segmenter
from viladiff.models.blocks import upsample
from viladiff.models.fused.pixel_logits import PixelLogits
from viladiff.models.segmenter import Network, NetworkFactory, Segmenter
from viladiff.text.concepts import concepts, names


class SemiVlPseudoConfig(PseudoConfig):
    weighting: Literal["pixel", "image"] = "pixel"
    """``image``: all pixels count, by the mean confidence of their image, as on Cityscapes."""


class ClipConfig(Section):
    """The frozen model that labels from text."""

    model: str = "ViT-B-16-quickgelu"
    """open_clip's name of it."""
    weights: str | None = None
    """A local file; none takes the run's text encoder and a learned map to it."""


class GuidanceConfig(Section):
    """Labels from text."""

    weight: float = Field(0.1, ge=0)
    """λ at the first step; it is 0 at the end."""
    threshold: float = Field(0.9, ge=0, le=1)
    scale: float = Field(100.0, gt=0)
    """Factor of cosines that makes them logits."""
    map_weight: float = Field(1.0, ge=0)
    """Of the cross-entropy that teaches map and encoder the texts where there are no CLIP weights (ours)."""
    map_scale: float = Field(20.0, gt=0)
    """``scale`` where there are no CLIP weights (ours): at 100 the map jumps from step to step and never settles."""


class SemiVlConfig(MethodConfig):
    """UniMatch's fields, the decoder's and those of the labels from text."""

    name: Literal["semivl"] = "semivl"
    cutmix: bool = True
    strong_weight: float = Field(0.5, ge=0)
    feature_weight: float = Field(0.5, ge=0)
    feature_dropout: float = Field(0.5, ge=0, lt=1)
    train_attention_only: bool = False
    """Whether of the encoder only attention and positions learn; for one that has seen much, as CLIP's."""
    pseudo: SemiVlPseudoConfig = SemiVlPseudoConfig()
    clip: ClipConfig = ClipConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    decoder: VlDecoderConfig = VlDecoderConfig()


class SemiVl(UniMatch):
    Config = SemiVlConfig
    published = (
        PublishedSetting(
            ("voc", "coco", "ade20k"),
            {"method.pseudo.weighting": "pixel", "method.pseudo.threshold": 0.95},
            "semivl 13ee65d",
        ),
        # A branch for OHEM is there, and no configuration reaches it.
        PublishedSetting(
            ("cityscapes",),
            {"method.pseudo.weighting": "image", "method.ohem.enabled": False},
            "semivl 13ee65d",
            not_available="a ResNet-101's first stage as the decoder's finest map",
        ),
    )
    protocols = (
        protocol(("voc",), "semivl 13ee65d", 512, 80.0, 8, {"optim.name": "adamw"}),
        protocol(("cityscapes",), "semivl 13ee65d", 801, batch=8, rates={"optim.name": "adamw"}),
        protocol(("coco",), "semivl 13ee65d", 512, 10.0, 8, {"optim.name": "adamw"}),
    )
    revision = 3
    views = Views(strong=2, cutmix=True)
    paper = Reference("SemiVL: Semi-Supervised Semantic Segmentation with Vision-Language Guidance", "ECCV", 2024)
    step_cost = StepCost(4, 4, 1, 1, "CLIP, where its weights are given: 1 forward")
    extra_state = "texts of the classes"
    student: VlSegmenter
    concepts: Tensor
    """(M, T) unit vectors of all classes' concepts."""
    owner: Tensor
    """(M,) int64: whose each is."""

    def build_student(self, build: NetworkFactory) -> Segmenter:
        texts = read_texts(self.cfg.clip, build)
        self._clip: tuple[MaskClip, ...] = texts.clip  # in a tuple, so that its weights are no part of a checkpoint
        # Made anew of the data's names and an encoder's file whenever a run starts.
        self.register_buffer("concepts", texts.concepts, persistent=False)
        self.register_buffer("owner", texts.owner, persistent=False)
        student = build(kind=vl_segmenter(texts.classes, self.cfg.decoder))
        if self.cfg.train_attention_only:
            train_attention_only(student.encoder, build.model.encoder)
        return student

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for module in self._clip:
            module._apply(fn)
        return super()._apply(fn, recurse)

    def notes(self) -> tuple[str, ...]:
        if self._clip:
            return ()
        return (
            "semivl without CLIP: its labels from text come from the run's text encoder and a map learned from "
            "labelled images; the published method's are those of a frozen CLIP, which method.clip.weights=FILE gives",
        )

    def eval_networks(self) -> dict[str, Network]:
        """Return the networks; an existing CLIP is evaluated too, as the untrained quality of its labels from text."""
        alone: dict[str, Any] = {"clip": ZeroShot(self._clip[0], self)} if self._clip else {}
        return {**super().eval_networks(), **alone}

    def pixel_weight(self, confidence: Tensor, threshold: float | Tensor, valid: Tensor) -> Tensor:
        if self.cfg.pseudo.weighting == "pixel":
            return super().pixel_weight(confidence, threshold, valid)
        share = (confidence * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)
        return share[:, None, None].expand_as(confidence)

    def threshold(self) -> float | None:
        return super().threshold() if self.cfg.pseudo.weighting == "pixel" else None

    def extra_loss(
        self, batch: Batch, step: Step, features: list[Tensor], streams: tuple[PixelLogits, ...]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        cfg, size = self.cfg, batch.image.shape[-2:]
        weak, taught = self._guide(batch, features[-1])
        scale = cfg.guidance.scale if self._clip else cfg.guidance.map_scale
        confidence, labels = PixelLogits(weak * scale, size).top()
        sure = (confidence >= cfg.guidance.threshold) & batch.valid
        labels = torch.where(sure, labels, IGNORE)
        strong = [cross_entropy(z, apply_cutmix_to(batch, i, labels)[0], norm="all") for i, z in enumerate(streams[:2])]
        dropped = cross_entropy(streams[2], labels, norm="all")
        guided = cfg.strong_weight * torch.stack(strong).mean() + cfg.feature_weight * dropped
        parts = {"guided": cfg.guidance.weight * (1 - step.progress) * guided}
        total = parts["guided"]
        for level in {0, 1, 2} - set(self.student.decoder.levels):
            total = total + 0 * features[level].float().mean()  # a norm of its own, as timm's have, must get a gradient
        terms = {"guided": guided, "guided_coverage": distributed_mean(sure.sum(), batch.valid.sum())}
        if taught is not None:
            terms["map"] = cross_entropy(PixelLogits(taught * scale, size), batch.target)
            parts["map"] = cfg.guidance.map_weight * terms["map"]
            total = total + parts["map"]
        return total, terms, parts

    def _guide(self, batch: Batch, top: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the likeness (U, K, h, w) of the weak views to the classes, and of labelled images if it is trained.

        ``top`` holds the encoder's last map of all views; labelled ones train the encoder as well.
        """
        for clip in self._clip:
            return self.likeness(clip(batch.weak[0])), None
        counts = [len(batch.image), len(batch.weak[0])]
        mine, weak = self.likeness(self.student.decoder.dense(top[: sum(counts)])).split(counts)
        return weak.detach(), mine

    def likeness(self, dense: Tensor) -> Tensor:
        """Map unit features (B, T, h, w) to the cosine of each class's best concept: (B, K, h, w)."""
        return best_concepts(similarity(dense, self.concepts), self.owner, self.student.num_classes)


class ZeroShot(nn.Module):
    """Labels from text alone: logits of a frozen CLIP's places against the classes' concepts."""

    def __init__(self, clip: MaskClip, method: SemiVl) -> None:
        super().__init__()
        self.clip = clip
        self._method = (method,)  # in a tuple: the method is no part of this

    def forward(self, images: Tensor, text: TextBatch | None = None) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to {"visual": (B, C, H, W) logits}."""
        (method,) = self._method
        likeness = method.likeness(self.clip(images)) * method.cfg.guidance.scale
        return {"visual": upsample(likeness, images.shape[-2:])}


class Texts(NamedTuple):
    """The vectors that the labels from text and the decoder read, of length 1."""

    clip: tuple[MaskClip, ...]
    """One where it is given, or none."""
    concepts: Tensor
    """(M, T) of the classes' concepts."""
    owner: Tensor
    """(M,) int64: whose each is."""
    classes: Tensor
    """(K, T) what the decoder reads."""


def read_texts(cfg: ClipConfig, build: NetworkFactory) -> Texts:
    """Encode the classes' concepts and names, with CLIP if it is available.

    Concepts unknown to the text encoder are left out; if it knows none of a class's published ones, the general
    concepts replace those of all classes. With a checkpoint that brings the texts there is neither CLIP nor a concept.
    Raises ValueError for a class without a known concept, and as ``load_clip``.
    """
    count = build.num_classes
    if build.texts is None:
        return Texts((), torch.zeros(count, build.text_dim), torch.arange(count), torch.zeros(count, build.text_dim))
    if cfg.weights:
        said, owner = _said(build, build.dataset)
        clip, vectors = load_clip(cfg.model, cfg.weights, said)
        return _gathered((clip,), vectors, owner, count)
    for dataset in (build.dataset, ""):
        said, owner = _said(build, dataset)
        vectors = F.normalize(build.texts(said), dim=1)
        mute = sorted(set(range(count)) - set(owner[vectors.any(1)].tolist()))
        if not mute:
            return _gathered((), vectors, owner, count)
    raise ValueError(
        f"method.name = 'semivl': the text encoder knows no word of the class {build.class_names[mute[0]]!r} "
        f"({', '.join(concepts(build.class_names)[mute[0]][:3])}); name it in a caption, choose another "
        "data.text_encoder, or set method.clip.weights"
    )


def _said(build: NetworkFactory, dataset: str) -> tuple[list[str], Tensor]:
    """Return all concepts and then all names, and their owners: class k for a concept, K + k for a name."""
    groups = (*concepts(build.class_names, dataset), *names(build.class_names, dataset))
    owner = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
    return [text for group in groups for text in group], owner


def _gathered(clip: tuple[MaskClip, ...], vectors: Tensor, owner: Tensor, count: int) -> Texts:
    mine = vectors.any(1) & (owner < count)
    of_concepts, of_names = class_text_vectors(vectors, owner, 2 * count).split(count)
    return Texts(clip, vectors[mine], owner[mine], torch.where(of_names.any(1, keepdim=True), of_names, of_concepts))


def class_text_vectors(vectors: Tensor, owner: Tensor, num_classes: int) -> Tensor:
    """Return (K, T): the mean of each class's unit vectors (M, T), at length 1, or 0 if all are 0; ``owner`` (M,)."""
    sums = torch.zeros(num_classes, vectors.shape[1]).index_add_(0, owner, vectors)
    return F.normalize(sums, dim=1)


def best_concepts(similar: Tensor, owner: Tensor, num_classes: int) -> Tensor:
    """Reduce (B, M, h, w) to (B, K, h, w): the highest of each class's own."""
    index = owner.view(1, -1, 1, 1).expand_as(similar)
    found = similar.new_zeros(len(similar), num_classes, *similar.shape[2:])
    return found.scatter_reduce(1, index, similar, "amax", include_self=False)


def train_attention_only(encoder: nn.Module, name: str) -> None:
    """Freeze all but attention and position embeddings. Raises ValueError if there is no attention."""
    chosen = {
        n
        for n, _ in encoder.named_parameters()
        if any(part.startswith("attn") or part == "attention" for part in n.split("."))
    }
    if not chosen:
        raise ValueError(f"method.train_attention_only = true: model.encoder = {name!r} has no attention to train")
    for n, parameter in encoder.named_parameters():
        placed = n.split(".")[-1] in ("pos_embed", "positions", "position_embedding")
        parameter.requires_grad_(parameter.requires_grad and (n in chosen or placed))
