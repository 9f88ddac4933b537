"""Settings of a method's publication by data set and list, as data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

NOTHING: Mapping[str, object] = MappingProxyType({})


class PublishedSetting(NamedTuple):
    """Fields that a publication sets for some data sets; of two that hold for a run, the later one goes first."""

    datasets: tuple[str, ...]
    """Values of ``data.dataset`` that it holds for."""
    fields: Mapping[str, object]
    """Dotted path to value."""
    source: str
    """Paper, or repository and commit, that says so."""
    splits: tuple[str, ...] = ()
    """Values of ``data.split``; empty for all."""
    families: tuple[str, ...] = ()
    """Values of ``data.split_family``; empty for all."""
    given: Mapping[str, object] = NOTHING
    """Other fields, by dotted path, and the values that they must have."""
    not_available: str = ""
    """What the publication also has there and no field here gives."""

    def holds(self, values: Mapping[str, object]) -> bool:
        """Return whether it applies to a run with these fields (dotted path to value)."""
        wanted = {"data.dataset": self.datasets, "data.split": self.splits, "data.split_family": self.families}
        listed = all(not allowed or values.get(path) in allowed for path, allowed in wanted.items())
        return listed and all(values.get(path) == value for path, value in self.given.items())


def sgd(lr: float, head: float | None = None) -> dict[str, object]:
    """Return the fields of SGD at a rate of the encoder, whose ``head``-fold the rest has; None where that is open."""
    return {"optim.name": "sgd", **_rates(lr, head)}


def adamw(lr: float, head: float) -> dict[str, object]:
    """Return the fields of AdamW, likewise."""
    return {"optim.name": "adamw", **_rates(lr, head)}


def _rates(lr: float, head: float | None) -> dict[str, object]:
    if head is None:
        return {"optim.lr": lr}
    # Rounded, so that 5e-6 times 40 is the 0.0002 that a table writes.
    return {"optim.lr": round(lr * head, 12), "optim.encoder_lr_scale": round(1 / head, 12)}


def protocol(
    datasets: tuple[str, ...],
    source: str,
    crop: int,
    epochs: float | None = None,
    batch: int | None = None,
    rates: Mapping[str, object] = NOTHING,
) -> PublishedSetting:
    """Return what a publication has of the settings that all rows of a table share; ``batch``: labelled, in total.

    No scale applies them: a page says where they differ from its protocol.
    """
    fields = {"data.crop": crop, "train.epochs": epochs, "data.batch_labelled": batch, **rates}
    return PublishedSetting(datasets, {path: value for path, value in fields.items() if value is not None}, source)
