"""Whether a sentence about a table holds, and how sure that is: tests over seeds, corrected for how many there are.

A claim becomes questions, each a sum of cell means with signs that is said to be above 0 (one cell against another; for
a shrinking gain, a difference against a difference). All numbers here are in points, percent of mIoU and the like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from viladiff.study.samples import (
    LEVEL,
    Pool,
    Records,
    Sample,
    Samples,
    Term,
    Tested,
    holm,
    pooled,
    samples,
    smallest_detectable,
    t_test,
)
from viladiff.study.spec import METRIC_NAMES, Claim, Metric, Table

if TYPE_CHECKING:
    from viladiff.study.plan import Plan

FEWEST_SEEDS = 3

Outcome = Literal["shown", "reversed", "open"]


@dataclass(frozen=True)
class Comparison:
    """One measured difference; positive is the claimed direction."""

    higher: str
    """Label of the row that is claimed to be higher; for a shrinking gain, the column whose gain is."""
    lower: str
    column: str
    """Label of the column; for a shrinking gain, which row is compared with which."""
    difference: float
    """Points."""
    interval: tuple[float, float]
    """95 % confidence interval of the difference, not corrected for the number of comparisons."""
    p: float
    """One-sided, in the claimed direction, corrected."""
    n: tuple[int, int]
    """Seeds on either side; of a gain, the fewer."""
    p_reversed: float
    """Likewise in the other direction."""
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """What records say of a claim, and what the paper's own numbers say."""

    text: str
    verdict: Literal["holds", "fails", "not decided"]
    why: str
    test: str
    comparisons: tuple[Comparison, ...]
    """Those with enough seeds."""
    detectable: float | None
    """Points of the least difference that the hardest comparison finds with a chance of 80 %; None if none was made."""
    source: Literal["paper", "ours"]
    metric: Metric
    printed: Literal["holds", "fails", "not printed"]
    """Whether the printed numbers bear the claim out, compared as decimals."""
    printed_why: str


class Question(NamedTuple):
    """Whether the sum of the terms is above minus the tolerance."""

    higher: str
    lower: str
    column: str
    terms: tuple[Term, ...]
    tolerance: float


# Questions


def questions(table: Table, claim: Claim) -> list[Question]:
    """What a claim asks, in the table's order.

    superset_increases: each row without ``control`` is higher than those whose parts it includes, in every column; only
    pairs with no row between them are asked, since the rest follows. best_row: the row is higher than every other row
    of the paper's. worst_rows: every other row is higher than each of these. higher: the first row is higher than the
    second. gain_shrinks: the first row's gain over the second is greater in each column than in the next one.
    """
    rows = {row.label: i for i, row in enumerate(table.rows)}
    columns = {column.label: i for i, column in enumerate(table.columns)}
    across = [columns[label] for label in claim.columns or columns]
    named = [rows[label] for label in claim.rows]
    if claim.kind == "gain_shrinks":
        return [_shrinks(table, named, left, right, claim.tolerance) for left, right in pairwise(across)]
    papers = [i for i, row in enumerate(table.rows) if not row.control]
    pairs: dict[str, Callable[[], list[tuple[int, int]]]] = {
        "superset_increases": lambda: covering(table),
        "best_row": lambda: [(named[0], i) for i in papers if i != named[0]],
        "worst_rows": lambda: [(i, worst) for worst in named for i in papers if i not in named],
        "higher": lambda: [(named[0], named[1])],
    }
    return [
        Question(
            table.rows[high].label,
            table.rows[low].label,
            table.columns[column].label,
            (Term(high, column, 1), Term(low, column, -1)),
            claim.tolerance,
        )
        for high, low in pairs[claim.kind]()
        for column in across
    ]


def covering(table: Table) -> list[tuple[int, int]]:
    """(row, row) where the first's parts include the second's and no row stands between; controls stay out."""
    parts = {i: frozenset(row.parts) for i, row in enumerate(table.rows) if not row.control}
    return [
        (high, low)
        for high in parts
        for low in parts
        if parts[low] < parts[high] and not any(parts[low] < between < parts[high] for between in parts.values())
    ]


def _shrinks(table: Table, rows: Sequence[int], left: int, right: int, tolerance: float) -> Question:
    one, other = rows
    terms = (Term(one, left, 1), Term(other, left, -1), Term(one, right, -1), Term(other, right, 1))
    what = f"{table.rows[one].label} over {table.rows[other].label}"
    return Question(table.columns[left].label, table.columns[right].label, what, terms, tolerance)


# Verdicts


def judge(plan: Plan, records: Records) -> list[Verdict]:
    """A verdict for each claim of the table, in its order.

    Holm's correction runs over the distinct comparisons that all claims of one source ask for, the paper's and ours
    apart; those that cannot be made yet count too, so that the correction is the same from the first run to the last.
    """
    verdicts: dict[str, Verdict] = {}
    for source in ("paper", "ours"):
        claims = [claim for claim in plan.table.claims if claim.source == source]
        verdicts |= dict(zip([claim.text for claim in claims], _judge(plan, records, claims), strict=True))
    return [verdicts[claim.text] for claim in plan.table.claims]


class _Key(NamedTuple):
    """Two claims that ask the same count once."""

    metric: Metric
    terms: frozenset[Term]
    tolerance: float


def _key(claim: Claim, question: Question) -> _Key:
    return _Key(claim.metric, frozenset(question.terms), question.tolerance)


def _judge(plan: Plan, records: Records, claims: Sequence[Claim]) -> list[Verdict]:
    asked = {claim.text: questions(plan.table, claim) for claim in claims}
    measured = {claim.metric: samples(plan, records, claim.metric) for claim in claims}
    pools = {metric: pooled(found) for metric, found in measured.items()}
    family = {_key(claim, question): question for claim in claims for question in asked[claim.text]}
    results: dict[_Key, Tested | None] = {}
    for key, question in family.items():
        pool = pools[key.metric]
        enough = not any(_lacking(plan, question, measured[key.metric]))
        results[key] = (
            t_test(question.terms, question.tolerance, measured[key.metric], pool)
            if enough and pool is not None
            else None
        )
    forward = holm([1.0 if found is None else found.p for found in results.values()])
    backward = holm([1.0 if found is None else found.p_reversed for found in results.values()])
    corrected = dict(zip(results, zip(forward, backward, strict=True), strict=True))
    verdicts = []
    for claim in claims:
        found, pool = measured[claim.metric], pools[claim.metric]
        made = [
            (question, result, *corrected[_key(claim, question)])
            for question in asked[claim.text]
            if (result := results[_key(claim, question)]) is not None
        ]
        comparisons = tuple(_comparison(*one, found, pool) for one in made if pool is not None)
        hardest = max((result.error for _, result, _, _ in made), default=None)
        least = None if hardest is None or pool is None else smallest_detectable(hardest, pool.df, len(family))
        verdict, why = _verdict(plan, asked[claim.text], comparisons, found)
        printed, printed_why = printed_verdict(plan.table, claim)
        test = _said(pool, len(family), claim)
        verdicts.append(
            Verdict(
                claim.text, verdict, why, test, comparisons, least, claim.source, claim.metric, printed, printed_why
            )
        )
    return verdicts


def _comparison(
    question: Question, result: Tested, p: float, p_reversed: float, measured: Samples, pool: Pool
) -> Comparison:
    from scipy import stats

    half = float(stats.t.isf(0.025, pool.df)) * result.error
    n = tuple(
        min(len(measured[row, column].values) for row, column, _ in terms)
        for terms in (question.terms[: len(question.terms) // 2], question.terms[len(question.terms) // 2 :])
    )
    outcome: Outcome = "shown" if p < LEVEL else "reversed" if p_reversed < LEVEL else "open"
    interval = (result.difference - half, result.difference + half)
    return Comparison(
        question.higher,
        question.lower,
        question.column,
        result.difference,
        interval,
        p,
        (n[0], n[1]),
        p_reversed,
        outcome,
    )


def _verdict(
    plan: Plan, asked: Sequence[Question], made: Sequence[Comparison], measured: Samples
) -> tuple[Literal["holds", "fails", "not decided"], str]:
    if not asked:
        return "not decided", "no row's parts include another row's"
    counts = {outcome: sum(one.outcome == outcome for one in made) for outcome in ("shown", "reversed", "open")}
    said = f"{counts['shown']} of {len(asked)} shown, {counts['reversed']} reversed, {counts['open']} open"
    lacking = list(dict.fromkeys(reason for question in asked for reason in _lacking(plan, question, measured)))
    if lacking:
        more = len(lacking) - 1
        rest = f" (likewise {more} more cell{'s' if more > 1 else ''})" if more else ""
        return "not decided", f"{lacking[0]}{rest}; {_as_measured(asked, measured)}"
    if counts["shown"] == len(asked):
        return "holds", said
    if counts["reversed"]:
        return "fails", f"{said}: {_worst([one for one in made if one.outcome == 'reversed'])}"
    return "not decided", said


def _worst(reversed_: Sequence[Comparison]) -> str:
    one = min(reversed_, key=lambda one: one.difference)
    return f"{one.higher!r} is {-one.difference:.1f} points below {one.lower!r} ({one.column})"


def _lacking(plan: Plan, question: Question, measured: Samples) -> Iterator[str]:
    """Why a question cannot be answered: cells that have fewer than three seeds."""
    for row, column, _ in question.terms:
        have, planned = len(measured.get((row, column), Sample((), ())).values), len(plan.run_ids(row, column))
        where = f"{plan.table.rows[row].label!r} at {plan.table.columns[column].label!r}"
        if not planned:
            yield f"{where} was not asked for"
        elif have < FEWEST_SEEDS:
            yield f"{where} has {have} of {max(planned, FEWEST_SEEDS)} seeds, and {FEWEST_SEEDS} are needed"


def _as_measured(asked: Sequence[Question], measured: Samples) -> str:
    """How many differences point the claimed way, for a table too small to decide."""
    sums = []
    for question in asked:
        cells = [(measured.get((row, column)), sign) for row, column, sign in question.terms]
        if all(one is not None and one.values for one, _ in cells):
            sums.append(sum(sign * sum(one.values) / len(one.values) for one, sign in cells if one is not None))
    if not sums:
        return "nothing to compare has been measured yet"
    claimed = sum(total + asked[0].tolerance > 0 for total in sums)
    return f"{claimed} of {len(sums)} differences measured so far point the claimed way"


def _said(pool: Pool | None, comparisons: int, claim: Claim) -> str:
    if pool is None:
        return "none: no cell has two seeds"
    whose = "the paper's claims" if claim.source == "paper" else "our own claims"
    count = "1 comparison" if comparisons == 1 else f"{comparisons} comparisons"
    beyond = f", with a tolerance of {claim.tolerance:g}," if claim.tolerance else ""
    return (
        f"one-sided t tests at 5 % in each direction{beyond} on {METRIC_NAMES[claim.metric]} over seeds, one standard "
        f"deviation, {pool.sd:.2f} points, pooled within {pool.cells} cells ({pool.df} degrees of freedom; that cells "
        f"share seeds is not used), Holm's correction for {count} of {whose}"
    )


# The printed numbers


def printed_verdict(table: Table, claim: Claim) -> tuple[Literal["holds", "fails", "not printed"], str]:
    """What the paper's own numbers say of a claim, compared as decimals; a number left out is passed over.

    Without a tolerance an equal number is not higher; with one, a number at its edge still counts.
    """
    if claim.metric != table.metric:
        return "not printed", f"the paper prints no {METRIC_NAMES[claim.metric]}"
    wrong, count = [], 0
    for question in questions(table, claim):
        printed = [_printed(table, term) for term in question.terms]
        numbers = [number for number in printed if number is not None]
        if len(numbers) < len(printed):
            continue
        count += 1
        total = sum((term.sign * number for term, number in zip(question.terms, numbers, strict=True)), Decimal(0))
        tolerance = Decimal(str(question.tolerance))
        if not (total > 0 or (tolerance and total + tolerance >= 0)):
            wrong.append(f"{question.higher!r} against {question.lower!r} ({question.column}): {total:+}")
    if not count:
        return "not printed", "the paper prints none of these numbers"
    if wrong:
        return "fails", f"{len(wrong)} of {count} printed differences are not as claimed: {'; '.join(wrong)}"
    return "holds", f"all {count} printed differences are as claimed"


def _printed(table: Table, term: Term) -> Decimal | None:
    numbers = table.rows[term.row].paper
    value = numbers[term.column] if numbers else "-"
    return None if value == "-" else Decimal(str(value))
