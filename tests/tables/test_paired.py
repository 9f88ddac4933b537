"""Differences paired by seed: against formulas written out in NumPy and SciPy's paired test, and how often tests and
intervals are wrong where there is nothing to find, whether pairs spread alike or not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import special, stats

from viladiff.tables.contrasts import Term
from viladiff.tables.paired import (
    SpreadPrior,
    VarianceModel,
    contrast_parts,
    fit_prior,
    t_test,
    untestable,
    variance_model,
)
from viladiff.tables.significance import LEVEL, CellSample, Samples, f_test

DIFFERENCE = (Term(0, 0, 1), Term(1, 0, -1))
GROUP = (0, ("", ""))


def rows_of(y: np.ndarray) -> dict[int, dict[int, float]]:
    return {r: {s: float(v) for s, v in enumerate(row) if not np.isnan(v)} for r, row in enumerate(y)}


def measured(y: np.ndarray, column: int = 0, read: str = "", precision: str = "") -> Samples:
    """A column's cells from y (rows, seeds), nan where missing."""
    found: Samples = {}
    for row, values in rows_of(y).items():
        runs = tuple(f"{row}/{column}/{seed}" for seed in values)
        found[row, column] = CellSample(tuple(values.values()), runs, tuple(values), read, precision)
    return found


def against_first(table: Samples) -> list[tuple[Term, Term]]:
    return [(Term(row, column, 1), Term(0, column, -1)) for row, column in table if row]


def model(table: Samples) -> VarianceModel:
    return variance_model(against_first(table), table)


def drawn(seed: int, rows: int, seeds: int, missing: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y = 50 + rng.normal(0, 3, (rows, 1)) + rng.normal(0, 5, (1, seeds)) + rng.normal(0, 1, (rows, seeds))
    y[rng.random(y.shape) < missing] = np.nan
    return y


# The distribution of variances


def test_prior_solves_the_equations_of_moments() -> None:
    """Smyth (2004), section 6.2, written out; degrees of freedom differ."""
    rng = np.random.default_rng(0)
    dfs = np.array([2, 3, 5, 5, 2, 4] * 5)
    variances = 0.5 * rng.chisquare(dfs) / dfs * rng.choice([0.2, 1.0, 6.0], len(dfs))
    found = fit_prior(variances.tolist(), dfs.tolist(), 90)
    e = np.log(variances) - special.digamma(dfs / 2) + np.log(dfs / 2)
    n = len(e)
    right = ((e - e.mean()) ** 2 * n / (n - 1) - special.polygamma(1, dfs / 2)).mean()
    assert right > 0 and special.polygamma(1, found.df / 2) == pytest.approx(right)
    assert found.sd**2 == pytest.approx(np.exp(e.mean() + special.digamma(found.df / 2) - np.log(found.df / 2)))
    assert (found.most, found.pairs) == (90, 30)


@pytest.mark.parametrize("d0", [2.0, 8.0])
def test_prior_is_found_again_from_many_variances(d0: float) -> None:
    rng = np.random.default_rng(1)
    true = d0 * 0.7**2 / rng.chisquare(d0, 20_000)
    found = fit_prior((true * rng.chisquare(5, 20_000) / 5).tolist(), [5] * 20_000, 10**6)
    assert found.sd == pytest.approx(0.7, rel=0.03) and found.df == pytest.approx(d0, rel=0.08)


def test_variances_that_are_alike_are_taken_as_one() -> None:
    found = fit_prior([1.0, 1.1, 0.9, 1.0], [2, 2, 4, 4], 12)
    assert math.isinf(found.df) and found.sd**2 == pytest.approx((1.0 * 2 + 1.1 * 2 + 0.9 * 4 + 1.0 * 4) / 12)
    assert found.moderated(9.0, 2) == pytest.approx((found.sd**2, 12.0))


def test_a_small_variance_is_drawn_up_and_a_large_one_is_kept() -> None:
    prior = SpreadPrior(0.5, 3.0, 65, 20)
    assert prior.moderated(0.1, 5) == pytest.approx(((3 * 0.25 + 5 * 0.1) / 8, 8.0))
    assert prior.moderated(1.0, 5) == (1.0, 5.0)
    assert prior.moderated(0.4, 5, size=2.0) == pytest.approx(((3 * 0.5 + 5 * 0.4) / 8, 8.0)), "of four cells"
    assert SpreadPrior(0.5, 90.0, 65, 20).moderated(0.1, 5)[1] == 65, "no more than the table has"
    assert SpreadPrior(0.5, 90.0, 2, 20).moderated(0.1, 5)[1] == 5, "no fewer than its own"


def test_model_is_of_all_pairs_of_the_cells_that_are_asked_about() -> None:
    y = drawn(2, 7, 5)
    table = measured(y)
    asked = against_first(table)[:5]
    found = variance_model([*asked, *[(low, high) for high, low in asked], *asked], table)
    variances = [(y[one] - y[other]).var(ddof=1) for one in range(6) for other in range(one)]
    wanted = fit_prior(sorted(variances), [4] * 15, 5 * 4)
    assert found[GROUP][:4] == pytest.approx(wanted[:4])
    assert variance_model(asked[:2], table) == {} and variance_model([], table) == {}, "three pairs are too few"


def test_variances_that_are_alike_give_the_residual_of_rows_and_seeds() -> None:
    """The mean variance of all pairs is twice the residual's of a randomised block design."""
    rng = np.random.default_rng(15)
    y = 50 + rng.normal(0, 4, (1, 6)) + rng.normal(0, 1, (6, 6))
    prior = model(measured(y))[GROUP]
    left = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
    assert math.isinf(prior.df) and prior.most == 25 and prior.sd**2 == pytest.approx(2 * (left**2).sum() / 25)


def test_equal_runs_tell_nothing_of_the_spread_of_others() -> None:
    y = drawn(3, 7, 4)
    y[1] = y[0] + 0.1
    assert model(measured(y))[GROUP].pairs == 20


def test_a_row_that_spreads_more_than_the_others_is_no_part_of_the_model() -> None:
    """A collapsing method neither hides what differs elsewhere nor borrows the certainty of the others."""
    y = drawn(16, 13, 3)
    y[12] = [6.0, 9.0, 41.8]
    table = measured(y)
    known = model(table)[GROUP]
    assert known._replace(apart=frozenset()) == model(measured(y[:12]))[GROUP] and known.pairs == 66
    assert known.apart == {table[12, 0]}
    found = t_test((Term(12, 0, 1), Term(0, 0, -1)), 0.0, table, model(table))
    assert found.interval() == pytest.approx(tuple(stats.ttest_rel(y[12], y[0]).confidence_interval(0.95)))


def test_rows_that_spread_alike_are_seldom_outliers() -> None:
    """In 1 % of tables at most, whatever seeds do to all rows; 300 tables of 8 rows give 8 at most nearly always."""
    rng = np.random.default_rng(2)
    found = [model(measured(no_difference(rng, 8, 3)))[GROUP].pairs for _ in range(300)]
    assert set(found) <= {28, 21, 15} and sum(pairs < 28 for pairs in found) <= 8


def test_rows_of_other_seeds_make_no_outliers() -> None:
    """Row means differ by 3, and half of the rows lack a seed: no row spreads more than the others."""
    rng = np.random.default_rng(17)
    found = 0
    for _ in range(150):
        y = 50 + rng.normal(0, 3, (12, 1)) + rng.normal(0, 4, (1, 3)) + rng.normal(0, 0.5, (12, 3))
        y[:6, 2] = np.nan
        found += bool(model(measured(y))[GROUP].apart)
    assert found <= 6
    y = 50 + rng.normal(0, 0.5, (8, 3))
    y[7] -= 30
    y[7, 2] = np.nan
    assert model(measured(y))[GROUP].apart == frozenset()


def test_each_column_has_a_model_of_its_own() -> None:
    """A column's verdicts are the same whatever other columns have."""
    table, wider = measured(drawn(18, 6, 3)), drawn(19, 6, 3)
    both = table | measured(wider, 1)
    assert model(both)[GROUP] == model(table)[GROUP]
    assert model(both)[1, GROUP[1]] == model(measured(wider, 1))[1, GROUP[1]] and len(model(both)) == 2
    assert model(table | measured(wider, 1, read="/fusion")).keys() == {GROUP, (1, ("/fusion", ""))}


def test_intervals_hold_where_another_column_spreads_twice_as_much() -> None:
    rng, held = np.random.default_rng(3), [0, 0]
    for _ in range(400):
        columns = [no_difference(rng, 8, 3), 50 + 2 * (no_difference(rng, 8, 3) - 50)]
        table = measured(columns[0]) | measured(columns[1], 1)
        known = model(table)
        for column in (0, 1):
            for row in range(1, 8):
                low, high = t_test((Term(row, column, 1), Term(0, column, -1)), 0.0, table, known).interval()
                held[column] += low <= 0 <= high
    assert all(0.93 <= one / (400 * 7) <= 0.97 for one in held), held


# Tests of rows


def test_few_pairs_have_students_paired_test() -> None:
    y = drawn(4, 2, 5)
    table = measured(y)
    found = t_test(DIFFERENCE, 0.3, table, model(table))
    wanted = stats.ttest_rel(y[0], y[1])
    sure = stats.ttest_1samp(y[0] - y[1], -0.3, alternative="greater")
    assert found.p == pytest.approx(sure.pvalue) and found.p_reversed == pytest.approx(1 - sure.pvalue)
    assert found.interval() == pytest.approx(tuple(wanted.confidence_interval(0.95))) and found.df == 4


def test_moderated_test_written_out() -> None:
    y = drawn(5, 8, 4)
    y[3:5] += np.random.default_rng(5).normal(0, 6, (2, 4))  # rows that follow no seed
    table = measured(y)
    known = model(table)
    prior, d = known[GROUP], 3
    assert 0 < prior.df < math.inf
    kept = []
    for row in range(1, 8):
        differences = y[row] - y[0]
        variance, df = differences.var(ddof=1), float(d)
        if variance < prior.sd**2:
            variance, df = (prior.df * prior.sd**2 + d * variance) / (prior.df + d), prior.df + d
        kept.append(df == d)
        t = differences.mean() / np.sqrt(variance / 4)
        found = t_test((Term(row, 0, 1), Term(0, 0, -1)), 0.0, table, known)
        assert found.p == pytest.approx(stats.t.sf(t, df)) and found.difference == pytest.approx(differences.mean())
        half = stats.t.ppf(0.975, df) * np.sqrt(variance / 4)
        assert found.interval() == pytest.approx((differences.mean() - half, differences.mean() + half))
    assert 0 < sum(kept) < 7


def test_columns_add_up_as_independent() -> None:
    columns = [drawn(11, 6, 5), drawn(12, 6, 4)]
    table = measured(columns[0]) | measured(columns[1], 1)
    known = model(table)
    gains = (Term(2, 1, 1), Term(0, 1, -1), Term(2, 0, -1), Term(0, 0, 1))
    one = t_test(gains[:2], 0.0, table, known)
    other = t_test((Term(2, 0, 1), Term(0, 0, -1)), 0.0, table, known)
    both = t_test(gains, 0.0, table, known)
    assert both.difference == pytest.approx(one.difference - other.difference)
    assert both.error**2 == pytest.approx(one.error**2 + other.error**2)
    welch = both.error**4 / (one.error**4 / one.df + other.error**4 / other.df)
    assert both.df == pytest.approx(welch)


def test_missing_seeds_leave_the_common_ones() -> None:
    y = drawn(6, 6, 6)
    y[0, 4:] = np.nan
    table = measured(y)
    found = t_test((Term(2, 0, 1), Term(0, 0, -1)), 0.0, table, {})
    assert found.p == pytest.approx(stats.ttest_rel(y[2, :4], y[0, :4], alternative="greater").pvalue)


def test_what_a_seed_does_to_all_rows_changes_nothing() -> None:
    y = drawn(3, 6, 5)
    table, moved = measured(y), measured(y + np.array([0, 20, -7, 3, 40]))
    one, other = (t_test(DIFFERENCE, 0.3, found, model(found)) for found in (table, moved))
    assert one == pytest.approx(other)


def test_gain_against_gain_within_one_column_is_taken_seed_by_seed() -> None:
    y = drawn(7, 6, 5)
    table = measured(y)
    known = {GROUP: SpreadPrior(0.5, 3.0, 20, 5, frozenset(table.values()))}
    gains = (Term(4, 0, 1), Term(0, 0, -1), Term(1, 0, -1), Term(2, 0, 1))
    (part,) = contrast_parts(gains, table)
    sums = y[4] - y[0] - y[1] + y[2]
    assert part.group == GROUP and part.size == 2 and part.by_seed() == pytest.approx(sums)
    assert sums.var(ddof=1) > 2 * 0.25
    assert t_test(gains, 0.0, table, known).error ** 2 == pytest.approx(sums.var(ddof=1) / 5)
    wide = {GROUP: SpreadPrior(5.0, 3.0, 20, 5, frozenset(table.values()))}
    found = t_test(gains, 0.0, table, wide)
    others = {GROUP: SpreadPrior(5.0, 3.0, 20, 5, frozenset(list(table.values())[:4]))}
    assert t_test(gains, 0.0, table, others).error ** 2 == pytest.approx(sums.var(ddof=1) / 5), "a cell was not in it"
    assert found.error**2 == pytest.approx((3 * 2 * 25 + 4 * sums.var(ddof=1)) / 7 / 5)


def test_one_row_of_two_columns_cancels() -> None:
    """A row whose labels are all there has the same runs in both columns."""
    columns = [drawn(21, 3, 4), drawn(22, 3, 4)]
    table = measured(columns[0]) | measured(columns[1], 1)
    table[2, 1] = table[2, 0]
    gap = (Term(2, 0, 1), Term(0, 0, -1), Term(2, 1, -1), Term(0, 1, 1))
    found, wanted = t_test(gap, 0.0, table, {}), stats.ttest_rel(columns[1][0], columns[0][0], alternative="greater")
    assert found.p == pytest.approx(wanted.pvalue), "seeds pair what is left"
    (part,) = contrast_parts(gap, table)
    assert part.group is None, "two columns together have a variance of their own"


def test_two_readings_have_a_variance_of_their_own() -> None:
    y, other = drawn(8, 6, 5), drawn(9, 1, 5)
    table = measured(y) | {(6, 0): measured(other, read="/fusion")[0, 0]}
    known = model(measured(y))
    found = t_test((Term(6, 0, 1), Term(0, 0, -1)), 0.0, table, known)
    assert found.p == pytest.approx(stats.ttest_rel(other[0], y[0], alternative="greater").pvalue)


def test_what_cannot_be_compared_says_why() -> None:
    y = np.array([[1.0, 2, 4, np.nan, np.nan, np.nan], [np.nan] * 3 + [3.0, 5, 4]])
    table = measured(y)
    assert model(table) == {}
    found = contrast_parts(DIFFERENCE, table)
    assert untestable(found, 3) == "the cells have 0 seeds in common, and 3 are needed"
    with pytest.raises(ValueError, match="0 seeds in common, and 2 are needed"):
        t_test(DIFFERENCE, 0.0, table, {})
    assert untestable([], 3) == ""


# How often they are wrong


def wrong(tables: Sequence[Samples], terms: Sequence[Term] = DIFFERENCE) -> float:
    """Share of tables in which a difference is shown, one-sided at 5 %."""
    return float(np.mean([t_test(terms, 0.0, table, model(table)).p < LEVEL for table in tables]))


def no_difference(
    rng: np.random.Generator, rows: int, seeds: int, list_sd: float = 4.0, alike: bool = True
) -> np.ndarray:
    """Draw y of rows that do not differ: lists of a seed spread by ``list_sd``, residuals by 1 or, unlike, by 0.3 to 2.

    Unlike rows have a third that follow the first row closely, as variants of one method do.
    """
    if alike:
        return 50 + rng.normal(0, list_sd, (1, seeds)) + rng.normal(0, 1, (rows, seeds))
    sd = np.where(np.arange(rows) % 3 == 1, 0.3, rng.choice([0.7, 2.0], rows))[:, None]
    return 50 + rng.normal(0, list_sd, (1, seeds)) + sd * rng.normal(0, 1, (rows, seeds))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(("rows", "seeds"), [(2, 3), (6, 3), (12, 3), (12, 6)])
def test_false_alarms_are_as_often_as_is_said(rows: int, seeds: int, alike: bool) -> None:
    """5 % of 400 tables, whatever seeds share; 0.023 to 0.077 is within 2.5 standard errors."""
    rng = np.random.default_rng(100 * rows + seeds)
    tables = [measured(no_difference(rng, rows, seeds, alike=alike)) for _ in range(400)]
    assert 0.02 <= wrong(tables) <= 0.077


def test_intervals_of_pairs_that_do_not_spread_alike_hold_their_differences() -> None:
    """95 % of 400 tables for a pair that spreads more than most; one variance for all pairs would hold about 80 %."""
    rng = np.random.default_rng(13)
    held, pooled = [], []
    for _ in range(400):
        y = 50 + rng.normal(0, 4, (1, 6)) + np.array([[0.1], [0.6], *[[0.1]] * 6]) * rng.normal(0, 1, (8, 6))
        table = measured(y)
        found = t_test((Term(1, 0, 1), Term(0, 0, -1)), 0.0, table, model(table))
        held.append(found.interval()[0] <= 0 <= found.interval()[1])
        left = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
        half = stats.t.isf(0.025, 35) * np.sqrt(2 * (left**2).sum() / 35 / 6)
        pooled.append(abs(found.difference) <= half)
    assert np.mean(held) > 0.93 and np.mean(pooled) < 0.85


@pytest.mark.parametrize("noisy", [0, 1])
def test_intervals_of_one_noisy_row_are_too_short_with_three_seeds_by_no_more_than_is_known(noisy: int) -> None:
    """Eight rows, one with three times the spread, the reference or the other: three seeds often do not find it out."""
    rng = np.random.default_rng(19 + noisy)
    held = []
    for _ in range(300):
        sd = np.where(np.arange(8) == noisy, 1.5, 0.5)[:, None]
        table = measured(50 + rng.normal(0, 4, (1, 3)) + sd * rng.normal(0, 1, (8, 3)))
        low, high = t_test(DIFFERENCE, 0.0, table, model(table)).interval()
        held.append(low <= 0 <= high)
    assert 0.78 < np.mean(held) < 0.95


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
    """One point, residuals of 0.5, lists that spread by 4: found mostly, and hardly ever without pairs."""
    rng = np.random.default_rng(9)
    found, unpaired = [], []
    for _ in range(200):
        y = 50 + rng.normal(0, 4, (1, 6)) + rng.normal(0, 0.5, (6, 6))
        y[0] += 1
        table = measured(y)
        found.append(t_test(DIFFERENCE, 0.0, table, model(table)).p < LEVEL)
        unpaired.append(stats.ttest_ind(y[0], y[1], alternative="greater").pvalue < LEVEL)
    assert np.mean(found) > 0.9 and np.mean(unpaired) < 0.3


def test_pairs_that_spread_alike_lend_each_other_degrees_of_freedom() -> None:
    """Two points, residuals of 0.5, three seeds: the moderated test finds more than each pair's own."""
    rng = np.random.default_rng(14)
    moderated, own = [], []
    for _ in range(200):
        y = 50 + rng.normal(0, 4, (1, 3)) + rng.normal(0, 0.5, (10, 3))
        y[0] += 2
        table = measured(y)
        moderated.append(t_test(DIFFERENCE, 0.0, table, model(table)).p < LEVEL / 20)
        own.append(t_test(DIFFERENCE, 0.0, table, {}).p < LEVEL / 20)
    assert np.mean(moderated) > 0.75 > 3 * np.mean(own)


def test_spreads_of_cells_that_share_seeds_are_compared_on_the_safe_side() -> None:
    rng = np.random.default_rng(10)
    for shared, most in ((0.0, 0.08), (1.0, 0.06), (4.0, 0.02)):
        tables = [measured(no_difference(rng, 2, 4, shared)) for _ in range(500)]
        assert np.mean([f_test([t[0, 0]], [t[1, 0]]).p < LEVEL for t in tables]) <= most
