"""The controller of a sweep: next points, results of runs, early stopping. No Ray, no torch.

``trial_queue`` hands out the runs. All events are numbered and written before they count, so that a search reopened on
the same directory continues as if it had not been interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from viladiff.runs.job import Outcome, PlannedRun
from viladiff.runs.store import Store
from viladiff.sweeps.optuna_study import OptunaStudy
from viladiff.sweeps.space import Point
from viladiff.sweeps.trials import Rung, SeedStatistics, State, Trial, load_trials, save_trial

HOPELESS = 3
"""Trials that must have failed, and none done anything else, for a sweep to be given up."""


class SweepController:
    """The trials of one sweep. Nothing here blocks but sampling."""

    def __init__(
        self,
        directory: Path,
        asker: OptunaStudy,
        planned: Callable[[Point, int, str], PlannedRun],
        seeds: tuple[int, ...],
        steps: tuple[int, ...],
        wanted: int,
        store: Store,
        tell: Callable[[Trial], None] = lambda trial: None,
        held: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the controller.

        ``planned`` names the run of a point under a seed; ``steps`` are the rungs, the last full. ``held`` is called
        before anything is written, and raises if another driver has the sweep now.
        """
        self.directory, self.asker, self.planned = directory, asker, planned
        self.seeds, self.steps, self.wanted, self.store, self.tell = seeds, steps, wanted, store, tell
        self.held = held
        self.trials = load_trials(directory)
        self.tally, self.order = SeedStatistics(), 0
        self.owner: dict[str, tuple[int, int]] = {}
        """Trial and seed of each run that is under way."""
        self.first: dict[str, int] = {}
        """Trial by its first run's name, to tell twins by."""
        self.twins: dict[int, list[int]] = {}
        """Trials that wait for another one's end."""
        self.done = False
        """Nothing is under way and nothing more will be."""
        self.hopeless = ""
        self._exhausted = False
        self._failed_now, self._fine_now = 0, False
        asker.open(self.trials, steps[-1])
        self._again = self._recall()

    # Going on from records

    def _recall(self) -> list[Trial]:
        """Count the past events in order; return the trials that were running."""
        for trial in self.trials:
            self.order = max([self.order, trial.order, trial.ended or 0, *(rung.order for rung in trial.rungs)])
            if trial.twin is None:
                self.first.setdefault(trial.runs[trial.seeds[0]], trial.number)
            elif trial.state == "running":
                self.twins.setdefault(trial.twin, []).append(trial.number)
        for trial in sorted(self.trials, key=lambda trial: trial.ended or 0):
            self.tally.add(trial)
        return [trial for trial in self.trials if trial.state == "running" and trial.twin is None]

    # Handing out

    def next_runs(self) -> list[PlannedRun]:
        """Return the runs to start now; empty while waiting, or at the end (``done``)."""
        while not self.hopeless:
            job = self._next()
            if job is None:
                break
            if job:
                return job
        self.done = not self.owner
        return []

    def _next(self) -> list[PlannedRun] | None:
        """Return the jobs of one trial, empty if it ended at once; None if there is no trial to continue with."""
        if self._again:
            return self._go_on(self._again.pop(0))
        if len(self.trials) < self.wanted and not self._exhausted:
            return self._ask()
        return None

    def _ask(self) -> list[PlannedRun]:
        self.held()
        number = len(self.trials)
        asked = self.asker.ask(number, self.trials)
        if asked is None:
            self._exhausted = True
            return []
        point, origin = asked
        runs = {str(seed): self._job(number, point, seed).run_id for seed in self.seeds}
        twin = self.first.get(runs[str(self.seeds[0])])
        trial = Trial(number=number, point=point, runs=runs, order=self._tick(), origin=origin, twin=twin)
        self.trials.append(trial)
        self._save(trial)
        if twin is None:
            self.first[runs[str(self.seeds[0])]] = number
            return self._go_on(trial)
        if self.trials[twin].state == "running":
            self.twins.setdefault(twin, []).append(number)
        else:
            self._follow(trial)
        return []

    def _job(self, number: int, point: Point, seed: int) -> PlannedRun:
        return self.planned(point, seed, f"trial {number}, seed {seed}")

    def _go_on(self, trial: Trial) -> list[PlannedRun]:
        """Return the trial's next run; end the trial if there is none."""
        if trial.number in self.asker.stopped:
            self._finish(trial, "pruned", self._stopped_at(trial))
            return []
        left = [seed for seed in trial.seeds if seed not in trial.values]
        enough = self.tally.decided(list(trial.values.values())) if left else ""
        if not left or enough:
            self._finish(trial, "complete", enough)
            return []
        job = self._job(trial.number, trial.point, int(left[0]))
        if job.run_id != trial.runs[left[0]]:
            raise ValueError(
                f"trial {trial.number} of {self.directory} has the run {trial.runs[left[0]]}, which is now named "
                f"{job.run_id}: code, data or weights changed; use --study NAME for a new sweep"
            )
        self.owner[job.run_id] = (trial.number, int(left[0]))
        return [job]

    # Hearing

    def on_score(self, run_id: str, step: int, value: float | None) -> bool:
        """Process an intermediate score; True asks the run to stop here, with a checkpoint."""
        number, seed = self.owner.get(run_id, (-1, -1))
        if number < 0 or seed != self.seeds[0]:
            return False
        trial = self.trials[number]
        rungs = self._new_rungs(trial, [(step, value)])
        if rungs:
            self._save(trial)
            self.asker.report(trial, rungs)
        return number in self.asker.stopped

    def _new_rungs(self, trial: Trial, scores: Iterable[tuple[int, float | None]]) -> list[Rung]:
        """Add the scores at rungs that are not recorded yet."""
        known = {rung.step for rung in trial.rungs}
        new = [
            Rung(step=step, value=value, order=self._tick())
            for step, value in scores
            if step in self.steps and step not in known and value is not None and math.isfinite(value)
        ]
        trial.rungs += new
        return new

    def on_run_ended(self, outcome: Outcome) -> list[PlannedRun]:
        """Process the end of a run; return the next run of its trial, if any."""
        number, seed = self.owner.pop(outcome.run_id, (-1, -1))
        if number < 0:
            return []
        trial = self.trials[number]
        if outcome.state == "done":
            return self._scored(trial, seed, outcome.run_id)
        if outcome.state == "failed":
            why = f"{outcome.failure.kind}: {outcome.failure.message}" if outcome.failure else "unknown reason"
            self._finish(trial, "failed", f"seed {seed}: {why}")
        elif number in self.asker.stopped:
            self._finish(trial, "pruned", self._stopped_at(trial))
        else:
            self._again.append(trial)  # interrupted: the next call goes on with it
        return []

    def _scored(self, trial: Trial, seed: int, run_id: str) -> list[PlannedRun]:
        record = self.store.get(run_id)
        value = None if record is None else record.miou
        if record is None or value is None or not math.isfinite(value):
            self._finish(trial, "failed", f"seed {seed}: no mIoU was measured")
            return []
        # Written at once: a trial with a value is finished, whatever the pruner says of the scores on its way.
        first = seed == self.seeds[0]
        rungs = self._new_rungs(trial, [(one["step"], one["miou"]) for one in record.history]) if first else []
        trial.values[str(seed)] = value
        self._save(trial)
        self.asker.stopped.discard(trial.number)
        self.asker.report(trial, rungs)
        return self._go_on(trial)

    def _finish(self, trial: Trial, state: State, reason: str) -> None:
        trial.state, trial.reason, trial.ended = state, reason, self._tick()
        self._save(trial)
        self.asker.tell(trial)
        self.tally.add(trial)
        if state == "failed":
            self._failed_now += 1
            if self._failed_now >= HOPELESS and not self._fine_now:
                self.hopeless = f"the first {self._failed_now} trials all failed; the first of them: {self._worst()}"
        else:
            self._fine_now = True
        self.tell(trial)
        for number in self.twins.pop(trial.number, []):
            self._follow(self.trials[number])

    def _follow(self, trial: Trial) -> None:
        """End a trial as its twin ended."""
        assert trial.twin is not None
        other = self.trials[trial.twin]
        trial.rungs = [Rung(step=rung.step, value=rung.value, order=self._tick()) for rung in other.rungs]
        trial.values = dict(other.values)
        self.asker.report(trial, trial.rungs)
        trial.state, trial.reason, trial.ended = other.state, f"as trial {other.number}, of the same runs", self._tick()
        self._save(trial)
        self.asker.tell(trial)
        self.tell(trial)

    def _worst(self) -> str:
        """Return the first failure of this call, with its traceback if there is one."""
        trial = [one for one in self.trials if one.state == "failed"][-self._failed_now]
        trace = next(
            (path for run in trial.runs.values() if (path := self.store.directory(run) / "traceback.txt").is_file()),
            None,
        )
        return f"trial {trial.number}, {trial.reason}" + (f"\n{trace.read_text().rstrip()}" if trace else "")

    def _stopped_at(self, trial: Trial) -> str:
        return f"stopped at step {trial.rungs[-1].step} of {self.steps[-1]}" if trial.rungs else "stopped"

    def _save(self, trial: Trial) -> None:
        self.held()
        save_trial(trial, self.directory)

    def _tick(self) -> int:
        self.order += 1
        return self.order
