"""A short fuzzing of all readers, every input that was a finding once, and the first findings by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from fuzz_mutators import MUTATORS, sealed
from fuzz_readers import READERS, attempt, complaint
from fuzz_run import CORPUS, HERE, inputs, minimised, run_block, seeds_of

from viladiff.config.base import unflatten
from viladiff.core.messages import LONGEST_LINE, MOST_LINES, error_lines, errors_name, one_line, shown
from viladiff.data.captions.files import read_captions
from viladiff.runs.checkpoint import load_checkpoint
from viladiff.runs.lease import HeartbeatMonitor, live_leases
from viladiff.runs.record import RunRecord, checksum, impossible, parse_record
from viladiff.tables.spec_file import load_table


def refusal(reader: str, name: str, data: bytes, folder: Path) -> str:
    """The error of a reader, of the kind that it may have."""
    outcome, why, error = attempt(READERS[reader], folder / "input", name, data)
    assert outcome == "refused", (why, error)
    return str(error)


def test_two_thousand_inputs_and_all_earlier_findings(tmp_path: Path) -> None:
    state = tmp_path / "quick.jsonl"
    words = ["--each", "84", "--total", "2000", "--block", "21", "--seed", "1", "--state", str(state)]
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz_run.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = state.with_suffix(".txt").read_text()
    counts = report.splitlines()[-1].split()
    assert counts[0] == "all" and int(counts[1]) >= 2000, report
    assert counts[5] == "0" and counts[7] == "0", report
    assert {json.loads(line)["reader"] for line in state.read_text().splitlines()} == {*READERS}
    assert len(report.splitlines()) == len(READERS) + 3


def test_every_reader_has_a_corpus_and_every_sound_file_is_read_or_refused(tmp_path: Path) -> None:
    assert {path.name for path in CORPUS.iterdir()} == {*READERS}
    for name in {*READERS} - {"model"}:
        for path in seeds_of(name):
            outcome, why, error = attempt(READERS[name], tmp_path / "input", path.name, path.read_bytes())
            assert outcome == "accepted", (path, why, error)


def test_a_block_is_the_same_each_time_and_others_are_not() -> None:
    for block in (0, 3):
        first = inputs("lease", READERS["lease"].kinds, 5, block, 20)
        assert first == inputs("lease", READERS["lease"].kinds, 5, block, 20)
        assert first != inputs("lease", READERS["lease"].kinds, 6, block, 20)


def test_what_is_wrong_with_an_error_is_found() -> None:
    assert complaint("a.json: no", ("a.json",), False) == ""
    assert "lines" in complaint("a.json: no\na.json: nor", ("a.json",), False)
    assert complaint("a.json: no\na.json: nor", ("a.json",), True) == ""
    assert "names neither" in complaint("no", ("a.json",), False)
    assert "names neither" in complaint("a.json: no\nnor", ("a.json",), True)
    assert "control" in complaint("a.json: \x1b[31m", ("a.json",), False)
    assert "characters" in complaint("a.json: " + "x" * 2000, ("a.json",), False)


def test_findings_are_made_small() -> None:
    assert minimised(lambda data: b"bad" in data, b"0123456789" * 9 + b"bad" + b"x" * 50) == b"bad"


def test_a_traceback_is_a_finding(tmp_path: Path) -> None:
    from dataclasses import replace

    wrong = replace(READERS["lease"], read=lambda path: {}["missing"])
    assert attempt(wrong, tmp_path / "input", "lease.json", b"{}")[:2] == ("finding", "KeyError")


class MortalWorker:
    """Dies of input 3, and then does the rest."""

    process = None

    def __init__(self) -> None:
        self.starts: list[int] = []

    def place(self) -> int:
        return 3

    def ask(self, task: dict[str, Any]) -> dict[str, Any] | None:
        self.starts.append(task["start"])
        return None if len(self.starts) == 1 else {"counts": {"refused": 6}, "findings": {}}


def test_an_input_that_ends_a_worker_is_a_finding_and_the_others_are_read() -> None:
    worker = MortalWorker()
    task = {"reader": "lease", "seed": 0, "block": 7, "number": 10, "start": 0, "keep": False, "known": []}
    found = run_block(worker, task)  # type: ignore[arg-type]
    assert worker.starts == [0, 4] and found["findings"] == {"death (0)": {"text": "input 3 of block 7"}}
    assert {"finding": 1, "uncounted": 3, "refused": 6}.items() <= found["counts"].items()


# The findings of the first run by hand, each by what it was


@pytest.mark.parametrize(
    "text", ['{"pid": 9223372036854775808}', "[" * 50_000, '{"a":' * 50_000, "9" * 5000, "\ud800", "[]", "null"]
)
def test_a_lease_that_cannot_be_read_is_of_nobody(tmp_path: Path, text: str) -> None:
    fields = {"host": "h", "machine": "m", "pid": 2**63, "started": 1, "since": "s"}
    for number, one in enumerate((text, json.dumps(fields), json.dumps({**fields, "pid": 1, "host": ["h"]}))):
        path = tmp_path / f"{number}" / f"lease-{'0' * 32}.json"
        path.parent.mkdir()
        path.write_bytes(one.encode("utf-8", "surrogatepass"))
        assert live_leases(path.parent, HeartbeatMonitor()) == {path: None}


def test_a_lease_is_told_without_what_a_terminal_obeys(tmp_path: Path) -> None:
    fields = {"host": "h\x1b[2J\n", "machine": "m", "pid": 7, "started": 1, "since": "s" * 9000}
    path = tmp_path / f"lease-{'0' * 32}.json"
    path.write_text(json.dumps(fields))
    (holder,) = live_leases(tmp_path, HeartbeatMonitor()).values()
    assert str(holder).startswith("process 7 on h\\x1b[2J\\n since s") and len(str(holder)) <= 200


@pytest.mark.parametrize("column", ["image", "prompt", "model", "revision"])
@pytest.mark.parametrize("value", [["a"], {"a": 1}, [[]]])
def test_a_caption_with_a_list_for_a_text_is_refused_by_row(tmp_path: Path, column: str, value: object) -> None:
    path = tmp_path / "captions.jsonl"
    row = {"image": "one", "text": "a cat", "prompt": "p", "model": "m", "revision": 12}
    path.write_text(f"{json.dumps(row)}\n{json.dumps({**row, column: value})}\n")
    with pytest.raises(ValueError, match=rf"captions.jsonl, row 2: the {column} is .*, not a text"):
        read_captions(path)


def test_a_list_of_data_sets_in_a_table_is_refused_by_entry(tmp_path: Path) -> None:
    text = (CORPUS / "table" / "table_a.toml").read_text().replace('"data.dataset" = "voc"', '"data.dataset" = ["voc"]')
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(
        ValueError,
        match=r"t.toml: scale.digits: datasets = .*does not say what becomes of \['voc'\], which columns\[1\]",
    ):
        load_table(tmp_path / "t.toml")


@pytest.mark.parametrize("flat", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}, {"a.b": 1, "a.b.c.d": 2}])
def test_a_field_and_one_below_it_contradict_each_other(flat: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"a(\.b(\.c\.d)?)?: .*keep one of the two"):
        unflatten(flat)
    assert unflatten({"a.b": 1, "a.c.d": 2}) == {"a": {"b": 1, "c": {"d": 2}}}


@pytest.mark.parametrize("value", ["0.5", "\x1b[31m", True, [["a"]], {"a": 1}, "x" * 5000])
@pytest.mark.parametrize("place", ["miou", "boundary_iou", "per_class"])
def test_text_where_a_record_has_a_score_is_refused_by_field(value: object, place: str) -> None:
    fields = json.loads((CORPUS / "record" / "record.json").read_bytes())
    fields["scores"]["student"]["visual"][place] = value
    fields.pop("checksum")
    says = f"student.visual.{place}: must be a (list of )?number"
    assert re.search(says, impossible(RunRecord(**fields)))
    with pytest.raises(ValueError, match=rf"^r.json .*{says}") as error:
        parse_record(json.dumps({**fields, "checksum": checksum(fields)}).encode(), "r.json")
    assert complaint(str(error.value), ("r.json",), False) == ""


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x03\x04" + b"x" * 400, b"\x80\x02}q\x00."])
def test_a_checkpoint_with_a_sound_trailer_and_a_broken_archive_is_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(sealed(content))
    with pytest.raises(ValueError, match=r"checkpoint .*checkpoint.pt \(?.*(damaged|refused|not a state)") as error:
        load_checkpoint(path)
    assert complaint(str(error.value), ("checkpoint.pt",), False) == ""
    half = tmp_path / "half.pt"
    torch.save({"a": torch.ones(300)}, half)
    path.write_bytes(sealed(half.read_bytes()[:700]))
    with pytest.raises(ValueError, match="truncated or damaged: what its checksum seals is no archive of torch"):
        load_checkpoint(path)


def test_values_are_cut_and_escaped() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, ["x"] * 10**5, deep, {"a": deep}, 10**5000, b"\0" * 10**6, "\x1b\u202e\n\ud800"):
        assert len(shown(value)) <= 160 and shown(value).isprintable()
    assert shown("a'b") == repr("a'b") and shown([1, None]) == "[1, None]"
    assert one_line("a\nb\x1b\u2028") == "a\\nb\\x1b\\u2028"
    text = one_line("begin " + "x" * 10**6 + " end")
    assert len(text) <= LONGEST_LINE and text.startswith("begin") and text.endswith(" end")
    lines = error_lines("\n".join(map(str, range(100)))).split("\n")
    assert len(lines) == MOST_LINES + 1 and lines[-1] == "and 60 more faults"


def test_an_error_names_its_file_and_keeps_its_type() -> None:
    class OwnError(ValueError):
        pass

    with pytest.raises(OwnError, match=r"^a.txt: b c$"), errors_name("a.txt"):
        raise OwnError("b\nc")
    with pytest.raises(ValueError, match=r"^a.txt: nested too deeply$"), errors_name("a.txt"):
        json.loads("[" * 100_000)
    with pytest.raises(ValueError, match=r"^a.txt: .*codec can't decode"), errors_name("a.txt"):
        b"\xff".decode()


def test_mutators_change_what_they_are_given() -> None:
    for name in READERS:
        for path in seeds_of(name):
            kinds = READERS[name].kinds
            mutator = MUTATORS[kinds.get(path.suffix) or kinds.get("") or next(iter(kinds.values()))]
            made = {mutator(Random(number), path.read_bytes()) for number in range(12)}
            assert len(made - {path.read_bytes()}) > 4, path
