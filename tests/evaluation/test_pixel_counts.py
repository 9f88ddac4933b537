from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from viladiff.data.batch import EvalBatch, TextBatch
from viladiff.evaluation.metrics import miou_from
from viladiff.evaluation.pixel_counts import (
    BINS,
    Scores,
    SegmentationMeter,
    boundary_band,
    boundary_counts,
    boundary_width,
    calibration_bins,
    calibration_error,
    confusion_matrix,
    pseudo_change,
    pseudo_quality,
    pseudo_shares,
    to_scores,
    trimap,
)
from viladiff.evaluation.pixel_counts import (
    evaluate_network as measure,
)
from viladiff.evaluation.protocols import STREAMS, center, predict_logits, stream_logits

C = 5


def blobs(seed: int, n: int = 3, h: int = 40, w: int = 52, ignore: float = 0.05) -> tuple[Tensor, Tensor]:
    """Smooth label maps with ragged outlines, a prediction that is mostly right, and void spots."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.normal(size=(n, C, h, w)), (0, 0, 4, 4))
    target = fields.argmax(1)
    pred = (fields + 0.4 * ndimage.gaussian_filter(rng.normal(size=fields.shape), (0, 0, 4, 4))).argmax(1)
    void = ndimage.gaussian_filter(rng.normal(size=target.shape), (0, 2, 2))
    target[void > np.quantile(void, 1 - ignore)] = 255
    return torch.from_numpy(pred), torch.from_numpy(target)


def naive_confusion(pred: Tensor, target: Tensor) -> np.ndarray:
    out = np.zeros((C, C), dtype=np.int64)
    for p, t in zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != 255:
            out[t, p] += 1
    return out


def test_confusion_equals_a_loop_with_truth_in_rows() -> None:
    pred, target = blobs(0)
    found = confusion_matrix(pred, target, C)
    assert found.dtype == torch.int64 and found.shape == (C, C)
    np.testing.assert_array_equal(found, naive_confusion(pred, target))
    assert confusion_matrix(torch.tensor([1]), torch.tensor([0]), 2).tolist() == [[0, 1], [0, 0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 255), st.integers(0, 2**31), st.sampled_from([torch.uint8, torch.int32, torch.int64]))
def test_confusion_for_any_number_of_classes_and_type(classes: int, seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, 300)
    pred = rng.integers(0, classes, 300)
    keep = rng.random(300) < 0.8
    expected = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(expected, (target[keep], pred[keep]), 1)
    labels = torch.from_numpy(np.where(keep, target, 255)).to(dtype)
    np.testing.assert_array_equal(confusion_matrix(torch.from_numpy(pred).to(dtype), labels, classes), expected)


@pytest.mark.parametrize(
    ("pred", "target", "match"),
    [
        (C, 0, f"pred: {C} found"),
        (-1, 1, "pred: -1 found"),
        (300, 0, "pred: 300 found"),
        (255, 255, "pred: 255 found"),
        (0, C, f"label {C} found"),
        (0, 254, "label 254 found"),
        (0, -1, "target: -1 found"),
        (0, 256, "target: 256 found"),
    ],
)
def test_confusion_refuses_values_that_are_no_class(pred: int, target: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        confusion_matrix(torch.tensor([0, pred]), torch.tensor([0, target]), C)


def test_confusion_refuses_shapes_and_class_counts() -> None:
    with pytest.raises(ValueError, match="shape"):
        confusion_matrix(torch.zeros(2, 3).long(), torch.zeros(3, 2).long(), C)
    with pytest.raises(ValueError, match="num_classes = 256"):
        confusion_matrix(torch.zeros(2).long(), torch.zeros(2).long(), 256)
    assert confusion_matrix(torch.zeros(0).long(), torch.zeros(0).long(), C).sum() == 0


def test_miou_equals_a_loop_and_sklearn() -> None:
    pred, target = blobs(1)
    mean, per_class = miou_from(confusion_matrix(pred, target, C))
    for label in range(C):
        known = target != 255
        union = ((pred == label) | (target == label)) & known
        both = (pred == label) & (target == label)
        assert per_class[label] == pytest.approx(int(both.sum()) / int(union.sum()), abs=1e-12)
    known = target != 255
    expected = jaccard_score(target[known].numpy(), pred[known].numpy(), average=None, labels=range(C))
    np.testing.assert_allclose(per_class, expected, atol=1e-12)
    assert mean == pytest.approx(expected.mean(), abs=1e-12)


def test_absent_classes_are_missing_and_missed_ones_are_zero() -> None:
    # Class 0 right, 1 true but never predicted, 2 predicted but never true, 3 nowhere.
    mean, per_class = miou_from(confusion_matrix(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1]), 4))
    assert per_class[:3] == [0.5, 0.0, 0.0] and math.isnan(per_class[3])
    assert mean == pytest.approx(0.5 / 3)
    assert math.isnan(miou_from(torch.zeros(4, 4, dtype=torch.int64))[0])


def test_one_class_of_several_is_no_mean() -> None:
    """Masks of one class under a network that knows no other: it has learned nothing, and is not right everywhere."""
    zeros = torch.zeros(1, 8, 8, dtype=torch.int64)
    mean, per_class = miou_from(confusion_matrix(zeros, zeros, 2))
    assert math.isnan(mean) and per_class[0] == 1.0 and math.isnan(per_class[1])
    meter = SegmentationMeter(2)
    meter.update(zeros, zeros)
    found = meter.result()
    assert tuple(found.values.values()) == (None, None, None, 1.0)
    half = zeros.clone()
    half[..., 4:] = 1
    assert miou_from(confusion_matrix(zeros, half, 2))[0] == 0.25, "a class that is missed counts as 0"
    assert miou_from(confusion_matrix(zeros, zeros, 1))[0] == 1.0


def scipy_band(mask: np.ndarray, d: int) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=d, border_value=0)


@pytest.mark.parametrize("d", [1, 2, 5, 30])
def test_boundary_band_equals_scipy_erosion_per_class(d: int) -> None:
    _, target = blobs(2)
    band = boundary_band(target, d)
    for i, label in [(i, label) for i in range(len(target)) for label in range(C)]:
        mask = (target[i] == label).numpy()
        np.testing.assert_array_equal((band[i] & (target[i] == label)).numpy(), scipy_band(mask, d))


@pytest.mark.parametrize("d", [1, 3])
def test_boundary_counts_equal_scipy_masks_with_void_cut_out(d: int) -> None:
    pred, target = blobs(3)
    expected = np.zeros((3, C), dtype=np.int64)
    for p, t in zip(pred.numpy(), target.numpy(), strict=True):
        for label in range(C):
            true_band = scipy_band(t == label, d)
            pred_band = scipy_band((p == label) & (t != 255), d)
            expected[:, label] += [(true_band & pred_band).sum(), true_band.sum(), pred_band.sum()]
    np.testing.assert_array_equal(boundary_counts(pred, target, C, d), expected)


def test_boundary_width_is_two_percent_of_the_diagonal() -> None:
    assert boundary_width(64, 64) == 2 and boundary_width(512, 512) == 14 and boundary_width(8, 8) == 1
    assert boundary_width(1024, 2048) == 46


@pytest.mark.parametrize("d", [1, 2, 4])
def test_trimap_is_the_chebyshev_neighbourhood_of_a_change(d: int) -> None:
    _, target = blobs(4)
    h, w = target.shape[1:]
    expected = np.zeros(target.shape, dtype=bool)
    for i in range(len(target)):
        for y in range(h):
            for x in range(w):
                window = target[i, max(0, y - d) : y + d + 1, max(0, x - d) : x + d + 1]
                expected[i, y, x] = bool((window != target[i, y, x]).any())
    np.testing.assert_array_equal(trimap(target, d).numpy(), expected)


def test_meter_over_batches_equals_the_parts_on_the_whole_set() -> None:
    pred, target = blobs(5, n=7)
    d = boundary_width(*target.shape[1:])
    meter = SegmentationMeter(C)
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        meter.update(pred[part], target[part])
    scores = meter.result()
    confusion = confusion_matrix(pred, target, C)
    near = confusion_matrix(pred, torch.where(trimap(target, d), target, 255), C)
    both, true_band, pred_band = boundary_counts(pred, target, C, d).double()
    assert scores.images == 7
    assert scores.values["miou"] == miou_from(confusion)[0] and list(scores.per_class) == miou_from(confusion)[1]
    assert scores.values["trimap_miou"] == miou_from(near)[0] != scores.values["miou"]
    assert scores.values["boundary_iou"] == pytest.approx(float((both / (true_band + pred_band - both)).mean()))
    assert scores.values["pixel_accuracy"] == pytest.approx(float((pred == target)[target != 255].float().mean()))


def test_meters_of_workers_add_up_to_one() -> None:
    pred, target = blobs(6, n=6)
    whole, first, second = SegmentationMeter(C), SegmentationMeter(C), SegmentationMeter(C)
    whole.update(pred, target)
    first.update(pred[:2], target[:2])
    second.update(pred[2:], target[2:])
    assert first.merge(second).result() == whole.result()
    with pytest.raises(ValueError, match="5 and 6 classes"):
        whole.merge(SegmentationMeter(6))


def test_perfect_prediction_scores_one_everywhere() -> None:
    _, target = blobs(7)
    meter = SegmentationMeter(C)
    meter.update(torch.where(target == 255, 0, target), target)
    scores = meter.result()
    assert tuple(scores.values.values()) == (1, 1, 1, 1)


def test_nothing_measured_is_missing_not_zero() -> None:
    meter = SegmentationMeter(C)
    meter.update(torch.zeros(1, 8, 8).long(), torch.full((1, 8, 8), 255))
    scores = meter.result()
    assert tuple(scores.values.values()) == (None,) * 4
    assert scores.per_class == (None,) * C and scores.images == 1
    plain = SegmentationMeter(C, boundary=False)
    plain.update(torch.eye(8).long()[None], torch.eye(8).long()[None])
    assert plain.result().values == {"miou": 1, "boundary_iou": None, "trimap_miou": None, "pixel_accuracy": 1}


def test_meter_names_a_label_that_is_no_class() -> None:
    meter = SegmentationMeter(C)
    meter.update(torch.zeros(1, 8, 8).long(), torch.full((1, 8, 8), 77))
    with pytest.raises(ValueError, match="label 77"):
        meter.result()


def test_pseudo_label_quality_counts() -> None:
    conf = torch.tensor([[[0.9, 0.95, 0.99, 0.99, 0.99, 0.99]]])
    labels = torch.tensor([[[1, 1, 1, 2, 1, 1]]])
    truth = torch.tensor([[[1, 1, 1, 1, 255, 1]]])
    valid = torch.tensor([[[True, True, True, True, True, False]]])
    sums = pseudo_quality(conf, labels, truth, 0.95, valid)
    assert {name: int(value) for name, value in sums.items()} == {"valid": 4, "accepted": 3, "correct": 2}
    assert pseudo_shares(sums) == {"coverage": 0.75, "precision": pytest.approx(2 / 3)}
    assert pseudo_shares({"valid": 3, "accepted": 0, "correct": 0}) == {"coverage": 0.0, "precision": None}


def test_pseudo_label_change_counts_rescued_and_spoiled() -> None:
    truth = torch.ones(1, 1, 6, dtype=torch.int64)
    truth[..., 5] = 255
    #                      rejected, wrong, wrong, good, good, void
    before = (torch.tensor([[[0.1, 0.99, 0.99, 0.99, 0.99, 0.1]]]), torch.tensor([[[1, 2, 2, 1, 1, 1]]]))
    after = (torch.tensor([[[0.99, 0.99, 0.1, 0.99, 0.1, 0.99]]]), torch.tensor([[[1, 1, 1, 1, 1, 1]]]))
    sums = pseudo_change(before, after, truth, 0.95)
    assert {name: int(value) for name, value in sums.items()} == {"lost": 3, "rescued": 2, "good": 2, "spoiled": 1}
    assert pseudo_shares(sums) == {"rescued": pytest.approx(2 / 3), "spoiled": 0.5}


def test_calibration_error_is_that_of_a_loop_over_bins_and_adds_over_batches() -> None:
    draw = np.random.default_rng(5)
    conf = draw.random((4, 6, 7)) ** 0.3
    conf[0, 0, :4] = [0.0, 1 / 15, 2 / 15, 1.0]  # edges belong to the bin below
    labels, truth = draw.integers(0, C, (2, 4, 6, 7))
    truth[draw.random(truth.shape) < 0.1] = 255
    error = 0.0
    for k in range(BINS):
        inside = (truth != 255) & (conf <= (k + 1) / BINS) & ((conf > k / BINS) | (k == 0))
        if inside.any():
            error += inside.sum() / (truth != 255).sum() * abs((labels == truth)[inside].mean() - conf[inside].mean())
    maps = [torch.from_numpy(x) for x in (conf, labels, truth)]
    whole = calibration_bins(*maps)
    assert calibration_error(whole) == pytest.approx(error, abs=1e-12) and error > 0.3
    halves = [calibration_bins(*(x[part] for x in maps)) for part in (slice(2), slice(2, 4))]
    assert torch.allclose(whole, halves[0] + halves[1])
    assert calibration_error(torch.zeros(3, BINS)) is None


def test_labels_as_sure_as_they_are_right_have_no_calibration_error() -> None:
    truth = torch.tensor([[[0, 1, 1, 1, 0, 0, 255]]])
    labels = torch.tensor([[[1, 1, 1, 1, 0, 0, 0]]])
    sure = torch.tensor([[[0.75, 0.75, 0.75, 0.75, 1.0, 1.0, 0.1]]])
    assert calibration_error(calibration_bins(sure, labels, truth)) == pytest.approx(0)
    assert calibration_error(calibration_bins(0 * sure + 1, labels, truth)) == pytest.approx(1 / 6)


def evaluate_network(network: nn.Module, *given: Any, **named: Any) -> dict[str, Scores]:
    return to_scores(measure(network, *given, **named))


class Toy(nn.Module):
    """Fusion and visual are two linear maps of the pixel; the text adds a constant to fusion's class 1."""

    def __init__(self, fusion: bool = True, patch: int = 4) -> None:
        super().__init__()
        self.side_multiple = patch
        self.visual = nn.Conv2d(3, C, 1)
        self.fused = nn.Conv2d(3, C, 1) if fusion else None
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor, text: TextBatch | None = None) -> dict[str, Tensor]:
        assert (
            not self.training
            and images.shape[-1] % self.side_multiple == 0
            and images.shape[-2] % self.side_multiple == 0
        )
        self.sizes.append(tuple(images.shape[-2:]))
        out = {"visual": self.visual(images)}
        if self.fused is not None:
            out["fusion"] = self.fused(images)
            if text is not None:
                out["fusion"] = out["fusion"] + text.tokens.sum() * torch.eye(C)[1].view(1, C, 1, 1)
        return out


def some_text(n: int) -> TextBatch:
    return TextBatch(torch.ones(n, 1, 1), torch.ones(n, 1, dtype=torch.bool))


def batches(with_text: bool = True) -> Iterator[EvalBatch]:
    gen = torch.Generator().manual_seed(0)
    for n in (3, 2):
        images = torch.randn(n, 3, 16, 16, generator=gen)
        target = torch.randint(0, C, (n, 16, 16), generator=gen)
        yield EvalBatch(images, target, some_text(n) if with_text else None)


def test_every_stream_is_scored_by_its_own_logits() -> None:
    torch.manual_seed(0)
    net = Toy()
    scores = evaluate_network(net, batches(), STREAMS, C)
    assert set(scores) == set(STREAMS)
    assert len(net.sizes) == 4  # two batches, each once with and once without text
    meters = {name: SegmentationMeter(C) for name in STREAMS}
    with torch.no_grad():
        net.eval()
        for images, target, text, _ in batches():
            assert text is not None
            visual, fusion = net.visual(images), net(images, text)["fusion"]
            maps = {"visual": visual, "fusion": fusion, "fusion_no_text": net(images, None)["fusion"]}
            maps["mean"] = visual.softmax(1) + fusion.softmax(1)
            for name, x in maps.items():
                meters[name].update(x.argmax(1), target)
    assert scores == {name: meter.result() for name, meter in meters.items()}
    assert len({score.values["miou"] for score in scores.values()}) == 4


def test_streams_that_cannot_be_had_are_left_out() -> None:
    assert set(evaluate_network(Toy(fusion=False), batches(), STREAMS, C)) == {"visual"}
    assert set(evaluate_network(Toy(), batches(with_text=False), STREAMS, C)) == {"visual", "fusion_no_text"}
    assert set(evaluate_network(Toy(), batches(), ("mean",), C)) == {"mean"}
    assert evaluate_network(Toy(), iter([]), STREAMS, C) == {}
    with pytest.raises(ValueError, match="did you mean 'fusion'"):
        stream_logits(Toy().eval(), torch.zeros(1, 3, 4, 4), None, ("fuson",))
    with pytest.raises(ValueError, match="caption"):
        predict_logits(Toy().eval(), torch.zeros(1, 3, 4, 4), None, stream="fusion")


def test_modes_are_restored_per_module_also_after_an_error() -> None:
    net = Toy()
    net.visual.eval()
    evaluate_network(net, batches(), ("visual",), C)
    assert net.training and net.fused is not None and net.fused.training and not net.visual.training
    with pytest.raises(ValueError, match="num_classes = 4"):
        evaluate_network(net, batches(), ("visual",), 4)
    assert net.training and not net.visual.training


def test_original_protocol_predicts_at_a_multiple_of_the_patch_and_comes_back() -> None:
    net = Toy(patch=14).eval()
    image = torch.randn(1, 3, 50, 61)
    logits = predict_logits(net, image)
    assert logits.shape == (1, C, 50, 61) and net.sizes == [(56, 56)]
    exact = predict_logits(net, image[..., :42, :56])
    torch.testing.assert_close(exact, net.visual(image[..., :42, :56]))


def test_sliding_windows_are_all_of_one_size_and_average_to_the_truth() -> None:
    net = Toy(patch=6).eval()
    image = torch.randn(2, 3, 50, 75)
    logits = predict_logits(net, image, None, "sliding_window", crop=24)
    # Starts 0, 16, 26 and 0, 16, 32, 48, 51: the last ones are snapped to the border.
    assert net.sizes == [(24, 24)] * 15
    torch.testing.assert_close(logits.softmax(1), net.visual(image).softmax(1))
    mean = predict_logits(net, image, some_text(2), "sliding_window", 24, "mean")
    assert torch.isfinite(mean).all() and mean.shape == (2, C, 50, 75)


def test_overlapping_windows_average_probabilities_not_logits() -> None:
    class ByWindow(nn.Module):
        patch = 2
        calls = 0

        def forward(self, images: Tensor, text: TextBatch | None = None) -> dict[str, Tensor]:
            self.calls += 1
            logits = torch.tensor([[0.0, 8.0], [1.0, 0.0], [1.0, 0.0]][self.calls - 1])
            return {"visual": logits.view(1, 2, 1, 1).expand(1, 2, *images.shape[-2:])}

    probs = predict_logits(ByWindow(), torch.zeros(1, 3, 6, 10), None, "sliding_window", 6).softmax(1)
    first, second = (torch.tensor(x).softmax(0) for x in ([0.0, 8.0], [1.0, 0.0]))
    torch.testing.assert_close(probs[0, :, 0, 5], (first + second) / 2)
    torch.testing.assert_close(probs[0, :, 0, 0], first)


@pytest.mark.parametrize("protocol", ["center_crop", "sliding_window"])
def test_images_smaller_than_the_crop_are_padded_and_cut_back(protocol: str) -> None:
    net = Toy(patch=4).eval()
    image = torch.randn(1, 3, 10, 30)
    logits = predict_logits(net, image, None, protocol, 20)
    expected = net.visual(center(image, 20) if protocol == "center_crop" else image)
    assert logits.shape == expected.shape and set(net.sizes) == {(20, 20)}
    torch.testing.assert_close(logits.softmax(1), expected.softmax(1))


def test_protocol_and_crop_are_checked() -> None:
    net, image = Toy(patch=4).eval(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="did you mean 'sliding_window'"):
        predict_logits(net, image, None, "sliding", 8)
    with pytest.raises(ValueError, match="crop = 0"):
        predict_logits(net, image, None, "center_crop")


def test_center_crops_are_scored_against_the_same_pixels() -> None:
    net = Toy(patch=4)
    images = torch.randn(1, 3, 16, 16)
    target = net.visual(images).argmax(1)
    target[:, :2] = (target[:, :2] + 1) % C  # wrong where the centre does not reach
    scores = evaluate_network(net, [EvalBatch(images, target)], ("visual",), C, protocol="center_crop", crop=12)
    assert scores["visual"].values["pixel_accuracy"] == 1
