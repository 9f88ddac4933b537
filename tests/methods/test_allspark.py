"""AllSpark: its block, its memory and its loss against straight-line NumPy; what reads whose channels, and when."""

from __future__ import annotations

from dataclasses import replace
from math import erf
from typing import Any

import numpy as np
import pytest
import torch
from method_kit import (
    CLASSES,
    SIDE,
    STEP,
    cross_entropy_map,
    make,
    make_batch,
    make_uneven,
    mean_over,
    softmax,
    take_steps,
)
from torch import Tensor

from viladiff.data.batch import Batch, Step
from viladiff.methods.allspark import AllSpark, AllSparkConfig
from viladiff.methods.base import Method
from viladiff.models.baselines import allspark
from viladiff.models.baselines.allspark import (
    AllSparkBlock,
    ChannelAttention,
    SemanticMemory,
    nearest_class,
    resize_tokens,
)
from viladiff.models.blocks import upsample
from viladiff.runs.config import RunConfig, override
from viladiff.training.optim import param_groups

Array = np.ndarray
EARLY = Step(7, 0.01, 3)


def np_(x: Tensor) -> Array:
    return np.asarray(x.detach().double().numpy())


def normed(x: Array, axes: tuple[int, ...]) -> Array:
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return np.asarray((x - mean) / np.sqrt(var + 1e-5))


def gelu(x: Array) -> Array:
    return np.asarray(x * 0.5 * (1 + np.vectorize(erf)(x / 2**0.5)))


def cross_in_numpy(net: ChannelAttention, x: Array, source: Array, drop: Array | None = None, p: float = 0.1) -> Array:
    """Reference for x (B, N, C), source (S, N, C) that all images read: one image and one row of the map at a time."""
    q, k, v, out = (np_(f.weight) for f in (net.query, net.key, net.value, net.out))
    answers = np.concatenate([one @ k.T for one in source], 1)  # (N, S h C)
    told = np.concatenate([one @ v.T for one in source], 1)
    found = []
    for i, one in enumerate(x):
        scores = normed((one @ q.T).T @ answers, (0, 1))
        weights = softmax(scores, axis=1)
        if drop is not None:
            weights = weights * (drop[i] >= p) / (1 - p)
        found.append((weights @ told.T).T @ out.T)
    return np.stack(found)


def within_in_numpy(net: ChannelAttention, x: Array) -> Array:
    q, k, v, out = (np_(f.weight) for f in (net.query, net.key, net.value, net.out))
    width, found = x.shape[2], []
    for one in x:
        heads = []
        for h in range(net.heads):
            rows = slice(h * width, (h + 1) * width)
            scores = normed((one @ q[rows].T).T @ (one @ k[rows].T), (0, 1))
            heads.append((softmax(scores, axis=1) @ (one @ v[rows].T).T).T)
        found.append(np.concatenate(heads, 1) @ out.T)
    return np.stack(found)


def attention(width: int = 6, heads: int = 2) -> ChannelAttention:
    torch.manual_seed(1)
    return ChannelAttention(width, heads)


def test_channels_of_all_sources_answer_together() -> None:
    net, x, source = attention(), torch.randn(3, 9, 6), torch.randn(4, 9, 6)
    drop = torch.rand(3, 12, 4 * 12)
    answers = torch.rand(3, 9, 6)

    def draw(what: str, shape: tuple[int, ...]) -> Tensor:
        return {"weights": drop, "answer": answers}[what].view(3, *shape)

    found = net(x, source[None], draw, 0.3)
    expected = cross_in_numpy(net, np_(x), np_(source), np_(drop), 0.3) * (np_(answers) >= 0.3) / 0.7
    np.testing.assert_allclose(np_(found), expected, atol=1e-5)
    plain = net(x, source[None])
    np.testing.assert_allclose(np_(plain), cross_in_numpy(net, np_(x), np_(source)), atol=1e-5)
    own = net(x, x[:, None])
    alone = [cross_in_numpy(net, np_(one)[None], np_(one)[None])[0] for one in x]
    np.testing.assert_allclose(np_(own), np.stack(alone), atol=1e-5)


def test_a_head_reads_its_own_channels_alone_on_the_unlabelled_side() -> None:
    net, x = attention(heads=3), torch.randn(2, 9, 6)
    np.testing.assert_allclose(np_(net.within(x)), within_in_numpy(net, np_(x)), atol=1e-5)
    asked: list[tuple[object, ...]] = []
    for lost in ("weights", "answer"):

        def draw(what: str, shape: tuple[int, ...], lost: str = lost) -> Tensor:
            asked.append((what, *shape))
            return torch.full((2, *shape), float(what != lost))

        assert not net.within(x, draw, 0.5).any()  # all of it dropped
    assert asked == 2 * [("weights", 3, 6, 6), ("answer", 9, 6)]


def test_projections_start_as_published() -> None:
    """Xavier's uniform, +- sqrt(6 / (in + out)), and no bias."""
    net = attention(40)
    for layer in (net.query, net.key, net.value, net.out):
        limit = (6 / (40 + 80)) ** 0.5
        assert layer.bias is None and 0.99 * limit < layer.weight.abs().max() <= limit
        assert layer.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.03)


def block_in_numpy(net: AllSparkBlock, top: Array, attended: Any) -> Array:
    """(B, D, h, w); ``attended`` maps normalised tokens (B, N, C) to what is added to the tokens."""
    enter, leave = net.enter[0], net.leave[0]
    batch, _, h, w = top.shape
    tokens = gelu(top.reshape(batch, -1, h * w).transpose(0, 2, 1) @ np_(enter.weight)[:, :, 0, 0].T + np_(enter.bias))
    e = normed(tokens, (2,)) * np_(net.norm.weight) + np_(net.norm.bias)
    tokens = tokens + attended(e)
    tokens = normed(tokens, (2,)) * np_(net.norm_out.weight) + np_(net.norm_out.bias)
    out = gelu(tokens @ np_(leave.weight)[:, :, 0, 0].T + np_(leave.bias))
    return np.asarray(out.transpose(0, 2, 1).reshape(top.shape))


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_a_looked_at_image_is_rebuilt_from_its_own_channels_in_any_size(grid: tuple[int, int]) -> None:
    torch.manual_seed(2)
    net = AllSparkBlock(10, 6, 2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    top = torch.randn(3, 10, *grid)
    expected = block_in_numpy(
        net, np_(top), lambda e: np.concatenate([cross_in_numpy(net.cross, one[None], one[None]) for one in e])
    )
    found = net(top)
    np.testing.assert_allclose(np_(found), expected, atol=1e-4)
    torch.testing.assert_close(net(top[1:2]), found[1:2])  # whatever else is in the batch


# The memory


def test_a_queue_is_first_in_first_out_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Tensor] = []
    copy = Tensor.index_copy
    monkeypatch.setattr(Tensor, "index_copy", lambda x, dim, rows, y: written.append(rows) or copy(x, dim, rows, y))  # type: ignore[func-returns-value]
    gen, memory = torch.Generator().manual_seed(0), SemanticMemory(3, 4, 2)
    queues: list[list[list[float]]] = [[], [], []]
    for count in (5, 1, 12, 7, 3):  # of 12, more come to a class than it keeps
        channels, classes = torch.randn(count, 4, generator=gen), torch.randint(0, 2, (count,), generator=gen)
        memory.push(channels, classes)
        for row, k in zip(channels.tolist(), classes.tolist(), strict=True):
            queues[k] = [*queues[k], row][-4:]
        held = memory.read(torch.Size((2, 2))).mT  # (K, C, N)
        for k in range(3):
            expected = queues[k] + [[0.0] * 4] * (4 - len(queues[k]))
            assert sorted(held[k].tolist()) == sorted(torch.tensor(expected).tolist())
        assert memory.filled() == pytest.approx(sum(map(len, queues)) / 12)
        assert (memory.slots[-1] == 0).all()
        kept = written[-1][written[-1] < 12]
        assert len(kept.unique()) == len(kept)  # on a GPU, of two in one place either may stay
    assert queues[2] == [] and memory.pushed.sum() == 28


def test_the_memory_comes_in_other_grids_too() -> None:
    memory = SemanticMemory(2, 3, 4)
    memory.push(torch.arange(48.0).view(3, 16), torch.tensor([1, 1, 1]))
    found = memory.read(torch.Size((2, 6))).mT
    maps = torch.arange(48.0).view(1, 3, 4, 4)
    torch.testing.assert_close(found[1].view(3, 2, 6), upsample(maps, (2, 6))[0])
    assert not found[0].any()
    x = torch.randn(2, 3, 16)
    assert resize_tokens(x, (4, 4), (4, 4)) is x


def test_a_channel_goes_to_the_class_whose_map_it_is_most_like() -> None:
    gen = torch.Generator().manual_seed(3)
    channels, maps = torch.randn(2, 7, 9, generator=gen), torch.rand(2, 4, 9, generator=gen)
    maps[:, 2] *= 100  # size does not count
    found = nearest_class(channels, maps)
    for u in range(2):
        for c in range(7):
            x = np_(channels)[u, c]
            cosines = [x @ m / np.linalg.norm(x) / np.linalg.norm(m) for m in np_(maps)[u]]
            assert int(found[u, c]) == int(np.argmax(cosines))
    assert len(found.unique()) > 2


def test_stated_memory_is_that_of_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """22 and 85 MB a map and a queue at 21 and 81 classes, width 256, two heads, 1024 tokens; four maps are kept."""
    cfg, shapes = AllSparkConfig(), []
    attend = allspark._attend
    monkeypatch.setattr(
        allspark, "_attend", lambda q, k, *rest: shapes.append((*q.shape[1:2], k.shape[2])) or attend(q, k, *rest)
    )
    for classes, megabytes in ((21, 22), (81, 85)):
        with torch.device("meta"):
            net, memory = ChannelAttention(cfg.width, cfg.attention_heads), SemanticMemory(classes, cfg.width, 32)
            net(torch.empty(1, 1024, 256), memory.read(torch.Size((32, 32)))[None])
        assert shapes[-1] == (512, 512 * classes)
        assert round(4 * shapes[-1][0] * shapes[-1][1] / 1e6) == megabytes
        assert round(4 * memory.slots.numel() / 1e6) == megabytes
    assert shapes[0] == (512, 10752)
    sizes: list[int] = []
    net = attention(32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
        net(torch.randn(1, 4, 32), torch.randn(1, 40, 4, 32), lambda what, shape: torch.rand(1, *shape))
    assert sum(size == 64 * 40 * 64 for size in sizes) == 4


# One step


class Seen:
    """Notes what the decoder gets from the block and what it answers."""

    def __init__(self, method: AllSpark, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tops: list[Tensor] = []
        self.logits: list[Tensor] = []
        decode = method.student.decode_rebuilt

        def noted(features: list[Tensor], *rest: Any) -> Any:
            found = decode(features, *rest)
            self.tops.append(features[-1])
            self.logits.append(found["visual"].logits)
            return found

        monkeypatch.setattr(method.student, "decode_rebuilt", noted)


def ready(**changes: object) -> tuple[AllSpark, Batch]:
    """Half-trained, with channels in the memory of most classes."""
    method = make_uneven("allspark", width=16, **changes)
    assert isinstance(method, AllSpark)
    gen = torch.Generator().manual_seed(4)
    for _ in range(4):
        method.memory.push(torch.randn(64, 16, generator=gen), torch.randint(0, 4, (64,), generator=gen))
    return method, make_batch(views=method.required_views())


def test_loss_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = ready(**{"pseudo.weight": 0.7, "pseudo.threshold": 0.4})
    seen = Seen(method, monkeypatch)
    losses = method(batch, STEP)
    clean, both = (np_(upsample(z, (SIDE, SIDE))) for z in seen.logits)
    valid, target = batch.valid.numpy(), batch.target.numpy()
    p = softmax(clean)
    accepted = p.max(1) >= np.float32(0.4)
    assert 0.05 < accepted.mean() < 0.95 and len(np.unique(p.argmax(1))) > 1
    sup = mean_over(cross_entropy_map(both[:4], target), target != 255)
    pseudo = mean_over(cross_entropy_map(both[4:], p.argmax(1)) * accepted, valid)
    assert losses.terms["sup"] == pytest.approx(sup, rel=1e-5)
    assert losses.terms["pseudo"] == pytest.approx(pseudo, rel=1e-5)
    assert losses.terms["coverage"] == pytest.approx((accepted & valid).sum() / valid.sum(), rel=1e-5)
    assert losses.total.item() == pytest.approx((sup + 0.7 * pseudo) / 2, rel=1e-5)


@pytest.mark.parametrize("step", [EARLY, STEP], ids=["warm-up", "memory"])
def test_both_halves_of_the_block_in_numpy(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labelled images in strong colours read the batch's unlabelled ones, later the memory with these in it."""
    method, batch = ready(dropout=0.0)
    seen, block, before = Seen(method, monkeypatch), method.student.spark, method.memory.slots.clone()
    method(batch, step)
    assert torch.equal(method.memory.slots, before)  # until the step is done
    method.after_step(step)
    held = np_(method.memory.read(torch.Size((4, 4))))
    assert not torch.equal(method.memory.slots, before)
    top = np_(method.student.encode(torch.cat([batch.image_strong, batch.weak[0]]))[-1])  # type: ignore[list-item]
    inside = batch.valid.numpy().reshape(4, 4, 8, 4, 8).any((2, 4)).reshape(4, 16, 1)
    assert 0.9 < inside.mean() < 1

    def attended(e: Array) -> Array:
        source = held if step is STEP else e[4:] * inside
        return np.concatenate([cross_in_numpy(block.cross, e[:4], source), within_in_numpy(block.own, e[4:])])

    np.testing.assert_allclose(np_(seen.tops[1]), block_in_numpy(block, top, attended), atol=1e-4)
    asked = block_in_numpy(block, top[4:], lambda e: cross_in_numpy(block.cross, e, e * inside))
    np.testing.assert_allclose(np_(seen.tops[0]), asked, atol=1e-4)  # the answers read the whole batch
    whole = block_in_numpy(block, top[4:], lambda e: cross_in_numpy(block.cross, e, e))
    method.pseudo_labels(batch.weak[0], None, batch.keys_u, step)  # of images without padding
    np.testing.assert_allclose(np_(seen.tops[2]), whole, atol=1e-4)


def test_dropout_is_named_by_step_and_image(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = ready()
    seen = Seen(method, monkeypatch)
    swapped = replace(batch, keys=(1, 0, 2, 3), keys_u=(1, 0, 2, 3))
    for given, step in ((batch, STEP), (batch, Step(8, 0.9, 3)), (swapped, STEP)):
        method(given, step)
    torch.manual_seed(5)
    method(batch, STEP)
    method.cfg = AllSparkConfig(width=16, dropout=0.0)
    method(batch, STEP)
    first, other, keys, again, plain = seen.tops[1::2]
    assert torch.equal(first, again)
    for part in (slice(0, 4), slice(4, 8)):
        assert not any(torch.equal(first[part], x[part]) for x in (other, plain))
        assert not torch.equal(first[part][0], keys[part][0]) and torch.equal(first[part][2], keys[part][2])
    method.cfg = AllSparkConfig(width=16)
    method(replace(batch, keys=(1, 0, 2, 3)), STEP)
    mine = seen.tops[-1]
    assert torch.equal(mine[4:], first[4:]) and torch.equal(mine[:2], keys[:2])  # each half is named by its own images
    looked_at = seen.tops[::2]
    assert all(torch.equal(x, looked_at[0]) for x in looked_at)  # nothing is dropped there


def grad_of_weak(method: Method, batch: Batch, step: Step) -> Tensor:
    weak = batch.weak[0].clone().requires_grad_()
    method(replace(batch, weak=(weak,)), step).total.backward()
    assert weak.grad is not None
    return weak.grad


def test_labelled_losses_reach_unlabelled_images_in_the_warmup_alone() -> None:
    method, batch = ready(**{"pseudo.weight": 0.0})
    assert grad_of_weak(method, batch, EARLY).abs().sum((1, 2, 3)).gt(0).all()
    assert not grad_of_weak(method, batch, STEP).any()
    padded = replace(batch, valid=torch.zeros_like(batch.valid))
    assert not grad_of_weak(method, padded, EARLY).any()  # padding is not read


def test_answers_teach_and_are_not_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = ready()
    modes: list[bool] = []
    encode = method.student.encode
    monkeypatch.setattr(method.student, "encode", lambda x: modes.append(method.student.training) or encode(x))
    seen = Seen(method, monkeypatch)
    method(batch, STEP)
    assert modes == [False, True] and method.student.training
    assert not seen.logits[0].requires_grad and seen.logits[1].requires_grad
    method.eval()
    method(batch, STEP)
    assert not method.student.training


def test_a_step_puts_its_channels_into_the_memory_when_it_is_done() -> None:
    method, batch = make_uneven("allspark", width=16, dropout=0.0), make_batch(views=make("allspark").required_views())
    assert isinstance(method, AllSpark)
    before = method.memory.slots.clone()
    method(batch, EARLY), method(batch, EARLY)  # two micro-batches
    assert torch.equal(method.memory.slots, before)
    _, e = method.student.spark.embed(method.student.encode(batch.weak[0])[-1])
    inside = torch.nn.functional.max_pool2d(batch.valid.float()[:, None], 8).flatten(2).mT
    channels = (e * inside).mT.detach()
    method.student.eval()
    grid = method._answers(batch.weak[0], inside).softmax(1)
    maps = torch.nn.functional.interpolate(grid, (4, 4), mode="bilinear").flatten(2)
    classes = nearest_class(channels, maps).flatten()
    method.after_step(EARLY)
    assert torch.equal(method.memory.pushed, 2 * torch.bincount(classes, minlength=CLASSES))
    held = method.memory.slots[:-1].view(CLASSES, 16, 16)
    for k in range(CLASSES):
        mine = channels.flatten(0, 1)[classes == k]
        if 0 < len(mine) <= 8:
            torch.testing.assert_close(held[k, : 2 * len(mine)], mine.repeat(2, 1))
    after = method.memory.slots.clone()
    method.eval()
    method(batch, STEP)
    method.after_step(STEP)
    assert torch.equal(method.memory.slots, after)


def test_the_memory_has_the_grid_of_a_training_crop_and_fills_within_a_few_steps() -> None:
    method = make("allspark")
    assert isinstance(method, AllSpark)
    assert method.memory.side == SIDE // 8 and method.memory.width == 128  # no wider than the encoder
    take_steps(method, torch.optim.AdamW(method.parameters(), 1e-3), 0, 4)
    assert method.memory.filled() > 0.5
    assert "memory.slots" in method.state_dict() and not any("memory" in name for name in method.student.state_dict())


def test_the_block_learns_at_the_rate_of_the_encoder() -> None:
    method = make("allspark", width=16)
    cfg = override(RunConfig(), {"method.name": "allspark", "optim.encoder_lr_scale": 0.07})
    block = {id(p) for p in method.student.spark.parameters()}
    scales: dict[bool, set[float]] = {True: set(), False: set()}
    for group in param_groups(method, cfg):
        for parameter in group["params"]:
            scales[id(parameter) in block].add(group["scale"])
    assert scales == {True: {0.07}, False: {0.07, 1.0}}


def test_published_defaults() -> None:
    cfg = AllSparkConfig()
    assert (cfg.width, cfg.attention_heads, cfg.dropout) == (256, 2, 0.1)
    assert (cfg.warmup * 80, cfg.warmup * 240) == (5, 15)
    assert (cfg.pseudo.threshold, cfg.pseudo.weight) == (0.0, 1.0)
