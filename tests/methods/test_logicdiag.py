"""LogicDiag (reimpl.): rules, diagnoses and paths by brute force over all states, and its loss in NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from method_kit import CLASSES, STEP, cross_entropy_map, make, make_batch, make_uneven, mixed

from viladiff.data.batch import Batch
from viladiff.data.sources import DATASETS
from viladiff.data.sources.digits import CLASS_NAMES
from viladiff.data.sources.voc import CLASS_NAMES as VOC_NAMES
from viladiff.data.transforms.mixing import box_mask
from viladiff.methods.logicdiag import LogicDiag, _nodes
from viladiff.models.baselines.class_hierarchy import (
    FLOOR,
    KNOWN,
    conflicts,
    diagnose,
    known_groups,
    node_cross_entropy,
    parents,
)
from viladiff.models.blocks import upsample
from viladiff.models.segmenter import NetworkFactory
from viladiff.runs.config import RunConfig, override

GROUPS = ("a", "b", "b", "c", "c")
TOY = ("x", "x", "y", "y", "y", "z")


def ready(**changes: object) -> tuple[LogicDiag, Batch]:
    method = make_uneven("logicdiag", **{"groups": GROUPS} | changes)
    assert isinstance(method, LogicDiag)
    return method, make_batch(views=method.required_views())


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def rules(groups: tuple[str, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Every rule as (kind, nodes): classes are 0 .. C-1, groups C .. C+S-1, the root C+S; the consequent comes last."""
    names, count = list(dict.fromkeys(groups)), len(groups)
    root = count + len(names)
    found: list[tuple[str, tuple[int, ...]]] = []
    for k, name in enumerate(groups):
        found.append(("composition", (k, count + names.index(name))))
    families = [[k for k, other in enumerate(groups) if other == name] for name in names]
    for s, family in enumerate(families):
        found.append(("decomposition", (count + s, *family)))
    tops = [count + s for s in range(len(names))]
    found.append(("decomposition", (root, *tops)))
    for family in [*families, tops]:
        found += [("exclusion", pair) for pair in itertools.combinations(family, 2)]
    return found


def truth(kind: str, nodes: tuple[int, ...], s: np.ndarray) -> float:
    """Reichenbach's; ``s`` has the root, 1, at its end."""
    if kind == "composition":
        return float(1 - s[nodes[0]] + s[nodes[0]] * s[nodes[1]])
    if kind == "decomposition":
        return float(1 - s[nodes[0]] + s[nodes[0]] * s[list(nodes[1:])].max())
    return float(1 - s[nodes[0]] * s[nodes[1]])


def paths(groups: tuple[str, ...]) -> np.ndarray:
    """(C, C + S) the states of all nodes on each class's path."""
    names = list(dict.fromkeys(groups))
    out = np.zeros((len(groups), len(groups) + len(names)), int)
    for k, name in enumerate(groups):
        out[k, k] = out[k, len(groups) + names.index(name)] = 1
    return out


@pytest.mark.parametrize("groups", [TOY, GROUPS, ("any",) * 4, ("a", "b", "c")], ids=str)
def test_states_that_break_no_rule_are_the_paths(groups: tuple[str, ...]) -> None:
    count = len(groups) + len(set(groups))
    consistent = {
        state
        for state in itertools.product((0, 1), repeat=count)
        if all(truth(kind, nodes, np.array([*state, 1])) == 1 for kind, nodes in rules(groups))
    }
    assert consistent == {tuple(path) for path in paths(groups).tolist()} and len(consistent) == len(groups)


@pytest.mark.parametrize("groups", [TOY, GROUPS, ("any",) * 4, ("a", "b", "c")], ids=str)
def test_conflict_of_a_node_is_the_mean_over_the_rules_it_stands_in(groups: tuple[str, ...]) -> None:
    gen = torch.Generator().manual_seed(1)
    count, nodes = len(groups), len(groups) + len(set(groups))
    s = torch.rand(2, nodes, 2, 3, generator=gen).double()
    found = torch.cat(conflicts(*s.split([count, nodes - count], 1), parents(groups)), 1).numpy()
    for i, y, x in np.ndindex(2, 2, 3):
        here = np.append(s[i, :, y, x].numpy(), 1.0)
        for v in range(nodes):
            mine = [1 - truth(kind, rule, here) for kind, rule in rules(groups) if v in rule]
            assert found[i, v, y, x] == pytest.approx(np.mean(mine), abs=1e-12)


@pytest.mark.parametrize("conflict_weight", [0.0, 1.0, 2.5])
def test_paths_are_weighed_as_all_consistent_states_one_by_one(conflict_weight: float) -> None:
    """Σ log κ over what is believed, Σ log(1 - κ) + γ log(ε + C) over what is not, up to one number a pixel."""
    gen = torch.Generator().manual_seed(2)
    z = 2 * torch.randn(2, 9, 4, 4, generator=gen).double()
    parent = parents(TOY)
    found = diagnose(z, parent, conflict_weight).double().numpy()
    s = sigmoid(z.numpy())
    degree = torch.cat(conflicts(*torch.from_numpy(s).split([6, 3], 1), parent), 1).numpy()
    changed = 0
    for i, y, x in np.ndindex(2, 4, 4):
        here, c = s[i, :, y, x], degree[i, :, y, x]
        observed = (here > 0.5).astype(int)
        kappa = np.where(observed, here, 1 - here)
        scores = []
        for path in paths(TOY):
            wrong = path != observed
            scores.append(
                np.log(kappa[~wrong]).sum() + (np.log(1 - kappa) + conflict_weight * np.log(FLOOR + c))[wrong].sum()
            )
        expected = np.array(scores)
        np.testing.assert_allclose(
            found[i, :, y, x] - found[i, :, y, x].max(), expected - expected.max(), rtol=1e-4, atol=1e-4
        )
        changed += found[i, :, y, x].argmax() != here[:6].argmax()
    assert changed > 3


def test_a_group_decides_between_classes_that_are_nearly_equal() -> None:
    """Two classes claim the pixel; the sure group of one of them settles it, against the slightly higher score."""
    z = torch.full((1, 9, 1, 1), -4.0)
    z[0, [0, 3, 7], 0, 0] = torch.tensor([1.1, 1.0, 3.0])
    assert diagnose(z, parents(TOY), 1.0).argmax(1).item() == 3
    z[0, 7], z[0, 6] = -4.0, 3.0
    assert diagnose(z, parents(TOY), 1.0).argmax(1).item() == 0


def test_node_loss_is_minus_the_log_of_the_path_s_probability() -> None:
    gen = torch.Generator().manual_seed(3)
    z = 3 * torch.randn(2, 8, 3, 4, generator=gen)
    target = torch.randint(0, CLASSES, (2, 3, 4), generator=gen)
    target[0, 0] = 255
    found = node_cross_entropy(z, target, parents(GROUPS)).numpy()
    s = sigmoid(z.double().numpy())
    for i, y, x in np.ndindex(2, 3, 4):
        label = int(target[i, y, x])
        wanted = paths(GROUPS)[label % CLASSES]
        bce = -(wanted * np.log(s[i, :, y, x]) + (1 - wanted) * np.log(1 - s[i, :, y, x])).sum()
        assert found[i, y, x] == pytest.approx(0.0 if label == 255 else bce, rel=1e-5)


@pytest.mark.parametrize("revise", [True, False])
def test_loss_in_numpy(revise: bool) -> None:
    method, batch = ready(**{"revise": revise, "pseudo.weight": 0.7, "pseudo.threshold": 0.6, "conflict_weight": 1.5})
    losses = method(batch, STEP)
    inside = box_mask(batch.mix[0].boxes, *batch.valid.shape[-2:])
    strong = torch.where(inside[:, None], batch.strong[0][[1, 0, 3, 2]], batch.strong[0])
    with torch.no_grad():
        z = _nodes(method.teacher, method.teacher_groups, batch.weak[0])
        alone = z[:, :CLASSES]
        scores = upsample(diagnose(z, method.parent, 1.5) if revise else alone, batch.valid.shape[-2:])
        logits = upsample(_nodes(method.student, method.groups, torch.cat([batch.image, strong])), (32, 32))
    p, before = scores.softmax(1).numpy(), upsample(alone, (32, 32)).argmax(1).numpy()
    revised = p.argmax(1) != before
    assert (0.02 < revised.mean() < 0.98) == revise
    valid, cut = batch.valid.numpy(), inside.numpy()
    assert losses.terms["revised"] == pytest.approx((revised * valid).sum() / valid.sum(), abs=1e-6)
    labels, accepted, seen = (mixed(x, cut) for x in (p.argmax(1), p.max(1) >= 0.6, valid))
    assert 0.05 < accepted.mean() < 0.95
    s, target = sigmoid(logits[:4].double().numpy()), batch.target.numpy()
    wanted = np.moveaxis(paths(GROUPS)[np.where(target == 255, 0, target)], -1, 1)
    bce = -(wanted * np.log(s) + (1 - wanted) * np.log(1 - s)).sum(1)
    sup = bce[target != 255].mean()
    pseudo = (cross_entropy_map(logits[4:, :CLASSES].numpy(), labels) * accepted * seen).sum() / seen.sum()
    assert losses.terms["sup"] == pytest.approx(sup, rel=1e-4)
    assert losses.terms["pseudo"] == pytest.approx(pseudo, rel=1e-4)
    assert losses.terms["coverage"] == pytest.approx((accepted * seen).sum() / seen.sum(), rel=1e-5)
    assert losses.total.item() == pytest.approx((sup + 0.7 * pseudo) / 2, rel=1e-4)


def test_groups_have_a_teacher_of_their_own_that_follows() -> None:
    method, batch = ready(**{"teacher.momentum": 0.9})
    method(batch, STEP).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher_groups.parameters())
    assert all(p.grad.abs().sum() > 0 for p in method.groups.parameters())
    before = [p.clone() for p in method.teacher_groups.parameters()]
    with torch.no_grad():
        for p in method.groups.parameters():
            p.add_(1.0)
    method.after_step(STEP._replace(index=10_000))
    for old, new, mine in zip(before, method.teacher_groups.parameters(), method.groups.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * mine)


def test_labels_that_are_measured_are_those_that_teach() -> None:
    method, batch = ready()
    found = method.pseudo_labels(batch.weak[0], None, batch.keys_u, STEP)
    changed = (found["before"].argmax(1) != found["after"].argmax(1)) & batch.valid
    share = changed.sum() / batch.valid.sum()
    assert 0 < share < 1 and method(batch, STEP).terms["revised"] == pytest.approx(float(share), abs=1e-6)


@pytest.mark.parametrize("dataset", KNOWN)
def test_known_hierarchies_put_every_class_into_one_group(dataset: str) -> None:
    count = DATASETS[dataset].num_classes
    assert count is not None
    assert sorted(label for labels in KNOWN[dataset].values() for label in labels) == list(range(count))
    found = known_groups(dataset, count)
    assert found is not None and len(found) == count and set(found) == set(KNOWN[dataset])
    numbers = parents(found)
    assert sorted(set(numbers.tolist())) == list(range(len(KNOWN[dataset])))
    assert [found[k] == found[0] for k in range(count)] == (numbers == numbers[0]).tolist()


def test_hierarchies_name_the_classes_that_they_mean() -> None:
    voc = dict(zip(VOC_NAMES, known_groups("voc", 21) or (), strict=True))
    assert [name for name, group in voc.items() if group == "animal"] == ["bird", "cat", "cow", "dog", "horse", "sheep"]
    assert voc["train"] == voc["aeroplane"] == "vehicle" and voc["tvmonitor"] == voc["sofa"] == "indoor"
    assert voc["person"] == "person" and voc["background"] == "background"
    digits = dict(zip(CLASS_NAMES, known_groups("digits", 11) or (), strict=True))
    assert [name for name, group in digits.items() if group == "straight"] == ["one", "four", "seven"]
    assert [name for name, group in digits.items() if group == "both"] == ["two", "five"]
    assert [len(labels) for labels in KNOWN["coco"].values()] == [1, 1, 8, 5, 10, 5, 10, 7, 10, 6, 6, 5, 7]


def built(dataset: str, classes: int, **changes: object) -> LogicDiag:
    fields = {f"method.{name}": value for name, value in changes.items()}
    cfg = override(RunConfig(), {"method.name": "logicdiag", "model.pretrained": "none", **fields})
    return LogicDiag(cfg.method, NetworkFactory(cfg.model, classes, 12, dataset))


def test_groups_are_those_of_the_data_set_or_given_or_one_with_a_message() -> None:
    known = built("digits", 11)
    assert known.notes() == () and known.groups.fine.out_channels == 4
    given = built("folder", 5, groups="sky, thing, thing, ground, ground")
    assert given.notes() == () and given.parent.tolist() == [0, 1, 1, 2, 2]
    (note,) = built("folder", 5).notes()
    assert "folder" in note and "method.groups" in note and built("folder", 5).parent.tolist() == [0] * 5
    with pytest.raises(ValueError, match=r"method\.groups = 'a, b'.*2 words.*5 classes"):
        built("folder", 5, groups=("a", "b"))


def test_it_is_called_a_reconstruction() -> None:
    assert LogicDiag.paper is not None and "reimpl." in LogicDiag.paper.title
    assert make("logicdiag").notes() != ()
