"""Shares of the gradient: measured rightly, without any effect on training, kept, and shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_kit import STEP, make, make_batch, make_uneven
from test_table_page import name, record, study
from torch import Tensor

from viladiff.data.batch import Losses, Step
from viladiff.inference.load import preview_run
from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.report.sections import loss_gradients
from viladiff.report.table.results import collect_results
from viladiff.runs.checkpoint import load_file
from viladiff.runs.config import RunConfig, override, run_id
from viladiff.runs.gradient_shares import TermShare, by_thirds, fault, measured_steps, together
from viladiff.runs.record import RunRecord, impossible
from viladiff.training.errors import StopRequested
from viladiff.training.gradients import GradientShares
from viladiff.training.trainer import fit

EARLY = Step(index=0, progress=0.0, seed=3)
BATCHES = {"u2pl", "allspark", "corrmatch", "daw", "ddfp", "psmt", "logicdiag"}
"""Methods with queues, running values or networks that move beside the student."""


def norm(vectors: list[Tensor | None]) -> float:
    return float(torch.cat([v.flatten() for v in vectors if v is not None]).norm())


def meter(method: Method, **runtime: Any) -> GradientShares:
    cfg = override(RunConfig(), {"method.name": method.cfg.name, "runtime.gradient_shares": 1, **runtime})
    return GradientShares(cfg, method, 3)


# Parts of a loss


@pytest.mark.parametrize("step", [EARLY, STEP], ids=["first step", "late step"])
@pytest.mark.parametrize("method", METHODS)
def test_parts_add_up_to_the_total_and_so_do_their_gradients(method: str, step: Step) -> None:
    made = make_uneven(method)
    torch.manual_seed(1)
    losses = made(make_batch(views=made.required_views()), step)
    assert sum(part.detach() for part in losses.parts.values()) == pytest.approx(losses.total.item(), rel=1e-5)
    assert "sup" in losses.parts
    weights = [p for place in made.shared().values() for p in place]
    whole = torch.autograd.grad(losses.total, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
    added = [torch.zeros_like(w) for w in weights]
    for part in losses.parts.values():
        taken = torch.autograd.grad(part, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        added = [a + b for a, b in zip(added, taken, strict=True)]
    assert norm([a - b for a, b in zip(added, whole, strict=True)]) < 1e-4 * norm(list(whole))


def test_parts_of_vila_are_those_that_their_fields_switch_off() -> None:
    """The loss is linear in every weight: what a weight of 0 takes from the gradient is the part's own."""
    views, shared = make("viladiff").required_views(), {}

    def gradient(**changes: object) -> Tensor:
        method = make_uneven("viladiff", **{"vila.gate": "always", "vila.lam": 0.5, **changes})
        method(make_batch(views=views), STEP).total.backward()
        shared.update(method.shared())
        return torch.cat([p.grad.flatten() for place in method.shared().values() for p in place])  # type: ignore[union-attr]

    whole = gradient()
    method = make_uneven("viladiff", **{"vila.gate": "always", "vila.lam": 0.5})
    shares = meter(method)
    shares.add(0, method(make_batch(views=views), STEP), 1.0)
    shares.finish(0, 1.0)
    found = {term: value for place in shares.found[0]["norms"].values() for term, value in place.items()}
    assert list(shares.found[0]["norms"]) == ["student", "denoiser"]
    off: dict[tuple[str, ...], dict[str, object]] = {
        ("pseudo",): {"pseudo.weight": 0.0},
        ("student_logits",): {"vila.path_weights.student_logits": 0.0},
        ("teacher_logits",): {"vila.path_weights.teacher_logits": 0.0},
        ("teacher_to_visual_logits",): {"vila.path_weights.teacher_to_visual_logits": 0.0},
        ("mixe_ce",): {"mixe.loss_weights": (0.0, 0.5, 0.5)},
        ("mixe_edge",): {"mixe.loss_weights": (1.0, 0.0, 0.5)},
        ("mixe_noise",): {"mixe.loss_weights": (1.0, 0.5, 0.0)},
    }
    for (term,), changes in off.items():
        assert norm([whole - gradient(**changes)]) == pytest.approx(found[term], rel=0.01), term
    for arrow in ("student_features", "teacher_features", "teacher_to_visual_features"):
        both = {f"vila.path_weights.{other}": 0.0 for other in ("student_features", "teacher_features",
                "teacher_to_visual_features") if other != arrow}  # fmt: skip
        alone, without, off_too = (
            gradient(**both),
            gradient(**both, **{"vila.lam": 0.0}),
            {f"vila.path_weights.{arrow}": 0},
        )
        nothing = gradient(**both, **off_too)
        assert norm([alone - without]) == pytest.approx(found[f"{arrow}/cosine"], rel=0.02)
        assert norm([without - nothing]) == pytest.approx(found[f"{arrow}/squared"], rel=0.02)


def test_a_part_that_depends_on_nothing_trained_has_no_share() -> None:
    """The guided denoiser sees no noise, so that the noise term is a constant."""
    method = make_uneven("viladiff", **{"mixe.denoiser": "guided"})
    losses = method(make_batch(views=method.required_views()), STEP)
    assert losses.parts["mixe_noise"].item() == 0 and not losses.parts["mixe_noise"].requires_grad
    shares = meter(method)
    shares.add(0, losses, 1.0)
    shares.finish(0, 1.0)
    assert set(shares.found[0]["norms"]["denoiser"]) == {"mixe_ce", "mixe_edge"}


def test_shares_of_the_baseline_by_hand() -> None:
    """Two micro-batches: norms of the mean gradient, and the cosine of pseudo-labels' to labels'."""
    method = make_uneven("semibaseline", **{"pseudo.weight": 0.5})
    shares, grads = meter(method), {"sup": 0.0, "pseudo": 0.0}
    weights = [*method.student.encoder.parameters(), *method.student.decoder.parameters()]
    for seed in (0, 1):
        batch = make_batch(seed=seed)
        shares.add(1, method(batch, STEP), 8.0 / 2)
        losses = method(batch, STEP)
        terms = {"sup": losses.total - losses.parts["pseudo"], "pseudo": losses.total - losses.parts["sup"]}
        for term, value in terms.items():
            method.zero_grad()
            value.backward(retain_graph=True)
            grads[term] = grads[term] + torch.cat([w.grad.flatten() for w in weights]) / 2  # type: ignore[union-attr]
    shares.finish(1, 8.0)
    sup, pseudo = grads["sup"], grads["pseudo"]
    assert isinstance(sup, Tensor) and isinstance(pseudo, Tensor)
    (one,) = shares.found
    assert one["norms"]["student"] == pytest.approx(
        {"sup": float(sup.norm()), "pseudo": float(pseudo.norm())}, rel=1e-3
    )
    cosine = float(torch.nn.functional.cosine_similarity(sup, pseudo, dim=0))
    assert one["cosines"]["student"] == pytest.approx({"sup": 1.0, "pseudo": cosine}, abs=1e-3)
    assert abs(cosine) < 0.99 and one["step"] == 1


def test_an_arrow_of_weight_0_leaves_the_rest_as_it_is() -> None:
    weights = {f"vila.path_weights.{one}": 0.0 for one in ("teacher_logits", "teacher_to_visual_logits")}
    paths = ("student_features", "student_logits", "teacher_features")
    by_weight, by_path = make("viladiff", **weights), make("viladiff", **{"vila.distillation_paths": paths})
    batch = make_batch(views=by_path.required_views())
    assert by_weight(batch, STEP).total.item() == pytest.approx(by_path(batch, STEP).total.item(), rel=1e-6)
    assert run_id(
        override(RunConfig(), {"method.name": "viladiff", "method.vila.path_weights.teacher_to_visual_logits": 1.0})
    ) == (run_id(override(RunConfig(), {"method.name": "viladiff"})))


# Training is left as it is


def trained(name: str, measure: bool) -> tuple[dict[str, Tensor], Tensor]:
    method = make(name)
    if "warmup" in type(method.cfg).model_fields:
        method = make(name, warmup=0.0)
    optimizer, shares = torch.optim.AdamW(method.parameters(), 1e-3), meter(method)
    torch.manual_seed(2)
    for index in range(3):
        losses = method(make_batch(seed=index, views=method.required_views()), Step(index, index / 3, 3))
        if measure:
            shares.add(index, losses, 1.0)
        losses.total.backward()
        if measure:
            shares.finish(index, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            method.after_step(Step(index, index / 3, 3))
    assert len(shares.found) == (3 if measure else 0)
    return method.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("method", METHODS)
def test_measuring_leaves_weights_memories_and_draws_as_they_are(method: str) -> None:
    (plain, draws), (measured, after) = trained(method, False), trained(method, True)
    assert plain.keys() == measured.keys() and set(METHODS) >= BATCHES
    assert all(torch.equal(plain[key], measured[key]) for key in plain)
    assert torch.equal(draws, after)


def config(out: Path, **changes: Any) -> RunConfig:
    small = {
        "method.name": "viladiff", "train.steps": 6, "data.batch_labelled": 4, "data.batch_unlabelled": 4,
        "eval.max_images": 2, "eval.boundary": False, "optim.warmup_steps": 1, "runtime.progress": False,
        "runtime.threads": 1, "runtime.gradient_shares": 1, "runtime.checkpoint_every": 2, "runtime.runs_dir": str(out),
    }  # fmt: skip
    return override(RunConfig(), {**small, **changes})


@pytest.mark.timeout(900)  # a busy machine
def test_a_run_with_and_without_is_one_run_also_where_it_is_interrupted(tmp_path: Path) -> None:
    plain = fit(config(tmp_path / "plain", **{"runtime.gradient_shares": 0}))
    whole = fit(config(tmp_path / "whole"))
    heard = iter([False, True])
    cfg = config(tmp_path / "stopped", **{"runtime.log_every": 2})
    with pytest.raises(StopRequested):
        fit(cfg, report=lambda news: next(heard) if "loss" in news else None)
    stopped = fit(cfg)
    assert plain.record.gradient_shares is None and plain.record.run_id == whole.record.run_id
    assert [one["step"] for one in (whole.record.gradient_shares or {})["measured"]] == [1, 3, 5]
    assert whole.record.gradient_shares == stopped.record.gradient_shares
    assert (whole.record.gradient_shares or {})["fields"]["method.vila.lam"] == ["*_features/cosine"]
    states = [load_file(one.directory / "checkpoint.pt")["method"] for one in (plain, whole, stopped)]
    for other in states[1:]:
        assert all(torch.equal(value, other[key]) for key, value in states[0].items())


@pytest.mark.timeout(900)
def test_shares_are_of_the_global_batch(tmp_path: Path) -> None:
    """Of one worker, of two, and of two micro-batches."""
    found = []
    for changes in ({}, {"runtime.workers": 2}, {"train.grad_accum_steps": 2}):
        short = {"method.name": "semibaseline", "train.steps": 1, "method.pseudo.threshold": 0.0}
        cfg = config(tmp_path / str(len(found)), **short, **changes)
        found.append((fit(cfg).record.gradient_shares or {})["measured"][0]["norms"]["student"])
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[2] == pytest.approx(found[0], rel=1e-2)


def test_a_method_without_parts_is_refused_in_a_line() -> None:
    method = make("supervised")
    with pytest.raises(
        ValueError, match=r"runtime.gradient_shares = 1: method.name = 'supervised' does not give"
    ) as told:
        meter(method).add(0, Losses(torch.zeros(()), {}), 1.0)
    assert "\n" not in str(told.value)


def test_a_gradient_that_is_not_finite_is_noted_without_norms() -> None:
    method = make("supervised")
    shares, losses = meter(method), method(make_batch(views=method.required_views()), STEP)
    shares.add(2, Losses(losses.total, {}, {"sup": losses.total * torch.inf}), 1.0)
    shares.finish(2, 1.0)
    assert shares.found == [{"step": 2, "norms": {}, "cosines": {}}]
    assert by_thirds(shares.record(), 3) == []


def test_a_part_that_reaches_nothing_shared_is_measured_elsewhere() -> None:
    """Of a frozen encoder, tags train their head alone."""
    method = make("fixmatch_tags")
    method.student.encoder.requires_grad_(False)
    shares = meter(method)
    shares.add(0, method(make_batch(views=method.required_views()), STEP), 1.0)
    shares.finish(0, 1.0)
    found = {place: list(norms) for place, norms in shares.found[0]["norms"].items()}
    assert found == {"student": ["sup", "pseudo"], "elsewhere": ["tags"]}


def test_the_cost_is_said_before(tmp_path: Path) -> None:
    said = preview_run(
        config(tmp_path, **{"method.name": "supervised", "train.steps": 600, "runtime.gradient_shares": 5})
    )
    assert said["gradient shares"] == "at 15 of 600 steps, at most 1.7 % more time for each part of the loss"
    assert "gradient shares" not in preview_run(config(tmp_path, **{"runtime.gradient_shares": 0}))


# What a record says


def test_steps_are_spread_over_each_third() -> None:
    for steps in (1, 2, 3, 4, 10, 11, 100, 601):
        for each in (1, 5):
            found = measured_steps(each, steps)
            counts = [sum(3 * step // steps == third for step in found) for third in range(3)]
            sizes = [sum(3 * step // steps == third for step in range(steps)) for third in range(3)]
            assert counts == [min(each, size) for size in sizes]
    assert sorted(measured_steps(5, 30)) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29]
    assert measured_steps(0, 30) == frozenset()


def measured(*steps: dict[str, Any], **fields: list[str]) -> dict[str, Any]:
    return {"fields": fields, "measured": list(steps)}


def at(step: int, **norms: float) -> dict[str, Any]:
    return {"step": step, "norms": {"student": norms}, "cosines": {"student": dict.fromkeys(norms, 0.5)}}


def test_shares_are_means_over_steps_and_a_part_that_is_not_yet_there_has_none() -> None:
    found = measured(at(0, sup=2.0), at(1, sup=3.0, pseudo=1.0), at(7, sup=1.0, pseudo=4.0))
    sup, pseudo = by_thirds(found, 9)
    assert sup == TermShare("student", "sup", (0.875, None, 0.2), (0.5, None, 0.5))
    assert pseudo == TermShare("student", "pseudo", (0.125, None, 0.8), (0.5, None, 0.5))
    assert together([sup, pseudo], ["p*", "nothing"]) == (0.125, None, 0.8)
    assert together([sup], ["p*"]) == (None, None, None)
    elsewhere = TermShare("denoiser", "part", (0.9, 0.3, None), (None, None, None))
    assert together([sup, pseudo, elsewhere], ["s*", "p*"]) == (1.0, 0.3, 1.0), "places are not added"
    assert by_thirds(None, 9) == [] and by_thirds(measured(at(0, sup=0.0)), 9)[0].shares == (None, None, None)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"measured": []}, "must have fields"),
        (measured(at(-1, sup=1.0)), "must have step"),
        (measured(at(0, sup=-1.0)), "norms.student.sup: must be a number from 0 to 1e+100, got -1.0"),
        (measured({**at(0, sup=1.0), "cosines": {"student": {"sup": 1.5}}}), "cosines.student.sup: must be a number"),
        (measured({"step": 0, "norms": [], "cosines": {}}), "must have norms"),
        ({"fields": {"a": "b"}, "measured": []}, "fields.a: must be a list"),
    ],
)
def test_a_record_with_impossible_shares_is_refused(broken: dict[str, Any], why: str) -> None:
    made = record(name(0, 0, 0), 0.5, gradient_shares=broken)
    assert why in impossible(made)
    assert fault(measured(at(0, sup=1.0), a=["b"])) == "" and impossible(record(name(0, 0, 0), 0.5)) == ""


def test_show_prints_shares(capsys: pytest.CaptureFixture[str]) -> None:
    from viladiff.runs.listing import _print_shares

    _print_shares(record(name(0, 0, 0), 0.5, gradient_shares=measured(at(0, sup=1.0, pseudo=3.0))))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["student", "pseudo", "75.00", "—", "—", "+0.50", "—", "—"] in lines
    _print_shares(record(name(0, 0, 0), 0.5))
    assert capsys.readouterr().out == ""


# The page


def results(tmp_path: Path, shares: Callable[[int, int], dict[str, Any] | None]) -> Any:
    """Rows 1 ... 3 with λ = 0.1, 0.5, 0.5, the last without an arrow."""
    plan, store = study(tmp_path, lambda row, column, seed: 0.5, seeds=(0, 1))
    found = collect_results(plan, store)
    entries = []
    for entry in found.entries:
        row, seed = entry.cell.row, entry.cell.seed
        paths = ["a_features", "a_logits"] if row < 2 else ["a_logits"]
        settings = {"method.vila.lam": (0.1, 0.5, 0.5)[row], "method.paths": paths, "method.same": 1}
        old: Any = entry.record
        made = RunRecord(**{**dict(old), "config": {**old.config, **settings}, "gradient_shares": shares(row, seed)})
        entries.append(SimpleNamespace(**{**vars(entry), "record": made}))
    return SimpleNamespace(
        plan=found.plan, entries=entries, rows=found.rows, headline=1,
        at=lambda row, column: [e for e in entries if (e.cell.row, e.cell.column) == (row, column)],
    )  # fmt: skip


def test_the_page_says_which_parts_a_table_cannot_test(tmp_path: Path) -> None:
    fields = {"method.vila.lam": ["*/cosine"], "method.paths=a_features": ["a_features/*"], "method.same": ["sup"]}

    def shares(row: int, seed: int) -> dict[str, Any] | None:
        terms = {"sup": 8.0, "a_features/squared": 1.2 + 0.2 * seed, "a_features/cosine": 0.6 - 0.2 * seed}
        return None if row == 2 else {"fields": fields, "measured": [at(0, **terms, a_logits=0.2)]}

    found = loss_gradients.section(results(tmp_path, shares))
    assert found is not None
    lam, arrow, lacking = found.said
    assert lam.startswith(
        "method.vila.lam: the parts that it weighs reach, in row 2, 5.0 % (early) in 1/8 (183), below 10 %"
    )
    assert "this table cannot test it" in lam
    assert "18.0 % (early) in 1/8 (183);" in arrow and "cannot" not in arrow
    assert lacking.startswith("Not measured in rows a own")
    chart = found.charts[0]
    assert chart.seeds == 2 and chart.terms[1].shares == (pytest.approx(0.13), None, None)
    assert [loss_gradients.small(term.shares[0]) for term in chart.terms] == [False, False, True, True]
    assert chart.svg.count("<rect") == 4 and 'height="80.00"' in chart.svg
    markdown = loss_gradients.gradients_markdown(found)["Gradient shares"]
    assert any("| 13.0 |" in line for line in markdown) and any("5.0 &lt;" in line for line in markdown)


def test_a_part_that_is_large_in_another_row_can_be_tested(tmp_path: Path) -> None:
    def shares(row: int, seed: int) -> dict[str, Any]:
        fields = {"method.vila.lam": ["part"], "method.paths=a_features": ["a_features/*"]}
        return {"fields": fields, "measured": [at(0, sup=9.5, part=(3.0, 0.5, 0.5)[row])]}

    lam, arrow = loss_gradients.section(results(tmp_path, shares)).said
    assert "in row 2, 5.0 % (early) in 1/8 (183), but 24.0 % in row 1;" in lam and "cannot" not in lam
    assert arrow.endswith("have no share in the rows that measured any.")


@pytest.mark.parametrize("name", ["column", "method.name"])
def test_what_varies_between_columns_or_methods_alone_is_no_ablation(tmp_path: Path, name: str) -> None:
    def shares(row: int, seed: int) -> dict[str, Any]:
        return {"fields": {"method.vila.lam": ["*"]}, "measured": [at(0, sup=1.0)]}

    found = results(tmp_path, shares)
    for entry in found.entries:
        there = entry.cell.row if name == "method.name" else entry.cell.column
        entry.record.config.update({"method.name": f"m{there}", "method.vila.lam": there})
    assert loss_gradients.section(found).said == ()


def test_a_table_without_measured_shares_has_no_section(tmp_path: Path) -> None:
    assert loss_gradients.section(results(tmp_path, lambda row, seed: None)) is None
    assert loss_gradients.gradients_markdown(None) == {}
