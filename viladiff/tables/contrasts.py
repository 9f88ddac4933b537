"""Contrasts of a table's claims: comparisons of cells, for records or printed numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Literal, NamedTuple

from viladiff.evaluation.metrics import METRICS
from viladiff.tables.spec import Claim, Table

Form = Literal["one_sided", "two_sided", "spread"]


class Term(NamedTuple):
    """A cell's mean with its sign."""

    row: int
    column: int
    sign: int


class Contrast(NamedTuple):
    """The claim that a sum of signed cells, compared at the same seeds, is above a limit.

    ``two_sided``: whether it is other than 0. ``spread``: whether the standard deviation between seeds is larger in the
    cells with sign + than in those with sign -, all columns taken together.
    """

    higher: str
    """Label of the row that is claimed to be higher; where gains are compared, what the greater gain is."""
    lower: str
    column: str
    """Label of the column; for a gain that shrinks from column to column, which row is compared with which."""
    terms: tuple[Term, ...]
    limit: float = 0.0
    """Points: the margin asked for, or the tolerance with a minus."""
    form: Form = "one_sided"


def contrasts(
    table: Table, claim: Claim, rows: Collection[int] | None = None, columns: Collection[int] | None = None
) -> list[Contrast]:
    """Return the contrasts of a claim, in the table's order; of these rows and columns alone, where they are given.

    superset_increases: each row without ``control`` is higher than those whose parts it includes, in every column; only
    pairs with no row between them are asked, since the rest follows. best_row: the row is higher than every other row
    of the paper's, or than those ``among`` which it stands. worst_rows: each of those is higher than these rows.
    higher: the first row is higher than the second. gain_shrinks: the first row's gain over the second is greater in
    each column than in the next one. gain_exceeds: the first row's gain over the second is greater than the third's
    over the fourth. returns_diminish: the second row's gain over the first is greater than each later row's over the
    one before it. less_stable: seeds spread more in the first row than in the second. differs: every other row, or
    those ``among``, differs from this one, in whichever direction.
    """
    there = range(len(table.rows)) if rows is None else rows
    across = [column for column in _columns(table, claim) if columns is None or column in columns]
    found = _contrasts(table, claim, there, across) if across else []
    return [one for one in found if all(term.row in there for term in one.terms)]


def _columns(table: Table, claim: Claim) -> list[int]:
    columns = {column.label: i for i, column in enumerate(table.columns)}
    return [columns[label] for label in claim.columns or columns]


def _contrasts(table: Table, claim: Claim, there: Collection[int], across: Sequence[int]) -> list[Contrast]:
    """Return the contrasts in these columns; ``there``: rows that may stand between two others."""
    rows = {row.label: i for i, row in enumerate(table.rows)}
    named = [rows[label] for label in claim.rows]
    limit = claim.margin - claim.tolerance
    if claim.kind == "gain_shrinks":
        return [_shrinks(table, named, left, right, limit) for left, right in pairwise(across)]
    if claim.kind == "gain_exceeds":
        return [_gains(table, tuple(named[:2]), tuple(named[2:]), column, limit) for column in across]
    if claim.kind == "returns_diminish":
        first, *later = [(high, low) for low, high in pairwise(named)]
        return [_gains(table, first, one, column, limit) for one in later for column in across]
    if claim.kind == "less_stable":
        return [_spreads(table, named, across)]
    others = _others(table, claim, named)
    pairs: dict[str, Callable[[], list[tuple[int, int]]]] = {
        "superset_increases": lambda: inclusion_pairs(table, there),
        "best_row": lambda: [(named[0], i) for i in others],
        "worst_rows": lambda: [(i, worst) for worst in named for i in others],
        "higher": lambda: [(named[0], named[1])],
        "differs": lambda: [(i, named[0]) for i in others],
    }
    form: Form = "two_sided" if claim.kind == "differs" else "one_sided"
    return [
        Contrast(
            table.rows[high].label,
            table.rows[low].label,
            table.columns[column].label,
            (Term(high, column, 1), Term(low, column, -1)),
            limit,
            form,
        )
        for high, low in pairs[claim.kind]()
        for column in across
    ]


def _others(table: Table, claim: Claim, named: Sequence[int]) -> list[int]:
    """Return the rows that best_row, worst_rows and differs compare with."""
    among = set(claim.among)
    chosen = [i for i, row in enumerate(table.rows) if (row.label in among if among else not row.control)]
    return [i for i in chosen if i not in named]


def inclusion_pairs(table: Table, rows: Collection[int] | None = None) -> list[tuple[int, int]]:
    """Return (row, row) where the first's parts include the second's and no row is between; controls are left out.

    ``rows``: those that are looked at; None for all.
    """
    there = range(len(table.rows)) if rows is None else rows
    parts = {i: frozenset(row.components) for i, row in enumerate(table.rows) if not row.control and i in there}
    return [
        (high, low)
        for high in parts
        for low in parts
        if parts[low] < parts[high] and not any(parts[low] < between < parts[high] for between in parts.values())
    ]


def _shrinks(table: Table, rows: Sequence[int], left: int, right: int, limit: float) -> Contrast:
    one, other = rows
    terms = (Term(one, left, 1), Term(other, left, -1), Term(one, right, -1), Term(other, right, 1))
    what = _gain(table, one, other)
    return Contrast(table.columns[left].label, table.columns[right].label, what, terms, limit)


def _gains(table: Table, greater: tuple[int, ...], less: tuple[int, ...], column: int, limit: float) -> Contrast:
    """Return the contrast that one pair of rows is farther apart than another, in one column."""
    signs = (1, -1, -1, 1)
    terms = tuple(Term(row, column, sign) for row, sign in zip((*greater, *less), signs, strict=True))
    return Contrast(_gain(table, *greater), _gain(table, *less), table.columns[column].label, terms, limit)


def _gain(table: Table, high: int, low: int) -> str:
    return f"{table.rows[high].label} over {table.rows[low].label}"


def _spreads(table: Table, rows: Sequence[int], across: Sequence[int]) -> Contrast:
    one, other = rows
    terms = (*(Term(one, column, 1) for column in across), *(Term(other, column, -1) for column in across))
    where = table.columns[across[0]].label if len(across) == 1 else f"{len(across)} columns together"
    return Contrast(table.rows[one].label, table.rows[other].label, where, terms, form="spread")


# The printed numbers


def printed_verdict(table: Table, claim: Claim) -> tuple[Literal["holds", "fails", "not printed"], str]:
    """Evaluate a claim on the paper's own numbers, compared as decimals; missing numbers are skipped.

    Without tolerance and margin an equal number is not higher; with one of them, a number at its edge still counts.
    """
    if claim.metric != table.metric:
        return "not printed", f"the paper prints no {METRICS[claim.metric].name}"
    if claim.kind in ("less_stable", "differs"):
        return "not printed", "the paper prints no spread"
    wrong, count = [], 0
    for question in contrasts(table, claim):
        if (total := printed_difference(table, question)) is None:
            continue
        count += 1
        limit = Decimal(str(question.limit))
        if not (total > 0 if limit == 0 else total >= limit):
            wrong.append(f"{question.higher!r} against {question.lower!r} ({question.column}): {total:+}")
    if not count:
        return "not printed", "the paper prints none of these numbers"
    gains = f"; the gains are {', '.join(_printed_gains(table, claim))}" if claim.kind == "gain_shrinks" else ""
    if wrong:
        said = f"{len(wrong)} of {count} printed differences are not as claimed: {'; '.join(wrong)}"
        return "fails", said + gains
    return "holds", f"all {count} printed differences are as claimed{gains}"


def printed_difference(table: Table, question: Contrast) -> Decimal | None:
    """Return the contrast of the printed numbers, of the table's own metric; None where one of them is not printed."""
    total = Decimal(0)
    for term in question.terms:
        if question.form == "spread" or (number := _printed(table, term)) is None:
            return None
        total += term.sign * number
    return total


def _printed_gains(table: Table, claim: Claim) -> Iterator[str]:
    """Yield the printed differences of the claim's two rows, column by column."""
    one, other = ([row.label for row in table.rows].index(label) for label in claim.rows)
    labels = [column.label for column in table.columns]
    for label in claim.columns or labels:
        ends = [_printed(table, Term(row, labels.index(label), 1)) for row in (one, other)]
        yield "—" if None in ends else str(ends[0] - ends[1])  # type: ignore[operator]


def _printed(table: Table, term: Term) -> Decimal | None:
    numbers = table.rows[term.row].paper
    value = numbers[term.column] if numbers else "-"
    return None if value == "-" else Decimal(str(value))
