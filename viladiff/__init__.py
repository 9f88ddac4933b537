"""The public interface: ``fit``, ``override``, ``Segmenter``, ``table``; torch is loaded at first use of a name.

>>> import viladiff
>>> cfg = viladiff.override(viladiff.RunConfig(), {"method.name": "viladiff", "data.split": "183"})
>>> result = viladiff.fit(cfg)  # doctest: +SKIP
>>> segmenter = viladiff.Segmenter.from_pretrained(result.directory)  # doctest: +SKIP
>>> labels, confidence = segmenter.predict("photograph.jpg")  # doctest: +SKIP
>>> viladiff.table(5)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viladiff.experiments.tables import table
    from viladiff.inference.pretrained import Segmenter, load_model
    from viladiff.runs.config import RunConfig, override
    from viladiff.trackers.base import Callback
    from viladiff.training.trainer import fit

__version__ = "0.1.0"
__all__ = ["Callback", "RunConfig", "Segmenter", "__version__", "fit", "load_model", "override", "table"]

_LAZY = {
    "Callback": "viladiff.trackers.base",
    "RunConfig": "viladiff.runs.config",
    "override": "viladiff.runs.config",
    "fit": "viladiff.training.trainer",
    "Segmenter": "viladiff.inference.pretrained",
    "load_model": "viladiff.inference.pretrained",
    "table": "viladiff.experiments.tables",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'viladiff' has no attribute {name!r}; it has {', '.join(__all__)}")
