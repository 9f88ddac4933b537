"""A table's claims and their comparisons as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from viladiff.evaluation.metrics import METRICS
from viladiff.report.markup import markdown

if TYPE_CHECKING:
    from viladiff.tables.claims import Comparison, Verdict

LEGEND = (
    "Intervals are 95 %, two-sided, for one difference at a time. p is corrected for all comparisons of one source; "
    "it is one-sided, in the claimed direction or, of a lower one, in the other, and two-sided where no direction is "
    "claimed. A comparison is shown at p < 0.05. “80 % power at” is the true difference that the test finds four "
    "times in five: a smaller one may be there. Below three seeds a side nothing is tested."
)
"""Beneath a list of comparisons."""
MOST_POWER = 20
"""Points, or a ratio, beyond which no smallest difference is printed."""


def signed(value: float | None) -> str:
    """Format ``+2.1``, ``−0.3``, ``0.0``; an em dash for None."""
    if value is None:
        return "—"
    text = f"{abs(value):.1f}"
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text


def interval(comparison: Comparison) -> str:
    """Format ``−0.4 to +2.1``, or ``× 0.80 to 2.10`` for a ratio."""
    if comparison.form == "spread":
        return "× " + " to ".join(_times(end) for end in comparison.interval)
    return " to ".join(signed(end) for end in comparison.interval)


def seen(comparison: Comparison) -> str:
    """Format ``+2.1``, or ``× 1.40`` for a ratio."""
    return f"× {_times(comparison.difference)}" if comparison.form == "spread" else signed(comparison.difference)


def least(comparison: Comparison) -> str:
    """Format the smallest difference that the comparison would have detected."""
    return f"× {power(comparison.least)}" if comparison.form == "spread" else power(comparison.least)


def power(smallest: float) -> str:
    """Format a smallest difference in points, or a ratio; a large one only says that the seeds are too few."""
    return f"{smallest:.1f}" if smallest <= MOST_POWER else f"> {MOST_POWER}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if math.isfinite(ratio) else "∞" if ratio > 0 else "—"


def in_print(comparison: Comparison) -> str:
    """Format the paper's difference; empty where it is not printed."""
    return "" if comparison.printed is None else signed(float(comparison.printed))


def it_is(comparison: Comparison) -> str:
    """Return how the first row compares with the second: higher, lower, not shown; against a limit where one is set."""
    limit = f"{abs(comparison.limit):g}"
    words = {
        0: {"shown": "higher", "reversed": "lower"},
        1: {"shown": f"more than {limit} higher", "reversed": f"less than {limit} higher"},
        -1: {"shown": f"less than {limit} lower", "reversed": f"more than {limit} lower"},
    }[(comparison.limit > 0) - (comparison.limit < 0)]
    return words.get(comparison.outcome, "not shown")


def p_value(comparison: Comparison) -> str:
    """Format p in the claimed direction or, of a lower row, in the other."""
    p = comparison.p_reversed if comparison.outcome == "reversed" else comparison.p
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def tested(verdicts: Sequence[Verdict], high: str, low: str, metric: str) -> str:
    """Return a sentence on the test of one difference in each column; empty if no claim asks about it."""
    found = {
        one.column: f"{it_is(one)} on {one.column} (p {'' if p_value(one).startswith('<') else '= '}{p_value(one)})"
        for verdict in verdicts
        for one in verdict.comparisons
        if (one.higher, one.lower, verdict.metric, one.limit) == (high, low, metric, 0) and one.form != "spread"
    }
    if not found:
        return ""
    return f"{high} against {low}, corrected for all comparisons: {'; '.join(found.values())}."


def tally(verdicts: Sequence[Verdict], claims: int = 0) -> list[str]:
    """Return a sentence for each column: how many distinct comparisons are shown; what two claims ask counts once.

    ``claims``: how many the table has; a last sentence says how many of them have no verdict at this scale.
    """
    columns: dict[str, dict[tuple[str | float, ...], Comparison]] = {}
    for verdict in verdicts:
        for one in verdict.comparisons:
            key = one.higher, one.lower, verdict.metric, verdict.source, one.form, one.limit
            columns.setdefault(one.column, {})[key] = one
    said = []
    for column, made in columns.items():
        counts = {kind: sum(one.outcome == kind for one in made.values()) for kind in ("shown", "reversed")}
        against = f", {counts['reversed']} the other way" if counts["reversed"] else ""
        said.append(f"{column}: {counts['shown']} of {len(made)} comparisons shown as claimed{against}.")
    if said and any(verdict.verdict == "not decided" for verdict in verdicts):
        said.append("A claim is decided when all its comparisons are made and shown, or one is shown the other way.")
    if (rest := claims - len(verdicts)) > 0:
        those = "1 claim asks" if rest == 1 else f"{rest} claims ask"
        said.append(f"{those} only about rows or columns that are not run at this scale.")
    return said


def claim_lines(verdicts: Sequence[Verdict], claims: int = 0) -> Iterator[str]:
    """Yield a list in markdown: each claim, and below it its verdicts by column; first the sentences of ``tally``."""
    yield from (f"- {markdown(sentence)}" for sentence in tally(verdicts, claims))
    for verdict in verdicts:
        whose = "The paper's" if verdict.source == "paper" else "Ours"
        times = "× " if any(one.form == "spread" for one in verdict.comparisons) else ""
        most = verdict.detectable
        found = "" if most is None else f" 80 % power at {markdown(times + power(most))}."
        metric = METRICS[verdict.metric]
        yield (
            f"- **{verdict.verdict}**: {markdown(verdict.text)}. {whose}, on {metric.title or metric.name}. "
            f"{markdown(verdict.why)}. Printed numbers: {verdict.printed} ({markdown(verdict.printed_why)}). "
            f"Test: {markdown(verdict.test)}.{found}"
        )
        for one in verdict.by_column:
            why = f"{markdown(one.why)}; 80 % power at {markdown(power(one.least))}"
            yield f"  - {markdown(one.column)} alone: **{one.verdict}** ({why})"


def comparison_grid(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """Return header and a line for each comparison, in markdown; what two claims ask stands once."""
    head = [
        "claimed to be higher",
        "than",
        "in",
        "metric",
        "points",
        "95 % interval",
        "paper",
        "p",
        "80 % power at",
        "seeds",
        "result",
    ]
    lines = {}
    for verdict in verdicts:
        metric = METRICS[verdict.metric]
        for one in verdict.comparisons:
            said = [markdown(text) for text in (one.higher, one.lower, one.column, metric.title or metric.name)]
            seeds = ", ".join(str(count) for count in dict.fromkeys(one.n))
            numbers = [seen(one), interval(one), in_print(one), markdown(p_value(one)), markdown(least(one)), seeds]
            lines[*said, verdict.source, one.form, one.limit] = [*said, *numbers, it_is(one)]
    return [head, *lines.values()]
