"""Published settings of a table's methods by data set, and which of them the table's runs have.

Nothing here loads torch when it is imported; both functions do, since a method declares its published settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from viladiff.config.base import parse

if TYPE_CHECKING:
    from viladiff.methods.common.published import PublishedSetting


def published(values: Mapping[str, object]) -> list[PublishedSetting]:
    """Return the published settings of a run with these fields (dotted path to value), the rest at their defaults.

    Raises ConfigError for an unknown data set or method.
    """
    from viladiff.methods import METHODS
    from viladiff.runs.config import RunConfig, schema

    plain = RunConfig()
    dataset = str(values.get("data.dataset", plain.data.dataset))
    name = str(values.get("method.name", plain.method.name))
    known = schema(dataset, name)
    every = {path: info.default for path, info in known.items()}
    every |= {
        path: parse(value, known[path].annotation) if isinstance(value, str) else value
        for path, value in values.items()
        if path in known
    }
    return [setting for setting in METHODS[name].published if setting.holds(every)]


def protocols(values: Mapping[str, object]) -> list[PublishedSetting]:
    """Return what the publication has of the shared settings of such a run, likewise; a table's own go before them."""
    from viladiff.methods import METHODS

    return [setting for setting in METHODS[str(values["method.name"])].protocols if setting.holds(values)]


def published_fields(values: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of ``published``, by dotted path."""
    return {path: value for setting in published(values) for path, value in setting.fields.items()}
