"""A copy of the package with some files changed, as somebody who adds a plug-in changes it, run in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def overlay(directory: Path, files: Mapping[str, str]) -> Path:
    """``directory`` with a package ``viladiff`` in it: links to this one's files, but for ``files``, text by path."""
    _link(ROOT / "viladiff", directory / "viladiff", {Path(name).parts: text for name, text in files.items()})
    return directory


def _link(source: Path, target: Path, files: Mapping[tuple[str, ...], str]) -> None:
    target.mkdir(parents=True)
    below = {parts[0] for parts in files}
    for entry in source.iterdir():
        if entry.name not in below and entry.name != "__pycache__":
            (target / entry.name).symlink_to(entry)
    for name in below:
        inner = {parts[1:]: text for parts, text in files.items() if parts[0] == name}
        if () in inner:
            (target / name).write_text(inner[()], encoding="utf-8")
        else:
            _link(source / name, target / name, inner)


def run_python(directory: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a script with the package in ``directory`` in place of this one."""
    check = "import pathlib, sys, viladiff\nassert str(pathlib.Path(viladiff.__file__).parents[1]) == sys.argv.pop(1)\n"
    environment = {**os.environ, "PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", check + script, str(directory), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=directory, check=False)


def replaced(path: str, *pairs: tuple[str, str]) -> str:
    """The text of a file of the package with each first text, which stands in it once, in place of the second."""
    text = (ROOT / "viladiff" / path).read_text(encoding="utf-8")
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text
