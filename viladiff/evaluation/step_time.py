"""Estimated time of counted operations on a device; no torch, so that a plan is costed without it.

A GPU takes for each operation the longest of three: starting its kernel, its arithmetic, and moving its bytes. A core
of a processor takes the sum of the three. Rates are shares of a GPU's peaks and measured figures of a core;
docs/performance.md has how they were fitted and how far they are off.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from viladiff.evaluation.devices import CPU, Device

ERROR = 0.55
"""Share by which an estimate may be off: the largest of a method that the fit had not seen, docs/performance.md."""
Kind = Literal["product", "convolution", "attention", "other"]


class Load(NamedTuple):
    """Equal operations: what each of them asks of a device."""

    kind: Kind
    half: bool
    """Whether it computes in bf16 or fp16."""
    flops: int
    bytes: int
    times: int
    """How many of them; each starts a kernel."""


class GpuShares(NamedTuple):
    """What eager PyTorch gets of a GPU's peaks."""

    single: float
    """Of fp32, by products."""
    convolution: float
    """Of what products get; likewise."""
    attention: float
    bandwidth: float
    launch: float
    """Seconds a kernel at least, on the host or on the device."""


class CoreRates(NamedTuple):
    """Seconds that one core of a processor takes."""

    product: float
    """A FLOP of a matrix product in fp32."""
    convolution: float
    attention: float
    byte: float
    launch: float
    """An operation, before it computes anything."""


GPU = GpuShares(single=0.7, convolution=0.6, attention=0.6, bandwidth=0.85, launch=4e-6)
CORE = CoreRates(product=3.2e-12, convolution=1.21e-11, attention=4.6e-11, byte=8.8e-11, launch=4.8e-5)
"""Of one core of an AMD EPYC (family 25, model 17), fitted to all steps of benchmarks/step_times.json."""


def step_seconds(loads: Iterable[Load], device: Device, tf32: bool = False) -> float:
    """Return the estimated seconds of a step's operations on one device."""
    if device is CPU:
        return sum(load.times * _core(load) for load in loads)
    return sum(load.times * _gpu(load, device, tf32) for load in loads)


def arithmetic_seconds(loads: Iterable[Load], device: Device, tf32: bool = False) -> float:
    """Return the seconds of the arithmetic alone at the GPU's peak: the limit that no implementation passes."""
    return sum(load.times * load.flops / _peak(load, device, tf32) for load in loads)


def _peak(load: Load, device: Device, tf32: bool) -> float:
    return device.half if load.half else device.tf32 if tf32 else device.single


def _gpu(load: Load, device: Device, tf32: bool) -> float:
    share = device.sustained if load.half or tf32 else GPU.single
    share *= 1.0 if load.kind in ("product", "other") else getattr(GPU, load.kind)
    arithmetic = load.flops / (share * _peak(load, device, tf32))
    return max(GPU.launch, arithmetic, load.bytes / (GPU.bandwidth * device.bandwidth))


def _core(load: Load) -> float:
    rate = 0.0 if load.kind == "other" else getattr(CORE, load.kind)
    return CORE.launch + rate * load.flops + CORE.byte * load.bytes
