"""Encoders of transformers from a directory: maps are the blocks' own, no weight is missing, no foreign code runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import bert, clip

from viladiff.inference.export import export_run
from viladiff.inference.load import load_method, load_run
from viladiff.models.encoders.build import build_encoder
from viladiff.runs.config import ConfigError, RunConfig, override
from viladiff.training.fingerprints import weights_fingerprint
from viladiff.training.trainer import fit

NARROW = {
    "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def saved(directory: Path, kind: str = "ViT", seed: int = 0, **more: Any) -> Path:
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**NARROW | more)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(directory)
    return directory


BEIT = {"use_relative_position_bias": True, "use_absolute_position_embeddings": False}
"""As the published BEiT has its positions."""
NEEDS_TELLING = ("ViT", "Beit", "Data2VecVision")
"""Models that bring positions to another size of image only if told to."""


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters", "Beit", "Data2VecVision"])
def test_maps_are_four_blocks_of_the_model_on_an_image_of_any_size(kind: str, tmp_path: Path) -> None:
    import transformers

    more = BEIT if kind in ("Beit", "Data2VecVision") else {}
    encoder = build_encoder("transformers", "timm", str(saved(tmp_path / "model", kind, **more))).eval()
    assert (encoder.channels, encoder.strides, encoder.patch, encoder.any_size) == ((16,) * 4, (8,) * 4, 8, False)
    model = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    for size, told in (((32, 32), {}), ((16, 48), {"interpolate_pos_encoding": True} if kind in NEEDS_TELLING else {})):
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            found = encoder(image)
            states = model(pixel_values=image, output_hidden_states=True, **told).hidden_states
        rows, columns = size[0] // 8, size[1] // 8
        for place, block in enumerate((1, 2, 3, 5)):
            expected = states[block][:, -rows * columns :]
            expected = (expected - expected.mean((1, 2), keepdim=True)) / (
                expected.var((1, 2), unbiased=False, keepdim=True) + 1e-5
            ).sqrt()
            assert found[place].shape == (2, 16, rows, columns)
            torch.testing.assert_close(found[place].flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Beit"])
def test_what_trains_has_a_gradient_and_the_rest_is_frozen(kind: str, tmp_path: Path) -> None:
    encoder = build_encoder("transformers", "none", str(saved(tmp_path / "model", kind))).train()
    torch.stack([one.square().mean() for one in encoder(torch.randn(2, 3, 16, 16))]).sum().backward()
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert all("mask_token" in name or "pooler" in name or name.startswith("net.layernorm") for name in frozen)
    assert any("attention" in name for name in trained) and any(name.startswith("norms.") for name in trained)


def test_of_clip_the_part_for_images_is_read(tmp_path: Path) -> None:
    encoder = build_encoder("transformers", "none", str(clip(tmp_path / "clip")))
    with torch.no_grad():
        maps = encoder(torch.randn(1, 3, 24, 16))
    assert [tuple(one.shape) for one in maps] == [(1, 16, 3, 2)] * 4


def edited(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_vision_transformer_is_refused_by_name(tmp_path: Path) -> None:
    def refused(directory: Path, said: str) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            build_encoder("transformers", "none", str(directory))
        assert str(directory) in str(caught.value)

    refused(tmp_path / "nowhere", "no such directory")
    refused(bert(tmp_path / "bert"), "is no plain vision transformer")
    bare = saved(tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    refused(bare, "could carry code and is not read: save it as safetensors")
    refused(edited(saved(tmp_path / "other"), num_hidden_layers=6), "of another model: .* missing")
    refused(edited(saved(tmp_path / "uneven"), patch_size=[8, 4]), "patch_size that is one number")
    code = edited(saved(tmp_path / "radio"), model_type="radio_x", auto_map={"AutoConfig": "m.C", "AutoModel": "m.M"})
    (code / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(code, "transformers cannot load it.*vit_base_patch16_radio_v3")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match=r"model\.weights: must be set to the directory"):
        override(RunConfig(), {"model.encoder": "transformers"})


def test_a_run_is_named_by_what_is_in_the_directory(tmp_path: Path) -> None:
    def named(directory: Path) -> str:
        cfg = override(RunConfig(), {"model.encoder": "transformers", "model.weights": str(directory)})
        return weights_fingerprint(cfg)["weights"]

    first = named(saved(tmp_path / "a"))
    assert first == named(saved(tmp_path / "b")) != named(saved(tmp_path / "c", seed=1))
    assert named(edited(tmp_path / "b", layer_norm_eps=1e-3)) != first
    (tmp_path / "a" / "more.safetensors").write_bytes(b"another part of the weights")
    assert named(tmp_path / "a") != first
    with pytest.raises(ValueError, match=r"must be a directory with config\.json and"):
        named(tmp_path / "nothing")
    for file, kind in (("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "JAX"), ("pytorch_model.bin", "torch")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").touch()
        (tmp_path / kind / file).touch()
        with pytest.raises(ValueError, match=rf"{file} is .*{kind}, which is not read: save the model anew"):
            named(tmp_path / kind)
    for file in ("manifest.json", "classes.txt"):
        (tmp_path / "b" / file).touch()
    with pytest.raises(ValueError, match=r"a model folder of viladiff export, .*; name .*model\.safetensors"):
        named(tmp_path / "b")


@pytest.mark.slow
def test_the_experiment_of_figure_1_runs_on_a_frozen_one(tmp_path: Path) -> None:
    changes = {
        "method.name": "textprobe", "model.encoder": "transformers", "model.encoder_frozen": True, "train.steps": 2,
        "model.weights": str(saved(tmp_path / "model", "Dinov2")), "eval.max_images": 16, "eval.boundary": False,
        "data.batch_labelled": 2, "runtime.runs_dir": str(tmp_path / "runs"), "runtime.progress": False,
    }  # fmt: skip
    result = fit(override(RunConfig(), changes))
    assert result.record.scores["student"]["fusion"]["silhouette"] is not None
    method = load_method(load_run(result.directory))
    before = build_encoder("transformers", "none", str(tmp_path / "model")).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in method.student.encoder.state_dict().items())
    assert not any(p.requires_grad for p in method.student.encoder.parameters())
    with pytest.raises(ValueError, match="no model folder can say what the network is"):
        export_run(result.directory, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
