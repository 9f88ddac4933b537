"""Preview of a run, loading of a finished one, and its repeated evaluation."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from viladiff.config.base import INTEGER, unflatten
from viladiff.core.atomic import write_atomically
from viladiff.core.distributed import tf32
from viladiff.data.dataset import Dataset
from viladiff.data.files.run_checks import check_files
from viladiff.data.loading.picture_space import picture_space, refuse_full_disk
from viladiff.evaluation.pixel_counts import to_scores
from viladiff.evaluation.protocols import STREAMS
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.batch_norm import statistics_notes
from viladiff.models.encoders.build import input_note, weights_fault
from viladiff.runs.checkpoint import load_file
from viladiff.runs.config import ConfigError, RunConfig, override
from viladiff.runs.gradient_shares import measured_steps
from viladiff.runs.record import RunRecord, load_record
from viladiff.training.errors import check_inputs
from viladiff.training.feasibility import refuse_infeasible, refuse_scoring
from viladiff.training.fingerprints import data_facts
from viladiff.training.launch import run_in_processes
from viladiff.training.optim import total_steps
from viladiff.training.step_work import empty_method

if TYPE_CHECKING:
    from torch import Tensor


def preview_run(cfg: RunConfig) -> dict[str, Any]:
    """Return name, directory, length, images and parameters of ``fit(cfg)``; may render data, trains nothing.

    Files are checked as in ``fit``, which then reuses the results. Raises ValueError as it does. No network is used;
    weights that a start would download are a note.
    """
    from viladiff.training.trainer import Trainer

    run = Trainer(cfg)
    data = data_facts(run.dataset)
    refuse_infeasible(cfg, data, weights=False)
    build = run.build()
    if cfg.model.pretrained == "timm" and cfg.model.weights is None:  # which would ask a network for news of them
        build = replace(build, model=override(cfg, {"model.pretrained": "none"}).model)
    method = METHODS[cfg.method.name](cfg.method, build)
    notes = [
        *filter(None, [weights_fault(cfg.model)]),
        *check_files(run.dataset),
        *method.student.encoder.notes,
        *statistics_notes(method, run.device, cfg.runtime.workers),
        *input_note(cfg.model, cfg.data.pixels.inputs),
    ]
    check_inputs(cfg, method, data)
    done, begun = (run.directory / name for name in ("record.json", "checkpoint.pt"))
    state = "finished" if done.exists() else "interrupted; would go on" if begun.exists() else "new"
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in method.eval_networks().items()}
    return {
        "run": run.name,
        "directory": run.directory,
        "state": state,
        "device": run.device,
        "steps": total_steps(cfg, run.dataset, method.required_views().unlabelled),
        "list of labelled images": run.dataset.split_name or "the data set's own",
        "labelled images": len(run.dataset.labelled),
        "unlabelled images": len(run.dataset.unlabelled) if method.required_views().unlabelled else "not used",
        "validation images": len(run.dataset.val_images),
        "captions": run.dataset.caption_source,
        **_stored(cfg, run.dataset),
        **_measuring(cfg.runtime.gradient_shares, total_steps(cfg, run.dataset, method.required_views().unlabelled)),
        **{f"parameters of {name}": f"{count:,}" for name, count in counts.items()},
        "trained parameters": f"{sum(p.numel() for p in method.parameters() if p.requires_grad):,}",
        **({"notes": "; ".join(notes)} if notes else {}),
    }


def _stored(cfg: RunConfig, dataset: Dataset) -> dict[str, str]:
    """Return the size of the picture cache, if one is asked for."""
    if not cfg.runtime.picture_cache:
        return {}
    space = picture_space(dataset, METHODS[cfg.method.name].views.unlabelled)
    refuse_full_disk(space)
    return {"picture cache": space.text()}


def _measuring(each: int, steps: int) -> dict[str, str]:
    """Return the cost of gradient shares if it exceeds 1 %: a backward pass a part, two thirds of a step's time."""
    count = len(measured_steps(each, steps))
    more = 200 * count / (3 * steps)
    what = f"at {count} of {steps} steps, at most {more:.1f} % more time for each part of the loss"
    return {"gradient shares": what} if more > 0.1 else {}


class Finished(NamedTuple):
    """A finished run's directory, loaded."""

    directory: Path
    record: RunRecord
    cfg: RunConfig


def load_run(directory: Path | str, changes: Mapping[str, object] | None = None) -> Finished:
    """Load the run of a directory, optionally with other ``eval`` and ``runtime`` fields; the record is unchanged.

    Raises ConfigError for other fields, ValueError if there is no finished run or its network has been removed.
    """
    directory, changes = Path(directory), changes or {}
    if not (directory / "record.json").is_file():
        raise ValueError(f"{directory}: no record.json in it, so it is not the directory of a finished run")
    wrong = [path for path in changes if path.split(".")[0] not in ("eval", "runtime")]
    if wrong:
        raise ConfigError(f"{wrong[0]}: would be another run; of a finished one only eval and runtime can be changed")
    if not (directory / "checkpoint.pt").is_file():
        raise ValueError(f"{directory}: no checkpoint.pt in it (viladiff runs gc removes it), so no network is left")
    record = load_record(directory / "record.json")
    cfg = override(RunConfig(**unflatten(record.config)), {"runtime.workers": 1, **changes})
    return Finished(directory.resolve(), record, cfg)


def load_method(run: Finished) -> Method:
    """Load the method of the run's last step, on the CPU, in evaluation mode; no data set is opened.

    Raises ValueError if the checkpoint is damaged or of another version.
    """
    path = run.directory / "checkpoint.pt"
    state: dict[str, Tensor] = load_file(path)["method"]
    method = empty_method(run.cfg, run.record.class_names, text_dim(state))
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is of another version of this model ({last_line(error)})") from error
    return method.eval()


def text_dim(state: Mapping[str, Tensor]) -> int:
    """Return the channels of a word, from the first layer that reads one or the classes' texts; 1 without either."""
    ends = ("words.0.weight", "class_texts")
    return next((value.shape[-1] for name, value in state.items() if name.endswith(ends)), 1)


def last_line(error: Exception) -> str:
    """Return the end of a message that lists everything; it names a parameter."""
    return str(error).splitlines()[-1].strip()


def evaluate_run(directory: Path | str, changes: Mapping[str, object]) -> dict[str, Any]:
    """Evaluate a finished run again: ``{network: {stream: {score: value}}}`` under ``scores``.

    ``eval`` and ``runtime`` may be changed as in ``load_run``. ``confusion`` holds {network: {stream: rows of counts}},
    truth down, prediction across. Several workers share the images, each counted once. Raises as ``load_run``, and
    ValueError if the data cannot be read.
    """
    rest = {path: value for path, value in changes.items() if path != "runtime.workers"}
    run, workers = load_run(directory, rest), _count(changes.get("runtime.workers", 1))
    if workers == 1:
        return _evaluated(run)
    with tempfile.TemporaryDirectory() as place:
        answer = run_in_processes(_evaluated_worker, run.cfg, workers, str(run.directory), rest, f"{place}/found.json")
        return json.loads(Path(answer).read_text(encoding="utf-8"))


def _count(workers: object) -> int:
    """Parse the number of workers, without the configuration: its check of the training batch does not apply here."""
    if not INTEGER.fullmatch(str(workers)) or int(str(workers)) < 1:
        raise ConfigError(f"runtime.workers = {workers!r}: must be a whole number, 1 or more")
    return int(str(workers))


def _evaluated_worker(cfg: RunConfig, directory: str, changes: dict[str, object], into: str) -> str:
    found = _evaluated(load_run(directory, changes))
    if dist.get_rank() == 0:
        write_atomically(Path(into), json.dumps(found).encode())
    return into


def _evaluated(finished_run: Finished) -> dict[str, Any]:
    from viladiff.evaluation.evaluator import compute_meters
    from viladiff.training.trainer import Trainer

    record, cfg = finished_run.record, finished_run.cfg
    run = Trainer(cfg)
    run.method = load_method(finished_run).to(run.device)
    if run.dataset.class_names != tuple(record.class_names):
        raise ValueError(f"the data have the classes {run.dataset.class_names}, the run had {record.class_names}")
    refuse_scoring(cfg, data_facts(run.dataset))
    same = run.fingerprints["data"] == record.fingerprints.get("data")
    found: dict[str, Any] = {"scores": {}, "confusion": {}}
    for name, network in run.method.eval_networks().items():
        with tf32(cfg.train.tf32):
            measured = compute_meters(run, network, STREAMS, cfg.eval.boundary)
        scores = to_scores(measured)
        found["scores"][name] = {stream: score.stored() for stream, score in scores.items()}
        found["confusion"][name] = {stream: measured[stream].confusion().tolist() for stream in scores}
    return {
        "run": record.run_id,
        "protocol": cfg.eval.protocol,
        "data": "as in training" if same else "not as in training: files or lists have changed since",
        **found,
    }
