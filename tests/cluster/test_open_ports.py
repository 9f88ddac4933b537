"""What a running table, a captioning and a run of two workers let in from the network: nothing."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from viladiff.cluster import captioning, executor, sweep_executor
from viladiff.core.watchdog import descendants
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.runs.store import Store
from viladiff.training.trainer import Trainer

pytestmark = [pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
RUN = ["method.name=semibaseline", "eval.max_images=5", "eval.boundary=false", "runtime.threads=1"]


def listening(pids: list[int]) -> set[tuple[int, str]]:
    """(process, address) of each TCP socket of the processes that takes connections."""
    addresses = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                digits = fields[1].partition(":")[0]
                words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
                addresses[fields[9]] = socket.inet_ntop(
                    socket.AF_INET if len(words) == 1 else socket.AF_INET6, struct.pack(f"={len(words)}I", *words)
                )
    found = set()
    for pid in pids:
        with suppress(OSError):
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    known = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{descriptor}"))
                    if known and known[1] in addresses:
                        found.add((pid, addresses[known[1]]))
    return found


def reachable(pids: list[int]) -> list[str]:
    """Those sockets that another machine could connect to, with what their processes are."""

    def local(address: str) -> bool:
        parsed = ip_address(address)
        return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback

    return [f"{address} of {command(pid)}" for pid, address in sorted(listening(pids)) if not local(address)]


def command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_socket_is_found_and_judged(address: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
        before = listening([os.getpid()])
        one.bind((address, 0))
        one.listen()
        assert listening([os.getpid()]) - before <= {(os.getpid(), address)}
        assert (os.getpid(), address) in listening([os.getpid()])
        assert bool(reachable([os.getpid()])) == (address in ("0.0.0.0", "::"))


def test_one_place_starts_ray_and_one_joins_a_group() -> None:
    """So that what the tests below see of a table holds for sweeps and captioning."""
    sources = {path.name: path.read_text() for path in (ROOT / "viladiff").rglob("*.py")}
    assert [name for name, text in sources.items() if "ray.init(" in text] == ["executor.py"]
    assert {name for name, text in sources.items() if "init_process_group(" in text} == {"distributed.py", "launch.py"}
    assert captioning.cluster is sweep_executor.cluster is executor.cluster


class Watched:
    """A program whose processes are looked at, again and again, as long as it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.open, self.seen = process, set[str](), set[str]()

    def look(self) -> None:
        pids = [self.process.pid, *descendants(self.process.pid)]
        self.open |= set(reachable(pids))
        self.seen |= {command(pid) for pid, _ in listening(pids)}


@contextmanager
def program(words: list[str], where: Path, **environment: str) -> Iterator[Watched]:
    with (where / "said").open("w") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, text=True, cwd=where, env=os.environ | environment)
        try:
            yield Watched(process)
        finally:
            left = descendants(process.pid)
            process.kill()
            process.wait()
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)


TABLE = """
import sys
from pathlib import Path
from viladiff.cluster.executor import run_jobs
from viladiff.runs.job import ExecutionSettings, PlannedRun
from viladiff.runs.store import Store
root, workers, name, words = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
changes = dict(word.split("=") for word in words)
job = PlannedRun(run_id=name, changes=changes, title="", steps=9, changed={}, workers=workers, threads=1)
print(run_jobs([job], Store(root), ExecutionSettings()))
"""


def steps(root: Path) -> list[Path]:
    return [path for path in root.rglob("steps.jsonl") if path.stat().st_size]


def table(root: Path, workers: int, length: int = 100_000) -> list[str]:
    """The command of a table of one run, which is too long to end by itself."""
    changes = [*RUN, f"train.steps={length}", "runtime.log_every=1", f"runtime.workers={workers}"]
    name = Trainer(override(RunConfig(), dict(change.split("=") for change in changes) | {"runtime.workers": "1"})).name
    return [sys.executable, "-c", TABLE, str(root), str(workers), name, *changes]


def look_until(watched: Watched, done: Iterator[bool]) -> None:
    for over in done:
        watched.look()
        if over:
            return
        assert watched.process.poll() is None, "it ended before"
        time.sleep(0.2)


def trained(root: Path) -> Iterator[bool]:
    while True:
        yield bool(steps(root))


@pytest.mark.ray
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_table_listens_on_loopback_alone(tmp_path: Path, workers: int) -> None:
    with program(table(tmp_path / "runs", workers), tmp_path) as watched:
        look_until(watched, trained(tmp_path / "runs"))
        watched.look()
    assert watched.open == set()
    for part in ("gcs_server", "raylet/raylet", "RuntimeEnvAgent"):
        assert any(part in command for command in watched.seen), f"{part} was not looked at: {watched.seen}"


def test_a_run_of_two_workers_listens_on_loopback_alone(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "viladiff", "train", *RUN, "train.steps=100000", "runtime.log_every=1"]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    words += ["runtime.workers=2", "--runs-dir", str(tmp_path / "runs")]
    with program(words, tmp_path, TMPDIR=str(temporary)) as watched:
        look_until(watched, trained(tmp_path / "runs"))
        watched.look()
        meetings = [path.stat().st_mode & 0o777 for path in temporary.glob("viladiff-*")]
        assert meetings == [0o700], "only its owner may write where the workers meet"
        watched.process.terminate()
    assert watched.open == set() and watched.seen, "gloo has a socket for every pair of workers"


STRANGER = """
import os, sys
import ray
ray.init(address=sys.argv[1], logging_level="CRITICAL", log_to_driver=False, namespace="stranger")
print("ran:", ray.get(ray.remote(num_cpus=0)(lambda: 6 * 7).remote()))
"""


@pytest.mark.ray
def test_a_stranger_needs_the_token(tmp_path: Path) -> None:
    """Whatever the caller's environment says: the product asks for it itself."""
    hold = (
        "import sys; from viladiff.cluster.executor import cluster; from viladiff.runs.job import ExecutionSettings\n"
        "with cluster(ExecutionSettings(), 1) as session:\n"
        "    import ray; print(session.scratch, ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    home = tmp_path / "home"  # without a token of a user's own
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home)
    }
    process = subprocess.Popen(
        [sys.executable, "-c", hold],
        env=environment | {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "0" * 64},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        scratch, address = process.stdout.readline().split()
        token = Path(scratch) / "token"
        assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64

        def stranger(**given: str) -> subprocess.CompletedProcess[str]:
            words = [sys.executable, "-c", STRANGER, address]
            here = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray takes another address of this machine
            return subprocess.run(words, env=environment | here | given, capture_output=True, text=True, timeout=500)

        wrong: dict[str, str] = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        with ThreadPoolExecutor() as both:  # a refused one tries for long
            without = list(both.map(lambda given: stranger(**given), ({}, wrong)))
        for refused in without:
            assert refused.returncode and "ran:" not in refused.stdout, refused
        assert "uthentication" in without[0].stderr and "uthentication" in without[1].stderr, without
        asked = stranger(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        assert asked.returncode == 0 and asked.stdout.strip() == "ran: 42", asked
    finally:
        process.stdin.close()
        process.wait(300)
    assert not Path(scratch).exists() and not list(home.iterdir()), "it writes no token into anybody's home"


def test_what_ray_notes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def cluster(*given: object) -> Iterator[executor.RaySession]:
        yield executor.RaySession(tmp_path, lambda: None, "dashboard: there")

    def asked(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "cluster", cluster)
    monkeypatch.setattr(executor, "ask_cluster", asked)
    told: list[Event] = []
    job = PlannedRun(run_id="0" * 16, changes={}, title="", steps=9, changed={}, workers=1, threads=1)
    with pytest.raises(KeyboardInterrupt):
        executor.run_jobs([job], Store(tmp_path / "runs"), ExecutionSettings(), told.append)
    assert "dashboard: there" in [event.message for event in told if event.kind == "note"]


@pytest.mark.ray
def test_a_dashboard_is_told_of_and_wants_the_token() -> None:
    with executor.cluster(ExecutionSettings(dashboard=True), 1) as session:
        told = re.fullmatch(r"dashboard: (http://127\.0\.0\.1:\d+) asks for the token in (\S+)", session.note)
        assert told is not None, session.note
        assert reachable([os.getpid(), *descendants(os.getpid())]) == []

        def asked(**headers: str) -> int:
            try:
                with urlopen(Request(f"{told[1]}/nodes?view=summary", headers=headers), timeout=100) as answer:
                    return int(answer.status)
            except HTTPError as error:
                return error.code

        token = Path(told[2]).read_text()
        assert (asked(), asked(Authorization="Bearer 0"), asked(Authorization=f"Bearer {token}")) == (401, 403, 200)
