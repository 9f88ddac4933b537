"""The help of every command, pinned as text, and plain words in help and raised errors.

VILADIFF_HELP=write pins the present help anew.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from viladiff.cli import main, reproduce, sweeps, tables

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").is_file())
PINNED = ROOT / "tests" / "cli" / "help.txt"
WRITE = os.environ.get("VILADIFF_HELP") == "write"
IDIOMS = re.compile(
    r"\b("
    r"mend|anew|likewise|at work|begins? so|say(s|ing)? so|(goes|go|went|going) on\b(?! (a|the|this) )|"
    r"leav(e|es|ing) (it |them )?(out|alone)|left out|set(s)? aside|looks? at|in the way|way round|worth a look|"
    r"deal (the|more)|on the spot|sign of life|bring it back|went another way|another matter|take none"
    r")\b",
    re.IGNORECASE,
)
"""Idioms where a technical word exists: resume, skip, archive, locked, fix, retrain, and so on."""
COMMANDS = (
    "",
    *("train", "evaluate", "predict", "export", "config", "methods", "table", "plan", "sweep", "doctor"),
    *("caption", "embed", "data", "data check", "data split", "data coco-masks", "data render", "data pictures"),
    *("runs", "runs list", "runs show", "runs diff", "runs verify", "runs gc", "runs export", "runs import"),
)


def help_text(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main.main([*command.split(), "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def pages(capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[str, str]]:
    for command in COMMANDS:
        yield f"viladiff {command}".strip(), help_text(command, capsys)
    scripts: dict[str, argparse.ArgumentParser] = {
        "ablations/run_table5.py": tables.table_parser(ROOT / "ablations" / "table5.toml", "run_table5.py"),
        "tune/sweep_lambda.py": sweeps.sweep_parser(ROOT / "tune" / "sweep_lambda.toml", "sweep_lambda.py"),
        "scripts/reproduce.py": reproduce.reproduce_parser(),
    }
    for name, parser in scripts.items():
        yield name, parser.format_help()


def test_help_is_as_pinned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = "\n".join(f"$ {name} --help\n\n{page}" for name, page in pages(capsys))
    if WRITE:
        PINNED.write_text(text, encoding="utf-8")
    assert text == PINNED.read_text(encoding="utf-8"), "VILADIFF_HELP=write pins the help anew"


def test_every_command_is_pinned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    listed = {command: _subcommands(help_text(command, capsys)) for command in ("", "data", "runs")}
    names = {name if not command else f"{command} {name}" for command, found in listed.items() for name in found}
    assert names == set(COMMANDS) - {""}


def _subcommands(text: str) -> list[str]:
    block = re.split(r"\n(?:commands|actions):\n", text)[1].split("\n\n")[0]
    return [line.split()[0] for line in block.splitlines() if re.match(r" {4}[a-z]", line)]


def test_help_has_no_idioms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    found = [(name, match[0]) for name, page in pages(capsys) for match in IDIOMS.finditer(" ".join(page.split()))]
    assert found == []


def test_every_option_has_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for name, page in pages(capsys):
        lines = [*page.splitlines(), ""]
        for line, below in pairwise(lines):
            if line.startswith("  -"):
                assert "  " in line.strip() or below.startswith(" " * 10), f"{name}: {line.strip()}"


def raised(path: Path) -> Iterator[tuple[int, str]]:
    """String literals of the raise statements of a file, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def test_raised_texts_have_no_idioms() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r} in {text!r}"
        for path in sorted((ROOT / "viladiff").rglob("*.py"))
        for line, text in raised(path)
        for match in IDIOMS.finditer(text)
    ]
    assert found == [], "\n".join(found)
