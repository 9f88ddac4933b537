"""Image tags: the classes that an image's captions mention, by name alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from viladiff.data.captions.simulated import Captions, Control, Images
from viladiff.data.captions.words import split_words

if TYPE_CHECKING:
    from viladiff.data.dataset import Dataset

UNNAMED = "background"
"""The class that no caption names."""
LONGEST = 3
"""Words that a name may be spread over in a caption, as "dining table" is the class diningtable."""
UNKNOWN = -1.0


def caption_tags(captions: Captions, class_names: Sequence[str]) -> np.ndarray:
    """Return (N, C) float32: 1 for a class that an image's texts name, 0 for one that they do not, -1 if unknown.

    A name matches whole words in a row, run together or apart, in any case, also in its plural (s, es). Synonyms (a
    man, for the class person) do not match. ``background`` is unknown, and so is any class of an image without a text.
    """
    places = {_joined(f"{name}{end}"): c for end in ("es", "s", "") for c, name in enumerate(class_names)}
    longest = max([LONGEST, *(len(split_words(name)) for name in class_names)])
    found = np.zeros((len(captions), len(class_names)), np.float32)
    for row, texts in zip(found, captions, strict=True):
        for words in map(split_words, texts):
            runs = ("".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1))
            row[[places[run] for run in runs if run in places]] = 1
    found[[not texts for texts in captions]] = UNKNOWN
    found[:, [name.lower() == UNNAMED for name in class_names]] = UNKNOWN
    return found


def dataset_tags(dataset: Dataset, control: Control = "own", on: Images = "both") -> np.ndarray:
    """Return ``caption_tags`` of the training pool's captions under a control, as methods read them."""
    return caption_tags(tuple(dataset.caption_table("train", control, on=on).values()), dataset.class_names)


def _joined(name: str) -> str:
    return "".join(split_words(name))
