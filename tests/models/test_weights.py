"""What an encoder starts from is part of a run's name, and its file of the record."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import timm

from viladiff.models.encoders.build import weights_origin
from viladiff.runs.config import RunConfig, override, run_id
from viladiff.training.fingerprints import weights_fingerprint

TIMM = override(RunConfig(), {"model.encoder": "resnet18", "model.pretrained": "timm"})


def test_timms_weights_are_named_by_tag_and_home() -> None:
    found = weights_fingerprint(TIMM)
    assert found == {"weights": "timm resnet18.a1_in1k (timm/resnet18.a1_in1k)"}
    assert weights_fingerprint(override(TIMM, {"model.encoder": "resnet18.tv_in1k"})) != found
    assert weights_fingerprint(override(TIMM, {"model.pretrained": "none"})) == {}


def test_another_default_of_timm_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before, default = run_id(TIMM, weights_fingerprint(TIMM)), timm.get_pretrained_cfg("resnet18.tv_in1k")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: default)
    assert run_id(TIMM, weights_fingerprint(TIMM)) != before


@pytest.mark.parametrize(
    "name", ["resnet18d_x", "resnet18.no_such_tag", "test_resnet_nothing", "vit_tiny_patch16_224_"]
)
def test_weights_that_do_not_exist_are_refused_before_a_run_starts(name: str) -> None:
    with pytest.raises(ValueError, match=r"model\.encoder = "):
        weights_fingerprint(override(TIMM, {"model.encoder": name}))


def test_a_model_without_weights_says_what_to_do() -> None:
    bare = sorted(set(timm.list_models("vit*")) - {name.split(".")[0] for name in timm.list_pretrained()})
    with pytest.raises(ValueError, match=f'timm has no weights for "{bare[0]}"'):
        weights_fingerprint(override(TIMM, {"model.encoder": bare[0]}))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_record_has_the_checksum_of_the_file_and_the_name_has_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is named before its weights are fetched; its name may not change by that."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    before = weights_fingerprint(TIMM)
    stated = f"{before['weights']}, licence apache-2.0"
    assert weights_origin(TIMM.model) == stated
    repository = tmp_path / "models--timm--resnet18.a1_in1k"
    for folder in ("refs", "snapshots/abc"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / name).write_bytes(b"weights")
    assert weights_origin(TIMM.model) == f"{stated}, SHA-256 {hashlib.sha256(b'weights').hexdigest()[:16]}"
    assert weights_fingerprint(TIMM) == before


def test_other_origins_are_as_they_were(tmp_path: Path) -> None:
    assert weights_origin(RunConfig().model) == "shipped"
    assert weights_origin(override(RunConfig(), {"model.pretrained": "none"}).model) == "none"
    assert weights_origin(override(RunConfig(), {"model.weights": "a.pth"}).model) == "a.pth"
