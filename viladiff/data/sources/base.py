"""What a data set is to the rest of the project: its section, its files, and how they become a ``Dataset``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from viladiff.config.base import did_you_mean
from viladiff.config.sections import DataConfig
from viladiff.data.cache import Opened, fingerprint
from viladiff.data.dataset import Dataset
from viladiff.data.files.file_cache import Contents
from viladiff.data.files.images import FileImages, FileMasks, MaskEncoding
from viladiff.data.files.index import FileIndex, Layout
from viladiff.data.files.known_splits import identify_split, list_hash, missing_unlabelled, same_size, similarly_named
from viladiff.data.files.split_lists import Lists
from viladiff.data.splits import VISIBLE, resample

ALL = "all"
"""The split under which every training image with a mask is labelled."""
Presets = Mapping[str, Mapping[str, object]]
"""Defaults of other sections, by section and field."""


class Classes(NamedTuple):
    """Names of the classes by id, and what the pixels of masks stand for where they are not class ids."""

    names: tuple[str, ...]
    coding: MaskEncoding | None


class SourceFiles(NamedTuple):
    """What a reader of files finds: everything that ``Dataset`` needs but the pixels."""

    tree: FileIndex
    classes: Classes
    lists: Lists
    sources: tuple[Path | None, ...]
    """The file of each list; none for unlabelled images that are simply all others, and for all of a folder."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """An entry of ``DATASETS``: all that the rest of the project knows of a data set."""

    config: type[DataConfig]
    """Its section of a configuration, whose field ``dataset`` admits the name of the entry alone. The fields that it
    has of its own, beside those of ``DataConfig``, reach ``read`` and ``scan``."""
    num_classes: int | None = None
    """Classes with background, where they are known before any file is read."""
    largest: Mapping[str, str] = field(default_factory=dict)
    """The longest labelled list by ``data.split_family``, the first for families that are not named: it is opened in
    place of the split ``all``, since the pool is the same under each. Empty where ``all`` is a list as any other."""
    presets: Presets = field(default_factory=dict)
    """Defaults of other sections that depend on the data set."""
    method_presets: Mapping[str, object] = field(default_factory=dict)
    """Defaults of fields of methods, for those that have them: {path below ``method``: value}."""

    def section(self, **fields: object) -> Any:
        """Return the section with these fields, unvalidated, and its defaults. ValueError for an unknown field."""
        known = self.config.model_fields
        for name in fields:
            if name not in known:
                raise ValueError(
                    f"data.{name}: no such field of {known['dataset'].default!r}{did_you_mean(name, known)}"
                )
        construct: Callable[..., Any] = self.config.model_construct
        return construct(**fields)

    def load(self, data: Any, root: str | None, scored: str) -> Dataset:
        """Open the data set. data: its section, root: the directory of its files, scored: the part to score."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class EmbeddedSource(DataSource):
    """A data set that is rendered: it needs no files, has the parts ``dev`` and ``test`` for choices and results, and
    the masks of unlabelled images may be read by controls."""

    read: Callable[[Any, str], Dataset]
    """From the section and the part to score."""
    pixels: Callable[[], Opened]
    """Opens its arrays, which are rendered on first use."""

    def load(self, data: Any, root: str | None, scored: str) -> Dataset:
        return self.read(data, scored)


@dataclass(frozen=True, kw_only=True)
class FileSource(DataSource):
    """A data set of image and mask files below ``runtime.data_root``, with the part ``val`` for scores."""

    layout: Layout
    """Its folders, by which ``viladiff data`` detects it."""
    places: tuple[str, ...] = ("",)
    """Where below the root the folders may lie."""
    scan: Callable[[Path | str, Any], tuple[FileIndex, Classes]]
    """Files and classes, from the root and the section. Raises ValueError where they cannot be used."""
    read: Callable[[Path | str, Any], SourceFiles]
    """The same and the lists of ``data.split``."""

    def load(self, data: Any, root: str | None, scored: str) -> Dataset:
        if root is None:
            wanted = f"must be set to the directory that holds the data set {data.dataset!r}"
            raise ValueError(f"runtime.data_root: {wanted}")
        return load_files(data, self.read(root, data))


def pretrained(epochs: float) -> dict[str, dict[str, object]]:
    """Presets of data sets of photographs: an encoder that is pretrained on ImageNet, mixed precision (paper, section
    4.1), the length of training, which is UniMatch V2's for those that it has, and checkpoints by time alone, since one
    of 1.4 GB takes longer than 100 steps on a GPU."""
    model = {"encoder": "vit_base_patch16_224", "pretrained": "timm", "decoder_width": 128}
    return {
        "model": model,
        "train": {"epochs": epochs, "precision": "bf16"},
        "runtime": {"checkpoint_every": 0},
    }


MANY_CLASSES = 81
"""From this number of classes on (COCO's) MixE's denoiser is wider: 21 classes pass through 64 channels, 150 do not."""


def photograph_sizes(classes: int | None) -> dict[str, object]:
    """Sizes of ViLa and MixE for data sets of photographs (ours: the paper states none).

    On a ViT-B/16 at 512 x 512 the fields' own defaults make 0.2 % of the encoder's parameters. A folder's number of
    classes (None) is not known before it is read: it counts as few.
    """
    width = 128 if classes is not None and classes >= MANY_CLASSES else 64
    vila: dict[str, object] = {"vila.width": 384, "vila.heads": 6, "vila.depth": 2}
    return {**vila, "mixe.width": width, "mixe.depth": 4}


def split_names(config: type[DataConfig]) -> tuple[str, ...]:
    """Return the labelled lists that ``data.split`` names, without ``all``."""
    return tuple(name for name in get_args(config.model_fields["split"].annotation) if name != ALL)


def describe_lists(dataset: str, found: SourceFiles) -> tuple[str, tuple[str, ...]]:
    """Return which published list the labelled images are, or that they are none; and notes on possible confusion."""
    labelled, val = identify_split(found.lists.labelled), identify_split(found.lists.val)
    if labelled is None:
        size = len(found.lists.labelled)
        name = f"no published list: {size} images, SHA-256 {list_hash(found.lists.labelled)[:12]}"
        return name, tuple(same_size(dataset, size))
    notes = [*similarly_named(labelled), *missing_unlabelled(labelled, len(found.lists.unlabelled))]
    if val is None or (val.dataset, val.family) != (labelled.dataset, "val"):
        where = found.sources[2] or found.tree.root / found.tree.layout.val_images
        here = f"{where}: {len(found.lists.val)} images"
        notes.append(f"{here}, which are not the validation list of {labelled.dataset}; published scores are of that")
    return str(labelled), tuple(notes)


def load_files(data: DataConfig, found: SourceFiles) -> Dataset:
    """Load the files of a split; the pool is the labelled images, then the others.

    Files that are new or changed are read, and none is decoded but
    masks that ``data.split_seed`` looks at."""
    drawn, contents = "", Contents(found.tree.root)
    if data.split_seed is not None:
        found = found._replace(lists=resample(found.lists, found.tree.masks, data.split_seed, _shown(found, contents)))
        drawn = f", drawn with data.split_seed = {data.split_seed}"
    split_name, notes = describe_lists(data.dataset, found)
    lists, (names, coding) = found.lists, found.classes
    named, copies = files_fingerprint(data.dataset, found, contents)
    # Where nothing is declared, names stay as they were before the fields.
    pixels = found.tree.pixels
    named = named if pixels.plain else fingerprint("pixels", named, pixels[:3])
    files = found.tree.files((*lists.labelled, *lists.unlabelled))
    val = found.tree.files(lists.val)
    labelled = np.arange(len(lists.labelled))
    return Dataset(
        name=data.dataset,
        num_classes=len(names),
        class_names=names,
        images=FileImages(files.paths, found.tree.pixels),
        masks=FileMasks(files.masks, len(names), coding),
        val_images=FileImages(val.paths, found.tree.pixels),
        val_masks=FileMasks(val.masks, len(names), coding),
        labelled=labelled,
        unlabelled=np.arange(len(labelled), len(files)),
        captions=((),) * len(files),
        val_captions=((),) * len(val),
        fingerprint=named,
        contents=contents,
        pixels=pixels,
        caption_source="no captions",
        uniform=False,
        files=files,
        val_files=val,
        split_name=split_name + drawn,
        notes=(*found.tree.notes, *notes, *copies, *found.tree.unused_note()),
        unused=found.tree.unused_note(),
    )


def _shown(found: SourceFiles, contents: Contents) -> Callable[[str], np.ndarray]:
    """Which classes the mask of an image shows, (C,) bool."""
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
