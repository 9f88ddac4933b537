"""The command of a sweep, with the same options from its script and from ``viladiff sweep``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from viladiff.cli.common import parse_arguments, run_command
from viladiff.cli.tables import add_placing

SAMPLERS = ("tpe", "gp", "cmaes", "random", "grid")
SCHEDULERS = ("none", "asha", "hyperband", "median")
EXAMPLES = """\
examples:
  {name} --dry-run                        what is searched, what would run, and how long it would take
  {name}                                  scale quick: minutes on two cores
  {name} --scale digits --trials 40       the embedded data set in full; again with 60: twenty more
  {name} --sampler random --scheduler asha --seeds 1
  {name} --scale digits --address auto --gpus-per-trial 0.5 --storage /shared/runs

The same command continues where the last one stopped and trains nothing twice. Points are chosen by images that are
held out of the labelled list; the best ones are then trained anew on fresh seeds, and only those scores are quoted.
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
    text = f"Searches the space of {path.name}, and says which point is best and how sure that is."
    top = argparse.ArgumentParser(name, description=text, epilog=EXAMPLES.format(name=name), formatter_class=raw)
    add_sweep_options(top)
    return top


def add_sweep_options(top: argparse.ArgumentParser) -> None:
    """Add the options that every sweep has."""
    what = top.add_argument_group("what")
    what.add_argument("--scale", default="quick", help="size of experiment: smoke, quick (default), digits or paper")
    what.add_argument("--trials", type=int, metavar="N", help="points in all, those of earlier calls included")
    what.add_argument("--seeds", metavar="N", help="seeds of each trial: so many, from 0; or a list such as 0,1")
    what.add_argument("--sampler", choices=SAMPLERS, default="tpe", help="where points come from (default: tpe)")
    what.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default="none",
        help="Optuna's pruner that stops trials early (default: none; docs/experiments.md has what stopping does)",
    )
    what.add_argument("--sampler-seed", type=int, default=0, metavar="N", help="names the sampler's draws")
    what.add_argument(
        "--select",
        choices=("holdout", "val"),
        default="holdout",
        help="images that points are chosen by; val is the reported set, and looking at it spoils what is reported",
    )
    what.add_argument("changes", nargs="*", metavar="FIELD=VALUE", help="fields for every run")
    how = top.add_argument_group("how")
    add_placing(how)
    how.add_argument("--workers", type=int, default=1, metavar="N", help="processes that share each run's batches")
    how.add_argument("--trial-timeout", type=float, metavar="SECONDS", help="a trial that takes longer has failed")
    where = top.add_argument_group("where")
    where.add_argument("--storage", default="runs", metavar="DIR", help="directory of runs and sweeps (default: runs)")
    where.add_argument("--out", metavar="DIR", help="directory of the page (default: reports/<scale>/sweep_<name>)")
    where.add_argument(
        "--publish", action="store_true", help="page, trials and records to reports/published/sweep_<name>"
    )
    where.add_argument("--study", metavar="NAME", help="name of the sweep's directory (default: sweep and scale)")
    where.add_argument(
        "--database", metavar="URL", help="where Optuna keeps its study (default: a journal beside the trials)"
    )
    then = top.add_mutually_exclusive_group()
    then.add_argument("--dry-run", action="store_true", help="say what would run and what it would take, and stop")
    then.add_argument("--render", action="store_true", help="write the page of what there is, and run nothing")
    top.add_argument("--no-finals", action="store_true", help="leave out the training of the best points anew")
