"""What classes are called in text: a class is known by one or several words or short phrases, its concepts."""

from __future__ import annotations

import re
from collections.abc import Sequence

BACKGROUND = (
    *("sky", "cloud", "wall", "building", "house", "window", "door", "roof", "floor", "ceiling", "stairs", "fence"),
    *("tree", "grass", "leaves", "flowers", "forest", "field", "ground", "sand", "rock", "mountain", "snow", "water"),
    *("sea", "river", "lake", "beach", "road", "street", "pavement", "bridge", "railway", "platform", "curtain"),
    *("carpet", "bed", "shelf", "cupboard", "lamp", "picture frame", "sign", "paper", "cloth", "background"),
)
"""Things and surfaces that photographs show and VOC has no class for; ours, as many as SemiVL's list has."""
APART = {
    "aeroplane": ("aeroplane", "airplane"),
    "diningtable": ("dining table",),
    "motorbike": ("motorbike", "motorcycle"),
    "pottedplant": ("potted plant",),
    "tvmonitor": ("television", "computer monitor"),
}
"""Names of VOC as people write them."""


def concepts(class_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The concepts of each class: its name in words; of ``background``, a list without what is a class here."""
    plain = [re.sub(r"[\s_-]+", " ", name).strip().lower() for name in class_names]
    named = [APART.get(name, (name,)) for name in plain]
    taken = {text for name, texts in zip(plain, named, strict=True) if name != "background" for text in texts}
    return tuple(
        tuple(text for text in BACKGROUND if text not in taken) if name == "background" else texts
        for name, texts in zip(plain, named, strict=True)
    )
