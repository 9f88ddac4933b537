"""What must not change when modules are moved and renamed: names of runs, stored records, tables, what an import loads.

``make compat`` runs these tests and the golden losses. VILADIFF_COMPAT=write pins the present state anew.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").is_file())
COMPAT = ROOT / "tests" / "compat"
PINNED = {name: COMPAT / name for name in ("readings.json", "names.txt", "table5.csv", "imports.txt")}
WRITE = os.environ.get("VILADIFF_COMPAT") == "write"

SYMBOLS = {
    "parse record": "viladiff.runs.record:parse_record",
    "record": "viladiff.runs.record:RunRecord",
    "save record": "viladiff.runs.record:save_record",
    "failure": "viladiff.runs.store:Failure",
    "store": "viladiff.runs.store:Store",
    "verify": "viladiff.runs.verify_and_gc:verify",
    "load trials": "viladiff.sweeps.trials:load_trials",
    "dimension": "viladiff.sweeps.space:Dimension",
    "read captions": "viladiff.data.captions.files:read_captions",
    "load table": "viladiff.tables.spec_file:load_table",
    "plan": "viladiff.tables.plan:Plan",
    "cell": "viladiff.tables.plan:PlannedCell",
    "run": "viladiff.runs.job:PlannedRun",
    "judge": "viladiff.tables.claims:evaluate_claims",
    "render": "viladiff.report.table.table_page:render_table",
    "override": "viladiff.runs.config:override",
    "config": "viladiff.runs.config:RunConfig",
    "name runs": "viladiff.training.fingerprints:name_runs",
}
"""Where each part lies; the only place of these tests that knows."""


def part(key: str) -> Any:
    module, name = SYMBOLS[key].split(":")
    return getattr(importlib.import_module(module), name)


def pinned(name: str, text: str) -> str:
    """The pinned text of a file; ``text`` itself is written first where VILADIFF_COMPAT=write."""
    if WRITE:
        PINNED[name].write_text(text, encoding="utf-8")
    return PINNED[name].read_text(encoding="utf-8")


def shared(value: Any, written: Any, where: str) -> Any:
    """``value`` without the keys that the file does not have: one that was written must be read."""
    if isinstance(written, dict) and isinstance(value, dict):
        assert written.keys() <= value.keys(), f"{where}: no longer read: {sorted(written.keys() - value.keys())}"
        return {key: shared(value[key], written[key], f"{where}.{key}") for key in written}
    if isinstance(written, list) and isinstance(value, list | tuple) and len(written) == len(value):
        return [shared(one, other, f"{where}[{i}]") for i, (one, other) in enumerate(zip(value, written, strict=True))]
    return value


def readings() -> dict[str, Any]:
    """What reading gives, by file."""
    values: dict[str, Any] = {}
    for path in sorted((COMPAT / "runs").glob("*.json")):
        record = part("parse record")(path.read_bytes(), path)
        values[path.name] = shared(record.model_dump(mode="json", by_alias=True), _written(path), path.name)
    path = COMPAT / "failure.json"
    failure = part("failure").model_validate_json(path.read_bytes())
    values[path.name] = shared(failure.model_dump(mode="json", by_alias=True), _written(path), path.name)
    trials = sorted((COMPAT / "trials").glob("*.json"))
    for path, trial in zip(trials, part("load trials")(COMPAT / "trials"), strict=True):
        values[path.name] = shared(trial.model_dump(mode="json", by_alias=True), _written(path), path.name)
        values[path.name]["mean"] = trial.value
    path = COMPAT / "sweep.json"
    for name, text in _written(path)["space"].items():
        dimension = part("dimension").model_validate_json(text)
        values[f"{path.name} {name}"] = shared(
            dimension.model_dump(mode="json", by_alias=True), json.loads(text), path.name
        )
    for path in sorted(COMPAT.glob("captions.*")):
        values[path.name] = list(part("read captions")(path))
    return values


def _written(path: Path) -> Any:
    """What the file says, without its checksum."""
    rest = json.loads(path.read_bytes())
    rest.pop("checksum", None)
    return rest


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def test_twenty_files_of_all_kinds_read_as_before() -> None:
    digests = {name: _digest(value) for name, value in readings().items()}
    assert len(digests) >= 20
    assert json.loads(pinned("readings.json", json.dumps(digests, indent=1) + "\n")) == digests


def test_committed_records_have_their_right_names(tmp_path: Path) -> None:
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer" / "records").symlink_to(COMPAT / "runs")
    layers = [tmp_path / "layer", ROOT / "tests" / "records", ROOT / "reports" / "published"]
    findings = list(part("verify")(part("store")(tmp_path / "runs", layers)))
    assert len(findings) == sum(1 for layer in layers for _ in layer.glob("**/records/*.json")) >= 30
    assert [(str(found.path), found.text) for found in findings if not found.good] == []


CONFIGS: tuple[dict[str, object], ...] = (
    {},
    {"seed": 3, "data.split": "92"},
    {"method.name": "supervised", "optim.lr": 0.003, "train.precision": "bf16"},
    {"method.name": "unimatch_v2", "data.holdout": 0.25, "eval.split": "holdout", "train.steps": 40},
    {"method.name": "viladiff", "method.mixe.enabled": False, "data.captions": "shuffled"},
)


def test_planned_runs_keep_their_names() -> None:
    configs = [part("override")(part("config")(), fields) for fields in CONFIGS]
    names = [named.run_id for named in part("name runs")(configs)]
    assert pinned("names.txt", "\n".join(names) + "\n").split() == names


def test_table_5_is_the_same_from_the_same_records(tmp_path: Path) -> None:
    table = part("load table")(ROOT / "ablations" / "table5.toml")
    store = part("store")(tmp_path / "runs")
    rows, columns, seeds = range(len(table.rows)), range(2), (0, 1)
    cells, runs = [], {}
    for row, column, seed in ((r, c, s) for r in rows for c in columns for s in seeds):
        record = _record(row, column, seed)
        cells.append(part("cell")(row, column, seed, record.run_id))
        runs[record.run_id] = part("run")(record.run_id, {}, "title", record.steps, record.changed)
        if (row, column, seed) != (2, 1, 1):  # one that is missing
            store.directory(record.run_id).mkdir(parents=True)
            part("save record")(record, store.directory(record.run_id) / "record.json")
    plan = part("plan")(table, "digits", tuple(rows), tuple(columns), seeds, tuple(cells), runs)
    verdicts = part("judge")(plan, store.records())
    part("render")(plan, store, tmp_path / "page", command="python ablations/run_table5.py", verdicts=verdicts)
    text = (tmp_path / "page" / "table.csv").read_text(encoding="utf-8")
    assert pinned("table5.csv", text) == text


def _record(row: int, column: int, seed: int) -> Any:
    """A made-up record of a cell, with a share that is its own."""
    from record_kit import name_of, told

    written = json.loads((COMPAT / "runs" / "viladiff-183-0.json").read_text())
    share = 0.3 + 0.013 * row + 0.05 * column + 0.007 * ((seed * 3 + row) % 4)
    scores = {"miou": share, "per_class": [share, None], "boundary_iou": share / 2, "trimap_miou": None, "images": 4}
    about = told(name_of(row=row, column=column, seed=seed))
    about["config"] |= {"data.dataset": "digits", "data.split": "183"}
    network = {written["network"]: {written["stream"]: scores}}
    fields = {**written, **about, "scores": network, "miou": share, "best": None, "history": []}
    return part("record")(**{key: value for key, value in fields.items() if key != "checksum"})


# What an import loads

HEAVY = ("torch", "ray")
_IMPORT = """
import importlib, sys
for module in sys.argv[2:]:
    importlib.import_module(module)
    if loaded := [name for name in sys.argv[1].split() if name in sys.modules]:
        raise SystemExit(f"{module} loads {loaded[0]}")
"""
_MEASURE = """
import importlib, os, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os._exit(1)
sys.meta_path.insert(0, Refuse())
for module in sys.argv[2:]:
    if not (child := os.fork()):
        importlib.import_module(module)
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        importlib.import_module(module)  # the next children start with it
        print(module)
"""
"""Prints the modules that do not load a package; a child whose import begins to load it ends."""


def first_to_load(modules: Iterable[str], packages: Iterable[str]) -> str:
    """``module loads package`` of the first module, imported one after another, that does; empty if none does."""
    command = [sys.executable, "-c", _IMPORT, " ".join(packages), *modules]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stderr.strip()


def pin_imports() -> None:
    """Writes ``module packages`` a line: the heavy packages that come with it."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "viladiff").rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths if path.stem != "__main__"]
    without = {}
    for package in HEAVY:
        command = [sys.executable, "-c", _MEASURE, package, *names]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        without[package] = set(done.stdout.split())
    lines = [" ".join([name, *(package for package in HEAVY if name not in without[package])]) for name in names]
    PINNED["imports.txt"].write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_no_module_gains_torch_or_ray_when_it_is_imported() -> None:
    if WRITE:
        pin_imports()
    lines = [line.split() for line in PINNED["imports.txt"].read_text(encoding="utf-8").splitlines()]
    light = [name for name, *packages in lines if not packages]
    assert len(light) > 50 and ["viladiff.losses", "torch"] in lines
    assert first_to_load(light, HEAVY) == ""
    assert first_to_load((name for name, *packages in lines if "ray" not in packages), ["ray"]) == ""


@pytest.mark.parametrize("package", HEAVY)
def test_a_gained_import_is_seen(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gains.py").write_text(f"import {package}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert first_to_load(["json", "gains"], HEAVY) == f"gains loads {package}"
