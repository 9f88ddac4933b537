"""The contract that every method keeps; a method is tested here by being listed in METHODS."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from viladiff import draws
from viladiff.batch import Batch, CutMix, Step, TextBatch
from viladiff.config import RunConfig, override
from viladiff.losses import pixel_cross_entropy
from viladiff.methods import METHODS
from viladiff.methods.base import MeanTeacher, Method
from viladiff.models.segmenter import Build

CLASSES, SIDE, WORDS = 5, 32, 6
GOLDEN = Path(__file__).parent / "golden"
STEP = Step(index=7, progress=0.9, seed=3)


def make(name: str, **changes: object) -> Method:
    """A method with an encoder of random weights; every pixel's pseudo-label is accepted unless told otherwise."""
    cfg = override(RunConfig(), {"method.name": name, "model.pretrained": "none", "model.decoder_width": 16})
    flat = {f"method.{path}": value for path, value in changes.items()}
    if "threshold" not in str(changes) and hasattr(cfg.method, "pseudo"):
        flat["method.pseudo.threshold"] = 0.0
    cfg = override(cfg, flat)
    torch.manual_seed(0)
    return METHODS[name](cfg.method, Build(cfg.model, CLASSES, 12)).train()


def make_batch(size: int = 4, seed: int = 0) -> Batch:
    gen = draws.generator("batch", seed)
    image, weak, strong = (torch.randn(size, 3, SIDE, SIDE, generator=gen) for _ in range(3))
    target = (
        torch.randint(0, CLASSES, (size, SIDE // 8, SIDE // 8), generator=gen)
        .repeat_interleave(8, 1)
        .repeat_interleave(8, 2)
    )
    target[:, :, -3:] = 255
    valid = torch.ones(size, SIDE, SIDE, dtype=torch.bool)
    valid[0, -8:] = False
    boxes = torch.zeros(size, 4, dtype=torch.int64)
    boxes[0] = torch.tensor([0, 8, 16, 24])
    boxes[3 % size] = torch.tensor([8, 8, 32, 24])
    texts = [
        TextBatch(torch.randn(size, WORDS, 12, generator=gen), torch.rand(size, WORDS, generator=gen) < 0.7)
        for _ in range(2)
    ]
    keys = tuple(range(size))
    mix = CutMix(boxes, torch.arange(size) ^ 1)
    return Batch(image, target, keys, (weak,), (strong,), (mix,), valid, keys, *texts)


def share(batch: Batch, rank: int, world: int) -> Batch:
    """The part of a global batch that a worker gets."""
    n = len(batch.image) // world
    cut = slice(rank * n, (rank + 1) * n)
    text, text_u = (TextBatch(t.tokens[cut], t.mask[cut]) for t in (batch.text, batch.text_u))  # type: ignore[union-attr]
    mix = CutMix(batch.mix[0].boxes[cut], batch.mix[0].partner[:n])
    return Batch(
        batch.image[cut],
        batch.target[cut],
        batch.keys[cut],
        (batch.weak[0][cut],),
        (batch.strong[0][cut],),
        (mix,),
        batch.valid[cut],
        batch.keys_u[cut],
        text,
        text_u,
    )


@pytest.fixture(params=list(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_loss_is_finite_and_its_terms_are_detached(name: str) -> None:
    losses = make(name)(make_batch(), STEP)
    assert losses.total.isfinite() and losses.total.requires_grad
    assert losses.terms and all(term.isfinite() and not term.requires_grad for term in losses.terms.values())


def test_fully_ignored_crop_gives_a_finite_loss_and_finite_gradients(name: str) -> None:
    batch = make_batch()
    batch.target.fill_(255)
    batch.valid.fill_(False)
    method = make(name)
    losses = method(batch, STEP)
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_every_strong_view_trains_and_no_weak_view_does(name: str) -> None:
    batch, method = make_batch(), make(name)
    views = method.views_wanted()
    batch.strong = tuple(torch.randn_like(batch.strong[0]).requires_grad_() for _ in range(views.strong))
    batch.mix = batch.mix * views.strong if views.cutmix else ()
    batch.weak = tuple(x.requires_grad_() for x in batch.weak)
    method(batch, STEP).total.backward()
    for strong in batch.strong:
        assert strong.grad is not None and strong.grad.abs().sum() > 0
    assert all(weak.grad is None or weak.grad.abs().sum() == 0 for weak in batch.weak)


def test_weak_view_changes_the_loss_where_one_is_asked_for(name: str) -> None:
    batch, method = make_batch(), make(name)
    before = method(batch, STEP).total
    other = replace(batch, weak=(torch.randn_like(batch.weak[0]),))
    changed = not torch.equal(before, method(other, STEP).total)
    assert changed == method.views_wanted().unlabelled


def test_teachers_get_no_gradient_and_follow_the_student(name: str) -> None:
    method = make(name)
    if not isinstance(method, MeanTeacher):
        pytest.skip("no teacher")
    method(make_batch(), STEP).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert not method.teacher.training
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
    before = [p.clone() for p in method.teacher.parameters()]
    method.after_step(Step(10_000, 0.9, 0))
    for old, new, student in zip(before, method.teacher.parameters(), method.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.99 * old + 0.01 * student)


def test_padding_never_trains(name: str) -> None:
    batch, method = make_batch(), make(name)
    batch.valid.fill_(False)
    batch.strong = tuple(x.requires_grad_() for x in batch.strong)
    losses = method(batch, STEP)
    losses.total.backward()
    assert all(x.grad is None or x.grad.abs().sum() == 0 for x in batch.strong)


def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    """DDP hangs or errs on a parameter that a step leaves out."""
    method = make(name)
    method(make_batch(), STEP).total.backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def _steps(method: Method, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
    totals = []
    for index in range(start, stop):
        step = Step(index, index / 10, 3)
        losses = method(make_batch(seed=index), step)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step)
        totals.append(losses.total.item())
    return totals


def test_state_dict_round_trip_continues_bit_for_bit(name: str) -> None:
    first = make(name)
    adam = torch.optim.AdamW(first.parameters(), 1e-3)
    _steps(first, adam, 0, 3)
    second = make(name)
    other = torch.optim.AdamW(second.parameters(), 1e-3)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(adam.state_dict()))  # Adam would share its moments otherwise
    assert _steps(first, adam, 3, 6) == _steps(second, other, 3, 6)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_golden_losses(name: str) -> None:
    """Ten steps on fixed batches; VILADIFF_GOLDEN=write makes the file anew; raise the method's revision with it."""
    method = make(name)
    totals = _steps(method, torch.optim.AdamW(method.parameters(), 1e-3), 0, 10)
    path = GOLDEN / f"{name}.json"
    if os.environ.get("VILADIFF_GOLDEN") == "write":
        path.write_text(json.dumps({"revision": METHODS[name].revision, "totals": totals}, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert golden["revision"] == METHODS[name].revision
    assert totals == pytest.approx(golden["totals"], rel=2e-3)


def _worker(rank: int, world: int, name: str, changes: dict[str, object], port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    method = make(name, **changes)
    ddp = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
    losses = ddp(share(make_batch(), rank, world), STEP)
    losses.total.backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in method.named_parameters() if p.grad is not None}, out)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "changes"), [*((name, {}) for name in METHODS), ("viladiff", {"vila.gate": "per_batch"})], ids=str
)
def test_two_workers_give_the_gradient_of_one(
    name: str, changes: dict[str, object], tmp_path: Path, free_port: int
) -> None:
    mp.spawn(_worker, (2, name, changes, free_port, str(tmp_path / "grads.pt")), nprocs=2)
    found = torch.load(tmp_path / "grads.pt", weights_only=True)
    method = make(name, **changes)
    method(make_batch(), STEP).total.backward()
    for n, p in method.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[n], p.grad, rtol=2e-3, atol=2e-5, msg=lambda text, n=n: f"{n}: {text}")


def test_viladiff_without_its_modules_is_semibaseline_bit_for_bit() -> None:
    bare = make("viladiff", **{"vila.enabled": False, "mixe.enabled": False})
    base = make("semibaseline")
    for method in (bare, base):
        method.cfg = method.cfg
    a = _steps(bare, torch.optim.AdamW(bare.parameters(), 1e-3), 0, 4)
    b = _steps(base, torch.optim.AdamW(base.parameters(), 1e-3), 0, 4)
    assert a == b
    assert all(torch.equal(x, y) for x, y in zip(bare.state_dict().values(), base.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"mixe.enabled": False},
        {"vila.enabled": False},
        {"mixe.gaussian": False},
        {"mixe.flips": False},
        {"mixe.edge_loss": False},
        {"mixe.denoiser": "plain"},
        {"mixe.refine_steps": 3},
        {"mixe.gaussian_region": "uncertain"},
        {"mixe.reverse": "direct"},
        {"mixe.flip_schedule": "constant"},
        {"mixe.flip_schedule": "matched", "mixe.timesteps": 5},
        {"mixe.train_on": "labelled"},
        {"mixe.train_on": "unlabelled"},
        {"vila.gate": "always"},
        {"vila.gate": "per_batch"},
        {"vila.feature_scope": "tokens"},
        {"vila.feature_scope": "flattened"},
        {"vila.feature_reduction": "sum"},
        {"vila.paths": ("student_features",)},
        {"vila.paths": ()},
        {"vila.teacher_to_visual": False},
        {"vila.cutmix_text": "own"},
        {"pseudo.source": "visual"},
        {"pseudo.source": "mean"},
        {"cutmix": False},
    ],
    ids=str,
)
def test_each_choice_of_viladiff_changes_the_loss_or_the_log(changes: dict[str, object]) -> None:
    """A field that nothing reads would pass for an ablation."""
    batch = make_batch()
    common = {"pseudo.threshold": 0.3, "mixe.tau_end": 0.4, "mixe.timesteps": changes.get("mixe.timesteps", 10)}
    default, other = make("viladiff", **common), make("viladiff", **{**common, **changes})
    # As if half-trained, so that the streams differ, both regions of Eq. 7 occur and the gate differs between images.
    for method in (default, other):
        gen = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for parameter in method.student.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=gen))
    batch_other = batch if other.views_wanted().cutmix else replace(batch, mix=())
    a, b = default(batch, STEP), other(batch_other, STEP)
    assert 0 < a.terms["gaussian"] < 1 and ("mixe.timesteps" in changes or 0 < a.terms["gate"] < 1)
    assert b.total.isfinite()
    b.total.backward()
    assert not torch.equal(a.total, b.total)


def test_arrows_reach_their_heads_alone() -> None:
    """The fusion stream teaches the visual one; nothing flows back through the arrow."""
    method = make(
        "viladiff",
        **{"mixe.enabled": False, "vila.paths": ("student_logits",), "pseudo.weight": 0.0, "vila.gate": "always"},
    )
    batch = make_batch()
    batch.target.fill_(255)
    method(batch, STEP).total.backward()
    student = method.student
    assert student.classifier_fusion is not None and student.vila is not None
    assert student.classifier_fusion.fine.weight.grad.abs().sum() == 0
    assert student.classifier.fine.weight.grad.abs().sum() > 0
    assert student.vila.inject[0].attention.query.weight.grad.abs().sum() == 0


def test_refinement_replaces_pseudo_labels_only_in_the_later_part() -> None:
    method = make("viladiff", **{"pseudo.threshold": 0.0})
    batch = make_batch()
    early = [method(batch, Step(7, 0.4, 3)).terms["pseudo"] for _ in range(2)]
    with torch.no_grad():
        method.denoiser.class_head.bias[2] += 50.0  # type: ignore[union-attr]
    assert torch.equal(early[0], early[1])
    assert torch.equal(method(batch, Step(7, 0.4, 3)).terms["pseudo"], early[0])
    stages = method.pseudo_labels(batch.weak[0], batch.text_u, batch.keys_u, STEP)
    assert (stages["after"].argmax(1) == 2).all() and not (stages["before"].argmax(1) == 2).all()
    assert not torch.equal(method(batch, Step(7, 0.6, 3)).terms["pseudo"], early[0])


def test_condition_of_the_denoiser_is_the_students_view() -> None:
    """Were it the teacher's own logits, the answer could be copied."""
    method = make("viladiff", **{"pseudo.threshold": 0.0, "mixe.refine": False, "vila.enabled": False})
    seen: list[torch.Tensor] = []
    prepare = method.denoiser.prepare  # type: ignore[union-attr]

    def spy(features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return prepare(features, logits)

    method.denoiser.prepare = spy  # type: ignore[union-attr,method-assign]
    batch = replace(make_batch(), mix=())
    method(batch, STEP)
    student = method.student.streams(torch.cat([batch.image, batch.strong[0]]))["visual"].logits
    torch.testing.assert_close(seen[0], student)
    assert not seen[0].requires_grad


def test_gate_opens_where_the_fusion_stream_is_better() -> None:
    method = make("viladiff")
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    good, bad = torch.zeros(2, CLASSES, 4, 4), torch.zeros(2, CLASSES, 4, 4)
    good[:, 0], bad[:, 1] = 5.0, 5.0
    logits = {"fusion": torch.stack([good[0], bad[0]]), "visual": torch.stack([bad[0], good[0]])}
    maps = {name: pixel_cross_entropy(x, labels) for name, x in logits.items()}
    assert method._gate(maps, torch.ones(2, 4, 4, dtype=torch.bool)).tolist() == [1.0, 0.0]


def test_denoiser_learns_from_labels_as_they_were_before_refinement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning from its own output, it would confirm itself."""
    method, batch = make("viladiff"), make_batch()
    refined = torch.zeros(4, CLASSES, SIDE // 2, SIDE // 2)
    refined[:, 2] = 50.0
    monkeypatch.setattr(method, "_refined", lambda *args, **kwargs: refined)
    with_refined = method(batch, STEP).terms
    monkeypatch.setattr(method, "_refined", lambda *args, **kwargs: None)
    without = method(batch, STEP).terms
    assert torch.equal(with_refined["mixe_ce"], without["mixe_ce"])
    assert not torch.equal(with_refined["pseudo"], without["pseudo"])


def test_headline_is_the_stream_that_the_configuration_names() -> None:
    assert make("viladiff", **{"predict.stream": "fusion"}).headline() == "fusion"
    assert make("viladiff", **{"predict.stream": "fusion", "vila.enabled": False}).headline() == "visual"
    student = make("viladiff", **{"predict.network": "student"})
    assert student.predictor() is student.student
