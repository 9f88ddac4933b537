"""Copies to a device, with a device of the test's own in the place of CUDA; one test runs where there is a real one."""

from __future__ import annotations

import ast
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import viladiff
from viladiff.data import registry
from viladiff.data.batch import Batch, CutMix, TextBatch, Views
from viladiff.data.loader import BatchLoader
from viladiff.data.loading import device_copies
from viladiff.data.loading.device_copies import LoaderStream, send
from viladiff.runs.config import RunConfig, override

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class HostTensor:
    """What ``send`` uses of a tensor, and what it did."""

    def __init__(self, done: tuple[object, ...] = ()) -> None:
        self.done = done

    def pin_memory(self) -> HostTensor:
        return HostTensor((*self.done, "pinned"))

    def to(self, device: torch.device, non_blocking: bool = False) -> HostTensor:
        return HostTensor((*self.done, device.type, non_blocking))


def test_a_gpu_is_sent_page_locked_memory_without_waiting_and_a_cpu_gets_the_tensor_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert send(HostTensor(), GPU).done == ("pinned", "cuda", True)  # type: ignore[arg-type, attr-defined]
    tensor = torch.arange(3)
    assert send(tensor, CPU) is tensor


class Fake:
    """Streams and events that write down what happens, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []
        self.here = "training"

    def Stream(self, device: torch.device) -> str:  # torch's name
        return "loading"

    def Event(self) -> Any:
        event = SimpleNamespace()
        event.record = lambda stream: self.log.append(("record", stream, self.here))
        return event

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        before, self.here = self.here, name
        try:
            yield
        finally:
            self.here = before

    def current_stream(self, device: torch.device) -> Any:
        name = self.here
        return SimpleNamespace(name=name, wait_event=lambda event: self.log.append(("wait", name)))


class Marked:
    """A tensor as far as streams go."""

    def __init__(self, fake: Fake, name: str) -> None:
        self.fake, self.name = fake, name

    def record_stream(self, stream: Any) -> None:
        self.fake.log.append(("used on", stream.name, self.name))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    monkeypatch.setattr(device_copies, "torch", SimpleNamespace(cuda=found))
    return found


def test_training_waits_for_the_batch_and_keeps_its_memory(fake: Fake) -> None:
    def steps() -> Generator[Any, None, None]:
        for i in range(2):
            fake.log.append(("make", i, fake.here))
            yield [SimpleNamespace(tensors=lambda i=i: [Marked(fake, f"{i}a"), Marked(fake, f"{i}b")])]

    stream = LoaderStream(GPU)
    for _ in stream.receive(stream.prepare(steps())):
        fake.log.append(("train", fake.here))
    one = [
        ("record", "loading", "loading"), ("wait", "training"), ("used on", "training", "{}a"),
        ("used on", "training", "{}b"), ("train", "training"),
    ]  # fmt: skip
    wanted = [
        event
        for i in range(2)
        for event in [("make", i, "loading"), *(tuple(str(part).format(i) for part in event) for event in one)]
    ]
    assert fake.log == wanted and fake.here == "training"


def test_an_error_and_a_close_leave_the_stream(fake: Fake) -> None:
    closed = []

    def steps() -> Generator[Any, None, None]:
        try:
            yield []
            raise ValueError("broken")
        finally:
            closed.append(fake.here)

    stream = LoaderStream(GPU)
    with pytest.raises(ValueError, match="broken"):
        list(stream.receive(stream.prepare(steps())))
    with closing(stream.receive(stream.prepare(steps()))) as received:
        next(received)
    assert len(closed) == 2 and fake.here == "training"


def test_a_cpu_has_no_stream() -> None:
    batches: list[list[Batch]] = [[], []]
    stream = LoaderStream(CPU)
    assert list(stream.receive(stream.prepare(one for one in batches))) == batches


def test_every_tensor_of_a_batch_is_named() -> None:
    """Or its memory would be given out again while a GPU reads it."""
    numbers = iter(range(100))

    def new() -> Tensor:
        return torch.tensor(next(numbers))

    mix = CutMix(new(), new())
    mix.masks[(1.0,)] = new()  # made by training, in its own stream
    batch = Batch(
        new(), new(), (0,), (new(), new()), (new(),), (mix,), new(), (1,), TextBatch(new(), new()),
        TextBatch(new(), new()), new(), new(), new(), new(),
    )  # fmt: skip
    left = {int(tensor) for tensor in batch.tensors()}
    assert left == set(range(int(next(numbers)))) - {2}


def test_what_the_loader_calls_makes_no_tensor_on_the_device_from_numbers() -> None:
    """``new_tensor`` and ``torch.tensor(..., device=...)`` copy from memory that is not locked, and wait."""
    root = Path(viladiff.__file__).parent / "data"
    wrong = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            named = {word.arg for word in node.keywords}
            made = ast.unparse(node.func) in ("torch.tensor", "torch.as_tensor") and "device" in named
            if node.func.attr == "new_tensor" or made or (node.func.attr == "to" and "non_blocking" in named):
                wrong.append(f"{path.relative_to(root)}:{node.lineno}")
    allowed = ("batch.py", "loading/device_copies.py")  # Batch.to, which no loader calls
    assert [one for one in wrong if not one.startswith(allowed)] == []


@pytest.mark.gpu
def test_batches_are_the_same_on_the_loaders_stream_and_on_the_default_one() -> None:
    cfg = override(RunConfig(), {"train.steps": 8, "runtime.device": "cuda"})
    dataset = registry.load_dataset(*registry.dataset_spec(cfg))
    made = BatchLoader(cfg, dataset, Views(weak=1, strong=2, cutmix=True), None, 4, GPU)
    plain = [tensor.clone() for step in range(8) for batch in made.micro_batches(step) for tensor in batch.tensors()]
    with closing(made.stream(0, 8, 2)) as stream:
        found = [tensor.clone() for batches in stream for batch in batches for tensor in batch.tensors()]
    assert len(plain) == len(found) and all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
