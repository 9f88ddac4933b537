"""Tune's ASHA and Hyperband, asked at rungs: what they decide; a sweep that was killed hears the same again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from viladiff.ray_judges import TuneJudge, judge
from viladiff.study import search as search_module
from viladiff.study.trials import Trial, save_trial


class KillError(BaseException):
    """Not an Exception, as a kill is none."""


def play(
    sweeping: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    kind: str,
    kill_at: int | None = None,
    wanted: int = 12,
    slots: int = 1,
) -> tuple[Any, Any, int, list[int]]:
    """Drives a sweep on formulas to its end, over at most one death.

    Returns desk, runs, how much there was that lasts, and which of it were promotions.
    """
    runs = sweeping.Runs(root, sweeping.bowl)
    count, promoted = 0, []

    def lasting(what: str = "") -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            raise KillError

    def saved(trial: Trial, directory: Path) -> None:
        lasting()
        save_trial(trial, directory)
        if trial.promotions and trial.promotions[-1].order == max(
            [one.order for one in (*trial.promotions, *trial.rungs)] + [trial.ended or 0]
        ):
            promoted.append(count + 1)
        lasting()

    monkeypatch.setattr(search_module, "save_trial", saved)
    for _ in range(2):
        try:
            desk = sweeping.opened(
                root, runs, wanted, "random", judge(kind, len(sweeping.STEPS), 2), slots=slots, seeds=(0,)
            )
            sweeping.drive(desk, runs, lasting)
            return desk, runs, count, promoted
        except KillError:
            continue
    raise AssertionError("it was killed twice")


@pytest.mark.parametrize("kind", ["asha", "hyperband"])
def test_killed_anywhere_it_equals_the_undisturbed_sweep(
    sweeping: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    desk, runs, count, promoted = play(sweeping, monkeypatch, tmp_path / "whole", kind)
    wanted = sweeping.told(desk)
    states = [trial["state"] for trial in wanted]
    assert len(wanted) == 12 and set(states) == {"complete", "pruned"}
    assert bool(promoted) == (kind == "hyperband")
    for at in (*range(1, count + 1, max(1, count // 6)), *promoted, *(at + 1 for at in promoted)):
        again, others, *_ = play(sweeping, monkeypatch, tmp_path / f"{at}", kind, at)
        assert sweeping.told(again) == wanted, f"killed at {at} of {count}"
        assert others.trained == runs.trained


def test_asha_stops_what_is_below_the_best_half_seen_at_its_rung() -> None:
    asha = judge("asha", 3, 2)
    for number in range(4):
        asha.add(number)
    assert [asha.hear(number, 0, value) for number, value in ((0, 0.5), (1, 0.4), (2, 0.6))] == ["go", "stop", "go"]
    # A later rung knows nothing of the values at the first one.
    assert asha.hear(2, 1, 0.1) == "go" and asha.hear(0, 1, 0.05) == "stop"
    assert asha.hear(3, 0, 0.45) == "stop"
    assert asha.promoted(True) is None and asha.dropped() == []


def hyperband(values: Callable[[int, int], float], rungs: int = 3) -> tuple[TuneJudge, list[tuple[int, int, str]]]:
    """Plays one full bracket of four trials: all come to the first rung before any goes on."""
    band, heard = judge("hyperband", rungs, 2), []
    for number in range(4):
        band.add(number)
        heard.append((number, 0, band.hear(number, 0, values(number, 0))))
    return band, heard


def test_hyperband_pauses_until_its_bracket_is_full_and_promotes_the_best() -> None:
    band, heard = hyperband(lambda number, rung: [0.1, 0.4, 0.3, 0.2][number])
    assert [decision for _, _, decision in heard[:3]] == ["pause"] * 3
    last = heard[3][2]
    promoted = []
    while (number := band.promoted(True)) is not None:
        promoted.append(number)
    alive = set(promoted) | ({3} if last == "go" else set())
    assert alive == {1, 2} and last == "stop" and set(band.dropped()) == {0}


def test_a_hyperband_sweep_runs_each_trial_to_one_rung_after_another(
    sweeping: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    desk, runs, *_ = play(sweeping, monkeypatch, tmp_path, "hyperband", wanted=20, slots=3)
    trials = desk.search.trials
    assert all(trial.state in ("complete", "pruned") for trial in trials) and not desk.search.paused
    assert any(trial.promotions for trial in trials)
    for trial in trials:
        reached = runs.progress[trial.runs["0"]]
        assert reached == (100 if trial.state == "complete" else trial.rungs[-1].step)
    # No step was trained twice: a promoted trial went on from where it had paused.
    assert runs.trained == sum(runs.progress.values())


def test_one_rung_is_too_few() -> None:
    with pytest.raises(ValueError, match="--scheduler asha: stops trials at rungs, and the sweep has one"):
        judge("asha", 1, 2)
