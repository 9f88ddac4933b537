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
