"""Published lists of images, identified by a hash of their images, so that a run names the list it trained on.

The lists themselves are not part of the project. Hashes and overlaps were computed from the files of the repositories
named below; order, line ends, folders and second column of a list do not matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from viladiff.core.hashing import sha256_hex

_UNIMATCH = "UniMatch, UniMatch V2, AllSpark, CorrMatch, SemiVL"
_CPS = "CPS, PS-MT, UniMatch, AllSpark, CorrMatch"
_U2PL = "U2PL, DDFP; u2pl_* of UniMatch and AllSpark; PS-MT's with a 0 appended"
_CITY = "CPS, PS-MT, UniMatch, UniMatch V2, AllSpark, CorrMatch, SemiVL"
_COCO = "PseudoSeg, UniMatch, UniMatch V2, AllSpark, CorrMatch, SemiVL"


class Published(NamedTuple):
    """One list: the data set and family that it belongs to, its usual name, and who uses it."""

    dataset: str
    family: str
    """As ``data.split_family`` where that exists; ``val`` and ``train`` for whole sets."""
    split: str
    size: int
    sha256: str
    """First 16 hexadecimal digits of ``list_hash``."""
    used_by: str

    def __str__(self) -> str:
        family = "" if self.family == self.split else f" {self.family}"
        return f"{self.dataset}{family} {self.split} ({self.size} images; {self.used_by})"


LISTS = (
    Published("voc", "hq", "92", 92, "124b0aab2fcd1767", f"{_UNIMATCH}, U2PL, DDFP, PseudoSeg, CPS, PS-MT"),
    Published("voc", "hq", "183", 183, "79b959bccf7753cd", f"{_UNIMATCH}, U2PL, DDFP, PseudoSeg, CPS, PS-MT"),
    Published("voc", "hq", "366", 366, "f0e702c687e2ba71", f"{_UNIMATCH}, U2PL, DDFP, PseudoSeg, CPS, PS-MT"),
    Published("voc", "hq", "732", 732, "8c23014f512884b9", f"{_UNIMATCH}, U2PL, DDFP"),
    Published("voc", "hq", "1464", 1464, "129f1fe991729b18", f"{_UNIMATCH}, U2PL, DDFP, PS-MT"),
    Published("voc", "pseudoseg", "732", 732, "1c27978cdf510174", "PseudoSeg, CPS, PS-MT"),
    Published("voc", "pseudoseg", "16_clean_14", 92, "4343386598d07b0b", "PseudoSeg"),
    Published("voc", "pseudoseg", "16_clean_20", 92, "89c08fc17f50ff6e", "PseudoSeg"),
    Published("voc", "aug_cps", "662", 662, "baa85754594fcd33", _CPS),
    Published("voc", "aug_cps", "1323", 1323, "c9ca45b4e688d408", _CPS),
    Published("voc", "aug_cps", "2646", 2646, "fd0e8dca3dac524c", _CPS),
    Published("voc", "aug_cps", "5291", 5291, "5338f277730143e0", "CPS, PS-MT, AllSpark"),
    Published("voc", "aug_u2pl", "662", 662, "feea4692738362e4", _U2PL),
    Published("voc", "aug_u2pl", "1323", 1323, "23921931a21324cf", _U2PL),
    Published("voc", "aug_u2pl", "2646", 2646, "d35f7cd4b4815e1d", _U2PL),
    Published("voc", "aug_u2pl", "5291", 5291, "aacb97f26e9468b4", "U2PL, DDFP; PS-MT's 52910"),
    Published("voc", "train", "train", 10582, "855dff350b7f447b", "official and augmented training images"),
    Published("voc", "val", "val", 1449, "6f8edc37993764f6", "all"),
    Published("cityscapes", "cps", "100", 100, "c4164038958f8c8e", _UNIMATCH),
    Published("cityscapes", "cps", "186", 186, "1e5363dd012cdc46", _CITY),
    Published("cityscapes", "cps", "372", 372, "6b3b52bab110157a", _CITY),
    Published("cityscapes", "cps", "744", 744, "6856046a4415296a", _CITY),
    Published("cityscapes", "cps", "1488", 1488, "2b3183629a3a9f1a", _CITY.replace(" CorrMatch,", "")),
    Published("cityscapes", "u2pl", "186", 186, "f20f7c7dea9c3a2e", "U2PL, DDFP"),
    Published("cityscapes", "u2pl", "372", 372, "f13edf481be983d5", "U2PL, DDFP"),
    Published("cityscapes", "u2pl", "744", 744, "7d0cfd6f5390d26d", "U2PL, DDFP"),
    Published("cityscapes", "u2pl", "1488", 1488, "c6122be0439bfc0d", "U2PL, DDFP"),
    Published("cityscapes", "train", "train", 2975, "356596e69da79ecb", "all"),
    Published("cityscapes", "val", "val", 500, "9e85f1e65cf6030b", "all"),
    Published("coco", "pseudoseg", "232", 232, "7a80d0605a2a4383", _COCO),
    Published("coco", "pseudoseg", "463", 463, "d89f8cf50e276af3", _COCO),
    Published("coco", "pseudoseg", "925", 925, "92eb3929f14c6eab", _COCO),
    Published("coco", "pseudoseg", "1849", 1849, "67e1fa5b00095d68", _COCO),
    Published("coco", "pseudoseg", "3697", 3697, "3410484b25372201", _COCO),
    Published("coco", "val", "val", 5000, "3b4ea1d567a37f2d", "all"),
    Published("ade20k", "semivl", "158", 158, "008a3b7ab2b3f1bf", "SemiVL"),
    Published("ade20k", "unimatch_v2", "316", 316, "a18f9332ac059d5f", "UniMatch V2, SemiVL"),
    Published("ade20k", "unimatch_v2", "631", 631, "4a2428d73c5eea47", "UniMatch V2"),
    Published("ade20k", "semivl", "632", 632, "d71b54f2bc52bca0", "SemiVL; UniMatch V2's 631 and one more"),
    Published("ade20k", "unimatch_v2", "1263", 1263, "d8fe7e5e32582782", "UniMatch V2, SemiVL"),
    Published("ade20k", "unimatch_v2", "2526", 2526, "dda7634ecffd1e2e", "UniMatch V2, SemiVL"),
    Published("ade20k", "unimatch_v2", "5052", 5052, "6b91b27c9fdc7ad8", "UniMatch V2"),
    Published("ade20k", "unimatch_v2", "10105", 10105, "8301d71e4b6e65d7", "UniMatch V2"),
    Published("ade20k", "dual_teacher", "631", 631, "ffc5b22997b0cf98", "Dual Teacher"),
    Published("ade20k", "dual_teacher", "1263", 1263, "d85c8ee54d5995c7", "Dual Teacher"),
    Published("ade20k", "dual_teacher", "2526", 2526, "810d1c6b05fa9f97", "Dual Teacher"),
    Published("ade20k", "dual_teacher", "5052", 5052, "ab50addd9dd40600", "Dual Teacher"),
    Published("ade20k", "dual_teacher", "10105", 10105, "70595da32237bee9", "Dual Teacher"),
    Published("ade20k", "train", "train", 20210, "5812d1749bb33a21", "all"),
    Published("ade20k", "val", "val", 2000, "ea1c90a7ccd457dd", "all"),
)
IN_COMMON = {
    frozenset(("8c23014f512884b9", "1c27978cdf510174")): 371,
    frozenset(("baa85754594fcd33", "feea4692738362e4")): 43,
    frozenset(("c9ca45b4e688d408", "23921931a21324cf")): 172,
    frozenset(("fd0e8dca3dac524c", "d35f7cd4b4815e1d")): 666,
    frozenset(("5338f277730143e0", "aacb97f26e9468b4")): 2690,
    frozenset(("1e5363dd012cdc46", "f20f7c7dea9c3a2e")): 8,
    frozenset(("6b3b52bab110157a", "f13edf481be983d5")): 48,
    frozenset(("6856046a4415296a", "7d0cfd6f5390d26d")): 182,
    frozenset(("2b3183629a3a9f1a", "c6122be0439bfc0d")): 720,
    frozenset(("4a2428d73c5eea47", "ffc5b22997b0cf98")): 18,
    frozenset(("d8fe7e5e32582782", "d85c8ee54d5995c7")): 65,
    frozenset(("dda7634ecffd1e2e", "810d1c6b05fa9f97")): 302,
    frozenset(("6b91b27c9fdc7ad8", "ab50addd9dd40600")): 1258,
    frozenset(("8301d71e4b6e65d7", "70595da32237bee9")): 5070,
}
"""Images that two lists of one data set and name share, by their hashes."""
_BY_HASH = {one.sha256: one for one in LISTS}


def stem(image: str) -> str:
    """Return the part of an image's name that the repositories' lists share: no folder, suffix or Cityscapes ending."""
    return PurePosixPath(image).name.partition(".")[0].removesuffix("_leftImg8bit")


def list_hash(images: Iterable[str]) -> str:
    """Return the SHA-256 of the sorted stems, joined by newlines; images: ids, names or paths in any order."""
    return sha256_hex("\n".join(sorted({stem(image) for image in images})))


def identify_split(images: Iterable[str]) -> Published | None:
    """Return the published list of exactly these images, if any."""
    return _BY_HASH.get(list_hash(images)[:16])


def similarly_named(found: Published) -> list[str]:
    """Return a sentence for each other list of the same data set and name."""
    return [
        f"{found} has a look-alike: {other} shares {IN_COMMON[frozenset((found.sha256, other.sha256))]} of its images; "
        "scores on the two are not comparable"
        for other in LISTS
        if other != found and (other.dataset, other.split) == (found.dataset, found.split)
    ]


def missing_unlabelled(found: Published, unlabelled: int) -> list[str]:
    """Return a warning if the unlabelled images are not all others of the training set, as in most papers."""
    whole = (one.size for one in LISTS if (one.dataset, one.family) == (found.dataset, "train"))
    return [
        f"{unlabelled} unlabelled images; the training set has {size - found.size} beside {found}"
        for size in whole
        if unlabelled != size - found.size
    ]


def same_size(dataset: str, size: int) -> list[str]:
    """Return a sentence for each published list that has as many images as an unknown one."""
    return [
        f"{size} labelled images, as {one} has, but other ones: this is not that list"
        for one in LISTS
        if (one.dataset, one.size) == (dataset, size)
    ]
