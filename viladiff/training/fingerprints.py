"""Fingerprints and names of runs before they start; shared inputs are read once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from viladiff.data.cache import fingerprint
from viladiff.data.dataset import Dataset
from viladiff.data.registry import dataset_spec
from viladiff.data.registry import load_dataset as load_dataset
from viladiff.data.sources import embedded_datasets
from viladiff.methods import METHODS
from viladiff.models.encoders.build import encoder_fingerprint, file_checksum
from viladiff.runs.config import RunConfig, method_presets, run_id
from viladiff.runs.job import DataFacts
from viladiff.text.embedding_bank import text_fingerprint
from viladiff.training.optim import total_steps


class Named(NamedTuple):
    """A run's name and what it is made of."""

    run_id: str
    fingerprints: dict[str, str]
    """Of data, text and, where a file is read, the encoder's first weights."""
    steps: int
    data: DataFacts | None = None


def data_facts(dataset: Dataset) -> DataFacts:
    """Return the facts of an opened data set that ``viladiff.training.feasibility`` asks for."""
    picture = tuple(dataset.val_images[0].shape[:2]) if dataset.uniform and len(dataset.val_images) else None
    return DataFacts(dataset.num_classes, len(dataset.unlabelled), any(dataset.captions), picture)


def fingerprints(cfg: RunConfig) -> dict[str, str]:
    """Return the fingerprints that ``viladiff.training.trainer.Trainer(cfg)`` computes. Raises ValueError as it does.

    Takes about a second; new or changed files of a data set are read as well.
    """
    return name_runs([cfg])[0].fingerprints


def weights_fingerprint(cfg: RunConfig) -> dict[str, str]:
    """Return the networks' initial weights: the encoder's, and the file of a method's frozen CLIP."""
    clip = getattr(getattr(cfg.method, "clip", None), "weights", None)
    beside = {"clip": file_checksum(Path(clip), "method.clip.weights")} if clip else {}
    return {**encoder_fingerprint(cfg.model), **beside}


def sizes_fingerprint(cfg: RunConfig) -> dict[str, str]:
    """Return what the data set makes of the method's sizes, which a run's name does not hold: they are defaults.

    Empty where it sets none. Earlier versions had other sizes under the same changed fields.
    """
    sizes = method_presets(cfg.data.dataset, cfg.method.name)
    return {"sizes": fingerprint("sizes", sorted(sizes.items()))} if sizes else {}


def scoring_precision(cfg: RunConfig) -> str:
    """Return the arithmetic in which a run's networks are scored: that of its training; fp32 on built-in data."""
    return "fp32" if cfg.data.dataset in embedded_datasets() else cfg.train.precision


def scoring_fingerprint(cfg: RunConfig) -> dict[str, str]:
    """Return ``scoring_precision`` where it is not fp32, in which earlier versions scored under the same fields."""
    found = scoring_precision(cfg)
    return {} if found == "fp32" else {"scoring": found}


def name_runs(configs: Iterable[RunConfig]) -> list[Named]:
    """Return the names that ``viladiff.training.trainer.Trainer`` gives, in order; render missing data.

    A labelled list and a file of weights are read once and, since the texts of a data set are the same under each of
    its lists, so is a bank of texts. Nothing is cached between calls: files may change. Raises ValueError for unusable
    inputs.
    """
    datasets: dict[object, tuple[Dataset, str]] = {}
    banks: dict[object, str] = {}
    weights: dict[object, dict[str, str]] = {}
    found = []
    for cfg in configs:
        data = cfg.data
        key = dataset_spec(cfg)
        if key not in datasets:
            opened = load_dataset(*key)
            datasets[key] = opened, fingerprint(opened.captions, opened.val_captions, opened.caption_source)
        dataset, words = datasets[key]
        kept = (data.captions_on, *(() if data.captions_on == "both" else (dataset.fingerprint,)))
        bank = (words, data.text_encoder, data.captions, kept, cfg.runtime.text_model)
        if bank not in banks:
            asked = data.text_encoder, data.captions
            banks[bank] = text_fingerprint(dataset, *asked, model=cfg.runtime.text_model, on=data.captions_on)
        files = (cfg.model.model_dump_json(), getattr(getattr(cfg.method, "clip", None), "weights", None))
        if files not in weights:
            weights[files] = weights_fingerprint(cfg)
        made = {**weights[files], **sizes_fingerprint(cfg), **scoring_fingerprint(cfg)}
        prints = {"data": dataset.fingerprint, "text": banks[bank], **made}
        steps = total_steps(cfg, dataset, METHODS[cfg.method.name].views.unlabelled)
        found.append(Named(run_id(cfg, prints), prints, steps, data_facts(dataset)))
    return found
