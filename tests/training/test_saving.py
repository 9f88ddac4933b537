"""Checkpoints beside training: the copy, the thread, what is due, and what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from viladiff.data.batch import Batch
from viladiff.runs import checkpoint
from viladiff.runs.checkpoint import load_checkpoint, load_file, previous, save_checkpoint
from viladiff.runs.config import RunConfig, override
from viladiff.runs.lease import LeaseLostError, acquire_or_raise
from viladiff.runs.record import load_record
from viladiff.training import saving
from viladiff.training.saving import CheckpointWriter, HostCopy
from viladiff.training.trainer import Result, StopRequested, Trainer, fit

CPU = torch.device("cpu")
TINY = {
    "method.name": "supervised",
    "model.pretrained": "none",
    "data.batch_labelled": 2,
    "train.steps": 6,
    "eval.max_images": 2,
    "eval.boundary": False,
    "runtime.threads": 1,
    "runtime.log_every": 100,
    "runtime.checkpoint_every": 0,
    "runtime.progress": False,
}


def config(out: Path, **changes: Any) -> RunConfig:
    flat = {path.replace("__", "."): value for path, value in changes.items()}
    return override(RunConfig(), {**TINY, "runtime.runs_dir": str(out), **flat})


def writer(path: Path, minutes: float = 1e9, proceed: Callable[[], None] = lambda: None) -> CheckpointWriter:
    return CheckpointWriter(path, minutes, CPU, proceed)


def state(step: int) -> dict[str, Any]:
    return {"step": step, "w": [torch.full((100, 100), float(step)), torch.full((3,), step)]}


class Gate:
    """Holds the writes of a checkpoint at their first piece."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.open.wait(30)


# The copy


def test_a_copy_keeps_values_types_and_attributes_and_reuses_its_memory() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    given = {"net": net.state_dict(), "history": [{"miou": None}, (1, 2.5)], "empty": torch.zeros(0)}
    host = HostCopy(CPU)
    first = host.take(given)
    assert type(first["net"]) is type(given["net"]) and vars(first["net"]) == vars(given["net"])
    assert list(first["net"]) == list(given["net"]) and first["history"] == given["history"]
    places = {name: value.data_ptr() for name, value in first["net"].items()}
    for name, value in net.state_dict().items():
        assert torch.equal(first["net"][name], value) and first["net"][name].stride() == value.stride()
        assert places[name] != value.data_ptr()
    given["history"].append("later")  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 1
    assert len(first["history"]) == 2 and not torch.equal(first["net"]["0.weight"], net[0].weight)
    second = host.take({"net": net.state_dict()})
    assert {name: value.data_ptr() for name, value in second["net"].items()} == places
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in second["net"].items())


# The thread


def test_training_goes_on_beside_the_write_of_what_was_copied(tmp_path: Path) -> None:
    gate, given = Gate(), state(1)
    with writer(tmp_path / "c.pt", proceed=gate) as saver:
        saver.save(given)
        assert gate.reached.wait(30)
        given["w"][0] += 1
        gate.open.set()
    found = load_checkpoint(tmp_path / "c.pt")
    assert found is not None and bool((found["w"][0] == 1).all())
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_one_write_at_a_time_and_one_checkpoint_beside_it(tmp_path: Path) -> None:
    path, seen, running = tmp_path / "c.pt", [], []

    def proceed() -> None:
        running.append(sum(thread.name.startswith("writer of") for thread in threading.enumerate()))
        seen.append(sorted(entry.name.replace(str(os.getpid()), "N") for entry in tmp_path.iterdir()))

    with writer(path, proceed=proceed) as saver:
        for step in range(1, 5):
            saver.save(state(step))
    assert set(running) == {1}
    assert [".c.pt.N.tmp", "c.pt"] in seen and not any(len(names) > 2 for names in seen)
    newest, older = load_file(path), load_file(previous(path))
    assert (newest["step"], older["step"]) == (4, 3)


def test_the_last_whole_checkpoint_is_kept_where_only_the_one_before_is_there(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(previous(path), state(1))

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"), writer(path, proceed=full) as saver:
        saver.save(state(2))
    found = load_checkpoint(path)
    assert found is not None and found["step"] == 1


def test_a_checkpoint_is_due_by_time_and_never_while_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, gate = [1000.0], Gate()
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    with writer(tmp_path / "c.pt", 10, gate) as saver:
        assert not saver.due()
        now[0] += 599
        assert not saver.due()
        now[0] += 1
        assert saver.due()
        saver.save(state(1))
        now[0] += 700
        assert not saver.due(), "it would have to wait for the write"
        gate.open.set()
        saver.wait()
        assert saver.due()


@pytest.mark.parametrize("call", ["due", "save", "wait", "exit"])
def test_an_error_of_the_thread_is_raised_once_by_the_next_call(tmp_path: Path, call: str) -> None:
    path, failing = tmp_path / "c.pt", [False]

    def proceed() -> None:
        if failing[0] and any(tmp_path.glob(".*.tmp")):  # amid the write
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with suppress(NotImplementedError), writer(path, proceed=proceed) as saver:
        saver.save(state(1))
        saver.wait()
        failing[0] = True
        saver.save(state(2))
        while saver._thread is not None and saver._thread.is_alive():
            time.sleep(0.001)
        failing[0] = False
        with pytest.raises(OSError, match=r"Input/output error: .*c\.pt"):
            if call == "exit":
                saver.__exit__(None, None, None)
            else:
                getattr(saver, call)(*[state(3)] * (call == "save"))
        assert not saver.due()
        found = load_checkpoint(path)
        assert found is not None and found["step"] == 1 and [entry.name for entry in tmp_path.iterdir()] == ["c.pt"]
        saver.save(state(4))
        saver.wait()
        assert load_file(path)["step"] == 4
        raise NotImplementedError("an error of training comes first")


def test_an_interrupt_abandons_the_write_and_an_error_lets_it_end(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, state(1))
    for error, step in ((KeyboardInterrupt, 1), (ValueError, 2)):
        gate = Gate()
        with pytest.raises(error), writer(path, proceed=gate) as saver:
            saver.save(state(2))
            assert gate.reached.wait(30)
            threading.Timer(0.2, gate.open.set).start()
            raise error
        assert load_file(path)["step"] == step and [entry.name for entry in tmp_path.glob(".*")] == []
        assert not any(thread.name.startswith("writer of") for thread in threading.enumerate())


# Runs


@contextmanager
def broken_disk(monkeypatch: pytest.MonkeyPatch, code: int, at: int) -> Iterator[None]:
    """The ``at``-th checkpoint fails after a piece of it was written."""
    count, real = [0], checkpoint._Hashing

    class Failing(real):  # type: ignore[valid-type,misc]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            count[0] += 1

        def write(self, data: Any) -> int:
            written: int = super().write(data)
            if count[0] == at and self.length > 5000:
                raise OSError(code, os.strerror(code))
            return written

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_Hashing", Failing)
        yield


def same(one: Result, other: Result) -> bool:
    a, b = (load_file(result.directory / "checkpoint.pt")["method"] for result in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_ends_the_run_with_a_line_and_it_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    plain = fit(config(tmp_path / "plain"))
    cfg = config(tmp_path / "full", runtime__checkpoint_minutes=1e-9)
    with broken_disk(monkeypatch, code, 3), pytest.raises(OSError, match=rf"{os.strerror(code)}: .*checkpoint\.pt"):
        fit(cfg)
    directory = tmp_path / "full" / plain.record.run_id
    assert not list(directory.glob("*record.json")) and not list(directory.glob(".*"))
    assert 1 <= load_file(directory / "checkpoint.pt")["step"] < 6
    again = fit(cfg)
    assert same(plain, again) and again.record.scores == plain.record.scores
    assert list(again.frame()["step"]) == list(range(6))


def test_a_finished_run_keeps_one_checkpoint_without_the_optimisers_state(tmp_path: Path) -> None:
    done = fit(config(tmp_path, runtime__checkpoint_every=2))
    assert not previous(done.directory / "checkpoint.pt").exists()
    kept = load_file(done.directory / "checkpoint.pt")
    assert kept["optimizer"] == {"name": "adamw"} and kept["step"] == 6
    (done.directory / "record.json").unlink()
    again = fit(config(tmp_path, runtime__checkpoint_every=2))  # evaluated once more, not trained
    assert again.record.scores == done.record.scores and same(again, done)
    save_checkpoint(done.directory / "checkpoint.pt", {**kept, "step": 4})
    (done.directory / "record.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint\.pt: of a finished run, without .*optimiser; start over"):
        fit(config(tmp_path))


def steps_saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    real = CheckpointWriter.save
    monkeypatch.setattr(CheckpointWriter, "save", lambda self, given: (found.append(given["step"]), real(self, given)))
    return found


def test_both_rules_say_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = steps_saved(monkeypatch)
    fit(config(tmp_path / "a", runtime__checkpoint_every=4, eval__every_steps=3))
    assert saved == [3, 4, 6], "by steps, after an evaluation and at the end"
    saved.clear()
    fit(config(tmp_path / "b", eval__every_steps=3))
    assert saved == [6], "by time, which has not passed"
    saved.clear()
    monkeypatch.setattr(CheckpointWriter, "due", lambda self: True)
    fit(config(tmp_path / "c"))
    assert saved == [1, 2, 3, 4, 5, 6]
    photographs = override(RunConfig(), {"data.dataset": "voc"})
    assert photographs.runtime.checkpoint_every == 0 and RunConfig().runtime.checkpoint_every == 100
    assert photographs.runtime.checkpoint_minutes == RunConfig().runtime.checkpoint_minutes == 10


def test_what_training_waits_for_is_in_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy in the middle of the run, and the write at its end."""
    plain = fit(config(tmp_path / "plain")).record.train_seconds
    take, write = HostCopy.take, CheckpointWriter._write

    def slow_copy(self: HostCopy, given: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.4)
        return take(self, given)

    def slow_write(self: CheckpointWriter, given: dict[str, Any]) -> None:
        time.sleep(0.8 if given["step"] == 6 else 0)
        write(self, given)

    monkeypatch.setattr(HostCopy, "take", slow_copy)
    monkeypatch.setattr(CheckpointWriter, "_write", slow_write)
    record = fit(config(tmp_path / "slow", runtime__checkpoint_every=3)).record
    assert record.train_seconds > 0.4 * 2 + 0.8 > plain
    assert record.seconds_per_step == pytest.approx(record.train_seconds / 6)


def test_a_lease_that_is_lost_amid_a_write_leaves_the_other_ones_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, runtime__checkpoint_every=2)
    directory = tmp_path / Trainer(cfg).name
    real, lost = CheckpointWriter._write, threading.Event()

    def write(self: CheckpointWriter, given: dict[str, Any]) -> None:
        if given["step"] == 4:
            lease._lost.set()
            lost.set()
        real(self, given)

    step = Trainer._step

    def waits(self: Trainer, batches: list[Batch]) -> Any:
        assert self.step < 4 or lost.wait(30)
        return step(self, batches)

    monkeypatch.setattr(CheckpointWriter, "_write", write)
    monkeypatch.setattr(Trainer, "_step", waits)
    with acquire_or_raise(directory) as lease, pytest.raises(LeaseLostError, match="another machine"):
        fit(cfg, lease=lease)
    assert load_file(directory / "checkpoint.pt")["step"] == 2 and not list(directory.glob(".*"))


def test_a_run_that_is_asked_to_stop_has_its_checkpoint_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CheckpointWriter._write
    monkeypatch.setattr(CheckpointWriter, "_write", lambda self, given: (time.sleep(0.3), real(self, given))[1])
    cfg = config(tmp_path, runtime__log_every=2)
    with pytest.raises(StopRequested):
        fit(cfg, report=lambda news: news["step"] == 4)
    assert load_file(tmp_path / Trainer(cfg).name / "checkpoint.pt")["step"] == 4


# Kills. Importing torch takes longer than the runs, so one process imports it and forks each run.

KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from viladiff.runs.checkpoint import load_checkpoint
from viladiff.runs.config import RunConfig, override
from viladiff.training.trainer import Trainer, fit

changes, plain, kills = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def start(out):
    child = os.fork()
    if child == 0:
        try:
            fit(override(RunConfig(), {**changes, "runtime.runs_dir": out}))
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child

def changed(path):
    return path.stat().st_mtime_ns if path.exists() else 0

def ended(child):
    return os.waitpid(child, os.WNOHANG)[0] != 0

_, status = os.waitpid(start(plain), 0)
assert status == 0
directory = Path(plain + "-killed") / next(Path(plain).iterdir()).name
draw, inside, done, step = random.Random(11), 0, 0, 0
while done < kills:
    child = start(str(directory.parent))
    # The kill comes after one or two new checkpoints: at the next write, or at any moment of the next steps.
    for _ in range(draw.choice([1, 2])):
        was = changed(directory / "checkpoint.pt")
        while changed(directory / "checkpoint.pt") == was:
            assert not ended(child), "the run was over before all kills"
            time.sleep(0.001)
    amid = draw.random() < 0.6
    time.sleep(draw.uniform(0, 0.02) if amid else draw.uniform(0, 0.3))
    while amid and not list(directory.glob(f".checkpoint.pt.{child}.tmp")):
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done += 1
    inside += any(str(child) in path.name for path in directory.glob(".*.tmp"))
    assert not (directory / "record.json").exists()
    state = load_checkpoint(directory / "checkpoint.pt")
    assert state is None or state["step"] >= step, "work of an earlier checkpoint is lost"
    step = state["step"] if state else 0
last = start(str(directory.parent))
assert os.waitpid(last, 0)[1] == 0
print(json.dumps({"kills": done, "inside": inside, "step": step, "directory": str(directory)}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_twenty_times_ends_as_the_one_that_is_not(tmp_path: Path) -> None:
    changes = {**TINY, "method.name": "semibaseline", "data.batch_unlabelled": 2, "train.steps": 60}
    changes |= {"runtime.checkpoint_minutes": 1e-9, "runtime.log_every": 5}
    script = [sys.executable, "-c", KILLER, json.dumps(changes), str(tmp_path / "plain"), "20"]
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert told["kills"] == 20 and told["inside"] >= 5 and 20 <= told["step"] < 60
    killed = Path(told["directory"])
    plain = tmp_path / "plain" / killed.name
    a, b = (load_file(directory / "checkpoint.pt")["method"] for directory in (plain, killed))
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    one, two = (load_record(directory / "record.json") for directory in (plain, killed))
    assert one.scores == two.scores and one.history == two.history
    assert (plain / "steps.jsonl").read_bytes() == (killed / "steps.jsonl").read_bytes()
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in plain.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_agree_on_a_step_by_the_clock_of_the_first_and_survive_a_kill(tmp_path: Path) -> None:
    changes = {**TINY, "method.name": "semibaseline", "train.steps": 40, "runtime.workers": 2}
    changes |= {"data.batch_labelled": 4, "data.batch_unlabelled": 4}
    plain = fit(override(RunConfig(), {**changes, "runtime.runs_dir": str(tmp_path / "plain")}))
    killed = {**changes, "runtime.runs_dir": str(tmp_path / "killed"), "runtime.checkpoint_minutes": 1e-9}
    words = [f"{path}={json.dumps(value) if isinstance(value, bool) else value}" for path, value in killed.items()]
    command = [sys.executable, "-m", "viladiff", "train", *words]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    path = tmp_path / "killed" / plain.record.run_id / "checkpoint.pt"
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert load_file(path)["step"] in (10, 20, 30) and not path.with_name("record.json").exists()
    again = fit(override(RunConfig(), killed))
    assert same(plain, again) and again.record.scores == plain.record.scores
    assert again.frame().equals(plain.frame())
