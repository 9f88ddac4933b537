"""A job queue whose runs come from a sweep's controller, with the retries, leases and heartbeats of a table's runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from viladiff.runs.job import Event, ExecutionSettings, Outcome, PlannedRun
from viladiff.runs.job_queue import ActiveRun, JobQueue, Kind
from viladiff.runs.store import Store
from viladiff.sweeps.controller import SweepController


class TrialQueue(JobQueue):
    """Asks a search for runs where there is room, and tells it how they ended."""

    def __init__(
        self,
        search: SweepController,
        store: Store,
        settings: ExecutionSettings,
        slots: int,
        tell: Callable[[Event], None] = lambda event: None,
        timeout: float | None = None,
        then: Callable[[], list[PlannedRun]] | None = None,
    ) -> None:
        """Create the queue. ``timeout``: seconds that all runs of a trial may take together in this call.

        ``then`` is called once for runs that follow from the result of the search.
        """
        super().__init__([], store, settings, slots, tell)
        self.search, self.timeout, self.then = search, timeout, then
        self.spent: dict[int, float] = {}
        self.began: dict[str, float] = {}

    judges = True

    @property
    def done(self) -> bool:
        return super().done and (self.stopping or (self.search.done and self.then is None))

    def prime(self) -> None:
        """Check whether there is anything to run, before Ray is started for it."""
        while not self.waiting and not self.elsewhere and not self.done:
            self.waiting.extend(self._work())
            self.drop_finished()

    def _work(self) -> list[PlannedRun]:
        jobs = self.search.next_runs()
        if not jobs and self.search.done and self.then is not None:
            then, self.then = self.then, None
            jobs = [] if self.search.hopeless else then()
        return jobs

    def next_job(self) -> PlannedRun | None:
        while True:
            job = super().next_job()
            if job is not None or self.stopping or self.waiting or self.alone or len(self.live) >= self.slots:
                return job
            more = self._work()
            if not more:
                return None
            self.waiting.extend(more)

    def on_started(self, run_id: str) -> None:
        self.began[run_id] = self.clock
        super().on_started(run_id)

    def should_stop(self, run_id: str, step: int, value: float | None) -> bool:
        return self.search.on_score(run_id, step, value)

    def poll(self) -> Iterator[tuple[str, tuple[str, int]]]:
        yield from super().poll()
        for run_id, run in self.live.items():
            if self.timeout is not None and run.place and not run.hung and self._spent(run_id) > self.timeout:
                run.hung = True
                yield run_id, run.place

    def _spent(self, run_id: str) -> float:
        number = self.search.owner.get(run_id, (-1, 0))[0]
        return self.spent.get(number, 0.0) + self.clock - self.began.get(run_id, self.clock)

    def _failed(self, run: ActiveRun, kind: Kind, message: str) -> None:
        if self.timeout is not None and kind == "hang" and self._spent(run.job.run_id) > self.timeout:
            self.tries.setdefault(run.job.run_id, []).append("hang")  # so that it is not tried again
            message = f"longer than --trial-timeout {self.timeout:g} s"
        super()._failed(run, kind, message)

    def _end(self, outcome: Outcome, step: int | None = None, miou: float | None = None) -> None:
        super()._end(outcome, step, miou)
        number = self.search.owner.get(outcome.run_id, (-1, 0))[0]
        self.spent[number] = self._spent(outcome.run_id)
        self.began.pop(outcome.run_id, None)
        self.waiting.extend(self.search.on_run_ended(outcome))
