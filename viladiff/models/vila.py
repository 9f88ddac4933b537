"""ViLa's two streams: image tokens alone, and image tokens that have read the captions (paper, section 3.3, Fig. 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from viladiff.config.base import Section
from viladiff.data.batch import TextBatch
from viladiff.losses import feature_terms, logit_distillation
from viladiff.models.blocks import CrossBlock, SelfBlock, sincos_2d

if TYPE_CHECKING:
    from viladiff.models.stream import StreamOutput

Path = Literal["student_features", "student_logits", "teacher_features", "teacher_logits"]


class PathWeights(Section):
    """Factor of each distillation path, on top of ``feature_weight`` or ``logit_weight``; 0: no gradient."""

    student_features: float = Field(1.0, ge=0)
    """Student fusion to student visual, Eq. 1."""
    student_logits: float = Field(1.0, ge=0)
    """Student fusion to student visual, Eq. 2."""
    teacher_features: float = Field(1.0, ge=0)
    """Teacher visual to student fusion, Eq. 1."""
    teacher_logits: float = Field(1.0, ge=0)
    """Teacher visual to student fusion, Eq. 2."""
    teacher_to_visual_features: float = Field(1.0, ge=0)
    """Teacher fusion to student visual, Eq. 1 (ours)."""
    teacher_to_visual_logits: float = Field(1.0, ge=0)
    """Teacher fusion to student visual, Eq. 2 (ours)."""


class VilaConfig(Section):
    """Vision-language dual distillation (paper, section 3.3, Eqs. 1, 2 and 12)."""

    enabled: bool = True
    lam: float = Field(0.5, ge=0)
    """λ of Eq. 1: weight of the cosine distance against the squared one (paper, Table 6)."""
    temperature: float = Field(2.0, gt=0)
    """T of Eq. 2; the paper gives none. 1 on the built-in data, chosen there on ``dev``."""
    feature_reduction: Literal["mean", "sum"] = "mean"
    """Squared distance of Eq. 1: ``mean`` over rows and channels, or ``sum`` of all squares, as it is printed, which is
    rows times channels as large. The cosine distance is a mean over rows in both."""
    feature_scope: Literal["pooled", "flattened", "tokens"] = "pooled"
    """Rows that Eq. 1 compares: an image's mean token, all its tokens as one long vector, or each token by itself."""
    gate: Literal["per_image", "per_batch", "always"] = "per_image"
    """When the fusion stream teaches the visual one: where its cross-entropy is lower, or always."""
    distillation_paths: tuple[Path, ...] = ("student_features", "student_logits", "teacher_features", "teacher_logits")
    """Arrows that are on. Student: its fusion stream to its visual one. Teacher: its streams to the student's."""
    teacher_to_visual: bool = True
    """Whether teacher fusion also teaches student visual (ours; the paper's teacher path is visual to fusion)."""
    feature_weight: float = Field(1.0, ge=0)
    """Factor of Eq. 1, both of its distances, in all distillation paths."""
    logit_weight: float = Field(1.0, ge=0)
    """Factor of Eq. 2 in all distillation paths."""
    path_weights: PathWeights = PathWeights()
    depth: int = Field(1, ge=1, le=12)
    """Cross-attention blocks of the fusion stream, and shared reconstruction blocks; 2 unless the data is built in."""
    width: int = Field(64, ge=8)
    """Channels of the streams; 384 unless the data is built in."""
    heads: int = Field(4, ge=1)
    """Heads of the attentions; 6 unless the data is built in."""
    cutmix_text: Literal["both", "own"] = "both"
    """Words that a mixed image is given: its own and its partner's, or its own alone (ours)."""

    @model_validator(mode="after")
    def _check(self) -> VilaConfig:
        if len(set(self.distillation_paths)) < len(self.distillation_paths):
            raise ValueError(f"distillation_paths = {self.distillation_paths}: a path is named twice")
        return self


class StreamTokens(NamedTuple):
    """One stream's result before the decoder."""

    features: Tensor
    """(B, N, W) normalised tokens: the F of Eq. 1."""
    top: Tensor
    """(B, D, h, w) what replaces the encoder's coarsest map."""


class ViLa(nn.Module):
    """Project, inject, reconstruct: both streams share projection, reconstruction and the way back, but not injection.

    The way back starts at zero, so that training begins from the encoder's own features.
    """

    def __init__(self, dim: int, text_dim: int, cfg: VilaConfig) -> None:
        super().__init__()
        self.width = cfg.width
        self.project = nn.Linear(dim, cfg.width)
        self.words = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, cfg.width))
        # Always among the words, so that an image without a caption has something to read, and DDP sees it used.
        self.null = nn.Parameter(torch.zeros(1, 1, cfg.width))
        nn.init.trunc_normal_(self.null, std=0.02)
        self.inject = nn.ModuleList([CrossBlock(cfg.width, cfg.heads) for _ in range(cfg.depth)])
        self.reconstruct = nn.ModuleList([SelfBlock(cfg.width, cfg.heads, ratio=2) for _ in range(cfg.depth)])
        self.norm = nn.LayerNorm(cfg.width)
        self.back = nn.Linear(cfg.width, dim)
        nn.init.zeros_(self.back.weight)
        nn.init.zeros_(self.back.bias)

    def forward(self, top: Tensor, text: TextBatch | None, streams: tuple[str, ...]) -> dict[str, StreamTokens]:
        """Map top (B, D, h, w) to the requested streams; without text the fusion stream reads the null token alone."""
        batch, dim, h, w = top.shape
        tokens = self.project(top.flatten(2).transpose(1, 2)) + sincos_2d(h, w, self.width, top.device)
        inputs = []
        for stream in streams:
            inputs.append(self._injected(tokens, text) if stream == "fusion" else tokens)
        x = torch.cat(inputs)
        for block in self.reconstruct:
            x = block(x)
        x = self.norm(x)
        change = self.back(x).transpose(1, 2).reshape(len(streams) * batch, dim, h, w)
        return {
            stream: StreamTokens(x[i * batch : (i + 1) * batch], top + change[i * batch : (i + 1) * batch])
            for i, stream in enumerate(streams)
        }

    def _injected(self, tokens: Tensor, text: TextBatch | None) -> Tensor:
        context, mask = prepend_null_token(self.null, self.words, text, len(tokens))
        for block in self.inject:
            tokens = block(tokens, context, mask)
        return tokens


def prepend_null_token(null: Tensor, embed: nn.Module, text: TextBatch | None, batch: int) -> tuple[Tensor, Tensor]:
    """Join the null token (1, 1, W) and the embedded text: (B, 1 + L, W), and its mask (B, 1 + L) bool."""
    context = null.expand(batch, -1, -1)
    mask = torch.ones(context.shape[:2], dtype=torch.bool, device=null.device)
    if text is not None:
        context = torch.cat([context, embed(text.tokens).to(context.dtype)], dim=1)
        mask = torch.cat([mask, text.mask], dim=1)
    return context, mask


def match_features(
    teacher: Tensor, student: Tensor, cells: Tensor, weight: Tensor, scope: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features (U, N, W) as the rows (B', D') that Eq. 1 compares, each row's weight, and the number of rows.

    Padding never counts; a row that the gate closes still does, so that the gate scales the loss.
    """
    mask, images = cells[..., None].to(teacher.dtype), torch.full((), len(weight), device=weight.device)
    if scope == "tokens":
        return teacher.flatten(0, 1), student.flatten(0, 1), (weight[:, None] * cells).flatten(), cells.sum()
    if scope == "flattened":
        return (teacher * mask).flatten(1), (student * mask).flatten(1), weight, images
    share = mask.sum(1).clamp(min=1)
    return (teacher * mask).sum(1) / share, (student * mask).sum(1) / share, weight, images


class Distilled(NamedTuple):
    """Eq. 12, term by term; the gradient of each goes to the path's end alone."""

    terms: dict[str, Tensor]
    """{path: scalar}, weighted; their sum is what is added to the loss."""
    parts: dict[str, Tensor]
    """The same by path, and those of features by the two distances of Eq. 1."""


def distil(
    cfg: VilaConfig,
    teacher: dict[str, StreamOutput],
    student: dict[str, StreamOutput],
    gate: Tensor,
    cells: Tensor,
    pixels: Tensor,
) -> Distilled:
    """Compute every enabled pair; those that end in the visual stream are weighted by ``gate`` (U,).

    ``teacher`` and ``student`` are the streams of U images by name, ``cells`` (U, N) and ``pixels`` (U, h, w) bool are
    False in padding.
    """
    pairs = {"student": [("student", student["fusion"], student["visual"], gate)], "teacher": []}
    pairs["teacher"].append(("teacher", teacher["visual"], student["fusion"], torch.ones_like(gate)))
    if cfg.teacher_to_visual:
        pairs["teacher"].append(("teacher_to_visual", teacher["fusion"], student["visual"], gate))
    terms: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for path in cfg.distillation_paths:
        origin, what = path.split("_")
        losses = []
        for owner, source, target, weight in pairs[origin]:
            name, path_weight = f"{owner}_{what}", getattr(cfg.path_weights, f"{owner}_{what}")
            if what == "features":
                factor = cfg.feature_weight * path_weight
                *rows, keep, count = match_features(source.features, target.features, cells, weight, cfg.feature_scope)
                inputs = rows[0], rows[1], cfg.lam, cfg.feature_reduction
                loss, squared, cosine = feature_terms(*inputs, weight=keep, count=count)
                losses.append(factor * loss)
                parts |= {f"{name}/squared": factor * squared, f"{name}/cosine": factor * cosine}
            else:
                keep = weight[:, None, None] * pixels
                loss = logit_distillation(
                    source.logits, target.logits, cfg.temperature, weight=keep, count=pixels.sum()
                )
                losses.append(cfg.logit_weight * path_weight * loss)
                parts[name] = losses[-1]
        terms[path] = torch.stack(losses).sum()
    return Distilled(terms, parts)
