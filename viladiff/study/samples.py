"""What was measured in a table's cells, and the tests that tell differences from the spread between seeds.

All numbers are in points: percent of mIoU and the like.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from viladiff.study.spec import Metric

if TYPE_CHECKING:
    from viladiff.record import RunRecord
    from viladiff.study.plan import Plan

LEVEL = 0.05
"""Chance, in each direction, of any wrong decision among all claims of one source."""
POWER = 0.8
APART = 0.01
"""Chance that any cell is set apart for its spread though all spread alike."""

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
    """Their names."""
    read: str = ""
    """Which of their scores it is, where not that of the headline: cells with the same runs and this are one sample."""
    precision: str = ""
    """``RunRecord.precision`` of all its runs."""

    @property
    def pool(self) -> tuple[str, str]:
        """Cells that differ in this have no variance in common."""
        return self.read, self.precision


Samples = dict[tuple[int, int], Sample]


class Pool(NamedTuple):
    """The standard deviation between seeds, taken as one for all its cells."""

    sd: float
    df: int
    cells: int


class Spread(NamedTuple):
    """What is known of the variance between seeds."""

    pools: dict[tuple[str, str], Pool]
    """One for each reading of the networks, and each precision, that some cell with two seeds has, by ``Sample.pool``.
    """
    apart: dict[Sample, float]
    """Cells that spread more than a pool explains, in none, and their own standard deviations."""


class Tested(NamedTuple):
    difference: float
    error: float
    """Standard error of the difference."""
    df: float
    """Degrees of freedom of that error."""
    p: float
    p_reversed: float
    apart: bool
    """Whether a cell that is set apart takes part."""


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


def one_precision(records: Iterable[RunRecord], of: str) -> str:
    """``RunRecord.precision`` that all of them have, empty without any; ValueError that names ``of`` for more than one.

    Runs of different precision are never averaged: their numbers differ by more than seeds.
    """
    found = sorted({record.precision for record in records})
    if len(found) > 1:
        raise ValueError(f"{of}: runs of different precision are not averaged, got {'; '.join(found)}")
    return found[0] if found else ""


def samples(plan: Plan, records: Records, metric: Metric = "miou") -> Samples:
    """What was measured in each cell of a plan; a run without a record or without the score is left out.

    Raises ValueError where the runs of a cell differ in precision.
    """
    found: Samples = {}
    for row in plan.rows:
        spec = plan.table.rows[row]
        read = f"{spec.network}/{spec.stream}" if spec.network or spec.stream else ""
        for column in plan.columns:
            names = [name for name in plan.run_ids(row, column) if name in records]
            scores = {name: score(records[name], metric, spec.network, spec.stream) for name in names}
            kept = {name: value for name, value in scores.items() if value is not None}
            cell = f"{spec.label!r} at {plan.table.columns[column].label!r}"
            precision = one_precision((records[name] for name in kept), cell)
            found[row, column] = Sample(tuple(kept.values()), tuple(kept), read, precision)
    return found


def pooled(measured: Iterable[Sample]) -> Pool | None:
    """One variance for all cells with two seeds or more: summed squares over summed degrees of freedom.

    Cells that are one sample count once. None where no cell has two seeds. ValueError for cells of two precisions.
    """
    measured = list(measured)
    precisions = sorted({one.precision for one in measured if one.values})
    if len(precisions) > 1:
        raise ValueError(f"cells of different precision have no variance in common, got {'; '.join(precisions)}")
    unique = {one for one in measured if len(one.values) >= 2}
    df = sum(len(one.values) - 1 for one in unique)
    if df == 0:
        return None
    return Pool(math.sqrt(sum(_squares(one.values) for one in unique) / df), df, len(unique))


def spread(measured: Samples) -> Spread:
    """A pool of all cells that read their networks alike, of one precision, less those of too large a variance.

    The cell with the largest variance is set apart while an F test of it against the pool of the others gives p below
    1 % / the number of cells; the next largest is then asked. A run that reads 40 once and 6 twice would otherwise hide
    every other difference of its table, and lend its own a certainty that three such numbers do not have.
    """
    by_pool: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for one in dict.fromkeys(measured.values()):
        if len(one.values) >= 2:
            by_pool[one.pool].append(one)
    pools: dict[tuple[str, str], Pool] = {}
    apart: dict[Sample, float] = {}
    for key, cells in by_pool.items():
        wild = _wild(cells)
        pool = pooled(one for one in cells if one not in wild)
        if pool is not None:
            pools[key] = pool
        apart |= {one: math.sqrt(_squares(one.values) / (len(one.values) - 1)) for one in wild}
    return Spread(pools, apart)


def _wild(cells: Sequence[Sample]) -> list[Sample]:
    from scipy import stats

    kept, wild = sorted(cells, key=lambda one: _squares(one.values) / (len(one.values) - 1)), []
    while len(kept) > 2:
        top, rest = kept[-1], pooled(kept[:-1])
        df = len(top.values) - 1
        if rest is None or rest.sd == 0:
            break
        if len(cells) * stats.f.sf(_squares(top.values) / df / rest.sd**2, df, rest.df) >= APART:
            break
        wild.append(kept.pop())
    return wild


def _squares(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values)


def t_test(terms: Sequence[Term], tolerance: float, measured: Samples, known: Spread) -> Tested:
    """Whether a sum of signed cell means is above minus the tolerance.

    t = (sum + tolerance) / error. The error's square is sd² Σ(sign² / n) over cells of a pool with standard deviation
    sd, n runs in a cell; a cell that is set apart adds its own variance / n; cells that read the same runs are summed
    run by run first, and add the variance of these sums / n, since what a seed does to one it does to the other. Where
    more than one of these estimates takes part, degrees of freedom are Welch's and Satterthwaite's. A cell that stands
    on both sides cancels. Where the error is 0, a p value is 0 or 1.

    Raises ValueError where cells share a single run.
    """
    from scipy import stats

    by_runs: dict[tuple[str, ...], dict[Sample, float]] = defaultdict(lambda: defaultdict(float))
    for row, column, sign in terms:
        by_runs[measured[row, column].runs][measured[row, column]] += sign
    difference, apart = 0.0, False
    parts: dict[object, float] = defaultdict(float)  # by estimate of a variance: its share of the error's square
    freedom: dict[object, int] = {}
    for runs, cells in by_runs.items():
        kept = {one: weight for one, weight in cells.items() if weight}
        if not kept:
            continue
        n = len(runs)
        sums = [sum(weight * one.values[i] for one, weight in kept.items()) for i in range(n)]
        difference += sum(sums) / n
        first = next(iter(kept))
        apart = apart or any(one in known.apart for one in kept)
        if len(kept) > 1 or first in known.apart:
            if n < 2:
                raise ValueError(f"rows that read the same runs take two of them to compare, and there is {runs}")
            parts[runs], freedom[runs] = _squares(sums) / (n - 1) / n, n - 1
        else:
            pool = known.pools[first.pool]
            parts[first.pool] += pool.sd**2 * kept[first] ** 2 / n
            freedom[first.pool] = pool.df
    square, beyond = sum(parts.values()), difference + tolerance
    if square == 0:
        return Tested(difference, 0.0, 1.0, float(beyond <= 0), float(beyond >= 0), apart)
    error = math.sqrt(square)
    df = square**2 / sum(part**2 / freedom[key] for key, part in parts.items())
    t = beyond / error
    return Tested(difference, error, df, float(stats.t.sf(t, df)), float(stats.t.cdf(t, df)), apart)


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

    Raises ValueError where a side has no cell with two seeds, or cells of different precision.
    """
    from scipy import stats

    up, down = pooled(above), pooled(below)
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


def smallest_detectable(error: float, df: float, comparisons: int) -> float:
    """The true difference that such a test finds with a chance of 80 %, by the noncentral t distribution.

    ``error``: standard error of the difference, taken as true. The level is Holm's first and strictest,
    5 % / ``comparisons``, one-sided: whatever the other comparisons give, a difference of this size is found so often.
    """
    return error * _detectable_errors(df, comparisons) if error else 0.0


@cache
def _detectable_errors(df: float, comparisons: int) -> float:
    """That difference in standard errors."""
    from scipy import optimize, stats

    critical = stats.t.isf(LEVEL / comparisons, df)
    # The chance rises with the difference; at 4 times the critical value and some it is near 1.
    shortfall = lambda effect: stats.nct.sf(critical, df, effect) - POWER  # noqa: E731
    return float(optimize.brentq(shortfall, 0.0, 4 * critical + 10))
