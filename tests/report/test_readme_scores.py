"""The scores in the README are those of the published Table 5."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def published(row: str) -> str:
    """Mean and deviation of three seeds at 183 labels."""
    table = (ROOT / "reports" / "published" / "table5" / "table.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.startswith(f"| {row} |"))
    (found, *_) = re.findall(r"\| ([\d.]+ ± [\d.]+) \(3\) \|", line)
    return found


def test_the_rows_of_its_table() -> None:
    rows = {"supervised`)": "a", "semibaseline`)": "1", "baseline + ViLa": "4", "viladiff`)": "8"}
    for name, row in rows.items():
        assert f"{name} | {published(row)} |" in README


def test_the_differences_and_controls_in_its_text() -> None:
    base, vila, whole = (float(published(row).split()[0]) for row in ("1", "4", "8"))
    (gain,) = re.findall(r"ViLa gains ([\d.]+) points", README)
    assert abs(float(gain) - (vila - base)) < 0.06 and "MixE gains nothing" in README and whole <= vila
    assert f"without captions ViLaDiff has {published('d')}," in README
    assert f"in place of the diffusion {published('f')}." in README
