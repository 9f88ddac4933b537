"""Records whose checksum and name are right and whose values no run can have: refused in one line, at once."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from record_kit import made

from viladiff.cli.main import main
from viladiff.runs.record import checksum, parse_record, record_bytes

ONE = made("supervised-183-0")
HUGE = 10**400


def with_sum(change: Callable[[dict[str, Any]], object]) -> bytes:
    fields = json.loads(record_bytes(ONE))
    del fields["checksum"]
    change(fields)
    return json.dumps({**fields, "checksum": checksum(fields)}).encode()


def headline(fields: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = fields["scores"][fields["network"]][fields["stream"]]
    return found


def shares(**more: object) -> dict[str, Any]:
    one = {"step": 0, "norms": {"student": {"sup": 1.0}}, "cosines": {}}
    return {"gradient_shares": {"fields": {}, "measured": [{**one, **more}]}}


@contextmanager
def seconds(most: int) -> Iterator[None]:
    """Fail what takes longer: the slow ways took hours."""

    def late(*_: object) -> None:
        raise AssertionError(f"longer than {most} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(most)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda one: one.update(git={"revision": 5}), "git.revision: must be text, got 5"),
        (lambda one: headline(one).update(per_class=0.5), "per_class: must be a list of numbers, got 0.5"),
        (lambda one: headline(one).update(boundary_iou=[0.5]), "boundary_iou: must be a number, got [0.5]"),
        (lambda one: one.update(best={"step": 1, "miou": [0.5]}), "best.miou: must be a number, got [0.5]"),
        (lambda one: one["history"].append({"step": HUGE, "miou": 0.5}), "must have step, an integer from 0 to 2^63"),
        (lambda one: one["history"].append({"step": -1, "miou": 0.5}), "must have step, an integer from 0 to 2^63"),
        (lambda one: one.update(palette=[[0, 0, 256]]), "palette: must be levels from 0 to 255"),
        (lambda one: one.update(shares(step=HUGE)), "measured[0]: must have step, an integer from 0 to 2^63"),
        (lambda one: one.update(shares(norms={"student": {"sup": HUGE}})), "must be a number from 0 to 1e+100"),
        (lambda one: one.update(shares(norms={"student": {"a": 1e308, "b": 1e308}})), "from 0 to 1e+100"),
    ],
)
def test_values_that_no_run_can_have(change: Callable[[dict[str, Any]], object], why: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_record(with_sum(change), "one.json")
    assert why in str(error.value) and "\n" not in str(error.value)


def test_a_key_that_is_there_twice_is_found_at_once() -> None:
    text = record_bytes(ONE).decode().rstrip().removesuffix("}")
    many = ",".join(f'"k{i}":1' for i in range(300_000))
    with seconds(30), pytest.raises(ValueError, match="has 'zz' twice"):
        parse_record(f'{text}, {many}, "zz": 1, "zz": 2}}'.encode(), "one.json")


def test_names_of_scores_are_printed_without_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "runs" / ONE.run_id / "record.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(with_sum(lambda one: headline(one).update({"\x1b[31mred": 0.5})))
    words = ["--runs-dir", str(tmp_path / "runs"), "--published", str(tmp_path / "none")]
    assert main(["runs", "show", ONE.run_id, *words]) == 0
    said = capsys.readouterr().out
    assert "\\x1b[31mred" in said and "\x1b" not in said


@pytest.mark.parametrize("unit", ["://:", "?passw", "://a:b@", "?a=passw"])
def test_long_text_of_others_is_printed_at_once(unit: str, capsys: pytest.CaptureFixture[str]) -> None:
    from viladiff.core.messages import print_text

    with seconds(30):
        print_text("=" + "?passw" * 1 + unit * 100_000 + "passw" * 100_000)
    said = capsys.readouterr().out
    assert len(said) > 500_000 or "***" in said, "what looks like a password is hidden, to the end of the word"
