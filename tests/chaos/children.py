"""Processes that the suite forks from itself, all modules loaded: in containers of their own, stopped, or killed."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos.hook import LIBC, MS_PRIVATE, MS_REC, install, mount

from viladiff.core.atomic import machine

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWPID = 0x00020000, 0x04000000, 0x20000000
PR_SET_PDEATHSIG = 1


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    if LIBC.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def may_unshare() -> bool:
    """Whether this machine lets us have namespaces: of mounts, of processes, of host names."""
    child = os.fork()
    if not child:
        try:
            unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS)
            mount("", Path("/"), "", MS_REC | MS_PRIVATE)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


class Child:
    """A forked process that runs ``do``; its words go to a pipe, and its exit status is what ``do`` returns."""

    def __init__(self, do: Callable[[], int], fault: dict[str, Any] | None = None, host: str = "") -> None:
        """``host``: the name of a container of its own, in which it is process 1; by default it is in ours."""
        reading, writing = os.pipe()
        told, tell = os.pipe()
        wait, self._go = os.pipe()
        self._words, self._told, self.text = reading, told, b""
        self.status: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            for descriptor in (reading, told, self._go):
                os.close(descriptor)
            given = None if fault is None else {**fault, "tell": tell, "wait": wait}
            os._exit(_enter(do, given, host, writing))
        for descriptor in (writing, tell, wait):
            os.close(descriptor)

    def at_the_place(self, seconds: float) -> bool:
        """Wait until it says that it is where its fault happens; False where it ended without."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._read(self._told, 0.1) == b"x":
                return True
            if self.ended():
                return False
        return False

    def go_on(self) -> None:
        os.write(self._go, b"x")

    def stopped(self, seconds: float) -> bool:
        """Wait until it is stopped by a signal; False where it ended without."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if found and os.WIFSTOPPED(status):
                return True
            if found:
                self.status = os.waitstatus_to_exitcode(status)
                return False
            self._drain()
            time.sleep(0.05)
        return False

    def ended(self) -> bool:
        self._drain()
        if self.status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self, seconds: float = 300) -> int:
        """Its exit status, negative after a signal. Raises TimeoutError, after killing it."""
        until = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"no end after {seconds} s: {self.said()[-500:]}")
            time.sleep(0.02)
        self._drain()
        for descriptor in (self._words, self._told, self._go):
            with suppress(OSError):
                os.close(descriptor)
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def said(self) -> str:
        return self.text.decode(errors="replace")

    def _drain(self) -> None:
        while more := self._read(self._words, 0):
            self.text += more

    def _read(self, descriptor: int, seconds: float) -> bytes:
        try:
            ready = select.select([descriptor], [], [], seconds)[0]
            return os.read(descriptor, 1 << 16) if ready else b""
        except (OSError, ValueError):
            return b""


def _enter(do: Callable[[], int], fault: dict[str, Any] | None, host: str, words: int) -> int:
    for number in (1, 2):
        os.dup2(words, number)
    # Those of the suite are at a place in a file, perhaps.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    try:
        if host:
            return _contained(do, fault, host)
        if fault is not None and fault.get("kind") == "read-only":
            unshare(CLONE_NEWNS)
            mount("", Path("/"), "", MS_REC | MS_PRIVATE)
        return _do(do, fault)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 70


def _contained(do: Callable[[], int], fault: dict[str, Any] | None, host: str) -> int:
    """Be the outside of a container: when this process dies, so does process 1 within, and with that all of them."""
    unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS)
    mount("", Path("/"), "", MS_REC | MS_PRIVATE)
    inner = os.fork()
    if not inner:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        socket.sethostname(host)
        mount("proc", Path("/proc"), "proc", 0)
        machine.cache_clear()
        try:
            os._exit(_do(do, fault))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(70)
    return abs(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]))


def _do(do: Callable[[], int], fault: dict[str, Any] | None) -> int:
    if fault is not None:
        install(fault)
    try:
        status = do()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(status or 0)
