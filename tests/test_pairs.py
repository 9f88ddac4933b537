"""What mixing needs of the data: pairs of different images, and coloured labelled images where they are asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from viladiff.batch import Batch, Views
from viladiff.config import RunConfig, override
from viladiff.data.datasets import load
from viladiff.data.loader import Loader, Order


@pytest.mark.parametrize("count", [3, 5, 6])
def test_no_image_is_its_own_partner_where_two_epochs_meet(count: int) -> None:
    ids = np.arange(10, 10 + count)
    order, plain = Order(ids, 0, "unlabelled", paired=True), Order(ids, 0, "unlabelled")
    found, before = ([o[place] for place in range(400 * count)] for o in (order, plain))
    alone = [i for i in range(0, len(found), 2) if found[i][1] == found[i + 1][1]]
    assert alone == []
    own = [i for i in range(0, len(before), 2) if before[i][1] == before[i + 1][1]]
    assert bool(own) == (count % 2 == 1)
    for epoch in range(400):
        assert sorted(i for e, i in found if e == epoch) == ids.tolist()
    # Only those pairs differ, and any place can be asked for first.
    assert sum(a != b for a, b in zip(found, before, strict=True)) <= 2 * len(own)
    assert [Order(ids, 0, "unlabelled", paired=True)[place] for place in range(20, 40)] == found[20:40]


def batch(views: Views, **changes: object) -> Batch:
    cfg = override(RunConfig(), {"method.name": "semibaseline", **changes})
    return Loader(cfg, load("digits", "92"), views, None, 8, torch.device("cpu")).micro_batches(3)[0]


def test_labelled_images_come_with_the_colours_of_a_strong_view_where_wanted() -> None:
    plain, wanted = (batch(Views(strong=1, strong_labelled=flag)) for flag in (False, True))
    assert plain.image_strong is None and wanted.image_strong is not None
    assert torch.equal(plain.image, wanted.image) and torch.equal(plain.strong[0], wanted.strong[0])
    changed = (wanted.image_strong - wanted.image).abs().amax((1, 2, 3)) > 0.01
    assert changed.float().mean() > 0.6
    grey = batch(Views(strong_labelled=True), **{"data.color_jitter": False})
    assert grey.image_strong is not None and torch.equal(grey.image_strong, grey.image)
