"""Commands as people type them, and consoles as they have them: each works, or gets one line that says what to do."""

from __future__ import annotations

import argparse
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from viladiff.cli import main
from viladiff.cli.common import prepare_console, run_command


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of a command that is refused."""
    try:
        status: object = main.main(words)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--optim.lr 0.1", "--optim.lr: a field, not a flag; write optim.lr=0.1"),
        ("seed=1 --optim.lr=0.1 --quiet", "--optim.lr: a field, not a flag; write optim.lr=0.1"),
        ("optim.lr 0.1", "'optim.lr': write field=value without spaces around '=', as in optim.lr=0.1"),
        ("optim.lr = 0.1", "'optim.lr': write field=value without spaces around '=', as in optim.lr=0.1"),
        ("optim.lr: 0.1", "'optim.lr:': write field=value without spaces around '=', as in optim.lr=0.1"),
        ("seed=1 --quiet optim.lr:0.1", "optim.lr:0.1: write optim.lr=0.1"),
        ("seed=1 --quiet optim.lr 0.1", "optim.lr 0.1: write optim.lr=0.1, in one word"),
        (
            "study.toml",
            "study.toml: fields are given one by one, as data.split=183; files are for viladiff table and sweep",
        ),
        ("foo", "'foo': write field=value without spaces around '=', as in data.split=183"),
    ],
)
def test_a_field_typed_otherwise_is_told_as_it_is_written(
    words: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(["train", *words.split()], capsys) == wanted


@pytest.mark.parametrize(
    "words",
    ["evaluate RUN OTHER", "export RUN OTHER out", "predict a.png --model RUN OTHER", "runs show RUN OTHER"],
)
def test_two_runs_where_one_is_wanted(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"RUN": str(tmp_path / "one"), "OTHER": str(tmp_path / "two")}
    for place in places.values():
        Path(place).mkdir()
        (Path(place) / "record.json").write_text("{}")
    line = told([places.get(word, word) for word in words.split()], capsys)
    both = ", ".join(places.values())
    assert line == f"{places['OTHER']}: one too many of {both}; name one where one is wanted (a shell's * gives all)"


def test_a_folder_whose_name_is_no_utf8_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    word = os.fsdecode(b"runtime.data_root=/data/caf\xe9")
    line = told(["train", "data.dataset=folder", word], capsys)
    assert line.endswith(": a name that is not UTF-8 text; rename it") and line.startswith(
        "runtime.data_root=/data/caf"
    )


def test_a_console_without_a_sign_gets_another_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    prepare_console()
    print("steps ≥ 1, 71.5 ± 1.0, λ, caf\udce9", end="", flush=True)
    assert sys.stdout.buffer.getvalue() == b"steps >= 1, 71.5 +/- 1.0, \\u03bb, caf\\udce9"  # type: ignore[attr-defined]


def test_commands_print_on_an_ascii_console_without_a_home() -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    here = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    command = [sys.executable, "-m", "viladiff", "config", "optim"]
    found = subprocess.run(command, env={**here, **plain}, capture_output=True, timeout=120, check=False)
    assert found.returncode == 0 and found.stderr == b""
    assert b"int >= 0" in found.stdout


def test_a_file_whose_name_begins_like_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-x.png").write_bytes(b"")
    assert told(["predict", "-x.png", "--model", "m"], capsys) == (
        "-x.png: a name that begins with '-' is read as a flag; write ./-x.png"
    )


@pytest.mark.parametrize("words", [["config", "optim"], ["--version"]])
def test_closed_outputs_are_no_error(words: list[str]) -> None:
    code = f"import sys; from viladiff.cli.main import main; sys.exit(main({words!r}))"
    command = f'exec "{sys.executable}" -c "{code}" >&- 2>&-'
    assert subprocess.run(["bash", "-c", command], env={**os.environ}, timeout=120, check=False).returncode == 0


def test_a_deleted_directory_is_told_before_a_library_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        assert told(["config", "optim"], capsys) == "the current directory has been deleted; change to another one"
    finally:
        os.chdir(tmp_path)


def test_ctrl_c_says_that_it_was_heard(capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> int:
        raise KeyboardInterrupt

    assert run_command(stop) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_that_begins_anew_does_not_promise_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(_: argparse.Namespace) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/a.png")

    for words, end in (
        (["predict", "a.jpg", "--model", "m"], "run the same command again"),
        (["export", "r", "m"], "run the same command again"),
        (["data", "coco-masks", "a"], "the same command goes on where it stopped"),
    ):
        parser = main.command_parser()
        args = parser.parse_args(words)
        args.run = fill
        monkeypatch.setattr("viladiff.cli.main.parse_arguments", lambda *_, found=args: found)
        assert main.main(words) == 2
        assert capsys.readouterr().err.endswith(f"free some space, and {end}\n")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EMFILE, "raise the limit on open files (ulimit -n), and the same command goes on where it stopped"),
        (errno.EACCES, "give this user the right to it, or name another place"),
        (errno.EROFS, "name another place (--runs-dir, --out), or remount it"),
        (errno.ENAMETOOLONG, "shorten the name"),
        (errno.ENOTDIR, "a part of it is a file; name a directory (--runs-dir"),
    ],
)
def test_what_the_system_refuses_is_told_with_the_way_out(
    number: int, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> int:
        raise OSError(number, os.strerror(number), "runs/a")

    assert run_command(refuse) == 2
    assert f"'runs/a'; {advice}" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_processes_are_one_or_more(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["data", "check", "photos", "--processes", count])
    assert f"argument --processes: '{count}': must be a whole number, 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "1000000", "x"])
def test_threads_have_a_limit_also_in_predict(count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(["predict", str(tmp_path), "--model", "m", "--threads", count], capsys)
    assert said.startswith("runtime.threads = ") and "must be" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("can't start new thread"), "error: the system allows no more threads; raise the limits"),
        (MemoryError(), "error: out of memory; raise the limits"),
    ],
)
def test_limits_of_the_session_are_told(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise error

    assert run_command(fail) == 2 and capsys.readouterr().err.startswith(said)


def test_another_fault_of_the_program_keeps_its_traceback() -> None:
    def fail() -> int:
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault of the program"):
        run_command(fail)
