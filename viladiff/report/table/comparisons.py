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
    "Intervals are 95 %, for one difference at a time; p is corrected for all comparisons of the same source. "
    "“Unseen” is the smallest true difference that the test finds four times in five."
)


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
    return f"× {comparison.least:.1f}" if comparison.form == "spread" else f"{comparison.least:.1f}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if math.isfinite(ratio) else "∞" if ratio > 0 else "—"


def in_print(comparison: Comparison) -> str:
    """Format the paper's difference; empty where it is not printed."""
    return "" if comparison.printed is None else signed(float(comparison.printed))


def it_is(comparison: Comparison) -> str:
    """Return how the first row compares with the second: higher, lower, open."""
    return {"shown": "higher", "reversed": "lower", "open": "open"}[comparison.outcome]


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def claim_lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield a list in markdown: each claim, and below it its verdicts by column."""
    for verdict in verdicts:
        whose = "The paper's" if verdict.source == "paper" else "Ours"
        times = "× " if any(one.form == "spread" for one in verdict.comparisons) else ""
        most = verdict.detectable
        power = (
            "" if most is None else f" Least difference that it would have seen four times in five: {times}{most:.1f}."
        )
        metric = METRICS[verdict.metric]
        yield (
            f"- **{verdict.verdict}**: {markdown(verdict.text)}. {whose}, on {metric.title or metric.name}. "
            f"{markdown(verdict.why)}. Printed numbers: {verdict.printed} ({markdown(verdict.printed_why)}). "
            f"Test: {markdown(verdict.test)}.{power}"
        )
        for one in verdict.by_column:
            why = f"{markdown(one.why)}; least difference {one.least:.1f}"
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
        "unseen",
        "seeds",
        "it is",
    ]
    lines = {}
    for verdict in verdicts:
        metric = METRICS[verdict.metric]
        for one in verdict.comparisons:
            said = [markdown(text) for text in (one.higher, one.lower, one.column, metric.title or metric.name)]
            seeds = ", ".join(str(count) for count in dict.fromkeys(one.n))
            numbers = [seen(one), interval(one), in_print(one), markdown(p_value(one.p)), f"&lt; {least(one)}", seeds]
            lines[*said, verdict.source] = [*said, *numbers, it_is(one)]
    return [head, *lines.values()]
