"""How long training waits for batches, and how many processes decode: by the cores first, then by that wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeVar

import torch

from viladiff.config.sections import Sections
from viladiff.core.environment import visible_cpus

T = TypeVar("T")

MINUTE = 60.0
"""Seconds after the first batch in which processes are added."""
WINDOW = 5.0
"""Seconds of a measurement that another process is started by."""
BEHIND = 0.1
"""Share of a window's time in which training waited, from which more processes are started."""
LIMITING = 0.2
"""Share from which the loader is called the limit of a run."""


class LoaderPace:
    """The time in which training waited for batches, as its own thread sees it.

    The first batch of a stream does not count: its wait is that for processes to start. On a GPU the host waits as long
    as the device has nothing to do only once it has launched all that came before; over many steps both are the same.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.waited: float | None = 0.0
        """Seconds of all legs of a run; None where an earlier one did not note it."""
        self._clock = clock
        self._start: float | None = None
        self._window = 0.0, 0.0
        """Start of the time since the last change, and the seconds waited in it."""
        self._judged = False

    def timed(self, batches: Generator[T, None, None]) -> Generator[T, None, None]:
        """Yield the same items and measure how long each took to come; closes ``batches`` at the end."""
        self._start = None
        with closing(batches):
            while True:
                asked = self._clock()
                try:
                    item = next(batches)
                except StopIteration:
                    return
                self._note(asked, self._clock())
                yield item

    def _note(self, asked: float, came: float) -> None:
        if self._start is None:
            self._start, self._window = came, (came, 0.0)
            return
        if self.waited is not None:
            self.waited += came - asked
        self._window = self._window[0], self._window[1] + came - asked

    def behind(self) -> bool:
        """Return whether more processes are due, within the first minute; if so, the next window begins."""
        now = self._clock()
        if self._start is None or now - self._start > MINUTE or now - self._window[0] < WINDOW:
            return False
        if self._share(now) <= BEHIND:
            return False
        self._window = now, 0.0
        return True

    def verdict(self) -> float | None:
        """Return once, after the first minute, the share waited since the last change of processes; else None."""
        now = self._clock()
        if self._judged or self._start is None or now - self._start < MINUTE or now - self._window[0] < WINDOW:
            return None
        self._judged = True
        return self._share(now)

    def _share(self, now: float) -> float:
        return self._window[1] / (now - self._window[0])


def decoding_cores(cfg: Sections) -> int:
    """Return the cores of this worker: ``runtime.cores`` or ``threads``, or its share of those that it may use."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", cfg.runtime.workers))
    return cfg.runtime.cores or cfg.runtime.threads or visible_cpus() // here


def decoding_processes(cfg: Sections, device: torch.device) -> tuple[int, int]:
    """Return how many processes decode at first, and how many at most; a process decodes some 150 images a second.

    Both are ``runtime.loader_workers`` where that is set. None start where the network itself runs on the CPU. Beside a
    GPU half of the cores start, four at most, and all but one may be used; of fewer than four cores none starts at
    first, since the thread that prepares batches decodes as well.
    """
    runtime = cfg.runtime
    if runtime.loader_workers is not None:
        return runtime.loader_workers, runtime.loader_workers
    cores = decoding_cores(cfg)
    if device.type == "cpu":
        return 0, 0
    return (0 if cores < 4 else min(cores // 2, 4)), max(0, min(cores - 1, 64))


def limit_note(share: float, processes: int, cores: int) -> str:
    """Return the sentence that the loader is the limit of a run."""
    who = f"{processes} decoding process{'es' * (processes != 1)}" if processes else "its own thread decoding"
    return (
        f"the loader is the limit: in its first minute training waited {100 * share:.0f} % of the time for images, "
        f"with {who} on {cores} core{'s' * (cores != 1)}; runtime.picture_cache=true, more cores for the run "
        "(runtime.cores) or more processes (runtime.loader_workers) help"
    )
