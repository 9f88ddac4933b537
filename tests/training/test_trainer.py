"""The loop: resuming, workers, precision, faults. Runs are a few steps on the rendered digits."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from viladiff.core.environment import peak_memory
from viladiff.evaluation import evaluator
from viladiff.runs.checkpoint import load_checkpoint, save_checkpoint
from viladiff.runs.config import RunConfig, override
from viladiff.runs.lease import LeaseLostError, acquire_or_raise
from viladiff.training.errors import RunIdMismatchError, TrainingError
from viladiff.training.trainer import StopRequested, Trainer, fit, lr_factor, param_groups

TINY = {
    "method.name": "viladiff",
    "model.pretrained": "none",
    "method.mixe.refine_from": 0.4,
    "method.mixe.timesteps": 3,
    "method.pseudo.threshold": 0.2,
    "train.steps": 6,
    "eval.max_images": 8,
    "runtime.threads": 1,
    "runtime.progress": False,
}


def config(out: Path, **changes: Any) -> RunConfig:
    flat = {path.replace("__", "."): value for path, value in changes.items()}
    return override(RunConfig(), {**TINY, "runtime.runs_dir": str(out), **flat})


def weights(directory: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(directory / "checkpoint.pt")
    assert state is not None
    return state["method"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_fit_returns_scores_and_a_log_that_pandas_likes(tmp_path: Path) -> None:
    result = fit(config(tmp_path, eval__every_steps=3, runtime__log_every=2))
    record = result.record
    assert result.directory == tmp_path / record.run_id
    assert record.miou is not None and 0 <= record.miou <= 1
    assert set(record.scores) == {"student", "teacher"}
    assert set(record.scores["teacher"]) == {"visual", "fusion", "fusion_no_text", "mean"}
    assert record.scores["teacher"]["visual"]["boundary_iou"] is not None
    assert {"before/coverage", "after/precision", "after/ece", "rescued"} <= set(record.pseudo_labels)
    assert 0 < record.pseudo_labels["before/ece"] < 1  # type: ignore[operator]
    assert record.cpu_seconds is not None and record.cpu_seconds > 0
    assert [entry["step"] for entry in record.history] == [3, 6]
    assert "simulated" in record.captions
    frame = result.frame()
    assert list(frame["step"]) == list(range(6))
    assert {"total", "sup", "pseudo", "mixe_ce", "lr", "coverage"} <= set(frame.columns)
    row = pd.DataFrame([result.summary()])
    assert row["miou"][0] == record.miou and row["method.name"][0] == "viladiff"


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = fit(config(tmp_path))
    stamp = (first.directory / "checkpoint.pt").stat().st_mtime_ns
    again = fit(config(tmp_path))
    assert again.already_finished and not first.already_finished
    assert again.record == first.record and (first.directory / "checkpoint.pt").stat().st_mtime_ns == stamp
    for name in evaluator.FILES:
        (first.directory / name).write_bytes(b"of an older version")
    fresh = fit(config(tmp_path), resume=False)
    assert not fresh.already_finished
    files = [path for path in fresh.directory.iterdir() if path.is_file()]
    assert not any(path.read_bytes() == b"of an older version" for path in files)
    assert (first.directory / "checkpoint.pt").stat().st_mtime_ns != stamp
    assert fresh.record.miou == first.record.miou


def test_same_seed_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    a, b, c = (fit(config(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert same(weights(a.directory), weights(b.directory))
    assert not same(weights(a.directory), weights(c.directory))


SCRIPT = """
import sys
from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import fit
import json
fit(override(RunConfig(), json.loads(sys.argv[1])))
"""


def _start(changes: dict[str, Any]) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(changes)], env=env, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_at_seeded_moments_then_resume_is_bit_for_bit(tmp_path: Path) -> None:
    """The process is killed at random moments, also while it writes a checkpoint (it writes one every step)."""
    changes = {**TINY, "train.steps": 14, "runtime.checkpoint_every": 1}
    undisturbed = fit(config(tmp_path / "plain", train__steps=14))
    out = tmp_path / "killed"
    changes["runtime.runs_dir"] = str(out)
    directory = out / undisturbed.record.run_id
    rng, kills, writing, attempt = random.Random(5), 0, 0, 0
    while not (directory / "record.json").exists():
        process = _start(changes)
        before = _step(directory)
        deadline = time.monotonic() + 120
        # Every second kill waits for a temporary checkpoint file: the process is then in the middle of writing.
        attempt += 1
        while process.poll() is None and kills < 6 and time.monotonic() < deadline:
            temporary = [p for p in directory.glob("*") if "checkpoint" in p.name and p.suffix not in (".pt",)]
            if attempt % 2 and temporary:
                writing += 1
                break
            if attempt % 2 == 0 and _step(directory) > before:
                time.sleep(rng.random() * 0.4)
                break
            time.sleep(0.001)
        if process.poll() is None and kills < 6:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        assert attempt < 20
    assert kills >= 5 and writing >= 1
    assert same(weights(directory), weights(undisturbed.directory))
    logged = [row["step"] for row in map(json.loads, (directory / "steps.jsonl").read_text().splitlines())]
    assert logged == list(range(14))


def _step(directory: Path) -> int:
    try:
        state = load_checkpoint(directory / "checkpoint.pt")
    except ValueError:
        return 0
    return 0 if state is None else state["step"]


def test_stopped_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick version of the test above: an error in the middle, in this process."""
    plain = fit(config(tmp_path / "plain"))
    step = Trainer._step

    def fails(self: Trainer, batches: Any) -> Any:
        if self.step == 4:
            raise RuntimeError("pulled the plug")
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_step", fails)
    with pytest.raises(RuntimeError, match="plug"):
        fit(config(tmp_path / "broken", runtime__checkpoint_every=3))
    monkeypatch.setattr(Trainer, "_step", step)
    resumed = fit(config(tmp_path / "broken", runtime__checkpoint_every=3))
    assert same(weights(plain.directory), weights(resumed.directory))
    assert resumed.record.scores == plain.record.scores
    assert resumed.frame().drop(columns="lr").equals(plain.frame().drop(columns="lr"))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    changes = {**TINY, "train.steps": 5000, "runtime.runs_dir": str(tmp_path), "runtime.log_every": 1}
    process = _start(changes)
    log = None
    while log is None and process.poll() is None:
        log = next(iter(tmp_path.glob("*/steps.jsonl")), None)
        log = log if log is not None and log.stat().st_size else None
        time.sleep(0.05)
    with pytest.raises(ValueError, match=f"run is locked by process {process.pid} on "):
        fit(override(RunConfig(), changes))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert b"the same command continues" in error and process.returncode != 0
    assert log is not None and _step(log.parent) > 0
    assert not list(log.parent.glob("*lease*"))


def test_a_lease_that_is_lost_after_the_last_step_leaves_the_record_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path)

    def lose(given: Trainer) -> None:
        assert given.lease is not None
        given.lease._lost.set()

    monkeypatch.setattr(evaluator, "save_qualitative", lose)
    with pytest.raises(LeaseLostError, match="another machine"):
        fit(cfg)
    assert not (tmp_path / Trainer(cfg).name / "record.json").exists()


def test_a_lease_is_taken_for_the_planned_run_alone_and_ends_it_when_lost(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with (
        acquire_or_raise(tmp_path / ("0" * 16)) as lease,
        pytest.raises(RunIdMismatchError, match="planned as 0000000000000000"),
    ):
        fit(cfg, lease=lease)
    assert [path.name for path in tmp_path.iterdir()] == ["0" * 16], "nothing was trained under another name"
    directory = tmp_path / Trainer(cfg).name
    with acquire_or_raise(directory) as lease, pytest.raises(LeaseLostError, match="another machine"):
        fit(config(tmp_path, runtime__log_every=2), lease=lease, report=lambda news: lease._lost.set())
    assert [path.name for path in directory.iterdir()] == ["steps.jsonl"], "its files are another's by now"


def test_wall_time_and_memory_are_those_of_all_legs_and_of_this_run_alone(tmp_path: Path) -> None:
    held = np.ones(100_000_000)  # 800 MB, of something that was in this process before
    before = peak_memory()
    del held

    def leave(news: dict[str, Any]) -> bool:
        time.sleep(1)
        return True

    cfg = config(tmp_path, runtime__log_every=3)
    with pytest.raises(StopRequested):
        fit(cfg, report=leave)
    checkpoint = tmp_path / Trainer(cfg).name / "checkpoint.pt"
    state = load_checkpoint(checkpoint)
    assert state is not None and 0 < state["peak_memory"] < before - 400_000_000
    state["peak_memory"] = before
    save_checkpoint(checkpoint, state)
    begun = time.time()
    record = fit(cfg).record
    took = time.time() - begun
    assert record.wall_seconds is not None and took + 0.5 < record.wall_seconds < took + state["wall_seconds"] + 0.5
    assert record.peak_memory_bytes == before, "the first leg held more"
    (checkpoint.parent / "record.json").unlink()
    save_checkpoint(
        checkpoint, {name: value for name, value in state.items() if name not in ("wall_seconds", "peak_memory")}
    )
    record = fit(cfg).record
    assert record.wall_seconds is None and record.peak_memory_bytes is None, "an older checkpoint does not tell"


def test_memory_is_not_known_where_the_kernel_cannot_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in (True, False):
        monkeypatch.setattr(evaluator, "reset_peak_memory", lambda allowed=allowed: allowed)
        memory = evaluator.PeakMemory(torch.device("cpu"))
        assert memory.bytes() is None, "not begun"
        memory.start()
        assert (memory.bytes() is not None) == allowed


@pytest.mark.timeout(300)
def test_two_workers_follow_one(tmp_path: Path) -> None:
    """Not to the bit: sums over two workers round differently, and Adam makes a whole step of a tiny value's sign."""
    base = {"method__name": "semibaseline", "train__steps": 3, "method__pseudo__threshold": 0.0}
    changes = {**base, "data__batch_labelled": 4, "data__batch_unlabelled": 4}
    flat = {k: v for k, v in TINY.items() if "mixe" not in k}
    one = fit(override(RunConfig(), {**flat, **_dots(changes), "runtime.runs_dir": str(tmp_path / "one")}))
    on_two = {**flat, **_dots(changes), "runtime.runs_dir": str(tmp_path / "two"), "runtime.workers": 2}
    two = fit(override(RunConfig(), on_two))
    assert not two.already_finished and fit(override(RunConfig(), on_two)).already_finished
    assert two.record.workers == 2 and two.record.run_id == one.record.run_id
    a, b = one.frame(), two.frame()
    assert list(a["step"]) == list(b["step"])
    assert a["total"].to_numpy() == pytest.approx(b["total"].to_numpy(), rel=2e-3)
    assert one.record.scores["student"]["visual"]["images"] == two.record.scores["student"]["visual"]["images"] == 8


def _dots(changes: dict[str, Any]) -> dict[str, Any]:
    return {path.replace("__", "."): value for path, value in changes.items()}


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path: Path) -> None:
    """Without ignored pixels each micro-batch weighs the same, so the sum is exact up to rounding."""
    frames = []
    for parts in (1, 2):
        flat = {
            "method.name": "supervised",
            "data.scale": (1.0, 1.0),
            "train.grad_accum_steps": parts,
            "train.steps": 3,
        }
        rest = {k: v for k, v in TINY.items() if not k.startswith("method")}
        frames.append(fit(override(RunConfig(), {**rest, **flat, "runtime.runs_dir": str(tmp_path)})).frame())
    assert frames[0]["total"].to_numpy() == pytest.approx(frames[1]["total"].to_numpy(), rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains(tmp_path: Path, precision: str) -> None:
    """Half precision is emulated, and slow, on most CPUs: two steps on the smallest batch."""
    small = {"data__batch_labelled": 2, "data__batch_unlabelled": 2, "eval__max_images": 2, "eval__boundary": False}
    frame = fit(config(tmp_path, train__precision=precision, train__steps=2, **small)).frame()
    assert frame["total"].notna().all() and len(frame) == 2


@contextmanager
def whatever_holds(flags: tuple[Any, ...], values: tuple[bool, ...]) -> Iterator[None]:
    """TF32 flags of torch set and put back; they are no attributes that monkeypatch could delete."""
    old = [flag.allow_tf32 for flag in flags]
    try:
        for flag, value in zip(flags, values, strict=True):
            flag.allow_tf32 = value
        yield
    finally:
        for flag, value in zip(flags, old, strict=True):
            flag.allow_tf32 = value


@pytest.mark.parametrize("before", [(False, True), (True, False)])
def test_tf32_is_set_for_a_run_and_leaks_into_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[bool, bool]
) -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    seen: list[tuple[bool, ...]] = []
    real = Trainer._step
    monkeypatch.setattr(
        Trainer,
        "_step",
        lambda self, batches: (seen.append(tuple(f.allow_tf32 for f in flags)), real(self, batches))[1],
    )
    small = {"train__steps": 1, "eval__max_images": 1, "eval__boundary": False}
    with whatever_holds(flags, before):
        records = [fit(config(tmp_path, train__tf32=allowed, **small)).record for allowed in (True, False)]
        assert seen == [(True, True), (False, False)] and tuple(flag.allow_tf32 for flag in flags) == before
        with pytest.raises(TrainingError):
            fit(config(tmp_path, train__tf32=True, optim__lr=1e6, train__steps=60, runtime__log_every=5))
        assert tuple(flag.allow_tf32 for flag in flags) == before, "also after a fault"
    assert [record.precision for record in records] == ["fp32, TF32", "fp32"]
    assert records[0].config["train.tf32"] is True and records[0].run_id != records[1].run_id


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_term(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d+ of 60 .*optim.lr = 1e\+06"):
        fit(config(tmp_path, optim__lr=1e6, train__steps=60, runtime__log_every=5, runtime__checkpoint_every=5))
    for checkpoint in tmp_path.glob("*/checkpoint.pt"):
        assert all(value.isfinite().all() for value in weights(checkpoint.parent).values())


def test_too_little_memory_is_one_clear_error(tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from viladiff.runs.config import RunConfig, override\n"
        "from viladiff.training.errors import TrainingError\n"
        "from viladiff.training.trainer import fit\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))\n"
        "flat = {'data.batch_labelled': 20000, 'runtime.runs_dir': sys.argv[1], 'runtime.progress': False}\n"
        "cfg = override(RunConfig(), flat)\n"
        "try:\n    fit(cfg)\n"
        "except TrainingError as error:\n    print(error)\n"
    )
    assert resource.RLIMIT_DATA is not None
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "data.batch_labelled = 20000" in done.stdout and "train.grad_accum_steps" in done.stdout, done.stderr[-500:]


def test_truncated_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    result = fit(config(tmp_path))
    (result.directory / "record.json").unlink()
    path = result.directory / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"checkpoint.pt"):
        fit(config(tmp_path))


@pytest.mark.parametrize("schedule", ["poly", "cosine", "constant"])
def test_learning_rate_schedules(schedule: str) -> None:
    cfg = override(RunConfig(), {"optim.schedule": schedule, "optim.warmup_steps": 10})
    factors = [lr_factor(cfg, step, 110) for step in range(110)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1.0) and factors[10] == pytest.approx(1.0)
    expected = {"poly": 0.5**0.9, "cosine": 0.5, "constant": 1.0}[schedule]
    assert factors[60] == pytest.approx(expected)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_encoder_has_its_own_rate_and_norms_do_not_decay() -> None:
    run = Trainer(override(RunConfig(), {"optim.encoder_lr_scale": 0.1, "method.name": "viladiff"}))
    run._build()
    groups = param_groups(run.method, run.cfg)
    assert {(g["scale"], g["weight_decay"]) for g in groups} == {(0.1, 0.01), (0.1, 0.0), (1.0, 0.01), (1.0, 0.0)}
    count = sum(p.numel() for g in groups for p in g["params"])
    assert count == sum(p.numel() for p in run.method.parameters() if p.requires_grad)


def test_one_step_moves_the_teacher_and_scales_the_encoders_rate(tmp_path: Path) -> None:
    run = Trainer(config(tmp_path, optim__encoder_lr_scale=0.1, optim__clip_norm=1e-3, optim__warmup_steps=0))
    run._build()
    run.method.train()
    before = [p.clone() for p in run.method.teacher.parameters()]  # type: ignore[union-attr]
    clipped: list[float] = []
    original = run.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        norms = [p.grad.norm() for p in run.method.parameters() if p.grad is not None]
        clipped.append(float(torch.stack(norms).norm()))
        return original(*args, **kwargs)

    run.optimizer.step = step  # type: ignore[method-assign]
    for _ in range(2):
        run._step(run.loader.micro_batches(run.step))
        run.step += 1
    after = list(run.method.teacher.parameters())  # type: ignore[union-attr]
    student = list(run.method.student.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, student, strict=True))
    rates = {round(group["lr"] / group["scale"], 9) for group in run.optimizer.param_groups}
    assert len(rates) == 1 and {group["scale"] for group in run.optimizer.param_groups} == {0.1, 1.0}
    assert max(clipped) <= 1.01e-3


def test_half_precision_reaches_the_forward_pass(tmp_path: Path) -> None:
    run = Trainer(config(tmp_path, train__precision="bf16"))
    run._build()
    seen: list[torch.dtype] = []
    hook = lambda module, inputs, output: seen.append(output.dtype)  # noqa: E731
    run.method.student.decoder.fuse[0].body[2].register_forward_hook(hook)
    run._step(run.loader.micro_batches(0))
    assert seen and set(seen) == {torch.bfloat16}


@pytest.mark.timeout(300)
def test_a_worker_without_a_validation_image_does_not_hang_the_others(tmp_path: Path) -> None:
    changes = {"eval__max_images": 1, "train__steps": 1, "data__batch_labelled": 4}
    one = fit(config(tmp_path / "one", **changes))
    two = fit(config(tmp_path / "two", runtime__workers=2, **changes))
    assert two.record.pseudo_labels.keys() == one.record.pseudo_labels.keys()
    assert two.record.scores["student"]["visual"]["images"] == 1


def test_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    result = fit(config(tmp_path, train__steps=2))
    state = load_checkpoint(result.directory / "checkpoint.pt")
    assert state is not None
    del state["method"]["student.classifier.fine.weight"]
    save_checkpoint(result.directory / "checkpoint.pt", state)
    (result.directory / "record.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint.pt is of another version"):
        fit(config(tmp_path, train__steps=2))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    run = Trainer(config(tmp_path))
    run._build()
    run.directory.mkdir(parents=True)
    with torch.no_grad():
        next(run.method.student.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="weights"):
        run._save()
    assert not (run.directory / "checkpoint.pt").exists()


def test_cuda_that_is_absent_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=r"runtime\.device"):
        fit(override(RunConfig(), {"runtime.device": "cuda"}))


def test_a_watcher_hears_of_each_log_and_may_end_the_run(tmp_path: Path) -> None:
    cfg = config(tmp_path, **{"train.steps": 6, "runtime.log_every": 2})
    heard: list[dict] = []

    def watch(news: dict) -> bool:
        heard.append(news)
        return news["step"] == 4

    with pytest.raises(StopRequested, match="stopped at step 4 of 6"):
        fit(cfg, report=watch)
    assert [(news["step"], news["steps"]) for news in heard] == [(2, 6), (4, 6)]
    assert all(math.isfinite(news["loss"]) for news in heard)
    result = fit(cfg, report=heard.append)
    assert result.record.steps == 6 and result.frame()["step"].tolist() == list(range(6))
    assert any(news.get("evaluating") for news in heard)


def test_pictures_hold_every_stage_as_class_ids(tmp_path: Path) -> None:
    cfg = config(tmp_path, **{"method.name": "viladiff", "train.steps": 2, "runtime.visualizations": 3})
    with np.load(fit(cfg).directory / "pictures.npz", allow_pickle=False) as found:
        stages = [name.split("/")[1] for name in sorted(found)]
        assert stages == [
            *("image", "truth", "pseudo-label", "refined", "edges"),
            *("noise t=1", "noise t=2", "noise t=3", "prediction"),
        ]
        assert all(array.dtype == np.uint8 and len(array) == 3 for array in found.values())
        assert found["00/image"].shape == (*found["01/truth"].shape, 3)
        # An untrained teacher is unsure, so all pixels are in the region of flips; more steps flip more of them.
        changed = [(found[f"0{i}/noise t={t}"] != found["02/pseudo-label"]).mean() for i, t in ((5, 1), (7, 3))]
        assert 0 < changed[0] < changed[1] < 1
        assert set(np.unique(found["04/edges"])) <= {0, 1}


def test_scores_from_before_an_interruption_are_told_once_more_and_may_end_the_run(tmp_path: Path) -> None:
    cfg = config(tmp_path, train__steps=6, eval__every_steps=2, eval__max_images=4, runtime__log_every=6)
    with pytest.raises(StopRequested, match="stopped at step 2 of 6"):
        fit(cfg, report=lambda news: "miou" in news)
    heard: list[list[int]] = []

    def hear(news: dict[str, Any]) -> bool:
        if "history" in news:
            heard.append([entry["step"] for entry in news["history"]])
        return len(heard) == 1

    with pytest.raises(StopRequested, match="stopped at step 2 of 6"):
        fit(cfg, report=hear)
    assert heard == [[2]]
    record = fit(cfg, report=hear).record
    assert heard == [[2], [2], [2, 4], [2, 4]] and [entry["step"] for entry in record.history] == [2, 4, 6]
