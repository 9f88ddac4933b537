"""The job queue: order, retries, and runs of other drivers, decided on one thread without Ray.

A run is handed out (``next_job``), reported on (``on_progress``) and returned (``on_result`` or ``on_worker_died``);
``poll`` handles runs that do not return by themselves. Retries: a process that died, ``settings.retries`` times; a
stalled run, once; too little memory, once, at the end and with nothing beside it; a loss that is not finite, an error,
or another name than planned, never, since it would end the same way. Attempts at which a run came further than ever
before are not counted against it, and neither is a machine that was taken away (a preemption).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from viladiff.runs.job import Event, ExecutionSettings, Outcome, PlannedRun
from viladiff.runs.store import Failure, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal["nan", "memory", "hang", "killed", "stale", "error"]

SETUP = 6
"""Rendering or reading a data set, and the first step, may take this many times ``stall_timeout``."""
LOOK = 1.0
"""Seconds between looks at runs that another driver has."""


@dataclass
class ActiveRun:
    """A run that is under way."""

    job: PlannedRun
    heard: float
    """Clock of the queue at the last sign of life."""
    place: tuple[str, int] | None = None
    """Node and process, once known."""
    step: int | None = None
    hung: bool = False


class JobQueue:
    """The state of one call of ``run_jobs``; nothing here blocks."""

    def __init__(
        self,
        jobs: Sequence[PlannedRun],
        store: Store,
        settings: ExecutionSettings,
        slots: int,
        tell: Callable[[Event], None],
    ) -> None:
        self.store, self.settings, self.slots, self._told = store, settings, slots, tell
        self.trouble: OSError | None = None
        """The first file that could not be written, as on a full disk; the queue stops, and its launcher raises it."""
        self.waiting = deque(jobs)
        self.alone: deque[PlannedRun] = deque()
        """Runs that ran out of memory beside others."""
        self.elsewhere: dict[str, tuple[PlannedRun, Failure | None]] = {}
        self.live: dict[str, ActiveRun] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.tries: dict[str, list[Kind]] = {}
        """Ends of each run's attempts since it last came further than before."""
        self.furthest: dict[str, int] = {}
        """The last step of each run's attempts, of those that ended early."""
        self.stopping = False
        self.asked_to_stop = False
        """Set by a signal handler, which must do no more than that."""
        self.clock, self._before, self._looked = 0.0, time.monotonic(), 0.0

    def tell(self, event: Event) -> None:
        """Send an event to whoever listens, who may write files."""
        self._write(lambda: self._told(event))

    def _write(self, do: Callable[[], None]) -> None:
        """Do what may write files; the launcher is in the middle of a call of Ray's, where nothing may be raised."""
        try:
            do()
        except OSError as error:
            self.trouble = self.trouble or error
            self.asked_to_stop = True

    # What the launcher asks

    @property
    def done(self) -> bool:
        """Nothing is under way and nothing more will be."""
        return not (self.live or self.waiting or self.alone or self.elsewhere)

    def drop_finished(self) -> None:
        """Drop finished runs from the queue, and set apart those that other processes hold."""
        for _ in range(len(self.waiting)):
            job = self.waiting.popleft()
            if not self._already(job):
                self.waiting.append(job)

    def next_job(self) -> PlannedRun | None:
        """Return a run to start now, if there is one and a free slot."""
        exclusive = any(name in self.tries and "memory" in self.tries[name] for name in self.live)
        if self.stopping or exclusive or len(self.live) >= self.slots:
            return None
        while self.waiting:
            job = self.waiting.popleft()
            if self._already(job):
                continue
            self.live[job.run_id] = ActiveRun(job, self.clock)
            return job
        if self.alone and not self.live and not self.elsewhere:
            job = self.alone.popleft()
            self.live[job.run_id] = ActiveRun(job, self.clock)
            return job
        return None

    def on_started(self, run_id: str) -> None:
        """Record that the run's process has started."""
        self.live[run_id].heard = self.clock
        self.tell(Event("started", run_id))

    def on_progress(self, run_id: str, news: dict[str, Any]) -> None:
        """Process a heartbeat, with ``node`` and ``pid`` at the start, ``step``, ``steps`` and ``loss`` later."""
        run = self.live.get(run_id)
        if run is None:
            return
        run.heard = self.clock
        if "node" in news:
            run.place = (str(news["node"]), int(news["pid"]))
        if news.get("step") is not None:
            run.step = int(news["step"])
            told: dict[str, Any] = {name: news.get(name) for name in ("step", "steps", "loss", "miou")}
            self.tell(Event("progress", run_id, **told))

    judges = False
    """Whether runs are to ask ``judged`` of each of their scores."""

    def should_stop(self, run_id: str, step: int, value: float | None) -> bool:
        """Process the score at a step; True stops the run there."""
        return False

    def on_result(self, run_id: str, result: dict[str, Any]) -> None:
        """Process a trial's result: ``state`` is done, stopped, elsewhere or failed (with ``kind`` and ``message``)."""
        run = self.live.pop(run_id)
        state = result["state"]
        if state == "elsewhere":
            self._leave(run.job)
        elif state == "failed":
            self._failed(run, result["kind"], result["message"])
        elif state == "stopped":
            self._end(Outcome(run_id, "stopped", attempts=self._attempts(run_id)), step=run.step)
        else:
            if self.store.failure(run_id) is not None:
                self.store.clear_failure(run_id)
            timing = {name: result.get(name) for name in ("began", "ended")}
            attempts = self._attempts(run_id) if timing["began"] else 0
            self._end(
                Outcome(run_id, "done", attempts=attempts, worker=_named(run.place), **timing), miou=result.get("miou")
            )

    def on_preempted(self, run_id: str, message: str) -> None:
        """Process the loss of a run's machine, which is no failure: it waits again, first in line."""
        run = self.live.pop(run_id)
        if self.stopping:
            self._end(Outcome(run_id, "stopped", attempts=self._attempts(run_id)), step=run.step)
            return
        self._again(run, f"preempted: {message}")

    def on_worker_died(self, run_id: str, message: str, memory: bool = False) -> None:
        """Process the loss of a run: its process died, was killed as stalled, or by Ray for lack of ``memory``."""
        run = self.live.pop(run_id)
        if self.stopping:
            self._end(Outcome(run_id, "stopped", attempts=self._attempts(run_id)), step=run.step)
            return
        trace = self.store.directory(run_id) / "hang.txt"
        hung = run.hung or (trace.is_file() and trace.stat().st_size > 0)
        if hung:
            stack = f"; where it stood: {trace}" if trace.is_file() and trace.stat().st_size else ""
            message = f"no sign of life for {self.settings.stall_timeout:g} s{stack}"
        self._failed(run, "hang" if hung else "memory" if memory else "killed", message)

    def poll(self) -> Iterator[tuple[str, tuple[str, int]]]:
        """Poll: take over abandoned runs; yield (run, (node, process)) of each stalled run, to be killed."""
        now = time.monotonic()
        # A driver that was itself stopped for a while must not think that everybody else was.
        self.clock += min(now - self._before, LOOK)
        self._before = now
        if self.clock - self._looked >= LOOK:
            self._looked = self.clock
            self._look_elsewhere()
        for run_id, run in self.live.items():
            # The run's own watchdog comes first and leaves a trace; this one is for a process that cannot act.
            patience = 1.25 * self.settings.stall_timeout * (SETUP if run.step is None else 1)
            if run.place and not run.hung and self.clock - run.heard > patience:
                run.hung = True
                yield run_id, run.place

    def request_stop(self) -> None:
        """Start nothing new and ask active runs to stop at a step, with a checkpoint."""
        self.stopping = True
        if self.live:
            runs, them = ("1 run", "it") if len(self.live) == 1 else (f"{len(self.live)} runs", "them")
            told = f"Stopping: {runs} will checkpoint at the next step. Press Ctrl-C again to kill {them}."
            self.tell(Event("note", "", message=told))
        others = [job for job, _ in self.elsewhere.values()]
        for job in (*self.waiting, *self.alone, *others):
            self._end(Outcome(job.run_id, "stopped", attempts=len(self.tries.get(job.run_id, []))))
        self.waiting.clear()
        self.alone.clear()
        self.elsewhere.clear()

    # How it decides

    def _already(self, job: PlannedRun) -> bool:
        """Return whether the run is done, or another process holds it."""
        record = self.store.get(job.run_id)
        if record is not None:
            self._end(Outcome(job.run_id, "done", attempts=0), miou=record.miou)
        elif self.store.held(job.run_id):
            self._leave(job)
        else:
            return False
        return True

    def _leave(self, job: PlannedRun) -> None:
        self.elsewhere[job.run_id] = (job, self.store.failure(job.run_id))
        self.tell(Event("elsewhere", job.run_id, message=f"{self.store.holder(job.run_id) or 'another driver'}"))

    def _look_elsewhere(self) -> None:
        for run_id, (job, before) in list(self.elsewhere.items()):
            if self.store.held(run_id):
                continue
            record = self.store.get(run_id)
            failure = self.store.failure(run_id)
            del self.elsewhere[run_id]
            if record is not None:
                self._end(Outcome(run_id, "done", attempts=0), miou=record.miou)
            elif failure is not None and failure != before and failure.kind in ("nan", "error"):
                self._end(Outcome(run_id, "failed", failure, attempts=0))
            else:
                self.waiting.appendleft(job)
                self.tell(Event("waiting", run_id, message="left by another driver"))

    def _failed(self, run: ActiveRun, kind: Kind, message: str) -> None:
        run_id = run.job.run_id
        tries = self.tries.setdefault(run_id, [])
        if kind in ("killed", "hang") and (run.step or 0) > self.furthest.get(run_id, 0):
            self.furthest[run_id] = run.step or 0
            tries[:] = [one for one in tries if one == "memory"]  # which would come again beside others
        tries.append(kind)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        failure = Failure(kind=kind, message=message, step=run.step, attempts=len(tries), when=now)
        if kind != "stale":  # then a run of this name is never asked for again
            self._write(lambda: self.store.record_failure(run_id, failure))
        allowed = {"killed": self.settings.retries, "hang": 1, "memory": 1}.get(kind, 0)
        if tries.count(kind) > allowed or self.stopping:
            self._end(Outcome(run_id, "failed", failure, len(tries)), step=run.step)
            return
        self._again(run, f"{kind}: {message}")

    def _again(self, run: ActiveRun, message: str) -> None:
        """Put a run back; one that met too little memory once stays alone, whatever happens to it next."""
        run_id = run.job.run_id
        if "memory" in self.tries.get(run_id, []):
            self.alone.append(run.job)
        else:
            self.waiting.appendleft(run.job)
        self.tell(Event("retry", run_id, step=run.step, message=message))

    def _attempts(self, run_id: str) -> int:
        return len(self.tries.get(run_id, [])) + 1

    def _end(self, outcome: Outcome, step: int | None = None, miou: float | None = None) -> None:
        self.outcomes[outcome.run_id] = outcome
        message = f"{outcome.failure.kind}: {outcome.failure.message}" if outcome.failure else ""
        event = Event(outcome.state, outcome.run_id, step=step, message=message)
        self.tell(replace(event, miou=miou))


def _named(place: tuple[str, int] | None) -> str:
    return "" if place is None else f"{place[0]}:{place[1]}"
