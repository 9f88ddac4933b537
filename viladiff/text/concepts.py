"""Names of classes in text: each class has one or several words or short phrases, its concepts.

``PUBLISHED`` has SemiVL's lists as they are in its repository (google-research/semivl 13ee65d,
``model/text_embeddings.py``, VOC's fourth and Cityscapes' third), spelling included, since its text vectors are of
these very words. On COCO and ADE20K SemiVL takes each class's name alone, that of the background too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BACKGROUND = (
    *("sky", "cloud", "wall", "building", "house", "window", "door", "roof", "floor", "ceiling", "stairs", "fence"),
    *("tree", "grass", "leaves", "flowers", "forest", "field", "ground", "sand", "rock", "mountain", "snow", "water"),
    *("sea", "river", "lake", "beach", "road", "street", "pavement", "bridge", "railway", "platform", "curtain"),
    *("carpet", "bed", "shelf", "cupboard", "lamp", "picture frame", "sign", "paper", "cloth", "background"),
)
"""Things and surfaces that photographs show and few data sets have a class for; ours, where nothing is published."""
_VOC = (
    "background; bed; building; cabinet; ceiling; curtain; door; fence; floor; grass; ground; mountain; road; rock; "
    "shelves; sidewalk; sky; snow; tree; wall; water; window; hang glider; helicopter; jet ski; go-cart; tractor; "
    "emergency vehicle; lorry; truck; lion; stool; bench; wheelchair; coffee table; queue; side table; picnic bench; "
    "wolve; flowers in a vase; goat; tram; laptop; advertising display; vehicle interior",
    "aeroplane; airplane; glider",
    "bicycle; tricycle; unicycle",
    "bird",
    "boat; ship; rowing boat; pedalo",
    "bottle; plastic bottle; glass bottle; feeding bottle",
    "bus; minibus",
    "car; van; large family car; realistic toy car",
    "cat; domestic cat",
    "chair; armchair; deckchair",
    "cow",
    "dining table; table for eating at",
    "dog; domestic dog",
    "horse; pony; donkey; mule",
    "motorbike; moped; scooter; sidecar",
    "person; people; baby; face",
    "potted plant; indoor plant in a pot; outdoor plant in a pot",
    "sheep",
    "sofa",
    "train; train carriage",
    "tv; monitor; standalone screen",
)
_CITYSCAPES = (
    "road; street; parking space",
    "sidewalk",
    "building; skyscaper; house; bus stop building; garage; car port; scaffolding",
    "individual standing wall, which is not part of a building",
    "fence; hole in fence",
    "pole; sign pole; traffic light pole",
    "traffic light",
    "traffic sign; parking sign; direction sign",
    "vegetation; tree; hedge",
    "terrain; grass; soil; sand",
    "sky",
    "person; pedestrian; walking person; standing person; person sitting on the ground; person sitting on a bench; "
    "person sitting on a chair",
    "rider; cyclist; motorcyclist",
    "car; jeep; SUV; van",
    "truck; box truck; pickup truck; truck trailer",
    "bus",
    "train; tram",
    "motorcycle; moped; scooter",
    "bicycle",
)
PUBLISHED = {
    dataset: tuple(tuple(line.split("; ")) for line in lines)
    for dataset, lines in {"voc": _VOC, "cityscapes": _CITYSCAPES}.items()
}
"""By data set, the concepts of each class in the order of its numbers."""
NAME_ALONE = ("coco", "ade20k")
"""Data sets whose classes have no concept but their names."""
READ_AS_MEAN = ("cityscapes",)
"""Data sets of which SemiVL's decoder reads the mean of a class's concepts; of the others, the class's name."""
APART = {
    "aeroplane": ("aeroplane", "airplane"),
    "diningtable": ("dining table",),
    "motorbike": ("motorbike", "motorcycle"),
    "pottedplant": ("potted plant",),
    "tvmonitor": ("television", "computer monitor"),
}
"""Names of VOC as people write them, for masks in folders with these names."""


def concepts(class_names: Sequence[str], dataset: str = "") -> tuple[tuple[str, ...], ...]:
    """Return the concepts of each class: those published for ``dataset``, or its name in words.

    For ``background`` of another data set, a list without its other classes.
    """
    published = PUBLISHED.get(dataset, ())
    if len(published) == len(class_names):
        return published
    plain = [_plain(name) for name in class_names]
    if dataset in NAME_ALONE:
        return tuple((name,) for name in plain)
    named = [APART.get(name, (name,)) for name in plain]
    taken = {text for name, texts in zip(plain, named, strict=True) if name != "background" for text in texts}
    return tuple(
        tuple(text for text in BACKGROUND if text not in taken) if name == "background" else texts
        for name, texts in zip(plain, named, strict=True)
    )


def names(class_names: Sequence[str], dataset: str = "") -> tuple[tuple[str, ...], ...]:
    """Return the texts of each class whose mean SemiVL's decoder reads: its name, or on Cityscapes its concepts."""
    return concepts(class_names, dataset) if dataset in READ_AS_MEAN else tuple((_plain(x),) for x in class_names)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()
