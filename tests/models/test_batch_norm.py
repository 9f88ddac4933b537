"""BatchNorm on several workers: synchronised on GPUs; elsewhere each by its share, and running statistics averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from viladiff.data.batch import Step
from viladiff.inference.load import preview_run
from viladiff.models import batch_norm
from viladiff.models.batch_norm import batch_norms, statistics_notes, synchronise, synchronises
from viladiff.runs.checkpoint import load_checkpoint
from viladiff.runs.config import RunConfig, override
from viladiff.training import trainer
from viladiff.training.result import Result
from viladiff.training.trainer import Trainer, fit

TINY = {
    "method.name": "supervised",
    "model.encoder": "resnet10t",
    "model.encoder_stride": 16,
    "model.pretrained": "none",
    "model.decoder": "deeplabv3plus",
    "data.crop": 33,
    "data.batch_labelled": 4,
    "train.steps": 1,
    "eval.max_images": 2,
    "eval.boundary": False,
    "runtime.threads": 1,
    "runtime.progress": False,
}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config(out: Path, **changes: Any) -> RunConfig:
    flat = {path.replace("__", "."): value for path, value in changes.items()}
    return override(RunConfig(), {**TINY, "runtime.runs_dir": str(out), **flat})


def weights(result: Result) -> dict[str, Tensor]:
    state = load_checkpoint(result.directory / "checkpoint.pt")
    assert state is not None
    return state["method"]


def test_it_is_synchronised_on_gpus_of_several_workers_alone() -> None:
    normed, plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.GroupNorm(1, 4)
    cases = {(module, device, world) for module in (normed, plain) for device in (CPU, CUDA) for world in (1, 2)}
    assert {case for case in cases if synchronises(*case)} == {(normed, CUDA, 2)}
    assert {case for case in cases if statistics_notes(*case)} == {(normed, CPU, 2)}
    before, tensors = normed.state_dict(), list(normed.parameters())
    synchronise(normed, CPU, 2)
    assert type(normed[1]) is nn.BatchNorm2d
    synchronise(normed, CUDA, 2)
    assert type(normed[1]) is nn.SyncBatchNorm and list(batch_norms(normed)) == [normed[1]]
    assert normed.state_dict().keys() == before.keys()
    assert all(one is other for one, other in zip(normed.parameters(), tensors, strict=True))


def test_activations_inside_timms_norms_are_kept() -> None:
    import timm

    encoder = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = encoder(images)
        synchronise(encoder, CUDA, 2)
        assert any(isinstance(norm, nn.SyncBatchNorm) for norm in batch_norms(encoder))
        for one, other in zip(before, encoder(images), strict=True):
            torch.testing.assert_close(one, other)


def test_the_loop_synchronises_before_it_distributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[nn.Module] = []
    monkeypatch.setattr(batch_norm, "synchronises", lambda module, device, world: world > 1)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda module, **_: given.append(module) or module)
    run = Trainer(config(tmp_path))
    run.world = 2
    run._build()
    assert given == [run.method] and all(isinstance(norm, nn.SyncBatchNorm) for norm in batch_norms(run.method))
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in given[0].parameters()}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_without_gpus_normalise_by_their_shares(tmp_path: Path) -> None:
    """Gradients are those of one worker that takes the shares one after the other; running statistics are means."""
    two = fit(config(tmp_path / "two", runtime__workers=2))
    parts = fit(config(tmp_path / "parts", train__grad_accum_steps=2))
    (note,) = (text for text in two.record.notes if text.startswith("BatchNorm on 2 workers"))
    assert not any("BatchNorm" in text for text in parts.record.notes) and "results differ" in note
    found, expected = weights(two), weights(parts)
    for name in (n for n in found if not n.split(".")[-1].startswith(("running", "num"))):
        assert (found[name] - expected[name]).abs().max() < 1e-5, name

    run = Trainer(config(tmp_path / "by hand", train__grad_accum_steps=2))
    run._build()
    first = {name: value.clone() for name, value in run.method.state_dict().items()}
    seen = []
    for batch in run.loader.micro_batches(0):
        run.method.load_state_dict(first)
        run.method(batch, Step(0, 0.0, 0))
        seen.append({name: value.clone() for name, value in run.method.state_dict().items()})
    running = [name for name in found if "running" in name]
    assert len(running) > 40
    for name in running:
        assert (found[name] - (seen[0][name] + seen[1][name]) / 2).abs().max() < 1e-5, name
    apart = max(float((seen[0][name] - seen[1][name]).abs().max()) for name in running)
    assert apart > 1e-2  # else the mean would say nothing


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_equal_one_where_statistics_are_frozen(tmp_path: Path) -> None:
    changes = {
        "model__encoder_frozen": True,
        "model__decoder": "light",
        "data__crop": 32,
        "train__steps": 2,
        "data__batch_unlabelled": 4,
        "method__name": "semibaseline",
    }
    one = weights(fit(config(tmp_path / "one", **changes)))
    two = weights(fit(config(tmp_path / "two", runtime__workers=2, **changes)))
    begun = Trainer(config(tmp_path / "new", **changes))
    begun._build()
    begin = begun.method.state_dict()
    for name in one:
        assert (one[name].double() - two[name].double()).abs().max() < 1e-5, name
        if "encoder" in name:
            assert torch.equal(one[name], begin[name]), name


def test_a_dry_run_tells_the_same(tmp_path: Path) -> None:
    assert "BatchNorm on 2 workers without GPUs" in preview_run(config(tmp_path, runtime__workers=2))["notes"]
    assert "notes" not in preview_run(config(tmp_path))
    assert trainer.statistics_notes is statistics_notes


def test_one_labelled_image_a_worker_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two images or more in each training pass of a worker, got 1") as error:
        fit(config(tmp_path, data__batch_labelled=1))
    assert "\n" not in str(error.value)
