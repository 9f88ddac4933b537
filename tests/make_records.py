"""Makes the records of runs that tests read, in ``tests/records``: a layer of a store, of runs of a few steps.

To be run again, and its outcome committed, when a revision or a field's default changes:

    make records        or: python tests/make_records.py

It takes about a minute on one thread. No test reads a score of them as a figure.
"""

from __future__ import annotations

import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from viladiff.core.atomic import write_atomically
from viladiff.runs.config import RunConfig, override
from viladiff.runs.record import save_record, strip_local_paths
from viladiff.runs.store import Failure
from viladiff.training.errors import TrainingError
from viladiff.training.trainer import fit

RECORDS = Path(__file__).resolve().parent / "records"
TINY: dict[str, object] = {
    "train.steps": 4,
    "data.batch_labelled": 4,
    "eval.max_images": 8,
    "eval.every_steps": 2,
    "eval.boundary": False,
    "eval.split": "test",
}
HELD_OUT = {"data.holdout": 0.25, "eval.split": "holdout"}


def wanted() -> dict[str, dict[str, object]]:
    """Fields by the name of the record's file."""
    three = [(m, s, seed) for m in ("supervised", "semibaseline", "viladiff") for s in ("92", "183") for seed in (0, 1)]
    found: dict[str, dict[str, object]] = {
        f"{method}-{split}-{seed}": {"method.name": method, "data.split": split, "seed": seed}
        for method, split, seed in [*three, ("supervised", "1464", 2), ("fixmatch", "183", 0), ("unimatch", "183", 0)]
    }
    two_streams = {"method.name": "viladiff", "data.split": "183"}
    found["viladiff-183-0-no-mixe"] = {**two_streams, "method.mixe.enabled": False}
    found["viladiff-183-0-shuffled"] = {**two_streams, "data.captions": "shuffled"}
    found["supervised-183-0-bf16"] = {"method.name": "supervised", "data.split": "183", "train.precision": "bf16"}
    for rate in (0.003, 0.006):
        found[f"fixmatch-183-0-holdout-{rate}"] = {"method.name": "fixmatch", "optim.lr": rate, **HELD_OUT}
    return found


def main() -> None:
    """Replaces what is there once every run is done."""
    with tempfile.TemporaryDirectory() as folder:
        runtime = {"runtime.runs_dir": f"{folder}/runs", "runtime.threads": 1, "runtime.progress": False}
        made = Path(folder) / "made"
        (made / "short" / "records").mkdir(parents=True)
        for name, fields in wanted().items():
            record = fit(override(RunConfig(), {**TINY, **fields, **runtime})).record
            save_record(strip_local_paths(record), made / "short" / "records" / f"{name}.json")
            print(name, record.run_id, flush=True)
        write_atomically(made / "failure.json", failed(runtime).model_dump_json(indent=1).encode())
        shutil.rmtree(RECORDS, ignore_errors=True)
        shutil.copytree(made, RECORDS)


def failed(runtime: dict[str, str]) -> Failure:
    """What a store keeps of a run whose loss is not finite."""
    try:
        fit(override(RunConfig(), {**TINY, **runtime, "train.steps": 60, "optim.lr": 1e6, "runtime.log_every": 5}))
    except TrainingError as error:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        message = str(error).replace(str(runtime["runtime.runs_dir"]), "runs")
        return Failure(kind="nan", message=message, step=None, attempts=1, when=now)
    raise RuntimeError("the loss is finite at optim.lr = 1e6")


if __name__ == "__main__":
    main()
