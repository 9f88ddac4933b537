"""PseudoSeg against straight-line NumPy: its maps, their spread, the fused labels, each loss; and what trains what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_kit import CLASSES, SIDE, STEP, cross_entropy_map, make_batch, make_uneven, mean_over, softmax

from viladiff.core import keyed_random
from viladiff.data.batch import Batch
from viladiff.data.transforms.mixing import square_boxes
from viladiff.methods.pseudoseg import PseudoSeg, fuse, soft_cross_entropy
from viladiff.models.baselines.grad_cam import Sgc, attention, class_maps, spread_maps, tag_loss, tagged
from viladiff.models.blocks import upsample

WIDTH = 8


def ready(**changes: object) -> tuple[PseudoSeg, Batch]:
    method = make_uneven("pseudoseg", **{"width": WIDTH} | changes)
    assert isinstance(method, PseudoSeg)
    return method, make_batch(views=method.required_views())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sgc_in_numpy(head: Sgc, features: list[np.ndarray], present: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Logits (B, C, h, w) one image, class and token at a time; ``counted`` (B, h, w)."""
    own = {name: value.detach().double().numpy() for name, value in head.state_dict().items()}
    out = []
    for third, top, tags, may in zip(*features[-2:], present, counted, strict=True):
        height, width = top.shape[-2:]
        maps = []
        for weight, there in zip(own["tag.weight"], tags, strict=True):
            found = np.maximum(0, np.tensordot(weight, top, 1)) * there
            maps.append(found / found.max() if found.max() > 0 else found)
        tokens = np.concatenate([third, top]).reshape(-1, height * width)
        query, key = (own[f"{n}.weight"][:, :, 0, 0] @ tokens + own[f"{n}.bias"][:, None] for n in ("query", "key"))
        scores = np.where(may.reshape(-1), query.T @ key / np.sqrt(WIDTH), -1e9)
        flat = np.reshape(maps, (len(maps), -1))
        rows = softmax(scores)
        s = np.stack([[rows[n] @ m + m[n] for n in range(height * width)] for m in flat])
        s = np.concatenate([2 - s.max(0, keepdims=True), s])
        z = own["score.0.weight"][:, :, 0, 0] @ s + own["score.0.bias"][:, None]
        z = (z - z.mean()) / np.sqrt(z.var() + 1e-5)
        z = z * own["score.1.weight"][:, None] + own["score.1.bias"][:, None]
        out.append(z.reshape(-1, height, width))
    return np.stack(out)


def fused_in_numpy(z: np.ndarray, a: np.ndarray, temperature: float) -> np.ndarray:
    out = []
    for one, other in zip(z, a, strict=True):
        scale = np.sqrt((np.stack([one, other]) ** 2).mean() + 1e-8)
        p = (softmax(one[None] / scale) + softmax(other[None] / scale))[0] / 2
        p = p ** (1 / temperature)
        out.append(p / p.sum(0))
    return np.stack(out)


def test_map_of_a_class_is_grad_cam_of_the_tag_over_its_highest() -> None:
    """Against the gradient itself, a class at a time."""
    top, weight, bias = noise(2, 7, 3, 4).requires_grad_(), noise(4, 7, seed=1), noise(4, seed=2)
    present = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]])
    with torch.no_grad():
        weight[3] = 0.0
        found = class_maps(top, weight, present)
    for k in range(4):
        score = top.mean((2, 3)) @ weight[k] + bias[k]
        (gradient,) = torch.autograd.grad(score.sum(), top)
        alpha = gradient.mean((2, 3))
        cam = torch.einsum("bd,bdhw->bhw", alpha, top.detach()).relu() * present[:, k, None, None]
        highest = cam.amax((1, 2))
        for i in range(2):
            expected = cam[i] / highest[i] if highest[i] > 0 else torch.zeros(3, 4)
            torch.testing.assert_close(found[i, k], expected)
    assert found[0, 0].max() == 1 and (found[0, 1] == 0).all() and (found[:, 3] == 0).all()


def test_tokens_read_none_in_padding_and_their_rows_sum_to_one() -> None:
    counted = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    a = attention(noise(2, WIDTH, 2, 3), noise(2, WIDTH, 2, 3, seed=1), counted)
    assert (a[0, :, 4:] == 0).all() and (a[0, :, :4] > 0).all()
    torch.testing.assert_close(a.sum(2), torch.ones(2, 6))
    torch.testing.assert_close(a[1], torch.full((6, 6), 1 / 6)), "nothing valid: still a number"
    maps = noise(2, 3, 2, 3, seed=2).abs()
    found = spread_maps(maps, a)
    expected = maps[0, 1].flatten() + torch.stack([row @ maps[0, 1].flatten() for row in a[0]])
    torch.testing.assert_close(found[0, 2].flatten(), expected)
    torch.testing.assert_close(found[:, 0], 2 - found[:, 1:].amax(1))


def test_fused_label_in_numpy_and_no_image_depends_on_another() -> None:
    z, a = 30 * noise(3, CLASSES, 4, 5), noise(3, CLASSES, 4, 5, seed=1)
    for temperature in (1.0, 0.5, 0.02):
        found = fuse(z, a, temperature)
        np.testing.assert_allclose(
            found, fused_in_numpy(z.double().numpy(), a.double().numpy(), temperature), 1e-3, 1e-6
        )
        torch.testing.assert_close(found.sum(1), torch.ones(3, 4, 5))
    torch.testing.assert_close(fuse(z[1:2], a[1:2], 0.5), fuse(z, a, 0.5)[1:2])
    assert torch.equal(fuse(z, a, 0.5).argmax(1), fuse(z, a, 1.0).argmax(1)), "sharpening changes no label"
    assert (fuse(z, a, 0.5).amax(1) > fuse(z, a, 1.0).amax(1)).all()


def test_soft_cross_entropy_in_numpy() -> None:
    z, p = noise(2, CLASSES, 3, 4), noise(2, CLASSES, 3, 4, seed=1).softmax(1)
    expected = -(p.double().numpy() * np.log(softmax(z.double().numpy()))).sum(1)
    np.testing.assert_allclose(soft_cross_entropy(z, p), expected, 1e-5)


def test_tags_come_from_masks_and_a_picture_without_a_label_tells_nothing() -> None:
    target = torch.tensor([[[0, 2], [2, 255]], [[0, 0], [0, 0]], [[255, 255], [255, 255]]])
    found = tagged(target, CLASSES)
    assert found.present.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found.known.tolist() == [True, True, False]
    scores = noise(3, CLASSES - 1)
    p = 1 / (1 + np.exp(-scores.double().numpy()))
    bce = -np.where(found.present.numpy() > 0, np.log(p), np.log(1 - p))
    assert tag_loss(scores, found) == pytest.approx(bce[:2].mean(), rel=1e-5)


def test_squares_are_within_the_crop_and_nowhere_in_particular() -> None:
    boxes = square_boxes([keyed_random.numpy_generator("square", i) for i in range(400)], 32, 100 / 513)
    assert boxes.min() == 0 and boxes.max() == 32
    assert ((boxes[:, 2:] - boxes[:, :2]) == 6).all()
    assert len(boxes.unique(dim=0)) > 250 and not (boxes[:, 0] == boxes[:, 1]).all()
    assert square_boxes([keyed_random.numpy_generator(0)], 32, 0.0).tolist() == [[0, 0, 0, 0]]


def test_loss_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = ready(**{"pseudo.weight": 0.7, "pseudo.temperature": 0.4, "pseudo.threshold": 0.5, "cutout": 0.3})
    batch.target[1] = torch.where(batch.target[1] == 3, 255, batch.target[1])
    batch.target[2, :8] = 255  # a whole row of tokens
    boxes = square_boxes(
        [keyed_random.numpy_generator(STEP.seed, "pseudoseg-cutout", STEP.index, key) for key in batch.keys_u],
        SIDE,
        0.3,
    )
    strong, inside = batch.strong[0].clone(), np.zeros((4, SIDE, SIDE), bool)
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        assert bottom - top == right - left == 10
        strong[i, :, top:bottom, left:right] = 0.0
        inside[i, top:bottom, left:right] = True
    losses = method(batch, STEP)

    student, head = method.student, method.sgc
    with torch.no_grad():
        mine, taught = student(batch.image)["visual"].numpy(), student(strong)["visual"].numpy()
        of_weak, own = student.encode(batch.weak[0]), student.encode(batch.image)
        grid = student.decode(of_weak)["visual"].logits
    target, valid = batch.target.numpy(), batch.valid.numpy()
    blocks = [x.reshape(4, 4, 8, 4, 8).any((2, 4)) for x in (target != 255, valid)]
    assert not blocks[0].all() and not blocks[1].all()

    def tags(level: torch.Tensor) -> np.ndarray:
        weight, bias = head.tag.weight.detach().double().numpy(), head.tag.bias.detach().double().numpy()
        return level.double().numpy().mean((2, 3)) @ weight.T + bias

    def full(x: np.ndarray, size: tuple[int, ...] = (SIDE, SIDE)) -> np.ndarray:
        return upsample(torch.from_numpy(x), size).numpy()

    present = np.stack([[float((y == k).any()) for k in range(1, CLASSES)] for y in target])
    assert 0 < present.mean() < 1
    p = 1 / (1 + np.exp(-tags(own[-1])))
    tag = -np.where(present > 0, np.log(p), np.log(1 - p)).mean()
    maps = full(sgc_in_numpy(head, [x.double().numpy() for x in own], present, blocks[0]))
    guessed = (tags(of_weak[-1]) >= 0).astype(float)
    assert 0 < guessed.mean() < 1
    a = sgc_in_numpy(head, [x.double().numpy() for x in of_weak], guessed, blocks[1])
    soft = full(fused_in_numpy(grid.double().numpy(), full(a, grid.shape[-2:]), 0.4))
    seen, accepted = valid & ~inside, soft.max(1) >= 0.5
    assert 0.05 < accepted.mean() < 0.95
    loss = -(soft * np.log(softmax(taught))).sum(1)
    expected = {
        "sup": mean_over(cross_entropy_map(mine, target), target != 255),
        "maps": mean_over(cross_entropy_map(maps, target), target != 255),
        "tags": tag,
        "pseudo": (loss * accepted * seen).sum() / seen.sum(),
        "coverage": (accepted * seen).sum() / seen.sum(),
    }
    for name, value in expected.items():
        assert losses.terms[name] == pytest.approx(value, rel=1e-4), name
    total = expected["sup"] + expected["maps"] + tag + 0.7 * expected["pseudo"]
    assert losses.total.item() == pytest.approx(total, rel=1e-4)


def test_each_loss_trains_what_it_should() -> None:
    """Scores of the maps reach neither encoder nor tags; tags reach the encoder; soft labels are no way back."""
    method, batch = ready()
    own = method.student.encode(batch.image)
    found = tagged(batch.target, CLASSES)
    method.sgc(own, found.present, batch.target != 255).square().sum().backward()
    assert all(p.grad is None for p in method.student.parameters()) and method.sgc.tag.weight.grad is None
    assert all(p.grad is not None for part in ("query", "key", "score") for p in getattr(method.sgc, part).parameters())
    tag_loss(method.sgc.tags(own[-1]), found).backward()
    assert method.student.encoder.norm.weight.grad.abs().sum() > 0
    assert not method._soft_labels(batch.weak[0], batch.valid).requires_grad


def test_a_square_is_not_seen_and_trains_nothing() -> None:
    method, batch = ready(cutout=0.5)
    batch.strong[0].requires_grad_()
    method(batch, STEP).total.backward()
    boxes = square_boxes(
        [keyed_random.numpy_generator(STEP.seed, "pseudoseg-cutout", STEP.index, key) for key in batch.keys_u],
        SIDE,
        0.5,
    )
    for gradient, (top, left, bottom, right) in zip(batch.strong[0].grad, boxes.tolist(), strict=True):
        assert (gradient[:, top:bottom, left:right] == 0).all() and gradient.abs().sum() > 0
    none, _ = ready(cutout=0.0)
    assert none(batch, STEP).total.isfinite()


def test_labels_that_are_measured_are_those_that_teach() -> None:
    method, batch = ready()
    batch.valid.fill_(True)
    found = method.pseudo_labels(batch.weak[0], None, batch.keys_u, STEP)
    assert torch.equal(found["after"], method._soft_labels(batch.weak[0], batch.valid))
    torch.testing.assert_close(found["before"], method.student(batch.weak[0])["visual"].softmax(1).detach())
