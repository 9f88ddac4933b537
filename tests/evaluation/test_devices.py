"""Seconds of counted work on the devices that are known."""

from __future__ import annotations

import pytest

from viladiff.evaluation.devices import CPU, DEVICES, device_called
from viladiff.evaluation.step_time import CORE, GPU, Load, arithmetic_seconds, step_seconds


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("cpu", "cpu"),
        ("NVIDIA T4", None),
    ],
)
def test_devices_are_known_by_what_their_driver_calls_them(called: str, name: str | None) -> None:
    assert device_called(called) is (DEVICES[name] if name else None)


def test_a_gpu_takes_the_longest_of_three_and_a_core_their_sum() -> None:
    h100 = DEVICES["h100"]
    tiny, moved = Load("other", False, 0, 8, 5), Load("other", False, 0, 10**9, 2)
    product = Load("product", True, 10**12, 10**6, 3)
    assert step_seconds([tiny], h100) == pytest.approx(5 * GPU.launch)
    assert step_seconds([moved], h100) == pytest.approx(2 * 10**9 / (GPU.bandwidth * h100.bandwidth))
    assert step_seconds([product], h100) == pytest.approx(3 * 10**12 / (h100.half * h100.sustained))
    assert arithmetic_seconds([product, moved], h100) == pytest.approx(3 * 10**12 / h100.half)
    whole = 3 * (CORE.launch + CORE.product * 10**12 + CORE.byte * 10**6)
    assert step_seconds([product], CPU) == pytest.approx(whole)


def test_precision_decides_the_rate() -> None:
    a100 = DEVICES["a100"]
    load = Load("product", False, 10**12, 0, 1)
    single, tf32 = step_seconds([load], a100), step_seconds([load], a100, tf32=True)
    assert single == pytest.approx(10**12 / (a100.single * GPU.single)) and single > 5 * tf32
    convolution = load._replace(kind="convolution")
    assert step_seconds([convolution], a100) == pytest.approx(single / GPU.convolution)
