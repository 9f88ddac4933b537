"""Tests run on one thread without a network, and keep rendered data beside pytest's own cache."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VILADIFF_CACHE", str(ROOT / ".pytest_cache" / "viladiff"))


@pytest.fixture
def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def load_module(path: Path) -> ModuleType:
    """A file of Python that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def photographs() -> ModuleType:
    """The module tests/photographs.py."""
    return load_module(ROOT / "tests" / "photographs.py")


@pytest.fixture(scope="session")
def sweeping() -> ModuleType:
    """The module tests/sweeping.py."""
    return load_module(ROOT / "tests" / "sweeping.py")


PRINTS: dict[object, Any] = {}


@pytest.fixture
def prints_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What data, words and weights are called is worked out once for all sweeps; it takes a second each time."""
    from viladiff.sweeps.spec import SweepPlanner

    plain = SweepPlanner.__init__

    def made(self: SweepPlanner, *given: Any, **words: Any) -> None:
        plain(self, *given, **words)
        self._prints = PRINTS

    monkeypatch.setattr(SweepPlanner, "__init__", made)


@pytest.fixture
def photo_folder(photographs: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """Writes n photographs with masks and lists below the test's directory: ``photo_folder(n, "voc", labelled=3)``."""

    def write(n: int, layout: str = "folder", *, root: str = "photos", **options: object) -> Path:
        return Path(photographs.write(tmp_path / root, n, layout, **options))

    return write
