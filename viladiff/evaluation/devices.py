"""Devices that runs are costed for: what their makers state, and what a rented one costs.

Peaks are of dense products with sums in float32, as NVIDIA states them in the data sheets of A100, H100, H200 and L40S
and in the white papers of the architectures GA102 (RTX 3090), AD102 (RTX 4090) and GB202 (RTX 5090). Prices, in US
dollars an hour for one rented GPU, are assumptions and no offer of anybody; ``--hourly-price`` replaces them.
"""

from __future__ import annotations

from typing import NamedTuple

MIB, TERA = 2**20, 1e12


class Device(NamedTuple):
    """A device that trains one run at a time."""

    name: str
    """As on the command line."""
    called: tuple[str, ...]
    """What its maker's driver calls it contains one of these; empty for a processor."""
    sustained: float
    """Share of ``half`` and ``tf32`` that large products get, by published throughputs (docs/performance.md)."""
    half: float
    """Peak of bf16, FLOP/s."""
    tf32: float
    single: float
    """Peak of fp32 without TF32, FLOP/s."""
    bandwidth: float
    """Of its memory, bytes/s."""
    memory: int
    """Bytes; 0 for a processor, whose memory all runs share."""
    price: float | None
    """US dollars an hour; None where it is this machine."""


CPU = Device("cpu", (), 1.0, 0.0, 0.0, 0.0, 0.0, 0, None)
"""One core; its rates are measured (``viladiff.evaluation.step_time``)."""

_SMALL = ("A100-SXM4-40GB", "A100-PCIE-40GB")
DEVICES = {
    device.name: device
    for device in (
        CPU,
        Device("h200", ("H200",), 0.5, 989 * TERA, 494 * TERA, 67 * TERA, 4.8 * TERA, 143_771 * MIB, 3.5),
        Device("h100", ("H100",), 0.5, 989 * TERA, 494 * TERA, 67 * TERA, 3.35 * TERA, 81_559 * MIB, 3.0),
        Device("a100", ("A100",), 0.5, 312 * TERA, 156 * TERA, 19.5 * TERA, 2.039 * TERA, 81_920 * MIB, 1.8),
        Device("a100-40gb", _SMALL, 0.5, 312 * TERA, 156 * TERA, 19.5 * TERA, 1.555 * TERA, 40_960 * MIB, 1.3),
        Device("l40s", ("L40S",), 0.5, 362 * TERA, 183 * TERA, 91.6 * TERA, 0.864 * TERA, 46_068 * MIB, 1.0),
        Device(
            "rtx5090", ("RTX 5090",), 0.95, 209.5 * TERA, 104.8 * TERA, 104.8 * TERA, 1.792 * TERA, 32_607 * MIB, 0.7
        ),
        Device(
            "rtx4090", ("RTX 4090",), 0.95, 165.2 * TERA, 82.6 * TERA, 82.6 * TERA, 1.008 * TERA, 24_564 * MIB, 0.45
        ),
        Device("rtx3090", ("RTX 3090",), 0.95, 71 * TERA, 35.6 * TERA, 35.6 * TERA, 0.936 * TERA, 24_576 * MIB, 0.25),
    )
}


def device_called(name: str) -> Device | None:
    """Return the device that a record or a driver names, as ``NVIDIA H100 80GB HBM3``; None if it is not known."""
    if name == "cpu":
        return CPU
    fits = [(len(part), device) for device in DEVICES.values() for part in device.called if part in name]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None
