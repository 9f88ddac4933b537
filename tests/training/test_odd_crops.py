"""Crops that are no multiple of the patch, as the published 321, 513 and 801: trained on, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from viladiff.inference.load import evaluate_run, preview_run
from viladiff.methods import METHODS
from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import fit


def config(out: Path, method: str, **fields: object) -> RunConfig:
    fixed = {
        "method.name": method,
        "model.encoder": "resnet10t",
        "model.encoder_stride": 16,
        "model.pretrained": "none",
        "model.decoder": "deeplabv3plus",
        "data.crop": 49,
        "data.cutmix_grid": "pixel",
        "data.batch_labelled": 2,
        "data.batch_unlabelled": 2,
        "train.steps": 2,
        "eval.max_images": 2,
        "eval.boundary": False,
        "runtime.progress": False,
        "runtime.threads": 1,
        "runtime.runs_dir": str(out),
    }
    return override(RunConfig(), {**fixed, **fields})


WHOLE = r"data\.crop = 49: must be a multiple of the patch of model\.encoder = 'resnet10t', 16; nearest: 48 or 64"


def check(method: str, out: Path) -> None:
    if method == "semivl":  # has a decoder of its own
        with pytest.raises(ValueError, match=WHOLE + "$"):
            preview_run(config(out, method))
        return
    if method == "viladiff":
        with pytest.raises(ValueError, match=r"method\.name=viladiff mixes feature maps.*set data\.cutmix_grid=patch$"):
            preview_run(config(out, method))
        with pytest.raises(ValueError, match=WHOLE + "$"):
            preview_run(config(out, method, **{"data.cutmix_grid": "patch"}))
        return
    assert fit(config(out, method)).record.miou is not None


@pytest.mark.parametrize("method", ["fixmatch", "semivl", "viladiff"])
def test_a_method_takes_an_odd_crop_or_says_why_not(method: str, tmp_path: Path) -> None:
    check(method, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fixmatch", "semivl", "viladiff"}))
def test_every_method_takes_an_odd_crop(method: str, tmp_path: Path) -> None:
    check(method, tmp_path)


@pytest.mark.parametrize(
    ("fields", "ending"),
    [
        ({"data.cutmix_grid": "patch"}, "48 or 64, or set data.cutmix_grid=pixel"),
        ({"model.decoder": "light"}, "48 or 64"),
        ({"method.pseudo.oracle": "grid"}, "48 or 64"),
    ],
)
def test_the_refusal_names_what_would_help(fields: dict[str, object], ending: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.crop = 49") as error:
        preview_run(config(tmp_path, "semibaseline", **fields))
    assert str(error.value).endswith(ending)


def test_images_are_scored_at_their_own_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a network that needs multiples of its patch is given resized images."""
    asked: list[int] = []
    from viladiff.evaluation import protocols

    own = protocols.resized_logits
    monkeypatch.setattr(
        protocols,
        "resized_logits",
        lambda forward, image, multiple: asked.append(multiple) or own(forward, image, multiple),
    )
    for decoder in ("deeplabv3plus", "light"):
        run = fit(config(tmp_path / decoder, "supervised", **{"model.decoder": decoder, "train.steps": 1}))
        for protocol in ("center_crop", "sliding_window"):
            assert evaluate_run(run.directory, {"eval.protocol": protocol})["scores"]
    assert asked and set(asked[: len(asked) // 2]) == {1} and set(asked[len(asked) // 2 :]) == {16}
