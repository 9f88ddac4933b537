"""Records learning curves over the joint space, for ``benchmarks/quality.py``: points spread evenly, three seeds each.

Each run is an ordinary one of ``sweep_joint`` at scale quick with 300 steps, scored on held-out images every 75.
Runs with a record in ``--runs-dir`` are skipped and interrupted ones are resumed; several calls may share the work.
Each call writes benchmarks/curves.csv, and where it comes from to curves.json, from all records that there are.

    python scripts/record_curves.py --dry-run               what is left
    python scripts/record_curves.py --shard 0/2             every second run, one thread; start 1/2 beside it
    python scripts/record_curves.py --points 8 --seeds 0    a first look
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from viladiff.cli.common import CommandParser
from viladiff.core.atomic import write_atomically
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import RunRecord
from viladiff.runs.store import Store
from viladiff.sweeps.space import Space, Value
from viladiff.sweeps.spec import SweepPlanner, load_sweep

ROOT = Path(__file__).resolve().parent.parent
CURVES = ROOT / "benchmarks" / "curves.csv"
CHANGES = {"train.steps": "300"}
POINTS, SEEDS = 24, (0, 1, 2)


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=POINTS, help="the first so many of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th run, beginning with the I-th")
    parser.add_argument("--runs-dir", default="runs/curves")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    index, count = map(int, args.shard.split("/"))
    sweep = load_sweep(ROOT / "tune" / "sweep_joint.toml")
    namer, store = SweepPlanner(sweep, "quick", CHANGES, "holdout"), Store(Path(args.runs_dir))
    points = spread(sweep.space, 64)
    # Whole seeds first, so that a campaign that is cut short has seen every point.
    wanted = [
        (number, seed, namer.planned(points[number], seed)) for seed in args.seeds for number in range(args.points)
    ]
    for number, seed, run in wanted[index::count]:
        if store.get(run.run_id) is None:
            print(f"point {number} seed {seed}", end=" ", flush=True)
            print("is to be run" if args.dry_run else train(run, store), flush=True)
    if not args.dry_run:
        write(store, [(number, seed, run.run_id) for number, seed, run in wanted], points, sweep.space)


def spread(space: Space, count: int) -> list[dict[str, Value]]:
    """Points of a scrambled Sobol' sequence, equally likely in each dimension's own measure; a power of two of them."""
    from scipy.stats import qmc

    drawn = qmc.Sobol(len(space), seed=5).random(count)
    return [
        {
            path: one.choices[min(int(u * len(one.choices)), len(one.choices) - 1)]
            if one.choices
            else one.number(float(u))
            for (path, one), u in zip(space.items(), row, strict=True)
        }
        for row in drawn
    ]


def train(run: PlannedRun, store: Store) -> str:
    """Train a run and return its result in a few words; a loss that is not finite is a result too."""
    from viladiff.runs.config import RunConfig, override
    from viladiff.runs.lease import LeaseLostError
    from viladiff.training.errors import TrainingError
    from viladiff.training.trainer import fit

    lease = store.lease(run.run_id)
    if lease is None:
        return "is in work elsewhere"
    here = {"runtime.runs_dir": str(store.root), "runtime.threads": 1, "runtime.progress": False}
    with lease:
        try:
            result = fit(override(RunConfig(), {**run.changes, **here}), lease=lease)
        except (TrainingError, LeaseLostError) as error:
            return str(error).splitlines()[0]
    return "no score" if result.miou is None else f"{100 * result.miou:.2f}, {result.record.train_seconds:.0f} s"


def write(store: Store, runs: Iterable[tuple[int, int, str]], points: list[dict[str, Value]], space: Space) -> None:
    """Write the table, a line a point, seed and step, and its provenance."""
    records = store.records()
    done = [(number, seed, records[run_id]) for number, seed, run_id in runs if run_id in records]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["point", "seed", "run", "step", "miou", *space])
    for number, seed, record in done:
        for entry in record.history:
            values = [points[number][path] for path in space]
            writer.writerow([number, seed, record.run_id, entry["step"], f"{entry['miou']:.6f}", *values])
    write_atomically(CURVES, buffer.getvalue().encode())
    told = json.dumps(provenance([record for _, _, record in done]), indent=1)
    write_atomically(CURVES.with_suffix(".json"), told.encode())
    print(f"{len(done)} curves in {CURVES.relative_to(ROOT)}")


def provenance(records: list[RunRecord]) -> dict[str, Any]:
    """Return the fields that the curves share, or all the values where they differ."""

    def all_of(values: Iterable[object]) -> list[str]:
        return sorted({json.dumps(value, sort_keys=True) for value in values})

    varied = {"seed", *(load_sweep(ROOT / "tune" / "sweep_joint.toml").space)}
    fixed = [
        {p: v for p, v in one.changed.items() if p not in varied and not p.startswith("runtime.")} for one in records
    ]
    return {
        "made by": "scripts/record_curves.py",
        "runs": len(records),
        "fields": all_of(fixed),
        "fingerprints": all_of(one.fingerprints for one in records),
        "revision": all_of(one.git.get("revision") for one in records),
        "versions": all_of(one.versions for one in records),
        "device": all_of(one.device for one in records),
        "threads": all_of(one.threads for one in records),
        "train hours": round(sum(one.train_seconds for one in records) / 3600, 2),
        "finished": max((one.finished for one in records), default=""),
    }


if __name__ == "__main__":
    main()
