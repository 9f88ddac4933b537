"""The script that times steps on a GPU, run on whatever is here with small networks, and what failures leave of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from method_kit import make_batch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    given = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--tiny", "--scales", "paper", *options]
    return subprocess.run(given, env=env, capture_output=True, text=True, timeout=580)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_table_has_all_stages_and_a_cell_that_fails_says_why(tmp_path: Path) -> None:
    options = ("--seconds", "550", "--methods", "supervised", "viladif", "--how", "eager", "eager, full")
    done = run(tmp_path, *options)
    head, _, *rows = (tmp_path / "gpu_check.md").read_text(encoding="utf-8").splitlines()
    assert done.stdout.splitlines()[0] == head and head.startswith("| method | scale | how | batch | ms a step |")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    assert [cell[:4] for cell in cells[:2]] == [
        ["supervised", "paper", "eager", "2 + 2"],
        ["supervised", "paper", "eager, full", "4 + 4"],
    ], "on a CPU twice the batch is the limit"
    for cell in cells[:2]:
        assert float(cell[4]) > 0 and cell[5:7] == ["-", "-"] and cell[8] == "-", "a CPU has neither"
    assert 0 <= float(cells[0][7]) <= 100 and cells[1][7] == "-", "a larger batch is not loaded"
    assert len(rows) == 4 and all("method.name = 'viladif'" in line for line in rows[2:])
    assert done.returncode == 1


def arguments(check: ModuleType, **more: Any) -> Namespace:
    return Namespace(**{"tiny": True, "how": list(check.STAGES), "changes": [], **more})


def test_what_a_cell_found_stays_when_its_time_is_over(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is ended, and the stages that it did not come to say so."""
    slow = tmp_path / "slow.py"
    line = json.dumps({"how": "eager", "ms": 5.0})
    slow.write_text(f"import time\nprint({line!r}, flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(check, "__file__", str(slow))
    begun = time.monotonic()
    found = list(check.cell("supervised", "paper", arguments(check), 5))
    assert time.monotonic() - begun < 30
    assert found[0] == {"how": "eager", "ms": 5.0} and [one["how"] for one in found] == list(check.STAGES)
    assert all(one["failed"] == "more than 5 s" for one in found[1:])
    slow.write_text(f"print({line!r}, flush=True)\nraise SystemExit('CUDA error: device lost')\n")
    found = list(check.cell("supervised", "paper", arguments(check), 60))
    assert "ms" in found[0] and all(one["failed"] == "CUDA error: device lost" for one in found[1:])


class Bench:
    """One whose second stage is short of memory and whose third one is late."""

    now: ClassVar[list[int]] = [0]

    def __init__(self) -> None:
        self.run = SimpleNamespace(optimizer=SimpleNamespace(zero_grad=lambda: None))

    def stage(self, how: str) -> dict[str, object]:
        if how == "eager, full":
            raise torch.OutOfMemoryError("CUDA out of memory\nlong story")
        if how == "compiled":
            self.now[0] += 100
        return {"ms": 1.0}


def test_a_stage_that_fails_or_is_late_leaves_the_others_alone(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "time", SimpleNamespace(monotonic=lambda: Bench.now[0]))
    found = list(check.staged(Bench, check.STAGES, 50))
    assert [one["how"] for one in found] == list(check.STAGES)
    assert found[0]["ms"] == found[2]["ms"] == 1.0
    assert found[1]["failed"] == "CUDA out of memory" and found[3]["failed"] == "no time is left"
    shown = check.row("supervised", "paper", found[1])
    assert shown == "| supervised | paper | eager, full | - | - | - | - | - | - | CUDA out of memory |"


@pytest.mark.parametrize(("holds", "expected"), [(1, 1), (2, 2), (3, 3), (5, 4), (6, 6), (11, 8), (12, 12), (99, 64)])
def test_the_batch_that_fills_the_card_is_searched(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, holds: int, expected: int
) -> None:
    monkeypatch.setattr(check.gc, "collect", lambda: 0)  # a second each time beside all other tests

    def fits(factor: int) -> None:
        if factor > holds:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert check.largest(fits, 64) == expected


def test_a_larger_batch_pairs_images_within_each_copy(check: ModuleType) -> None:
    one = make_batch(4)
    (twice,) = check.repeated([one], 2)
    assert twice.image.shape[0] == twice.target.shape[0] == twice.strong[0].shape[0] == len(twice.keys) == 8
    assert twice.mix[0].partner.tolist() == [1, 0, 3, 2, 5, 4, 7, 6] and twice.mix[0].boxes.shape == (8, 4)
    assert twice.text.tokens.shape[0] == 8 and torch.equal(twice.image[4:], one.image)


def test_synchronisations_are_counted(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step(batches: list[Tensor]) -> None:
        for text in ("called a synchronizing CUDA operation", "called a synchronizing CUDA operation", "deprecated"):
            warnings.warn(text, stacklevel=1)

    assert check.synchronisations(step, []) == 2 and modes == ["warn", "default"]
