"""The command of a table, with the same options from its script and from ``viladiff table``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from viladiff.cli.common import parse_arguments, run_command

EXAMPLES = """\
examples:
  {name} --dry-run                        what would run, and how long it would take
  {name}                                  scale quick: one seed, minutes on two cores
  {name} --scale digits --seeds 3         the embedded data set in full
  {name} --rows 1 8 --columns 1 -- train.steps=50
  {name} --scale digits --address auto --gpus-per-trial 0.5 --storage /shared/runs

The same command continues where the last one stopped, runs nothing twice, and shares work with others like it.
"""


SHARE = "share of a GPU, or whole GPUs (default: those of this machine, shared out; 0: none is kept)"


def main(path: Path, argv: Sequence[str] | None = None, name: str | None = None) -> int:
    """Run a table's script, as ``ablations/run_table5.py``, or ``viladiff table 5``; print user errors as lines."""
    from viladiff.experiments.tables import run_table, shell_command

    given = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(table_parser(path, name or Path(sys.argv[0]).name), given)
    return run_command(lambda: run_table(path, args, shell_command(name or _said(sys.argv[0]), given)))


def _said(program: str) -> str:
    """Return the program as it is typed, without this machine's paths."""
    from viladiff.experiments.tables import ROOT

    path = Path(program).absolute()
    return f"python {path.relative_to(ROOT)}" if path.is_relative_to(ROOT / "ablations") else path.name


def table_parser(path: Path, name: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    text = f"Runs what {path.name} asks for and is not done yet, and writes its page."
    top = argparse.ArgumentParser(name, description=text, epilog=EXAMPLES.format(name=name), formatter_class=raw)
    add_table_options(top)
    return top


def add_table_options(top: argparse.ArgumentParser) -> None:
    """Add the options that every table has."""
    what = top.add_argument_group("what")
    what.add_argument("--scale", default="quick", help="size of experiment: smoke, quick (default), digits or paper")
    what.add_argument("--seeds", metavar="N", help="so many seeds, from 0; or a list such as 3,4,5")
    what.add_argument("--rows", nargs="+", metavar="ROW", help="labels, their beginnings, or numbers from 1")
    what.add_argument("--columns", nargs="+", metavar="COLUMN", help="likewise")
    what.add_argument("--encoder", metavar="NAME", help="another encoder for every cell, such as a timm backbone")
    what.add_argument("changes", nargs="*", metavar="FIELD=VALUE", help="fields for every cell (-- first after --rows)")
    how = top.add_argument_group("how")
    how.add_argument("--workers", type=int, metavar="N", help="processes that share each run's batches")
    add_placing(how)
    how.add_argument("--dashboard", action="store_true", help="Ray's dashboard, on this machine's loopback")
    where = top.add_argument_group("where")
    where.add_argument("--storage", default="runs", metavar="DIR", help="directory of runs (default: runs)")
    where.add_argument("--out", metavar="DIR", help="directory of the page (default: reports/<scale>/<table>)")
    where.add_argument("--publish", action="store_true", help="page and records to reports/published/<table>")
    then = top.add_mutually_exclusive_group()
    then.add_argument("--dry-run", action="store_true", help="say what would run and what it would take, and stop")
    then.add_argument("--render", action="store_true", help="write the page of what there is, and run nothing")
    top.add_argument(
        "--fresh", action="store_true", help="every cell anew; older runs are set aside (leave out to continue)"
    )
    top.add_argument("--price", type=float, metavar="P", help="price of an hour of this machine, for --dry-run")


def add_placing(how: argparse._ArgumentGroup) -> None:
    """Add the options of Ray's placement of runs, for tables and sweeps alike."""
    how.add_argument("--max-concurrent", type=int, metavar="N", help="runs at once (default: as many as fit)")
    how.add_argument("--gpus-per-trial", type=float, metavar="F", help=SHARE)
    how.add_argument("--address", help="an existing Ray cluster, or auto; default: one of its own on this machine")
    how.add_argument("--hang-after", type=float, default=600.0, metavar="SECONDS", help="silence that ends a run")
