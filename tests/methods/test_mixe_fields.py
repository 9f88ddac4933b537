"""Which labels MixE replaces, what its denoiser reads and learns from, and what the record says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_kit import CLASSES, PAPER_DEFAULTS, SIDE, STEP, cross_entropy_map, make_batch, make_uneven, mean_over
from torch import Tensor, nn

from viladiff.data.batch import Batch
from viladiff.data.loader import BatchLoader
from viladiff.data.registry import load_dataset as load_dataset
from viladiff.data.splits import set_apart
from viladiff.data.transforms.mixing import apply_cutmix
from viladiff.evaluation.pixel_counts import boundary_width, trimap
from viladiff.evaluation.pseudo_labels import STEPS, matched, pseudo_counts, pseudo_scores
from viladiff.methods import viladiff, viladiff_mixe
from viladiff.methods.viladiff import ViLaDiff
from viladiff.models.fused.pixel_loss import grid_cross_entropy
from viladiff.models.mixe import guided_filter, relabel
from viladiff.models.mixe.denoiser import MixeConfig
from viladiff.models.mixe.diffusion import edge_mask
from viladiff.models.mixe.guided_filter import Guided
from viladiff.models.mixe.relabel import KEPT, LEVELS, Calibration, refined_pixels
from viladiff.runs.config import ConfigError, RunConfig, override
from viladiff.training.optim import param_groups


def probabilities(seed: int, batch: int = 2, side: int = 8) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, CLASSES, side, side, generator=gen)).softmax(1)


def denoiser_of(method: ViLaDiff) -> nn.Module:
    assert method.denoiser is not None
    return method.denoiser


def noting(into: list[Any], place: slice | int, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, with what it was given at ``place`` of its arguments kept."""

    def noted(*given: Any) -> Any:
        into.append(given[place])
        return call(*given)

    return noted


def ours(**changes: object) -> ViLaDiff:
    method = make_uneven("viladiff", **changes)
    assert isinstance(method, ViLaDiff)
    return method


def batch_for(method: ViLaDiff, seed: int = 0) -> Batch:
    return make_batch(seed=seed, views=method.required_views())


# Which labels are replaced


def relabelled(
    teacher: Tensor, refined: Tensor, cfg: MixeConfig, threshold: float, calibration: Calibration | None = None
) -> Tensor:
    where = None if cfg.refine_where == "all" else refined_pixels(teacher, cfg.refine_where, threshold, 2)
    return relabel.relabelled(teacher, refined, where, cfg.confidence, calibration)


@pytest.mark.parametrize("confidence", ["refined", "product", "calibrated"])
@pytest.mark.parametrize("where", ["all", "unsure", "edges"])
def test_relabelling_pixel_by_pixel(where: str, confidence: str) -> None:
    cfg = MixeConfig(refine_where=where, confidence=confidence, holdout=0.25)
    teacher, refined, calibration = probabilities(0), probabilities(1), Calibration()
    calibration.counts = torch.stack([torch.full((LEVELS,), 9.0), torch.linspace(0, 9, LEVELS)])
    scores = relabelled(teacher, refined, cfg, 0.6, calibration)
    edges = edge_mask(teacher.argmax(1))
    for b, y, x in np.ndindex(2, 8, 8):
        p, q = (maps[b, :, y, x].numpy() for maps in (teacher, refined))
        cell = edges[b, y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2]
        if {"all": True, "unsure": p.max() < 0.6, "edges": bool(cell.any())}[where]:
            label = int(q.argmax())
            level = min(int(q[label] * LEVELS), LEVELS - 1)
            precision = (9 * level / (LEVELS - 1) + (level + 0.5) / LEVELS) / 10
            sure = {"refined": q[label], "product": q[label] * p[label], "calibrated": precision}[confidence]
        else:
            label, sure = int(p.argmax()), p.max()
        assert int(scores[b, :, y, x].argmax()) == label
        assert float(scores[b, :, y, x].max()) == pytest.approx(float(sure), rel=1e-5)


def test_relabelling_that_changes_nothing() -> None:
    teacher, refined = probabilities(0), probabilities(1)
    unsure = MixeConfig(refine_where="unsure")
    assert relabelled(teacher, refined, unsure, 0.0) is not refined
    assert torch.equal(relabelled(teacher, refined, unsure, 0.0), teacher)
    assert torch.equal(relabelled(teacher, refined, unsure, 1.01), refined)
    assert relabelled(teacher, refined, MixeConfig(), 0.5) is refined
    same = relabelled(teacher, teacher, MixeConfig(confidence="product"), 0.5)
    torch.testing.assert_close(same.amax(1), teacher.amax(1).square())


def test_a_product_keeps_the_label_that_the_teacher_rules_out() -> None:
    teacher, refined = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.1, 0.2, 0.7])
    before, after = (x.view(1, 3, 1, 1).expand(1, 3, 2, 2) for x in (teacher, refined))
    scores = relabelled(before, after, MixeConfig(confidence="product"), 0.5)
    assert (scores.argmax(1) == 2).all() and (scores.clamp_min(1e-30).log().argmax(1) == 2).all()
    assert scores.max() < 1e-6


def test_calibration_is_the_running_precision_of_each_level() -> None:
    calibration, gen = Calibration(), torch.Generator().manual_seed(0)
    counts = np.zeros((2, LEVELS))
    for _ in range(3):
        counts *= KEPT
        for _ in range(2):  # micro-batches
            sure, right, counted = torch.rand(2, 4, 4, generator=gen), *(torch.rand(2, 2, 4, 4, generator=gen) < 0.5)
            calibration.add(sure, right, counted)
            for c, r, n in zip(sure.flatten(), right.flatten(), counted.flatten(), strict=True):
                counts[:, int(c * LEVELS)] += [bool(n), bool(n & r)]
        calibration.after_step()
    np.testing.assert_allclose(calibration.counts.numpy(), counts, rtol=1e-5)
    assert not calibration.pending.any() and list(calibration.state_dict()) == ["counts"]
    asked = torch.tensor([0.0, 0.51, 1.0])
    places = [0, 10, LEVELS - 1]
    expected = [(counts[1, k] + (k + 0.5) / LEVELS) / (counts[0, k] + 1) for k in places]
    np.testing.assert_allclose(calibration(asked).numpy(), expected, rtol=1e-5)


def test_the_border_of_the_picture_is_no_edge() -> None:
    """The teacher labels the padding too; where that meets the picture nothing is to be refined."""
    labels = torch.zeros(1, 32, 32, dtype=torch.int64)
    labels[:, 24:] = 1
    labels[:, :4, :4] = 2  # a true edge
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    valid[:, 24:] = False
    teacher = F.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    where = refined_pixels(teacher, "edges", 0.5, 2, valid)
    assert where[:, :6, :6].any() and not where[:, 8:].any()
    assert refined_pixels(teacher, "edges", 0.5, 2)[:, 8:].any(), "without it the border is one"


CHOSEN = [
    {"mixe.refine_where": "unsure", "pseudo.threshold": 0.5},
    {"mixe.refine_where": "edges", "mixe.confidence": "product", "pseudo.threshold": 0.5},
    {"mixe.confidence": "calibrated", "mixe.holdout": 0.5, "pseudo.threshold": 0.5},
    {"mixe.denoiser": "guided", "mixe.refine_where": "unsure", "pseudo.threshold": 0.5},
]


@pytest.mark.parametrize("changes", CHOSEN, ids=str)
def test_labels_that_are_scored_are_those_that_train(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, trained = ours(cutmix=False, **changes), []

    def spy(cfg: object, progress: float, confidence: Tensor, labels: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        trained.append((confidence, labels))
        return confidence, labels

    monkeypatch.setattr(viladiff, "with_truth", spy)
    batch = batch_for(method)
    batch = replace(batch, valid=torch.ones_like(batch.valid))  # as an image that is scored is
    step = STEP._replace(progress=0.999999)  # τ is where it stays
    method(batch, step)
    found = method.pseudo_labels(batch.weak[0], batch.text_u, batch.keys_u, step)
    assert torch.allclose(found["after"].amax(1), trained[0][0], atol=1e-5)
    assert (found["after"].argmax(1) == trained[0][1]).float().mean() > 0.999
    assert not torch.equal(found["after"].argmax(1), found["before"].argmax(1))


# Labelled images that are left out


def test_images_set_apart_stay_in_their_places() -> None:
    data = load_dataset("digits", "92")
    rest, apart = set_apart(data, 4)
    assert len(apart) == 23 and sorted([*rest, *apart]) == sorted(data.labelled)
    assert np.array_equal(set_apart(data, 4)[1], apart)
    cfg = override(RunConfig(), {"data.split": "92", "data.batch_labelled": 8, "method.name": "viladiff"})
    views = replace(ours(**{"mixe.holdout": 0.25}).required_views(), text=False)
    assert views.apart == 4
    whole = BatchLoader(cfg, data, views, None, 8, torch.device("cpu"))
    drawn = [image for step in range(12) for _, image in whole._shares(step, 0)[0].drawn]
    assert {*drawn[3::4]} <= {*apart.tolist()} and {*drawn} - {*drawn[3::4]} <= {*rest.tolist()}
    assert len({*drawn[3::4]}) == 23 and len(set(drawn)) == 23 + 69
    halves = [BatchLoader(cfg, data, views, None, 8, torch.device("cpu"), rank, 2) for rank in (0, 1)]
    assert [image for half in halves for _, image in half._shares(5, 0)[0].drawn] == drawn[40:48]


@pytest.mark.parametrize("confidence", ["refined", "calibrated"])
def test_left_out_masks_reach_mixe_alone(confidence: str) -> None:
    changes = {"mixe.holdout": 0.5, "mixe.confidence": confidence}
    found = []
    for shift in (0, 1):
        method = ours(**changes)
        batch = batch_for(method)
        held = batch.target[1::2]
        batch.target[1::2] = torch.where(held == 255, held, (held + shift) % CLASSES)
        terms = method(batch, STEP).terms
        method.after_step(STEP)
        found.append((terms, None if method.calibration is None else method.calibration.counts.clone()))
    (one, counts), (two, others) = found
    assert torch.equal(one["sup"], two["sup"])
    assert torch.equal(one["mixe_ce"], two["mixe_ce"]) == (confidence == "calibrated")
    if counts is not None and others is not None:
        assert counts[0].sum() == (batch.target[1::2] != 255).sum() and not torch.equal(counts, others)


def test_supervised_term_is_that_of_the_images_left_in() -> None:
    method = ours(**{"mixe.holdout": 0.5, "vila.enabled": False})
    batch = batch_for(method)
    logits = method.student(torch.cat([batch.image, apply_cutmix(batch.strong[0], batch.mix[0])]))["visual"][:4]
    target = batch.target.numpy()[::2]
    loss = cross_entropy_map(logits.detach().numpy()[::2], target)
    assert method(batch, STEP).terms["sup"] == pytest.approx(mean_over(loss, target != 255), rel=1e-4)


@pytest.mark.parametrize(
    ("sizes", "changes", "expected"),
    [
        ((8, 8), {}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ((4, 8), {}, [0, 1, 2, 3]),
        ((8, 4), {}, [0, 2, 4, 6]),
        ((6, 4), {}, [0, 1, 3, 4]),
        ((8, 4), {"mixe.holdout": 0.5}, [1, 3, 5, 7]),
        ((12, 4), {"mixe.holdout": 0.5}, [1, 3, 7, 9]),
    ],
    ids=str,
)
def test_workers_choose_together_what_one_worker_would(
    sizes: tuple[int, int], changes: dict[str, object], expected: list[int]
) -> None:
    method, whole = ours(**changes), make_batch(max(sizes))
    for workers in (1, 2):
        labelled, unlabelled = (size // workers for size in sizes)
        found = list[int]()
        for start in range(0, sizes[0], labelled):
            keys, own = whole.keys[start : start + labelled], slice(start, start + labelled)
            part = replace(whole, image=whole.image[own], keys=keys, weak=(whole.weak[0][:unlabelled],))
            chosen = method._chosen(part)
            mine = viladiff_mixe.keys_at(part, chosen)
            assert torch.equal(viladiff_mixe.rows_at(part.image, chosen), whole.image[list(mine)])
            found += mine
        assert found == expected, workers


# Views that x_0 is made from, and what the denoiser reads


@pytest.mark.parametrize(("labelled", "unlabelled"), [("strong", "strong"), ("cutmix", "cutmix"), ("strong", "weak")])
def test_views_of_x0_and_its_targets(labelled: str, unlabelled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = ours(**{"mixe.labelled_views": labelled, "mixe.unlabelled_views": unlabelled, "mixe.refine": False})
    batch, shown, answers, starts = batch_for(method), list[Any](), list[Any](), list[Any]()
    see, entropy, denoised = method._see, grid_cross_entropy, method._denoised
    monkeypatch.setattr(method, "_see", noting(shown, 1, see))
    monkeypatch.setattr(viladiff_mixe, "grid_cross_entropy", noting(answers, 1, entropy))
    monkeypatch.setattr(method, "_denoised", noting(starts, slice(None), denoised))
    method(batch, STEP)
    mix, boxes = batch.mix[0], method._boxes(batch.keys, batch.image, STEP)
    assert batch.image_strong is not None and boxes.boxes.any()
    pictures, target = batch.image_strong, batch.target
    if labelled == "cutmix":
        pictures, target = apply_cutmix(pictures, boxes), apply_cutmix(target, boxes)
    strong = apply_cutmix(batch.strong[0], mix)
    others = {"weak": [], "strong": [batch.strong[0]], "cutmix": [strong]}[unlabelled]
    assert torch.equal(shown[0], torch.cat([pictures, batch.weak[0], *others]))
    weak = method.teacher.streams(batch.weak[0], batch.text_u)["fusion"].logits
    pseudo = apply_cutmix(F.interpolate(weak, SIDE, mode="bilinear").argmax(1), mix)
    assert torch.equal(answers[0][:4], target) and (answers[0][4:] == pseudo).float().mean() > 0.999
    soft, _, image = starts[0][:3]
    own = batch.image if labelled == "strong" else apply_cutmix(batch.image, boxes)
    assert torch.equal(image, torch.cat([own, strong]))
    if unlabelled != "cutmix":
        logits = method.teacher.streams(batch.weak[0] if unlabelled == "weak" else others[0], batch.text_u)["fusion"]
        expected = apply_cutmix(logits.logits.softmax(1), mix, method.student.decoder.stride)
        torch.testing.assert_close(soft[4:], expected, rtol=1e-4, atol=1e-5)


def test_condition_has_the_maps_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    method = ours(**{"mixe.condition": ("image", "finer", "other_stream"), "mixe.refine": False}, cutmix=False)
    batch, seen = batch_for(method), list[Any]()
    denoiser: Any = method.denoiser
    prepare = denoiser.prepare
    monkeypatch.setattr(denoiser, "prepare", noting(seen, slice(None), prepare))
    method(batch, STEP)
    _, _, image, fine, middle, other = seen[0]
    pictures = torch.cat([batch.image, batch.strong[0]])
    assert torch.equal(image, F.pixel_unshuffle(pictures, 2))
    maps = method.student.encode(pictures)
    torch.testing.assert_close(fine, maps[0])
    torch.testing.assert_close(middle, maps[1])
    visual = method.student.streams(pictures)["visual"]
    torch.testing.assert_close(other, torch.cat([visual.mid, visual.logits.softmax(1)], 1), rtol=1e-3, atol=1e-4)
    cond = prepare(*seen[0])
    for k in range(2, 6):
        changed = [x + 1 if i == k else x for i, x in enumerate(seen[0])]
        changed[k] = changed[k] * torch.rand(changed[k].shape)
        assert not torch.allclose(prepare(*changed), cond), k


# The guided control


def test_guided_filter_is_a_joint_bilateral_one() -> None:
    torch.manual_seed(0)
    net, soft, image = Guided(CLASSES, 2, 8, 1), probabilities(0, 1, 6), torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        net.near.copy_(torch.randn(net.near.shape))
        keys = net.keys(net.body(net.cells(image)))[0].numpy()
        got, near = net(soft, image)[0].numpy(), net.near[0].numpy()
    p, half = soft[0].numpy(), guided_filter.WINDOW // 2
    for y, x in np.ndindex(6, 6):
        total, weights = np.zeros(CLASSES), 0.0
        for k, (dy, dx) in enumerate(np.ndindex(guided_filter.WINDOW, guided_filter.WINDOW)):
            v, u = y + dy - half, x + dx - half
            if 0 <= v < 6 and 0 <= u < 6:
                w = np.exp(near[k] - ((keys[:, v, u] - keys[:, y, x]) ** 2).sum())
                total, weights = total + w * p[:, v, u], weights + w
        np.testing.assert_allclose(got[:, y, x], np.log(total / weights), rtol=1e-3, atol=1e-4)


def test_guided_control_has_no_noise_and_learns() -> None:
    method = ours(**{"mixe.denoiser": "guided"})
    losses = method(batch_for(method), STEP)
    losses.total.backward()
    assert losses.terms["gaussian"] == 0 and losses.terms["mixe_noise"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser_of(method).parameters())


# Size, rates, inference


@pytest.mark.parametrize(
    "changes",
    [
        {"mixe.denoiser": "guided"},
        {"mixe.denoiser": "plain", "mixe.confidence": "product", "pseudo.source": "mean"},
        {"mixe.condition": ("image", "finer", "other_stream"), "mixe.confidence": "calibrated", "mixe.holdout": 0.5},
    ],
    ids=str,
)
def test_a_step_in_mixed_precision(changes: dict[str, object]) -> None:
    losses = []
    for enabled in (False, True):
        method = ours(**changes)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = method(batch_for(method), STEP)
        found.total.backward()
        assert all(p.grad.isfinite().all() for p in denoiser_of(method).parameters() if p.grad is not None)
        losses.append(found.terms["mixe_ce"].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_large_denoiser_and_its_own_rate() -> None:
    method = ours(**{"mixe.width": 64, "mixe.depth": 4, "mixe.lr_scale": 3.0})
    assert method(batch_for(method), STEP).total.isfinite()
    cfg = override(RunConfig(), {"method.name": "viladiff"})
    own = {id(p) for p in denoiser_of(method).parameters()}
    scales = {(id(p) in own, group["scale"]) for group in param_groups(method, cfg) for p in group["params"]}
    assert {scale for mine, scale in scales if mine} == {3.0} and 3.0 not in {s for mine, s in scales if not mine}
    assert ours().extra_param_groups() == {}


def test_refined_network_is_the_chain_after_the_evaluated_one() -> None:
    method = ours(**{"predict.refine": True, "mixe.refine_where": "unsure", "pseudo.threshold": 0.5}).eval()
    batch = make_batch()
    with torch.no_grad():
        found = method.eval_networks()["refined"](batch.weak[0], batch.text_u)
        seen = method._see(method.teacher, batch.weak[0], batch.text_u)
        for name in ("visual", "fusion"):
            soft = seen.streams[name].logits
            step = STEP._replace(index=0, seed=0, progress=1.0)
            after = F.interpolate(
                method.chained(seen, soft, (0,) * 4, step, name), SIDE, mode="bilinear", align_corners=False
            ).softmax(1)
            before = F.interpolate(soft, SIDE, mode="bilinear", align_corners=False).softmax(1)
            expected = torch.where(before.amax(1, keepdim=True) < 0.5, after, before)
            torch.testing.assert_close(found[name].exp(), expected, rtol=1e-3, atol=1e-4)
            alone = method.eval_networks()["refined"](batch.weak[0][2:3], None)["visual"]
            torch.testing.assert_close(alone, found["visual"][2:3], rtol=1e-2, atol=1e-2)
    assert "refined" not in ours().eval_networks() and method.state_dict().keys() == ours().state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"predict.refine": True, "mixe.enabled": False}, "predict.refine = true.*no denoiser"),
        ({"mixe.condition": ("other_stream",), "vila.enabled": False}, "other_stream.*one stream"),
        ({"mixe.condition": ("image", "image")}, "named twice"),
        ({"mixe.unlabelled_views": "cutmix", "cutmix": False}, "unlabelled_views = 'cutmix'.*no boxes"),
        ({"mixe.unlabelled_views": "strong", "mixe.train_images": "labelled"}, "unlabelled_views.*no such images"),
        ({"mixe.labelled_views": "strong", "mixe.train_images": "unlabelled"}, "labelled_views.*no such images"),
        ({"mixe.confidence": "calibrated"}, "calibrated.*set holdout"),
        ({"mixe.confidence": "calibrated", "mixe.holdout": 0.25, "mixe.refine": False}, "calibrated.*refine = false"),
        ({"mixe.holdout": 0.3}, "holdout = 0.3: .*nearest: 0.33"),
        ({"mixe.holdout": 0.2}, "holdout = 0.2: .*multiple of 5"),
        ({"mixe.holdout": 0.25, "mixe.train_images": "unlabelled"}, "use no left-out images"),
        ({"mixe.denoiser": "guided", "mixe.flips": False}, "flips = False: denoiser = 'guided'"),
        ({"mixe.denoiser": "guided", "mixe.condition": ("image",)}, "condition = .*'guided'"),
        ({"mixe.labelled_views": "cutmix", "mixe.holdout": 0.125}, "labelled_views = 'cutmix'.*multiple of 16"),
        ({"mixe.refine_where": "unshure"}, "refine_where.*unsure"),
    ],
)
def test_combinations_without_a_meaning_are_refused(changes: dict[str, object], said: str) -> None:
    first = {f"method.{path}": value for path, value in PAPER_DEFAULTS.items()}
    flat = {f"method.{path}": value for path, value in changes.items()}
    with pytest.raises(ConfigError, match=said) as error:
        override(RunConfig(), {"method.name": "viladiff", **first, **flat})
    assert len(str(error.value).splitlines()) == 1


# The score


def test_scores_of_labels_before_and_after_refinement() -> None:
    gen = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (2, 6, 6), generator=gen).repeat_interleave(4, 1).repeat_interleave(4, 2)
    truth[:, 3, :] = 255
    stages = {}
    for name in ("before", "after"):
        labels = torch.where(torch.rand(truth.shape, generator=gen) < 0.7, truth, 1) % 255
        stages[name] = (torch.rand(truth.shape, generator=gen), labels)
    halves = [
        pseudo_counts({n: (c[i : i + 1], y[i : i + 1]) for n, (c, y) in stages.items()}, truth[i : i + 1], 0.6)
        for i in range(2)
    ]
    got = pseudo_scores({name: halves[0][name] + halves[1][name] for name in halves[0]})
    near, known, t = trimap(truth, boundary_width(24, 24)).numpy(), truth.numpy() != 255, truth.numpy()
    for suffix, where in (("", known), ("/edges", known & near), ("/elsewhere", known & ~near)):
        n, good, right = where.sum(), {}, {}
        for name, (c, y) in stages.items():
            accepted, right[name] = where & (c.numpy() >= np.float32(0.6)), y.numpy() == t
            good[name] = accepted & right[name]
            assert got[f"{name}/coverage{suffix}"] == accepted.sum() / n
            assert got[f"{name}/precision{suffix}"] == good[name].sum() / accepted.sum()
            assert got[f"{name}/wrong{suffix}"] == (accepted & ~right[name]).sum() / n
        a, b = good["before"], good["after"]
        assert got[f"rescued{suffix}"] == (where & ~a & b).sum() / (where & ~a).sum()
        assert got[f"spoiled{suffix}"] == (where & a & ~b).sum() / a.sum()
        a, b = (where & right[name] for name in ("before", "after"))
        assert got[f"corrected{suffix}"] == (where & ~a & b).sum() / (where & ~a).sum()
        assert got[f"corrupted{suffix}"] == (a & ~b).sum() / a.sum()
        # At equal coverage: as many of the surest labels of the teacher as are accepted after refinement.
        c, wrong = stages["before"][0].numpy()[where], ~right["before"][where]
        first = np.argsort(-c)[: round(got[f"after/coverage{suffix}"] * n)]
        assert got[f"matched/wrong{suffix}"] == pytest.approx(wrong[first].sum() / n, abs=2 / n)
        assert got[f"matched/threshold{suffix}"] == pytest.approx(c[first].min(), abs=3 / STEPS)
    assert pseudo_scores(pseudo_counts(stages, torch.full_like(truth, 255), 0.6))["matched/wrong"] is None
    alone = pseudo_scores(pseudo_counts({"before": stages["before"]}, truth, 0.6))
    assert {"before/wrong/edges", "before/ece"} <= alone.keys() and "rescued" not in alone
    assert pseudo_scores(pseudo_counts(stages, truth, None)).keys() == {"before/ece", "after/ece"}


def test_the_teachers_own_threshold_is_found_again() -> None:
    labels = probabilities(0, 4, 16)
    conf, truth = labels.amax(1), probabilities(3, 4, 16).argmax(1)
    stages = {"before": (conf, labels.argmax(1)), "after": (conf, labels.argmax(1))}
    got = pseudo_scores(pseudo_counts(stages, truth, 0.7))
    assert got["matched/wrong"] == pytest.approx(got["before/wrong"])
    assert got["matched/threshold"] == pytest.approx(0.7, abs=10 / STEPS)
    assert got["rescued"] == got["spoiled"] == got["corrupted"] == 0
    assert matched(torch.zeros(2, STEPS), 0.5) == (None, None)
