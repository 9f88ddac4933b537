"""Tests run on one thread without a network, and keep rendered data beside pytest's own cache."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VILADIFF_CACHE", str(ROOT / ".pytest_cache" / "viladiff"))
