"""Kills of Ray's processes, for which the commands start Ray really: a worker, the raylet, the driver."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos.hook import VARIABLE
from chaos.targets import ROOT, collect_garbage, contents

VICTIMS = ("kill of worker", "kill of raylet", "kill of driver")
TINY = ("--", "model.pretrained=none", "train.steps=3", "eval.max_images=2", "runtime.checkpoint_every=1")
TINY += ("runtime.log_every=1", "data.batch_labelled=2", "eval.boundary=false")
TABLE = ("ablations/run_table5.py", "--scale", "smoke", "--rows", "supervised", "--columns", "1")
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "table of Ray": (TABLE, TINY),
    "TorchTrainer": ((*TABLE, "--workers", "2"), TINY),
    "sweep of Ray": (
        ("tune/sweep_lambda.py", "--scale", "smoke", "--sampler", "random", "--trials", "1", "--no-finals"),
        (*TINY, "data.batch_unlabelled=2", "model.decoder_width=16"),
    ),
}
FILES = ("step log", "checkpoint", "record")
"""Of a worker; its own lease and the driver's have one kind of name."""


def place_of(work: Path) -> dict[str, Path]:
    """Directories of a command: of its files, of Ray."""
    return {"root": work / "w", "scratch": work / "t"}


def start(target: str, work: Path, fault: dict[str, Any] | None = None) -> subprocess.Popen[str]:
    """The command in a session of its own; ``fault`` goes to every process of Python that it starts."""
    where = place_of(work)
    for place in where.values():
        place.mkdir(parents=True, exist_ok=True)
    words, fields = COMMANDS[target]
    given = ["--runs-dir", str(where["root"] / "runs"), "--report-dir", str(where["root"] / "page")]
    env = {**os.environ, "TMPDIR": str(where["scratch"]), "OMP_NUM_THREADS": "1"}
    if fault is not None:
        env |= {VARIABLE: json.dumps(fault)}
        env["PYTHONPATH"] = f"{Path(__file__).with_name('site')}:{env.get('PYTHONPATH', '')}"
    script = [sys.executable, str(ROOT / words[0])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(
        [*script, *words[1:], *given, *fields], env=env, text=True, start_new_session=True, cwd=ROOT, **pipes
    )  # type: ignore[call-overload]
    (work / "driver").write_text(str(process.pid))
    return process


def finished(process: subprocess.Popen[str], seconds: float) -> str:
    """What it said, at its end. Raises TimeoutExpired, after killing it."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise


def whole(target: str, work: Path) -> dict[str, str]:
    """The files of the command without a fault. Raises RuntimeError if it fails."""
    process = start(target, work)
    said = finished(process, 600)
    if process.returncode:
        raise RuntimeError(f"{target}: failed without a fault: {said[-2000:]}")
    collect_garbage(work / "w")
    found = contents(work / "w")
    # A page's pictures and costs are of times, and are compared where runs are made up.
    return {name: "" if name.startswith("page/") or name.endswith("sweep.json") else d for name, d in found.items()}


def strike(kind: str, told: dict[str, Any], target: str, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The command with the fault, and again; also what of Ray is left. Raises RuntimeError for what must not be."""
    fault = {**told, "kind": "kill", "victim": kind.removeprefix("kill of "), "driver": str(work / "driver")}
    process = start(target, work, fault)
    said = finished(process, 600)
    allowed = {"kill of driver": (-9,), "kill of worker": (0,), "kill of raylet": (0, 1, 2, 130)}[kind]
    if process.returncode not in allowed or ("Traceback" in said and kind != "kill of raylet"):
        raise RuntimeError(f"first: exit status {process.returncode}, expected {allowed}: {said[-1500:]}")
    first = {"status": process.returncode, "said": said[-900:]}
    again = start(target, work)
    said = finished(again, 600)
    left = remains(work)
    for pid in left["processes"]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left["processes"] or left["files"]:
        raise RuntimeError(f"left of Ray: {left}")
    return first, {"status": again.returncode, **({"said": said[-900:]} if again.returncode else {})}


def remains(work: Path) -> dict[str, Any]:
    """Processes and files of Ray that are still there half a minute after the command's end."""
    scratch, until = place_of(work)["scratch"], time.monotonic() + 30
    while True:
        pids = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if str(scratch) in _words(pid)]
        files = [str(path) for path in scratch.glob("viladiff-*")]
        if time.monotonic() > until or not (pids or files):
            return {"processes": pids, "files": files}
        time.sleep(0.2)


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def clear(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
