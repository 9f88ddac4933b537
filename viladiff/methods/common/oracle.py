"""Oracle pseudo-labels: true labels in part of the unlabelled pixels, as ceilings for what a refinement can bring.

They read true masks of unlabelled images, which only the built-in data sets give out. A run with one is no result of a
method: pages mark it as a ceiling.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from viladiff.data.batch import IGNORE
from viladiff.methods.base import PseudoConfig
from viladiff.models.mixe.diffusion import edge_mask
from viladiff.models.mixe.relabel import cells_with

Oracle = Literal["none", "everywhere", "edges", "teacher_edges", "wrong_and_unsure", "grid"]


class OraclePseudoConfig(PseudoConfig):
    """Pseudo-labels that an ablation may replace by the truth."""

    oracle: Oracle = "none"
    """Pixels whose pseudo-label is replaced by the true one, with confidence 1: a ceiling, on built-in data alone."""
    oracle_from: float = Field(0.0, ge=0, lt=1)
    """Share of training after which the oracle is on."""


def with_truth(
    cfg: OraclePseudoConfig, progress: float, confidence: Tensor, labels: Tensor, truth: Tensor | None, stride: int
) -> tuple[Tensor, Tensor]:
    """Replace confidence and labels (U, H, W) by true labels where ``cfg.oracle`` says; unchanged if it is off.

    truth: (U, H, W) int64, 255 in padding, where nothing is replaced. stride: width of a label grid's cell in pixels;
    edges are whole cells that hold a pixel on an edge.
    """
    if cfg.oracle == "none" or progress < cfg.oracle_from:
        return confidence, labels
    assert truth is not None  # the views ask for it
    known = truth != IGNORE
    if cfg.oracle == "grid":
        where, truth = known, _through_grid(truth, stride)
    elif cfg.oracle == "everywhere":
        where = known
    elif cfg.oracle == "wrong_and_unsure":
        where = known & (labels != truth) & (confidence < cfg.threshold)
    else:
        drawn = truth if cfg.oracle == "edges" else labels.masked_fill(~known, IGNORE)
        where = known & cells_with(edge_mask(drawn), stride)
    return torch.where(where, torch.ones_like(confidence), confidence), torch.where(where, truth, labels)


def _through_grid(truth: Tensor, stride: int) -> Tensor:
    """Average labels (U, H, W) as one-hot maps over cells and resize them to pixels bilinearly, as logits are."""
    known = truth != IGNORE
    onehot = F.one_hot(truth.masked_fill(~known, 0)).permute(0, 3, 1, 2).float() * known[:, None]
    cells = F.avg_pool2d(onehot, stride)
    return F.interpolate(cells, scale_factor=stride, mode="bilinear", align_corners=False).argmax(1)
