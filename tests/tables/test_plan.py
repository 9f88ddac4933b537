"""Plans: names equal to those of the runs themselves, equal cells once, a kept plan without torch, states and times."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from record_kit import bound, content_of
from record_kit import made as record_of

from viladiff.core import source_digest
from viladiff.evaluation.devices import DEVICES
from viladiff.evaluation.step_time import ERROR, Load
from viladiff.models.encoders.build import SHIPPED
from viladiff.runs.config import RunConfig, non_default_fields, override
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import RunRecord, save_record
from viladiff.runs.store import Failure, Store
from viladiff.tables import plan as plans
from viladiff.tables.estimate import cost_lines, estimate
from viladiff.tables.plan import Plan, make_plan, states
from viladiff.tables.spec import Table
from viladiff.tables.spec_file import load_table
from viladiff.training.fingerprints import fingerprints, name_runs
from viladiff.training.run_cost import CountedStep, CountedSteps
from viladiff.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = record_of("supervised-92-0")

SMALL = """
title = "A table"
seeds = [0, 1]
notes = ["a note"]
[base]
"method.name" = "viladiff"
[scale.tiny]
datasets = { voc = "digits" }
threads = 1
seconds_per_step = 0.5
seconds_overhead = 2
set = { "train.steps" = 10, "eval.max_images" = 8 }
[scale.bare]
datasets = { voc = "digits" }
[[columns]]
label = "10"
set = { "data.dataset" = "voc", "data.split" = "183" }
[[columns]]
label = "20"
set = { "data.dataset" = "voc", "data.split" = "732" }
[[rows]]
label = "2"
set = { "method.name" = "semibaseline" }
paper = [1, 2]
components = ["a"]
[[rows]]
label = "1"
[[rows]]
label = "like 1"
set = { "method.mixe.timesteps" = 10 }
[[rows]]
label = "own"
control = true
set = { "data.captions" = "none" }
[[claims]]
text = "a claim"
kind = "higher"
rows = ["1", "2"]
"""


def table(tmp_path: Path, *changes: tuple[str, str]) -> Table:
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "small.toml"
    path.write_text(text, encoding="utf-8")
    return load_table(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of the whole small table, made once; tests only read it."""
    return make_plan(table(tmp_path_factory.mktemp("made")), "tiny")


# Names


def test_names_are_those_that_the_runs_give_themselves(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    shutil.copy(SHIPPED, other)
    chosen: list[dict[str, object]] = [
        {"method.name": "semibaseline", "data.split": "732", "seed": 2},
        {"method.name": "viladiff", "data.captions": "none", "data.split_seed": 3},
        {"method.name": "supervised", "model.pretrained": "none", "train.epochs": 0.01},
        {"method.name": "supervised", "model.weights": str(other), "runtime.threads": 1},
    ]
    configs = [override(RunConfig(), one) for one in chosen]
    found = name_runs(configs)
    for cfg, named in zip(configs, found, strict=True):
        run = Trainer(cfg)
        assert (named.run_id, named.fingerprints) == (run.name, run.fingerprints)
    assert len({named.run_id for named in found}) == len(found)
    assert [named.steps for named in found] == [1500, 1500, 1, 1500]
    assert "weights" not in found[2].fingerprints and fingerprints(configs[0]) == found[0].fingerprints
    other.write_bytes(other.read_bytes() + b" ")
    assert name_runs([configs[3]])[0].run_id != found[3].run_id, "nothing is remembered of a file that has changed"


def test_what_runs_share_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import viladiff.training.fingerprints as module

    read: list[tuple[object, ...]] = []

    def dataset(name: str, split: str, *rest: object) -> SimpleNamespace:
        read.append((name, split, *rest))
        words = ((f"words of {name}",),)
        facts = {"num_classes": 4, "unlabelled": (1, 2), "uniform": False, "fingerprint": f"{name} {split}"}
        return SimpleNamespace(captions=words, val_captions=words, caption_source="us", **facts)

    def text(opened: SimpleNamespace, encoder: str, control: str, *, model: str | None, on: str) -> str:
        read.append((opened.captions, control))
        return f"{opened.captions} {control}"

    def weights(cfg: RunConfig) -> dict[str, str]:
        hashed.append(getattr(getattr(cfg.method, "clip", None), "weights", cfg.model.pretrained))
        return {"weights": hashed[-1]}

    hashed: list[str] = []
    monkeypatch.setattr(module, "weights_fingerprint", weights)
    monkeypatch.setattr(module, "load_dataset", dataset)
    monkeypatch.setattr(module, "text_fingerprint", text)
    splits = [("digits", "183"), ("digits", "732"), ("dense", "232")]
    fields = [
        {"data.dataset": name, "data.split": split, "data.captions": control, "seed": seed}
        for name, split in splits
        for control in ("own", "none")
        for seed in range(3)
    ]
    fields.append({"data.split": "183", "model.pretrained": "none"})
    fields += [{"data.split": "183", "method.name": "semivl", "method.clip.weights": f"{name}.st"} for name in "ab"]
    found = name_runs([override(RunConfig(), one) for one in fields])
    assert len(read) == 3 + 2 * 2, "three labelled lists; the words of two data sets under two controls"
    assert hashed == ["shipped", "none", "a.st", "b.st"]
    assert {one.data for one in found} == {(4, 2, True, None)}, "facts of the data come with the name"
    assert [one.fingerprints["weights"] for one in found[-3:]] == hashed[1:], "CLIP's file counts as well"
    assert len({one.run_id for one in found}) == len(found)
    assert len({one.fingerprints["text"] for one in found}) == 4


def test_unusable_inputs_are_refused_as_a_run_refuses_them() -> None:
    with pytest.raises(ValueError, match=r"runtime\.data_root: must be set .* 'coco'"):
        name_runs([override(RunConfig(), {"data.dataset": "coco"})])


# Plans


def test_equal_cells_are_one_run_and_every_cell_has_one(made: Plan) -> None:
    assert len(made.cells) == 4 * 2 * 2 and len(made.runs) == 3 * 2 * 2
    assert {cell.run_id for cell in made.cells} == set(made.runs)
    assert made.run_ids(1, 0) == made.run_ids(2, 0) and len(set(made.run_ids(1, 0))) == 2
    assert made.run_ids(0, 0) != made.run_ids(0, 1) and made.run_ids(4, 0) == ()
    assert "method.mixe.timesteps" not in made.runs[made.run_ids(1, 0)[0]].changes, "as its first cell asks for it"
    titles = [run.title for run in made.runs.values()]
    assert titles[:3] == ["2, 10, seed 0", "2, 20, seed 0", "1, 10, seed 0"] and "like 1, 10, seed 0" not in titles
    assert [cell.seed for cell in made.cells] == [0] * 8 + [1] * 8


def test_a_planned_run_can_be_run_as_it_stands(made: Plan) -> None:
    for run_id, run in made.runs.items():
        cfg = override(RunConfig(), run.changes)
        assert run.run_id == run_id and run.steps == 10 and (run.workers, run.threads) == (1, 1)
        assert run.changed == {
            path: value for path, value in non_default_fields(cfg).items() if not path.startswith("runtime.")
        }
    first = next(iter(made.runs.values()))
    assert Trainer(override(RunConfig(), first.changes)).name == first.run_id


def test_places_survive_labels_that_look_like_numbers(tmp_path: Path) -> None:
    """Row "2" is the first row: what was chosen must not be looked up by its number once more."""
    found = make_plan(table(tmp_path), "tiny", seeds=[0], rows=["2"], columns=["10"])
    assert found.rows == (0,) and [run.changes["method.name"] for run in found.runs.values()] == ["semibaseline"]
    assert [run.changes["data.split"] for run in found.runs.values()] == ["183"]


# Keeping


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, made: Plan) -> list[int]:
    """How often a plan was made; making is replaced, since only the keeping is looked at."""
    calls: list[int] = []

    def fake(*_: object) -> tuple[plans._Kept, bool]:
        calls.append(1)
        return plans._Kept(made.cells, tuple(made.runs.values())), True

    monkeypatch.setattr(plans, "_make", fake)
    monkeypatch.setattr(plans, "code_digest", lambda: "code")
    return calls


SAME = [
    ('title = "A table"', 'title = "B table"'),
    ('notes = ["a note"]', "notes = []"),
    ('label = "own"', 'label = "ours"'),
    ("paper = [1, 2]", "paper = [3, 4]"),
    ('components = ["a"]', 'components = ["b"]'),
    ('text = "a claim"', 'text = "another"'),
    ("seconds_per_step = 0.5", "seconds_per_step = 0.6"),
    ('[scale.bare]\ndatasets = { voc = "digits" }', '[scale.bare]\ndatasets = { voc = "dense" }'),
]
OTHER = [
    ('"train.steps" = 10', '"train.steps" = 11'),
    ('datasets = { voc = "digits" }', 'datasets = { voc = "dense" }'),
    ("threads = 1", "threads = 2"),
    ("seeds = [0, 1]", "seeds = [0, 2]"),
    ('"data.captions" = "none"', '"data.captions" = "generic"'),
    ('"data.split" = "732"', '"data.split" = "92"'),
    ('"method.name" = "viladiff"', '"method.name" = "viladiff"\n"train.precision" = "bf16"'),
]


@pytest.mark.parametrize("change", SAME, ids=lambda change: change[1])
def test_a_plan_is_kept_through_changes_that_no_run_sees(
    tmp_path: Path, counted: list[int], change: tuple[str, str]
) -> None:
    first = make_plan(table(tmp_path), "tiny", cache=tmp_path / "plans")
    again = make_plan(table(tmp_path, change), "tiny", cache=tmp_path / "plans")
    assert len(counted) == 1 and (again.cells, again.rows) == (first.cells, first.rows)
    assert again.table != first.table


def test_titles_follow_the_labels_of_today(tmp_path: Path, counted: list[int]) -> None:
    make_plan(table(tmp_path), "tiny", cache=tmp_path / "plans")
    again = make_plan(table(tmp_path, ('label = "own"', 'label = "ours"')), "tiny", cache=tmp_path / "plans")
    assert "ours, 10, seed 0" in {run.title for run in again.runs.values()} and len(counted) == 1


@pytest.mark.parametrize("change", OTHER, ids=lambda change: change[1])
def test_a_plan_is_made_again_where_a_run_changes(tmp_path: Path, counted: list[int], change: tuple[str, str]) -> None:
    make_plan(table(tmp_path), "tiny", cache=tmp_path / "plans")
    make_plan(table(tmp_path, change), "tiny", cache=tmp_path / "plans")
    assert len(counted) == 2


def test_a_plan_belongs_to_its_selection_command_line_code_and_weights(
    tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, cache = table(tmp_path), tmp_path / "plans"
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"one")
    ways: list[dict[str, object]] = [
        {},
        {"seeds": [0]},
        {"rows": ["1"]},
        {"columns": ["10"]},
        {"changes": {"train.steps": "11"}},
        {"changes": {"model.weights": str(weights)}},
    ]
    for _ in range(2):
        for way in ways:
            make_plan(spec, "tiny", cache=cache, **way)  # type: ignore[arg-type]
        assert len(counted) == len(ways)
    weights.write_bytes(b"two")
    make_plan(spec, "tiny", cache=cache, changes={"model.weights": str(weights)})
    assert len(counted) == len(ways) + 1
    monkeypatch.setattr(plans, "code_digest", lambda: "newer code")
    make_plan(spec, "tiny", cache=cache)
    assert len(counted) == len(ways) + 2
    make_plan(spec, "tiny")
    assert len(counted) == len(ways) + 3, "without a place to keep it, it is made each time"


@pytest.mark.parametrize("damage", ["empty", "cut", "altered", "other shape", "not text", "a directory"])
def test_a_damaged_plan_is_made_again(tmp_path: Path, counted: list[int], damage: str) -> None:
    cache = tmp_path / "plans"
    first = make_plan(table(tmp_path), "tiny", cache=cache)
    (file,) = cache.iterdir()
    text = file.read_text()
    if damage == "empty":
        file.write_text("")
    elif damage == "cut":
        file.write_text(text[: len(text) // 2])
    elif damage == "altered":
        file.write_text(text.replace('"steps": 10', '"steps": 12', 1))
    elif damage == "other shape":
        rest = '{"cells": [], "runs": [1]}'
        file.write_text(f"{hashlib.sha256(rest.encode()).hexdigest()}\n{rest}")
    elif damage == "not text":
        file.write_bytes(b"\xff\xfe")
    else:
        file.unlink()
        file.mkdir()
    again = make_plan(table(tmp_path), "tiny", cache=cache)
    assert len(counted) == 2 and again == first
    if damage != "a directory":
        make_plan(table(tmp_path), "tiny", cache=cache)
        assert len(counted) == 2 and file.read_text() == text, "and kept"


def test_a_place_that_cannot_be_written_costs_time_only(tmp_path: Path, counted: list[int]) -> None:
    (tmp_path / "file").write_text("")
    make_plan(table(tmp_path), "tiny", cache=tmp_path / "file" / "plans")
    assert len(counted) == 1


def test_data_that_may_change_is_looked_at_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import viladiff.training.fingerprints as module

    named = module.Named("0" * 16, {}, 3)
    monkeypatch.setattr(module, "name_runs", lambda configs: [named for _ in configs])
    for scale, kept in (("tiny", 1), ("real", 1)):
        spec = table(tmp_path, ("[scale.bare]", "[scale.real]\n[scale.bare]"))
        make_plan(spec, scale, seeds=[0], cache=tmp_path / "plans")
        assert len(list((tmp_path / "plans").iterdir())) == kept


def test_code_digest_sees_every_source_and_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "viladiff"
    (package / "models").mkdir(parents=True)
    (package / "a.py").write_text("1")
    (package / "models" / "w.safetensors").write_text("1")
    monkeypatch.setattr(source_digest, "_PACKAGE", package)
    seen = [source_digest.code_digest()]
    for file in ("a.py", "models/w.safetensors", "models/b.py"):
        (package / file).write_text("2")
        seen.append(source_digest.code_digest())
    (package / "a.py").rename(package / "c.py")
    seen.append(source_digest.code_digest())
    (package / "notes.md").write_text("no code")
    assert len(set(seen)) == 5 and source_digest.code_digest() == seen[-1]


def test_a_kept_plan_needs_no_torch_and_little_time(
    tmp_path: Path, made: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that finds the plan: reading, planning and looking at the store."""
    package = tmp_path / "viladiff"  # a copy, so that an edit of the sources meanwhile does not make it another plan
    shutil.copytree(ROOT / "viladiff", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source_digest, "_PACKAGE", package)
    monkeypatch.setattr(plans, "_make", lambda *_: (plans._Kept(made.cells, tuple(made.runs.values())), True))
    make_plan(table(tmp_path), "tiny", cache=tmp_path / "plans")
    code = (
        "import sys, time; from pathlib import Path; from viladiff.tables.spec_file import load_table;"
        "from viladiff.tables.plan import make_plan, states; from viladiff.tables.estimate import estimate;"
        "from viladiff.runs.store import Store;"
        "import viladiff; assert Path(viladiff.__file__).is_relative_to(Path.cwd());"
        "p = make_plan(load_table('small.toml'), 'tiny', cache=Path('plans')); s = Store(Path('runs'));"
        "states(p, s); estimate(p, s, 2);"
        "print('torch' in sys.modules, 'scipy' in sys.modules, time.process_time(), *p.runs)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch, scipy, seconds, *names = done.stdout.split()
    assert (torch, scipy) == ("False", "False") and names == list(made.runs)
    assert float(seconds) < 1.5, "of processor time, which a busy machine does not stretch"


# States


def record(run: PlannedRun, **fields: Any) -> RunRecord:
    """Of the plan's run; with other ``fingerprints`` or changed fields, of a run with the name that they give."""
    return bound(EXAMPLE, **{**content_of(run), "threads": 1, "steps": run.steps, **fields})


def put(store: Store, one: RunRecord) -> None:
    directory = store.directory(one.run_id)
    directory.mkdir(parents=True, exist_ok=True)
    save_record(one, directory / "record.json")


def test_a_page_takes_settings_at_their_defaults_from_the_plan(made: Plan, tmp_path: Path) -> None:
    from viladiff.report.table.results import collect_results

    run = next(iter(made.runs.values()))
    store = Store(tmp_path)
    put(store, record(run))
    (one,) = store.records().values()
    assert "eval.protocol" not in run.changed and made.settled(one) == one
    forged = RunRecord(**{**one.model_dump(), "config": {**one.config, "eval.protocol": "sliding", "optim.lr": 9.0}})
    put(store, forged)
    assert store.records()[run.run_id].config["optim.lr"] == 9.0, "no hash says so"
    (shown,) = collect_results(made, store).records().values()
    assert shown == one and made.default(run.changed, "optim.lr") == one.config["optim.lr"]


def test_states_of_runs(made: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    ids = list(made.runs)
    assert set(states(made, store).values()) == {"missing"}
    done, running, failed, begun, stale, other_seed, *rest = ids
    put(store, record(made.runs[done]))
    put(store, record(made.runs[stale], fingerprints={"data": "older"}))
    put(store, record(made.runs[rest[0]], changed={"seed": 7}))
    for one in (done, running, failed, begun):
        store.directory(one).mkdir(parents=True, exist_ok=True)
        (store.directory(one) / "checkpoint.pt").write_bytes(b"")
    failure = Failure(kind="nan", message="m", step=3, attempts=1, when="2026-01-31T12:00:00Z")
    for one in (done, running, failed):
        store.record_failure(one, failure)
    with store.lease(running) or pytest.fail("the lease was not to be had"):
        found = states(made, store)
    assert [found[one] for one in ids[:6]] == ["done", "running", "failed", "begun", "stale", "missing"]
    assert {found[one] for one in (other_seed, *rest)} == {"missing"}


# Estimates


def test_estimate_without_measurements_is_the_tables_guess(made: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    found = estimate(made, store, 2, price_per_hour=3.0)
    assert (found.cells, found.runs, found.done, found.measured) == (16, 12, 0, 0)
    assert found.seconds == pytest.approx(12 * (10 * 0.5 + 2) / 2)
    assert found.cost == pytest.approx(found.seconds / 3600 * 3.0)
    assert found.basis == "12 runs remaining: 12 estimated by the table file"
    assert estimate(made, store, 50).seconds == pytest.approx(7), "no faster than the longest run"
    assert estimate(made, store).cost is None
    with pytest.raises(ValueError, match="concurrency = 0"):
        estimate(made, store, 0)


def test_estimate_from_records_of_the_same_settings_then_of_the_same_method(made: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    runs = list(made.runs.values())
    ours = [run for run in runs if run.changed["method.name"] == "viladiff" and "data.captions" not in run.changed]
    # 0.3 s a step and 4 s besides; the second was resumed, so that its last process says nothing of the rest.
    put(store, record(ours[0], train_seconds=3.0, wall_seconds=7.0))
    put(store, record(ours[1], train_seconds=3.0, wall_seconds=0.5))
    found = estimate(made, store)
    assert (found.done, found.measured) == (2, 6), "no captions cost no other time; semibaseline is another method"
    assert found.seconds == pytest.approx(6 * (10 * 0.3 + 4) + 4 * (10 * 0.5 + 2))
    assert "6 timed from runs with the same settings, 4 estimated by the table file" in found.basis
    first = next(run for run in runs if run.changed["method.name"] == "semibaseline")
    akin = {**first.changed, "method.cutmix": False}
    put(store, record(first, changed=akin, train_seconds=1.0, wall_seconds=2.0))
    found = estimate(made, store)
    assert (
        found.seconds == pytest.approx(6 * 7 + 4 * (10 * 0.1 + 1))
        and "4 timed from runs of the same method" in found.basis
    )


def test_estimate_prefers_records_of_as_many_threads_and_the_same_evaluation(made: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    ours = [run for run in made.runs.values() if run.changed["method.name"] == "semibaseline"]
    put(store, record(ours[0], train_seconds=10.0, wall_seconds=13.0))
    put(store, record(ours[0], fingerprints={"data": "older"}, threads=4, train_seconds=1.0, wall_seconds=2.0))
    all_images = {path: value for path, value in ours[1].changed.items() if path != "eval.max_images"}
    put(store, record(ours[1], changed=all_images, train_seconds=10.0, wall_seconds=90.0))
    found = estimate(made, store)
    assert found.seconds == pytest.approx(3 * (10 + 3) + 8 * 7)


def test_estimate_takes_no_time_of_another_precision(made: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    (first, *_) = [run for run in made.runs.values() if run.changed["method.name"] == "semibaseline"]
    bf16 = {**first.changed, "train.precision": "bf16"}
    put(store, record(first, changed=bf16, train_seconds=1.0, wall_seconds=2.0))
    assert estimate(made, store).measured == 0
    put(store, record(first, fingerprints={"data": "older"}, train_seconds=1.0, wall_seconds=2.0))
    assert estimate(made, store).measured > 0


@pytest.mark.parametrize(
    "other",
    [
        {"device": "NVIDIA H100 80GB HBM3"},
        {"workers": 2},
        {"model.encoder": "resnet18"},
        {"data.crop": 32},
        {"data.batch_unlabelled": 8},
        {"data.dataset": "dense"},
        {"train.precision": "bf16"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_time_is_not_lent_to_runs_of_another_kind(made: Plan, tmp_path: Path, other: dict[str, object]) -> None:
    store = Store(tmp_path / "runs")
    first = next(run for run in made.runs.values() if run.changed["method.name"] == "semibaseline")
    fields = {path: value for path, value in other.items() if "." not in path}
    changed = {**first.changed, **{path: value for path, value in other.items() if "." in path}}
    put(store, record(first, fingerprints={"data": "other"}, changed=changed, train_seconds=1.0, **fields))
    assert estimate(made, store).measured == 0
    put(store, record(first, fingerprints={"data": "older"}, train_seconds=1.0))
    assert estimate(made, store).measured > 0


def test_counted_work_costs_hours_memory_and_money(tmp_path: Path, made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the scale's guess, which is of a core, is not taken."""
    h100 = DEVICES["h100"]
    product = Load("product", True, int(h100.half * h100.sustained * 0.25), 0, 2)  # half a second
    monkeypatch.setattr(CountedSteps, "of", lambda steps, run: CountedStep((product,), 3 * 2**30, 2**30, 1))
    found = estimate(made, Store(tmp_path / "runs"), 2, device=h100)
    assert found.counted == 12 and found.basis == "12 runs remaining: 12 estimated from their counted work"
    assert found.seconds == pytest.approx(12 * 10 * 0.5 / 2) and found.device_hours == pytest.approx(60 / 3600)
    assert found.cost == pytest.approx(60 / 3600 * (h100.price or 0)), "of the device, as no price was given"
    lines = cost_lines(found, h100)
    assert lines["memory"] == "at most 3.0 GiB a run, checkpoints of 1.00 GiB"
    assert lines["GPU-hours"] == f"0 on h100, estimated to within {ERROR:.0%}" and lines["cost"].startswith("0.05, est")
    small = h100._replace(memory=2 * 2**30)
    assert "; more than the 2 GiB of h100: name another --device" in cost_lines(found, small)["memory"]
    priced = estimate(made, Store(tmp_path / "runs"), 2, 3.6, h100)
    assert priced.cost == pytest.approx(0.03), "30 s of the whole machine at 3.6 an hour"


def test_estimate_takes_off_what_an_interrupted_run_has_done(made: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    directory = store.directory(next(iter(made.runs)))
    directory.mkdir(parents=True)
    (directory / "steps.jsonl").write_text('{"step": 0}\n{"step": 5}\n{"st')
    assert estimate(made, store).seconds == pytest.approx(12 * 7), "without a checkpoint it starts again"
    (directory / "checkpoint.pt").write_bytes(b"")
    assert estimate(made, store).seconds == pytest.approx(12 * 7 - 6 * 0.5)


def test_estimate_says_nothing_where_nobody_can(tmp_path: Path, made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedSteps, "of", lambda steps, run: None)
    spec = table(tmp_path, ("seconds_per_step = 0.5", ""))
    bare = Plan(spec, "tiny", made.rows, made.columns, made.seeds, made.cells, made.runs)
    found = estimate(bare, Store(tmp_path / "runs"), price_per_hour=1.0)
    assert found.seconds is None and found.cost is None and "no timing for '2, 10, seed 0'" in found.basis
    store = Store(tmp_path / "all")
    for run in bare.runs.values():
        put(store, record(run))
    found = estimate(bare, store)
    assert (found.seconds, found.done, found.basis) == (0.0, 12, "nothing to run")


@pytest.mark.slow
def test_a_plan_of_table5_names_each_run_once() -> None:
    found = make_plan(load_table(ROOT / "ablations" / "table5.toml"), "digits")
    cells = {(cell.row, cell.column, cell.seed) for cell in found.cells}
    seeds = {seed for *_, seed in cells}
    assert len(found.cells) == len(found.runs) == len(cells) == 171
    assert len({(row, column) for row, column, _ in cells}) * len(seeds) == len(cells) and {0, 1, 2} <= seeds
