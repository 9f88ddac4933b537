"""Tune's own schedulers as judges of a sweep: they decide, and nothing of theirs stops a process.

In Tune a scheduler's STOP ends a trial by raising inside it, which can leave behind a nested trainer's processes, and
its PAUSE lives in Tune's own snapshots, which a killed driver loses. Here a scheduler sees stand-ins for Tune's trials,
whose state is what the sweep's records say; its word becomes a flag that the training loop reads.
"""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.schedulers.hb_bohb import HyperBandForBOHB

from viladiff.study.search import Decision

TIME, VALUE = "rung_time", "value"


class Seat:
    """What a scheduler sees of a trial."""

    is_saving = False

    def __init__(self, number: int) -> None:
        self.number, self.trial_id, self.status = number, str(number), Trial.PENDING

    def __str__(self) -> str:
        return self.trial_id


class TuneJudge:
    """A judge of ``viladiff.study.search`` that asks a Tune scheduler; also the controller that the scheduler asks.

    The rungs are its time: 1, η, η², ... whatever shares of the training they stand for, so that η is the share of
    trials that go on (1 / η) at each of them.
    """

    def __init__(self, scheduler: TrialScheduler) -> None:
        self.scheduler: Any = scheduler  # which is given stand-ins for what it takes
        self.eta = int(getattr(scheduler, "_reduction_factor", 0) or getattr(scheduler, "_eta", 0))
        self.seats: dict[int, Seat] = {}
        self.exhausted = False
        self._dropped: list[int] = []

    # What a sweep asks

    def add(self, number: int) -> None:
        seat = self.seats[number] = Seat(number)
        self.scheduler.on_trial_add(self, seat)
        seat.status = Trial.RUNNING

    def hear(self, number: int, rung: int, value: float) -> Decision:
        seat = self.seats[number]
        if seat.status in (Trial.TERMINATED, Trial.ERROR):
            return "go"  # a finished run whose earlier values come all at once
        seat.status = Trial.RUNNING
        result = {TIME: self.eta**rung, VALUE: value}
        action = self.scheduler.on_trial_result(self, seat, result)
        if action == TrialScheduler.STOP:
            self.scheduler.on_trial_complete(self, seat, result)
            seat.status = Trial.TERMINATED
            return "stop"
        if action == TrialScheduler.PAUSE:
            seat.status = Trial.PAUSED
            return "pause"
        return "go"

    def lose(self, number: int) -> None:
        seat = self.seats[number]
        if seat.status in (Trial.RUNNING, Trial.PAUSED):
            seat.status = Trial.ERROR
            self.scheduler.on_trial_error(self, seat)

    def promoted(self, exhausted: bool) -> int | None:
        self.exhausted = exhausted
        seat = self.scheduler.choose_trial_to_run(self)
        if seat is None:
            return None
        seat.status = Trial.RUNNING
        return int(seat.number)

    def dropped(self) -> list[int]:
        found, self._dropped = self._dropped, []
        return found

    # What a scheduler asks of Tune's controller

    @property
    def search_alg(self) -> Any:
        return self

    searcher = search_alg

    def on_pause(self, trial_id: str) -> None:
        """Tune's searchers are told so that they ask for more; a sweep asks by itself."""

    def on_unpause(self, trial_id: str) -> None:
        """Likewise."""

    def get_trials(self) -> list[Any]:
        """A scheduler that sees nothing running closes brackets that are not full; not while new trials may come."""
        if self.exhausted:
            return list(self.seats.values())
        running = Seat(-1)
        running.status = Trial.RUNNING
        return [running]

    def stop_trial(self, seat: Seat) -> None:
        self._dropped.append(seat.number)
        self.scheduler.on_trial_remove(self, seat)
        seat.status = Trial.TERMINATED


class Asha(ASHAScheduler):
    """ASHA never pauses, so that there is nothing for it to choose."""

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        return None


def judge(kind: str, rungs: int, eta: int) -> TuneJudge:
    """``asha`` (stops what is below the best 1/η seen at a rung) or ``hyperband`` (brackets; pauses, promotes).

    Raises ValueError where there is only one rung.
    """
    if rungs < 2:
        raise ValueError(
            f"--scheduler {kind}: stops trials at rungs, and the sweep has one; give it rungs, or take none"
        )
    common: dict[str, Any] = {"time_attr": TIME, "metric": VALUE, "mode": "max", "max_t": eta ** (rungs - 1)}
    if kind == "asha":
        return TuneJudge(Asha(**common, grace_period=1, reduction_factor=eta, stop_last_trials=False))
    return TuneJudge(HyperBandForBOHB(**common, reduction_factor=eta))
