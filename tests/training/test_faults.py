"""What goes wrong with several workers, with probabilities of 0 and at padding: refused, or survived, by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_kit import PAPER_DEFAULTS
from torch import Tensor

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, Step, TextBatch
from viladiff.methods import METHODS, viladiff_mixe
from viladiff.methods.viladiff import ViLaDiff
from viladiff.models.blocks import upsample
from viladiff.models.fused.pixel_logits import PixelLogits
from viladiff.models.segmenter import NetworkFactory
from viladiff.models.stream import StreamOutput
from viladiff.runs.checkpoint import load_checkpoint
from viladiff.runs.config import RunConfig, override
from viladiff.training import launch
from viladiff.training.errors import TrainingError
from viladiff.training.trainer import Trainer, fit

TINY = {
    "method.name": "supervised",
    "model.pretrained": "none",
    "train.steps": 4,
    "eval.max_images": 2,
    "eval.boundary": False,
    "data.batch_labelled": 4,
    "runtime.threads": 1,
    "runtime.log_every": 1,
    "runtime.progress": False,
}
CLASSES, SIDE = 5, 32


def config(out: Path, **changes: Any) -> RunConfig:
    flat = {path.replace("__", "."): value for path, value in changes.items()}
    return override(RunConfig(), {**TINY, "runtime.runs_dir": str(out), **flat})


# Several workers


@pytest.mark.parametrize(("asked", "announced"), [(2, 3), (2, 1), (1, 2)])
def test_launcher_with_another_number_of_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: int, asked: int, announced: int
) -> None:
    """Joining would wait forever for workers that nobody starts, or train on shares of the wrong size."""
    environment = {"RANK": 0, "WORLD_SIZE": announced, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    # Should the check be gone, the test must fail at once instead of waiting for the missing workers.
    monkeypatch.setattr(launch.dist, "init_process_group", lambda *_, **__: pytest.fail("joined the group"))
    with pytest.raises(ValueError, match=rf"runtime\.workers = {asked}, .* started {announced} processes"):
        fit(config(tmp_path, runtime__workers=asked))
    assert list(tmp_path.iterdir()) == []


def _second_worker_fails(rank: int, dump: dict, *rest: Any) -> None:
    """Stands where ``launch._worker`` stood: the second of two workers finds at step 2 that it cannot go on."""
    step = Trainer._step

    def fails(self: Trainer, batches: list[Batch]) -> dict[str, Tensor]:
        if self.rank == 1 and self.step == 2:
            raise TrainingError("train.precision: worker 1 has no such numbers")
        return step(self, batches)

    Trainer._step = fails  # type: ignore[method-assign]  # this process ends with the worker
    launch_worker(rank, dump, *rest)


launch_worker = launch._worker


@pytest.mark.timeout(120)
def test_error_in_one_of_two_workers_is_the_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other worker only sees that its neighbour went away; that must not be what the user reads."""
    monkeypatch.setattr(launch, "_worker", _second_worker_fails)
    with pytest.raises(TrainingError) as caught:
        fit(config(tmp_path, runtime__workers=2))
    assert str(caught.value) == "train.precision: worker 1 has no such numbers"
    assert caught.value.__cause__ is None
    assert not list(tmp_path.glob("*/record.json"))


@pytest.mark.filterwarnings("error")
def test_gradients_are_views_of_what_is_sent_and_buffers_are_not_sent(tmp_path: Path) -> None:
    launch.dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
        model = launch.data_parallel(net, torch.device("cpu"))
        model(torch.randn(2, 1, 5, 5)).square().sum().backward()
        places = {parameter.grad.untyped_storage().data_ptr() for parameter in net.parameters()}  # type: ignore[union-attr]
        assert len(places) == 1 and not model.broadcast_buffers
    finally:
        launch.dist.destroy_process_group()


def _train(out: Path, **changes: object) -> subprocess.Popen[str]:
    """``viladiff train`` in a process group of its own, as a shell starts it."""
    flat = TINY | {path.replace("__", "."): value for path, value in changes.items()} | {"runtime.runs_dir": out}
    words = [f"{path}={json.dumps(value) if isinstance(value, bool) else value}" for path, value in flat.items()]
    command = [sys.executable, "-m", "viladiff", "train", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, text=True, start_new_session=True, stderr=subprocess.PIPE)


def _logged(out: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in out.glob("*/steps.jsonl"))


def _weights(out: Path) -> dict[str, Tensor]:
    state = load_checkpoint(next(out.glob("*/checkpoint.pt")))
    assert state is not None
    return state["method"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_on_two_workers_saves_and_the_same_command_ends_with_the_same_weights(tmp_path: Path) -> None:
    """The terminal sends SIGINT to the command and to both workers at once; they agree on the step to stop at."""
    changes = {"runtime__workers": 2, "method__name": "semibaseline", "data__batch_unlabelled": 4, "train__steps": 60}
    plain, stopped = tmp_path / "plain", tmp_path / "stopped"
    _, error = (process := _train(plain, **changes)).communicate(timeout=300)
    assert process.returncode == 0, error

    process = _train(stopped, **changes)
    deadline = time.monotonic() + 120
    while _logged(stopped) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command continues" in error, error
    assert "Traceback" not in error and not list(stopped.glob("*/record.json"))
    state = load_checkpoint(next(stopped.glob("*/checkpoint.pt")))
    assert state is not None and 3 <= state["step"] < 60

    _, error = (process := _train(stopped, **changes)).communicate(timeout=300)
    assert process.returncode == 0, error
    a, b = _weights(plain), _weights(stopped)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    assert _logged(stopped) == 60


# Probabilities of 0, and padding


def method(**changes: object) -> ViLaDiff:
    """ViLaDiff with an encoder of random weights, that accepts every pixel's pseudo-label."""
    flat = {"method.name": "viladiff", "model.pretrained": "none", "model.decoder_width": 16}
    accept = {"method.pseudo.threshold": 0.0}
    cfg = override(
        RunConfig(), flat | accept | {f"method.{path}": value for path, value in {**PAPER_DEFAULTS, **changes}.items()}
    )
    torch.manual_seed(0)
    made = METHODS["viladiff"](cfg.method, NetworkFactory(cfg.model, CLASSES, 12)).train()
    assert isinstance(made, ViLaDiff)
    return made


def batch(size: int = 2) -> Batch:
    """Images, masks and words without CutMix; the last 12 rows of the unlabelled images are padding."""
    gen = keyed_random.torch_generator("faults", 0)
    image, weak, strong = (torch.randn(size, 3, SIDE, SIDE, generator=gen) for _ in range(3))
    target = torch.randint(0, CLASSES, (size, SIDE, SIDE), generator=gen)
    valid = torch.ones(size, SIDE, SIDE, dtype=torch.bool)
    valid[:, -12:] = False
    words = [TextBatch(torch.randn(size, 6, 12, generator=gen), torch.ones(size, 6, dtype=torch.bool)) for _ in "lu"]
    keys = tuple(range(size))
    return Batch(image, target, keys, (weak,), (strong,), (), valid, keys, *words)


def test_mean_of_the_streams_stays_finite_where_a_probability_is_exactly_0() -> None:
    """Its logarithm is minus infinity, and bilinear interpolation makes 0 times infinity of that."""
    streams = {}
    for name, value in (("visual", 400.0), ("fusion", 300.0)):
        logits = torch.zeros(1, CLASSES, 4, 4)
        logits[:, 0, :, :2], logits[:, 1, :, 2:] = value, value
        assert (logits.softmax(1) == 0).any()
        streams[name] = StreamOutput(torch.zeros(0), torch.zeros(0), logits)
    mean = method(**{"pseudo.source": "mean"})._source_logits(streams)
    assert mean.isfinite().all()
    fine = upsample(mean, torch.Size((8, 8))).softmax(1)
    assert fine.isfinite().all() and torch.equal(fine.argmax(1)[0, 0], torch.tensor([0] * 4 + [1] * 4))


def test_a_step_stays_finite_where_the_teacher_is_wholly_sure() -> None:
    made = method(**{"pseudo.source": "mean", "cutmix": False})
    with torch.no_grad():
        for network in (made.student, made.teacher):
            for classifier in (network.classifier, network.classifier_fusion):
                classifier.fine.bias[1] += 500.0  # type: ignore[union-attr]
    given = batch()
    teacher = made.teacher.streams(given.weak[0], given.text_u)
    assert (torch.stack([stream.logits.softmax(1) for stream in teacher.values()]).mean(0) == 0).any()
    losses = made(given, Step(7, 0.1, 3))  # early: the labels are the teacher's own, not yet the refined ones
    losses.total.backward()
    assert losses.total.isfinite() and all(term.isfinite() for term in losses.terms.values())
    assert losses.terms["coverage"] == 1  # a confidence that is no number would pass no threshold, unnoticed
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


def test_padding_draws_no_edge_around_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher labels the padding too; where that meets the picture is no edge of anything."""
    seen: list[Tensor] = []

    def edge_mean(loss: Tensor, edges: Tensor) -> Tensor:
        seen.append(edges)
        return original(loss, edges)

    def one_class_inside_another_outside(logits: PixelLogits) -> tuple[Tensor, Tensor]:
        labels = torch.where(given.valid, 1, 2)
        labels[:, :6, :6] = 3  # a true edge, which must be kept
        return torch.ones(labels.shape), labels

    original, given = viladiff_mixe.edge_mean, batch()
    monkeypatch.setattr(viladiff_mixe, "edge_mean", edge_mean)
    made = method(**{"cutmix": False, "mixe.train_images": "unlabelled", "mixe.refine": False})
    monkeypatch.setattr(PixelLogits, "top", one_class_inside_another_outside)
    made(given, Step(7, 0.9, 3))
    (edges,) = seen
    assert edges[:, :7, :7].any() and not edges[:, 8:].any()

    # With nothing marked as padding the same labels do make an edge, so the lines above could have seen one.
    made(replace(given, valid=torch.ones_like(given.valid)), Step(7, 0.9, 3))
    assert seen[1][:, 19:21].all()
