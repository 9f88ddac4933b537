"""What a step is counted as: its networks, its optimiser, what its checkpoint holds, and the store of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stub_encoders

from viladiff.evaluation import protocols
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import DataFacts, PlannedRun
from viladiff.runs.run_name import arithmetic
from viladiff.training import run_cost, step_work
from viladiff.training.run_cost import CountedStep, CountedSteps, assumed_run, scoring_seconds, windows
from viladiff.training.step_work import StepWork, count_step, method_on_meta


@pytest.fixture(autouse=True, scope="module")
def _known_to_timm() -> None:
    stub_encoders.register()


FIELDS: dict[str, object] = {
    **{"data.dataset": "voc", "data.split": "92", "data.crop": 64, "model.encoder": "stub_any"},
    **{"model.pretrained": "none", "model.decoder_width": 16, "train.precision": "fp32"},
}


def counted(**changes: object) -> tuple[RunConfig, StepWork]:
    cfg = override(RunConfig(), {**FIELDS, **{path.replace("__", "."): value for path, value in changes.items()}})
    return cfg, count_step(cfg, 21)


def flops(work: StepWork) -> int:
    return sum(line.load.flops * line.load.times for line in work.lines)


def test_work_grows_with_the_batch_and_not_with_its_parts() -> None:
    _, one = counted()
    _, twice = counted(data__batch_labelled=8)
    _, parts = counted(data__batch_labelled=8, train__grad_accum_steps=2)
    assert flops(twice) == flops(parts) == 2 * flops(one)
    assert one.peak_bytes <= parts.peak_bytes < twice.peak_bytes, "half a batch needs less"
    update = [line for line in parts.lines if line.module == "optimiser"]
    assert update and all(line.load.times == 1 for line in update), "once a step"


def test_the_optimiser_and_a_teacher_are_in_memory_and_checkpoint() -> None:
    cfg, adam = counted()
    weights = sum(x.numel() * 4 for x in method_on_meta(cfg, 21).student.parameters())
    _, sgd = counted(optim__name="sgd", optim__momentum=0.9)
    assert adam.checkpoint_bytes - sgd.checkpoint_bytes == weights
    moved = [sum(x.load.bytes * x.load.times for x in one.lines if x.module == "optimiser") for one in (adam, sgd)]
    assert moved[0] == pytest.approx(7 * weights, rel=1e-3) and moved[1] == pytest.approx(5 * weights, rel=1e-3)
    _, teacher = counted(method__name="fixmatch")
    assert teacher.checkpoint_bytes == pytest.approx(adam.checkpoint_bytes + weights, rel=0.02)
    assert {"teacher", "student", "optimiser", "update"} <= {line.module.split(".")[0] for line in teacher.lines}


def test_half_precision_moves_fewer_bytes() -> None:
    (_, full), (_, half) = counted(method__name="fixmatch"), counted(method__name="fixmatch", train__precision="bf16")
    assert flops(full) == flops(half) and half.peak_bytes < full.peak_bytes
    products = [line.load for line in half.lines if line.load.flops]
    assert all(load.half for load in products) and not any(line.load.half for line in full.lines)


def planned(**changes: object) -> PlannedRun:
    cfg = override(RunConfig(), {**FIELDS, **changes})
    from viladiff.runs.config import non_default_fields

    how = 1, None, arithmetic(cfg.train.precision, cfg.train.tf32)
    return PlannedRun("1", {**FIELDS, **changes}, "t", 10, non_default_fields(cfg), *how, DataFacts(21, 9, True))


def test_equal_steps_are_counted_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    count = step_work.count_step

    def noting(cfg: Any, classes: int) -> StepWork:
        calls.append(cfg.method.name)
        return count(cfg, classes)

    monkeypatch.setattr(step_work, "count_step", noting)
    steps = CountedSteps(tmp_path)
    first = steps.of(planned())
    assert first is not None and first.peak_bytes and first.passes == 3 * 4
    for same in ({"optim.lr": 0.1}, {"train.epochs": 3.0}, {"data.split": "183"}, {"seed": 4}):
        assert steps.of(planned(**same)) == first
    assert CountedSteps(tmp_path).of(planned()) == first and calls == ["supervised"]
    other = steps.of(planned(**{"data.crop": 96}))
    assert other is not None and other.peak_bytes > first.peak_bytes and len(calls) == 2
    for path in (tmp_path / "counted").rglob("step-*.json"):
        path.write_text("{")
    assert CountedSteps(tmp_path).of(planned()) == first and len(calls) == 3, "what is damaged is counted again"


def test_an_image_of_cityscapes_is_scored_in_windows() -> None:
    for crop in (500, 798, 801, 1024, 2048):
        stride = protocols.window_stride(crop)
        rows, columns = (protocols._snapped_starts(max(crop, side), crop, stride) for side in (1024, 2048))
        assert windows({"data.dataset": "cityscapes", "data.crop": crop}) == len(rows) * len(columns)
    assert windows({"data.dataset": "cityscapes", "data.crop": 798}) == 8
    cfg = override(RunConfig(), {"data.dataset": "cityscapes"})
    default = windows({"data.dataset": "cityscapes"})
    assert default == windows({"data.dataset": "cityscapes", "data.crop": cfg.data.crop}) > 1
    assert windows({"data.dataset": "cityscapes", "eval.protocol": "original"}) == windows({"data.dataset": "voc"}) == 1
    run, cost = planned(), CountedStep((), 0, 0, 10)
    once = scoring_seconds(run, cost, 1.0)
    wide = replace(run, changed={**run.changed, "data.dataset": "cityscapes", "data.crop": 798})
    assert once == 1449 / 10 and scoring_seconds(wide, cost, 1.0) == 500 * 8 / 10


def test_runs_without_their_files_have_the_published_numbers_of_images() -> None:
    fields: dict[str, object] = {"data.dataset": "voc", "data.split": "92", "method.name": "fixmatch"}
    run = assumed_run({**fields, "train.epochs": 60.0, "data.batch_unlabelled": 8}, "name")
    assert run is not None and run.data == DataFacts(21, 10582 - 92, True)
    assert run.steps == -(-60 * (10582 - 92) // 8)
    assert assumed_run({"data.dataset": "folder", "data.split": "all"}, "name") is None
    assert run_cost.evaluations({"eval.every_epochs": 4.0, "train.epochs": 60.0}, 9, None) == 15
