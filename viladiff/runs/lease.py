"""Leases: at most one process works on a run at a time, on one machine or on several that share the directory.

A lease is a file ``lease-<token>.json`` in the run's directory; its token is drawn anew each time and never used again.
To acquire one, a process writes its own file, then looks at the others, and withdraws if one of them is alive. Of two
that come at once, the later write is followed by a look that finds the earlier one, so never do both stay; that both
withdraw is possible, hence they try again after a random pause. Since no name is ever used twice, any process may
remove the file of a dead holder, any number of times, and can never hit a living one: a takeover needs no lock of its
own. Whether a holder is alive is read from the kernel on its own machine, from its heartbeat elsewhere.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from viladiff.core.atomic import machine, write_atomically
from viladiff.core.messages import one_line, printable
from viladiff.core.watchdog import start

HEARTBEAT = 10.0
"""Seconds between renewals."""
SILENT = 60.0
"""Seconds without a renewal, watched by one's own clock, after which a holder on another machine is taken for dead."""
LONG_DEAD = 1800.0
"""Seconds of age by the clock, after which two heartbeats need to be missed: a clock jumps, as after a suspension."""
PATIENCE = 5.0
"""Seconds to go on trying while others try too."""

_NAME = re.compile(r"lease-[0-9a-f]{32}\.json")


@dataclass(frozen=True)
class Holder:
    """The process that works on a run, according to its lease file."""

    host: str
    machine: str
    """Boot and process namespace: process numbers mean the same only where this is equal; empty where unknown."""
    pid: int
    started: int
    """Start of the process in clock ticks since boot; a process number is used again, with this it is not."""
    since: str
    """When the lease was taken, UTC."""

    def __str__(self) -> str:
        return one_line(f"process {self.pid} on {self.host} since {self.since}", 200)


class LeaseLostError(ValueError):
    """Another machine took this one for dead and has the run now; writing on would spoil its files."""


class HeartbeatMonitor:
    """When this process first saw each heartbeat of another machine, so that clocks are never compared."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[int, float]] = {}

    def silent(self, name: str, beat: int) -> float:
        """Return the seconds since ``beat``, the file's modification time in ns, was first seen unchanged."""
        now = time.monotonic()
        with self._lock:
            known = self._seen.get(name)
            if known is None or known[0] != beat:
                self._seen[name] = known = (beat, now)
        return now - known[1]

    def forget(self, name: str) -> None:
        with self._lock:
            self._seen.pop(name, None)


class Lease:
    """The right to work on a run until ``release``; a context manager. Not inherited by a forked child."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pid = os.getpid()
        self._done, self._lost = threading.Event(), threading.Event()
        self._beaten = time.time()
        threading.Thread(target=self._beat, name=f"lease of {path.parent.name}", daemon=True).start()

    @property
    def lost(self) -> bool:
        """True once another machine has taken over, after this one was silent for too long: stop and write nothing."""
        late = abs(time.time() - self._beaten) > 2 * HEARTBEAT
        if late and not self._lost.is_set() and not self._done.is_set():  # as after a suspension: sooner than it beats
            with suppress(OSError):
                if not self.path.exists():
                    self._lost.set()
        return self._lost.is_set()

    def check(self) -> None:
        """Raise LeaseLostError if another machine has taken over; read the file now, not at the next heartbeat."""
        if self._lost.is_set() or not self.path.exists():
            self._lost.set()
            raise LeaseLostError(
                f"{self.path.parent}: another machine took this over after this one was silent too long"
            )

    def release(self) -> None:
        """Release the lease; safe to call twice, and without effect in a forked child."""
        if os.getpid() == self._pid:
            self._done.set()
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT):
            try:
                os.utime(self.path)
                self._beaten = time.time()
            except FileNotFoundError:
                if not self._done.is_set():
                    self._lost.set()
                return
            except OSError:
                continue  # the file system may come back before others lose patience


def acquire(directory: Path, watch: HeartbeatMonitor) -> Lease | None:
    """Acquire a lease on ``directory``, creating it if missing; None if another process holds or wins it.

    Safe between threads, processes and machines; a dead holder's lease is removed.
    """
    until = time.monotonic() + PATIENCE
    pause = 0.002
    while not _held(directory, watch):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"lease-{secrets.token_hex(16)}.json"
        try:
            write_atomically(path, json.dumps(asdict(_self()), indent=1).encode())
            alone = {found.path for found in _held(directory, watch)} == {path}
        except BaseException:
            with suppress(OSError):  # as the first error, in a directory that cannot be written
                path.unlink(missing_ok=True)
            raise
        if alone:
            return Lease(path)
        path.unlink(missing_ok=True)
        if time.monotonic() > until:
            return None
        time.sleep(random.uniform(0, pause))
        pause = min(2 * pause, 0.2)
    return None


def acquire_or_raise(directory: Path) -> Lease:
    """Acquire with ``take_or_wait``. Raises ValueError that names the holder if another process has the directory."""
    watch = HeartbeatMonitor()
    lease = take_or_wait(directory, watch)
    if lease is None:
        holders = [str(holder) for holder in live_leases(directory, watch).values() if holder is not None]
        who = holders[0] if holders else "another process"
        raise ValueError(f"{directory}: run is locked by {who}; wait for it to finish or stop it")
    return lease


def take_or_wait(directory: Path, watch: HeartbeatMonitor) -> Lease | None:
    """Acquire a lease, waiting while the holder's state is unknown; None once a holder is known to be alive.

    After a restart of the machine or the container, the lease of a dead run looks like one of another machine. Its
    heartbeat is watched until there is one or SILENT seconds have passed, counted down on stderr. Ctrl-C leaves the
    lease unchanged.
    """
    if directory.is_dir() and not os.access(directory, os.W_OK | os.X_OK):  # said before the wait, not after it
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))
    first: dict[Path, int] = {}
    with _countdown(directory) as show:
        while (lease := acquire(directory, watch)) is None:
            held = [found for found in read_leases(directory, watch) if not found.sure]
            if any(_lives(found.holder) or first.setdefault(found.path, found.beat) != found.beat for found in held):
                return None
            if held:
                show(held[0].holder, max(_left(found, watch) for found in held))
            time.sleep(min(1.0, SILENT / 10))
    return lease


@contextmanager
def _countdown(directory: Path) -> Iterator[Callable[[Holder | None, float], None]]:
    """Show the holder and the longest remaining wait in seconds: in place on a terminal, else from time to time."""
    terminal, spoken = sys.stderr.isatty(), math.inf

    def show(holder: Holder | None, left: float) -> None:
        nonlocal spoken
        if terminal or spoken - left >= HEARTBEAT:
            spoken = left
            who = f"locked by {holder or 'another process'}, on another machine or before a restart"
            line = printable(
                f"{directory.name}: {who}; taken over in {max(left, 0):.0f} s unless its heartbeat changes"
            )
            print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if terminal and spoken < math.inf:
            print(file=sys.stderr, flush=True)


def live_leases(directory: Path, watch: HeartbeatMonitor) -> dict[Path, Holder | None]:
    """Return leases on ``directory`` whose holder is or may be alive; None: unreadable. Remove nothing."""
    return {found.path: found.holder for found in read_leases(directory, watch) if not found.dead}


def held(directory: Path, watch: HeartbeatMonitor) -> bool:
    """Return whether ``acquire`` would find a holder, which may be dead and needs longer observation."""
    return bool(_held(directory, watch))


def _held(directory: Path, watch: HeartbeatMonitor) -> list[FoundLease]:
    """Return leases that nobody may take over; remove the others, if permitted."""
    seen = read_leases(directory, watch)
    for found in seen:
        if found.sure:
            with suppress(OSError):  # another user's: it stays, without effect
                found.path.unlink(missing_ok=True)
                watch.forget(found.path.name)
    return [found for found in seen if not found.sure]


class FoundLease(NamedTuple):
    """A lease as it was seen."""

    path: Path
    holder: Holder | None
    """None where it cannot be read."""
    beat: int
    """The file's modification time in ns."""
    dead: bool
    """Whether the holder is, as far as one look tells."""
    sure: bool
    """Whether it is also certain enough to take the run over."""


def read_leases(directory: Path, watch: HeartbeatMonitor) -> list[FoundLease]:
    """Return each lease on ``directory``; remove nothing."""
    try:
        names = [name for name in os.listdir(directory) if _NAME.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []  # of a directory that cannot be read, no lease can be had either: nobody sees to be alone in it
    found = []
    for name in sorted(names):
        path = directory / name
        try:
            beat, text = path.stat().st_mtime_ns, b""
            with suppress(PermissionError, IsADirectoryError):  # another user's: its heartbeat has to do
                text = path.read_bytes()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                continue  # released between the two looks; on a network file system the second one is stale
            raise
        found.append(_judged(path, _parse(text), beat, watch))
    return found


def _parse(text: bytes) -> Holder | None:
    try:
        fields = json.loads(text)
        holder = Holder(**fields)
    except (ValueError, TypeError, RecursionError):
        return None
    whole = type(holder.pid) is int and type(holder.started) is int
    whole = whole and all(type(text) is str for text in (holder.host, holder.machine, holder.since))
    return holder if whole and 0 < holder.pid < 2**31 else None


def _judged(path: Path, holder: Holder | None, beat: int, watch: HeartbeatMonitor) -> FoundLease:
    alive, silent = _lives(holder), watch.silent(path.name, beat)
    if alive is not None:
        return FoundLease(path, holder, beat, not alive, not alive)  # one that is stopped is silent and may still go on
    return FoundLease(
        path, holder, beat, silent > SILENT or _aged(beat), silent > (2 * HEARTBEAT if _aged(beat) else SILENT)
    )


def _aged(beat: int) -> bool:
    return time.time() - beat / 1e9 > LONG_DEAD


def _left(found: FoundLease, watch: HeartbeatMonitor) -> float:
    """Return the seconds of silence after which it may be taken over."""
    return (2 * HEARTBEAT if _aged(found.beat) else SILENT) - watch.silent(found.path.name, found.beat)


def _lives(holder: Holder | None) -> bool | None:
    """Return whether the process runs, according to this machine's kernel; None if only the heartbeat can tell."""
    if holder is None or not holder.machine or holder.machine != machine():
        return None
    started = start(holder.pid)
    if started is not None:
        return started == holder.started
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return None  # another user's, hidden from us
    return start(holder.pid) == holder.started or _dying(holder.pid)  # a zombie, or it came just now


def _dying(pid: int) -> bool:
    """Return whether threads of a killed process remain, whose last write may not be over though it is a zombie."""
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    return False


def _self() -> Holder:
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Holder(socket.gethostname(), machine(), os.getpid(), start(os.getpid()) or 0, since)
