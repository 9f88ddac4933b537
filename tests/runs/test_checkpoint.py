from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from viladiff.runs import checkpoint
from viladiff.runs.checkpoint import StepLog, load_checkpoint, load_file, previous, save_checkpoint


def training_state(step: int) -> dict[str, Any]:
    """What a run keeps: weights, optimiser, numbers, nested lists."""
    torch.manual_seed(step)
    net = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    net(torch.randn(4, 7)).square().mean().backward()
    optimizer.step()
    return {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "history": [{"miou": None}, (1, 2.5)],
    }


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_round_trip_is_exact_and_keeps_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert load_checkpoint(path) is None
    with pytest.raises(FileNotFoundError):
        load_file(path)
    for step in (1, 2, 3):
        save_checkpoint(path, training_state(step))
        assert_same(load_checkpoint(path), training_state(step))
    assert_same(load_file(previous(path)), training_state(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt"]
    path.unlink()
    assert_same(load_checkpoint(path), training_state(2))


def test_loaded_state_restores_module_and_optimizer(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", training_state(4))
    state = load_checkpoint(tmp_path / "c.pt")
    assert state is not None
    net = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    net.load_state_dict(state["net"])
    torch.optim.AdamW(net.parameters()).load_state_dict(state["optimizer"])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.99, 0.9999])
def test_truncated_file_is_one_clear_error(tmp_path: Path, share: float) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, training_state(1))
    save_checkpoint(path, training_state(2))
    data = path.read_bytes()
    size = int(len(data) * share)
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match=rf"checkpoint\.pt \({size} bytes\).*Delete it.*checkpoint\.prev\.pt"):
        load_checkpoint(path)
    path.unlink()
    assert_same(load_checkpoint(path), training_state(1))


def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, training_state(1), keep_previous=False)
    data = path.read_bytes()
    places = [0, len(data) - 1, len(data) - 20, len(data) - 45]
    places += random.Random(0).sample(range(len(data)), 30)
    for place in places:
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"checkpoint\.pt"):
            load_checkpoint(path)
    path.write_bytes(data)
    assert_same(load_checkpoint(path), training_state(1))


def test_bytes_appended_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, training_state(1))
    path.write_bytes(path.read_bytes() + path.read_bytes())
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(path)


class Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "pickle", "pickle4", "with checksum"])
def test_a_file_that_carries_code_is_refused_and_not_run(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, proof = tmp_path / "checkpoint.pt", tmp_path / "it-ran"
    evil = {"step": 1, "net": Payload(f"touch {proof}")}
    if form == "torch":
        torch.save(evil, path)
    elif form == "with checksum":
        monkeypatch.setattr(checkpoint, "_check_plain", lambda value, where: None)
        save_checkpoint(path, evil)
    else:
        path.write_bytes(pickle.dumps(evil, protocol=4 if form == "pickle4" else 2))
    with pytest.raises(ValueError, match=r"checkpoint\.pt carries code and is refused") as caught:
        load_checkpoint(path)
    assert not proof.exists()
    assert "weights_only" not in str(caught.value)  # torch's advice to load it all the same is not passed on
    if form == "pickle":
        pickle.loads(path.read_bytes())  # the payload is live: without the refusal it does run
        assert proof.exists()


def test_files_of_other_programs_and_formats_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="another program"):
        load_file(path)
    path.write_bytes(b"hello" * 100)
    with pytest.raises(ValueError, match=r"weights\.pt \(500 bytes\)"):
        load_file(path)
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    save_checkpoint(path, {"step": 1})
    monkeypatch.setattr(checkpoint, "VERSION", 1)
    with pytest.raises(ValueError, match="format 2"):
        load_file(path)


@pytest.mark.parametrize("value", [np.float64(1.0), np.arange(3), {1, 2}, Path("x"), nn.Linear(1, 1)])
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, value: object) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(ValueError, match=r"state\['a'\]\[1\]"):
        save_checkpoint(path, {"a": [0, value]})
    assert load_checkpoint(path) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_failed_write_leaves_the_old_state_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_every_byte_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("sync directory" if name.is_dir() else f"sync {name.suffix}")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        assert path.exists()  # no moment without a checkpoint
        events.append(f"rename to {target.name}")
        real_replace(source, target)
        assert path.exists()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save_checkpoint(path, {"step": 2})
    assert events == ["sync .tmp", "rename to checkpoint.prev.pt", "rename to checkpoint.pt", "sync directory"]


def test_previous_is_kept_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*names: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", unsupported)
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2):
        save_checkpoint(path, {"step": step})
    assert load_checkpoint(path) == {"step": 2} and load_file(previous(path)) == {"step": 1}


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.12345.tmp").write_bytes(b"half")
    (tmp_path / ".other.pt.12345.tmp").write_bytes(b"not ours")
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.pt.12345.tmp", "checkpoint.pt"]


SAVER = """
import sys, torch
from viladiff.runs.checkpoint import StepLog, save_checkpoint
log = StepLog(sys.argv[2])
for step in range(1, 10**6):
    log.append({"step": step - 1, "loss": 1 / step})
    log.flush()
    w = [torch.full((400, 400), step), torch.full((300, 300), float(step))]
    save_checkpoint(sys.argv[1], {"step": step, "w": w})
    if step == 1:
        print("ready", flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_whole_state(tmp_path: Path) -> None:
    path, log = tmp_path / "checkpoint.pt", tmp_path / "steps.jsonl"
    script = tmp_path / "saver.py"
    script.write_text(SAVER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(script), str(path), str(log)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    # One start of Python is dear, so the file is also checked while the saver is frozen at seeded moments.
    draw = random.Random(7)
    seen: list[int] = []
    torn = 0
    deadline = time.monotonic() + 120
    while (len(set(seen)) < 6 or torn < 3) and time.monotonic() < deadline:
        time.sleep(draw.uniform(0.0, 0.04))
        os.kill(process.pid, signal.SIGSTOP)
        torn += bool(list(tmp_path.glob(".*.tmp")))
        state = load_checkpoint(path)
        assert state is not None
        seen.append(state["step"])
        assert all(bool((w == state["step"]).all()) for w in state["w"])
        os.kill(process.pid, signal.SIGCONT)
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(set(seen)) >= 6 and torn >= 3  # several states were seen, and some stops were amid a write
    newest, older = load_checkpoint(path), load_file(previous(path))
    assert newest is not None and newest["step"] - older["step"] in (0, 1)
    StepLog(log).truncate_to(newest["step"])
    assert [row["step"] for row in StepLog(log).read()] == list(range(newest["step"]))


@pytest.mark.parametrize("seed", range(5))
def test_killed_process_leaves_what_the_next_one_needs(tmp_path: Path, seed: int) -> None:
    """Forked, since starting Python five times takes longer than everything else here."""
    path = tmp_path / "checkpoint.pt"
    child = os.fork()
    if child == 0:
        try:
            for step in range(1, 10**6):
                save_checkpoint(path, {"step": step, "w": torch.full((500, 500), step)})
        finally:
            os._exit(1)  # never back into the tests
    try:
        while not path.exists():
            time.sleep(0.001)
        time.sleep(random.Random(seed).uniform(0.01, 0.1))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    state = load_checkpoint(path)
    assert state is not None and bool((state["w"] == state["step"]).all())
    save_checkpoint(path, {"step": 0})
    assert load_checkpoint(path) == {"step": 0} and not list(tmp_path.glob(".*.tmp"))


def test_step_log_buffers_until_flush_and_reads_into_pandas(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps.jsonl")
    assert log.read() == []
    for step in range(3):
        log.append({"step": step, "loss": 0.5 / (step + 1), "miou": None})
    assert log.read() == []
    log.flush()
    log.append({"step": 3, "loss": 0.1})
    log.flush()
    frame = pd.DataFrame(StepLog(log.path).read())
    assert frame["step"].tolist() == [0, 1, 2, 3] and frame["loss"].iloc[1] == 0.25


def test_resume_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    log = StepLog(path)
    for step in range(6):
        log.append({"step": step})
    log.flush()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in log.read()] == [0, 1, 2, 3, 4, 5]
    log.append({"step": 99})  # not flushed before the crash
    log.truncate_to(4)
    log.append({"step": 4})
    log.flush()
    assert [row["step"] for row in log.read()] == [0, 1, 2, 3, 4]
    assert path.read_text().endswith('{"step": 4}\n')


def test_bad_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 0}\n{"stp": 1}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"steps\.jsonl, line 2"):
        StepLog(path).read()
    with pytest.raises(ValueError, match="step = None"):
        StepLog(path).append({"loss": 1})
    with pytest.raises(ValueError, match="Tensor"):
        StepLog(path).append({"step": 1, "loss": torch.tensor(1.0)})


@pytest.mark.parametrize("content", [b"x" * 100, b"", b"<html>not found</html>"])
def test_a_file_of_anything_is_called_damaged_and_not_code(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt \(\d+ bytes\) is truncated or damaged"):
        load_checkpoint(path)
