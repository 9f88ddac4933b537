"""What a constant adds, relative to what is there: by the authors' formula and by ours on the same tensors.

DDFP, U2PL and SemiVL by what their releases compute, LogicDiag, whose code is not public, by the reconstruction's
description. Tensors have the authors' channels, classes and values (after a norm and ReLU; maps of classes with
borders) on a part of their grid. Ours has to lie between a third and three times theirs; each guard also rejects the
constants that stood here before, or such as are plainly off, so that it is known to see them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_kit import SIDE, make, make_batch, vectors
from torch import Tensor, nn

from viladiff.data.batch import CutMix, Step
from viladiff.data.sources.voc import CLASS_NAMES
from viladiff.methods.base import MeanTeacher
from viladiff.methods.ddfp import Ddfp, DdfpConfig, lower_density
from viladiff.methods.logicdiag import LogicDiag, LogicDiagConfig
from viladiff.methods.semivl import SemiVl
from viladiff.methods.u2pl import U2pl, U2plConfig
from viladiff.models.baselines import normalizing_flow as flow_module
from viladiff.models.baselines.class_hierarchy import FLOOR, diagnose, known_groups, parents
from viladiff.models.baselines.normalizing_flow import Flow
from viladiff.models.baselines.vl_decoder import VlDecoder, VlDecoderConfig
from viladiff.models.segmenter import NetworkFactory
from viladiff.models.stream import StreamOutput
from viladiff.runs.config import RunConfig, override

CLASSES, FACTOR = 21, 3.0


def alike(mine: float, theirs: float) -> bool:
    return theirs / FACTOR <= mine <= theirs * FACTOR


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(n: int, channels: int, side: int, seed: int, cells: int = 6) -> Tensor:
    """Noise of variance 1 whose neighbours are alike: (n, channels, side, side)."""
    x = F.interpolate(torch.randn(n, channels, cells, cells, generator=gen(seed)), (side, side), mode="bicubic")
    return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)


def built(name: str, dataset: str = "", **changes: object) -> Any:
    """A method for 21 classes."""
    flat = {f"method.{path}": value for path, value in changes.items()}
    cfg = override(RunConfig(), {"method.name": name, "model.pretrained": "none", "model.decoder_width": 16} | flat)
    torch.manual_seed(0)
    build = NetworkFactory(cfg.model, CLASSES, 12, dataset, class_names=CLASS_NAMES, crop=SIDE, texts=vectors)
    return {"u2pl": U2pl, "semivl": SemiVl, "logicdiag": LogicDiag}[name](cfg.method, build).train()


def time_constant(method: Any, step: Step) -> float:
    """Steps 1 / (1 - m) of the teacher's average at that step, from how far it moves."""
    mine, theirs = next(method.teacher.parameters()), next(method.student.parameters())
    with torch.no_grad():
        mine.zero_()
        theirs.fill_(1.0)
        method.after_step(step)
    return 1 / float(mine.detach().double().mean())


# DDFP

ATAN: dict[str, Callable[[Tensor, float], Tensor]] = {
    "FrEIA": lambda x, limit: limit * 0.636 * torch.atan(x),
    "before": lambda x, limit: 2 * limit / math.pi * torch.atan(x / limit),
}


def released(flow: Flow, x: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of each class (n, K), log |det| (n,)): two GLOW couplings, clamp 2, means of N(0, 1), unit covariance."""
    unit = flow.means / flow.means.std()
    log_det = x.new_zeros(len(x))
    for coupling in flow.couplings:
        first, second = x.chunk(2, 1)
        scale, shift = coupling.by_second(second).chunk(2, 1)  # type: ignore[operator]
        scale = ATAN["FrEIA"](scale, 2.0)
        first, log_det = first * scale.exp() + shift, log_det + scale.sum(1)
        scale, shift = coupling.by_first(first).chunk(2, 1)  # type: ignore[operator]
        scale = ATAN["FrEIA"](scale, 2.0)
        second, log_det = second * scale.exp() + shift, log_det + scale.sum(1)
        x = torch.cat([first, second], 1)[:, coupling.permutation]  # type: ignore[index]
    apart = (x[:, None] - unit).square().sum(2)
    return -0.5 * (apart + x.shape[1] * math.log(2 * math.pi)), log_det


def released_nll(flow: Flow, x: Tensor) -> Tensor:
    log_p, log_det = released(flow, x)
    return math.log(CLASSES) - log_p.logsumexp(1) - log_det


def started(means: float | None = None) -> tuple[Flow, Tensor]:
    """The flow as it starts, or with means of that deviation, and vectors of 256 channels after a norm and ReLU."""
    torch.manual_seed(0)
    flow = Flow(256, CLASSES, 256)
    if means is not None:
        flow.means.data.mul_(means / flow.means.data.std())
    x = smooth(1, 256, 33, 1).relu().flatten(2)[0].T
    return flow, (x + 0.05 * torch.randn(x.shape, generator=gen(2))).requires_grad_()


def slope(nll: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(nll.sum(), x, retain_graph=True)
    return found


START = {
    "ours": (None, "ours", True),
    "means at 0.05": (0.05, "ours", False),
    "means at 5": (5.0, "ours", False),
    "clamp divided": (None, "before", False),
    "both": (0.05, "before", False),
}


@pytest.mark.parametrize(("means", "clamp", "fits"), START.values(), ids=START)
def test_flow_starts_as_strong_as_the_authors(
    means: float | None, clamp: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far classes differ in log p, and the variance that the Jacobian brings into it."""
    if clamp != "ours":
        monkeypatch.setattr(flow_module, "soft_clamp", ATAN[clamp])
    flow, x = started(means)
    with torch.no_grad():
        log_p, log_det = released(flow, x)
        found = torch.stack([-flow.nll(x, torch.full((len(x),), k)) for k in range(CLASSES)], 1)
        mine = flow(x)[1]
    classes = alike(float(found.std(1).mean()), float(log_p.std(1).mean()))
    jacobian = alike(float(mine.var()), float(log_det.var()))
    assert (classes and jacobian) == fits
    assert classes == (means is None) and jacobian == (clamp == "ours")


@pytest.mark.parametrize(("means", "clamp", "fits"), START.values(), ids=START)
def test_density_descends_in_the_authors_direction(
    means: float | None, clamp: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if clamp != "ours":
        monkeypatch.setattr(flow_module, "soft_clamp", ATAN[clamp])
    flow, x = started(means)
    cosine = F.cosine_similarity(slope(flow.nll(x), x), slope(released_nll(flow, x), x)).mean()
    assert (float(cosine) > 0.97) == fits, float(cosine)


@pytest.mark.parametrize(("radius", "fits"), [(None, True), (0.05, False), (1.5, False)])
def test_features_move_as_far_as_the_authors(radius: float | None, fits: bool) -> None:
    """Theirs by 4 at each position of a map of 304 channels after norms and ReLU, along the slope of the flow's NLL."""
    flow, _ = started()
    torch.manual_seed(1)
    last = nn.Sequential(
        *(nn.Conv2d(304, 256, 3, padding=1), nn.GroupNorm(32, 256), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.GroupNorm(32, 256), nn.ReLU()),
    )
    maps = torch.cat([smooth(2, 48, 17, 3, cells=12), smooth(2, 256, 17, 4)], 1).relu()

    def rows(given: Tensor) -> Tensor:
        return last(given).flatten(2).mT.flatten(0, 1)

    (move,) = lower_density([maps], lambda given: flow.nll(rows(given[0])).sum(), radius or DdfpConfig().radius)
    asked = maps.clone().requires_grad_()
    theirs = 4.0 * F.normalize(slope(released_nll(flow, rows(asked)), asked), dim=1)
    length = maps.norm(dim=1).mean()
    assert alike(float(move.norm(dim=1).mean() / length), float(theirs.norm(dim=1).mean() / length)) == fits
    assert float(F.cosine_similarity(move, theirs).mean()) > 0.97
    with torch.no_grad():
        before, mine, their = (float(released_nll(flow, rows(x)).sum()) for x in (maps, maps + move, maps + theirs))
    assert mine > before and (alike(mine - before, their - before) or not fits)


@pytest.mark.parametrize("counted", ["after the warm-up", "from the first step"])
def test_the_average_is_as_long_as_the_authors_after_the_warm_up(counted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch of 80 is warm-up; n steps after it theirs keeps min(1 - 1 / (n + 1), 0.999)."""
    if counted != "after the warm-up":
        monkeypatch.setattr(Ddfp, "after_step", MeanTeacher.after_step)
    method, epoch = make("ddfp"), 500
    found = []
    for n in (0, 1, 9, 99, 5000):
        step = Step(epoch + n, (epoch + n) / (80 * epoch), 3)
        found.append(alike(time_constant(method, step), 1 / (1 - min(1 - 1 / (n + 1), 0.999))))
    assert all(found) == (counted == "after the warm-up"), found


# U2PL


class Given(nn.Module):
    """In place of a representation head: what it is given."""

    def forward(self, mid: Tensor, uniform: Tensor | None = None, p: float = 0.1) -> Tensor:
        return mid.flatten(2).mT.float()


def scene(n: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (n, side, side), a teacher's logits, sure inside and unsure at borders, and vectors of 256 channels."""
    score = smooth(n, CLASSES, side, 5)
    logits = 6 * score + 0.5 * torch.randn(score.shape, generator=gen(6))
    centres = torch.randn(CLASSES, 256, generator=gen(7))
    mid = torch.einsum("nchw,cd->ndhw", logits.softmax(1), centres)
    return score.argmax(1), logits, mid + 0.7 * torch.randn(mid.shape, generator=gen(8))


@pytest.mark.parametrize(
    ("changes", "fits"),
    [({}, True), ({"contrast_weight": 0.1}, False), ({"contrast_weight": 10.0}, False)],
    ids=["ours", "0.1", "10"],
)
def test_contrast_pulls_as_hard_as_the_authors(changes: dict[str, object], fits: bool) -> None:
    """The gradient of L_c in the layer below, over that of the supervised loss; the paper's rule, at half of training.

    Theirs takes 256 anchors of each class of the batch, ours 256 of each image, shared by its classes.
    """
    method, side, labelled = built("u2pl", width=256, queue_size=2000, **changes), 33, 4
    method.head, method.teacher_head = Given(), Given()
    stride = method.student.decoder.stride
    classes, logits, mid = scene(8, side)
    p = logits.softmax(1)
    entropy = -(p * p.log()).sum(1)
    low, high = (entropy[labelled:].quantile(q) for q in (0.1, 0.9))
    known = torch.arange(8)[:, None, None] < labelled
    sure, unsure = known | (entropy <= low), known | (entropy >= high)
    rank = (p[:, None] > p[:, :, None]).sum(2)  # of each class, from 0
    other = torch.arange(CLASSES)[:, None, None] != classes[:, None]
    far = torch.where(known[:, None], (rank < 3) & other, (rank >= 3) & (rank < 20)) & unsure[:, None]
    rows = F.normalize(mid, dim=1).permute(0, 2, 3, 1)
    bank = [rows[far[:, k]] for k in range(CLASSES)]
    for k, found in enumerate(bank):
        counted = torch.zeros(1, CLASSES, len(found), dtype=torch.bool)
        counted[0, k] = True
        method.banks.push(found.expand(1, CLASSES, -1, -1), counted)

    layer = nn.Conv2d(256, 256, 1, bias=False)
    torch.manual_seed(3)
    nn.init.dirac_(layer.weight)
    classify = torch.randn(CLASSES, 256) / 16
    student = layer(mid + 0.5 * torch.randn(mid.shape, generator=gen(9)))
    scores = torch.einsum("ndhw,cd->nchw", student, classify)
    sup = slope(F.cross_entropy(scores[:labelled], classes[:labelled]), layer.weight).norm()

    def grown(x: Tensor) -> Tensor:
        return x.repeat_interleave(stride, 1).repeat_interleave(stride, 2)

    views = method.required_views()
    batch = make_batch(views=views)
    stream = StreamOutput(mid.flatten(2).mT, layer(mid + 0.5 * torch.randn(mid.shape, generator=gen(9))), scores)
    mine, anchors = method._contrast(
        stream,
        StreamOutput(mid.flatten(2).mT, mid, logits),
        grown(classes),
        [grown(sure), grown(unsure)],
        batch,
        Step(7, 0.5, 3),
    )
    mine = slope(method.cfg.contrast_weight * mine, layer.weight).norm() / sup
    assert 0 < int(anchors) <= 256 * 8

    terms = []
    for k in range(CLASSES):
        mask = (classes == k) & sure
        chosen = student.permute(0, 2, 3, 1)[mask & (p[:, k] > 0.3)]
        if not len(chosen) or not len(bank[k]):
            continue
        chosen = chosen[torch.randint(len(chosen), (256,), generator=gen(k))]
        against = bank[k][torch.randint(len(bank[k]), (256, 50), generator=gen(100 + k))]
        positive = mid.permute(0, 2, 3, 1)[mask].mean(0).expand(256, 1, -1)
        cosines = F.cosine_similarity(chosen[:, None], torch.cat([positive, against], 1), dim=2)
        terms.append(F.cross_entropy(cosines / 0.5, torch.zeros(256, dtype=torch.int64)))
    assert len(terms) > 10
    theirs = slope(torch.stack(terms).mean(), layer.weight).norm() / sup
    assert alike(float(mine), float(theirs)) == fits, (float(mine), float(theirs))


@pytest.mark.parametrize(("classes", "megabytes", "fits"), [(21, None, True), (81, None, True), (21, 64, False)])
def test_queues_are_as_long_as_the_authors(classes: int, megabytes: int | None, fits: bool) -> None:
    """30,000 vectors of 256 channels a class there; the oldest of ours is younger than the teacher's average."""
    cfg = override(RunConfig(), {"method.name": "u2pl", "model.pretrained": "none"}).method
    if megabytes is not None:
        cfg = cfg.model_copy(update={"queue_megabytes": megabytes})
    with torch.device("meta"):
        method = U2pl(
            cfg.model_copy(update={"width": 256}),
            NetworkFactory(RunConfig(model={"pretrained": "none"}).model, classes, 12),
        )
    size = method.banks.vectors.shape[1]
    assert alike(size, 30_000) == fits
    assert size / (8 * cfg.max_enqueue) < 1 / (1 - cfg.teacher.momentum)


@pytest.mark.parametrize("percent", [20.0, 2.0])
def test_as_many_pixels_are_dropped_as_by_the_authors(percent: float) -> None:
    """20 (1 - τ) percent of them."""
    method = make("u2pl", drop_percent=percent)
    batch = make_batch(views=method.required_views())
    found = []
    for progress in (0.05, 0.5, 0.9):
        dropped = 1 - float(method(batch, Step(7, progress, 3)).terms["coverage"])
        found.append(alike(dropped, 0.2 * (1 - progress)))
    assert all(found) == (percent == U2plConfig().drop_percent), found


# SemiVL


@pytest.mark.parametrize(("weight", "fits"), [(None, True), (1.0, False), (0.01, False)])
def test_labels_from_text_teach_as_much_as_the_authors(
    weight: float | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient at the strong views' logits, over UniMatch's, with cosines as CLIP's: near 0.2, apart by 0.03."""
    changes = {} if weight is None else {"guidance.weight": weight}
    method, progress = built("semivl", "voc", **changes), 0.25
    batch = make_batch(views=method.required_views())
    cosines = 0.2 + 0.03 * smooth(4, CLASSES, SIDE, 10)
    method._clip = (nn.Identity(),)  # whose scale is 100
    monkeypatch.setattr(method, "_guide", lambda batch, top: (cosines, None))
    still = CutMix(torch.zeros(4, 4, dtype=torch.int64), torch.arange(4))
    object.__setattr__(batch, "mix", (still, still))
    features = [x.detach() for x in method.student.encode(torch.cat([batch.image, batch.weak[0]]))]
    streams = [(4 * smooth(4, CLASSES, SIDE, seed)).requires_grad_() for seed in (11, 12, 13)]
    total, *_ = method.extra_loss(batch, Step(7, progress, 3), features, tuple(streams))
    mine = torch.stack([g.norm() for g in torch.autograd.grad(total, streams)])

    q = (100 * cosines).softmax(1)
    labels = torch.where((q.amax(1) >= 0.9) & batch.valid, q.argmax(1), 255)
    assert 0.05 < float((labels != 255).float().mean()) < 0.95
    shares = (0.25, 0.25, 0.5)
    guided = sum(
        w * F.cross_entropy(z, labels, ignore_index=255, reduction="none").mean()
        for w, z in zip(shares, streams, strict=True)
    )
    theirs = torch.stack([g.norm() for g in torch.autograd.grad(0.1 * (1 - progress) * guided, streams)])
    clean = (6 * smooth(4, CLASSES, SIDE, 14)).softmax(1)
    counted = (clean.amax(1) >= 0.95) & batch.valid
    unimatch = sum(
        w / 2 * (F.cross_entropy(z, clean.argmax(1), reduction="none") * counted).sum() / batch.valid.sum()
        for w, z in zip(shares, streams, strict=True)
    )
    there = torch.stack([g.norm() for g in torch.autograd.grad(unimatch, streams)])
    assert all(alike(a, b) == fits for a, b in zip((mine / there).tolist(), (theirs / there).tolist(), strict=True))


def test_branches_of_the_decoder_are_as_large_as_the_authors() -> None:
    """Of the ASPP, the skips and the projected text, over what they join; norms have 16 channels a group."""
    torch.manual_seed(0)
    net: Any = VlDecoder((768,) * 4, (16,) * 4, 128, torch.randn(6, 512), VlDecoderConfig())
    cosines, tops = 0.2 + 0.03 * smooth(6, 1, 16, 15), smooth(1, 768, 16, 16)
    with torch.no_grad():
        x = net.embed(cosines)
        branches = [F.relu(F.group_norm(branch[0](x), 8)) for branch in net.aspp.branches]
        pooled = F.relu(F.group_norm(net.aspp.mean[0](x.mean((2, 3), keepdim=True)), 8))
        theirs = F.relu(F.group_norm(net.aspp.join[0](torch.cat([*branches, pooled.expand_as(x)], 1)), 8))
        assert alike(float((net.aspp(x) - x).std() / x.std()), float(theirs.std() / x.std()))
        torch.testing.assert_close(net.aspp(x) - x, theirs, rtol=1e-3, atol=1e-4)

        y = net.aspp(x)
        for up, skip, level in zip(net.ups, net.skips, net.levels, strict=True):
            joined = F.relu(F.conv2d(tops, skip[0].weight, skip[0].bias, padding=1))
            grown = up.grow(y)
            assert level in (0, 2) and joined.shape[1] + grown.shape[1] == up.grow.in_channels
            assert alike(float(skip(tops).std() / grown.std()), float(joined.std() / grown.std()))
            y = up(y[None], F.interpolate(skip(tops), grown.shape[-2:]))[0]

        seen: list[Tensor] = []
        for block in net.blocks:
            block.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
        net([tops] * 4)
        words = F.relu(F.linear(net.class_texts, net.text[0].weight, net.text[0].bias))
    assert len(seen) == 2 and all(alike(float(given.std()), float(words.std())) for given in seen)


# LogicDiag


@pytest.mark.parametrize(("weight", "fits"), [(None, True), (0.1, False), (10.0, False)])
def test_conflict_counts_as_much_beside_confidence_as_described(weight: float | None, fits: bool) -> None:
    """Σ_Δ log(ε + C) over Σ log κ, rule by rule on VOC's hierarchy: the deviation among a pixel's paths."""
    parent = parents(known_groups("voc", CLASSES) or ())
    count = len(set(parent.tolist()))
    leaf = 6 * smooth(1, CLASSES, 8, 17) - 4
    above = torch.stack([leaf[:, parent == g].amax(1) for g in range(count)], 1) + smooth(1, count, 8, 18)
    z = torch.cat([leaf, above], 1)
    gamma = LogicDiagConfig().conflict_weight if weight is None else weight
    alone = diagnose(z, parent, 0.0)
    mine = (diagnose(z, parent, gamma) - alone).std(1).mean() / alone.std(1).mean()

    s = z.double().sigmoid()[0].flatten(1)
    conflict: list[list[Tensor]] = [[] for _ in range(CLASSES + count)]

    def rule(degree: Tensor, *nodes: int) -> None:
        for node in nodes:
            conflict[node].append(degree)

    families = [[k for k in range(CLASSES) if parent[k] == g] for g in range(count)]
    tops = [CLASSES + g for g in range(count)]
    for g, family in enumerate(families):
        for k in family:
            rule(s[k] * (1 - s[CLASSES + g]), k, CLASSES + g)
        rule(s[CLASSES + g] * (1 - s[family].amax(0)), CLASSES + g, *family)
    rule(1 - s[tops].amax(0), *tops)
    for family in [*families, tops]:
        for i, a in enumerate(family):
            for b in family[i + 1 :]:
                rule(s[a] * s[b], a, b)
    degree = torch.stack([torch.stack(found).mean(0) for found in conflict])
    observed = s > 0.5
    kappa = torch.where(observed, s, 1 - s)
    sure, torn = [], []
    for k in range(CLASSES):
        path = torch.zeros(CLASSES + count, 1, dtype=torch.bool)
        path[k] = path[CLASSES + parent[k]] = True
        wrong = observed != path
        sure.append(torch.where(wrong, (1 - kappa).log(), kappa.log()).sum(0))
        torn.append((wrong * (degree + FLOOR).log()).sum(0))
    theirs = torch.stack(torn).std(0).mean() / torch.stack(sure).std(0).mean()
    assert alike(float(mine), float(theirs)) == fits, (float(mine), float(theirs))


@pytest.mark.parametrize(("momentum", "fits"), [(None, True), (0.9, False), (0.9999, False)])
def test_logicdiags_average_is_as_long_as_that_of_its_loop(momentum: float | None, fits: bool) -> None:
    """The loop is that of FixMatch with an average of 0.996, here long after the start."""
    method = make("logicdiag", **({} if momentum is None else {"teacher.momentum": momentum}))
    assert alike(time_constant(method, Step(100_000, 0.6, 3)), 1 / (1 - 0.996)) == fits
