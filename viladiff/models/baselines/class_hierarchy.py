"""Classes in groups, and the logic of contradicting predictions (reconstruction of LogicDiag).

A tree of three levels: the root, which holds, groups, and classes. Its rules: a class implies its group (composition),
a group one of its classes and the root one of the groups (decomposition), and of siblings no two hold (exclusion). The
states that break no rule are the C paths from the root to a class. Scores are s = sigmoid(z); truth values are
Reichenbach's: 1 - s_c + s_c s_p, 1 - s_p + s_p max s_c, 1 - s_a s_b.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from viladiff.data.batch import IGNORE

Groups = Mapping[str, tuple[int, ...]]
"""Classes by the name of their group."""

FLOOR = 1e-3
"""Added to the degree of conflict, so that a node without any can still be doubted."""

VOC: Groups = {
    "background": (0,),
    "person": (15,),
    "animal": (3, 8, 10, 12, 13, 17),
    "vehicle": (1, 2, 4, 6, 7, 14, 19),
    "indoor": (5, 9, 11, 16, 18, 20),
}
CITYSCAPES: Groups = {
    "flat": (0, 1),
    "construction": (2, 3, 4),
    "object": (5, 6, 7),
    "nature": (8, 9),
    "sky": (10,),
    "human": (11, 12),
    "vehicle": (13, 14, 15, 16, 17, 18),
}
COCO: Groups = {
    "background": (0,),
    "person": (1,),
    "vehicle": tuple(range(2, 10)),
    "outdoor": tuple(range(10, 15)),
    "animal": tuple(range(15, 25)),
    "accessory": tuple(range(25, 30)),
    "sports": tuple(range(30, 40)),
    "kitchen": tuple(range(40, 47)),
    "food": tuple(range(47, 57)),
    "furniture": tuple(range(57, 63)),
    "electronic": tuple(range(63, 69)),
    "appliance": tuple(range(69, 74)),
    "indoor": tuple(range(74, 81)),
}
"""The official super-categories; classes in the order of their official numbers, without gaps, after background."""
DIGITS: Groups = {"background": (0,), "curved": (1, 4, 7, 9, 10), "straight": (2, 5, 8), "both": (3, 6)}
"""By strokes: 0, 3, 6, 8, 9 are curves, 1, 4, 7 straight lines, 2 and 5 have both. Class k + 1 is digit k.

An arbitrary grouping: digits have no kinds, people write them in different strokes, and odd against even, or open
against closed, would be as good. It was chosen because the strokes can be seen, and before anything was trained.
"""
KNOWN: Mapping[str, Groups] = {"digits": DIGITS, "dense": DIGITS, "voc": VOC, "cityscapes": CITYSCAPES, "coco": COCO}


def known_groups(dataset: str, num_classes: int) -> tuple[str, ...] | None:
    """Return the name of each class's group, or None if no grouping of that data set is known."""
    if dataset not in KNOWN:
        return None
    name = {label: group for group, labels in KNOWN[dataset].items() for label in labels}
    return tuple(name[label] for label in range(num_classes))


def parents(groups: tuple[str, ...]) -> Tensor:
    """Return (C,) int64 the number of each class's group, in the order in which the names first occur."""
    order = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    return torch.tensor([order[name] for name in groups])


def node_cross_entropy(logits: Tensor, target: Tensor, parent: Tensor) -> Tensor:
    """Return (B, H, W) nats, - log P(path of the label): the sum of all nodes' binary cross-entropies; 0 at label 255.

    ``logits`` (B, C + S, H, W) of classes and then groups, ``target`` (B, H, W) int64, ``parent`` (C,). With path π it
    is the sum of softplus(z) - π z.
    """
    known = target != IGNORE
    label = torch.where(known, target, 0)
    path = torch.stack([label, len(parent) + parent[label]], 1)
    z = logits.float()
    return (F.softplus(z).sum(1) - z.gather(1, path).sum(1)) * known


def conflicts(classes: Tensor, groups: Tensor, parent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean degree of conflict, 1 - truth, of each node's rules: (U, C, h, w), (U, S, h, w).

    From scores of classes (U, C, h, w) and groups (U, S, h, w), in time and memory of these maps, since a node's
    exclusions add up to s_a (sum of its siblings' s). That a group implies the root is always true, and no rule here.
    """
    above, size = (
        groups[:, parent],
        torch.zeros_like(groups[0, :, 0, 0]).index_add(0, parent, torch.ones_like(parent, dtype=groups.dtype)),
    )
    index = parent.view(1, -1, 1, 1).expand_as(classes)
    total = torch.zeros_like(groups).index_add(1, parent, classes)
    highest = torch.zeros_like(groups).scatter_reduce(1, index, classes, "amax")
    up = classes * (1 - above)
    down = groups * (1 - highest)
    rootless = 1 - groups.amax(1, keepdim=True)
    of_class = up + down[:, parent] + classes * (total[:, parent] - classes)
    of_group = torch.zeros_like(groups).index_add(1, parent, up) + down + rootless
    of_group = of_group + groups * (groups.sum(1, keepdim=True) - groups)
    size = size[:, None, None]
    return of_class / (size[parent] + 1), of_group / (size + len(size) + 1)


def diagnose(logits: Tensor, parent: Tensor, conflict_weight: float) -> Tensor:
    """Score of each class's path, up to a number that is common to a pixel's paths: (U, C, h, w).

    ``logits`` (U, C + S, h, w). Each node is observed to hold or not, at s = 1/2. A path's diagnosis is the set of
    nodes observed otherwise; its score is the sum of log P(node as on the path), and of ``conflict_weight`` times
    log(conflict + FLOOR) over the diagnosis: cheap is to change what is unsure and in conflict. A path differs from no
    class at all in two nodes, so all C are weighed exactly by C + S terms. Counted of an image with 94 nodes on a grid
    of 128 x 128: 35 MB at most, beside the 6 MB that come in.
    """
    z = logits.float()
    classes, groups = z.sigmoid().tensor_split([len(parent)], 1)
    conflict = torch.cat(conflicts(classes, groups, parent), 1)
    # From not holding to holding: log s - log(1 - s) = z, and the conflict_weight is gained or saved.
    gain = z - torch.where(z > 0, 1.0, -1.0) * conflict_weight * (conflict + FLOOR).log()
    return gain[:, : len(parent)] + gain[:, len(parent) :][:, parent]
