"""Sentences on a leaderboard, generated from its numbers and tests, and the limits of such numbers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from viladiff.report.sections.learning_rates import RateComparison
from viladiff.report.table.comparisons import signed
from viladiff.report.table.results import Results, difference, summary
from viladiff.tables.spec import OWN_LISTS

if TYPE_CHECKING:
    from viladiff.runs.record import RunRecord
    from viladiff.tables.claims import Comparison, Verdict


def ranking_sentences(results: Results, verdicts: Sequence[Verdict], tried: Sequence[RateComparison]) -> list[str]:
    """Return sentences: the number of measurements, the differences shown and not shown, and the limits."""
    if not results.records():
        return ["Nothing has been measured yet."]
    found = [*_extent(results), *_shown(results, verdicts), *_gap(results), *_controls(verdicts)]
    return [*found, *_limits(results, tried)]


def _extent(results: Results) -> Iterator[str]:
    rows = results.rows(control=False)
    there = [row for row in rows if any(e.record for e in results.of_row(row))]
    whole = [row for row in there if all(e.record for e in results.of_row(row))]
    steps = sorted({r.steps for row in there for e in results.of_row(row) if (r := e.record)})
    seeds = len({e.cell.seed for e in results.entries if e.record})
    length = " or ".join(map(str, steps))
    missing = [results.plan.table.rows[row].label for row in rows if row not in there]
    yield (
        f"{len(there)} of {len(rows)} methods have been trained, {len(whole)} of them in every column with every seed: "
        f"{length} optimiser steps, {seeds} seed{'s' if seeds != 1 else ''}"
        + (f"; none yet of {', '.join(missing)}." if missing else ".")
    )


def _shown(results: Results, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield the rows above and below the reference, by the test of the claim that asks what differs from it."""
    table = results.plan.table
    claim = next((one for one in table.claims if one.kind == "differs" and one.metric == table.metric), None)
    verdict = next((one for one in verdicts if claim is not None and one.text == claim.text), None)
    if claim is None or verdict is None:
        return
    for column in results.plan.columns:
        label = table.columns[column].label
        found = {row: summary(results.at(row, column), table.metric) for row in results.rows(control=False)}
        there = {row: one.mean for row, one in found.items() if one.mean is not None}
        if not there:
            yield f"{label}: nothing measured yet."
            continue
        top = max(there, key=lambda row: there[row])
        lead = f"{label}: the highest of {len(there)} means is {table.rows[top].label}'s, {there[top]:.1f}"
        if len({found[row].n for row in there}) > 1:
            lead = f"{label}: no mean is called the highest while rows have unlike numbers of seeds"
        yield f"{lead}. {_against(claim.rows[0], [one for one in verdict.comparisons if one.column == label])}"


def _against(reference: str, made: Sequence[Comparison]) -> str:
    if not made:
        return f"Nothing has three seeds on both sides yet, so no difference to {reference} is tested."
    parts = []
    for outcome, word in (("shown", "above"), ("reversed", "below")):
        those = [f"{c.higher} ({signed(c.difference)})" for c in made if c.outcome == outcome]
        parts.append(f"{word} it: {', '.join(those)}" if those else f"none {word} it")
    rest = ""
    long = 3 * statistics.median_low([c.least for c in made])
    if open_ := [c for c in made if c.outcome == "open" and c.least <= long]:
        low, high = f"{min(c.least for c in open_):.1f}", f"{max(c.least for c in open_):.1f}"
        points = f"{low} points" if low == high else f"{low} to {high} points, depending on the method"
        rest = f"; of {len(open_)} no difference is shown, where the test has 80 % power for {points}"
    wild = [f"{c.higher} ({signed(c.difference)})" for c in made if c.outcome == "open" and c.least > long]
    rest += f"; {', '.join(wild)}: seeds differ too much for a verdict" if wild else ""
    return f"Shown against {reference}, corrected for all comparisons: {'; '.join(parts)}{rest}."


def _gap(results: Results) -> Iterator[str]:
    """Yield the share of the gain of labels for all images that the best method reaches."""
    table = results.plan.table
    labels = {table.rows[row].label: row for row in results.plan.rows}
    low = labels.get(table.supervised)
    high = next((row for row in results.plan.rows if table.rows[row].set.get("data.split") == "all"), None)
    if low is None or high is None:
        return
    for column in results.plan.columns:
        base, full = (summary(results.at(row, column), table.metric) for row in (low, high))
        gap = difference(full, base)
        others = [row for row in results.rows(control=False) if row != low]
        gains = [difference(summary(results.at(row, column), table.metric), base) for row in others]
        best = max((gain.mean for gain in gains if gain), default=None)
        if gap is None or best is None or gap.mean <= 0:
            continue
        share = f"{signed(best)}, {100 * best / gap.mean:.0f} % of that" if best > 0 else f"none ({signed(best)})"
        yield (
            f"{table.columns[column].label}: with labels for every training image, in as many steps, the same network "
            f"reaches {signed(gap.mean)} points over {table.supervised}; the largest gain of a method is {share}."
        )


def _controls(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield every other question of ours, with its answer."""
    for verdict in verdicts:
        if verdict.source == "ours" and any(c.form == "one_sided" for c in verdict.comparisons):
            few = verdict.comparisons if len(verdict.comparisons) <= 4 else ()
            listed = ", ".join(f"{signed(c.difference)} at {c.column}" for c in few)
            yield f"“{verdict.text}”: {verdict.verdict} ({'; '.join(filter(None, [verdict.why, listed]))})."


def _limits(results: Results, tried: Sequence[RateComparison]) -> Iterator[str]:
    records = list(results.records().values())
    sets = sorted({str(r.config.get("data.dataset")) for r in records})
    encoders = sorted({f"{r.encoder} ({r.pretrained})" for r in records})
    one = f"one data set ({sets[0]})" if len(sets) == 1 else f"the data sets {', '.join(sets)}"
    network = f"one encoder, {encoders[0]}" if len(encoders) == 1 else f"the encoders {', '.join(encoders)}"
    yield (
        f"This is {one} with {network}, few steps and a small decoder. It says how these methods behave under one "
        "protocol at that size. It does not say how they rank on photographs, with large pretrained encoders or after "
        "the tens of thousands of steps that they were published with; a method made for those may be held back here."
    )
    if {"digits", "dense"} & set(sets):
        yield (
            "The images are drawn: handwriting on photographs, few classes, captions simulated from the truth. What "
            "helps against ambiguity between many classes, or with real captions, cannot show itself."
        )
    yield from _evaluated(results)
    yield from _draws(records)
    size = results.plan.table.scale.get(results.plan.scale)
    if size and size.split_per_seed:
        yield f"Beside first weights and draws, {OWN_LISTS}: differences are paired by seed."
    else:
        yield "Seeds change weights and draws, not the labelled images: another draw of these may change the order."
    yield _rates(results, tried)


def _evaluated(results: Results) -> Iterator[str]:
    """Yield the network of each score."""
    averaged, own = [], []
    for row in results.rows(control=False):
        networks = {e.record.network for e in results.of_row(row) if e.record}
        label = results.plan.table.rows[row].label
        averaged += [label] if networks - {"student"} else []
        own += [label] if networks == {"student"} else []
    if averaged and own:
        yield (
            f"Evaluated is what each method's authors evaluate: an average of weights for {', '.join(averaged)}; the "
            f"trained network itself for {', '.join(own)}. In few steps an average lags behind its network: the "
            "trained networks' scores stand beside."
        )


def _draws(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yield the number of images in training, if it is the same for nearly all."""
    batches = ("data.batch_labelled", "data.batch_unlabelled")
    kinds = Counter((*(int(r.config.get(one) or 0) for one in batches), r.steps) for r in records)
    (labelled, unlabelled, steps), count = kinds.most_common(1)[0]
    if not labelled:
        return  # not noted
    yield (
        f"A step draws {labelled} labelled and, in methods that want them, {unlabelled} unlabelled images: {steps} "
        f"steps draw {labelled * steps:,} and {unlabelled * steps:,}"
        + ("." if count == len(records) else f" ({count} of {len(records)} runs).")
    )


def _rates(results: Results, tried: Sequence[RateComparison]) -> str:
    """Summarise the comparisons of rates and the number of method families."""
    families = {row.group for row in results.plan.table.rows if not row.control}
    compared = [one for one in tried if len(one.rates) > 1 and one.family in families]
    have = {one.family for one in compared}
    said = f"Learning rates were compared for {len(have)} of {len(families)} families"
    if not compared:
        return f"{said}."
    highest = sum(any(rate.taken and rate.highest for rate in one.rates) for one in compared)
    seeds = min(rate.found.n for one in compared for rate in one.rates)
    return (
        f"{said}, on images held out from the labelled ones, with {seeds} seed{'s' if seeds != 1 else ''} at least. "
        f"The table's rate was the highest for {highest} of {len(compared)}."
    )
