"""The table of metrics. A metric is one function of counted pixels and one entry, under the name that records have.

Nothing here loads torch before a score is computed: tables and pages read the names alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class PixelCounts(NamedTuple):
    """Pixels of all images of a set, under one prediction; those whose truth is 255 do not count."""

    confusion: Tensor
    """(C, C) int64; rows are the truth, columns the prediction."""
    near: Tensor | None
    """The same of the pixels near a true boundary; None where ``eval.boundary`` is off."""
    bands: Tensor | None
    """(3, C) int64: in the boundary bands of truth and prediction at once, of the truth, of the prediction; or None."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """An entry of ``METRICS``: all that records, tables and pages know of a score."""

    name: str
    """As a sentence has it."""
    title: str = ""
    """Heading of its table on pages; empty for one that pages show only where a table or a claim is about it."""
    better: Literal["higher", "lower"] = "higher"
    compute: Callable[[PixelCounts], float | None] | None = None
    """The score; NaN or None where nothing could be measured, which a record has as None. None in place of a function
    for a score that is not of pixels: ``viladiff.evaluation.feature_clusters`` measures those."""

    def heading(self) -> str:
        """Return the title, or else the name, and the direction where lower is better."""
        return (self.title or self.name) + (" (lower is better)" if self.better == "lower" else "")


def miou_from(confusion: Tensor) -> tuple[float, list[float]]:
    """Return (mean IoU, IoU per class), in [0, 1], of a confusion matrix.

    A class in neither truth nor prediction is NaN and left out of the mean. A class that is predicted but never true,
    or true but never predicted, counts as 0. With fewer than two of several classes left, the mean is NaN: all pixels
    are of one class in truth and prediction, and it would be 1 whatever the network has learned. Published scripts add
    1e-10 to the union, which counts an absent class as 0; in full sets no class is absent.
    """
    counts = confusion.double()
    return _mean_iou(counts.diagonal(), counts.sum(1) + counts.sum(0) - counts.diagonal())


def _mean_iou(intersection: Tensor, union: Tensor) -> tuple[float, list[float]]:
    import torch

    per_class = torch.where(union > 0, intersection.double() / union.double(), torch.nan)
    enough = int((union > 0).sum()) >= min(2, len(union))
    return float(per_class.nanmean()) if enough else torch.nan, per_class.tolist()


def mean_iou(counts: PixelCounts) -> float:
    """Mean over classes of the IoU."""
    return miou_from(counts.confusion)[0]


def boundary_iou(counts: PixelCounts) -> float | None:
    """Mean over classes of the IoU of boundary bands (Cheng et al. 2021, Boundary IoU, section 4).

    The bands and their width are those of ``pixel_counts.boundary_counts``.
    """
    if counts.bands is None:
        return None
    both, true_band, pred_band = counts.bands
    return _mean_iou(both, true_band + pred_band - both)[0]


def trimap_miou(counts: PixelCounts) -> float | None:
    """MIoU of the pixels near a true boundary."""
    return None if counts.near is None else miou_from(counts.near)[0]


def pixel_accuracy(counts: PixelCounts) -> float | None:
    """Share of pixels whose class is right."""
    total = int(counts.confusion.sum())
    return int(counts.confusion.trace()) / total if total else None


METRICS: dict[str, Metric] = {
    "miou": Metric(name="mIoU", title="mIoU", compute=mean_iou),
    "boundary_iou": Metric(name="boundary IoU", title="Boundary IoU", compute=boundary_iou),
    "trimap_miou": Metric(name="trimap mIoU", title="Trimap mIoU", compute=trimap_miou),
    "pixel_accuracy": Metric(name="pixel accuracy", compute=pixel_accuracy),
    "silhouette": Metric(name="100 × silhouette coefficient by class"),
    "davies_bouldin": Metric(name="100 × Davies-Bouldin index", better="lower"),
    "image_silhouette": Metric(name="100 × silhouette coefficient by image"),
}
"""By the name in ``RunRecord.scores``, which tables and claims give as ``metric``. Scores of pixels are in [0, 1]."""


def shown_metrics(own: str) -> list[str]:
    """Metrics with a table of their own on a page: those that have a title, and ``own``, which the page is about."""
    return [name for name, metric in METRICS.items() if metric.title or name == own]
