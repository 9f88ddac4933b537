"""Pools of processes that read or draw images, and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from viladiff.core.environment import visible_cpus


@contextmanager
def map_in_processes(processes: int | None, jobs: int) -> Iterator[Callable[..., Iterator[list[Any]]]]:
    """Provide ``map`` over this process or several, which end with the block in any case."""
    count = min(processes or visible_cpus(), jobs)
    if count < 2:
        yield map
        return
    # A fork costs no second import of everything; only Pillow and NumPy run in it.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(count, context, initializer=_follow, initargs=(os.getpid(),))
    try:
        yield pool.map
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of the {count} processes that read images has died, as when memory is short; try --processes 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow(parent: int) -> None:
    """Leave Ctrl-C to the parent process and end with it, also when it is killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
