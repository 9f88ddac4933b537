"""SemiVL: its decoder, the labels from text and its loss against straight-line NumPy; a tiny CLIP through open_clip."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_kit import (
    CLASSES,
    NAMES,
    SIDE,
    STEP,
    cross_entropy_map,
    make,
    make_batch,
    make_uneven,
    mean_over,
    mixed,
    softmax,
    vectors,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from viladiff.data.batch import Batch, Step
from viladiff.data.sources.ade20k import CLASS_NAMES as ADE_NAMES
from viladiff.data.sources.cityscapes import CLASS_NAMES as CITY_NAMES
from viladiff.data.sources.coco import CLASS_NAMES as COCO_NAMES
from viladiff.data.sources.voc import CLASS_NAMES as VOC_NAMES
from viladiff.data.transforms.mixing import box_mask
from viladiff.methods import METHODS
from viladiff.methods.semivl import SemiVl, SemiVlConfig, best_concepts, class_text_vectors
from viladiff.models.baselines import vl_decoder
from viladiff.models.baselines.maskclip import TEMPLATE, load_clip
from viladiff.models.baselines.vl_decoder import (
    Aspp,
    SemanticBlock,
    Up,
    VlDecoder,
    VlDecoderConfig,
    similarity,
    skip_levels,
)
from viladiff.models.blocks import upsample
from viladiff.models.fused.pixel_logits import PixelLogits
from viladiff.models.segmenter import NetworkFactory
from viladiff.runs.config import RunConfig, override, run_id
from viladiff.text.concepts import APART, BACKGROUND, PUBLISHED, concepts, names
from viladiff.training.fingerprints import weights_fingerprint

Array = np.ndarray


def np_(x: Tensor) -> Array:
    return np.asarray(x.detach().double().numpy())


# Texts


def test_classes_are_called_by_their_concepts() -> None:
    found = concepts(("background", "tvmonitor", "traffic_light", "tree", "person"))
    assert found[1:] == (("television", "computer monitor"), ("traffic light",), ("tree",), ("person",))
    assert found[0] == tuple(text for text in BACKGROUND if text != "tree")
    assert len(set(BACKGROUND)) == len(BACKGROUND) == 45
    assert concepts(("sky", "road")) == (("sky",), ("road",))


def test_published_concepts_belong_to_the_classes_that_they_name() -> None:
    """Each class is among its own concepts, by its name or as people write it; 45 name VOC's background."""
    for dataset, classes in (("voc", VOC_NAMES), ("cityscapes", CITY_NAMES)):
        found = concepts(classes, dataset)
        assert found == PUBLISHED[dataset] and len(found) == len(classes)
        every = [text for group in found for text in group]
        assert len(set(every)) == len(every) and all(text == text.strip() and text for text in every)
        for name, group in zip(classes, found, strict=True):
            known = {name.replace("_", " "), *APART.get(name, ())} | ({"tv"} if name == "tvmonitor" else set())
            assert known & set(group) or (dataset, name) == ("cityscapes", "wall"), name
    voc, city = PUBLISHED["voc"], PUBLISHED["cityscapes"]
    assert (len(voc[0]), sum(map(len, voc))) == (45, 98) and (len(city[11]), sum(map(len, city))) == (7, 54)
    assert city[3] == ("individual standing wall, which is not part of a building",)
    assert concepts(CITY_NAMES[:5], "cityscapes")[3] == ("wall",)  # other classes than those published
    for dataset, classes in (("coco", COCO_NAMES), ("ade20k", ADE_NAMES)):
        assert concepts(classes, dataset) == names(classes, dataset) == tuple((name,) for name in classes)


def test_the_decoder_reads_a_name_alone_and_on_cityscapes_the_mean_of_the_concepts() -> None:
    assert names(VOC_NAMES, "voc")[0] == ("background",) and names(VOC_NAMES, "voc")[11] == ("diningtable",)
    assert names(CITY_NAMES, "cityscapes") == PUBLISHED["cityscapes"]
    cfg = override(RunConfig(), {"method.name": "semivl", "model.pretrained": "none"})
    for dataset, classes in (("voc", VOC_NAMES), ("cityscapes", CITY_NAMES), ("", NAMES)):
        build = NetworkFactory(cfg.model, len(classes), 12, dataset, class_names=classes, crop=SIDE, texts=vectors)
        method = SemiVl(cfg.method, build)
        read = [np_(vectors(group)).mean(0) for group in names(classes, dataset)]
        expected = np.stack([x / np.linalg.norm(x) for x in read])
        np.testing.assert_allclose(np_(method.student.decoder.class_texts), expected, atol=1e-6)
        labelled_by = [text for group in concepts(classes, dataset) for text in group]
        torch.testing.assert_close(method.concepts, F.normalize(vectors(labelled_by), dim=1))
        assert method.owner.tolist() == [k for k, group in enumerate(concepts(classes, dataset)) for _ in group]


def test_general_concepts_stand_in_where_the_encoder_knows_none_that_is_published() -> None:
    cfg = override(RunConfig(), {"method.name": "semivl", "model.pretrained": "none"})
    general = concepts(VOC_NAMES)

    def texts(asked: Any) -> Tensor:  # no word for a sofa or for "tv"
        mute = {"tv", "monitor", "standalone screen"}
        return vectors(asked) * torch.tensor([[float(text not in mute)] for text in asked])

    method = SemiVl(cfg.method, NetworkFactory(cfg.model, 21, 12, "voc", class_names=VOC_NAMES, crop=SIDE, texts=texts))
    assert len(method.owner) == sum(map(len, general)) and (method.owner == 20).sum() == 2


def test_a_class_has_the_likeness_of_its_best_concept_and_the_mean_of_their_texts() -> None:
    gen = torch.Generator().manual_seed(0)
    dense = F.normalize(torch.randn(2, 6, 3, 4, generator=gen), dim=1)
    texts, owner = F.normalize(torch.randn(5, 6, generator=gen), dim=1), torch.tensor([1, 0, 1, 2, 1])
    cosines = similarity(dense, texts)
    expected = np.einsum("bthw,mt->bmhw", np_(dense), np_(texts))
    np.testing.assert_allclose(np_(cosines), expected, atol=1e-6)
    found = best_concepts(cosines, owner, 3)
    groups = ([1], [0, 2, 4], [3])
    np.testing.assert_allclose(np_(found), np.stack([expected[:, g].max(1) for g in groups], 1), atol=1e-6)
    assert (found < 0).any()  # nothing is 0 for want of a start
    means = np.stack([np_(texts)[g].mean(0) for g in groups])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(np_(class_text_vectors(texts, owner, 3)), means, atol=1e-6)


def test_unknown_concepts_are_left_out_and_a_class_without_any_is_refused() -> None:
    cfg = override(RunConfig(), {"method.name": "semivl", "model.pretrained": "none"})

    def knows(*words: str) -> NetworkFactory:
        def texts(asked: Any) -> Tensor:
            return vectors(asked) * torch.tensor([[float(text in words)] for text in asked])

        return NetworkFactory(cfg.model, CLASSES, 12, class_names=NAMES, crop=SIDE, texts=texts)

    method = SemiVl(cfg.method, knows("sky", "wall", *NAMES[1:]))
    assert method.owner.tolist() == [0, 0, 1, 2, 3, 4] and method.concepts.shape == (6, 12)
    expected = vectors(["sky", "wall"]).sum(0)
    torch.testing.assert_close(method.student.decoder.class_texts[0], expected / expected.norm())
    with pytest.raises(ValueError, match=r"semivl.*knows no word of the class 'three'.*method.clip.weights"):
        SemiVl(cfg.method, knows("sky", "one", "two", "four"))


# The decoder


def conv(x: Array, layer: nn.Module, pad: int = 0, dilation: int = 1) -> Array:
    """(B, C, h, w) by a convolution of stride 1, one tap at a time."""
    weight: Array = np_(layer.weight)  # type: ignore[arg-type]
    h, w = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    out = np.zeros((len(x), len(weight), h, w))
    if layer.bias is not None:
        out += np_(layer.bias)[:, None, None]  # type: ignore[arg-type]
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            part = padded[:, :, i * dilation : i * dilation + h, j * dilation : j * dilation + w]
            out += np.einsum("bchw,oc->bohw", part, weight[:, :, i, j])
    return out


def group_norm(x: Array, layer: nn.Module) -> Array:
    groups = x.reshape(len(x), layer.num_groups, -1)  # type: ignore[arg-type]
    groups = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
    weight, bias = (np_(p)[:, None, None] for p in (layer.weight, layer.bias))  # type: ignore[arg-type]
    return np.asarray(groups.reshape(x.shape) * weight + bias)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def uneven(module: nn.Module, seed: int = 0) -> Any:
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=gen))
    return module


def test_aspp_in_numpy() -> None:
    net: Any = uneven(Aspp(32, (2, 3)))
    x = np.random.default_rng(0).normal(size=(3, 32, 5, 7))
    parts = [
        relu(group_norm(conv(x, branch[0], pad, max(1, pad)), branch[1]))
        for branch, pad in zip(net.branches, (0, 2, 3), strict=True)
    ]
    mean = np.broadcast_to(relu(group_norm(conv(x.mean((2, 3), keepdims=True), net.mean[0]), net.mean[1])), x.shape)
    joined = relu(group_norm(conv(np.concatenate([*parts, mean], 1), net.join[0]), net.join[1]))
    found = np_(net(torch.from_numpy(x).float()))
    np.testing.assert_allclose(found, x + joined, atol=1e-4)
    assert (found < 0).mean() > 0.1  # what is negative passes


def test_semantic_block_in_numpy() -> None:
    """At each pooled place a sequence of classes, each its map beside its text; half of the answer is added."""
    net: Any = uneven(SemanticBlock(8), 1)
    rng = np.random.default_rng(1)
    x, words = rng.normal(size=(2, 3, 8, 6, 5)), relu(rng.normal(size=(3, 8)))
    coarse = np.zeros((2, 3, 8, 2, 2))
    for i in range(2):
        for j in range(2):
            place = x[..., 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean((3, 4))  # at the border of what there is
            for b in range(2):
                tokens = torch.from_numpy(np.concatenate([place[b], words], 1))[None].float()
                coarse[b, ..., i, j] = np_(net.block(tokens))[0, :, :8]
    fine = np_(upsample(torch.from_numpy(coarse).flatten(0, 1), (6, 5))).reshape(x.shape)
    found = net(torch.from_numpy(x).float(), torch.from_numpy(words).float())
    np.testing.assert_allclose(np_(found), x + fine, atol=1e-4)


def test_up_in_numpy() -> None:
    """Two classes of three images: each image's map joins both of its classes."""
    net: Any = uneven(Up(8, 4, 8), 2)
    rng = np.random.default_rng(2)
    x, skip = rng.normal(size=(6, 8, 3, 2)), rng.normal(size=(3, 4, 6, 4))
    grown = np.zeros((6, 4, 6, 4)) + np_(net.grow.bias)[:, None, None]
    for i in range(2):
        for j in range(2):
            grown[:, :, i::2, j::2] += np.einsum("bchw,co->bohw", x, np_(net.grow.weight)[:, :, i, j])
    y = np.concatenate([grown, skip[[0, 0, 1, 1, 2, 2]]], 1)
    for place in (0, 3):
        y = relu(group_norm(conv(y, net.join[place], 1), net.join[place + 1]))
    found = net(torch.from_numpy(x.reshape(3, 2, 8, 3, 2)).float(), torch.from_numpy(skip).float())
    np.testing.assert_allclose(np_(found), y.reshape(3, 2, 8, 6, 4), atol=1e-4)


def decoder(chunk: int = 21, classes: int = 5, width: int = 16) -> VlDecoder:
    torch.manual_seed(0)
    texts = vectors([str(k) for k in range(classes)])
    cfg = VlDecoderConfig(dilations=(1, 2), classes_per_chunk=chunk)
    return VlDecoder((8, 12, 20, 20), (2, 4, 8, 8), width, texts, cfg)


def features(batch: int = 2, h: int = 4, w: int = 5) -> list[Tensor]:
    gen = torch.Generator().manual_seed(1)
    sizes = ((8, 4), (12, 2), (20, 1), (20, 1))
    return [torch.randn(batch, c, scale * h, scale * w, generator=gen) for c, scale in sizes]


def test_logits_are_class_by_class_and_know_the_classes_by_their_texts_alone() -> None:
    net, maps = decoder(), features()
    found = net(maps)
    assert found.shape == (2, 5, 16, 20) and found.dtype == torch.float32
    order = [3, 0, 4, 1, 2]
    net.class_texts.copy_(net.class_texts[order].clone())
    torch.testing.assert_close(net(maps), found[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net([x[1:] for x in maps]), found[1:, order], rtol=1e-4, atol=1e-5)
    for level in net.levels:  # both finer maps are read
        other = [x + (i == level) for i, x in enumerate(maps)]
        assert not torch.allclose(net(other), net(maps))


def test_the_stages_of_the_decoder_follow_one_another() -> None:
    net, maps = decoder(), features()
    sims = F.normalize(net.to_text(maps[3]), dim=1).permute(0, 2, 3, 1) @ net.class_texts.T
    x = torch.stack([net.aspp(net.embed(sims[..., k][:, None])) for k in range(5)], 1)
    projection: Any = net.text[0]
    words = relu(np_(net.class_texts) @ np_(projection.weight).T + np_(projection.bias))
    for block in net.blocks:
        x = block(x, torch.from_numpy(words).float())
    skips = [
        torch.from_numpy(relu(conv(np_(maps[level]), net.skips[i][0], 1))).float()  # type: ignore[index]
        for i, level in enumerate((1, 0))
    ]
    found = []
    for k in range(5):
        y = x[:, k]
        for up, skip in zip(net.ups, skips, strict=True):
            y = up(y[:, None], skip)[:, 0]
        found.append(net.score(y))
    torch.testing.assert_close(net(maps), torch.cat(found, 1), rtol=1e-4, atol=1e-5)


def test_chunks_change_the_memory_and_nothing_else() -> None:
    whole, parts, maps = decoder(), decoder(chunk=2), features(3)
    kept: dict[str, int] = {}
    grads = []
    for name, net in (("whole", whole), ("parts", parts)):
        sizes: list[int] = []
        given = [x.clone().requires_grad_() for x in maps]
        pack: Callable[[Tensor], Tensor] = lambda x, sizes=sizes: sizes.append(x.numel()) or x  # type: ignore[misc]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = net(given)
        kept[name] = sum(sizes)
        out.square().mean().backward()
        grads.append([out, *(x.grad for x in given), *(p.grad for p in net.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert kept["parts"] < kept["whole"] / 2


def test_a_chunk_without_gradients_is_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[int] = []
    once = vl_decoder.checkpoint
    monkeypatch.setattr(vl_decoder, "checkpoint", lambda *a, **k: again.append(1) or once(*a, **k))
    with torch.no_grad():
        decoder(chunk=2)(features())
    decoder(chunk=5)(features())
    assert again == []
    decoder(chunk=2)(features())
    assert len(again) == 6


def test_finer_maps_join_where_their_cells_fit() -> None:
    assert skip_levels((2, 4, 8, 8)) == (1, 0)
    assert skip_levels((16, 16, 16, 16)) == (2, 0)
    assert skip_levels((4, 8, 16, 32)) == (2, 1)
    plain = VlDecoder((6,) * 4, (14,) * 4, 16, vectors(["a", "b"]), VlDecoderConfig())
    assert plain([torch.randn(1, 6, 3, 3) for _ in range(4)]).shape == (1, 2, 12, 12)


def test_stated_memory_is_that_of_the_shapes() -> None:
    """Of one image, 11 and 42 MB a map on 32 x 32 tokens at 21 and 81 classes, four times that on the finest grid."""
    cfg = VlDecoderConfig()
    assert cfg.classes_per_chunk == 21
    for classes, megabytes in ((21, 11), (81, 42)):
        with torch.device("meta"):
            net = VlDecoder((768,) * 4, (16,) * 4, 128, torch.empty(classes, 512), cfg)
            sizes: list[tuple[int, ...]] = []
            for module in (net.aspp, net.ups[1].join):
                module.register_forward_hook(lambda m, given, out, sizes=sizes: sizes.append(tuple(out.shape)))
            assert net([torch.empty(1, 768, 32, 32) for _ in range(4)]).shape == (1, classes, 128, 128)
        middle, fine = (sum(np.prod(s) for s in sizes if s[1] == width) for width in (128, 32))
        assert round(4 * middle / 1e6) == megabytes and fine == 4 * middle
        assert max(s[0] for s in sizes) <= 21


# One step


class Seen:
    """Notes the encoder's maps and what the decoder answers."""

    def __init__(self, method: SemiVl, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tops: list[Tensor] = []
        self.logits: list[Array] = []
        encode, ask = method.student.encode, method.student.at_pixels

        def encoded(images: Tensor) -> list[Tensor]:
            found = encode(images)
            self.tops.append(found[-1])
            return found

        def logits(grid: Tensor, size: torch.Size) -> PixelLogits:
            out = ask(grid, size)
            self.logits.append(np_(out.tensor()))
            return out

        monkeypatch.setattr(method.student, "encode", encoded)
        monkeypatch.setattr(method.student, "at_pixels", logits)


def ready(**changes: object) -> tuple[SemiVl, Batch]:
    method = make_uneven("semivl", **changes)
    assert isinstance(method, SemiVl)
    return method, make_batch(views=method.required_views())


def cosine_maps(method: SemiVl, top: Tensor) -> Array:
    """(n, K, H, W) by each class's best concept, at full size."""
    layer = method.student.decoder.to_text
    dense = np.einsum("bchw,tc->bthw", np_(top), np_(layer.weight)[:, :, 0, 0]) + np_(layer.bias)[:, None, None]
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    cosines = np.einsum("bthw,mt->bmhw", dense, np_(method.concepts))
    best = np.stack([cosines[:, method.owner.numpy() == k].max(1) for k in range(CLASSES)], 1)
    return np_(upsample(torch.from_numpy(best), (SIDE, SIDE)))


@pytest.mark.parametrize("weighting", ["pixel", "image"])
def test_loss_in_numpy(weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = ready(
        **{
            "pseudo.threshold": 0.25,
            "pseudo.weighting": weighting,
            "guidance.threshold": 0.6,
            "guidance.map_scale": 8.0,
        },
        **{"guidance.weight": 0.3, "guidance.map_weight": 0.6, "strong_weight": 0.7, "feature_weight": 0.4},
    )
    seen, step = Seen(method, monkeypatch), Step(7, 0.25, 3)
    losses = method(batch, step)
    mine, clean, first, second, dropped = np.split(seen.logits[0], 5)
    valid, target = batch.valid.numpy(), batch.target.numpy()
    inside = [np_(box_mask(mix.boxes, SIDE, SIDE)) > 0 for mix in batch.mix]

    p = softmax(clean)
    confidence, labels = p.max(1), p.argmax(1)
    weight = (confidence >= 0.25).astype(float)
    if weighting == "image":
        share = np.array([c[v].mean() for c, v in zip(confidence, valid, strict=True)])
        weight = np.broadcast_to(share[:, None, None], weight.shape)
    assert 0.02 < weight.mean() < 0.98
    sup = mean_over(cross_entropy_map(mine, target), target != 255)

    def hard(z: Array, i: int | None) -> float:
        y, w, v = (x if i is None else mixed(x, inside[i]) for x in (labels, weight, valid))
        return mean_over(cross_entropy_map(z, y) * w, v)

    strong, feature = (hard(first, 0) + hard(second, 1)) / 2, hard(dropped, None)

    top = seen.tops[0]
    q = softmax(8 * cosine_maps(method, top[4:8]))
    sure = (q.max(1) >= 0.6) & valid
    guide = np.where(sure, q.argmax(1), 255)
    assert 0.1 < sure.mean() < 0.9
    told = [cross_entropy_map(z, mixed(guide, inside[i])).mean() for i, z in enumerate((first, second))]
    guided = 0.7 * np.mean(told) + 0.4 * cross_entropy_map(dropped, guide).mean()
    taught = mean_over(cross_entropy_map(8 * cosine_maps(method, top[:4]), target), target != 255)

    expected = {"sup": sup, "pseudo": strong, "feature": feature, "guided": guided, "map": taught}
    expected |= {"guided_coverage": sure.sum() / valid.sum()}
    for name, value in expected.items():
        assert losses.terms[name] == pytest.approx(value, rel=1e-4), name
    unimatch = (sup + 0.7 * strong + 0.4 * feature) / 2
    total = unimatch + 0.3 * 0.75 * guided + 0.6 * taught
    assert losses.total.item() == pytest.approx(total, rel=1e-4)
    assert method.threshold() == (0.25 if weighting == "pixel" else None)


def test_published_weights() -> None:
    cfg = SemiVlConfig()
    assert (cfg.strong_weight, cfg.feature_weight, cfg.feature_dropout, cfg.pseudo.threshold) == (0.5, 0.5, 0.5, 0.95)
    assert (cfg.guidance.weight, cfg.guidance.threshold, cfg.guidance.scale) == (0.1, 0.9, 100.0)  # map_scale is ours
    assert (cfg.decoder.dilations, cfg.decoder.transformers) == ((6, 12, 18), 2)
    net = VlDecoder((768,) * 4, (16,) * 4, 128, torch.zeros(2, 512), cfg.decoder)
    first, second, words = (part[0] for part in (*net.skips, net.text))  # type: ignore[index]
    sizes = [tuple(m.weight.shape) for m in (net.embed, first, second, net.score, words)]
    assert sizes == [(128, 1, 7, 7), (32, 768, 3, 3), (16, 768, 3, 3), (1, 32, 3, 3), (128, 512)]
    assert len(net.blocks) == 2 and sum(p.shape == (128, 512) for p in net.parameters()) == 1  # one projection of texts
    plain = [m for part in (net.aspp, *(up.join for up in net.ups)) for m in part.modules() if isinstance(m, nn.Conv2d)]
    assert len(plain) == 10 and all(m.bias is None for m in plain)  # what a norm follows
    assert TEMPLATE.format("sky") == "a photo of a sky"
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 10 and {m.num_channels // m.num_groups for m in norms} == {16}
    assert [tuple(up.join[0].weight.shape[:2]) for up in net.ups] == [(64, 128), (32, 64)]
    block: Any = net.blocks[0]
    assert block.block.mlp[0].weight.shape == (512, 256) and block.block.attention.heads == 4


def test_map_and_encoder_alone_learn_from_the_maps_own_loss() -> None:
    changes = {"pseudo.weight": 0.0, "guidance.weight": 0.0}
    grads = []
    for weight in (0.0, 1.0):
        method, batch = ready(**changes, **{"guidance.map_weight": weight})
        method(batch, STEP).total.backward()
        grads.append({name: p.grad for name, p in method.named_parameters()})
    moved = {name for name, grad in grads[0].items() if not torch.equal(grad, grads[1][name])}
    outside = {name for name in moved if not name.startswith("student.encoder.")}
    assert outside == {"student.decoder.to_text.weight", "student.decoder.to_text.bias"} and outside != moved


def test_labels_from_text_carry_no_gradient_and_fade() -> None:
    method, batch = ready(**{"pseudo.weight": 0.0, "guidance.map_weight": 0.0, "guidance.threshold": 0.0})
    batch.target.fill_(255)
    totals = [method(batch, Step(7, progress, 3)) for progress in (0.0, 0.5, 1.0)]
    first = float(totals[0].terms["guided"])
    assert first > 0 and [x.total.item() for x in totals] == pytest.approx([0.1 * first, 0.05 * first, 0])
    weak = batch.weak[0].clone().requires_grad_()
    method.cfg = override(
        RunConfig(), {"method.name": "semivl", "method.feature_weight": 0.0, "method.guidance.threshold": 0.0}
    ).method
    batch = replace(batch, weak=(weak,))
    method(batch, Step(0, 0.0, 3)).total.backward()
    assert weak.grad is not None and not weak.grad.any()


def test_a_map_that_the_decoder_does_not_read_leaves_no_parameter_without_a_gradient() -> None:
    changes = {"method.name": "semivl", "model.pretrained": "none", "model.encoder": "vit_tiny_patch16_224"}
    cfg = override(RunConfig(), changes)
    method = SemiVl(
        cfg.method, NetworkFactory(cfg.model, CLASSES, 12, class_names=NAMES, crop=SIDE, texts=vectors)
    ).train()
    assert method.student.decoder.levels == (2, 0)
    method(replace(make_batch(2, views=method.required_views()), mix=()), STEP).total.backward()
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_only_attention_and_positions_learn_when_tuned_spatially() -> None:
    method = make("semivl", train_attention_only=True)
    learning = {name for name, p in method.student.encoder.named_parameters() if p.requires_grad}
    every = {name for name, _ in method.student.encoder.named_parameters()}
    assert learning == {name for name in every if ".attention." in name} | {"positions"}
    assert 0 < len(learning) < len(every) and all(p.requires_grad for p in method.student.decoder.parameters())
    changes = {"method.name": "semivl", "method.train_attention_only": True, "model.pretrained": "none"}
    cfg = override(RunConfig(), {**changes, "model.encoder": "vit_tiny_patch16_224"})
    build = NetworkFactory(cfg.model, CLASSES, 12, class_names=NAMES, crop=SIDE, texts=vectors)
    found = {n for n, p in SemiVl(cfg.method, build).student.encoder.named_parameters() if p.requires_grad}
    assert "net.model.pos_embed" in found and sum(".attn." in name for name in found) == len(found) - 1
    cfg = override(cfg, {"model.encoder": "resnet18"})
    with pytest.raises(
        ValueError, match=r"method.train_attention_only = true: model.encoder = 'resnet18' has no attention"
    ):
        SemiVl(cfg.method, replace(build, model=cfg.model))


# CLIP

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Weights of a tiny CLIP that open_clip knows as ``tiny-clip``."""
    import open_clip
    from open_clip import factory

    place = tmp_path_factory.mktemp("clip")
    (place / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(place / "tiny-clip.json")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY)  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim < 2 else None
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, place / "tiny.safetensors")
    yield place / "tiny.safetensors"
    factory._MODEL_CONFIG_PATHS.remove(place / "tiny-clip.json")
    factory._rescan_model_configs()


@pytest.fixture
def reference(clip_file: Path) -> Any:
    """The same model as open_clip has it."""
    import open_clip
    from safetensors.torch import load_file

    model = open_clip.CLIP(**TINY).eval()  # type: ignore[arg-type]
    model.load_state_dict(load_file(clip_file))
    return model


def value_path(visual: Any, pixels: Tensor, positions: Tensor) -> Tensor:
    """Dense features (B, T, h, w) by hand: the last block's values, projected, in place of its attention."""
    patches = visual.conv1(pixels)
    h, w = patches.shape[-2:]
    x = torch.cat([visual.class_embedding.expand(len(pixels), 1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = visual.ln_pre(x + positions)
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    last = visual.transformer.resblocks[-1]
    width = x.shape[2]
    values = F.linear(last.ln_1(x), last.attn.in_proj_weight[2 * width :], last.attn.in_proj_bias[2 * width :])
    x = x + last.attn.out_proj(values)
    x = x + last.mlp(last.ln_2(x))
    x = visual.ln_post(x)[:, 1:] @ visual.proj
    return F.normalize(x, dim=2).transpose(1, 2).unflatten(2, (h, w))


@torch.no_grad()
def test_dense_features_are_those_of_the_value_path(clip_file: Path, reference: Any) -> None:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    from viladiff.data.transforms.augment import normalise

    clip, texts = load_clip("tiny-clip", str(clip_file), ["sky", "dining table"])
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    own = reference.visual.positional_embedding
    fitted = F.interpolate(own[1:].T.reshape(1, 32, 4, 4), (4, 6), mode="bicubic")[0].reshape(32, 24).T
    positions = torch.cat([own[:1], fitted])
    found = clip(normalise(pixels))
    torch.testing.assert_close(
        found, value_path(reference.visual, (pixels - mean) / std, positions), rtol=1e-3, atol=1e-4
    )
    import open_clip

    tokens = open_clip.tokenizer.SimpleTokenizer(context_length=16)(
        [TEMPLATE.format(x) for x in ("sky", "dining table")]
    )
    torch.testing.assert_close(texts, F.normalize(reference.encode_text(tokens), dim=1))
    # A square of its own size needs no new positions; what is smaller is enlarged to it, and the rest to whole patches.
    square = pixels[..., :32]
    torch.testing.assert_close(
        clip(normalise(square)), value_path(reference.visual, (square - mean) / std, own), rtol=1e-3, atol=1e-4
    )
    assert clip(torch.randn(1, 3, 16, 24)).shape[-2:] == (4, 6) and clip(torch.randn(1, 3, 70, 33)).shape[-2:] == (9, 4)


def with_clip(clip_file: Path, **changes: object) -> tuple[SemiVl, Batch]:
    return ready(**{"clip.model": "tiny-clip", "clip.weights": str(clip_file), **changes})


def test_clip_labels_and_is_no_part_of_the_state(clip_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = with_clip(clip_file, **{"guidance.scale": 10.0, "pseudo.weight": 0.0})
    assert method.notes() == () and len(make("semivl").notes()) == 1
    clip = method._clip[0]
    assert not any(p.requires_grad for p in clip.parameters()) and not clip.training
    assert not any("visual" in name for name in (*method.state_dict(), *dict(method.named_parameters())))
    assert method.student.decoder.class_texts.shape == (CLASSES, 24)
    # A CLIP that has learned nothing says nearly the same of all texts.
    method.concepts.copy_(F.normalize(torch.randn(method.concepts.shape, generator=torch.Generator().manual_seed(0))))
    dense = np_(clip(batch.weak[0]))
    cosines = np.einsum("bthw,mt->bmhw", dense, np_(method.concepts))
    best = np.stack([cosines[:, method.owner.numpy() == k].max(1) for k in range(CLASSES)], 1)
    q = softmax(10 * np_(upsample(torch.from_numpy(best), (SIDE, SIDE))))
    middle = float(np.median(q.max(1)))
    method.cfg = with_clip(clip_file, **{"guidance.threshold": middle, "guidance.scale": 10.0, "pseudo.weight": 0.0})[
        0
    ].cfg
    seen = Seen(method, monkeypatch)
    losses = method(batch, Step(0, 0.0, 3))
    sure = (q.max(1) >= middle) & batch.valid.numpy()
    guide = np.where(sure, q.argmax(1), 255)
    _, _, first, second, dropped = np.split(seen.logits[0], 5)
    inside = [np_(box_mask(mix.boxes, SIDE, SIDE)) > 0 for mix in batch.mix]
    told = [cross_entropy_map(z, mixed(guide, inside[i])).mean() for i, z in enumerate((first, second))]
    guided = 0.5 * np.mean(told) + 0.5 * cross_entropy_map(dropped, guide).mean()
    assert losses.terms["guided"] == pytest.approx(guided, rel=1e-4) and "map" not in losses.terms
    assert 0.02 < losses.terms["guided_coverage"] < 0.98
    assert losses.total.item() == pytest.approx(float(losses.terms["sup"]) / 2 + 0.1 * guided, rel=1e-4)
    before = [p.clone() for p in clip.parameters()]
    losses.total.backward()
    assert all(p.grad is None for p in clip.parameters()) and all(map(torch.equal, before, clip.parameters()))
    assert method.double() is method and clip.visual.conv1.weight.dtype == torch.float64  # it moves with the method


def test_the_student_is_drawn_alike_with_and_without_clip(clip_file: Path) -> None:
    names = ("student.encoder.blocks.0.mlp.0.weight",)
    plain = make("semivl").state_dict()
    guided = make("semivl", **{"clip.model": "tiny-clip", "clip.weights": str(clip_file)}).state_dict()
    assert all(torch.equal(plain[name], guided[name]) for name in names)


def test_clip_files_name_the_run_and_their_place_stays_private(clip_file: Path, tmp_path: Path) -> None:
    cfg = override(RunConfig(), {"method.name": "semivl", "method.clip.weights": str(clip_file)})
    prints = weights_fingerprint(cfg)
    assert len(prints["clip"]) == 16 and "clip" not in weights_fingerprint(
        override(RunConfig(), {"method.name": "semivl"})
    )
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    moved = weights_fingerprint(override(cfg, {"method.clip.weights": str(other)}))
    assert run_id(cfg, prints) != run_id(cfg, moved)
    with pytest.raises(ValueError, match=r"nowhere.pt does not exist \(method.clip.weights\)"):
        weights_fingerprint(override(cfg, {"method.clip.weights": "nowhere.pt"}))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("ViT-B-61", r"method.clip.model = 'ViT-B-61': open_clip has no such model.*ViT-B-16"),
        ("RN50", r"method.clip.model = 'RN50': not a CLIP with a plain vision transformer"),
        ("roberta-ViT-B-32", r"method.clip.model = 'roberta-ViT-B-32': not a CLIP with a plain"),
        ("coca_ViT-B-32", r"method.clip.model = 'coca_ViT-B-32': not a CLIP with a plain"),
    ],
)
def test_other_models_are_refused_before_anything_is_read(model: str, said: str, clip_file: Path) -> None:
    with pytest.raises(ValueError, match=said):
        load_clip(model, str(clip_file), ["sky"])


def test_a_file_that_does_not_fit_is_named(clip_file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "half.safetensors"
    save_file({"logit_scale": torch.zeros(())}, wrong)
    with pytest.raises(ValueError, match=r"half.safetensors does not fit: it lacks"):
        load_clip("tiny-clip", str(wrong), ["sky"])


def test_a_checkpoint_brings_the_texts(clip_file: Path) -> None:
    """To predict, neither a text encoder nor CLIP's file is needed."""
    for method, dim in ((make("semivl"), 12), (with_clip(clip_file)[0], 24)):
        cfg = override(
            RunConfig(), {"method.name": "semivl", "model.pretrained": "none", "method.clip.weights": "gone.pt"}
        )
        empty = METHODS["semivl"](cfg.method, NetworkFactory(cfg.model, CLASSES, dim, class_names=NAMES)).eval()
        empty.load_state_dict(method.state_dict())
        images = make_batch().image
        assert torch.equal(empty.student(images)["visual"], method.eval().student(images)["visual"])
