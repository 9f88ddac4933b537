"""Workers that are started from a script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from viladiff.runs.config import RunConfig
from viladiff.training.launch import run_in_processes
{guard}run_in_processes(print, RunConfig(), 2)
"""


@pytest.mark.parametrize("guard", ["", pytest.param("if __name__ == '__main__': ", marks=pytest.mark.slow)])
def test_a_script_without_a_guard_is_told_to_have_one(guard: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard=guard))
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, check=False)
    said = found.stderr.splitlines()
    if guard:
        assert found.returncode == 0
        return
    assert found.returncode == 1 and found.stderr.count("Traceback") == 1
    assert said[-1].startswith("ValueError: runtime.workers = 2: each worker imports the script that started it")
    assert said[-1].endswith('put the call under if __name__ == "__main__": in the script')
