"""Values, durations and checksums are written in one way; a TOML file and the command line give one reason."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from viladiff.config.base import error_reason, nearest
from viladiff.core.hashing import file_sha256, sha256_hex
from viladiff.core.messages import format_seconds, format_value


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
