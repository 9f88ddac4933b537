"""The store under fire: damaged files, killed holders, many processes at once, names that try to leave it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from record_kit import LAYER, SHORT_RUNS, bound, made

from viladiff.core import atomic
from viladiff.runs import lease as leases
from viladiff.runs.record import (
    CorruptRecordError,
    ForgedRecordError,
    RunRecord,
    checksum,
    load_record,
    mismatch,
    parse_record,
    record_bytes,
    save_record,
    strip_local_paths,
)
from viladiff.runs.store import Failure, Store

TOKEN = atomic.writer_token()

EXAMPLE, SECOND = made("supervised-92-0"), made("supervised-92-1")
ROOT = Path(__file__).resolve().parents[2]
RUN, OTHER = EXAMPLE.run_id, SECOND.run_id


def a_record(run_id: str = RUN, **fields: object) -> RunRecord:
    return RunRecord(**{**{RUN: EXAMPLE, OTHER: SECOND}[run_id].model_dump(), **fields})


def put(store: Store, run_id: str = RUN, **fields: object) -> Path:
    path = store.directory(run_id) / "record.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_record(a_record(run_id, **fields), path)
    return path


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> Store:
    return Store(tmp_path / "runs", say=said.append)


# Records


def test_record_comes_back_and_its_layout_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = a_record(captions="Müller × 3", scale="quick", miou=None)
    save_record(record, path)
    assert load_record(path) == record
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert load_record(path) == record
    assert [child.name for child in tmp_path.iterdir()] == ["record.json"]
    assert load_record(path).scale == "quick" and strip_local_paths(record).scale == "quick"


def test_record_from_before_a_field_keeps_its_checksum(tmp_path: Path) -> None:
    rest = {name: value for name, value in a_record().model_dump(mode="json").items() if name != "scale"}
    (tmp_path / "r.json").write_text(json.dumps({**rest, "checksum": checksum(rest)}))
    assert load_record(tmp_path / "r.json").scale == ""


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_changed_byte_changes_what_is_read(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        save_record(a_record(), path)
        whole = bytearray(path.read_bytes())
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(whole)
        try:
            assert load_record(path) == a_record()  # white space, or another spelling of the same number
        except ValueError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {**row, "miou": 0.99}, "damaged: its checksum is"),
        (lambda row: {name: value for name, value in row.items() if name != "checksum"}, "it has no checksum"),
        (lambda row: [row], "holds a list"),
    ],
)
def test_forged_record_is_refused(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "record.json"
    save_record(a_record(), path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))  # type: ignore[operator]
    with pytest.raises(CorruptRecordError, match=message) as caught:
        load_record(path)
    assert str(path) in str(caught.value)


def forged_bytes(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A record that was edited and given the checksum of what it then says."""
    rest = a_record().model_dump(mode="json")
    change(rest)
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return json.dumps({**rest, "checksum": found}).encode()


def headline(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = row["scores"][row["network"]][row["stream"]]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(miou=math.nan), "not JSON compliant"),
        (lambda row: row["changed"].update({"optim.lr": math.inf}), "not JSON compliant"),
        (lambda row: row.update(notes=["\ud800"]), "surrogates not allowed"),
        (lambda row: row.update(miou=7.0), "miou: must be a number from 0 to 1, got 7.0"),
        (lambda row: row.update(steps=10**400), r"steps: must be a number from 0 to 2\^63, got 1000+\.\.\."),
        (lambda row: row.update(train_seconds=-1.0), "train_seconds: must be a number from 0"),
        (
            lambda row: headline(row).update(boundary_iou="high"),
            "boundary_iou: must be a number from 0 to 1, got 'high'",
        ),
        (lambda row: headline(row).update(tokens=10**400), "tokens: must be a number, got 1000"),
        (lambda row: headline(row).update(per_class=[0.5, True]), "per_class: must be a number from 0 to 1, got True"),
        (lambda row: row.update(best={"step": 1, "miou": "9"}), "best.miou: must be a number from 0 to 1, got '9'"),
        (lambda row: row.update(history=[{"x": 1}]), r"history\[0\]: must have step"),
    ],
)
def test_numbers_that_no_run_measures_are_refused(change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(CorruptRecordError, match=message) as caught:
        parse_record(forged_bytes(change), "records/one.json")
    assert str(caught.value).startswith("records/one.json ")


def test_a_key_that_is_there_twice_is_refused() -> None:
    data = forged_bytes(lambda row: None)
    assert parse_record(data, "one.json") == a_record()
    with pytest.raises(CorruptRecordError, match=r"^one\.json is not a run's record: has 'miou' twice"):
        parse_record(b'{"miou": 0.999, ' + data[1:], "one.json")


def test_missing_and_empty_files_and_deep_nests_are_no_records(tmp_path: Path) -> None:
    for data in (None, b"", b"\xff\xfe", b"[" * 100_000):
        path = tmp_path / "record.json"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a run's record"):
            load_record(path)


def test_a_record_that_is_cut_off_is_told_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for data, why in ((b" ", "the file is empty"), (forged_bytes(lambda row: None)[:200], ".*")):
        path.write_bytes(data)
        with pytest.raises(CorruptRecordError, match=rf"record: {why}; train the run again with --restart$"):
            load_record(path)


def test_writer_that_fails_leaves_the_old_record_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    save_record(a_record(), path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_record(a_record(miou=0.1), path)
    assert load_record(path) == a_record()
    assert [child.name for child in tmp_path.iterdir()] == ["record.json"]


# Store


def test_store_and_layers_answer_together(tmp_path: Path, said: list[str]) -> None:
    layers = [tmp_path / name for name in ("one", "two", "absent")]
    store = Store(tmp_path / "runs", layers, said.append)
    assert store.records() == {} and store.get(RUN) is None and store.local_run_ids() == []
    for layer, miou in zip(layers[:2], (0.1, 0.2), strict=True):
        folder = layer / "table5" / "records"
        folder.mkdir(parents=True)
        save_record(a_record(miou=miou), folder / "any-name.json")
    save_record(a_record(OTHER), layers[1] / "table5" / "records" / "other.json")
    assert {name: record.miou for name, record in store.records().items()} == {RUN: 0.1, OTHER: SECOND.miou}
    put(store, miou=0.3)
    assert store.records()[RUN].miou == 0.3
    record = store.get(RUN)
    assert record is not None and record.miou == 0.3
    assert store.file(OTHER, "record.json") == layers[1] / "table5" / "records" / "other.json"
    pictures = layers[1] / "table5" / "pictures" / f"{RUN}.npz"
    pictures.parent.mkdir()
    pictures.write_bytes(b"x")
    assert store.file(RUN, "pictures.npz") == pictures and store.file(OTHER, "pictures.npz") is None
    (store.directory(RUN) / "pictures.npz").write_bytes(b"y")
    assert store.file(RUN, "pictures.npz") == store.directory(RUN) / "pictures.npz"
    assert said == []


def test_records_of_this_checkout_load(said: list[str]) -> None:
    found = Store(Path("/nonexistent/runs"), [LAYER], said.append).records()
    assert len(found) == len(list(SHORT_RUNS.glob("*.json"))) >= 20 and found[RUN] == EXAMPLE and not said
    published = ROOT / "reports" / "published"
    files = len(list(published.glob("**/records/*.json")))
    assert len(Store(Path("/nonexistent/runs"), [published], said.append).records()) == files and not said


def test_records_are_read_again_only_when_they_change(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(store)
    store.records()
    reads: list[Path] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (reads.append(self), real(self))[1])
    assert store.records()[RUN] == a_record() and store.get(RUN) == a_record() and reads == []
    save_record(a_record(miou=0.5), path)
    assert store.records()[RUN].miou == 0.5 and reads == [path]
    path.unlink()
    assert store.records() == {}


def test_damaged_record_is_set_aside_once_and_its_checkpoint_stays(store: Store, said: list[str]) -> None:
    path = put(store)
    path.write_bytes(path.read_bytes()[:-40])
    (path.parent / "checkpoint.pt").write_bytes(b"weights")
    put(store, OTHER)
    assert list(store.records()) == [OTHER]
    assert not path.exists() and (path.parent / "checkpoint.pt").exists()
    aside = list((store.root / "damaged").rglob("record.json"))
    assert len(aside) == 1 and aside[0].parent.name.startswith(f"{RUN}-")
    assert len(said) == 1 and str(path) in said[0] and str(aside[0].parent) in said[0]
    assert store.get(RUN) is None and len(said) == 1
    put(store)
    assert store.get(RUN) == a_record()


def test_record_of_another_run_is_set_aside(store: Store, said: list[str]) -> None:
    shutil.copytree(put(store, OTHER).parent, store.directory(RUN))
    assert list(store.records()) == [OTHER] and "is the record of another run" in said[0]


def test_a_record_in_another_s_place_is_refused_and_one_of_an_older_revision_is_not(
    store: Store, said: list[str]
) -> None:
    """What the name does not follow from is set aside; a file that is copied and given the name is no exception."""
    best = made("semibaseline-183-0")
    forged = RunRecord(**{**best.model_dump(), "run_id": made("viladiff-183-0").run_id, "miou": 0.99})
    place = store.directory(forged.run_id) / "record.json"
    place.parent.mkdir(parents=True)
    save_record(forged, place)
    older = bound(EXAMPLE, core_revision=EXAMPLE.core_revision - 1)
    store.directory(older.run_id).mkdir()
    save_record(older, store.directory(older.run_id) / "record.json")
    with pytest.raises(ForgedRecordError, match=f"does not match its name {forged.run_id}: .* give {best.run_id}"):
        load_record(place)
    assert store.records() == {older.run_id: older} and store.get(forged.run_id) is None and not place.exists()
    assert len(said) == 1 and "does not match its name" in said[0] and "damaged" in said[0]


def test_a_record_from_before_revisions_is_of_another_version(store: Store, said: list[str]) -> None:
    path = put(store)
    rest = {name: value for name, value in a_record().model_dump(mode="json").items() if "_revision" not in name}
    path.write_text(json.dumps({**rest, "checksum": checksum(rest)}))
    assert store.get(RUN) is None and list((store.root / "other-version").rglob("record.json"))
    assert "another version of viladiff: core_revision" in said[0]


def test_a_published_record_has_the_name_that_the_run_had_although_it_hides_paths() -> None:
    fields = {"model.weights": "/home/me/w.safetensors", "method.clip.weights": "/data/clip.safetensors"}
    mine = bound(EXAMPLE, changed={**EXAMPLE.changed, **fields, "runtime.runs_dir": "/home/me/runs"})
    sent = strip_local_paths(mine)
    assert "/home" not in sent.model_dump_json() and mismatch(sent) == mismatch(mine) == ""
    other = bound(EXAMPLE, changed={**EXAMPLE.changed, **fields, "model.weights": "/home/me/other.safetensors"})
    assert other.run_id != mine.run_id


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["optim.lr", "data.scale", "model.weights", "x"]),
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(),
            st.tuples(st.floats(-1, 1), st.integers()),
        ),
    )
)  # fmt: skip
def test_a_name_is_the_same_after_json(changed: dict[str, Any]) -> None:
    one = bound(EXAMPLE, changed={**EXAMPLE.changed, **changed})
    again = parse_record(record_bytes(one), "there")
    assert again.run_id == one.run_id and mismatch(again) == ""


def test_record_that_was_mended_meanwhile_is_put_back(store: Store, said: list[str]) -> None:
    path = put(store)
    store._set_aside(path, "was damaged a moment ago", "damaged")
    assert store.get(RUN) == a_record() and said == []
    assert list((store.root / "damaged").iterdir()) == []


def test_a_field_of_another_version_is_kept_unread(store: Store, said: list[str]) -> None:
    path = put(store)
    rest = {**a_record().model_dump(mode="json"), "colour": "red"}
    path.write_text(json.dumps({**rest, "checksum": checksum(rest)}))
    record = store.get(RUN)
    assert record is not None and record.miou == EXAMPLE.miou and said == []
    save_record(strip_local_paths(record), path)
    assert json.loads(path.read_text())["colour"] == "red", "and goes on with the record"


@pytest.mark.parametrize(
    "change", [lambda row: row.pop("steps"), lambda row: row.update(scores="none")], ids=["missing", "another type"]
)
def test_sound_record_that_this_version_cannot_use_is_set_aside_and_its_run_can_go_on(
    store: Store, said: list[str], change: Callable[[dict[str, object]], object]
) -> None:
    path = put(store)
    (path.parent / "checkpoint.pt").write_bytes(b"weights")
    rest = a_record().model_dump(mode="json")
    change(rest)
    data = json.dumps({**rest, "checksum": checksum(rest)})
    path.write_text(data)
    looker = Store(store.root, say=said.append, repair=False)
    assert looker.get(RUN) is None and path.exists(), "who only looks moves nothing"
    assert store.get(RUN) is None and not path.exists() and (path.parent / "checkpoint.pt").exists()
    (aside,) = (store.root / "other-version").rglob("record.json")
    assert aside.read_text() == data
    assert len(said) == 2 and "another version" in said[1] and str(aside.parent) in said[1]


def test_damage_in_a_layer_is_only_told(tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "published" / "x" / "records" / "a.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    store = Store(tmp_path / "runs", [tmp_path / "published"], said.append)
    assert store.records() == {} and store.records() == {}
    assert path.read_text() == "{}" and len(said) == 1 and str(path) in said[0]
    assert not (tmp_path / "runs").exists()


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.text(max_size=20), st.sampled_from(["..", "/etc", "0123456789ABCDEF", RUN + "\n", f"../{RUN}"])))
def test_no_name_leaves_the_store(name: str) -> None:
    assume(not re.fullmatch(r"[0-9a-f]{16}", name))
    store = Store(Path("/nonexistent/runs"))
    for call in (store.directory, store.get, store.lease, store.failure, store.holder, store.clear_failure):
        with pytest.raises(ValueError, match="16 digits"):
            call(name)
    if not name.isascii() or not name.replace("-", "").isalnum():
        with pytest.raises(ValueError, match=r"16 digits|plain name"):
            store.file(name, "record.json")
        with pytest.raises(ValueError, match="plain name"):
            store.file(RUN, f"../{name}")


def test_failure_is_noted_replaced_and_cleared(store: Store, said: list[str]) -> None:
    assert store.failure(RUN) is None
    for attempts in (1, 2):
        failure = Failure(kind="nan", message="loss", step=None, attempts=attempts, when="2026-01-31T12:00:00Z")
        store.record_failure(RUN, failure)
        assert store.failure(RUN) == failure
    (store.directory(RUN) / "failure.json").write_text("{")
    assert store.failure(RUN) is None and len(said) == 1
    store.clear_failure(RUN)
    store.clear_failure(RUN)
    assert store.failure(RUN) is None and list(store.directory(RUN).iterdir()) == []


def test_half_written_files_of_processes_that_one_has_ended_oneself_go_at_once(store: Store) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = put(store).parent / f".checkpoint.pt.{dead.pid}.tmp"
    elsewhere = f"{int(TOKEN[:4], 16) ^ 1:04x}{TOKEN[4:]}"
    kept = {f".record.json.{os.getpid()}.{TOKEN}.tmp", f".record.json.{dead.pid}.{elsewhere}.tmp"}
    for name in (path.name, f".record.json.{dead.pid}.{TOKEN}.tmp", *kept):
        (path.parent / name).write_bytes(b"half")
    lease = store.lease(RUN)
    assert lease is not None and store.clean([dead.pid]) == [], "somebody is at work there"
    lease.release()
    assert [one.name for one in store.clean()] == [f".record.json.{dead.pid}.{TOKEN}.tmp"], "others' may be elsewhere's"
    assert len(store.clean([dead.pid, os.getpid()])) == 1
    assert {one.name for one in path.parent.iterdir()} == {"record.json", *kept}
    half_an_hour = time.time() - 1800
    os.utime(path.parent / f".record.json.{dead.pid}.{elsewhere}.tmp", (half_an_hour, half_an_hour))
    assert store.clean() == [], "clocks of machines may be half an hour apart"
    os.utime(path.parent / f".record.json.{dead.pid}.{elsewhere}.tmp", (1, 1))
    assert len(store.clean()) == 1


def test_store_needs_no_torch() -> None:
    code = "import sys, viladiff.runs.store; print([m for m in ('torch', 'viladiff.runs.config') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Leases


def lease_files(store: Store, run_id: str = RUN) -> list[str]:
    folder = store.directory(run_id)
    return [path.name for path in folder.iterdir() if "lease" in path.name] if folder.exists() else []


def foreign(store: Store, age: float = 0.0) -> Path:
    """The lease of a process on another machine."""
    path = store.directory(RUN) / f"lease-{'0' * 32}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = {"host": "far", "machine": "another", "pid": os.getpid(), "started": 1, "since": "2026-01-31T12:00:00Z"}
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_lease_is_one_and_leaves_nothing(store: Store) -> None:
    with store.lease(RUN) as lease:  # type: ignore[union-attr]
        assert lease is not None and not lease.lost
        assert store.lease(RUN) is None and Store(store.root).lease(RUN) is None
        holder = store.holder(RUN)
        assert holder is not None and holder.pid == os.getpid() and str(os.getpid()) in str(holder)
        other = store.lease(OTHER)
        assert other is not None
        other.release()
    assert lease_files(store) == lease_files(store, OTHER) == [] and store.holder(RUN) is None
    again = store.lease(RUN)
    assert again is not None
    again.release()
    again.release()


def test_of_two_that_come_at_once_none_stays_beside_the_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = leases.write_atomically

    def write(path: Path, data: bytes) -> None:
        real(path, data)
        foreign(store)  # comes after the first look, before the second

    monkeypatch.setattr(leases, "write_atomically", write)
    assert store.lease(RUN) is None
    assert lease_files(store) == [f"lease-{'0' * 32}.json"]


def test_failed_write_of_a_lease_leaves_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = leases.write_atomically

    def write(path: Path, data: bytes) -> None:
        real(path, data)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(leases, "write_atomically", write)
    with pytest.raises(OSError, match="Input/output"):
        store.lease(RUN)
    assert lease_files(store) == []


def test_threads_exclude_each_other(store: Store) -> None:
    inside, most, taken = [0], [0], [0]
    guard = threading.Lock()

    def work() -> None:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            lease = store.lease(RUN)
            if lease is None:
                continue
            with guard:
                inside[0] += 1
                taken[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.002)
            with guard:
                inside[0] -= 1
            lease.release()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and taken[0] > 5 and lease_files(store) == []


CONTENDER = """
import fcntl, os, random, sys, time
from pathlib import Path
from viladiff.runs.store import Store
root, seed, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
store, draw = Store(root), random.Random(seed)
runs = [f"{i:016x}" for i in range(20)]
print("ready", flush=True)
sys.stdin.readline()
until, got = time.monotonic() + seconds, 0
while time.monotonic() < until:
    run = draw.choice(runs)
    lease = store.lease(run)
    if lease is None:
        continue
    # The kernel frees this lock when its process dies, so that it tells two holders also among killed ones.
    mark = os.open(root / f"mark-{run}", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("TWO HOLDERS OF", run, flush=True)
    time.sleep(draw.uniform(0, 0.004))
    os.close(mark)
    lease.release()
    got += 1
print("got", got, flush=True)
"""


def contend(root: Path, kill: int, seconds: float = 1.5) -> tuple[str, int]:
    """What eight contending processes say, ``kill`` of which are killed on the way, and how often they held a lease."""
    root.mkdir()
    words = [sys.executable, "-c", CONTENDER, str(root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*words, str(seed), str(seconds)], **pipes) for seed in range(8)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    draw = random.Random(0)
    for process in processes[:kill]:
        time.sleep(draw.uniform(0.1, 0.3))
        process.kill()
    said = "".join(process.communicate(timeout=60)[0] for process in processes)
    return said, sum(int(line.split()[1]) for line in said.splitlines() if line.startswith("got"))


@pytest.mark.parametrize("kill", [0, 4])
def test_eight_processes_never_hold_one_run_twice(tmp_path: Path, kill: int) -> None:
    said, got = contend(tmp_path / "runs", kill)
    assert "TWO HOLDERS" not in said and "Error" not in said, said
    assert got > 50
    store = Store(tmp_path / "runs")
    for run in store.local_run_ids():
        lease = store.lease(run)
        assert lease is not None, f"{run} is still held by {store.holder(run)}"
        lease.release()
    for path in (tmp_path / "runs").rglob(".lease-*"):  # the killed were writing these
        os.utime(path, (1, 1))
    store.clean()
    assert list((tmp_path / "runs").rglob("*lease*")) == []


def held_by_process(root: Path, run_id: str) -> subprocess.Popen[str]:
    code = (
        "import sys, time; from pathlib import Path; from viladiff.runs.store import Store\n"
        "lease = Store(Path(sys.argv[1])).lease(sys.argv[2]); print(lease is not None, flush=True); time.sleep(600)"
    )
    words = [sys.executable, "-c", code, str(root), run_id]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    return process


def test_killed_holder_is_free_at_once_and_a_stopped_one_is_not(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENT", 0.0)
    monkeypatch.setattr(leases, "LONG_DEAD", 0.0)
    process = held_by_process(store.root, RUN)
    try:
        holder = store.holder(RUN)
        assert holder is not None and holder.pid == process.pid and store.lease(RUN) is None
        process.send_signal(signal.SIGSTOP)
        assert store.lease(RUN) is None, "a stopped process may go on"
        process.kill()
        until = time.monotonic() + 5
        while store.holder(RUN) is not None and time.monotonic() < until:
            time.sleep(0.01)
        lease = store.lease(RUN)  # nobody has waited for the process yet: it is a zombie
        assert lease is not None and len(lease_files(store)) == 1
        lease.release()
    finally:
        process.kill()
        process.wait()
    assert lease_files(store) == []


def test_process_number_that_was_used_again_holds_nothing(store: Store) -> None:
    lease = store.lease(RUN)
    assert lease is not None
    fields = json.loads(lease.path.read_text())
    lease.path.write_text(json.dumps({**fields, "started": fields["started"] - 1}))
    assert store.holder(RUN) is None and lease_files(store) != [], "whoever looks deletes nothing"
    lease.release()


def test_other_machine_holds_while_its_heart_beats(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENT", 0.2)
    path = foreign(store)
    for _ in range(4):
        assert store.lease(RUN) is None
        time.sleep(0.1)
        os.utime(path)
    assert store.holder(RUN) is not None
    time.sleep(0.3)
    lease = store.lease(RUN)
    assert lease is not None and not path.exists()
    lease.release()


@pytest.mark.parametrize("age", [-7200.0, -300.0, 300.0])
def test_clock_of_another_machine_may_be_wrong(store: Store, age: float) -> None:
    foreign(store, age)
    assert store.lease(RUN) is None, "only a heartbeat watched to stand still is a dead one's"


def test_long_dead_holder_of_another_machine_needs_two_heartbeats(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock may have jumped, as after a suspension, which the holder survives."""
    monkeypatch.setattr(leases, "HEARTBEAT", 0.2)
    path = foreign(store, 2 * leases.LONG_DEAD)
    assert store.lease(RUN) is None and store.held(RUN) and store.clean() == [], "it may beat in a moment"
    assert store.holder(RUN) is None and store.stale_files() == [path], "one look tells more than nothing"
    os.utime(path, (1, 1))
    time.sleep(0.3)
    assert store.lease(RUN) is None
    os.utime(path, (2, 2))
    assert store.lease(RUN) is None, "its heart beats, whatever the clocks say"
    assert store.lease(RUN) is None
    time.sleep(0.5)
    lease = store.lease(RUN)
    assert lease is not None and len(lease_files(store)) == 1 and not store.held(OTHER)
    lease.release()


def test_unreadable_lease_holds_until_it_is_silent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign(store)
    whole = path.read_text()
    machine = json.dumps(leases.machine())
    numbers = [whole.replace(f'"pid": {os.getpid()}', f'"pid": {pid}') for pid in (0, -1, 10**30)]
    numbers = [text.replace('"another"', machine) for text in numbers]
    for text in ("", "{}", "[]", '{"pid": "x"}', "\x00", "[" * 10**5, *numbers):
        path.write_text(text)
        assert store.lease(RUN) is None and store.holder(RUN) is None
    monkeypatch.setattr(leases, "SILENT", 0.0)
    time.sleep(0.01)
    lease = store.lease(RUN)
    assert lease is not None
    lease.release()


def test_heart_beats_and_a_lost_lease_is_noticed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT", 0.02)
    lease = store.lease(RUN)
    assert lease is not None
    os.utime(lease.path, (1, 1))
    until = time.monotonic() + 5
    while lease.path.stat().st_mtime < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert lease.path.stat().st_mtime > 2 and not lease.lost
    lease.path.unlink()
    while not lease.lost and time.monotonic() < until:
        time.sleep(0.01)
    assert lease.lost
    lease.release()


def test_a_lost_lease_is_noticed_after_a_stall_before_the_next_beat(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspended machine wakes in the middle of a step, and writes soon after."""
    with store.lease(RUN) as lease:  # type: ignore[union-attr]
        assert lease is not None
        lease.path.unlink()
        assert not lease.lost, "the file is not looked for at every step"
        now = time.time()
        monkeypatch.setattr(leases.time, "time", lambda: now + leases.SILENT)
        assert lease.lost


def test_forked_child_does_not_give_the_lease_away(store: Store) -> None:
    lease = store.lease(RUN)
    assert lease is not None
    child = os.fork()
    if child == 0:
        lease.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert lease_files(store) == [lease.path.name]
    lease.release()


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_sweep_removes_what_the_dead_left_and_nothing_else(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = put(store)
    names = [f".record.json.{dead_pid()}.{TOKEN}.tmp", f".checkpoint.pt.{dead_pid()}.tmp"]
    names += [f".checkpoint.pt.{dead_pid()}.prev.tmp", f".record.json.{os.getpid()}.{TOKEN}.tmp", ".notes.tmp"]
    for name in names:
        (kept.parent / name).write_bytes(b"half")
        os.utime(kept.parent / name, (1, 1))
    fresh = kept.parent / f".steps.jsonl.{dead_pid()}.tmp"
    fresh.write_bytes(b"half")
    stale = foreign(store, 2 * leases.LONG_DEAD)
    monkeypatch.setattr(leases, "HEARTBEAT", 0.0)
    assert store.held(RUN)
    time.sleep(0.01)
    removed = {path.name for path in store.clean()}
    assert removed == {*names[:3], stale.name}
    assert {path.name for path in kept.parent.iterdir()} == {"record.json", *names[3:], fresh.name}
    assert store.get(RUN) == a_record()


def test_sweep_leaves_a_held_run_alone(store: Store) -> None:
    foreign(store)
    half = store.directory(RUN) / f".checkpoint.pt.{dead_pid()}.tmp"
    half.write_bytes(b"half")
    os.utime(half, (1, 1))
    assert store.clean() == [] and half.exists()
