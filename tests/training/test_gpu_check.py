"""The script that times steps on a GPU, run on whatever is here with small networks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "gpu_check.sh"


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    given = ["bash", str(SCRIPT), "--tiny", "--scales", "paper", "--how", "eager", *options]
    return subprocess.run(given, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_the_table_has_a_row_a_cell_and_a_cell_that_fails_says_why(tmp_path: Path) -> None:
    done = run(tmp_path, "--seconds", "250", "--methods", "supervised", "viladif")
    head, _, good, bad = (tmp_path / "gpu_check.md").read_text(encoding="utf-8").splitlines()
    assert done.stdout.splitlines()[0] == head and head.startswith("| method | scale | how | ms a step |")
    cells = [cell.strip() for cell in good.strip("|").split("|")]
    assert cells[:3] == ["supervised", "paper", "eager"] and float(cells[3]) > 0
    assert cells[4:6] == ["-", "-"] and 0 <= float(cells[6]) <= 100 and cells[7] == "-", "a CPU has neither"
    assert bad.startswith("| viladif | paper | eager | - |") and "method.name = 'viladif'" in bad
    assert done.returncode == 1
