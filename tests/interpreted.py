"""Triton's kernels in its interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODELS = Path(__file__).with_name("models")


def check_kernels(program: str) -> None:
    """Run a program that compares kernels with torch, and prints ``kernels agree`` at its end.

    Triton's interpreter computes a kernel's program on the CPU; it is chosen before Triton is imported. The program may
    import modules of ``tests/models``.
    """
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(MODELS), *sys.path])}
    found = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=280)
    assert found.stdout.strip() == "kernels agree", found.stderr[-2000:]
