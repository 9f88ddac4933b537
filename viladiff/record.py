"""What a finished run leaves behind: its numbers, and everything one needs to know to believe them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pydantic", "scikit-learn", "viladiff")


class RunRecord(BaseModel):
    """One run, as in ``record.json``; what was not measured is None, never 0; mIoU and the like are in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    config: dict[str, Any]
    """Every field by dotted path."""
    changed: dict[str, Any]
    """The fields that differ from their defaults."""
    fingerprints: dict[str, str]
    steps: int
    miou: float | None
    """The headline: last step, ``predictor()``, the stream that the method names."""
    network: str
    """Which network the headline comes from."""
    stream: str
    scores: dict[str, dict[str, dict[str, Any]]]
    """network, stream, score; ``per_class`` is a list."""
    best: dict[str, Any] | None
    """Best evaluation along the way, for comparison only: it is chosen on the set that it reports."""
    history: list[dict[str, Any]]
    pseudo_labels: dict[str, float | None]
    """Coverage, precision, rescued and spoiled shares on weakly viewed validation images, before and after MixE."""
    class_names: list[str]
    captions: str
    text_encoder: str
    encoder: str
    pretrained: str
    wall_seconds: float
    train_seconds: float
    seconds_per_step: float | None
    peak_memory_bytes: int
    workers: int
    threads: int
    device: str
    versions: dict[str, str]
    git: dict[str, Any]
    step_log: str = "steps.jsonl"


def save_record(record: RunRecord, path: Path) -> None:
    """Writes the record so that a reader sees none or all of it."""
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with temporary.open("w") as file:
        file.write(record.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def without_paths(record: RunRecord) -> RunRecord:
    """A copy fit to be published: it no longer says where on somebody's machine it ran."""
    hidden = ("runtime.out", "runtime.data_root")
    config, changed = (
        {name: value for name, value in fields.items() if name not in hidden}
        for fields in (record.config, record.changed)
    )
    return RunRecord(**{**record.model_dump(), "config": config, "changed": changed})


def load_record(path: Path) -> RunRecord:
    """Raises ValueError that names the file where it is not a record."""
    try:
        return RunRecord.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a run's record: {str(error).splitlines()[0]}") from error


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any]:
    """Revision of the checkout that the package is imported from, and whether it was changed; empty outside of one."""
    here = Path(__file__).parent
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        return {"revision": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return {}


def peak_memory() -> int:
    """Most bytes of main memory that this process has held so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
