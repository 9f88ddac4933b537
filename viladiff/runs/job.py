"""Messages between an executor and its observers; no Ray and no torch, so that pages and tests can read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from viladiff.runs.store import Failure

EventKind = Literal["started", "progress", "done", "failed", "retry", "stopped", "elsewhere", "waiting", "note"]
"""A note is about no run in particular: its ``run_id`` is empty, its ``message`` is for people."""
OutcomeState = Literal["done", "failed", "stopped"]


@dataclass(frozen=True)
class Event:
    """Something happened to one run; what does not apply is None."""

    kind: EventKind
    run_id: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    miou: float | None = None
    """In [0, 1]."""
    message: str = ""


@dataclass(frozen=True)
class Outcome:
    """The end of one run."""

    run_id: str
    state: OutcomeState
    failure: Failure | None = None
    attempts: int = 1
    """0 where another driver did it, or it was done already."""
    began: float | None = None
    """Unix time at which ``fit`` was entered in the last attempt; None where this driver did not train it."""
    ended: float | None = None
    worker: str = ""
    """Node and process that trained it."""


@dataclass(frozen=True)
class ExecutionSettings:
    """The distribution of runs over processors. Raises ValueError for invalid numbers."""

    threads: int = 1
    """CPU threads, and so CPU resources, of a worker, unless a run says otherwise; the largest counts for all."""
    gpus_per_trial: float | None = None
    """None: the GPUs that there are, shared out among the runs at once; 0: none is kept, and all runs see all."""
    max_concurrent: int | None = None
    """Runs at once; None: as many as processors (or fractions of a GPU) allow, all of them on a cluster."""
    retries: int = 2
    """How often a run whose process died is started again."""
    stall_timeout: float = 600.0
    """Seconds without a sign of life after which a run is killed; until its first step, six times that."""
    address: str | None = None
    """A Ray cluster; None starts one on this machine for the time of the call."""
    dashboard: bool = False
    track: tuple[str, ...] = ()
    """Trackers of the runs: fields of ``runtime`` that are set."""
    group: str = ""
    """Name by which they group the runs."""

    def __post_init__(self) -> None:
        gpus = float(self.gpus_per_trial or 0.0)
        faults = [
            f"{name} = {value!r}: {rule}"
            for name, value, rule, fine in (
                ("threads", self.threads, "must be at least 1", self.threads >= 1),
                ("gpus_per_trial", self.gpus_per_trial, "must not be negative", gpus >= 0),
                ("gpus_per_trial", self.gpus_per_trial, "above 1, only whole GPUs", gpus <= 1 or gpus.is_integer()),
                (
                    "max_concurrent",
                    self.max_concurrent,
                    "must be at least 1",
                    self.max_concurrent is None or self.max_concurrent >= 1,
                ),
                ("retries", self.retries, "must not be negative", self.retries >= 0),
                ("stall_timeout", self.stall_timeout, "must be more than 0 seconds", self.stall_timeout > 0),
            )
            if not fine
        ]
        if faults:
            raise ValueError("; ".join(faults))


class DataFacts(NamedTuple):
    """Facts of a run's data that decide whether its method and its networks can work with them."""

    classes: int
    unlabelled: int
    """Images without labels that training may read."""
    captions: bool
    """Whether any image of the pool has a caption."""
    picture: tuple[int, int] | None = None
    """(height, width) of all images; None where they differ."""


@dataclass(frozen=True)
class PlannedRun:
    """One unique run."""

    run_id: str
    changes: dict[str, object]
    """``override(RunConfig(), changes)`` is its configuration; ``runtime.*`` included."""
    title: str
    """Row, column and seed of its first cell, for people."""
    steps: int
    changed: dict[str, Any]
    """Fields outside ``runtime`` that differ from their defaults, as a record has them."""
    workers: int = 1
    threads: int | None = None
    precision: str = "fp32"
    """As ``RunRecord.precision``."""
    data: DataFacts | None = None
    """None where the plan did not open the data."""
