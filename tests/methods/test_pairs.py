"""What mixing needs of the data: pairs of different images, and coloured labelled images where they are asked for."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from method_kit import STEP, make, make_batch

from viladiff.data.batch import Batch, CutMix, Views
from viladiff.data.loader import BatchLoader, ShuffledIndices
from viladiff.data.registry import load_dataset
from viladiff.inference.load import preview_run
from viladiff.methods import METHODS
from viladiff.runs.config import RunConfig, override


@pytest.mark.parametrize("count", [3, 5, 6])
def test_no_image_is_its_own_partner_where_two_epochs_meet(count: int) -> None:
    ids = np.arange(10, 10 + count)
    order, plain = ShuffledIndices(ids, 0, "unlabelled", paired=True), ShuffledIndices(ids, 0, "unlabelled")
    found, before = ([o[place] for place in range(400 * count)] for o in (order, plain))
    alone = [i for i in range(0, len(found), 2) if found[i][1] == found[i + 1][1]]
    assert alone == []
    own = [i for i in range(0, len(before), 2) if before[i][1] == before[i + 1][1]]
    assert bool(own) == (count % 2 == 1)
    for epoch in range(400):
        assert sorted(i for e, i in found if e == epoch) == ids.tolist()
    # Only those pairs differ, and any place can be asked for first.
    assert sum(a != b for a, b in zip(found, before, strict=True)) <= 2 * len(own)
    assert [ShuffledIndices(ids, 0, "unlabelled", paired=True)[place] for place in range(20, 40)] == found[20:40]


def batch(views: Views, **changes: object) -> Batch:
    cfg = override(RunConfig(), {"method.name": "semibaseline", **changes})
    return BatchLoader(cfg, load_dataset("digits", "92"), views, None, 8, torch.device("cpu")).micro_batches(3)[0]


def test_labelled_images_come_with_the_colours_of_a_strong_view_where_wanted() -> None:
    plain, wanted = (batch(Views(strong=1, strong_labelled=flag)) for flag in (False, True))
    assert plain.image_strong is None and wanted.image_strong is not None
    assert torch.equal(plain.image, wanted.image) and torch.equal(plain.strong[0], wanted.strong[0])
    changed = (wanted.image_strong - wanted.image).abs().amax((1, 2, 3)) > 0.01
    assert changed.float().mean() > 0.6
    grey = batch(Views(strong_labelled=True), **{"data.color_jitter": False})
    assert grey.image_strong is not None and torch.equal(grey.image_strong, grey.image)


def test_boxes_lie_on_the_patch_grid_or_on_any_pixel() -> None:
    """Of one image either none has a box or both have; areas are those of UniMatch."""

    def boxes(grid: str) -> torch.Tensor:
        cfg = override(RunConfig(), {"method.name": "semibaseline", "data.cutmix_grid": grid})
        loader = BatchLoader(
            cfg, load_dataset("digits", "92"), Views(strong=2, cutmix=True), None, 8, torch.device("cpu")
        )
        return torch.cat([mix.boxes for step in range(40) for mix in loader.micro_batches(step)[0].mix])

    patch, pixel = boxes("patch"), boxes("pixel")
    assert not (patch % 8).any() and (pixel % 8).any(0).all()
    assert torch.equal(patch.any(1), pixel.any(1))
    sizes = (pixel[:, 2:] - pixel[:, :2]).prod(1)[pixel.any(1)] / 48**2
    assert 0.015 < sizes.min() < 0.06 and 0.35 < sizes.max() < 0.42


PIXEL = {"data.cutmix_grid": "pixel", "train.steps": 1}


@pytest.mark.parametrize("changes", [{}, {"method.mixe.enabled": False}, {"method.vila.enabled": False}])
def test_a_method_that_mixes_feature_maps_refuses_boxes_on_any_pixel(changes: dict[str, object]) -> None:
    cfg = override(RunConfig(), {"method.name": "viladiff", **PIXEL, **changes})
    with pytest.raises(ValueError, match=r"data.cutmix_grid: method.name=viladiff mixes .*'pixel'; set .*=patch"):
        preview_run(cfg)


def test_a_method_that_mixes_pixels_alone_takes_boxes_on_any_pixel() -> None:
    """Whatever mixes maps without saying so meets an edge inside a cell, which ``apply_cutmix`` refuses."""
    without = {"method.name": "viladiff", "method.vila.enabled": False, "method.mixe.enabled": False}
    preview_run(override(RunConfig(), PIXEL | without))
    for name, kind in METHODS.items():
        cut = kind.views.cutmix and not kind.views.whole_cells
        for changes in [{}] if cut else [{"vila.enabled": False, "mixe.enabled": False}] if name == "viladiff" else []:
            method = make(name, **changes)
            batch = make_batch(views=method.required_views())
            batch.mix = tuple(CutMix(torch.tensor([[3, 5, 20, 17]] * 4), mix.partner) for mix in batch.mix)
            assert method(batch, STEP).total.isfinite(), name


def test_methods_with_boxes_on_the_patch_grid_say_so() -> None:
    for name, kind in METHODS.items():
        said = " ".join((sys.modules[kind.__module__].__doc__ or "").split())
        assert ("boxes lie on the patch grid" in said or "They lie on the patch grid" in said) == kind.views.cutmix, (
            name
        )
        assert ("data.cutmix_grid" in said) == kind.views.cutmix, name
