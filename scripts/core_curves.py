"""Runs the campaign behind reports/published/core: three methods, five splits of ``digits``, three seeds.

Each seed draws its own labelled images, the same for all methods.

Runs that have a record there are skipped, interrupted ones continue from their checkpoint in ``--runs-dir``. Examples:

    python scripts/core_curves.py --dry-run               what is left
    python scripts/core_curves.py --shard 0/2             every second run, one thread; start 1/2 beside it
    python scripts/core_curves.py --methods viladiff --seeds 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from viladiff.cli.common import CommandParser
from viladiff.runs.config import RunConfig, override
from viladiff.runs.record import load_record, save_record, strip_local_paths
from viladiff.training.trainer import Trainer, fit

RECORDS = Path(__file__).resolve().parent.parent / "reports" / "published" / "core" / "records"
METHODS = ("supervised", "semibaseline", "viladiff")
SPLITS = ("92", "183", "366", "732", "1464")


def is_done(cfg: RunConfig, path: Path) -> bool:
    """Whether the record there is of this very run: one of an older revision or another data set is stale.

    So is one that cannot be used, which is said.
    """
    if not path.exists():
        return False
    try:
        return load_record(path).run_id == Trainer(cfg).name
    except ValueError as error:
        print(f"{error}; it is made anew")
        return False


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th run, beginning with the I-th")
    parser.add_argument("--runs-dir", default="runs/core")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    index, count = map(int, args.shard.split("/"))
    wanted = [(m, s, seed) for seed in args.seeds for m in args.methods for s in args.splits]
    for method, split, seed in wanted[index::count]:
        fields = {
            "method.name": method,
            "data.split": split,
            "eval.split": "test",
            "data.split_seed": seed,
            "seed": seed,
        }
        runtime = {"runtime.runs_dir": args.runs_dir, "runtime.threads": 1, "runtime.progress": False}
        cfg, path = override(RunConfig(), {**fields, **runtime}), RECORDS / f"{method}-{split}-{seed}.json"
        if is_done(cfg, path):
            continue
        print(f"{method} {split} seed {seed}", end=" ", flush=True)
        if args.dry_run:
            print("is to be run")
            continue
        result = fit(cfg)
        RECORDS.mkdir(parents=True, exist_ok=True)
        save_record(strip_local_paths(result.record), path)
        print("no score" if result.miou is None else f"{100 * result.miou:.2f}", flush=True)


if __name__ == "__main__":
    main()
