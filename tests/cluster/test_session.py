"""The environment and the token of a Ray of one machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from viladiff.cluster.executor import _check_answers, _start, cluster
from viladiff.cluster.session import LOOPBACK, PRIVATE, QUIET, load_ray, private
from viladiff.runs.job import ExecutionSettings


def test_environment_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a user's own")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    load_ray(local=True)
    before, old = dict(os.environ), os.umask(0)
    try:
        with private(tmp_path):
            assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & os.environ.keys(), "Ray sets the mode, and reads our token"
            assert PRIVATE.items() <= os.environ.items()
            token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
            assert token.parent == tmp_path and token.stat().st_mode & 0o777 == 0o600
            os.environ["RAY_AUTH_MODE"] = "token"  # as Ray does
    finally:
        os.umask(old)
    assert dict(os.environ) == before


def test_words_of_the_user_go_before_the_quiet_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "5")
    ray = load_ray(local=True)
    assert ray.__name__ == "ray"
    assert {name: os.environ[name] for name in QUIET} == QUIET | {"RAY_worker_niceness": "5"}
    assert not LOOPBACK.keys() & os.environ.keys(), "another Ray of this process is not ours to bind"


def test_a_ray_that_would_listen_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_ray(local=True)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.7")
    with pytest.raises(ValueError, match=r"^Ray: it was loaded before and would listen at 192\.0\.2\.7; .*CLUSTER=0"):
        private(tmp_path).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_ray_that_would_ask_for_no_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_ray(local=True), "__version__", "2.58.1")
    with pytest.raises(ValueError, match=r"^Ray: requires 2\.59 or newer, got 2\.58\.1; run make setup$"):
        private(tmp_path).__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_process_starts_one_ray_after_another() -> None:
    """Ray's library keeps the token that it reads first, and some of its settings."""
    for dashboard in (False, True):
        with cluster(ExecutionSettings(dashboard=dashboard), 1) as session:
            import ray

            assert ray.get(ray.remote(num_cpus=0)(lambda: 6 * 7).remote()) == 42
            assert bool(session.note) == dashboard


def test_a_full_temporary_folder_is_told_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(total=2**30, used=2**30, free=2**20))
    with pytest.raises(ValueError, match=r"1 MB free, and Ray needs 50 MB for its logs.*set TMPDIR") as error:
        cluster(ExecutionSettings(), 1).__enter__()
    assert str(error.value).startswith(f"temporary folder {tmp_path}: ") and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_long_temporary_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's sockets, whose names may have 107 characters, lie in it under a short name."""
    folder = tmp_path / ("a long name " * 8)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with cluster(ExecutionSettings(), 1) as session:
        import ray

        assert ray.get(ray.remote(num_cpus=0)(lambda: 6 * 7).remote()) == 42
        assert session.scratch.parent == folder and list((session.scratch / "r").glob("session_*"))
    assert not list(folder.glob("viladiff-*"))


def test_an_address_at_which_nothing_answers_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # not listening
        address = f"127.0.0.1:{free.getsockname()[1]}"
        for said in (address, f"ray://{address}"):
            with pytest.raises(ValueError, match=rf"--address {said}: cannot be joined: .*; is a head running there"):
                _check_answers(said)
        free.listen()
        _check_answers(address)
    _check_answers("local")
    _check_answers("auto")


def test_a_dead_address_is_told_before_ray_tries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = load_ray(local=True)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("it would be tried for many minutes"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="cannot be joined"):
            _start(f"127.0.0.1:{free.getsockname()[1]}", {}, lambda: [])
