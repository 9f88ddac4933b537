"""The counted cost of planned runs, stored in the cache folder, one for each distinct step; reading loads no torch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from viladiff.core.atomic import write_atomically
from viladiff.core.hashing import sha256_hex
from viladiff.core.progress import tracked
from viladiff.data.cache import cache_dir
from viladiff.data.files.known_splits import LISTS
from viladiff.evaluation.devices import Device
from viladiff.evaluation.step_time import Load, step_seconds
from viladiff.runs.job import DataFacts, PlannedRun

if TYPE_CHECKING:
    from viladiff.runs.config import RunConfig

POOLS = {"coco": 118_287} | {one.dataset: one.size for one in LISTS if one.family == one.split == "train"}
"""Training images by data set, where its files are not here."""
SCORED = {one.dataset: one.size for one in LISTS if one.family == one.split == "val"}
"""Validation images, likewise."""
PICTURES = {"cityscapes": (1024, 2048)}
"""Height and width of validation images, where all have one size."""
_STEP = (
    *("data.dataset", "data.crop", "data.cutmix_grid", "data.captions", "data.batch_labelled", "data.batch_unlabelled"),
    *("train.precision", "train.grad_accum_steps", "optim.name", "optim.momentum", "optim.clip_norm"),
)
_NOT_COUNTED = ("inference", "tables", "sweeps", "report", "cluster", "experiments", "cli")
"""Packages that no step needs; a change of them leaves the stored counts valid."""
_CONTENT = ("model.weights", "model.pretrained")


class CountedStep(NamedTuple):
    """One worker's step."""

    loads: tuple[Load, ...]
    peak_bytes: int
    checkpoint_bytes: int
    passes: int
    """Images that go forwards through an encoder in a step, those that go backwards too counted three times."""

    def seconds(self, device: Device, tf32: bool = False) -> float:
        """Return the estimated seconds of a step."""
        return step_seconds(self.loads, device, tf32)


class CountedSteps:
    """Costs by planned run; what is not stored is counted, which takes seconds and loads torch."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root
        self._known: dict[str, CountedStep | None] = {}

    @cached_property
    def _folder(self) -> Path:
        from viladiff.training.checked import state_of_code  # loads data sets, which a plan of known times does without

        return (cache_dir() if self._root is None else self._root) / "counted" / state_of_code(_NOT_COUNTED)

    def of(self, run: PlannedRun) -> CountedStep | None:
        """Return the cost of a step; None where it cannot be counted, as where the method reads its own numbers."""
        key = self._key(run)
        if key not in self._known:
            self._known[key] = self._read(key) or self._count(run, key)
        return self._known[key]

    def prepare(self, runs: Iterable[PlannedRun]) -> None:
        """Count what is not stored of these runs; show on stderr how far it is if that takes long."""
        todo = {key: run for run in runs if (key := self._key(run)) not in self._known}
        for key in list(todo):
            found = self._read(key)
            if found is not None:
                self._known[key] = found
                del todo[key]
        for key, run in tracked([*todo.items()], "counting the work of each distinct step"):
            self._known[key] = self._count(run, key)

    def _key(self, run: PlannedRun) -> str:
        """Return a name of all that decides a step's work. Of a method's numbers it counts whether they are 0."""
        fields = {
            path: bool(value) if isinstance(value, float) and path.startswith("method.") else value
            for path, value in run.changed.items()
            if path.startswith(("method.", "model.")) or path in _STEP
            if path not in _CONTENT
        }
        classes = run.data.classes if run.data else None
        return sha256_hex(json.dumps([fields, run.workers, classes], sort_keys=True))[:24]

    def _read(self, key: str) -> CountedStep | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            found = json.loads((self._folder / f"step-{key}.json").read_text(encoding="utf-8"))
            loads = tuple(Load(*load) for load in found["loads"])
            return CountedStep(loads, found["peak_bytes"], found["checkpoint_bytes"], found["passes"])
        return None

    def _count(self, run: PlannedRun, key: str) -> CountedStep | None:
        from viladiff.methods import METHODS
        from viladiff.runs.config import RunConfig, override
        from viladiff.training.step_work import count_step

        cfg = override(RunConfig(), {**run.changes, "runtime.workers": run.workers})
        try:
            work = count_step(cfg, run.data.classes if run.data else 2)
        except (RuntimeError, ValueError, NotImplementedError):
            return None  # what cannot be trained is refused elsewhere, with what to set
        merged: dict[Load, int] = {}
        for line in work.lines:
            one = line.load._replace(times=1)
            merged[one] = merged.get(one, 0) + line.load.times
        loads = tuple(load._replace(times=times) for load, times in merged.items())
        passes = METHODS[cfg.method.name].step_cost
        each = cfg.data.batch_labelled // cfg.runtime.workers
        images = each * (passes.forward + 2 * passes.backward) if passes else 3 * each
        found = CountedStep(loads, work.peak_bytes, work.checkpoint_bytes, images)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / f"step-{key}.json", json.dumps(found._asdict()).encode())
        return found


def scoring_seconds(run: PlannedRun, cost: CountedStep, step: float) -> float:
    """Return the estimated seconds of all evaluations: each network goes forwards through each validation image.

    An image is taken as large as a crop, or as many windows of that size as the protocol cuts out of it.
    """
    images = SCORED.get(str(run.changed.get("data.dataset")), 0) * windows(run.changed)
    return evaluations(run.changed, run.steps, run.data) * images * step / max(1, cost.passes)


def windows(changed: Mapping[str, Any]) -> int:
    """Return the windows of an image under ``sliding_window`` where all have one known size, else 1."""
    dataset = str(changed.get("data.dataset"))
    if dataset not in PICTURES:
        return 1
    from viladiff.data.sources import DATASETS

    crop = int(changed.get("data.crop", DATASETS[dataset].config.model_fields["crop"].default))
    usual = DATASETS[dataset].presets.get("eval", {}).get("protocol")
    if changed.get("eval.protocol", usual) != "sliding_window":
        return 1
    stride = max(1, 2 * crop // 3)  # as viladiff.evaluation.protocols.window_stride, which loads torch
    return math.prod(1 + max(0, -(-(side - crop) // stride)) for side in PICTURES[dataset])


def evaluations(changed: Mapping[str, Any], steps: int, data: DataFacts | None) -> int:
    """Return how often a run is scored, about: at the end, and as ``eval.every_steps`` or ``every_epochs`` says."""
    if changed.get("eval.every_steps"):
        return 1 + (steps - 1) // int(changed["eval.every_steps"])
    if changed.get("eval.every_epochs") and changed.get("train.epochs"):
        return math.ceil(float(changed["train.epochs"]) / float(changed["eval.every_epochs"]))
    return 1


def assumed_run(changes: Mapping[str, object], name: str) -> PlannedRun | None:
    """Return the run of a data set whose files are not here, with as many images as it is published with.

    None for a data set without a published size. Raises ConfigError for fields that contradict each other.
    """
    from viladiff.data.sources import DATASETS
    from viladiff.methods import METHODS
    from viladiff.runs.config import RunConfig, non_default_fields, override
    from viladiff.runs.run_name import arithmetic

    cfg = override(RunConfig(), changes)
    pool, classes = POOLS.get(cfg.data.dataset), DATASETS[cfg.data.dataset].num_classes
    if pool is None or classes is None:
        return None
    labelled = int(cfg.data.split) if cfg.data.split.isdigit() else pool
    fields = {path: value for path, value in non_default_fields(cfg).items() if not path.startswith("runtime.")}
    how = cfg.runtime.workers, cfg.runtime.threads, arithmetic(cfg.train.precision, cfg.train.tf32)
    steps = _steps(cfg, labelled, pool - labelled, METHODS[cfg.method.name].views.unlabelled)
    return PlannedRun(name, dict(changes), name, steps, fields, *how, DataFacts(classes, pool - labelled, True))


def _steps(cfg: RunConfig, labelled: int, unlabelled: int, uses_unlabelled: bool) -> int:
    """Return ``viladiff.training.optim.total_steps`` of lists that are not opened."""
    from types import SimpleNamespace

    from viladiff.training.optim import total_steps

    lists = SimpleNamespace(labelled=range(labelled), unlabelled=range(unlabelled))
    return total_steps(cfg, lists, uses_unlabelled)  # type: ignore[arg-type]
