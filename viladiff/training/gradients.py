"""Measurement of each loss term's share of the gradient, without any effect on training.

At a few steps of each third of training the gradient of each weighted term is taken on the step's own graph before the
step's backward pass, with ``torch.autograd.grad``: there is no second forward pass, no random draw, and no ``.grad``,
buffer or queue is touched, so that weights are the same bit for bit with and without. Gradients are those of the global
batch: means over micro-batches and workers. It costs a backward pass a term at those steps, and a copy of the shared
parameters a term in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from viladiff.runs.gradient_shares import SUPERVISED, measured_steps

if TYPE_CHECKING:
    from viladiff.data.batch import Losses
    from viladiff.methods.base import Method
    from viladiff.runs.config import RunConfig


class GradientShares:
    """The measurement of a run's gradient shares (``runtime.gradient_shares``); none if that is 0."""

    def __init__(self, cfg: RunConfig, method: Method, steps: int) -> None:
        self.each, self.name = cfg.runtime.gradient_shares, cfg.method.name
        self.at = measured_steps(self.each, steps)
        self.places = _everywhere(method) if self.each else {}
        self.fields = {f"method.{path}": list(names) for path, names in method.term_fields.items()}
        self.found: list[dict[str, Any]] = []
        """A measured step each; saved with the run."""
        self._sums: dict[str, dict[str, Tensor]] = {}

    def record(self) -> dict[str, Any] | None:
        """Return the entry ``RunRecord.gradient_shares``; None if nothing was measured."""
        return {"fields": self.fields, "measured": self.found} if self.found else None

    def add(self, step: int, losses: Losses, scale: float) -> None:
        """Add the gradients of a micro-batch's parts, if ``step`` is measured; call it before ``backward``.

        ``scale`` multiplies each part: the micro-batch's share of the step, and the factor of a gradient scaler. A part
        that depends on no parameter has no share.
        Raises ValueError if the method does not say what its loss is made of.
        """
        if step not in self.at:
            return
        if not losses.parts:
            here = f"runtime.gradient_shares = {self.each}: method.name = {self.name!r}"
            raise ValueError(f"{here} does not give the parts of its loss (Losses.parts); set it to 0")
        weights = [weight for place in self.places.values() for weight in place]
        for term, part in losses.parts.items():
            if not part.requires_grad:  # a constant, as the noise of a denoiser that sees none
                continue
            taken = torch.autograd.grad(scale * part, weights, retain_graph=True, allow_unused=True)
            place, own = self._reached(weights, taken)
            if place:
                vector = torch.cat([(torch.zeros_like(w) if g is None else g).flatten().float() for w, g in own])
                sums = self._sums.setdefault(place, {})
                sums[term] = sums[term] + vector if term in sums else vector

    def finish(self, step: int, scale: float) -> None:
        """Record the norms and directions of a measured step; ``scale`` is the scaler's factor, divided out again.

        All workers take part. A step with a gradient that is not finite, which a scaler skips, is recorded without
        norms.
        """
        if step not in self.at:
            return
        norms: dict[str, dict[str, float]] = {}
        cosines: dict[str, dict[str, float | None]] = {}
        for place, sums in self._sums.items():
            vectors = {term: _mean_of_workers(vector) / scale for term, vector in sums.items()}
            names, found = list(vectors), torch.stack([torch.linalg.vector_norm(v) for v in vectors.values()])
            norms[place] = dict(zip(names, found.tolist(), strict=True))
            other = vectors.get(SUPERVISED)
            if other is not None:
                dots = torch.stack([vector @ other for vector in vectors.values()]).tolist()
                pairs = zip(names, dots, strict=True)
                cosines[place] = {n: _cosine(dot, norms[place][n], norms[place][SUPERVISED]) for n, dot in pairs}
        self._sums = {}
        finite = all(torch.tensor(list(values.values())).isfinite().all() for values in norms.values())
        self.found.append({"step": step, "norms": norms if finite else {}, "cosines": cosines if finite else {}})

    def _reached(
        self, weights: list[torch.nn.Parameter], taken: tuple[Tensor | None, ...]
    ) -> tuple[str, list[tuple[Tensor, Tensor | None]]]:
        """Return the first place that a term's gradient reaches, and its parameters with gradients; "" for none."""
        start = 0
        for place, own in self.places.items():
            pairs = list(zip(weights[start : start + len(own)], taken[start : start + len(own)], strict=True))
            if any(gradient is not None for _, gradient in pairs):
                return place, [(weight.detach(), gradient) for weight, gradient in pairs]
            start += len(own)
        return "", []


def _everywhere(method: Method) -> dict[str, list[torch.nn.Parameter]]:
    """Return the method's shared parameters by place, and as ``elsewhere`` all others that are trained."""
    places = method.shared()
    there = {id(weight) for place in places.values() for weight in place}
    rest = [weight for weight in method.parameters() if weight.requires_grad and id(weight) not in there]
    return {**places, **({"elsewhere": rest} if rest else {})}


def _mean_of_workers(vector: Tensor) -> Tensor:
    """Average this worker's gradient over all workers, as DDP does."""
    if not dist.is_initialized():
        return vector
    dist.all_reduce(vector)
    return vector / dist.get_world_size()


def _cosine(dot: float, one: float, other: float) -> float | None:
    """Return the cosine; None if a gradient is 0, which has no direction."""
    return max(-1.0, min(1.0, dot / (one * other))) if one * other else None
