"""What the faults happen to: the commands that write durable files, at the smallest size at which they write them all.

Each is a function of a directory that returns the command's exit status. ``train``, ``render`` are the commands
themselves. ``table``, ``sweep`` and ``captions`` run theirs with made-up runs and captions in this process, in place of
Ray's; all that they write is written by the program. The same commands through Ray are in ``through_ray``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from viladiff.cli import main, sweeps, tables
from viladiff.cluster import executor, sweep_executor
from viladiff.data.cache import Facts, open_or_make
from viladiff.runs.checkpoint import load_file
from viladiff.runs.job import Outcome, PlannedRun
from viladiff.runs.record import load_record, save_record
from viladiff.runs.store import Failure, Store
from viladiff.runs.verify_and_gc import garbage, remove
from viladiff.sweeps.trial_queue import TrialQueue
from viladiff.text.captioning import job as captioning
from viladiff.text.captioning.blip2 import CaptionerSpec, ImageRef

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("train", "train.steps=3", "data.batch_labelled=2", "eval.max_images=2", "eval.boundary=false")
TRAIN += ("model.pretrained=none", "model.decoder_width=16", "runtime.checkpoint_every=1", "runtime.log_every=1")
TRAIN += ("runtime.visualizations=1", "--threads", "1", "--quiet", "--runs-dir")
IMAGES = 12
TIMES = ("wall_seconds", "train_seconds", "cpu_seconds", "seconds_per_step", "peak_memory_bytes", "finished")
TIMES += ("loader_share", "git")


def train(root: Path) -> int:
    """``viladiff train`` of three steps with a checkpoint after each."""
    return main.main([*TRAIN, str(root / "runs")])


def render(root: Path) -> int:
    """A folder of the cache, as the built-in data and the vectors of texts are kept."""

    def fill(folder: Path) -> Facts:
        for name in ("images", "masks"):
            np.save(folder / f"{name}.npy", np.arange(20_000, dtype=np.int64), allow_pickle=False)
        return {"images": 1}

    try:
        made = open_or_make(root / "cache" / "digits" / "0123456789abcdef", fill)
    except ValueError as error:  # as the commands do
        print(f"error: {error}", flush=True)
        return 2
    return int(sorted(made.arrays) != ["images", "masks"])


def _made_up(store: Store, run: PlannedRun, score: float) -> None:
    """Write what a run writes, without its training; a run fails once, so that there is a note to be taken away."""
    directory = store.directory(run.run_id)
    while (lease := store.lease(run.run_id)) is None:  # another driver's, or a dead container's
        time.sleep(0.2)
    with lease:
        if store.get(run.run_id) is not None:
            return
        store.record_failure(run.run_id, Failure(kind="killed", message="x", step=1, attempts=1, when="2026-01-31"))
        from test_sweep_page import record_of

        save_record(record_of(run, score), directory / "record.json")
        store.clear_failure(run.run_id)


def _run_jobs(jobs: Any, store: Store, settings: Any, on_event: Callable[..., None] = print) -> list[Outcome]:
    for run in jobs:
        if store.get(run.run_id) is None:
            _made_up(store, run, 0.3 + int(run.run_id[:4], 16) / 2**18)
    return [Outcome(run.run_id, "done") for run in jobs]


def table(root: Path) -> int:
    """Table 5 at scale smoke, two rows, with its page."""
    executor.run_jobs = _run_jobs  # type: ignore[assignment]
    words = ["--scale", "smoke", "--rows", "supervised", "SemiBaseline", "--columns", "1"]
    words += ["--runs-dir", str(root / "runs"), "--report-dir", str(root / "page")]
    return tables.main(ROOT / "ablations" / "table5.toml", words)


def _search(queue: TrialQueue) -> None:
    queue.prime()
    while not queue.done:
        run = queue.next_job()
        if run is None:
            return
        queue.on_started(run.run_id)
        score = 0.5 - 0.1 * abs(float(str(run.changes["method.vila.lam"])) - 0.6)
        if queue.store.get(run.run_id) is None:
            _made_up(queue.store, run, score)  # type: ignore[arg-type]
        queue.on_result(run.run_id, {"state": "done", "miou": score})


def sweep(root: Path) -> int:
    """The sweep of lambda at scale smoke, four trials, with its page."""
    sweep_executor.run_search = _search  # type: ignore[assignment]
    words = ["--scale", "smoke", "--sampler", "random", "--trials", "4", "--no-finals"]
    words += ["--runs-dir", str(root / "runs"), "--report-dir", str(root / "page")]
    return sweeps.main(ROOT / "tune" / "sweep_lambda.toml", words)


def captions(root: Path) -> int:
    """A captioning job of eight images in parts of two."""
    who = CaptionerSpec("", "tiny", "0", ("a photo of",), 8)
    images = tuple(ImageRef(f"i{place}", f"{place}.jpg") for place in range(8))
    job = captioning.CaptioningJob("", images, who, root / "captions.parquet")
    try:
        left = captioning.state(job).todo
        if not left and job.out.is_file() and not job.parts.exists():
            return 0
        captioning.begin(job)
        for place in range(0, len(left), 2):
            rows = [(one.image, "a photo of", f"of {one.image}", "tiny", "0", 0.0, None) for one in left[place:][:2]]
            captioning.write_part(job, [captioning.rows_table(rows)])
        captioning.finish(job)
    except (ValueError, OSError) as error:
        print(f"error: {error}", flush=True)
        return 2
    return 0


TARGETS: dict[str, Callable[[Path], int]] = {
    "train": train,
    "table": table,
    "sweep": sweep,
    "captions": captions,
    "render": render,
}


def collect_garbage(root: Path) -> None:
    """``viladiff runs gc --keep-checkpoints``, an hour later: what is younger may be another machine's."""
    for path in root.rglob("*"):
        if path.name.startswith((".", "lease-")) and not path.is_symlink():
            os.utime(path, (1e9, 1e9))
    for item in garbage(Store(root / "runs"), keep_checkpoints=True, pages=root / "page", cache=root / "cache"):
        remove(item)


def contents(root: Path) -> dict[str, str]:
    """Each file and folder below ``root`` with a digest of what must be equal after a fault; a time need not."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = re.sub(r"part-[0-9a-f]{16}", "part", path.relative_to(root).as_posix())
        found[name] = "folder" if path.is_dir() else hashlib.sha256(_essence(path)).hexdigest()[:16]
    return found


def _essence(path: Path) -> bytes:
    if path.name == "record.json":
        fields = load_record(path).model_dump()
        for name in ("config", "changed"):
            fields[name].pop("runtime.runs_dir", None)
        return json.dumps({name: value for name, value in fields.items() if name not in TIMES}).encode()
    if path.suffix == ".pt":
        state = load_file(path)
        kept = {name: state[name] for name in ("method", "optimizer", "step", "history", "gradient_shares")}
        return repr(_plain(kept)).encode()
    if path.name == "optuna.journal" or path.parent.name == "plans":
        return b""  # a journal has every attempt; trials are compared
    if path.suffix in (".html", ".svg", ".md"):
        return re.sub(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\dZ?)?|\d+(\.\d+)? (s|min|h)\b", b"", path.read_bytes())
    return path.read_bytes()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return [(name, _plain(item)) for name, item in value.items()]
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
