"""Methods with the decoder dpt, whose cells are an eighth of a patch and not always whole pixels."""

from __future__ import annotations

from dataclasses import replace

import method_kit
import pytest
import tiny_vits
import torch
from method_kit import CLASSES, NAMES, STEP, make_batch, vectors
from torch import Tensor

from viladiff.data.batch import Batch, CutMix, Step
from viladiff.data.transforms.mixing import apply_cutmix
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.methods.viladiff import ViLaDiff
from viladiff.models.blocks import upsample
from viladiff.models.segmenter import NetworkFactory
from viladiff.models.stream import StreamOutput
from viladiff.runs.config import RunConfig, override


@pytest.fixture(autouse=True, scope="module")
def _known_to_timm() -> None:
    tiny_vits.register()


def made(name: str, patch: int, decoder: str = "dpt", **changes: object) -> Method:
    flat = {
        "method.name": name, "model.encoder": tiny_vits.PICO[patch], "model.pretrained": "none",
        "model.decoder": decoder, "model.decoder_width": 64,
    }  # fmt: skip
    cfg = override(RunConfig(), flat)
    if hasattr(cfg.method, "pseudo"):
        changes.setdefault("pseudo.threshold", 0.0)
    cfg = override(cfg, {f"method.{path}": value for path, value in changes.items()})
    torch.manual_seed(0)
    build = NetworkFactory(cfg.model, CLASSES, 12, class_names=NAMES, crop=4 * patch, texts=vectors)
    return METHODS[name](cfg.method, build).train()


def batch_for(method: Method, patch: int, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """A batch of two and two, whose boxes lie on the patch grid."""
    monkeypatch.setattr(method_kit, "SIDE", 4 * patch)
    boxes = torch.tensor([[0, patch, 2 * patch, 3 * patch], [0, 0, 0, 0]])
    views = method.required_views()
    batch = make_batch(2, views=replace(views, cutmix=False))
    mix = (CutMix(boxes, torch.tensor([1, 0])),) * max(1, views.strong) if views.cutmix else ()
    return replace(batch, mix=mix)


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_takes_a_step(name: str, patch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = made(name, patch)
    losses = method(batch_for(method, patch, monkeypatch), STEP)
    losses.total.backward()
    method.after_step(STEP)
    assert losses.total.isfinite() and all(term.isfinite() for term in losses.terms.values())
    grads = [p.grad for p in method.student.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)
    own = name in ("semivl", "textprobe")
    assert own or any(p.grad is not None and p.grad.any() for p in method.student.decoder.parameters())


@pytest.mark.parametrize("patch", [14, 16])
def test_dpt_leaves_no_parameter_without_a_gradient(patch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers would wait for one that has none."""
    method = made("supervised", patch)
    method(batch_for(method, patch, monkeypatch), STEP).total.backward()
    assert [name for name, p in method.student.named_parameters() if p.grad is None] == []


def uneven(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("patch", "stride", "cells"), [(14, 7, 4), (16, 4, 2)])
def test_mixe_sees_means_over_cells_of_its_own_grid(patch: int, stride: int, cells: int) -> None:
    method, side = made("viladiff", patch), 4 * patch
    assert isinstance(method, ViLaDiff) and method.student.label_stride == stride
    images = uneven(torch.empty(2, 3, side, side), 0)
    with torch.no_grad():
        out = method._see(method.student, images, None)
    stream = StreamOutput(*(uneven(x, i) for i, x in enumerate(out.streams["fusion"])))
    out = out._replace(streams=dict.fromkeys(out.streams, stream))
    assert stream.logits.shape[-1] == 32 and cells * (side // stride) == 32

    def means(x: Tensor) -> Tensor:
        h = side // stride
        return x.unflatten(3, (h, cells)).unflatten(2, (h, cells)).mean((3, 5))

    soft = method._soft(stream.logits, images.shape[-2:])
    torch.testing.assert_close(soft, means(stream.logits.softmax(1)))
    mid, logits, *more = method._condition(out)
    torch.testing.assert_close(mid, means(stream.mid))
    torch.testing.assert_close(logits.softmax(1), soft)
    assert all(x.shape[0] == 2 for x in more)
    with torch.no_grad():
        refined = method.chained(out, stream.logits, (0, 1), Step(3, 1.0, 0))
    assert refined.shape == (2, CLASSES, side // stride, side // stride)
    # What is pasted before the means are taken is what is pasted after: a box cuts no cell of either grid.
    boxes = CutMix(torch.tensor([[0, patch, 2 * patch, 3 * patch], [0, 0, 0, 0]]), torch.tensor([1, 0]))
    probs = stream.logits.softmax(1)
    pasted = apply_cutmix(soft, boxes, stride)
    torch.testing.assert_close(pasted, means(apply_cutmix(probs, boxes, patch / 8)))
    assert not torch.equal(pasted, soft)
    mixed = out.mixed(boxes).streams["fusion"]
    assert torch.equal(mixed.logits, apply_cutmix(stream.logits, boxes, patch / 8))


def test_boxes_lie_where_they_lie_in_the_image() -> None:
    """Cells of 1.75 pixels, blown up to the grid of quarter pixels, on which both are whole."""
    logits, boxes = torch.randn(2, 3, 32, 32), torch.tensor([[14, 0, 42, 28], [0, 28, 56, 56]])
    pasted = apply_cutmix(logits, CutMix(boxes, torch.tensor([1, 0])), 1.75)
    fine = [x.repeat_interleave(7, 2).repeat_interleave(7, 3) for x in (logits, pasted)]
    expected = apply_cutmix(fine[0], CutMix(boxes * 4, torch.tensor([1, 0])))
    assert torch.equal(fine[1], expected)
    with pytest.raises(ValueError, match=r"stride = 1\.75: must divide every edge"):
        apply_cutmix(logits, CutMix(boxes + 1, torch.tensor([1, 0])), 1.75)


def test_with_the_light_decoder_the_label_grid_is_its_own() -> None:
    method = made("viladiff", 14, "light")
    assert isinstance(method, ViLaDiff) and method.student.decoder.stride == method.student.label_stride == 7
    logits = torch.randn(2, CLASSES, 8, 8)
    size = torch.Size((56, 56))
    assert torch.equal(method._soft(logits, size), logits.softmax(1))
    stream = StreamOutput(torch.zeros(2, 16, 3), torch.zeros(2, 64, 8, 8), logits)
    assert method._on_labels(stream, size) is stream
    assert upsample(logits, size).shape == (2, CLASSES, 56, 56)
