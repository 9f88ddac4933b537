"""The built-in data sets ``digits`` and ``dense``: scenes of ``viladiff.data.scenes`` with simulated captions."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from viladiff.config.sections import DataConfig
from viladiff.core.progress import counter
from viladiff.data.cache import Facts, Opened, cache_dir, fingerprint, open_or_make
from viladiff.data.captions.simulated import SIMULATED, Captions, CaptionSource, simulate
from viladiff.data.dataset import Dataset
from viladiff.data.scenes import MATERIAL, REVISION, SCENES, SEED, Part, SceneRecipe, render, scene_kind
from viladiff.data.sources.base import ALL, EmbeddedSource, Presets, split_names
from viladiff.data.splits import classes_present, labelled_order, split_size

CLASS_NAMES = ("background", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
POOL = 4000
"""Training images of each built-in data set."""
DIGITS = SceneRecipe()
DENSE = SceneRecipe(objects=(4, 8), height=(12, 22), overlap=0.2, shadow=(0.0, 0.25))


class Variant(NamedTuple):
    """A recipe and how many scenes of it there are."""

    recipe: SceneRecipe
    train: int
    dev: int
    test: int

    def sizes(self) -> dict[Part, int]:
        """Return the number of scenes of each part in the cache."""
        return {"train": self.train, "dev": self.dev, "test": self.test}


VARIANTS = {"digits": Variant(DIGITS, POOL, 600, 1000), "dense": Variant(DENSE, POOL, 600, 1000)}


class EmbeddedData(DataConfig):
    """The rendered data sets: small images, no mirroring (a mirrored digit is none), words as text."""

    batch_labelled: int = Field(8, ge=1)
    batch_unlabelled: int = Field(8, ge=1)
    crop: int = Field(48, ge=16)
    scale: tuple[float, float] = (0.9, 1.1)
    hflip: float = Field(0.0, ge=0, le=1)
    text_encoder: Literal["words", "minilm", "open_clip", "transformers"] = "words"
    caption_recall: float = Field(0.85, ge=0, le=1)
    """Probability that a visible class is noticed; what is noticed at one rate is noticed at every higher one."""
    caption_false: float = Field(0.02, ge=0, le=1)
    """Probability that a class that is absent is noticed all the same."""
    caption_synonyms: float = Field(0.0, ge=0, le=1)
    """Probability that a class goes by its synonym in an image's captions, a word that no class is called. ``words``
    learns one vector a word, so that 0 and 1 differ in no more than the name of each word."""

    @field_validator("split", mode="before")
    @classmethod
    def _fits_the_pool(cls, split: object) -> object:
        if isinstance(split, str) and split.isascii() and split.isdigit() and int(split) > POOL:
            allowed = ", ".join((*split_names(cls), ALL))
            raise ValueError(f"{split!r} asks for more labelled images than the pool of {POOL} has; allowed: {allowed}")
        return split


class DigitsData(EmbeddedData):
    dataset: Literal["digits"] = "digits"
    split: Literal["92", "183", "366", "732", "1464", "all"] = "183"


class DenseData(EmbeddedData):
    dataset: Literal["dense"] = "dense"
    split: Literal["232", "463", "925", "1849", "all"] = "463"


def variant_fingerprint(name: str) -> str:
    """Hash recipe, revision, seed, sizes and material of a variant: its pixels, without rendering them."""
    variant = VARIANTS[name]
    return fingerprint("scenes", name, REVISION, SEED, asdict(variant.recipe), variant.sizes(), MATERIAL)


def open_pixels(name: str) -> Opened:
    """Open the arrays images, masks (the pool), dev_images, dev_masks, test_images, test_masks of a variant.

    Rendered on first use, which takes seconds.

    Checked on every use. Raises ValueError for a damaged or unwritable cache.
    """
    return open_or_make(cache_dir() / name / variant_fingerprint(name), functools.partial(_fill, name))


def load_scenes(data: EmbeddedData, scored: str) -> Dataset:
    """Return the scenes of ``data.dataset``, their labelled list and captions; validation images are ``dev``'s, or
    of ``test`` where ``scored`` says so. Raises ValueError for an unknown split, and as ``open_pixels``."""
    name = data.dataset
    part: Part = "test" if scored == "test" else "dev"
    source = replace(
        SIMULATED, recall=data.caption_recall, false_mention=data.caption_false, synonyms=data.caption_synonyms
    )
    arrays = open_pixels(name).arrays
    images, masks, val_masks = arrays["images"], arrays["masks"], arrays[f"{part}_masks"]
    size = split_size(name, data.split, split_names(type(data)), len(images))
    present = classes_present(masks, len(CLASS_NAMES))
    order = labelled_order(name, present, data.split_seed)
    captions = _captions(name, "train", present, source)
    val_captions = _captions(name, part, classes_present(val_masks, len(CLASS_NAMES)), source)
    return Dataset(
        name=name,
        num_classes=len(CLASS_NAMES),
        class_names=CLASS_NAMES,
        images=images,
        masks=masks,
        val_images=arrays[f"{part}_images"],
        val_masks=val_masks,
        labelled=order[:size],
        unlabelled=order[size:],
        captions=captions,
        val_captions=val_captions,
        fingerprint=fingerprint(variant_fingerprint(name), data.split, order[:size].tolist(), captions, val_captions),
        caption_source=str(source),
        scored=part,
    )


def _captions(name: str, part: Part, present: np.ndarray, source: CaptionSource) -> Captions:
    scenes = [SCENES[scene_kind(name, part, index)] for index in range(len(present))]
    return simulate(present, scenes, CLASS_NAMES, name, part, source=source)


def _fill(name: str, directory: Path) -> Facts:
    recipe, sizes = VARIANTS[name].recipe, VARIANTS[name].sizes()
    done, total = 0, sum(sizes.values())
    with counter(f"rendering {name}", True) as advance:
        for part, count in sizes.items():
            prefix = "" if part == "train" else f"{part}_"
            shape = (count, recipe.side, recipe.side)
            images, masks = np.empty((*shape, 3), np.uint8), np.empty(shape, np.uint8)
            for index in range(count):
                images[index], masks[index] = render(recipe, name, part, index)
                done += 1
                advance(done, total)
            np.save(directory / f"{prefix}images.npy", images, allow_pickle=False)
            np.save(directory / f"{prefix}masks.npy", masks, allow_pickle=False)
    return {"variant": name, "revision": REVISION, **{str(part): count for part, count in sizes.items()}}


_PRESETS: Presets = {
    "optim": {"lr": 6e-3, "encoder_lr_scale": 0.2, "warmup_steps": 30},
    "eval": {"split": "dev"},
}
"""Fixed with ``supervised`` and ``semibaseline``, before ViLaDiff was trained with them: docs/experiments.md."""


def _source(config: type[EmbeddedData], largest: str) -> EmbeddedSource:
    return EmbeddedSource(
        config=config,
        num_classes=len(CLASS_NAMES),
        largest={"": largest},
        presets=_PRESETS,
        read=load_scenes,
        pixels=functools.partial(open_pixels, config.model_fields["dataset"].default),
    )


DIGITS_SOURCE = _source(DigitsData, "1464")
DENSE_SOURCE = _source(DenseData, "1849")
