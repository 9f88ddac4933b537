"""docs/writing-a-method.md, followed to the letter in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "writing-a-method.md").read_text(encoding="utf-8")


def example() -> tuple[str, str, str, str]:
    """File, code, import and entry of the page's method."""
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    place = re.search(r"`(viladiff/methods/\w+\.py)`: cross-entropy", PAGE)
    added = re.search(r"Then `(from viladiff\.methods\.\w+ import \w+)` and `(\"\w+\": \w+)` in the table", PAGE)
    assert code and place and added
    return place.group(1), code.group(1), added.group(1), added.group(2)


def run(where: Path, *words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=where, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the page touches, copied."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("viladiff", "tests/golden"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/method_kit.py", "tests/methods/test_methods.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_example_is_short_and_tidy(tmp_path: Path) -> None:
    file, code, *_ = example()
    assert len(code.splitlines()) < 80
    path = tmp_path / Path(file).name
    path.write_text(code, encoding="utf-8")
    for command in (["check"], ["format", "--check"]):
        run(ROOT, "ruff", *command, "--config", str(ROOT / "pyproject.toml"), "--no-cache", str(path))


@pytest.mark.timeout(900)  # a busy machine
def test_page_followed_gives_a_method_that_keeps_the_contract_and_trains(checkout: Path) -> None:
    file, code, imported, entry = example()
    (checkout / file).write_text(code, encoding="utf-8")
    table = checkout / "viladiff" / "methods" / "__init__.py"
    text = table.read_text(encoding="utf-8")
    text = text.replace("\nMETHODS:", f"\n{imported}\n\nMETHODS:").replace("] = {\n", f"] = {{\n    {entry},\n", 1)
    table.write_text(text, encoding="utf-8")

    name = Path(file).stem
    before = {path.name: path.read_bytes() for path in (checkout / "tests/golden").iterdir()}
    chosen = f"{name} and not two_workers"  # starting processes would be most of this test's time
    out = run(checkout, "pytest", "tests/methods/test_methods.py", "-q", "-rs", "-k", chosen, VILADIFF_GOLDEN="write")
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed.group(1)) >= 12, out
    after = {path.name: path.read_bytes() for path in (checkout / "tests/golden").iterdir()}
    assert json.loads(after.pop(f"{name}.json"))["revision"] == 1
    assert after == before

    command = re.search(r"`viladiff (train method\.name=[^`]+)`", PAGE)
    assert command
    short = ["train.steps=2", "eval.max_images=2", "eval.boundary=false", f"runtime.runs_dir={checkout / 'runs'}"]
    run(checkout, "viladiff", *command.group(1).split(), *short)
    record = next((checkout / "runs").glob("*/record.json"))
    assert json.loads(record.read_text())["config"]["method.weight"] == 0.5
