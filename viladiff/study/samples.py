"""What was measured in a table's cells, and the tests that tell differences from the spread between seeds.

All numbers are in points: percent of mIoU and the like.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from viladiff.study.spec import Metric

if TYPE_CHECKING:
    from viladiff.record import RunRecord
    from viladiff.study.plan import Plan

LEVEL = 0.05
"""Chance, in each direction, of any wrong decision among all claims of one source."""
POWER = 0.8

Records = Mapping[str, "RunRecord"]
"""Finished runs by name."""


class Term(NamedTuple):
    """A cell's mean with its sign."""

    row: int
    column: int
    sign: int


class Sample(NamedTuple):
    """What was measured in a cell."""

    values: tuple[float, ...]
    """Points, one a finished run."""
    runs: tuple[str, ...]
    """Their names, and which of their scores is read: cells with the same are one sample."""


Samples = dict[tuple[int, int], Sample]


class Pool(NamedTuple):
    """The standard deviation between seeds, taken as one for all cells."""

    sd: float
    df: int
    cells: int


class Tested(NamedTuple):
    difference: float
    error: float
    """Standard error of the difference."""
    p: float
    p_reversed: float


class Ratio(NamedTuple):
    """Of two standard deviations."""

    ratio: float
    """Infinite where the lower one is 0, not a number where both are."""
    interval: tuple[float, float]
    """95 %."""
    df: tuple[int, int]
    p: float
    p_reversed: float


def score(record: RunRecord, metric: str, network: str = "", stream: str = "") -> float | None:
    """Percent, of the headline network and stream unless others are named; None where it was not measured."""
    if metric == "miou" and not (network or stream):
        value = record.miou
    else:
        value = record.scores.get(network or record.network, {}).get(stream or record.stream, {}).get(metric)
    return None if value is None or not math.isfinite(value) else 100 * float(value)


def samples(plan: Plan, records: Records, metric: Metric = "miou") -> Samples:
    """What was measured in each cell of a plan; a run without a record or without the score is left out."""
    found: Samples = {}
    for row in plan.rows:
        spec = plan.table.rows[row]
        read = f" {spec.network}/{spec.stream}" if spec.network or spec.stream else ""
        for column in plan.columns:
            names = [name for name in plan.run_ids(row, column) if name in records]
            scores = {f"{name}{read}": score(records[name], metric, spec.network, spec.stream) for name in names}
            kept = {name: value for name, value in scores.items() if value is not None}
            found[row, column] = Sample(tuple(kept.values()), tuple(kept))
    return found


def pooled(measured: Samples) -> Pool | None:
    """One variance for all cells with two seeds or more: summed squares over summed degrees of freedom.

    Cells that share their runs count once. None where no cell has two.
    """
    unique = {one.runs: one.values for one in measured.values() if len(one.values) >= 2}
    df = sum(len(values) - 1 for values in unique.values())
    if df == 0:
        return None
    squares = sum((x - sum(values) / len(values)) ** 2 for values in unique.values() for x in values)
    return Pool(math.sqrt(squares / df), df, len(unique))


def t_test(terms: Sequence[Term], tolerance: float, measured: Samples, pool: Pool) -> Tested:
    """Whether a sum of signed cell means is above minus the tolerance: a t test with the pooled standard deviation.

    t = (sum + tolerance) / (sd √Σ(sign² / n)), n runs in a cell, with the degrees of freedom of the pool.
    A cell's runs that stand on both sides cancel, mean and variance alike. Where the error is 0, a p value is 0 or 1.
    """
    from scipy import stats

    weights: dict[tuple[str, ...], float] = defaultdict(float)
    values: dict[tuple[str, ...], tuple[float, ...]] = {}
    for row, column, sign in terms:
        one = measured[row, column]
        weights[one.runs] += sign
        values[one.runs] = one.values
    difference = sum(w * sum(values[runs]) / len(values[runs]) for runs, w in weights.items() if w)
    error = pool.sd * math.sqrt(sum(w**2 / len(values[runs]) for runs, w in weights.items()))
    beyond = difference + tolerance
    if error == 0:
        return Tested(difference, 0.0, float(beyond <= 0), float(beyond >= 0))
    t = beyond / error
    return Tested(difference, error, float(stats.t.sf(t, pool.df)), float(stats.t.cdf(t, pool.df)))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of m times m - k + 1, never below a smaller one's, at most 1."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, highest = [0.0] * len(ps), 0.0
    for k, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - k) * ps[i]))
        corrected[i] = highest
    return corrected


def f_test(above: Sequence[Sample], below: Sequence[Sample]) -> Ratio:
    """Whether seeds spread more in some cells than in others: an F test of variances pooled within the cells of a side.

    Raises ValueError where a side has no cell with two seeds.
    """
    from scipy import stats

    pools = [pooled({(0, i): one for i, one in enumerate(side)}) for side in (above, below)]
    up, down = pools
    if up is None or down is None:
        raise ValueError("a spread takes two seeds in a cell at least")
    df = (up.df, down.df)
    if down.sd == 0:
        sure = float(up.sd == 0)
        ratio = math.nan if up.sd == 0 else math.inf
        return Ratio(ratio, (ratio, ratio), df, sure, 1.0)
    ratio = up.sd / down.sd
    ends = (ratio / math.sqrt(stats.f.isf(0.025, *df)), ratio / math.sqrt(stats.f.isf(0.975, *df)))
    return Ratio(ratio, ends, df, float(stats.f.sf(ratio**2, *df)), float(stats.f.cdf(ratio**2, *df)))


def smallest_ratio(df: tuple[int, int], comparisons: int) -> float:
    """The true ratio of standard deviations that ``f_test`` finds with a chance of 80 %, at 5 % / ``comparisons``."""
    from scipy import stats

    return math.sqrt(stats.f.isf(LEVEL / comparisons, *df) / stats.f.isf(POWER, *df))


def smallest_detectable(error: float, df: int, comparisons: int) -> float:
    """The true difference that such a test finds with a chance of 80 %, by the noncentral t distribution.

    ``error``: standard error of the difference, taken as true. The level is Holm's first and strictest,
    5 % / ``comparisons``, one-sided: whatever the other comparisons give, a difference of this size is found so often.
    """
    return error * _detectable_errors(df, comparisons) if error else 0.0


@cache
def _detectable_errors(df: int, comparisons: int) -> float:
    """That difference in standard errors."""
    from scipy import optimize, stats

    critical = stats.t.isf(LEVEL / comparisons, df)
    # The chance rises with the difference; at 4 times the critical value and some it is near 1.
    shortfall = lambda effect: stats.nct.sf(critical, df, effect) - POWER  # noqa: E731
    return float(optimize.brentq(shortfall, 0.0, 4 * critical + 10))
