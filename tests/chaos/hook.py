"""One fault at one durable write, fired inside the process that writes: what ``suite`` and its children install.

A durable write begins with the opening of its file (or of the temporary one), is half done when its data are flushed
with fsync, and is over after the rename that puts it in place, or after the fsync of an appended log. The three places
``before``, ``during`` and ``after`` are these. ``open``, ``os.fsync``, ``os.link``, ``os.replace`` and ``os.rename``
are wrapped to count them; nothing else of the program is changed.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import json
import os
import re
import resource
import signal
import stat
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PLACES = ("before", "during", "after")
VARIABLE = "VILADIFF_TESTS_FAULT"
"""Environment of a process that Python starts with a fault: the JSON of ``Fault``'s fields."""
STEP = 1800.0
"""Seconds of a step of the clock."""

_TEMPORARY = re.compile(r"\.(.+?)\.\d+\.(?:[0-9a-f]{8}\.|(prev)\.)?tmp")
_KINDS = (
    (r"lease-[0-9a-f]{32}\.json", "lease"),
    (r"steps\.jsonl", "step log"),
    (r"checkpoint\.prev\.pt", "previous checkpoint"),
    (r"checkpoint\.pt", "checkpoint"),
    (r"record\.json", "record"),
    (r"pictures\.npz", "pictures"),
    (r"failure\.json", "failure note"),
    (r"plan-.*\.json", "plan"),
    (r"\d{6}\.json", "trial"),
    (r"sweep\.json", "sweep's definition"),
    (r"optuna\.journal", "study's journal"),
    (r"job\.json", "captioning job"),
    (r"part-[0-9a-f]{16}\.parquet", "captions' part"),
    (r".*\.parquet", "captions"),
    (r"manifest\.json", "cache's manifest"),
    (r".*\.npy", "cache's array"),
    (r"index\.html", "page"),
    (r".*\.(?:svg|png)", "figure"),
    (r".*\.(?:csv|md|toml)", "page's table"),
)
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
LIBC = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    """mount(2). Raises OSError."""
    words = (source.encode(), os.fsencode(target), kind.encode(), flags, options.encode())
    if LIBC.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[4]):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def file_kind(path: str) -> str | None:
    """What a path is of, by its name or that of the file for which it is temporary; None of no durable file."""
    name = os.path.basename(path)
    if found := _TEMPORARY.fullmatch(name):
        name = "checkpoint.prev.pt" if found[2] else found[1]
    return next((kind for pattern, kind in _KINDS if re.fullmatch(pattern, name)), None)


class Hook:
    """Counts durable writes below ``root``; at the ``nth`` of ``file`` at ``place`` the fault ``kind`` happens, once.

    fault: root, kind, place, file, nth; ``size`` of the file undisturbed; ``marker``, a file that says that it has
    happened; ``victim`` of a kill (worker, raylet, driver); ``tell`` and ``wait``, descriptors of the suite. Without
    a kind it notes each event in ``seen`` instead.
    """

    def __init__(self, fault: dict[str, Any]) -> None:
        self.fault, self.root = fault, str(fault["root"]) + "/"
        self.counts: Counter[tuple[str, str]] = Counter()
        self.seen: list[tuple[str, str, int]] = []
        self.begun: dict[str, int] = {}
        self.pid = os.getpid()

    def event(self, place: str, path: str, size: int = 0, descriptor: int | None = None) -> None:
        """A durable write of ``path`` has come to ``place``."""
        kind = file_kind(path) if path.startswith(self.root) else None
        if kind is None:
            return
        self.seen.append((place, kind, size))
        fault = self.fault
        # A full disk half way must be full before the data are written, which is where the file is opened.
        early = fault.get("kind") == "full disk" and fault["place"] == "during"
        if not fault.get("kind") or kind != fault["file"] or place != ("before" if early else fault["place"]):
            return
        self.counts[place, kind] += 1
        if self.counts[place, kind] == fault["nth"] and self._first():
            self._happen(path, descriptor)

    def _first(self) -> bool:
        try:
            os.close(os.open(self.fault["marker"], os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def _happen(self, path: str, descriptor: int | None) -> None:
        kind, place = self.fault["kind"], self.fault["place"]
        if kind == "kill":
            self._kill()
        elif kind == "torn":
            self._tear(path, descriptor)
        elif kind == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path if place == "before" else None)
        elif kind == "full disk":
            self._fill(path)
        elif kind == "read-only":
            root = Path(self.fault["root"])
            mount(str(root), root, "", MS_BIND)
            mount("", root, "", MS_BIND | MS_REMOUNT | MS_RDONLY)
        elif kind == "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "clock":
            step_clock(STEP if self.fault["seed"] % 2 else -STEP)
        elif kind in ("container", "two hosts"):
            os.write(self.fault["tell"], b"x")
            os.read(self.fault["wait"], 1)

    def _kill(self) -> None:
        victim, pid = self.fault.get("victim"), os.getpid()
        if victim == "raylet":
            pid = os.getppid()  # which starts the workers
        elif victim == "driver":
            pid = int(Path(self.fault["driver"]).read_text())
        os.kill(pid, signal.SIGKILL)

    def _tear(self, path: str, descriptor: int | None) -> None:
        """What the machine had written when it lost its power: nothing, a half, or all but a byte."""
        if descriptor is not None:
            start, end = self.begun.get(path, 0), os.fstat(descriptor).st_size
            kept = {"before": 0, "during": (end - start) // 2, "after": max(0, end - start - 1)}[self.fault["tear"]]
            os.truncate(path, start + kept)
        os.kill(os.getpid(), signal.SIGKILL)

    def _fill(self, path: str) -> None:
        """Fill the disk, really where it is small, leaving half of what the file needs; else the kernel's limit."""
        half = self.fault["size"] // 2 if self.fault["place"] == "during" else 0
        here = os.path.getsize(path) if os.path.exists(path) else 0
        if not self.fault.get("disk") or 0 < half < 8192:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(1, here + half), -1))
            return
        fill(Path(self.fault["disk"]), half)


def fill(disk: Path, leave: int) -> None:
    """Fill a file system up to ``leave`` bytes with a file ``ballast``."""
    descriptor, place = os.open(disk / "ballast", os.O_CREAT | os.O_WRONLY), 0
    free = os.statvfs(disk)
    size = max(0, free.f_bavail * free.f_bsize - leave)
    while size >= 4096:
        with suppress(OSError):
            os.posix_fallocate(descriptor, place, size)
            place += size
            continue
        size //= 2
    os.close(descriptor)


def step_clock(seconds: float) -> None:
    """Shift this process's clock of the day."""
    real = time.time
    time.time = lambda: real() + seconds
    time.time_ns = lambda: int((real() + seconds) * 1e9)


def install(fault: dict[str, Any]) -> Hook:
    """Wrap what files are written with, for the rest of this process; return what counts."""
    hook = Hook(fault)
    plain_open, fsync, link = builtins.open, os.fsync, os.link

    def opened(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if isinstance(file, str | os.PathLike) and set(mode) & set("wax"):
            path = os.path.abspath(os.fspath(file))
            hook.event("before", path)
            hook.begun[path] = os.path.getsize(path) if "a" in mode and os.path.exists(path) else 0
        return plain_open(file, mode, *rest, **named)

    def synced(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        found = os.fstat(number)
        path = "" if stat.S_ISDIR(found.st_mode) else os.readlink(f"/proc/self/fd/{number}")
        if path:
            hook.event("during", path, found.st_size, number)
        fsync(descriptor)
        if path and not _TEMPORARY.fullmatch(os.path.basename(path)) and "/." not in path:
            hook.event("after", path)

    def linked(source: Any, target: Any, **named: Any) -> None:
        path = os.path.abspath(os.fspath(target))
        hook.event("before", path)
        link(source, target, **named)
        hook.event("during", path)

    def moved(plain: Callable[..., None]) -> Callable[..., None]:
        def move(source: Any, target: Any, **named: Any) -> None:
            plain(source, target, **named)
            path = os.path.abspath(os.fspath(target))
            if os.path.isdir(path):
                for name in sorted(os.listdir(path)):
                    hook.event("after", f"{path}/{name}")
            else:
                hook.event("after", path)

        return move

    builtins.open = io.open = opened  # type: ignore[assignment]
    os.fsync, os.link = synced, linked  # type: ignore[assignment]
    os.replace, os.rename = moved(os.replace), moved(os.rename)
    return hook


def install_from_environment() -> None:
    """Install the fault that the environment asks for, if any."""
    text = os.environ.get(VARIABLE)
    if text:
        install(json.loads(text))
