"""Scoring a run: one pass of each network through each image, and the numbers of a pass for each score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_kit import make, make_batch, make_uneven
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from viladiff.evaluation import evaluator
from viladiff.evaluation.pixel_counts import SegmentationMeter, evaluate_network, to_scores, truth_of
from viladiff.evaluation.protocols import STREAMS
from viladiff.models.blocks import SMALL, bilinear
from viladiff.models.ema import ema_update
from viladiff.models.segmenter import Segmenter, remembered
from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import Trainer

IMAGES = 30


def prepared(name: str, path: Path, **changes: object) -> Trainer:
    flat = {"method.name": name, "eval.max_images": IMAGES, "runtime.runs_dir": str(path), "runtime.device": "cpu"}
    run = Trainer(override(RunConfig(), {**flat, **changes}))
    run._build()
    gen = torch.Generator().manual_seed(4)
    with torch.no_grad():  # so that networks and streams differ
        for parameter in run.method.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=gen))
    return run


def counted(module: nn.Module, name: str, into: Counter[str]) -> None:
    def count(_: nn.Module, given: tuple[Tensor, ...], __: object) -> None:
        into[name] += len(given[0])

    module.register_forward_hook(count)


@pytest.mark.parametrize("name", ["supervised", "semibaseline", "unimatch", "cps", "viladiff"])
def test_each_network_goes_once_through_each_image(name: str, tmp_path: Path) -> None:
    run = prepared(name, tmp_path)
    segmenters = {path: m for path, m in run.method.named_modules() if isinstance(m, Segmenter)}
    passes: Counter[str] = Counter()
    for path, segmenter in segmenters.items():
        counted(segmenter.encoder, path, passes)
    scored, _ = evaluator.evaluated(run)
    assert passes == dict.fromkeys(segmenters, IMAGES)
    assert set(scored) == set(run.method.eval_networks())
    assert all(score["images"] == IMAGES for found in scored.values() for score in found.values())
    assert all(segmenter.last is None for segmenter in segmenters.values())


def test_the_decoder_makes_each_stream_of_an_image_once(tmp_path: Path) -> None:
    run = prepared("viladiff", tmp_path)
    passes: Counter[str] = Counter()
    for name, network in run.method.eval_networks().items():
        counted(network.get_submodule("decoder"), name, passes)
    evaluator.evaluated(run)
    assert passes == {"student": 3 * IMAGES, "teacher": 3 * IMAGES}  # visual, fusion, fusion without text


def test_one_pass_for_all_scores_gives_those_of_a_pass_for_each(tmp_path: Path) -> None:
    run = prepared("viladiff", tmp_path)
    scored, shares = evaluator.evaluated(run)
    given = run.dataset.num_classes, True, "original", run.cfg.data.crop
    for name, network in run.method.eval_networks().items():
        for stream in STREAMS:
            alone = to_scores(evaluate_network(network, evaluator.eval_batches(run), (stream,), *given))[stream]
            # What reads no text is then made beside the visual stream, in another batch: last bits of logits differ.
            loose = pytest.approx(alone.values["miou"], abs=1e-4)
            assert scored[name][stream]["miou"] == (loose if stream == "fusion_no_text" else alone.values["miou"])
            assert stream == "fusion_no_text" or scored[name][stream] == alone.stored()
    run.method.eval()
    alone_shares = evaluator.PseudoLabels(run)
    for batch in evaluator.eval_batches(run):
        alone_shares.add(batch)
    assert shares == alone_shares.shares() and shares["after/ece"] is not None


def test_large_images_go_one_by_one_and_small_ones_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared("supervised", tmp_path)
    assert [len(images) for images, *_ in evaluator.eval_batches(run)] == [25, 5]
    monkeypatch.setattr(evaluator, "BATCH_PIXELS", 2 * 64 * 64 + 1)
    assert [len(images) for images, *_ in evaluator.eval_batches(run)] == [2] * 15
    monkeypatch.setattr(evaluator, "BATCH_PIXELS", 64)
    assert [len(images) for images, *_ in evaluator.eval_batches(run)] == [1] * IMAGES


def test_what_was_remembered_is_of_the_same_images_words_and_streams(tmp_path: Path) -> None:
    run = prepared("viladiff", tmp_path)
    network = run.method.student.eval()
    (images, _, text, _), (others, _, words, _) = evaluator.eval_batches(run)
    plain: Callable[..., object] = network.streams
    with torch.no_grad():
        asked = [(images, text), (images, None), (images, text), (others, words), (images, text)]
        expected = [plain(*given) for given in asked]
        with remembered((network,)):
            found = [network.streams(*given) for given in asked]
            assert found[2]["visual"].logits is found[0]["visual"].logits
            assert set(network.streams(images, text, ("fusion",))) == {"fusion"}
    for one, other in zip(expected, found, strict=True):
        assert isinstance(one, dict)
        for name in one:
            assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True))


def small(name: str = "supervised") -> tuple[Segmenter, Tensor]:
    """A network in evaluation mode, and images."""
    method = make_uneven(name)
    return method.student.eval(), make_batch().image


def test_nothing_is_remembered_in_training_mode_or_for_a_gradient() -> None:
    network, images = small()
    with remembered((network,)):
        with torch.no_grad():
            first = network.encode(images)
            assert network.encode(images)[0] is first[0]
        (network(images)["visual"].sum()).backward()
        assert next(network.encoder.parameters()).grad is not None
        with torch.no_grad():
            network.train()
            assert network.encode(images)[0] is not first[0]
            network.eval()
            assert network.encode(images)[0] is first[0]


def test_who_changes_what_was_given_changes_nothing_remembered() -> None:
    network, images = small()
    with torch.no_grad(), remembered((network,)):
        network.encode(images).clear()
        first = network.streams(images)
        logits = first["visual"].logits
        first.clear()
        assert network.streams(images)["visual"].logits is logits


@torch.no_grad()
def an_average(network: Segmenter, images: Tensor, maps: list[Tensor]) -> None:
    ema_update(network, make("semibaseline").student, 9)


@torch.no_grad()
def an_image(network: Segmenter, images: Tensor, maps: list[Tensor]) -> None:
    images[0].mul_(2)


@torch.no_grad()
def a_map(network: Segmenter, images: Tensor, maps: list[Tensor]) -> None:
    maps[2].neg_()


def an_optimiser(network: Segmenter, images: Tensor, maps: list[Tensor]) -> None:
    with torch.enable_grad():
        network(images)["visual"].sum().backward()
    torch.optim.SGD(network.parameters(), 1e-3).step()


def the_memory_of_the_first(network: Segmenter, images: Tensor, maps: list[Tensor]) -> None:
    images.set_(torch.randn_like(images))  # type: ignore[call-overload]


@pytest.mark.parametrize("another_batch_after", [False, True])
@pytest.mark.parametrize("change", [an_average, an_image, a_map, an_optimiser, the_memory_of_the_first])
def test_what_is_changed_in_place_meanwhile_is_no_score_without_a_word(
    change: Callable[[Segmenter, Tensor, list[Tensor]], None], another_batch_after: bool
) -> None:
    network, images = small()
    with pytest.raises(RuntimeError, match="changed in place"), torch.no_grad(), remembered((network,)):
        maps = network.encode(images)
        change(network, images, maps)
        if another_batch_after:
            network.encode(images.clone())
    assert network.last is None
    with torch.no_grad(), remembered((network,)):  # NaN, as in a run that diverged, is no change
        network.encode(torch.full_like(images, torch.nan))


def test_words_changed_in_place_are_no_score_without_a_word(tmp_path: Path) -> None:
    run = prepared("viladiff", tmp_path)
    network = run.method.student.eval()
    images, _, text, _ = next(iter(evaluator.eval_batches(run)))
    assert text is not None
    with pytest.raises(RuntimeError, match="words"), torch.no_grad(), remembered((network,)):
        network.streams(images, text)
        text.tokens.mul_(2)


def test_an_error_within_is_the_one_that_is_told() -> None:
    network, images = small()
    with pytest.raises(KeyError), torch.no_grad(), remembered((network,)):
        network.encode(images)
        images.mul_(2)
        raise KeyError("other")
    assert network.last is None


def test_a_batch_counts_as_its_images_do_one_by_one() -> None:
    gen = torch.Generator().manual_seed(1)
    target = torch.randint(0, 5, (6, 8, 10), generator=gen).repeat_interleave(6, 1).repeat_interleave(6, 2)
    pred = torch.where(torch.rand(target.shape, generator=gen) < 0.1, 2, target.roll(2, 2))
    target[torch.rand(target.shape, generator=gen) < 0.05] = 255
    together, alone, shared = SegmentationMeter(5), SegmentationMeter(5), SegmentationMeter(5)
    together.update(pred, target)
    for i in range(len(target)):
        alone.update(pred[i : i + 1], target[i : i + 1])
    truth = truth_of(target)
    shared.update(pred, target, truth)
    assert torch.equal(together.state, alone.state) and torch.equal(together.state, shared.state)
    assert 0 < int((truth.near != 255).sum()) < int(truth.band.sum()) < target.numel()


@pytest.mark.parametrize(
    ("source", "size"),
    [((24, 24), (48, 48)), ((6, 9), (24, 20)), ((7, 5), (7, 5)), ((48, 3), (9, 9)), ((5, 49), (9, 98))],
)
def test_bilinear_is_that_of_torch_both_ways(source: tuple[int, int], size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *source, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(2, 3, *size)
    expected = F.interpolate(x, size, mode="bilinear", align_corners=False)
    found = bilinear(x, size)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    (gradient,) = torch.autograd.grad((found * weight).sum(), x)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5)
    assert max(source) <= SMALL or torch.equal(found, expected)
    assert torch.equal(bilinear(x.double(), size), F.interpolate(x.double(), size, mode="bilinear"))


def test_weights_of_bilinear_do_not_depend_on_who_asked_first() -> None:
    """They are kept; sizes here are no other test's."""
    x = torch.randn(1, 2, 13, 11)
    with FakeTensorMode():
        bilinear(torch.randn(1, 2, 13, 11), (29, 23))
    with torch.device("meta"):
        bilinear(x, (29, 23))
    torch.set_default_dtype(torch.float64)
    try:
        bilinear(x, (31, 37))
    finally:
        torch.set_default_dtype(torch.float32)
    for size in ((29, 23), (31, 37)):
        expected = F.interpolate(x, size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(bilinear(x, size), expected, rtol=0, atol=2e-6)
    with FakeTensorMode():
        assert bilinear(torch.randn(1, 2, 13, 11), (29, 23)).shape == (1, 2, 29, 23)


def test_bilinear_has_torch_s_second_derivative() -> None:
    found = []
    for enlarge in (bilinear, partial(F.interpolate, mode="bilinear")):
        x = torch.linspace(-1, 1, 60).view(1, 2, 5, 6).requires_grad_()
        (gradient,) = torch.autograd.grad(enlarge(x, (9, 8)).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    torch.testing.assert_close(*found)
