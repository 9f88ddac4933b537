"""The contract that every method keeps; a method is tested here by being listed in METHODS."""

from __future__ import annotations

import copy
import json
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from method_kit import CLASSES, SIDE, STEP, make, make_batch, share, take_steps
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from viladiff.core import keyed_random
from viladiff.data.batch import Batch, CutMix, Step, TextBatch
from viladiff.data.registry import load_dataset as load_dataset
from viladiff.inference.load import preview_run
from viladiff.losses import pixel_cross_entropy
from viladiff.methods import METHODS
from viladiff.methods.base import MeanTeacher, Method
from viladiff.models.decoders.light import Classifier
from viladiff.runs.config import ConfigError, RunConfig, override
from viladiff.training import trainer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=list(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def wanted(method: Method, seed: int = 0) -> Batch:
    """A batch with the views that the method asks for."""
    return make_batch(seed=seed, views=method.required_views())


def test_loss_is_finite_and_its_terms_are_detached(name: str) -> None:
    method = make(name)
    losses = method(wanted(method), STEP)
    assert losses.total.isfinite() and losses.total.requires_grad and losses.total.ndim == 0
    assert losses.terms and all(term.isfinite() and not term.requires_grad for term in losses.terms.values())
    assert all(term.ndim == 0 for term in losses.terms.values())


def test_fully_ignored_crop_gives_finite_losses_gradients_and_state(name: str) -> None:
    """Also in the step after one in which there was nothing to learn the running values from."""
    method = make(name)
    for seed in range(2):
        batch = wanted(method, seed)
        batch.target.fill_(255)
        batch.valid.fill_(False)
        losses = method(batch, STEP)
        losses.total.backward()
        with torch.no_grad():
            method.after_step(STEP)
        assert losses.total.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    assert all(x.isfinite().all() for x in method.state_dict().values())


def test_every_strong_view_trains_and_a_weak_view_only_where_the_method_says_so(name: str) -> None:
    method = make(name)
    batch = wanted(method)
    batch.strong = tuple(x.requires_grad_() for x in batch.strong)
    batch.weak = tuple(x.requires_grad_() for x in batch.weak)
    coloured = [] if batch.image_strong is None else [batch.image_strong.requires_grad_()]
    method(batch, STEP).total.backward()
    for strong in (*batch.strong[: method.required_views().strong], *coloured):
        assert strong.grad is not None and (strong.grad.abs().sum((1, 2, 3)) > 0).all()
    for weak in batch.weak:
        assert (weak.grad is not None and bool(weak.grad.abs().sum() > 0)) == method.trains_on_weak


def test_weak_view_changes_the_loss_where_one_is_asked_for(name: str) -> None:
    method = make(name)
    batch = wanted(method)
    other = replace(batch, weak=(torch.randn_like(batch.weak[0]),))
    totals = []
    for given in (batch, batch, other):
        torch.manual_seed(0)  # the loop seeds what drop-path draws from
        totals.append(method(given, STEP).total)
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2]) == (not method.required_views().unlabelled)


def test_teachers_get_no_gradient_and_follow_the_student(name: str) -> None:
    method = make(name)
    if not isinstance(method, MeanTeacher):
        pytest.skip("no teacher")
    method(wanted(method), STEP).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert not method.teacher.training
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
    before = [p.clone() for p in method.teacher.parameters()]
    method.after_step(Step(10_000, 0.9, 0))
    kept = method.cfg.teacher.momentum
    for old, new, student in zip(before, method.teacher.parameters(), method.student.parameters(), strict=True):
        torch.testing.assert_close(new, kept * old + (1 - kept) * student)


def test_what_is_frozen_gets_no_gradient(name: str) -> None:
    method = make(name)
    method(wanted(method), STEP).total.backward()
    assert all(p.grad is None for p in method.parameters() if not p.requires_grad)


def test_padding_never_trains(name: str) -> None:
    method = make(name)
    batch = wanted(method)
    batch.valid.fill_(False)
    batch.strong = tuple(x.requires_grad_() for x in batch.strong)
    batch.weak = tuple(x.requires_grad_() for x in batch.weak)
    losses = method(batch, STEP)
    losses.total.backward()
    assert all(x.grad is None or x.grad.abs().sum() == 0 for x in (*batch.strong, *batch.weak))


def test_padding_is_pasted_with_the_picture(name: str) -> None:
    """All that is valid is replaced by padding of the partner, so that nothing is left to train on."""
    method = make(name)
    if not method.required_views().cutmix:
        pytest.skip("no boxes")
    batch = wanted(method)
    top, left, bottom, right = batch.mix[0].boxes[0].tolist()
    batch.valid.fill_(False)
    batch.valid[0, top:bottom, left:right] = True
    batch.strong = (batch.strong[0].requires_grad_(), *batch.strong[1:])
    method(batch, STEP).total.backward()
    assert not batch.strong[0].grad.any()


JUDGED = {
    **{name: {} for name in ("semibaseline", "fixmatch", "unimatch", "unimatch_v2", "daw", "cps", "psmt", "swith")},
    **{"corrmatch": {}, "logicdiag": {}, "viladiff": {"mixe.enabled": False}},
}
"""Methods whose labels are a classifier's, pixel by pixel, with what makes them so."""


@pytest.mark.parametrize("name", JUDGED)
def test_a_label_exactly_at_the_threshold_counts(name: str) -> None:
    """Networks that give every class 1 / C."""
    found = []
    for threshold in (1 / CLASSES, 1.001 / CLASSES):
        method = make(name, **{"pseudo.threshold": threshold, **JUDGED[name]})
        with torch.no_grad():
            for part in method.modules():
                if isinstance(part, Classifier):
                    for parameter in part.parameters():
                        parameter.zero_()
        found.append(bool(method(wanted(method), STEP).terms["pseudo"] > 0))
    assert found == [True, False]


def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    """DDP hangs or errs on a parameter that a step leaves out."""
    method = make(name)
    method(wanted(method), STEP).total.backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_cutmix_can_be_switched_off_where_it_is_a_field(name: str) -> None:
    if not hasattr(make(name).cfg, "cutmix"):
        pytest.skip("no such field")
    method, mixed = make(name, cutmix=False), make(name)
    assert not method.required_views().cutmix
    total = method(wanted(method), STEP).total
    assert total.isfinite() and not torch.equal(total, mixed(wanted(mixed), STEP).total)


def test_what_is_evaluated_is_among_the_networks_and_says_what_its_labels_are(name: str) -> None:
    method = make(name).eval()
    assert any(network is method.eval_network() for network in method.eval_networks().values())
    batch = make_batch()
    for found in method.pseudo_labels(batch.weak[0], batch.text_u, batch.keys_u, STEP).values():
        assert found.shape == (4, CLASSES, SIDE, SIDE) and not found.requires_grad
        torch.testing.assert_close(found.sum(1), torch.ones(4, SIDE, SIDE))


def test_too_few_images_are_said_before_training(name: str) -> None:
    method = make(name)
    views = method.required_views()
    method.check_images(2)
    if not views.unlabelled:
        method.check_images(0)
        return
    with pytest.raises(ValueError, match=rf"{name}.*data.split leaves none.*method.name=supervised"):
        method.check_images(0)
    if views.cutmix or views.pairs:
        with pytest.raises(ValueError, match=rf"{name}.*data.split leaves one.*add images"):
            method.check_images(1)


@pytest.mark.parametrize("left", [0, 1])
def test_a_run_without_enough_images_ends_before_it_starts(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"train.steps": 1, "eval.max_images": 1, "eval.boundary": False, "runtime.progress": False}
    cfg = override(RunConfig(), {"method.name": "semibaseline", "runtime.runs_dir": str(tmp_path), **few})
    dataset = load_dataset("digits", "92")
    monkeypatch.setattr(trainer, "load_dataset", lambda *args: replace(dataset, unlabelled=dataset.unlabelled[:left]))
    for start in (trainer.fit, preview_run):
        with pytest.raises(ValueError, match=r"semibaseline.*data.split leaves (none|one)"):
            start(cfg)
    assert list(tmp_path.glob("*/steps.jsonl")) == []


def test_one_image_in_a_batch_is_refused_with_what_to_change(name: str) -> None:
    method, one = make(name), {"method.name": name, "data.batch_unlabelled": 1}
    views = method.required_views()
    if not (views.cutmix or views.pairs):
        override(RunConfig(), one)
        return
    can_be_off = hasattr(method.cfg, "cutmix")
    advice = "multiple of 2" + (", or method.cutmix=false" if can_be_off else "$")
    with pytest.raises(ConfigError, match=rf"data.batch_unlabelled = 1: .*pairs images.*{advice}"):
        override(RunConfig(), one)
    if can_be_off:
        override(RunConfig(), one | {"method.cutmix": False})
        alone = make(name, cutmix=False)
        assert alone(share(wanted(alone), 0, 4), STEP).total.isfinite()


def test_state_dict_round_trip_continues_bit_for_bit(name: str) -> None:
    first = make(name)
    adam = torch.optim.AdamW(first.parameters(), 1e-3)
    take_steps(first, adam, 0, 3)
    second = make(name)
    other = torch.optim.AdamW(second.parameters(), 1e-3)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(adam.state_dict()))  # Adam would share its moments otherwise
    torch.manual_seed(1)
    going_on = take_steps(first, adam, 3, 6)
    torch.manual_seed(1)  # the loop seeds what dropout draws from, by step
    assert take_steps(second, other, 3, 6) == going_on
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_golden_losses(name: str) -> None:
    """Ten steps on fixed batches; VILADIFF_GOLDEN=write makes the file anew; raise the method's revision with it."""
    method = make(name)
    totals = take_steps(method, torch.optim.AdamW(method.parameters(), 1e-3), 0, 10)
    path = GOLDEN / f"{name}.json"
    if os.environ.get("VILADIFF_GOLDEN") == "write":
        path.write_text(json.dumps({"revision": METHODS[name].revision, "totals": totals}, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert golden["revision"] == METHODS[name].revision
    assert totals == pytest.approx(golden["totals"], rel=2e-3)


# Several workers

WITHOUT_DROP_PATH: dict[str, dict[str, object]] = {"swith": {"drop_path": 0.0}}
"""Each worker drops other branches, as it should; what is left is compared."""
SHARED: list[tuple[str, dict[str, object]]] = [
    *((name, WITHOUT_DROP_PATH.get(name, {})) for name in METHODS),
    ("viladiff", {"vila.gate": "per_batch"}),
    ("viladiff", {"mixe.confidence": "calibrated", "mixe.holdout": 0.5}),
    ("viladiff", {"mixe.holdout": 0.5, "mixe.condition": ("finer", "other_stream", "image")}),
    ("allspark", {"warmup": 1.0}),
]


def _two_steps(method: Method, model: nn.Module, rank: int, world: int) -> dict[str, Tensor]:
    """Gradients of a step, and of another one after it, and then the state, running values among it."""
    found = {}
    for index in (7, 8):
        step = Step(index, 0.9, 3)
        model(share(wanted(method, index), rank, world), step).total.backward()
        with torch.no_grad():
            for n, p in method.named_parameters():
                if p.grad is not None:
                    found[f"{index} {n}"] = p.grad.clone()
                    p.sub_(0.01 * p.grad)
                    p.grad = None
            method.after_step(step)
    return found | {f"state {n}": x.clone() for n, x in method.state_dict().items()}


def _worker(rank: int, world: int, port: int, out: str, cases: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for i in cases:
        name, changes = SHARED[i]
        try:
            method = make(name, **changes)
            model = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
            found: object = _two_steps(method, model, rank, world)
        except Exception:
            found = traceback.format_exc()
        if rank == 0:
            torch.save(found, f"{out}/{i}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes computed, all chosen methods in turn: starting them takes longer than the steps."""
    out = tmp_path_factory.mktemp("workers")
    cases = [item.callspec.params["case"] for item in request.session.items if "of_two_workers" in item.fixturenames]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (2, port, str(out), cases), nprocs=2)
    return out


@pytest.mark.timeout(900)  # on a busy machine two processes wait for each other often
@pytest.mark.parametrize("case", range(len(SHARED)), ids=[f"{name}-{changes}" for name, changes in SHARED])
def test_two_workers_give_the_gradient_of_one(case: int, of_two_workers: Path) -> None:
    name, changes = SHARED[case]
    found = torch.load(of_two_workers / f"{case}.pt", weights_only=True)
    assert isinstance(found, dict), found
    method = make(name, **changes)
    expected = _two_steps(method, method, 0, 1)
    assert found.keys() == expected.keys()
    for n, value in expected.items():
        torch.testing.assert_close(found[n], value, rtol=2e-3, atol=2e-5, msg=lambda text, n=n: f"{n}: {text}")


# Nothing in a step waits for the device


class Crossings(TorchDispatchMode):
    """Notes what would wait between host and (pretended) GPU: copies, but for those up that are told not to block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        if func is torch.ops.aten._to_copy.default and out.device != given[0].device:
            if not (out.is_cuda and (kwargs or {}).get("non_blocking")):
                self.found.append(f"{given[0].device.type} to {out.device.type}")
        elif any(x.is_cuda for x in given) and any(x.ndim and not x.is_cuda for x in given):
            self.found.append(f"{func} of both devices")
        return out


def on_pretended_gpu(value: Any) -> Any:
    """The tensors of a batch as tensors without content, of a GPU that need not exist."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")
    if isinstance(value, tuple):
        return tuple(on_pretended_gpu(x) for x in value)
    if isinstance(value, Batch | CutMix | TextBatch):
        return replace(value, **{f.name: on_pretended_gpu(getattr(value, f.name)) for f in fields(value) if f.init})
    return value


def step_without_content(method: Method, batch: Batch, step: Step) -> list[str]:
    """One step with tensors that have shapes only: what looks into one raises. Returns what else would wait.

    There are no threads that could go backwards on a GPU that is not there, so gradients of inputs are shapes as well.
    """
    with pytest.MonkeyPatch.context() as stack, FakeTensorMode(allow_non_fake_inputs=True), Crossings() as seen:
        method._apply(on_pretended_gpu)
        stack.setattr(torch.autograd, "grad", lambda out, into, **options: [torch.zeros_like(x) for x in into])
        method(on_pretended_gpu(batch), step)
        with torch.no_grad():
            method.after_step(step)
    return seen.found


FIRST = Step(index=0, progress=0.0, seed=3)
OPTIONS: list[tuple[str, dict[str, object]]] = [
    ("viladiff", {"mixe.holdout": 0.5, "mixe.refine_where": "unsure", "mixe.confidence": "calibrated"}),
    ("viladiff", {"mixe.refine_where": "edges", "mixe.confidence": "product", "mixe.condition_noise": 0.1}),
    ("viladiff", {"mixe.train_images": "unlabelled", "mixe.reverse": "direct", "vila.gate": "per_batch"}),
    ("viladiff", {"mixe.unlabelled_views": "cutmix", "mixe.condition": ("image", "finer", "other_stream")}),
    ("viladiff", {"mixe.denoiser": "guided", "vila.feature_scope": "tokens"}),
    ("viladiff", {"mixe.denoiser": "plain", "pseudo.source": "mean", "cutmix": False}),
    ("cps", {"cutmix": False}),
    ("ddfp", {"cutmix": False}),
    ("psmt", {"cutmix": False, "vat.epsilon": 0.0, "warmup": 0.0}),
    ("u2pl", {"cutmix": False}),
]
"""Branches that neither a first nor a late step of the defaults takes."""


def waits(method: Method, step: Step, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would wait for the device in a step of a method that has taken it once."""
    batch = wanted(method)
    method(batch, step)  # fills caches of constants, which are made on the host once
    method.after_step(step)
    batch.mix = tuple(CutMix(mix.boxes, mix.partner) for mix in batch.mix)
    monkeypatch.setattr(keyed_random, "torch_generator", lambda *parts, device="cpu": None)
    # A backward pass inside a step, as of adversarial noise, would ask for the GPU itself.
    monkeypatch.setattr(torch.autograd, "grad", lambda out, given, **options: [torch.zeros_like(x) for x in given])
    return step_without_content(method, batch, step)


@pytest.mark.parametrize("step", [FIRST, STEP], ids=["first", "late"])
def test_no_step_waits_for_the_device(name: str, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """An .item(), a bool of a tensor or a boolean index stalls a GPU until it has done all that was asked before.

    The first step is that of warm-ups, here with the loss of hard pixels; the late one has all parts of a loss.
    """
    assert waits(make(name, **({"ohem.enabled": True} if step is FIRST else {})), step, monkeypatch) == []


@pytest.mark.slow
@pytest.mark.parametrize(("one", "changes"), OPTIONS, ids=str)
def test_no_option_waits_for_the_device(one: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits(make(one, **changes), STEP, monkeypatch) == []


@pytest.mark.parametrize(
    "look",
    [lambda x: x.item(), bool, lambda x: x.nonzero(), lambda x: x[None][x[None] > 0], lambda x: x.tolist()],
    ids=["item", "bool", "nonzero", "index", "tolist"],
)
def test_a_step_that_waits_is_noticed(look: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch) -> None:
    method = make("supervised")
    monkeypatch.setattr(method, "after_step", lambda step: look(method.student.decoder.norm.weight.sum()))
    with pytest.raises(Exception, match=r"aten\.|[Dd]ata.dependent|item"):
        step_without_content(method, make_batch(), STEP)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x.cpu(),
        lambda x: x[[0, 1]],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.tensor([1.0, 2.0]).to(x.device),
    ],
    ids=["down", "list", "index", "new", "up"],
)
def test_a_copy_that_waits_is_noticed(copy: Callable[[Tensor], object]) -> None:
    def found(copy: Callable[[Tensor], object]) -> list[str]:
        method = make("supervised")  # a new one each time: weights without content cannot be exchanged for others
        with pytest.MonkeyPatch.context() as stack:
            stack.setattr(method, "after_step", lambda step: copy(method.student.decoder.norm.weight))
            return step_without_content(method, make_batch(), STEP)

    assert len(found(copy)) == 1
    assert found(lambda x: torch.tensor([1.0]).to(x.device, non_blocking=True)) == []


def test_viladiff_without_its_modules_is_semibaseline_bit_for_bit() -> None:
    bare = make("viladiff", **{"vila.enabled": False, "mixe.enabled": False})
    base = make("semibaseline")
    for method in (bare, base):
        method.cfg = method.cfg
    a = take_steps(bare, torch.optim.AdamW(bare.parameters(), 1e-3), 0, 4)
    b = take_steps(base, torch.optim.AdamW(base.parameters(), 1e-3), 0, 4)
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
        {"mixe.train_images": "labelled"},
        {"mixe.train_images": "unlabelled"},
        {"mixe.refine_where": "unsure"},
        {"mixe.refine_where": "edges"},
        {"mixe.confidence": "product"},
        {"mixe.unlabelled_views": "strong"},
        {"mixe.unlabelled_views": "cutmix"},
        {"mixe.holdout": 0.5},
        {"mixe.condition": ("finer",)},
        {"mixe.condition": ("other_stream",)},
        {"mixe.condition": ("image",)},
        {"mixe.denoiser": "guided"},
        {"vila.gate": "always"},
        {"vila.gate": "per_batch"},
        {"vila.feature_scope": "tokens"},
        {"vila.feature_scope": "flattened"},
        {"vila.feature_reduction": "sum"},
        {"vila.distillation_paths": ("student_features",)},
        {"vila.distillation_paths": ()},
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
    timesteps = changes.get("mixe.timesteps", 10)
    common: dict[str, object] = {"pseudo.threshold": 0.3, "mixe.tau_end": 0.4, "mixe.timesteps": timesteps}
    default = make("viladiff", **common)
    if changes == {"mixe.denoiser": "guided"}:  # it has no noise to set
        common.pop("mixe.tau_end")
        common.pop("mixe.timesteps")
    other = make("viladiff", **{**common, **changes})
    # As if half-trained, so that the streams differ, both regions of Eq. 7 occur and the gate differs between images.
    for method in (default, other):
        gen = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for parameter in method.student.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=gen))
    batch_other = batch if other.required_views().cutmix else replace(batch, mix=())
    a, b = default(batch, STEP), other(batch_other, STEP)
    assert 0 < a.terms["gaussian"] < 1 and ("mixe.timesteps" in changes or 0 < a.terms["gate"] < 1)
    assert b.total.isfinite()
    b.total.backward()
    assert not torch.equal(a.total, b.total)


def test_arrows_reach_their_heads_alone() -> None:
    """The fusion stream teaches the visual one; nothing flows back through the arrow."""
    method = make(
        "viladiff",
        **{
            "mixe.enabled": False,
            "vila.distillation_paths": ("student_logits",),
            "pseudo.weight": 0.0,
            "vila.gate": "always",
        },
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
    assert make("viladiff", **{"predict.stream": "fusion"}).eval_stream() == "fusion"
    assert make("viladiff", **{"predict.stream": "fusion", "vila.enabled": False}).eval_stream() == "visual"
    student = make("viladiff", **{"predict.network": "student"})
    assert student.eval_network() is student.student
