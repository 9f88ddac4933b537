"""The scales of real data from their command to the page, on a small tree of photographs in VOC's layout, on a CPU."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import published_layouts as layouts
import pytest
import torch

from viladiff.cli.tables import table_parser
from viladiff.experiments import tables
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import DataFacts
from viladiff.runs.record import RunRecord
from viladiff.runs.store import Store
from viladiff.training import feasibility
from viladiff.training.trainer import fit

ROOT = Path(__file__).resolve().parents[2]
STEPS, REFINED_FROM = 40, 20
SEEN = {"china": "A pagoda among trees below the sky.", "flower": "A red flower.", "grace": "A woman and a flag."}


class RealScale(NamedTuple):
    """A scale of the tables at its smallest."""

    encoder: str
    crop: int
    labelled: int
    """Labelled images in a step; BatchNorm of the pooled image refuses one. Two are unlabelled, which CutMix pairs."""
    rival: str
    """A row of Table 1 that is in no other table."""


SCALES = {
    "paper": RealScale("vit_tiny_patch16_224", 96, 1, "CorrMatch"),
    "strong": RealScale("vit_small_patch14_dinov2", 98, 1, "UniMatch V2"),
    "resnet": RealScale("resnet50s", 96, 2, "UniMatch"),
}


@pytest.fixture
def tree(photo_folder: Callable[..., Path], tmp_path: Path) -> dict[str, str]:
    """Fields that name twelve photographs, four of them labelled and three for validation, and a file of captions."""
    root = photo_folder(12, "voc", labelled=4, val=3, split="183", sizes=(90, 130), unlabelled_masks=True)
    rows = [{"image": path.stem, "text": SEEN[path.stem.split("_")[0]]} for path in (root / "JPEGImages").iterdir()]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "runtime.data_root": str(root),
        "runtime.captions": str(captions),
        "data.text_encoder": "words",
    }


def small(scale: RealScale, tree: dict[str, str]) -> list[str]:
    """Fields that shrink a scale and leave its protocol: two evaluations, refinement from the middle on."""
    fields = {
        **tree,
        "model.pretrained": "none",
        "data.crop": scale.crop,
        "data.batch_labelled": scale.labelled,
        "data.batch_unlabelled": 2,
        "train.steps": STEPS,
        "train.epochs": "none",
        "eval.every_steps": STEPS // 2,
        "eval.every_epochs": "none",
        "runtime.checkpoint_every": 10,
        "runtime.threads": 1,
    }
    return [f"{path}={value}" for path, value in fields.items()]


def command(table: int, scale: str, place: Path, rows: Sequence[str], fields: Sequence[str]) -> list[str]:
    where = ["--runs-dir", str(place / "runs"), "--report-dir", str(place / f"page{table}")]
    chosen = ["--scale", scale, "--columns", "1/8 (183)", "--seeds", "1", "--encoder", SCALES[scale].encoder]
    script = str(ROOT / "ablations" / f"run_table{table}.py")
    return [sys.executable, script, *chosen, "--max-concurrent", "1", *where, "--rows", *rows, "--", *fields]


def run(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def killed_after_refinement(words: list[str], runs: Path) -> str:
    """Start a table, kill the process that trains and then the table's own as soon as labels have been refined; return
    the name of the run."""
    table = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600
        while table.poll() is None and time.monotonic() < deadline:
            for log in runs.glob("*/steps.jsonl"):
                if len(log.read_text(encoding="utf-8").splitlines()) > REFINED_FROM + 5:
                    (lease,) = log.parent.glob("lease-*.json")
                    os.kill(json.loads(lease.read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
                    return log.parent.name
            time.sleep(0.05)
        raise AssertionError(f"no run has refined labels; the table's status is {table.poll()}")
    finally:
        table.kill()
        table.wait()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("scale", SCALES)
def test_tables_of_real_data_from_the_command_to_the_page(scale: str, tree: dict[str, str], tmp_path: Path) -> None:
    fields, runs = small(SCALES[scale], tree), tmp_path / "runs"
    ours = command(5, scale, tmp_path, ["ViLaDiff", "SemiBaseline"], fields)
    first = command(5, scale, tmp_path, ["ViLaDiff"], fields)
    killed = killed_after_refinement(first, runs)
    assert not (runs / killed / "record.json").exists() and (runs / killed / "checkpoint.pt").exists()
    run(ours)
    run(command(1, scale, tmp_path, [SCALES[scale].rival], fields))

    records = Store(runs).records()
    assert len(records) == 3 and killed in records
    for record in records.values():
        assert_complete(record, runs / record.run_id, SCALES[scale])
    log = [json.loads(line) for line in (runs / killed / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in log] == list(range(STEPS))
    for table in (1, 5):
        page = (tmp_path / f"page{table}" / "table.md").read_text(encoding="utf-8")
        assert (
            f"All rows train by the recipe {scale} (" in page and (tmp_path / f"page{table}" / "index.html").is_file()
        )


def assert_complete(record: RunRecord, directory: Path, scale: RealScale) -> None:
    assert record.steps == STEPS and record.config["model.encoder"] == scale.encoder
    assert [entry["step"] for entry in record.history] == [STEPS // 2, STEPS]
    assert record.miou is not None and 0 < record.miou < 1
    assert torch.load(directory / "checkpoint.pt", weights_only=True)["step"] == STEPS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_at_scale_strong_are_one(tree: dict[str, str], tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        **tree,
        "data.dataset": "voc",
        "data.split": "183",
        "method.name": "semibaseline",
        "model.encoder": "vit_small_patch14_dinov2",
        "model.pretrained": "none",
        "model.decoder": "dpt",
        "model.decoder_width": 64,
        "optim.lr": 2e-4,
        "optim.encoder_lr_scale": 0.025,
        "optim.decay_norm_and_bias": True,
        "data.crop": 56,
        "data.batch_labelled": 4,
        "data.batch_unlabelled": 4,
        "method.pseudo.threshold": 0.05,
        "train.steps": 3,
        "train.precision": "fp32",
        "eval.boundary": False,
        "runtime.threads": 1,
        "runtime.progress": False,
    }
    logs = []
    for workers in (1, 2):
        here = {"runtime.workers": workers, "runtime.runs_dir": str(tmp_path / f"of{workers}")}
        directory = fit(override(RunConfig(), {**fields, **here})).directory
        logs.append([json.loads(line) for line in (directory / "steps.jsonl").read_text(encoding="utf-8").splitlines()])
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert logs[0][-1]["pseudo"] > 0


VOC_LISTS = ("92", "183", "366", "732", "1464", *(f"{own}1_{n}" for own in ("", "u2pl_") for n in (16, 8, 4, 2)))
LISTS = {
    1: VOC_LISTS,
    2: VOC_LISTS,
    3: ("186", "372", "744", "1488"),
    4: ("232", "463", "925", "1849", "3697"),
    5: VOC_LISTS,
}


@pytest.fixture
def whole_tree(request: pytest.FixtureRequest, photographs: Any, tmp_path: Path) -> list[str]:
    """Fields of a tree in a table's layout, with all of its lists and a caption of every image; each list is alike."""
    table = request.getfixturevalue("table")
    first, *others = LISTS[table]
    if table in (3, 4):
        root = {3: layouts.cityscapes, 4: layouts.coco}[table](tmp_path / "photos", split=first).root
    else:
        root = photographs.write(tmp_path / "photos", 12, "voc", labelled=4, val=3, split=first, unlabelled_masks=True)
    for name in others:
        shutil.copytree(root / "splits" / first, root / "splits" / name)
    pictures = [path for path in root.rglob("*.*") if path.suffix in (".jpg", ".png") and "color" not in path.name]
    with open(tmp_path / "captions.csv", "w", encoding="utf-8", newline="") as file:
        names = {path.stem.removesuffix("_leftImg8bit") for path in pictures if "gtFine" not in path.name}
        csv.writer(file).writerows([["image", "text"], *((name, "a photograph") for name in sorted(names))])
    return [f"runtime.data_root={root}", f"runtime.captions={tmp_path / 'captions.csv'}"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", LISTS)
def test_the_whole_plan_passes_without_content(
    table: int, scale: str, whole_tree: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every network of a table at its own size, on meta tensors: a step and an evaluation of each."""
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    tried: list[str] = []
    plain = feasibility.try_on_meta

    def noted(cfg: RunConfig, data: DataFacts) -> list[str]:
        tried.append(f"{cfg.method.name} {cfg.model.encoder} {cfg.model.decoder} {cfg.data.crop} {data.classes}")
        return plain(cfg, data)

    monkeypatch.setattr(feasibility, "try_on_meta", noted)
    spec = ROOT / "ablations" / f"table{table}.toml"
    words = ["--scale", scale, "--seeds", "1", "--dry-run", "--runs-dir", str(tmp_path / "runs"), "--", *whole_tree]
    words += ["model.pretrained=none", "data.text_encoder=words"]
    assert tables.run_table(spec, table_parser(spec, "t").parse_args(words), "t") == 0
    recipe = {"paper": "vit_base_patch16_224 light", "strong": "vit_base_patch14_dinov2 dpt"}
    assert all(recipe.get(scale, "resnet101s deeplabv3plus") in one for one in tried), tried
    assert {one.split()[-1] for one in tried} == {{3: "19", 4: "81"}.get(table, "21")}
    methods = {one.split()[0] for one in tried}
    assert {"viladiff", "semibaseline"} <= methods if table == 5 else {"viladiff", "unimatch", "supervised"} <= methods
