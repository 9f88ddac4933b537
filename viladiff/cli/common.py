"""Shared parts of all commands: arguments in any order, errors as lines with an exit status."""

from __future__ import annotations

import argparse
import codecs
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from viladiff.core.messages import disk_advice, hide_passwords, one_line, print_text

RENAMED = {
    "--storage": ("--runs-dir",),
    "--store": ("--runs-dir",),
    "--out": ("--report-dir", "--runs-dir"),
    "--fresh": ("--restart",),
    "--hang-after": ("--stall-timeout",),
    "--price": ("--hourly-price",),
    "--scheduler": ("--early-stopping",),
}
"""Flags of earlier versions and what replaces them; the first one that a command has."""


SPELT = {"≥": ">=", "≤": "<=", "±": "+/-", "×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "→": "->", "’": "'"}
"""Signs that a console without them gets in other letters."""


class CommandParser(argparse.ArgumentParser):
    """Parser that reports an unknown flag with the flag to use instead."""

    words: Sequence[str] = ()
    """The arguments, for messages."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message; for a file whose name begins like a flag, with the way to name it."""
        taken = next((word for word in self.words if word.startswith("-") and Path(word).exists()), None)
        if taken is not None:
            self.exit(2, f"error: {taken}: a name that begins with '-' is read as a flag; write ./{taken}\n")
        super().error(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit with the message as errors are printed: in one line each, cut, without passwords."""
        super().exit(status, message and hide_passwords("\n".join(map(one_line, message.split("\n")))))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As in argparse, but exits with status 2 if a flag is unknown; positional arguments may be left over."""
        self.words = sys.argv[1:] if args is None else list(args)
        parsed, left = super().parse_known_args(args, namespace)
        flags = [word.partition("=")[0] for word in left if word.startswith("-") and word != "--"]
        if flags and re.fullmatch(r"--[a-z]\w*(\.\w+)+", flags[0]):
            words = sys.argv[1:] if args is None else list(args)
            at = next(i for i, word in enumerate(words) if word.partition("=")[0] == flags[0])
            value = words[at].partition("=")[2] or next(iter(words[at + 1 :]), "VALUE")
            self.exit(2, f"error: {flags[0]}: a field, not a flag; write {flags[0][2:]}={value}\n")
        if flags:
            self.error(f"{flags[0]}: unknown flag{self._replacement(flags[0])}")
        return parsed, left

    def _replacement(self, flag: str) -> str:
        """Return the flag to use instead, as the end of a message; empty if there is none."""
        known = re.findall(r"--[a-z][a-z-]*", self.format_usage())
        renamed = next((name for name in RENAMED.get(flag, ()) if name in known), None)
        if renamed is not None:
            return f"; use {renamed}"
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
        return f"; did you mean {near[0]}?" if near else ""


def positive(text: str) -> int:
    """Return the whole number above 0 that an argument is. Raises ArgumentTypeError for another."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 1 or more")
    return number


def parse_arguments(into: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments with ``FIELD=VALUE`` before, between and after options; argparse takes the first few alone."""
    prepare_console()
    words = sys.argv[1:] if argv is None else list(argv)
    args, left = into.parse_known_args(words)
    if not hasattr(args, "source"):  # a picture to be labelled may have any name
        _refuse_unreadable(words)
    if left[:1] == ["--"]:  # argparse leaves it where a list of no words stood before the options
        left = left[1:]
    late = [text for text in left if "=" in text and not text.startswith("-")]
    taking = next((name for name in ("fields", "changes") if hasattr(args, name)), None)
    extra = [text for text in left if text not in late]
    if taking == "fields" and hasattr(args, "directory"):  # of one run, before its fields
        extra += [text for text in args.fields if "=" not in text]
    if extra or (late and taking is None):
        told = _advice(extra, [*words], taking) if extra else ""
        into.exit(2, told) if told else into.error(f"unrecognized arguments: {' '.join(extra or left)}")
    if late and taking:
        setattr(args, taking, [*getattr(args, taking), *late])
    return args


def _advice(extra: Sequence[str], words: Sequence[str], taking: str | None) -> str:
    """Return the line that says how arguments are meant that no command has a place for; empty if that is unclear."""
    runs = [text for text in words if (Path(text) / "record.json").is_file()]
    there = [text for text in extra if Path(text).exists()] or runs[1:]
    if there:
        near = [text for text in words if Path(text).exists() and Path(text).parent == Path(there[0]).parent]
        which = ", ".join(near[:4]) + ", ..." * (len(near) > 4)
        return f"error: {there[0]}: one too many of {which}; name one where one is wanted (a shell's * gives all)\n"
    for text in extra:
        field, sign, value = text.partition(":")
        if taking and sign and value and re.fullmatch(r"[a-z]\w*(\.\w+)+", field):
            return f"error: {text}: write {field}={value.lstrip('=')}\n"
    fields = [text.strip("=:") for text in words if re.fullmatch(r"[a-z]\w*(\.\w+)+[=:]?", text)]
    if taking is None or not fields:
        return ""
    field = fields[0]
    after = [text.lstrip("=") for text in words[words.index(next(w for w in words if w.startswith(field))) + 1 :]]
    value = next((text for text in after if text and not text.startswith("-")), "VALUE")
    return f"error: {field} {value}: write {field}={value}, in one word\n"


def _refuse_unreadable(words: Sequence[str]) -> None:
    """Exit with one line for an argument that is not text in UTF-8, which no record could hold."""
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise SystemExit(_print_error(f"{word}: a name that is not UTF-8 text; rename it"))


def _print_error(line: str) -> int:
    print_text(f"error: {one_line(line)}", error=True)
    return 2


def prepare_console() -> None:
    """Let a console that lacks a sign print another for it, instead of an error."""
    codecs.register_error("viladiff", _spell)
    if sys.stdout is None:  # a closed one, whose number another file would get
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="viladiff")


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    one = error.object[error.start]
    return SPELT.get(one) or ascii(one)[1:-1], error.start + 1


def run_command(command: Callable[[], int], resumes: bool = True) -> int:
    """Run ``command`` and return its exit status; print one line for each error.

    resumes: whether the command goes on where it was interrupted, if it is given again.
    """
    try:
        _check_directory()
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UnicodeEncodeError as error:
        if os.environ.get("VILADIFF_DEBUG") == "1":
            raise
        return _print_error(f"{error.object[:200]!a}: has a name that is not UTF-8 text; rename the file or folder")
    except (ValueError, OSError) as error:
        if os.environ.get("VILADIFF_DEBUG") == "1":
            raise
        for line in (str(error) or type(error).__name__).rstrip("\n").split("\n"):
            _print_error(line + disk_advice(error, resumes))
        return 2
    except (MemoryError, RuntimeError) as error:
        thread = "can't start new thread" in str(error)
        if os.environ.get("VILADIFF_DEBUG") == "1" or not (thread or isinstance(error, MemoryError)):
            raise
        what = "the system allows no more threads" if thread else "out of memory"
        return _print_error(f"{what}; raise the limits of this session (ulimit -v, ulimit -u) or use less of it")
    except KeyboardInterrupt as stop:
        print_text(str(stop) or "interrupted", error=True)
        return 130


def _check_directory() -> None:
    """Raise ValueError if the current directory has been deleted, on which libraries end the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the current directory has been deleted; change to another one") from None
