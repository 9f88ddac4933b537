"""Progress bars on a terminal, lines from time to time elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TypeVar

from viladiff.core.messages import print_text, printable

T = TypeVar("T")

Advance = Callable[[int, int], None]
"""Hears how many are done, and of how many."""


@contextmanager
def counter(title: str, show: bool) -> Iterator[Advance]:
    """Count on stderr from the first call on if it is a terminal; show nothing otherwise or without ``show``."""
    if not show or not sys.stderr.isatty():
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn
    from rich.progress import Progress as Bar

    bar = Bar(*Bar.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(escape(printable(title)), total=None)

    def advance(done: int, of: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=of)

    try:
        yield advance
    finally:
        bar.stop()


SAY_AFTER = 10.0
"""Seconds that something may take without a word."""


def tracked(items: Sequence[T], title: str) -> Iterator[T]:
    """Yield the items; show how far they are, with the time left, once all are expected to take over SAY_AFTER."""
    begun, progress = time.monotonic(), None
    with ExitStack() as stack:
        for done, item in enumerate(items):
            if progress is None and done and (time.monotonic() - begun) * len(items) / done > SAY_AFTER:
                progress = stack.enter_context(Progress(len(items), done, title, True))
            yield item
            if progress is not None:
                progress.advance()


class Progress:
    """Shows how far ``total`` steps are; writes to stderr, so that standard output stays for results."""

    def __init__(self, total: int, done: int, title: str, show: bool) -> None:
        self.total, self.done, self.title, self.show = total, done, title, show
        self.begun, self.first, self.spoken = time.monotonic(), done, time.monotonic()
        self.text = ""
        self.bar = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            ]
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(escape(printable(title)), total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def note(self, loss: float) -> None:
        """Show the newest loss beside the bar."""
        self.text = f"loss {loss:.3f}"

    def advance(self) -> None:
        """Count one more step."""
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=self.text)
        elif self.show and (time.monotonic() - self.spoken > 10 or self.done == self.total):
            self.spoken = time.monotonic()
            rate = (self.done - self.first) / (self.spoken - self.begun + 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            print_text(f"{self.title}: {self.done}/{self.total} {self.text}, {left:.0f} s left", error=True, flush=True)
