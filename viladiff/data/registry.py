"""Opens a data set by its name in the table ``viladiff.data.sources.DATASETS``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from viladiff.config.base import did_you_mean
from viladiff.config.sections import DataConfig, Sections
from viladiff.data.all_labelled import base_split, label_all
from viladiff.data.cache import fingerprint
from viladiff.data.captions.files import match, read_captions
from viladiff.data.dataset import Dataset
from viladiff.data.formats.pillow_file import limit_pixels
from viladiff.data.sources import DATASETS
from viladiff.data.splits import hold_out


class DatasetSpec(NamedTuple):
    """Everything that chooses a data set; the arguments of ``load_dataset``, in order."""

    name: str
    split: str
    split_seed: int | None = None
    root: str | None = None
    holdout: float = 0.0
    scored: str = "val"
    captions: str | None = None
    own: tuple[tuple[str, object], ...] = ()
    max_pixels: int | None = None


def dataset_spec(cfg: Sections) -> DatasetSpec:
    """Return the data set that a run asks for."""
    data = cfg.data
    own = tuple((name, getattr(data, name)) for name in type(data).model_fields if name not in DataConfig.model_fields)
    place, captions, most = cfg.runtime.data_root, cfg.runtime.captions, cfg.runtime.max_pixels
    return DatasetSpec(
        data.dataset, data.split, data.split_seed, place, data.holdout, cfg.eval.split, captions, own, most
    )


def load_dataset(
    name: str,
    split: str,
    split_seed: int | None = None,
    root: str | None = None,
    holdout: float = 0.0,
    scored: str = "val",
    captions: str | None = None,
    own: Mapping[str, object] | Iterable[tuple[str, object]] = (),
    max_pixels: int | None = None,
) -> Dataset:
    """Open a data set under one of its labelled splits; ``split_seed`` draws another labelled list of the same size.

    split: the name of a list, or "all" (``data.all_labelled``). root: where the files of a data set that is not
    built in are.
    holdout: see ``data.holdout``; those images are the validation set where ``scored`` is "holdout". captions: a file
    of captions in place of the data set's own. own: the fields that the section of the data set has beside those of all
    data sets, such as ``split_family``; its defaults where they are not given. max_pixels: ``runtime.max_pixels``,
    which holds for all that this process reads from here on. Raises ValueError for an unknown data set, split or field,
    for a cache that is damaged or cannot be written, and for files that cannot be used.
    """
    if name not in DATASETS:
        raise ValueError(
            f"data.dataset = {name!r}: unknown; allowed: {', '.join(DATASETS)}{did_you_mean(name, DATASETS)}"
        )
    limit_pixels(max_pixels)
    source, fields = DATASETS[name], dict(own)
    base = base_split(source, split, str(fields.get("split_family", "")))
    whole = source.load(source.section(dataset=name, split=base, split_seed=split_seed, **fields), root, scored)
    if base != split:
        whole = label_all(whole)
    if captions is not None:
        whole = with_captions(whole, captions)
    return hold_out(whole, holdout, scored == "holdout") if holdout else whole


def with_captions(dataset: Dataset, path: str) -> Dataset:
    """Return the data set with the captions of a file. Raises ValueError as ``read_captions`` and ``match``."""
    found = match(read_captions(path), *image_ids(dataset))
    return replace(
        dataset,
        captions=found.train,
        val_captions=found.val,
        caption_source=found.source,
        notes=(*dataset.notes, *found.notes),
        fingerprint=fingerprint("captions", dataset.fingerprint, found.train, found.val),
    )


def image_ids(dataset: Dataset) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the captions' ids of the pool and validation: ids of files, else ``train/0``, ``dev/0`` and on."""
    if dataset.files is not None and dataset.val_files is not None:
        return dataset.files.ids, dataset.val_files.ids
    sizes = {"train": len(dataset.images), dataset.scored: len(dataset.val_images)}
    train, val = (tuple(f"{part}/{i}" for i in range(size)) for part, size in sizes.items())
    return train, val
