"""Every method trains and is scored on images of five channels, by shapes alone."""

from __future__ import annotations

import pytest

from viladiff.methods import METHODS
from viladiff.runs.config import RunConfig, override
from viladiff.runs.job import DataFacts
from viladiff.training.feasibility import try_on_meta

FAST = ("viladiff", "cps")
"""The paper's, and one of two networks."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in METHODS]
)
def test_a_method_takes_five_channels(name: str) -> None:
    fields: dict[str, object] = {
        "data.dataset": "folder", "data.channels": 5, "data.crop": 64, "data.batch_labelled": 8,
        "data.batch_unlabelled": 8, "data.text_encoder": "words", "method.name": name, "model.encoder": "digits_vit",
        "model.pretrained": "none", "model.decoder_width": 16,
    }  # fmt: skip
    assert try_on_meta(override(RunConfig(), fields), DataFacts(6, 10, True)) == []
