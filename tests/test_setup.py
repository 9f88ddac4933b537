"""What ``make setup`` installs: the versions of constraints.txt where it was made, elsewhere the newest, said."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from viladiff.cluster.session import OLDEST

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
MADE = "3.11 Linux x86_64"
SHIM = f"""#!/bin/bash
case "$*" in
"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip"*) echo "$*" >>pip.log; echo "Collecting torch>=2.11 (from viladiff)"; [ -z "$BROKEN" ] ;;
*platform*) echo "$HERE" ;;
"-c import pydantic"*) ;;
*) exec {sys.executable} "$@" ;;
esac
"""


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_are_exact_versions_and_name_every_dependency() -> None:
    lines = [line for line in CONSTRAINTS.splitlines() if not line.startswith("#")]
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!]+", line)]
    assert not wrong, "a name and a version, no host, path or option"
    names = [plain(line.partition("==")[0]) for line in lines]
    assert len(set(names)) == len(names) and "viladiff" not in names
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {plain(re.split(r"[^A-Za-z0-9._-]", one)[0]) for one in asked} <= set(names)
    assert not re.search(r"://|index|/", CONSTRAINTS)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(SHIM)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def setup(checkout: Path, status: int = 0, **given: str) -> tuple[str, list[str]]:
    """What it says, and how pip was called since the last time."""
    environment = {name: value for name, value in os.environ.items() if name != "CONSTRAINTS"}
    environment |= {"PYTHON": str(checkout / "python"), "HERE": MADE, "VILADIFF_SETUP_GB": "1", "BROKEN": "", **given}
    done = subprocess.run(["bash", "scripts/setup.sh"], cwd=checkout, capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    log = checkout / "pip.log"
    calls = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return done.stdout + done.stderr, calls


def test_the_versions_of_the_file_are_installed_once(checkout: Path) -> None:
    said, (call,) = setup(checkout)
    assert "-c constraints.txt -e .[dev]" in call and "newest" not in said
    assert setup(checkout) == ("", []), "nothing to do"
    with (checkout / "constraints.txt").open("a") as file:
        file.write("another==1\n")
    assert len(setup(checkout)[1]) == 1, "other versions are another installation"


def test_elsewhere_the_newest_are_installed_and_that_is_said(checkout: Path) -> None:
    said, (call,) = setup(checkout, HERE="3.13 Darwin arm64")
    assert "-c" not in call.split() and "is of Python 3.11 Linux x86_64, here is 3.13 Darwin arm64" in said
    assert setup(checkout, HERE="3.13 Darwin arm64") == ("", [])
    _, (call,) = setup(checkout, HERE="3.13 Darwin arm64", CONSTRAINTS="constraints.txt")
    assert "-c constraints.txt" in call


def test_constraints_can_be_left_out_or_be_others(checkout: Path) -> None:
    _, (call,) = setup(checkout, CONSTRAINTS="none")
    assert "-c" not in call.split()
    assert setup(checkout) == ("", []), "what was chosen stays until something else is asked for"
    assert "no such file" in setup(checkout, 1, CONSTRAINTS="mine.txt")[0]
    (checkout / "mine.txt").write_text("torch==2.11.0\n")
    _, (call,) = setup(checkout, CONSTRAINTS="mine.txt")
    assert "-c mine.txt" in call
    assert "CONSTRAINTS=none takes the newest" in setup(checkout, 1, CONSTRAINTS="constraints.txt", BROKEN="1")[0]


def test_another_index_of_torch_is_searched_beside_the_usual_one(checkout: Path) -> None:
    _, (call,) = setup(checkout, TORCH_INDEX="file:///wheels")
    assert "-c constraints.txt --extra-index-url file:///wheels -e .[dev]" in call
    assert setup(checkout, TORCH_INDEX="file:///other") == ("", []), "what is installed stays"


def test_tools_that_only_some_systems_have_are_not_needed(checkout: Path) -> None:
    """sha256sum, and sed with unbuffered output, are missing on older macOS."""
    tools = checkout / "tools"
    tools.mkdir()
    for name, text in (
        ("sha256sum", "exit 127"),
        ("sed", f'case "$1" in -*u*) exit 1 ;; esac; exec {shutil.which("sed")} "$@"'),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    said, _ = setup(checkout, PATH=path)
    assert "  fetching torch\n" in said and "setup: done" in said
    assert setup(checkout, PATH=path) == ("", [])
    assert "  fetching" in setup(checkout, PATH=path, CONSTRAINTS="none")[0], "another choice is another installation"


# The bounds of pyproject.toml

EXTRAS = ("captions", "coco", "trackers", "onnx", "sweeps")
"""Those whose packages the code uses; of tools and of a package of one file any version will do."""


def bounded() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for name in EXTRAS for text in project["optional-dependencies"][name]]
    return [Requirement(text) for text in [*project["dependencies"], *extras]]


@pytest.mark.parametrize("one", bounded(), ids=lambda one: one.name)
def test_each_dependency_has_both_bounds_and_the_pinned_version_between_them(one: Requirement) -> None:
    signs = sorted(part.operator for part in one.specifier)
    assert signs == ["<", ">="], "a lower bound that make test-lowest tests, and an upper one"
    pins = dict(line.split("==") for line in CONSTRAINTS.splitlines() if "==" in line)
    pinned = {plain(name): version for name, version in pins.items()}.get(plain(one.name))
    assert pinned is None or one.specifier.contains(pinned), f"constraints.txt has {pinned}"
    assert pinned is not None or one.name == "accelerate"


def test_the_lower_bounds_are_what_the_code_asks_for() -> None:
    lower = {one.name: next(part.version for part in one.specifier if part.operator == ">=") for one in bounded()}
    assert lower["ray"] == ".".join(map(str, OLDEST)), "the release that requires a token"
    assert 'torch.__version__.split(".")[:2]) >= (2, 12)' in (ROOT / "viladiff" / "cli" / "doctor.py").read_text()
    assert lower["torch"] == "2.12"


VERSIONS = """#!/bin/bash
echo "$*" >>uv.log
case "$*" in
"-m venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
"-c import uv"*) exit 1 ;;
"-m uv pip compile"*) [ "$BROKEN" != compile ] ;;
"-m pytest"*) [ "$BROKEN" != tests ] ;;
*) exit 0 ;;
esac
"""


@pytest.mark.parametrize(
    ("words", "broken", "status", "says", "calls"),
    [
        (["lowest"], "", 0, "into .venv-lowest", ["--resolution lowest-direct", "-m pip install .*uv", "-m pytest"]),
        (["newest"], "", 0, "into .venv-newest", ["--resolution highest .*--upgrade", "-m pytest"]),
        (["lowest"], "compile", 1, "no versions fit the bounds", []),
        (["lowest"], "tests", 1, "", ["-m pytest"]),
        (["oldest"], "", 1, "got 'oldest'; write lowest or newest", []),
    ],
)
def test_bounds_are_tested_in_environments_of_their_own(
    checkout: Path, words: list[str], broken: str, status: int, says: str, calls: list[str]
) -> None:
    shutil.copy(ROOT / "scripts" / "test_versions.sh", checkout / "scripts")
    (checkout / "python").write_text(VERSIONS)
    environment = os.environ | {"PYTHON": str(checkout / "python"), "BROKEN": broken, "COMMANDS": "no"}
    script = ["bash", "scripts/test_versions.sh", *words]
    done = subprocess.run(script, cwd=checkout, capture_output=True, text=True, env=environment)
    log = (checkout / "uv.log").read_text() if (checkout / "uv.log").exists() else ""
    assert done.returncode == status and says in done.stdout + done.stderr, done.stdout + done.stderr
    assert all(re.search(call, log) for call in calls), log
    assert not (checkout / ".venv").exists(), "what make setup makes is left alone"


def test_the_tests_of_the_bounds_exist() -> None:
    text = (ROOT / "scripts" / "test_versions.sh").read_text(encoding="utf-8")
    named = re.findall(r"tests/[\w/.:]+", text.partition("tests=(")[2].partition(")")[0])
    assert len(named) > 10 and [name for name in named if not (ROOT / name.partition("::")[0]).exists()] == []
