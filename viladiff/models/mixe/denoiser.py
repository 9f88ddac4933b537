"""MixE (paper, section 3.4): corruption of labels by noise or flipped classes, and the denoiser that undoes it.

The equations are in ``models.mixe.diffusion``. Shape letters are those of ``viladiff.data.batch``; d is the length of a
class's code, S the number of reverse steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.core.distributed import full_precision
from viladiff.data.loading.device_copies import send
from viladiff.losses import check_choice
from viladiff.models.blocks import bilinear
from viladiff.models.fused.agreement import kernels_agree, stands_for_gpu
from viladiff.models.fused.chain import FoldedChain, reverse_step
from viladiff.models.fused.norms import norm_act
from viladiff.models.fused.pixel_loss import fused
from viladiff.models.mixe.config import MixeConfig
from viladiff.models.mixe.diffusion import (
    add_gaussian_noise,
    alpha_bar,
    check_beta,
    class_codes,
    confidence_threshold,
    ddim_step,
    edge_mask,
    flip_labels,
    flip_probability,
    posterior,
    posterior_memory,
    posterior_of,
    sample_classes,
    step_probability,
)

__all__ = [
    "Corrupted",
    "Denoiser",
    "MixeConfig",
    "add_gaussian_noise",
    "alpha_bar",
    "class_codes",
    "confidence_threshold",
    "corrupt",
    "ddim_step",
    "edge_mask",
    "flip_labels",
    "flip_probability",
    "noise_levels",
    "posterior",
    "refine",
    "regions",
    "reverse_times",
    "sample_classes",
    "step_probability",
]


@lru_cache(maxsize=64)
def _codes_on(num_classes: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return send(class_codes(num_classes), device)


@lru_cache(maxsize=64)
def _alpha_bar_on(timesteps: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return send(alpha_bar(timesteps), device)


@lru_cache(maxsize=64)
def _alpha_bar_list(timesteps: int) -> list[float]:
    return alpha_bar(timesteps).tolist()


@dataclass
class Corrupted:
    """The result of Eq. 7 on soft labels."""

    codes: Tensor
    """(B, d, h, w) float32, what the denoiser sees."""
    labels: Tensor
    """(B, h, w) int64, flipped where ``gaussian`` is False, the argmax elsewhere."""
    gaussian: Tensor
    """(B, h, w) bool, the region with Gaussian noise; the rest is the region of flips."""
    edges: Tensor
    """(B, h, w) bool, edges of the uncorrupted argmax."""
    noise: Tensor
    """(B, d, h, w), the target of Eq. 4 where ``gaussian``."""


def regions(soft: Tensor, tau: float, gaussian_region: str) -> Tensor:
    """Return (B, h, w) bool, True where a pixel gets Gaussian noise: Eq. 7 says "confident", its text "uncertain".

    ``soft`` (B, C, h, w) probabilities; a pixel is confident if its largest one exceeds ``tau``. Raises ValueError for
    another region.
    """
    check_choice("gaussian_region", gaussian_region, ("confident", "uncertain"))
    confident = soft.amax(dim=1) > tau
    return confident if gaussian_region == "confident" else ~confident


def corrupt(soft: Tensor, t: int | Tensor, tau: float, cfg: MixeConfig, *, noise: Tensor, uniform: Tensor) -> Corrupted:
    """Apply Eq. 7: by its confidence a pixel gets noise on the code of its soft label, or a flip of its top class.

    ``soft`` (B, C, h, w) probabilities; ``t`` an int or (B,) int64 in 1 ... cfg.timesteps; draws ``noise`` (B, d, h, w)
    normal and ``uniform`` (B, h, w) in [0, 1). Edge pixels flip at cfg.beta + cfg.edge_bonus a step. With cfg.gaussian
    or cfg.flips off, that region keeps its clean codes. Raises ValueError for an impossible beta and shapes that do not
    fit.
    """
    soft = soft.float()
    labels = soft.max(dim=1).indices  # on a CPU a tenth of argmax's time
    gaussian, edges = regions(soft, tau, cfg.gaussian_region), edge_mask(labels)
    with full_precision(soft.device):
        values = torch.einsum("bchw,cd->bdhw", soft, _codes_on(soft.shape[1], soft.device))
    if cfg.gaussian:
        values = add_gaussian_noise(values, t, _alpha_bar_on(cfg.timesteps, soft.device), noise)
    if cfg.flips:
        rates, when = _rates(cfg, soft.shape[1], soft.device), t[:, None] if isinstance(t, Tensor) else t
        chances = flip_probability(when, rates, soft.shape[1], cfg.flip_schedule, cfg.timesteps)
        edge_index = edges.flatten(1).long()
        chance = chances.expand(len(soft), -1).gather(1, edge_index).view_as(edges)
        labels = torch.where(gaussian, labels, flip_labels(labels, chance, soft.shape[1], uniform=uniform))
    return Corrupted(_assemble(values, labels, gaussian, soft.shape[1]), labels, gaussian, edges, noise)


def noise_levels(soft: Tensor, tau: float, cfg: MixeConfig, *, noise: Tensor, uniform: Tensor) -> dict[str, Tensor]:
    """Return maps to visualise, (B, h, w): ``edges``, which flip more, and the nearest classes at three timesteps.

    Arguments as of ``corrupt``.
    """
    codes = _codes_on(soft.shape[1], soft.device)
    maps: dict[str, Tensor] = {}
    for t in sorted({1, (cfg.timesteps + 1) // 2, cfg.timesteps}):
        state = corrupt(soft, t, tau, cfg, noise=noise, uniform=uniform)
        maps.setdefault("edges", state.edges)
        maps[f"noise t={t}"] = torch.einsum("bdhw,cd->bchw", state.codes, codes).argmax(1)
    return maps


def _rates(cfg: MixeConfig, classes: int, device: torch.device) -> Tensor:
    """Return (2,) probabilities of a flip in one step, off and on an edge: all that depends on them has two values."""
    check_beta(cfg.beta + cfg.edge_bonus, classes)
    return cfg.beta + cfg.edge_bonus * torch.arange(2, device=device).float()


@lru_cache(maxsize=64)
def _memory_lost_at(beta: float, edge_bonus: float, classes: int, times: tuple[int, ...], schedule: str) -> Tensor:
    """Return ``posterior_memory`` (S, 3, 2) of a chain's steps, off and on an edge; made on the host once."""
    with torch.inference_mode(False):
        rates, steps = (
            beta + edge_bonus * torch.arange(2, device="cpu").float(),
            torch.tensor(times, device="cpu")[:, None],
        )
        return torch.stack(posterior_memory(steps[:-1], steps[1:], rates, classes, schedule, times[0]), dim=1)


def _assemble(values: Tensor, labels: Tensor, gaussian: Tensor, classes: int) -> Tensor:
    """Return (B, d, h, w): continuous ``values`` in the Gaussian region, codes of ``labels`` elsewhere."""
    codes = _codes_on(classes, values.device).T.index_select(1, labels.flatten())
    codes = codes.view(-1, *labels.shape).transpose(0, 1)
    return torch.where(gaussian.unsqueeze(1), values, codes)


class Denoiser(nn.Module):
    """f_theta of Eq. 8 in one small body with two heads: the clean class of each pixel, and the noise of Eq. 4.

    ``cond_channels`` are those of the segmenter's features, ``width`` its own, ``depth`` residual blocks,
    ``timesteps`` T. ``more``: channels of each further map that it is conditioned on.
    """

    def __init__(
        self, num_classes: int, cond_channels: int, width: int, depth: int, timesteps: int, more: Sequence[int] = ()
    ) -> None:
        super().__init__()
        code_length = class_codes(num_classes).shape[1]
        self.timesteps, self.width = timesteps, width
        self.features = nn.Conv2d(cond_channels, width, 1)
        self.features_norm = _norm(width)
        self.logits = nn.Conv2d(num_classes, width, 1)
        self.entry = nn.Conv2d(code_length + 2, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * width * depth))
        self.norms = nn.ModuleList(_norm(width) for _ in range(depth))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.exit = _norm(width)
        self.class_head = nn.Conv2d(width, num_classes, 1)
        self.noise_head = nn.Conv2d(width, code_length, 1)
        self.more = nn.ModuleList(nn.Sequential(nn.Conv2d(inputs, width, 1), _norm(width)) for inputs in more)

    def prepare(self, features: Tensor, logits: Tensor, *more: Tensor) -> Tensor:
        """Return (B, width, h, w) conditioning, computed once for the whole chain; no gradient reaches the segmenter.

        ``features`` (B, cond_channels, ...) and ``more`` (B, ...) are brought to the grid of ``logits`` (B, C, h, w) if
        theirs is another.
        """
        seen = _on_grid(self.features_norm(self.features(features.detach())), logits)
        for project, x in zip(self.more, more, strict=True):
            seen = seen + _on_grid(project(x.detach()), logits)
        return seen + self.logits(logits.detach().float().softmax(dim=1))

    def forward(self, codes: Tensor, gaussian: Tensor, edges: Tensor, t: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, C, h, w) logits of the clean class and (B, d, h, w) noise, float32.

        ``codes`` (B, d, h, w), ``gaussian`` and ``edges`` (B, h, w) bool, ``t`` (B,) int64, ``cond`` from
        ``prepare``.
        """
        return self.denoise(codes, self.films(t), self.placed(cond, gaussian, edges))

    def placed(self, cond: Tensor, gaussian: Tensor, edges: Tensor) -> Tensor:
        """Add to ``cond`` the entry's features of the two regions, which are constant within a chain."""
        maps = torch.stack((gaussian, edges), dim=1).to(self.entry.weight.dtype)
        return cond + F.conv2d(maps, self.entry.weight[:, -2:], self.entry.bias, padding=1)

    def films(self, t: Tensor) -> Tensor:
        """Return (B, 2 * depth * width, 1, 1) scale and shift of each block at ``t`` (B,) int64."""
        return self.time(_sinusoids(t / self.timesteps, self.width))[:, :, None, None]

    def denoise(self, codes: Tensor, films: Tensor, placed: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``forward`` from the results of ``films`` and ``placed``; one row of ``films`` serves a batch."""
        x = placed + F.conv2d(codes, self.entry.weight[:, :-2], padding=1)
        parts = films.chunk(2 * len(self.convs), dim=1)
        for norm, conv, scale, shift in zip(self.norms, self.convs, parts[::2], parts[1::2], strict=True):
            assert isinstance(norm, nn.GroupNorm)
            x = torch.addcmul(x + shift, conv(norm_act(norm, x, "silu")), 1 + scale)
        with full_precision(x.device):
            x = norm_act(self.exit, x.float(), "silu", torch.float32)
            return self.class_head(x), self.noise_head(x)

    def chain(
        self, gaussian: Tensor, edges: Tensor, times: Tensor, cond: Tensor
    ) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        """Return ``forward`` of codes at the i-th of ``times`` (S,) int64; work that the steps share is done once."""
        films, placed = self.films(times), self.placed(cond, gaussian, edges)
        if _kernels(cond) and not torch.is_grad_enabled():
            return FoldedChain(self, films, placed)
        return lambda codes, i: self.denoise(codes, films[i : i + 1], placed)


def _on_grid(x: Tensor, logits: Tensor) -> Tensor:
    return x if x.shape[-2:] == logits.shape[-2:] else bilinear(x, logits.shape[-2:])


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(width, 8), width)


def _sinusoids(share: Tensor, width: int) -> Tensor:
    """Return (B, width) of sines and cosines of ``share`` (B,) in 0 ... 1, at frequencies from 1 to 1000 a unit."""
    rates = torch.logspace(0, 3, (width + 1) // 2, device=share.device)
    angles = share.float().unsqueeze(1) * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]


def reverse_times(timesteps: int, steps: int | None) -> list[int]:
    """Return the times that a refinement visits, evenly from T to 0: ``steps`` + 1 of them, T + 1 if ``steps`` is None.

    Raises ValueError unless 1 <= steps <= T.
    """
    steps = timesteps if steps is None else steps
    if not 1 <= steps <= timesteps:
        raise ValueError(f"refine_steps = {steps}: must be from 1 to timesteps = {timesteps}")
    return [timesteps - i * timesteps // steps for i in range(steps + 1)]


class Chained(Protocol):
    """The interface that ``refine`` needs of a denoiser; see ``Denoiser.chain``."""

    def chain(
        self, gaussian: Tensor, edges: Tensor, times: Tensor, cond: Tensor, /
    ) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]: ...


@torch.no_grad()
def refine(
    denoiser: Chained, cond: Tensor, soft: Tensor, tau: float, cfg: MixeConfig, noise: Tensor, uniforms: Tensor
) -> Tensor:
    """Return (B, C, h, w) logits of the clean class after the chain: corrupt ``soft`` at T, then undo it step by step.

    ``denoiser`` has the ``chain`` of a ``Denoiser``; ``cond`` as from its ``prepare``; ``soft`` (B, C, h, w)
    probabilities; ``noise`` (B, d, h, w) normal; ``uniforms`` (S, B, h, w) in [0, 1), the first for the corruption.
    Regions and edges are those of ``soft`` throughout. S = cfg.refine_steps or T. Raises ValueError if ``uniforms`` has
    another S.
    """
    times, classes = reverse_times(cfg.timesteps, cfg.refine_steps), soft.shape[1]
    if len(uniforms) != len(times) - 1:
        raise ValueError(
            f"uniforms has {len(uniforms)} entries on axis 0: must have one per reverse step, {len(times) - 1}"
        )
    signal = _alpha_bar_list(cfg.timesteps)
    state = corrupt(soft, cfg.timesteps, tau, cfg, noise=noise, uniform=uniforms[0])
    x, z = state.codes, state.labels
    denoise = denoiser.chain(state.gaussian, state.edges, send(torch.tensor(times[:-1]), soft.device), cond)
    lost = send(_memory_lost_at(cfg.beta, cfg.edge_bonus, classes, tuple(times), cfg.flip_schedule), soft.device)
    if _kernels(soft) and cfg.flips and cfg.gaussian and cfg.reverse == "posterior":
        return _in_kernels(denoise, state, times, lost, signal, uniforms.contiguous())
    edge_index = state.edges.flatten().long()
    memory = [part[:, edge_index].view(-1, len(soft), 1, *soft.shape[2:]) for part in lost.unbind(1)]
    for i, (t, t_prev) in enumerate(pairwise(times)):
        logits, noise_pred = denoise(x, i)
        if t_prev == 0:
            break
        if cfg.flips:
            probs = logits.float().softmax(dim=1)
            if cfg.reverse == "posterior":
                probs = posterior_of(z, probs, *(part[i] for part in memory))
            z = torch.where(state.gaussian, z, sample_classes(probs, uniforms[i + 1]))
        if cfg.gaussian:
            x, _ = ddim_step(x, noise_pred, t, signal, t_prev)
        x = _assemble(x, z, state.gaussian, classes)
    return logits


_tried: ContextVar[bool | None] = ContextVar("tried", default=None)
"""Whether the chain that is just being tried is in kernels."""


def _kernels(x: Tensor) -> bool:
    """Return whether a chain on the device of ``x`` is in kernels, which must agree with the loop there."""
    if (tried := _tried.get()) is not None:
        return tried
    return fused(x) and (stands_for_gpu(x) or _chain_agrees(x.device))


@lru_cache
def _chain_agrees(device: torch.device) -> bool:
    return kernels_agree(device, _example)


def _example(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits of a small chain in kernels, and of the loop; no generator's state changes."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), full_precision(device):
        torch.manual_seed(0)
        network, steps = Denoiser(5, 6, 8, 2, 4), 4
        given = [torch.randn(2, 8, 9, 7), (2 * torch.randn(2, 5, 9, 7)).softmax(1)]
        drawn = [torch.randn(2, network.noise_head.out_channels, 9, 7), torch.rand(steps, 2, 9, 7)]
        (cond, soft), (noise, uniforms) = ([x.to(device) for x in part] for part in (given, drawn))
        network, cfg, found = network.to(device), MixeConfig(timesteps=steps, beta=0.2, edge_bonus=0.3), []
        for kernels in (True, False):
            token = _tried.set(kernels)
            try:
                found.append([refine(network, cond, soft, 0.5, cfg, noise, uniforms)])
            finally:
                _tried.reset(token)
    return found[0], found[1]


def _in_kernels(
    denoise: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    state: Corrupted,
    times: list[int],
    lost: Tensor,
    signal: Sequence[float],
    uniforms: Tensor,
) -> Tensor:
    """Return what the loop of ``refine`` does, each step after the network in one kernel; ``lost`` (S, 3, 2)."""
    x, z, regions = state.codes.contiguous(), state.labels, (state.gaussian, state.edges)
    last = len(times) - 2
    for i, (t, t_prev) in enumerate(pairwise(times)):
        heads = denoise(x, i)
        if i == last:
            break
        codes = _codes_on(heads[0].shape[1], x.device)
        x, z = reverse_step(heads, (x, z), uniforms[i + 1], regions, (lost[i], codes), (signal[t], signal[t_prev]))
    return heads[0]
