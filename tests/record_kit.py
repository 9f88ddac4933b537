"""Records for tests: those that ``tests/make_records.py`` made, and made-up ones whose names match what they say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from viladiff.runs.job import PlannedRun
from viladiff.runs.record import RunRecord, load_record
from viladiff.runs.run_name import Content, run_name

LAYER = Path(__file__).resolve().parent / "records"
"""A layer of a store."""
SHORT_RUNS = LAYER / "short" / "records"
_CHANGED: dict[str, dict[str, Any]] = {}


def made(name: str) -> RunRecord:
    """``made("viladiff-183-0")``: of a run of a few steps."""
    return load_record(SHORT_RUNS / f"{name}.json")


def name_of(**changed: Any) -> str:
    """The name of a made-up run with these changed fields, of revisions 0 and without fingerprints."""
    found = run_name(Content(0, 0, changed, int(changed.get("seed", 0)), "fp32", False, {}))
    _CHANGED[found] = changed
    return found


def told(run_id: str) -> dict[str, Any]:
    """What a record of a run named by ``name_of`` says that its name is a hash of."""
    changed = _CHANGED[run_id]
    config = {"seed": changed.get("seed", 0), "train.precision": "fp32", "train.tf32": False, **changed}
    about = {"fingerprints": {}, "core_revision": 0, "method_revision": 0}
    return {"run_id": run_id, "config": config, "changed": changed, **about}


def bound(record: RunRecord, **fields: Any) -> RunRecord:
    """The record with other fields, under the name that these give."""
    return RunRecord(**named({**record.model_dump(), **fields}))


def named(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a record with config made to agree with changed fields, and the name that they give."""
    config = {"seed": 0, "train.precision": "fp32", "train.tf32": False, **fields["config"], **fields["changed"]}
    revisions = fields.get("core_revision", 0), fields.get("method_revision", 0)
    how = config["seed"], config["train.precision"], config["train.tf32"]
    run_id = run_name(Content(*revisions, fields["changed"], *how, fields["fingerprints"]))
    about = dict(zip(("core_revision", "method_revision"), revisions, strict=True))
    return {**fields, **about, "config": config, "run_id": run_id}


_PRINTS: dict[object, dict[str, str]] = {}


def content_of(run: PlannedRun, **changes: object) -> dict[str, Any]:
    """What the record of a planned run says that its name is a hash of; ``changes`` may be under ``runtime`` alone."""
    from viladiff.methods import METHODS
    from viladiff.runs.config import CORE_REVISION, RunConfig, flatten, override
    from viladiff.runs.config import non_default_fields as changed
    from viladiff.training.fingerprints import fingerprints

    cfg = override(RunConfig(), {**run.changes, **changes})
    key = cfg.data, cfg.model, cfg.eval.split
    if key not in _PRINTS:
        _PRINTS[key] = fingerprints(cfg)
    revisions = {"core_revision": CORE_REVISION, "method_revision": METHODS[cfg.method.name].revision}
    about = {"config": flatten(cfg), "changed": changed(cfg), "fingerprints": _PRINTS[key]}
    return {"run_id": run.run_id, **about, **revisions}
