"""A table that fills in while it runs; without a terminal, a line from time to time and every failure at once.

Its input is events only, so that it shows the same for trials in other processes, on other machines, or in a test.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from viladiff.core.messages import format_seconds, printable
from viladiff.runs.job import Event
from viladiff.tables.plan import Plan

SPOKEN = 10.0
"""Seconds between lines where there is no terminal."""
SHOWN = 8
"""Runs under way that get a line; a screen has few."""
KEEP_TITLE = 200
"""Characters of a failure that are printed; all of it is in the run's directory."""


@dataclass
class RunStatus:
    """The state of one run."""

    state: str = "waiting"
    miou: float | None = None
    step: int = 0
    steps: int = 0
    loss: float | None = None
    begun: float | None = None
    """Clock at its start."""
    first: tuple[float, int] | None = None
    """Clock and step of the first word of this attempt; speed is measured from there."""
    message: str = ""


class LiveTable:
    """A context manager; ``hear`` takes the events of ``run_jobs``."""

    def __init__(
        self,
        plan: Plan,
        done: Mapping[str, float | None],
        concurrency: int | None,
        *,
        expected: float | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the view. ``done``: mIoU in [0, 1] of finished runs. ``expected``: seconds, until speed is measured.

        ``concurrency``: runs at the same time; None: as many as are active.
        """
        self.plan, self.concurrency, self.expected, self.clock = plan, concurrency, expected, clock
        self.console = console or Console(stderr=True)
        self.runs = {name: RunStatus(steps=run.steps) for name, run in plan.runs.items()}
        for name in done.keys() & self.runs.keys():
            self.runs[name] = RunStatus("done", done[name], plan.runs[name].steps, plan.runs[name].steps)
        self._rows = {cell.run_id: cell.row for cell in reversed(plan.cells)}
        self._took: dict[int, list[tuple[float, int]]] = {}
        """Seconds and steps of each run that was trained here, by row: rows differ in cost."""
        self._begun = self._spoken = clock()
        self._lock = threading.Lock()
        self._screen = Screen(console=self.console, get_renderable=self.render, refresh_per_second=2, transient=True)

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self._screen.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._screen.stop()
        self._line()

    def hear(self, event: Event) -> None:
        """Process an event; events of runs outside the plan are ignored."""
        if event.kind == "note":
            self.console.print(escape(printable(event.message)), style="yellow", highlight=False, soft_wrap=True)
            return
        with self._lock:
            run = self.runs.get(event.run_id)
            if run is None:
                return
            self._note(run, event)
        if event.kind in ("failed", "retry"):
            again = "again: " if event.kind == "retry" else ""
            text = (
                f"{event.kind if not again else 'trying'} {again}{self.plan.runs[event.run_id].title}: {event.message}"
            )
            self.console.print(
                escape(printable(text)[:KEEP_TITLE]), style="red" if not again else "yellow", highlight=False
            )
        if not self.console.is_terminal and self.clock() - self._spoken >= SPOKEN:
            self._line()

    def _note(self, run: RunStatus, event: Event) -> None:
        now = self.clock()
        if event.kind == "started":
            run.state, run.begun, run.first, run.loss = "running", now, None, None
        elif event.kind == "progress":
            run.state, run.step, run.steps = "running", event.step or 0, event.steps or run.steps
            run.loss = event.loss if event.loss is not None else run.loss
            run.first = run.first or (now, run.step)
        elif event.kind == "done":
            if run.begun is not None:
                # Of a run that went on from a checkpoint, only what was done here is known to have taken this long.
                since = 0 if run.first is None or run.first[1] * 4 < run.steps else run.first[1]
                row = self._rows.get(event.run_id, -1)
                self._took.setdefault(row, []).append((now - run.begun, max(1, run.steps - since)))
            run.state, run.miou, run.step = "done", event.miou, run.steps
        else:
            run.state = "waiting" if event.kind == "retry" else event.kind
            run.message = event.message

    # Numbers

    def count(self, *states: str) -> int:
        return sum(run.state in states for run in self.runs.values())

    def left(self) -> float | None:
        """Return the seconds to the end, from the speeds so far; None while there are none.

        A waiting run begins where a slot is free first, so the figure falls while any run goes on. Runs of another
        driver take no slot.
        """
        pace = self._pace(None)
        unknown = [run for run in self.runs.values() if run.state in ("waiting", "running", "elsewhere")]
        if not unknown:
            return 0.0
        if pace is None:
            return None if self.expected is None else max(0.0, self.expected - (self.clock() - self._begun))
        rest = {
            name: (self._pace(self._rows.get(name)) or pace) * (run.steps - run.step)
            for name, run in self.runs.items()
            if run in unknown
        }
        active = [rest[name] for name in rest if self.runs[name].state == "running"]
        slots = max(1, self.concurrency or self.count("running"))
        ends = sorted([0.0] * (slots - len(active)) + active)
        for name, run in self.runs.items():
            if run.state == "waiting":
                heapq.heapreplace(ends, ends[0] + rest[name])
        return max(ends + [rest[name] for name in rest if self.runs[name].state == "elsewhere"])

    def _pace(self, row: int | None) -> float | None:
        """Return a slot's seconds for each step, in this row or in all."""
        took = [pair for key, pairs in self._took.items() if row in (None, key) for pair in pairs]
        if not took:
            mine = [run for name, run in self.runs.items() if row in (None, self._rows.get(name))]
            took = [(self.clock() - run.first[0], run.step - run.first[1]) for run in mine if _moving(run)]  # type: ignore[index]
        steps = sum(count for _, count in took)
        return sum(seconds for seconds, _ in took) / steps if steps else None

    # Pictures

    def render(self) -> RenderableType:
        """Return the table, the active runs and a line of totals, cut to the terminal's height with a note.

        Half of the height is for active runs, of which few are shown, and the rest for rows, those with active runs
        first.
        """
        with self._lock:
            last = Text(self.totals(), style="bold")
            low = self.console.height - len(last.wrap(self.console, self.console.width))
            room = low if self.console.is_terminal else len(self.runs) + len(self.plan.rows)
            active = [name for name, run in self.runs.items() if run.state == "running"]
            half = max(1, room // 2)
            shown = len(active) if len(active) <= min(SHOWN, half) else min(SHOWN, half - 1)
            lines = shown + (len(active) > shown)
            free = room - lines - 2  # the title, and the columns' names
            rows = self._chosen(free if free >= len(self.plan.rows) else max(0, free - 1))
            parts: list[RenderableType] = [self._grid(rows)] if rows else []
            if len(rows) < len(self.plan.rows) and room > lines:
                parts.append(Text(f"and {len(self.plan.rows) - len(rows)} more rows", style="dim"))
            parts += [self._running(active, shown)] if active else []
            return Group(*parts, last)

    def _chosen(self, count: int) -> list[int]:
        """Return so many rows in order; if not all fit, those with active runs first."""
        at_work = {self._rows.get(name) for name, run in self.runs.items() if run.state == "running"}
        first = sorted(self.plan.rows, key=lambda row: row not in at_work)[:count]
        return [row for row in self.plan.rows if row in first]

    def _grid(self, rows: Sequence[int]) -> Grid:
        table = self.plan.table
        grid = Grid(title=escape(table.title), title_style="bold", title_justify="left", box=None, pad_edge=False)
        grid.add_column("", overflow="ellipsis", no_wrap=True, ratio=2)
        for column in self.plan.columns:
            label = escape(table.columns[column].label)
            grid.add_column(label, justify="right", no_wrap=True, overflow="ellipsis", ratio=1)
        for row in rows:
            cells = [self._cell(self.plan.run_ids(row, column)) for column in self.plan.columns]
            label = f"{table.row_numbers[row]:>2}  {table.rows[row].label}"
            grid.add_row(escape(label), *cells, style="dim" if table.rows[row].control else "")
        return grid

    def _cell(self, names: tuple[str, ...]) -> Text:
        """Return mean mIoU in points of the finished seeds, their number, and the state of the others."""
        runs = [self.runs[name] for name in names]
        scores = [run.miou for run in runs if run.state == "done" and run.miou is not None]
        text = Text()
        if scores:
            count = f" {len(scores)}/{len(runs)}" if len(scores) < len(runs) else ""
            text.append(f"{100 * sum(scores) / len(scores):.1f}{count}", style="green")
        for state, style, shown in (
            ("running", "cyan", ""),
            ("failed", "red", "failed"),
            ("elsewhere", "blue", "other"),
        ):
            some = [run for run in runs if run.state == state]
            if some:
                part = sum(run.step for run in some) / max(1, sum(run.steps for run in some))
                text.append(" " if text else "").append(shown or f"{part:.0%}", style=style)
        return text or Text("–" if any(run.state == "stopped" for run in runs) else "·", style="dim")

    def _running(self, active: Sequence[str], shown: int) -> Grid:
        grid = Grid.grid(padding=(0, 1), expand=True)
        grid.add_column(ratio=3, no_wrap=True, overflow="ellipsis")
        grid.add_column(ratio=2)
        for _ in range(3):
            grid.add_column(justify="right", no_wrap=True)
        for name in active[:shown]:
            run = self.runs[name]
            pace = self._own_pace(run)
            rest = "" if pace is None else format_seconds(pace * (run.steps - run.step))
            loss = "" if run.loss is None else f"loss {run.loss:.3f}"
            bar = ProgressBar(total=max(1, run.steps), completed=run.step)
            title = Text(self.plan.runs[name].title)
            grid.add_row(title, bar, f"{run.step}/{run.steps}" if run.step else "starting", loss, rest)
        if len(active) > shown:
            grid.add_row(Text(f"and {len(active) - shown} more", style="dim"))
        return grid

    def _own_pace(self, run: RunStatus) -> float | None:
        if not _moving(run):
            return None
        assert run.first is not None
        return (self.clock() - run.first[0]) / (run.step - run.first[1])

    def totals(self) -> str:
        """Return the overall progress in a line."""
        parts = [f"{self.count('done')} of {len(self.runs)} runs done"]
        for state in ("running", "failed", "stopped"):
            parts += [f"{self.count(state)} {state}"] if self.count(state) else []
        parts += [f"{self.count('elsewhere')} with another driver"] if self.count("elsewhere") else []
        left = self.left()
        if left is not None and self.count("waiting", "running", "elsewhere"):
            parts.append(f"{format_seconds(left)} left")
        return ", ".join([*parts, f"{format_seconds(self.clock() - self._begun)} so far"])

    def _line(self) -> None:
        self._spoken = self.clock()
        self.console.print(Text(self.totals()), highlight=False, soft_wrap=True)


def _moving(run: RunStatus) -> bool:
    return run.state == "running" and run.first is not None and run.step > run.first[1]
