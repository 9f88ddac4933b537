"""Differences paired by seed: against least squares written out in NumPy, on whole and on incomplete tables, and how
often a test is wrong where there is nothing to find."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from viladiff.tables.paired import CellResidual, Part, contrast_parts, fit_rows, t_test, untestable, variance_model
from viladiff.tables.significance import LEVEL, CellSample, Samples, Term, f_test

DIFFERENCE = (Term(0, 0, 1), Term(1, 0, -1))


def least_squares(y: np.ndarray) -> tuple[float, int, np.ndarray, np.ndarray]:
    """Of y (rows, seeds), nan where missing: squared residuals, their df, (rows, rows) differences and factors."""
    rows, seeds = y.shape
    there = [(r, s) for r in range(rows) for s in range(seeds) if not np.isnan(y[r, s])]
    x = np.zeros((len(there), rows + seeds))
    for i, (r, s) in enumerate(there):
        x[i, r] = x[i, rows + s] = 1
    values = np.array([y[place] for place in there])
    beta, _, rank, _ = np.linalg.lstsq(x, values)
    covariance = np.linalg.pinv(x.T @ x)[:rows, :rows]
    variance = np.diag(covariance)
    left = values - x @ beta
    return (
        float(left @ left),
        len(there) - int(rank),
        beta[:rows, None] - beta[None, :rows],
        variance[:, None] + variance[None, :] - 2 * covariance,
    )


def rows_of(y: np.ndarray) -> dict[int, dict[int, float]]:
    return {r: {s: float(v) for s, v in enumerate(row) if not np.isnan(v)} for r, row in enumerate(y)}


def measured(y: np.ndarray, column: int = 0, read: str = "", precision: str = "") -> Samples:
    """A column's cells from y (rows, seeds), nan where missing."""
    found: Samples = {}
    for row, values in rows_of(y).items():
        runs = tuple(f"{row}/{column}/{seed}" for seed in values)
        found[row, column] = CellSample(tuple(values.values()), runs, tuple(values), read, precision)
    return found


def drawn(seed: int, rows: int, seeds: int, missing: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y = 50 + rng.normal(0, 3, (rows, 1)) + rng.normal(0, 5, (1, seeds)) + rng.normal(0, 1, (rows, seeds))
    y[rng.random(y.shape) < missing] = np.nan
    return y


# The fit


@pytest.mark.parametrize("missing", [0.0, 0.15, 0.35])
@pytest.mark.parametrize("seed", range(6))
def test_rows_and_seeds_are_fitted_by_least_squares(seed: int, missing: float) -> None:
    y = drawn(seed, 5, 6, missing)
    squares, df, differences, factors = least_squares(y)
    found = fit_rows(rows_of(y))
    assert found.squares == pytest.approx(squares) and found.df == df
    for one in range(5):
        for other in range(5):
            if one == other or one not in found.rows or other not in found.rows:
                continue
            contrast = found.contrast({one: 1, other: -1})
            assert contrast is not None and contrast.value == pytest.approx(differences[one, other])
            assert contrast.factor == pytest.approx(factors[one, other])


def test_a_whole_table_has_differences_of_means() -> None:
    y = drawn(1, 4, 5, 0.0)
    found = fit_rows(rows_of(y))
    contrast = found.contrast({0: 1, 2: -1})
    assert found.df == 3 * 4 and contrast is not None
    assert contrast == pytest.approx((y[0].mean() - y[2].mean(), 2 / 5))
    gains = found.contrast({0: 2, 1: -1, 2: -1})
    assert gains is not None and gains.factor == pytest.approx((4 + 1 + 1) / 5)


def test_what_common_seeds_do_not_join_is_not_told() -> None:
    """Rows 0 and 1 share seeds, rows 2 and 3 others; a row between joins them, though not at one seed."""
    y = np.full((4, 4), np.nan)
    y[0, :2], y[1, :2], y[2, 2:], y[3, 2:] = [1, 2], [3, 5], [7, 9], [8, 8]
    found = fit_rows(rows_of(y))
    assert found.df == 8 - 4 - 2 and found.contrast({0: 1, 2: -1}) is None
    assert found.contrast({0: 1, 1: -1}) is not None
    assert found.contrast({0: 1, 1: -2}) is None, "no contrast"
    joined = fit_rows({**rows_of(y), 4: {1: 4.0, 2: 6.0}}).contrast({0: 1, 2: -1})
    assert joined is not None and joined.factor > 2 / 2
    with pytest.raises(KeyError):
        found.contrast({9: 1, 0: -1})
    assert fit_rows({}).df == fit_rows({0: {}}).df == 0


def test_residuals_of_rounding_are_none() -> None:
    """Rows that differ by the same at each seed, in numbers that binary digits do not hold."""
    seeds = {s: 0.1 * s**2 for s in range(4)}
    found = fit_rows({r: {s: 50 + 0.3 * r + value for s, value in seeds.items()} for r in range(5)})
    assert found.squares == 0.0 and found.df == 12


# Tests of rows


def test_one_variance_for_all_columns_of_an_incomplete_table() -> None:
    columns = [drawn(11, 4, 5, 0.2), drawn(12, 4, 5, 0.1)]
    table = measured(columns[0]) | measured(columns[1], 1)
    known = variance_model(table)
    fitted = [least_squares(y) for y in columns]
    df = sum(one[1] for one in fitted)
    sd = np.sqrt(sum(one[0] for one in fitted) / df)
    pool = known.pools["", ""]
    assert pool == pytest.approx((sd, df, 8)) and pool.paired == pytest.approx(np.sqrt(2) * sd)
    found = t_test((Term(2, 1, 1), Term(0, 1, -1)), 0.0, table, known)
    assert found.difference == pytest.approx(fitted[1][2][2, 0])
    assert found.error == pytest.approx(sd * np.sqrt(fitted[1][3][2, 0])) and found.df == pytest.approx(df)
    assert found.p == pytest.approx(stats.t.sf(found.difference / found.error, df))
    across = (Term(2, 1, 1), Term(0, 1, -1), Term(2, 0, -1), Term(0, 0, 1))
    gains = t_test(across, 0.0, table, known)
    assert gains.difference == pytest.approx(fitted[1][2][2, 0] - fitted[0][2][2, 0])
    assert gains.error == pytest.approx(sd * np.sqrt(fitted[0][3][2, 0] + fitted[1][3][2, 0]))
    assert gains.df == pytest.approx(df)


def test_what_a_seed_does_to_all_rows_changes_nothing() -> None:
    y = drawn(3, 4, 5, 0.2)
    table, moved = measured(y), measured(y + np.array([0, 20, -7, 3, 40]))
    one, other = (t_test(DIFFERENCE, 0.3, found, variance_model(found)) for found in (table, moved))
    assert one[:5] == pytest.approx(other[:5])


def test_one_row_of_two_columns_is_compared_seed_by_seed_and_counts_once() -> None:
    """A row whose labels are all there has the same runs in both columns."""
    columns = [drawn(21, 3, 4, 0.0), drawn(22, 3, 4, 0.0)]
    columns[1][2] = columns[0][2]
    table = measured(columns[0]) | measured(columns[1], 1)
    table[2, 1] = table[2, 0]
    known = variance_model(table)
    assert known.pools["", ""].df == 2 * 3 + 1 * 3, "its residuals are in the first column alone"
    _, _, differences, factors = least_squares(columns[1])
    inside = t_test((Term(2, 1, 1), Term(0, 1, -1)), 0.0, table, known)
    assert inside.difference == pytest.approx(differences[2, 0])
    assert inside.error == pytest.approx(known.pools["", ""].sd * np.sqrt(factors[2, 0]))
    gap = (Term(2, 0, 1), Term(0, 0, -1), Term(2, 1, -1), Term(0, 1, 1))
    found, wanted = t_test(gap, 0.0, table, known), stats.ttest_rel(columns[1][0], columns[0][0], alternative="greater")
    assert found.p == pytest.approx(wanted.pvalue), "it cancels, and seeds pair what is left"


def test_a_cell_set_apart_takes_its_column_along() -> None:
    y = drawn(5, 8, 4, 0.0)
    y[7] = [6, 9, 60, 30]
    table = measured(y)
    known = variance_model(table)
    assert set(known.apart) == {table[7, 0]} and known.pools["", ""].df == 6 * 3
    gains = (Term(7, 0, 1), Term(0, 0, -1), Term(1, 0, -1), Term(2, 0, 1))
    found = t_test(gains, 0.0, table, known)
    wanted = stats.ttest_1samp(y[7] - y[0] - y[1] + y[2], 0, alternative="greater")
    assert found.apart and found.p == pytest.approx(wanted.pvalue) and found.df == pytest.approx(3)
    (part,) = contrast_parts(gains, table, known)
    assert part.fit is None and part.seeds == (0, 1, 2, 3)


def test_what_cannot_be_compared_says_why() -> None:
    y = np.array([[1.0, 2, 4, np.nan, np.nan, np.nan], [np.nan] * 3 + [3.0, 5, 4]])
    table = measured(y)
    known = variance_model(table)
    assert known.pools == {}
    found = contrast_parts(DIFFERENCE, table, known)
    assert untestable(found, known, 3) == "the cells have 0 seeds in common, and 3 are needed"
    with pytest.raises(ValueError, match="0 seeds in common, and 2 are needed"):
        t_test(DIFFERENCE, 0.0, table, known)
    alone = measured(np.array([[1.0, np.nan], [3.0, np.nan]]))
    assert "no seed is left" in untestable(
        contrast_parts(DIFFERENCE, alone, variance_model(alone)), variance_model(alone), 3
    )
    assert untestable([Part({table[0, 0]: 1.0}, None)], known, 3) == ""


# How often they are wrong


def wrong(tables: Sequence[Samples], terms: Sequence[Term] = DIFFERENCE) -> float:
    """Share of tables in which a difference is shown, one-sided at 5 %."""
    return float(np.mean([t_test(terms, 0.0, table, variance_model(table)).p < LEVEL for table in tables]))


def no_difference(rng: np.random.Generator, rows: int, seeds: int, list_sd: float = 4.0) -> np.ndarray:
    """Draw y of rows that do not differ: lists of a seed spread by ``list_sd``, residuals by 1."""
    return 50 + rng.normal(0, list_sd, (1, seeds)) + rng.normal(0, 1, (rows, seeds))


@pytest.mark.parametrize(("rows", "seeds"), [(2, 3), (5, 3), (4, 6)])
def test_false_alarms_are_as_often_as_is_said(rows: int, seeds: int) -> None:
    """5 % of 400 tables, whatever seeds share; 0.023 to 0.077 is within 2.5 standard errors."""
    rng = np.random.default_rng(100 * rows + seeds)
    assert 0.023 <= wrong([measured(no_difference(rng, rows, seeds)) for _ in range(400)]) <= 0.077


def test_false_alarms_of_incomplete_tables() -> None:
    rng = np.random.default_rng(7)
    tables: list[Samples] = []
    while len(tables) < 400:
        y = no_difference(rng, 5, 6)
        y[rng.random(y.shape) < 0.25] = np.nan
        table = measured(y)
        if not untestable(contrast_parts(DIFFERENCE, table, variance_model(table)), variance_model(table), 3):
            tables.append(table)
    assert 0.023 <= wrong(tables) <= 0.077


def test_false_alarms_between_two_readings() -> None:
    """Each reading has effects of seeds of its own."""
    rng = np.random.default_rng(8)
    tables = []
    for _ in range(400):
        one, other = no_difference(rng, 3, 4), no_difference(rng, 3, 4)
        fusion = {(row + 3, 0): sample for (row, _), sample in measured(other, read="/fusion").items()}
        tables.append(measured(one) | fusion)
    assert 0.023 <= wrong(tables, (Term(3, 0, 1), Term(0, 0, -1))) <= 0.077


def test_pairing_finds_what_lists_would_hide() -> None:
    """One point, residuals of 0.5, lists that spread by 4: found nearly always, and hardly ever without pairs."""
    rng = np.random.default_rng(9)
    found, unpaired = [], []
    for _ in range(200):
        y = 50 + rng.normal(0, 4, (1, 6)) + rng.normal(0, 0.5, (4, 6))
        y[0] += 1
        table = measured(y)
        found.append(t_test(DIFFERENCE, 0.0, table, variance_model(table)).p < LEVEL)
        unpaired.append(stats.ttest_ind(y[0], y[1], alternative="greater").pvalue < LEVEL)
    assert np.mean(found) > 0.9 and np.mean(unpaired) < 0.3


def test_spreads_of_cells_that_share_seeds_are_compared_on_the_safe_side() -> None:
    rng = np.random.default_rng(10)
    for shared, most in ((0.0, 0.08), (1.0, 0.06), (4.0, 0.02)):
        tables = [measured(no_difference(rng, 2, 4, shared)) for _ in range(500)]
        assert np.mean([f_test([t[0, 0]], [t[1, 0]]).p < LEVEL for t in tables]) <= most


def test_a_difference_of_the_size_of_the_residuals_spread() -> None:
    """A residual's sd of 1 is one of √2 between two rows at one seed."""
    rng = np.random.default_rng(12)
    y = 50 + rng.normal(0, 4, (1, 4000)) + rng.normal(0, 1, (2, 4000))
    pool = variance_model(measured(y)).pools["", ""]
    assert pool.paired == pytest.approx(np.std(y[0] - y[1], ddof=1))
    assert CellResidual(1.0, 4, 2).paired == pytest.approx(np.sqrt(2))


def test_a_cell_is_set_apart_from_others_without_any_spread() -> None:
    """Two rows that are equal bit for bit leave no residual, and would halve a third row's variance."""
    found = variance_model(measured(np.array([[10.0, 11.0, 13.0], [10.0, 11.0, 13.0], [12.0, 11.0, 17.0]])))
    assert [one.runs[0] for one in found.apart] == ["2/0/0"] and [one.sd for one in found.pools.values()] == [0.0]
