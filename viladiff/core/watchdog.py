"""Watchdog that kills a dead driver's Ray processes and removes its temporary directory.

Run as a program, by its path and without site packages, so that it costs some milliseconds and a few megabytes. Ray's
own processes notice the death of their driver, but some only after a minute.
"""

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

DONE = "done"


class Reaper:
    """The driver's end: ``watch`` names processes, ``dismiss`` after a tidy end."""

    def __init__(self, directory: Path) -> None:
        """Start the watchdog; ``directory`` is removed with the driver."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is not meant for it
        )

    def watch(self, pids: list[int]) -> None:
        """Name processes to be killed if the driver dies; a later process of the same number is not touched."""
        self._say(json.dumps([[pid, began] for pid in pids if (began := start(pid)) is not None]))

    def dismiss(self) -> None:
        """End the watchdog after the driver's own cleanup."""
        self._say(DONE)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


def start(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None where there is none, or only its remains.

    A number is used again; with its start it names one process.
    """
    try:
        # The name of the program stands in brackets and may hold anything, also brackets and spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZXx" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def descendants(*pids: int) -> list[int]:
    """Return children of processes, their children, and so on; empty if the system does not tell."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, new = set[int](), set(pids)
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def main(directory: str) -> None:
    """Wait for the driver's dismissal or its death, which closes the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    named: list[list[int]] = []
    for line in sys.stdin:
        if line.strip() == DONE:
            return
        named = json.loads(line)
    for pid, began in named:
        if start(pid) == began:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    for _ in range(20):  # the last of the processes may still be writing
        shutil.rmtree(directory, ignore_errors=True)
        if not os.path.exists(directory):
            return
        time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1])
