"""Learning rates tried for a table's methods: the store's runs that differ from the table's in the rate alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from viladiff.data.sources import embedded_datasets
from viladiff.report.table.results import Results, Summary, number, row_name
from viladiff.runs.record import RunRecord
from viladiff.tables.plan import fields_of
from viladiff.tables.significance import score

RATE = "optim.lr"
APART = (RATE, "seed", "data.holdout", "eval.split", "eval.every_steps", "eval.every_epochs", "eval.boundary")
"""Fields in which a run that tries a rate may differ from the one that is reported."""


class RateResult(NamedTuple):
    value: float
    found: Summary
    """mIoU on images that the run held out."""
    taken: bool
    """Whether the table's own runs have it."""
    highest: bool


class RateComparison(NamedTuple):
    """All rates of one row in one column."""

    number: str
    label: str
    family: str
    column: str
    rates: tuple[RateResult, ...]

    @property
    def said(self) -> str:
        """Whether what the table takes is what scored highest, and how far apart the rates are."""
        taken = next((one for one in self.rates if one.taken), None)
        top = next(one for one in self.rates if one.highest)
        if len(self.rates) < 2:
            return "one rate alone was tried"
        if taken is None:
            return f"the rate of the table was not tried; {top.value:g} is highest"
        if taken is top:
            return "the table takes the highest"
        return f"{top.value:g} is {_mean(top) - _mean(taken):.1f} points above the one that the table takes"


def _for_choices(changed: Mapping[str, object]) -> bool:
    """Return whether a run was scored on selection images: held out, or built-in data's default part ``dev``."""
    if "eval.split" in changed:
        return changed["eval.split"] in ("dev", "holdout")
    return str(changed.get("data.dataset")) in embedded_datasets()


def tried(results: Results, records: Mapping[str, RunRecord]) -> list[RateComparison]:
    """Return comparisons in the table's order; rows without runs scored on held-out images are left out."""
    by_fields: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
    for record in records.values():
        if _for_choices(record.changed):
            by_fields[_key(record.changed), record.precision].append(record)
    found, table = [], results.plan.table
    for row in results.rows():
        for column in results.plan.columns:
            names = results.plan.run_ids(row, column)
            run = results.plan.runs[names[0]] if names else None
            mine = by_fields.get((_key(run.changed), run.precision), []) if run else []
            plain = results.plan.default(run.changed, RATE) if run else None
            rates = _rates(mine, run.changed.get(RATE, plain), plain) if run else ()
            if rates:
                label, where = row_name(results, row), table.columns[column].label
                found.append(RateComparison(number(results, row), label, table.rows[row].group, where, rates))
    return found


def _key(changed: Mapping[str, Any]) -> str:
    """Return a key that is equal for runs that differ in ``APART`` alone, and in lists that seeds draw."""
    fields = {path: value for path, value in changed.items() if path not in APART}
    drawn = changed.get("data.split_seed")
    if drawn is not None:
        fields["data.split_seed"] = drawn - changed.get("seed", 0)
    return fields_of(fields)


def _rates(records: Iterable[RunRecord], taken: float | None, plain: float | None) -> tuple[RateResult, ...]:
    """Return the results of each rate; ``taken`` is the table's rate, ``plain`` the plan's default.

    A record's ``config`` is no evidence of the default.
    """
    values: dict[float, dict[int, float]] = defaultdict(dict)
    for record in records:
        found, rate = score(record, "miou"), record.changed.get(RATE, plain)
        if found is not None and rate is not None:
            values[float(rate)][int(record.config.get("seed", 0))] = found
    summaries = {value: Summary(dict(sorted(those.items())), {}, frozenset()) for value, those in values.items()}
    top = max(summaries, key=lambda value: summaries[value].mean or 0.0, default=None)
    return tuple(RateResult(value, summaries[value], value == taken, value == top) for value in sorted(summaries))


def _mean(rate: RateResult) -> float:
    mean = rate.found.mean
    assert mean is not None  # a rate without a score is not listed
    return mean
