"""The table of data sets. A data set is one file in this folder, one import and one entry here."""

from __future__ import annotations

from viladiff.data.sources.ade20k import ADE20K_SOURCE
from viladiff.data.sources.base import DataSource, EmbeddedSource
from viladiff.data.sources.cityscapes import CITYSCAPES_SOURCE
from viladiff.data.sources.coco import COCO_SOURCE
from viladiff.data.sources.digits import DENSE_SOURCE, DIGITS_SOURCE
from viladiff.data.sources.folder import FOLDER_SOURCE
from viladiff.data.sources.voc import VOC_SOURCE

DATASETS: dict[str, DataSource] = {
    "digits": DIGITS_SOURCE,
    "dense": DENSE_SOURCE,
    "voc": VOC_SOURCE,
    "cityscapes": CITYSCAPES_SOURCE,
    "coco": COCO_SOURCE,
    "ade20k": ADE20K_SOURCE,
    "folder": FOLDER_SOURCE,
}
"""By ``data.dataset``. The layout of a directory is the first one that fits, in this order."""


def embedded_datasets() -> tuple[str, ...]:
    """Names of the data sets that are rendered, which have parts ``dev`` and ``test`` and need no files."""
    return tuple(name for name, source in DATASETS.items() if isinstance(source, EmbeddedSource))
