"""Protocols on images of their own sizes: windows against a plain loop, bands, several workers without duplicates."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from viladiff.data.batch import EvalBatch, TextBatch
from viladiff.data.registry import dataset_spec
from viladiff.data.registry import load_dataset as load_dataset
from viladiff.evaluation.pixel_counts import evaluate_network
from viladiff.evaluation.protocols import PROTOCOLS, Band, bands, center, nearest_multiple, predict_logits, stream_bands
from viladiff.inference.load import evaluate_run, load_run
from viladiff.runs.config import ConfigError, RunConfig, override
from viladiff.runs.record import load_record
from viladiff.training.trainer import fit

C = 4


class Positional(nn.Module):
    """Logits depend on the pixel and on its place in the window, so that a window put wrong is seen."""

    def __init__(self, patch: int = 1) -> None:
        super().__init__()
        self.side_multiple = patch
        self.mix = nn.Conv2d(3, C, 3, padding=1, bias=False)
        self.windows: list[tuple[int, ...]] = []

    def forward(self, images: Tensor, text: TextBatch | None = None) -> dict[str, Tensor]:
        assert images.shape[-1] % self.side_multiple == 0 and images.shape[-2] % self.side_multiple == 0
        self.windows.append(tuple(images.shape))
        ramp = torch.linspace(0, 2, images.shape[-1]) + torch.linspace(0, 1, images.shape[-2])[:, None]
        return {"visual": self.mix(images) * 3 + ramp * torch.arange(C).view(1, C, 1, 1)}


def net(patch: int = 1) -> Positional:
    torch.manual_seed(0)
    return Positional(patch).eval()


def plain_sliding(network: Positional, image: Tensor, crop: int) -> Tensor:
    """Mean probabilities over all windows that cover a pixel, pixel by pixel counted."""
    height, width = image.shape[-2:]
    stride = int(crop * 2 / 3)

    def starts(length: int) -> list[int]:
        found = [0]
        while found[-1] + crop < length:
            found.append(min(found[-1] + stride, length - crop))
        return found

    total, count = torch.zeros(1, C, height, width), torch.zeros(height, width)
    for top in starts(height):
        for left in starts(width):
            window = network(image[:, :, top : top + crop, left : left + crop])["visual"].softmax(1)
            total[:, :, top : top + crop, left : left + crop] += window
            count[top : top + crop, left : left + crop] += 1
    return total / count


@torch.no_grad()
@pytest.mark.parametrize("size", [(24, 24), (25, 24), (24, 70), (71, 24), (57, 64), (100, 33)])
def test_bands_equal_the_mean_over_all_windows(size: tuple[int, int]) -> None:
    network = net()
    image = torch.randn(1, 3, *size)
    expected = plain_sliding(network, image, 24)
    found = list(stream_bands(network, image, None, ("visual",), "sliding_window", 24))
    tops = [band.top for band in found]
    heights = [band.logits["visual"].shape[2] for band in found]
    assert tops == np.cumsum([0, *heights[:-1]]).tolist() and sum(heights) == size[0]
    probabilities = torch.cat([band.logits["visual"].softmax(1) for band in found], 2)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-6)


def test_published_starts_of_a_cityscapes_image() -> None:
    """UniMatch V2 at crop 798: starts 0, 532, 1064, 1250 across and 0, 226 down."""
    seen: list[int] = []

    def forward(x: Tensor) -> dict[str, Tensor]:
        seen.append(int(x[0, 0, 0, 0]))
        return {"visual": torch.zeros(1, 2, *x.shape[-2:])}

    places = torch.arange(1024)[:, None] * 4096 + torch.arange(2048)
    list(bands(forward, places.expand(1, 3, 1024, 2048), 14, "sliding_window", 798))
    found = {divmod(value, 4096) for value in seen}
    assert len(seen) == 8
    assert found == {(y, x) for y in (0, 226) for x in (0, 532, 1064, 1250)}


@torch.no_grad()
def test_a_crop_that_the_patch_does_not_divide_is_resized_window_by_window() -> None:
    network = net(patch=16)
    logits = predict_logits(network, torch.randn(1, 3, 40, 60), None, "sliding_window", 33)
    assert set(network.windows) == {(1, 3, 32, 32)} and logits.shape == (1, C, 40, 60)
    network.windows.clear()
    assert predict_logits(network, torch.randn(1, 3, 60, 20), None, "center_crop", 33).shape == (1, C, 33, 20)
    assert network.windows == [(1, 3, 32, 32)]


def test_the_middle_of_odd_sides_and_the_nearest_multiples() -> None:
    x = torch.arange(30).view(1, 1, 5, 6)
    assert center(x, 2).tolist() == [[[[8, 9], [14, 15]]]] and center(x, 9).shape == x.shape
    small, more = torch.rand(1, 3, 5, 6), 8
    (band,) = bands(lambda seen: {"echo": seen}, small, 1, "center_crop", more)
    assert torch.equal(band.logits["echo"], small), "what is added to a small image is below it and on its right"
    assert [nearest_multiple(side, 8) for side in (1, 11, 12, 13, 20, 25, 29)] == [8, 8, 16, 16, 16, 24, 32]


def test_rows_of_bands_need_no_more_memory_than_one_row_of_windows() -> None:
    """What the generator holds is one band; a band is as high as the crop at most."""
    network, image = net(), torch.zeros(1, 3, 200, 30)
    with torch.no_grad():
        heights = [
            band.logits["visual"].shape[2] for band in stream_bands(network, image, protocol="sliding_window", crop=24)
        ]
    assert len(heights) == 12 and max(heights) == 24


SIZES = [(17, 40), (40, 17), (24, 24), (31, 33), (64, 20), (25, 25), (5, 60)]


def native(rank: int = 0, world: int = 1) -> list[EvalBatch]:
    """Every world-th image, each of a size of its own, a batch each."""
    found = []
    for i, (h, w) in list(enumerate(SIZES))[rank::world]:
        gen = torch.Generator().manual_seed(i)
        target = torch.randint(0, C, (1, h, w), generator=gen)
        target[:, :1] = 255
        found.append(EvalBatch(torch.randn(1, 3, h, w, generator=gen), target))
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_on_native_sizes_count_every_pixel_once(protocol: str) -> None:
    network = net(patch=4)
    meter = evaluate_network(network, native(), ("visual",), C, True, protocol, 24)["visual"]
    expected = torch.zeros(C, C, dtype=torch.int64)
    with torch.no_grad():
        for image, target, *_ in native():
            truth = center(target, 24) if protocol == "center_crop" else target
            labels = predict_logits(network, image, None, protocol, 24).argmax(1)
            keep = truth != 255
            expected += torch.bincount(truth[keep] * C + labels[keep], minlength=C * C).view(C, C)
    assert torch.equal(meter.confusion(), expected)
    assert meter.result().images == len(SIZES)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_shares_add_up_to_the_whole(protocol: str) -> None:
    network = net(patch=4)
    whole, first, second = (
        evaluate_network(network, native(*share), ("visual",), C, True, protocol, 24)["visual"]
        for share in ((0, 1), (0, 2), (1, 2))
    )
    assert torch.equal(first.merge(second).state, whole.state)


def test_bands_say_where_they_are() -> None:
    found = list(bands(lambda x: {"a": x[:, :2]}, torch.zeros(1, 3, 8, 8), 4))
    assert [type(band) for band in found] == [Band] and found[0].top == 0


@pytest.fixture(scope="module")
def run(photographs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on photographs of different sizes, one step long."""
    place = tmp_path_factory.mktemp("evaluated")
    changes = {
        "data.dataset": "folder",
        "runtime.data_root": str(photographs.write(place / "photos", 12, labelled=3, val=7, sizes=(40, 90))),
        "runtime.runs_dir": str(place / "runs"),
        "runtime.progress": False,
        "runtime.threads": 1,
        "method.name": "semibaseline",
        "model.encoder": "digits_vit",
        "model.pretrained": "shipped",
        "model.decoder_width": 16,
        "data.crop": 32,
        "data.batch_labelled": 2,
        "data.batch_unlabelled": 2,
        "train.steps": 1,
        "eval.max_images": 2,
    }
    return fit(override(RunConfig(), changes)).directory


def test_two_processes_count_what_one_does(run: Path) -> None:
    """Seven images of seven sizes: the shares are unequal, and a padded sampler would count one image twice."""
    changes = {"eval.protocol": "sliding_window", "eval.max_images": None, "runtime.progress": False}
    one = evaluate_run(run, changes)
    two = evaluate_run(run, {**changes, "runtime.workers": 2})
    assert one["confusion"].keys() == {"student", "teacher"} and one["scores"]["teacher"]["visual"]["images"] == 7
    assert json.loads(json.dumps(one)) == two
    pixels = sum(mask.size for mask in load_dataset(*dataset_spec(load_run(run).cfg)).val_masks)
    assert np.sum(one["confusion"]["teacher"]["visual"]) == pixels
    record = load_record(run / "record.json")
    again = evaluate_run(run, {"eval.max_images": 2})
    assert again["scores"]["teacher"]["visual"]["miou"] == record.miou and again["data"] == "as in training"


def test_evaluation_says_that_the_data_have_changed(run: Path) -> None:
    lists = run.parent.parent / "photos" / "splits" / "labelled" / "val.txt"
    names = lists.read_text()
    try:
        lists.write_text("\n".join(names.split()[:4]))
        found = evaluate_run(run, {"eval.boundary": False})
    finally:
        lists.write_text(names)
    assert found["data"].startswith("not as in training") and found["scores"]["student"]["visual"]["images"] == 2
    with pytest.raises(ConfigError, match=r"data.crop: would be another run"):
        evaluate_run(run, {"data.crop": 64})
