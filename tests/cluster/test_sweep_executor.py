"""Sweeps on a real Ray: the same decisions as without it, deaths of processes and of drivers, stopped trainers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from run_kit import alive

from viladiff.cluster.sweep_executor import run_search
from viladiff.core.watchdog import descendants
from viladiff.sweeps.space import Dimension

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
TRAINERS = int(os.environ.get("VILADIFF_TRAINERS", "4"))
"""Trials of two workers in one sweep; the aim is told of 20."""

DRIVER = """
import importlib.util, json, sys
from pathlib import Path
from viladiff.cluster.sweep_executor import run_search
spec = importlib.util.spec_from_file_location("sweeping", sys.argv[1])
sweeping = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweeping)
root, wanted = Path(sys.argv[2]), int(sys.argv[3])
runs = sweeping.Files(root, sweeping.bowl)
queue = sweeping.opened(root, runs, wanted, "tpe", "asha")
run_search(queue, sweeping.work)
print("done", flush=True)
"""


def test_ray_decides_what_formulas_do_and_records_deaths(sweeping: ModuleType, tmp_path: Path) -> None:
    """A sequential sweep with ASHA: a run that fails is recorded, one whose process is killed is run again."""
    ray, plain = sweeping.Files(tmp_path / "ray", sweeping.bowl), sweeping.Runs(tmp_path / "plain", bad(sweeping))
    queue = sweeping.opened(tmp_path / "ray", ray, 14, "random", "asha")
    run_search(queue, sweeping.work)
    other = sweeping.opened(tmp_path / "plain", plain, 14, "random", "asha")
    sweeping.drive(other, plain)
    found, wanted = sweeping.told(queue), sweeping.told(other)
    for one in (*found, *wanted):
        one.pop("reason")
    assert found == wanted
    states = {trial["state"] for trial in found}
    assert states == {"complete", "pruned", "failed"}
    killed = [trial for trial in found if trial["point"]["b"] == 7]
    assert killed and all(trial["state"] != "failed" for trial in killed)
    assert any(path.name == "killed" for path in (tmp_path / "ray").glob("*/killed"))
    reasons = [trial.reason for trial in queue.search.trials if trial.state == "failed"]
    assert reasons and all(reason == "seed 0: nan: the loss is nan" for reason in reasons)


def bad(sweeping: ModuleType) -> Any:
    """The formula, not a number where a process would say so."""

    def score(point: dict[str, Any], seed: int, step: int) -> float:
        return float("nan") if point["b"] == 3 else float(sweeping.bowl(point, seed, step))

    return score


@pytest.mark.slow
def test_a_run_that_stands_still_is_ended_tried_again_and_recorded(sweeping: ModuleType, tmp_path: Path) -> None:
    """A process that is stopped cannot answer, whatever it was at: the driver ends it. What hangs twice has failed."""
    work = sweeping.work

    def standing(job: Any, place: Any, tell: Any, judged: Any) -> Any:
        """Stops its process before it begins: the first time at ``b`` = 6, every time at ``b`` = 5."""
        import ray

        directory, b = Path(place.root) / job.run_id, job.changes["b"]
        directory.mkdir(parents=True, exist_ok=True)
        tell({"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()})
        hung = directory / "hung"
        if b == 5 or (b == 6 and not hung.exists()):
            with hung.open("a") as file:
                file.write(f"{os.getpid()} ")
            os.kill(os.getpid(), signal.SIGSTOP)
        return work(job, SimpleNamespace(root=place.root), lambda news: None, judged)

    runs = sweeping.Files(tmp_path, sweeping.bowl)
    space = {"a": Dimension(choices=(0.5, 0.7)), "b": Dimension(low=5, high=9, step=1)}
    queue = sweeping.opened(tmp_path, runs, 3, "grid", space=space, first={"a": 0.5, "b": 6}, seeds=(0,))
    queue.settings = replace(queue.settings, stall_timeout=3.0)
    run_search(queue, standing)
    trials = queue.search.trials
    assert [trial.point["b"] for trial in trials] == [6, 5, 7]
    hung = [tmp_path / trial.runs["0"] / "hung" for trial in trials]
    pids = [[int(word) for word in path.read_text().split()] for path in hung[:2]]
    assert [len(set(some)) for some in pids] == [1, 2] and not hung[2].exists()
    assert [trial.state for trial in trials] == ["complete", "failed", "complete"], "the sweep goes on"
    assert trials[1].reason.startswith("seed 0: hang: no sign of life for 3 s")
    assert alive([pid for some in pids for pid in some]) == []


@pytest.mark.slow
def test_ten_kills_of_the_driver_change_nothing_and_leave_nothing(sweeping: ModuleType, tmp_path: Path) -> None:
    plain = sweeping.Runs(tmp_path / "plain", bad(sweeping))
    other = sweeping.opened(tmp_path / "plain", plain, 30, "tpe", "asha")
    sweeping.drive(other, plain)
    wanted, root, drawn, kills = sweeping.told(other), tmp_path / "ray", random.Random(5), 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(ROOT / "tests" / "sweeping.py"), str(root), "30"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        if kills < 10:
            # After so many more writes of trials, and a moment.
            before = stamps(root)
            until = time.monotonic() + 300
            while process.poll() is None and stamps(root) < before + drawn.randint(1, 5) and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(drawn.random() * 0.05)
            children = descendants(process.pid)
            process.kill()
            process.wait()
            kills += 1
            until = time.monotonic() + 60
            while alive(children) and time.monotonic() < until:
                time.sleep(0.1)
            assert alive(children) == []
            continue
        assert process.wait(600) == 0
        break
    runs = sweeping.Files(root, sweeping.bowl)
    again = sweeping.opened(root, runs, 30, "tpe", "asha")
    found = sweeping.told(again)
    for one in (*found, *wanted):
        one.pop("reason")
    assert found == wanted
    trained = [path.read_text().split() for path in root.glob("*/trained")]
    assert all(steps == sorted(set(steps), key=int) for steps in trained), "no step of a run is done twice"
    assert [path for path in root.rglob("lease-*.json")] == []


def stamps(root: Path) -> int:
    """How often trials have been written, roughly: rungs and ends that are on disk."""
    total = 0
    for path in (root / "trials").glob("*.json"):
        try:
            trial = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        total += 1 + len(trial["rungs"]) + len(trial["values"]) + (trial["ended"] is not None)
    return total


@pytest.mark.slow
def test_a_sweep_from_its_command_to_its_verdict(tmp_path: Path) -> None:
    """Real runs: search, stop, resume after Ctrl-C, finals, and nothing to do the second time."""
    words = [sys.executable, str(ROOT / "tune" / "sweep_lambda.py"), "--scale", "smoke", "--trials", "4"]
    words += ["--early-stopping", "asha", "--runs-dir", str(tmp_path / "runs"), "--report-dir", str(tmp_path / "page")]
    words += ["--", "method.mixe.timesteps=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("trial 0:"):
            process.send_signal(signal.SIGINT)
            break
    process.stdout.read()
    assert process.wait(300) == 130
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert (
        "4 of 4 trials" in done.stdout and "over 5 of 5 fresh seeds" in done.stdout and "viladiff train" in done.stdout
    )
    again = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "trial 3:" not in again.stdout
    assert done.stdout.split("trials: ")[1] == again.stdout.split("trials: ")[1]


@pytest.mark.slow
@pytest.mark.timeout(300 + 180 * TRAINERS)
def test_trainers_of_two_workers_are_stopped_without_leaks(tmp_path: Path) -> None:
    """TorchTrainer trials, half of them stopped at a rung; a leaked placement group would hang the next one."""
    from optuna.pruners import BasePruner

    from viladiff.runs.job import ExecutionSettings
    from viladiff.runs.store import Store
    from viladiff.sweeps.controller import SweepController
    from viladiff.sweeps.optuna_study import OptunaStudy
    from viladiff.sweeps.spec import SweepPlanner, load_sweep
    from viladiff.sweeps.trial_queue import TrialQueue

    class Every(BasePruner):
        """Stops every other trial at its first rung."""

        def prune(self, study: Any, trial: Any) -> bool:
            return bool(trial.number % 2)

    sweep = load_sweep(ROOT / "tune" / "sweep_lambda.toml")
    typed = {"method.name": "semibaseline", "data.batch_labelled": "4", "eval.max_images": "8"}
    sweep = sweep.model_validate_json(
        sweep.model_dump_json()
        .replace("method.vila.lam", "method.pseudo.threshold")
        .replace('"high":2.0', '"high":0.99')
    )
    namer = SweepPlanner(sweep, "smoke", typed, "holdout", workers=2)
    store = Store(tmp_path / "runs")
    (tmp_path / "trials").mkdir()
    asker = OptunaStudy(
        "s", sweep.space, [sweep.initial_point], "random", 0, False, str(tmp_path / "optuna.journal"), Every()
    )
    search = SweepController(tmp_path / "trials", asker, namer.planned, (0,), namer.steps, TRAINERS, store)
    queue = TrialQueue(search, store, ExecutionSettings(gpus_per_trial=0.0), 1)
    run_search(queue)
    assert [trial.state for trial in search.trials] == ["complete", "pruned"] * (TRAINERS // 2)
    assert all(trial.rungs[-1].step == (1 if trial.number % 2 else 4) for trial in search.trials)
