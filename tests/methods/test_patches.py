"""Encoders whose patches are 14 pixels wide, as DINOv2's: cells of 7 pixels, crops that are multiples of 14."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from viladiff.config.sections import ModelConfig
from viladiff.core.keyed_random import numpy_generator
from viladiff.data.batch import CutMix, TextBatch
from viladiff.data.transforms.mixing import apply_cutmix, cutmix_boxes
from viladiff.inference.export import Standalone, export_onnx, export_run, onnx_difference
from viladiff.inference.load import evaluate_run, preview_run
from viladiff.inference.predict import Model
from viladiff.inference.pretrained import load_model
from viladiff.models.decoders.light import LightDecoder, output_stride
from viladiff.models.encoders.build import build_encoder
from viladiff.models.segmenter import Segmenter, cutmix_stream
from viladiff.models.vila import ViLa, VilaConfig
from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import fit

Make = Callable[..., Path]
PICO = "vit_pico_patch14"


def vit_pico_patch14(pretrained: bool = False, **options: Any) -> nn.Module:
    """DINOv2's shape, registers and all, in a thousandth of its size."""
    shape = {"patch_size": 14, "embed_dim": 32, "depth": 8, "num_heads": 2, "reg_tokens": 4, "init_values": 1e-5}
    features = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(
        VisionTransformer, PICO, pretrained, feature_cfg=features, img_size=56, **shape, **options
    )


@pytest.fixture(autouse=True, scope="module")
def _known_to_timm() -> None:
    sys.modules[__name__].__dict__.setdefault("__all__", [])
    register_model(vit_pico_patch14)


def network(vila: bool = False, classes: int = 5, decoder: str = "light") -> Segmenter:
    torch.manual_seed(0)
    encoder = build_encoder(PICO, "none")
    net = Segmenter(
        encoder,
        ModelConfig(decoder=decoder, decoder_width=64 if decoder == "dpt" else 16),  # type: ignore[arg-type]
        classes,
        ViLa(32, 12, VilaConfig(width=32, heads=2)) if vila else None,
    )
    with torch.no_grad():  # an untrained block adds next to nothing
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def test_cells_are_whole_pixels_and_patches_whole_cells() -> None:
    strides = {16: 4, 8: 4, 32: 4, 14: 7, 7: 7}
    assert {patch: output_stride((patch,) * 4) for patch in strides} == strides
    assert output_stride((4, 8, 16, 32)) == 4 and output_stride((2, 4, 8, 8)) == 2
    with pytest.raises(ValueError, match=r"cells of 15 pixels; the decoder needs a multiple of 4 or of 7"):
        output_stride((15,) * 4)
    decoder = LightDecoder((8, 8, 8, 8), (14,) * 4, 16)
    maps = [torch.rand(2, 8, 3, 4) for _ in range(4)]
    assert [tuple(x.shape[-2:]) for x in decoder.laterals(maps)] == [(6, 8), (3, 4), (3, 4)]
    assert decoder(maps[3], decoder.laterals(maps)).shape == (2, 16, 6, 8)


def test_two_streams_and_boxes_on_both_grids() -> None:
    net, size = network(vila=True), (56, 84)
    words = TextBatch(torch.rand(4, 3, 12), torch.ones(4, 3, dtype=torch.bool))
    with torch.no_grad():
        found = net.streams(torch.rand(4, 3, *size), words)
        assert {name: x.shape for name, x in net(torch.rand(4, 3, *size), words).items()} == dict.fromkeys(
            ("visual", "fusion"), (4, 5, *size)
        )
    for stream in found.values():
        assert stream.features.shape[:2] == (4, 24) and stream.logits.shape == (4, 5, 8, 12)
    boxes = cutmix_boxes([numpy_generator("box", i) for i in range(4)], 56, 14)
    assert boxes.any() and not (boxes % 14).any()
    mix, stream = CutMix(boxes, torch.tensor([1, 0, 3, 2])), found["visual"]
    square = stream._replace(features=stream.features[:, :16], logits=stream.logits[..., :8])
    pixels = square.logits.repeat_interleave(7, 2).repeat_interleave(7, 3)
    pasted = cutmix_stream(square, mix, 4, 4, 14, 7)
    assert torch.equal(pasted.logits.repeat_interleave(7, 2).repeat_interleave(7, 3), apply_cutmix(pixels, mix))
    assert not torch.equal(pasted.logits, square.logits) and not torch.equal(pasted.features, square.features)


def changes(root: Path, method: str = "semibaseline", **fields: object) -> RunConfig:
    return override(
        RunConfig(),
        {
            "data.dataset": "folder",
            "runtime.data_root": str(root / "photos"),
            "runtime.runs_dir": str(root / "runs"),
            "runtime.progress": False,
            "runtime.threads": 1,
            "method.name": method,
            "model.encoder": PICO,
            "model.pretrained": "none",
            "model.decoder_width": 16,
            "data.crop": 56,
            "data.batch_labelled": 2,
            "data.batch_unlabelled": 2,
            "data.captions": "none",
            "train.steps": 2,
            "eval.boundary": False,
            **fields,
        },
    )


@pytest.mark.parametrize("method", ["viladiff", "corrmatch"])
def test_from_photographs_to_a_model_folder(method: str, photo_folder: Make, tmp_path: Path) -> None:
    """Both methods cut and vote on the grid of patches; nothing that comes after knows of patches but by asking."""
    photo_folder(12, sizes=(40, 90))
    result = fit(changes(tmp_path, method))
    for protocol in ("original", "sliding_window", "center_crop"):
        assert evaluate_run(result.directory, {"eval.protocol": protocol})["scores"]
    export_run(result.directory, tmp_path / "model")
    found = load_model(tmp_path / "model", "cpu")
    assert found.network.patch == 14
    pixels = (torch.rand(61, 117, 3) * 255).byte().numpy()
    for protocol in ("original", "sliding_window"):
        labels, confidence = found.predict(pixels, protocol)
        assert labels.shape == confidence.shape == (61, 117) and 0 < confidence.min() <= confidence.max() <= 1


@pytest.mark.parametrize(("method", "crop", "nearest"), [("supervised", 512, "504 or 518"), ("cps", 64, "56 or 70")])
def test_other_crops_are_refused_with_the_nearest_that_fit(
    method: str, crop: int, nearest: str, photo_folder: Make, tmp_path: Path
) -> None:
    photo_folder(8)
    message = rf"data\.crop = {crop}: must be a multiple of the patch of .*{PICO}', 14; nearest: {nearest}"
    for start in (fit, preview_run):
        with pytest.raises(ValueError, match=message):
            start(changes(tmp_path, method, **{"data.crop": crop}))
    assert not list(tmp_path.rglob("steps.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("crop", [518, 798])
def test_published_crops_of_a_real_encoder_s_shape(crop: int) -> None:
    encoder = build_encoder("vit_small_patch14_reg4_dinov2", "none")
    net = Segmenter(encoder, ModelConfig(decoder_width=64), 21).eval()
    with torch.inference_mode():
        assert net(torch.rand(1, 3, crop, crop))["visual"].shape == (1, 21, crop, crop)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["light", "dpt"])
def test_onnx_of_patches_of_14(decoder: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = network(decoder=decoder)
    model = Model(net, tuple("abcde"), 56, "original", torch.device("cpu"))
    assert export_onnx(model, tmp_path / "model.onnx") < 1e-4
    assert onnx_difference(Standalone(net), tmp_path / "model.onnx", (2, 126, 98)) < 1e-4
