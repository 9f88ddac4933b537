"""Finals of a sweep: its best points and the paper's, on fresh seeds and the reported set.

A best trial is the best of many, on images and seeds that it was chosen by, so its own score is biased upwards. These
points are not chosen by the seeds that they report; ``chosen`` is, so that its mean, the highest of up to three, is
biased upwards too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from viladiff.runs.job import PlannedRun
from viladiff.sweeps.space import Value
from viladiff.sweeps.spec import FRESH, Sweep, SweepPlanner
from viladiff.sweeps.trials import Trial, ranked
from viladiff.tables.significance import LEVEL, Records, holm, smallest_detectable

if TYPE_CHECKING:
    from collections.abc import Iterator

Role = Literal["winner", "paper", "runner-up"]


@dataclass(frozen=True)
class Finalist:
    """A point that is trained anew."""

    roles: tuple[Role, ...]
    """The first point, ``paper``, may be the winner too; what it is, ``Sweep.initial_label`` says."""
    trial: int
    point: dict[str, Value]
    runs: dict[int, PlannedRun]
    """By fresh seed."""

    @property
    def label(self) -> str:
        return " and ".join("first point" if role == "paper" else role for role in self.roles)


@dataclass(frozen=True)
class FinalComparison:
    """A paired comparison of two finalists over the seeds that both have; points of mIoU."""

    higher: str
    lower: str
    n: int
    difference: float
    spread: float
    """Standard deviation of the paired differences."""
    interval: tuple[float, float]
    """95 %, not corrected."""
    p: float
    """Two-sided, so that it agrees with the interval; corrected by Holm."""
    detectable: float
    """The true difference that would have been found with a chance of 80 %."""
    outcome: Literal["shown", "reversed", "open"]


class Tuned(NamedTuple):
    """One sweep as a row; scores in percent of mIoU, an em dash where nothing was measured."""

    title: str
    wanted: int
    """Trials that the sweep asks for."""
    complete: int
    first_trial: str
    """Of the first point, as a trial."""
    first: str
    """Of the first point, on fresh seeds."""
    chosen: str
    """Of the chosen point, on fresh seeds."""
    point: Mapping[str, Value]
    """Empty until all finalists are scored."""
    kept: bool
    """Whether the first point is the chosen one."""


def finalists(sweep: Sweep, trials: Sequence[Trial], namer: SweepPlanner) -> list[Finalist]:
    """Return winner, the paper's value and runner-up, equal ones once; empty without a complete trial. Loads torch."""
    best = ranked(list(trials))
    chosen: dict[int, list[Role]] = {}
    if best:
        chosen.setdefault(best[0].number, []).append("winner")
    paper = next((trial for trial in trials if trial.origin == "paper"), None)
    if best and paper is not None:
        chosen.setdefault(paper.number, []).append("paper")
    if len(best) > 1:
        chosen.setdefault(best[1].number, []).append("runner-up")
    return [
        Finalist(
            tuple(roles),
            number,
            dict(trials[number].point),
            {seed: namer.final(trials[number].point, seed, " and ".join(roles)) for seed in sweep.final_seeds},
        )
        for number, roles in chosen.items()
    ]


def scores(finalist: Finalist, records: Records) -> dict[int, float]:
    """Return mIoU in points by seed, of runs that are done."""
    found = {seed: records[run.run_id].miou for seed, run in finalist.runs.items() if run.run_id in records}
    return {seed: 100 * miou for seed, miou in found.items() if miou is not None and math.isfinite(miou)}


def chosen(found: Sequence[Finalist], records: Records) -> Finalist | None:
    """Return the finalist with the highest mean, the paper's in a tie; None until all fresh seeds are done."""
    means = []
    for one in found:
        values = scores(one, records)
        if len(values) < len(one.runs):
            return None
        means.append((math.fsum(values.values()) / len(values), "paper" in one.roles))
    return found[max(range(len(found)), key=means.__getitem__)] if found else None


def compare_finalists(found: Sequence[Finalist], records: Records, fewest: int = FRESH) -> list[FinalComparison]:
    """Compare the winner with each other finalist that shares ``fewest`` seeds with it, with Holm's correction.

    A two-sided paired t test: d_s = a_s - b_s over the n seeds that both have, t = mean(d) / (sd(d) / √n), n - 1
    degrees of freedom. Comparisons that cannot be made yet count in the correction too.
    """
    pairs = [(found[0], other) for other in found[1:]] if found else []
    measured = [(a, b, _differences(scores(a, records), scores(b, records))) for a, b in pairs]
    enough = [len(d) >= fewest for _, _, d in measured]
    tested = [_paired(d) if fine else None for (_, _, d), fine in zip(measured, enough, strict=True)]
    corrected = holm([1.0 if one is None else one[2] for one in tested])
    return [
        _contest(a, b, d, one, p, len(pairs))
        for (a, b, d), one, p in zip(measured, tested, corrected, strict=True)
        if one is not None
    ]


def _differences(a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    return [a[seed] - b[seed] for seed in a if seed in b]


def _paired(d: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean difference, its standard error and the two-sided p."""
    from scipy import stats

    mean = math.fsum(d) / len(d)
    error = math.sqrt(math.fsum((one - mean) ** 2 for one in d) / (len(d) - 1) / len(d))
    if error == 0:
        return mean, 0.0, float(mean == 0)
    return mean, error, 2 * float(stats.t.sf(abs(mean / error), len(d) - 1))


def _contest(
    a: Finalist,
    b: Finalist,
    d: Sequence[float],
    tested: tuple[float, float, float],
    p: float,
    comparisons: int,
) -> FinalComparison:
    from scipy import stats

    mean, error, df = tested[0], tested[1], len(d) - 1
    half = float(stats.t.isf(0.025, df)) * error
    return FinalComparison(
        a.label,
        b.label,
        len(d),
        mean,
        error * math.sqrt(len(d)),
        (mean - half, mean + half),
        p,
        smallest_detectable(error, df, 2 * comparisons),  # one side of a two-sided test
        "open" if p >= LEVEL else "shown" if mean > 0 else "reversed",
    )


def format_verdict(found: Sequence[Finalist], records: Records, wanted: int) -> Iterator[str]:
    """Yield the verdict in lines of text."""
    for one in found:
        values = list(scores(one, records).values())
        if values:
            mean = math.fsum(values) / len(values)
            sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
            spread = "" if sd is None else f" ± {sd:.2f}"
            yield f"{one.label}: {mean:.2f}{spread} mIoU over {len(values)} of {wanted} fresh seeds, trial {one.trial}"
        else:
            yield f"{one.label}: not retrained yet, trial {one.trial}"
    for contest in compare_finalists(found, records, min(FRESH, wanted)):
        low, high = contest.interval
        verdict = {"shown": "better", "reversed": "worse", "open": "not told apart"}[contest.outcome]
        yield (
            f"{contest.higher} against {contest.lower}: {contest.difference:+.2f} points [{low:+.2f}, {high:+.2f}], "
            f"{verdict} (two-sided paired t over {contest.n} seeds, standard deviation of paired differences "
            f"{contest.spread:.2f}, Holm p = {contest.p:.3f}; "
            f"80 % power for a difference of {contest.detectable:.2f})"
        )
