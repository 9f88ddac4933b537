"""Optuna's pruners at the rungs of a sweep: each rung judged once, as its rule says, and again alike after a kill."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import optuna
import pytest

from viladiff.sweeps import controller as search_module
from viladiff.sweeps.early_stopping import optuna_pruner, successive_halving_settings
from viladiff.sweeps.optuna_study import OptunaStudy
from viladiff.sweeps.trials import Rung, Trial, save_trial

STEPS = (25, 50, 100)


def verdicts(kind: Any, steps: tuple[int, ...], curves: list[list[float]], name: str = "s") -> list[list[bool]]:
    """What a new study's pruner says of one trial after another, at each rung until it stops it."""
    study = optuna.create_study(study_name=name, direction="maximize", pruner=optuna_pruner(kind, steps))
    found = []
    for curve in curves:
        trial, said = study.ask(), []
        for step, value in zip(steps[:-1], curve, strict=True):
            trial.report(value, step)
            said.append(trial.should_prune())
            if said[-1]:
                break
        study.tell(trial, curve[-1] if not said[-1] else None, state=None if not said[-1] else PRUNED)
        found.append(said)
    return found


PRUNED = optuna.trial.TrialState.PRUNED


def by_rule(curves: list[list[float]], factor: int) -> list[list[bool]]:
    """Asynchronous successive halving (Li et al., 2020) in straight lines: at a rung go on the best n // η of n."""
    seen: dict[int, list[float]] = {}
    found = []
    for curve in curves:
        said = []
        for rung, value in enumerate(curve):
            values = seen.setdefault(rung, [])
            values.append(value)
            best = sorted(values, reverse=True)[: max(1, len(values) // factor)]
            said.append(value < best[-1])
            if said[-1]:
                break
        found.append(said)
    return found


GEOMETRIC = {
    (25, 50, 100): (25, 2),
    (1, 2, 4): (1, 2),
    (150, 300, 600): (150, 2),
    (15000, 30000, 60000): (15000, 2),
    (66, 198, 600): (66, 3),
    (67, 200, 600): (66, 3),
    (2, 5, 10): (2, 2),
    (1, 10, 100, 1000): (1, 10),
    (60, 600): (60, 10),
}
"""Steps of rungs; smallest resource and factor, by hand."""


@pytest.mark.parametrize("steps", GEOMETRIC)
def test_asha_judges_each_rung_once_by_its_rule(steps: tuple[int, ...]) -> None:
    assert successive_halving_settings("asha", steps) == GEOMETRIC[steps]
    drawn = random.Random(1)
    curves = [[drawn.random() for _ in steps[:-1]] for _ in range(60)]
    assert verdicts("asha", steps, curves) == by_rule(curves, GEOMETRIC[steps][1])


@pytest.mark.parametrize("steps", [(50, 75, 100), (2, 3, 6), (25, 50, 60, 100)])
def test_rungs_that_successive_halving_would_skip_are_refused(steps: tuple[int, ...]) -> None:
    for kind in ("asha", "hyperband"):
        with pytest.raises(
            ValueError, match=rf"--early-stopping {kind}: rungs must grow by one factor .*\[{steps[0]}, "
        ):
            optuna_pruner(kind, steps)  # type: ignore[arg-type]
    assert isinstance(optuna_pruner("median", steps), optuna.pruners.MedianPruner)


def test_one_rung_is_too_few() -> None:
    for kind in ("asha", "hyperband", "median"):
        with pytest.raises(ValueError, match=f"--early-stopping {kind}: stops trials at rungs, and the sweep has one"):
            optuna_pruner(kind, (100,))  # type: ignore[arg-type]
    assert isinstance(optuna_pruner("none", (100,)), optuna.pruners.NopPruner)


@pytest.mark.parametrize("steps", [STEPS, (1, 10, 100, 1000), (1, 5, 25, 125)])
def test_hyperband_has_a_bracket_for_each_rung(steps: tuple[int, ...]) -> None:
    """Of trials that are worse and worse each bracket but the last stops its own at its first rung."""
    curves = [[1 - i / 1000] * (len(steps) - 1) for i in range(400)]
    said = verdicts("hyperband", steps, curves)[40:]
    assert {tuple(one) for one in said} == {
        *((False,) * rung + (True,) for rung in range(len(steps) - 1)),
        (False,) * (len(steps) - 1),
    }
    assert verdicts("hyperband", steps, curves)[40:] == said
    assert verdicts("hyperband", steps, curves, "t")[40:] != said, "a bracket follows from the study's name"


def test_median_stops_what_is_below_the_middle_of_complete_trials() -> None:
    curves = [[0.1 * i, 0.1 * i, 0.1 * i] for i in range(1, 6)]
    steps = (25, 50, 75, 100)
    assert verdicts("median", steps, [*curves, [0.29, 0.9, 0.9]])[5] == [True]
    assert verdicts("median", steps, [*curves, [0.31, 0.1, 0.9]])[5] == [False] * 3, "the best so far counts"
    assert verdicts("median", steps, [*curves[:4], [0.05, 0.9, 0.9]])[4] == [False] * 3, "five are to be complete"


def notes(queue: Any) -> list[Any]:
    """All that the study in memory has of each trial, the pruner's notes with it."""
    study = queue.search.asker.memory.study
    return [(one.state, one.values, one.intermediate_values, one.user_attrs, pruners_of(one)) for one in study.trials]


def pruners_of(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    return {name: value for name, value in trial.system_attrs.items() if not name.startswith("tpe:")}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("kind", ["asha", "hyperband", "median"])
def test_a_study_that_was_lost_is_replayed_with_the_pruners_notes(
    sweeping: ModuleType, tmp_path: Path, kind: str, sampler: str
) -> None:
    """Three runs at once, with trials that fail and some of equal points."""

    def score(point: dict[str, Any], seed: int, step: int) -> float:
        return float("nan") if point["b"] == 6 and step == 100 else float(sweeping.bowl({**point, "a": 0.5}, 0, step))

    runs = sweeping.Runs(tmp_path, score)
    space = {"a": sweeping.Dimension(choices=(0.4, 0.5, 0.6)), "b": sweeping.SPACE["b"]}
    given = {"kind": sampler, "pruner": kind, "slots": 3, "seeds": (0,), "space": space}
    sweeping.drive(queue := sweeping.opened(tmp_path, runs, 30, **given), runs)
    states = {trial.state for trial in queue.search.trials}
    assert states == {"complete", "pruned", "failed"}
    assert any(trial.twin is not None for trial in queue.search.trials)
    wanted = notes(queue)
    assert any(kept for *_, kept in wanted) == (kind != "median")
    (tmp_path / "optuna.journal").unlink()
    assert notes(sweeping.opened(tmp_path, runs, 30, **given)) == wanted


def test_a_twin_counts_once(sweeping: ModuleType, tmp_path: Path) -> None:
    """Of 0.4, 0.6 and 0.5 one goes on; with 0.4 once more two would."""
    trials = [
        Trial(
            number=number,
            point=sweeping.FIRST,
            runs={"0": "r"},
            order=10 * number + 1,
            rungs=[Rung(step=25, value=value, order=10 * number + 2)],
            twin=0 if number == 1 else None,
        )
        for number, value in enumerate((0.4, 0.4, 0.6, 0.5))
    ]
    pruner, journal = optuna_pruner("asha", STEPS), str(tmp_path / "optuna.journal")
    asker = OptunaStudy("s", sweeping.SPACE, [sweeping.FIRST], "random", 0, False, journal, pruner)
    asker.open(trials, STEPS[-1])
    assert asker.stopped == {3}


class KillError(BaseException):
    """Not an Exception, as a kill is none."""


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_was_finished_before_is_not_stopped(
    sweeping: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Another sweep or a table has trained it: its scores count at the rungs, but it is complete, after a kill too."""

    def never(study: Any, trial: Any) -> bool:
        return True

    pruner = type("Never", (optuna.pruners.BasePruner,), {"prune": staticmethod(never)})
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    for seed in sweeping.SEEDS:
        job = sweeping.planned(sweeping.FIRST, seed)
        history = [{"step": step, "miou": sweeping.bowl(sweeping.FIRST, seed, step)} for step in STEPS]
        runs.records[job.run_id] = SimpleNamespace(miou=history[-1]["miou"], history=history)
    queue = sweeping.opened(tmp_path, runs, 2, "random", pruner())
    if killed:
        writes = itertools.count()

        def saved(trial: Trial, directory: Path) -> None:
            save_trial(trial, directory)
            if next(writes) == 1:  # its point, then its scores
                raise KillError

        with monkeypatch.context() as patch:
            patch.setattr(search_module, "save_trial", saved)
            with pytest.raises(KillError):
                sweeping.drive(queue, runs)
        queue = sweeping.opened(tmp_path, runs, 2, "random", pruner())
    sweeping.drive(queue, runs)
    first, second = queue.search.trials
    assert first.state == "complete" and len(first.values) == 3 and [rung.step for rung in first.rungs] == [*STEPS]
    assert second.state == "pruned" and second.rungs[-1].step == 25


@pytest.mark.parametrize("finished", [False, True])
def test_a_trial_that_was_stopped_as_its_driver_died_stays_stopped(
    sweeping: ModuleType, tmp_path: Path, finished: bool
) -> None:
    """Unless its run came to its end all the same."""
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    queue = sweeping.opened(tmp_path, runs, 2, "random", "asha", seeds=(0,))
    for stopped in (False, True):
        job = queue.next_job()
        queue.on_started(job.run_id)
        assert queue.should_stop(job.run_id, 25, 0.4 if stopped else 0.5) is stopped
        if finished or not stopped:
            runs.records[job.run_id] = SimpleNamespace(miou=0.6, history=[])
            queue.on_result(job.run_id, {"state": "done", "began": 0.0, "ended": 0.0, "miou": 0.6})
    again = sweeping.opened(tmp_path, runs, 2, "random", "asha", seeds=(0,))
    assert again.search.next_runs() == []
    second = again.search.trials[1]
    assert (second.state, second.value) == (("complete", 0.6) if finished else ("pruned", None))
    assert finished or second.reason == "stopped at step 25 of 100"


def test_a_killed_drivers_lock_and_half_a_line_are_passed_over(sweeping: ModuleType, tmp_path: Path) -> None:
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    sweeping.drive(sweeping.opened(tmp_path, runs, 3, "random", "asha"), runs)
    journal = tmp_path / "optuna.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x"')  # of a point that was not written down yet
    (tmp_path / "optuna.journal.lock").touch()
    begun = time.monotonic()
    again = sweeping.opened(tmp_path, runs, 6, "random", "asha")
    assert again.search.next_runs() and time.monotonic() - begun < 25, "Optuna itself waits for 30 s"
    sweeping.drive(again := sweeping.opened(tmp_path, runs, 6, "random", "asha"), runs)
    assert len(again.search.trials) == 6 and not (tmp_path / "optuna.journal.lock").exists()
    whole = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    assert len(optuna.load_study(study_name="sweep", storage=whole).trials) == 6
