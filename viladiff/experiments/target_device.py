"""The device that a plan is costed for."""

from __future__ import annotations

from collections.abc import Iterable

from viladiff.cluster.resources import visible_gpus
from viladiff.config.base import did_you_mean
from viladiff.data.sources import embedded_datasets
from viladiff.evaluation.devices import CPU, DEVICES, Device, device_called
from viladiff.runs.job import PlannedRun

USUAL = DEVICES["h100"]
"""What runs on photographs are costed for where nobody names a device and there is none here."""


def target_device(name: str | None, runs: Iterable[PlannedRun]) -> Device:
    """Return the device of ``--device``, else this machine's GPU, else ``USUAL`` for photographs and a CPU otherwise.

    Raises ValueError for an unknown name.
    """
    if name is not None:
        if name not in DEVICES:
            raise ValueError(f"--device {name}: unknown; allowed: {', '.join(DEVICES)}{did_you_mean(name, DEVICES)}")
        return DEVICES[name]
    found = None
    if visible_gpus():
        import torch

        found = device_called(torch.cuda.get_device_name())
    if found is not None:
        return found
    embedded = embedded_datasets()
    return CPU if all(run.changed.get("data.dataset", "digits") in embedded for run in runs) else USUAL
