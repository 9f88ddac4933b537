"""The command line of ``make reproduce``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from viladiff.cli.common import CommandParser, parse_arguments, run_command
from viladiff.cli.tables import COLUMNS, ROWS, add_placing
from viladiff.experiments.reproduce import reproduce


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0 if all runs agree with their records, 1 if one does not, 2 if there is nothing to compare with, 130 if
    interrupted.
    """
    args = parse_arguments(reproduce_parser(), argv)
    return run_command(lambda: reproduce(args))


def reproduce_parser() -> argparse.ArgumentParser:
    top = CommandParser("reproduce.py", description="Train published runs again and compare the scores.")
    top.add_argument(
        "--table", default="5", help="number of a table of the paper, or path of a .toml file (default: 5)"
    )
    top.add_argument("--scale", default="digits", help="published scale (default: digits)")
    top.add_argument("--rows", nargs="+", default=["1", "8"], metavar="ROW", help=f"{ROWS} (default: 1 8)")
    top.add_argument("--columns", nargs="+", default=["1"], metavar="COLUMN", help=f"{COLUMNS} (default: 1)")
    top.add_argument("--seed", type=int, default=0, help="seed of the runs (default: 0)")
    top.add_argument(
        "--runs-dir", default="runs/reproduce", metavar="DIR", help="directory of runs (default: runs/reproduce)"
    )
    add_placing(top.add_argument_group("execution"))
    top.add_argument("--dry-run", action="store_true", help="print the runs to train and compare, and exit")
    return top
