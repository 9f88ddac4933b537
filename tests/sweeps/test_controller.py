"""A sweep's decisions on formulas: killed anywhere it goes on as if undisturbed; what is stopped, shared, left out."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest

from viladiff.sweeps import controller as search_module
from viladiff.sweeps.space import Dimension
from viladiff.sweeps.trials import SeedStatistics, Trial, load_trials, ranked, save_trial


class Deaths:
    """Kills the driver before or after the k-th thing that lasts."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0

    def __call__(self, what: str = "") -> None:
        self.count += 1
        if self.count == self.at:
            raise KillError


class KillError(BaseException):
    """Not an Exception, as a kill is none."""


def play(
    sweeping: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    pruner: str,
    kill_at: int | None = None,
    wanted: int = 9,
    **more: Any,
) -> tuple[Any, Any, int]:
    """Drives a sweep to its end, over at most one death; returns the last queue, the runs, and how much there was."""
    runs = sweeping.Runs(root, sweeping.bowl)
    deaths = Deaths(kill_at)

    def saved(trial: Trial, directory: Path) -> None:
        deaths()
        save_trial(trial, directory)
        deaths()

    monkeypatch.setattr(search_module, "save_trial", saved)
    for _ in range(2):
        try:
            queue = sweeping.opened(root, runs, wanted, pruner=pruner, **more)
            sweeping.drive(queue, runs, deaths)
            return queue, runs, deaths.count
        except KillError:
            continue
    raise AssertionError("it was killed twice")


@pytest.mark.parametrize(
    ("kind", "pruner"),
    [("tpe", "asha"), ("tpe", "hyperband"), ("random", "none"), ("grid", "median"), ("cmaes", "none"), ("tpe", "none")],
)
def test_killed_anywhere_it_equals_the_undisturbed_sweep(
    sweeping: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, pruner: str
) -> None:
    """Sequential: points, values, rungs, ends, and what Optuna's study says."""
    size = 16 if kind == "tpe" else 9  # TPE's first ten are drawn at random
    queue, runs, count = play(sweeping, monkeypatch, tmp_path / "whole", pruner, kind=kind, wanted=size)
    wanted, trained = sweeping.told(queue), runs.trained
    assert len(wanted) == size and len({repr(trial["point"]) for trial in wanted}) > 3
    for at in range(1, count + 1, max(1, count // 6)):
        queue, runs, _ = play(sweeping, monkeypatch, tmp_path / f"{at}", pruner, at, kind=kind, wanted=size)
        assert sweeping.told(queue) == wanted, f"killed at {at} of {count}"
        assert runs.trained == trained
        assert study(queue) == study_of(wanted)


def study(queue: Any) -> list[tuple[str, Any, Any]]:
    return said(optuna.load_study(study_name="sweep", storage=queue.search.asker.storage))


def said(theirs: optuna.Study) -> list[tuple[str, Any, Any]]:
    return [(one.state.name, one.values and one.values[0], one.intermediate_values) for one in theirs.trials]


def study_of(trials: list[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
    """What the study of these records must say."""
    names = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL", "running": "RUNNING"}
    found = []
    for raw in trials:
        trial = Trial.model_validate(raw)
        value = trial.rungs[-1].value if trial.state == "pruned" else trial.value
        found.append((names[trial.state], value, {rung.step: rung.value for rung in trial.rungs}))
    return found


def test_the_papers_value_comes_first_and_more_trials_go_on(sweeping: ModuleType, tmp_path: Path) -> None:
    whole, parts = sweeping.Runs(tmp_path / "w", sweeping.bowl), sweeping.Runs(tmp_path / "p", sweeping.bowl)
    queue = sweeping.opened(tmp_path / "w", whole, 14)
    sweeping.drive(queue, whole)
    assert queue.search.trials[0].point == sweeping.FIRST and queue.search.trials[0].origin == "paper"
    for wanted in (5, 14):
        again = sweeping.opened(tmp_path / "p", parts, wanted)
        sweeping.drive(again, parts)
        assert len(again.search.trials) == wanted
    assert sweeping.told(again) == sweeping.told(queue)


def test_listed_points_come_after_the_papers_and_before_those_drawn(sweeping: ModuleType, tmp_path: Path) -> None:
    points = [{"a": 0.25, "b": 2}, {"a": 0.75, "b": 9}]
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    queue = sweeping.opened(tmp_path, runs, 4, points=points)
    sweeping.drive(queue, runs)
    trials = queue.search.trials
    assert [trial.origin for trial in trials] == ["paper", "listed", "listed", "tpe"]
    assert [trial.point for trial in trials[:3]] == [sweeping.FIRST, *points]
    again = sweeping.opened(tmp_path, runs, 5, points=points)
    sweeping.drive(again, runs)
    assert [trial.point for trial in again.search.trials[:4]] == [trial.point for trial in trials]


def test_a_wider_space_goes_on_in_the_same_study(sweeping: ModuleType, tmp_path: Path) -> None:
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    first, space = {"a": 0.5, "m": "x"}, {"a": sweeping.SPACE["a"], "m": Dimension(choices=("x", "y"))}
    score = lambda point, seed, step: 0.1 + 0.1 * point["a"]  # noqa: E731
    runs.score = score
    sweeping.drive(sweeping.opened(tmp_path, runs, 6, space=space, first=first), runs)
    wider = {"a": Dimension(low=0.01, high=9.0, log=True), "m": Dimension(choices=("w", "x", "y", "z"))}
    queue = sweeping.opened(tmp_path, runs, 30, space=wider, first=first)
    sweeping.drive(queue, runs)
    points = [trial.point for trial in queue.search.trials]
    assert len(points) == 30 and max(point["a"] for point in points[6:]) > 4
    assert {point["m"] for point in points[6:]} == {"w", "x", "y", "z"}


def test_a_stopped_trial_is_pruned_at_its_budget_and_has_no_value(
    sweeping: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    queue, runs, _ = play(sweeping, monkeypatch, tmp_path, "asha", wanted=20, kind="random")
    stopped = [trial for trial in queue.search.trials if trial.state == "pruned"]
    assert len(stopped) > 5
    frozen = optuna.load_study(study_name="sweep", storage=queue.search.asker.storage).trials
    for trial in stopped:
        assert trial.value is None and not trial.values and trial.rungs[-1].step < STEP_LAST
        assert f"stopped at step {trial.rungs[-1].step} of 100" == trial.reason
        assert frozen[trial.number].state.name == "PRUNED"
        assert frozen[trial.number].user_attrs["budget"] == trial.rungs[-1].step
        assert runs.progress[trial.runs["0"]] == trial.rungs[-1].step
        assert all(run not in runs.progress for seed, run in trial.runs.items() if seed != "0")
    assert not {trial.number for trial in stopped} & {trial.number for trial in ranked(queue.search.trials)}


STEP_LAST = 100


def test_other_seeds_are_left_out_where_the_first_decide(sweeping: ModuleType, tmp_path: Path) -> None:
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    queue = sweeping.opened(tmp_path, runs, 20, kind="random")
    sweeping.drive(queue, runs)
    fewer = [trial for trial in queue.search.trials if len(trial.values) < 3]
    assert fewer and all("standard errors" in trial.reason for trial in fewer)
    best = ranked(queue.search.trials)[0]
    assert len(best.values) == 3 and all(trial.value < best.value for trial in fewer)


def test_what_is_left_out_follows_the_formula() -> None:
    tally = SeedStatistics()

    def done(number: int, *values: float) -> Trial:
        scores = {str(i): value for i, value in enumerate(values)}
        return Trial(number=number, point={}, runs=dict.fromkeys(scores, "r"), order=1, state="complete", values=scores)

    tally.add(done(0, 0.50, 0.52, 0.54))
    assert tally.decided([0.1]) == "", "2 degrees of freedom are too few"
    tally.add(done(1, 0.30, 0.32, 0.34))
    # sd = 0.02; one seed against three: 2 * 0.02 * sqrt(4 / 3) = 0.0462 below 0.52
    assert tally.decided([0.4739]) == "" and "trial 0" in tally.decided([0.4737])
    # two seeds against three: 2 * 0.02 * sqrt(5 / 6) = 0.0365
    assert tally.decided([0.48, 0.4872]) == "" and tally.decided([0.48, 0.4868])
    assert tally.decided([]) == ""


def test_equal_points_share_their_runs(sweeping: ModuleType, tmp_path: Path) -> None:
    runs = sweeping.Runs(tmp_path, lambda point, seed, step: 0.1 + (point["m"] == "y") * 0.1 + 0.001 * seed)
    first, space = {"m": "x"}, {"m": Dimension(choices=("x", "y"))}
    queue = sweeping.opened(tmp_path, runs, 12, kind="random", first=first, space=space, slots=4)
    sweeping.drive(queue, runs)
    trials = queue.search.trials
    assert len(trials) == 12 and all(trial.state == "complete" for trial in trials)
    assert len(runs.records) <= 6 and sum(trial.twin is None for trial in trials) == 2
    assert {trial.value for trial in trials if trial.point["m"] == "y"} == {ranked(trials)[0].value}
    assert len(ranked(trials)) == 2


def test_failures_are_recorded_and_the_sweep_goes_on(sweeping: ModuleType, tmp_path: Path) -> None:
    def score(point: dict[str, Any], seed: int, step: int) -> float:
        if point["b"] == 3:
            return float("nan")
        return -1.0 if point["b"] == 7 and seed == 1 else 0.5 + 0.001 * seed

    runs = sweeping.Runs(tmp_path, score)
    queue = sweeping.opened(tmp_path, runs, 40, kind="random")
    sweeping.drive(queue, runs)
    trials = queue.search.trials
    bad = [trial for trial in trials if trial.state == "failed"]
    assert len(trials) == 40 and {trial.point["b"] for trial in bad} == {3, 7}
    assert all(trial.reason.startswith("seed 0: nan") for trial in bad if trial.point["b"] == 3)
    assert all(trial.reason == "seed 1: error: value -1.0" for trial in bad if trial.point["b"] == 7)
    assert not queue.search.hopeless and study(queue) == study_of(sweeping.told(queue))


def test_when_all_fail_it_ends_with_the_first_traceback(sweeping: ModuleType, tmp_path: Path) -> None:
    runs = sweeping.Runs(tmp_path, lambda point, seed, step: -1.0)
    job = sweeping.planned(sweeping.FIRST, 0)
    (tmp_path / job.run_id).mkdir()
    (tmp_path / job.run_id / "traceback.txt").write_text("Traceback\nKeyError: 'lam'\n")
    queue = sweeping.opened(tmp_path, runs, 40, kind="random")
    sweeping.drive(queue, runs)
    assert len(queue.search.trials) == 3
    assert "the first 3 trials all failed" in queue.search.hopeless and "KeyError: 'lam'" in queue.search.hopeless
    runs.score = sweeping.bowl  # mended: the next call goes on
    again = sweeping.opened(tmp_path, runs, 8, kind="random")
    sweeping.drive(again, runs)
    assert [trial.state for trial in again.search.trials] == ["failed"] * 3 + ["complete"] * 5


def test_many_at_once(sweeping: ModuleType, tmp_path: Path) -> None:
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    queue = sweeping.opened(tmp_path, runs, 100, pruner="asha", kind="random", slots=64)
    sweeping.drive(queue, runs)
    assert len({repr(trial.point) for trial in queue.search.trials}) == 100
    assert all(trial.state in ("complete", "pruned") for trial in queue.search.trials)


def test_grid_ends_when_every_point_was_tried(sweeping: ModuleType, tmp_path: Path) -> None:
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    space = {"a": Dimension(choices=(0.1, 0.5)), "b": Dimension(low=2, high=6, step=2)}
    queue = sweeping.opened(tmp_path, runs, 40, kind="grid", space=space, first={"a": 0.5, "b": 4})
    sweeping.drive(queue, runs)
    points = [(trial.point["a"], trial.point["b"]) for trial in queue.search.trials]
    assert points[0] == (0.5, 4) and sorted(points) == sorted(itertools.product((0.1, 0.5), (2, 4, 6)))


def test_cmaes_improves_and_says_what_it_cannot_search(sweeping: ModuleType, tmp_path: Path) -> None:
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    first = {"a": 3.0, "b": 1}
    queue = sweeping.opened(tmp_path, runs, 60, kind="cmaes", first=first)
    sweeping.drive(queue, runs)
    losses = [abs(trial.point["a"] - 0.5) / 4 + (trial.point["b"] - 6) ** 2 / 100 for trial in queue.search.trials]
    assert sum(losses[-12:]) < 0.4 * sum(losses[1:13])
    with pytest.raises(ValueError, match=r"--sampler cmaes: .*m has choices; use tpe"):
        space = {"a": sweeping.SPACE["a"], "m": Dimension(choices=("x", "y"))}
        sweeping.opened(tmp_path / "other", runs, 3, kind="cmaes", space=space, first={"a": 1.0, "m": "x"})


def test_gp_draws_the_same_again(sweeping: ModuleType, tmp_path: Path) -> None:
    points = []
    for name, parts in (("whole", (12,)), ("parts", (11, 12))):
        runs = sweeping.Runs(tmp_path / name, sweeping.bowl)
        for wanted in parts:
            queue = sweeping.opened(tmp_path / name, runs, wanted, "gp", seeds=(0,))
            sweeping.drive(queue, runs)
        points.append(sweeping.told(queue))
    assert points[0] == points[1] and points[0][11]["origin"] == "gp"


def test_optunas_dashboard_opens_the_study(sweeping: ModuleType, tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    sweeping.drive(sweeping.opened(tmp_path, runs, 5, pruner="asha"), runs)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.journal"))
    app = dashboard.wsgi(optuna.storages.JournalStorage(backend))
    heard: list[str] = []
    request = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/api/studies",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr,
    }
    body = b"".join(app(request, lambda status, headers, *rest: heard.append(status)))
    assert heard[0].startswith("200") and json.loads(body)["study_summaries"][0]["study_name"] == "sweep"


def test_a_torn_or_lost_study_is_made_anew_and_a_foreign_one_left_alone(sweeping: ModuleType, tmp_path: Path) -> None:
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    sweeping.drive(queue := sweeping.opened(tmp_path, runs, 5), runs)
    wanted, journal = sweeping.told(queue), tmp_path / "optuna.journal"
    half = lambda: journal.write_bytes(journal.read_bytes().replace(b'"op_code"', b"\n", 5))  # noqa: E731
    for damage in (lambda: journal.write_bytes(journal.read_bytes()[:-20]), half, journal.unlink):
        damage()
        again = sweeping.opened(tmp_path, runs, 5)
        assert again.search.next_runs() == [] and sweeping.told(again) == wanted and study(again) == study_of(wanted)
    url = f"sqlite:///{tmp_path / 'other.db'}"
    sweeping.drive(there := sweeping.opened(tmp_path, runs, 6, storage=url), runs)
    assert study(there) == study_of(sweeping.told(there)) and len(study(there)) == 6
    optuna.create_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'theirs.db'}")
    with pytest.raises(ValueError, match=r"theirs.db: holds a study 'sweep' that was not made by viladiff"):
        sweeping.opened(tmp_path, runs, 6, storage=f"sqlite:///{tmp_path / 'theirs.db'}")
    with pytest.raises(ValueError, match="Optuna cannot keep its study there") as found:
        sweeping.opened(tmp_path, runs, 6, storage="sqlite:////nowhere/at/all.db")
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("kind", ["tpe", "random", "grid"])
def test_a_point_is_one_write_to_the_journal(sweeping: ModuleType, tmp_path: Path, kind: str) -> None:
    """Each write waits for the disk, and a suggestion of 13 parameters would wait 14 times."""
    runs, journal = sweeping.Runs(tmp_path, sweeping.bowl), tmp_path / "optuna.journal"
    sweeping.drive(sweeping.opened(tmp_path, runs, 11, kind, seeds=(0,)), runs)
    queue = sweeping.opened(tmp_path, runs, 12, kind, seeds=(0,))
    before = journal.read_bytes().count(b"\n")
    assert queue.next_job() is not None and journal.read_bytes().count(b"\n") == before + 1
    stored = optuna.load_study(study_name="sweep", storage=queue.search.asker.storage).trials[11]
    assert stored.state.name == "RUNNING" and stored.params == queue.search.trials[11].point


def test_a_journal_with_a_study_of_somebody_else_is_left_alone(sweeping: ModuleType, tmp_path: Path) -> None:
    journal = tmp_path / "optuna.journal"
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    optuna.create_study(study_name="thesis", storage=optuna.storages.JournalStorage(backend))
    before = journal.read_bytes()
    with pytest.raises(ValueError, match=r"optuna.journal: holds a study 'thesis' .* not made by viladiff; move the"):
        sweeping.opened(tmp_path, sweeping.Runs(tmp_path, sweeping.bowl), 6)
    assert journal.read_bytes() == before


def test_records_that_are_damaged_or_missing_are_named(sweeping: ModuleType, tmp_path: Path) -> None:
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    sweeping.drive(sweeping.opened(tmp_path, runs, 4), runs)
    path = tmp_path / "trials" / "000002.json"
    sound = path.read_text()
    path.write_text(sound.replace('"complete"', '"pruned"'))
    with pytest.raises(ValueError, match=r"000002.json: not a trial's record, or damaged \(its checksum"):
        load_trials(tmp_path / "trials")
    path.unlink()
    with pytest.raises(ValueError, match=r"000002.json: missing, though 000003.json is there"):
        load_trials(tmp_path / "trials")
    path.write_text(sound)
    assert len(load_trials(tmp_path / "trials")) == 4


def test_a_run_of_another_name_than_recorded_is_refused(
    sweeping: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    queue = sweeping.opened(tmp_path, runs, 1)
    assert queue.search.next_runs()
    again = sweeping.opened(tmp_path, runs, 2)
    again.search.planned = lambda point, seed, title="": sweeping.planned({**point, "c": 1}, seed, title)
    with pytest.raises(ValueError, match="code, data or weights changed"):
        again.search.next_runs()


def test_a_trial_that_takes_too_long_is_ended_once(sweeping: ModuleType, tmp_path: Path) -> None:
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    queue = sweeping.opened(tmp_path, runs, 2)
    queue.timeout = 10.0
    job = queue.next_job()
    queue.on_started(job.run_id)
    queue.on_progress(job.run_id, {"node": "n", "pid": 1})
    assert list(queue.poll()) == []
    queue.clock += 11
    queue.live[job.run_id].heard = queue.clock
    assert list(queue.poll()) == [(job.run_id, ("n", 1))]
    (tmp_path / job.run_id).mkdir()
    queue.on_worker_died(job.run_id, "its process died")
    trial = queue.search.trials[0]
    assert trial.state == "failed" and trial.reason == "seed 0: hang: longer than --trial-timeout 10 s"


def test_optuna_itself_reads_the_journal(sweeping: ModuleType, tmp_path: Path) -> None:
    """With its own reader and lock, as anybody would open it beside a sweep."""
    runs = sweeping.Runs(tmp_path, sweeping.bowl)
    sweeping.drive(queue := sweeping.opened(tmp_path, runs, 9, pruner="asha"), runs)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.journal"))
    theirs = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    assert said(theirs) == study_of(sweeping.told(queue))
    assert theirs.best_trial.number == ranked(queue.search.trials)[0].number
    assert [trial.params for trial in theirs.trials] == [trial.point for trial in queue.search.trials]
