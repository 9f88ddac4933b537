"""``viladiff methods`` says of each method what its step really does."""

from __future__ import annotations

import json
import re

import pytest
from method_kit import STEP, make, make_batch
from torch import Tensor, nn

from viladiff.cli import main
from viladiff.cli.methods import method_rows, needs, written
from viladiff.data.batch import Views
from viladiff.methods import METHODS
from viladiff.methods.base import StepCost
from viladiff.models.baselines.text_probe import ClassQueryHead
from viladiff.models.baselines.vl_decoder import VlDecoder
from viladiff.models.decoders.base import Decoder
from viladiff.models.encoders.base import Encoder
from viladiff.models.stream import StreamOutput


def counted(name: str) -> tuple[float, float, float, float]:
    """Images through encoders and decoders in a step, forward and with a graph, over the images of a batch."""
    method, size = make(name), 4
    totals = {(kind, graph): 0 for kind in (Encoder, Decoder) for graph in (False, True)}
    decoders = Decoder | VlDecoder | ClassQueryHead

    def note(module: nn.Module, given: tuple[Tensor, ...], out: Tensor | list[Tensor] | StreamOutput) -> None:
        kind = Encoder if isinstance(module, Encoder) else Decoder
        found = out[-1] if isinstance(out, list | tuple) else out
        totals[kind, False] += len(found)
        totals[kind, True] += len(found) * found.requires_grad

    for module in method.modules():
        if isinstance(module, Encoder | decoders):
            module.register_forward_hook(note)
    method(make_batch(size, views=method.required_views()), STEP)
    f, b, df, db = (totals[kind, graph] / size for kind in (Encoder, Decoder) for graph in (False, True))
    return f, b, df - f, db - b


@pytest.mark.parametrize("name", METHODS)
def test_passes_are_those_of_a_step(name: str) -> None:
    passes = METHODS[name].step_cost
    assert passes is not None
    assert counted(name) == passes[:4]


def test_every_method_is_listed_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == method_rows() and [row["method"] for row in found] == list(METHODS)
    for row in found:
        if row["method"] in ("supervised", "semibaseline", "fixmatch_tags", "textprobe"):
            assert row["paper"] is row["year"] is None
        else:
            assert len(row["paper"]) > 20 and row["venue"] and 2015 < row["year"] <= 2026


def test_table_for_people_has_every_method_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["methods"]) == 0
    text = capsys.readouterr().out
    assert [re.search(rf"^{name} ", text, re.MULTILINE) is not None for name in METHODS] == [True] * len(METHODS)
    assert max(map(len, text.splitlines())) <= 160
    assert "CVPR 2021" in text and "6f + 4b" in text


def test_needs_and_passes_in_words() -> None:
    views = Views(weak=1, strong=2, cutmix=True, text=True, strong_labelled=True, pairs=True)
    assert needs(views) == "labelled, labelled in colours, 1 weak, 2 strong, CutMix boxes, pairs, captions"
    assert needs(Views(weak=0)) == "labelled"
    assert written(StepCost(3, 2)) == "3f + 2b"
    assert written(StepCost(3, 2, 1, 0, "a head")) == "3f + 2b + 1df; a head"
