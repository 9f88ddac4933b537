"""Runs whose machine or container was restarted: one call waits until their lease is silent, and takes it over."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from run_kit import short_run

from viladiff.experiments.sweep_setup import alone
from viladiff.runs import job_queue as queues
from viladiff.runs import lease as leases
from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.runs.job_queue import JobQueue
from viladiff.runs.lease import acquire_or_raise
from viladiff.runs.store import Store


def left_behind(directory: Path, host: str = "far") -> Path:
    """The lease of a process of another boot, which may also be another machine's; its heart beat just now."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"lease-{'0' * 32}.json"
    holder = {"host": host, "machine": "another", "pid": os.getpid(), "started": 1, "since": "2026-01-31T12:00:00Z"}
    path.write_text(json.dumps(holder))
    return path


@pytest.mark.parametrize("host", ["far", socket.gethostname()])
@pytest.mark.parametrize("take", [acquire_or_raise, alone])
def test_one_call_waits_and_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str, take: object
) -> None:
    """An equal host name proves nothing: a run on another machine of that name would lose its files."""
    monkeypatch.setattr(leases, "SILENT", 0.5)
    path, begun = left_behind(tmp_path / "run", host), time.monotonic()
    lease = take(tmp_path / "run")  # type: ignore[operator]
    assert time.monotonic() - begun > 0.5 and not path.exists() and lease.path.exists()
    told = capsys.readouterr().err
    assert told.startswith(f"run: locked by process {os.getpid()} on {host} since 2026-01-31T12:00:00Z, on another")
    assert "taken over in" in told
    lease.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_the_countdown_goes_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENT", 0.5)
    monkeypatch.setattr(leases, "HEARTBEAT", 0.0)
    shown: list[float] = []
    real = leases._countdown

    @leases.contextmanager
    def countdown(directory: Path):  # type: ignore[no-untyped-def]
        with real(directory) as show:
            yield lambda holder, left: (shown.append(left), show(holder, left))

    monkeypatch.setattr(leases, "_countdown", countdown)
    left_behind(tmp_path)
    acquire_or_raise(tmp_path).release()
    assert len(shown) > 1 and shown == sorted(shown, reverse=True) and shown[0] <= 0.5


def test_a_beating_heart_is_refused(tmp_path: Path) -> None:
    path, over = left_behind(tmp_path / "run"), threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match=f"run is locked by process {os.getpid()} on far since .*; wait"):
            acquire_or_raise(tmp_path / "run")
    finally:
        over.set()
        thread.join()
    assert list((tmp_path / "run").iterdir()) == [path]


def test_a_process_that_this_kernel_knows_is_neither_waited_for_nor_watched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with acquire_or_raise(tmp_path) as mine:
        with pytest.raises(ValueError, match="run is locked by process"):
            acquire_or_raise(tmp_path)
        fields = json.loads(mine.path.read_text())
        mine.path.write_text(json.dumps({**fields, "started": fields["started"] - 1}))
        acquire_or_raise(tmp_path).release()
    assert capsys.readouterr().err == ""


READ_ONLY = """
import os, sys
from pathlib import Path
from viladiff.runs.lease import acquire_or_raise
from viladiff.runs.store import Store
run = Path(sys.argv[1])
os.chmod(run, 0o555)
if os.getuid() == 0:
    os.setuid(65534)
store = Store(run.parent)
print(store.holder(run.name), store.held(run.name), store.clean())
acquire_or_raise(run)
"""


def test_a_directory_to_look_at_only_is_looked_at_and_refused_at_once() -> None:
    with tempfile.TemporaryDirectory() as parent:  # pytest's own would be closed to the other user
        os.chmod(parent, 0o755)
        path = left_behind(Path(parent, "0" * 16))
        gone = subprocess.Popen(["true"])
        gone.wait()
        holder = {"host": "here", "machine": leases.machine(), "pid": gone.pid, "started": 1, "since": "x"}
        path.write_text(json.dumps(holder))
        words = [sys.executable, "-c", READ_ONLY, str(path.parent)]
        said = subprocess.run(words, capture_output=True, text=True, timeout=50, env=os.environ | {"HOME": parent})
        os.chmod(path.parent, 0o755)
        assert said.stdout == "None False []\n", said
        assert said.stderr.splitlines()[-1] == f"PermissionError: [Errno 13] Permission denied: {str(path.parent)!r}"
        assert path.exists()


def test_a_directory_whose_files_cannot_be_looked_at_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network file system, a lease that was just released is stale; other errors are not hidden."""
    path = left_behind(tmp_path)
    real = Path.stat

    def broken(number: int) -> None:
        def stat(self: Path, **words: bool) -> os.stat_result:
            if self == path:
                raise OSError(number, os.strerror(number), str(path))
            return real(self, **words)

        monkeypatch.setattr(Path, "stat", stat)

    broken(errno.ESTALE)
    assert leases.read_leases(tmp_path, leases.HeartbeatMonitor()) == []
    for number in (errno.EIO, errno.EACCES):
        broken(number)
        with pytest.raises(OSError, match=os.strerror(number)):
            leases.read_leases(tmp_path, leases.HeartbeatMonitor())


ELSEWHERE = """
import os, sys
from viladiff.runs import lease
print(os.getpid(), lease.machine() == "")
"""


def test_starts_of_another_process_namespace_prove_nothing() -> None:
    """Where /proc is not mounted anew, process 1 there has the start of this machine's: it would never die."""
    words = [sys.executable, "-c", ELSEWHERE]
    inside = subprocess.run(["unshare", "--pid", "--fork", *words], capture_output=True, text=True)
    if inside.returncode and "unshare" in inside.stderr:
        pytest.skip("this machine makes no process namespaces")
    assert inside.stdout == "1 True\n", inside
    assert leases.machine()


WAITS = """
import sys
from pathlib import Path
from viladiff.runs import lease as leases
leases.SILENT = 1.0
print("ready", flush=True)
sys.stdin.readline()
try:
    lease = leases.acquire_or_raise(Path(sys.argv[1]))
except ValueError as error:
    print("refused", error, flush=True)
else:
    print("got", lease.path.name, flush=True)
    sys.stdin.read()
"""


def test_of_four_that_wait_one_takes_it(tmp_path: Path) -> None:
    path = left_behind(tmp_path / "run")
    words = [sys.executable, "-c", WAITS, str(path.parent)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    callers = [subprocess.Popen(words, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    try:
        for caller in callers:
            assert caller.stdout.readline() == "ready\n"
        for caller in callers:
            caller.stdin.write("go\n")
            caller.stdin.flush()
        said = [caller.stdout.readline().split() for caller in callers]
        assert sorted(words[0] for words in said) == ["got", "refused", "refused", "refused"], said
        names = [words[1] for words in said if words[0] == "got"]
        assert [held.name for held in path.parent.iterdir()] == names
    finally:
        for caller in callers:
            caller.kill()
            caller.communicate()


TRAIN = ["train", "method.name=semibaseline", "train.steps=2", "eval.max_images=5", "eval.boundary=false"]


def test_ctrl_c_leaves_the_lease_as_it_was(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "viladiff", *TRAIN, "--runs-dir", str(tmp_path), "--threads", "1"]
    name = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, check=True).stdout
    run = next(
        word for word in name.replace("/", " ").split() if len(word) == 16 and set(word) <= set("0123456789abcdef")
    )
    path = left_behind(tmp_path / run)
    before = path.read_bytes(), path.stat().st_mtime_ns
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = ""
    while "taken over in" not in line:
        line = process.stderr.readline()
        assert line, "it ended without a countdown"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in error, error
    assert [(found.read_bytes(), found.stat().st_mtime_ns) for found in path.parent.iterdir()] == [before]


def test_training_goes_on_after_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENT", 0.5)
    done = short_run(tmp_path, "semibaseline")
    (done / "record.json").unlink()
    left_behind(done)
    assert short_run(tmp_path, "semibaseline") == done
    assert (done / "record.json").is_file() and not list(done.glob("lease-*"))


def test_a_table_does_its_other_runs_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENT", 0.5)
    monkeypatch.setattr(queues, "LOOK", 0.0)
    jobs = [PlannedRun(f"{number:016x}", {"seed": number}, f"seed {number}", 100, {}) for number in range(2)]
    path = left_behind(tmp_path / jobs[0].run_id)
    events: list[Event] = []
    queue = JobQueue(jobs, Store(tmp_path), ExecutionSettings(), 2, events.append)
    queue.drop_finished()
    assert queue.next_job() == jobs[1] and queue.next_job() is None, "the other run does not wait"
    assert [event.run_id for event in events if event.kind == "elsewhere"] == [jobs[0].run_id]
    until = time.monotonic() + 60
    while (taken := queue.next_job()) is None and time.monotonic() < until:
        list(queue.poll())
        time.sleep(0.05)
    assert taken == jobs[0] and not path.exists()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls differ")
def test_a_killed_process_is_dead_only_when_all_its_threads_are(tmp_path: Path) -> None:
    """The first thread ends alone, as it may when a signal kills the process: what the others still write may come."""
    code = (
        "import ctypes, sys, threading, time; from pathlib import Path\n"
        "from viladiff.runs.lease import HeartbeatMonitor, acquire\n"
        "lease = acquire(Path(sys.argv[1]), HeartbeatMonitor())\n"
        "threading.Thread(target=time.sleep, args=(600,)).start(); print('taken', flush=True)\n"
        "ctypes.CDLL(None).syscall(60, 0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    stat = Path(f"/proc/{process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert leases.acquire(tmp_path / "run", leases.HeartbeatMonitor()) is None
    process.kill()
    while len(os.listdir(f"/proc/{process.pid}/task")) > 1:
        time.sleep(0.01)
    taken = leases.acquire(tmp_path / "run", leases.HeartbeatMonitor())
    assert taken is not None
    taken.release()
    process.wait()
