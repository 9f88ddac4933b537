"""Claims on gains, spreads and differences in either direction: what they ask, and their statistics by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from viladiff.runs.record import RunRecord
from viladiff.tables.claims import Verdict, evaluate_claims, printed_verdict
from viladiff.tables.contrasts import Term, contrasts
from viladiff.tables.paired import fit_prior
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.significance import (
    LEVEL,
    CellSample,
    cell_samples,
    f_test,
    holm,
    score,
    smallest_detectable,
    smallest_ratio,
)
from viladiff.tables.spec import Claim, Column, Row, Scale, Table

Values = dict[tuple[int, int], list[float]]
"""Points by (row, column), one a seed."""


def a_table(rows: int | list[Row], columns: str, *claims: Claim) -> Table:
    made = [Row(label=f"r{i}") for i in range(rows)] if isinstance(rows, int) else rows
    across = tuple(Column(label=label) for label in columns)
    return Table(name="t", title="T", scale={"s": Scale()}, columns=across, rows=tuple(made), claims=claims)


def claim(kind: str, *rows: str, **more: object) -> Claim:
    return Claim(text=f"{kind} {rows}", kind=kind, rows=rows, **more)  # type: ignore[arg-type]


def a_record(run_id: str, points: float, fusion: float | None = None) -> RunRecord:
    scores = {
        "teacher": {"visual": {"miou": points / 100}, "fusion": {"miou": None if fusion is None else fusion / 100}}
    }
    return RunRecord(
        run_id=run_id, config={}, changed={}, fingerprints={}, core_revision=0, method_revision=0,
        steps=1, miou=points / 100, network="teacher",
        stream="visual", scores=scores, best=None, history=[], pseudo_labels={}, class_names=[], captions="",
        text_encoder="", encoder="", pretrained="", wall_seconds=1, train_seconds=1, seconds_per_step=None,
        peak_memory_bytes=1, workers=1, threads=1, device="cpu", versions={}, git={},
    )  # fmt: skip


def world(table: Table, values: Values, fusion: float | None = None) -> tuple[Plan, dict[str, RunRecord]]:
    rows, columns = sorted({row for row, _ in values}), sorted({column for _, column in values})
    seeds = range(max(map(len, values.values())))
    names = {(row, column, seed): f"{row}/{column}/{seed}" for row in rows for column in columns for seed in seeds}
    cells = tuple(PlannedCell(*place, name) for place, name in names.items())
    records = {
        names[row, column, seed]: a_record(names[row, column, seed], points, fusion and points + fusion)
        for (row, column), found in values.items()
        for seed, points in enumerate(found)
    }
    return Plan(table, "s", tuple(rows), tuple(columns), tuple(seeds), cells, {}), records


def verdict(table: Table, values: Values) -> Verdict:
    (found,) = evaluate_claims(*world(table, values))
    return found


def near(center: float, spread: float = 0.1) -> list[float]:
    """Three seeds with this mean and standard deviation, in another direction for another mean."""
    drawn = np.random.default_rng(round(1000 * center)).normal(size=3)
    return (center + spread * (drawn - drawn.mean()) / drawn.std(ddof=1)).tolist()


def asked(table: Table, one: Claim) -> list[tuple[str, str, str]]:
    return [(q.higher, q.lower, q.column) for q in contrasts(table, one)]


# Gains


def test_returns_diminish_compares_the_first_gain_with_each_later_one() -> None:
    one = claim("returns_diminish", "r0", "r2", "r1", "r3")
    table = a_table(4, "ab", one)
    assert asked(table, one) == [
        ("r2 over r0", "r1 over r2", "a"),
        ("r2 over r0", "r1 over r2", "b"),
        ("r2 over r0", "r3 over r1", "a"),
        ("r2 over r0", "r3 over r1", "b"),
    ]
    values: Values = {(row, 0): near(level) for row, level in enumerate((50.0, 52.5, 52.0, 52.6))}
    values |= {(row, 1): near(level) for row, level in enumerate((40.0, 41.9, 42.0, 43.9))}
    found = verdict(table, values)
    # a: first gain 2, later 0.5 and 0.1; b: first gain 2, later -0.1 and 2.0.
    assert [c.difference for c in found.comparisons] == pytest.approx([1.5, 2.1, 1.9, 0.0])
    assert [c.outcome for c in found.comparisons] == ["shown", "shown", "shown", "open"]
    assert found.verdict == "not decided"


def test_a_cell_that_stands_in_both_gains_counts_twice() -> None:
    """2 x middle - first - last: the middle's weight is 2."""
    one = claim("returns_diminish", "r0", "r1", "r2")
    values: Values = {(0, 0): [50.0, 51.0, 52.5], (1, 0): [55.0, 56.1, 54.0], (2, 0): [57.0, 56.2, 57.9]}
    found = verdict(a_table(3, "a", one), values).comparisons[0]
    means = [np.mean(values[row, 0]) for row in range(3)]
    y = np.array([values[row, 0] for row in range(3)])
    assert found.difference == pytest.approx(2 * means[1] - means[0] - means[2])
    wanted = stats.ttest_1samp(2 * y[1] - y[0] - y[2], 0, alternative="greater")
    assert found.p == pytest.approx(wanted.pvalue) and found.p_reversed == pytest.approx(1 - wanted.pvalue)


def test_gain_exceeds_compares_two_pairs_of_rows() -> None:
    one = claim("gain_exceeds", "r3", "r1", "r1", "r0")
    table = a_table(4, "a", one)
    assert asked(table, one) == [("r3 over r1", "r1 over r0", "a")]
    values: Values = {(row, 0): near(level) for row, level in enumerate((50.0, 51.0, 40.0, 55.0))}
    assert verdict(table, values).verdict == "holds"
    swapped = a_table(4, "a", claim("gain_exceeds", "r1", "r0", "r3", "r1"))
    assert verdict(swapped, values).verdict == "fails"


def test_printed_gains_are_compared_as_decimals() -> None:
    rows = [Row(label=f"r{i}", paper=(number,)) for i, number in enumerate((74.9, 76.3, 76.3, 77.7))]
    one = claim("returns_diminish", "r0", "r1", "r2", "r3")
    said = printed_verdict(a_table(rows, "a", one), one)
    assert said == (
        "fails",
        "1 of 2 printed differences are not as claimed: 'r1 over r0' against 'r3 over r2' (a): +0.0",
    )
    assert 76.3 - 74.9 != 77.7 - 76.3, "as floats these gains differ"


# Margins, and rows that are compared with some others only


def test_a_margin_has_to_be_exceeded() -> None:
    one = claim("higher", "r0", "r1", margin=1.8)
    table = a_table(2, "a", one)
    assert verdict(table, {(0, 0): near(53), (1, 0): near(50)}).verdict == "holds"
    short = verdict(table, {(0, 0): near(51), (1, 0): near(50)})
    assert short.verdict == "fails" and short.comparisons[0].difference == pytest.approx(1.0)
    assert "beyond a margin of 1.8" in short.test
    shown = verdict(table, {(0, 0): [50.7, 51.8, 52.9], (1, 0): [51.1, 50.0, 48.9]})
    assert shown.verdict == "not decided" and shown.comparisons[0].p == pytest.approx(0.5)


def test_a_printed_number_at_the_margin_is_as_claimed() -> None:
    for number, wanted in ((83.9, "holds"), (83.8, "fails")):
        rows = [Row(label="r0", paper=(number,)), Row(label="r1", paper=(82.1,))]
        one = claim("higher", "r0", "r1", margin=1.8)
        assert printed_verdict(a_table(rows, "a"), one)[0] == wanted
    assert 83.9 - 82.1 - 1.8 != 0, "as floats it is not at the margin"


def test_best_and_worst_among_named_rows() -> None:
    table = a_table(5, "a")
    assert asked(table, claim("best_row", "r1", among=("r3", "r0"))) == [("r1", "r0", "a"), ("r1", "r3", "a")]
    assert asked(table, claim("worst_rows", "r4", among=("r0", "r4"))) == [("r0", "r4", "a")]
    assert asked(table, claim("differs", "r2", among=("r0",))) == [("r0", "r2", "a")]


# Differences in either direction


def test_differs_is_two_sided_and_corrected_for_all_rows() -> None:
    one = claim("differs", "r1", source="ours")
    rows = [*(Row(label=f"r{i}") for i in range(4)), Row(label="own", control=True)]
    table = a_table(rows, "a", one)
    assert asked(table, one) == [(f"r{i}", "r1", "a") for i in (0, 2, 3)], "controls stay out unless they are named"
    values: Values = {(0, 0): near(52.0), (1, 0): near(50.0), (2, 0): near(49.0), (3, 0): near(50.05)}
    found = verdict(table, values)
    assert found.verdict == "holds" and found.why == "2 of 3 differ: 1 higher, 1 lower; 1 open"
    assert [c.outcome for c in found.comparisons] == ["shown", "reversed", "open"]
    y = np.array([values[row, 0] for row in range(4)])
    variances = [float((y[i] - y[j]).var(ddof=1)) for i in range(4) for j in range(i)]
    prior = fit_prior(variances, [2] * 6, 6)
    tests = []
    for i in (0, 2, 3):
        variance, df = prior.moderated(float((y[i] - y[1]).var(ddof=1)), 2)
        tests.append((abs(float((y[i] - y[1]).mean())), math.sqrt(variance / 3), df))
    two_sided = [2 * float(stats.t.sf(d / error, df)) for d, error, df in tests]
    wanted = holm(two_sided)
    assert [c.p for c in found.comparisons] == pytest.approx(wanted)
    assert [c.p_reversed for c in found.comparisons] == pytest.approx(wanted)
    assert found.comparisons[0].least == pytest.approx(smallest_detectable(*tests[0][1:], 6)), "5 % in both directions"
    assert "two-sided t tests at 5 %" in found.test and "3 comparisons of our own claims" in found.test


def test_that_nothing_differs_is_never_shown() -> None:
    one = claim("differs", "r0")
    found = verdict(a_table(3, "a", one), {(row, 0): near(50.0 + row / 100, 0.5) for row in range(3)})
    assert (found.verdict, found.why) == ("not decided", "0 of 2 differ: 0 higher, 0 lower; 2 open")
    assert found.detectable is not None and found.detectable > 1


def test_one_difference_is_enough_although_other_rows_were_not_run() -> None:
    one = claim("differs", "r0")
    found = verdict(a_table(3, "a", one), {(0, 0): near(50.0), (1, 0): near(53.0), (2, 0): near(50.0)[:1]})
    assert found.verdict == "holds" and "'r2' at 'a' has 1 of 3 seeds" in found.why
    assert [c.higher for c in found.comparisons] == ["r1"]
    assert printed_verdict(a_table(3, "a", one), one) == ("not printed", "the paper prints no spread")


# Spreads


def test_a_spread_is_an_f_test_over_all_columns() -> None:
    one = claim("less_stable", "r0", "r1")
    values: Values = {
        (0, 0): [50.0, 53.0, 47.0],
        (0, 1): [60.0, 64.0, 59.0],
        (1, 0): [50.0, 50.2, 49.8],
        (1, 1): near(60),
    }
    table = a_table(2, "ab", one)
    assert asked(table, one) == [("r0", "r1", "2 columns together")]
    found = verdict(table, values)
    (made,) = found.comparisons
    high, low = (np.mean([np.var(values[row, c], ddof=1) for c in (0, 1)]) for row in (0, 1))
    assert made.difference == pytest.approx(np.sqrt(high / low)) and made.form == "spread"
    assert made.p == pytest.approx(stats.f.sf(high / low, 4, 4)) and found.verdict == "holds"
    ends = np.sqrt(high / low / stats.f.ppf([0.975, 0.025], 4, 4))
    assert made.interval == pytest.approx(tuple(ends)) and made.n == (3, 3)
    assert made.least == pytest.approx(smallest_ratio((4, 4), 1)) and "F test on mIoU" in found.test
    turned = verdict(a_table(2, "ab", claim("less_stable", "r1", "r0")), values)
    assert turned.verdict == "fails" and "'r1' spreads 0.0" in turned.why and "times as much as 'r0'" in turned.why


def test_equal_spreads_at_other_levels_are_open() -> None:
    """The means differ by 30 points; only what is left within a cell counts."""
    one = claim("less_stable", "r0", "r1")
    found = verdict(a_table(2, "a", one), {(0, 0): near(80.0, 1.0), (1, 0): near(50.0, 1.0)})
    assert found.verdict == "not decided" and found.comparisons[0].difference == pytest.approx(1.0)


def test_a_spread_below_three_seeds_is_not_decided() -> None:
    one = claim("less_stable", "r0", "r1")
    found = verdict(a_table(2, "a", one), {(0, 0): [50.0, 59.0], (1, 0): [50.0, 50.1]})
    assert found.verdict == "not decided" and found.comparisons == () and "has 2 of 3 seeds" in found.why


def test_spreads_of_nothing() -> None:
    flat, wide = (
        CellSample((1.0, 1.0, 1.0), tuple("abc"), (0, 1, 2)),
        CellSample((1.0, 2.0, 3.0), tuple("def"), (0, 1, 2)),
    )
    assert f_test([wide], [flat])[0] == math.inf and f_test([wide], [flat]).p == 0
    assert f_test([flat], [flat]).p == 1 and f_test([flat], [flat]).p_reversed == 1
    assert f_test([flat], [wide]).p == pytest.approx(1)
    with pytest.raises(ValueError, match="two seeds"):
        f_test([CellSample((1.0,), ("a",), (0,))], [wide])


def test_smallest_ratio_is_found_four_times_in_five() -> None:
    """By simulation, normal seeds: 8 and 6 degrees of freedom, three comparisons."""
    df, comparisons = (8, 6), 3
    ratio = smallest_ratio(df, comparisons)
    rng = np.random.default_rng(2)
    draws = 200_000
    quotient = ratio**2 * (rng.chisquare(df[0], draws) / df[0]) / (rng.chisquare(df[1], draws) / df[1])
    assert (stats.f.sf(quotient, *df) < LEVEL / comparisons).mean() == pytest.approx(0.8, abs=0.004)


# Scores that a row reads from the same runs


def test_a_row_can_read_another_stream_of_the_same_runs() -> None:
    one = claim("higher", "r1", "r0")
    rows = [Row(label="r0"), Row(label="r1", stream="fusion"), Row(label="r2", network="student")]
    table = a_table(rows, "a", one)
    plan, records = world(table, {(row, 0): near(50) for row in range(3)}, fusion=2.0)
    shared = tuple(PlannedCell(row, 0, seed, f"0/0/{seed}") for row in range(3) for seed in range(3))
    plan = Plan(table, "s", (0, 1, 2), (0,), (0, 1, 2), shared, {})
    measured = cell_samples(plan, records)
    assert measured[0, 0].values == pytest.approx(near(50)) and measured[1, 0].values == pytest.approx(
        [one + 2 for one in near(50)]
    )
    assert measured[2, 0].values == (), "no run has such a network"
    assert measured[0, 0].runs == measured[1, 0].runs
    assert measured[0, 0].read != measured[1, 0].read, "or the two would cancel"
    found = evaluate_claims(plan, records)[0]
    assert found.verdict == "holds" and found.comparisons[0].difference == pytest.approx(2.0)


def test_score_is_the_headline_unless_another_is_named() -> None:
    found = a_record("x", 41.0, 43.0)
    assert score(found, "miou") == pytest.approx(41.0) and score(found, "miou", stream="fusion") == pytest.approx(43.0)
    assert score(found, "miou", "student") is None and score(found, "boundary_iou") is None
    assert score(a_record("x", math.nan), "miou") is None
    assert Term(0, 0, 1) < Term(0, 1, -1), "terms sort, so that two claims that ask the same are known as one"
