"""The command of a table, with the same options from its script and from ``viladiff table``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from viladiff.cli.common import CommandParser, parse_arguments, run_command

EXAMPLES = """\
examples:
  {name} --dry-run                        list the runs and estimate the time
  {name}                                  scale quick: one seed, minutes on two cores
  {name} --scale digits --seeds 3         the full built-in data set
  {name} --rows 1 8 --columns 1 -- train.steps=50
  {name} --scale digits --address auto --gpus-per-trial 0.5 --runs-dir /shared/runs

Re-running the command resumes interrupted runs and skips finished ones. Processes that share
--runs-dir split the work.
"""

ROWS = "rows to run: labels, unique prefixes, or the numbers and letters of the page"
COLUMNS = "columns to run: labels, unique prefixes, or 1-based numbers"
SHARE = "GPUs per process of a run, a fraction or whole ones (default: this machine's, divided evenly; 0: none)"


def main(path: Path, argv: Sequence[str] | None = None, name: str | None = None) -> int:
    """Run a table's script, as ``ablations/run_table5.py``, or ``viladiff table 5``; print user errors as lines."""
    from viladiff.experiments.tables import run_table, shell_command

    given = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(table_parser(path, name or Path(sys.argv[0]).name), given)
    return run_command(lambda: run_table(path, args, shell_command(name or _said(sys.argv[0]), given)))


def _said(program: str) -> str:
    """Return the program as it is typed, without this machine's paths."""
    from viladiff.core.installation import specs_dir

    path, folder = Path(program).absolute(), specs_dir("ablations")
    return f"python {path.relative_to(folder.parent)}" if path.is_relative_to(folder) else path.name


def table_parser(path: Path, name: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    text = f"Run the unfinished cells of {path.name} and write its page."
    top = CommandParser(name, description=text, epilog=EXAMPLES.format(name=name), formatter_class=raw)
    add_table_options(top)
    return top


def add_table_options(top: argparse.ArgumentParser) -> None:
    """Add the options that every table has."""
    what = top.add_argument_group("selection")
    what.add_argument(
        "--scale",
        default="quick",
        help="size of experiment: smoke, quick (default), digits, paper, strong or resnet",
    )
    what.add_argument("--seeds", metavar="N", help="number of seeds, counted from 0, or a list such as 3,4,5")
    what.add_argument("--rows", nargs="+", metavar="ROW", help=ROWS)
    what.add_argument("--columns", nargs="+", metavar="COLUMN", help=COLUMNS)
    what.add_argument("--encoder", metavar="NAME", help="encoder of all cells, such as a timm backbone")
    what.add_argument(
        "changes", nargs="*", metavar="FIELD=VALUE", help="fields of all cells (put -- first after --rows)"
    )
    how = top.add_argument_group("execution")
    how.add_argument("--workers", type=int, metavar="N", help="processes per run, which share its batches")
    add_placing(how)
    how.add_argument("--dashboard", action="store_true", help="start Ray's dashboard on the loopback interface")
    where = top.add_argument_group("output")
    where.add_argument("--runs-dir", default="runs", metavar="DIR", help="directory of runs (default: runs)")
    where.add_argument("--report-dir", metavar="DIR", help="directory of the page (default: reports/<scale>/<table>)")
    where.add_argument("--publish", action="store_true", help="write page and records to reports/published/<table>")
    then = top.add_mutually_exclusive_group()
    then.add_argument(
        "--dry-run", action="store_true", help="print the planned runs and their estimated time, and exit"
    )
    then.add_argument("--render", action="store_true", help="write the page from existing records, and run nothing")
    top.add_argument(
        "--restart", action="store_true", help="rerun every cell; existing runs are archived below replaced/"
    )
    add_pricing(top)


def add_pricing(top: argparse.ArgumentParser) -> None:
    """Add the options of the cost estimate, for tables and sweeps alike."""
    top.add_argument(
        "--hourly-price", type=float, metavar="P", help="hourly price of this machine, for the cost estimate"
    )
    top.add_argument(
        "--device", metavar="NAME", help="device of the cost estimate: cpu, h100, ... (default: this machine's GPU)"
    )


def add_placing(how: argparse._ArgumentGroup) -> None:
    """Add the options of Ray's placement of runs, for tables and sweeps alike."""
    how.add_argument(
        "--max-concurrent", type=int, metavar="N", help="maximum of concurrent runs (default: as many as fit)"
    )
    how.add_argument("--gpus-per-trial", type=float, metavar="F", help=SHARE)
    how.add_argument(
        "--track", nargs="+", choices=("tensorboard", "wandb"), default=[], help="trackers that follow the runs"
    )
    how.add_argument("--address", help="address of a Ray cluster, or auto (default: start one on this machine)")
    how.add_argument(
        "--stall-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="kill a run that reports no progress for SECONDS (default: 600)",
    )
