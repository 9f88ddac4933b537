"""The table of data sets, and the loading of one by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import NamedTuple

import numpy as np

from viladiff.config.base import did_you_mean
from viladiff.config.sections import DataConfig, Sections
from viladiff.data.cache import fingerprint
from viladiff.data.captions.files import match, read_captions
from viladiff.data.captions.table import SIMULATED, Captions, CaptionSource, simulate
from viladiff.data.dataset import Dataset
from viladiff.data.files.contents import Contents
from viladiff.data.files.images import FileImages, FileMasks
from viladiff.data.sources.ade20k import open_ade20k
from viladiff.data.sources.cityscapes import open_cityscapes
from viladiff.data.sources.coco import open_coco
from viladiff.data.sources.digits import CLASS_NAMES, SCENES, Part, open_pixels, scene_kind, variant_fingerprint
from viladiff.data.sources.folder import SourceFiles, describe_lists, open_folder
from viladiff.data.sources.voc import open_voc
from viladiff.data.splits import (
    VISIBLE,
    base_split,
    classes_present,
    hold_out,
    label_all,
    labelled_order,
    resample,
    split_size,
)


class DatasetSpec(NamedTuple):
    """Everything that chooses a data set; the arguments of ``load``, in order."""

    name: str
    split: str
    split_seed: int | None = None
    root: str | None = None
    split_dir: str | None = None
    holdout: float = 0.0
    scored: str = "val"
    family: str = ""
    reduce_zero_label: bool = True
    captions: str | None = None
    simulated: CaptionSource = SIMULATED


def dataset_spec(cfg: Sections) -> DatasetSpec:
    """Return the data set that a run asks for."""
    data = cfg.data
    return DatasetSpec(
        data.dataset,
        data.split,
        data.split_seed,
        cfg.runtime.data_root,
        getattr(data, "split_dir", None),
        data.holdout,
        cfg.eval.split,
        getattr(data, "split_family", ""),
        getattr(data, "reduce_zero_label", True),
        cfg.runtime.captions,
        _simulated(data),
    )


def _simulated(data: DataConfig) -> CaptionSource:
    """Return the captioner's rates of the embedded data sets; other data sets have no such fields."""
    rates = {"recall": "caption_recall", "false_mention": "caption_false", "synonyms": "caption_synonyms"}
    return replace(SIMULATED, **{name: getattr(data, path) for name, path in rates.items() if hasattr(data, path)})


def load_dataset(
    name: str,
    split: str,
    split_seed: int | None = None,
    root: str | None = None,
    split_dir: str | None = None,
    holdout: float = 0.0,
    scored: str = "val",
    family: str = "",
    reduce_zero_label: bool = True,
    captions: str | None = None,
    simulated: CaptionSource = SIMULATED,
) -> Dataset:
    """Open a data set under one of its labelled splits; ``split_seed`` draws another labelled list of the same size.

    split: the name of a list, or "all" (``label_all``). root and split_dir: where the files and the lists of a data set
    that is not embedded are. holdout: see ``data.holdout``; those images are the validation set where ``scored`` is
    "holdout". family: which of several published lists of that size. reduce_zero_label: see ``data.ade20k``. captions:
    a file of captions in place of the data set's own. simulated: who writes those of an embedded data set. Raises
    ValueError for an unknown data set or split, for a cache that is damaged or cannot be written, and for files that
    cannot be used.
    """
    if name not in READERS:
        raise ValueError(
            f"data.dataset = {name!r}: unknown; allowed: {', '.join(READERS)}{did_you_mean(name, READERS)}"
        )
    asked = DatasetSpec(name, split, split_seed, root, split_dir, holdout, scored, family, reduce_zero_label, captions)
    asked = asked._replace(simulated=simulated)
    whole = READERS[name](asked._replace(split=base_split(name, split, family)))
    if base_split(name, split, family) != split:
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


def _embedded(asked: DatasetSpec) -> Dataset:
    name, split, split_seed = asked[:3]
    scored: Part = "test" if asked.scored == "test" else "dev"
    arrays = open_pixels(name).arrays
    images, masks, val_masks = arrays["images"], arrays["masks"], arrays[f"{scored}_masks"]
    size = split_size(name, split, len(images))
    present = classes_present(masks, len(CLASS_NAMES))
    order = labelled_order(name, present, split_seed)
    captions = _captions(name, "train", present, asked.simulated)
    val_captions = _captions(name, scored, classes_present(val_masks, len(CLASS_NAMES)), asked.simulated)
    return Dataset(
        name=name,
        num_classes=len(CLASS_NAMES),
        class_names=CLASS_NAMES,
        images=images,
        masks=masks,
        val_images=arrays[f"{scored}_images"],
        val_masks=val_masks,
        labelled=order[:size],
        unlabelled=order[size:],
        captions=captions,
        val_captions=val_captions,
        fingerprint=fingerprint(variant_fingerprint(name), split, order[:size].tolist(), captions, val_captions),
        caption_source=str(asked.simulated),
        scored=scored,
    )


def _captions(name: str, part: Part, present: np.ndarray, source: CaptionSource) -> Captions:
    scenes = [SCENES[scene_kind(name, part, index)] for index in range(len(present))]
    return simulate(present, scenes, CLASS_NAMES, name, part, source=source)


def _folder(asked: DatasetSpec) -> Dataset:
    return _of_files(asked, open_folder(_root(asked), asked.split, asked.split_dir))


def _voc(asked: DatasetSpec) -> Dataset:
    return _of_files(asked, open_voc(_root(asked), asked.split, asked.family or "hq", asked.split_dir))


def _root(asked: DatasetSpec) -> str:
    if asked.root is None:
        raise ValueError(f"runtime.data_root: must be set to the directory that holds the data set {asked.name!r}")
    return asked.root


def _of_files(asked: DatasetSpec, found: SourceFiles) -> Dataset:
    """Build a data set from files, the pool being the labelled images, then the others.

    Files that are new or changed are read, and none is decoded but the masks that ``data.split_seed`` needs.
    """
    drawn, contents = "", Contents(found.tree.root)
    if asked.split_seed is not None:
        found = found._replace(lists=resample(found.lists, found.tree.masks, asked.split_seed, _shown(found, contents)))
        drawn = f", drawn with data.split_seed = {asked.split_seed}"
    split_name, notes = describe_lists(asked.name, found)
    lists, (names, coding) = found.lists, found.classes
    named, copies = files_fingerprint(asked.name, found, contents)
    files = found.tree.files((*lists.labelled, *lists.unlabelled))
    val = found.tree.files(lists.val)
    labelled = np.arange(len(lists.labelled))
    return Dataset(
        name=asked.name,
        num_classes=len(names),
        class_names=names,
        images=FileImages(files.paths),
        masks=FileMasks(files.masks, len(names), coding),
        val_images=FileImages(val.paths),
        val_masks=FileMasks(val.masks, len(names), coding),
        labelled=labelled,
        unlabelled=np.arange(len(labelled), len(files)),
        captions=((),) * len(files),
        val_captions=((),) * len(val),
        fingerprint=named,
        contents=contents,
        caption_source="no captions",
        uniform=False,
        files=files,
        val_files=val,
        split_name=split_name + drawn,
        notes=(*found.tree.notes, *notes, *copies),
    )


def _shown(found: SourceFiles, contents: Contents) -> Callable[[str], np.ndarray]:
    """Return a function from an image to the classes of its mask, (C,) bool."""
    count = len(found.classes.names)

    def shown(name: str) -> np.ndarray:
        return contents.mask(found.tree.masks[name], count, found.classes.coding).counts[:count] >= VISIBLE

    return shown


def files_fingerprint(name: str, found: SourceFiles, contents: Contents) -> tuple[str, list[str]]:
    """Hash lists, classes and each file by its name and all of its bytes; return it with notes.

    Masks of unlabelled images are left out and not read, so that the hash is the same whether they exist or not. A note
    says that training images are validated on.
    """
    lists, (names, coding) = found.lists, found.classes
    ids = [one for part in lists for one in part]
    used = [one for part in (lists.labelled, lists.val) for one in part]
    digests = contents.digests([*(found.tree.images[one] for one in ids), *(found.tree.masks[one] for one in used)])
    images, masks = digests[: len(ids)], digests[len(ids) :]
    palette = coding and astuple(coding)[:2]
    copies = _copies(dict(zip(ids, images, strict=True)), lists.val)
    return fingerprint("contents", name, lists, images, masks, names, palette), copies


def _copies(digests: dict[str, str], val: Sequence[str]) -> list[str]:
    """Return a warning if validation images have the bytes of training images; digests: of all, by id."""
    apart = {*val}
    trained = {digest: name for name, digest in digests.items() if name not in apart}
    both = [(name, trained[digests[name]]) for name in val if digests[name] in trained]
    if not both:
        return []
    first = "{!r} (as {!r})".format(*both[0])
    return [f"{len(both)} validation images are training images under another name, first {first}: scores are too high"]


def _cityscapes(asked: DatasetSpec) -> Dataset:
    return _of_files(asked, open_cityscapes(_root(asked), asked.split, asked.family or "cps", asked.split_dir))


def _coco(asked: DatasetSpec) -> Dataset:
    return _of_files(asked, open_coco(_root(asked), asked.split, asked.split_dir))


def _ade20k(asked: DatasetSpec) -> Dataset:
    return _of_files(asked, open_ade20k(_root(asked), asked.split, asked.reduce_zero_label, asked.split_dir))


READERS: dict[str, Callable[[DatasetSpec], Dataset]] = {
    "digits": _embedded,
    "dense": _embedded,
    "folder": _folder,
    "voc": _voc,
    "cityscapes": _cityscapes,
    "coco": _coco,
    "ade20k": _ade20k,
}
