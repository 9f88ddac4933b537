"""Values, durations and checksums are written in one way, and nothing that a terminal or a spreadsheet obeys."""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field, ValidationError

from viladiff.cli.common import run_command
from viladiff.cli.doctor import print_checks
from viladiff.cli.main import main
from viladiff.config.base import error_reason, nearest
from viladiff.core.checks import Check
from viladiff.core.hashing import file_sha256, sha256_hex
from viladiff.core.messages import format_seconds, format_value, plain_cell, print_text, printable
from viladiff.inference.predict import _write_classes
from viladiff.report.markup import markdown
from viladiff.report.table.exports import csv_text
from viladiff.runs.listing import say


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "—"), (0.4, "0 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (3599.4, "59 min 59 s"), (7500, "2 h 5 min")],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text
    assert format_seconds(None, "not known") == "not known"


def test_values_are_as_typed_with_so_many_digits_as_asked() -> None:
    assert [format_value(one) for one in (None, True, "a", 3, 0.1234567891)] == [
        "none",
        "true",
        "a",
        "3",
        "0.1234567891",
    ]
    assert format_value((0.1234567891, [None, "b"]), 6) == "0.123457,none,b"


def test_sha256_of_text_bytes_and_files(tmp_path: Path) -> None:
    wanted = hashlib.sha256("λ".encode()).hexdigest()
    (tmp_path / "x").write_text("λ", encoding="utf-8")
    assert sha256_hex("λ") == sha256_hex("λ".encode()) == file_sha256(tmp_path / "x") == wanted


def test_nearest_keeps_to_its_cutoff() -> None:
    assert nearest("visaul", ["visual", "fusion"]) == "visual"
    assert nearest("zzz", ["visual"]) is None and nearest("zzz", ["visual"], cutoff=0.0) == "visual"


class _Example(BaseModel):
    count: int = Field(1, gt=0)
    share: float = Field(0.5, le=1, allow_inf_nan=False)
    kind: Literal["mean", "sum"] = "mean"
    name: str = ""
    inner: MissingField | None = None


class MissingField(BaseModel):
    there: int


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"count": 0}, "must be > 0"),
        ({"count": 1.5}, "must be a whole number"),
        ({"share": 1.5}, "must be ≤ 1"),
        ({"share": "x"}, "must be a number"),
        ({"share": float("nan")}, "must be a finite number"),
        ({"kind": "men"}, "allowed: mean, sum; did you mean 'mean'?"),
        ({"name": 1}, "must be text"),
        ({"inner": 1}, "must be a section of fields"),
        ({"inner": {}}, "missing, and it has no default"),
    ],
)
def test_reasons_of_pydantic_are_in_the_projects_words(given: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _Example(**given)
    assert [error_reason(item) for item in caught.value.errors()] == [reason]


# What a terminal and a spreadsheet would obey

STRANGE = "a\x1b[31mb\x1b]0;title\x07c\rd\x08e\x9b2Jf\u202eg\u2066h\u2069\x00i"


def test_a_terminal_obeys_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = r"a\x1b[31mb\x1b]0;title\x07c\rd\x08e\x9b2Jf\u202eg\u2066h\u2069\x00i"
    assert printable(STRANGE) == wanted
    every = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
    assert set(printable(every)) <= {*map(chr, range(0x20, 0x7F)), "\n", "\t"}
    kept = "λ ≥ 0 — Größe 猫\tx\u00a0y\n"
    assert printable(kept) == kept
    print_text(STRANGE, 1, end="")
    print_text("postgresql://ann:pw@h/db", error=True)
    shown = capsys.readouterr()
    assert shown.out == f"{wanted} 1" and shown.err == "postgresql://ann:***@h/db\n"


@pytest.mark.parametrize("row", [["name", STRANGE], [STRANGE, "x"]])
def test_columns_of_a_listing_obey_nothing(row: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    say([row], ["a", "b"])
    shown = capsys.readouterr().out
    assert r"\x1b[31m" in shown and printable(shown) == shown


def test_checks_of_the_doctor_obey_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_checks([Check(STRANGE, "[bold]found", STRANGE)])
    shown = capsys.readouterr().out
    assert "[bold]found" in shown and "u202e" in shown and printable(shown) == shown


def test_an_error_is_lines_that_obey_nothing_and_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ValueError(f"{STRANGE}: unknown\nthis {'x' * 100_000}: write less")

    assert run_command(fail) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(r"error: a\x1b[31mb") and first.endswith("unknown") and printable(first) == first
    assert len(second) <= 1100 and second.endswith("x: write less"), "its end says what to do"


def test_words_of_the_command_line_are_cleaned_in_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["runs", "list", "--state", f"{STRANGE}{'y' * 100_000}"])
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and "invalid choice" in shown
    assert printable(shown) == shown and max(map(len, shown.splitlines())) <= 1100


PRINTS = {
    "core/messages.py": 1,  # print_text itself
    "runs/listing.py": 1,  # columns, whose cells are cleaned before a terminal's styles come in
    "cli/main.py": 1,  # the same
    "runs/lease.py": 2,  # a line that is written over; its text is cleaned
}


def test_nothing_is_printed_past_print_text() -> None:
    package = Path(__file__).resolve().parents[2] / "viladiff"
    found: dict[str, int] = {}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                name = path.relative_to(package).as_posix()
                found[name] = found.get(name, 0) + 1
    assert found == PRINTS


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+49 1", "'+49 1"),
        ("-cmd|' /C calc'!A0", "'-cmd|' /C calc'!A0"),
        ("\t=1", "'\t=1"),
        ("\r=1", r"\r=1"),
        ("\uff1d1+1", "'\uff1d1+1"),
        ("a\x1b[1m", r"a\x1b[1m"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        ("-inf", "-inf"),
        ("-", "-"),
        ("--", "--"),
        ("cat = 1", "cat = 1"),
        (-0.5, -0.5),
        (-3, -3),
        (None, None),
        ("", ""),
    ],
)
def test_a_spreadsheet_computes_no_cell_of_text(value: object, cell: object) -> None:
    assert plain_cell(value) == cell


def test_every_csv_file_of_the_package_has_plain_cells() -> None:
    package = Path(__file__).resolve().parents[2] / "viladiff"
    writers = {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8").count("plain_cell(")
        + path.read_text(encoding="utf-8").count("map(plain_cell")
        for path in package.rglob("*.py")
        if re.search(r"csv\.(Dict)?[wW]riter|(?<!exports)\.to_csv\(|write_csv\(", path.read_text(encoding="utf-8"))
    }
    assert set(writers) == {"report/sweep/sweep_page.py", "report/table/exports.py", "inference/predict.py"}
    assert all(writers.values())


def test_the_files_of_tables_and_classes_have_plain_cells(tmp_path: Path) -> None:
    assert csv_text([{"row": "=1", "score": -0.5}, {"row": "+x", "score": 1}]) == "row,score\n'=1,-0.5\n'+x,1\n"
    colours = np.zeros((2, 3), np.uint8)
    _write_classes(tmp_path / "classes.csv", ("=HYPERLINK(1)", "cat"), colours, np.array([1, 2]))
    assert (tmp_path / "classes.csv").read_text().splitlines()[1:] == ["0,'=HYPERLINK(1),#000000,1", "1,cat,#000000,2"]


def test_markdown_has_nothing_that_a_terminal_obeys() -> None:
    assert markdown("\x1b[31m\u202e|") == r"\\x1b\[31m\\u202e\|"
