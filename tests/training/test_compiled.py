"""Compilation part by part: no graph breaks, the same losses, when it is on, and evaluation without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from method_kit import STEP, make, make_batch
from run_kit import short_run
from torch import Tensor

from viladiff.models.compiled import compile_parts, compiled_parts, compiler_works, stance_restored
from viladiff.runs.config import RunConfig, override
from viladiff.training import launch
from viladiff.training.launch import training_forward

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _stance() -> object:
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["supervised", "unimatch_v2", "viladiff"])
def test_no_graph_breaks_and_the_same_step(name: str) -> None:
    """``fullgraph`` makes a break an error; the backend is torch itself, so that numbers stay."""
    plain, method = make(name), make(name)
    parts = compile_parts(method, backend="eager", fullgraph=True)
    assert {"student.encoder", "student.decoder"} <= set(parts)
    batch = make_batch(views=method.required_views())
    torch.manual_seed(1)
    expected = plain(batch, STEP).total
    torch.manual_seed(1)
    found = method(batch, STEP).total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for total in (found, expected):
        total.backward()
    for (path, mine), (_, theirs) in zip(method.named_parameters(), plain.named_parameters(), strict=True):
        assert (mine.grad is None) is (theirs.grad is None), path
        if mine.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert method.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.slow
def test_a_graph_break_is_seen() -> None:
    method = make("supervised")
    network = method.student.decoder
    inner = network.forward
    network.forward = lambda *args: (print("", end=""), inner(*args))[1]  # type: ignore[method-assign]
    compile_parts(method, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"[Uu]nsupported|[Bb]reak"):
        method(make_batch(views=method.required_views()), STEP)


def test_what_is_compiled_is_networks_and_denoiser() -> None:
    assert [path for path, _ in compiled_parts(make("viladiff"))] == [
        *("student.encoder", "student.decoder", "teacher.encoder", "teacher.decoder", "denoiser"),
    ]


def chosen(monkeypatch: pytest.MonkeyPatch, device: torch.device, works: bool = True, **fields: object) -> bool:
    """Whether parts are compiled with these fields of ``runtime``."""
    calls: list[object] = []
    monkeypatch.setattr(launch, "compiler_works", lambda device: works)
    monkeypatch.setattr(launch, "compile_parts", calls.append)
    method = make("supervised")
    with stance_restored():
        training_forward(override(RunConfig(), {f"runtime.{k}": v for k, v in fields.items()}), method, method, device)
    return bool(calls)


def test_it_is_on_where_it_is_asked_for_and_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert chosen(monkeypatch, gpu, compile="auto") and chosen(monkeypatch, CPU, compile="on")
    assert not chosen(monkeypatch, CPU, compile="auto")
    assert not chosen(monkeypatch, gpu, works=False, compile="auto")
    assert not chosen(monkeypatch, gpu) and not chosen(monkeypatch, gpu, compile="auto", gradient_shares=5)
    with pytest.raises(ValueError, match=r"runtime.compile = on: .* runtime.gradient_shares = 5"):
        chosen(monkeypatch, CPU, compile="on", gradient_shares=5)


def compiled_so_far() -> tuple[Callable[[Tensor], Tensor], list[object]]:
    """A function that is compiled at its first call, unless the process's stance is against it, and what it was."""
    seen: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        seen.append(graph)
        return graph.forward

    return torch.compile(lambda x: 2 * x, backend=backend), seen


def test_parts_are_compiled_within_a_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "compile_parts", lambda method: [])
    double, seen = compiled_so_far()
    method, cfg = make("supervised"), override(RunConfig(), {"runtime.compile": "on"})
    step = training_forward(cfg, double, method, CPU)  # type: ignore[arg-type]
    double(torch.ones(3))
    assert not seen
    step(torch.ones(3))
    assert len(seen) == 1


def test_after_a_run_other_code_compiles_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "compile_parts", lambda method: [])
    short_run(tmp_path, "supervised", **{"runtime.compile": "on"})
    double, seen = compiled_so_far()
    double(torch.ones(3))
    assert len(seen) == 1


def test_a_compiler_that_fails_or_is_late_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("no C compiler\nlong story")

    assert not compiler_works(CPU, try_it=fail)
    assert not compiler_works(CPU, 0.05, lambda: time.sleep(0.3))
    assert compiler_works(CPU, try_it=lambda: None)
    first, second = capsys.readouterr().err.splitlines()
    assert "no C compiler" in first and "long story" not in first and "more than 0 s" in second
