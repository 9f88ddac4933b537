"""``viladiff runs``: what it shows is what was recorded, what it deletes is waste, what it unpacks was checked."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_kit import LAYER, SHORT_RUNS, bound, made

from viladiff.cli import main
from viladiff.core.atomic import writer_token
from viladiff.core.source_digest import plan_stem
from viladiff.runs import archive
from viladiff.runs.record import RunRecord, record_bytes, save_record, strip_local_paths
from viladiff.runs.store import Failure, Store

ONE, TWO = made("viladiff-183-0"), made("viladiff-92-0")
THREE = made("supervised-1464-2").model_copy(update={"finished": ""})  # as if it was not noted
PERCENT = f"{100 * (ONE.miou or 0):.2f}"
RISING = [record.run_id for record in sorted((ONE, TWO, THREE), key=lambda record: record.miou or 0)]
SHORT = "data.batch_labelled=4 eval.every_steps=2 eval.split=test eval.max_images=8 eval.boundary=false"
"""What tests/make_records.py sets for every run, as the list shows it."""
BEGUN, FAILED = "00000000000000aa", "00000000000000bb"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store ``runs`` in the working directory with two finished, a begun and a failed run, and a published one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    layer = tmp_path / "reports" / "published" / "table5" / "records"
    layer.mkdir(parents=True)
    save_record(THREE, layer / "any.json")
    store = Store(tmp_path / "runs")
    for record in (ONE, TWO):
        put(store, record)
    for run_id in (BEGUN, FAILED):
        store.directory(run_id).mkdir()
    (store.directory(BEGUN) / "checkpoint.pt").write_bytes(b"weights")
    failure = Failure(kind="nan", message="the loss is nan", step=7, attempts=1, when="2026-01-31T12:00:00Z")
    store.record_failure(FAILED, failure)
    return store


def put(store: Store, record: RunRecord) -> Path:
    path = store.directory(record.run_id) / "record.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_record(record, path)
    return path


@pytest.fixture
def runs(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Carries out ``viladiff runs ...`` and returns what it prints, errors included."""

    def call(*words: str, status: int = 0) -> str:
        got = main.main(["runs", *words])
        text = capsys.readouterr()
        assert got == status, text
        return text.out + text.err

    return call


Runs = Callable[..., str]


@pytest.mark.parametrize("words", [["--help"], ["list", "--help"], ["import", "--help"]])
def test_help_has_examples_and_loads_nothing(words: list[str]) -> None:
    code = (
        "import sys\nfrom viladiff.cli.main import main\ntry: main(['runs', *sys.argv[1:]])\n"
        "finally: print([m for m in ('torch', 'numpy', 'pydantic', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n") and "example" in done.stdout and done.returncode == 0


def test_reading_commands_need_no_torch(home: Store) -> None:
    code = "import sys\nfrom viladiff.cli.main import main\nmain(['runs', *sys.argv[1:]])\n"
    code += "assert 'torch' not in sys.modules"
    for words in (["list"], ["show", ONE.run_id], ["diff", ONE.run_id, TWO.run_id], ["gc", "--dry-run"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# list


def names(text: str) -> list[str]:
    """First words of the lines of runs."""
    return re.findall(r"^([0-9a-f]{16}) ", text, re.MULTILINE)


def test_list_shows_every_run_sorted(home: Store, runs: Runs) -> None:
    text = runs("list")
    assert names(text) == [THREE.run_id, TWO.run_id, ONE.run_id, BEGUN, FAILED]  # split 92 before 183
    line = next(line for line in text.splitlines() if line.startswith(ONE.run_id))
    assert line.split() == [ONE.run_id, "viladiff", "digits", "183", "0", *SHORT.split(), "4", *line.split()[-3:]]
    assert PERCENT in line and "done" in line and "published" not in line
    assert "published" in next(line for line in text.splitlines() if line.startswith(THREE.run_id))
    assert "nan at step 7, attempt 1: the loss is nan" in text and text.endswith("5 runs\n")
    assert names(runs("list", "--sort", "miou")) == [*RISING, BEGUN, FAILED]
    assert names(runs("list", "--sort", "miou", "--reverse"))[:3] == RISING[::-1]


def test_list_says_what_differs_and_the_scale(home: Store, runs: Runs) -> None:
    changes = {"method.mixe.enabled": False, "runtime.runs_dir": "/somewhere", "data.split": "183"}
    more = {"scale": "quick", "finished": "2026-01-31T12:00:00Z"}
    put(home, one := bound(ONE, changed={**ONE.changed, **changes}, **more))
    line = next(line for line in runs("list", "scale=quick").splitlines() if line.startswith(one.run_id))
    told = [*SHORT.split(), "method.mixe.enabled=false", "4", PERCENT, "done", "2026-01-31T12:00:00Z", "quick"]
    assert line.split()[5:] == told


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["data.split=183"], [ONE.run_id]),
        (["method.name=viladiff", "seed=0"], [TWO.run_id, ONE.run_id]),
        (["method=viladiff", "optim.lr=6e-3"], [TWO.run_id, ONE.run_id]),
        (["data.scale=0.9,1.1", "method.mixe.enabled=true"], [TWO.run_id, ONE.run_id]),
        (["train.epochs=none"], [THREE.run_id, TWO.run_id, ONE.run_id]),
        (["published=true"], [THREE.run_id]),
        (["--state", "failed"], [FAILED]),
        (["--state", "begun"], [BEGUN]),
        (["--state", "done", "seed=2"], [THREE.run_id]),
    ],
)
def test_filters(home: Store, runs: Runs, words: list[str], found: list[str]) -> None:
    assert names(runs("list", *words)) == found
    assert [row["run_id"] for row in json.loads(runs("list", "--json", *words))] == found


def test_filters_that_find_nothing_say_what_there_is(home: Store, runs: Runs) -> None:
    assert "data.split is one of 92, 183, 1464; did you mean '183'?" in runs("list", "data.split=184")
    assert "did you mean 'data.split'?" in runs("list", "data.splt=183", status=2)
    assert "eval.on: renamed; write eval.split" in runs("list", "eval.on=val", status=2)
    assert "write field=value" in runs("list", "183", status=2)
    assert "did you mean 'miou'?" in runs("list", "--sort", "moiu", status=2)
    assert "None of 5 runs" in runs("list", "data.split=183", "--state", "failed")
    assert json.loads(runs("list", "data.split=184", "--json")) == []


def test_running_is_told_and_json_is_whole(home: Store, runs: Runs) -> None:
    lease = home.lease(BEGUN)
    assert lease is not None
    rows = {row["run_id"]: row for row in json.loads(runs("list", "--json"))}
    lease.release()
    assert rows[BEGUN]["state"] == "running" and str(os.getpid()) in rows[BEGUN]["note"]
    assert rows[ONE.run_id]["miou"] == ONE.miou and rows[BEGUN]["miou"] is None


def test_no_run_is_met_with_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["list"], ["verify"]):
        assert "viladiff train method.name=viladiff" in runs(*words)
    for words in (["show", "a"], ["diff", "a", "b"], ["export", "a.tar.gz"]):
        assert "error: no " in runs(*words, status=2)
    assert "Nothing to delete" in runs("gc")
    assert list(tmp_path.iterdir()) == []


# show, diff


def test_show_tells_scores_and_a_bar_for_each_class(home: Store, runs: Runs) -> None:
    text = runs("show", ONE.run_id[:5])
    assert text == runs("show", f"runs/{ONE.run_id}/")
    assert f"run {ONE.run_id}: done" in text and f"{PERCENT} (teacher/visual" in text and "method.name" in text
    assert re.search(r"^precision +fp32$", text, re.MULTILINE)
    for network, streams in ONE.scores.items():
        for stream, scores in streams.items():
            line = next(line for line in text.splitlines() if line.startswith(f"{network}/{stream} "))
            assert f"{100 * scores['miou']:.2f}" in line
    bars = {line.split()[0]: line.count("█") for line in text.splitlines() if "█" in line}
    per_class = ONE.scores["teacher"]["visual"]["per_class"]
    wanted = {name: round(30 * iou) for name, iou in zip(ONE.class_names, per_class, strict=True)}
    assert bars == {name: length for name, length in wanted.items() if length}
    assert json.loads(runs("show", ONE.run_id, "--json"))["miou"] == ONE.miou


def test_show_of_unfinished_runs(home: Store, runs: Runs) -> None:
    assert "failed" in (text := runs("show", FAILED)) and "the loss is nan" in text
    assert "begun" in (text := runs("show", BEGUN)) and "checkpoint.pt  7 B" in text


def test_names_of_runs_are_understood_or_explained(home: Store, runs: Runs) -> None:
    assert "ambiguous run id '0000': matches 00000000000000aa, 00000000000000bb" in runs("show", "0000", status=2)
    wrong = ONE.run_id[:5] + "z" + ONE.run_id[6:]
    assert f"did you mean '{ONE.run_id}'?" in runs("show", wrong, status=2)
    assert f"did you mean '{ONE.run_id[:4]}'?" in runs("show", ONE.run_id[:3] + "z", status=2)
    assert "5 runs are in viladiff runs list" in runs("show", "", status=2)
    assert "not finished (failed" in runs("diff", ONE.run_id, FAILED, status=2)


def test_diff_shows_changed_fields_and_scores(home: Store, runs: Runs) -> None:
    lines = [line.split() for line in runs("diff", ONE.run_id, TWO.run_id).splitlines()]
    assert ["data.split", "183", "92"] in lines and ["data", *(r.fingerprints["data"] for r in (ONE, TWO))] in lines
    assert not any("method.name" in line for line in lines)
    a, b = (100 * record.scores["student"]["fusion"]["miou"] for record in (ONE, TWO))
    assert ["student/fusion/miou", f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"] in lines
    text = runs("diff", ONE.run_id, THREE.run_id)
    assert "method.name" in text and "teacher/visual/miou" in text


# verify


def test_verify_finds_damage_and_older_revisions_and_moves_nothing(home: Store, runs: Runs) -> None:
    from viladiff.runs import checkpoint

    (home.directory(BEGUN) / "checkpoint.pt").unlink()
    checkpoint.save_checkpoint(home.directory(ONE.run_id) / "checkpoint.pt", {"step": 600})
    text = runs("verify")
    assert text.count("configuration matches name") == 3 and "at step 600" in text and text.endswith("4 good, 0 bad\n")
    put(home, older := bound(ONE, core_revision=0))
    path = put(home, gone := bound(ONE, core_revision=0, changed={**ONE.changed, "data.gone": 1}))
    text = runs("verify", older.run_id, gone.run_id)
    assert f"stale: older revision, today's name would be {ONE.run_id}" in text and "stale: older fields" in text
    assert text.endswith("2 good, 0 bad\n")
    path.write_text(path.read_text().replace("0.0", "0.5", 1))
    weights = home.directory(ONE.run_id) / "checkpoint.pt"
    weights.write_bytes(weights.read_bytes()[:-1])
    text = runs("verify", status=1)
    assert text.count("BAD") == 2 and "its checksum is" in text and "truncated or damaged" in text and path.exists()
    assert "1 good, 0 bad" in runs("verify", "data.split=92", TWO.run_id)
    assert names(text := runs("list", "--state", "damaged")) == [gone.run_id] and "is damaged: its checksum" in text
    assert path.exists() and not (home.root / "damaged").exists()


def test_verify_tells_a_record_under_another_name(home: Store, runs: Runs) -> None:
    home.directory("3" * 16).mkdir()
    save_record(ONE, home.directory("3" * 16) / "record.json")
    assert "is the record of another run" in runs("verify", "3" * 16, status=1)


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "another run's place": (
        {**made("semibaseline-183-0").model_dump(), "run_id": ONE.run_id, "miou": 0.99},
        "fields, revisions, fingerprints, seed and precision give ",
    ),
    "the seed": ({"config": {**ONE.config, "seed": 1}, "changed": {**ONE.changed, "seed": 1}}, "give "),
    "the seed in config": ({"config": {**ONE.config, "seed": 1}}, "give "),
    "a changed field in config": ({"config": {**ONE.config, "train.steps": 600}}, "train.steps is 4 among the changed"),
    "a field": ({"config": {**ONE.config, "optim.lr": 1.0}, "changed": {**ONE.changed, "optim.lr": 1.0}}, "give "),
    "the precision": ({"config": {**ONE.config, "train.precision": "bf16"}}, "give "),
    "tf32": ({"config": {**ONE.config, "train.tf32": True}}, "give "),
    "a fingerprint": ({"fingerprints": {**ONE.fingerprints, "data": "0" * 16}}, "give "),
    "the core's revision": ({"core_revision": ONE.core_revision + 1}, "give "),
    "the method's revision": ({"method_revision": ONE.method_revision + 1}, "give "),
}
"""What is changed of ``ONE`` while its name and its checksum are right, and what is said."""
UNSAID: dict[str, tuple[dict[str, Any], str]] = {
    "a default": (
        {"config": {**ONE.config, "optim.lr": 1.0}},
        "optim.lr is 1.0 in config, 0.006 by default, and not among the changed fields",
    ),
    "the headline": ({"miou": 0.99}, f"miou is 0.99, and {ONE.miou} among the scores of teacher, visual"),
    "the stream": ({"stream": "fusion"}, "among the scores of teacher, fusion"),
    "the steps": ({"steps": 600}, "steps is 600, and train.steps 4"),
}
"""What is in no hash, and is looked up by ``verify`` and ``import``."""


@pytest.mark.parametrize("kind", FORGED)
def test_a_record_that_does_not_match_its_name_is_refused_everywhere(home: Store, runs: Runs, kind: str) -> None:
    fields, words = FORGED[kind]
    forged = RunRecord(**{**ONE.model_dump(), **fields})
    path = pack(Path("forged.tar.gz"), {RECORD: record_bytes(forged)})
    told = f"does not match its name {ONE.run_id}: "
    for text in (runs("import", str(path), "--runs-dir", "new", status=2), runs("import", str(path), status=2)):
        assert told in text and words in text
    assert contents(Path("new")) == set() and home.get(ONE.run_id) == ONE
    layer = Path("reports/published/forged/records")
    layer.mkdir(parents=True)
    save_record(forged, layer / "any.json")
    text = runs("verify", status=1)
    assert text.count(told) == 1 and words in text
    (layer / "any.json").unlink()
    place = put(home, forged)
    text = runs("verify", ONE.run_id, status=1)
    assert told in text and words in text and place.exists(), "looking moves nothing"
    said: list[str] = []
    store = Store(home.root, [layer.parent.parent], said.append)
    assert store.get(ONE.run_id) is None and told in said[0] and "damaged" in said[0] and not place.exists()


@pytest.mark.parametrize("kind", UNSAID)
def test_a_record_that_contradicts_itself_is_refused(home: Store, runs: Runs, kind: str) -> None:
    fields, words = UNSAID[kind]
    forged = RunRecord(**{**ONE.model_dump(), **fields})
    path = pack(Path("forged.tar.gz"), {RECORD: record_bytes(forged)})
    assert words in runs("import", str(path), "--runs-dir", "new", status=2) and contents(Path("new")) == set()
    put(home, forged)
    assert words in runs("verify", ONE.run_id, status=1)


def test_records_of_this_checkout_match_their_names(runs: Runs) -> None:
    text = runs("verify", "--runs-dir", "nowhere", "--published", str(LAYER))
    count = len(list(SHORT_RUNS.glob("*.json")))
    assert text.count("configuration matches name") == count and "stale" not in text, "make records"


# gc


def test_gc_deletes_waste_and_says_how_much(home: Store, runs: Runs) -> None:
    folder = home.directory(ONE.run_id)
    (folder / "checkpoint.pt").write_bytes(b"x" * 3000)
    os.link(folder / "checkpoint.pt", folder / "checkpoint.prev.pt")
    (folder / "hang.txt").write_bytes(b"x" * 40)  # of a worker that was killed once its record was there
    dead = subprocess.Popen(["true"])
    dead.wait()
    temporary = folder / f".record.json.{dead.pid}.{writer_token()}.tmp"
    temporary.write_bytes(b"x" * 500)
    os.utime(temporary, (1, 1))
    lease = home.directory(BEGUN) / f"lease-{'0' * 32}.json"
    lease.write_text("{}")
    os.utime(lease, (1, 1))
    leftover = home.root / f".import-{dead.pid}-abc"
    leftover.mkdir()
    os.utime(leftover, (1, 1))
    aside = home.root / "damaged" / f"{TWO.run_id}-20260131T120000-000000001"
    aside.mkdir(parents=True)
    (aside / "record.json").write_bytes(b"x" * 400)
    mine = home.root / "damaged" / "notes.txt"
    mine.write_text("of a person")
    before = {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()}
    text = runs("gc", "--dry-run")
    assert "It would free 3.9 kB (7 items)" in text and text.count("would delete") == 7
    assert {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()} == before
    assert "Freed 942 B" in runs("gc", "--keep-checkpoints") and (folder / "checkpoint.pt").exists()
    assert "Freed 3.0 kB" in runs("gc")
    left = {path for path in home.root.rglob("*") if path.is_file()}
    records = {home.directory(record.run_id) / "record.json" for record in (ONE, TWO)}
    kept = {mine, home.directory(BEGUN) / "checkpoint.pt", home.directory(FAILED) / "failure.json"}
    assert left == records | kept and not leftover.exists() and not aside.exists()
    assert "Nothing to delete" in runs("gc") and home.get(ONE.run_id) == ONE


def test_gc_knows_plans_pages_the_cache_and_what_fresh_has_replaced(home: Store, runs: Runs, tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    plans, page, replaced = home.root / "plans", Path("reports/quick/table5/figures"), home.root / "replaced" / "2026"
    for folder in (plans, page, replaced / ONE.run_id, replaced / BEGUN):
        folder.mkdir(parents=True)
    waste = [plans / f"plan-{'0' * 12}-{'1' * 24}.json", plans / f"plan-{'1' * 24}.json", replaced / BEGUN / "x"]
    half = [
        plans / f".plan.json.{dead.pid}.{writer_token()}.tmp",
        page / f".scores.png.{dead.pid}.{writer_token()}.tmp",
    ]
    kept = [plans / f"{plan_stem()}-{'1' * 24}.json", plans / "mine.txt", page / "scores.png"]
    kept.append(page / f".scores.png.{os.getpid()}.{writer_token()}.tmp")
    cache = tmp_path / "cache" / "digits"
    half.append(cache / f".5c3643929a9d7679-{dead.pid}-{writer_token()}" / "images.npy")
    kept += [cache / f".5c3643929a9d7679-{os.getpid()}-{writer_token()}" / "images.npy", cache / "5c36" / "images.npy"]
    for path in (half[-1], *kept[-2:]):
        path.parent.mkdir(parents=True)
    for path in (*waste, *half, *kept, replaced / ONE.run_id / "checkpoint.pt"):
        path.write_bytes(b"x")
        os.utime(path, (1, 1))
    save_record(ONE, replaced / ONE.run_id / "record.json")
    assert "Freed 6 B (6 items)" in runs("gc", "--keep-checkpoints")
    assert (replaced / ONE.run_id / "checkpoint.pt").exists()
    assert "Freed 1 B (1 items)" in runs("gc") and "Nothing to delete" in runs("gc")
    assert all(path.exists() for path in (*kept, replaced / ONE.run_id / "record.json"))
    assert not any(path.exists() for path in (*waste, *half, replaced / BEGUN))


def test_gc_spares_checkpoints_that_are_needed(home: Store, runs: Runs) -> None:
    for record in (ONE, TWO):
        (home.directory(record.run_id) / "checkpoint.pt").write_bytes(b"x")
    path = home.directory(ONE.run_id) / "record.json"
    path.write_text("{}")  # its run will be finished again from the checkpoint
    lease = home.lease(TWO.run_id)
    assert lease is not None
    assert "Nothing to delete" in runs("gc")
    lease.release()
    assert path.read_text() == "{}", "looking for waste moves nothing"
    assert (home.directory(ONE.run_id) / "checkpoint.pt").exists()


# export, import


@pytest.fixture
def packed(home: Store, runs: Runs) -> Path:
    path = put(home, RunRecord(**{**ONE.model_dump(), "config": {**ONE.config, "runtime.runs_dir": "/home/me/runs"}}))
    np.savez(path.parent / "pictures.npz", **{"0/image": np.zeros((1, 2, 2, 3), np.uint8)})
    (path.parent / "steps.jsonl").write_text('{"step": 0, "total": 1.5}\n')
    assert "2 runs in mine.tar.gz" in runs("export", "mine.tar.gz", "method.name=viladiff")
    return Path("mine.tar.gz")


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def pack(path: Path, files: dict[str, bytes], sums: bool = True) -> Path:
    if sums:
        files = {
            **files,
            "sums.json": json.dumps({k: hashlib.sha256(v).hexdigest() for k, v in files.items()}).encode(),
        }
    path.write_bytes(archive._pack(files))
    return path


def contents(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")} if root.exists() else set()


def test_what_is_packed_is_what_is_unpacked(home: Store, packed: Path, runs: Runs) -> None:
    assert b"/home/me" not in gzip.decompress(packed.read_bytes())
    again = runs("export", "again.tar.gz", ONE.run_id[:6], TWO.run_id)
    assert "2 runs" in again and Path("again.tar.gz").read_bytes() == packed.read_bytes()
    text = runs("import", str(packed), "--runs-dir", "new")
    assert "2 of 2 runs imported" in text
    new = Store(Path("new"))
    assert new.records() == {record.run_id: strip_local_paths(home.records()[record.run_id]) for record in (ONE, TWO)}
    for name in ("pictures.npz", "steps.jsonl"):
        assert (new.directory(ONE.run_id) / name).read_bytes() == (home.directory(ONE.run_id) / name).read_bytes()
    assert contents(new.root) == {
        *(record.run_id for record in (ONE, TWO)),
        *(f"{record.run_id}/record.json" for record in (ONE, TWO)),
        *(f"{ONE.run_id}/{name}" for name in ("pictures.npz", "steps.jsonl")),
    }
    assert "0 of 2" in (text := runs("import", str(packed), "--runs-dir", "new")) and text.count("already here") == 2


def test_export_refuses_what_it_cannot_do(home: Store, packed: Path, runs: Runs) -> None:
    assert "exists and is not overwritten" in runs("export", "mine.tar.gz", status=2)
    assert "ends in .tar.gz" in runs("export", "mine.zip", status=2)
    assert "not finished" in runs("export", "x.tar.gz", FAILED, status=2)
    assert "data.split is one of" in runs("export", "x.tar.gz", "data.split=1", status=2)
    assert "3 runs" in runs("export", "all.tar.gz")


def test_import_never_replaces_a_good_record(home: Store, packed: Path, runs: Runs) -> None:
    put(home, other := RunRecord(**{**TWO.model_dump(), "miou": 0.125}))
    assert "another record of it is here, which stays" in runs("import", str(packed))
    assert home.get(TWO.run_id) == other
    (home.directory(TWO.run_id) / "record.json").write_text("{}")
    text = runs("import", str(packed))
    assert "set aside" not in text and "1 of 2 runs imported" in text and "moved to" in text
    assert home.get(TWO.run_id) == strip_local_paths(TWO)


def test_import_leaves_runs_in_work_alone_and_finishes_begun_ones(home: Store, packed: Path, runs: Runs) -> None:
    new = Store(Path("new"))
    new.directory(ONE.run_id).mkdir(parents=True)
    (new.directory(ONE.run_id) / "checkpoint.pt").write_bytes(b"half-trained")
    lease = new.lease(TWO.run_id)
    assert lease is not None
    text = runs("import", str(packed), "--runs-dir", "new")
    lease.release()
    assert f"not imported: in work here (process {os.getpid()}" in text and "its checkpoint was removed" in text
    assert not (new.directory(ONE.run_id) / "checkpoint.pt").exists() and list(new.records()) == [ONE.run_id]


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


RECORD = f"records/{ONE.run_id}.json"
HOSTILE = {
    "parent": member("../outside.json"),
    "absolute": member("/tmp/viladiff-outside.json"),
    "inside parent": member(f"records/../../{ONE.run_id}.json"),
    "around": member(f"evil/records/{'1' * 16}.json.sh"),
    "link": member(RECORD, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member(RECORD, type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "device": member(RECORD, type=tarfile.CHRTYPE),
    "pipe": member(RECORD, type=tarfile.FIFOTYPE),
    "folder": member(f"records/{'0' * 16}.json", type=tarfile.DIRTYPE),
    "twice": member(RECORD),
    "other name": member("records/short.json"),
    "other part": member(f"checkpoints/{ONE.run_id}.pt"),
    "other ending": member(f"records/{ONE.run_id}.npz"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_put_nothing_anywhere(
    tmp_path: Path, home: Store, packed: Path, runs: Runs, kind: str
) -> None:
    files = members(packed)
    if HOSTILE[kind].name == RECORD and kind != "twice":
        del files[RECORD]
    path = Path("hostile.tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            tar.addfile(member(name, size=len(data)), io.BytesIO(data))
        tar.addfile(HOSTILE[kind])
    before = contents(tmp_path)
    assert "is nothing that viladiff runs export writes" in runs("import", str(path), "--runs-dir", "new", status=2)
    assert contents(tmp_path) - before <= {"new"} and contents(Path("new")) == set()
    assert not Path("/tmp/viladiff-outside.json").exists()


def test_archives_with_wrong_content_put_nothing_in_place(home: Store, packed: Path, runs: Runs) -> None:
    good = {name: data for name, data in members(packed).items() if name != "sums.json"}
    forged = re.sub(rb'"miou": 0\.', b'"miou": 0.9', good[RECORD], count=1)
    assert forged != good[RECORD]
    wrong: dict[str, tuple[dict[str, bytes], str]] = {
        "forged": ({**good, RECORD: forged}, "is damaged: its checksum"),
        "of another run": ({**good, RECORD: record_bytes(TWO)}, f"is the record of {TWO.run_id}"),
        "pickle": ({**good, f"pictures/{ONE.run_id}.npz": b"\x80\x04."}, "cannot be read"),
        "log": ({**good, f"steps/{ONE.run_id}.jsonl": b'{"step": "x"}\n'}, "cannot be read"),
        "no record": ({**good, f"steps/{'9' * 16}.jsonl": b""}, "belongs to no record"),
    }
    for files, message in wrong.values():
        path = pack(Path("wrong.tar.gz"), files)
        assert message in runs("import", str(path), "--runs-dir", "new", status=2)
        assert contents(Path("new")) == set()
    sums = members(packed)["sums.json"]
    for text, message in (
        (sums.replace(b"a", b"b"), "does not match sums"),
        (b"[", "cannot be read"),
        (b"3", "cannot be"),
    ):
        path = pack(Path("wrong.tar.gz"), {**good, "sums.json": text}, sums=False)
        assert message in runs("import", str(path), "--runs-dir", "new", status=2)
    assert "has no sums.json" in runs("import", str(pack(Path("w.tar.gz"), good, False)), "--runs-dir", "new", status=2)
    assert contents(Path("new")) == set()


def test_broken_files_are_no_archives(home: Store, packed: Path, runs: Runs) -> None:
    whole = packed.read_bytes()
    for data in (b"", b"not an archive", whole[: len(whole) // 2], gzip.compress(b"not a tar" * 100)):
        Path("broken.tar.gz").write_bytes(data)
        assert "broken.tar.gz" in runs("import", "broken.tar.gz", "--runs-dir", "new", status=2)
        assert contents(Path("new")) == set()
    assert "No such file" in runs("import", "absent.tar.gz", "--runs-dir", "new", status=2)


def test_archives_that_would_fill_the_disk_are_refused(
    home: Store, packed: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "LIMITS", {**archive.LIMITS, "records": 100})
    assert (
        "at most 100 are allowed" in runs("import", str(packed), "--runs-dir", "new", status=2)
        and contents(Path("new")) == set()
    )
