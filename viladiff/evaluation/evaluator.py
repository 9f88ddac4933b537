"""Evaluation of a trained run: scores of its networks, quality of its pseudo-labels, pictures, its record."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from viladiff.core.atomic import write_atomically
from viladiff.core.distributed import autocast, summed_over_workers
from viladiff.core.environment import git_state, peak_memory, processor, reset_peak_memory, versions
from viladiff.data.batch import IGNORE, EvalBatch, Step, TextBatch
from viladiff.data.files.images import PaletteEncoding
from viladiff.data.formats.values import displayed
from viladiff.data.loading.eval_loader import (
    BATCH_PIXELS,
    Size,
    decoding_threads,
    images_together,
    plan_batches,
    validation,
)
from viladiff.data.loading.pace import LIMITING, LoaderPace
from viladiff.data.transforms.augment import normalise, unit_images
from viladiff.evaluation import feature_clusters
from viladiff.evaluation.context import EvalContext
from viladiff.evaluation.pixel_counts import SegmentationMeter, measure_all, to_scores
from viladiff.evaluation.protocols import STREAMS, nearest_multiple, resized_logits
from viladiff.evaluation.pseudo_labels import pseudo_counts, pseudo_scores
from viladiff.methods.base import Method
from viladiff.models.batch_norm import statistics_notes
from viladiff.models.encoders.build import weights_origin
from viladiff.runs.config import CORE_REVISION, flatten, non_default_fields
from viladiff.runs.record import RunRecord
from viladiff.text.embedding_bank import EmbeddingBank, uneven_notes
from viladiff.text.encoders import describe_text_encoder

FILES = ("pictures.npz", "features.npz", "plane.npz")
"""What a finished run may have beside its record and its log."""


class PeakMemory:
    """Most memory that a run holds in all its legs: of its GPU where it has one, else of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None = 0
        """Of earlier legs; None where they are not known."""
        self.own = False
        """Whether what is measured is this run's, and not what an earlier one in this process held."""

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.own = True
        else:
            self.own = reset_peak_memory()

    def bytes(self) -> int | None:
        if self.before is None or not self.own:
            return None
        cuda = self.device.type == "cuda"
        return max(self.before, torch.cuda.max_memory_allocated(self.device) if cuda else peak_memory())


def eval_batches(run: EvalContext) -> Iterator[EvalBatch]:
    """Yield this worker's validation images in batches of one size, sending heartbeats.

    Files are decoded ahead. Built-in data keep batches that depend on neither device nor protocol's windows.
    """
    dataset, images = run.dataset, len(run.dataset.val_images)
    count = min(images, run.cfg.eval.max_images or images)

    def together(size: Size) -> int:
        if not dataset.uniform:
            return images_together(size, dataset.num_classes, run.device)
        return max(1, BATCH_PIXELS // (size[0] * size[1])) if run.cfg.eval.protocol == "original" else 1

    bank = run.val_bank if run.method.required_views().text else None
    planned = plan_batches(dataset, range(run.rank, count, run.world), together)
    for batch in validation(dataset, bank, run.device, planned, decoding_threads(run.cfg, run.device)):
        run.alive()
        yield batch


def compute_meters(
    run: EvalContext,
    networks: Mapping[str, nn.Module],
    streams: tuple[str, ...],
    boundary: bool,
    also: Callable[[EvalBatch], None] | None = None,
) -> dict[str, dict[str, SegmentationMeter]]:
    """Count streams of networks over the validation images of all workers, in one pass: {network: {stream: counts}}.

    The networks compute in ``run.scoring``. ``also`` as in ``measure_all``.
    """
    given = streams, run.dataset.num_classes, boundary, run.cfg.eval.protocol, run.cfg.data.crop
    with autocast(run.device, run.scoring):
        return measure_all(networks, eval_batches(run), *given, also=also)


def compute_scores(
    run: EvalContext, network: nn.Module, streams: tuple[str, ...], boundary: bool
) -> dict[str, dict[str, Any]]:
    """Return {stream: {score: value}}; a stream that the network or the texts do not allow is left out."""
    found = compute_meters(run, {"": network}, streams, boundary)[""]
    return {name: score.stored() for name, score in to_scores(found).items()}


class PseudoLabels:
    """Quality of the pseudo-labels on validation images, since masks of unlabelled images are never read.

    ``ece`` is of all pixels' labels; what depends on a threshold is left out where the method has none. Where a side
    must be a multiple of the patch and is not, labels are made at the nearest one and their probabilities brought back.
    """

    def __init__(self, run: EvalContext) -> None:
        self.run = run
        self.wanted = type(run.method).pseudo_labels is not Method.pseudo_labels
        student, whole = run.method.student, run.method.required_views().whole_patches
        self.multiple = student.patch if whole else student.side_multiple
        self.sums: dict[str, Any] = {}

    def add(self, batch: EvalBatch) -> None:
        """Count a batch, with the method in evaluation mode; sums stay on the device."""
        if not self.wanted:
            return
        run, method = self.run, self.run.method
        if method.labels_read_batch and not run.dataset.uniform and len(batch.places) > 1:
            for one in _one_by_one(batch):  # or quality would depend on how many images of a size there are
                self.add(one)
            return
        # Draws are named by the place in the validation set, whichever worker looks at the image.
        step = Step(run.steps, 1.0, run.cfg.seed)
        made = partial(method.pseudo_labels, text=batch.text, keys=batch.places, step=step)
        found = {name: p.float().max(1) for name, p in resized_logits(made, batch.images, self.multiple).items()}
        stages = {name: (p.values, p.indices) for name, p in found.items()}
        for name, count in pseudo_counts(stages, batch.target, method.threshold()).items():
            self.sums[name] = self.sums.get(name, 0) + count

    def shares(self) -> dict[str, float | None]:
        """Return ``pseudo_scores`` of all workers' images; all workers must call it."""
        here = {name: count.cpu() for name, count in self.sums.items()}
        return pseudo_scores(summed_over_workers({"": here}).get("", {})) if self.wanted else {}


def _one_by_one(batch: EvalBatch) -> Iterator[EvalBatch]:
    for i, place in enumerate(batch.places):
        part, text = slice(i, i + 1), batch.text
        words = None if text is None else TextBatch(text.tokens[part], text.mask[part])
        yield EvalBatch(batch.images[part], batch.target[part], words, (place,))


def evaluated(
    run: EvalContext, also: Callable[[EvalBatch], None] | None = None
) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, float | None]]:
    """Return {network: {stream: {score: value}}} and the quality of pseudo-labels, from one pass over the images.

    ``also`` is called with each of this worker's batches.
    """
    run.method.eval()
    pseudo = PseudoLabels(run)

    def seen(batch: EvalBatch) -> None:
        pseudo.add(batch)
        if also is not None:
            also(batch)

    found = compute_meters(run, run.method.eval_networks(), STREAMS, run.cfg.eval.boundary, seen)
    scored = {name: {stream: x.stored() for stream, x in to_scores(meters).items()} for name, meters in found.items()}
    return scored, pseudo.shares()


def _best(measured: list[dict[str, Any]], split: str) -> dict[str, Any] | None:
    """Return the best of the evaluations, marked as selected on the images that it reports; None for a single one."""
    if len(measured) < 2:
        return None
    best = max(measured, key=lambda entry: entry["miou"])
    return {**best, "evaluations": len(measured), "picked_on": split, "picked_on_reported": True}


class GradientRecord(Protocol):
    """Shares of the gradient that were measured in training."""

    def record(self) -> dict[str, Any] | None:
        """Return the entry ``RunRecord.gradient_shares``; None if nothing was measured."""
        ...


class RecordContext(EvalContext, Protocol):
    """A run that has taken its last step: what its record says besides scores."""

    name: str
    bank: EmbeddingBank
    fingerprints: dict[str, str]
    history: list[dict[str, Any]]
    train_seconds: float
    cpu_seconds: float | None
    pace: LoaderPace
    memory: PeakMemory

    @property
    def shares(self) -> GradientRecord:
        """Shares of the gradient that were measured in training."""
        ...

    def wall_seconds(self) -> float | None:
        """Return the seconds of all legs; None if unknown."""
        ...


def _palette(masks: object) -> list[tuple[int, int, int]] | None:
    """Return the colour of each class, where masks are in colours."""
    coding = getattr(masks, "coding", None)
    return [*coding.colours] if isinstance(coding, PaletteEncoding) else None


def _loader_share(run: RecordContext) -> float | None:
    """Return the share of training that waited for batches; None where a leg did not note it."""
    if run.pace.waited is None or not run.train_seconds:
        return None
    return min(1.0, run.pace.waited / run.train_seconds)


def _notes(run: RecordContext) -> list[str]:
    own = [*run.method.student.encoder.notes, *statistics_notes(run.method, run.device, run.world)]
    share = None if run.dataset.files is None else _loader_share(run)
    slow = [] if share is None or share <= LIMITING else [f"training waited {100 * share:.0f} % of its time for images"]
    uneven = uneven_notes(run.bank, run.dataset, run.method.labels_read_text)
    return [*run.dataset.unused, *run.bank.notes(), *run.method.notes(), *own, *uneven, *slow]


def record(run: RecordContext) -> RunRecord:
    """Evaluate a run after its last step and return its record; all workers take part."""
    cfg = run.cfg
    predictor, stream = run.method.eval_network(), run.method.eval_stream()
    tokens = feature_clusters.TokenLabels(run)
    found, pseudo_labels = evaluated(run, tokens.add)
    network = next(name for name, net in run.method.eval_networks().items() if net is predictor)
    miou = found[network][stream]["miou"] if stream in found[network] else None
    if stream in found[network]:
        found[network][stream] |= feature_clusters.measure_clusters(run, tokens.gathered())
    history = [*run.history, {"step": run.steps, "miou": miou}]
    measured = [entry for entry in history if entry["miou"] is not None]
    cuda = run.device.type == "cuda"
    return RunRecord(
        run_id=run.name,
        scale=cfg.runtime.scale,
        config=flatten(cfg),
        changed=non_default_fields(cfg),
        fingerprints=run.fingerprints,
        core_revision=CORE_REVISION,
        method_revision=run.method.revision,
        steps=run.steps,
        miou=miou,
        network=network,
        stream=stream,
        scores=found,
        best=_best(measured, cfg.eval.split),
        history=history,
        pseudo_labels=pseudo_labels,
        gradient_shares=run.shares.record(),
        class_names=list(run.dataset.class_names),
        palette=_palette(run.dataset.masks),
        notes=_notes(run),
        split_name=run.dataset.split_name,
        captions=run.dataset.caption_source,
        text_encoder=describe_text_encoder(cfg.data.text_encoder, cfg.runtime.text_model),
        encoder=cfg.model.encoder,
        pretrained=weights_origin(cfg.model, run.dataset.pixels.inputs),
        wall_seconds=run.wall_seconds(),
        train_seconds=run.train_seconds,
        cpu_seconds=run.cpu_seconds,
        loader_share=_loader_share(run),
        seconds_per_step=run.train_seconds / run.steps,
        peak_memory_bytes=run.memory.bytes(),
        workers=run.world,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if cuda else "cpu",
        processor=processor(),
        versions=versions(),
        git=git_state(),
        finished=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


@torch.no_grad()
def save_qualitative(run: EvalContext) -> None:
    """Write ``pictures.npz``: evenly spaced validation images and their labels at every stage, in order of name.

    Each array is uint8 (K, H, W), the image (K, H, W, 3): class ids with 255 for unknown pixels, or 0 and 1. Images of
    different sizes are cropped to their centre, and padded if smaller than a crop.
    """
    count = min(run.cfg.runtime.visualizations, len(run.dataset.val_images))
    if run.rank or not count:
        return
    run.method.eval()
    places = np.linspace(0, len(run.dataset.val_images) - 1, count).astype(int).tolist()
    pixels = np.stack([_shown(run, run.dataset.val_images[i], 0) for i in places])
    truth = np.stack([_shown(run, run.dataset.val_masks[i], IGNORE) for i in places])
    seen = np.stack([displayed(image, run.dataset.pixels) for image in pixels])
    stages: list[tuple[str, np.ndarray]] = [("image", seen), ("truth", truth)]
    images = normalise(unit_images(torch.from_numpy(pixels).to(run.device).permute(0, 3, 1, 2)))
    text = None
    if run.method.required_views().text:
        words = run.val_bank.batch(places)
        text = TextBatch(words.tokens.to(run.device), words.mask.to(run.device))
    with autocast(run.device, run.scoring):
        shown = run.method.visualize(images, text, tuple(places), Step(run.steps, 1.0, run.cfg.seed))
        logits = run.method.eval_network()(images, text)[run.method.eval_stream()]
    predicted = {"prediction": logits.float().argmax(1)}
    stages += [(name, labels.to(torch.uint8).cpu().numpy()) for name, labels in {**shown, **predicted}.items()]
    packed = io.BytesIO()
    named: dict[str, Any] = {f"{i:02}/{name}": array for i, (name, array) in enumerate(stages)}
    np.savez_compressed(packed, allow_pickle=False, **named)
    write_atomically(run.directory / "pictures.npz", packed.getvalue())


def _shown(run: EvalContext, array: np.ndarray, pad: int) -> np.ndarray:
    """Return (H, W, ...) unchanged if all images have one size, else its centre on a square of the crop's size."""
    if run.dataset.uniform:
        return array
    side = nearest_multiple(run.cfg.data.crop, run.method.student.patch)
    found = np.full((side, side, *array.shape[2:]), pad, array.dtype)
    height, width = (min(side, length) for length in array.shape[:2])
    top, left = ((length - side) // 2 if length > side else 0 for length in array.shape[:2])
    found[:height, :width] = array[top : top + side, left : left + side]
    return found
