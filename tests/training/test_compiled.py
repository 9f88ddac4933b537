"""Compilation part by part: no graph breaks, the same losses, when it is on, and what a compiler's failures do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from method_kit import CLASSES, STEP, make, make_batch
from torch import Tensor, nn

from viladiff.methods import METHODS
from viladiff.methods.base import Method
from viladiff.models.cast_weights import CastWeights
from viladiff.models.compiled import CALLS, CompiledForward, Compiling, compile_parts, compiled_parts
from viladiff.runs.config import RunConfig, override
from viladiff.training import launch
from viladiff.training.launch import compiles, step_forward, trial_passes
from viladiff.training.step_work import LATE, TEXT_DIM, empty_batch, empty_method

CPU, GPU = torch.device("cpu"), torch.device("cuda")
QUICK = ("viladiff", "ddfp", "pseudoseg")
"""Of all kinds of parts; the other methods are slow tests."""
FILES: dict[str, object] = {"data.dataset": "voc", "data.split": "92"}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def counting(graphs: list[object], fail_from: int = 10**9, seconds: float = 0.0) -> Callable[..., Any]:
    """A backend that runs what it gets as it is; from its n-th graph on it fails, and each takes its time."""

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        graphs.append(graph)
        time.sleep(seconds)
        if len(graphs) > fail_from:
            raise RuntimeError("no C compiler\nlong story")
        return graph.forward

    return backend


def total_of(method: Method, compiling: Compiling | None = None) -> Tensor:
    torch.manual_seed(1)
    batch = make_batch(views=method.required_views())
    if compiling is None:
        return method(batch, STEP).total
    with compiling.step():
        return method(batch, STEP).total


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_no_graph_breaks(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``fullgraph`` makes a break a failure of its part; a graph for each part and kind of call is all there is."""
    method, compiling, graphs = make(name), Compiling(), list[object]()
    parts = compile_parts(method, compiling, counting(graphs), fullgraph=True)
    assert {"student.encoder", "student.decoder"} <= {part.path for part in parts}
    total_of(method, compiling)
    assert not any(part.failed for part in parts), capsys.readouterr().err
    assert len(graphs) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["viladiff", "psmt", "semivl"])
def test_a_vit_has_no_graph_breaks(name: str) -> None:
    fields = {"model.encoder": "vit_base_patch16_224", "model.pretrained": "none", "method.name": name}
    cfg = override(
        RunConfig(), {**FILES, **fields, "data.crop": 64, "data.batch_labelled": 2, "data.batch_unlabelled": 2}
    )
    method, compiling, graphs = (
        empty_method(cfg, [f"class {i}" for i in range(CLASSES)], TEXT_DIM),
        Compiling(),
        list[object](),
    )
    parts = compile_parts(method.train(), compiling, counting(graphs), fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), compiling.step():
        method(empty_batch(cfg, method.required_views(), CLASSES).to(CPU), LATE)
    assert graphs and not any(part.failed for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["supervised", "unimatch_v2", "viladiff"])
def test_a_compiled_step_is_the_same(name: str) -> None:
    """Gradients go through torch's own tracing of the backward pass, so that the numbers stay."""
    plain, method, compiling = make(name), make(name), Compiling()
    parts = compile_parts(method, compiling, "aot_eager", fullgraph=True)
    expected, found = total_of(plain), total_of(method, compiling)
    assert not any(part.failed for part in parts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for total in (found, expected):
        total.backward()
    same_weights(method, plain, compare=lambda x: x.grad)
    same_weights(method, plain, compare=lambda x: x)
    assert method.state_dict().keys() == plain.state_dict().keys()


def same_weights(method: nn.Module, plain: nn.Module, compare: Callable[[Tensor], Tensor | None]) -> None:
    """Parameters and buffers, or what is compared of them."""
    tensors = [[*m.named_parameters(), *m.named_buffers()] for m in (method, plain)]
    for (path, mine), (_, theirs) in zip(*tensors, strict=True):
        a, b = compare(mine), compare(theirs)
        assert (a is None) is (b is None), path
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")


def test_a_graph_break_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    method, compiling = make("supervised"), Compiling()
    network = method.student.decoder
    inner = network.forward
    network.forward = lambda *args: (print("", end=""), inner(*args))[1]  # type: ignore[method-assign]
    parts = compile_parts(method, compiling, counting([]), fullgraph=True)
    assert total_of(method, compiling).isfinite()
    assert [part.path for part in parts if part.failed] == ["student.decoder"]
    assert capsys.readouterr().err.startswith("note: student.decoder is not compiled: ")


def test_what_is_compiled_is_networks_and_denoiser() -> None:
    assert [path for path, _ in compiled_parts(make("viladiff"))] == [
        *("student.encoder", "student.decoder", "teacher.encoder", "teacher.decoder", "denoiser"),
    ]


def test_parts_that_wait_for_other_workers_stay_as_they_are() -> None:
    method = make("supervised")
    method.student.decoder.extra = nn.SyncBatchNorm(4)
    assert [path for path, _ in compiled_parts(method)] == ["student.encoder"]


# One part


class Part(nn.Module):
    """A convolution with statistics and draws."""

    def __init__(self, drops: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5) if drops else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 13:
            raise ValueError("13 is no side")
        return self.drop(self.norm(self.conv(x)))


def guarded(
    backend: Callable[..., Any] | str, budget: float | None = None, **made: bool
) -> tuple[Part, CompiledForward]:
    part, compiling = Part(**made), Compiling(budget)
    found = CompiledForward("net", part, compiling, torch.compile(part.forward, backend=backend, dynamic=False))
    part.forward = found  # type: ignore[method-assign]
    return part, found


def call(part: Part, side: int) -> Tensor:
    """A step's call, with its gradient."""
    compiling = part.forward.compiling  # type: ignore[attr-defined]
    torch.manual_seed(side)
    x = torch.randn(2, 3, side, side, requires_grad=True)
    with compiling.step():
        out = part(x)
    (out.square().mean() + out.mean()).backward()
    return out.detach()


def as_plain(part: Part, sides: list[int]) -> None:
    """Results, gradients and statistics are those of the part as it is."""
    plain = Part(drops=isinstance(part.drop, nn.Dropout))
    for side in sides:
        torch.manual_seed(side)
        x = torch.randn(2, 3, side, side, requires_grad=True)
        out = plain(x)
        (out.square().mean() + out.mean()).backward()
        torch.testing.assert_close(call(part, side), out.detach())
    same_weights(part, plain, compare=lambda x: x.grad)
    same_weights(part, plain, compare=lambda x: x)


@pytest.mark.parametrize("drops", [False, True])
def test_a_trial_leaves_nothing_behind(drops: bool) -> None:
    graphs: list[object] = []
    part, found = guarded(counting(graphs), drops=drops)
    as_plain(part, [6, 6, 7])
    assert len(graphs) == 2 and not found.failed, "a graph for each size, none of the second call"


def test_a_compiler_that_raises_leaves_the_part_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    graphs: list[object] = []
    part, found = guarded(counting(graphs, fail_from=0))
    as_plain(part, [6, 7, 6])
    assert found.failed and len(graphs) == 1, "it is asked once"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: net is not compiled: ") and "no C compiler" in line and "long story" not in line


def test_a_compiler_that_fails_at_the_second_size_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    graphs: list[object] = []
    part, found = guarded(counting(graphs, fail_from=1))
    as_plain(part, [6, 6, 7, 6])
    assert found.failed and len(graphs) == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_compiled_code_that_fails_later_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        def run(*args: object) -> object:
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("launch failed")
            return graph.forward(*args)

        return run

    part, found = guarded(backend)
    as_plain(part, [6, 6, 6, 6])
    assert found.failed and "net is not compiled: launch failed" in capsys.readouterr().err


def test_a_backward_pass_that_does_not_compile_is_seen_before_it_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("no backward")

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        return lambda *args: tuple(Bad.apply(x) for x in graph.forward(*args))

    part, found = guarded(backend)
    as_plain(part, [6, 6])
    assert found.failed and "no backward" in capsys.readouterr().err


def test_wrong_numbers_are_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    part, found = guarded(lambda graph, inputs: lambda *args: tuple(1.01 * x for x in graph.forward(*args)))
    as_plain(part, [6, 6])
    assert found.failed and "its numbers are off by" in capsys.readouterr().err


def test_a_part_s_own_error_is_raised() -> None:
    part, _ = guarded("eager")
    call(part, 6)
    with pytest.raises(ValueError, match="13 is no side"):
        call(part, 13)


def test_what_comes_after_the_budget_is_not_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    graphs: list[object] = []
    part, found = guarded(counting(graphs, seconds=0.3), budget=0.2)
    as_plain(part, [6, 6, 7, 8])
    assert len(graphs) == 1 and not found.failed
    (line,) = capsys.readouterr().err.splitlines()
    assert "time for compilation is over" in line


def test_new_sizes_do_not_compile_without_end() -> None:
    graphs: list[object] = []
    part, _ = guarded(counting(graphs))
    sides = list(range(4, 4 + CALLS + 2))
    as_plain(part, sides + sides)
    assert len(graphs) == CALLS


def test_outside_of_a_step_nothing_is_compiled() -> None:
    graphs: list[object] = []
    part, _ = guarded(counting(graphs))
    for side in (6, 7):
        part(torch.zeros(2, 3, side, side))
    assert not graphs


def test_weights_that_are_cast_each_step_are_compiled_once() -> None:
    method, compiling, graphs = make("supervised"), Compiling(), list[object]()
    compile_parts(method, compiling, counting(graphs))
    step = CastWeights(method, GPU, "bf16", method.exact)  # named alone: on it weights are cast
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16), compiling.step():
            step(make_batch(views=method.required_views()), STEP).total.backward()
        assert len(graphs) == 2


# A run


def chosen(device: torch.device, passes: bool = True, steps: int = 30_000, **fields: object) -> bool:
    """Whether parts are compiled with these fields of ``runtime``."""
    with pytest.MonkeyPatch.context() as stack:
        stack.setattr(launch, "trial_passes", lambda *given: passes)
        files = {} if "data__dataset" in fields else FILES
        cfg = override(RunConfig(), {**files, **{path.replace("__", "."): value for path, value in fields.items()}})
        return compiles(cfg, CLASSES, device, steps)


def test_it_is_on_where_it_can_be() -> None:
    assert chosen(GPU) and chosen(CPU, runtime__compile="on") and chosen(GPU, passes=False, runtime__compile="on")
    assert not chosen(CPU) and not chosen(GPU, passes=False) and not chosen(GPU, runtime__compile="off")
    assert not chosen(GPU, runtime__gradient_shares=5) and not chosen(GPU, steps=29_999)
    assert not chosen(GPU, data__dataset="digits"), "whose numbers are frozen"
    with pytest.raises(ValueError, match=r"runtime.compile = on: .* runtime.gradient_shares = 5"):
        chosen(CPU, runtime__compile="on", runtime__gradient_shares=5)


def test_a_step_compiles_if_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[object] = []
    given = lambda method, compiling: compile_parts(method, compiling, counting(graphs))  # noqa: E731
    monkeypatch.setattr(launch, "compile_parts", given)
    method, batch = make("supervised"), make_batch()
    for compiled, expected in ((False, 0), (True, 2)):
        step_forward(RunConfig(), method, method, CPU, compiled)(batch, STEP)
        method.student(batch.image[:1])
        assert len(graphs) == expected


TINY: dict[str, object] = {
    **FILES,
    **{"model.encoder": "digits_vit", "model.decoder_width": 16, "data.crop": 32, "data.batch_labelled": 2},
    **{"data.batch_unlabelled": 2, "train.precision": "fp32", "model.pretrained": "none"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "budget", "said"),
    [("eager", 250, ""), ("none_such", 250, "none_such"), ("eager", 1, "it took more than 1 s")],
)
def test_a_trial_in_a_process_of_its_own(
    backend: str, budget: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = override(RunConfig(), {**TINY, "method.name": "viladiff"})
    assert trial_passes(cfg, CLASSES, CPU, budget, backend) is not bool(said)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said) and all(said in line and "nothing is compiled (" in line for line in lines)
