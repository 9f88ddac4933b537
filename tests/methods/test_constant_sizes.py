"""The size of each constant: what a method adds, over what is there, is between a third and three times the authors'.

Theirs is computed here from the published formulas and numbers, ours is measured, on the same tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from constant_sizes import Answers, hold, pull
from method_kit import make, make_batch, make_uneven
from torch import Tensor, nn

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, Step
from viladiff.data.transforms.mixing import (
    beta_boxes,
    box_mask,
    class_mask,
    cutmix_boxes,
    parity_boxes,
    parity_mask,
    square_boxes,
)
from viladiff.losses import feature_distillation, logit_distillation
from viladiff.methods import METHODS, pseudoseg
from viladiff.methods.allspark import AllSpark, AllSparkConfig
from viladiff.methods.base import Method, keyed_boxes, turn_length
from viladiff.methods.corrmatch import Correlation, CorrMatchConfig, correlated
from viladiff.methods.psmt import PsMt, VatConfig, bounded_momentum
from viladiff.models.baselines.allspark import AllSparkBlock, ChannelAttention
from viladiff.models.baselines.perturbations import virtual_adversarial
from viladiff.models.mixe.denoiser import MixeConfig
from viladiff.models.mixe.diffusion import add_gaussian_noise, alpha_bar
from viladiff.models.vila import VilaConfig
from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import StopRequested, fit

LATE = Step(300, 0.5, 3)


def rngs(n: int) -> list[np.random.Generator]:
    return [keyed_random.numpy_generator(0, "sizes", i) for i in range(n)]


@pytest.mark.parametrize(("ours", "fits"), [(0.34, True), (2.9, True), (0.33, False), (3.1, False)])
def test_the_guard_allows_a_third_to_three_times(ours: float, fits: bool) -> None:
    if fits:
        hold(ours, 1.0)
    else:
        with pytest.raises(AssertionError):
            hold(ours, 1.0)


# The loss on unlabelled images against the supervised one


def ce(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z, labels, ignore_index=255, reduction="none")


def sup(z: Tensor, batch: Batch) -> Tensor:
    return ce(z, batch.target).sum() / (batch.target != 255).sum()


def hard(z: Tensor, labels: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """Divided by all pixels outside the padding."""
    return (ce(z, labels) * weight * valid).sum() / valid.sum()


def pasted(batch: Batch, view: int, *maps: Tensor) -> list[Tensor]:
    inside = box_mask(batch.mix[view].boxes, 32, 32)
    return [torch.where(inside, x[batch.mix[view].partner], x) for x in maps]


def judged(z: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    confidence, labels = z.detach().softmax(1).max(1)
    return confidence, labels, (confidence >= threshold).float()


def one_strong_view(answers: Answers, method: Any, batch: Batch, step: Step) -> Tensor:
    (z,), (weak,) = answers.of(method.student), answers.of(method.teacher)
    _, labels, sure = judged(weak, 0.95)
    return sup(z[:4], batch) + hard(z[4:], *pasted(batch, 0, labels, sure, batch.valid))


def unimatch(answers: Answers, method: Any, batch: Batch, step: Step) -> Tensor:
    (z,) = answers.of(method.student)
    mine, clean, first, second, dropped = z.split(4)
    _, labels, sure = judged(clean, 0.95)
    strong = [hard(s, *pasted(batch, i, labels, sure, batch.valid)) for i, s in enumerate((first, second))]
    return (sup(mine, batch) + sum(strong) / 4 + hard(dropped, labels, sure, batch.valid) / 2) / 2


def unimatch_v2(answers: Answers, method: Any, batch: Batch, step: Step) -> Tensor:
    (z,), (weak,) = answers.of(method.student), answers.of(method.teacher)
    _, labels, sure = judged(weak, 0.95)
    strong = [hard(s, *pasted(batch, i, labels, sure, batch.valid)) for i, s in enumerate(z[4:].split(4))]
    return (sup(z[:4], batch) + sum(strong) / 2) / 2


def corrmatch(answers: Answers, method: Any, batch: Batch, step: Step) -> Tensor:
    """Without regions, which add labels to few pixels here; scores by correlation have no gradient to logits."""
    (z,) = answers.of(method.student)
    mine, weak, strong, dropped = z.split(4)
    _, labels, sure = judged(weak, 0.85)
    mixed_labels, mixed_sure, valid = pasted(batch, 0, labels, sure, batch.valid)
    inside = box_mask(batch.mix[0].boxes, 32, 32)[:, None]
    target = torch.where(inside, weak[batch.mix[0].partner], weak).detach()
    apart = (target.softmax(1) * (target.log_softmax(1) - strong.log_softmax(1))).sum(1)
    kl = (apart * mixed_sure * valid).sum() / valid.sum()
    others = hard(strong, mixed_labels, mixed_sure, valid) + kl + hard(dropped, labels, sure, batch.valid)
    return (sup(mine, batch) / 2 + others / 4) / 2


def swith(answers: Answers, method: Any, batch: Batch, step: Step) -> Tensor:
    """A turn of CutMix: the share of sure pixels weighs all pixels of a picture."""
    (z,), (weak,) = answers.of(method.student), answers.of(method.teachers[0])
    _, labels, sure = judged(weak, 0.95)
    inside = method._box_masks(batch, labels, torch.arange(4) ^ 1, step)
    mixed_labels, valid = (torch.where(inside, x[torch.arange(4) ^ 1], x) for x in (labels, batch.valid))
    share = (sure * batch.valid).sum((1, 2), keepdim=True) / batch.valid.sum((1, 2), keepdim=True)
    mine, mixed, strong = z.split(4)
    return sup(mine, batch) + hard(mixed, mixed_labels, share, valid) + 0.2 * hard(strong, labels, sure, batch.valid)


def cps(answers: Answers, method: Any, batch: Batch, step: Step) -> Tensor:
    (weak_a, a), (weak_b, b) = answers.of(method.student), answers.of(method.second)
    partner, inside = method._boxes(batch, step)
    labels = [torch.where(inside, y[partner], y) for y in (weak_a.argmax(1), weak_b.argmax(1))]
    valid = torch.where(inside, batch.valid[partner], batch.valid).float()
    cross = hard(a[4:], labels[1], torch.ones(()), valid) + hard(b[4:], labels[0], torch.ones(()), valid)
    return sup(a[:4], batch) + sup(b[:4], batch) + 1.0 * cross


def psmt(answers: Answers, method: Any, batch: Batch, step: Step) -> Tensor:
    """After the ramp, at 183 labels; both teachers are heard in all of five classes."""
    (z,), (first,), (second,) = (answers.of(net) for net in (method.student, *(method.teachers[i] for i in (0, 1))))
    confidence, labels, sure = judged((first + second) / 2, 0.6)
    mix = keyed_boxes(batch, step, "psmt-boxes", lambda draws, _, size: beta_boxes(draws, size))
    inside = box_mask(mix.boxes, 32, 32)
    confidence, labels, kept = (
        torch.where(inside, x[torch.arange(4) ^ 1], x) for x in (confidence, labels, sure * batch.valid)
    )
    return sup(z[:4], batch) + 0.6 * (confidence * ce(z[4:], labels) * kept).sum() / kept.sum()


PULLS = {
    "semibaseline": (one_strong_view, {}, {"pseudo.weight": 4.0}),
    "fixmatch": (one_strong_view, {}, {"pseudo.weight": 0.3}),
    "unimatch": (unimatch, {}, {"pseudo.weight": 4.0}),
    "unimatch_v2": (unimatch_v2, {}, {"pseudo.weight": 0.3}),
    "daw": (unimatch, {}, {"pseudo.weight": 4.0}),
    "corrmatch": (corrmatch, {}, {"pseudo.weight": 4.0}),
    "swith": (swith, {"teacher.switch_period": 0.25}, {"pseudo.weight": 4.0}),
    "cps": (cps, {}, {"pseudo.weight": 0.3}),
    "psmt": (psmt, {"vat.epsilon": 0.0}, {"pseudo.weight": 3.0}),
}
"""The authors' loss, what makes its case, and constants that must be rejected."""


@pytest.mark.parametrize("name", PULLS)
def test_the_pull_of_unlabelled_images_over_that_of_labelled_ones(name: str) -> None:
    formula, case, wrong = PULLS[name]
    ours, theirs = pull(name, LATE, formula, **case)  # type: ignore[arg-type]
    hold(ours, theirs)
    with pytest.raises(AssertionError):
        hold(pull(name, LATE, formula, **case, **wrong)[0], theirs)  # type: ignore[arg-type]


# Averages


AVERAGES = {
    "semibaseline": 0.99,
    "viladiff": 0.99,
    "fixmatch": 0.996,
    "unimatch_v2": 0.996,
    "daw": 0.999,
    "swith": 0.99,
}


def kept(method: Method, teacher: nn.Module, step: Step) -> float:
    """Share of itself that a teacher keeps in a step, measured."""
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.zero_()
        for parameter in teacher.parameters():
            parameter.fill_(1.0)
        method.after_step(step)
    return float(next(teacher.parameters()).flatten()[0])


@pytest.mark.parametrize("name", AVERAGES)
def test_steps_that_an_average_is_over(name: str) -> None:
    method = make(name, **({"teacher.switch_period": 1.0} if name == "swith" else {}))
    teacher = method.teachers[0] if name == "swith" else method.teacher  # type: ignore[index, union-attr]
    hold(1 / (1 - kept(method, teacher, Step(5000, 0.5, 0))), 1 / (1 - AVERAGES[name]))  # type: ignore[arg-type]


def test_psmt_turns_over_their_average() -> None:
    """10,399 unlabelled images of VOC at 183 labels in steps of 8 on 4 GPUs: a turn has 325 steps, the average 250."""
    theirs = 10399 / 32 * (1 - 0.996)
    assert theirs == pytest.approx(1.3, abs=0.01)
    method = make("psmt")
    assert isinstance(method, PsMt)
    for steps in (600, 80 * 10399 / 32):  # `digits`, the authors' run
        step = Step(int(steps / 2), int(steps / 2) / steps, 0)
        turn = turn_length(step, method.cfg.teacher.switch_period)
        hold(turn * (1 - kept(method, method.teachers[method._active(step)], step)), theirs)
    with pytest.raises(AssertionError):
        hold(7.5 * (1 - 0.996), theirs)
    with pytest.raises(AssertionError):
        hold(7.5 * (1 - 0.99), theirs)
    assert bounded_momentum(0.996, 325) == 0.996


# Perturbations


def noise_share(features: Tensor, epsilon: float) -> float:
    """Length of PS-MT's noise over that of the map, ours."""
    torch.manual_seed(1)
    decoder = nn.Conv2d(features.shape[1], 21, 1)
    start = torch.rand(features.shape) - 0.5
    (noise,) = virtual_adversarial([features], lambda f: decoder(f[0]), [start], epsilon, VatConfig().xi)
    return float(noise.norm() / features.norm())


def test_psmt_noise_over_the_features() -> None:
    """A map of 304 channels, 128 x 128, of length 1381, and noise of length 2."""
    features = torch.randn(1, 304, 128, 128, generator=torch.Generator().manual_seed(0)).abs()
    features *= 1381 / features.norm()
    direction = torch.rand(features.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    theirs = float((2.0 * direction / direction.norm()).norm() / features.norm())
    hold(noise_share(features, VatConfig().epsilon), theirs)
    with pytest.raises(AssertionError):
        hold(noise_share(features, 0.1), theirs)  # what it was


@pytest.mark.parametrize(
    ("name", "half"), [("unimatch", False), ("daw", False), ("corrmatch", False), ("unimatch_v2", True)]
)
def test_dropped_channels_over_the_features(name: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout2d at 1/2 moves a map by its own length; of UniMatch V2 half of the images are left whole."""
    method = make(name)
    batch = make_batch(views=method.required_views())
    seen: list[list[Tensor]] = []
    encode, decode = method.student.encode, method.student.decode
    monkeypatch.setattr(method.student, "encode", lambda x: seen.append(encode(x)) or seen[-1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(method.student, "decode", lambda x, *a, **k: seen.append(x) or decode(x, *a, **k))  # type: ignore[func-returns-value]
    method(batch, LATE)
    plain, given = seen[-2][-1], seen[-1][-1]
    before, after = (plain[4:], given[4:]) if half else (plain[4:8], given[-4:])
    theirs = 0.5**0.5 if half else 1.0
    hold(float((after - before).norm() / before.norm()), theirs, 1.5)


def test_areas_that_are_pasted_or_cut_out() -> None:
    """Shares of a crop of 513, and the share of classes that ClassMix takes."""
    side = 513
    for snap in (1, 27):  # any pixel, a grid of 19 x 19 patches
        one = box_mask(cutmix_boxes(rngs(200), side, snap), side, side).float().mean()
        hold(float(one), 0.5 * 0.21)  # of half of the images, U[0.02, 0.4]
    cut = square_boxes(rngs(8), side, make("pseudoseg").cfg.cutout)
    hold(float(box_mask(cut, side, side).float().mean()), (100 / 513) ** 2)
    three = parity_mask(parity_boxes(rngs(64), side), side, side).float().mean()
    hold(float(three), 0.375)
    beta = box_mask(beta_boxes(rngs(64), side), side, side).float().mean()
    hold(float(beta), 0.5 * (1 - 1 / 8))  # side sqrt(1 - λ), mean of λ 1/2; what the border cuts off comes off
    labels = torch.arange(5).repeat_interleave(10)[None, None].expand(1, 50, 50)
    mask = class_mask(labels, torch.ones(1, 50, 50, dtype=torch.bool), torch.rand(1, 5))
    assert float(mask.float().mean()) == pytest.approx(2 / 5)  # two of five; rounded up it was three


# PseudoSeg


def test_pseudoseg_soft_labels_and_their_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Tensor, Tensor]] = []
    fuse = pseudoseg.fuse
    monkeypatch.setattr(pseudoseg, "fuse", lambda z, a, t: given.append((z, a)) or fuse(z, a, t))  # type: ignore[func-returns-value]

    def theirs(answers: Answers, method: Any, batch: Batch, step: Step) -> Tensor:
        z, a = given[-1]
        scaled = torch.cat([z, a]) * torch.rsqrt(torch.cat([z, a]).square().mean() + 1e-8)
        mean = sum(half.softmax(1) for half in scaled.chunk(2)) / 2
        sharp = mean**2 / (mean**2).sum(1, keepdim=True)
        assert fuse(z, a, method.cfg.pseudo.temperature).sub(sharp).abs().max() < 0.2  # norms of a batch, of an image
        soft = F.interpolate(sharp, (32, 32), mode="bilinear")
        logits = answers.of(method.student)[-1]
        valid = method._cut(batch, step)[1]
        pull = -(soft * logits[4:].log_softmax(1)).sum(1)
        return sup(logits[:4], batch) + (pull * valid).sum() / valid.sum()

    ours, wanted = pull("pseudoseg", LATE, theirs)
    hold(ours, wanted)
    with pytest.raises(AssertionError):
        hold(pull("pseudoseg", LATE, theirs, **{"pseudo.weight": 4.0})[0], wanted)


# CorrMatch


def test_corrmatch_scores_by_correlation_over_logits() -> None:
    """Compare r = z A with A = softmax(f1^T f2 / sqrt(K)), at 41 x 41 tokens of a crop of 321, K = 21, 256 channels."""
    torch.manual_seed(0)
    width = CorrMatchConfig().width
    head = Correlation(64, width, 21)
    top, z = torch.randn(1, 64, 41, 41), 5 * torch.randn(1, 21, 41, 41)
    a = head(top, torch.ones(1, width)).detach()
    ours = correlated(z, a, torch.Size((41, 41)))
    x = head.project(top) / 0.9
    f1, f2 = head.first(x).flatten(2), head.second(x).flatten(2)
    theirs = (z.flatten(2) @ torch.softmax(f1.mT @ f2 / 21**0.5, 2)).detach()
    hold(float(ours.std() / z.std()), float(theirs.std() / z.std()))
    # A tenth of the channels is dropped: none above three times that, all below a third.
    assert torch.equal(head(top, torch.full((1, width), 0.31)), head(top, torch.ones(1, width)))
    nothing = head(top, torch.full((1, width), 0.03))
    torch.testing.assert_close(nothing, torch.full_like(nothing, 1 / 41**2))


# DAW


def test_daw_running_values_move_at_the_published_rate() -> None:
    method = make_uneven("daw")
    batch = make_batch(views=method.required_views())
    before = method.distributions.clone()  # type: ignore[operator]
    own = method.student(batch.image)["visual"].softmax(1)
    method(batch, LATE)
    method.after_step(LATE)
    confidence, labels = own.max(1)
    known = batch.target != 255
    for k in labels[known].unique().tolist():
        mean = confidence[known & (labels == k)].mean()
        theirs = abs(float(0.01 * (mean - before[0, k])))
        hold(abs(float(method.distributions[0, k] - before[0, k])), theirs)  # type: ignore[index, operator]


# ViLaDiff


def test_viladiff_distillation_over_cross_entropy() -> None:
    """Eqs. 1 and 2 by their letters with λ = 0.5, T = 2, on features of 768 channels and logits of 21 classes."""
    gen, cfg = torch.Generator().manual_seed(0), VilaConfig()
    f, g = (torch.randn(8, 768, generator=gen) for _ in range(2))
    z, q = (3 * torch.randn(8, 21, 32, 32, generator=gen) for _ in range(2))
    loss = F.cross_entropy(z, q.argmax(1))
    theirs = (f - g).square().mean() + 0.5 * (1 - F.cosine_similarity(f, g)).mean()
    ours = cfg.feature_weight * feature_distillation(f, g, cfg.lam, cfg.feature_reduction)
    hold(float(ours / loss), float(theirs / loss))
    p = (z / 2).softmax(1)
    theirs = 4 * (p * (p.log() - (q / 2).log_softmax(1))).sum(1).mean()
    hold(float(cfg.logit_weight * logit_distillation(z, q, cfg.temperature) / loss), float(theirs / loss))


def test_viladiff_noise_over_labels_and_weights_of_its_losses() -> None:
    """DDPM's noise at ten even steps; flips of 0.1 a step; weights 1, 1/2, 1/2."""
    cfg, kept = MixeConfig(), np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    codes = torch.ones(1, 4, 32, 32)
    for t in range(1, 8):  # later the signal is lost in what is measured
        noisy = add_gaussian_noise(codes, t, alpha_bar(cfg.timesteps), torch.randn(codes.shape))
        signal = kept[100 * t - 1] ** 0.5
        theirs = (1 - kept[100 * t - 1]) ** 0.5 / signal
        hold(float(noisy.std() / noisy.mean().abs()), theirs)
    hold(cfg.beta, 0.1)
    for ours, theirs in zip(cfg.loss_weights, (1.0, 0.5, 0.5), strict=True):
        hold(ours, theirs)


# AllSpark


def answer_share(net: ChannelAttention, tokens: Tensor, memory: Tensor) -> float:
    """Standard deviation of the answer over that of the tokens that it is added to."""
    with torch.no_grad():
        return float(net(F.layer_norm(tokens, tokens.shape[-1:]), memory[None]).std() / tokens.std())


def test_allspark_answers_over_the_tokens_at_the_start() -> None:
    """512 channels, 17 x 17 tokens of a crop of 513, two heads; a memory of 512 channels for each of four classes."""
    torch.manual_seed(0)
    tokens, memory = torch.randn(2, 289, 512), F.layer_norm(torch.randn(4, 289, 512), (512,))
    e = F.layer_norm(tokens, (512,))
    limit = (6 / (512 + 1024)) ** 0.5  # Xavier's, for four matrices
    q, k, v, out = ((2 * torch.rand(a, b) - 1) * limit for a, b in [(1024, 512)] * 3 + [(512, 1024)])
    keys, values = (torch.cat(list(memory @ w.T), 1) for w in (k, v))  # (N, K h C)
    scores = (e @ q.T).mT @ keys
    scores = (scores - scores.mean((1, 2), keepdim=True)) / (scores.var((1, 2), keepdim=True) + 1e-5).sqrt()
    theirs = float(((scores.softmax(2) @ values.T).mT @ out.T).std() / tokens.std())
    cfg = AllSparkConfig()
    net = ChannelAttention(512, cfg.attention_heads)
    hold(answer_share(net, tokens, memory), theirs)
    with torch.no_grad():
        net.out.weight.mul_(4)
    with pytest.raises(AssertionError):
        hold(answer_share(net, tokens, memory), theirs)


def test_allspark_drops_as_much_as_published() -> None:
    cfg = AllSparkConfig()
    net, asked = ChannelAttention(32, 2), {}

    def draw(what: str, shape: tuple[int, ...]) -> Tensor:
        asked[what] = shape
        return torch.rand(2, *shape)

    found = net(torch.randn(2, 289, 32), torch.randn(1, 4, 289, 32), draw, cfg.dropout)
    assert asked == {"weights": (64, 256), "answer": (289, 32)}
    hold(float((found == 0).float().mean()), 0.1)


def answers_while_training(rates: dict[str, Any] | None, out: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """Size of the answers over the tokens that they are added to, in step 300 of 600 with 183 labels of `digits`."""
    tokens: list[Tensor] = []
    found: list[tuple[bool, float]] = []
    embed, restore = AllSparkBlock.embed, AllSparkBlock.restore

    def noted(self: AllSparkBlock, top: Tensor) -> tuple[Tensor, Tensor]:
        seen = embed(self, top)
        tokens[:] = [seen[0].detach()]
        return seen

    def measured(self: AllSparkBlock, both: Tensor, grid: torch.Size) -> Tensor:
        added = both.detach() - tokens[0]
        found.append((self.training, float(added.std() / tokens[0].std())))
        return restore(self, both, grid)

    monkeypatch.setattr(AllSparkBlock, "embed", noted)
    monkeypatch.setattr(AllSparkBlock, "restore", measured)
    if rates is not None:
        monkeypatch.setattr(AllSpark, "extra_param_groups", lambda self: rates)
    flat = {"method.name": "allspark", "data.split": "183", "train.steps": 600, "runtime.runs_dir": str(out)}
    cfg = override(RunConfig(), flat | {"runtime.progress": False, "runtime.threads": 1})
    with pytest.raises(StopRequested):
        fit(cfg, report=lambda news: news.get("step", 0) >= 300)
    return [share for training, share in found if training][-1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rates", [None, {}], ids=["the encoder's rate", "the head's rate"])
def test_allspark_answers_stay_below_the_tokens(
    rates: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the head's rate they end at many times the tokens, and all pixels in few classes."""
    share = answers_while_training(rates, tmp_path, monkeypatch)
    print(f"answers over tokens at step 300: {share:.2f}")
    assert share <= 1 if rates is None else share > 3


def test_every_method_with_constants_of_its_authors_is_here() -> None:
    elsewhere = {"ddfp", "semivl", "u2pl", "logicdiag"}  # test_constant_sizes_density.py
    without = {"supervised", "textprobe", "fixmatch_tags"}  # nothing is added; ours
    here = {*PULLS, *AVERAGES, "pseudoseg", "allspark"}
    assert here | elsewhere | without == set(METHODS)
