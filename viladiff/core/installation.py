"""Directories of tables, sweeps and reports: those of a checkout or, after ``pip install viladiff``, the package's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent.parent


def checkout() -> Path | None:
    """Return the root of the checkout that the package is imported from; None for an installed wheel."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "ablations").is_dir() else None


def specs_dir(kind: Literal["ablations", "tune"]) -> Path:
    """Return the directory of the tables' (``ablations``) or of the sweeps' (``tune``) TOML files."""
    return (checkout() or _PACKAGE / "shipped") / kind


def reports_dir() -> Path:
    """Return the directory of pages: that of the checkout, else ``reports`` in the working directory."""
    return (checkout() or Path.cwd()) / "reports"


def published_dir() -> Path:
    """Return the directory of committed reports and records, which a wheel does not have."""
    return (checkout() or _PACKAGE / "shipped") / "reports" / "published"


def require_checkout(option: str) -> None:
    """Refuse an option that writes to committed files. Raises ValueError in an installed wheel."""
    if checkout() is None:
        raise ValueError(f"{option}: writes reports/published/ of a checkout; this viladiff is installed without one")
