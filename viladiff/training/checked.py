"""Results of ``viladiff.training.feasibility``, stored in the cache folder, one for each distinct combination.

Reading them loads no torch. A result holds for one state of the code and of the packages that build networks.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from viladiff.core.atomic import write_atomically
from viladiff.core.hashing import sha256_hex
from viladiff.core.source_digest import code_digest
from viladiff.data.cache import cache_dir
from viladiff.data.sources import embedded_datasets
from viladiff.runs.job import DataFacts

ENOUGH = 2
"""Unlabelled images from which on their number makes no difference to whether a method can work with them."""
_DECISIVE = ("data.crop", "data.cutmix_grid", "data.captions", "data.batch_labelled", "data.batch_unlabelled")
_ALSO = ("train.grad_accum_steps", "eval.protocol", "data.channels", "data.bands")
_VALUES = ("model.weights", "model.pretrained", "model.encoder_frozen")
"""Fields of the model that leave every shape as it is."""
_TESTED = (
    "train.grad_accum_steps",
    "data.batch_labelled",
    "data.batch_unlabelled",
    "data.captions",
    "model.drop_path",
    *_VALUES,
)
"""Fields with which runs on built-in data are still such as the package's own tests train."""
_PACKAGES = ("torch", "timm", "transformers")


def usual(changed: Mapping[str, Any], workers: int, data: DataFacts) -> bool:
    """Return whether the package's own tests train such networks: on built-in data with its encoder and crop.

    changed: fields that differ from their defaults, by dotted path, as ``RunRecord.changed``.
    """
    shapes = [path for path in changed if path.startswith("model.") or path in (*_DECISIVE, *_ALSO)]
    other = any(path not in _TESTED for path in shapes)
    embedded = changed.get("data.dataset") in embedded_datasets()
    return embedded and not other and workers == 1 and data.captions and data.unlabelled >= ENOUGH


def shares_statistics(workers: int, device: str) -> bool:
    """Return whether BatchNorm of a run takes the images of all its workers: several of them, on GPUs.

    device: ``runtime.device``; ``cuda`` is believed, also on a machine that has none and only plans.
    """
    if workers == 1 or device == "cpu":
        return False
    if device == "cuda":
        return True
    import torch

    return torch.cuda.is_available()


def state_of_code(without: Collection[str] = ()) -> str:
    """Return 12 hex digits that name the sources, but those of folders ``without``, and the packages' versions."""
    packages = [_version(name) for name in _PACKAGES]
    return sha256_hex(json.dumps([code_digest(without), packages]))[:12]


class Checked:
    """The stored results of this state of the code."""

    def __init__(self, root: Path | None = None) -> None:
        self.folder = (cache_dir() if root is None else root) / "checked" / state_of_code()

    def key(self, changed: Mapping[str, Any], workers: int, data: DataFacts, shared: bool = False) -> str | None:
        """Return the name of a run's result; None where a directory outside the package makes the network.

        shared: ``shares_statistics`` of the run.
        """
        if changed.get("model.encoder") == "transformers":
            return None
        parts = ("method.", "model.")
        fields = {
            path: value
            for path, value in changed.items()
            if path not in _VALUES and (path.startswith(parts) or path in ("data.dataset", *_DECISIVE, *_ALSO))
        }
        facts = [data.classes, min(data.unlabelled, ENOUGH), data.captions, data.picture]
        return sha256_hex(json.dumps([fields, workers, shared, facts], sort_keys=True))[:24]

    def find(self, key: str | None) -> list[str] | None:
        """Return the faults that were found; None where nothing is stored, or it is damaged."""
        if key is None:
            return None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            found = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))["faults"]
            if isinstance(found, list) and all(isinstance(one, str) for one in found):
                return found
        return None

    def keep(self, key: str | None, faults: list[str]) -> None:
        """Store a result; where that is impossible the next start checks again."""
        if key is not None:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self.folder / f"{key}.json", json.dumps({"faults": faults}).encode())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
