"""What a step of each method costs, as a benchmark measured it and wrote it down; never a number typed by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

NAME = "steps.json"
MAKE = "python benchmarks/bench_methods.py --json reports/published/leaderboard/steps.json"


class StepCost(BaseModel):
    """One method's step, in ms, and a step of ``supervised`` that was timed between its repeats."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    device: str
    passes: str
    step_ms: float = Field(gt=0, allow_inf_nan=False)
    step_cpu_ms: float = Field(gt=0, allow_inf_nan=False)
    reference_ms: float = Field(gt=0, allow_inf_nan=False)
    reference_cpu_ms: float = Field(gt=0, allow_inf_nan=False)

    @property
    def relative(self) -> float:
        """Times a supervised step: of the clock on a GPU, else of processor time, which other work disturbs less."""
        if self.device.startswith("cuda"):
            return self.step_ms / self.reference_ms
        return self.step_cpu_ms / self.reference_cpu_ms


class Measured(BaseModel):
    """The file that ``benchmarks/bench_methods.py --json`` writes."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    made: str
    """UTC, as 2026-01-31T12:00:00Z."""
    machine: str
    device: str
    threads: int
    repeats: int
    fields: tuple[str, ...]
    """Words of the command line that were not defaults."""
    methods: dict[str, StepCost]

    def __str__(self) -> str:
        of = "" if self.device == "cpu" else f" ({self.device})"
        fields = f", with {' '.join(self.fields)}" if self.fields else ""
        many = "thread" if self.threads == 1 else "threads"
        return f"{self.machine}{of}, {self.threads} {many}, medians of {self.repeats} repeats{fields}, {self.made}"


class Costs(NamedTuple):
    measured: Measured | None
    why: str
    """Why there is nothing; empty where there is."""


def read(out: Path, layers: Iterable[Path]) -> Costs:
    """The file beside the page, or else beside a published one."""
    places = [out / NAME, *(path for layer in layers for path in sorted(layer.glob(f"*/{NAME}")))]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        return Costs(None, f"not measured here; {MAKE} does it")
    try:
        return Costs(Measured.model_validate_json(found.read_bytes()), "")
    except (OSError, ValidationError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        return Costs(None, f"{found.parent.name}/{NAME} cannot be used ({said}); {MAKE} makes it anew")
