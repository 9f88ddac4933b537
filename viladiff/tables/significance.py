"""Scores of a table's cells and their variance; ``viladiff.tables.paired`` has the tests of rows.

All numbers are in points: percent of mIoU and the like.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from viladiff.tables.spec import MetricName

if TYPE_CHECKING:
    from viladiff.runs.record import RunRecord
    from viladiff.tables.plan import Plan

LEVEL = 0.05
"""Chance, in each direction, of any wrong decision among all claims of one source."""
FEWEST_SEEDS = 3
"""Below these a cell has no part in a test."""
POWER = 0.8

Records = Mapping[str, "RunRecord"]
"""Finished runs by name."""


class CellSample(NamedTuple):
    """The scores of a cell."""

    values: tuple[float, ...]
    """Points, one a finished run."""
    runs: tuple[str, ...]
    """Their names."""
    seeds: tuple[int, ...]
    """Their seeds."""
    read: str = ""
    """Which of their scores it is, where not that of the headline: cells with the same runs and this are one sample."""
    precision: str = ""
    """``RunRecord.precision`` of all its runs."""

    @property
    def pool(self) -> tuple[str, str]:
        """Cells that differ in this have no variance in common."""
        return self.read, self.precision

    @property
    def by_seed(self) -> dict[int, float]:
        return dict(zip(self.seeds, self.values, strict=True))


Samples = dict[tuple[int, int], CellSample]


class PooledVariance(NamedTuple):
    """The standard deviation within cells, taken as one for all of them."""

    sd: float
    df: int
    cells: int


class FTest(NamedTuple):
    """Of two standard deviations."""

    ratio: float
    """Infinite where the lower one is 0, not a number where both are."""
    interval: tuple[float, float]
    """95 %."""
    df: tuple[int, int]
    p: float
    p_reversed: float


def score(record: RunRecord, metric: str, network: str = "", stream: str = "") -> float | None:
    """Return percent, of the headline network and stream unless others are named; None if not measured."""
    if metric == "miou" and not (network or stream):
        value = record.miou
    else:
        value = record.scores.get(network or record.network, {}).get(stream or record.stream, {}).get(metric)
    return None if value is None or not math.isfinite(value) else 100 * float(value)


def one_precision(records: Iterable[RunRecord], of: str) -> str:
    """Return the ``RunRecord.precision`` of all; empty without any. Raises ValueError that names ``of`` for several.

    Runs of different precision are never averaged: their numbers differ by more than seeds.
    """
    found = sorted({record.precision for record in records})
    if len(found) > 1:
        raise ValueError(f"{of}: runs of different precision are not averaged, got {'; '.join(found)}")
    return found[0] if found else ""


def cell_samples(plan: Plan, records: Records, metric: MetricName = "miou") -> Samples:
    """Return the scores of each cell of a plan; a run without a record or without the score is left out.

    Raises ValueError if the runs of a cell differ in precision.
    """
    found: Samples = {}
    for row in plan.rows:
        spec = plan.table.rows[row]
        read = f"{spec.network}/{spec.stream}" if spec.network or spec.stream else ""
        for column in plan.columns:
            names = {name: seed for seed, name in plan.by_seed(row, column).items() if name in records}
            scores = {name: score(records[name], metric, spec.network, spec.stream) for name in names}
            kept = {name: value for name, value in scores.items() if value is not None}
            cell = f"{spec.label!r} at {plan.table.columns[column].label!r}"
            precision = one_precision((records[name] for name in kept), cell)
            seeds = tuple(names[name] for name in kept)
            found[row, column] = CellSample(tuple(kept.values()), tuple(kept), seeds, read, precision)
    return found


def pooled_variance(measured: Iterable[CellSample]) -> PooledVariance | None:
    """Return one variance within cells of two seeds or more: summed squares over summed degrees of freedom.

    Cells that are one sample count once. None if no cell has two seeds. Raises ValueError for cells of two precisions.
    """
    measured = list(measured)
    precisions = sorted({one.precision for one in measured if one.values})
    if len(precisions) > 1:
        raise ValueError(f"cells of different precision have no variance in common, got {'; '.join(precisions)}")
    unique = {one for one in measured if len(one.values) >= 2}
    df = sum(len(one.values) - 1 for one in unique)
    if df == 0:
        return None
    return PooledVariance(math.sqrt(sum(sum_of_squares(one.values) for one in unique) / df), df, len(unique))


def sum_of_squares(values: Sequence[float]) -> float:
    """Return the sum of squares about their mean."""
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values)


def holm(ps: Sequence[float]) -> list[float]:
    """Apply Holm's step-down correction: the k-th smallest of m times m - k + 1, monotone, at most 1."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, highest = [0.0] * len(ps), 0.0
    for k, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - k) * ps[i]))
        corrected[i] = highest
    return corrected


def f_test(above: Sequence[CellSample], below: Sequence[CellSample]) -> FTest:
    """Test whether seeds spread more in some cells than in others: an F test of variances pooled within a side's cells.

    With common seeds on both sides it is conservative: a seed's effect on both brings their variances nearer.

    Raises ValueError if a side has no cell with two seeds, or cells of different precision.
    """
    from scipy import stats

    up, down = pooled_variance(above), pooled_variance(below)
    if up is None or down is None:
        raise ValueError("a spread takes two seeds in a cell at least")
    df = (up.df, down.df)
    if down.sd == 0:
        sure = float(up.sd == 0)
        ratio = math.nan if up.sd == 0 else math.inf
        return FTest(ratio, (ratio, ratio), df, sure, 1.0)
    ratio = up.sd / down.sd
    ends = (ratio / math.sqrt(stats.f.isf(0.025, *df)), ratio / math.sqrt(stats.f.isf(0.975, *df)))
    return FTest(ratio, ends, df, float(stats.f.sf(ratio**2, *df)), float(stats.f.cdf(ratio**2, *df)))


def smallest_ratio(df: tuple[int, int], comparisons: int) -> float:
    """Return the ratio of standard deviations that ``f_test`` detects with 80 % power at 5 % / ``comparisons``."""
    from scipy import stats

    return math.sqrt(stats.f.isf(LEVEL / comparisons, *df) / stats.f.isf(POWER, *df))


def smallest_detectable(error: float, df: float, comparisons: int) -> float:
    """Return the true difference that such a test detects with 80 % power, by the noncentral t distribution.

    ``error``: standard error of the difference, taken as true. The level is Holm's first and strictest, 5 % /
    ``comparisons``, one-sided: whatever the other comparisons give, a difference of this size is found so often.
    """
    return error * _detectable_errors(df, comparisons) if error else 0.0


@cache
def _detectable_errors(df: float, comparisons: int) -> float:
    """Return the smallest detectable difference in standard errors."""
    from scipy import optimize, stats

    critical = stats.t.isf(LEVEL / comparisons, df)
    # The chance rises with the difference; at 4 times the critical value and some it is near 1.
    shortfall = lambda effect: stats.nct.sf(critical, df, effect) - POWER  # noqa: E731
    return float(optimize.brentq(shortfall, 0.0, 4 * critical + 10))
