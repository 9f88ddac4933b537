"""The command line of ``make reproduce``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from viladiff.cli.tables import add_placing
from viladiff.experiments.reproduce import reproduce


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0 if all runs agree with their records, 1 if one does not, 2 if there is nothing to compare with, 130 if
    interrupted.
    """
    from viladiff.cli.common import parse_arguments, run_command

    args = parse_arguments(reproduce_parser(), argv)
    return run_command(lambda: reproduce(args))


def reproduce_parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("reproduce.py", description="Trains published runs again and compares the scores.")
    top.add_argument("--table", default="5", help="number of the paper's table, or the path of a .toml file")
    top.add_argument("--scale", default="digits", help="the scale that was published")
    top.add_argument("--rows", nargs="+", default=["1", "8"], metavar="ROW", help="labels, beginnings, or numbers")
    top.add_argument("--columns", nargs="+", default=["1"], metavar="COLUMN", help="likewise")
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--storage", default="runs/reproduce", metavar="DIR", help="directory of runs (runs/reproduce)")
    add_placing(top.add_argument_group("how"))
    top.add_argument("--dry-run", action="store_true", help="say what would be trained and compared, and stop")
    return top
