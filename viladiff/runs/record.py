"""The record of a finished run: its numbers, and the evidence for them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from viladiff.config.base import error_reason
from viladiff.core.atomic import write_atomically
from viladiff.core.hashing import sha256_hex
from viladiff.core.messages import errors_name, shown
from viladiff.runs import gradient_shares as shares
from viladiff.runs.run_name import WEIGHTS, Content, arithmetic, run_name


class RunRecord(BaseModel):
    """One run, as in ``record.json``; what was not measured is None, never 0; mIoU and the like are in [0, 1].

    A field that only another version knows is kept as it is, so that reading and writing again loses nothing.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    run_id: str
    config: dict[str, Any]
    """Every field by dotted path."""
    changed: dict[str, Any]
    """The fields that differ from their defaults."""
    fingerprints: dict[str, str]
    core_revision: int
    """``viladiff.runs.config.CORE_REVISION`` that the run was made with."""
    method_revision: int
    """Its method's ``revision``, likewise."""
    steps: int
    miou: float | None
    """The headline: last step, ``predictor()``, the stream that the method names."""
    network: str
    """Which network the headline comes from."""
    stream: str
    scores: dict[str, dict[str, dict[str, Any]]]
    """network, stream, score; ``per_class`` is a list."""
    best: dict[str, Any] | None
    """Best of all evaluations, for comparison only; ``picked_on_reported`` says that the images which it was picked on,
    ``picked_on``, are those that it reports, and ``evaluations`` from how many."""
    history: list[dict[str, Any]]
    pseudo_labels: dict[str, float | None]
    """Coverage, precision, rescued and spoiled shares on weakly viewed validation images, before and after MixE."""
    class_names: list[str]
    captions: str
    text_encoder: str
    encoder: str
    pretrained: str
    wall_seconds: float | None
    """Of all legs of the run; what a kill undid after a checkpoint is not in it."""
    train_seconds: float
    seconds_per_step: float | None
    peak_memory_bytes: int | None
    """Of the GPU where there is one, else main memory of the first worker; the most of all legs."""
    workers: int
    threads: int
    device: str
    versions: dict[str, str]
    git: dict[str, Any]
    step_log: str = "steps.jsonl"
    cpu_seconds: float | None = None
    """Processor time of the first worker's process in ``train_seconds``, all its threads added; not that of programs
    that decode. Other work on the machine lengthens it less than the clock's. None where a leg did not note it."""
    loader_share: float | None = None
    """Share of ``train_seconds`` in which the first worker waited for batches, from 0 to 1; of a run on a CPU, in which
    it made them. None where a leg did not note it."""
    notes: list[str] = []
    """What the method said before training of what it lacked here, a sentence each."""
    split_name: str = ""
    """Which list of files the labelled images are, and whether it is a published one; empty for built-in data sets."""
    scale: str = ""
    """Size of experiment that the run was made for; empty for a run of its own."""
    gradient_shares: dict[str, Any] | None = None
    """Norms of the gradients of the loss's parts where ``runtime.gradient_shares`` asked for them: ``measured``, a step
    each with ``norms`` and ``cosines`` to the supervised gradient by place and part; and ``fields``, which parts the
    method's fields weigh. ``viladiff.runs.gradient_shares.by_thirds`` makes shares of it."""
    processor: str = ""
    """Model of the first worker's processor, as the kernel names it; empty where it was not noted."""
    palette: list[tuple[int, int, int]] | None = None
    """Red, green and blue of each class in the masks, where they are in colours, in which predictions are written."""
    finished: str = ""
    """When the record was made, UTC, as 2026-01-31T12:00:00Z; empty where it was not noted."""

    @property
    def precision(self) -> str:
        """Arithmetic of its training: ``fp32``, ``bf16`` or ``fp16``, and ``fp32, TF32`` where that was allowed."""
        return arithmetic(self.config.get("train.precision", "fp32"), bool(self.config.get("train.tf32")))

    @property
    def unlearned(self) -> tuple[str, ...]:
        """Classes with a headline IoU of 0: they are in the truth or predicted, and no pixel of theirs is right."""
        per_class = self.scores.get(self.network, {}).get(self.stream, {}).get("per_class") or []
        return tuple(name for name, iou in zip(self.class_names, per_class, strict=False) if iou == 0)

    @property
    def scoring(self) -> str:
        """Arithmetic in which its networks were scored; ``fp32`` of built-in data and of earlier versions."""
        return self.fingerprints.get("scoring", "fp32")


def mismatch(record: RunRecord) -> str:
    """Return how a record's configuration contradicts its name; empty if it matches.

    The name is computed again from the record: changed fields, revisions, fingerprints, seed and precision. It
    authenticates no score. Fields at their defaults are compared by ``viladiff.runs.verify_and_gc.contradiction``.
    """
    config, changed = record.config, record.changed
    for path, value in changed.items():
        if path not in config or config[path] != value:
            there = shown(config.get(path, "missing"))
            return f"{shown(path)[1:-1]} is {shown(value)} among the changed fields and {there} in config"
    if type(config.get("seed")) is not int or not isinstance(config.get("train.precision"), str):
        return "config lacks seed or train.precision"
    revisions = record.core_revision, record.method_revision
    precision, tf32 = config["train.precision"], bool(config.get("train.tf32"))
    found = run_name(Content(*revisions, changed, config["seed"], precision, tf32, record.fingerprints))
    return "" if found == record.run_id else f"fields, revisions, fingerprints, seed and precision give {found}"


SHARES = ("miou", "boundary_iou", "trimap_miou", "pixel_accuracy", "per_class")
"""Scores in [0, 1]."""
_LARGEST = 2.0**63


def impossible(record: RunRecord) -> str:
    """Return the first number that no run can have measured; empty if there is none.

    Pages compute with these numbers, so values of another type or range must be refused here.
    """
    for name in ("steps", "train_seconds", "wall_seconds", "seconds_per_step", "cpu_seconds", "peak_memory_bytes"):
        value = getattr(record, name)
        if value is not None and not 0 <= value < _LARGEST:
            return f"{name}: must be a number from 0 to 2^63, got {_short(value)}"
    found: list[tuple[str, object]] = [("miou", record.miou)]
    if record.loader_share is not None and not _measured(record.loader_share, True):
        return f"loader_share: must be a number from 0 to 1, got {_short(record.loader_share)}"
    streams = [(f"{net}.{stream}", one) for net, those in record.scores.items() for stream, one in those.items()]
    events = [("best", record.best)] if record.best is not None else []
    events += [(f"history[{i}]", one) for i, one in enumerate(record.history)]
    for where, one in events:
        if type(step := one.get("step")) is not int or not 0 <= step < _LARGEST or "miou" not in one:
            return f"{where}: must have step, an integer from 0 to 2^63, and miou, got {_short(one)}"
    found += [(f"{where}.{name}", value) for where, one in streams for name, value in one.items()]
    found += [(f"{where}.miou", one["miou"]) for where, one in events]
    for name, value in found:
        score = name.rpartition(".")[2]
        listed = isinstance(value, list)
        if value is not None and score in SHARES and listed != (score == "per_class"):
            return f"{name}: must be {'a number' if listed else 'a list of numbers'}, got {_short(value)}"
        for number in value if isinstance(value, list) else (value,):
            if number is not None and not _measured(number, score in SHARES):
                return f"{name}: must be a number{' from 0 to 1' * (score in SHARES)}, got {_short(number)}"
    if not isinstance(revision := record.git.get("revision", ""), str | None):
        return f"git.revision: must be text, got {_short(revision)}"
    if any(not 0 <= level <= 255 for colour in record.palette or () for level in colour):
        return f"palette: must be levels from 0 to 255, got {_short(record.palette)}"
    return "" if record.gradient_shares is None else shares.fault(record.gradient_shares)


def _measured(value: object, share: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= 1 if share else abs(value) < _LARGEST


def _short(value: object) -> str:
    text = shown(value, 1000)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError for a repeated key, of which readers choose different values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"has {shown(next(name for name, count in counts.items() if count > 1))} twice")
    return found


def save_record(record: RunRecord, path: Path) -> None:
    """Write the record with its checksum, atomically, also across a power cut."""
    write_atomically(path, record_bytes(record))


def record_bytes(record: RunRecord) -> bytes:
    """Return what ``save_record`` writes: JSON, the checksum last."""
    rest = json.loads(record.model_dump_json())
    return json.dumps({**rest, "checksum": checksum(rest)}, indent=1, ensure_ascii=False, allow_nan=False).encode()


def checksum(rest: dict[str, Any]) -> str:
    """Return the SHA-256 of a record without its ``checksum``, over sorted compact JSON, whatever the file's layout.

    It covers the file's content, not the model's fields, so that fields added later invalidate no older record. Raises
    ValueError if a number is not finite or text has no UTF-8.
    """
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sha256_hex(text)


def strip_local_paths(record: RunRecord) -> RunRecord:
    """Return a copy for publication, without paths of this machine."""
    hidden = ("runtime.runs_dir", "runtime.data_root", "data.split_dir", "runtime.captions", "runtime.text_model")
    config, changed = (
        {name: value for name, value in fields.items() if name not in hidden}
        for fields in (record.config, record.changed)
    )
    for fields in (config, changed):
        for weights in WEIGHTS:
            if fields.get(weights):
                fields[weights] = Path(str(fields[weights])).name
    pretrained = Path(record.pretrained).name if record.config.get("model.weights") else record.pretrained
    return RunRecord(**{**record.model_dump(), "config": config, "changed": changed, "pretrained": pretrained})


class CorruptRecordError(ValueError):
    """The bytes are not those that ``save_record`` wrote; a sound record of another version is a plain ValueError."""


class ForgedRecordError(CorruptRecordError):
    """The record's configuration does not match its name."""


def load_record(path: Path) -> RunRecord:
    """Load a record.

    Raises ValueError that names the file if it cannot be read, its checksum is wrong or missing, a field that this
    version needs is missing or of another type, or its configuration does not match its name.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a file")  # a pipe would be waited for
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} is not a run's record: {error}") from error
    return parse_record(data, path)


def parse_record(data: bytes, path: Path | str) -> RunRecord:
    """Parse the record in the bytes of a file; ``path`` is for messages. Raises as ``load_record`` does."""
    with errors_name(path):
        return _parsed(data, path)


def _parsed(data: bytes, path: Path | str) -> RunRecord:
    try:
        rest = json.loads(data, object_pairs_hook=_once)
        if not isinstance(rest, dict):
            raise ValueError(f"holds a {type(rest).__name__}")
        written = rest.pop("checksum", None)
        found = checksum(rest)
    except (ValueError, RecursionError) as error:
        why = str(error).splitlines()[0] if data.strip() else "the file is empty"
        raise CorruptRecordError(f"{path} is not a run's record: {why}; train the run again with --restart") from error
    if written is None:
        raise CorruptRecordError(f"{path} is not a run's record: it has no checksum")
    if written != found:
        raise CorruptRecordError(
            f"{path} is damaged: its checksum is {shown(str(written)[:12])[1:-1]}, its content gives {found[:12]}"
        )
    try:
        record = RunRecord.model_validate(rest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        why = f"{field}: {error_reason(first)}"
        raise ValueError(f"{path} was written by another version of viladiff: {why}") from error
    if why := impossible(record):
        raise CorruptRecordError(f"{path} is not a run's record: {why}")
    if why := mismatch(record):
        raise ForgedRecordError(f"{path} does not match its name {record.run_id}: {why}")
    return record
