"""CPS, PS-MT and SwiTh against straight-line NumPy, and which network teaches, follows or rests when."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from method_kit import CLASSES, SIDE, cross_entropy_map, make, make_batch, make_uneven, mean_over, mixed, softmax
from torch import Tensor, nn

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, Step
from viladiff.data.transforms.mixing import beta_boxes, box_mask, class_mask
from viladiff.methods.base import Method, keyed_boxes, turn, turn_length
from viladiff.methods.cps import Cps
from viladiff.methods.psmt import PsMt, bounded_momentum, ramp, strict, strict_consistency
from viladiff.methods.swith import Swith, sure_share
from viladiff.models.baselines.perturbations import virtual_adversarial
from viladiff.models.segmenter import NetworkFactory
from viladiff.runs.config import RunConfig, override

STEP = Step(index=70, progress=0.7, seed=3)


def ready(name: str, **changes: object) -> tuple[Method, Batch]:
    """A method and a batch with its views, padding enough to be pasted; labels are judged by its own threshold."""
    changes.setdefault("pseudo.threshold", {"cps": 0.0, "psmt": 0.6, "swith": 0.95}[name])
    method = make_uneven(name, **changes)
    batch = make_batch(views=method.required_views())
    batch.valid[1, :, : SIDE // 2] = False
    return method, batch


@torch.no_grad()
def seen(network: nn.Module, images: np.ndarray | Tensor) -> np.ndarray:
    """Full-size logits of the visual stream."""
    return network(torch.as_tensor(images))["visual"].numpy()


@torch.no_grad()
def see_all_classes(network: nn.Module, images: Tensor) -> None:
    """Gives each class's logits the mean 0, so that each is somewhere the highest, and four times their size."""
    head = network.classifier
    head.fine.bias.sub_(network(images)["visual"].mean((0, 2, 3)))  # type: ignore[union-attr, operator]
    for parameter in head.parameters():  # type: ignore[union-attr]
        parameter.mul_(4)


def moved(before: list[Tensor], network: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def copies(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


# CPS


@pytest.mark.parametrize("cutmix", [True, False])
def test_cps_loss_is_that_of_the_formula(cutmix: bool) -> None:
    method, batch = ready("cps", **{"cutmix": cutmix, "pseudo.weight": 1.5})
    assert isinstance(method, Cps)
    losses = method(batch, STEP)
    nets, weak = (method.student, method.second), batch.weak[0].numpy()
    target, valid = batch.target.numpy(), batch.valid.numpy()
    inside = method._boxes(batch, STEP)[1].numpy() if cutmix else np.zeros_like(valid)
    assert not cutmix or 0.1 < inside.mean() < 0.5
    labels = [mixed(seen(net, weak).argmax(1), inside) for net in nets]
    assert (labels[0] != labels[1]).mean() > 0.1
    own = [seen(net, batch.image) for net in nets]
    z = [seen(net, mixed(weak, inside)) for net in nets]
    sup = sum(mean_over(cross_entropy_map(x, target), target != 255) for x in own)
    counted = mixed(valid, inside)
    maps = [cross_entropy_map(z[i], labels[1 - i]) for i in (0, 1)]
    if not cutmix:  # labelled images teach too
        maps = [np.concatenate([cross_entropy_map(own[i], own[1 - i].argmax(1)), maps[i]]) for i in (0, 1)]
        counted = np.concatenate([target != 255, counted])
    cross = sum(mean_over(x, counted) for x in maps)
    assert float(losses.terms["sup"]) == pytest.approx(sup, rel=1e-4)
    assert float(losses.terms["pseudo"]) == pytest.approx(cross, rel=1e-3)
    assert float(losses.total.detach()) == pytest.approx(sup + 1.5 * cross, rel=1e-3)


def test_cps_starts_two_networks_from_one_encoder_and_other_heads() -> None:
    cfg = override(RunConfig(), {"method.name": "supervised"})  # with shipped weights
    torch.manual_seed(0)
    method = Cps(Cps.Config(), NetworkFactory(cfg.model, CLASSES, 12))
    pairs = zip(method.student.encoder.parameters(), method.second.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(method.student.classifier.fine.weight, method.second.classifier.fine.weight)
    assert not torch.equal(method.student.decoder.fuse[0].body[2].weight, method.second.decoder.fuse[0].body[2].weight)


@pytest.mark.parametrize(("cutmix", "name", "other"), [(True, "student", "second"), (False, "second", "student")])
def test_cps_labels_are_hard_and_carry_no_gradient_to_the_network_that_made_them(
    cutmix: bool, name: str, other: str
) -> None:
    method, batch = ready("cps", cutmix=cutmix)
    grads = []
    for factor in (1.0, 3.0):  # scaled logits keep their argmax
        with torch.no_grad():
            for conv in (getattr(method, other).classifier.fine, getattr(method, other).classifier.coarse):
                conv.weight.mul_(factor), conv.bias.mul_(factor)
        method.zero_grad()
        method(batch, STEP).total.backward()
        grads.append([p.grad.clone() for p in getattr(method, name).parameters()])
    assert any(grad.any() for grad in grads[0])
    for before, after in zip(*grads, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def test_cps_boxes_are_named_by_seed_step_and_image() -> None:
    method, batch = ready("cps")
    assert isinstance(method, Cps)
    first = method._boxes(batch, STEP)[1]
    assert torch.equal(first, method._boxes(batch, STEP)[1])
    batch.keys_u = (2, 3, 0, 1)
    assert torch.equal(method._boxes(batch, STEP)[1], first[[2, 3, 0, 1]])
    assert not torch.equal(method._boxes(batch, STEP._replace(index=71))[1], method._boxes(batch, STEP)[1])


# Turns


@pytest.mark.parametrize(("steps", "period"), [(100, 0.1), (600, 1 / 80), (601, 1 / 60), (97, 0.3), (10, 0.01), (7, 1)])
def test_turns_follow_one_another_and_cover_training(steps: int, period: float) -> None:
    found = [turn(Step(i, i / steps, 0), period) for i in range(steps)]
    numbers = [number for number, _ in found]
    assert numbers == sorted(numbers) and set(numbers) == set(range(numbers[-1] + 1))
    length = max(2.0, period * steps)
    assert numbers == [int((i + 1e-6) / length) for i in range(steps)]
    for (before, done), (after, then) in pairwise(found):
        assert then == (0 if after > before else done + 1)
    assert [turn(Step(i, i / steps, 0), period, ahead=1) for i in range(steps - 1)] == found[1:]


# PS-MT


def test_strict_assistant_is_heard_at_its_top_classes_only() -> None:
    rng = np.random.default_rng(0)
    assistant, active = rng.normal(size=(2, 2, 6, 3, 3))
    expected = active.copy()
    for i, y, x in np.ndindex(2, 3, 3):
        top = np.argsort(assistant[i, :, y, x])[-4:]
        expected[i, top, y, x] = assistant[i, top, y, x]
    found = strict(torch.from_numpy(assistant), torch.from_numpy(active), 4)
    assert np.array_equal(found.numpy(), expected)
    assert strict(found, found, 7) is found


def test_strict_consistency_is_a_mean_over_accepted_pixels() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 5, 4, 4)), rng.integers(0, 5, (2, 4, 4))
    confidence, accepted = rng.random((2, 4, 4)), rng.random((2, 4, 4)) < 0.4
    expected = mean_over(confidence * cross_entropy_map(logits, labels), accepted)
    given = [torch.from_numpy(x) for x in (logits, labels, confidence, accepted)]
    assert float(strict_consistency(*given)) == pytest.approx(expected, rel=1e-5)
    z = given[0].requires_grad_()
    strict_consistency(z, *given[1:3], torch.zeros(2, 4, 4, dtype=torch.bool)).backward()
    assert z.grad is not None and not z.grad.any()


def test_ramp_is_half_a_cosine() -> None:
    assert [ramp(x, 0.2) for x in (0.0, 0.1, 0.2, 0.9)] == pytest.approx([0, 0.5, 1, 1])
    assert ramp(0.05, 0.2) == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 4))
    assert ramp(0.0, 0.0) == 1


@pytest.mark.parametrize("radius", [0.0, 0.1])
@pytest.mark.parametrize("index", [70, 71])
def test_psmt_loss_is_that_of_the_formula(radius: float, index: int) -> None:
    """Step 70 of 500 falls into an odd turn, step 71 of 444 into an even one."""
    given = {
        "teacher.switch_period": 0.02,
        "teacher.assistant_classes": 2,
        "pseudo.threshold": 0.4,
        "pseudo.weight": 0.7,
    }
    method, batch = ready("psmt", **{"vat.epsilon": radius}, **given)
    assert isinstance(method, PsMt) and batch.image_strong is not None
    step = Step(index, 0.14 if index == 70 else 0.16, 3)
    losses = method(batch, step)
    active = turn(step, 0.02)[0] % 2
    mine, other = (method.teachers[i].streams(batch.weak[0])["visual"].logits.detach() for i in (active, 1 - active))
    pseudo = torch.nn.functional.interpolate((mine + strict(other, mine, 2)) / 2, (SIDE, SIDE), mode="bilinear")
    assert (strict(other, mine, 2) != other).any()
    p, valid = softmax(pseudo.numpy()), batch.valid.numpy()
    mix = keyed_boxes(batch, step, "psmt-boxes", lambda draws, _, size: beta_boxes(draws, size))
    inside = box_mask(mix.boxes, SIDE, SIDE).numpy()
    rngs = [keyed_random.numpy_generator(3, "psmt-boxes", index, key) for key in range(4)]
    assert torch.equal(mix.boxes, beta_boxes(rngs, SIDE)) and 0.05 < inside.mean() < 0.9
    confidence, labels, counted = (mixed(x, inside) for x in (p.max(1), p.argmax(1), valid))
    with torch.no_grad():
        picture = torch.from_numpy(mixed(batch.strong[0].numpy(), inside))
        features = method.student.encode(torch.cat([batch.image_strong, picture]))
        noise = method._noise(features, batch, step)
        length = torch.cat([x.flatten(1) for x in noise], 1).norm(dim=1)
        torch.testing.assert_close(length, radius * torch.cat([x.flatten(1) for x in features], 1).norm(dim=1))
        logits = method.student.logits([a + b for a, b in zip(features, noise, strict=True)], (SIDE, SIDE)).numpy()
    accepted = (confidence >= np.float32(0.4)) & counted
    assert 0.05 < accepted.mean() < 0.95
    target = batch.target.numpy()
    sup = mean_over(cross_entropy_map(logits[:4], target), target != 255)
    unsup = mean_over(confidence * cross_entropy_map(logits[4:], labels), accepted)
    weight = 0.7 * (1 - math.cos(math.pi * (step.progress - 0.0625) / 0.15)) / 2
    assert float(losses.terms["weight"]) == pytest.approx(weight)
    assert float(losses.terms["pseudo"]) == pytest.approx(unsup, rel=1e-3)
    assert float(losses.terms["coverage"]) == pytest.approx(accepted.sum() / counted.sum())
    assert float(losses.total.detach()) == pytest.approx(sup + weight * unsup, rel=1e-3)


def test_psmt_warms_three_networks_up_on_labels_alone() -> None:
    method, batch = ready("psmt")
    assert isinstance(method, PsMt) and batch.image_strong is not None
    early = Step(3, 0.03, 3)
    losses = method(batch, early)
    images = [(method.student, batch.image_strong), *((founder, batch.image) for founder in method.founders)]
    target = batch.target.numpy()
    expected = [mean_over(cross_entropy_map(seen(net, x), target), target != 255) for net, x in images]
    assert float(losses.total.detach()) == pytest.approx(sum(expected), rel=1e-4)
    losses.total.backward()
    assert all(p.grad is not None for net, _ in images for p in net.parameters())
    method.after_step(early)
    for i, founder in enumerate(method.founders):
        pairs = zip(founder.state_dict().values(), method.teachers[i].state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(method.founders[0].classifier.fine.weight, method.founders[1].classifier.fine.weight)


def test_an_average_is_no_longer_than_a_turn() -> None:
    """At the published size, 10,399 images in steps of 32 over 80 epochs, nothing changes."""
    published = bounded_momentum(0.996, turn_length(Step(1000, 1000 / (80 * 10399 / 32), 0), 1 / 80))
    assert published == 0.996
    length = turn_length(Step(300, 0.5, 0), 1 / 80)
    assert length == pytest.approx(7.5) and bounded_momentum(0.996, length) == pytest.approx(1 - 1 / 7.5)
    assert bounded_momentum(0.5, length) == 0.5 and turn_length(Step(0, 0.0, 0), 1 / 80) == 2
    assert turn_length(Step(10, 0.5, 0), 1 / 80) == 2


@pytest.mark.parametrize("bounded", [True, False])
def test_psmt_teachers_take_turns_after_the_warm_up_and_the_founders_rest(bounded: bool) -> None:
    """A turn is 10 of 100 steps."""
    method, batch = ready("psmt", **{"teacher.switch_period": 0.1, "teacher.bounded": bounded})
    assert isinstance(method, PsMt)
    for index, active in ((25, 0), (35, 1)):
        step = Step(index, index / 100, 3)
        method.zero_grad()
        method(batch, step).total.backward()
        assert all(not p.grad.any() for p in method.founders.parameters())
        assert all(p.grad is None for p in method.teachers.parameters())
        before = [copies(method.teachers[i]) for i in (0, 1)]
        method.after_step(step)
        assert [moved(before[i], method.teachers[i]) for i in (0, 1)] == [i == active for i in (0, 1)]
        keep = 1 - 1 / 10 if bounded else 1 - 1 / (index + 1)
        old, new = before[active][0], next(method.teachers[active].parameters())
        torch.testing.assert_close(new, keep * old + (1 - keep) * next(method.student.parameters()))


def test_psmt_without_a_warm_up_starts_both_teachers_as_the_student() -> None:
    method = make("psmt", warmup=0.0)
    assert isinstance(method, PsMt) and len(method.founders) == 0
    batch = make_batch(views=method.required_views())
    np.testing.assert_array_equal(seen(method.teachers[0], batch.image), seen(method.student, batch.image))
    np.testing.assert_array_equal(seen(method.teachers[1], batch.image), seen(method.student, batch.image))
    assert method(batch, Step(0, 0.0, 3)).total.isfinite()


def test_psmt_and_swith_ship_what_their_papers_evaluate() -> None:
    psmt, swith, images = make_uneven("psmt"), make_uneven("swith"), make_batch().image
    both = np.mean([seen(psmt.teachers[i], images) for i in (0, 1)], axis=0)
    np.testing.assert_allclose(seen(psmt.eval_network(), images), both, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # as predict and export ask
        halves = psmt.eval_network().logits(psmt.eval_network().encode(images), (SIDE, SIDE)).numpy()
    np.testing.assert_allclose(halves, both, rtol=1e-4, atol=1e-5)
    assert psmt.eval_networks()["teacher"] is psmt.eval_network() and psmt.eval_network().patch == 8
    assert swith.eval_network() is swith.student is swith.eval_networks()["student"]
    assert make("swith", **{"predict.network": "teacher"}).eval_network().members[0].num_classes == CLASSES
    assert not any(p.requires_grad for method in (psmt, swith) for p in method.teachers.parameters())


def test_psmt_noise_is_found_with_both_teachers_from_centred_draws_of_each_image() -> None:
    """Labelled image 0 and unlabelled image 0 have draws of their own."""
    method, batch = ready("psmt", **{"vat.epsilon": 0.2, "vat.xi": 0.3})
    assert isinstance(method, PsMt)
    with torch.no_grad():
        features = method.student.encode(torch.cat([batch.image, batch.strong[0]]))
    sizes = [level[0].numel() for level in features]
    keys = [f"{kind}{key}" for kind in "lu" for key in range(4)]
    drawn = keyed_random.uniform(keys, (sum(sizes),), STEP.seed, "psmt-vat", STEP.index)
    start = [part.view_as(x) - 0.5 for part, x in zip(drawn.split(sizes, 1), features, strict=True)]

    def mean_of_teachers(given: list[Tensor]) -> Tensor:
        both = [method.teachers[i].decode(given)["visual"].logits for i in (0, 1)]
        return torch.stack(both).mean(0)

    expected = virtual_adversarial(features, mean_of_teachers, start, 0.2, 0.3)
    for found, wanted in zip(method._noise(features, batch, STEP), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_psmt_noise_is_adversarial_to_the_teachers() -> None:
    method, batch = ready("psmt")
    assert isinstance(method, PsMt)
    with torch.no_grad():
        features = method.student.encode(torch.cat([batch.image, batch.strong[0]]))
        noise = method._noise(features, batch, STEP)
        random = [torch.randn_like(x) for x in features]
        unit = torch.cat([x.flatten(1) for x in random], 1).norm(dim=1)
        length = torch.cat([x.flatten(1) for x in noise], 1).norm(dim=1)
        scale = (length / unit).view(-1, 1, 1, 1)

        def apart(added: list[Tensor]) -> float:
            p, q = (
                method.teachers.grid_logits(x).log_softmax(1)
                for x in (features, [a + b for a, b in zip(features, added, strict=True)])
            )
            return float((p.exp() * (p - q)).sum())

        assert apart(noise) > 3 * apart([scale * x for x in random])


# SwiTh


def test_share_of_sure_pixels_by_picture_or_batch() -> None:
    rng = np.random.default_rng(0)
    sure, valid = rng.random((3, 4, 4)) < 0.5, rng.random((3, 4, 4)) < 0.7
    valid[2] = False
    given = torch.from_numpy(sure), torch.from_numpy(valid)
    each = [(sure[i] & valid[i]).sum() / max(1, valid[i].sum()) for i in range(3)]
    torch.testing.assert_close(sure_share(*given, whole_batch=False).flatten(), torch.tensor(each, dtype=torch.float32))
    whole = sure_share(*given, whole_batch=True)
    assert whole.shape == (1, 1, 1) and float(whole) == pytest.approx((sure & valid).sum() / valid.sum())


@pytest.mark.parametrize("index", [70, 75])
def test_swith_loss_is_that_of_the_formula(index: int) -> None:
    """Turns of five hundredths: CutMix at step 70, ClassMix at 75."""
    pseudo = {"pseudo.threshold": 0.5, "pseudo.weight": 0.8, "pseudo.consistency_weight": 0.3}
    method, batch = ready("swith", **{"teacher.switch_period": 0.05}, **pseudo)
    assert isinstance(method, Swith)
    step = Step(index, index / 100, 3)
    for i in (0, 1):
        see_all_classes(method.teachers[i], batch.weak[0])
    losses = method(batch, step)
    classmix = index == 75
    p, valid, target = (
        softmax(seen(method.teachers[int(classmix)], batch.weak[0])),
        batch.valid.numpy(),
        batch.target.numpy(),
    )
    confidence, labels = p.max(1), p.argmax(1)
    assert min(len(np.unique(x)) for x in labels) > 2
    if classmix:
        uniform = keyed_random.uniform(range(4), (CLASSES,), 3, "swith-classes", index)
        inside = class_mask(torch.from_numpy(labels), batch.valid, uniform).numpy()[np.arange(4) ^ 1]
    else:
        inside = box_mask(
            beta_boxes([keyed_random.numpy_generator(3, "swith-boxes", index, i) for i in range(4)], SIDE), SIDE, SIDE
        ).numpy()
    assert 0.05 < inside.mean() < 0.95
    z = seen(method.student, mixed(batch.strong[0].numpy(), inside))
    counted, sure = mixed(valid, inside), confidence >= np.float32(0.5)
    w = [(sure[i] & valid[i]).sum() / valid[i].sum() for i in range(4)]  # of the picture before anything is pasted
    assert (mixed(sure, inside) != sure).any()
    if classmix:
        w = [(mixed(sure, inside) & counted).sum() / counted.sum()] * 4
    assert min(w) > 0.05 and max(w) < 0.95
    weighted = cross_entropy_map(z, mixed(labels, inside)) * np.array(w)[:, None, None]
    pseudo_loss = mean_over(weighted, counted)
    plain = cross_entropy_map(seen(method.student, batch.strong[1]), labels) * (confidence >= np.float32(0.5))
    consistency = mean_over(plain, valid)
    sup = mean_over(cross_entropy_map(seen(method.student, batch.image), target), target != 255)
    named = {"sup": sup, "pseudo": pseudo_loss, "consistency": consistency}
    assert {k: float(losses.terms[k]) for k in named} == pytest.approx(named, rel=1e-3)
    assert float(losses.total.detach()) == pytest.approx(sup + 0.8 * (pseudo_loss + 0.3 * consistency), rel=1e-3)


def test_swith_teachers_are_temporary() -> None:
    """After the last step of a turn the other teacher becomes the student; then it follows, by steps of its turn."""
    method = make_uneven("swith", **{"teacher.switch_period": 0.05})
    assert isinstance(method, Swith)
    for index, follows, keep in ((73, 0, 0.8), (74, 1, 0.0), (75, 1, 0.5), (76, 1, 2 / 3), (79, 0, 0.0)):
        before = [copies(method.teachers[i]) for i in (0, 1)]
        method.after_step(Step(index, index / 100, 3))
        assert not moved(before[1 - follows], method.teachers[1 - follows])
        new = zip(before[follows], method.teachers[follows].parameters(), method.student.parameters(), strict=True)
        for old, now, student in new:
            torch.testing.assert_close(now, keep * old + (1 - keep) * student)


def test_swith_student_alone_drops_residual_branches() -> None:
    method, images = make_uneven("swith", drop_path=0.5), make_batch().image
    assert isinstance(method, Swith)
    assert not np.array_equal(seen(method.student, images), seen(method.student, images))
    for i in (0, 1):
        np.testing.assert_array_equal(seen(method.teachers[i], images), seen(method.teachers[i], images))
    assert not any(module.training for module in method.teachers.modules())
    rates = [block.drop.rate for block in make("swith", drop_path=0.1).student.encoder.blocks]
    assert max(rates) == pytest.approx(Swith.Config().drop_path)
