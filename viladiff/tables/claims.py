"""Evaluation of a table's claims: tests over seeds, corrected for their number.

A claim becomes contrasts (``viladiff.tables.contrasts``), most of them a signed sum of cell means that is claimed to be
above 0. Numbers here are in points, percent of mIoU and the like, but where two spreads are compared, by their ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from viladiff.evaluation.metrics import METRICS
from viladiff.tables.contrasts import Contrast, Form, Term, printed_difference, printed_verdict
from viladiff.tables.paired import VarianceModel, contrast_parts, t_test, untestable, variance_model
from viladiff.tables.significance import (
    FEWEST_SEEDS,
    LEVEL,
    CellSample,
    Records,
    Samples,
    cell_samples,
    f_test,
    holm,
    smallest_detectable,
    smallest_ratio,
)
from viladiff.tables.spec import ORACLE, Claim, MetricName

if TYPE_CHECKING:
    from viladiff.tables.plan import Plan

Outcome = Literal["shown", "reversed", "open"]
Decision = Literal["holds", "fails", "not decided"]


@dataclass(frozen=True)
class Comparison:
    """One measured difference; positive is the claimed direction."""

    higher: str
    """``Question.higher``, and so on."""
    lower: str
    column: str
    difference: float
    """Points; of two spreads, their ratio."""
    interval: tuple[float, float]
    """95 % confidence interval of the difference, not corrected for the number of comparisons."""
    p: float
    """In the claimed direction, corrected; where no direction is claimed, two-sided."""
    n: tuple[int, int]
    """Seeds on either side; of a gain, the fewer. What is compared is paired by seed."""
    p_reversed: float
    """Likewise in the other direction."""
    outcome: Outcome
    least: float = 0.0
    """The smallest true difference, or ratio, that this comparison finds with a chance of 80 %."""
    form: Form = "one_sided"
    printed: Decimal | None = None
    """The paper's difference, where it prints these numbers."""
    limit: float = 0.0
    """``Contrast.limit``: what the difference is tested against."""


class ColumnVerdict(NamedTuple):
    """The verdict on a claim in one of its columns, of the same comparisons and corrections."""

    column: str
    verdict: Decision
    why: str
    least: float
    """``Verdict.detectable`` of the column."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim, by records and by the paper's own numbers."""

    text: str
    verdict: Decision
    why: str
    test: str
    comparisons: tuple[Comparison, ...]
    """Those with enough seeds."""
    detectable: float | None
    """``least`` of the hardest comparison; None if none was made."""
    source: Literal["paper", "ours"]
    metric: MetricName
    printed: Literal["holds", "fails", "not printed"]
    """Whether the printed numbers bear the claim out, compared as decimals."""
    printed_why: str
    by_column: tuple[ColumnVerdict, ...] = ()
    """Of a claim about several columns: those in which every cell has enough seeds."""


# Verdicts


def evaluate_claims(plan: Plan, records: Records) -> list[Verdict]:
    """Return a verdict for each claim of the table, in order.

    Holm's correction runs over the distinct comparisons of all claims from one source, the paper's and ours separately;
    comparisons that cannot be made yet count too, so that the correction is the same from the first run to the last;
    those on rows and columns that the scale leaves out do not (``Plan.contrasts``).
    """
    metrics = dict.fromkeys(claim.metric for claim in plan.claims)
    measured = {metric: cell_samples(plan, records, metric) for metric in metrics}
    known = {metric: table_variances(plan, found) for metric, found in measured.items()}
    verdicts: dict[str, Verdict] = {}
    for source in ("paper", "ours"):
        claims = [claim for claim in plan.claims if claim.source == source]
        verdicts |= dict(zip([claim.text for claim in claims], _judge(plan, claims, measured, known), strict=True))
    return [verdicts[claim.text] for claim in plan.claims]


def table_variances(plan: Plan, measured: Samples) -> VarianceModel:
    """Return the model of variances of a metric's paired differences: of all comparisons that any claim asks for.

    Ceilings are left out, since their spread may be small. A table without claims compares its rows with the first.
    """
    asked = [one.terms for claim in plan.claims for one in plan.contrasts(claim) if one.form != "spread"]
    if not asked:
        first, *others = plan.rows
        asked = [(Term(row, column, 1), Term(first, column, -1)) for row in others for column in plan.columns]
    return variance_model([terms for terms in asked if not any(t.row in plan.ceilings for t in terms)], measured)


class _Key(NamedTuple):
    """Two claims that ask the same count once."""

    metric: MetricName
    terms: tuple[Term, ...]
    limit: float
    form: Form


class _Answer(NamedTuple):
    """A comparison before it is corrected."""

    difference: float
    interval: tuple[float, float]
    p: float
    p_reversed: float
    least: float


def _key(claim: Claim, question: Contrast) -> _Key:
    return _Key(claim.metric, tuple(sorted(question.terms)), question.limit, question.form)


def _judge(
    plan: Plan,
    claims: Sequence[Claim],
    samples: Mapping[MetricName, Samples],
    known: Mapping[MetricName, VarianceModel],
) -> list[Verdict]:
    asked = {claim.text: plan.contrasts(claim) for claim in claims}
    family = {_key(claim, question): question for claim in claims for question in asked[claim.text]}
    answers: dict[_Key, _Answer | None] = {}
    for key, question in family.items():
        found = samples[key.metric]
        enough = not any(_lacking(plan, question, found))
        answers[key] = _answer(question, found, known[key.metric], len(family)) if enough else None
    forward = holm([1.0 if found is None else found.p for found in answers.values()])
    backward = holm([1.0 if found is None else found.p_reversed for found in answers.values()])
    corrected = dict(zip(answers, zip(forward, backward, strict=True), strict=True))
    verdicts = []
    for claim in claims:
        found = samples[claim.metric]
        made = tuple(
            replace(
                _comparison(question, answer, *corrected[key], found),
                printed=printed_difference(plan.table, question) if claim.metric == plan.table.metric else None,
            )
            for question in asked[claim.text]
            if (answer := answers[key := _key(claim, question)]) is not None
        )
        verdict, why = _verdict(plan, claim, asked[claim.text], made, found)
        printed, printed_why = printed_verdict(plan.table, claim)
        judge = partial(_verdict, plan, claim, measured=found)
        verdicts.append(
            Verdict(
                claim.text,
                verdict,
                why + plan.left_out(claim),
                _said(plan, known[claim.metric], asked[claim.text], found, len(family), claim),
                made,
                _hardest(made),
                claim.source,
                claim.metric,
                printed,
                printed_why,
                tuple(_by_column(asked[claim.text], made, judge)),
            )
        )
    return verdicts


def _hardest(made: Sequence[Comparison]) -> float | None:
    return max((one.least for one in made), default=None)


def _by_column(
    asked: Sequence[Contrast],
    made: Sequence[Comparison],
    judge: Callable[[Sequence[Contrast], Sequence[Comparison]], tuple[Decision, str]],
) -> Iterator[ColumnVerdict]:
    """Yield the verdicts of complete columns. Questions across columns have one label of a column, and so none."""
    columns = list(dict.fromkeys(question.column for question in asked))
    for column in columns if len(columns) > 1 else ():
        here = [one for one in asked if one.column == column]
        found = [one for one in made if one.column == column]
        if (least := _hardest(found)) is not None and len(found) == len(here):
            yield ColumnVerdict(column, *judge(here, found), least)


def _answer(question: Contrast, measured: Samples, known: VarianceModel, family: int) -> _Answer:
    """Answer a question; ``family``: the number of all comparisons."""
    if question.form == "spread":
        above, below = ([measured[t.row, t.column] for t in question.terms if t.sign == sign] for sign in (1, -1))
        found = f_test(above, below)
        return _Answer(found.ratio, found.interval, found.p, found.p_reversed, smallest_ratio(found.df, family))
    result = t_test(question.terms, -question.limit, measured, known)
    sides = 2 if question.form == "two_sided" else 1
    least = smallest_detectable(result.error, result.df, sides * family)
    p, p_reversed = result.p, result.p_reversed
    if question.form == "two_sided":
        p = p_reversed = min(1.0, 2 * min(p, p_reversed))
    return _Answer(result.difference, result.interval(), p, p_reversed, least)


def _comparison(question: Contrast, answer: _Answer, p: float, p_reversed: float, measured: Samples) -> Comparison:
    n = tuple(
        min(len(measured[row, column].values) for row, column, _ in terms)
        for terms in (question.terms[: len(question.terms) // 2], question.terms[len(question.terms) // 2 :])
    )
    outcome: Outcome = "shown" if p < LEVEL else "reversed" if p_reversed < LEVEL else "open"
    if question.form == "two_sided" and outcome != "open":
        outcome = "shown" if answer.difference > 0 else "reversed"
    labels = (question.higher, question.lower, question.column)
    return Comparison(
        *labels,
        answer.difference,
        answer.interval,
        p,
        (n[0], n[1]),
        p_reversed,
        outcome,
        answer.least,
        question.form,
        limit=question.limit,
    )


def _verdict(
    plan: Plan,
    claim: Claim,
    asked: Sequence[Contrast],
    made: Sequence[Comparison],
    measured: Samples,
) -> tuple[Decision, str]:
    if not asked:
        return "not decided", "no row's parts include another row's"
    counts = {outcome: sum(one.outcome == outcome for one in made) for outcome in ("shown", "reversed", "open")}
    lacking = list(dict.fromkeys(reason for question in asked for reason in _lacking(plan, question, measured)))
    more = len(lacking) - 1
    rest = f" (likewise {more} more cell{'s' if more > 1 else ''})" if more > 0 else ""
    if claim.kind == "differs":
        return _differs(counts, len(asked), f"; {lacking[0]}{rest}" if lacking else "")
    said = f"{counts['shown']} of {len(asked)} shown, {counts['reversed']} reversed, {counts['open']} open"
    if lacking:
        return "not decided", f"{lacking[0]}{rest}; {_as_measured(plan, asked, measured)}"
    if counts["shown"] == len(asked):
        return "holds", said
    if counts["reversed"]:
        return "fails", f"{said}: {_worst([one for one in made if one.outcome == 'reversed'])}"
    return "not decided", said


def _differs(counts: Mapping[str, int], asked: int, lacking: str) -> tuple[Literal["holds", "not decided"], str]:
    """Return the verdict on difference: one is enough; its absence cannot be shown, only bounded."""
    higher, lower = counts["shown"], counts["reversed"]
    said = f"{higher + lower} of {asked} differ: {higher} higher, {lower} lower; {counts['open']} open{lacking}"
    return ("holds" if higher + lower else "not decided"), said


def _worst(reversed_: Sequence[Comparison]) -> str:
    one = min(reversed_, key=lambda one: one.difference)
    if one.form == "spread":
        return f"{one.higher!r} spreads {one.difference:.2f} times as much as {one.lower!r} ({one.column})"
    if one.difference > 0:
        return f"{one.higher!r} is {one.difference:.1f} points above {one.lower!r}, {one.limit:g} asked ({one.column})"
    return f"{one.higher!r} is {-one.difference:.1f} points below {one.lower!r} ({one.column})"


def _lacking(plan: Plan, question: Contrast, measured: Samples) -> Iterator[str]:
    """Yield why a question cannot be answered: cells with fewer than three seeds, own or common; two precisions."""
    few = any(_ceiling(plan, term.row) for term in question.terms)
    for label in dict.fromkeys(plan.table.rows[t.row].label for t in question.terms if _ceiling(plan, t.row)):
        yield f"{label!r} reads true masks of unlabelled images here ({ORACLE}): a ceiling is no result of a method"
    for row, column, _ in question.terms:
        have, planned = len(measured.get((row, column), CellSample((), (), ())).values), len(plan.run_ids(row, column))
        few = few or have < FEWEST_SEEDS
        where = f"{plan.table.rows[row].label!r} at {plan.table.columns[column].label!r}"
        if not planned:
            yield f"{where} was not asked for"
        elif have < FEWEST_SEEDS:
            yield f"{where} has {have} of {max(planned, FEWEST_SEEDS)} seeds, and {FEWEST_SEEDS} are needed"
    if question.form != "spread":
        why = "" if few else untestable(contrast_parts(question.terms, measured), FEWEST_SEEDS)
        if why:
            yield f"{question.higher!r} and {question.lower!r} ({question.column}): {why}"
    else:
        for sign in (1, -1):
            side = [measured.get((t.row, t.column)) for t in question.terms if t.sign == sign]
            found = sorted({one.precision for one in side if one and one.values})
            if len(found) > 1:
                label = question.higher if sign > 0 else question.lower
                yield f"{label!r} has cells of different precision ({'; '.join(found)}), whose spreads are not pooled"


def _ceiling(plan: Plan, row: int) -> bool:
    """Return whether a row reads true masks, and not by its spec, which may ask about its own ceilings."""
    return row in plan.ceilings and not plan.table.rows[row].oracle


def _as_measured(plan: Plan, asked: Sequence[Contrast], measured: Samples) -> str:
    """Describe how many differences have the claimed sign over common seeds, for a table too small to decide."""
    counted = [one for one in asked if one.form != "spread" and not any(_ceiling(plan, t.row) for t in one.terms)]
    if not counted:
        return "no difference is counted before that"
    sums = []
    for question in counted:
        cells = [(measured.get((row, column)), sign) for row, column, sign in question.terms]
        there = [(one.by_seed, sign) for one, sign in cells if one is not None]
        seeds = set.intersection(*(set(values) for values, _ in there)) if len(there) == len(cells) else set()
        if seeds:
            sums.append(sum(sign * values[seed] for values, sign in there for seed in seeds) / len(seeds))
    if not sums:
        return "nothing to compare has been measured yet"
    claimed = sum(total > asked[0].limit for total in sums)
    return f"{claimed} of {len(sums)} differences measured so far point the claimed way"


def _said(
    plan: Plan, known: VarianceModel, asked: Sequence[Contrast], measured: Samples, comparisons: int, claim: Claim
) -> str:
    whose = "the paper's claims" if claim.source == "paper" else "our own claims"
    count = "1 comparison" if comparisons == 1 else f"{comparisons} comparisons"
    corrected = f"Holm's correction for {count} of {whose}"
    on = f"on {METRICS[claim.metric].name} over seeds"
    if claim.kind == "less_stable":
        return f"F test {on}, of variances pooled within the cells of either side, at 5 %; {corrected}"
    sides = "two-sided t tests at 5 %" if claim.kind == "differs" else "one-sided t tests at 5 % in each direction"
    beyond = f", with a tolerance of {claim.tolerance:g}," if claim.tolerance else ""
    beyond = f", beyond a margin of {claim.margin:g}," if claim.margin else beyond
    return f"{sides}{beyond} {on}, {'; '.join(_spreads(plan, known, asked, measured))}; {corrected}"


def _spreads(plan: Plan, known: VarianceModel, asked: Sequence[Contrast], measured: Samples) -> Iterator[str]:
    """Yield what is paired, and the standard deviations of a claim's tests."""
    places = dict.fromkeys(term[:2] for one in asked for term in one.terms if term[:2] in measured)
    cells = {place: measured[place] for place in places if measured[place].values}
    groups = {(column, one.pool) for (_, column), one in cells.items()}
    pools, columns = {pool for _, pool in groups}, {column for column, _ in groups}
    yield "differences paired by seed"
    several = len({precision for _, precision in pools}) > 1
    for (column, (read, precision)), prior in known.items():
        if (column, (read, precision)) in groups:
            of = f" of the {' '.join(filter(None, reversed(read.split('/'))))}" if read else ""
            of += f" in {precision}" if several else ""
            of += f" at {plan.table.columns[column].label}" if len(columns) > 1 else ""
            common = f"{prior.sd:.2f} points, that of {prior.pairs} pairs of rows"
            if math.isinf(prior.df):
                yield f"their standard deviation{of} is {common}, which differ in it by chance alone"
            else:
                yield (
                    f"a standard deviation{of} below {common}, is drawn up towards it, which counts for {prior.df:.1f} "
                    "degrees of freedom; one above is the pair's own"
                )
    if own := groups - known.keys():
        at = ", ".join(plan.table.columns[column].label for column in sorted({column for column, _ in own}))
        yield f"each pair's standard deviation{f' at {at}' if len(columns) > 1 else ''} is its own"
    if any(len({term.column for term in question.terms}) > 1 for question in asked):
        yield "seeds are paired within each column, and what two columns leave is taken as independent"
    if len(pools) > 1:
        yield "two streams, networks or precisions are compared with a standard deviation of their own"
    wild = {one for prior in known.values() for one in prior.apart}
    apart = [
        f"{plan.table.rows[row].label} at {plan.table.columns[column].label}"
        for (row, column), one in cells.items()
        if one in wild
    ]
    if apart:
        yield f"{', '.join(apart)}: no part of that, since they follow the others' seeds less (F test, 1 % in a column)"
