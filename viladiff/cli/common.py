"""Shared parts of all commands: arguments in any order, errors as lines with an exit status."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

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


class CommandParser(argparse.ArgumentParser):
    """Parser that reports an unknown flag with the flag to use instead."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As in argparse, but exits with status 2 if a flag is unknown; positional arguments may be left over."""
        parsed, left = super().parse_known_args(args, namespace)
        flags = [word.partition("=")[0] for word in left if word.startswith("-") and word != "--"]
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


def parse_arguments(into: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments with ``FIELD=VALUE`` before, between and after options; argparse takes the first few alone."""
    args, left = into.parse_known_args(argv)
    if left[:1] == ["--"]:  # argparse leaves it where a list of no words stood before the options
        left = left[1:]
    late = [text for text in left if "=" in text and not text.startswith("-")]
    taking = next((name for name in ("fields", "changes") if hasattr(args, name)), None)
    if len(late) < len(left) or (late and taking is None):
        into.error(f"unrecognized arguments: {' '.join(text for text in left if text not in late) or ' '.join(left)}")
    if late and taking:
        setattr(args, taking, [*getattr(args, taking), *late])
    return args


def run_command(command: Callable[[], int]) -> int:
    """Run ``command`` and return its exit status; print one line for each error."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("VILADIFF_DEBUG") == "1":
            raise
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(stop or "interrupted", file=sys.stderr)
        return 130
