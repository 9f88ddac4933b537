"""A model folder says where it comes from and what it costs; its ONNX file computes what torch does, at any size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from run_kit import short_run
from torch import Tensor, nn

from viladiff.cli import main
from viladiff.evaluation.complexity import costs
from viladiff.inference import export, pretrained
from viladiff.inference.card import _command
from viladiff.inference.export import ONNX, Standalone, export_onnx, export_run, onnx_difference
from viladiff.inference.predict import Model
from viladiff.inference.pretrained import load_model
from viladiff.methods.viladiff import VilaConfig
from viladiff.models import blocks
from viladiff.models.blocks import Attention, bilinear
from viladiff.models.decoders import light
from viladiff.models.segmenter import NetworkFactory, Segmenter
from viladiff.runs.config import RunConfig, override
from viladiff.runs.record import load_record


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a short run with one stream."""
    return short_run(tmp_path_factory.mktemp("runs"), "semibaseline")


def network(vila: bool, encoder: str = "digits_vit") -> Segmenter:
    torch.manual_seed(0)
    changes = {"model.encoder": encoder, "model.pretrained": "none"}
    made = NetworkFactory(override(RunConfig(), changes).model, 7, 12)(VilaConfig() if vila else None)
    return made.eval().requires_grad_(False)


def test_a_folder_tells_scores_cost_and_origin(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    assert main.main(["export", str(run), str(out)]) == 0
    assert re.search(r"48 x 48 without text +[\d,]+ parameters, [\d.]+ GFLOPs, [\d.e+]+ ms", capsys.readouterr().out)
    record = load_record(run / "record.json")
    card = (out / "README.md").read_text(encoding="utf-8")
    teacher = record.scores["teacher"]["visual"]
    for fact in (
        record.run_id,
        f"| visual (this folder) | {100 * teacher['miou']:.2f} | - | - | 5 |",
        "semibaseline on digits",
        record.fingerprints["data"],
        record.versions["torch"],
        record.finished,
        "viladiff train data.dataset=digits data.batch_labelled=4 method.name=semibaseline train.steps=2",
        "0 background, 1 zero",
        "GFLOPs",
    ):
        assert fact in card
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["scores"] == json.loads(json.dumps(record.scores)) and metrics["run_id"] == record.run_id
    assert (out / "classes.txt").read_text(encoding="utf-8").split("\n")[:-1] == record.class_names
    said = "".join(path.read_text(encoding="utf-8") for path in out.iterdir() if path.suffix != ".safetensors")
    assert str(run.parent) not in said and "runtime." not in said
    assert main.main(["export", str(run), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_folder_appears_whole_or_not_at_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "card", full)
    with pytest.raises(OSError, match="No space left"):
        export_run(run, tmp_path / "model")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        export_run(run, tmp_path / "model")
    with pytest.raises(ValueError, match=r"no record.json"):
        export_run(tmp_path, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_command_in_the_card_names_the_run_again(run: Path) -> None:
    import shlex

    record = load_record(run / "record.json")
    words = shlex.split(_command(record))[2:]
    again = override(RunConfig(), dict(word.split("=", 1) for word in words))
    changed = {path: value for path, value in record.changed.items() if not path.startswith("runtime.")}
    assert {path: json.loads(json.dumps(value)) for path, value in _changed(again).items()} == changed


def _changed(cfg: RunConfig) -> dict[str, object]:
    from viladiff.runs.config import non_default_fields as changed

    return changed(cfg)


@pytest.mark.parametrize("vila", [False, True])
def test_flops_are_those_of_convolutions_products_and_attention(vila: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by hand, layer by layer, from the shapes that each layer sees."""
    net, counted = network(vila), [0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.ConvTranspose2d):
            counted[0] += 2 * inputs[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Conv2d):
            counted[0] += 2 * output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            counted[0] += 2 * output.numel() * module.in_features
        elif isinstance(module, Attention):
            tokens, other = inputs[0], inputs[1] if len(inputs) > 1 and inputs[1] is not None else inputs[0]
            counted[0] += 4 * tokens.shape[0] * tokens.shape[1] * other.shape[1] * tokens.shape[2]

    def enlarge(x: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
        """Two matrix products, along the columns and along the rows."""
        (h, w), (height, width) = x.shape[-2:], size
        counted[0] += 2 * x.shape[0] * x.shape[1] * (h * w * width + h * width * height)
        return bilinear(x, size)

    with monkeypatch.context() as patch:
        for place in (light, blocks):
            patch.setattr(place, "bilinear", enlarge)
        hooks = [module.register_forward_hook(count) for module in net.modules()]  # type: ignore[arg-type]
        with torch.no_grad():
            net.logits(net.encode(torch.zeros(1, 3, 64, 64)), (64, 64))
        for hook in hooks:
            hook.remove()
    assert costs(net, 64, 12, passes=1)["without text"].flops == counted[0] > 1e7


def test_parameters_are_those_that_the_answer_depends_on() -> None:
    net = network(vila=True)
    found = costs(net, 64, 12, passes=1)
    assert found["with text"].parameters == sum(p.numel() for p in net.parameters())
    assert net.vila is not None and net.classifier_fusion is not None
    textual = [net.vila.words, net.vila.inject, net.classifier_fusion]
    extra = sum(p.numel() for module in textual for p in module.parameters()) + net.vila.null.numel()
    assert found["without text"].parameters == found["with text"].parameters - extra
    assert found["without text"].flops < found["with text"].flops and found["without text"].seconds > 0
    assert list(costs(network(vila=False), 64, 12, passes=1)) == ["without text"]
    assert all(p.grad is None for p in net.parameters())


def folded(net: Segmenter, crop: int = 48) -> Model:
    return Model(net, tuple("abcdefg"), crop, "original", torch.device("cpu"))


def test_onnx_computes_what_torch_does_at_any_size(tmp_path: Path) -> None:
    """Batch, height and width are free; normalisation is inside; classes and patch are written in the file."""
    onnxruntime = pytest.importorskip("onnxruntime")
    net, path = network(vila=True), tmp_path / ONNX
    assert export_onnx(folded(net), path) < 2e-5
    for size in ((1, 64, 64), (2, 16, 200), (5, 72, 40)):
        assert onnx_difference(Standalone(net), path, size) < 2e-5
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list("abcdefg") and facts["patch"] == "8"
    assert [one.name for one in session.get_inputs()] == ["image"]
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    logits = session.run(None, {"image": pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255})[0]
    labels, confidence = folded(net).predict(pixels, "original")
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    np.testing.assert_allclose(shares.max(1)[0], confidence, atol=1e-5)
    assert (logits.argmax(1)[0] == labels).mean() > 0.999


def test_an_onnx_file_that_computes_something_else_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Program:
        class model:
            metadata_props: dict[str, str] = {}  # noqa: RUF012

            class graph:
                all_nodes = staticmethod(lambda: [])

        def save(self, path: Path, external_data: bool) -> None:
            path.write_bytes(b"something")

    monkeypatch.setattr(torch.onnx, "export", lambda *given, **named: Program())
    monkeypatch.setattr(export, "onnx_difference", lambda *given: 0.5)
    with pytest.raises(ValueError, match=r"differ from torch's by 0.5"):
        export_run(run, tmp_path / "model", onnx=True)
    monkeypatch.setattr(export, "onnx_difference", lambda *given: float("nan"))
    with pytest.raises(ValueError, match=r"differ from torch's by nan"):
        export_run(run, tmp_path / "model", onnx=True)
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_an_onnx_form_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    asks = lambda self, image: image if image.sum() > 0 else -image  # noqa: E731
    monkeypatch.setattr(Standalone, "forward", asks)
    with pytest.raises(
        ValueError, match=r"^model\.encoder = .* has no form for ONNX: .*; export without --onnx, or with --pt2$"
    ):
        export_onnx(folded(network(vila=False)), tmp_path / ONNX)
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_the_message_names_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx is not installed; pip install 'viladiff\[onnx\]'"):
        export_run(run, tmp_path / "model", onnx=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "resnet18"])
def test_onnx_of_encoders_from_timm(encoder: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = network(vila=False, encoder=encoder)
    assert export_onnx(folded(net, 64), tmp_path / ONNX) < 1e-4
    assert onnx_difference(Standalone(net), tmp_path / ONNX, (2, 128, 96)) < 1e-4


def test_a_folder_with_onnx_says_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "export_onnx", lambda model, path: 3e-6)
    facts = export_run(run, tmp_path / "model", onnx=True)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "3e-06" in facts["ONNX against torch"] and "3e-06" in card and "multiples of 8" in card
    assert load_model(tmp_path / "model").crop == 48


def test_of_a_chain_of_errors_the_first_cause_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            raise NotImplementedError("five dimensions\n\nof attention")
        except NotImplementedError as cause:
            raise torch.onnx.OnnxExporterError("\nFailed\nConversionError: node\n(Refer to the trace)") from cause

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match=r"has no form for ONNX: five dimensions; export without") as caught:
        export_onnx(folded(network(vila=False)), tmp_path / ONNX)
    assert "\n" not in str(caught.value)
