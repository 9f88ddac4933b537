"""Stores, folders and clocks of others: what may only be read, processes of other containers, clocks that are apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from record_kit import made

from viladiff.cli.main import main
from viladiff.cluster import executor
from viladiff.core.atomic import hold, writer_token
from viladiff.core.watchdog import start
from viladiff.runs import lease as leases
from viladiff.runs.record import save_record
from viladiff.runs.store import Store
from viladiff.runs.verify_and_gc import garbage

ROOT = Path(__file__).resolve().parents[2]
ONE = made("supervised-92-0")
OTHER = 12345
"""A user who has no processes here."""
MOUNTED = 'mount --make-rprivate / && mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
WAYS = {
    "read-only": ["unshare", "--mount", "sh", "-c", MOUNTED, "sh"],
    "another's": ["setpriv", "--inh-caps=-all", "--bounding-set=-all"],
}


def can(words: list[str]) -> bool:
    return shutil.which(words[0]) is not None and subprocess.run(words, capture_output=True).returncode == 0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A finished run, a damaged one, one of a dead process, all of which a cleaner would put in order."""
    found = Store(tmp_path / "runs")
    for run_id, text in ((ONE.run_id, b""), ("0" * 16, b"{}"), ("1" * 16, b"")):
        found.directory(run_id).mkdir(parents=True)
        if text:
            (found.directory(run_id) / "record.json").write_bytes(text)
    save_record(ONE, found.directory(ONE.run_id) / "record.json")
    begun = found.directory("1" * 16)
    (begun / "checkpoint.pt").write_bytes(b"x")
    gone = {"host": "here", "machine": leases.machine(), "pid": 2**22 + 1, "started": 1, "since": "x"}
    (begun / f"lease-{'a' * 32}.json").write_text(json.dumps(gone))
    (begun / ".record.json.4194305.tmp").write_bytes(b"half")
    os.utime(begun / ".record.json.4194305.tmp", (1, 1))
    return found


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


SAYS = """
import json, sys
from viladiff.cli import main
for words in json.loads(sys.argv[1]):
    print(words, main.main(words), flush=True)
"""
RENDERS = """
import sys
from pathlib import Path
from viladiff.cli import sweeps, tables
root, runs, page = map(Path, sys.argv[1:])
words = ["--scale", "smoke", "--render", "--runs-dir", str(runs), "--report-dir"]
some = ["--rows", "1", "--columns", "1"]
assert tables.main(root / "ablations" / "table5.toml", [*words, str(page / "table"), *some], "x") == 0
assert sweeps.main(root / "tune" / "sweep_lambda.toml", [*words, str(page / "sweep")], "x") == 0
"""


def told(code: str, words: list[str], before: list[str]) -> str:
    done = subprocess.run([*before, sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("way", WAYS)
def test_list_show_verify_and_a_dry_gc_read_only(way: str, store: Store) -> None:
    before = [*WAYS[way], *([str(store.root)] if way == "read-only" else [])]
    if not can([*before, "true"]):
        pytest.skip("this user may not")
    if way == "another's":
        for path in [store.root, *store.root.rglob("*")]:
            os.chown(path, OTHER, OTHER)
    saved = files(store.root)
    commands = (["list"], ["list", "--json"], ["show", ONE.run_id], ["verify"], ["gc", "--dry-run", "--pages", "none"])
    places = ["--runs-dir", str(store.root), "--published", "none"]
    words = json.dumps([["runs", *command, *places] for command in commands])
    found = told(SAYS, [words], before)
    assert found == told(SAYS, [words], []) and "would delete" in found and found.count("'list'") == 2
    refused = subprocess.run([*before, "touch", str(store.root / "x")], capture_output=True, text=True)
    assert refused.returncode != 0, "the store was not read-only"
    assert files(store.root) == saved, "whoever looks deletes nothing"


def test_whoever_trains_takes_no_unreadable_record_for_a_missing_one(store: Store) -> None:
    """The run would be trained again, and its record written over."""
    run_id = "0123456789abcdef"
    (store.directory(run_id) / "record.json").mkdir(parents=True)
    with pytest.raises(OSError, match="not a file"):
        Store(store.root).get(run_id)
    assert Store(store.root, repair=False).get(run_id) is None


@pytest.mark.parametrize("private", ["directory", "record", "note"])
def test_a_private_run_hides_no_other(private: str, store: Store) -> None:
    """Whoever looks at a store of somebody else sees the runs that may be read, and that others may not."""
    before = WAYS["another's"]
    if not can([*before, "true"]):
        pytest.skip("this user may not")
    hidden = store.directory("2" * 16)
    hidden.mkdir()
    (hidden / "record.json").write_bytes(b"{}" if private != "note" else b"")
    (hidden / "failure.json").write_bytes(b"{}")
    for path in [store.root, *store.root.rglob("*")]:
        os.chown(path, OTHER, OTHER)
    chosen = {"directory": hidden, "record": hidden / "record.json", "note": hidden / "failure.json"}[private]
    chosen.chmod(0)
    actions = (["list"], ["show", ONE.run_id], ["show", "2" * 16], ["verify"], ["gc", "--dry-run", "--pages", "none"])
    words = [["runs", *action, "--runs-dir", str(store.root), "--published", "none"] for action in actions]
    found = told(SAYS, [json.dumps(words)], before)
    assert [line.rpartition("]")[2].strip() for line in found.splitlines() if line.startswith("['runs'")] == [*"00010"]
    assert ONE.run_id in found and found.count("2" * 16) > 2
    if private == "directory":
        assert "unreadable" in found and "its directory cannot be read by this user" in found


def test_garbage_is_not_looked_for_behind_links(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / ".notes.4194305.tmp"
    mine.parent.mkdir()
    mine.write_text("of a user")
    os.utime(mine, (1, 1))
    for name in ("pages", "cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "link").symlink_to(mine.parent)
    folders = {"pages": tmp_path / "pages", "cache": tmp_path / "cache"}
    assert garbage(Store(tmp_path / "runs"), **folders) == []
    assert [item.path for item in garbage(Store(tmp_path / "runs"), pages=mine.parent)] == [mine]


def test_what_is_no_run_hides_none(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """A file, links and a pipe in places of runs and of their files."""
    (store.root / ("2" * 16)).write_text("a file")
    (store.root / ("3" * 16)).symlink_to(store.root / "gone")
    (store.root / ("4" * 16)).symlink_to(store.root / ("4" * 16))
    for run_id, make in (("5" * 16, os.mkfifo), ("6" * 16, os.mkdir)):
        store.directory(run_id).mkdir()
        make(store.directory(run_id) / "record.json")
    for name in ("failure.json", f"lease-{'b' * 32}.json"):
        (store.directory("6" * 16) / name).mkdir()
    for action in (["list"], ["show", ONE.run_id], ["show", "5" * 16], ["gc", "--dry-run", "--pages", "none"]):
        words = ["runs", *action, "--runs-dir", str(store.root), "--published", "none"]
        assert main(words) == 0, action
        assert ONE.run_id in capsys.readouterr().out or action != ["list"]


@pytest.mark.timeout(600)
def test_render_read_only(store: Store, tmp_path: Path) -> None:
    before = [*WAYS["read-only"], str(store.root)]
    if not can([*before, "true"]):
        pytest.skip("this user may not")
    saved = files(store.root)
    told(RENDERS, [str(ROOT), str(store.root), str(tmp_path / "page")], before)
    assert all((tmp_path / "page" / name / "index.html").is_file() for name in ("table", "sweep"))
    assert files(store.root) == saved


CONTAINER = """
import sys
from pathlib import Path
from viladiff.cluster import executor
from viladiff.runs.store import Store
from viladiff.runs.verify_and_gc import garbage
made = executor._scratch()
print(sorted(path.name for path in Path(sys.argv[1]).glob("viladiff-*") if path != made))
print([item.path.name for item in garbage(Store(Path(sys.argv[2])), cache=Path(sys.argv[3]))])
"""


def test_another_container_spares_the_files_of_the_living(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers of processes are others: 4,000,000 is nobody there, and 1 is always somebody."""
    wrap = ["unshare", "--pid", "--fork", "--mount-proc", "--uts", "--kill-child"]
    if not can([*wrap, "true"]):
        pytest.skip("this machine makes no process namespaces")
    scratch, cache, store = tmp_path / "tmp", tmp_path / "cache", Store(tmp_path / "runs")
    gone = next(pid for pid in range(2**22 - 1, 0, -1) if start(pid) is None)
    mine = f"{gone}-{writer_token()}"
    living, dead = scratch / f"viladiff-{gone}-living", scratch / f"viladiff-{gone}-dead"
    draft, importing = cache / "digits" / f".0123-{mine}", store.root / f".import-{mine}-x"
    for folder in (living, dead, draft, importing, store.root / "plans"):
        folder.mkdir(parents=True)
    half = store.root / "plans" / f".plan-0.json.{gone}.{writer_token()}.tmp"
    half.write_bytes(b"half")
    earlier = time.time() - 1800  # by a clock that is half an hour apart
    for path in (living, dead, draft, importing, half):
        os.utime(path, (earlier, earlier))
    held = hold(living)
    assert held is not None
    words = [*wrap, sys.executable, "-c", CONTAINER, str(scratch), str(store.root), str(cache)]
    env = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.stdout.splitlines() == [str([living.name]), "[]"], done
    os.close(held)
    # On its own machine, where nobody has that number, all of it goes.
    found = {item.path for item in garbage(store, cache=cache)}
    assert found == {draft, importing, half}
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    (left,) = scratch.glob("viladiff-1-*")  # of a driver in the container, which was process 1 and is gone
    os.utime(left, (earlier, earlier))
    made_here = executor._scratch()
    assert list(scratch.iterdir()) == [made_here]
    executor._remove(made_here)
    assert not made_here.exists() and made_here not in executor._LOCKS


KILLED = """
import os, signal, sys
from pathlib import Path
from viladiff.cluster import executor
with executor._short(Path(sys.argv[1])) as link:
    print(link.parent, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_short_name_of_a_killed_drivers_scratch_is_removed_by_the_next(tmp_path: Path) -> None:
    scratch = tmp_path / ("long " * 30)
    scratch.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(scratch)], capture_output=True, text=True)
    left = Path(done.stdout.strip())
    assert (left / "s").is_symlink(), done
    with executor._short(scratch):
        assert left.is_dir(), "its driver may be about to lock it"
    earlier = time.time() - 1800
    os.utime(left, (earlier, earlier))
    with executor._short(scratch) as link:
        assert not left.exists() and link.resolve() == scratch.resolve()
        os.utime(link.parent, (earlier, earlier))
        with executor._short(scratch):
            assert link.exists(), "its driver lives"
    assert scratch.is_dir() and not link.parent.exists()


APART = """
import sys, time
from pathlib import Path
real, apart = time.time, float(sys.argv[2])
time.time = lambda: real() + apart
from viladiff.runs import lease as leases
leases.HEARTBEAT, leases.SILENT = 0.2, 3.0
lease = leases.take_or_wait(Path(sys.argv[1]), leases.HeartbeatMonitor())
print("refused" if lease is None else "taken")
"""


@pytest.mark.parametrize("apart", [1800, -1800, 1e6])
def test_clocks_that_are_apart_take_no_run_from_the_living_and_leave_none_to_the_dead(
    apart: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap = ["unshare", "--pid", "--fork", "--mount-proc", "--uts", "--kill-child"]
    if not can([*wrap, "true"]):
        pytest.skip("this machine makes no process namespaces")
    monkeypatch.setattr(leases, "HEARTBEAT", 0.2)
    lease = leases.acquire(tmp_path / "run", leases.HeartbeatMonitor())
    assert lease is not None
    words = [*wrap, sys.executable, "-c", APART, str(tmp_path / "run"), str(apart)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout == "refused\n", done
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + apart)  # its own clock steps, and it has the run still
    assert not lease.lost
    lease.check()
    lease._done.set()  # it stops beating, as a process that was killed
    time.sleep(0.5)
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout == "taken\n" and not lease.path.exists(), done
    with pytest.raises(leases.LeaseLostError):
        lease.check()
