"""What cannot be trained or scored is refused before it starts, with what to set; what can is tried once."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stub_encoders
import torch
from method_kit import STEP, make, make_batch
from torch import Tensor

from viladiff.data.batch import Batch, Losses, Step
from viladiff.inference.predict import Model, label_files
from viladiff.methods import METHODS
from viladiff.methods.supervised import Supervised
from viladiff.models.encoders.build import weights_fault
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import DataFacts
from viladiff.training import checked, feasibility
from viladiff.training.checked import Checked
from viladiff.training.feasibility import check_prediction, refuse_scoring, run_faults, try_on_meta
from viladiff.training.step_work import empty_method

FACTS = DataFacts(classes=21, unlabelled=9, captions=True)


@pytest.fixture(autouse=True, scope="module")
def _known_to_timm() -> None:
    stub_encoders.register()


def config(encoder: str = "any", crop: int = 64, method: str = "supervised", **changes: object) -> RunConfig:
    fields: dict[str, object] = {"data.dataset": "voc", "data.split": "92", "method.name": method, "data.crop": crop}
    fields |= {"model.encoder": f"stub_{encoder}", "model.pretrained": "none", "model.decoder_width": 16}
    return override(RunConfig(), {**fields, **{name.replace("__", "."): value for name, value in changes.items()}})


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_runs_without_content(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is left out because it reads a number of a tensor: that would be a fault here."""
    monkeypatch.setattr(feasibility, "_untraceable", lambda error: False)
    assert try_on_meta(config(method=name), FACTS) == []


@pytest.mark.parametrize(
    ("cfg", "facts", "told"),
    [
        (
            {"encoder": "fixed"},
            FACTS,
            r"^eval\.protocol = 'original': .* 90 x 55 .*protocol=sliding_window fits",
        ),
        ({"encoder": "fixed", "method": "fixmatch"}, FACTS, r"stub_fixed.*pseudo-labels are scored on whole pictures"),
        (
            {"encoder": "fixed", "crop": 96},
            FACTS,
            r"^data\.crop = 96: .*stub_fixed.*\(96, 96\) is not of 64",
        ),
        ({"encoder": "last"}, FACTS, r"needs a map of \(1, 8, 16, 16\), got \(1, 16, 16, 8\)\); choose an encoder"),
        (
            {"encoder": "idle", "runtime__workers": 2},
            FACTS,
            r"no loss reaches 1 weights \(student\.encoder",
        ),
        ({"crop": 80, "method": "fixmatch"}, FACTS, r"^data\.crop = 80: .*stub_any', 32; nearest: 64 or 96$"),
        ({"method": "viladiff"}, FACTS._replace(captions=False), r"^data\.captions = 'own': .*runtime\.captions"),
        (
            {"method": "fixmatch"},
            FACTS._replace(unlabelled=0),
            r"learns from unlabelled images",
        ),
        ({"method": "fixmatch"}, FACTS._replace(unlabelled=1), r"data\.split leaves one"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line_with_what_can(cfg: dict[str, Any], facts: DataFacts, told: str) -> None:
    assert [one for one in try_on_meta(config(**cfg), facts) if re.search(told, one)]
    assert len(try_on_meta(config(**cfg), facts)) == 1


@pytest.mark.parametrize(
    "cfg",
    [
        {"encoder": "fixed", "eval__protocol": "sliding_window"},
        {"encoder": "norm", "method": "fixmatch"},
        {"encoder": "idle"},
        {"method": "viladiff", "data__captions": "none"},
    ],
    ids=str,
)
def test_what_can_be_run_is_not_refused(cfg: dict[str, Any]) -> None:
    assert try_on_meta(config(**cfg), FACTS._replace(captions="data__captions" not in cfg)) == []


def batch_norm(size: int, parts: int = 1, encoder: str = "resnet10t") -> RunConfig:
    """A run whose coarsest map has one cell."""
    fields = {"model.encoder": encoder, "data.crop": 32, "data.batch_labelled": size}
    return override(config(), {**fields, "train.grad_accum_steps": parts})


def test_batch_norm_of_one_value_names_the_batch_and_two_values_are_enough() -> None:
    (told,) = try_on_meta(batch_norm(1), FACTS)
    assert told.endswith("a map of one cell of one image has one; set data.batch_labelled=2")
    (told,) = try_on_meta(batch_norm(4, 4), FACTS)
    assert told.endswith("set data.batch_labelled=8 for runtime.workers x train.grad_accum_steps = 4 parts")
    assert try_on_meta(batch_norm(2), FACTS) == []


def pooled(**changes: object) -> RunConfig:
    """DeepLabV3+, whose pooled image has one value of each channel, on two workers."""
    deep = {"model__encoder": "resnet10t", "model__encoder_stride": 16, "model__decoder": "deeplabv3plus"}
    return config(crop=33, **{**deep, "runtime__workers": 2, "data__batch_labelled": 2, **changes})


def test_one_image_a_worker_is_enough_where_gpus_share_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SyncBatchNorm of torch refuses one value a channel in one worker alone."""
    for gpus in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus)
        for device in ("auto", "cpu", "cuda"):
            faults = try_on_meta(pooled(runtime__device=device), FACTS)
            assert bool(faults) == (device == "cpu" or (device == "auto" and not gpus)), (device, gpus)
            for fault in faults:
                assert re.match(
                    r"model\.decoder = 'deeplabv3plus': BatchNorm .* got 1; raise .*grad_accum_steps$", fault
                )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (told,) = try_on_meta(pooled(runtime__workers=1, data__batch_labelled=1), FACTS)
    assert "got 1" in told
    assert try_on_meta(pooled(data__batch_labelled=4, train__grad_accum_steps=2), FACTS) == []


def test_the_size_that_an_encoder_was_made_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility, "own_size", lambda name: 64)
    assert "data.crop=64 fits, or choose" in try_on_meta(config("fixed", 96), FACTS)[0]


def test_pictures_of_one_size_are_tried_at_that_size_alone() -> None:
    assert try_on_meta(config("fixed"), FACTS._replace(picture=(64, 64))) == []
    assert "picture of 96 x 64" in try_on_meta(config("fixed"), FACTS._replace(picture=(96, 64)))[0]


def test_a_step_that_fails_is_told_and_one_that_reads_numbers_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Supervised, batch: Batch, step: Step) -> Losses:
        raise RuntimeError("sizes 3 and 4 differ\nand so on")

    def reads(self: Supervised, batch: Batch, step: Step) -> Losses:
        total: Tensor = self.student(batch.image)["visual"].mean()
        return Losses(total * total.item(), {})

    monkeypatch.setattr(Supervised, "forward", fails)
    (told,) = try_on_meta(config(), FACTS)
    assert told.startswith("method.name = 'supervised' with model.encoder = 'stub_any', data.crop = 64: ")
    assert "a training step fails (sizes 3 and 4 differ); choose another" in told
    monkeypatch.setattr(Supervised, "forward", reads)
    assert try_on_meta(config(), FACTS) == []


def test_what_is_kept_between_steps_stays_real() -> None:
    """Constants are kept by device: a run that was tried on meta must not find any of its tensors."""
    method = make("viladiff")
    batch = make_batch(views=method.required_views())
    before = method(batch, STEP).total
    assert try_on_meta(override(RunConfig(), {"method.name": "viladiff", "data.crop": 32}), FACTS) == []
    assert torch.equal(make("viladiff")(batch, STEP).total, before)


# What is stored


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that were tried."""
    found: list[RunConfig] = []

    def note(cfg: RunConfig, data: DataFacts) -> list[str]:
        found.append(cfg)
        return [f"no {cfg.data.crop}"]

    monkeypatch.setattr(feasibility, "try_on_meta", note)
    return found


def test_each_combination_is_tried_once(tmp_path: Path, tried: list[RunConfig]) -> None:
    store = Checked(tmp_path)
    for changes in ({}, {"seed": 3}, {"optim__lr": 0.5}, {"data__split": "183"}, {"model__encoder_frozen": True}):
        assert run_faults(config(**changes), FACTS._replace(unlabelled=100 + len(changes)), store) == ["no 64"]
    assert len(tried) == 1
    others: list[dict[str, Any]] = [{"crop": 96}, {"method": "fixmatch"}, {"encoder": "norm"}, {"runtime__workers": 2}]
    others += [{"eval__protocol": "center_crop"}, {"method__ohem__enabled": True}]
    others += [{"model__drop_path": 0.1}]
    for changes in others:
        run_faults(config(**changes), FACTS, store)
    for facts in (FACTS._replace(classes=5), FACTS._replace(captions=False), FACTS._replace(unlabelled=1)):
        run_faults(config(), facts, store)
    assert len(tried) == 11
    for device in ("cpu", "cuda", "cpu"):
        run_faults(pooled(runtime__device=device), FACTS, store)
    assert len(tried) == 13


def test_a_result_is_of_one_state_of_the_code(
    tmp_path: Path, tried: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_faults(config(), FACTS, Checked(tmp_path))
    run_faults(config(), FACTS, Checked(tmp_path))
    assert len(tried) == 1
    (file,) = tmp_path.rglob("*.json")
    for damage in ("", "[]", '{"faults": [1]}', '{"faults": "none"}'):
        file.write_text(damage, encoding="utf-8")
        assert run_faults(config(), FACTS, Checked(tmp_path)) == ["no 64"]
    assert len(tried) == 5
    monkeypatch.setattr(checked, "code_digest", lambda *given: "other")
    run_faults(config(), FACTS, Checked(tmp_path))
    assert len(tried) == 6


def test_a_place_that_cannot_be_written_costs_time_only(tmp_path: Path, tried: list[RunConfig]) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert run_faults(config(), FACTS, Checked(tmp_path / "file")) == ["no 64"]
    assert len(tried) == 2


def test_what_the_tests_of_the_package_train_is_not_tried(tmp_path: Path, tried: list[RunConfig]) -> None:
    facts, store = FACTS._replace(classes=4, picture=(64, 64)), Checked(tmp_path)
    for changes in ({}, {"method.name": "viladiff", "method.vila.lam": 0.3}, {"model.weights": "a.pth"}):
        assert run_faults(override(RunConfig(), changes), facts, store) == []
    assert tried == []
    for changes in ({"data.crop": 56}, {"model.encoder": "stub_any", "model.pretrained": "none"}):
        run_faults(override(RunConfig(), changes), facts, store)
    run_faults(RunConfig(), facts._replace(unlabelled=0), store)
    run_faults(override(RunConfig(), {"runtime.workers": 2}), facts, store)
    assert len(tried) == 4


# Weights


def test_weights_that_are_not_here_are_told_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object, **words: object) -> None:
        raise AssertionError("a dry run asks no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = override(RunConfig(), {"model.encoder": "resnet18", "model.pretrained": "timm"}).model
    with monkeypatch.context() as patch:
        patch.setattr(socket, "create_connection", refused)
        patch.setattr(socket.socket, "connect", refused)
        told = weights_fault(model)
    assert told is not None and told.startswith("model.pretrained = 'timm': the weights of 'resnet18' (timm/")
    assert "not in the cache of this machine, and a start would download them; set model.weights to a file" in told
    assert "cannot be downloaded" in (weights_fault(model, fetch=True) or "")
    for folder in ("refs", "snapshots/abc"):
        (tmp_path / "models--timm--resnet18.a1_in1k" / folder).mkdir(parents=True)
    (tmp_path / "models--timm--resnet18.a1_in1k" / "refs" / "main").write_text("abc")
    (tmp_path / "models--timm--resnet18.a1_in1k" / "snapshots" / "abc" / "model.safetensors").write_bytes(b"weights")
    assert weights_fault(model) is None
    for changes in ({"model.encoder": "resnet18", "model.pretrained": "none"}, {"model.weights": "a.pth"}, {}):
        assert weights_fault(override(RunConfig(), changes).model) is None


# Networks that are trained


def loaded(encoder: str) -> Model:
    network = empty_method(config(encoder), [f"class {i}" for i in range(5)], 8).eval_network()
    return Model(network.eval(), ("a", "b", "c", "d", "e"), 64, "original", torch.device("cpu"))


def test_predict_refuses_what_the_network_cannot_take(tmp_path: Path, photographs: Any) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    piece = photographs.piece(0, (100, 130)).pixels
    Image.fromarray(piece).save(tmp_path / "in" / "odd.png")
    Image.fromarray(piece[:64, :64]).save(tmp_path / "in" / "even.png")
    with pytest.raises(ValueError, match=r"^protocol = 'original': .* a picture of 1[0-3]\d x .*use sliding_window$"):
        label_files(loaded("fixed"), tmp_path / "in", tmp_path / "out", show=False)
    assert not (tmp_path / "out").exists()
    assert label_files(loaded("fixed"), tmp_path / "in", tmp_path / "out", "sliding_window", show=False).images == 2
    assert label_files(loaded("fixed"), tmp_path / "in" / "even.png", tmp_path / "one", show=False).images == 1
    assert label_files(loaded("any"), tmp_path / "in", tmp_path / "any", show=False).images == 2


def test_predict_takes_sides_that_no_patch_divides() -> None:
    cfg = override(config(), {"model.encoder": "eva02_tiny_patch14_224"})
    network = empty_method(cfg, [f"class {i}" for i in range(5)], 8).eval_network().eval()
    model = Model(network, ("a", "b", "c", "d", "e"), 64, "original", torch.device("cpu"))
    assert model.network.side_multiple == 14 and not model.network.encoder.any_size
    check_prediction(model.network, 64, "original", [(97, 130)])  # which is resized to the nearest multiples
    assert model.predict(np.zeros((97, 130, 3), np.uint8)).labels.shape == (97, 130)


def test_a_loaded_network_keeps_its_weights() -> None:
    network = loaded("any").network
    before = {name: x.clone() for name, x in network.state_dict().items()}
    check_prediction(network, 64, "original", [(70, 80)])
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


def test_evaluate_refuses_a_protocol_that_cannot_work() -> None:
    with pytest.raises(ValueError, match=r"^eval\.protocol = 'original': .*eval\.protocol=sliding_window fits"):
        refuse_scoring(config("fixed"), FACTS)
    refuse_scoring(config("fixed", eval__protocol="sliding_window"), FACTS)
    refuse_scoring(config("any"), FACTS)
