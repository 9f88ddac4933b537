"""Pretraining data of the models behind a number, as far as their authors state it, and its overlap with the data set.

A small table, not a search: a model that is not in it is unknown, not free of overlap. The names are those of timm,
open_clip and of model hubs' directories.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from viladiff.runs.record import RunRecord


class Known(NamedTuple):
    """The pretraining data of models whose name matches."""

    pattern: str
    """Of their names, in lower case."""
    trained_on: str
    seen: dict[str, str] = {}  # noqa: RUF012, never changed
    """What of a data set of ours was among it."""


MODELS = (
    Known(
        r"radio",
        "by distillation from models of CLIP's kind, DINOv2 and SAM, on web images (AM-RADIO)",
        {name: "training images, without masks, through DINOv2" for name in ("voc", "cityscapes", "ade20k")},
    ),
    Known(
        r"dinov2|lvd142m",
        "LVD-142M: web images that resemble those of curated sets, without labels (DINOv2, table 15)",
        {name: "training images, without masks" for name in ("voc", "cityscapes", "ade20k")},
    ),
    Known(r"dinov3|lvd1689m", "LVD-1689M: web images and curated sets, without labels (DINOv3)"),
    Known(
        r"in2[12]k_ft_in1k|in12k_ft_in1k|augreg2?_in21k",
        "ImageNet-21k or -22k and, where fine-tuned, ImageNet-1k, with labels",
    ),
    Known(r"laion2b", "LAION-2B: image-text pairs of the web"),
    Known(r"laion400m", "LAION-400M: image-text pairs of the web"),
    Known(r"datacomp|dfn", "DataComp or DFN: filtered image-text pairs of the web"),
    Known(r"metaclip", "MetaCLIP: balanced image-text pairs of the web"),
    Known(r"webli|siglip", "WebLI: image-text pairs of the web, not published"),
    Known(r"openai|clip-vit-(base|large)-patch", "400 million image-text pairs of the web, not published (CLIP)"),
    Known(r"\bmae\b|\.dino\b|dino_", "ImageNet-1k, without labels"),
    Known(r"sa1b|\bsam\b|samvit", "SA-1B: photographs with masks of no class"),
    Known(r"in1k", "ImageNet-1k, with labels"),
)
"""Encoders of images or texts; the first that fits counts."""
CAPTIONERS = (
    Known(
        r"simulated",
        "nothing: they are told by the masks of all images, through stated rates of error",
        dict.fromkeys(("digits", "dense"), "all masks, of unlabelled images too: what is in an image, not where"),
    ),
    Known(
        r"blip-?2",
        "129 million image-text pairs: COCO, Visual Genome, CC3M, CC12M, SBU and a part of LAION-400M (BLIP-2); its "
        "image encoder, EVA-CLIP, besides ImageNet-21k, Object365 and ADE20K",
        {"coco": "training images with captions written by people", "ade20k": "training images, without masks"},
    ),
)
TEXT = (
    Known(r"^words$", "the captions of this data set's own training images"),
    Known(
        r"minilm",
        "1.17 billion pairs of sentences of the web, 828,395 of COCO's captions and 317,695 of Flickr 30k's among them",
        {"coco": "captions written by people; of which images is not said"},
    ),
)
UNKNOWN = "not known"


def pretraining_overlap(record: RunRecord) -> dict[str, str]:
    """Return the pretraining data of each model behind a run, and its overlap with the run's data set.

    Text models are listed only if they were used.
    """
    data = str(record.config.get("data.dataset"))
    found = {"Image encoder was trained on": _image(record, data)}
    if record.captions != "no captions" and record.config.get("data.captions", "own") not in ("none", "generic"):
        found["Captioner was trained on"] = _told(CAPTIONERS, record.captions, data)
        found["Text encoder was trained on"] = _told((*TEXT, *MODELS), record.text_encoder, data)
    return found


def _image(record: RunRecord, data: str) -> str:
    if record.pretrained == "none":
        return "nothing"
    if record.pretrained == "shipped":
        return "training digits and photographs of the built-in data sets, with the digit's name and without masks"
    return _told(MODELS, f"{record.pretrained} {record.encoder}", data)


def _told(table: tuple[Known, ...], name: str, data: str) -> str:
    known = next((one for one in table if re.search(one.pattern, name.lower())), None)
    if known is None:
        return UNKNOWN
    here = known.seen.get(data)
    return f"{known.trained_on}; of {data} it saw {here}" if here else known.trained_on
