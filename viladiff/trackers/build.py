"""The trackers that a configuration asks for."""

from __future__ import annotations

from viladiff.config.sections import RuntimeConfig
from viladiff.trackers.base import Callback
from viladiff.trackers.tensorboard import TensorBoard
from viladiff.trackers.weights_and_biases import WeightsAndBiases

TRACKERS: dict[str, type[Callback]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""By the field of ``runtime`` that asks for each."""


def asked_trackers(runtime: RuntimeConfig) -> list[Callback]:
    """Return a new tracker for each that the fields ask for."""
    return [tracker() for name, tracker in TRACKERS.items() if getattr(runtime, name)]
