"""A table on a Ray that somebody else has started, which asks for a token."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from viladiff.runs.store import Store
from viladiff.sweeps.trials import load_trials

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import sys
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="CRITICAL", log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


class Head(NamedTuple):
    process: subprocess.Popen[str]
    address: str
    environment: dict[str, str]

    def table(self, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        words = ["--scale", "smoke", "--rows", "1", "8", "--columns", "1"]
        return self.call("ablations/run_table5.py", words, out, **environment)

    def call(self, script: str, words: list[str], out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        where = ["--address", self.address, "--runs-dir", str(out / "runs"), "--report-dir", str(out / "page")]
        command = [sys.executable, str(ROOT / script), *where, *words]
        env = self.environment | environment
        return subprocess.run(command, env=env, cwd=out, capture_output=True, text=True, timeout=800)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield Head(process, process.stdout.readline().strip(), environment)
    finally:
        process.stdin.close()
        process.wait(120)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_two_cells_on_a_cluster_with_a_token(head: Head, tmp_path: Path) -> None:
    stranger = head.table(tmp_path, RAY_AUTH_TOKEN="0" * 64)
    assert stranger.returncode == 2, stranger.stderr
    assert f"error: --address {head.address}: cannot be joined" in stranger.stderr
    assert "Traceback" not in stranger.stderr and not list(tmp_path.rglob("record.json"))
    done = head.table(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs done" in done.stdout and "no GPU in the cluster so far" in done.stderr
    records = Store(tmp_path / "runs").records().values()
    assert sorted(record.config["method.name"] for record in records) == ["semibaseline", "viladiff"]
    assert (tmp_path / "page" / "index.html").is_file()
    names = [path.name for path in (tmp_path / "runs").rglob("*")]
    assert [name for name in names if name.startswith("lease-") or name.endswith(".tmp")] == []
    assert head.process.poll() is None, "the cluster is not the driver's to end"
    again = head.table(tmp_path)
    assert again.returncode == 0 and "cluster" not in again.stderr, "nothing is left to run, so none is joined"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_sweep_on_a_cluster_takes_the_room_that_there_is(head: Head, tmp_path: Path) -> None:
    """Three trials, of which two fit at once: none is asked for before there is room, so that each learns from those
    before it."""
    words = ["--scale", "smoke", "--trials", "3", "--early-stopping", "asha", "--no-finals"]
    done = head.call("tune/sweep_lambda.py", words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 trials" in done.stdout and "no GPU in the cluster so far" in done.stderr
    trials = load_trials(tmp_path / "runs" / "sweeps" / "lambda-smoke" / "trials")
    assert all(trial.state in ("complete", "pruned") for trial in trials)
    assert trials[2].order > min(trial.ended or 0 for trial in trials[:2]), "it was asked for once another had ended"
    assert (tmp_path / "page" / "index.html").is_file()
    assert head.process.poll() is None, "the cluster is not the driver's to end"
    assert [path.name for path in (tmp_path / "runs").rglob("lease-*")] == []
    again = head.call("tune/sweep_lambda.py", words, tmp_path)
    assert again.returncode == 0 and "trial 2:" not in again.stdout
