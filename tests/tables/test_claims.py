"""Verdicts: the statistics against straight-line NumPy and SciPy, the meaning of each kind, what is not decided."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from record_kit import made
from scipy import stats

from viladiff.report.table import comparisons
from viladiff.runs.record import RunRecord
from viladiff.tables.claims import Verdict, evaluate_claims
from viladiff.tables.contrasts import Term, contrasts, inclusion_pairs, printed_verdict
from viladiff.tables.paired import SpreadPrior, fit_prior, t_test
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.significance import (
    LEVEL,
    CellSample,
    cell_samples,
    holm,
    pooled_variance,
    smallest_detectable,
)
from viladiff.tables.spec import Claim, Column, Row, Scale, Table
from viladiff.tables.spec_file import load_table

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = made("supervised-92-0")
TABLE5 = load_table(ROOT / "ablations" / "table5.toml")

Values = dict[tuple[int, int], list[float]]
"""Points by (row, column), one a seed."""


def a_table(rows: list[Row], columns: list[str], *claims: Claim) -> Table:
    return Table(
        name="t",
        title="T",
        scale={"s": Scale()},
        columns=tuple(Column(label=label) for label in columns),
        rows=tuple(rows),
        claims=claims,
    )


def plain(count: int) -> list[Row]:
    return [Row(label=f"r{i}") for i in range(count)]


def a_record(run_id: str, points: float | None, boundary: float | None = None) -> RunRecord:
    scores = {"teacher": {"visual": {"miou": 0.99, "boundary_iou": boundary}}, "student": {"visual": {"miou": 0.01}}}
    given = {"run_id": run_id, "miou": None if points is None else points / 100, "network": "teacher"}
    return RunRecord(**{**EXAMPLE.model_dump(), **given, "stream": "visual", "scores": scores})


def world(table: Table, values: Values, seeds: int = 3) -> tuple[Plan, dict[str, RunRecord]]:
    """A plan of all rows that have values or are named in ``values`` with an empty list, and the records."""
    rows, columns = sorted({row for row, _ in values}), sorted({column for _, column in values})
    cells = [
        PlannedCell(row, column, seed, f"{row}/{column}/{seed}")
        for seed in range(seeds)
        for row in rows
        for column in columns
    ]
    records = {
        f"{row}/{column}/{seed}": a_record(f"{row}/{column}/{seed}", value, value / 200)
        for (row, column), found in values.items()
        for seed, value in enumerate(found)
    }
    scale = "s" if "s" in table.scale else "paper"
    return Plan(table, scale, tuple(rows), tuple(columns), tuple(range(seeds)), tuple(cells), {}), records


def verdict(table: Table, values: Values, seeds: int = 3) -> Verdict:
    (found,) = evaluate_claims(*world(table, values, seeds))
    return found


def higher(*labels: str, kind: str = "higher", **more: object) -> Claim:
    return Claim(text=f"{kind} {labels}", kind=kind, rows=labels, **more)  # type: ignore[arg-type]


def a_reading(run_id: str, visual: float, fusion: float) -> RunRecord:
    """A record with two streams."""
    scores = {"teacher": {"visual": {"miou": visual / 100}, "fusion": {"miou": fusion / 100}}}
    return a_record(run_id, visual).model_copy(update={"scores": scores})


def near(center: float, spread: float = 0.1) -> list[float]:
    """Three seeds with this mean and standard deviation, in another direction for another mean."""
    drawn = np.random.default_rng(round(1000 * center)).normal(size=3)
    return (center + spread * (drawn - drawn.mean()) / drawn.std(ddof=1)).tolist()


# Statistics


def straight(values: Values, one: tuple[int, int], other: tuple[int, int]) -> tuple[float, float, float, SpreadPrior]:
    """Difference, standard error and degrees of freedom of two cells of a column, from the model of all pairs."""
    values = {place: found for place, found in values.items() if place[1] == one[1]}
    pairs = [(a, b) for a in values for b in values if a[0] > b[0]]
    differences = {(a, b): [x - y for x, y in zip(values[a], values[b], strict=False)] for a, b in pairs}
    sizes = [len(found) for found in values.values()]
    most = sum(sizes) - len(sizes) - max(sizes) + 1
    variances = [float(np.var(each, ddof=1)) for each in differences.values()]
    prior = fit_prior(variances, [len(each) - 1 for each in differences.values()], most)
    mine = np.array([x - y for x, y in zip(values[one], values[other], strict=False)])
    variance, df = float(mine.var(ddof=1)), float(len(mine) - 1)
    if math.isinf(prior.df):
        variance, df = prior.sd**2, most
    elif variance < prior.sd**2:
        variance, df = (prior.df * prior.sd**2 + df * variance) / (prior.df + df), min(prior.df + df, most)
    return float(mine.mean()), math.sqrt(variance / len(mine)), df, prior


def test_two_cells_give_students_paired_test() -> None:
    table = a_table(plain(2), ["c"], higher("r0", "r1"))
    one, other = [51.0, 52.5, 50.1], [49.9, 50.2, 51.4, 48.0]
    found = verdict(table, {(0, 0): one, (1, 0): other}, seeds=4).comparisons[0]
    up = stats.ttest_rel(one, other[:3], alternative="greater")
    down = stats.ttest_rel(one, other[:3], alternative="less")
    both = stats.ttest_rel(one, other[:3]).confidence_interval(0.95)
    assert found.p == pytest.approx(up.pvalue) and found.p_reversed == pytest.approx(down.pvalue)
    assert found.interval == pytest.approx((both.low, both.high))
    assert found.difference == pytest.approx(np.mean(one) - np.mean(other[:3])) and found.n == (3, 4)
    assert (found.higher, found.lower, found.column, found.outcome) == ("r0", "r1", "c", "open")


def test_each_column_has_one_model_and_all_comparisons_one_correction() -> None:
    """Straight through in NumPy: 4 rows x 2 columns of unequal numbers of seeds, 8 distinct comparisons."""
    claims = (higher("r0", "r1"), higher("r1", "r2"), higher("r0", "r2"), higher("r0", kind="best_row"))
    table = a_table(plain(4), ["a", "b"], *claims)
    rng = np.random.default_rng(0)
    sizes = {(0, 0): 3, (0, 1): 4, (1, 0): 5, (1, 1): 3, (2, 0): 3, (2, 1): 4, (3, 0): 4, (3, 1): 5}
    values = {place: (50 + 0.8 * place[0] + rng.normal(0, 1 + place[1], n)).tolist() for place, n in sizes.items()}
    found = evaluate_claims(*world(table, values, seeds=5))

    pairs = [((higher, c), (lower, c)) for higher, lower in ((0, 1), (1, 2), (0, 2), (0, 3)) for c in (0, 1)]
    told = [straight(values, *pair) for pair in pairs]
    diffs, errors, dfs = (np.array([one[i] for one in told]) for i in range(3))
    for sign, name in ((1, "p"), (-1, "p_reversed")):
        raw = stats.t.sf(sign * diffs / errors, dfs)
        order = np.argsort(raw)
        wanted = np.empty(8)
        wanted[order] = np.minimum(1, np.maximum.accumulate(raw[order] * np.arange(8, 0, -1)))
        first_three = [getattr(one, name) for v in found[:3] for one in v.comparisons]
        assert first_three == pytest.approx(wanted[:6])
        best = [getattr(one, name) for one in found[3].comparisons]
        assert best == pytest.approx(wanted[[0, 1, 4, 5, 6, 7]]), "comparisons that another claim asks for count once"
    half = stats.t.ppf(0.975, dfs) * errors
    assert [one.interval for one in found[0].comparisons] == [
        pytest.approx((d - h, d + h)) for d, h in zip(diffs[:2], half[:2], strict=True)
    ]
    for column, label in enumerate("ab"):
        assert f" at {label}" in found[0].test
        assert f"{told[column][3].sd:.2f} points, that of 6 pairs of rows" in found[0].test
    assert told[0][3].sd < told[1][3].sd and "for 8 comparisons of the paper" in found[0].test


def test_pool_counts_shared_runs_once_and_leaves_single_runs_out() -> None:
    same = CellSample((1.0, 3.0), ("x", "y"), (0, 1))
    pool = pooled_variance([same, same, CellSample((9.0,), ("z",), (0,)), CellSample((), (), ())])
    assert pool is not None and (pool.df, pool.cells) == (1, 1) and pool.sd == pytest.approx(np.sqrt(2))
    assert pooled_variance([CellSample((9.0,), ("z",), (0,))]) is None and pooled_variance([]) is None


def test_the_same_runs_cannot_differ() -> None:
    one = CellSample((1.0, 2.0, 4.0), ("x", "y", "z"), (0, 1, 2))
    measured = {(0, 0): one, (1, 0): one}
    terms = (Term(0, 0, 1), Term(1, 0, -1))
    assert t_test(terms, 0.0, measured, {}) == (0.0, 0.0, 1.0, 1.0, 1.0)
    assert t_test(terms, 0.4, measured, {})[3:5] == (0.0, 1.0), "within any tolerance, surely"


def test_two_readings_of_the_same_runs_are_compared_run_by_run() -> None:
    """As SciPy's paired test; so is a reading against another run's."""
    rows = [Row(label="r0"), Row(label="r1", stream="fusion"), Row(label="r2")]
    table = a_table(rows, ["c"], higher("r1", "r0"), higher("r1", "r2"))
    visual, fusion, other = [40.0, 44.0, 47.0], [41.0, 45.1, 47.7], [43.0, 42.0, 44.5]
    runs = ("x", "y", "z")
    plan, _ = world(table, {(row, 0): visual for row in range(3)})
    measured = {
        (0, 0): CellSample((*visual,), runs, (0, 1, 2)),
        (1, 0): CellSample((*fusion,), runs, (0, 1, 2), "/fusion"),
        (2, 0): CellSample((*other,), ("a", "b", "c"), (0, 1, 2)),
    }
    known = {(0, ("", "")): SpreadPrior(9.0, 5.0, 40, 9), (0, ("/fusion", "")): SpreadPrior(9.0, 5.0, 40, 9)}
    found, wanted = t_test((Term(1, 0, 1), Term(0, 0, -1)), 0.0, measured, known), stats.ttest_rel(fusion, visual)
    assert found.p == pytest.approx(wanted.pvalue / 2) and found.df == pytest.approx(2)
    assert found.difference == pytest.approx(np.mean(fusion) - np.mean(visual)) and found.p < 0.01
    beside = t_test((Term(1, 0, 1), Term(2, 0, -1)), 0.0, measured, known)
    assert beside.p == pytest.approx(stats.ttest_rel(fusion, other, alternative="greater").pvalue)
    with pytest.raises(ValueError, match="have 1 seed in common, and 2 are needed"):
        once = {(0, 0): CellSample((1.0,), ("x",), (0,)), (1, 0): CellSample((2.0,), ("x",), (0,), "/fusion")}
        t_test((Term(1, 0, 1), Term(0, 0, -1)), 0.0, once, {})
    records = {cell.run_id: a_record(cell.run_id, 0.0) for cell in plan.cells} | {
        f"0/0/{i}": a_reading(f"0/0/{i}", visual[i], fusion[i]) for i in range(3)
    }
    shared = tuple(
        PlannedCell(c.row, c.column, c.seed, f"0/0/{c.seed}" if c.row == 1 else c.run_id) for c in plan.cells
    )
    one, _ = evaluate_claims(replace(plan, cells=shared), records)
    assert one.comparisons[0].p_reversed == pytest.approx(1.0, abs=0.02) and "two streams" in one.test
    assert one.verdict == "holds"


def test_a_cell_that_spreads_more_than_the_others_is_tested_with_its_own_spread() -> None:
    """A collapsing method neither hides what differs elsewhere nor borrows the certainty of the others."""
    rng = np.random.default_rng(1)
    values = {(row, 0): (50 + 20 * (row == 1) + rng.normal(0, 0.8, 3)).tolist() for row in range(12)}
    wild = values[12, 0] = [6.0, 9.0, 41.8]
    table = a_table(plain(13), ["c"], higher("r0", kind="differs"))
    found = verdict(table, values)
    prior = straight({place: v for place, v in values.items() if place != (12, 0)}, (1, 0), (0, 0))[3]
    assert f"{prior.sd:.2f} points, that of 66 pairs of rows" in found.test
    by_row = {one.higher: one for one in found.comparisons}
    assert by_row["r1"].outcome == "shown"
    last, wanted = by_row["r12"], stats.ttest_rel(wild, values[0, 0]).confidence_interval(0.95)
    assert last.outcome == "open" and last.interval == pytest.approx((wanted.low, wanted.high))
    assert "r12 at c: no part of that, since they follow the others' seeds less" in found.test


def test_without_any_spread_a_difference_is_certain() -> None:
    table = a_table(plain(2), ["c"], higher("r0", "r1"))
    found = verdict(table, {(0, 0): [52.0] * 3, (1, 0): [51.0] * 3})
    assert found.verdict == "holds" and found.comparisons[0].p == 0 and found.detectable == 0
    assert verdict(table, {(0, 0): [51.0] * 3, (1, 0): [52.0] * 3}).verdict == "fails"
    assert verdict(table, {(0, 0): [51.0] * 3, (1, 0): [51.0] * 3}).verdict == "not decided"


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.6]) == [1.0, 1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]
    assert holm([0.02, 0.02]) == [0.04, 0.04]


def test_smallest_detectable_difference_is_found_four_times_in_five() -> None:
    """By simulation: two cells of three seeds, the pool of eight cells, ten comparisons."""
    df, comparisons, sd = 16, 10, 0.7
    error = sd * np.sqrt(2 / 3)
    effect = smallest_detectable(error, df, comparisons)
    rng = np.random.default_rng(1)
    draws = 200_000
    difference = rng.normal(effect, error, draws)
    spread = sd * np.sqrt(rng.chisquare(df, draws) / df)
    found = stats.t.sf(difference / (spread * np.sqrt(2 / 3)), df) < LEVEL / comparisons
    assert found.mean() == pytest.approx(0.8, abs=0.004)
    assert smallest_detectable(2 * error, df, comparisons) == pytest.approx(2 * effect)
    assert smallest_detectable(error, df, 1) < effect < smallest_detectable(error, 4, comparisons)
    assert np.isfinite(smallest_detectable(1.0, 4, 500)) and smallest_detectable(0.0, 4, 5) == 0


def test_detectable_is_that_of_the_hardest_comparison() -> None:
    table = a_table(plain(2), ["a", "b"], higher("r0", "r1"))
    values = {(0, 0): [50.0, 51, 52], (1, 0): [50.0, 52, 51], (0, 1): [50.0, 51, 52, 51], (1, 1): [51.0, 51, 52, 50]}
    found = verdict(table, values, seeds=4)
    first, second = (np.subtract(values[0, c], values[1, c]) for c in (0, 1))
    errors = [float(each.std(ddof=1)) / math.sqrt(len(each)) for each in (first, second)]
    least = [smallest_detectable(error, len(each) - 1, 2) for error, each in zip(errors, (first, second), strict=True)]
    assert [one.least for one in found.comparisons] == pytest.approx(least)
    assert found.detectable == max(one.least for one in found.comparisons)


# Verdicts


LADDER = [
    Row(label="r0", components=("x",)),
    Row(label="r1", components=("x", "y")),
    Row(label="r2", components=("x", "y", "z")),
]
STEPS = Claim(text="steps", kind="superset_increases")


def test_a_claim_holds_where_every_comparison_is_shown() -> None:
    found = verdict(a_table(LADDER, ["c"], STEPS), {(0, 0): near(50), (1, 0): near(52), (2, 0): near(54)})
    assert (found.verdict, found.why) == ("holds", "2 of 2 shown, 0 reversed, 0 open")
    assert [one.outcome for one in found.comparisons] == ["shown", "shown"]


def test_a_claim_fails_where_one_comparison_is_reversed() -> None:
    found = verdict(a_table(LADDER, ["c"], STEPS), {(0, 0): near(50), (1, 0): near(52), (2, 0): near(51)})
    assert found.verdict == "fails"
    assert found.why == "1 of 2 shown, 1 reversed, 0 open: 'r2' is 1.0 points below 'r1' (c)"


def test_a_claim_is_open_where_a_difference_may_be_chance() -> None:
    found = verdict(a_table(LADDER, ["c"], STEPS), {(0, 0): near(50), (1, 0): near(52), (2, 0): near(52.05)})
    assert (found.verdict, found.why) == ("not decided", "1 of 2 shown, 0 reversed, 1 open")
    tied = verdict(a_table(LADDER, ["c"], STEPS), {(0, 0): near(50), (1, 0): near(52), (2, 0): near(52)})
    assert tied.verdict == "not decided"


def test_a_complete_column_has_a_verdict_of_its_own() -> None:
    values: Values = {
        (0, 0): near(50),
        (1, 0): near(52),
        (2, 0): near(51),
        (0, 1): near(50),
        (1, 1): near(52),
        (2, 1): [],
    }
    found = verdict(a_table(LADDER, ["a", "b"], STEPS), values)
    assert found.verdict == "not decided" and "'r2' at 'b' has 0 of 3 seeds" in found.why
    (alone,) = found.by_column
    assert alone[:2] == ("a", "fails")
    assert alone.why == "1 of 2 shown, 1 reversed, 0 open: 'r2' is 1.0 points below 'r1' (a)"
    assert alone.least == max(one.least for one in found.comparisons if one.column == "a")
    full = verdict(a_table(LADDER, ["a", "b"], STEPS), {**values, (2, 1): near(54)})
    assert [one[:2] for one in full.by_column] == [("a", "fails"), ("b", "holds")] and full.verdict == "fails"
    assert verdict(a_table(LADDER, ["a"], STEPS), {at: v for at, v in values.items() if at[1] == 0}).by_column == ()


def test_a_claim_across_columns_has_no_verdict_of_one_column() -> None:
    values: Values = {(0, 0): near(54), (1, 0): near(50), (0, 1): near(55), (1, 1): near(54)}
    for kind in ("gain_shrinks", "less_stable"):
        source = "ours" if kind == "less_stable" else "paper"
        found = verdict(a_table(plain(2), ["a", "b"], higher("r0", "r1", kind=kind, source=source)), values)
        assert found.comparisons and found.by_column == ()


def test_correction_can_undo_what_one_test_would_show() -> None:
    values: Values = {(0, 0): [50.0, 50.6, 51.2], (1, 0): [49.0, 50.4, 50.2]}
    alone = verdict(a_table(plain(2), ["c"], higher("r0", "r1")), values)
    assert alone.verdict == "not decided" and 0.05 < alone.comparisons[0].p < 0.06
    wider: Values = {(0, 0): [50.0, 50.6, 51.2], (1, 0): [48.8, 50.0, 49.6]}
    assert verdict(a_table(plain(2), ["c"], higher("r0", "r1")), wider).verdict == "holds"
    both = a_table(plain(2), ["c"], higher("r0", "r1"), higher("r1", "r0"))
    assert [one.verdict for one in evaluate_claims(*world(both, wider))] == ["not decided", "not decided"]


def test_claims_of_the_paper_and_ours_are_corrected_apart() -> None:
    values: Values = {(0, 0): [50.0, 50.6, 51.2], (1, 0): [48.8, 50.0, 49.6]}
    ours = higher("r1", "r0", source="ours")
    found = evaluate_claims(*world(a_table(plain(2), ["c"], ours, higher("r0", "r1")), values))
    assert [one.source for one in found] == ["ours", "paper"], "in the table's order"
    assert found[1].verdict == "holds" and found[0].verdict == "fails"
    assert "for 1 comparison of our own claims" in found[0].test and "of the paper's claims" in found[1].test


@pytest.mark.parametrize(
    ("values", "seeds", "why"),
    [
        ({(0, 0): near(54)[:2], (1, 0): near(50)}, 3, "'r0' at 'c' has 2 of 3 seeds, and 3 are needed; 1 of 1 diff"),
        (
            {(0, 0): [54.0], (1, 0): [50.0]},
            1,
            "'r0' at 'c' has 1 of 3 seeds, and 3 are needed (likewise 1 more cell); 1",
        ),
        ({(0, 0): [], (1, 0): near(50)}, 3, "'r0' at 'c' has 0 of 3 seeds, and 3 are needed; nothing to compare"),
        ({(1, 0): near(50)}, 3, "'r0' at 'c' was not asked for; nothing to compare"),
        ({(0, 0): near(54), (1, 0): near(50)[:2]}, 5, "'r1' at 'c' has 2 of 5 seeds, and 3 are needed; 1 of 1 diff"),
    ],
)
def test_below_three_seeds_nothing_is_decided(values: Values, seeds: int, why: str) -> None:
    found = verdict(a_table(plain(2), ["c"], higher("r0", "r1")), values, seeds)
    assert found.verdict == "not decided" and found.why.startswith(why), found.why
    assert found.comparisons == () and found.detectable is None


def test_the_test_is_named_where_no_residual_tells_its_spread() -> None:
    claim = higher("r0", "r1", kind="less_stable", source="ours")
    plan, records = world(a_table(plain(2), ["c"], claim), {(0, 0): near(50), (1, 0): near(60)}, seeds=6)
    apart = {f"1/0/{seed + 3}": records.pop(f"1/0/{seed}") for seed in range(3)}
    (found,) = evaluate_claims(plan, {**records, **apart})
    assert found.comparisons and found.test.startswith("F test on mIoU over seeds")
    rows = [*plain(2), Row(label="f0", stream="fusion"), Row(label="f1", stream="fusion")]
    values: Values = {(row, 0): near(50 + row) for row in range(4)}
    plan, records = world(a_table(rows, ["c"], higher("f0", "f1")), values)
    (found,) = evaluate_claims(plan, records)  # no record has a fusion stream
    assert "over seeds, differences paired by seed" in found.test


def test_three_of_five_seeds_are_enough() -> None:
    found = verdict(a_table(plain(2), ["c"], higher("r0", "r1")), {(0, 0): near(54), (1, 0): near(50)}, seeds=5)
    assert found.verdict == "holds"


def test_a_missing_cell_keeps_a_claim_open_even_where_another_is_reversed() -> None:
    values: Values = {(0, 0): near(60), (1, 0): near(50), (2, 0): []}
    found = verdict(a_table(LADDER, ["c"], STEPS), values)
    assert found.verdict == "not decided" and [one.outcome for one in found.comparisons] == ["reversed"]
    assert "'r2' at 'c' has 0 of 3 seeds" in found.why and "0 of 1 differences" in found.why


def test_the_correction_is_the_same_before_the_table_is_full() -> None:
    whole: Values = {(0, 0): near(50), (1, 0): near(50.3), (2, 0): near(54)}
    part: Values = {**whole, (2, 0): []}
    found = verdict(a_table(LADDER, ["c"], STEPS), part).comparisons[0]
    alone = stats.ttest_rel(whole[1, 0], whole[0, 0], alternative="greater").pvalue
    assert found.p == pytest.approx(2 * alone)


def test_a_run_without_the_score_counts_as_missing() -> None:
    table = a_table(plain(2), ["c"], higher("r0", "r1"))
    plan, records = world(table, {(0, 0): near(54), (1, 0): near(50)})
    records["0/0/1"] = a_record("0/0/1", None)
    assert "has 2 of 3 seeds" in evaluate_claims(plan, records)[0].why
    records["0/0/1"] = a_record("0/0/1", 54.0)
    assert evaluate_claims(plan, records)[0].verdict == "holds"


def test_another_metric_is_that_of_the_headline() -> None:
    claim = higher("r0", "r1", metric="boundary_iou")
    plan, records = world(a_table(plain(2), ["c"], claim), {(0, 0): near(54), (1, 0): near(50)})
    assert cell_samples(plan, records, "boundary_iou")[0, 0].values == pytest.approx(
        tuple(value / 2 for value in near(54))
    )
    (found,) = evaluate_claims(plan, records)
    assert found.comparisons[0].difference == pytest.approx(2.0) and found.metric == "boundary_iou"
    bare = {name: a_record(name, 100 * (one.miou or 0), None) for name, one in records.items()}
    assert evaluate_claims(plan, bare)[0].verdict == "not decided"


# Kinds


def pairs_of(table: Table, claim: Claim) -> list[tuple[str, str, str]]:
    return [(one.higher, one.lower, one.column) for one in contrasts(table, claim)]


def test_covering_pairs_of_table5() -> None:
    """Nine edges; the sixteen other inclusions follow from them. Controls take no part."""
    assert sorted((low + 1, high + 1) for high, low in inclusion_pairs(TABLE5)) == [
        *[(1, 2), (1, 3), (2, 4), (3, 4), (4, 5), (4, 6), (5, 7), (6, 7), (7, 8)]
    ]
    assert len(contrasts(TABLE5, TABLE5.claims[0])) == 18


def test_covering_leaves_out_equal_parts_and_counts_both_of_equals() -> None:
    rows = [
        Row(label="a"),
        Row(label="b", components=("x",)),
        Row(label="c", components=("x",)),
        Row(label="d", components=("y", "x")),
    ]
    assert inclusion_pairs(a_table(rows, ["c"])) == [(1, 0), (2, 0), (3, 1), (3, 2)]
    none = verdict(a_table(plain(2), ["c"], STEPS), {(0, 0): near(50), (1, 0): near(54)})
    assert none.verdict == "not decided" and none.why == "no row's parts include another row's"


def test_best_and_worst_rows_are_compared_with_the_papers_others() -> None:
    rows = [*plain(3), Row(label="ours", control=True)]
    table = a_table(rows, ["a", "b"])
    assert pairs_of(table, higher("r1", kind="best_row", columns=("b",))) == [("r1", "r0", "b"), ("r1", "r2", "b")]
    assert pairs_of(table, higher("r1", "r2", kind="worst_rows", columns=("a",))) == [
        ("r0", "r1", "a"),
        ("r0", "r2", "a"),
    ]
    assert len(contrasts(table, higher("r1", kind="best_row"))) == 4, "in every column, where none is named"


def test_a_tolerance_forgives_a_small_shortfall_only() -> None:
    best = higher("r0", kind="best_row", tolerance=0.4)
    table = a_table(plain(2), ["c"], best)
    assert verdict(table, {(0, 0): near(50, 0.02), (1, 0): near(50.2, 0.02)}).verdict == "holds"
    assert verdict(table, {(0, 0): near(50, 0.02), (1, 0): near(50.6, 0.02)}).verdict == "fails"
    assert verdict(table, {(0, 0): near(50, 0.5), (1, 0): near(50.2, 0.5)}).verdict == "not decided"
    margin = a_table(plain(2), ["c"], higher("r0", "r1", margin=5))
    found = verdict(margin, {(0, 0): near(52, 0.02), (1, 0): near(50, 0.02)})
    assert found.verdict == "fails" and found.comparisons[0].limit == 5
    assert found.why.endswith("'r0' is 2.0 points above 'r1', 5 asked (c)")


def test_a_gain_shrinks_from_column_to_column() -> None:
    """The gain of r0 over r1: 8, 5 and 2 points, then 8, 2 and 5; paired in each column."""
    claim = higher("r0", "r1", kind="gain_shrinks")
    table = a_table(plain(2), ["a", "b", "c"], claim)
    values: Values = {(0, c): near(50 + gain) for c, gain in enumerate((8, 5, 2))} | {
        (1, c): near(50) for c in range(3)
    }
    found = verdict(table, values)
    assert found.verdict == "holds" and [one.difference for one in found.comparisons] == pytest.approx([3, 3])
    first = found.comparisons[0]
    shares = [np.subtract(values[0, c], values[1, c]).var(ddof=1) / 3 for c in (0, 1)]
    df = sum(shares) ** 2 / sum(share**2 / 2 for share in shares)
    half = stats.t.ppf(0.975, df) * math.sqrt(sum(shares))
    assert first.interval[1] - first.difference == pytest.approx(half)
    assert "what two columns leave is taken as independent" in found.test
    assert (first.higher, first.lower, first.column) == ("a", "b", "r0 over r1") and first.n == (3, 3)
    values = {**values, (0, 1): near(52), (0, 2): near(55)}
    assert verdict(table, values).verdict == "fails"
    reordered = a_table(plain(2), ["a", "b", "c"], higher("r0", "r1", kind="gain_shrinks", columns=("a", "c", "b")))
    assert verdict(reordered, values).verdict == "holds"


# The printed numbers


def test_printed_numbers_of_table5() -> None:
    found = {claim.text: printed_verdict(TABLE5, claim) for claim in TABLE5.claims}
    verdicts = [one for one, _ in found.values()]
    assert verdicts == ["holds", "holds", "holds", "not printed", "not printed", *["not printed"] * 8]
    assert found[TABLE5.claims[0].text][1] == "all 18 printed differences are as claimed"
    assert found[TABLE5.claims[3].text][1] == "the paper prints no boundary IoU"


def test_printed_numbers_are_compared_as_decimals() -> None:
    rows = [
        Row(label="r0", paper=(78.3, 78.5)),
        Row(label="r1", paper=(78.3, "-")),
        Row(label="r2", paper=(77.9, 78.9)),
    ]
    table = a_table(rows, ["a", "b"])
    tie = printed_verdict(table, higher("r0", "r1"))
    assert tie == ("fails", "1 of 1 printed differences are not as claimed: 'r0' against 'r1' (a): +0.0")
    edge = higher("r0", "r2", tolerance=0.4, columns=("b",))
    assert 78.5 - 78.9 + 0.4 < 0, "as floats the edge would be missed"
    assert printed_verdict(table, edge)[0] == "holds"
    assert printed_verdict(table, higher("r0", "r2", tolerance=0.3, columns=("b",)))[0] == "fails"
    assert printed_verdict(table, higher("r1", "r0", columns=("b",)))[0] == "not printed"
    assert printed_verdict(table, higher("r0", "r2", columns=("a",)))[0] == "holds"


def test_printed_gains_of_table1_shrink() -> None:
    """28.0, 16.5, 10.7, 6.8, 6.7 points, as differences of the printed rows."""
    base, ours = (50.7, 59.1, 65.0, 70.6, 74.1), (78.7, 75.6, 75.7, 77.4, 80.8)
    rows = [Row(label="r0", paper=ours), Row(label="r1", paper=base)]
    table = a_table(rows, list("abcde"))
    assert printed_verdict(table, higher("r0", "r1", kind="gain_shrinks"))[0] == "holds"
    assert printed_verdict(table, higher("r0", "r1", kind="gain_shrinks", columns=("e", "d")))[0] == "fails"


# Rank agreement


def test_claims_of_table5_over_made_up_records() -> None:
    """The printed means as if measured with three seeds, 0.05 apart: it is shown; at 92 later rows win."""
    values: Values = {
        (i, c): near(60.0 + i if number == "-" else float(number), 0.05)
        for i, row in enumerate(TABLE5.rows)
        for c, number in enumerate(row.paper or (70 + i / 100, 70 - i / 100))
    }
    found = evaluate_claims(*world(TABLE5, values))
    assert [one.text for one in found] == [claim.text for claim in TABLE5.claims]
    assert all(c.printed == round(Decimal(c.difference), 1) for one in found[:3] for c in one.comparisons)
    assert {c.printed for one in found[3:] for c in one.comparisons} == {None}, "boundaries and controls"
    (mixe,) = [c for c in found[1].comparisons if (c.lower, c.column) == ("ViLa", "1/8 (183)")]
    assert mixe.printed == Decimal("4.8")
    kinds = {one.text: (one.verdict, one.why) for one in found}
    assert kinds[TABLE5.claims[0].text] == ("holds", "18 of 18 shown, 0 reversed, 0 open")
    assert kinds[TABLE5.claims[1].text][0] == "holds" and kinds[TABLE5.claims[2].text][0] == "holds"
    assert {one.verdict for one in found if one.source == "ours"} == {"holds"}
    for one in found:
        assert one.detectable is not None and 0 < one.detectable < 2 and "Holm's correction" in one.test


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_a_scale_bounds_what_its_claims_ask(kind: str) -> None:
    """Comparisons on rows and columns that it leaves out take no part in the correction; those named by hand do."""
    columns, ranks = ("x", "y") if kind == "columns" else ("x",), Claim(text="best", kind="best_row", rows=("r0",))
    size = Scale(rows=("r0", "r1")) if kind == "rows" else Scale(columns=("x",))
    table = a_table(plain(3), list(columns), ranks, higher("r0", "r2"))
    table = table.model_copy(update={"scale": {"s": size, "other": Scale()}})
    rows = (0, 1) if kind == "rows" else (0, 1, 2)
    values: Values = {(row, 0): near(70 - row) for row in rows}
    found = evaluate_claims(*world(table, values))
    assert [one.verdict for one in found] == ["holds"] * (1 if kind == "rows" else 2)
    assert found[0].why.endswith("0 open; other rows and columns are not run at scale s")
    count = 1 if kind == "rows" else 2
    assert f"Holm's correction for {count} comparison" in found[0].test
    last = comparisons.tally(found, len(table.claims))[-1]
    assert (last == "1 claim asks only about rows or columns that are not run at this scale.") is (kind == "rows")
    more = {(2, 0): near(60)} if kind == "rows" else {(row, 1): near(70 - row) for row in rows}
    whole = evaluate_claims(*world(table, values | more))
    assert len(whole) == 2 and "are not run" not in whole[0].why
    assert f"Holm's correction for {2 * len(columns)} comparisons" in whole[0].test
    by_hand = evaluate_claims(*world(table, {place: one for place, one in values.items() if place[0] != 1}))
    assert "'r1' at 'x' was not asked for" in by_hand[0].why, "--rows leaves out what the scale runs"


def test_contrasts_between_what_a_scale_runs() -> None:
    """A row or column between two others that is not run is passed over, since the rest does not follow from it."""
    parts = [Row(label=label, components=tuple(label)) for label in ("a", "ab", "abc")]
    adds = Claim(text="adds", kind="superset_increases")
    table = a_table(parts, ["x", "y", "z"], adds)
    found = contrasts(table, adds, (0, 2), (0,))
    assert [(one.higher, one.lower, one.column) for one in found] == [("abc", "a", "x")]
    shrinks = higher("ab", "a", kind="gain_shrinks")
    assert [(one.higher, one.lower) for one in contrasts(table, shrinks, (0, 1), (0, 2))] == [("x", "z")]
    spreads = higher("ab", "a", kind="less_stable")
    (one,) = contrasts(table, spreads, (0, 1), (1, 2))
    assert one.column == "2 columns together" and {term.column for term in one.terms} == {1, 2}
    assert contrasts(table, spreads, (0, 1), ()) == [] == contrasts(table, higher("abc", "a"), (0, 1), (0,))


def test_a_claim_on_a_row_that_a_scale_leaves_out_is_not_made_there() -> None:
    rows = [Row(label="a"), Row(label="b"), Row(label="c", scales=("other",))]
    table = a_table(rows, ["x"], higher("a", "b"), higher("a", "c"))
    values: Values = {(0, 0): near(70), (1, 0): near(60)}
    assert [one.text for one in evaluate_claims(*world(table, values))] == [table.claims[0].text]
    named = evaluate_claims(*world(table, values | {(2, 0): near(50)}))  # rows may be named at any scale
    assert [one.verdict for one in named] == ["holds", "holds"]
    rows[2] = Row(label="c", scales=("s",))
    table = a_table(rows, ["x"], higher("a", "b"), higher("a", "c"))
    assert len(evaluate_claims(*world(table, values))) == 2, "left out by hand: it says what is missing"


@pytest.mark.parametrize("begun", ["column", "row"])
def test_the_first_seeds_change_no_verdict_of_finished_cells(begun: str) -> None:
    """Those of another column, or of another row of the same one; two seeds make a pair's variance, and no verdict."""
    table = a_table(plain(6), ["x", "y"], *(higher(f"r{i}", "r0") for i in range(1, 6)))
    drawn = np.random.default_rng(5).normal(0, 0.3, (5, 3))
    values: Values = {(row, 0): (60 + row + drawn[row]).tolist() for row in range(5)}
    first: Values = {(row, 1): [50.0 + 3 * row, 50.0 - 9 * row] for row in range(5)}
    first = first if begun == "column" else {(5, 0): [65.0, 66.0]}
    found = [
        [c for one in evaluate_claims(*world(table, given)) for c in one.comparisons if c.column == "x"]
        for given in (values | {place: [] for place in first}, values | first)
    ]
    assert found[0] == found[1] and len(found[0]) == 4


def test_verdicts_load_no_torch() -> None:
    code = "import sys, viladiff.tables.claims; print('torch' in sys.modules, 'scipy' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "False False\n"


# Precision


def in_precision(records: dict[str, RunRecord], which: Callable[[int, int, int], bool]) -> dict[str, RunRecord]:
    """Some of the records as if they had been trained in bf16."""
    changed = {}
    for name, one in records.items():
        row, column, seed = map(int, name.split("/"))
        bf16 = {"config": {**one.config, "train.precision": "bf16"}}
        changed[name] = one.model_copy(update=bf16) if which(row, column, seed) else one
    return changed


def test_a_cell_of_two_precisions_is_refused() -> None:
    plan, records = world(a_table(plain(2), ["a"]), {(0, 0): [40.0, 41.0, 42.0], (1, 0): [43.0, 44.0, 45.0]})
    assert cell_samples(plan, records)[0, 0].precision == "fp32"
    mixed = in_precision(records, lambda row, column, seed: (row, seed) == (1, 2))
    with pytest.raises(ValueError, match="'r1' at 'a': runs of different precision are not averaged, got bf16; fp32"):
        cell_samples(plan, mixed)


def test_variances_are_pooled_within_one_precision() -> None:
    """A test within fp32 knows its rows alone, and one across both has differences of its own."""
    near, far = [[40.0, 41.0, 42.0], [42.0, 41.0, 40.0]], [[50.0, 52.0, 54.0], [54.0, 52.0, 50.0]]
    values = {(0, 0): near[0], (1, 0): near[1], (2, 0): far[0], (3, 0): far[1]}
    claims = [Claim(text=f"{a} > r0", kind="higher", source="ours", rows=(a, "r0")) for a in ("r1", "r2")]
    plan, records = world(a_table(plain(4), ["a"], *claims), values)
    split = in_precision(records, lambda row, column, seed: row >= 2)
    with pytest.raises(ValueError, match="different precision have no variance in common, got bf16; fp32"):
        pooled_variance(cell_samples(plan, split).values())
    within, across = evaluate_claims(plan, split)
    assert "precisions" not in within.test
    assert "precisions are compared with a standard deviation of their own" in across.test
    found = t_test((Term(2, 0, 1), Term(0, 0, -1)), 0.0, cell_samples(plan, split), {})
    assert found.error == pytest.approx(1 / math.sqrt(3)) and found.df == pytest.approx(2)


def test_spreads_of_cells_of_two_precisions_are_not_compared() -> None:
    claim = Claim(text="r0 is less stable", kind="less_stable", source="ours", rows=("r0", "r1"))
    one, other = [40.0, 41.0, 42.0], [50.0, 52.0, 54.0]
    values = {(0, 0): other, (0, 1): other, (1, 0): one, (1, 1): one}
    plan, records = world(a_table(plain(2), ["a", "b"], claim), values)
    (verdict,) = evaluate_claims(plan, in_precision(records, lambda row, column, seed: (row, column) == (0, 1)))
    assert verdict.verdict == "not decided"
    assert "'r0' has cells of different precision (bf16; fp32), whose spreads are not pooled" in verdict.why
