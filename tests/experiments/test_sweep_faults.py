"""A sweep's command where things go wrong: what it says, that nothing was trained, and that it goes on afterwards.

Training is made up, and handed out without Ray; ``test_sweep_executor`` has processes that die.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_sweep_page import record_of

from viladiff.cli import sweeps as sweep_options
from viladiff.cluster import sweep_executor
from viladiff.experiments import sweeps
from viladiff.runs.record import save_record
from viladiff.sweeps import controller as search_module
from viladiff.sweeps.trial_queue import TrialQueue
from viladiff.sweeps.trials import Trial, load_trials, save_trial

pytestmark = pytest.mark.usefixtures("prints_once")
TUNE = Path(__file__).resolve().parents[2] / "tune"


class Played:
    """Stands in for Ray: each run is a number, or an error with a traceback."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.bad: Callable[[dict[str, Any]], bool] = lambda changes: False

    def __call__(self, queue: TrialQueue) -> None:
        queue.prime()
        while not queue.done:
            run = queue.next_job()
            if run is None:
                assert queue.done
                return
            queue.on_started(run.run_id)
            self.runs.append(run.run_id)
            directory = queue.store.directory(run.run_id)
            directory.mkdir(parents=True, exist_ok=True)
            if self.bad(run.changes):
                (directory / "traceback.txt").write_text("Traceback (most recent call last):\nKeyError: 'lam'\n")
                queue.on_result(run.run_id, {"state": "failed", "kind": "error", "message": "KeyError: 'lam'"})
                continue
            made = record_of(run, 0.5 - 0.1 * abs(float(str(run.changes["method.vila.lam"])) - 0.6))
            save_record(made, directory / "record.json")
            queue.on_result(run.run_id, {"state": "done", "miou": made.miou})


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    found = Played()
    monkeypatch.setattr(sweep_executor, "run_search", found)
    return found


def sweep(root: Path, *words: str) -> int:
    given = [
        "--scale",
        "smoke",
        "--sampler",
        "random",
        "--runs-dir",
        str(root / "runs"),
        "--report-dir",
        str(root / "page"),
    ]
    return sweep_options.main(TUNE / "sweep_lambda.toml", [*given, *words])


def trials_in(root: Path) -> list[Trial]:
    return load_trials(root / "runs" / "sweeps" / "lambda-smoke" / "trials")


def test_when_all_fail_the_command_ends_with_the_first_traceback(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    played.bad = lambda changes: True
    assert sweep(tmp_path, "--trials", "12") == 1
    error = capsys.readouterr().err
    assert "given up: the first 3 trials all failed" in error and error.count("KeyError: 'lam'") >= 1
    assert "Traceback (most recent call last):" in error and len(trials_in(tmp_path)) == 3
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Given up:</b> the first 3 trials all failed" in page and "failed: seed 0: error: KeyError" in page
    played.bad = lambda changes: False
    assert sweep(tmp_path, "--trials", "5", "--no-finals") == 0, "what was mended goes on"
    assert [trial.state for trial in trials_in(tmp_path)] == ["failed"] * 3 + ["complete"] * 2


def test_some_that_fail_are_recorded_and_the_best_is_quoted(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    played.bad = lambda changes: 0.2 < float(str(changes["method.vila.lam"])) < 0.45
    assert sweep(tmp_path, "--trials", "12") == 0
    out = capsys.readouterr().out
    trials = trials_in(tmp_path)
    failed = [trial for trial in trials if trial.state == "failed"]
    assert len(trials) == 12 and failed and all(0.2 < float(trial.point["method.vila.lam"]) < 0.45 for trial in failed)
    assert all(trial.reason == "seed 0: error: KeyError: 'lam'" for trial in failed)
    assert f"{12 - len(failed)} complete, {len(failed)} failed" in out and "over 5 of 5 fresh seeds" in out
    before = len(played.runs)
    assert sweep(tmp_path, "--trials", "12") == 0 and len(played.runs) == before, "nothing to do the second time"
    assert sweep(tmp_path, "--trials", "12", "--render") == 0
    assert f"{12 - len(failed)} trials complete" in (tmp_path / "page" / "index.html").read_text()


def test_a_disk_that_fills_up_is_named_and_the_sweep_goes_on_as_if_it_had_not(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "whole", "--trials", "5", "--no-finals") == 0
    written = 0

    def filling(trial: Trial, directory: Path) -> None:
        nonlocal written
        written += 1
        if written == 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(directory / f"{trial.number:06}.json"))
        save_trial(trial, directory)

    with monkeypatch.context() as patch:
        patch.setattr(search_module, "save_trial", filling)
        capsys.readouterr()
        assert sweep(tmp_path, "--trials", "5", "--no-finals") == 2
    error = capsys.readouterr().err
    assert "error: [Errno 28] No space left on device: " in error and "00000" in error and "Traceback" not in error
    assert sweep(tmp_path, "--trials", "5", "--no-finals") == 0
    assert trials_in(tmp_path) == trials_in(tmp_path / "whole")


@pytest.mark.parametrize(
    "url",
    ["sqlite:////nowhere/at/all.db", "postgresql://nobody:secret@127.0.0.1:9/none", "redis://:secret@127.0.0.1:9"],
)
def test_a_database_out_of_reach_is_said_before_any_training(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert sweep(tmp_path, "--database", url) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Optuna cannot keep its study there" in error and "Traceback" not in error
    assert "secret" not in error and played.runs == []


def test_a_misspelt_space_is_said_before_any_training(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (TUNE / "sweep_lambda.toml").read_text().replace("method.vila.lam", "method.vila.lan")
    (tmp_path / "sweep_lambda.toml").write_text(text)
    assert (
        sweep_options.main(tmp_path / "sweep_lambda.toml", ["--scale", "smoke", "--runs-dir", str(tmp_path / "runs")])
        == 2
    )
    assert "did you mean 'method.vila.lam'" in capsys.readouterr().err and played.runs == []
    assert not (tmp_path / "runs").exists()


def test_two_sweeps_of_other_spaces_do_not_mix(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, "--trials", "1", "--no-finals") == 0
    before = len(played.runs)
    assert sweep(tmp_path, "--trials", "2", "--", "method.mixe.timesteps=2") == 2
    assert "is another sweep: fields was" in capsys.readouterr().err and len(played.runs) == before
    assert sweep(tmp_path, "--render", "--", "method.mixe.timesteps=2") == 2
    assert "is another sweep: fields was" in capsys.readouterr().err


def test_the_page_is_rewritten_as_trials_end(played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that the thread which writes it is woken; here it writes at once."""
    seen: list[str] = []

    class AtOnce:
        def __init__(self, write: Callable[[], Path]) -> None:
            self.dirty = SimpleNamespace(set=lambda: seen.append(write().read_text()))

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(sweeps, "PageWriter", AtOnce)
    assert sweep(tmp_path, "--trials", "3", "--no-finals") == 0
    counts = [int(found[1]) for page in seen if (found := re.search(r"(\d) of 3 trials have ended; this page", page))]
    assert counts == sorted(counts) and {1, 2} <= set(counts)
    assert "this page is rewritten" not in (tmp_path / "page" / "index.html").read_text()


def test_a_driver_that_was_taken_over_writes_nothing_more(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was silent, another machine removed its lease and brought the sweep to its end; then it wakes up."""
    directory = tmp_path / "runs" / "sweeps" / "lambda-smoke"

    def silent(queue: TrialQueue) -> None:
        run = queue.next_job()
        assert run is not None
        queue.on_started(run.run_id)
        (lease,) = directory.glob("lease-*.json")
        lease.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(sweep_executor, "run_search", played)
            assert sweep(tmp_path, "--trials", "2", "--no-finals") == 0
        queue.on_result(
            run.run_id, {"state": "failed", "kind": "error", "message": "another machine took this run over"}
        )

    monkeypatch.setattr(sweep_executor, "run_search", silent)
    assert sweep(tmp_path, "--trials", "3", "--no-finals") == 2
    assert f"error: {directory}: another machine took this over" in capsys.readouterr().err
    assert [trial.state for trial in trials_in(tmp_path)] == ["complete"] * 2, "its failure is not written over them"


@pytest.mark.parametrize("text", ["a user's own file\n", "without an end of line"])
def test_a_database_that_is_a_file_is_refused_and_left_as_it_is(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "mine.txt").write_text(text)
    assert sweep(tmp_path, "--database", str(tmp_path / "mine.txt")) == 2
    assert "mine.txt: must be a URL, such as sqlite:///" in capsys.readouterr().err and played.runs == []
    assert (tmp_path / "mine.txt").read_text() == text
