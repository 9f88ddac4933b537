"""The result of one check of a machine or a file, with its fix."""

from __future__ import annotations

from typing import NamedTuple


class Check(NamedTuple):
    """One line of the report; ``remedy`` is empty where all is well."""

    name: str
    found: str
    remedy: str = ""
    broken: bool = False
    """Whether training cannot work; otherwise a remedy is advice."""
