"""Page section on choices that the paper leaves open: every alternative against the default."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from viladiff.report.markup import markdown
from viladiff.report.table.comparisons import interval, least, p_value, power, seen, signed
from viladiff.report.table.results import Results, difference, number, summary
from viladiff.tables.contrasts import contrasts

if TYPE_CHECKING:
    from viladiff.tables.claims import Comparison, Verdict


class Alternative(NamedTuple):
    """One row against the reference in one column."""

    number: str
    label: str
    column: str
    tested: Comparison | None
    """None below three seeds on either side."""
    gap: float | None
    """Points over the seeds that both have, tested or not; None where one side has nothing."""
    why: str
    """Why it is not tested."""

    @property
    def outcome(self) -> str:
        if self.tested is None:
            return "not decided"
        return {"shown": "higher", "reversed": "lower", "open": "no difference shown"}[self.tested.outcome]


class Choice(NamedTuple):
    where: str
    """What the text says and what the default is: the heading of its rows."""
    said: str
    """The answer in a sentence."""
    alternatives: tuple[Alternative, ...]


def build_choices(results: Results, verdicts: Sequence[Verdict]) -> list[Choice]:
    """Return the choices by heading of rows, for a table of our own that asks what differs from its reference."""
    table = results.plan.table
    claim = next((one for one in table.claims if one.kind == "differs" and one.metric == table.metric), None)
    if table.printed or claim is None or table.page != "table":
        return []
    verdict = next((one for one in verdicts if one.text == claim.text), None)
    made = {(one.higher, one.column): one for one in verdict.comparisons} if verdict else {}
    reference = [row.label for row in table.rows].index(claim.rows[0])
    asked = {question.higher for question in contrasts(table, claim)}
    rows = [row for row in results.rows(control=False) if table.rows[row].label in asked]
    return [
        _choice(where, [one for row in group for one in _alternatives(results, row, reference, made)])
        for where, group in groupby(rows, key=lambda row: table.rows[row].group)
    ]


def _alternatives(
    results: Results, row: int, reference: int, made: dict[tuple[str, str], Comparison]
) -> list[Alternative]:
    table, found = results.plan.table, []
    for column in results.plan.columns:
        mine, base = (summary(results.at(place, column), table.metric) for place in (row, reference))
        gap = difference(mine, base)
        label, where = table.rows[row].label, table.columns[column].label
        few = f"{min(mine.n, base.n)} seed{'s' if min(mine.n, base.n) != 1 else ''}, and 3 are needed"
        why = "" if (label, where) in made else "; ".join(dict.fromkeys(mine.missing.values())) or few
        tested = made.get((label, where))
        found.append(Alternative(number(results, row), label, where, tested, gap.mean if gap else None, why))
    return found


def _choice(where: str, alternatives: Sequence[Alternative]) -> Choice:
    differing = [one for one in alternatives if one.tested and one.tested.outcome != "open"]
    tested = [one.tested for one in alternatives if one.tested]
    if differing:
        listed = "; ".join(f"{one.label}, {signed(one.gap)} ({one.column})" for one in differing)
        said = f"It matters: {listed}."
    elif len(tested) < len(alternatives):
        said = "Not decided."
    else:
        most = max(one.least for one in tested)
        said = f"No difference shown; the test has 80 % power for {power(most)} points."
    return Choice(where, said, tuple(alternatives))


def answer(found: Sequence[Choice]) -> str:
    """Summarise all choices in a sentence; empty if there is none."""
    outcomes = [one.outcome for choice in found for one in choice.alternatives]
    if not outcomes:
        return ""
    counts = [(sum(one == kind for one in outcomes), kind) for kind in ("higher", "lower", "not decided")]
    told = ", ".join(f"{n} {'is' if n == 1 else 'are'} {kind}" for n, kind in counts)
    open_ = outcomes.count("no difference shown")
    many = "1 alternative" if len(outcomes) == 1 else f"{len(outcomes)} alternatives"
    return f"Of {many} {told}; for {open_} no difference is shown."


def choices_markdown(found: Sequence[Choice]) -> list[str]:
    """Return the lines of table.md."""
    out = [answer(found), ""] if found else []
    for choice in found:
        out += [f"- **{markdown(choice.where)}** {markdown(choice.said)}"]
        for one in choice.alternatives:
            tested = one.tested
            if tested is None:
                told = f"{signed(one.gap)} so far, not tested ({one.why})"
            else:
                told = (
                    f"{seen(tested)} (95 % interval {interval(tested)}; p {p_value(tested)}): {one.outcome}; "
                    f"80 % power for {least(tested)}"
                )
            out += [f"  - {markdown(f'{one.number} {one.label}, {one.column}: {told}')}"]
    return out
