"""Fifty steps of training beside the same steps in straight-line torch, on photographs, in float64.

``fit`` trains UniMatch V2 with DINOv2's shape and a DPT head, UniMatch and FixMatch with a ResNet and DeepLabV3+, as
the recipes ``strong`` and ``resnet`` say. The other side is in ``straight_line``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import straight_line
from straight_line import SIDES, STEPS, Run, config, followed, trained
from torch import Tensor, nn

from viladiff.methods import base, unimatch_v2
from viladiff.models.ema import ema_update
from viladiff.training import optim, trainer

TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Iterator[None]:
    with straight_line.in_float64():
        yield


@pytest.fixture
def photos(photographs: ModuleType, tmp_path: Path) -> Path:
    """Four labelled pictures and eight without labels, some smaller than a crop."""
    photographs.write(tmp_path / "photos", 13, "voc", labelled=4, val=1, sizes=(30, 90))
    return tmp_path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "unimatch" else []) for name in sorted(SIDES)]
)
def test_losses_and_weights_are_those_of_straight_line_torch(name: str, photos: Path) -> None:
    run = trained(config(photos, name))
    side, losses, weights = followed(run)
    assert len(losses) == STEPS and list(weights) == [9, 19, 29, 39, 49]
    assert max(losses) < TOLERANCE and max(weights.values()) < TOLERANCE
    lines = (run.directory / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["total"] for line in lines] == run.totals
    check_that_it_compares_something(run, side.accepted)


def check_that_it_compares_something(run: Run, accepted: list[float]) -> None:
    """Labels count and are refused, boxes are pasted in each view, crops have padding, and something is learned."""
    assert sum(0 < share < 1 for share in accepted) > 10
    for view in range(len(run.batches[0].strong)):
        assert any(batch.mix[view].boxes.any() for batch in run.batches)
    assert any(not batch.valid.all() for batch in run.batches)
    assert sum(run.totals[-10:]) < sum(run.totals[:10])


def _average_late(patch: pytest.MonkeyPatch) -> None:
    def late(teacher: nn.Module, student: nn.Module, step: int, momentum: float) -> None:
        ema_update(teacher, student, step + 1, momentum)

    patch.setattr(base, "ema_update", late)


def _confidence_stays(patch: pytest.MonkeyPatch) -> None:
    plain = unimatch_v2.apply_cutmix_to

    def kept(batch: Any, view: int, *maps: Tensor) -> tuple[Tensor, ...]:
        image, _, *others = plain(batch, view, *maps)
        return image, maps[1], *others

    patch.setattr(unimatch_v2, "apply_cutmix_to", kept)


def _encoder_as_head(patch: pytest.MonkeyPatch) -> None:
    def one(options: dict[str, Any], cfg: Any) -> float:
        return float(options.pop("lr_scale") is not None)

    patch.setattr(optim, "rate_scale", one)


def _rate_late(patch: pytest.MonkeyPatch) -> None:
    plain = optim.lr_factor
    patch.setattr(trainer, "lr_factor", lambda cfg, step, steps: plain(cfg, max(step - 1, 0), steps))


@pytest.mark.parametrize("broken", [_average_late, _confidence_stays, _encoder_as_head, _rate_late])
def test_a_wrong_step_is_found(
    broken: Callable[[pytest.MonkeyPatch], None], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    _, losses, weights = followed(trained(config(photos, "unimatch_v2", **{"train.steps": 8, **SURE})))
    assert max(losses) > TOLERANCE or weights[7] > TOLERANCE


SURE = {"method.pseudo.threshold": 0.06}
"""Within few steps some pixels are this sure and some are not."""
