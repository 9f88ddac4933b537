"""Shared parts of all commands: arguments in any order, errors as lines with an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence


def parse_arguments(into: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments with ``FIELD=VALUE`` before, between and after options; argparse takes the first few alone."""
    args, left = into.parse_known_args(argv)
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
