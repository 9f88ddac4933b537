"""Results of a table: for each cell its runs, one a seed, their scores, and the reason for each missing one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from viladiff.runs.record import RunRecord
from viladiff.tables.plan import Plan, PlannedCell, State, states
from viladiff.tables.significance import one_precision, score
from viladiff.tables.spec import PaperValue

if TYPE_CHECKING:
    from viladiff.runs.store import Store

CEILING = "ceiling: reads true masks"
"""Mark of a row whose runs have an oracle for pseudo-labels."""
_WHY: dict[State, str] = {
    "missing": "not run yet",
    "begun": "begun, not finished",
    "running": "running now",
    "failed": "failed",
    "stale": "an older revision of the code made it; to be run again",
    "done": "its record is gone",
}


Mark = State | Literal["unavailable"]
"""How far a cell's run is; ``unavailable`` has none, since it wants what is not given."""


@dataclass(frozen=True)
class CellRun:
    """One seed of one cell; ``why`` is empty where ``record`` counts."""

    cell: PlannedCell
    """Its ``run_id`` is empty where there is no run."""
    state: Mark
    record: RunRecord | None
    why: str = ""
    network: str = ""
    """Whose score the row reads from its record; empty for the headline's."""
    stream: str = ""


@dataclass(frozen=True)
class Results:
    plan: Plan
    entries: tuple[CellRun, ...]

    def at(self, row: int, column: int) -> list[CellRun]:
        return [e for e in self.entries if (e.cell.row, e.cell.column) == (row, column)]

    def of_row(self, row: int) -> list[CellRun]:
        return [e for e in self.entries if e.cell.row == row]

    def records(self) -> dict[str, RunRecord]:
        """Return the records behind the table's numbers, each once, in the order of the table."""
        return {e.cell.run_id: e.record for e in self.entries if e.record is not None}

    def counts(self) -> dict[State, int]:
        """Count unique runs by state; a run of several cells counts once."""
        by_run = {e.cell.run_id: e.state for e in self.entries if e.cell.run_id}
        return {state: n for state in _WHY if (n := sum(s == state for s in by_run.values()))}

    def rows(self, control: bool | None = None) -> list[int]:
        """Return the rows that are not controls or, with ``control``, those that are, without ceilings."""
        table = self.plan.table
        found = [row for row in self.plan.rows if control is None or table.rows[row].control == control]
        return [row for row in found if control is not False or row not in self.plan.ceilings]

    @property
    def reference(self) -> int:
        """Place of the row that differences are taken to."""
        return self._named(self.plan.table.reference, 0)

    @property
    def headline(self) -> int:
        """Place of the row that the first sentence is about."""
        return self._named(self.plan.table.headline, -1)

    def _named(self, label: str, otherwise: int) -> int:
        there = {self.plan.table.rows[row].label: row for row in self.plan.rows}
        return there[label] if label in there else (self.rows(control=False) or self.rows())[otherwise]


@dataclass(frozen=True)
class Summary:
    """Mean over seeds; ``spread`` is the sample standard deviation, None below two seeds. Percent."""

    values: dict[int, float]
    missing: dict[int, str]
    """Seed to reason."""
    marks: frozenset[Mark]
    """States of the missing ones."""

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float | None:
        return float(np.mean(list(self.values.values()))) if self.values else None

    @property
    def spread(self) -> float | None:
        return float(np.std(list(self.values.values()), ddof=1)) if self.n > 1 else None

    def __str__(self) -> str:
        """Return ``78.1 ± 0.3 (3)``, ``78.1 (1)`` or an em dash."""
        if self.mean is None:
            return "—"
        return f"{self.mean:.1f}" + (f" ± {self.spread:.1f}" if self.spread is not None else "") + f" ({self.n})"


def collect_results(plan: Plan, store: Store) -> Results:
    """Read each run of the plan once.

    A record belongs here by its name alone, which is its content: one that was made for another scale is the same run,
    and the page's provenance says so.
    """
    state = states(plan, store)
    found = {name: plan.settled(one) for name, one in store.records().items() if name in plan.runs}
    read = {name: _entry(store, name, state[name], found.get(name)) for name in {c.run_id for c in plan.cells}}
    wanted = {(row, column) for row in plan.rows for column in plan.columns}
    cells = sorted(
        (c for c in plan.cells if (c.row, c.column) in wanted),
        key=lambda c: (plan.rows.index(c.row), plan.columns.index(c.column), c.seed),
    )
    rows = plan.table.rows
    have = [CellRun(c, *read[c.run_id], rows[c.row].network, rows[c.row].stream) for c in cells]
    lack = [
        CellRun(PlannedCell(row, column, seed, ""), "unavailable", None, why)
        for row, why in plan.unavailable.items()
        for column in plan.columns
        for seed in sorted({c.seed for c in plan.cells if c.column == column}) or plan.seeds
    ]
    return Results(plan, (*have, *lack))


def begun_columns(results: Results) -> Results:
    """Return the results of the columns in which a run is done, not of a control alone; of all columns if none is."""
    rows = results.plan.table.rows
    there = {one.cell.column for one in results.entries if one.record is not None and not rows[one.cell.row].control}
    columns = tuple(column for column in results.plan.columns if column in there)
    if not columns or len(columns) == len(results.plan.columns):
        return results
    kept = tuple(entry for entry in results.entries if entry.cell.column in there)
    return Results(replace(results.plan, columns=columns), kept)


def _entry(store: Store, run_id: str, state: State, record: RunRecord | None) -> tuple[State, RunRecord | None, str]:
    if state == "done" and record is not None:
        return state, record, ""
    failure = store.failure(run_id) if state == "failed" else None
    if failure is None:
        return state, None, _WHY[state]
    at = f" at step {failure.step}" if failure.step is not None else ""
    tries = f" after {failure.attempts} attempts" if failure.attempts > 1 else ""
    # A page may be published, and whose disk the run was on is nobody's business.
    message = failure.message.replace(f"{store.root}{os.sep}", "")
    return state, None, f"failed ({failure.kind}{at}{tries}): {message}"


def summary(entries: Sequence[CellRun], metric: str, network: str = "", stream: str = "") -> Summary:
    """Summarise one cell. Raises ValueError if its runs differ in precision."""
    one_precision((e.record for e in entries if e.record is not None), "a cell")
    found = {
        e.cell.seed: score(e.record, metric, network or e.network, stream or e.stream) if e.record is not None else None
        for e in entries
    }
    lacking = [e for e in entries if found[e.cell.seed] is None]
    return Summary(
        {seed: value for seed, value in found.items() if value is not None},
        {e.cell.seed: e.why or "not measured in this run" for e in lacking},
        frozenset(e.state for e in lacking),
    )


class Difference(NamedTuple):
    mean: float
    seeds: tuple[int, ...]


def difference(of: Summary, to: Summary) -> Difference | None:
    """Return the mean difference over common seeds, so that a seed's luck is in both or neither; None without one."""
    seeds = tuple(sorted(of.values.keys() & to.values.keys()))
    if not seeds:
        return None
    return Difference(float(np.mean([of.values[s] - to.values[s] for s in seeds])), seeds)


def gaps(results: Results) -> list[str]:
    """Return a sentence for each gap of the table: the share that a row closes, over seeds that all three rows have."""
    table = results.plan.table
    labels = [row.label for row in table.rows]
    said = []
    for gap in table.gaps:
        places = [labels.index(label) for label in (gap.row, gap.low, gap.high)]
        shares = []
        for column in results.plan.columns:
            row, low, high = (summary(results.at(place, column), table.metric).values for place in places)
            seeds = sorted(row.keys() & low.keys() & high.keys())
            if not seeds:
                continue
            way, whole = (sum(to[s] - low[s] for s in seeds) / len(seeds) for to in (row, high))
            share = f"{way / whole:.0%}" if whole > 0 else "none, since there is no gap"
            points = f"{way:.1f} of {whole:.1f} points, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
            shares.append(f"{share} on {table.columns[column].label} ({points})")
        if shares:
            said.append(f"Of the gap from {gap.low} to {gap.high}, {gap.row} closes {'; '.join(shares)}.")
    return said


def paper_value(results: Results, row: int, column: int) -> PaperValue | None:
    """Return the paper's number; "-" if it leaves one out, None for a row that it does not have."""
    numbers = results.plan.table.rows[row].paper
    return numbers[column] if column < len(numbers) else None


def number(results: Results, row: int) -> str:
    """Return the row's number in its table, as ``Table.row_numbers`` has it."""
    return results.plan.table.row_numbers[row]


def row_name(results: Results, row: int) -> str:
    """Return a row's label, with a mark if its runs read true masks."""
    text = results.plan.table.rows[row].label
    return f"{text} ({CEILING})" if row in results.plan.ceilings else text


def table_parts(results: Results) -> list[str]:
    """Return the parts in the order in which the table's rows introduce them."""
    return list(dict.fromkeys(part for row in results.plan.table.rows for part in row.components))


class Agreement(NamedTuple):
    """The agreement of the measured order of rows with the printed one."""

    column: str
    tau: float | None
    """Kendall's τ-b; None below two rows or where one side is all ties."""
    rows: int
    same: int
    """Pairs of rows in the printed order."""
    reverse: int
    tied: int
    chance: float | None
    """Probability that a random order agrees at least so well; exact; None with ties."""


def agreement(results: Results, column: int) -> Agreement:
    """Kendall's τ-b by SciPy, over the paper's rows that are measured and printed in this column."""
    pairs = []
    for row in results.rows(control=False):
        mean = summary(results.at(row, column), results.plan.table.metric).mean
        printed = paper_value(results, row, column)
        if mean is not None and isinstance(printed, float | int):
            pairs.append((mean, float(printed)))
    label = results.plan.table.columns[column].label
    measured, paper = np.array(pairs, dtype=float).reshape(-1, 2).T
    first, second = np.triu_indices(len(pairs), 1)
    signs = np.sign(measured[first] - measured[second]) * np.sign(paper[first] - paper[second])
    same, reverse, tied = (int((signs == sign).sum()) for sign in (1, -1, 0))
    if len(set(measured)) < 2 or len(set(paper)) < 2:
        return Agreement(label, None, len(pairs), same, reverse, tied, None)
    from scipy import stats

    test = stats.kendalltau(measured, paper, alternative="greater", method="asymptotic" if tied else "exact")
    chance = None if tied else float(test.pvalue)
    return Agreement(label, float(test.statistic), len(pairs), same, reverse, tied, chance)


def headline_sentence(results: Results) -> str:
    """Describe the headline row's score, and its difference to the reference, in one sentence."""
    plan, row, other = results.plan, results.headline, results.reference
    said = []
    for column in plan.columns:
        found, base = (summary(results.at(place, column), plan.table.metric) for place in (row, other))
        if found.mean is None:
            continue
        where = f"{found} on {_column(results, column)}"
        if row == other:
            said.append(where + (_standing(results, row, column) if plan.table.printed else ""))
        else:
            against = _against(difference(found, base), plan.table.rows[other].label)
            board = plan.table.page == "leaderboard"
            said.append(where + against + (_standing(results, row, column) if board else ""))
    name = row_name(results, row)
    if not said:
        which = "the last row" if not plan.table.headline else f"row {number(results, row)} ({name})"
        done = any(e.record for e in results.entries)
        return f"Some runs are done, but none of {which} yet." if done else "No run of this table has finished yet."
    return f"Row {number(results, row)} ({name}) reaches {'; '.join(said)}."


def swapped(results: Results, column: int) -> tuple[str, str] | None:
    """Return the data set that a column names and this scale's substitute; None if they are the same."""
    table, size = results.plan.table, results.plan.table.scale.get(results.plan.scale)
    asked = str(table.columns[column].set.get("data.dataset", table.base.get("data.dataset")))
    there = size.datasets.get(asked, asked) if size else asked
    return None if there == asked else (asked, there)


def _column(results: Results, column: int) -> str:
    """Return a column's label, with this scale's substitute for a data set of the paper's."""
    label, other = results.plan.table.columns[column].label, swapped(results, column)
    return f"{label}, with {other[1]} in its place" if other and other[0] in label.lower() else label


def _standing(results: Results, row: int, column: int) -> str:
    """Describe a row's rank at its seeds among the rows that have these, controls left out."""
    table = results.plan.table
    found = {r: summary(results.at(r, column), table.metric) for r in results.rows(control=False)}
    mine = summary(results.at(row, column), table.metric).values.keys()
    there = {
        r: float(np.mean([one.values[seed] for seed in mine])) for r, one in found.items() if mine <= one.values.keys()
    }
    top = max(there, key=lambda r: there[r], default=row)
    short = there.get(top, 0.0) - there.get(row, 0.0)
    if len(there) < 2:
        return ""
    if top == row:
        return f", the highest of {len(there)} rows"
    return (
        f", level with the highest, {table.rows[top].label}"
        if short < 0.05
        else (f", {short:.1f} below the highest, {table.rows[top].label}")
    )


def _against(gap: Difference | None, label: str) -> str:
    if gap is None:
        return ""
    if abs(gap.mean) < 0.05:
        return f", level with {label}"
    return f", {abs(gap.mean):.1f} {'above' if gap.mean > 0 else 'below'} {label}"


def per_class(record: RunRecord) -> dict[str, float | None]:
    """Return percent by class name for the headline; None for a class in neither truth nor prediction."""
    scores = record.scores.get(record.network, {}).get(record.stream, {})
    shares = scores.get("per_class") or []
    return {
        name: None if share is None or math.isnan(share) else 100 * share
        for name, share in zip(record.class_names, shares, strict=False)
    }
