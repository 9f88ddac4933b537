"""Commands in the documentation: each is parsed here; those that plan runs on the built-in data are planned (slow).

A fence ``sh`` holds commands for a shell. What belongs to other programs (docker, ray, pip) is not looked at.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from viladiff.cli import main, reproduce, sweeps, tables
from viladiff.cli.common import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```sh\n(.*?)^```", re.S | re.M)
PLANNED = ("train", "table", "sweep", "plan")


def commands() -> Iterator[tuple[str, list[str]]]:
    """Page and words of each command of this project."""
    for page in PAGES:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
                lexer.whitespace_split = True
                for operator, group in groupby(lexer, key=lambda word: set(word) <= set("();<>|&")):
                    words = list(group)
                    if not operator and words[0] in ("viladiff", "python", "make"):
                        yield page.name, words


ALL = [pytest.param(words, id=f"{page}: {' '.join(words)}") for page, words in commands()]


def test_there_are_commands() -> None:
    assert len(ALL) > 50


@pytest.mark.parametrize("words", ALL)
def test_a_documented_command_is_one(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        assert {word for word in rest if "=" not in word} <= targets
        return
    if program == "viladiff":
        parser = main.command_parser()
    else:
        path = ROOT / rest.pop(0)
        assert path.is_file()
        toml = path.with_suffix(".toml")
        table = path.parent / f"{path.stem.removeprefix('run_')}.toml"
        if path.parent.name == "ablations":
            parser = tables.table_parser(table, path.name)
        elif path.parent.name == "tune":
            parser = sweeps.sweep_parser(toml, path.name)
        elif path.name == "reproduce.py":
            parser = reproduce.reproduce_parser()
        else:
            return
    try:
        parse_arguments(parser, rest)
    except SystemExit as error:
        assert error.code == 0, f"{' '.join(words)}: not understood"


@pytest.mark.slow
@pytest.mark.parametrize("words", [one for one in ALL if one.values[0][:2] in [["viladiff", p] for p in PLANNED]])
def test_a_documented_plan_can_be_made(words: list[str], tmp_path: Path) -> None:
    if any(
        "data_root" in word or word.endswith("mine.toml") or word in ("paper", "strong", "resnet") for word in words
    ):
        pytest.skip("of files that are not here")
    if "--render" in words:
        pytest.skip("plans nothing")
    dry = [] if words[1] == "plan" or "--dry-run" in words else ["--dry-run"]
    at = words.index("--") if "--" in words else len(words)
    command = [sys.executable, "-m", "viladiff", *words[1:at], *dry, "--runs-dir", str(tmp_path), *words[at:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
