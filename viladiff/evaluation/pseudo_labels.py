"""Quality of pseudo-labels before and after refinement, at edges and elsewhere, from counts of pixels.

A pixel is at an edge within ``evaluate.trimap`` of the truth: as near to another true label as boundary scores look.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from viladiff.data.batch import IGNORE
from viladiff.evaluation.pixel_counts import (
    boundary_width,
    calibration_bins,
    calibration_error,
    pseudo_change,
    pseudo_quality,
    pseudo_shares,
    trimap,
)

Labelling = tuple[Tensor, Tensor]  # confidence and labels, each (B, H, W)
AREAS = ("", "edges", "elsewhere")
"""All pixels, and the two parts that each score is also given for."""
STEPS = 2000
"""Equal parts of [0, 1] among which the threshold of equal coverage is found."""


def pseudo_counts(stages: Mapping[str, Labelling], truth: Tensor, threshold: float | None) -> dict[str, Tensor]:
    """Return counts that add over batches and workers, by "stage/count/area".

    ``change`` counts the change from the first stage to the second. ``stages`` "before" and maybe "after", (B, H, W)
    each; ``truth`` (B, H, W), 255 = ignore. Without a threshold, the bins of calibration alone.
    """
    found = {f"{name}/bins/": calibration_bins(*labels, truth) for name, labels in stages.items()}
    if threshold is None:
        return found
    near = trimap(truth, boundary_width(*truth.shape[-2:]))
    for area, where in zip(AREAS, (torch.ones_like(near), near, ~near), strict=True):
        parts = {name: pseudo_quality(*labels, truth, threshold, where) for name, labels in stages.items()}
        if "after" in stages:
            parts["change"] = pseudo_change(stages["before"], stages["after"], truth, threshold, where)
            parts["change"] |= _label_change(stages["before"][1], stages["after"][1], truth, where)
            parts["change"]["histogram"] = _histogram(*stages["before"], truth, where)
        found |= {f"{name}/{what}/{area}": n for name, counts in parts.items() for what, n in counts.items()}
    return found


def pseudo_scores(total: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Return shares in [0, 1] from summed ``pseudo_counts``; None if the denominator is 0.

    ``before/`` and ``after/`` have, at the threshold: coverage (accepted of all), precision (right of the accepted),
    wrong (accepted and wrong of all), and ece of all pixels. Of both: rescued (of the pixels not accepted or wrong, now
    accepted and right) and spoiled (the reverse, of the accepted and right); corrected and corrupted, the same of
    labels alone: of the wrong ones and of the right ones. ``matched/`` is the effect of a lower or higher threshold on
    the labels before refinement at their coverage after it: that threshold, and wrong. A name that ends in ``/edges``
    or ``/elsewhere`` is of these pixels alone.
    """
    counts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, count in total.items():
        stage, what, area = name.split("/")
        counts.setdefault((stage, area), {})[what] = count
    out: dict[str, float | None] = {}
    for (stage, area), sums in counts.items():
        prefix, suffix = "" if stage == "change" else f"{stage}/", f"/{area}" if area else ""
        shares = pseudo_shares(sums)
        if "accepted" in sums:
            shares["wrong"] = _ratio(sums["accepted"] - sums["correct"], sums["valid"])
        if "relabelled" in sums:
            shares["corrected"] = _ratio(sums["corrected"], sums["relabelled"])
            shares["corrupted"] = _ratio(sums["corrupted"], sums["right"])
        if "bins" in sums:
            shares["ece"] = calibration_error(sums["bins"])
        out |= {f"{prefix}{what}{suffix}": share for what, share in shares.items()}
        if "histogram" in sums:
            after = counts["after", area]
            level, wrong = matched(sums["histogram"], _ratio(after["accepted"], after["valid"]))
            out |= {f"matched/threshold{suffix}": level, f"matched/wrong{suffix}": wrong}
    return out


def _label_change(before: Tensor, after: Tensor, truth: Tensor, where: Tensor) -> dict[str, Tensor]:
    """Count how refinement changes labels, accepted or not."""
    known = where & (truth != IGNORE)
    right, now = known & (before == truth), known & (after == truth)
    wrong = known & ~right
    return {
        "relabelled": wrong.sum(),
        "corrected": (wrong & now).sum(),
        "right": right.sum(),
        "corrupted": (right & ~now).sum(),
    }


def _histogram(confidence: Tensor, labels: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    """Return (2, STEPS) float64 pixels and wrong ones by confidence: bin k is [k / STEPS, (k + 1) / STEPS), or to 1."""
    known = (where & (truth != IGNORE)).double().flatten()
    place = (confidence.double().flatten() * STEPS).long().clamp(0, STEPS - 1)
    parts = torch.stack([known, known * (labels != truth).flatten()])
    return torch.zeros(2, STEPS, dtype=torch.float64, device=known.device).index_add_(1, place, parts)


def matched(histogram: Tensor, coverage: float | None) -> tuple[float | None, float | None]:
    """Return (threshold, accepted and wrong share) at which labels of ``_histogram`` have that coverage.

    Between the edges of a bin its pixels and its wrong ones are taken as spread evenly. None without pixels.
    """
    pixels, wrong = histogram.cpu().numpy()
    if coverage is None or not pixels.sum():
        return None, None
    # From the top down: accepted and wrong shares at each edge, from threshold 1 to 0.
    covered, missed = (np.concatenate([[0.0], x[::-1].cumsum() / pixels.sum()]) for x in (pixels, wrong))
    edges = np.linspace(1, 0, STEPS + 1)
    k = int(np.searchsorted(covered, coverage - 1e-12))  # the first edge that covers enough
    if k == 0:
        return 1.0, 0.0
    k = min(k, STEPS)
    share = (coverage - covered[k - 1]) / (covered[k] - covered[k - 1])
    level, wrong_share = (float(x[k - 1] + share * (x[k] - x[k - 1])) for x in (edges, missed))
    return level, wrong_share


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return int(part) / int(whole) if int(whole) else None
