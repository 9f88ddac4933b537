"""A store that may only be read, really: reading prints the same, deletes nothing and needs no right to write."""

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


def told(words: list[str], cwd: Path, before: list[str]) -> tuple[int, str]:
    done = subprocess.run([*before, sys.executable, "-m", *words], cwd=cwd, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("way", WAYS)
def test_list_show_and_verify_read_only(way: str, store: Store, tmp_path: Path) -> None:
    before = [*WAYS[way], *([str(store.root)] if way == "read-only" else [])]
    if not can([*before, "true"]):
        pytest.skip("this user may not")
    if way == "another's":
        for path in [store.root, *store.root.rglob("*")]:
            os.chown(path, OTHER, OTHER)
    saved = files(store.root)
    for words in (["list"], ["list", "--json"], ["show", ONE.run_id], ["verify"], ["gc", "--dry-run"]):
        command = ["viladiff", "runs", *words, "--runs-dir", str(store.root), "--published", "none"]
        assert told(command, tmp_path, before) == told(command, tmp_path, []), words
    refused = subprocess.run([*before, "touch", str(store.root / "x")], capture_output=True, text=True)
    assert refused.returncode != 0, "the store was not read-only"
    assert files(store.root) == saved, "whoever looks deletes nothing"


def test_render_and_dry_run_read_only(store: Store, tmp_path: Path) -> None:
    before = [*WAYS["read-only"], str(store.root)]
    if not can([*before, "true"]):
        pytest.skip("this user may not")
    saved = files(store.root)
    code = "import sys; from pathlib import Path; from {0} import main; sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))"
    for module, spec in (("tables", "ablations/table5.toml"), ("sweeps", "tune/sweep_lambda.toml")):
        page = tmp_path / module
        words = [sys.executable, "-c", code.format(f"viladiff.cli.{module}"), str(ROOT / spec), "--scale", "smoke"]
        words += ["--runs-dir", str(store.root), "--report-dir", str(page)]
        words += ["--rows", "1", "--columns", "1"] if module == "tables" else []
        for option in ("--render", "--dry-run"):
            done = subprocess.run([*before, *words, option], capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert (page / "index.html").is_file() and files(store.root) == saved


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
    an_hour = time.time() - 1800  # by a clock that is half an hour apart
    for path in (draft, importing, half):
        os.utime(path, (an_hour, an_hour))
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
    made_here = executor._scratch()
    assert sorted(scratch.iterdir()) == [made_here]
    executor._remove(made_here)
    assert not made_here.exists() and made_here not in executor._LOCKS
