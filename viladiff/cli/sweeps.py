"""The command of a sweep, with the same options from its script and from ``viladiff sweep``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from viladiff.cli.common import CommandParser, parse_arguments, run_command
from viladiff.cli.tables import add_placing, add_pricing

SAMPLERS = ("tpe", "gp", "cmaes", "random", "grid")
EARLY_STOPPING = ("none", "asha", "hyperband", "median")
EXAMPLES = """\
examples:
  {name} --dry-run                        print the space and the runs, and estimate the time
  {name}                                  scale quick: minutes on two cores
  {name} --scale digits --trials 40       the full built-in data set; --trials 60 adds twenty
  {name} --sampler random --early-stopping asha --seeds 1
  {name} --scale digits --address auto --gpus-per-trial 0.5 --runs-dir /shared/runs

Re-running the command resumes an interrupted sweep and skips finished runs. Trials are scored on
images held out of the labelled list; the best points are then retrained on fresh seeds, and only
those scores are reported.
"""


def main(path: Path, argv: Sequence[str] | None = None, name: str | None = None) -> int:
    """Run a sweep's script, as ``tune/sweep_lambda.py``, or ``viladiff sweep lambda``; print user errors as lines."""
    from viladiff.experiments.sweeps import run_sweep
    from viladiff.experiments.tables import shell_command

    given = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(sweep_parser(path, name or Path(sys.argv[0]).name), given)
    return run_command(lambda: run_sweep(path, args, shell_command(f"python tune/{path.stem}.py", given)))


def sweep_parser(path: Path, name: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    text = f"Search the space of {path.name} for the best point, with confidence intervals."
    top = CommandParser(name, description=text, epilog=EXAMPLES.format(name=name), formatter_class=raw)
    add_sweep_options(top)
    return top


def add_sweep_options(top: argparse.ArgumentParser) -> None:
    """Add the options that every sweep has."""
    what = top.add_argument_group("selection")
    what.add_argument(
        "--scale", default="quick", help="size of the experiment: smoke, quick (default), digits or paper"
    )
    what.add_argument("--trials", type=int, metavar="N", help="number of trials, including those of earlier calls")
    what.add_argument("--seeds", metavar="N", help="seeds per trial: a number, counted from 0, or a list such as 0,1")
    what.add_argument("--sampler", choices=SAMPLERS, default="tpe", help="sampler of the points (default: tpe)")
    what.add_argument(
        "--early-stopping",
        choices=EARLY_STOPPING,
        default="none",
        help="rule that ends weak trials early, by Optuna (default: none; see docs/experiments.md)",
    )
    what.add_argument("--sampler-seed", type=int, default=0, metavar="N", help="seed of the sampler (default: 0)")
    what.add_argument(
        "--select",
        choices=("holdout", "val"),
        default="holdout",
        help="images that trials are scored on (default: holdout); val, the reported set, biases the reported scores",
    )
    what.add_argument("changes", nargs="*", metavar="FIELD=VALUE", help="fields of all runs")
    how = top.add_argument_group("execution")
    add_placing(how)
    how.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes per run, which share its batches (default: 1)"
    )
    how.add_argument(
        "--trial-timeout", type=float, metavar="SECONDS", help="fail a trial that takes longer than SECONDS"
    )
    where = top.add_argument_group("output")
    where.add_argument("--runs-dir", default="runs", metavar="DIR", help="directory of runs and sweeps (default: runs)")
    where.add_argument(
        "--report-dir", metavar="DIR", help="directory of the page (default: reports/<scale>/sweep_<name>)"
    )
    where.add_argument(
        "--publish", action="store_true", help="write page, trials and records to reports/published/sweep_<name>"
    )
    where.add_argument("--study", metavar="NAME", help="name of the sweep's directory (default: sweep and scale)")
    where.add_argument(
        "--database", metavar="URL", help="URL of Optuna's storage (default: a journal beside the trials)"
    )
    then = top.add_mutually_exclusive_group()
    then.add_argument(
        "--dry-run", action="store_true", help="print the planned runs and their estimated time, and exit"
    )
    then.add_argument("--render", action="store_true", help="write the page from existing records, and run nothing")
    add_pricing(top)
    top.add_argument("--no-finals", action="store_true", help="skip retraining the best points on fresh seeds")
