"""Differences between rows of a table, paired by seed, and the variance that they are tested against.

A seed gives two rows the same labelled images, first weights and order of images, so that its luck favours neither. All
numbers are in points.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from viladiff.tables.significance import CellSample, Samples, Term, sum_of_squares

APART = 0.01
"""Chance that any cell is set apart for its spread though all spread alike."""


class CellResidual(NamedTuple):
    """The residual of rows and seeds (a randomised block design), with one variance for all cells."""

    sd: float
    df: int
    cells: int

    @property
    def paired(self) -> float:
        """The standard deviation of a difference between two rows at the same seed: √2 times the residual's."""
        return math.sqrt(2) * self.sd


class VarianceModel(NamedTuple):
    """The estimate of the variance between seeds."""

    pools: dict[tuple[str, str], CellResidual]
    """One for each reading of the networks, and each precision, by ``Sample.pool``; none where no residual is left."""
    apart: dict[CellSample, float]
    """Cells that spread more than a pool explains, in none, and the standard deviations of their values."""
    fits: dict[tuple[int, tuple[str, str]], Fit]
    """By column and pool, of the cells that are not set apart."""


class TTest(NamedTuple):
    difference: float
    error: float
    """Standard error of the difference."""
    df: float
    """Degrees of freedom of that error."""
    p: float
    p_reversed: float
    apart: bool
    """Whether a cell that is set apart takes part."""


def variance_model(measured: Samples) -> VarianceModel:
    """Pool the variance of all cells that read their networks alike and have one precision, without outlying cells.

    The residuals are those of rows and seeds in each column, summed over columns. The cell that adds most to them is
    excluded while an F test of its part against the others' gives p below 1 % / the number of cells; then the next is
    tested. A run that reads 40 once and 6 twice would otherwise hide every other difference of its table, and lend its
    own a certainty that three such numbers do not have.
    """
    columns: dict[tuple[str, str], dict[int, list[CellSample]]] = defaultdict(lambda: defaultdict(list))
    for (_, column), one in measured.items():
        if one.values and one not in columns[one.pool][column]:
            columns[one.pool][column].append(one)
    pools: dict[tuple[str, str], CellResidual] = {}
    apart: dict[CellSample, float] = {}
    fits: dict[tuple[int, tuple[str, str]], Fit] = {}
    for key, found in columns.items():
        wild = _wild(_once(found))
        apart |= {one: math.sqrt(sum_of_squares(one.values) / (len(one.values) - 1)) for one in wild}
        kept = {column: [one for one in cells if one not in wild] for column, cells in found.items()}
        fits |= {(column, key): _fit(cells) for column, cells in kept.items()}
        left = [(_fit(cells), cells) for cells in _once(kept).values()]
        df = sum(one.df for one, _ in left)
        if df:
            sd = math.sqrt(sum(one.squares for one, _ in left) / df)
            pools[key] = CellResidual(sd, df, sum(len(cells) for one, cells in left if one.df))
    return VarianceModel(pools, apart, fits)


def _once(columns: Mapping[int, Sequence[CellSample]]) -> dict[int, list[CellSample]]:
    """Return cells by column, a cell of several columns in the first alone: its residuals count once."""
    seen: set[CellSample] = set()
    found: dict[int, list[CellSample]] = {}
    for column, cells in columns.items():
        found[column] = [one for one in cells if one not in seen]
        seen |= set(cells)
    return found


def _fit(cells: Iterable[CellSample]) -> Fit:
    return fit_rows({one: one.by_seed for one in cells})


def _wild(columns: Mapping[int, Sequence[CellSample]]) -> list[CellSample]:
    """Return the cells to exclude, the one that adds most to the residuals first."""
    from scipy import stats

    kept = {column: list(cells) for column, cells in columns.items()}
    wild: list[CellSample] = []
    while sum(map(len, kept.values())) > 2:
        whole = {column: _fit(cells) for column, cells in kept.items()}
        asked: list[tuple[float, float, int, CellSample]] = []
        for column, one in ((column, one) for column, cells in kept.items() for one in cells if len(one.values) > 1):
            less = _fit(other for other in kept[column] if other is not one)
            added = whole[column].squares - less.squares, whole[column].df - less.df
            rest = [less, *(other for place, other in whole.items() if place != column)]
            squares, df = sum(other.squares for other in rest), sum(other.df for other in rest)
            if added[1] and df:
                ratio = added[0] / added[1] / (squares / df) if squares else math.inf if added[0] else 0.0
                p = float(stats.f.sf(ratio, added[1], df))
                asked.append((p, -sum_of_squares(one.values), column, one))
        if not asked or sum(map(len, columns.values())) * min(asked)[0] >= APART:
            break
        *_, column, top = min(asked)
        kept[column].remove(top)
        wild.append(top)
    return wild


class Part(NamedTuple):
    """Some of a comparison's cells, and how they are compared."""

    weights: dict[CellSample, float]
    fit: Fit | None
    """Of their column, with a pool's variance; None where differences are taken seed by seed."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that all its cells have."""
        return tuple(sorted(set.intersection(*(set(one.seeds) for one in self.weights))))


def contrast_parts(terms: Sequence[Term], measured: Samples, known: VarianceModel) -> list[Part]:
    """Choose how a sum of signed cells is compared; cells on both sides cancel, and all of them may.

    In each column and pool whose signs add up to 0: by the fit of rows and seeds. Otherwise (two readings of one run,
    two precisions), or if a cell is excluded: the column's cells together, seed by seed. Columns whose own signs do not
    add up to 0: all of them together, seed by seed.
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
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for one, weight in cells.items():
            sums[one.pool] += weight
        if sum(sums.values()):
            loose |= cells
        elif any(sums.values()) or any(one in known.apart for one in cells):
            found.append(Part(cells, None))
        else:
            found += [
                Part({one: weight for one, weight in cells.items() if one.pool == pool}, known.fits[column, pool])
                for pool in sums
            ]
    return [*found, *([Part(loose, None)] if loose else [])]


def t_test(terms: Sequence[Term], tolerance: float, measured: Samples, known: VarianceModel) -> TTest:
    """Test whether a sum of signed cells is above minus the tolerance: t = (sum + tolerance) / error.

    The error's square adds up over ``parts``: of a fit, the pool's variance times the contrast's factor (2 / n of two
    rows with the same n seeds); of differences seed by seed, their variance / n, over the n seeds that all cells have.
    Where more than one estimate of a variance takes part, degrees of freedom are Welch's and Satterthwaite's; what
    columns leave is taken as independent of each other. Where the error is 0, a p value is 0 or 1.

    Raises ValueError if ``untestable`` says why.
    """
    from scipy import stats

    difference, apart = 0.0, False
    shares: dict[object, float] = defaultdict(float)  # by estimate of a variance: its share of the error's square
    freedom: dict[object, int] = {}
    found = contrast_parts(terms, measured, known)
    why = untestable(found, known, 2)
    if why:
        raise ValueError(why)
    for number, part in enumerate(found):
        apart = apart or any(one in known.apart for one in part.weights)
        contrast = part.fit.contrast(part.weights) if part.fit else None
        if contrast is not None:
            pool = next(iter(part.weights)).pool
            difference += contrast.value
            shares[pool] += known.pools[pool].sd ** 2 * contrast.factor
            freedom[pool] = known.pools[pool].df
        else:
            n = len(part.seeds)
            sums = [sum(w * one.by_seed[seed] for one, w in part.weights.items()) for seed in part.seeds]
            difference += sum(sums) / n
            shares[number], freedom[number] = sum_of_squares(sums) / (n - 1) / n, n - 1
    largest = max((abs(value) for part in found for one in part.weights for value in one.values), default=0.0)
    square, beyond = sum(shares.values()), difference + tolerance
    if square <= (1e-10 * largest) ** 2:
        beyond = 0.0 if abs(beyond) <= 1e-10 * largest else beyond
        return TTest(difference, 0.0, 1.0, float(beyond <= 0), float(beyond >= 0), apart)
    error = math.sqrt(square)
    df = square**2 / sum(share**2 / freedom[key] for key, share in shares.items() if share)
    t = beyond / error
    return TTest(difference, error, df, float(stats.t.sf(t, df)), float(stats.t.cdf(t, df)), apart)


def untestable(found: Sequence[Part], known: VarianceModel, fewest: int) -> str:
    """Explain why cells with enough seeds each cannot be compared; empty if they can."""
    for part in found:
        if part.fit is None or part.fit.contrast(part.weights) is None:
            if len(part.seeds) < fewest:
                have = f"{len(part.seeds)} seed{'s' if len(part.seeds) != 1 else ''}"
                return f"the cells have {have} in common, and {fewest} are needed"
        elif next(iter(part.weights)).pool not in known.pools:
            return "no seed is left to tell the spread of differences by"
    return ""


_ROUNDING = 1e-10
"""Residuals below this share of the largest value are rounding."""
_SMALL = 1e-8
"""Of a weight in a contrast."""


class FittedContrast(NamedTuple):
    """A sum of rows with weights that add up to 0."""

    value: float
    factor: float
    """Its variance as a multiple of the residual's."""


@dataclass(frozen=True)
class Fit:
    """The least-squares fit of a column."""

    rows: tuple[Hashable, ...]
    squares: float
    """Sum of squared residuals."""
    df: int
    """Degrees of freedom of the residual: values less the rank of rows and seeds together."""
    estimates: np.ndarray
    """(rows,) effects, of which differences alone mean something."""
    inverse: np.ndarray
    """(rows, rows): covariance of contrasts as a multiple of the residual's variance."""
    information: np.ndarray
    """(rows, rows): its Moore-Penrose inverse."""

    def contrast(self, weights: Mapping[Any, float]) -> FittedContrast | None:
        """Return the contrast; None if the cells do not determine it.

        Rows that no chain of common seeds joins, or weights that do not add up to 0, determine none. Raises KeyError
        for a row that is not in the fit.
        """
        c = np.zeros(len(self.rows))
        for row, weight in weights.items():
            c[self._place(row)] += weight
        if np.abs(self.information @ (self.inverse @ c) - c).max(initial=0.0) > _SMALL:
            return None
        return FittedContrast(float(c @ self.estimates), float(c @ self.inverse @ c))

    def _place(self, row: Hashable) -> int:
        if row not in self.rows:
            raise KeyError(row)
        return self.rows.index(row)


def fit_rows(cells: Mapping[Any, Mapping[int, float]]) -> Fit:
    """Fit rows and seeds. ``cells``: each row's values by seed; rows without one are left out.

    With n_rs = 1 where row r has seed s, k_s rows at seed s and totals T_r and B_s: the estimates solve C b = q, C =
    diag(Σ_s n_rs) - n diag(1 / k) nᵀ, q = T - n (B / k). The solution of least norm is taken.
    """
    there = {row: dict(values) for row, values in cells.items() if values}
    rows, seeds = tuple(there), sorted({seed for values in there.values() for seed in values})
    if not rows:
        return Fit((), 0.0, 0, np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0)))
    have = np.array([[seed in values for seed in seeds] for values in there.values()], float)
    y = np.array([[values.get(seed, 0.0) for seed in seeds] for values in there.values()])
    largest = float(np.abs(y).max())
    y = have * (y - y.sum() / have.sum())  # an even level changes no contrast, and fewer digits are lost
    per_seed = have.sum(0)
    information = np.diag(have.sum(1)) - (have / per_seed) @ have.T
    inverse = np.linalg.pinv(information, rcond=_SMALL, hermitian=True)
    estimates = inverse @ (y.sum(1) - have @ (y.sum(0) / per_seed))
    level = ((y - have * estimates[:, None]).sum(0)) / per_seed
    left = have * (y - estimates[:, None] - level)
    rank = int(np.linalg.matrix_rank(information, tol=_SMALL, hermitian=True))
    squares = float((left**2).sum())
    if squares <= have.sum() * (_ROUNDING * largest) ** 2:
        squares = 0.0
    return Fit(rows, squares, int(have.sum()) - len(seeds) - rank, estimates, inverse, information)
