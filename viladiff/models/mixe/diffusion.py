"""The two noises of MixE (paper, Eqs. 3 and 5-7), forward and backward; ``models.mixe.denoiser`` combines them.

The kernel of Eq. 6 treats all other classes alike, so t of its steps are again such a kernel, with one number that
matters: the share 1 - (1 - beta C / (C - 1))^t of its memory that a pixel has lost. Nothing here builds a C x C
matrix. Shape letters are those of ``viladiff.data.batch``; d is the length of a class's code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor

from viladiff.data.batch import IGNORE
from viladiff.losses import check_choice

SCHEDULES = ("cumulative", "constant", "matched")
MATCHED_STEPS = 10
"""The paper's T: "matched" makes as many flips in T steps as "cumulative" makes in this many."""
DDPM_STEPS = 1000
TINY_RATE = 1e-12
"""The posterior at beta = 0 is 0/0 wherever the network disagrees with the label; it is read as the limit beta -> 0."""


def alpha_bar(timesteps: int) -> Tensor:
    """Return (T + 1,) shares of signal left: DDPM's 1000 steps at round(1000 t / T), so T = 10 too ends in pure noise.

    Float32, entry 0 is 1; computed in float64 from beta = 1e-4 ... 0.02 (Ho et al. 2020). Raises ValueError unless 1 <=
    T <= 1000.
    """
    if not 1 <= timesteps <= DDPM_STEPS:
        raise ValueError(f"timesteps = {timesteps}: must be from 1 to {DDPM_STEPS}")
    kept = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, DDPM_STEPS))])
    index = np.round(np.arange(timesteps + 1) * DDPM_STEPS / timesteps).astype(np.int64)
    return torch.from_numpy(kept[index]).float()


def add_gaussian_noise(x0: Tensor, t: int | Tensor, alpha_bar: Tensor, noise: Tensor) -> Tensor:
    """Return Eq. 3: sqrt(a) x0 + sqrt(1 - a) noise with a = alpha_bar[t]; t = 0 gives x0 back.

    ``x0`` and ``noise`` (B, ...); ``t`` an int or (B,) int64, from 0 to T. Float32. Raises ValueError for unlike
    shapes.
    """
    if x0.shape != noise.shape:
        raise ValueError(f"x0 {tuple(x0.shape)} and noise {tuple(noise.shape)} must have the same shape")
    kept = _trailing(alpha_bar[t], x0.ndim)
    return kept.sqrt() * x0.float() + (1 - kept).sqrt() * noise.float()


def flip_probability(
    t: int | Tensor,
    beta: float | Tensor,
    num_classes: int,
    schedule: str = "cumulative",
    timesteps: int | None = None,
) -> Tensor:
    """Return the probability that t steps of Eq. 6 leave a label in another class.

    It is at most (C - 1) / C, as flips also lead back. ``t`` an int or int64 tensor; ``beta`` a float or tensor, the
    probability in one step; a (B,) ``t`` goes with a (B, h, w) ``beta``. "cumulative" composes t steps; "constant" is
    beta for every t >= 1, the letter of Eq. 6; "matched" needs ``timesteps`` = T and has a rate such that T steps flip
    as many as 10 steps of beta. Float64 and 0-dimensional for an int and a float, else float32. Raises ValueError for t
    < 0, beta outside 0 ... (C - 1) / C, an unknown schedule. (Tensors on a GPU are not read, so not checked.)
    """
    check_beta(beta, num_classes)
    return _memory_lost(_exponent(t, schedule, timesteps), beta, num_classes) * ((num_classes - 1) / num_classes)


def step_probability(
    t: int | Tensor,
    beta: float | Tensor,
    num_classes: int,
    schedule: str = "cumulative",
    timesteps: int | None = None,
    *,
    t_prev: int | Tensor | None = None,
) -> Tensor:
    """Flip probability of the step from ``t_prev`` (default t - 1) to t: all composed give ``flip_probability(t)``.

    For "constant" the first step does everything and the later ones nothing. Arguments and errors as for
    ``flip_probability``; also ValueError unless 0 <= t_prev <= t.
    """
    check_beta(beta, num_classes)
    return _step_memory_lost(t, t_prev, beta, num_classes, schedule, timesteps) * ((num_classes - 1) / num_classes)


def _step_memory_lost(
    t: int | Tensor,
    t_prev: int | Tensor | None,
    beta: float | Tensor,
    classes: int,
    schedule: str,
    timesteps: int | None,
) -> Tensor:
    # The difference of exponents is the ratio of the shares kept, also where both shares are 0.
    t_prev = t - 1 if t_prev is None else t_prev
    power = _exponent(t, schedule, timesteps) - _exponent(t_prev, schedule, timesteps)
    if _known_below(power, 0):
        raise ValueError(f"t_prev = {t_prev}: must not be later than t = {t}")
    return _memory_lost(power, beta, classes)


def _exponent(t: int | Tensor, schedule: str, timesteps: int | None) -> float | Tensor:
    """Return the number of steps at rate beta that the first t steps of the schedule amount to."""
    check_choice("flip_schedule", schedule, SCHEDULES)
    if _known_below(t, 0):
        raise ValueError(f"t = {t}: must not be negative")
    if schedule == "cumulative":
        return t
    if schedule == "constant":
        return t.clamp(max=1) if isinstance(t, Tensor) else min(t, 1)
    if timesteps is None or timesteps < 1:
        raise ValueError(f"timesteps = {timesteps}: flip_schedule 'matched' needs the number of steps, at least 1")
    return t * MATCHED_STEPS / timesteps


def _memory_lost(power: float | Tensor, beta: float | Tensor, classes: int) -> Tensor:
    """Return 1 - (1 - beta C / (C - 1))^power, exact also for rates near 0 and for the rate that forgets at once."""
    scalar = not isinstance(power, Tensor) and not isinstance(beta, Tensor)
    device = beta.device if isinstance(beta, Tensor) else power.device if isinstance(power, Tensor) else None
    rate = torch.as_tensor(beta, dtype=torch.float64 if scalar else torch.float32, device=device)
    rate = (rate * (classes / (classes - 1))).clamp(max=1)
    if isinstance(power, Tensor):
        power = _trailing(power.to(rate.dtype), rate.ndim)
    return -torch.expm1(torch.special.xlog1py(power, -rate))


def check_beta(beta: float | Tensor, classes: int) -> None:
    if classes < 2:
        raise ValueError(f"num_classes = {classes}: must be at least 2")
    top = (classes - 1) / classes
    if _known_below(beta, 0) or _known_below(-beta, -top - 1e-6):
        shown = f"{float(beta.min()):.4g} ... {float(beta.max()):.4g}" if isinstance(beta, Tensor) else beta
        raise ValueError(f"beta = {shown}: must be from 0 to (C - 1) / C = {top:.4g} for C = {classes} classes")


def _known_below(value: float | Tensor, bound: float) -> bool:
    """Return whether any entry is below; a tensor on an accelerator is not read, because that would stop its queue."""
    if isinstance(value, Tensor):
        return value.device.type == "cpu" and bool((value < bound).any())
    return value < bound


def _trailing(values: Tensor, ndim: int) -> Tensor:
    """Reshape (B,) to (B, 1, ..., 1); 0-dimensional tensors and those of full rank pass."""
    return values.reshape(values.shape + (1,) * (ndim - values.ndim)) if 0 < values.ndim < ndim else values


def edge_mask(labels: Tensor) -> Tensor:
    """Return bool, as labels: some class's one-hot map has a non-zero Laplacian just where a neighbour's class differs.

    ``labels`` (..., H, W) integers; the class ids are compared, never subtracted. Borders replicate, so they are no
    edges; a pixel of 255 is no edge and makes none. Four neighbours. Raises ValueError for fewer than two axes.
    """
    if labels.ndim < 2:
        raise ValueError(f"labels {tuple(labels.shape)}: must have height and width as last axes")
    known = labels != IGNORE
    edges = torch.zeros_like(known)
    rows = (labels[..., 1:, :] != labels[..., :-1, :]) & known[..., 1:, :] & known[..., :-1, :]
    columns = (labels[..., 1:] != labels[..., :-1]) & known[..., 1:] & known[..., :-1]
    sides = (edges[..., 1:, :], rows), (edges[..., :-1, :], rows), (edges[..., 1:], columns), (edges[..., :-1], columns)
    for side, found in sides:
        side.logical_or_(found)
    return edges


def flip_labels(
    labels: Tensor,
    probability: float | Tensor,
    num_classes: int,
    generator: torch.Generator | None = None,
    *,
    uniform: Tensor | None = None,
) -> Tensor:
    """Apply Eqs. 5-6 with one uniform u a pixel: u < p decides, then u / p, again uniform, picks another class.

    ``labels`` integers of any shape and dtype, preserved; 255 stays 255. ``probability`` a float or a tensor that
    broadcasts to the labels. ``uniform`` (as labels, float32 in [0, 1)) replaces the draw from ``generator``. Memory
    does not depend on C. Raises ValueError for C < 2, C > 255, a float probability outside 0 ... 1, and shapes that do
    not fit.
    """
    if not 2 <= num_classes <= IGNORE:
        raise ValueError(f"num_classes = {num_classes}: must be from 2 to {IGNORE}")
    if not isinstance(probability, Tensor):
        if not 0 <= probability <= 1:
            raise ValueError(f"probability = {probability}: must be from 0 to 1")
        probability = torch.tensor(probability, dtype=torch.float32, device=labels.device)
    if uniform is None:
        device = labels.device if generator is None else generator.device
        uniform = torch.rand(labels.shape, generator=generator, device=device).to(labels.device)
    if uniform.shape != labels.shape:
        raise ValueError(f"uniform {tuple(uniform.shape)} must have the shape of labels {tuple(labels.shape)}")
    # 16 bits hold every class and its successor, and move a quarter of the bytes of int64.
    small, probability = labels.to(torch.int16), probability.float()
    flipped = (uniform < probability) & (small != IGNORE)
    # 1 ... C - 1 classes further, cyclically. u < p leaves u / p below 1; the clamps keep other pixels within 16 bits.
    shift = uniform / probability.clamp(min=torch.finfo(torch.float32).tiny)
    moved = shift.mul_(num_classes - 1).clamp_(max=num_classes - 2).to(torch.int16).add_(small).add_(1)
    moved = torch.where(moved >= num_classes, moved - num_classes, moved)
    return torch.where(flipped, moved, small).to(labels.dtype)


def posterior(
    z_t: Tensor,
    x0_probs: Tensor,
    t: int | Tensor,
    beta: float | Tensor,
    num_classes: int,
    schedule: str = "cumulative",
    timesteps: int | None = None,
    *,
    t_prev: int | Tensor | None = None,
) -> Tensor:
    """Return (B, C, h, w) probabilities of z at ``t_prev`` (default t - 1): the mixture of q(z_prev | z_t, x0) over x0.

    By Bayes q is Q(z_t | z) Qbar_prev(z | x0) / Qbar_t(z_t | x0). With w(k) = x0_probs(k) / Qbar_t(z_t | k) and W
    their sum, the uniform kernel leaves Q(z_t | z) [(W - w(z)) o + w(z) d], where d is the chance to be unflipped at
    t_prev and o that of one other class: O(C) a pixel. ``z_t`` (B, h, w) integers, ``x0_probs`` (B, C, h, w), ``t``
    >= 1; ``beta`` a float or (B, h, w). Where z_t is 255 the answer is ``x0_probs``; at t_prev = 0 too. Float32.
    Errors as for ``step_probability``, and ValueError for shapes that do not fit.
    """
    check_beta(beta, num_classes)
    if x0_probs.ndim != 4 or x0_probs.shape[1] != num_classes or z_t.shape != x0_probs.shape[:1] + x0_probs.shape[2:]:
        raise ValueError(
            f"z_t {tuple(z_t.shape)}, x0_probs {tuple(x0_probs.shape)}: want (B, h, w) and (B, {num_classes}, h, w)"
        )
    if _known_below(t, 1):
        raise ValueError(f"t = {t}: must be at least 1")
    lost = posterior_memory(t, t - 1 if t_prev is None else t_prev, beta, num_classes, schedule, timesteps)
    unknown = (z_t == IGNORE).unsqueeze(1)
    here = z_t.long().masked_fill(unknown[:, 0], 0)
    result = posterior_of(here, x0_probs, *(_per_channel(part) for part in lost))
    return torch.where(unknown, x0_probs.float(), result)


def posterior_memory(
    t: int | Tensor,
    t_prev: int | Tensor,
    beta: float | Tensor,
    num_classes: int,
    schedule: str = "cumulative",
    timesteps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return shares of labels redrawn by time t, by ``t_prev``, and between the two: ``posterior`` without its labels.

    Float32, of the shape that ``t`` and ``beta`` broadcast to; a chain has all its steps at once from a ``t`` (S, 1,
    1, 1) and a ``beta`` (B, h, w). A beta of 0 is read as a tiny one. Errors as for ``step_probability``.
    """
    rate = beta.clamp(min=TINY_RATE) if isinstance(beta, Tensor) else max(beta, TINY_RATE)
    return (
        _memory_lost(_exponent(t, schedule, timesteps), rate, num_classes).float(),
        _memory_lost(_exponent(t_prev, schedule, timesteps), rate, num_classes).float(),
        _step_memory_lost(t, t_prev, rate, num_classes, schedule, timesteps).float(),
    )


def posterior_of(z_t: Tensor, x0_probs: Tensor, lost_t: Tensor, lost_prev: Tensor, lost_step: Tensor) -> Tensor:
    """Return ``posterior`` from the three shares of ``posterior_memory``, broadcast against (B, C, h, w); no 255."""
    here, probs, classes = z_t.unsqueeze(1), x0_probs.float(), x0_probs.shape[1]
    away = (classes - 1) / classes
    ratio = probs / (lost_t / classes)
    ratio = ratio.scatter_(1, here, probs.gather(1, here) / (1 - away * lost_t))
    # W o + w(z) (d - o), and d - o is the share of memory kept at t_prev.
    mixed = torch.addcmul(ratio.sum(1, keepdim=True) * (lost_prev / classes), ratio, 1 - lost_prev)
    stayed = mixed.gather(1, here) * (1 - away * lost_step)
    return (mixed * (lost_step / classes)).scatter_(1, here, stayed)


def _per_channel(values: Tensor) -> Tensor:
    """Reshape () or (B,) or (B, h, w) to broadcast against (B, C, h, w)."""
    return values.unsqueeze(1) if values.ndim == 3 else _trailing(values, 4)


def sample_classes(probs: Tensor, uniform: Tensor) -> Tensor:
    """Return (B, h, w) int64, the first class whose cumulated share exceeds ``uniform``, never one of probability 0.

    ``probs`` (B, C, h, w) need not be normalised; ``uniform`` (B, h, w) in [0, 1). Raises ValueError for shapes that do
    not fit.
    """
    if uniform.shape != probs.shape[:1] + probs.shape[2:]:
        raise ValueError(f"uniform {tuple(uniform.shape)} does not fit probs {tuple(probs.shape)}")
    shares = probs.float().cumsum(dim=1)
    total = shares[:, -1]
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return (shares <= point.unsqueeze(1)).sum(dim=1).clamp(max=probs.shape[1] - 1)


def confidence_threshold(
    progress: float, maximum: float = 0.8, ramp: float = 0.5, *, start: float = 0.0, shape: str = "linear"
) -> float:
    """Return tau of Eq. 7: from ``start`` to ``maximum`` over the first ``ramp`` of training, then constant.

    ``progress`` and ``ramp`` are shares of training; ramp = 0 is ``maximum`` at once. ``shape``: "linear" (the paper),
    "cosine", or "step", which jumps at the end of the ramp. Raises ValueError for progress or ramp outside 0 ... 1 and
    an unknown shape.
    """
    for name, value in (("progress", progress), ("ramp", ramp)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value}: must be from 0 to 1")
    check_choice("tau_shape", shape, ("linear", "cosine", "step"))
    done = 1.0 if progress >= ramp else progress / ramp
    if shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    elif shape == "step":
        done = float(done == 1)
    return start + (maximum - start) * done


def class_codes(num_classes: int) -> Tensor:
    """Return (C, d) rows of +-1, all equally far apart; d is the least power of two above C: 32 for 21 classes.

    Rows 1 ... C of a Hadamard matrix, without the constant row 0. A soft label embeds as probs @ codes, in [-1, 1]^d,
    as DDPM's data are. Raises ValueError for C < 2.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes = {num_classes}: must be at least 2")
    length = 1 << num_classes.bit_length()
    return torch.from_numpy(hadamard(length, dtype=np.float32)[1 : num_classes + 1].copy())


def ddim_step(
    x_t: Tensor, noise_pred: Tensor, t: int, alpha_bar: Tensor | Sequence[float], t_prev: int | None = None
) -> tuple[Tensor, Tensor]:
    """Perform one DDIM step (eta = 0, no fresh noise) from t to ``t_prev`` (default t - 1): new x and predicted x0.

    x0 is clipped to [-1, 1], where codes live, and the noise is recomputed from the clipped x0, so that x_t stays
    explained by the pair; without it an error of the network at alpha_bar near 0 is amplified. ``alpha_bar`` is best a
    list: a tensor on a GPU would be read, and stall it. Raises ValueError unless 0 <= t_prev < t.
    """
    t_prev = t - 1 if t_prev is None else t_prev
    if not 0 <= t_prev < t:
        raise ValueError(f"t = {t}, t_prev = {t_prev}: must be 0 <= t_prev < t")
    now, then = float(alpha_bar[t]), float(alpha_bar[t_prev])
    x_t = x_t.float()
    x0 = torch.sub(x_t, noise_pred.float(), alpha=(1 - now) ** 0.5).div_(now**0.5).clamp_(-1, 1)
    # sqrt(then) x0 + sqrt(1 - then) noise, where noise = (x_t - sqrt(now) x0) / sqrt(1 - now).
    share = ((1 - then) / (1 - now)) ** 0.5
    return torch.add(x_t * share, x0, alpha=then**0.5 - share * now**0.5), x0
