"""Scores of photographs of several sizes: equal in batches, ahead, shared, and one by one; in the run's precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from viladiff.data.loading import eval_loader
from viladiff.evaluation import evaluator, feature_clusters
from viladiff.evaluation.pixel_counts import SegmentationMeter
from viladiff.evaluation.protocols import PROTOCOLS, STREAMS
from viladiff.inference.load import evaluate_run
from viladiff.runs.config import RunConfig, override, run_id
from viladiff.training import fingerprints, trainer
from viladiff.training.trainer import Trainer, fit

Make = Callable[..., Path]
IMAGES = 9
SMALL = {
    "data.dataset": "folder", "data.crop": 32, "model.encoder": "digits_vit", "model.pretrained": "none",
    "model.decoder_width": 8, "data.batch_labelled": 2, "data.batch_unlabelled": 2, "data.text_encoder": "words",
    "data.captions": "none",
    "train.steps": 2, "train.precision": "fp32", "runtime.device": "cpu", "runtime.threads": 1,
    "runtime.progress": False,
}  # fmt: skip


@pytest.fixture
def fields(photo_folder: Make, tmp_path: Path) -> dict[str, object]:
    """A run on images of four sizes."""
    root = photo_folder(16, labelled=4, val=IMAGES, sizes=(44, 45))
    return {**SMALL, "runtime.data_root": str(root), "runtime.runs_dir": str(tmp_path / "runs")}


def built(fields: dict[str, object], name: str, **more: object) -> Trainer:
    run = Trainer(override(RunConfig(), {**fields, "method.name": name, **more}))
    run._build()
    gen = torch.Generator().manual_seed(4)
    with torch.no_grad():  # so that the networks know several classes
        for parameter in run.method.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=gen))
    return run


class Counts:
    """All that one worker counts."""

    def __init__(self, run: Trainer) -> None:
        run.method.eval()
        self.pseudo, self.tokens, self.batches = evaluator.PseudoLabels(run), feature_clusters.TokenLabels(run), []
        meters = evaluator.compute_meters(run, run.method.eval_networks(), STREAMS, True, self._see)
        self.states = {(name, stream): meter for name, found in meters.items() for stream, meter in found.items()}

    def _see(self, batch: Any) -> None:
        self.batches.append(len(batch.places))
        self.pseudo.add(batch)
        self.tokens.add(batch)


def equal(one: SegmentationMeter, other: SegmentationMeter) -> bool:
    """Logits in batches may differ in their last bit, so that a pixel in ten thousand may fall to another class."""
    return int((one.state - other.state).abs().sum()) <= int(one.confusion().sum()) // 2500


@pytest.mark.parametrize(
    ("name", "protocol"),
    [*(("viladiff", protocol) for protocol in PROTOCOLS), ("textprobe", "original"), ("allspark", "original")],
)
def test_batches_count_as_images_one_by_one(
    fields: dict[str, object], name: str, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(fields, name, **{"eval.protocol": protocol})
    monkeypatch.setattr(eval_loader, "BATCH_PIXELS", 1)
    alone = Counts(run)
    monkeypatch.setattr(eval_loader, "BATCH_PIXELS", 4 * 45 * 45)
    monkeypatch.setattr(evaluator, "decoding_threads", lambda cfg, device: 2)
    together = Counts(run)
    assert alone.batches == [1] * IMAGES and max(together.batches) > 1 and sum(together.batches) == IMAGES
    assert len(alone.states) == (8 if name == "viladiff" else 4)  # streams that there are not are empty
    for key, meter in alone.states.items():
        assert equal(meter, together.states[key]), key
        assert not int(meter.state[-1]) or len(meter.confusion().sum(0).nonzero()) > 1, key
    one, other = (counts.pseudo.shares() for counts in (alone, together))
    assert one == pytest.approx(other, abs=1e-4, nan_ok=True)
    assert name != "viladiff" or one["after/ece"] != one["before/ece"] != None  # noqa: E711
    labels, others = alone.tokens.gathered(), together.tokens.gathered()
    assert len(labels) == (IMAGES if name == "textprobe" else 0)
    assert all((a == b).all() for a, b in zip(labels, others, strict=True))


def test_what_is_drawn_for_an_image_is_named_by_its_place(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_loader, "BATCH_PIXELS", 4 * 45 * 45)
    run = built(fields, "viladiff")
    seen: dict[int, torch.Tensor] = {}
    plain = run.method.pseudo_labels

    def noted(images: torch.Tensor, text: Any, keys: tuple[int, ...], step: Any) -> Any:
        assert len(keys) == len(images)
        seen.update(zip(keys, images, strict=True))
        return plain(images, text, keys, step)

    monkeypatch.setattr(run.method, "pseudo_labels", noted)
    for rank in (0, 1):  # as two workers, of which the first has one image more
        run.rank, run.world = rank, 2
        Counts(run)
    assert sorted(seen) == list(range(IMAGES))
    for place, image in seen.items():
        height, width = run.dataset.val_images[place].shape[:2]
        ((images, *_),) = eval_loader.validation(run.dataset, None, run.device, [((place,), (height, width))])
        wanted = torch.nn.functional.interpolate(images, image.shape[-2:], mode="bilinear")[0]
        assert torch.equal(image, wanted), "the image of this place, at the network's size"


def test_workers_with_other_numbers_of_batches_count_each_image_once(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_loader, "BATCH_PIXELS", 4 * 45 * 45)
    run = built(fields, "supervised")
    whole = Counts(run)
    parts = []
    for run.rank, run.world in ((0, 2), (1, 2)):
        parts.append(Counts(run))
    assert len(parts[0].batches) + len(parts[1].batches) >= len(whole.batches)
    first, second, meter = (counts.states["student", "visual"] for counts in (*parts, whole))
    assert equal(first.merge(second), meter) and first.result().images == IMAGES


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(fields: dict[str, object]) -> None:
    result = fit(override(RunConfig(), {**fields, "method.name": "textprobe"}))
    one, two = (evaluate_run(result.directory, {"runtime.workers": workers}) for workers in (1, 2))
    assert one["confusion"] == two["confusion"]
    assert one["scores"]["student"]["visual"]["images"] == two["scores"]["student"]["visual"]["images"] == IMAGES
    shared = fit(override(RunConfig(), {**fields, "method.name": "textprobe", "runtime.workers": 2, "seed": 1}))
    scores = shared.record.scores[shared.record.network][shared.record.stream]
    assert scores["tokens"] > 0 and (shared.directory / "features.npz").is_file()


# Precision


def test_a_run_is_scored_in_its_precision_and_evaluated_again_alike(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    plain = evaluator.measure_all

    def noted(*given: Any, **named: Any) -> Any:
        asked.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16)
        return plain(*given, **named)

    monkeypatch.setattr(evaluator, "measure_all", noted)
    half = override(RunConfig(), {**fields, "method.name": "semibaseline", "train.precision": "bf16"})
    result = fit(half)
    assert asked == [True] and result.record.scoring == result.record.fingerprints["scoring"] == "bf16"
    again = evaluate_run(result.directory, {})
    assert asked == [True, True]
    for name, streams in again["scores"].items():
        for stream, scores in streams.items():
            stored = result.record.scores[name][stream]
            assert {what: list(x) if what == "per_class" else x for what, x in scores.items()} == stored

    # A run of an earlier version, which was scored in fp32, has another name, and is still scored in fp32.
    monkeypatch.setattr(trainer, "scoring_precision", lambda cfg: "fp32")
    monkeypatch.setattr(trainer, "scoring_fingerprint", lambda cfg: {})
    earlier = fit(half)
    monkeypatch.undo()
    assert earlier.record.run_id != result.record.run_id and earlier.record.scoring == "fp32"
    found = evaluate_run(earlier.directory, {})
    assert found["scores"]["student"]["visual"]["miou"] == earlier.record.scores["student"]["visual"]["miou"]
    assert found["confusion"] != again["confusion"], "or nothing was shown"


def test_built_in_data_are_scored_in_fp32_and_keep_their_names(fields: dict[str, object]) -> None:
    own = override(RunConfig(), {"train.precision": "bf16"})
    assert fingerprints.scoring_precision(own) == "fp32" and fingerprints.scoring_fingerprint(own) == {}
    photos = override(RunConfig(), fields)
    assert fingerprints.scoring_fingerprint(photos) == {}, "names of runs in fp32 stay"
    for precision in ("bf16", "fp16"):
        half = override(photos, {"train.precision": precision})
        (named,) = fingerprints.name_runs([half])
        assert named.fingerprints["scoring"] == precision
        assert named.run_id == Trainer(half).name != run_id(half, {**named.fingerprints, "scoring": ""})
