"""Losses: pure functions, computed in float32 even under autocast, and equal on one worker and on many.

Equations are those of the paper; shape letters are those of ``viladiff.data.batch``. A mean whose divisor depends on
the data goes through ``distributed_mean``. All return scalars unless they say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from viladiff.config.base import did_you_mean
from viladiff.data.batch import IGNORE


class OnGrid(Protocol):
    """Logits of pixels that have their own way to the cross-entropy, as ``models.fused.pixel_logits`` has."""

    def cross_entropy(self, target: Tensor) -> Tensor:
        """Return (B, H, W) nats, 0 where ``target`` (B, H, W) is 255."""


Logits = Tensor | OnGrid
"""Logits (B, C, H, W), or what stands for them."""


def distributed_mean(total: Tensor, count: Tensor) -> Tensor:
    """Return the mean over all workers: DDP averages gradients, so local sums are multiplied by the workers.

    ``total`` is this worker's sum and ``count`` this worker's number of terms, both scalars. The result is total *
    workers / max(count summed over workers, 1), hence 0 with a gradient graph when there is nothing to count. Its mean
    over the workers is the global mean. Only the count is communicated, detached.
    """
    count = count.detach().to(torch.float32)
    workers = _workers()
    if workers > 1:
        count = count.clone()
        dist.all_reduce(count)
    return (total if workers == 1 else total * workers) / count.clamp(min=1)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return ``values`` summed over workers, detached, for decisions that all workers must take alike."""
    values = values.detach().clone()
    if _workers() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """Return the element-wise maximum of all workers' ``values``, detached."""
    values = values.detach().clone()
    if _workers() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def all_gather(values: Tensor) -> Tensor:
    """Join all workers' rows, detached: (n, ...) to (workers * n, ...); n is the same on all workers."""
    values = values.detach().contiguous()
    if _workers() == 1:
        return values
    found = [torch.empty_like(values) for _ in range(_workers())]
    dist.all_gather(found, values)
    return torch.cat(found)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return all_gather(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce_sum(grads[0].contiguous()).chunk(_workers())[dist.get_rank()]


def all_gather_with_grad(values: Tensor) -> Tensor:
    """Join all workers' rows as ``all_gather`` does; the gradients of all workers' losses reach this worker's rows."""
    return values if _workers() == 1 else _Gathered.apply(values)


def mean_over_classes(values: Tensor, classes: Tensor, counted: Tensor, num_classes: int) -> Tensor:
    """Average ``values`` by class and then over the classes that have any, over all workers; 0 without any.

    ``values`` (n,) with a gradient, ``classes`` (n,) int64, ``counted`` (n,) bool.
    """
    weight = counted.float()
    count = all_reduce_sum(torch.zeros(num_classes, device=weight.device).index_add_(0, classes, weight))
    share = weight / count.clamp(min=1)[classes]
    return (values * share).sum() * _workers() / (count > 0).sum().clamp(min=1)


def feature_distillation(
    teacher: Tensor,
    student: Tensor,
    lam: float,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Return Eq. 1: squared distance + lam * cosine distance of (B, D) features; no gradient reaches the teacher.

    ``reduction`` concerns the first term: "mean" divides the squared differences by B * D (the "mean squared error"
    of section 3.3), "sum" adds them all, as Eq. 1 is printed. The cosine distance is a mean over B in both.
    ``weight`` (B,) multiplies each sample's share, and the divisor B becomes ``count``: this worker's share of it, by
    default the sum of the weights. Raises ValueError for unlike shapes and an unknown reduction.
    """
    return feature_terms(teacher, student, lam, reduction, weight=weight, count=count)[0]


def feature_terms(
    teacher: Tensor,
    student: Tensor,
    lam: float,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``feature_distillation`` and its two summands, the squared distance and lam * the cosine distance.

    Arguments, reduction and errors as of ``feature_distillation``.
    """
    _same_shape("teacher", teacher, "student", student)
    check_choice("reduction", reduction, ("mean", "sum"))
    teacher, student = teacher.detach().float(), student.float()
    squared = (teacher - student).square()
    cosine = 1 - F.cosine_similarity(teacher, student, dim=1)
    apart = lam * _gated_mean(cosine, weight, count)
    if reduction == "mean":
        squared = squared.mean(dim=1)
        return _gated_mean(squared + lam * cosine, weight, count), _gated_mean(squared, weight, count), apart
    squared = squared.sum(dim=1)
    summed = (squared.sum() if weight is None else (squared * weight.float()).sum()) * _workers()
    return summed + apart, summed, apart


def logit_distillation(
    teacher: Tensor, student: Tensor, temperature: float, *, weight: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Return Eq. 2: T² * KL(softmax(teacher / T) || softmax(student / T)); T² keeps the gradient's size.

    Both are (B, C, ...) with classes on axis 1; the teacher gets no gradient. The mean is over all pixels, or, with a
    ``weight`` that broadcasts to (B, ...), the weighted sum over ``count``: this worker's share of it, by default the
    sum of the weights. Raises ValueError for unlike shapes and a temperature that is not positive.
    """
    _same_shape("teacher", teacher, "student", student)
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be positive")
    log_p = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    log_q = F.log_softmax(student.float() / temperature, dim=1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * _gated_mean(divergence, weight, count)


def cross_entropy(logits: Logits, target: Tensor, weight: Tensor | None = None, norm: str = "labelled") -> Tensor:
    """Return Eq. 10 over the pixels not labelled 255; a batch without such pixels gives 0 with a gradient, never NaN.

    ``logits`` (B, C, H, W), ``target`` (B, H, W) int64, ``weight`` (B, H, W) a factor on each pixel that leaves the
    divisor alone. ``norm``: divide by the "labelled" pixels of all workers, or by "all" of them, ignored ones
    included. Raises ValueError for unlike shapes and an unknown norm.
    """
    check_choice("norm", norm, ("labelled", "all"))
    loss = pixel_cross_entropy(logits, target)
    if weight is None and norm == "labelled":
        return ignore_aware_mean(loss, target)
    total = loss.sum() if weight is None else (loss * weight.float()).sum()
    counted = target != IGNORE if norm == "labelled" else torch.ones_like(target, dtype=torch.bool)
    return distributed_mean(total, counted.sum())


def ignore_aware_mean(loss: Tensor, target: Tensor) -> Tensor:
    """Reduce a map (B, H, W) that is 0 where ``target`` is 255, as ``cross_entropy`` does."""
    return distributed_mean(loss.sum(), (target != IGNORE).sum())


def ohem_mean(loss: Tensor, target: Tensor, threshold: float, share: float) -> Tensor:
    """Reduce as ``ignore_aware_mean`` over the hard pixels alone (online hard example mining): p <= max(threshold, p_n)

    p = exp(-loss) is the probability of the true class, p_n that of the n-th hardest pixel of all workers' maps, with n
    their pixels times ``share``; where fewer than n are labelled, all are kept. ``loss`` (B, H, W), 0 where ``target``
    is 255; ``threshold`` and ``share`` in (0, 1]. The divisor is the number of pixels kept.
    """
    known = target != IGNORE
    ranked = loss.detach().masked_fill(~known, -1.0)  # below any loss
    everyone = all_gather(ranked).flatten()
    n = max(1, round(share * everyone.numel()))
    nth = everyone.kthvalue(everyone.numel() - n + 1).values
    kept = known & (ranked >= nth.clamp(max=-math.log(threshold)))
    return distributed_mean((loss * kept).sum(), kept.sum())


def pseudo_label_cross_entropy(logits: Logits, labels: Tensor, confidence_weight: Tensor, valid: Tensor) -> Tensor:
    """Return pseudo-label cross-entropy over the valid pixels, not the confident ones: few confident, small loss.

    ``logits`` (U, C, H, W), ``labels`` (U, H, W) int64, ``confidence_weight`` (U, H, W) >= 0, ``valid`` (U, H, W)
    bool, False in padding. The form is that of FixMatch and UniMatch. Raises ValueError for unlike shapes.
    """
    _same_shape("labels", labels, "valid", valid)
    return weighted_pixel_mean(pixel_cross_entropy(logits, labels), confidence_weight, valid)


def weighted_pixel_mean(loss: Tensor, confidence_weight: Tensor, valid: Tensor) -> Tensor:
    """Reduce a map (U, H, W) as ``pseudo_label_cross_entropy`` does."""
    return distributed_mean((loss * (confidence_weight.float() * valid)).sum(), valid.sum())


def edge_cross_entropy(logits: Tensor, target: Tensor, edges: Tensor) -> Tensor:
    """Return L_edge of Eq. 13: cross-entropy of edge pixels alone, divided by their number, however few they are.

    ``logits`` (B, C, H, W), ``target`` (B, H, W) int64 (255 is never an edge here), ``edges`` (B, H, W) bool. Raises
    ValueError for unlike shapes.
    """
    _same_shape("target", target, "edges", edges)
    return edge_mean(pixel_cross_entropy(logits, target), edges & (target != IGNORE))


def edge_mean(loss: Tensor, edges: Tensor) -> Tensor:
    """Reduce a map (B, H, W) over edges with a known label, as ``edge_cross_entropy`` does."""
    return distributed_mean((loss * edges).sum(), edges.sum())


def noise_loss(pred: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """Return Eq. 4: squared error of the predicted noise, a mean over channels and the pixels that got Gaussian noise.

    ``pred`` and ``noise`` (B, d, h, w), ``mask`` (B, h, w) bool. Raises ValueError for unlike shapes.
    """
    _same_shape("pred", pred, "noise", noise)
    squared = (pred.float() - noise.detach().float()).square().mean(dim=1)
    _same_shape("mask", mask, "pred without its channels", squared)
    return distributed_mean((squared * mask).sum(), mask.sum())


@torch.no_grad()
def per_image_cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Return (B,) cross-entropy without a gradient, for gates that compare streams image by image.

    ``logits`` (B, C, H, W), ``labels`` (B, H, W) int64, ``valid`` (B, H, W) bool. A mean over each image's own pixels
    that are valid and not 255; 0 for an image that has none. Raises ValueError for unlike shapes.
    """
    _same_shape("labels", labels, "valid", valid)
    return image_mean(pixel_cross_entropy(logits, labels), valid & (labels != IGNORE))


@torch.no_grad()
def image_mean(loss: Tensor, counted: Tensor) -> Tensor:
    """Reduce a map (B, H, W) over the bool pixels ``counted``, as ``per_image_cross_entropy`` does."""
    total = (loss * counted).flatten(1).sum(dim=1)
    return total / counted.flatten(1).sum(dim=1).clamp(min=1)


def check_choice(field: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError for a value that is not allowed, with ``field``, the allowed values and the nearest one."""
    if value not in allowed:
        raise ValueError(f"{field} = {value!r}: must be one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}")


def _workers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gated_mean(values: Tensor, weight: Tensor | None, count: Tensor | None) -> Tensor:
    """Average by weight; without a gate every worker's share is equally large and needs no communication."""
    if weight is None:
        return values.mean() if count is None else distributed_mean(values.sum(), count)
    weight = weight.float().expand_as(values)
    return distributed_mean((values * weight).sum(), weight.sum() if count is None else count)


def pixel_cross_entropy(logits: Logits, target: Tensor) -> Tensor:
    """Return (B, H, W) nats, 0 where the target is 255, for several losses that read one map.

    ``logits`` (B, C, H, W), ``target`` (B, H, W) int64. Raises ValueError for unlike shapes.
    """
    if not isinstance(logits, Tensor):
        return logits.cross_entropy(target)
    if logits.ndim != target.ndim + 1 or logits.shape[:1] + logits.shape[2:] != target.shape:
        raise ValueError(
            f"target {tuple(target.shape)} does not fit logits {tuple(logits.shape)}: want (B, H, W), (B, C, H, W)"
        )
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")


def _same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name} {tuple(tensor.shape)} and {other_name} {tuple(other.shape)} must have the same shape")
