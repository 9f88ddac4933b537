"""Differences between rows of a table, paired by seed, and the variance that they are tested against.

A seed gives two rows the same labelled images, first weights and order of images, so that its luck favours neither. All
numbers are in points.

Two rows that train almost alike differ by almost the same at each seed, and two others by less so: with one variance
for all pairs the second kind would have intervals that are too short. A variance of each pair's own has two to five
degrees of freedom and finds little. So the distribution of the variances of all pairs of a column is estimated (G. K.
Smyth, Statistical Applications in Genetics and Molecular Biology 3(1), 2004). Where they differ by chance alone, all
pairs have one; a row that spreads twice to four times as much as the others is not always found out with three seeds,
and its intervals then hold 80 to 90 % in place of 95. Otherwise a pair with less than most has a moderated variance,
which is drawn up towards the others, and a pair with more has its own: drawn down, its intervals would be too short.

Each column has a distribution of its own: fewer labels spread more. With one for two columns, of which one spreads 1.5
times as much, intervals hold 97 to 99 % in the one and 90 to 95 % in the other; with two they hold 95 to 97 % and 92 to
96 % (simulated: 6 and 17 rows that spread alike, some of them related, at three and six seeds).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from itertools import combinations
from typing import NamedTuple

import numpy as np

from viladiff.tables.contrasts import Term
from viladiff.tables.significance import FEWEST_SEEDS, CellSample, Samples, sum_of_squares

APART = 0.01
"""Chance that any cell of a column is taken for an outlier though all spread alike."""
FEWEST_PAIRS = 4
"""Compared pairs below which no variance is drawn towards others."""
_ROUNDING = 1e-10
"""Spreads below this share of the largest value are rounding."""

PairGroup = tuple[int, tuple[str, str]]
"""A column and ``CellSample.pool``: the network and stream that scores are of, and a precision."""
VarianceModel = Mapping[PairGroup, "SpreadPrior"]


class SpreadPrior(NamedTuple):
    """The scaled inverse chi-square distribution of the variances of paired differences."""

    sd: float
    """s_0: the standard deviation of a difference of two rows at one seed that variances are drawn towards."""
    df: float
    """d_0: the degrees of freedom that it counts for; infinite where variances differ by chance alone."""
    most: int
    """Degrees of freedom that a variance can have: those of the residual of rows and seeds."""
    pairs: int
    """Number of variances that it was estimated from."""
    cells: frozenset[CellSample] = frozenset()
    """Those whose pairs it was estimated from; differences of others have a variance of their own."""
    apart: frozenset[CellSample] = frozenset()
    """Outliers among the cells that claims ask about."""

    def moderated(self, variance: float, df: int, size: float = 1.0) -> tuple[float, float]:
        """Return the variance to test with, and its degrees of freedom.

        Where d_0 is infinite, s_0². Else a variance above s_0² is kept, and one below is drawn up (Smyth, section 3):
        s̃² = (d_0 s_0² + d s²) / (d_0 + d), with d_0 + d degrees of freedom, ``most`` at most. ``size``: the variance of
        a contrast as a multiple of that of a difference of two cells, half the sum of its squared weights.
        """
        prior = size * self.sd**2
        if math.isinf(self.df):
            return prior, float(max(self.most, df))
        if variance >= prior:
            return variance, float(df)
        return (self.df * prior + df * variance) / (self.df + df), min(self.df + df, float(max(self.most, df)))


class TTest(NamedTuple):
    difference: float
    error: float
    """Standard error of the difference."""
    df: float
    """Degrees of freedom of that error."""
    p: float
    p_reversed: float

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the difference."""
        from scipy import stats

        half = float(stats.t.isf(0.025, self.df)) * self.error
        return self.difference - half, self.difference + half


class Part(NamedTuple):
    """Some of a comparison's cells, which are compared seed by seed."""

    weights: dict[CellSample, float]
    group: PairGroup | None
    """Of cells of one column and pool whose weights add up to 0; None for all others, whose differences have a variance
    of their own."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that all its cells have."""
        return tuple(sorted(set.intersection(*(set(one.seeds) for one in self.weights))))

    def by_seed(self) -> list[float]:
        """Return the weighted sum at each seed."""
        return [sum(weight * one.by_seed[seed] for one, weight in self.weights.items()) for seed in self.seeds]

    @property
    def size(self) -> float:
        """Half the sum of squared weights: 1 for a difference of two cells."""
        return sum(weight**2 for weight in self.weights.values()) / 2


# The variance of all pairs


def variance_model(asked: Iterable[Sequence[Term]], measured: Samples) -> VarianceModel:
    """Estimate the distribution of variances from all pairs of cells that take part in the comparisons ``asked``.

    One for the pairs of each column and pool. All of them, since variances of pairs that have one row in common are too
    much alike; but not those of ``_outliers``, nor of cells with fewer than ``FEWEST_SEEDS``: a row's first runs would
    change the verdicts of others. A group with fewer than ``FEWEST_PAIRS`` variances has none.
    """
    groups: dict[PairGroup, set[CellSample]] = defaultdict(set)
    for row, column, _ in (term for terms in asked for term in terms):
        one = measured.get((row, column))
        if one is not None and len(one.values) >= FEWEST_SEEDS:
            groups[column, one.pool].add(one)
    found = {}
    for group, cells in sorted(groups.items()):
        wild = _outliers(cells)
        kept = sorted(cells - wild)  # sums must not depend on the order in which a set holds its members
        spreads = [spread for two in combinations(kept, 2) if (spread := _spread(*two)) is not None]
        if len(spreads) >= FEWEST_PAIRS:
            variances, dfs = zip(*spreads, strict=True)
            prior = fit_prior(variances, dfs, _residual_df(kept))
            found[group] = prior._replace(cells=frozenset(kept), apart=frozenset(wild))
    return found


def _spread(one: CellSample, other: CellSample) -> tuple[float, int] | None:
    """Return variance and degrees of freedom; None below two common seeds, or where all that is left is rounding."""
    sums = Part({one: 1, other: -1}, None).by_seed()
    if len(sums) < 2:
        return None
    variance = sum_of_squares(sums) / (len(sums) - 1)
    largest = max(map(abs, (*one.values, *other.values)))
    return (variance, len(sums) - 1) if variance > (_ROUNDING * largest) ** 2 else None


def _outliers(cells: Set[CellSample]) -> set[CellSample]:
    """Return the cells of a column that spread more than the others, by an F test at ``APART`` / the number of cells.

    One method that collapses in two seeds of three would otherwise make all variances seem to differ. The differences
    of a cell of S seeds to the mean of m others that have these seeds too have the variance σ² (m + 1) / m, with S - 1
    degrees of freedom, if all spread alike, and σ², half the mean variance of the others' pairs, has (m - 1) (S - 1).
    The cell with the lowest p goes first, then the others are tested again; three stay.
    """
    from scipy import stats

    kept = sorted(cells)
    spreads = {two: spread[0] for two in combinations(kept, 2) if (spread := _spread(*two)) is not None}
    while len(kept) > 3:
        asked = []
        for one in kept:
            others = [other for other in kept if other is not one and set(one.seeds) <= set(other.seeds)]
            rest = [spreads[two] for two in combinations(others, 2) if two in spreads]
            df, m = len(one.seeds) - 1, len(others)
            if not rest or df < 1:
                continue
            left = [
                value - sum(other.by_seed[seed] for other in others) / m
                for seed, value in zip(one.seeds, one.values, strict=True)
            ]
            variance = sum_of_squares(left) / df * m / (m + 1)
            p = float(stats.f.sf(variance / (sum(rest) / len(rest) / 2), df, (m - 1) * df))
            asked.append((p, -variance, one))
        if not asked or len(cells) * min(asked)[0] >= APART:
            break
        kept.remove(min(asked)[2])
    return set(cells) - set(kept)


def fit_prior(variances: Sequence[float], dfs: Sequence[int], most: int) -> SpreadPrior:
    """Estimate s_0 and d_0 by the moments of log variances. Smyth (2004), section 6.2.

    With e = log s² - ψ(d/2) + log(d/2): d_0 solves ψ'(d_0/2) = mean((e - ē)² n / (n - 1) - ψ'(d/2)), and s_0² =
    exp(ē + ψ(d_0/2) - log(d_0/2)). Where the right side is not positive d_0 is infinite, and s_0² the mean variance.
    variances: (n,) above 0. dfs: (n,) their degrees of freedom.
    """
    from scipy import optimize, special

    s2, half = np.asarray(variances, float), np.asarray(dfs, float) / 2
    e = np.log(s2) - special.digamma(half) + np.log(half)
    n = len(e)
    excess = float(np.mean((e - e.mean()) ** 2 * n / (n - 1) - special.polygamma(1, half)))
    if excess <= 0:
        return SpreadPrior(math.sqrt(float(np.average(s2, weights=half))), math.inf, most, n)
    # ψ' falls from infinity to 0.
    d0 = 2 * math.exp(optimize.brentq(lambda x: special.polygamma(1, math.exp(x)) - excess, -25.0, 25.0))
    log_s0 = float(e.mean() + special.digamma(d0 / 2) - math.log(d0 / 2))
    return SpreadPrior(math.exp(log_s0 / 2), d0, most, n)


def _residual_df(cells: Collection[CellSample]) -> int:
    """Values less rows and seeds, plus one: of a column whose rows are joined by common seeds."""
    seeds = {seed for one in cells for seed in one.seeds}
    return max(0, sum(len(one.values) for one in cells) - len(cells) - len(seeds) + 1) if cells else 0


# Tests of rows


def contrast_parts(terms: Sequence[Term], measured: Samples) -> list[Part]:
    """Divide a sum of signed cells into parts; cells on both sides cancel, and all of them may.

    A part is a column whose signs add up to 0; columns whose own signs do not are one part together.
    """
    weights: dict[CellSample, float] = defaultdict(float)
    place: dict[CellSample, int] = {}
    for row, column, sign in terms:
        weights[measured[row, column]] += sign
        place.setdefault(measured[row, column], column)
    columns: dict[int, dict[CellSample, float]] = defaultdict(dict)
    for one, weight in weights.items():
        if weight:
            columns[place[one]][one] = weight
    found: list[Part] = []
    loose: dict[CellSample, float] = {}
    for column, cells in columns.items():
        if sum(cells.values()):
            loose |= cells
        else:
            pools = {one.pool for one in cells}
            found.append(Part(cells, (column, pools.pop()) if len(pools) == 1 else None))
    return [*found, *([Part(loose, None)] if loose else [])]


def t_test(terms: Sequence[Term], tolerance: float, measured: Samples, known: VarianceModel) -> TTest:
    """Test whether a sum of signed cells is above minus the tolerance: t = (sum + tolerance) / error.

    The error's square adds up over ``contrast_parts``: of n sums at common seeds, their moderated variance / n. Columns
    are taken as independent of each other; degrees of freedom of several parts are Welch's and Satterthwaite's. Where
    the error is 0, a p value is 0 or 1.

    Raises ValueError if ``untestable`` says why.
    """
    from scipy import stats

    found = contrast_parts(terms, measured)
    if why := untestable(found, 2):
        raise ValueError(why)
    difference, shares = 0.0, []
    for part in found:
        sums = part.by_seed()
        n, prior = len(sums), known.get(part.group) if part.group is not None else None
        variance, df = sum_of_squares(sums) / (n - 1), float(n - 1)
        if prior is not None and part.weights.keys() <= prior.cells:
            variance, df = prior.moderated(variance, n - 1, part.size)
        difference += sum(sums) / n
        shares.append((variance / n, df))
    largest = max((abs(value) for part in found for one in part.weights for value in one.values), default=0.0)
    square, beyond = sum(share for share, _ in shares), difference + tolerance
    if square <= (_ROUNDING * largest) ** 2:
        beyond = 0.0 if abs(beyond) <= _ROUNDING * largest else beyond
        return TTest(difference, 0.0, 1.0, float(beyond <= 0), float(beyond >= 0))
    error = math.sqrt(square)
    df = square**2 / sum(share**2 / freedom for share, freedom in shares if share)
    t = beyond / error
    return TTest(difference, error, df, float(stats.t.sf(t, df)), float(stats.t.cdf(t, df)))


def untestable(found: Sequence[Part], fewest: int) -> str:
    """Explain why cells with enough seeds each cannot be compared; empty if they can."""
    for part in found:
        if len(part.seeds) < fewest:
            have = f"{len(part.seeds)} seed{'s' if len(part.seeds) != 1 else ''}"
            return f"the cells have {have} in common, and {fewest} are needed"
    return ""
