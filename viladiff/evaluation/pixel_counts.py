"""Pixels are counted over the whole set; every score is a ratio of these counts, never a mean of per-image ratios.

``viladiff.evaluation.metrics`` has the scores and the table of their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.data.batch import IGNORE, EvalBatch
from viladiff.evaluation.metrics import METRICS, PixelCounts, miou_from
from viladiff.evaluation.protocols import Band, center, stream_bands
from viladiff.models.segmenter import remembered

Batches = Iterable[EvalBatch]
Labelling = tuple[Tensor, Tensor]  # confidence and labels, each (B, H, W)


def _count(index: Tensor, bins: int) -> Tensor:
    """Return the histogram of int64 ``index`` in [0, bins); on a GPU bincount waits, scatter_add does not."""
    index = index.reshape(-1)
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=bins)
    return torch.zeros(bins, dtype=torch.int64, device=index.device).scatter_add_(0, index, torch.ones_like(index))


def _counts(pred: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Return (256, C) counts, a row per possible label: ignored pixels cost no mask and strange labels stay visible."""
    index = torch.add(pred.reshape(-1).long(), target.reshape(-1).long(), alpha=num_classes)
    return _count(index, 256 * num_classes).view(-1, num_classes)


def _known_rows(counts: Tensor) -> Tensor:
    """Return the (C, C) part of ``_counts``. Raises ValueError if a label is neither a class nor 255."""
    num_classes = counts.shape[1]
    strange = counts[num_classes:IGNORE].sum(1).nonzero()
    if len(strange):
        label = int(strange[0]) + num_classes
        raise ValueError(f"target: label {label} found; allowed are 0..{num_classes - 1} and {IGNORE} (ignored)")
    return counts[:num_classes]


def confusion_matrix(pred: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count pixels: (C, C) int64, rows are the truth, columns the prediction.

    pred and target are integer tensors of one shape. Pixels whose target is 255 do not count. Raises ValueError for
    shapes that differ, more than 255 classes, or a value outside 0..C-1 (255 is allowed in target).
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred has shape {tuple(pred.shape)}, target {tuple(target.shape)}; they must be equal")
    if not 1 <= num_classes <= IGNORE:
        raise ValueError(f"num_classes = {num_classes}: must be in 1..{IGNORE}")
    if pred.numel() == 0:
        return torch.zeros(num_classes, num_classes, dtype=torch.int64, device=pred.device)
    for name, values, top in (("pred", pred, num_classes - 1), ("target", target, IGNORE)):
        low, high = (int(value) for value in torch.aminmax(values))
        if low < 0 or high > top:
            raise ValueError(f"{name}: {low if low < 0 else high} found; allowed are 0..{top}")
    return _known_rows(_counts(pred, target, num_classes))


def boundary_width(height: int, width: int) -> int:
    """Return d in pixels: 2 % of the image diagonal, at least 1 (Cheng et al. 2021, Boundary IoU, section 4)."""
    return max(1, round(0.02 * (height**2 + width**2) ** 0.5))


def _uniform(labels: Tensor, d: int) -> Tensor:
    """Return (B, H, W) bool: the (2d+1)-square window around the pixel, clipped at the border, holds one label.

    Where it does, the pixel survives erosion of its own class by d, so one pass serves all classes at once. A window
    holds one label where no two neighbours inside it differ; running sums count them in a time that d does not change.
    """
    across = _near(_near(F.pad(labels.diff(dim=2) != 0, (0, 1)), 2, d, d - 1), 1, d, d)
    down = _near(_near(F.pad(labels.diff(dim=1) != 0, (0, 0, 0, 1)), 1, d, d - 1), 2, d, d)
    return ~(across | down)


def _near(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Return bool, shape of x: whether any of x[i - before : i + after + 1] along ``dim`` is True, clipped."""
    sums = F.pad(x.cumsum(dim, dtype=torch.int32), (1, 0) if dim == 2 else (0, 0, 1, 0))
    places = torch.arange(x.shape[dim], device=x.device)
    high = sums.index_select(dim, (places + after + 1).clamp_(max=x.shape[dim]))
    return high != sums.index_select(dim, (places - before).clamp_(min=0))


def boundary_band(labels: Tensor, d: int) -> Tensor:
    """Return the boundary band (B, H, W) bool of each pixel's class: True where erosion by d removes the pixel.

    A class's band also runs along the image border.

    labels (B, H, W) hold integers in 0..255. Equals mask & ~erode(mask) for every class, with a 3 x 3 square applied d
    times and everything outside the image taken as another class (Cheng et al. 2021, Boundary IoU, section 4).
    """
    return _with_border(~_uniform(labels, d), d)


def _with_border(band: Tensor, d: int) -> Tensor:
    band[:, :d], band[:, -d:], band[..., :d], band[..., -d:] = True, True, True, True
    return band


def boundary_counts(pred: Tensor, target: Tensor, num_classes: int, d: int, true_band: Tensor | None = None) -> Tensor:
    """Return (3, C) pixels of: both bands at once, the truth's band, the prediction's band.

    Ignored pixels are cut out of both maps before the bands are made, so that a perfect prediction scores 1.
    ``true_band`` is ``boundary_band(target, d)`` where that was made before.
    """
    pred = torch.where(target == IGNORE, IGNORE, pred)
    true_band = boundary_band(target, d) if true_band is None else true_band
    pred_band = boundary_band(pred, d)
    both = true_band & pred_band & (pred == target)
    parts = ((both, target), (true_band, target), (pred_band, pred))
    return torch.stack([_count(torch.where(keep, x, IGNORE).long(), 256)[:num_classes] for keep, x in parts])


def trimap(target: Tensor, d: int) -> Tensor:
    """Return (B, H, W) bool: within d pixels, on the longer axis, of another true label; 255 is one, the border not.

    Data sets put 255 along outlines, so leaving it out would leave out most boundaries.
    """
    return ~_uniform(target, d)


@dataclass(frozen=True)
class Truth:
    """A batch's masks and what is made of them once for all predictions."""

    target: Tensor
    """(B, H, W) integers, 255 = ignore."""
    width: int
    """d of the bands."""
    near: Tensor
    """(B, H, W) ``target`` within the trimap, 255 elsewhere."""
    band: Tensor
    """(B, H, W) bool, the true boundary band."""


def truth_of(target: Tensor) -> Truth:
    """Compute trimap and band of ``target`` (B, H, W) once."""
    d = boundary_width(*target.shape[-2:])
    close = trimap(target, d)
    return Truth(target, d, torch.where(close, target, IGNORE), _with_border(close, d))


@dataclass(frozen=True)
class Scores:
    """Shares in [0, 1], not percent; None where nothing could be measured."""

    values: Mapping[str, float | None]
    """By name in ``METRICS``, of those that are computed from counts."""
    per_class: tuple[float | None, ...]
    """IoU of each class."""
    images: int

    def stored(self) -> dict[str, Any]:
        """As a record has it: the scores by name, ``per_class`` and ``images``."""
        return {**self.values, "per_class": self.per_class, "images": self.images}


class SegmentationMeter:
    """Counts of one prediction stream, kept on the device, so that no batch waits for the host."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", boundary: bool = True) -> None:
        if not 1 <= num_classes <= IGNORE:
            raise ValueError(f"num_classes = {num_classes}: must be in 1..{IGNORE}")
        self.num_classes = num_classes
        self.boundary = boundary
        # 256 rows of all pixels, 256 rows of trimap pixels, 3 rows of bands; the last entry counts images.
        self.state = torch.zeros(515 * num_classes + 1, dtype=torch.int64, device=device)
        rows = self.state[:-1].view(515, num_classes)
        self._all, self._near, self._bands = rows[:256], rows[256:512], rows[512:]

    def update(self, pred: Tensor, target: Tensor, truth: Truth | None = None) -> None:
        """Count a batch: pred (B, H, W) of classes 0..C-1, as an argmax gives, and target likewise, 255 = ignore.

        ``pred`` is not checked, which would wait for the device.

        ``truth`` is ``truth_of(target)`` where several predictions are measured against one target.
        """
        self._all += _counts(pred, target, self.num_classes)
        if self.boundary:
            truth = truth_of(target) if truth is None else truth
            self._near += _counts(pred, truth.near, self.num_classes)
            self._bands += boundary_counts(pred, target, self.num_classes, truth.width, truth.band)
        self.state[-1] += len(target)

    def merge(self, other: SegmentationMeter) -> SegmentationMeter:
        """Add another worker's counts to this one's."""
        if (self.num_classes, self.boundary) != (other.num_classes, other.boundary):
            raise ValueError(f"meters of {self.num_classes} and {other.num_classes} classes or of other parts differ")
        self.state += other.state.to(self.state.device)
        return self

    def all_reduce(self) -> SegmentationMeter:
        """Sum over all workers in place. Call it once, after the last batch; a single process has nothing to sum."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.state)
        return self

    def confusion(self) -> Tensor:
        """Return (C, C) int64 on the CPU, rows are the truth.

        Raises ValueError for a target that is no class and not 255.
        """
        return _known_rows(self._all.cpu())

    def result(self) -> Scores:
        """Return the scores. Raises ValueError if a target had a label that is neither a class nor 255."""
        state = self.state.cpu()
        rows = state[:-1].view(515, self.num_classes)
        near = _known_rows(rows[256:512]) if self.boundary else None
        counts = PixelCounts(_known_rows(rows[:256]), near, rows[512:] if self.boundary else None)
        found = {name: metric.compute(counts) for name, metric in METRICS.items() if metric.compute is not None}
        return Scores(
            values={name: _present(value) for name, value in found.items()},
            per_class=tuple(_present(value) for value in miou_from(counts.confusion)[1]),
            images=int(state[-1]),
        )


def _present(value: float | None) -> float | None:
    return None if value is None or value != value else value


def pseudo_quality(
    conf: Tensor, labels: Tensor, truth: Tensor, threshold: float, valid: Tensor | None = None
) -> dict[str, Tensor]:
    """Count for coverage = accepted / valid and precision = correct / accepted; sums add over batches and workers.

    All maps are (B, H, W); a label is accepted where its confidence is at least ``threshold``. Pixels whose truth is
    255, or that are not ``valid`` (padding), do not count.
    """
    known = truth != IGNORE if valid is None else valid & (truth != IGNORE)
    accepted = known & (conf >= threshold)
    return {"valid": known.sum(), "accepted": accepted.sum(), "correct": (accepted & (labels == truth)).sum()}


BINS = 15
"""Equal parts of [0, 1] that confidences are sorted into (Guo et al. 2017, "On Calibration ...", section 2)."""


def calibration_bins(conf: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """Return (3, 15) float64, a column a bin of confidence: pixels, right ones, summed confidence; adds over batches.

    All maps are (B, H, W); bin k holds confidences in (k / 15, (k + 1) / 15], the first 0 too. Pixels whose truth is
    255 do not count, whatever their confidence; every other one does, trained on or not.
    """
    known = (truth != IGNORE).double().flatten()
    conf = conf.double().flatten()
    place = ((conf * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    parts = torch.stack([known, known * (labels == truth).flatten(), known * conf])
    return torch.zeros(3, BINS, dtype=torch.float64, device=conf.device).index_add_(1, place, parts)


def calibration_error(bins: Tensor) -> float | None:
    """Return Σ_k n_k / n · |accuracy_k - mean confidence_k| of ``calibration_bins``, in [0, 1]; None without pixels."""
    count, correct, confidence = bins
    total = float(count.sum())
    return float((correct - confidence).abs().sum()) / total if total else None


def pseudo_change(
    before: Labelling, after: Labelling, truth: Tensor, threshold: float, valid: Tensor | None = None
) -> dict[str, Tensor]:
    """Count how refinement changes labels: the lost ones that it rescues, the good ones that it spoils.

    A pixel is good where its label is accepted and right, lost otherwise; rescued goes from lost to good, spoiled from
    good to lost. Truth and valid as in ``pseudo_quality``.
    """
    known = truth != IGNORE if valid is None else valid & (truth != IGNORE)
    good_before, good_after = ((conf >= threshold) & (labels == truth) for conf, labels in (before, after))
    return {
        "lost": (known & ~good_before).sum(),
        "rescued": (known & ~good_before & good_after).sum(),
        "good": (known & good_before).sum(),
        "spoiled": (known & good_before & ~good_after).sum(),
    }


def pseudo_shares(sums: dict[str, Tensor] | dict[str, int]) -> dict[str, float | None]:
    """Return shares from summed counts of ``pseudo_quality`` and ``pseudo_change``; None if the denominator is 0."""
    ratios = {"coverage": ("accepted", "valid"), "precision": ("correct", "accepted")}
    ratios |= {"rescued": ("rescued", "lost"), "spoiled": ("spoiled", "good")}
    found = {name: (int(sums[a]), int(sums[b])) for name, (a, b) in ratios.items() if a in sums and b in sums}
    return {name: a / b if b else None for name, (a, b) in found.items()}


def evaluate_network(
    network: nn.Module,
    images_iter: Batches,
    streams: Sequence[str],
    num_classes: int,
    boundary: bool = True,
    protocol: str = "original",
    crop: int = 0,
) -> dict[str, SegmentationMeter]:
    """Return ``measure_all`` of one network: {stream: counts}."""
    return measure_all({"": network}, images_iter, streams, num_classes, boundary, protocol, crop)[""]


def measure_all(
    networks: Mapping[str, nn.Module],
    images_iter: Batches,
    streams: Sequence[str],
    num_classes: int,
    boundary: bool = True,
    protocol: str = "original",
    crop: int = 0,
    also: Callable[[EvalBatch], None] | None = None,
) -> dict[str, dict[str, SegmentationMeter]]:
    """Count each network's streams over the images of all workers, in one pass over the images.

    images_iter yields batches of normalised images. Each worker passes its own part of the set, possibly empty, without
    a padded sampler's duplicates; the numbers of batches may differ between workers. A stream that network or texts do
    not allow has seen no image. Labels are those of the largest float32 logit, also under autocast. ``also`` is called
    with each batch after the networks, and outputs that it requests for the same tensors are not computed again.
    Networks are in eval mode meanwhile; each module's mode is restored, also after an error. Raises ValueError for a
    network of another number of classes.
    """
    modes = {module: module.training for network in networks.values() for module in network.modules()}
    device = next(next(iter(networks.values())).parameters()).device
    meters = {
        name: {stream: SegmentationMeter(num_classes, device, boundary) for stream in streams} for name in networks
    }
    for network in networks.values():
        network.eval()
    try:
        # Not inference_mode(): what ``also`` keeps in caches must be of use in training too.
        with torch.no_grad(), remembered(networks.values()):
            for batch in images_iter:
                batch = _moved(batch, device)
                centred = center(batch.target, crop) if protocol == "center_crop" else batch.target
                truth = truth_of(centred) if boundary else None
                for name, network in networks.items():
                    found = stream_bands(network, batch.images, batch.text, streams, protocol, crop)
                    for stream, labels in _label_maps(found, num_classes).items():
                        meters[name][stream].update(labels, centred, truth)
                if also is not None:
                    also(batch)
    finally:
        for module, training in modes.items():
            module.training = training
    return {name: {stream: meter.all_reduce() for stream, meter in found.items()} for name, found in meters.items()}


def _moved(batch: EvalBatch, device: torch.device) -> EvalBatch:
    text = batch.text
    if text is not None:
        text = replace(text, tokens=text.tokens.to(device), mask=text.mask.to(device))
    images, target = batch.images.to(device, non_blocking=True), batch.target.to(device, non_blocking=True)
    return EvalBatch(images, target, text, batch.places)


def _label_maps(bands: Iterable[Band], num_classes: int) -> dict[str, Tensor]:
    """Return (B, H, W) labels by stream, dropping each band. Raises ValueError for another number of classes."""
    parts: dict[str, list[Tensor]] = {}
    for band in bands:
        for name, logits in band.logits.items():
            if logits.shape[1] != num_classes:
                raise ValueError(f"num_classes = {num_classes}: the network has {logits.shape[1]}")
            parts.setdefault(name, []).append(logits.float().max(1).indices)  # on a CPU a fifth of argmax's time
    return {name: torch.cat(labels, 1) for name, labels in parts.items()}


def to_scores(found: dict[str, SegmentationMeter]) -> dict[str, Scores]:
    """Return the scores of ``evaluate_network``; a stream that the network or the texts do not allow is left out."""
    scores = {name: meter.result() for name, meter in found.items()}
    return {name: score for name, score in scores.items() if score.images}
