"""A randomised block design: rows of a table by seeds, each seed a block, cells missing or not.

y = row + seed + residual within one column of a table. What a seed does to all rows alike (its labelled list, its first
weights, its order of images) is in the seed's effect and in no difference between rows. The estimates are those of
least squares with both effects fixed, which Yates (1936) calls intrablock; with all cells there, rows differ by
differences of their means, and the residual has (rows - 1) (seeds - 1) degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_ROUNDING = 1e-10
"""Residuals below this share of the largest value are rounding."""
_SMALL = 1e-8
"""Of a weight in a contrast."""


class Contrast(NamedTuple):
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

    def contrast(self, weights: Mapping[Any, float]) -> Contrast | None:
        """None where the cells that are there do not tell it: rows that no chain of common seeds joins, or weights that
        do not add up to 0. Raises KeyError for a row that is not in the fit."""
        c = np.zeros(len(self.rows))
        for row, weight in weights.items():
            c[self._place(row)] += weight
        if np.abs(self.information @ (self.inverse @ c) - c).max(initial=0.0) > _SMALL:
            return None
        return Contrast(float(c @ self.estimates), float(c @ self.inverse @ c))

    def _place(self, row: Hashable) -> int:
        if row not in self.rows:
            raise KeyError(row)
        return self.rows.index(row)


def fit(cells: Mapping[Any, Mapping[int, float]]) -> Fit:
    """``cells``: each row's values by seed; rows without one are left out.

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
