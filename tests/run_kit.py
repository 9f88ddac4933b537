"""What tests share that look at processes or at a trained run."""

from __future__ import annotations

from pathlib import Path

from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import fit


def alive(pids: list[int]) -> list[int]:
    """Those that still run; one that ended and was not yet asked for its status does not."""

    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "X"

    return [pid for pid in pids if state(pid) not in "ZX"]


def short_run(out: Path, method: str, **more: object) -> Path:
    """The directory of a run of two steps, scored on five images."""
    changes = {
        "method.name": method,
        "train.steps": 2,
        "data.batch_labelled": 4,
        "eval.max_images": 5,
        "eval.boundary": False,
        "runtime.runs_dir": str(out),
        "runtime.progress": False,
        "runtime.threads": 1,
        **more,
    }
    return fit(override(RunConfig(), changes)).directory
