"""Pages under docs name functions, tests, fields and modules; a page that has gone stale fails here."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache, reduce
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from viladiff.data.sources import DATASETS
from viladiff.methods import METHODS
from viladiff.runs.config import RunConfig, flatten, override, schema

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NOTES = (ROOT / "docs" / "paper-notes.md").read_text(encoding="utf-8")
OURS = override(RunConfig(), {"method.name": "viladiff", "data.dataset": "voc", "data.split": "183"})
FIELD = r"(?:seed|(?:data|method|model|optim|train|eval|runtime)\.[a-z_.]+)"


@cache
def every_field() -> frozenset[str]:
    return frozenset(path for data in DATASETS for method in METHODS for path in schema(data, method))


def functions(text: str) -> set[tuple[str, str]]:
    """(file, dotted name) of each `path.py:name`."""
    return set(re.findall(r"`([\w/]+\.py):([\w.]+)`", text))


def fields(text: str) -> set[str]:
    """Dotted paths in backticks, alone or set to a value."""
    return set(re.findall(rf"`({FIELD})(?:=[^`\s]*)?`", text))


def exists(file: str, name: str) -> bool:
    if file.startswith("tests/"):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        return name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    module = importlib.import_module("viladiff." + file.removesuffix(".py").replace("/", "."))
    return callable(reduce(getattr, name.split("."), module))


def modules() -> dict[str, Path]:
    """File of each module by its name inside the package."""
    package = ROOT / "viladiff"
    paths = [path for path in package.rglob("*.py") if not path.stem.startswith("__")]
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in paths}


def rows() -> dict[str, tuple[str, str]]:
    """field: (default, alternatives) of every row of the tables of choices."""
    found = re.findall(rf"^\| `({FIELD})` \| (.*?) \| (.*?) \|", NOTES, re.MULTILINE)
    return {field: (default, others) for field, default, others in found}


def written(value: object) -> str:
    """A value as the table writes it."""
    if isinstance(value, tuple):
        return ", ".join(map(written, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_function_and_field_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = []
    for file, name in sorted(functions(text)):
        try:
            found = exists(file, name)
        except (AttributeError, ImportError, OSError):
            found = False
        missing += [] if found else [f"{file}:{name}"]
    assert missing == []
    assert sorted(fields(text) - every_field() - set(modules())) == []


PACKAGES = sorted({path.parent.name for path in (ROOT / "viladiff").glob("*/__init__.py")} | {"losses"})
DOTTED = rf"`(?:viladiff\.)?((?:{'|'.join(PACKAGES)})(?!\.(?:py|yaml|json)`)(?:\.\w+)+)(?:\(\))?`"


def is_defined(dotted: str) -> bool:
    """Whether ``runs.store`` is a module or folder, or ``runs.store.Store`` a name that a module defines."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        place = (ROOT / "viladiff").joinpath(*parts[:length])
        if place.is_dir():
            return length == len(parts)
        if place.with_suffix(".py").is_file():
            tree = ast.parse(place.with_suffix(".py").read_text(encoding="utf-8"))
            names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
            names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            return set(parts[length:]) <= names
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(DOTTED, page.read_text(encoding="utf-8")))
    assert sorted(name for name in named - every_field() if not is_defined(name)) == []


def test_the_test_of_names_can_fail() -> None:
    assert is_defined("runs.store") and is_defined("runs.store.Store") and is_defined("data.files")
    assert not is_defined("runs.stores") and not is_defined("runs.store.Shop")


def test_notes_name_enough_to_be_worth_checking() -> None:
    assert len(functions(NOTES)) > 50 and len(rows()) > 50
    named = set(re.findall(r"Eqs?\. (\d+)", NOTES)) | {"9", "11"}
    assert {str(number) for number in range(1, 14)} <= named


def test_every_field_of_viladiff_has_a_row() -> None:
    missing = [path for path in schema("digits", "viladiff") if path.startswith("method.") and path not in rows()]
    assert missing == []


def test_defaults_in_the_tables_are_the_real_ones() -> None:
    real = flatten(OURS)
    pairs = {field: (row[0], written(real[field])) for field, row in rows().items()}
    assert {field: pair for field, pair in pairs.items() if pair[0] != pair[1]} == {}


def test_alternatives_in_the_tables_are_the_allowed_ones() -> None:
    known = schema("voc", "viladiff")
    for field, (default, others) in rows().items():
        if field == "method.name":
            continue
        choices = _choices(known[field].annotation)
        if choices:
            assert {default, *others.split(", ")} == choices, field


def _choices(kind: Any) -> set[str]:
    """Words that a field of this type can be; empty for numbers."""
    if kind is bool:
        return {"true", "false"}
    if get_origin(kind) is Literal:
        return {str(choice) for choice in get_args(kind)}
    return set()
