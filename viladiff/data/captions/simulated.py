"""Captions of the built-in data sets, made from the masks by a simulated captioner with stated error rates.

They name an image's classes and never their position, size or number, so they are extra, weak supervision; every result
made with them has to say so (``CaptionSource``). ``CaptionTable`` holds captions of any source and makes the controls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from viladiff.core import keyed_random
from viladiff.data.cache import fingerprint

Captions = tuple[tuple[str, ...], ...]
"""Per image, one text per prompt."""
Control = Literal["own", "shuffled", "generic", "none"]
Images = Literal["both", "labelled", "unlabelled"]
"""Images of the pool that have their captions; the others have no words."""

PROMPTS = ("A photo of", "A photo contains")
"""The paper's two prompts (section 3.2)."""
GENERIC = "A photo of something."
SYNONYMS = {
    "zero": "nought",
    "one": "ace",
    "two": "pair",
    "three": "trio",
    "four": "quartet",
    "five": "quintet",
    "six": "sextet",
    "seven": "septet",
    "eight": "octet",
    "nine": "nonet",
}
"""Another word for each class that captions name; none of them is a class's name."""
_BEHIND = {"building": "in front of a building", "flowers": "in front of flowers"}


@dataclass(frozen=True)
class CaptionSource:
    """The captioner and its error rates: per image, both prompts share what was noticed."""

    name: str
    recall: float
    """Probability that a class that is visible is noticed."""
    false_mention: float
    """Probability that a class that is absent is noticed all the same."""

    synonyms: float = 0.0
    """Probability that a class goes by its synonym in the captions of an image."""

    def __str__(self) -> str:
        more = f", synonyms {self.synonyms:g}" if self.synonyms else ""
        return f"{self.name} (recall {self.recall:g}, false mentions {self.false_mention:g} a class{more})"


SIMULATED = CaptionSource("simulated captions", recall=0.85, false_mention=0.02)


def simulate(
    present: np.ndarray,
    scenes: Sequence[str],
    class_names: Sequence[str],
    *key: keyed_random.Part,
    source: CaptionSource = SIMULATED,
) -> Captions:
    """Write one caption per prompt and image, drawn by (``key``, number of the image).

    present: (N, C) bool, the classes that the truth shows; class 0 is background and is never named. scenes: per image,
    the scene of its photograph, which is always right if anything is noticed.
    """
    return tuple(
        describe(row, scene, class_names, *key, index, source=source)
        for index, (row, scene) in enumerate(zip(present, scenes, strict=True))
    )


def describe(
    present: np.ndarray,
    scene: str,
    class_names: Sequence[str],
    *key: keyed_random.Part,
    source: CaptionSource = SIMULATED,
) -> tuple[str, str]:
    """Write the texts of both prompts from the classes (C,) bool, the scene and the key alone.

    The texts depend on no position or size. Each visible class is noticed with probability ``source.recall`` and each
    absent one with ``source.false_mention``, once for both prompts. The first names at most two of those noticed and
    the scene, the second all of them, each in an order of its own draw. A class is replaced by its synonym with
    probability ``source.synonyms``, in both prompts alike. Draws do not depend on the rates: a class noticed, or
    renamed, at one rate is so at every higher rate. Raises ValueError if a class that is to be renamed has no
    synonym.
    """
    rng = keyed_random.numpy_generator("caption", *key)
    noticed = rng.random(len(present)) < np.where(present, source.recall, source.false_mention)
    noticed[0] = False
    orders = rng.permutation(len(present)), rng.permutation(len(present))
    names = _renamed(class_names, source.synonyms, *key) if source.synonyms else class_names
    few, all_of_them = ([_with_article(names[c]) for c in order if noticed[c]] for order in orders)
    if not few:
        return f"{PROMPTS[0]} something", f"{PROMPTS[1]} something"
    return f"{PROMPTS[0]} {_listed(few[:2])} {_BEHIND[scene]}", f"{PROMPTS[1]} {_listed(all_of_them)}"


def _renamed(class_names: Sequence[str], share: float, *key: keyed_random.Part) -> list[str]:
    chosen = keyed_random.numpy_generator("caption synonyms", *key).random(len(class_names)) < share
    chosen[0] = False
    if lacking := [name for name, renamed in zip(class_names, chosen, strict=True) if renamed and name not in SYNONYMS]:
        raise ValueError(f"data.caption_synonyms = {share:g}: no synonym is known of {', '.join(lacking)}")
    return [SYNONYMS[name] if renamed else name for name, renamed in zip(class_names, chosen, strict=True)]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiu' or noun == 'octet' else 'a'} {noun}"


def _listed(things: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(things[:-1]), things[-1]]))


class CaptionTable(Mapping[str, tuple[str, ...]]):
    """Texts by image id, one per prompt; the order of the ids is part of the table."""

    def __init__(self, texts: Mapping[str, Sequence[str]], source: str) -> None:
        self._texts = {image: tuple(lines) for image, lines in texts.items()}
        self.source = source

    def __getitem__(self, image: str) -> tuple[str, ...]:
        return self._texts[image]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def hash(self) -> str:
        """Return 16 hexadecimal digits that name ids and texts."""
        return fingerprint("captions", list(self._texts.items()))

    def variant(self, control: Control, seed: int = 0) -> CaptionTable:
        """Return the table for a control experiment.

        own: as it is. shuffled: along one random cycle through all images, so none keeps its own. generic: one
        sentence for all. none: no text. Raises ValueError for another name, and for shuffling fewer than two images.
        """
        images = list(self._texts)
        if control == "own":
            return self
        if control == "shuffled":
            return CaptionTable(dict(zip(images, self._deranged(seed), strict=True)), f"{self.source}, shuffled")
        if control == "generic":
            return CaptionTable(dict.fromkeys(images, (GENERIC,)), "one generic sentence for all")
        if control == "none":
            return CaptionTable(dict.fromkeys(images, ()), "no text")
        raise ValueError(f"data.captions = {control!r}: allowed: {', '.join(get_args(Control))}")

    def silenced(self, images: Iterable[str]) -> CaptionTable:
        """Return the table without texts for these images."""
        dropped = frozenset(images)
        texts = {image: () if image in dropped else lines for image, lines in self._texts.items()}
        return CaptionTable(texts, self.source)

    def _deranged(self, seed: int) -> list[tuple[str, ...]]:
        if len(self) < 2:
            raise ValueError(f"data.captions = 'shuffled': needs two images at least, there are {len(self)}")
        cycle = keyed_random.numpy_generator("shuffled captions", seed).permutation(len(self))
        giver = np.empty_like(cycle)
        giver[cycle] = np.roll(cycle, 1)
        texts = list(self._texts.values())
        return [texts[i] for i in giver]
