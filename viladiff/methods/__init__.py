"""The table of methods. A method is one file, one import and one entry here, and its golden file under tests."""

from __future__ import annotations

from viladiff.methods.base import Method
from viladiff.methods.semibaseline import SemiBaseline
from viladiff.methods.supervised import Supervised
from viladiff.methods.viladiff import ViLaDiff

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "semibaseline": SemiBaseline,
    "viladiff": ViLaDiff,
}
