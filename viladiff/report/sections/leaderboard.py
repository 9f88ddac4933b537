"""Page section of the leaderboard: accuracy against cost, calibration, tried learning rates, a summary.

Used by specs with ``page = "leaderboard"``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from viladiff.config.base import error_reason
from viladiff.core.messages import one_line
from viladiff.report.charts import cost_scatter
from viladiff.report.charts.themes import uri
from viladiff.report.markup import markdown
from viladiff.report.sections import ranking
from viladiff.report.sections.learning_rates import RateComparison, tried
from viladiff.report.table.results import Results, Summary, number, row_name, summary
from viladiff.report.table.table_views import shares

if TYPE_CHECKING:
    from viladiff.runs.job import PlannedRun
    from viladiff.runs.record import RunRecord
    from viladiff.runs.store import Store
    from viladiff.tables.claims import Verdict

ACROSS = "processor time of a step at 70 % of training, times steps; supervised = 1"


class MeanTime(NamedTuple):
    """Mean over runs of any column."""

    seconds: float | None
    runs: int


class LeaderboardRow(NamedTuple):
    """A row of the leaderboard; summaries stand one a column of the table."""

    number: str
    label: str
    group: str
    control: bool
    accuracy: tuple[Summary, ...]
    student: tuple[Summary | None, ...]
    """The trained network's own, where an average of its weights is evaluated; None where it is that network."""
    boundary: tuple[Summary, ...]
    calibration: tuple[Summary | None, ...]
    """Expected calibration error of the teacher's labels, in points."""
    step: TimedStep | None
    lengths: float | None
    """Steps, as a multiple of the supervised row's."""
    memory: float | None
    """MiB at most in any of its runs' processes."""
    cpu: MeanTime
    """Seconds of processor time in training, over runs that noted it."""
    clock: MeanTime
    """Seconds on the clock, whatever else the machine did."""
    why: str
    """Why it has no number at all; empty where it has one."""

    @property
    def cost(self) -> float | None:
        """Of the whole training, in supervised trainings."""
        return None if self.step is None or self.lengths is None else self.step.relative * self.lengths


class CostChart(NamedTuple):
    """One column's accuracy against cost; light and dark are data URIs."""

    title: str
    light: str
    dark: str
    words: str


class Leaderboard(NamedTuple):
    said: tuple[str, ...]
    lines: tuple[LeaderboardRow, ...]
    costs: Costs
    pictures: tuple[CostChart, ...]
    files: tuple[str, ...]
    """Names of the pictures below figures/."""
    tried: tuple[RateComparison, ...]


def build_leaderboard(results: Results, store: Store, out: Path, verdicts: Sequence[Verdict]) -> Leaderboard | None:
    """Compute all values of the template; None if the spec does not request them. Writes figures below ``out``."""
    if results.plan.table.page != "leaderboard":
        return None
    measured = read_costs(out, store.layers)
    lines = tuple(_line(results, row, measured) for row in results.rows())
    found = tuple(one for one in tried(results, store.records()) if len(one.rates) > 1)
    pictures, files = _pictures(results, lines, out / "figures")
    said = ranking.ranking_sentences(results, verdicts, found)
    return Leaderboard(tuple(said), lines, measured, pictures, files, found)


def _line(results: Results, row: int, measured: Costs) -> LeaderboardRow:
    table, columns = results.plan.table, results.plan.columns
    entries = results.of_row(row)
    records = list({e.cell.run_id: e.record for e in entries if e.record is not None}.values())
    method = next((str(run.changed.get("method.name")) for run in _planned(results, row)), "")
    peaks = [r.peak_memory_bytes for r in records if r.peak_memory_bytes is not None]
    spec, read = table.rows[row], measured.measured
    averaged = any(r.network != "student" for r in records)
    why = next((e.why for e in entries if e.state == "unavailable"), "") if not records else ""
    return LeaderboardRow(
        number(results, row),
        row_name(results, row),
        spec.group,
        spec.control,
        tuple(summary(results.at(row, column), "miou") for column in columns),
        tuple(summary(results.at(row, column), "miou", "student") if averaged else None for column in columns),
        tuple(summary(results.at(row, column), "boundary_iou") for column in columns),
        tuple(shares(results.at(row, column), "before/ece") for column in columns),
        read.methods.get(method) if read else None,
        _lengths(results, row),
        max(peaks) / 2**20 if peaks else None,
        _time(records, "cpu_seconds"),
        _time(records, "train_seconds"),
        why,
    )


def _planned(results: Results, row: int) -> list[PlannedRun]:
    """Return the unique runs of a row."""
    names = dict.fromkeys(name for column in results.plan.columns for name in results.plan.run_ids(row, column))
    return [results.plan.runs[name] for name in names]


def _lengths(results: Results, row: int) -> float | None:
    """Return the steps of a row's runs over those of the supervised row, or if that is not planned, of most runs."""
    mine = [run.steps for run in _planned(results, row)]
    labels = {results.plan.table.rows[place].label: place for place in results.plan.rows}
    base = labels.get(results.plan.table.supervised)
    others = [] if base is None else [run.steps for run in _planned(results, base)]
    others = others or [run.steps for run in results.plan.runs.values()]
    return mine[0] / Counter(others).most_common(1)[0][0] if mine and others else None


def _time(records: Sequence[RunRecord], name: Literal["cpu_seconds", "train_seconds"]) -> MeanTime:
    """Return the mean over a row's runs of all columns; none if their precision, and so a step, differs."""
    if len({record.precision for record in records}) > 1:
        return MeanTime(None, 0)
    values: list[float | None] = [getattr(record, name) for record in records]
    there = [value for value in values if value is not None]
    return MeanTime(sum(there) / len(there) if there else None, len(there))


# Pictures


def _pictures(
    results: Results, lines: Sequence[LeaderboardRow], folder: Path
) -> tuple[tuple[CostChart, ...], tuple[str, ...]]:
    """Draw a figure for each column in which a method has a point; a row without a score or a cost has none."""
    table, found, files = results.plan.table, [], []
    groups = tuple(dict.fromkeys(line.group or "Rows" for line in lines))
    for place, column in enumerate(results.plan.columns):
        points = tuple(
            cost_scatter.Point(
                cost,
                mean,
                line.accuracy[place].spread,
                line.number,
                line.label,
                groups.index(line.group or "Rows"),
                line.control,
            )
            for line in lines
            if (cost := line.cost) is not None and (mean := line.accuracy[place].mean) is not None
        )
        if all(point.ours for point in points):
            continue
        title = table.columns[column].label
        chart = cost_scatter.Chart(title, ACROSS, "mIoU (%), mean and standard deviation of seeds", points, groups)
        paths = cost_scatter.save_scatter(chart, folder, f"cost-{place + 1}")
        words = "; ".join(f"{one.label}: {one.y:.1f} at {one.x:.1f}" for one in points)
        light, dark = (uri(paths[theme]) for theme in ("light", "dark"))
        found.append(CostChart(title, light, dark, f"mIoU (%) against cost, {title}. {words}"))
        files += [path.name for path in paths.values()]
    return tuple(found), tuple(files)


# Plain text


def leaderboard_markdown(found: Leaderboard | None, columns: Sequence[str]) -> dict[str, list[str]]:
    """Return the sections of table.md."""
    if found is None:
        return {}
    heads = ["row", *(f"mIoU of the trained network, {one}" for one in columns)]
    heads += [f"calibration error, {one}" for one in columns]
    heads += [
        "step at 70 % of training, supervised = 1",
        "the same, times steps",
        "passes",
        "peak MiB",
        "CPU s (runs)",
        "clock s (runs)",
    ]
    grid = [heads, *(_cells(line) for line in found.lines)]
    pipes = ["| " + " | ".join(markdown(cell) for cell in row) + " |" for row in grid]
    about = str(found.costs.measured) if found.costs.measured else found.costs.why
    return {
        "What this shows, and what it does not": [f"- {markdown(text)}" for text in found.said],
        "Cost and calibration": [pipes[0], "|" + " --- |" * len(heads), *pipes[1:], "", f"Steps: {markdown(about)}."],
        "Learning rates that were tried": [_rates(one) for one in found.tried],
    }


def _cells(line: LeaderboardRow) -> list[str]:
    students = (
        "the same" if own is None and of.n else str(own or of)
        for own, of in zip(line.student, line.accuracy, strict=True)
    )
    shown = [f"{line.number} {line.label}", *students]
    shown += [str(one) if one else "—" for one in line.calibration]
    numbers = [(line.step.relative if line.step else None, ".2f"), (line.cost, ".2f")]
    shown += [text(value, form) for value, form in numbers]
    shown.append(line.step.passes if line.step else "—")
    return [*shown, text(line.memory, ".0f"), timed(line.cpu), timed(line.clock)]


def _rates(one: RateComparison) -> str:
    listed = "; ".join(f"{rate.value:g}: {rate.found}{' (taken)' if rate.taken else ''}" for rate in one.rates)
    return f"- {markdown(f'{one.number} {one.label}, {one.column}: {listed}; {one.said}')}"


def timed(found: MeanTime) -> str:
    """Format ``196 (3)``: seconds, and over how many runs."""
    return "—" if found.seconds is None else f"{found.seconds:.0f} ({found.runs})"


def text(value: float | None, form: str) -> str:
    """Format a value; an em dash if it is unknown."""
    return "—" if value is None else format(value, form)


NAME = "steps.json"
MAKE = "python benchmarks/bench_methods.py --json reports/published/leaderboard/steps.json"


class TimedStep(BaseModel):
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
    methods: dict[str, TimedStep]

    def __str__(self) -> str:
        of = "" if self.device == "cpu" else f" ({self.device})"
        fields = f", with {' '.join(self.fields)}" if self.fields else ""
        many = "thread" if self.threads == 1 else "threads"
        return f"{self.machine}{of}, {self.threads} {many}, medians of {self.repeats} repeats{fields}, {self.made}"


class Costs(NamedTuple):
    measured: Measured | None
    why: str
    """Why there is nothing; empty where there is."""


def read_costs(out: Path, layers: Iterable[Path]) -> Costs:
    """Read the cost file beside the page, or else beside a published one."""
    places = [out / NAME, *(path for layer in layers for path in sorted(layer.glob(f"*/{NAME}")))]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        return Costs(None, f"not measured here; {MAKE} does it")
    try:
        return Costs(Measured.model_validate_json(found.read_bytes()), "")
    except (OSError, ValidationError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        said = f"{'.'.join(map(str, first['loc']))}: {error_reason(first)}" if first else str(error)
        return Costs(None, f"{found.parent.name}/{NAME} cannot be used ({one_line(said, 200)}); {MAKE} makes it anew")
